"""The table of engines' speeds in docs/export.md says what was measured; an engine that fails says why."""

import json
import sys
from pathlib import Path

import pytest
from speed import BEGIN, DOCUMENT, END, RESULTS, Asked, figures, table

import engines
from engines import Answer, Setup, run_elsewhere


def test_the_table_follows_from_the_figures() -> None:
    written = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert written == table(json.loads(RESULTS.read_text(encoding="utf-8")))


def test_costs_are_in_the_engines_own_steps() -> None:
    def asked(seconds: float, tokens: int = 9, drafted: int = 0, accepted: int = 0) -> Asked:
        whole = Answer(tokens=[5] * tokens, seconds=seconds + 1, drafted=drafted, accepted=accepted)
        return Asked(whole, first=1.0)

    # Plain: 8 steps of 2 s. Drafted: 4 rounds of 2 drafted tokens at 0.5 s and 3 s of verifying. Alone: 0.5 s a step.
    found = figures([[1, 2]] * 2, [asked(16)] * 2, [asked(16, drafted=8, accepted=4)] * 2, [asked(4)])
    assert (found["draft step"], found["verifying"]) == (0.25, 1.5)
    assert (found["tokens a round"], found["drafted a round"], found["share accepted"]) == (2.0, 2.0, 0.5)
    assert found["speed-up"][0] == found["decoding speed-up"][0] == 1.0
    assert found["texts equal"] == "2 of 2"
    # What the engine counts past the end is no round's gain.
    past = Asked(Answer(tokens=[5] * 9, seconds=17, drafted=10, accepted=4, rounds=5), first=1.0)
    found = figures([[1, 2]], [asked(16)], [past], [asked(4)])
    assert (found["tokens a round"], found["drafted a round"], found["share accepted"]) == (1.6, 2.0, 0.4)


@pytest.mark.parametrize(
    ("script", "limit", "why"),
    [
        ("import time; time.sleep(60)", 1, "toy said nothing for 1 s and was ended"),
        ("raise SystemExit('no such model')", 60, "toy ended: no such model"),
        ("print(input() and '{}', flush=True)", 60, "toy ended"),
    ],
)
def test_an_engine_that_does_not_answer_is_given_up(
    script: str, limit: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "toys" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (tmp_path / "ask_toy.py").write_text(script, encoding="utf-8")
    monkeypatch.setattr(engines, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(engines, "HERE", tmp_path)
    monkeypatch.setattr(engines, "STARTING", limit)
    with pytest.raises(AssertionError, match=why), run_elsewhere("toy", "toys", Setup(target="")) as ask:
        ask([1], 1)
