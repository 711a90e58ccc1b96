"""A Medusa run: the heads of the recipe, taught to predict the text further ahead than the target's own head does."""

from collections.abc import Callable, Sequence
from pathlib import Path

from kangaroo.medusa import MedusaConfig, MedusaHeads
from kangaroo.model import Target
from kangaroo.training.corpus import Corpus
from kangaroo.training.evaluation import HeldOut
from kangaroo.training.frozen import train_for_target
from kangaroo.training.heads import LaterTokens
from kangaroo.training.recipe import MedusaRecipe
from kangaroo.training.report import Report


def train_medusa(recipe: MedusaRecipe, paths: Sequence[Path], report: Report, *, resume: bool) -> Path:
    """Train heads for the recipe's target; returns the folder of the best ones."""

    def begin(target: Target) -> Callable[[HeldOut, Corpus], LaterTokens]:
        heads = new_heads(target, recipe)
        return lambda held_out, _: LaterTokens(target, heads, held_out, recipe)

    return train_for_target(recipe, paths, report, begin, resume=resume)


def new_heads(target: Target, recipe: MedusaRecipe) -> MedusaHeads:
    """The untrained heads."""
    heads = MedusaHeads(target, MedusaConfig(heads=recipe.medusa.heads))
    heads.initialise(recipe.seed, from_target=recipe.medusa.init == "target")
    return heads
