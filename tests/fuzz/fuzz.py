"""`make fuzz`: every kind of input in turn, for so many minutes.

Prints what fails, at its simplest, and how many cases there were.
"""

import argparse
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import psutil
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "training"), str(HERE.parent / "bench")]

from place import Place, models_kept  # noqa: E402
from targets import TARGETS  # noqa: E402

PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
MEMORY = 4 * 10**9
"""Bytes beyond what there was at the start at which a case fails, instead of the machine."""


def fuzz(place: Place, name: str, *, cases: int, number: int | None) -> None:
    """Try so many cases of one kind; the same ones every time for a `number` of None."""
    target = TARGETS[name]

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=number is None,
        phases=PHASES,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.draw(place))
    def attempt(drawn: Any) -> None:
        with place.case():
            target.act(place, drawn)

    with models_kept(place):
        (attempt if number is None else seed(number)(attempt))()


def main() -> int:
    """Fuzz, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", choices=list(TARGETS), action="append")
    parser.add_argument("--cases", type=int, default=50, help="Of one kind before the next has its turn.")
    parser.add_argument("--seed", type=int, default=0)
    given_ = parser.parse_args()
    torch.set_num_threads(1)
    began, failed, counts = time.monotonic(), set[str](), dict[str, int]()
    until = began + 60 * given_.minutes
    with tempfile.TemporaryDirectory() as folder:
        place, turn = Place(Path(folder)), given_.seed
        most = psutil.Process().memory_info().data + MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        names = given_.only or list(TARGETS)
        while time.monotonic() < until and failed != set(names):
            turn += 1
            for name in names:
                before = place.cases
                try:
                    if name not in failed and time.monotonic() < until:
                        fuzz(place, name, cases=given_.cases, number=turn)
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    print(f"FAILED: {name}, seed {turn}", flush=True)
                    traceback.print_exception(error, limit=-12)
                    failed.add(name)
                counts[name] = counts.get(name, 0) + place.cases - before
            if turn % 10 == 0:
                print(_rate(place.cases, began), flush=True)
    for name, count in counts.items():
        print(f"{name:16} {count:7,} cases{'  FAILED' if name in failed else ''}")
    print(f"{_rate(sum(counts.values()), began)}; {len(failed)} of {len(names)} kinds of input failed")
    return 1 if failed else 0


def _rate(cases: int, began: float) -> str:
    seconds = time.monotonic() - began
    return f"{cases:,} cases in {seconds / 60:.1f} minutes, {cases / seconds:.0f} a second"


if __name__ == "__main__":
    sys.exit(main())
