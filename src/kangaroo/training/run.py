"""From a recipe and data files to a finished run."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kangaroo import demo
from kangaroo.errors import ConfigError
from kangaroo.loading import load_tokenizer
from kangaroo.training.adapter import train_adapter
from kangaroo.training.batches import Stream
from kangaroo.training.corpus import tokenize
from kangaroo.training.data import choose_documents, hash_files
from kangaroo.training.loop import Trainer
from kangaroo.training.medusa import train_medusa
from kangaroo.training.reading import read_recipe
from kangaroo.training.recipe import AdapterRecipe, MedusaRecipe, TargetRecipe
from kangaroo.training.report import Report
from kangaroo.training.resume import find_progress
from kangaroo.training.target import NextToken, build_model
from kangaroo.training.tokenizer import train_tokenizer


def train(
    recipe: Path,
    data: Sequence[Path] = (),
    *,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    report: Report = lambda _: None,
) -> Path:
    """Train what the recipe says on the files named, or on text of the target's own; returns the best weights' folder.

    A recipe with a synthesis section takes no `data`; any other takes at least one file.

    `overrides` replace values of the recipe by dotted key ("schedule.steps"). `report` receives an Estimate before the
    first step and Updates along the way. With `resume` the run in the recipe's output folder goes on from its last
    checkpoint, to the same weights as if it had never stopped.

    Raises ConfigError, DataError, ModelError or CapacityError; Interrupted, a KeyboardInterrupt, after Ctrl-C.
    """
    settings = read_recipe(recipe, overrides)
    if isinstance(settings, AdapterRecipe):
        return train_adapter(settings, data, report, resume=resume)
    if isinstance(settings, MedusaRecipe):
        return train_medusa(settings, data, report, resume=resume)
    assert isinstance(settings, TargetRecipe), "read_recipe knows no other kind"
    return train_target(settings, data, report, resume=resume)


def train_target(recipe: TargetRecipe, paths: Sequence[Path], report: Report, *, resume: bool) -> Path:
    """Train a model from scratch, and its tokenizer unless the recipe names one."""
    identity = {"data": hash_files(paths)}
    tokenizer = None if recipe.model.tokenizer is None else take_tokenizer(recipe.model.tokenizer)
    if tokenizer is not None:
        identity["tokenizer"] = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    progress = find_progress(recipe, identity, resume=resume)
    training, held_out = choose_documents(paths, recipe.data, recipe.seed)
    if tokenizer is None:
        assert recipe.model.vocab_size is not None, "the recipe has one of the two"
        texts = (" ".join(m["content"] for m in d.messages) if d.messages else d.text for d in training)
        tokenizer = train_tokenizer(texts, recipe.model.vocab_size, recipe.model.context)
    learnt, kept = (
        Stream(tokenize(part, tokenizer, assistant_only=recipe.data.assistant_only)) for part in (training, held_out)
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(recipe.model, tokenizer, recipe.seed).to(device)
    return Trainer(NextToken(model, tokenizer, kept, recipe.run), learnt, recipe, progress).fit(report)


def take_tokenizer(name: str) -> Any:
    """The tokenizer of "demo", a folder or a hub name. Raises ModelError or ConfigError."""
    tokenizer = load_tokenizer(demo.TARGET if name == "demo" else name)
    if not tokenizer.is_fast:
        raise ConfigError(f"{name} has no tokenizer.json, which model.tokenizer needs")
    return tokenizer
