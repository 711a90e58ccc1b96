"""Files of questions: every format, every mistake with its line, and which questions a limit asks."""

import gzip
import json
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from kangaroo import demo
from kangaroo.bench.formats import CATEGORIES, MT_BENCH, fetch, read_questions
from kangaroo.bench.questions import Question, in_running_order, read_prompts
from kangaroo.errors import ConfigError, DataError

SPEC = {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."], "reference": ["not read"]}
SPEED = {"question_id": "a1", "category": "coding", "sub_category": "python", "turns": ["Sort a list."]}
LONG = {"question_id": "t1", "category": "low_entropy", "sub_category": "code", "turns": ["Go on."]}


def lines(*rows: Any) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def read(*rows: Any, source: str = "file.jsonl", split: str | None = None) -> list[Question]:
    return read_questions(lines(*rows), source, split)


def test_spec_bench() -> None:
    writing, qa = read(SPEC, {"question_id": 321, "category": "qa", "turns": ["Who?"]})
    assert (writing.id, writing.task, writing.category) == (81, "mt_bench", "writing")
    assert writing.turns == ("Write.", "Again.")
    assert (qa.task, qa.category) == ("qa", "qa")
    assert writing.conversation(["Once."]) == [
        {"role": "user", "content": "Write."},
        {"role": "assistant", "content": "Once."},
        {"role": "user", "content": "Again."},
    ]
    assert len({"mt_bench" if category in MT_BENCH else category for category in CATEGORIES}) == 6


def test_speed_bench_takes_the_split_from_the_row_or_from_the_name_of_the_file() -> None:
    qualitative = read(SPEED, source="speed/qualitative/test.jsonl")[0]
    assert (qualitative.task, qualitative.split) == ("coding", "qualitative")
    for rows, source in (([LONG], "throughput_8k.jsonl"), ([{**LONG, "split": "throughput_8k"}], "any.jsonl")):
        long = read(*rows, source=source)[0]
        assert (long.task, long.category, long.split) == ("throughput_8k", "low_entropy", "throughput_8k")
    two = [{**LONG, "split": "throughput_1k"}, {**LONG, "question_id": "t2", "split": "throughput_32k"}]
    assert [question.id for question in read(*two, split="throughput_32k")] == ["t2"]


def test_evaluation_prompts_of_one_split() -> None:
    held_out = read_questions(demo.PROMPTS.read_bytes(), "prompts", "held-out")
    expected = read_prompts(split="held-out")
    assert [question.id for question in held_out] == [prompt.id for prompt in expected]
    assert [question.conversation([]) for question in held_out] == [prompt.messages for prompt in expected]
    assert {question.task for question in held_out} == {prompt.kind for prompt in expected}
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    question = read({"id": "x", "kind": "chat", "messages": system})[0]
    assert (question.turns, question.conversation([])) == (("Hello?",), system)


def test_gsm8k_human_eval_and_prompts_of_ones_own() -> None:
    assert [(q.id, q.task, q.turns) for q in read({"question": "2 + 2?", "answer": "#### 4"})] == [
        (1, "gsm8k", ("2 + 2?",))
    ]
    assert read({"task_id": "HumanEval/0", "prompt": "def f():"})[0].id == "HumanEval/0"
    own = read({"prompt": "One"}, "", {"prompt": "Two", "id": "b", "task": "poems", "category": "odes"})
    assert [(q.id, q.task, q.category) for q in own] == [(1, "prompts", "prompts"), ("b", "poems", "odes")]


def test_gzipped_files_and_separators_inside_of_strings() -> None:
    content = json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False).encode() + b"\n"
    assert read_questions(gzip.compress(content), "x.gz")[0].turns == ("a\u2028b\x85c",)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([SPEC, {**SPEC, "question_id": 82, "category": "poetry"}], "line 2: unknown category 'poetry'; .*writing"),
        ([SPEC, SPEC], "line 2: question 81 occurs twice, first at file.jsonl, line 1"),
        ([SPEC, {"category": "qa", "turns": ["?"]}], "line 2: 'question_id' is missing"),
        ([{"category": "qa", "turns": ["?"]}], "line 1: 'question_id' is missing"),
        ([{**SPEC, "question_id": None}], "line 1: 'question_id' must be a whole number or a non-empty string"),
        ([{**SPEC, "turns": []}], "line 1: 'turns' must be a non-empty list of non-empty strings, got \\[\\]"),
        ([{**SPEC, "turns": ["a", " "]}], "line 1: 'turns' must be"),
        ([SPEC, "{oops"], "line 2: not JSON"),
        ([SPEC, "[1]"], "line 2: expected a JSON object"),
        ([{"foo": 1}], "line 1: in no known format: it has the keys foo; known are .*GSM8K: answer, question"),
        ([{**SPEED, "split": "qualitative", "category": "mixed"}], "unknown category 'mixed'"),
        ([SPEED], "line 1: to which split does it belong"),
        ([{**LONG, "split": "throughput_9k"}], "unknown split 'throughput_9k'; .*throughput_8k"),
        ([{"id": "x", "kind": "chat", "messages": [{"role": "assistant", "content": "Hi"}]}], "ends with a user's"),
        ([{"id": "", "kind": "chat", "messages": []}], "line 1: 'id' must be a non-empty string"),
        ([{"question": "", "answer": ""}], "line 1: 'question' must be a non-empty string"),
        ([{"task_id": True, "prompt": "x"}], "line 1: 'task_id' must be"),
        ([{"prompt": 3}], "line 1: 'prompt' must be a non-empty string, got 3"),
        ([], "holds no questions"),
    ],
)
def test_mistakes_name_their_line(rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(*rows)


def test_a_split_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"has no split 'dev'; it is not divided into splits"):
        read(SPEC, split="dev")
    with pytest.raises(ConfigError, match=r"has no split 'dev'; it has qualitative"):
        read({**SPEED, "split": "qualitative"}, split="dev")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x1f\x8bbroken"])
