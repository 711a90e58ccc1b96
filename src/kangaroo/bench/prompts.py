"""Evaluation prompts: six kinds of requests, split into development and held-out by a hash of their id."""

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, TypeVar

from kangaroo import demo
from kangaroo.errors import DataError

Split = Literal["development", "held-out"]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class EvaluationPrompt:
    """A conversation that waits for an answer."""

    id: str
    kind: str
    messages: list[dict[str, str]]

    @property
    def split(self) -> Split:
        """Settings are chosen on the development half and measured on the other."""
        return "development" if int(sha256(self.id.encode()).hexdigest(), 16) % 2 == 0 else "held-out"


def read_prompts(path: Path = demo.PROMPTS, split: Split | None = None) -> list[EvaluationPrompt]:
    """Prompts of a JSONL file with `id`, `kind` and `messages`, in file order; only those of `split` if given.

    Raises DataError naming the line of a malformed row.
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            prompts.append(EvaluationPrompt(row["id"], row["kind"], row["messages"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: expected id, kind and messages ({error})") from None
    return [prompt for prompt in prompts if split in (None, prompt.split)]


def interleave_kinds(prompts: Sequence[EvaluationPrompt]) -> list[EvaluationPrompt]:
    """The same prompts ordered so that any first few of them cover all kinds evenly."""
    return interleave(prompts, lambda prompt: prompt.kind)


def interleave(items: Sequence[Item], group: Callable[[Item], Hashable]) -> list[Item]:
    """First the first of every group, in the order in which groups appear, then the second of every group, ..."""
    seen: dict[Hashable, int] = {}
    ranks = []
    for item in items:
        ranks.append(seen.get(group(item), 0))
        seen[group(item)] = ranks[-1] + 1
    return [item for _, item in sorted(zip(ranks, items, strict=True), key=lambda pair: pair[0])]
