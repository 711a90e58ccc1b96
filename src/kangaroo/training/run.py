"""From a recipe and data files to a finished run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kangaroo.training.adapter import train_adapter
from kangaroo.training.batches import Stream
from kangaroo.training.corpus import tokenize
from kangaroo.training.data import choose_documents, hash_files
from kangaroo.training.loop import Trainer
from kangaroo.training.reading import read_recipe
from kangaroo.training.recipe import AdapterRecipe, TargetRecipe
from kangaroo.training.report import Report
from kangaroo.training.resume import find_progress
from kangaroo.training.target import NextToken, build_model
from kangaroo.training.tokenizer import train_tokenizer


def train(
    recipe: Path,
    data: Sequence[Path],
    *,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    report: Report = lambda _: None,
) -> Path:
    """Train what the recipe says on the files named; returns the folder of the best weights.

    `overrides` replace values of the recipe by dotted key ("schedule.steps"). `report` receives an Estimate before the
    first step and Updates along the way. With `resume` the run in the recipe's output folder goes on from its last
    checkpoint, to the same weights as if it had never stopped.

    Raises ConfigError, DataError, ModelError or CapacityError; Interrupted, a KeyboardInterrupt, after Ctrl-C.
    """
    settings = read_recipe(recipe, overrides)
    if isinstance(settings, AdapterRecipe):
        return train_adapter(settings, data, report, resume=resume)
    assert isinstance(settings, TargetRecipe), "read_recipe knows no other kind"
    return train_target(settings, data, report, resume=resume)


def train_target(recipe: TargetRecipe, paths: Sequence[Path], report: Report, *, resume: bool) -> Path:
    """Train tokenizer and model from scratch."""
    progress = find_progress(recipe, {"data": hash_files(paths)}, resume=resume)
    training, held_out = choose_documents(paths, recipe.data, recipe.seed)
    texts = (" ".join(m["content"] for m in d.messages) if d.messages else d.text for d in training)
    tokenizer = train_tokenizer(texts, recipe.model.vocab_size, recipe.model.context)
    learnt, kept = (
        Stream(tokenize(part, tokenizer, assistant_only=recipe.data.assistant_only)) for part in (training, held_out)
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(recipe.model, tokenizer, recipe.seed).to(device)
    return Trainer(NextToken(model, tokenizer, kept, recipe.run), learnt, recipe, progress).fit(report)
