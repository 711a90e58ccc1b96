"""What a pass takes on a machine of which four numbers are known: a roofline, and a price for every launch.

    seconds = max(bytes / bytes per second, operations / operations per second) + kernels · seconds per launch

(Williams et al. 2009 for the maximum.) The bytes are the weights, read once however many tokens pass, and the keys and
values of the context; the operations are two per weight and token, and those of attention. Left out: what passes
between the memory and the processor besides, biases, and everything that a round does between its passes.
"""

import math
from dataclasses import dataclass
from typing import Self

from kangaroo.bench.report.projection.parameters import adapter_parameters
from kangaroo.bench.report.projection.shapes import Shape
from kangaroo.drafters.kangaroo.adapter import Variant
from kangaroo.drafters.kangaroo.costs import CONTEXT, Costs
from kangaroo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Work:
    """What a pass asks of a machine."""

    bytes: float = 0.0
    flops: float = 0.0
    kernels: float = 0.0
    sums: float = 0.0
    """Results that several devices, each with a part of every matrix, have to add up."""

    def __add__(self, other: Self) -> "Work":
        return Work(
            self.bytes + other.bytes,
            self.flops + other.flops,
            self.kernels + other.kernels,
            self.sums + other.sums,
        )

    def __mul__(self, times: int) -> "Work":
        return Work(self.bytes * times, self.flops * times, self.kernels * times, self.sums * times)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A machine. Raises ConfigError for numbers that no machine has."""

    name: str
    bytes_per_second: float
    """Peak, of one device's memory."""
    flops_per_second: float
    """Peak, of one device, dense, in the precision of the weights."""
    launch_seconds: float
    """Per kernel; 0 where launches are captured in graphs and cost nothing."""
    memory_bytes: float = math.inf
    """Of one device."""
    efficiency: float = 1.0
    """The share of both peaks that is reached."""
    devices: int = 1
    """They share every matrix evenly. Adding up their results counts as one launch, which is what it takes at best."""

    def __post_init__(self) -> None:
        for name in ("bytes_per_second", "flops_per_second", "memory_bytes", "efficiency", "devices"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{self.name}: {name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.launch_seconds < math.inf:
            raise ConfigError(f"{self.name}: launch_seconds must be at least 0, got {self.launch_seconds}")

    def seconds(self, work: Work) -> float:
        """One pass."""
        share = self.efficiency * self.devices
        busy = max(work.bytes / self.bytes_per_second, work.flops / self.flops_per_second) / share
        launches = work.kernels + (work.sums if self.devices > 1 else 0)
        return busy + launches * self.launch_seconds


@dataclass(frozen=True, slots=True)
class Pieces:
    """The pieces of a round, as `Costs` has them, in work in place of seconds."""

    full_step: Work
    shallow: Work
    adapter: Work
    head: Work
    verify: dict[int, Work]

    def costs(self, hardware: Hardware) -> Costs:
        """What they take on a machine."""
        return Costs(
            full_step=hardware.seconds(self.full_step),
            shallow=hardware.seconds(self.shallow),
            adapter=hardware.seconds(self.adapter),
            head=hardware.seconds(self.head),
            verify={nodes: hardware.seconds(work) for nodes, work in self.verify.items()},
        )


def make_pieces(
    shape: Shape, exit_layer: int, adapter: Variant | None, *, nodes: int, context: int = CONTEXT
) -> Pieces:
    """The work of each piece, verifying 1..nodes tokens after `context` others; without an adapter, early exit.

    Raises ConfigError for an exit layer that is none of the shape's.
    """
    if not 0 <= exit_layer < shape.layers:
        raise ConfigError(f"exit layer must be in 0..{shape.layers - 1} for {shape.name}, got {exit_layer}")
    layer = [_layer(shape, tokens, context) for tokens in range(nodes + 1)]
    head = [_matrices(shape, shape.sizes.vocabulary_map, tokens, 1) for tokens in range(nodes + 1)]
    norm, embedding = Work(kernels=shape.kernels.norm), Work(kernels=1)
    return Pieces(
        full_step=layer[1] * shape.layers + norm + head[1],
        shallow=embedding + layer[1] * exit_layer,
        adapter=Work() if adapter is None else _adapter(shape, adapter, context),
        head=head[1] + norm if adapter is None else head[1],
        verify={n: layer[n] * (shape.layers - exit_layer) + norm + head[n] for n in range(1, nodes + 1)},
    )


def _matrices(shape: Shape, weights: int, tokens: int, kernels: int) -> Work:
    return Work(weights * shape.bytes_per_weight, 2.0 * weights * tokens, kernels)


def _context(shape: Shape, tokens: int, context: int) -> Work:
    """Reading the keys and values of a context, kept in the precision of the weights, and attending to them."""
    sizes = shape.sizes
    stored = 2 * sizes.key_value_heads * sizes.head_dim * context
    return Work(stored * shape.bytes_per_weight, 4.0 * sizes.heads * sizes.head_dim * context * tokens)


def _layer(shape: Shape, tokens: int, context: int) -> Work:
    matrices = _matrices(shape, shape.layer_weights, tokens, shape.kernels.layer)
    return matrices + _context(shape, tokens, context) + Work(sums=2)


def _adapter(shape: Shape, variant: Variant, context: int) -> Work:
    """On one token, without a head of its own, which takes the place of the target's."""
    attends, feeds = variant != "mlp-only", variant in ("mlp-only", "full-layer")
    head = shape.sizes.vocabulary_map if variant == "own-head" else 0
    kernels = shape.kernels
    count = (1 + attends + feeds) * kernels.norm + attends * kernels.attention + feeds * kernels.mlp
    work = _matrices(shape, adapter_parameters(shape.sizes, variant) - head, 1, count) + Work(sums=attends + feeds)
    return work + _context(shape, 1, context) if attends else work
