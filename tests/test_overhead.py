"""What a round costs besides arithmetic: how often it waits for the device, and how many calls into torch it makes.

A read is whatever brings a number of a tensor to the host: on a GPU each waits until everything before it is done. On
inference tensors the methods of Tensor that read pass no dispatcher, so they are counted where they are called. Calls
are operators as a TorchDispatchMode around `step` sees them: one per call from Python, however much it does inside.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kangaroo.model
from kangaroo.decode import decode, start, step
from kangaroo.drafters import chain, find_drafter
from kangaroo.drafters.base import Drafter
from kangaroo.loading import load_model
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import Request, State
from kangaroo.tree import Placement
from little_model import ADAPTER, TARGET
from oracle import EVERYTHING, GREEDY, GREEDY_PENALISED

READS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "nonzero", "__iter__")
INDEXING, MASKED = {"aten.index", "aten.index_put", "aten.index_put_"}, "an index by a mask"
READING_OPERATORS = {"aten.nonzero", "aten.masked_select", "aten._unique2", "aten.equal", MASKED}
PROMPT = [11, 302, 7, 45, 9, 1024, 33, 78]


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(operator.overloadpacket)
        if name in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1]):
            name = MASKED
        self.names[name] += 1
        return operator(*args, **(kwargs or {}))


@contextmanager
def reads(calls: Calls) -> Iterator[Counter[str]]:
    """Counts reads by what makes them; `calls` sees those made inside torch, such as an index by a mask."""
    found: Counter[str] = Counter()
    plain = {name: getattr(torch.Tensor, name) for name in READS}

    def counted(name: str) -> Callable[..., Any]:
        def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return plain[name](self, *args, **kwargs)

        return read

    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, counted(name))
        yield found
    found.update({name: count for name, count in calls.names.items() if name in READING_OPERATORS})


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(load_model(TARGET, torch.float32), pack=True)


def begin(
    target: Target, name: str, settings: dict[str, Any], sampling: Sampling = GREEDY, rows: int = 1
) -> tuple[Drafter, State]:
    """Some rounds into a text, of rows of different lengths."""
    files = {"adapter": ADAPTER} if name.startswith("kangaroo") else {}
    drafter = find_drafter(name).build(target, None, files | settings)()
    state = start(target, drafter, [Request(PROMPT[i:], sampling, 60) for i in range(rows)])
    for _ in range(3):
        step(target, drafter, state)
    return drafter, state


AUTO = {"stop": "auto", "draft_cost": 0.02, "node_cost": 0.01, "start_cost": 0.01}
CHAINS = [("kangaroo", {"max_draft": 5, "threshold": 0.02}), ("kangaroo", AUTO), ("early-exit", {"threshold": 0.001})]


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("sampling", [GREEDY, GREEDY_PENALISED, EVERYTHING], ids=["greedy", "penalised", "sampled"])
@pytest.mark.parametrize(("name", "settings"), [("none", {}), *CHAINS], ids=["none", "chain", "auto", "early-exit"])
def test_a_round_reads_once_and_once_for_every_drafted_token(
    target: Target, name: str, settings: dict[str, Any], sampling: Sampling, rows: int
) -> None:
    drafter, state = begin(target, name, settings, sampling, rows)
    longest = 0
    rounds = decode(target, drafter, state)
    for _ in range(6):
        with Calls() as calls, reads(calls) as found:
            done = next(rounds)
        longest = max(longest, *done.drafted)
        assert found.total() <= 1 + max(done.drafted), found
    assert (longest > 0) == (name != "none")


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("sampling", [GREEDY, EVERYTHING], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("name", "settings"), CHAINS, ids=["chain", "auto", "early-exit"])
def test_where_reads_are_dear_a_round_reads_once(
    target: Target,
    name: str,
    settings: dict[str, Any],
    sampling: Sampling,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chain, "CHEAP_READS", ())
    drafter, state = begin(target, name, settings, sampling, rows)
    rounds, longest = decode(target, drafter, state), 0
    for _ in range(6):
        with Calls() as calls, reads(calls) as found:
            done = next(rounds)
        longest = max(longest, *done.drafted)
        assert found == {"tolist": 1}
    assert longest > 0


def test_a_read_is_noticed() -> None:
    x = torch.arange(4)
    with Calls() as calls, reads(calls) as found, torch.inference_mode():
        assert bool((x > 2).any())
        assert int(x.max()) == x.tolist()[3] == x[3].item()
        x[x > 2]
    assert found.total() == 5


@pytest.mark.parametrize(
    ("name", "settings", "most"), [("none", {}, 1300), ("kangaroo", {"max_draft": 5, "threshold": 0.0}, 2050)]
)
def test_calls_into_torch(name: str, settings: dict[str, Any], most: int) -> None:
    """Of 24 layers, as transformers writes them but for their norms: what a round adds is little.

    Steady pieces of float32 products are not counted here: what they cost is a property of the machine.
    """
    inexact = Target(load_model(TARGET, torch.float32), exact=False)
    drafter, state = begin(inexact, name, settings)
    with Calls() as calls:
        done = step(inexact, drafter, state)
    assert done.drafted == [settings.get("max_draft", 0)]
    assert calls.names.total() <= most, calls.names.most_common()


def test_masks_are_built_once_a_round(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, state = begin(target, "early-exit", {"max_draft": 5, "threshold": 0.0})
    made, plain = [], kangaroo.model.attention_mask

    def counted(where: Placement, *rest: Any) -> torch.Tensor:
        made.append(where)
        return plain(where, *rest)

    monkeypatch.setattr(kangaroo.model, "attention_mask", counted)
    assert step(target, drafter, state).drafted == [5]
    assert len(made) == 1
