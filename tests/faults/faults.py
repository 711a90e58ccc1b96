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
from work import REFUSED, Work, fork, fresh, make_works, wait

from kangaroo.errors import KangarooError

WRITES = ("fsync", "replace", "mkdir")
PLACES = (*range(1, 13), 16, 24, 32, 64, 128, 256, 512)
"""Which write fails: all of the first dozen, then fewer, as they repeat themselves."""
SIZES = (0, 10, 500, 5_000, 20_000, 60_000, 150_000)
"""Bytes beyond which no file can grow, as if the disk were full there."""


def undisturbed(work: Work, folder: Path) -> tuple[Any, float]:
    """(what the work comes to, its seconds)."""
    began = time.monotonic()
    assert wait(fork(lambda: work.act(fresh(folder)))) == 0
    return work.result(folder), time.monotonic() - began


def kill(work: Work, folder: Path, times: int, chance: random.Random) -> None:
    """Kill −9 so many times, going on in between; whenever the work gets to its end, compare and begin anew."""
    expected, seconds = undisturbed(work, folder)
    fresh(folder)
    while times:
        child = fork(lambda: work.act(folder))
        time.sleep(chance.random() * seconds)
        os.kill(child, signal.SIGKILL)
        status = wait(child)
        assert status in (0, -9), f"going on after a kill ended with {status}"
        times -= status == -9
        work.whole(folder)
        if status == 0:
            assert work.result(folder) == expected, "another result"
            fresh(folder)
    assert wait(fork(lambda: work.act(folder))) == 0
    assert work.result(folder) == expected, "another result"


def refuse_writes(work: Work, folder: Path) -> int:
    """Let every write fail in turn, for want of room and of permission; returns how many there were."""
    expected, _ = undisturbed(work, folder)
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
                assert work.result(folder) == expected, "another result"
    return tried


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


def limit_sizes(work: Work, folder: Path) -> int:
    """Let no file grow beyond a size; returns how often that was in the way."""
    expected, _ = undisturbed(work, folder)
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
        assert work.result(folder) == expected, "another result"
    assert refused, "no limit was in the way"
    return refused


DIGESTED = {
    "train": ["run/state.safetensors"],
    "datastore build": ["x.rest"],
    "adapter save": ["adapter.safetensors"],
}
"""Files of which every bit counts."""


def flip(work: Work, folder: Path, names: list[str], times: int, chance: random.Random) -> None:
    """Flip a bit, so many times in each file; going on must find it."""
    assert wait(fork(lambda: work.act(fresh(folder)))) == 0
    for name in names:
        path = folder / name
        whole = path.read_bytes()
        for _ in range(times):
            at, bit = chance.randrange(len(whole)), chance.randrange(8)
            if whole[at : at + 1] == b" ":
                continue  # padding of a header
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            try:
                work.whole(folder)
            except KangarooError:
                continue
            status = wait(fork(lambda: work.act(folder))) if work.whole.__name__ == "<lambda>" else 0
            assert status == REFUSED, f"{name}: bit {bit} of byte {at} was not found ({status})"
        path.write_bytes(whole)


def main() -> int:
    """All of it, or less."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="Over all kinds of work together.")
    parser.add_argument("--flips", type=int, default=30, help="In each file.")
    parser.add_argument("--only", action="append")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as base:
        works = make_works(Path(base))
        chosen = {name: work for name, work in works.items() if not given.only or name in given.only}
        for name, work in chosen.items():
            folder = Path(base) / "work"
            kill(work, folder, max(1, given.kills // len(chosen)), chance)
            print(f"{name}: killed {max(1, given.kills // len(chosen))} times, nothing lost", flush=True)
            print(f"{name}: {refuse_writes(work, folder)} writes that failed, nothing lost", flush=True)
            print(f"{name}: {limit_sizes(work, folder)} full disks, nothing lost", flush=True)
            if name in DIGESTED:
                flip(work, folder, DIGESTED[name], given.flips, chance)
                print(
                    f"{name}: {given.flips} flipped bits in each of {', '.join(DIGESTED[name])}, all found", flush=True
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
