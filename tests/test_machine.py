"""How much memory is left: what torch keeps for itself is free to it, and a container has less than the machine."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from kangaroo import cgroup
from kangaroo.machine import available_bytes, machine, trim_heap

CPU = torch.device("cpu")


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8,000 bytes of which 5,000 are available, and where its control groups are mounted."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=8000, available=5000))
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(cgroup, "MOUNTED", tmp_path / "mounted")
    return tmp_path / "mounted"


def test_without_a_container_what_the_system_can_give_is_available(groups: Path) -> None:
    assert available_bytes(CPU) == 5000
    assert machine()["memory_bytes"] == 8000


def test_a_container_has_what_its_limit_leaves_after_file_cache_is_given_up(groups: Path) -> None:
    (groups.parent / "membership").write_text("0::/\n")
    stat = "anon 700\nactive_file 150\ninactive_file 50"
    write(groups, memory__max=3000, memory__current=1000, memory__stat=stat)
    assert available_bytes(CPU) == 3000 - (1000 - 200)
    assert machine()["memory_bytes"] == 3000


def test_the_first_version_of_control_groups(groups: Path) -> None:
    (groups.parent / "membership").write_text("5:cpu,cpuacct:/\n4:hugetlb,memory:/box\n0::/box\n")
    unlimited, stat = 2**63 - 4096, "inactive_file 3\ntotal_active_file 40\ntotal_inactive_file 60"
    write(groups / "memory", memory__limit_in_bytes=unlimited, memory__usage_in_bytes=9, memory__stat=stat)
    assert available_bytes(CPU) == 5000
    write(groups / "memory" / "box", memory__limit_in_bytes=2000, memory__usage_in_bytes=500, memory__stat=stat)
    assert available_bytes(CPU) == 2000 - (500 - 100)


def test_every_group_around_the_process_counts(groups: Path) -> None:
    (groups.parent / "membership").write_text("0::/pod/box\n")
    write(groups / "pod" / "box", memory__max="max", memory__current=1, memory__stat="anon 1")
    write(groups / "pod", memory__max=1000, memory__current=900, memory__stat="anon 900")
    assert available_bytes(CPU) == 100
    write(groups / "pod", memory__current=1200)
    assert available_bytes(CPU) == 0, "over its limit until the kernel has reclaimed"


def test_a_path_on_the_host_is_not_looked_for_inside_the_container(groups: Path) -> None:
    (groups.parent / "membership").write_text("0::/kubepods/of/the/host\n")
    write(groups, memory__max=1000, memory__current=300, memory__stat="anon 300")
    assert available_bytes(CPU) == 700


def test_on_this_machine() -> None:
    assert 0 < available_bytes(CPU) <= machine()["memory_bytes"]


def test_systems_that_count_no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS, which knows no SC_AVPHYS_PAGES, and on Windows, which has no sysconf at all."""
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert available_bytes(CPU) > 0
    assert machine()["memory_bytes"] > 0
    assert machine()["cores"] > 0


@pytest.mark.skipif(not hasattr(psutil, "heap_trim"), reason="this C library trims no heap")
def test_holes_in_the_heap_go_back_to_the_system() -> None:
    """A block between two that stay can be used again, and until then it is held: up to when the heap is trimmed."""
    blocks = [torch.zeros(1 << 12) for _ in range(4096)]
    stay = blocks[::2]
    del blocks
    held = psutil.Process().memory_info().rss
    trim_heap()
    assert held - psutil.Process().memory_info().rss > 8 << 20
    del stay


def test_a_heap_that_cannot_be_trimmed_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(psutil, "heap_trim", raising=False)
    trim_heap()


def test_blocks_that_torch_holds_in_reserve_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 800)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert available_bytes(device) == 100 + 500


def test_the_command_line_needs_no_unix() -> None:
    """Windows has no fcntl."""
    code = "import sys; sys.modules['fcntl'] = None; from kangaroo.cli import bench, main"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


MANY_SHAPES = """
import psutil, torch
from kangaroo.machine import bound_kernel_caches
bound_kernel_caches()
weight = torch.randn(32, 32)
packed = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
for rows in range(1, 1000):
    torch.ops.mkldnn._linear_pointwise(torch.randn(rows, 32), packed, None, "none", [], "")
    if rows == 400:
        before = psutil.heap_info().heap_used
print(psutil.heap_info().heap_used - before)
"""


@pytest.mark.skipif(not hasattr(psutil, "heap_info"), reason="this C library does not say what its heap holds")
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_kernels_for_ever_more_shapes_do_not_pile_up_unless_the_user_wants_them_to() -> None:
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    others = {name: value for name, value in os.environ.items() if name not in names}

    def grown(**more: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", MANY_SHAPES], env=others | more, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    kept, all_of_them = grown(), grown(**dict.fromkeys(names, "1024"))
    assert kept < 4 << 20 < 64 << 20 < all_of_them
