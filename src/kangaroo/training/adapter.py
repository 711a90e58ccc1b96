"""An adapter run: the adapter of the recipe, taught to imitate the target."""

from collections.abc import Callable, Sequence
from pathlib import Path

from kangaroo.adapter import Adapter, AdapterConfig
from kangaroo.model import Target
from kangaroo.training.evaluation import HeldOut
from kangaroo.training.frozen import train_for_target
from kangaroo.training.imitation import Imitation
from kangaroo.training.recipe import AdapterRecipe
from kangaroo.training.report import Report


def train_adapter(recipe: AdapterRecipe, paths: Sequence[Path], report: Report, *, resume: bool) -> Path:
    """Train an adapter for the recipe's target; returns the folder of the best one."""

    def begin(target: Target) -> Callable[[HeldOut], Imitation]:
        adapter = new_adapter(target, recipe)
        return lambda held_out: Imitation(target, adapter, held_out, recipe)

    return train_for_target(recipe, paths, report, begin, resume=resume)


def new_adapter(target: Target, recipe: AdapterRecipe) -> Adapter:
    """The untrained adapter. Raises ConfigError if the target has no such layer, or none to start from."""
    config = AdapterConfig(
        exit_layer=recipe.adapter.exit_layer,
        variant=recipe.adapter.variant,
        max_draft=recipe.evaluation.max_draft,
        threshold=recipe.evaluation.threshold,
    )
    adapter = Adapter(target, config)
    adapter.initialise(recipe.seed, from_target=recipe.adapter.init == "target")
    return adapter
