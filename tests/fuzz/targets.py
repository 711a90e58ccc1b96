"""What is fuzzed: a strategy for each kind of input, and what is done with what it draws."""

import hashlib
import json
import math
import tomllib
from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import strategies as st
from lesson import ADAPTER, MEDUSA
from made_up import PROVENANCE, make_run
from place import Place
from values import changed, damaged, like_number, numbers, scalars, texts, to_json, values

from kangaroo.bench.formats import read_questions
from kangaroo.bench.recipe import read_bench_recipe
from kangaroo.bench.report.results import read_runs
from kangaroo.documents import read_documents
from kangaroo.drafters import DRAFTERS
from kangaroo.drafters.copying.datastore import Datastore
from kangaroo.drafters.kangaroo.adapter import Adapter
from kangaroo.drafters.kangaroo.calibration import Calibration
from kangaroo.loading import load_tokenizer
from kangaroo.sampling import Sampling
from kangaroo.text import TextStream
from kangaroo.training.recipe import read_recipe

QUICK = [name for name in DRAFTERS if name not in ("medusa", "medusa-tree", "eagle3", "eagle3-tree", "draft-model")]
NUMBERS = ("max_draft", "threshold", "exit_layer", "top_k", "longest", "shortest", "trigger", "max_copy", "nodes")
SETTINGS = (*NUMBERS, "continuation", "occurrences", "draft_cost", "node_cost", "start_cost", "nonsense")
TOGETHER = {"stop": "auto", "draft_cost": 0.1, "node_cost": 0.1, "start_cost": 0.0}


class Fuzzed(NamedTuple):
    """One kind of input."""

    draw: Callable[[Place], st.SearchStrategy[Any]]
    act: Callable[[Place, Any], object]


def _settings(place: Place) -> st.SearchStrategy[Any]:
    chosen = st.dictionaries(st.sampled_from(SETTINGS), like_number, max_size=3)
    auto = st.sampled_from([{}, {}, {"stop": "auto"}, TOGETHER])
    return st.tuples(st.sampled_from(QUICK), st.tuples(auto, chosen).map(lambda both: both[0] | both[1]))


def _draft(place: Place, drawn: tuple[str, dict[str, Any]]) -> None:
    name, given = drawn
    decoder = place.decoder.with_drafter(name, **given)
    prompts = ["Where would you like to eat? Where would", "The answer"]
    got = [answer.tokens for answer in decoder.generate(prompts, max_tokens=6)]
    assert got == [answer.tokens for answer in place.decoder.generate(prompts, max_tokens=6)]


def _sampling(place: Place) -> st.SearchStrategy[Any]:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    bias = st.one_of(values, st.dictionaries(st.one_of(st.integers(-1, 310), scalars), numbers, max_size=4))
    fields = st.dictionaries(st.sampled_from((*names, "seed", "index")), like_number, max_size=4)
    return st.tuples(fields, st.one_of(st.none(), bias), like_number)


def _sample(place: Place, drawn: tuple[dict[str, Any], Any, Any]) -> None:
    given, bias, max_tokens = drawn
    sampling = Sampling(**given, **({} if bias is None else {"logit_bias": bias}))
    longest = max_tokens if not isinstance(max_tokens, int) or max_tokens < 12 else 4
    answer = place.decoder.generate(["Where would"], max_tokens=longest, sampling=sampling)[0]
    drafted = place.decoder.with_drafter("prompt-lookup").generate(
        ["Where would"], max_tokens=longest, sampling=sampling
    )
    assert drafted[0].tokens == answer.tokens


def _requests(place: Place) -> st.SearchStrategy[Any]:
    names = (
        "n",
        "max_tokens",
        "min_tokens",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "logprobs",
        "sampling",
        "processor",
    )
    ids = st.lists(st.one_of(st.integers(-1, 310), scalars), max_size=3)
    processor = st.sampled_from([None, *(lambda prompt, output, scores, v=v: v for v in (None, 1.0, math.nan))])
    drawn = st.dictionaries(st.sampled_from(names), st.one_of(like_number, values, ids, st.integers(0, 4)), max_size=4)
    return st.tuples(drawn, st.one_of(st.just("Where would"), ids), st.one_of(st.none(), st.none(), processor))


