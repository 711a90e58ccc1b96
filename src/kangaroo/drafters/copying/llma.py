"""LLMA: copy from reference documents what followed there (Yang et al. 2023).

The last 5 down to 1 generated tokens are matched against the documents, and the 19 tokens after the first occurrence
are copied. The documents are those the application knows, such as retrieved passages; without any, the prompt is the
reference. Differences from the original: an index instead of a scan in every round; any batch, and sampling.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kangaroo.cache import LayerShape
from kangaroo.documents import read_documents
from kangaroo.drafters.copying.arrivals import arrivals, copy_chain, rearranged
from kangaroo.drafters.copying.ngrams import NgramIndex, check_lengths
from kangaroo.drafters.settings import Settings, configure, to_path
from kangaroo.errors import ConfigError, DataError
from kangaroo.model import Target
from kangaroo.state import Committed, State
from kangaroo.tree import Draft

BREAK = -1
"""Stands between documents: no text holds it, so no match and no copy runs from one into the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMAConfig:
    """What to look for and how much to copy."""

    longest: int = 5
    trigger: int = 1
    """Fewest matching tokens that are worth copying after (the paper's n)."""
    max_draft: int = 19
    """Tokens copied at most (the paper's k, less one)."""

    def __post_init__(self) -> None:
        check_lengths(self.trigger, self.longest, self.max_draft)


class LLMA:
    """Copies from the references given, or from each row's prompt."""

    taps: tuple[int, ...] = ()
    cache_layers: tuple[LayerShape, ...] = ()

    def __init__(self, config: LLMAConfig, references: NgramIndex | None):
        self._config, self._references = config, references
        self.nodes = config.max_draft + 1
        self._prompts: dict[int, NgramIndex] = {}
        self._outputs: dict[int, list[int] | None] = {}
        """The end of each row's output; None while the pending token is still the prompt's last."""

    def observe(self, state: State, committed: Committed) -> None:
        """Prompts are references if there are no others; of the output only the end is needed."""
        for arrived in arrivals(committed):
            row, tokens = arrived.row, arrived.tokens
            if arrived.fresh:
                self._prompts[row], self._outputs[row] = new_index(self._config), None
            if arrived.prompt and self._references is None:
                self._prompts[row].extend(tokens)
            if not arrived.prompt:
                output = self._outputs[row]
                output = tokens[1:] if output is None else [*output, *tokens]
                self._outputs[row] = output[-self._config.longest :]

    def arrange(self, rows: Sequence[int]) -> None:
        """What is known of a row stays with it."""
        self._prompts, self._outputs = rearranged(self._prompts, rows), rearranged(self._outputs, rows)

    def draft(self, state: State) -> Draft:
        """What follows the row's latest output in a reference; nothing before there is any, or even a prompt."""
        found = [self._find(number, row.pending) if row.active else [] for number, row in enumerate(state.rows)]
        return copy_chain(state, found)

    def _find(self, row: int, pending: int) -> list[int]:
        output = self._outputs[row]
        if output is None:
            return []
        reference = self._prompts[row] if self._references is None else self._references
        length, end = reference.find([*output, pending])
        copy = reference.tokens[end : end + self._config.max_draft] if length else []
        return copy[: copy.index(BREAK)] if BREAK in copy else copy


def new_index(config: LLMAConfig) -> NgramIndex:
    """An index of reference text."""
    return NgramIndex(config.trigger, config.longest, "first")


def build(target: Target, tokenizer: Any, settings: Settings) -> Callable[[], LLMA]:
    """Settings: those of LLMAConfig; references, the path of a file of documents (JSONL, Parquet or text)."""
    config = configure(LLMAConfig, settings, also=("references",))
    path = settings.get("references")
    references = None if path is None else read_references(to_path("references", path), target, tokenizer, config)
    return lambda: LLMA(config, references)


def read_references(path: Path, target: Target, tokenizer: Any, config: LLMAConfig) -> NgramIndex:
    """Index the documents of a file. Raises DataError for one that could not stand in the target's context."""
    if tokenizer is None:
        raise ConfigError("references are text: this drafter needs the target's tokenizer to read them")
    references = new_index(config)
    for document in read_documents(path):
        text = document.text or "\n".join(message["content"] for message in document.messages or ())
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) > target.context:
            raise DataError(
                f"{document.where}: a reference of {len(tokens)} tokens is longer than the target's context of "
                f"{target.context}; split it"
            )
        references.extend([BREAK, *tokens])
    return references
