"""Documents from files: conversations and plain text, in the order of the rows."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kangaroo.errors import ConfigError, DataError
from kangaroo.training.recipe import DataSection

Messages = list[dict[str, str]]
FORMATS = (".jsonl", ".jsonl.gz", ".parquet", ".txt", ".md")


@dataclass(frozen=True, slots=True)
class Document:
    """One row of a data file: a conversation, or plain text."""

    source: str
    messages: Messages | None = None
    text: str = ""
    where: str = ""
    """File and row it came from, for error messages."""


def read_documents(path: Path) -> Iterator[Document]:
    """Rows of a .jsonl, .jsonl.gz or .parquet file; of a .txt or .md file, its parts between two or more blank lines.

    A row has `messages` (a list of {"role", "content"}) or `text`; `source` is optional.
    Raises DataError naming the line of the first malformed row.
    """
    if not path.is_file():
        raise DataError(f"no data file at {path}")
    if not path.name.endswith(FORMATS):
        raise DataError(f"{path}: expected a file ending in {', '.join(FORMATS)}")
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix in (".txt", ".md"):
        parts = path.read_text(encoding="utf-8").split("\n\n\n")
        yield from (Document(path.stem, text=part.strip(), where=str(path)) for part in parts if part.strip())
    else:
        yield from _read_lines(path)


def _read_lines(path: Path) -> Iterator[Document]:
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parse(line, f"{path}, line {number}")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}, after line {number}: unreadable ({error})") from None


def _read_parquet(path: Path) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Parquet files need the train extra: pip install 'kangaroo-decoding[train]'") from None
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                # Parquet fills columns that a row does not use with nulls.
                yield _document({k: v for k, v in row.items() if v is not None}, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}, after row {number}: unreadable ({error})") from None


def _parse(line: str, where: str) -> Document:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    return _document(row, where)


def _document(row: Any, where: str) -> Document:
    if not isinstance(row, dict) or ("messages" not in row and "text" not in row):
        raise DataError(f'{where}: expected an object with "messages" or "text", got {str(row)[:60]!r}')
    source = str(row.get("source", "data"))
    if "text" in row:
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise DataError(f'{where}: "text" must be a non-empty string, got {str(row["text"])[:60]!r}')
        return Document(source, text=row["text"], where=where)
    messages = row["messages"]
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not well_formed or not messages:
        raise DataError(f'{where}: "messages" must be a non-empty list of {{"role", "content"}} objects')
    return Document(source, messages=messages, where=where)


def choose_documents(paths: Sequence[Path], settings: DataSection, seed: int) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, shuffled by `seed`.

    Raises DataError if nothing is left to train on.
    """
    if not paths:
        raise DataError("no data: name at least one file")
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


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 over the bytes of the files in order, for provenance."""
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            raise DataError(f"no data file at {path}")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
