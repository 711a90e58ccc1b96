"""Kangaroo's chain: draft one token at a time, stop when the self-draft model is unsure (Liu et al. 2024, section 3.2).

The unsure token stays in the draft: confidence only decides whether to go on. Each row stops by its own confidence, and
the loop ends when every row has stopped. Differences from the authors' release: any batch, sampling, and the room a row
has left bounds its draft.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from kangaroo.drafters.chain import Stopping, Threshold
from kangaroo.drafters.kangaroo.adapter import Adapter
from kangaroo.drafters.kangaroo.calibration import Calibration
from kangaroo.drafters.kangaroo.costs import measure_costs
from kangaroo.drafters.kangaroo.exit_calibration import ExitCalibration
from kangaroo.drafters.kangaroo.self_draft import (
    ADAPTER_SETTINGS,
    SelfChain,
    SelfDraft,
    choose_exit_layer,
    load_adapter,
)
from kangaroo.drafters.kangaroo.stopping import CostAware, DraftCosts
from kangaroo.drafters.settings import Settings, allows_relatives, configure, to_path
from kangaroo.errors import ConfigError
from kangaroo.model import Target
from kangaroo.state import Committed, State
from kangaroo.tree import Draft

StopRule = Literal["threshold", "auto"]
COSTS = ("draft_cost", "node_cost", "start_cost")
LONGEST = 10
"""Tokens that "auto" drafts at most unless told otherwise."""
MEASURED, WHILE_WAITED_FOR = (8, 12), (4, 3)
"""Nodes and repeats of the measurement of its costs: when the drafter is made, and when rows wait for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainConfig:
    """When to stop drafting."""

    max_draft: int = 6
    """The paper's gamma: drafted tokens per round at most."""
    threshold: float = 0.6
    """The paper's eta: stop after a token whose top-1 probability was below it; 0 drafts a fixed length."""
    stop: StopRule = "threshold"
    """"auto" needs no threshold: it drafts on while the next token is expected to pay, by the adapter's calibration."""
    draft_cost: float | None = None
    """For "auto": cost of drafting a token, in plain steps; None measures it when the drafter is made."""
    node_cost: float | None = None
    """For "auto": cost of verifying one more token; likewise."""
    start_cost: float | None = None
    """For "auto": what a round that drafts costs beyond its tokens; likewise."""

    def __post_init__(self) -> None:
        if self.stop not in get_args(StopRule):
            raise ConfigError(f"stop must be one of {', '.join(get_args(StopRule))}, got {self.stop!r}")
        for name in COSTS:
            cost = getattr(self, name)
            if cost is not None and not 0 <= cost < math.inf:
                raise ConfigError(f"{name} is a cost in plain steps, at least 0, got {cost}")
        if self.max_draft < 1:
            raise ConfigError(f"max_draft must be at least 1, got {self.max_draft}")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold is a probability in [0, 1], got {self.threshold}")


class Kangaroo:
    """Shallow layers and adapter draft a chain; without an adapter this is plain early exit."""

    def __init__(
        self,
        target: Target,
        adapter: Adapter | None,
        exit_layer: int,
        config: ChainConfig,
        stopping: Stopping | None = None,
    ):
        """`stopping` overrides the threshold of the config."""
        self.model, self._stopping = SelfDraft(target, adapter, exit_layer), stopping or Threshold(config.threshold)
        self.taps, self.cache_layers = self.model.taps, self.model.cache_layers
        self.nodes = config.max_draft + 1
        self._chain = SelfChain(self.model, self.nodes)

    def observe(self, state: State, committed: Committed) -> None:
        """Feed the adapter what it has not seen, and the stopping rule what became of the draft."""
        self._chain.observe(state, committed)
        self._stopping.observe(state, committed)

    def arrange(self, rows: Sequence[int]) -> None:
        """What waits for the adapter, and what the stopping rule has learnt, stays with its row."""
        self.model.arrange(rows)
        self._stopping.arrange(rows)

    def draft(self, state: State) -> Draft:
        """One token per step until every row stops, has no room, or has drafted `max_draft`."""
        limits = [self.nodes - 1] * state.batch
        return self._chain.finish(state, self._chain.grow(state, limits, self._stopping))


