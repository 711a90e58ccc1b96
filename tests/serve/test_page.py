"""The page, as a person uses it: in a headless Chromium where there is one; and what holds of its files anyway."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live import CLIENT, Live, engine_of, serving
from stand_in import ScriptedEngine

from chat_model import save_chat_model
from kangaroo.decoder import Decoder, load
from kangaroo.errors import ConfigError
from kangaroo.load import Load
from kangaroo.serve.app import Access
from kangaroo.serve.browser import FILES, FOLDER

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
expect = sync_api.expect
SHORT = '{"max_tokens": 24}'
MARKUP = ["<img src=x onerror=alert(1)> ", "<script>alert(2)</script> ", "&amp; <b>bold</b>"]


# --- the files


def test_the_page_is_small_and_loads_nothing_from_elsewhere() -> None:
    with serving(lambda: ScriptedEngine(["a"]), Access(key="s3cret")) as live:
        sizes = []
        for path in FILES:  # without the key
            answer = CLIENT.get(live.url + path)
            assert answer.status_code == 200
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
            assert "unsafe" not in answer.headers["Content-Security-Policy"]
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            sizes.append(len(answer.content))
        assert CLIENT.get(live.url + "/page/../app.py").status_code in (401, 404)
    assert sum(sizes) < 100_000
    for file in FOLDER.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.", text), f"{file.name} names another host"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\bon\w+=", text), file.name


def palettes() -> dict[str, dict[str, str]]:
    text = (FOLDER / "page.css").read_text(encoding="utf-8")
    named = {"light": r":root \{(.*?)\n\}", "dark": r':root\[data-theme="dark"\] \{(.*?)\n\}'}
    return {
        name: dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", re.search(block, text, re.DOTALL).group(1)))  # type: ignore[union-attr]
        for name, block in named.items()
    }


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("name", ["light", "dark"])
def test_colours_can_be_told_apart(name: str) -> None:
    """WCAG 2.2: 4.5 for text, 3 for what is not."""
    own = palettes()[name]
    text = [("ink", "paper"), ("ink", "raised"), ("ink", "drafted-tint"), ("muted", "paper"), ("muted", "press")]
    text += [("muted", "raised"), ("main-ink", "main"), ("bad", "paper"), ("good", "paper"), ("stop", "raised")]
    shapes = [("drafted", "drafted-tint"), ("drafted", "paper"), ("own", "paper"), ("main", "paper")]
    for pairs, least in ((text, 4.5), (shapes, 3.0)):
        for front, back in pairs:
            light, dark = sorted((luminance(own[front]), luminance(own[back])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= least, f"{front} on {back}"


# --- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page; whatever the console reports as an error fails the test."""
    contexts, errors = [], list[str]()

    def open_page(live: Live, width: int = 1200, height: int = 800, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.add_init_script(f"localStorage.getItem('kangaroo') ?? localStorage.setItem('kangaroo', '{SHORT}')")
        page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(live.url + "/")
        return page

    yield open_page
    for context in contexts:
        context.close()
    # What the server refuses on purpose is reported by the browser itself.
    assert [error for error in errors if "Failed to load resource" not in error] == []


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = save_chat_model(tmp_path_factory.mktemp("chat"))
    return load(folder / "target", adapter=folder / "adapter", dtype="float64", threshold=0.0, max_draft=3)


@pytest.fixture(scope="module")
def live(decoder: Decoder) -> Iterator[Live]:
    with (
        pytest.MonkeyPatch.context() as patch,
        serving(engine_of(decoder, rows=4, also=["prompt-lookup", "early-exit"])) as found,
    ):
        patch.setattr(Load, "drafts", lambda self, rows: True)  # whether it pays, on a busy machine or not
        patch.setattr(Load, "pays", lambda self, rows: True)
        yield found


def test_why_nothing_is_drafted_is_said(visit: Any, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Load, "drafts", lambda self, rows: False)
    monkeypatch.setattr(Load, "pays", lambda self, rows: False)
    page = visit(live)
    ask(page, "Where?")
    finished(page)
    expect(page.locator(".remark").first).to_contain_text("Drafting is off at present: drafts do not pay at this load.")
    assert fact(page, "drafted") == "0 %"
    assert fact(page, "accepted") == "–"


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def finished(page: Any) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=30_000)
    expect(page.locator(".busy")).to_have_count(0)