def _request(place: Place, drawn: tuple[dict[str, Any], Any, Any]) -> None:
    given, prompt, processor = drawn
    given = {"max_tokens": 3, **given, **({} if processor is None else {"processor": processor})}
    if isinstance(given["max_tokens"], int) and given["max_tokens"] > 12:
        given["max_tokens"] = 4
    plain = place.decoder.generate([prompt], **given)
    drafted = place.decoder.with_drafter("prompt-lookup").generate([prompt], **given)
    assert [answer.tokens for answer in drafted] == [answer.tokens for answer in plain]


def _prompts(place: Place) -> st.SearchStrategy[Any]:
    message = st.fixed_dictionaries({"role": st.one_of(st.sampled_from(["user", "system"]), values), "content": values})
    one = st.one_of(texts, values, st.lists(st.one_of(message, values), max_size=3))
    return st.tuples(st.one_of(values, st.lists(one, max_size=2)), st.lists(texts, max_size=2))


def _config(place: Place) -> st.SearchStrategy[Any]:
    table = json.loads((place.folder / "adapter" / "config.json").read_text())
    return st.one_of(changed(table).map(to_json), values.map(to_json)).map(lambda text: text.encode())


def _load_adapter(place: Place, content: bytes) -> None:
    Adapter.load(place.copy_folder("adapter", "config.json", content), place.decoder.target)


def _calibration(place: Place) -> st.SearchStrategy[Any]:
    table = json.loads((place.folder / "adapter" / "calibration.json").read_text())
    return changed(table).map(lambda changed: to_json(changed).encode())


def _calibrate(place: Place, content: bytes) -> None:
    found = Calibration.load(place.copy_folder("adapter", "calibration.json", content))
    assert all(0 <= found.chance(c / 10) <= 1 for c in range(11))


def _weights(place: Place) -> st.SearchStrategy[Any]:
    content = (place.folder / "adapter" / "adapter.safetensors").read_bytes()
    # Half of the time the digest is that of the damaged bytes: what is in them must be looked at too.
    return st.tuples(damaged(content[: 8 + int.from_bytes(content[:8], "little")]), st.just(content), st.booleans())


def _load_weights(place: Place, drawn: tuple[bytes, bytes, bool]) -> None:
    header, whole_, signed = drawn
    content = header + whole_[8 + int.from_bytes(whole_[:8], "little") :]
    folder = place.copy_folder("adapter", "adapter.safetensors", content)
    if signed:
        config = json.loads((folder / "config.json").read_text())
        config["weights_sha256"] = hashlib.sha256(content).hexdigest()
        (folder / "config.json").write_text(json.dumps(config))
    Adapter.load(folder, place.decoder.target)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml_value(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(v) for v in value if v is not None) + "]"
    if isinstance(value, float) and not isinstance(value, bool):
        return str(value)
    return json.dumps(value)


def _to_toml(table: dict[str, Any]) -> bytes:
    rows = [f"{json.dumps(key)} = {_toml_value(value)}\n" for key, value in table.items() if value is not None]
    return "".join(rows).encode("utf-8", "surrogatepass")


BENCH = {
    "model": "demo",
    "output": "x",
    "threads": 1,
    "sampling": {"temperature": 0.5, "top_k": 3},
    "methods": [{"name": "a", "drafter": "kangaroo", "max_draft": 3, "at": 1.0}],
    "experiment": {"name": "e", "axis": "x"},
    "vary": {"key": "max_tokens", "values": [1, 2]},
    "quick": {"limit": 1},
}


