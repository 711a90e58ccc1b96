"""Threads by a trial: the fewest that are about as fast, remembered, and never changed where nobody asked."""

import json
from pathlib import Path

import pytest
import torch

import kangaroo.threads
from kangaroo.decoder import load
from kangaroo.errors import ConfigError
from kangaroo.threads import choose_threads
from little_model import TARGET
from tiny import build


@pytest.fixture(autouse=True)
def _six_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANGAROO_CACHE", str(tmp_path))
    monkeypatch.setattr(kangaroo.threads, "_cores", lambda: 6)


def clock(seconds: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A clock by which a step takes so long with so many threads; returns what was timed."""
    timed: list[int] = []
    now = [0.0]

    def read() -> float:
        timed.append(torch.get_num_threads())
        now[0] += seconds[torch.get_num_threads()] / 2  # read before and after every step
        return now[0]

    monkeypatch.setattr(kangaroo.threads.time, "perf_counter", read)
    return timed


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: 1.0, 2: 0.6, 4: 0.4, 6: 0.3}, 6),
        ({1: 1.0, 2: 0.6, 4: 0.59, 6: 0.58}, 2),
        ({1: 1.0, 2: 30.0, 4: 30.0, 6: 30.0}, 1),
    ],
    ids=["all", "few-are-as-good", "a-shared-machine"],
)
def test_the_fewest_threads_that_are_about_as_fast_are_chosen_and_kept(
    seconds: dict[int, float], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed, model = clock(seconds, monkeypatch), build("llama")
    assert choose_threads(model) == best == torch.get_num_threads()
    assert set(timed) == {1, 2, 4, 6}
    timed.clear()
    torch.set_num_threads(3)
    assert choose_threads(model) == best == torch.get_num_threads()
    assert not timed


def test_threads_stay_as_they_are_unless_asked(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    load(TARGET, drafter="none", dtype=torch.float32)
    assert torch.get_num_threads() == 2
    load(TARGET, drafter="none", dtype=torch.float32, threads=3)
    assert torch.get_num_threads() == 3
    load(TARGET, drafter="none", dtype=torch.float32, threads="auto")
    assert torch.get_num_threads() in (1, 2, 4, 6)
    found = [json.loads(file.read_text())["found"] for file in (tmp_path / "trials").glob("*.json")]
    assert any(name.startswith("threads llama") for table in found for name in table)
    with pytest.raises(ConfigError, match=r"threads must be in 1\.\.1024, got 0"):
        load(TARGET, drafter="none", threads=0)
    with pytest.raises(ConfigError, match="threads must be a whole number, got 'all'"):
        load(TARGET, drafter="none", threads="all")  # type: ignore[arg-type]