def tokens(page: Any, answer: int = 0) -> list[tuple[str, bool]]:
    spans = page.locator(".answer").nth(answer).locator(".t")
    return [tuple(each) for each in spans.evaluate_all("all => all.map(s => [s.textContent, s.matches('.drafted')])")]


def fact(page: Any, name: str, answer: int = 0) -> str:
    row = page.locator(".answer").nth(answer).locator(".facts > div").filter(has=page.locator(f"dt:text-is('{name}')"))
    return str(row.locator("dd").inner_text())


LISTEN = """
    const fetched = fetch;
    heard = "";
    fetch = async (...request) => {
        const response = await fetched(...request);
        const [own, copy] = response.body.tee();
        const hear = new WritableStream({ write(text) { heard += text; } });
        copy.pipeThrough(new TextDecoderStream()).pipeTo(hear);
        return new Response(own, { status: response.status, headers: response.headers });
    };
"""
"""Keeps what a page is sent: of a stream the browser itself keeps nothing that could be relied on."""


def test_an_answer_streams_in_marked_by_who_wrote_it(visit: Any, live: Live, decoder: Decoder) -> None:
    page = visit(live)
    expect(page.locator("#model")).to_have_text("tiny")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Tokens at most").fill("40")
    page.get_by_role("button", name="Done").click()
    page.evaluate(LISTEN)
    ask(page, "Where would you like to eat?")
    finished(page)
    chunks = [json.loads(line[6:]) for line in page.evaluate("heard").split("\n") if line.startswith("data: {")]
    sent = [(t["text"], t["drafted"]) for chunk in chunks for c in chunk["choices"] for t in c.get("tokens", ())]
    messages = [{"role": "user", "content": "Where would you like to eat?"}]
    assert tokens(page) == [(text, drafted) for text, drafted in sent if text]
    assert page.locator(".answer .text").text_content() == decoder.generate([messages], max_tokens=40)[0].text
    drafted, told = sum(flag for _, flag in sent), chunks[-1]["speculation"]
    assert 0 < drafted < len(sent)
    assert fact(page, "tokens") == str(len(sent))
    assert fact(page, "drafted") == f"{round(100 * drafted / len(sent))} %"
    assert fact(page, "tokens/round") == f"{told['mean_acceptance_length']:.2f}"
    assert fact(page, "accepted") == f"{round(100 * told['acceptance_rate'])} %"
    assert page.evaluate("document.activeElement.id") == "input"
    # A colour alone would not do.
    drafted_one, own_one = page.locator(".answer .t.drafted").first, page.locator(".answer .t.own").first
    assert "inset" in drafted_one.evaluate("s => getComputedStyle(s).boxShadow")
    assert own_one.evaluate("s => getComputedStyle(s).borderBottomStyle") == "dotted"
    page.get_by_label("Marks").uncheck()
    assert own_one.evaluate("s => getComputedStyle(s).borderBottomStyle") == "none"


def test_a_conversation_goes_on_and_begins_anew(visit: Any, live: Live, decoder: Decoder) -> None:
    page = visit(live)
    ask(page, "Where?")
    finished(page)
    first = page.locator(".answer .text").first.text_content()
    ask(page, "And then?")
    finished(page)
    said = [("user", "Where?"), ("assistant", first), ("user", "And then?")]
    messages = [{"role": role, "content": text} for role, text in said]
    assert page.locator(".answer .text").nth(1).text_content() == decoder.generate([messages], max_tokens=24)[0].text
    page.get_by_role("button", name="New").click()
    expect(page.locator(".answer")).to_have_count(0)
    expect(page.get_by_role("heading", name="The same words")).to_be_visible()