def _recipes(place: Place) -> st.SearchStrategy[Any]:
    known = [tomllib.loads(text.format(target=place.model, output="x")) for text in (ADAPTER, MEDUSA)]
    either = st.sampled_from([*known, BENCH]).flatmap(changed).map(_to_toml)
    return st.one_of(either, either, either.flatmap(damaged))


def _read_recipes(place: Place, content: bytes) -> None:
    path = place.scratch("recipe.toml", content)
    with place.case():
        read_recipe(path)
    read_bench_recipe(path, quick=True)


ROWS = (
    {"text": "Some text."},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    {"question_id": 1, "category": "writing", "turns": ["a", "b"]},
    {"question_id": 1, "category": "coding", "sub_category": "x", "split": "qualitative", "turns": ["a"]},
    {"task_id": "x", "prompt": "y"},
    {"id": "x", "kind": "y", "messages": [{"role": "user", "content": "x"}]},
)


def _rows(place: Place) -> st.SearchStrategy[Any]:
    row = st.sampled_from(ROWS).flatmap(changed).map(to_json)
    lines = st.lists(st.one_of(row, row, texts), max_size=4).map("\n".join)
    content = lines.map(lambda text: text.encode("utf-8", "surrogatepass"))
    name = st.sampled_from(["rows.jsonl", "rows.jsonl.gz", "rows.txt", "rows.parquet"])
    return st.tuples(name, st.one_of(content, content, content.flatmap(damaged), st.binary(max_size=40)))


def _read_rows(place: Place, drawn: tuple[str, bytes]) -> None:
    path = place.scratch(*drawn)
    with place.case():
        list(read_documents(path))
    read_questions(drawn[1], str(path))


def _datastores(place: Place) -> st.SearchStrategy[Any]:
    return damaged(place.datastore.read_bytes())


def _open_datastore(place: Place, content: bytes) -> None:
    path = place.scratch("x.rest", content)
    # What was not refused must be whole: padding of its header is all that may differ.
    opened = Datastore.open(path, place.decoder.tokenizer.wrapped, 300)
    assert opened.documents == 3


def _runs(place: Place) -> st.SearchStrategy[Any]:
    records = [json.loads(record.model_dump_json()) for record in make_run({"kangaroo": 0.5}, questions=1, tokens=4)]
    rows = st.sampled_from(records).flatmap(changed).map(to_json)
    lines = st.lists(rows, max_size=1).map(lambda extra: [*map(to_json, records[:-1]), *extra])
    return st.tuples(lines, st.one_of(st.just(PROVENANCE), changed(PROVENANCE)))


def _read_run(place: Place, drawn: tuple[list[str], Any]) -> None:
    lines, provenance = drawn
    folder = place.scratch("records.jsonl", "".join(f"{line}\n" for line in lines).encode()).parent
    place.scratch("provenance.json", to_json(provenance).encode())
    read_runs([folder])


def _model_files(place: Place) -> st.SearchStrategy[Any]:
    names = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
    tables = {name: json.loads((place.model / name).read_text()) for name in names}
    # Of a tokenizer's file the parts are looked at, not its thousands of merges.
    return st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), changed(tables[name]).map(to_json)))


def _load_tokenizer(place: Place, drawn: tuple[str, str]) -> None:
    folder = place.copy_folder("target", drawn[0], drawn[1].encode())
    if drawn[0].startswith("tokenizer"):
        load_tokenizer(folder)
    else:
        place.command("generate", "--drafter", "none", "--model", str(folder), "--prompt", "x", "--max-tokens", "2")


OPTIONS = (
    *("--prompt", "--prompts", "--drafter", "--set", "--max-tokens", "--temperature", "--top-k", "--top-p", "--seed"),
    *("--stop", "--json", "--raw", "--dtype", "--adapter", "--datastore", "--heads", "--threads", "--min-p", "--limit"),
    *("--output", "--data", "--batch", "--nonsense", "--help", "--file", "--repeats", "--against", "--samples"),
    *("--min-tokens", "--ignore-eos", "--device", "--revision", "--allow-other-target", "--version", "--minutes"),
)


