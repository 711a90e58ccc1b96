"""Files that are not what they should be: one line, exit status 2, whatever they are and whoever reads them."""

import json
import os
from pathlib import Path

import pytest
from damage import BAD_FILES, BAD_JSON, DEEP, DIGITS, Refused

from kangaroo.documents import read_documents
from kangaroo.errors import DataError


@pytest.fixture(params=BAD_FILES)
def bad(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return BAD_FILES[request.param](tmp_path)


def readers(path: Path, model: str, output: Path) -> dict[str, list[str]]:
    """Commands that read a file, by what they take it for."""
    answer = ["generate", "--model", model, "--prompt", "x", "--max-tokens", "2"]
    return {
        "prompts": ["generate", "--model", model, "--drafter", "none", "--prompts", str(path)],
        "prompt": ["compare", "--model", model, "--file", str(path)],
        "datastore": [*answer, "--drafter", "rest", "--datastore", str(path)],
        "adapter": [*answer, "--adapter", str(path)],
        "heads": [*answer, "--drafter", "medusa", "--heads", str(path)],
        "model": ["info", "--drafter", "none", "--model", str(path)],
        "recipe": ["train", str(path), "--data", str(path)],
        "bench recipe": ["bench", str(path)],
        "run": ["report", str(path)],
        "documents": ["datastore", "build", str(path), "--model", model, "--output", str(output)],
    }


@pytest.mark.parametrize("what", readers(Path(), "", Path()))
def test_what_is_no_file_is_refused_by_every_reader(
    what: str, bad: Path, model: str, refused: Refused, tmp_path: Path
) -> None:
    output = tmp_path / "output.rest"
    assert len(refused(*readers(bad, model, output)[what])) < 1500
    assert not output.exists()


CONTENTS = {"bytes": b"\xff\xfe\x00 not text", "deep": DEEP.encode(), "digits": DIGITS.encode(), "null": b"\0" * 40}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_data_that_cannot_be_read(name: str, content: str, model: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(CONTENTS[content])
    build = ("datastore", "build", str(tmp_path / name), "--model", model, "--output", str(tmp_path / "x.rest"))
    assert name in refused(*build)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ('{"text": "\\ud800"}', "surrogate"),
        ('{"text": 5}', '"text" must be'),
        ('{"text": NaN}', "NaN"),
        ('{"messages": [{"role": "user", "content": null}]}', '"messages" must be'),
        ('{"messages": [{"role": "user", "content": "\\udfff"}]}', "surrogate"),
        (DEEP, "too deep"),
        (f'{{"text": {DIGITS}}}', "too many digits"),
        (json.dumps({"text": "x" * 10_000_001}), "10,000,001 characters"),
    ],
    ids=["surrogate", "number", "nan", "no content", "surrogate in chat", "deep", "digits", "long"],
)
def test_rows_are_refused_by_their_line(row: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n\n' + row + "\n")
    with pytest.raises(DataError, match="line 3") as caught:
        list(read_documents(path))
    assert named in str(caught.value)


def test_invalid_bytes_are_found_on_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' * 3 + b'{"text": "\xff"}\n' + b'{"text": "fine"}\n' * 3000)
    with pytest.raises(DataError, match=r"line 4 is not text in UTF-8: byte 0xff"):
        list(read_documents(path))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(b"\xef\xbb\xbfHello")
    assert [document.text for document in read_documents(path)] == ["Hello"]
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b'\xef\xbb\xbf{"text": "Hello"}\n')
    assert [document.text for document in read_documents(rows)] == ["Hello"]


@pytest.mark.parametrize("content", BAD_JSON)
@pytest.mark.parametrize(
    "name",
    [
        "adapter/config.json",
        "adapter/calibration.json",
        "target/config.json",
        "target/tokenizer.json",
        "target/tokenizer_config.json",
        "target/generation_config.json",
    ],
)
def test_json_of_a_model_or_adapter(
    name: str, content: str, copy: Path, refused: Refused, request: pytest.FixtureRequest
) -> None:
    (copy / name).write_text(BAD_JSON[content])
    refused(
        "generate",
        "--model",
        str(copy / "target"),
        "--adapter",
        str(copy / "adapter"),
        "--set",
        "stop=auto",
        "--prompt",
        "x",
        "--max-tokens",
        "2",
    )


def test_reading_as_root_or_not_a_file_without_permission(tmp_path: Path, model: str, refused: Refused) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = tmp_path / "secret.txt"
    path.write_text("x")
    path.chmod(0)
    assert "Permission denied" in refused("compare", "--model", model, "--file", str(path))