@pytest.mark.parametrize(("turns", "temperature"), [("both at once", "1.3"), ("one after the other", "0")])
def test_side_by_side_the_texts_are_the_same(visit: Any, live: Live, turns: str, temperature: str) -> None:
    page = visit(live)
    page.get_by_text("Side by side", exact=True).click()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill(temperature)
    page.get_by_label("Seed").fill("")
    page.get_by_label(turns).check()
    page.keyboard.press("Escape")
    ask(page, "I need 3 tickets to Oakland.")
    finished(page)
    expect(page.locator(".verdict")).to_contain_text("Identical")
    plain, ours = tokens(page, 0), tokens(page, 1)
    assert [text for text, _ in plain] == [text for text, _ in ours]
    assert not any(drafted for _, drafted in plain)
    assert any(drafted for _, drafted in ours)
    assert fact(page, "tokens/round") == "1.00"
    assert float(fact(page, "tokens/round", 1)) > 1
    assert ("times the pace" in page.locator(".verdict").inner_text()) is (turns == "one after the other")


def test_drafters_are_switched_and_compared(visit: Any, live: Live) -> None:
    page = visit(live)
    expect(page.locator("#model")).to_have_text("tiny")
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Drafter").locator("option")).to_have_text(["kangaroo", "prompt-lookup", "early-exit"])
    expect(page.locator("#drafter-hint")).to_contain_text("kangaroo, threshold=0.0, max_draft=3")
    page.keyboard.press("Escape")
    seen = []
    page.on("request", lambda request: seen.append(request.post_data_json) if request.method == "POST" else None)
    ask(page, "Where to?")
    finished(page)
    for name, longest in (("prompt-lookup", ""), ("early-exit", "1")):
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Drafter").select_option(name)
        page.get_by_label("Tokens per draft").fill(longest)
        expect(page.locator("#drafter-hint")).to_contain_text(name)
        page.get_by_role("button", name="Done").click()
        page.get_by_role("button", name="New").click()
        ask(page, "Where to?")
        finished(page)
        assert (fact(page, "accepted"), name) != ("–", "early-exit"), "it drafts"
    one_at_most = [int(column.inner_text()) for column in page.locator(".answer .bars > span").all()]
    assert max(one_at_most) <= 2
    page.reload()  # the choice is kept
    page.get_by_text("Side by side", exact=True).click()
    ask(page, "Where to?")
    finished(page)
    expect(page.locator(".answer h3")).to_have_text(["Plain", "Drafted by early-exit"])
    expect(page.locator(".verdict")).to_contain_text("Identical")
    asked = [(each["speculation"]["drafter"], each["speculation"]["max_draft"]) for each in seen]
    assert asked == [("kangaroo", None), ("prompt-lookup", None), *[("early-exit", 1)] * 3]
    assert [each["speculation"]["enabled"] for each in seen] == [True, True, True, False, True]


def test_a_drafter_that_is_no_longer_offered_is_forgotten(visit: Any, live: Live) -> None:
    page = visit(live)
    page.evaluate("""localStorage.setItem("kangaroo", '{"drafter": "gone", "max_tokens": 5}')""")
    page.reload()
    ask(page, "Where?")
    finished(page)
    assert page.get_by_role("alert").count() == 0
    assert page.locator("#drafter").input_value() == "kangaroo"


