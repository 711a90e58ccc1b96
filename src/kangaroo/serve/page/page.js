// The page: a chat that shows which tokens were drafted, and the same prompt with drafts and without.
// What the model writes goes into the page as text, never as markup.

const DEFAULTS = {
  temperature: 0, top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1, max_tokens: 256, seed: 1, system: "",
  draft: true, drafter: "", max_draft: null, turns: "together", marks: true, theme: "system",
};
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens"];
const EXAMPLES = [
  "Explain in three sentences why the sky is blue.",
  "Write a short poem about a kangaroo at dusk.",
  "List five unusual uses for a paper clip.",
];
const THEMES = { system: ["◐", "as the system has them"], light: ["☀", "light"], dark: ["☾", "dark"] };
const POLL_MS = 1500;

const $ = (id) => document.getElementById(id);
const messages = [];
let settings = { ...DEFAULTS, ...stored("kangaroo") };
let running = null; // the AbortController of the answers being written
let drafters = []; // what the server offers, its default first

function stored(name) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? {};
  } catch {
    return {}; // storage may be barred, or hold something else
  }
}

function keep() {
  try {
    localStorage.setItem("kangaroo", JSON.stringify(settings));
  } catch {
    // then settings last as long as the page
  }
}

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

// --- the server

function headers() {
  const key = $("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function connect() {
  const model = $("model");
  try {
    const health = await fetch("health");
    const { status } = await health.json();
    if (!health.ok) {
      const said = { loading: "loading the model …", draining: "shutting down", failed: "the model could not be loaded" };
      model.textContent = said[status] ?? status;
      setTimeout(connect, POLL_MS);
      return;
    }
    const found = await fetch("v1/models", { headers: headers() });
    if (found.status === 401) {
      model.textContent = "needs a key: see Settings";
      return;
    }
    const card = (await found.json()).data[0];
    drafters = card.drafters;
    model.textContent = card.id;
    model.title = `${card.id}, up to ${card.max_model_len} tokens`;
    $("drafter").replaceChildren(...drafters.map(({ id }) => new Option(id, id)));
    choose();
  } catch {
    model.textContent = "the server does not answer";
    setTimeout(connect, 2 * POLL_MS);
  }
}

function chosen() {
  return drafters.find(({ id }) => id === settings.drafter) ?? drafters[0];
}

function choose() {
  const { id, description } = chosen() ?? {};
  if (!id) return;
  $("drafter").value = id;
  $("drafter-hint").textContent = `It drafts with ${description}. That changes the pace, never the text.`;
}

function body(draft, seed) {
  const asked = { messages: settings.system ? [{ role: "system", content: settings.system }, ...messages] : messages };
  for (const name of NUMBERS) asked[name] = settings[name];
  const speculation = { enabled: draft, drafter: chosen()?.id, max_draft: settings.max_draft };
  return { ...asked, seed, stream: true, speculation: { ...speculation, statistics: true, tokens: true } };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

async function refusal(response) {
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // a proxy between may have answered with a page of its own
  }
  if (response.status === 401) openSettings("key");
  return new Error(message);
}

// --- one answer

class Answer {
  constructor(title) {
    this.box = element("article", "answer busy");
    this.box.setAttribute("aria-busy", "true");
    if (title) this.box.append(element("h3", "", title));
    this.words = element("div", "text");
    this.facts = element("dl", "facts");
    this.facts.hidden = true;
    this.box.append(this.words, this.facts);
    this.text = "";
    this.tokens = this.drafted = this.run = this.early = 0;
    this.lengths = []; // how many rounds came to 1, 2, ... tokens
    this.first = this.last = 0;
    this.statistics = null;
    this.finish = null;
  }

  async read(asked, signal) {
    try {
      const response = await fetch("v1/chat/completions", {
        method: "POST", signal, body: JSON.stringify(asked), headers: { "Content-Type": "application/json", ...headers() },
      });
      if (!response.ok) throw await refusal(response);
      for await (const chunk of events(response)) {
        if (chunk.error) throw new Error(chunk.error.message);
        for (const choice of chunk.choices) this.add(choice);
        if (chunk.speculation) this.statistics = chunk.speculation;
      }
    } catch (error) {
      if (error.name === "AbortError") this.finish = "stopped";
      else this.fail(error instanceof TypeError ? "The connection to the server was lost." : error.message);
    }
    this.box.classList.remove("busy");
    this.box.removeAttribute("aria-busy");
    this.show();
    this.remark();
  }

  add(choice) {
    for (const token of choice.tokens ?? []) this.token(token);
    this.finish = choice.finish_reason ?? this.finish;
    if (!this.drawing) this.drawing = requestAnimationFrame(() => this.show());
  }

  token({ text, drafted }) {
    const now = performance.now();
    if (!this.tokens) this.first = now;
    if (now - this.first < 5) this.early += 1; // of the first round, whose beginning nobody has seen
    this.last = now;
    this.tokens += 1;
    this.drafted += drafted;
    this.run += 1;
    if (!drafted) {
      this.lengths[this.run - 1] = (this.lengths[this.run - 1] ?? 0) + 1;
      this.run = 0;
    }
    if (text) this.words.append(element("span", drafted ? "t drafted" : "t own", text));
    this.text += text;
  }

  show() {
    this.drawing = 0;
    if (!this.tokens) return;
    const rounds = this.statistics?.rounds ?? this.tokens - this.drafted + (this.run > 0);
    const seconds = (this.last - this.first) / 1000;
    const { drafted, accepted } = this.statistics ?? {};
    const percent = (share) => `${Math.round(100 * share)} %`;
    this.rate = seconds > 0.05 ? (this.tokens - this.early) / seconds : 0;
    this.rounds = rounds;
    const rows = [
      ["tokens/s", this.rate ? this.rate.toFixed(1) : "–", "As they arrive here, from the first round on"],
      ["tokens/round", (this.tokens / rounds).toFixed(2), "Tokens for each pass of the whole model"],
      ["drafted", percent(this.drafted / this.tokens), "Tokens of this text that were drafted"],
      ["accepted", drafted ? percent(accepted / drafted) : this.statistics ? "–" : "…", "Drafted tokens that were kept"],
      ["tokens", String(this.tokens), "Tokens of this text"],
    ];
    this.facts.replaceChildren(...rows.map(([name, value, meaning]) => {
      const row = element("div");
      row.title = meaning;
      row.append(element("dt", "", name), element("dd", "", value));
      return row;
    }), this.histogram());
    this.facts.hidden = false;
    follow();
  }

  histogram() {
    const counts = this.statistics?.histogram ?? Array.from(this.lengths, (count) => count ?? 0);
    const row = element("div", "rounds"), bars = element("dd", "bars"), most = Math.max(1, ...counts);
    counts.forEach((count, index) => {
      const column = element("span", "", ""), bar = element("i");
      bar.style.height = `${Math.max(1, Math.round((20 * count) / most))}px`;
      column.append(bar, String(index + 1));
      bars.append(column);
    });
    const told = counts.map((count, index) => `${count} of ${index + 1}`).join(", ");
    row.title = `Rounds, by the tokens they brought: ${told}`;
    bars.setAttribute("role", "img");
    bars.setAttribute("aria-label", row.title);
    row.append(element("dt", "", "rounds by tokens"), bars);
    return row;
  }

  remark() {
    const { status } = this.statistics ?? {};
    const said = [];
    if (this.finish === "stopped") said.push("Stopped.");
    if (this.finish === "length") said.push("Cut off: no more tokens are allowed (Settings).");
    if (status && status !== "on" && status !== "asked not to") said.push(`Drafting is off at present: ${status}.`);
    if (said.length) this.box.append(element("p", "remark", said.join(" ")));
  }

  fail(message) {
    this.finish = "error";
    const problem = element("p", "problem", message);
    problem.setAttribute("role", "alert");
    this.box.append(problem);
  }
}

// --- a turn

function mode() {
  return document.querySelector("input[name=mode]:checked").value;
}

async function send() {
  const text = $("input").value.trim();
  if (!text || running) return;
  const problem = invalid();
  if (problem) {
    openSettings(problem.id);
    return;
  }
  $("input").value = "";
  grow();
  $("welcome").hidden = true;
  messages.push({ role: "user", content: text });
  running = new AbortController();
  busy(true);
  const answer = mode() === "compare" ? await compare(text) : await single(text);
  if (answer.text && answer.finish !== "error") messages.push({ role: "assistant", content: answer.text });
  else giveBack(text);
  running = null;
  busy(false);
  say(answer.finish === "error" ? "No answer." : `Answer finished, ${answer.tokens} tokens.`);
}

function giveBack(text) {
  messages.pop(); // so that it can be asked again
  if (!$("input").value) $("input").value = text;
  grow();
}

function begin(text, answers, className) {
  const turn = element("section", className), row = element("div", "answers");
  row.append(...answers.map((answer) => answer.box));
  turn.append(element("div", "asked", text), row);
  $("log").append(turn);
  follow(true);
  return turn;
}

function seed() {
  return settings.seed ?? Math.floor(Math.random() * 2 ** 31);
}

async function single(text) {
  const answer = new Answer("");
  begin(text, [answer], "turn");
  await answer.read(body(settings.draft, seed()), running.signal);
  return answer;
}

async function compare(text) {
  const plain = new Answer("Plain"), ours = new Answer(`Drafted by ${chosen()?.id ?? "the server"}`), own = seed();
  const turn = begin(text, [plain, ours], "turn pair"), signal = running.signal;
  if (settings.turns === "turns") {
    await plain.read(body(false, own), signal);
    await ours.read(body(true, own), signal);
  } else {
    await Promise.all([plain.read(body(false, own), signal), ours.read(body(true, own), signal)]);
  }
  turn.append(verdict(plain, ours));
  follow();
  return ours;
}

function verdict(plain, ours) {
  const box = element("p", "verdict"), strong = element("strong");
  const shorter = Math.min(plain.text.length, ours.text.length);
  let same = 0;
  while (same < shorter && plain.text[same] === ours.text[same]) same += 1;
  const whole = [plain, ours].every((answer) => ["stop", "length"].includes(answer.finish));
  let rest = "";
  if (same < shorter || (whole && plain.text !== ours.text)) {
    box.classList.add("differ");
    strong.textContent = `The texts part after ${same} characters.`;
    rest = " Unless the server computes in a way that rounds differently from pass to pass, this should not be.";
  } else if (!whole) {
    box.classList.add("open");
    strong.textContent = same ? `The same for the ${same} characters that both have.` : "Nothing to compare.";
  } else {
    box.classList.add("same");
    strong.textContent = `Identical: ${ours.tokens} tokens, ${ours.text.length} characters.`;
    rest = ` ${ours.rounds} passes of the whole model instead of ${plain.rounds}`;
    const faster = settings.turns === "turns" && plain.rate && ours.rate ? ours.rate / plain.rate : 0;
    rest += faster ? `; ${faster.toFixed(2)} times the pace.` : ".";
  }
  box.append(strong, document.createTextNode(rest));
  box.setAttribute("role", "status");
  return box;
}

// --- the page around it

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  for (const input of document.querySelectorAll("input[name=mode]")) input.disabled = on;
  $("fresh").disabled = on;
  if (!on) $("input").focus({ preventScroll: true });
}