def _command_lines(place: Place) -> st.SearchStrategy[Any]:
    files = [place.folder / name for name in ("adapter", "x.rest", "prompts.txt", "rows.jsonl", "missing")]
    value = st.one_of(
        st.sampled_from(
            [*map(str, files), *QUICK, "1", "2", "0.5", "max_draft=2", "threshold=x", "float32", "-1", "nan"]
        ),
        texts.filter(lambda text: "\0" not in text and not text.startswith("/dev")),
        numbers.map(lambda number: f"{number:.30g}" if isinstance(number, float) else str(number)[:40]),
    )
    words = st.lists(st.one_of(st.tuples(st.sampled_from(OPTIONS), value), st.tuples(value)), max_size=4)
    verb = st.sampled_from(["generate", "generate", "generate", "compare", "report", "train", "bench", "nonsense"])
    return st.tuples(verb, words.map(lambda pairs: [word for pair in pairs for word in pair]))


def _run_command(place: Place, drawn: tuple[str, list[str]]) -> None:
    verb, words = drawn
    common = ["--model", str(place.model), "--max-tokens", "3"] if verb in ("generate", "compare") else []
    # Neither a large answer nor many threads is what is looked for here.
    words = [word for word in words if not word.isdigit() or int(word) < 5]
    place.command(verb, *common, *words)


def _stops(place: Place) -> st.SearchStrategy[Any]:
    return st.tuples(st.text("ab ", max_size=30), st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3))


def _stop(place: Place, drawn: tuple[str, list[str]]) -> None:
    text, stops = drawn
    stream = TextStream(place.decoder.tokenizer, stops)
    pieces = [stream.push(token) for token in place.decoder.tokenizer.encode(text)]
    got = "".join([*pieces, stream.flush()])
    places = [text.find(stop) for stop in stops if stop in text]
    # Of several stop strings the one that is complete first ends the text.
    assert text.startswith(got)
    assert stream.stopped == bool(places)
    assert got == text or len(got) in places


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "a+"}, "age": {"enum": [1, 2]}},
    "required": ["name"],
    "additionalProperties": {"type": "array", "items": {"type": "number", "minimum": 0}, "maxItems": 3},
}


def _grammars(place: Place) -> st.SearchStrategy[Any]:
    rules = {
        "json_schema": changed(SCHEMA) | values | texts,
        "regex": st.text("ab(|)[]*+{}0,\\^.\ud800", max_size=12) | values,
        "choice": st.lists(texts, max_size=3) | values,
        "lark": st.text('start: x\n|"ab()*', max_size=12).map(lambda text: f"start: {text}") | values,
    }
    return st.sampled_from(list(rules)).flatmap(lambda kind: st.tuples(st.just(kind), rules[kind]))


def _compile_grammar(place: Place, drawn: tuple[str, Any]) -> None:
    place.decoder.grammar(**{drawn[0]: drawn[1]})


TARGETS: dict[str, Fuzzed] = {
    "drafters": Fuzzed(_settings, _draft),
    "samplings": Fuzzed(_sampling, _sample),
    "requests": Fuzzed(_requests, _request),
    "prompts": Fuzzed(_prompts, lambda p, d: p.decoder.generate(d[0], max_tokens=2, stop=d[1])),
    "grammars": Fuzzed(_grammars, _compile_grammar),
    "adapter configs": Fuzzed(_config, _load_adapter),
    "adapter weights": Fuzzed(_weights, _load_weights),
    "calibrations": Fuzzed(_calibration, _calibrate),
    "recipes": Fuzzed(_recipes, _read_recipes),
    "rows": Fuzzed(_rows, _read_rows),
    "datastores": Fuzzed(_datastores, _open_datastore),
    "runs": Fuzzed(_runs, _read_run),
    "models": Fuzzed(_model_files, _load_tokenizer),
    "command lines": Fuzzed(_command_lines, _run_command),
    "stop strings": Fuzzed(_stops, _stop),
}