def test_texts_that_differ_are_said_to(visit: Any) -> None:
    scripts = iter([["one ", "two ", "three"], ["one ", "two ", "four"]])
    with serving(lambda: ScriptedEngine(lambda: next(scripts))) as live:
        page = visit(live)
        page.get_by_text("Side by side", exact=True).click()
        ask(page, "Count.")
        finished(page)
        expect(page.locator(".verdict")).to_contain_text("part after 8 characters")


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stopping(visit: Any, how: str) -> None:
    engine = ScriptedEngine(["so ", 0.05, "far ", 30.0, "and further"])
    with serving(lambda: engine) as live:
        page = visit(live)
        ask(page, "Go on")
        expect(page.locator(".answer .text")).to_have_text("so far ")
        assert page.locator(".answer").get_attribute("aria-busy") == "true"
        if how == "Escape":
            page.keyboard.press("Escape")
        else:
            page.get_by_role("button", name="Stop").click()
        finished(page)
        expect(page.locator(".remark")).to_have_text("Stopped.")
        live.wait_until(lambda: engine.tickets[0].cancelled_at is not None)
        expect(page.locator(".answer .text")).to_have_text("so far ")


def test_what_the_model_writes_is_text(visit: Any) -> None:
    with serving(lambda: ScriptedEngine(MARKUP)) as live:
        page = visit(live)
        dialogs: list[str] = []
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        ask(page, "<b>bold</b>")
        finished(page)
        assert page.locator(".answer .text").text_content() == "".join(MARKUP)
        assert page.locator(".asked").text_content() == "<b>bold</b>"
        assert page.locator("main img, main script, main b").count() == 0
        assert dialogs == []


def test_keys(visit: Any, live: Live) -> None:
    page = visit(live)
    box = page.get_by_label("Message", exact=True)
    box.press_sequentially("one")
    low = box.bounding_box()["height"]
    page.keyboard.press("Shift+Enter")
    box.press_sequentially("two")
    assert box.input_value() == "one\ntwo"
    assert box.bounding_box()["height"] > low
    expect(page.locator(".answer")).to_have_count(0)
    page.keyboard.press("Enter")
    finished(page)
    assert page.locator(".asked").text_content() == "one\ntwo"
    page.keyboard.press("Enter")  # nothing to send
    expect(page.locator(".asked")).to_have_count(1)
    page.evaluate("document.activeElement.blur()")
    names = list[str]()
    for _ in range(8):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
        width = page.evaluate(
            """() => { const e = document.activeElement, s = e.closest('label')?.querySelector('span') ?? e;
            return e.id === 'input' ? getComputedStyle(e.form).borderTopWidth
              : [getComputedStyle(e), getComputedStyle(s)].map(x => x.outlineStyle).find(x => x !== 'none') ?? ''; }"""
        )
        assert width or names[-1] in (None, "", "log"), f"no focus to be seen on {names[-1]}"
    assert {"mode", "fresh", "theme", "open-settings", "input"} <= set(names)


def test_everything_that_can_be_used_has_a_name(visit: Any, live: Live) -> None:
    page = visit(live)
    page.get_by_role("button", name="Settings").click()
    nameless = page.locator("button, input, textarea").evaluate_all(
        "all => all.filter(e => !(e.ariaLabel || e.textContent.trim() || [...(e.labels ?? [])]"
        ".some(l => l.textContent.trim()))).map(e => e.outerHTML)"
    )
    assert nameless == []
    assert page.locator("dialog").get_attribute("aria-labelledby")
    expect(page.get_by_role("radio", name="Side by side")).to_have_count(1)


def test_colours_follow_the_system_or_the_button(visit: Any, live: Live) -> None:
    def paper(page: Any) -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light, dark = visit(live), visit(live, scheme="dark")
    assert paper(light) == "rgb(251, 250, 247)"
    assert paper(dark) == "rgb(19, 23, 24)"
    button = light.get_by_role("button", name="Colours")
    seen = []
    for _ in range(3):
        button.click()
        seen.append((button.get_attribute("aria-label"), paper(light)))
    assert seen[0] == ("Colours: light", paper(light))
    assert seen[1] == ("Colours: dark", paper(dark))
    button.click()
    button.click()
    light.reload()
    assert paper(light) == paper(dark), "what was chosen is kept"


