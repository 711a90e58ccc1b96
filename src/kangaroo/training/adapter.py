"""An adapter run: load the frozen target, let it write what is needed, train, keep the best."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kangaroo import demo
from kangaroo.adapter import Adapter, AdapterConfig
from kangaroo.documents import Document
from kangaroo.errors import ConfigError, DataError
from kangaroo.loading import end_tokens, load_model, load_tokenizer
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import Request
from kangaroo.training.answers import Writer
from kangaroo.training.batches import Packed
from kangaroo.training.corpus import Corpus, prompts, tokenize
from kangaroo.training.data import choose_documents, hash_files
from kangaroo.training.evaluation import HeldOut
from kangaroo.training.imitation import Imitation
from kangaroo.training.loop import Trainer
from kangaroo.training.recipe import AdapterRecipe
from kangaroo.training.report import Report
from kangaroo.training.resume import find_progress

WRITTEN, REGENERATED = "written.jsonl", "regenerated.jsonl"


def train_adapter(recipe: AdapterRecipe, paths: Sequence[Path], report: Report, *, resume: bool) -> Path:
    """Train an adapter for the recipe's target; returns the folder of the best one."""
    data = hash_files(paths)
    target, tokenizer = load_target(recipe)
    if recipe.schedule.longest > target.context:
        raise ConfigError(
            f"sequences of {recipe.schedule.longest} tokens exceed the target's context of {target.context} "
            "(schedule.sequence_length)"
        )
    config = AdapterConfig(
        exit_layer=recipe.adapter.exit_layer,
        variant=recipe.adapter.variant,
        max_draft=recipe.evaluation.max_draft,
        threshold=recipe.evaluation.threshold,
    )
    adapter = Adapter(target, config)
    adapter.initialise(recipe.seed, from_target=recipe.adapter.init == "target")
    progress = find_progress(recipe, {"data": data, "target": target.fingerprint}, resume=resume)
    training, held_out = choose_documents(paths, recipe.data, recipe.seed)
    author = Author(target, tokenizer, recipe, report)
    kept = author.held_out(held_out)
    learnt = author.training(training)
    return Trainer(Imitation(target, adapter, kept, recipe), Packed(learnt), recipe, progress).fit(report)


def load_target(recipe: AdapterRecipe) -> tuple[Target, Any]:
    """The frozen target and its tokenizer. Raises ModelError if they cannot be loaded."""
    name = str(demo.TARGET) if recipe.target == "demo" else recipe.target
    dtype = None if recipe.run.dtype == "auto" else getattr(torch, recipe.run.dtype)
    if dtype is None and not torch.cuda.is_available():
        dtype = torch.float32
    model = load_model(name, dtype).requires_grad_(False)
    return Target(model), load_tokenizer(name)


class Author:
    """Turns documents into the texts of a run, the target's own answers among them."""

    def __init__(self, target: Target, tokenizer: Any, recipe: AdapterRecipe, report: Report):
        self.target, self.tokenizer, self.recipe, self.report = target, tokenizer, recipe, report
        self.eos = end_tokens(target.model)

    def held_out(self, documents: Sequence[Document]) -> HeldOut:
        """Held-out documents, and the target's greedy answers to prompts from the first of them."""
        settings = self.recipe.evaluation
        asked = prompts(documents, self.tokenizer, self.recipe.seed)
        asked = [p for p in asked if len(p) + settings.max_tokens <= self.target.context][: settings.prompts]
        if not asked:
            raise DataError(
                f"no held-out prompt leaves room for evaluation.max_tokens = {settings.max_tokens} in the target's "
                f"context of {self.target.context}"
            )
        writer = Writer(self.target, self.eos, settings.batch, self.report)
        requests = [Request(prompt, Sampling(), settings.max_tokens) for prompt in asked]
        answers = writer.answer("answer", requests, self.recipe.output / WRITTEN)
        return HeldOut(self._tokenize(documents), self.recipe.schedule.sequence_length, asked, answers, settings)

    def training(self, documents: Sequence[Document]) -> Corpus:
        """Training documents; with a regenerate section, the first of them in the target's own words.

        A document whose prompt leaves no room for the answer within the run's longest sequence keeps its own.
        """
        settings = self.recipe.regenerate
        if settings is None:
            return self._tokenize(documents)
        first, rest = documents[: settings.prompts], documents[settings.prompts :]
        asked = prompts(first, self.tokenizer, self.recipe.seed)
        fits = [len(p) + settings.max_tokens <= self.recipe.schedule.longest for p in asked]
        chosen = [prompt for prompt, fit in zip(asked, fits, strict=True) if fit]
        # Noise is keyed by the index, so that prompts do not share theirs.
        common = Sampling(temperature=settings.temperature, seed=self.recipe.seed)
        requests = [Request(p, replace(common, index=i), settings.max_tokens) for i, p in enumerate(chosen)]
        writer = Writer(self.target, self.eos, settings.batch, self.report)
        answers = writer.answer("regenerate", requests, self.recipe.output / REGENERATED)
        all_tokens = not self.recipe.data.assistant_only
        written = [(p + a, [all_tokens] * len(p) + [True] * len(a)) for p, a in zip(chosen, answers, strict=True)]
        kept = [*(d for d, fit in zip(first, fits, strict=True) if not fit), *rest]
        if not kept:
            return Corpus.join(written)
        corpus = self._tokenize(kept)
        return Corpus.join([*written, *(corpus.document(i) for i in range(len(corpus)))])

    def _tokenize(self, documents: Sequence[Document]) -> Corpus:
        return tokenize(documents, self.tokenizer, assistant_only=self.recipe.data.assistant_only)
