"""Linears and layers compiled for this machine's processor, with which a row's bits do not depend on its company.

The sources beside this file are compiled once for each processor and compiler, and kept in the user's cache. That needs
a C++ compiler, so it is asked for by name: `compile=True`.
"""

import ctypes
import hashlib
import mmap
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from kangaroo.cache import round_up
from kangaroo.errors import ConfigError
from kangaroo.files import cache_folder, write_atomically
from kangaroo.machine import machine

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.cpp", "products.h"))
COMPILERS = ("c++", "g++", "clang++")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC"]
# Apple's compiler comes without OpenMP; there, a model is computed by one thread.
_THREADS = [] if sys.platform == "darwin" else ["-fopenmp"]
_SECONDS = 300
LINE, HUGE, PIECE = 64, 2 << 20, 256 << 20
"""Bytes: where weights begin, of a large page, and that memory for weights is taken by."""


class _Linear(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inner", ctypes.c_int64),
        ("outer", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("norm_in", "norm_mid")),
        *((name, ctypes.c_double) for name in ("epsilon", "scale")),
        *((name, ctypes.c_int64) for name in ("width", "heads", "stores", "dim")),
        *((name, _Linear) for name in ("read", "write", "widen", "narrow")),
    )


class _View(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "nodes", "extent", "threads")),
        *((name, ctypes.c_void_p) for name in ("slots", "rows", "cos", "sin", "mask", "paths")),
        *((name, ctypes.c_int64) for name in ("row", "head", "slot")),
    )


class Kernels:
    """The compiled library. Raises ConfigError where there is no compiler, or it does not compile this."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        if dtype not in DTYPES or device.type != "cpu":
            raise ConfigError(
                f"compile=True is for models on a CPU in float32 or bfloat16, got {str(dtype).removeprefix('torch.')} "
                f"on {device.type}; leave it out"
            )
        path = _compiled()
        self.name = path.stem
        """Of the library: another source, compiler or processor has another."""
        library = ctypes.CDLL(str(path))
        self.dtype, self._panel, self.lanes = dtype, int(library.panel_width()), int(library.lanes())
        pointer, whole = ctypes.c_void_p, ctypes.c_int64
        self._product = getattr(library, f"product_{DTYPES[dtype]}")
        self._product.argtypes, self._product.restype = [*[pointer] * 3, whole, whole, ctypes.c_int], None
        self.arena = Arena()
        self._layer = getattr(library, f"layer_{DTYPES[dtype]}")
        self._layer.argtypes, self._layer.restype = [pointer] * 6, None

    def pack(self, weight: Tensor, bias: Tensor | None) -> "PanelWeights":
        """Weights [O, K], and a bias [O], in the order in which these kernels read them."""
        return PanelWeights(self, weight, bias)

    def multiply(self, linear: _Linear, x: Tensor, outer: int) -> Tensor:
        """x [..., K] -> [..., O]."""
        x = x.contiguous()
        made = torch.empty(*x.shape[:-1], outer, dtype=x.dtype)
        rows, inner = x.numel() // x.shape[-1], x.shape[-1]
        at = ctypes.addressof(linear)
        self._product(at, x.data_ptr(), made.data_ptr(), rows, inner, torch.get_num_threads())
        return made

    def run(self, layer: _Layer, view: _View, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """A layer on x [B, N, D], its keys and values written to and read from their storage."""
        x = x.contiguous()
        made = torch.empty_like(x)
        stored = keys.data_ptr(), values.data_ptr()
        self._layer(ctypes.addressof(layer), ctypes.addressof(view), x.data_ptr(), made.data_ptr(), *stored)
        return made


class Arena:
    """Memory for weights in pieces of many pages at once, which a processor finds its way through faster."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """Room for so many numbers; it lives as long as any that was taken beside it."""
        size = round_up(count * dtype.itemsize, LINE)
        if len(self._free) < size:
            piece = torch.frombuffer(_large_pages(max(PIECE, size + HUGE)), dtype=torch.uint8)
            self._free = piece[-piece.data_ptr() % HUGE :]
        taken, self._free = self._free[: count * dtype.itemsize], self._free[size:]
        return taken.view(dtype)


def _large_pages(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    # Shared memory, mmap's default, is given no large pages unless a system is set up for it.
    whole = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole.madvise(mmap.MADV_HUGEPAGE)
    return whole


class PanelWeights:
    """Weights [O, K] in panels of results: of each, all terms one after the other; no other copy is kept."""

    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor | None):
        self.outer, self.inner = weight.shape
        pair = 2 if weight.dtype == torch.bfloat16 else 1  # terms that stand side by side
        self._panel = kernels._panel
        with torch.inference_mode(False), torch.no_grad():
            filled = functional.pad(weight.detach(), (0, self.inner % pair, 0, -self.outer % self._panel))
            panels = filled.view(-1, self._panel, filled.shape[1] // pair, pair)
            panels = panels.transpose(1, 2)  # [O / panel, K / pair, panel, pair]
            self._held = kernels.arena.take(panels.numel(), weight.dtype).view(panels.shape).copy_(panels)
            self._bias = None if bias is None else bias.detach().contiguous()
        self._kernels = kernels
        at = None if self._bias is None else self._bias.data_ptr()
        self.linear = _Linear(self._held.data_ptr(), at, filled.shape[1], self.outer)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., O]."""
        return self._kernels.multiply(self.linear, x, self.outer)

    def dense(self) -> Tensor:
        """A plain copy [O, K]."""
        return self._held.transpose(1, 2).reshape(len(self._held) * self._panel, -1)[: self.outer, : self.inner]


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What a layer of Llama's kind is made of."""

    norms: tuple[Tensor, Tensor | None]
    """Weights [D] of RMSNorm before attention and before the feed-forward network; None without the latter."""
    epsilon: float
    read: PanelWeights
    """Queries, keys and values."""
    write: PanelWeights
    wide: PanelWeights | None
    """Gate and up."""
    narrow: PanelWeights | None
    heads: int
    stores: int
    """Heads of keys and values."""
    dim: int
    scale: float


