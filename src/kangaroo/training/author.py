"""From documents to the texts of a run, the frozen target's own answers among them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kangaroo.documents import Document
from kangaroo.errors import DataError
from kangaroo.loading import end_tokens
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import Request
from kangaroo.training.answers import Writer
from kangaroo.training.corpus import Corpus, prompts, tokenize
from kangaroo.training.evaluation import HeldOut
from kangaroo.training.recipe import FrozenTargetRecipe
from kangaroo.training.report import Report

WRITTEN, REGENERATED = "written.jsonl", "regenerated.jsonl"


class Author:
    """Turns documents into the texts of a run, the target's own answers among them."""

    def __init__(self, target: Target, tokenizer: Any, recipe: FrozenTargetRecipe, report: Report):
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
        # Prompts of like length together: a batch is padded to its longest, and takes as long.
        chosen = sorted((prompt for prompt, fit in zip(asked, fits, strict=True) if fit), key=len)
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
