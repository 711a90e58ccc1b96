"""Documents from files: conversations and plain text, in the order of the rows, and as a model reads them."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kangaroo.errors import ConfigError, DataError

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
                    yield _document(parse_line(line, f"{path}, line {number}"), f"{path}, line {number}")
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


def parse_line(line: str, where: str) -> Any:
    """What a line of JSON holds. Raises DataError naming the line."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None


def are_messages(value: Any) -> bool:
    """Whether this is a list of one or more {"role", "content"} objects."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )


def _document(row: Any, where: str) -> Document:
    if not isinstance(row, dict) or ("messages" not in row and "text" not in row):
        raise DataError(f'{where}: expected an object with "messages" or "text", got {str(row)[:60]!r}')
    source = str(row.get("source", "data"))
    if "text" in row:
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise DataError(f'{where}: "text" must be a non-empty string, got {str(row["text"])[:60]!r}')
        return Document(source, text=row["text"], where=where)
    if not are_messages(row["messages"]):
        raise DataError(f'{where}: "messages" must be a non-empty list of {{"role", "content"}} objects')
    return Document(source, messages=row["messages"], where=where)


def read_as_model(document: Document, tokenizer: Any) -> str:
    """The text that a model sees: a conversation by the chat template, plain text between the special tokens.

    Raises DataError for conversations that the tokenizer's template cannot render.
    """
    if document.messages is None:
        return (tokenizer.bos_token or "") + document.text + (tokenizer.eos_token or "")
    return apply_template(document, tokenizer, document.messages)


def apply_template(document: Document, tokenizer: Any, messages: Messages, *, prompt: bool = False) -> str:
    """Messages of a document by the tokenizer's chat template; a `prompt` ends where the answer begins."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError(
            f"{document.where}: a conversation, but the target has no chat template; it needs plain text rows"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except TemplateError as error:
        raise DataError(f"{document.where}: the chat template refuses this conversation: {error}") from None
