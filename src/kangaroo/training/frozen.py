"""A run for a frozen target: load it, let it write what is needed, train what drafts for it, keep the best."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kangaroo import demo
from kangaroo.errors import ConfigError
from kangaroo.loading import load_model, load_tokenizer
from kangaroo.model import Target
from kangaroo.training.author import Author
from kangaroo.training.batches import Packed
from kangaroo.training.corpus import Corpus
from kangaroo.training.data import Given, choose_documents
from kangaroo.training.evaluation import HeldOut
from kangaroo.training.loop import Trainer
from kangaroo.training.objective import Objective
from kangaroo.training.recipe import FrozenTargetRecipe
from kangaroo.training.report import Report
from kangaroo.training.resume import find_progress
from kangaroo.training.synthesis import Synthesis

Begin = Callable[[Target], Callable[[HeldOut, Corpus], Objective]]
"""Makes the weights to train for a target, at once; and their objective, when there is text to evaluate
on, and to learn from."""


def train_for_target(
    recipe: FrozenTargetRecipe, paths: Sequence[Path], report: Report, begin: Begin, *, resume: bool
) -> Path:
    """Train for the recipe's target; returns the folder of the best weights.

    A recipe with a synthesis section takes no `paths`; any other takes at least one.
    """
    if recipe.synthesis is not None and paths:
        raise ConfigError(
            "the recipe's [synthesis] section makes the text itself: drop the data files (--data), or drop the section"
        )
    given = Given(paths) if recipe.synthesis is None else None
    target, tokenizer = load_target(recipe)
    if recipe.schedule.longest > target.context:
        raise ConfigError(
            f"sequences of {recipe.schedule.longest} tokens exceed the target's context of {target.context} "
            "(schedule.sequence_length)"
        )
    make_objective = begin(target)
    source = given or Synthesis(target, tokenizer, recipe, report)
    progress = find_progress(recipe, {"data": source.digest, "target": target.fingerprint}, resume=resume)
    training, held_out = choose_documents(source.files(), recipe.data, recipe.seed)
    author = Author(target, tokenizer, recipe, report)
    kept, learnt = author.held_out(held_out), author.training(training)
    return Trainer(make_objective(kept, learnt), Packed(learnt), recipe, progress).fit(report)


def load_target(recipe: FrozenTargetRecipe) -> tuple[Target, Any]:
    """The frozen target and its tokenizer. Raises ModelError if they cannot be loaded."""
    name = str(demo.TARGET) if recipe.target == "demo" else recipe.target
    dtype = None if recipe.run.dtype == "auto" else getattr(torch, recipe.run.dtype)
    if dtype is None and not torch.cuda.is_available():
        dtype = torch.float32
    model = load_model(name, dtype).requires_grad_(False)
    return Target(model), load_tokenizer(name)