class CompiledLayer:
    """A layer of Llama's kind in one call, on the weights of its parts."""

    def __init__(self, kernels: Kernels, parts: LayerParts):
        self._kernels, self._parts = kernels, parts  # the parts own what the structure points to
        none = _Linear(None, None, 0, 0)
        self._norms = [None if norm is None else norm.detach().contiguous() for norm in parts.norms]
        pointers = [None if norm is None else norm.data_ptr() for norm in self._norms]
        linears = [none if part is None else part.linear for part in (parts.wide, parts.narrow)]
        sizes = (parts.write.outer, parts.heads, parts.stores, parts.dim)
        ends = (parts.read.linear, parts.write.linear, *linears)
        self._layer = _Layer(*pointers, parts.epsilon, parts.scale, *sizes, *ends)

    def __call__(self, x: Tensor, seen: "Seen", keys: Tensor, values: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]; keys and values [rows, H', S, dim] are those of the layer, all of them."""
        return self._kernels.run(self._layer, seen.of(keys), x, keys, values)


class Seen:
    """What all layers of a pass are told of it: where its tokens stand, and which slots each may look at."""

    def __init__(
        self,
        slots: Tensor,
        rows: Tensor | None,
        mask: Tensor,
        rotary: tuple[Tensor, Tensor],
        paths: Tensor | None,
    ):
        """slots [B, N]; rows [B]; additive mask [B, 1, N, S]; cosines and sines [B, N, dim]; paths [B, N, S]."""
        batch, nodes = slots.shape
        cos, sin = (part.expand(batch, -1, -1).contiguous() for part in rotary)
        mask = mask.expand(batch, 1, -1, -1).contiguous()
        # Kept while the structure points to them.
        self._kept = [slots, rows, cos, sin, mask, paths]
        self._kept = [None if part is None else part.contiguous() for part in self._kept]
        pointers = [None if part is None else part.data_ptr() for part in self._kept]
        self._view = _View(batch, nodes, mask.shape[-1], torch.get_num_threads(), *pointers, 0, 0, 0)

    def of(self, keys: Tensor) -> _View:
        """With the strides of keys and values [rows, H', S, dim], which are alike."""
        self._view.row, self._view.head, self._view.slot = keys.stride()[:3]
        return self._view


@cache
def _compiled() -> Path:
    """The library of this machine, compiled now if it has not been before."""
    compiler = _compiler()
    version = _run([compiler, "--version"]).stdout
    facts = machine()
    sources = [source.read_text(encoding="utf-8") for source in SOURCES]
    made_of = [*sources, version, *_FLAGS, *_THREADS, facts["cpu"], facts["cpu_capability"]]
    name = hashlib.sha256("\0".join(map(str, made_of)).encode()).hexdigest()[:16]
    path = cache_folder() / "kernels" / f"{name}.so"
    if not path.is_file():
        write_atomically(path, lambda part: _compile(compiler, part))
    return path


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    found = next((path for name in ([wanted] if wanted else COMPILERS) if (path := shutil.which(name))), None)
    if found is None:
        what = f"CXX names {wanted!r}, which is not there" if wanted else f"there is none of {', '.join(COMPILERS)}"
        raise ConfigError(f"compile=True needs a C++ compiler, and {what}; install one, or leave compile out")
    return found


def _compile(compiler: str, to: Path) -> None:
    done = _run([compiler, *_FLAGS, *_THREADS, "-o", str(to), str(SOURCES[0])])
    if done.returncode or not to.is_file():
        lines = (
            [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["nothing"]
        )
        raise ConfigError(
            f"compile=True: {compiler} says {lines[0].strip()!r}; set CXX to another, or leave compile out"
        )


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"compile=True: {command[0]} could not be run ({error}); set CXX, or leave compile out"
        ) from None
