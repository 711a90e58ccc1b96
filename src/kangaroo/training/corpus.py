"""Which documents a run learns from and which it holds out; their tokens, and which of those are learnt from."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kangaroo.documents import Document, answer_turns, apply_template, read_as_model, read_documents
from kangaroo.errors import DataError
from kangaroo.inputs import open_file
from kangaroo.training.recipe import DataSection

Ints = np.ndarray[Any, np.dtype[np.int32]]
Marks = np.ndarray[Any, np.dtype[np.bool_]]
Spans = list[tuple[int, int]]
CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Corpus:
    """Tokenised documents one after another. `trained` marks the tokens whose prediction is learnt from."""

    tokens: Ints
    trained: Marks
    starts: np.ndarray[Any, np.dtype[np.int64]]
    """Where each document starts, and the end of the last one."""

    @classmethod
    def join(cls, documents: Iterable[tuple[Sequence[int] | Ints, Sequence[bool] | Marks]]) -> "Corpus":
        """Lay (tokens, trained) pairs end to end. Raises DataError if there are none."""
        pairs = [(np.asarray(tokens, dtype=np.int32), np.asarray(marks, dtype=bool)) for tokens, marks in documents]
        if not pairs:
            raise DataError("there is no text to learn from")
        starts = np.cumsum([0, *(len(tokens) for tokens, _ in pairs)])
        return cls(np.concatenate([t for t, _ in pairs]), np.concatenate([m for _, m in pairs]), starts)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.starts) - 1

    def document(self, index: int) -> tuple[Ints, Marks]:
        """(tokens, trained) of one document."""
        place = slice(self.starts[index], self.starts[index + 1])
        return self.tokens[place], self.trained[place]


def tokenize(documents: Sequence[Document], tokenizer: Any, *, assistant_only: bool) -> Corpus:
    """Render conversations with the tokenizer's chat template and tokenise everything.

    With `assistant_only`, only what the assistant says is learnt from, the token that ends its turn included; plain
    text is learnt from whole. Raises DataError for conversations that the tokenizer's template cannot render, or
    whose assistant turns cannot be found in the rendered text.
    """
    if not tokenizer.is_fast:
        raise DataError(f"{type(tokenizer).__name__} cannot tell which characters its tokens cover (no tokenizer.json)")
    return Corpus.join(_tokenize(documents, tokenizer, assistant_only))


def _tokenize(documents: Sequence[Document], tokenizer: Any, assistant_only: bool) -> Iterator[tuple[Ints, Marks]]:
    for start in range(0, len(documents), CHUNK):
        texts = [text for d in documents[start : start + CHUNK] for text in render(d, tokenizer, assistant_only)]
        encoded = tokenizer(
            [text for text, _ in texts], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for (_, spans), ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield np.array(ids, dtype=np.int32), _mark(np.array(offsets).reshape(-1, 2)[:, 0], spans)


def _mark(starts: np.ndarray[Any, Any], spans: Spans) -> Marks:
    marked = np.zeros(len(starts), dtype=bool)
    for begin, end in spans:
        marked |= (starts >= begin) & (starts < end)
    return marked


def render(document: Document, tokenizer: Any, assistant_only: bool) -> list[tuple[str, Spans]]:
    """The texts of a document, each with the character spans to learn from.

    That is one text, unless the chat template rewrites earlier turns as a conversation goes on (dropping what a model
    thought, say). Then each assistant turn becomes a text of its own, with its history as decoding would see it.
    """
    whole = read_as_model(document, tokenizer)
    if document.messages is None or not assistant_only:
        return [(whole, [(0, len(whole))])]
    turns = [_turn(document, tokenizer, i) for i in answer_turns(document.messages)]
    if all(whole.startswith(text) for text, _ in turns):
        return [(whole, [span for _, spans in turns for span in spans])]
    return turns


def _turn(document: Document, tokenizer: Any, index: int) -> tuple[str, Spans]:
    """The conversation up to and including one assistant message, and where that message lies in it."""
    assert document.messages is not None
    before = apply_template(document, tokenizer, document.messages[:index], prompt=True)
    text = apply_template(document, tokenizer, document.messages[: index + 1])
    if not text.startswith(before):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise DataError(
            f"{document.where}: the chat template of {name} renders an answer so that it does not continue its own "
            "generation prompt; set data.assistant_only = false to learn from whole conversations"
        )
    return text, [(len(before), len(text))]


def choose_documents(paths: Sequence[Path], settings: DataSection, seed: int) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, shuffled by `seed`.

    Raises DataError if nothing is left to train on.
    """
    rows = (document for path in paths for document in read_documents(path))
    documents = [d for d in rows if not settings.sources or d.source in settings.sources]
    if len(documents) <= settings.held_out:
        named = f" of the sources {', '.join(settings.sources)}" if settings.sources else ""
        raise DataError(
            f"{len(documents)} documents{named} are too few to hold out {settings.held_out} (data.held_out)"
        )
    order = np.random.default_rng(seed).permutation(len(documents))
    shuffled = [documents[i] for i in order]
    return shuffled[settings.held_out :][: settings.limit], shuffled[: settings.held_out]


class Given:
    """Documents in files. Raises DataError if there are no files, or one is missing."""

    def __init__(self, paths: Sequence[Path]):
        self._paths, self.digest = paths, hash_files(paths)

    def files(self) -> Sequence[Path]:
        """All of them."""
        return self._paths


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 over the bytes of the files in order, for provenance. Raises DataError if there are none."""
    if not paths:
        raise DataError("no data: name at least one file")
    digest = hashlib.sha256()
    for path in paths:
        with open_file(path, "data file", DataError) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
