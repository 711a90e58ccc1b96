"""Text that the frozen target writes itself, to be evaluated on and to learn from; kept on disk as it is made."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kangaroo.decode import collect, decode, start
from kangaroo.documents import Document, prompts
from kangaroo.drafters.none import NoDrafter
from kangaroo.errors import DataError
from kangaroo.files import write_text, writing
from kangaroo.inputs import is_file, parse_json, read_text
from kangaroo.loading import end_tokens
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.sealed import open_sealed, seal
from kangaroo.state import Request
from kangaroo.training.corpus import Corpus, tokenize
from kangaroo.training.evaluation import HeldOut
from kangaroo.training.recipe import FrozenTargetRecipe
from kangaroo.training.report import Clock, Stage, TrainingReport

WRITTEN, REGENERATED = "written.jsonl", "regenerated.jsonl"


class TargetText:
    """Turns documents into the texts of a run, the target's own answers among them."""

    def __init__(self, target: Target, tokenizer: Any, recipe: FrozenTargetRecipe, report: TrainingReport):
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


class Writer:
    """A frozen target that answers prompts. `eos` are the tokens that end its answers."""

    def __init__(self, target: Target, eos: Sequence[int], batch: int, report: TrainingReport):
        self.target, self.eos, self.batch, self.report = target, tuple(eos), batch, report

    def answer(self, stage: Stage, requests: Sequence[Request], path: Path) -> list[list[int]]:
        """The target's own answers, an end token included, without any drafting.

        What `path` holds of them already is not generated again; a file made by another target or for other requests
        is replaced.
        """
        header = {"requests": self._digest(requests)}
        answers = _read(path, header, self.target.vocab_size)
        clock = Clock(stage, len(answers), len(requests), self.report)
        text = "".join(json.dumps(row) + "\n" for row in [header, *map(_row, answers)])
        write_text(path, text)
        with writing(path), path.open("a", encoding="utf-8") as file:
            for begin in range(len(answers), len(requests), self.batch):
                new = self._generate(requests[begin : begin + self.batch])
                file.write("".join(json.dumps(_row(tokens)) + "\n" for tokens in new))
                file.flush()
                answers += new
                clock.advance(len(answers), sum(map(len, new)))
        return answers

    def _generate(self, requests: Sequence[Request]) -> list[list[int]]:
        drafter = NoDrafter()
        state = start(self.target, drafter, requests, eos=self.eos)
        return collect(decode(self.target, drafter, state), len(requests))

    def _digest(self, requests: Sequence[Request]) -> str:
        asked = [(list(r.prompt), r.max_tokens, repr(r.sampling)) for r in requests]
        content = json.dumps([self.target.fingerprint, self.eos, asked])
        return hashlib.sha256(content.encode()).hexdigest()


def _read(path: Path, header: dict[str, str], limit: int) -> list[list[int]]:
    """The answers in a file, if it was made for this header. Raises DataError for one that is damaged."""
    if not is_file(path):
        return []
    # What follows the last newline is empty, or a row cut short by a kill.
    lines = read_text(path, "file of answers", DataError).split("\n")[:-1]
    rows = [parse_json(line, f"{path}, line {number}", DataError) for number, line in enumerate(lines, 1)]
    if not rows or rows[0] != header:
        return []
    return [_tokens(row, f"{path}, line {number}", limit) for number, row in enumerate(rows[1:], 2)]


def _row(tokens: list[int]) -> dict[str, Any]:
    return seal({"tokens": tokens})


def _tokens(row: Any, where: str, limit: int) -> list[int]:
    """The answer in a row, which in files of earlier releases is the bare list."""
    tokens = open_sealed(row, where, DataError).get("tokens") if isinstance(row, dict) else row
    if not isinstance(tokens, list) or not tokens or not all(type(t) is int and 0 <= t < limit for t in tokens):
        raise DataError(f"{where}: damaged, as it should hold token ids; delete the file to go on")
    return tokens
