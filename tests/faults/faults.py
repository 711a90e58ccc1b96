"""`make faults`: kills at random moments, disks that are full or read-only at every write, flipped bits.

After each of them nothing may be lost: what is there is whole, and going on comes to what an undisturbed run comes to.
"""

import argparse
import errno
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar
from work import REFUSED, Work, copied, fork, fresh, make_works, wait

WRITES = ("fsync", "replace", "mkdir")
PLACES = (*range(1, 13), 16, 24, 32, 64, 128, 256, 512)
"""Which write fails: all of the first dozen, then fewer, as they repeat themselves."""
SIZES = (0, 10, 500, 5_000, 20_000, 60_000, 150_000)
"""Bytes beyond which no file can grow, as if the disk were full there."""


Expected = tuple[Any, float]
"""What a work comes to undisturbed, and its seconds."""


def undisturbed(work: Work, folder: Path) -> Expected:
    """Done once, and kept as it is."""
    began = time.monotonic()
    assert wait(fork(lambda: work.act(fresh(folder)))) == 0
    return work.result(folder), time.monotonic() - began


def kill(work: Work, folder: Path, expected: Expected, times: int, chance: random.Random) -> str:
    """Kill −9 so many times, going on in between; whenever the work gets to its end, compare and begin anew."""
    wanted, seconds = expected
    fresh(folder)
    left = times
    while left:
        child = fork(lambda: work.act(folder))
        time.sleep(chance.random() * seconds)
        os.kill(child, signal.SIGKILL)
        status = wait(child)
        assert status in (0, -9), f"going on after a kill ended with {status}"
        left -= status == -9
        work.whole(folder)
        if status == 0:
            assert work.result(folder) == wanted, "another result"
            fresh(folder)
    assert wait(fork(lambda: work.act(folder))) == 0
    assert work.result(folder) == wanted, "another result"
    return f"killed {times} times"


def refuse_writes(work: Work, folder: Path, expected: Expected) -> str:
    """Let every write fail in turn, for want of room and of permission."""
    tried = 0
    for number in (errno.ENOSPC, errno.EROFS):
        for name in WRITES:
            for place in PLACES:
                fresh(folder)
                status = wait(fork(lambda n=name, p=place, e=number: (_fail_at(n, p, e), work.act(folder))))
                assert status in (0, REFUSED), f"{name} no. {place} failing with {os.strerror(number)}: {status}"
                work.whole(folder)
                if status == 0:
                    break
                tried += 1
                assert wait(fork(lambda: work.act(folder))) == 0, f"not gone on after {name} no. {place}"
                assert work.result(folder) == expected[0], "another result"
    return f"{tried} writes that failed"


def _fail_at(name: str, place: int, number: int) -> None:
    plain: Callable[..., Any] = getattr(os, name)
    count = 0

    def failing(*arguments: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count == place:
            raise OSError(number, os.strerror(number))
        return plain(*arguments, **more)

    setattr(os, name, failing)


def limit_sizes(work: Work, folder: Path, expected: Expected) -> str:
    """Let no file grow beyond a size."""
    refused = 0
    for size in SIZES:
        fresh(folder)
        status = wait(
            fork(lambda size=size: (resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)), work.act(folder)))
        )
        assert status in (0, REFUSED), f"files of {size} bytes at most: {status}"
        refused += status == REFUSED
        work.whole(folder)
        assert wait(fork(lambda: work.act(folder))) == 0
        assert work.result(folder) == expected[0], "another result"
    assert refused, "no limit was in the way"
    return f"{refused} full disks"


def flip(work: Work, folder: Path, times: int, chance: random.Random) -> str:
    """Flip a bit, so many times in files of each kind; whoever reads them finds it, or comes to the same."""
    kept, found, said = folder.with_name("kept"), 0, []
    assert wait(fork(lambda: work.act(fresh(kept)))) == 0
    for pattern, use in work.uses.items():
        wanted = use(copied(kept, folder))
        files = sorted(path.relative_to(kept) for path in kept.glob(pattern))
        assert files, f"no {pattern}"
        found = 0
        for _ in range(times):
            path = copied(kept, folder) / chance.choice(files)
            whole = path.read_bytes()
            at, bit = chance.randrange(len(whole)), chance.randrange(8)
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            status = wait(fork(lambda use=use, wanted=wanted: _same(use(folder), wanted)))  # type: ignore[misc]
            where = f"{path.relative_to(folder)}: bit {bit} of byte {at} ({whole[max(0, at - 20) : at + 20]!r})"
            assert status in (0, REFUSED), f"{where} was not found ({status})"
            found += status == REFUSED
        said.append(f"{pattern} {found}")
    return f"{times} flipped bits in each of these were found so often, the others harmless: {', '.join(said)}"


def _same(got: Any, wanted: Any) -> None:
    assert got == wanted, "another result"


def main() -> int:
    """All of it, or less."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="Over all kinds of work together.")
    parser.add_argument("--flips", type=int, default=20, help="In each file.")
    parser.add_argument("--only", action="append")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    chance, began = random.Random(given.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as base:
        os.environ["KANGAROO_CACHE"] = str(Path(base) / "cache")
        works = make_works(Path(base))
        chosen = {name: work for name, work in works.items() if not given.only or name in given.only}
        for name, work in chosen.items():
            folder = Path(base) / "work"
            expected = undisturbed(work, folder)
            kills = -(-given.kills // len(chosen))
            for attack in (
                lambda: kill(work, folder, expected, kills, chance),  # noqa: B023 (called at once)
                lambda: refuse_writes(work, folder, expected),  # noqa: B023
                lambda: limit_sizes(work, folder, expected),  # noqa: B023
                lambda: flip(work, folder, given.flips, chance),  # noqa: B023
            ):
                said = attack()
                print(f"[{time.monotonic() - began:4.0f} s] {name}: {said}", flush=True)
    print("nothing was lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