function say(text) {
  $("said").textContent = text;
}

function follow(always = false) {
  const log = $("log");
  if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 160) log.scrollTop = log.scrollHeight;
}

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function fresh() {
  messages.length = 0;
  for (const child of [...$("log").children]) if (child.id !== "welcome") child.remove();
  $("welcome").hidden = false;
  $("input").focus();
}

function paint() {
  const root = document.documentElement, [sign, name] = THEMES[settings.theme] ?? THEMES.system;
  if (settings.theme === "system") delete root.dataset.theme;
  else root.dataset.theme = settings.theme;
  root.dataset.marks = settings.marks ? "on" : "off";
  $("theme").textContent = sign;
  $("theme").setAttribute("aria-label", `Colours: ${name}`);
  $("theme").title = `Colours: ${name}`;
}

function fill() {
  for (const name of NUMBERS) $(name).value = settings[name];
  $("seed").value = settings.seed ?? "";
  $("max_draft").value = settings.max_draft ?? "";
  choose();
  $("system").value = settings.system;
  $("draft").checked = settings.draft;
  $("marks").checked = settings.marks;
  document.querySelector(`input[name=turns][value=${settings.turns === "turns" ? "turns" : "together"}]`).checked = true;
}

function invalid() {
  return [...document.querySelectorAll("#settings input")].find((input) => !input.checkValidity());
}

