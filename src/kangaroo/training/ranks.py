"""Ranks: processes that train one thing together, as torchrun starts them.

All take the same steps from the same weights. Each runs its share of a micro-batch's sequences, and what they sum over
tokens is added up, so that a step is that of the joint batch. What is done once, the first does: it writes files,
evaluates, and lets the target write. A process that torchrun has not started is the only one, and waits for nobody.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from kangaroo.checks import shown
from kangaroo.errors import CapacityError, ConfigError
from kangaroo.model_files import first_line

LATEST = timedelta(minutes=10)
"""How long a rank may keep the others waiting at a step before they give up."""
WHILE_FIRST_WORKS = timedelta(days=7)
"""Likewise, where the first does what may take hours. One that dies is noticed at once."""

T = TypeVar("T")
_patient: dist.ProcessGroup | None = None


def count() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Is this process the one that writes? torchrun says so before the ranks have met, and after."""
    return number() == 0 if dist.is_initialized() else _is_alone() or os.environ["RANK"] == "0"


def number() -> int:
    """Which of them this process is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def _is_alone() -> bool:
    return "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1"


@contextmanager
def joined() -> Iterator[None]:
    """While entered, this process is one of the ranks that torchrun started: over nccl on GPUs, over gloo on CPUs.

    Raises ConfigError if the others cannot be met.
    """
    global _patient
    if _is_alone() or dist.is_initialized():
        yield
        return
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=LATEST)
        _patient = dist.new_group(backend="gloo", timeout=WHILE_FIRST_WORKS)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"cannot meet the other ranks: {first_line(error)}. Start all of them by torchrun") from None
    yield
    # Not after an error: the others may not come to the end, and a process that is over leaves them anyway.
    dist.destroy_process_group()
    _patient = None


def by_first(make: Callable[[], T]) -> T:
    """What the first rank makes, on every rank; the others wait for it, however long it takes."""
    if count() == 1:
        return make()
    box: list[Any] = [make() if is_first() else None]
    with _others_there():
        dist.broadcast_object_list(box, src=0, group=_patient)
    return box[0]  # type: ignore[no-any-return]


def agree(facts: Mapping[str, Any]) -> None:
    """Raises ConfigError, on every rank, if one of the facts is not the same on all of them."""
    if count() == 1:
        return
    found: list[Any] = [None] * count()
    with _others_there():
        dist.all_gather_object(found, dict(facts), group=_patient)
    for name in facts:
        for other, theirs in enumerate(found):
            if theirs[name] != found[0][name]:
                raise ConfigError(
                    f"the ranks differ: {name} is {shown(found[0][name])} on the first and {shown(theirs[name])} on "
                    f"rank {other}; start all with the same recipe, data and target"
                )


def add_up(tensor: Tensor) -> None:
    """Replace a tensor by its sum over all ranks, the same bits on each. Raises CapacityError if one is gone."""
    if count() > 1:
        with _others_there():
            dist.all_reduce(tensor)


def on_any(flag: bool) -> bool:
    """Is it so on any rank?"""
    flags = torch.tensor([float(flag)])
    add_up(flags)
    return bool(flags.item())


@contextmanager
def _others_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise CapacityError(
            f"rank {number()} has lost the others ({first_line(error)}): one has stopped, and says why if it could. "
            "The last checkpoint is intact; start all of them again with --resume"
        ) from None
