"""What this process holds: memory, threads and open files. Long tests look from time to time; what grows fails them."""

import gc
import statistics
import threading
from dataclasses import dataclass, field
from typing import NamedTuple

import psutil

GROWTH = 0.05
"""Of the memory resident, by which it may grow."""


class Held(NamedTuple):
    """At one moment."""

    memory: int
    """Bytes resident."""
    threads: int
    files: int


@dataclass
class Watch:
    """Looks at this process, and judges what they have shown."""

    process: psutil.Process = field(default_factory=psutil.Process)
    looks: list[Held] = field(default_factory=list)

    def look(self) -> None:
        """While work is under way."""
        self.looks.append(self.now())

    def now(self) -> Held:
        """What is held at this moment."""
        return Held(self.process.memory_info().rss, threading.active_count(), self.process.num_fds())

    def check(self, before: Held, *, spare_memory: int, spare: int) -> str:
        """Fail for what has grown since `before`, with nothing under way; returns what to say of it.

        Memory: the median of the last quarter of the looks against that of the second, as the first fills caches.
        `spare_memory`: bytes that it may grow by however little there is; `spare`: threads and open files likewise,
        as pools start what they need when they first need it.
        """
        gc.collect()
        after, quarter = self.now(), max(1, len(self.looks) // 4)
        sizes = [look.memory for look in self.looks]
        settled = int(statistics.median(sizes[quarter : 2 * quarter] or sizes))
        last = int(statistics.median(sizes[-quarter:]))
        said = (
            f"memory {settled >> 20} -> {last >> 20} MiB from the second quarter to the last, "
            f"threads {before.threads} -> {after.threads}, open files {before.files} -> {after.files}"
        )
        assert last - settled <= max(GROWTH * settled, spare_memory), said
        assert after.threads - before.threads <= spare, said
        assert after.files - before.files <= spare, said
        return said
