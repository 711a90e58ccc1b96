"""Documents from files, and the token stream a run reads: which tokens step `s` sees is a pure function of `s`."""

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kangaroo.errors import DataError

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Document:
    """One row of a data file: a conversation, or plain text."""

    source: str
    messages: Messages | None = None
    text: str = ""


def read_documents(path: Path) -> Iterator[Document]:
    """Rows of a .jsonl, .jsonl.gz or .parquet file, or one document per blank-line-separated part of a .txt file.

    A row has `messages` (a list of {"role", "content"}) or `text`; `source` is optional.
    Raises DataError naming the line of the first malformed row.
    """
    if not path.is_file():
        raise DataError(f"no data file at {path}")
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix in (".txt", ".md"):
        parts = path.read_text(encoding="utf-8").split("\n\n\n")
        yield from (Document(path.stem, text=part.strip()) for part in parts if part.strip())
    else:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parse(line, path, number)


def _read_parquet(path: Path) -> Iterator[Document]:
    import pyarrow.parquet as parquet

    number = 0
    for batch in parquet.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield _document(row, f"{path}, row {number}")


def _parse(line: str, path: Path, number: int) -> Document:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
    return _document(row, f"{path}, line {number}")


def _document(row: Any, where: str) -> Document:
    if not isinstance(row, dict) or ("messages" not in row and "text" not in row):
        raise DataError(f'{where}: expected an object with "messages" or "text", got {str(row)[:60]!r}')
    source = str(row.get("source", "data"))
    if "text" in row:
        return Document(source, text=str(row["text"]))
    messages = row["messages"]
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not well_formed or not messages:
        raise DataError(f'{where}: "messages" must be a non-empty list of {{"role", "content"}} objects')
    return Document(source, messages=messages)


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 over the bytes of the files in order, for provenance."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class TokenStream:
    """All training text as one row of tokens. `trained` marks the tokens whose prediction is learnt from."""

    tokens: np.ndarray[Any, np.dtype[np.int32]]
    trained: np.ndarray[Any, np.dtype[np.bool_]]

    def batch(self, step: int, rows: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
        """The tokens [rows, length + 1] of step `step` and their marks.

        Blocks are visited in an order shuffled anew each epoch; resuming at a step therefore needs no reader state.
        """
        blocks = (len(self.tokens) - 1) // length
        if blocks < 1:
            raise DataError(f"{len(self.tokens)} tokens of training text are fewer than one sequence of {length}")
        visits = np.arange(step * rows, (step + 1) * rows)
        chosen = np.array([_shuffled(seed, int(v // blocks), blocks)[v % blocks] for v in visits])
        index = chosen[:, None] * length + np.arange(length + 1)
        return torch.from_numpy(self.tokens[index].astype(np.int64)), torch.from_numpy(self.trained[index])


_orders: dict[tuple[int, int, int], np.ndarray[Any, np.dtype[np.int64]]] = {}


def _shuffled(seed: int, epoch: int, blocks: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    key = (seed, epoch, blocks)
    if key not in _orders:
        _orders.clear()
        _orders[key] = np.random.default_rng(key).permutation(blocks)
    return _orders[key]


def tokenize(documents: Sequence[Document], tokenizer: Any, *, assistant_only: bool) -> TokenStream:
    """Render conversations with the tokenizer's chat template and join everything into one stream.

    With `assistant_only`, only what the assistant says is trained on; plain text is always trained on.
    """
    pieces: list[np.ndarray[Any, np.dtype[np.int32]]] = []
    marks: list[np.ndarray[Any, np.dtype[np.bool_]]] = []
    for start in range(0, len(documents), 1024):
        part = documents[start : start + 1024]
        texts = [_render(document, tokenizer) for document in part]
        encoded = tokenizer(
            [text for text, _ in texts], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for (_, spans), ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            pieces.append(np.array(ids, dtype=np.int32))
            marks.append(_mark(np.array(offsets)[:, 0], spans) if assistant_only else np.ones(len(ids), dtype=bool))
    return TokenStream(np.concatenate(pieces), np.concatenate(marks))


def _mark(starts: np.ndarray[Any, Any], spans: list[tuple[int, int]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    marked = np.zeros(len(starts), dtype=bool)
    for begin, end in spans:
        marked |= (starts >= begin) & (starts < end)
    return marked


def _render(document: Document, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text of a document, and the character spans that the assistant wrote (its end-of-turn token included)."""
    if document.messages is None:
        text = (tokenizer.bos_token or "") + document.text + (tokenizer.eos_token or "")
        return text, [(0, len(text))]
    render = tokenizer.apply_chat_template
    spans = []
    for i, message in enumerate(document.messages):
        if message["role"] == "assistant":
            before = render(document.messages[:i], tokenize=False, add_generation_prompt=True)
            after = render(document.messages[: i + 1], tokenize=False)
            spans.append((len(before), len(after)))
    return render(document.messages, tokenize=False), spans
