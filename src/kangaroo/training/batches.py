"""Which tokens step `s` sees: a pure function of `s`, so resuming at a step needs no reader state.

Beside it, where the documents of a packed batch lie, and which positions of them are learnt from.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kangaroo.errors import DataError
from kangaroo.training.corpus import Corpus
from kangaroo.tree import Placement

Array = np.ndarray[Any, np.dtype[np.int64]]
OPEN_ROWS = 64


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch of B rows."""

    tokens: Tensor
    """[B, T] int64; from a `Joined`, one more than the length asked for, so that every input has its next token."""
    trained: Tensor
    """[B, T] bool: tokens whose prediction is learnt from."""
    documents: Tensor | None = None
    """[B, T] int64: which of its row's documents each token belongs to; None if rows are undivided."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        documents = None if self.documents is None else self.documents.to(device)
        return Batch(self.tokens.to(device), self.trained.to(device), documents)

    def __getitem__(self, rows: slice) -> "Batch":
        """Some of the rows."""
        documents = None if self.documents is None else self.documents[rows]
        return Batch(self.tokens[rows], self.trained[rows], documents)


class Batches(Protocol):
    """An endless, reproducible sequence of micro-batches."""

    def batch(self, number: int, rows: int, length: int, seed: int) -> Batch:
        """Micro-batch `number`, from 0, of `rows` sequences of `length` tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Share:
    """Of each micro-batch every `count`-th row, from row `first` on: what one of `count` ranks runs."""

    batches: Batches
    first: int
    count: int

    def batch(self, number: int, rows: int, length: int, seed: int) -> Batch:
        """Its part of a micro-batch of `rows` sequences."""
        return self.batches.batch(number, rows, length, seed)[self.first :: self.count]


@dataclass(frozen=True, slots=True)
class Joined:
    """All documents as one row of tokens, cut into blocks wherever they end: every token is used, none is padding."""

    corpus: Corpus

    def batch(self, number: int, rows: int, length: int, seed: int) -> Batch:
        """Blocks [rows, length + 1], in an order shuffled anew each epoch; a block's last token starts the next."""
        blocks = (len(self.corpus.tokens) - 1) // length
        if blocks < 1:
            raise DataError(f"{len(self.corpus.tokens)} tokens of text are fewer than one sequence of {length}")
        index = visit(number, rows, blocks, seed)[:, None] * length + np.arange(length + 1)
        tokens = torch.from_numpy(self.corpus.tokens[index].astype(np.int64))
        return Batch(tokens, torch.from_numpy(self.corpus.trained[index]))


class Packed:
    """Whole documents packed into rows, each to be run as if it were alone: from position 0, seeing only itself.

    A document longer than a row loses its end, and documents with nothing to learn from in what is left are dropped:
    pieces from the middle would have states that decoding never sees. Rows are filled first-fit in the documents'
    order and padded; padding is not learnt from and belongs to a document of its own.
    """

    def __init__(self, corpus: Corpus):
        self.corpus = corpus
        self._rows: dict[int, list[list[int]]] = {}

    def batch(self, number: int, rows: int, length: int, seed: int) -> Batch:
        """Rows [rows, length], in an order shuffled anew each epoch."""
        packed = self.rows(length)
        return self.lay_out([packed[i] for i in visit(number, rows, len(packed), seed)], length)

    def rows(self, length: int) -> list[list[int]]:
        """The documents of every row of `length` tokens."""
        if length not in self._rows:
            self._rows[length] = _first_fit(self.corpus, length)
        if not self._rows[length]:
            raise DataError(
                f"no document has a token to learn from within its first {length} tokens; of a conversation that is "
                "what the assistant answers (unless data.assistant_only = false)"
            )
        return self._rows[length]

    def lay_out(self, rows: Sequence[Sequence[int]], length: int) -> Batch:
        """A batch [len(rows), length] of the documents named."""
        shape = (len(rows), length)
        tokens, trained = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
        documents = np.zeros(shape, dtype=np.int64)
        for row, members in enumerate(rows):
            end = 0
            for place, member in enumerate(members):
                ids, marks = self.corpus.document(member)
                begin, end = end, end + min(length, len(ids))
                tokens[row, begin:end], trained[row, begin:end] = ids[:length], marks[:length]
                documents[row, begin:end] = place
            documents[row, end:] = len(members)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(trained), torch.from_numpy(documents))


def _first_fit(corpus: Corpus, length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for index in range(len(corpus)):
        marks = corpus.document(index)[1][:length]
        if not marks[1:].any():  # the first token is context: nothing predicts it
            continue
        first = max(0, len(rows) - OPEN_ROWS)
        row = next((r for r in range(first, len(rows)) if room[r] >= len(marks)), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(index)
        room[row] -= len(marks)
    return rows


def visit(number: int, rows: int, blocks: int, seed: int) -> Array:
    """Which of the blocks micro-batch `number` reads: every block once per epoch, then again in another order."""
    visits = np.arange(number * rows, (number + 1) * rows)
    return np.array([_shuffled(seed, int(v // blocks), blocks)[v % blocks] for v in visits])


@functools.lru_cache(maxsize=4)
def _shuffled(seed: int, epoch: int, blocks: int) -> Array:
    return np.random.default_rng((seed, epoch, blocks)).permutation(blocks)


def learnt_positions(batch: Batch, ahead: int = 1) -> Tensor:
    """[B, T] bool: positions whose token `ahead` of them is marked and in the same document."""
    assert batch.documents is not None
    mask = torch.zeros_like(batch.trained)
    mask[:, :-ahead] = batch.trained[:, ahead:] & (batch.documents[:, ahead:] == batch.documents[:, :-ahead])
    return mask


def place_documents(batch: Batch) -> Placement:
    """Documents side by side in rows, each as if it were alone: positions from 0, no sight of its neighbours."""
    assert batch.documents is not None
    documents = batch.documents
    slots = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    positions = slots - torch.where(first, slots, 0).cummax(1).values
    same = documents[:, :, None] == documents[:, None]
    return Placement(positions, slots, same & (slots[:, None] <= slots[..., None]), positions)
