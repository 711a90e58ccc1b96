"""Recipes and runs that contradict themselves."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import DEEP, DIGITS, Refused

from command import invoke
from kangaroo.bench.records import RECORDS
from kangaroo.errors import ConfigError, DataError
from kangaroo.sealed import open_sealed, seal
from kangaroo.toml import read_table

RECIPE = {
    "kind": '"adapter"',
    "target": '"{model}"',
    "output": '"{output}"',
    "adapter.exit_layer": "1",
    "schedule.steps": "1",
    "data.held_out": "2",
    "evaluation.prompts": "2",
}
WRONG = {
    "kind of lists": {"kind": '["adapter"]'},
    "kind of numbers": {"kind": "5"},
    "kind of tables": {"kind": "{{}}"},
    "betas": {"optimizer.betas": "[1.0, 1.0]"},
    "seed": {"seed": str(2**64)},
    "negative seed": {"seed": "-1"},
    "huge batch": {"schedule.batch_sequences": "1e25"},
    "large batch": {"schedule.batch_sequences": str(2**40)},
    "huge number": {"schedule.steps": DIGITS},
    "huge hexadecimal": {"schedule.steps": "0x" + "f" * 5000},
    "nan": {"optimizer.learning_rate": "nan"},
    "infinite": {"optimizer.learning_rate": "inf"},
    "infinite clip": {"optimizer.clip_norm": "inf"},
    "nothing but decay": {"optimizer.weight_decay": "nan"},
    "null in output": {"output": '"\\u0000"'},
    "null in target": {"target": '"\\u0000"'},
    "empty target": {"target": '""'},
    "section as value": {"schedule.steps.x": "1"},
    "deep": {"data.sources": DEEP},
    "strings for numbers": {"schedule.steps": '"one"'},
    "booleans for numbers": {"schedule.sequence_length": "true"},
    "unknown": {"shedule.steps": "1"},
    "unknown and long": {"data." + "x" * 5000: "1"},
}


def write(path: Path, table: dict[str, str], **known: object) -> Path:
    path.write_text("".join(f"{key} = {value}\n" for key, value in table.items()).format(**known))
    return path


@pytest.mark.parametrize("name", WRONG)
def test_recipes_that_cannot_be(name: str, model: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("\n\n\n".join(["Where would you like to eat tonight?"] * 6))
    path = write(tmp_path / "recipe.toml", RECIPE | WRONG[name], model=model, output=tmp_path / "run")
    assert len(refused("train", str(path), "--data", str(tmp_path / "rows.txt"))) < 1100


@pytest.mark.parametrize("content", [b"\xff", DEEP.encode(), b"x = " + DEEP.encode(), b"a." * 50_000 + b"b = 1", b"\0"])
@pytest.mark.parametrize("verb", ["train", "bench"])
def test_files_that_are_no_recipes(verb: str, content: bytes, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes(content)
    refused(verb, str(tmp_path / "recipe.toml"), "--data", "x")


def test_a_recipe_of_more_than_could_be_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    for content, named in (("\na" + ".a" * 5000 + " = 1", "line 2 has 10,005"), ("#\n" * 600_000, "1,200,000 char")):
        path.write_text(content)
        with pytest.raises(ConfigError, match=named):
            read_table(path)


BENCH = {"model": '"{model}"', "output": '"{output}"', "questions": '"{questions}"', "max_tokens": "3", "limit": "2"}
METHOD = '\n[[methods]]\nname = "lookup"\ndrafter = "prompt-lookup"\n'


@pytest.fixture
def bench(model: str, tmp_path: Path) -> Callable[..., Path]:
    (tmp_path / "questions.jsonl").write_text('{"prompt": "Where?"}\n{"prompt": "Why?"}\n')
    known = {"model": model, "output": tmp_path / "run", "questions": tmp_path / "questions.jsonl"}

    def make(methods: str = METHOD, **changes: str) -> Path:
        path = write(tmp_path / "bench.toml", BENCH | changes, **known)
        path.write_text(path.read_text() + methods)
        return path

    return make


@pytest.mark.parametrize(
    ("methods", "changes"),
    [
        (METHOD + "max_draft = 2.5\n", {}),
        (METHOD + 'max_draft = "x"\n', {}),
        (METHOD + "max_draft = nan\n", {}),
        (METHOD + "longest = 1000000\n", {}),
        (METHOD, {"threads": "100000"}),
        (METHOD, {"questions": '"/dev/zero"'}),
        (METHOD, {"questions": '"\\u0000"'}),
        (METHOD, {"max_tokens": "1e25"}),
        (METHOD, {"sampling.top_k": "0"}),
        (METHOD, {"sampling.temperature": "nan"}),
        (METHOD, {"sampling.presence_penalty": "1e300"}),
        ('\nmethods = "x"\n', {}),
        ("\n[[methods]]\n[[methods.name]]\n", {}),
    ],
    ids=range(13),
)
def test_benchmarks_that_cannot_be(
    methods: str, changes: dict[str, str], bench: Callable[..., Path], refused: Refused
) -> None:
    refused("bench", str(bench(methods, **changes)))


def test_an_answer_by_a_method_that_the_run_does_not_have(bench: Callable[..., Path], refused: Refused) -> None:
    """Both verbs say the same, and neither recommends the other."""
    recipe = bench()
    output = recipe.parent / "run"
    assert invoke("bench", str(recipe)) == 0
    lines = (output / RECORDS).read_text().splitlines()
    stranger = json.dumps(seal(open_sealed(json.loads(lines[-1]), "", DataError) | {"method": "stranger"}))
    (output / RECORDS).write_text("\n".join([*lines, stranger]) + "\n")
    for command in (["bench", str(recipe)], ["report", str(output)]):
        message = refused(*command)
        assert "'stranger'" in message
        assert "delete its lines" in message


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", "", DEEP, '{"recipe": 5}', '{"recipe": {}, "machine": 1, "commit": 1, "dirty": 1, "versions": 1}',
     '{"recipe": {"methods": 5}, "machine": 1, "commit": 1, "dirty": 1, "versions": 1, "resumed": 5}',
     '{"recipe": {"methods": [5]}, "machine": 1, "commit": 1, "dirty": 1, "versions": 1, "costs": 5}'],
    ids=range(8),
)  # fmt: skip
def test_a_provenance_that_says_nothing(content: str, bench: Callable[..., Path], refused: Refused) -> None:
    recipe = bench()
    output = recipe.parent / "run"
    assert invoke("bench", str(recipe)) == 0
    (output / "provenance.json").write_text(content)
    refused("bench", str(recipe))
    refused("report", str(output))


LINES = ["", "{}", "\ud800", "\0", DEEP, '{"question": ' + DIGITS + "}", '{"step": 1}', "\xff"]


@pytest.mark.parametrize("line", LINES,
                         ids=range(8))  # fmt: skip
def test_records_that_cannot_be_read(line: str, bench: Callable[..., Path], refused: Refused) -> None:
    recipe = bench()
    output = recipe.parent / "run"
    assert invoke("bench", str(recipe)) == 0
    with (output / RECORDS).open("ab") as file:
        file.write(line.encode("latin-1" if line == "\xff" else "utf-8", "surrogatepass") + b"\n")
    refused("bench", str(recipe))
    refused("report", str(output))
