"""Projections as tables, each beside what it rests on: other models and machines, and the paper's own figures."""

from collections.abc import Sequence
from dataclasses import replace

from kangaroo.bench.published import PAPER, SOURCE, TASKS
from kangaroo.bench.report.projection import project
from kangaroo.bench.report.projection.known import A100, CASES, MACHINES, VICUNA_7B, VICUNA_13B
from kangaroo.bench.report.projection.passes import Hardware, make_pieces
from kangaroo.bench.report.projection.shapes import Shape
from kangaroo.bench.report.projection.trace import Trace
from kangaroo.bench.report.tables import UNKNOWN, Table, number, percent, span
from kangaroo.drafters.kangaroo.adapter import Variant

DEVICES = (1, 2, 4, 8)
ROOM = 1.2
"""Memory over weights: keys, values and what a pass needs."""


def projected_speedups(
    trace: Trace,
    cases: Sequence[tuple[Shape, int]] = CASES,
    machines: Sequence[Hardware] = MACHINES,
    adapter: Variant | None = "kangaroo",
) -> Table:
    """By shape, with its exit layer, and machine; as many devices as the weights need."""
    rows = [_row(trace, shape, exit_layer, machine, adapter) for shape, exit_layer in cases for machine in machines]
    note = (
        "Nothing in this table was measured. Projected from the rounds of another model (tokens per round: "
        f"{trace.compression_rate:.2f}), taken to draft and accept alike on these, and from the cost of passes: "
        "published shapes in float16, data-sheet peaks times one efficiency, batch 1. In graphs: launches are free. "
        "One by one: each costs what a published speed of Llama-7B implies. In brackets the 95 % interval over the "
        "trace's questions, which says nothing of how wrong the costs may be. –: eight devices do not hold it."
    )
    header = (
        "projected: model, machine",
        "devices assumed",
        "projected plain step in graphs, ms",
        "projected speed-up, launches in graphs",
        "projected speed-up, launches one by one",
    )
    return Table("projected", "Projected speed-ups (not measured)", note, header, rows)


def _row(trace: Trace, shape: Shape, exit_layer: int, machine: Hardware, adapter: Variant | None) -> tuple[str, ...]:
    name = f"{shape.name}, exit {exit_layer}, {machine.name}"
    launching = with_devices(machine, shape)
    if launching is None:
        return name, *[UNKNOWN] * 4
    captured = replace(launching, launch_seconds=0.0)
    step = make_pieces(shape, exit_layer, adapter, nodes=1).costs(captured).full_step
    speedups = (span(project(trace, shape, hardware, exit_layer, adapter)) for hardware in (captured, launching))
    return name, str(launching.devices), f"{1000 * step:.1f}", *speedups


def with_devices(machine: Hardware, shape: Shape) -> Hardware | None:
    """The machine with as few devices as hold the weights and some room; None if eight do not."""
    enough = [count for count in DEVICES if count * machine.memory_bytes >= ROOM * shape.bytes]
    return replace(machine, devices=enough[0]) if enough else None


def beside_published(trace: Trace, machine: Hardware = A100) -> Table:
    """The paper's Kangaroo: projected from its published compression rates, beside its published speed-ups."""
    rows = []
    for row in PAPER:
        if row.method == "Kangaroo":
            shape, exit_layer = {"7B": (VICUNA_7B, 2), "13B": (VICUNA_13B, 3)}[row.size]
            figures = zip(TASKS.values(), row.compression_rates, row.speedups, strict=True)
            for task, rate, published in figures:
                scaled = trace.at(rate)
                captured, launched = (
                    project(scaled, shape, hardware, exit_layer).value
                    for hardware in (replace(machine, launch_seconds=0.0), machine)
                )
                name = f"{row.size}, {task}"
                cells = (f"{rate:.2f}", f"{published:.2f}", number(captured), number(launched))
                rows.append((name, *cells, percent(launched / published - 1)))
    note = (
        f"Published: {SOURCE}. Projected, with nothing fitted, from the published compression rate and the lengths of "
        f"drafts in a trace of our own, for {machine.name}: the machine of the paper's figures is not known to us. "
        "Error: projected over published speed-up, less 1, launches one by one. It holds what the authors' software "
        "did between passes, and how the lengths of their drafts differ from ours."
    )
    header = (
        "projected: size, task",
        "published CR",
        "published speed-up",
        "projected, launches in graphs",
        "projected, launches one by one",
        "projected: error",
    )
    return Table("projected-paper", "Projected beside the paper", note, header, rows)
