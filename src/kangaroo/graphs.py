"""Passes at fixed addresses: run by a captured graph on CUDA, and by the function itself elsewhere.

A pass over a few tokens starts hundreds of kernels, each of which takes less time than starting it. A CUDA graph starts
them all at once, but on the same addresses every time, and in the same shapes. So the inputs of a pass are copied into
buffers that stay where they are, as wide as the next power of two, over as many slots as the next power of two of
blocks. Its results are copied out again: nobody outside holds a buffer.

Chains only, of a few nodes: prompts and trees come in too many shapes, and start no more kernels per token for it.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import Any, Literal, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kangaroo.cache import KVCache, LayerShape
from kangaroo.errors import ConfigError, ModelError
from kangaroo.passes import Attention
from kangaroo.tree import Placement, place_chain
from kangaroo.trial import Tried

Function = Callable[[Tensor, Any, Any], Sequence[Tensor]]
"""States [B, N, D], a Placement and a KVCache -> results [B, N, ...]; without the last two for what needs neither."""
Wanted = bool | Literal["auto"]
WIDEST, MOST_ROWS = 16, 128
"""Nodes of a pass at most, and rows times nodes: wider ones spend their time in the kernels."""
MOST = 64
"""Passes that are kept, the latest."""


class Frame:
    """A placement of nodes in buffers of fixed addresses, for all passes of one shape."""

    def __init__(self, batch: int, width: int, extent: int, device: torch.device):
        positions = torch.zeros(batch, width, dtype=torch.int64, device=device)
        # Of no memory: layers read what has been made of a mask, which is copied, and never the mask itself.
        mask = torch.empty(batch, width, extent, dtype=torch.bool, device="meta")
        self.where = Placement(positions, positions, mask, torch.empty(batch, extent, device="meta"))
        self._extent = extent
        self._held: Placement | None = None
        self._copied = set[object]()

    def hold(self, where: Placement) -> None:
        """Copy a placement of up to as many nodes, and all that has been made of it, unless it is here already."""
        if self._held is not where:
            self._held, self._copied = where, set()
            _fill(self.where.positions[..., None], where.positions[..., None])
        for key in where.derived.keys() - self._copied:
            self._copied.add(key)
            blocked, *rotary = where.derived[key]
            if key not in self.where.derived:
                sizes = [(*blocked.shape[:2], self.where.mask.shape[1], self._extent)]
                sizes += [(len(made), self.where.mask.shape[1], made.shape[-1]) for made in rotary]
                self.where.derived[key] = tuple(blocked.new_zeros(size) for size in sizes)
            buffer, *rest = self.where.derived[key]
            seen = blocked.shape[-1]
            _fill(buffer[..., :seen], blocked)
            if seen < self._extent:
                buffer[..., seen:].fill_(torch.finfo(buffer.dtype).min)
            for into, made in zip(rest, rotary, strict=True):
                _fill(into, made)


def _fill(buffer: Tensor, values: Tensor) -> None:
    """Values [..., N, D] into a buffer [..., W, D]: the last node stands in for those that are missing.

    It does what it would do alone, once more: it writes the same keys and values to the same slot.
    """
    nodes = values.shape[-2]
    buffer[..., :nodes, :].copy_(values)
    if nodes < buffer.shape[-2]:
        buffer[..., nodes:, :].copy_(values[..., -1:, :])


class Capturing:
    """CUDA's part: running functions so that they can be captured, and capturing them."""

    _one_at_a_time = Lock()  # in a process, as torch asks

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # One pool for all graphs: nothing that lies in it outlives a replay.
        self._pool = torch.cuda.graph_pool_handle()

    def aside(self, work: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """What a function returns, run on the stream that it will be captured on: libraries get ready there."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            done = work()
        here.wait_stream(self._stream)
        return done

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What replays a function, which is not run now. Raises ModelError if it cannot be captured."""
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            with self._one_at_a_time, torch.cuda.device(self._device):
                recording = torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                )
                with recording:
                    work()
        except RuntimeError as error:
            torch.cuda.set_stream(here)  # which torch leaves as it was during the capture
            raise ModelError(
                f"a pass could not be captured as a CUDA graph ({_in_short(error)}); load with graphs=False"
            ) from error
        return graph.replay

    def finish(self) -> None:
        """Wait until no replay is under way."""
        torch.cuda.current_stream(self._device).synchronize()


def _in_short(error: BaseException) -> str:
    """The first line of what went wrong first."""
    first = error.__context__ or error  # ending a capture that has failed fails as well
    return (str(first).strip() or type(first).__name__).splitlines()[0]


class _Static:
    """One pass: where its states come in, and where its results come out."""

    def __init__(self, x: Tensor, width: int, frame: Frame | None):
        self._frame = frame
        self._x = x.new_zeros(len(x), width, x.shape[-1])
        self._out: list[Tensor] | None = None
        self._replay: Callable[[], None] | None = None

    def __call__(
        self, function: Function, x: Tensor, where: Placement | None, cache: KVCache | None, by: Capturing | None
    ) -> tuple[Tensor, ...]:
        _fill(self._x, x)
        if self._frame is not None and where is not None:
            self._frame.hold(where)

        def work() -> Sequence[Tensor]:
            return function(self._x, None if self._frame is None else self._frame.where, cache)

        if self._out is None:
            done = work() if by is None else by.aside(work)
            self._out = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in done]
            self._write(done)
        elif by is None:
            self._write(work())
        else:
            if self._replay is None:
                self._replay = by.capture(lambda: self._write(work()))
            self._replay()
        nodes = x.shape[1]
        return tuple(out[:, :nodes].clone(memory_format=torch.contiguous_format) for out in self._out)

    def _write(self, done: Sequence[Tensor]) -> None:
        assert self._out is not None, "made for the first results"
        for out, each in zip(self._out, done, strict=True):
            out.copy_(each)


