"""A load test against a live server: counts add up, texts are compared, and a server that is not there is one line."""

import json
from pathlib import Path

import pytest
from live import CLIENT, engine_of, serving
from pydantic import TypeAdapter
from stand_in import ScriptedEngine

from chat_model import save_chat_model
from command import invoke
from kangaroo.cli.schema import VERBS
from kangaroo.decoder import load
from kangaroo.errors import CapacityError


def test_a_load_test_counts_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_chat_model(tmp_path / "chat")
    decoder = load(folder / "target", adapter=folder / "adapter", dtype="float32")
    options = ("--at-once", "1", "--at-once", "3", "--requests", "2", "--max-tokens", "6")
    with serving(engine_of(decoder, rows=2)) as live:
        assert invoke("loadtest", live.url, *options, "--output", str(tmp_path / "out"), "--json") == 0
        done = CLIENT.get(live.url + "/metrics").text
    shown = capsys.readouterr().out
    TypeAdapter(VERBS["loadtest"]).validate_json(shown)
    found = json.loads(shown)
    assert found == json.loads((tmp_path / "out" / "loadtest.json").read_text())
    levels = found["levels"]
    assert [(level["at_once"], level["speculation"], level["requests"]) for level in levels] == [
        (1, True, 2),
        (1, False, 2),
        (3, True, 3),
        (3, False, 3),
    ]
    assert found["identical"] == found["compared"] == 5
    total = sum(level["tokens"] for level in levels)
    counted = next(line for line in done.splitlines() if line.startswith("kangaroo_generation_tokens_total"))
    assert total < float(counted.split()[1]) <= total + 12 + 3, "two requests came before, to warm up, and each prompt"
    for level in levels:
        assert 0 < level["time_to_first_token"]["p50"] <= level["whole"]["p50"] <= level["whole"]["p99"]
        assert level["tokens_per_second"] == level["tokens"] / level["seconds"]
    assert (tmp_path / "out" / "loadtest.html").read_text().count("<svg") == 3


def test_what_stands_in_the_way_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda: ScriptedEngine(["a", CapacityError("no memory")])) as live:
        for options, said in (
            (("http://127.0.0.1:9",), "no server answers"),
            ((live.url,), "no memory"),
            ((live.url, "--at-once", "0"), "at least 1"),
            ((live.url, "--requests", "0"), "at least one"),
        ):
            assert invoke("loadtest", *options) == 2
            error = capsys.readouterr().err.splitlines()[-1]
            assert error.startswith("error: ")
            assert said in error