def test_files_that_are_not_text(content: bytes) -> None:
    with pytest.raises(DataError, match=r"x is not (JSON lines|text)"):
        read_questions(content, "x")


def test_a_limit_asks_all_tasks_evenly_and_their_categories_in_turn() -> None:
    questions = [
        Question(number, "mt_bench" if category in MT_BENCH else category, category, ("?",))
        for number, category in enumerate(category for category in CATEGORIES for _ in range(10))
    ]
    order = in_running_order(questions)
    assert sorted(question.id for question in order) == list(range(130))
    for limit in (6, 12, 13, 60):
        counts = Counter(question.task for question in order[:limit])
        assert len(counts) == 6
        assert max(counts.values()) - min(counts.values()) <= 1
    of_mt_bench = [question.category for question in order if question.task == "mt_bench"]
    assert of_mt_bench[:8] == list(MT_BENCH)
    assert order == in_running_order(questions)


class Files(BaseHTTPRequestHandler):
    """Serves one file, whole under /whole and cut short under /short."""

    def __init__(self, content: bytes, *arguments: Any):
        self.content = content
        super().__init__(*arguments)

    def do_GET(self) -> None:
        known = self.path in ("/whole", "/short")
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(self.content) if known else 0))
        self.end_headers()
        if known:
            self.wfile.write(self.content[: 10 if self.path == "/short" else None])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), partial(Files, lines(SPEC)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_questions_from_the_web(address: str) -> None:
    assert fetch(f"{address}/whole") == lines(SPEC)
    for broken in ("none", "short"):
        with pytest.raises(DataError, match=f"cannot fetch {address}/{broken}"):
            fetch(f"{address}/{broken}")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file of questions"):
        fetch(str(tmp_path / "absent.jsonl"))
    for address in ("http://127.0.0.1:9/closed", "http://\udcff", "http://[", "http://127.0.0.1:99999999/x"):
        with pytest.raises(DataError, match="cannot fetch"):
            fetch(address)