function take() {
  const wrong = invalid(), problem = $("settings-problem");
  problem.hidden = !wrong;
  if (wrong) {
    problem.textContent = `${wrong.closest("label").firstChild.textContent.trim()}: ${wrong.validationMessage}`;
    return;
  }
  for (const name of NUMBERS) settings[name] = $(name).value === "" ? DEFAULTS[name] : Number($(name).value);
  for (const name of ["seed", "max_draft"]) settings[name] = $(name).value === "" ? null : Number($(name).value);
  settings.drafter = $("drafter").value || settings.drafter;
  settings.system = $("system").value;
  settings.draft = $("draft").checked;
  settings.marks = $("marks").checked;
  settings.turns = document.querySelector("input[name=turns]:checked").value;
  keep();
  paint();
  choose();
}

function openSettings(id = "") {
  if (!$("settings").open) $("settings").showModal();
  if (id) $(id).focus();
  take();
}

for (const text of EXAMPLES) {
  const item = element("li"), button = element("button", "", text);
  button.type = "button";
  button.addEventListener("click", () => {
    $("input").value = text;
    send();
  });
  item.append(button);
  document.querySelector(".examples").append(item);
}
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !$("settings").open) running.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("fresh").addEventListener("click", fresh);
$("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  settings.theme = names[(names.indexOf(settings.theme) + 1) % names.length];
  keep();
  paint();
});
$("open-settings").addEventListener("click", () => openSettings());
$("settings").addEventListener("input", take);
$("marks").addEventListener("input", take);
$("settings").addEventListener("click", (event) => {
  if (event.target === $("settings")) $("settings").close(); // beside it
});
document.querySelector("#settings form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("settings").close();
});
$("key").addEventListener("change", connect);
$("defaults").addEventListener("click", () => {
  settings = { ...DEFAULTS, theme: settings.theme };
  fill();
  take();
});
fill();
paint();
connect();
$("input").focus();