@pytest.mark.parametrize("width", [360, 1400])
def test_nothing_is_cut_off_at_any_width(visit: Any, width: int) -> None:
    with serving(lambda: ScriptedEngine(["word " * 20, "x" * 200, "\n\nend"])) as live:
        page = visit(live, width=width, height=640)
        page.get_by_text("Side by side", exact=True).click()
        ask(page, "y" * 150)
        finished(page)
        expect(page.locator(".verdict")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        wide = page.locator("main *").evaluate_all(
            "(all, most) => all.filter(e => e.getBoundingClientRect().right > most).map(e => e.outerHTML)", width
        )
        assert wide == []
        for name in ("Send", "New", "Settings"):
            box = page.get_by_role("button", name=name).bounding_box()
            assert 0 <= box["x"] <= box["x"] + box["width"] <= width
            assert 0 <= box["y"] <= box["y"] + box["height"] <= 640
        page.get_by_role("button", name="Settings").click()
        assert page.locator("dialog").evaluate("d => d.scrollWidth <= d.clientWidth")


def test_errors_are_shown_and_the_message_is_given_back(visit: Any) -> None:
    scripts = iter([["half", ConfigError("the grammar is <i>odd</i>")], ["better"]])
    with serving(lambda: ScriptedEngine(lambda: next(scripts))) as live:
        page = visit(live)
        ask(page, "Try")
        finished(page)
        expect(page.get_by_role("alert").first).to_have_text("the grammar is <i>odd</i>")
        assert page.get_by_label("Message", exact=True).input_value() == "Try"
        page.keyboard.press("Enter")
        finished(page)
        expect(page.locator(".answer .text").last).to_have_text("better")
        live.stop(0.0)
        live.thread.join(20)
        ask(page, "Anyone?")
        finished(page)
        expect(page.get_by_role("alert").last).to_contain_text("connection")


def test_settings_that_cannot_be_are_not_sent(visit: Any) -> None:
    engine = ScriptedEngine(["a"])
    with serving(lambda: engine) as live:
        page = visit(live)
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Top p").fill("7")
        expect(page.locator("#settings-problem")).to_contain_text("Top p")
        page.keyboard.press("Escape")
        ask(page, "Hello")
        expect(page.locator("dialog")).to_be_visible()
        assert engine.tickets == []
        page.get_by_role("button", name="Defaults").click()
        expect(page.locator("#settings-problem")).to_be_hidden()
        page.get_by_role("button", name="Done").click()
        page.get_by_label("Message", exact=True).press("Enter")
        finished(page)
        assert len(engine.tickets) == 1


def test_a_key_is_asked_for_and_used(visit: Any) -> None:
    with serving(lambda: ScriptedEngine(["in"]), Access(key="s3cret")) as live:
        page = visit(live)
        expect(page.locator("#model")).to_contain_text("key")
        ask(page, "Hello")
        finished(page)
        expect(page.get_by_label("API key")).to_be_focused()
        page.get_by_label("API key").fill("s3cret")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("tiny")
        page.get_by_label("Message", exact=True).press("Enter")
        finished(page)
        expect(page.locator(".answer .text").last).to_have_text("in")
        assert "s3cret" not in page.evaluate("JSON.stringify(localStorage) + JSON.stringify(sessionStorage)")


def test_a_model_that_still_loads_is_waited_for(visit: Any, tmp_path: Path) -> None:
    ready = tmp_path / "ready"

    def slow() -> ScriptedEngine:
        import time

        while not ready.exists():
            time.sleep(0.01)
        return ScriptedEngine(["a"])

    with serving(slow, wait=False) as live:
        page = visit(live)
        expect(page.locator("#model")).to_contain_text("loading")
        ready.touch()
        expect(page.locator("#model")).to_have_text("tiny")
