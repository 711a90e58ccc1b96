"""From a recipe and data files to a finished run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kangaroo.errors import DataError
from kangaroo.training.data import Document, read_documents, tokenize
from kangaroo.training.loop import Report, fit
from kangaroo.training.recipe import DataSection, TargetRecipe
from kangaroo.training.target import NextToken, build_model
from kangaroo.training.tokenizer import train_tokenizer


def choose_documents(paths: Sequence[Path], settings: DataSection, seed: int) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, shuffled by `seed`."""
    documents = [
        d for path in paths for d in read_documents(path) if not settings.sources or d.source in settings.sources
    ]
    if len(documents) <= settings.held_out:
        raise DataError(f"{len(documents)} documents are too few to hold out {settings.held_out}")
    order = np.random.default_rng(seed).permutation(len(documents))
    shuffled = [documents[i] for i in order]
    return shuffled[settings.held_out :][: settings.limit], shuffled[: settings.held_out]


def train_target(recipe: TargetRecipe, paths: Sequence[Path], report: Report, *, resume: bool) -> None:
    """Train tokenizer and model from scratch; the result lies in `recipe.output`/best."""
    training, held_out = choose_documents(paths, recipe.data, recipe.seed)
    texts = (" ".join(m["content"] for m in d.messages) if d.messages else d.text for d in training)
    tokenizer = train_tokenizer(texts, recipe.model.vocab_size, recipe.model.context)
    both = [tokenize(part, tokenizer, assistant_only=recipe.data.assistant_only) for part in (training, held_out)]
    objective = NextToken(build_model(recipe.model, tokenizer, recipe.seed), tokenizer, both[1], recipe.run)
    fit(objective, both[0], recipe, report, resume=resume)
