"""The memory that a container leaves to this process: limits of Linux control groups, version 1 and 2.

A process in a container sees all of the machine's memory and is killed for using more than its group's share of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")
MOUNTED = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _Files:
    """What a version calls the files of a group, and in its memory.stat the file cache, which the kernel gives up."""

    limit: str
    usage: str
    cache: tuple[str, ...]


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
_V2 = _Files("memory.max", "memory.current", ("active_file", "inactive_file"))


def memory_limit() -> int | None:
    """Bytes that the process and its group may use at most; None without a limit."""
    return min((limit for _, _, limit in _limited()), default=None)


def memory_left() -> int | None:
    """Bytes that may still be allocated under every limit, after file cache has been given up; None without a limit."""
    return min((max(limit - _in_use(group, files), 0) for group, files, limit in _limited()), default=None)


def _limited() -> Iterator[tuple[Path, _Files, int]]:
    """(folder, names of files, bytes) of every group with a limit: the process's own and those around it."""
    for group, files in _groups():
        try:
            limit = (group / files.limit).read_text(encoding="ascii").strip()
        except (FileNotFoundError, PermissionError):  # the root has no limit; a sandbox may hide it, and others
            continue
        if limit != "max":
            yield group, files, int(limit)


def _groups() -> Iterator[tuple[Path, _Files]]:
    if not MEMBERSHIP.is_file():  # not Linux
        return
    for line in MEMBERSHIP.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, files = MOUNTED, _V2
        elif "memory" in controllers.split(","):
            root, files = MOUNTED / "memory", _V1
        else:
            continue
        # A container may be shown its path on the host, which does not exist below its own root: what exists counts.
        inner = Path(path.lstrip("/"))
        for group in (inner, *inner.parents):
            yield root / group, files


def _in_use(group: Path, files: _Files) -> int:
    lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    counts = dict(line.split(maxsplit=1) for line in lines)
    cache = sum(int(counts.get(name, 0)) for name in files.cache)
    return int((group / files.usage).read_text(encoding="ascii")) - cache