class StaticPasses:
    """The passes of a target that are run at fixed addresses. Threads may share it: they take turns."""

    def __init__(self, by: Capturing | None, most: int = MOST):
        """Without anything to capture them `by`, passes run in their buffers all the same."""
        self._by, self._most = by, most
        self._passes: OrderedDict[Hashable, _Static] = OrderedDict()
        self._frames: WeakValueDictionary[Hashable, Frame] = WeakValueDictionary()
        self._turn = Lock()

    def __len__(self) -> int:
        """How many passes are kept."""
        return len(self._passes)

    def takes(self, x: Tensor, where: Placement | None, cache: KVCache | None) -> bool:
        """Whether a pass over states [B, N, D] can be run here: decoding, over the nodes of chains."""
        if not torch.is_inference_mode_enabled() or x.ndim != 3 or not 1 <= x.shape[1] <= WIDEST:
            return False
        if where is not None and (cache is None or where.branches or where.prompt or where.rows is not None):
            return False
        return len(x) * _width(x) <= MOST_ROWS

    def run(
        self, name: Hashable, function: Function, x: Tensor, where: Placement | None, cache: KVCache | None
    ) -> tuple[Tensor, ...]:
        """`function` of states [B, N, D], a placement and a cache; `name` tells it from others.

        What the function reads of the placement must have been made of it already (`Placement.derived`).
        """
        with self._turn:
            one = self._find(name, x, where, cache)
            return one(function, x, where, cache, self._by)

    def _find(self, name: Hashable, x: Tensor, where: Placement | None, cache: KVCache | None) -> _Static:
        extent = 0 if where is None or cache is None else _reach(where.mask.shape[-1], cache)
        shape = len(x), _width(x), extent
        key = name, shape, None if cache is None else cache.layout
        if key in self._passes:
            self._passes.move_to_end(key)
            return self._passes[key]
        while len(self._passes) >= self._most:
            if self._by is not None:
                self._by.finish()
            self._passes.popitem(last=False)
        frame = self._frame(shape, x.device) if where is not None else None
        self._passes[key] = _Static(x, shape[1], frame)
        return self._passes[key]

    def _frame(self, shape: tuple[int, int, int], device: torch.device) -> Frame:
        frame = self._frames.get(shape)
        if frame is None:
            self._frames[shape] = frame = Frame(*shape, device)
        return frame


def _width(x: Tensor) -> int:
    """Nodes of a static pass that x [B, N, D] fits in."""
    return 1 << (x.shape[1] - 1).bit_length()


def _reach(extent: int, cache: KVCache) -> int:
    """Slots that a static pass looks at instead of so many."""
    blocks = -(-extent // cache.block)
    return min(cache.block << (blocks - 1).bit_length(), cache.stored)


class Captured(Tried, Protocol):
    """What capturing needs of a target, under the same names."""

    shapes: list[LayerShape]
    static: StaticPasses | None

    @property
    def way(self) -> Attention | None:
        """How its attention is computed; None for the model's own."""
        ...


def set_graphs(target: Captured, wanted: Wanted) -> str:
    """Have a target's passes captured if that is wanted and can be; "on", or "off" and why.

    Raises ConfigError where it is wanted in any case and cannot be.
    """
    if wanted not in (True, False, "auto"):
        raise ConfigError(f'graphs must be True, False or "auto", got {wanted!r}')
    if wanted is False:
        return "off (not asked for)"
    trouble = _trouble(target) or _try(target)
    if trouble is None:
        return "on"
    target.static = None
    if wanted is True:
        raise ConfigError(f"graphs=True cannot be honoured: {trouble}; leave it out")
    return f"off ({trouble})"


def _trouble(target: Captured) -> str | None:
    """Why passes cannot be captured, as far as that is plain to see."""
    if target.device.type != "cuda":
        return f"CUDA graphs need a CUDA device, and the model is on {target.device.type}"
    if any(shape.device != target.device for shape in target.shapes):
        return "the model is spread over several devices"
    if target.way is None:
        return "the model's own attention is used, as exactness was not asked for or cannot be had"
    return None


@torch.inference_mode()
def _try(target: Captured) -> str | None:
    """Why captured passes will not do; None if they give the bits that others give."""
    cache = target.new_cache(1, 4)
    where = place_chain(torch.tensor([1], device=target.device), 3, 4)  # of which a fourth node is made
    x = target.embed(torch.tensor([[1, 2, 3]], device=target.device) % target.vocab_size)

    def logits() -> Tensor:
        return target.logits(target.norm(target.run(x, where, cache)[0]))

    plain = logits()
    target.static = StaticPasses(Capturing(target.device))
    try:
        found = [logits() for _ in range(3)]  # run aside, captured, replayed
    except (ModelError, RuntimeError) as error:
        return f"capturing failed: {_in_short(error.__cause__ or error)}"
    return None if all(torch.equal(each, plain) for each in found) else "captured passes give other bits"