def build(target: Target, tokenizer: Any, settings: Settings) -> Callable[[], Kangaroo]:
    """Settings: adapter, and those of ChainConfig, which default to what the adapter was evaluated with."""
    adapter = load_adapter(target, settings)
    auto = settings.get("stop") == "auto"
    evaluated = {"max_draft": LONGEST if auto else adapter.config.max_draft, "threshold": adapter.config.threshold}
    config = configure(ChainConfig, evaluated | dict(settings), also=ADAPTER_SETTINGS)
    exit_layer = adapter.config.exit_layer
    if not auto:
        return lambda: Kangaroo(target, adapter, exit_layer, config)
    calibration = Calibration.load(Path(settings["adapter"]))
    costs = _costs(SelfDraft(target, adapter, exit_layer), config)
    return lambda: Kangaroo(
        target, adapter, exit_layer, config, CostAware(calibration, costs, longest=config.max_draft)
    )


def build_early_exit(target: Target, tokenizer: Any, settings: Settings) -> Callable[[], Kangaroo]:
    """Settings: exit_layer, or calibration, a folder that says it and makes "auto" possible; those of ChainConfig."""
    calibrated = _load_calibration(target, settings)
    exit_layer = choose_exit_layer(target, settings) if calibrated is None else calibrated.exit_layer
    auto = settings.get("stop") == "auto"
    config = configure(ChainConfig, {"max_draft": LONGEST} | dict(settings) if auto else settings, also=EXIT_SETTINGS)
    if not auto:
        return lambda: Kangaroo(target, None, exit_layer, config)
    if calibrated is None:
        raise ConfigError(
            "stop = 'auto' needs calibrated confidences: an adapter, or calibration = a folder that `kangaroo import` "
            "made for this model; or set a threshold"
        )
    curve, costs = calibrated.calibration, _costs(SelfDraft(target, None, exit_layer), config)
    return lambda: Kangaroo(target, None, exit_layer, config, CostAware(curve, costs, longest=config.max_draft))


EXIT_SETTINGS = ("exit_layer", "calibration", "allow_other_target")


def _load_calibration(target: Target, settings: Settings) -> ExitCalibration | None:
    if settings.get("calibration") is None:
        return None
    folder = to_path("calibration", settings["calibration"])
    relative = allows_relatives(settings)
    found = ExitCalibration.load(folder, target, allow_other_target=relative)
    if settings.get("exit_layer", found.exit_layer) != found.exit_layer:
        raise ConfigError(
            f"the calibration in {folder} is of exit layer {found.exit_layer}, not {settings['exit_layer']}; leave one "
            "of the two out"
        )
    return found


def _costs(model: SelfDraft, config: ChainConfig) -> Callable[[int], DraftCosts]:
    """What drafting costs with so many rows, as configured or measured: now for one, for more once there are more."""
    given = {name: getattr(config, name) for name in COSTS}
    if None not in given.values():
        fixed = _draft_costs(given, rows=1)
        return lambda rows: fixed

    @cache
    def measured(rows: int) -> DraftCosts:
        nodes, repeats = MEASURED if rows == 1 else WHILE_WAITED_FOR
        found = measure_costs(model.target, model, nodes=nodes, repeats=repeats, rows=rows)
        shares = dict(zip(COSTS, (found.draft_share, found.node_share, found.start_share), strict=True))
        return _draft_costs({name: shares[name] if cost is None else cost for name, cost in given.items()}, rows)

    measured(1)
    return lambda rows: measured(1 << (rows - 1).bit_length())


def _draft_costs(costs: dict[str, float], rows: int) -> DraftCosts:
    return DraftCosts(token=costs["draft_cost"] + costs["node_cost"], start=costs["start_cost"], rows=rows)
