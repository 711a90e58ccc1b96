"""Documents from files: conversations and plain text, in the order of the rows, and as a model reads them."""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kangaroo.chat import Messages, are_messages, need_text, render
from kangaroo.checks import shown
from kangaroo.errors import ConfigError, DataError
from kangaroo.inputs import decode, name_path, need_file, open_file, parse_json, read_text

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
    if not path.name.endswith(FORMATS):
        raise DataError(f"{name_path(path)}: expected a file ending in {', '.join(FORMATS)}")
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix in (".txt", ".md"):
        parts = read_text(path, "data file", DataError).split("\n\n\n")
        for part in parts:
            if part.strip():
                yield Document(path.stem, text=need_text(part.strip(), str(path)), where=str(path))
    else:
        yield from _read_lines(path)


def _read_lines(path: Path) -> Iterator[Document]:
    number = 0
    with open_file(path, "data file", DataError) as file:
        try:
            # Bytes, so that the line that cannot be decoded is known.
            lines = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            for number, line in enumerate(lines, 1):
                where = f"{path}, line {number}"
                if line.strip():
                    yield _document(parse_json(decode(line, where, DataError), where, DataError), where)
        except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
            raise DataError(f"{path}, after line {number}: unreadable ({error})") from None


def _read_parquet(path: Path) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Parquet files need the train extra: pip install 'kangaroo-decoding[train]'") from None
    number = 0
    need_file(path, "data file", DataError)
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                # Parquet fills columns that a row does not use with nulls.
                yield _document({k: v for k, v in row.items() if v is not None}, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}, after row {number}: unreadable ({error})") from None


def _document(row: Any, where: str) -> Document:
    if not isinstance(row, dict) or ("messages" not in row and "text" not in row):
        raise DataError(f'{where}: expected an object with "messages" or "text", got {shown(row)}')
    source = str(row.get("source", "data"))
    if "text" in row:
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise DataError(f'{where}: "text" must be a non-empty string, got {shown(row["text"])}')
        return Document(source, text=need_text(row["text"], where), where=where)
    if not are_messages(row["messages"]):
        raise DataError(f'{where}: "messages" must be a non-empty list of {{"role", "content"}} objects')
    for message in row["messages"]:
        need_text(message["content"], where)
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
    if not tokenizer.chat_template:
        raise DataError(
            f"{document.where}: a conversation, but the target has no chat template; it needs plain text rows"
        )
    return render(tokenizer, messages, document.where, prompt=prompt)


def answer_turns(messages: Messages) -> list[int]:
    """The assistant turns that answer something."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]


def prompts(documents: Sequence[Document], tokenizer: Any, seed: int) -> list[list[int]]:
    """What the target is to answer in each document: token ids, as decoding would see them.

    A conversation is cut before one of its assistant turns, plain text after a quarter to a half of its tokens; both
    chosen by (`seed`, place in the list). Conversations without an assistant turn are answered at their end.
    """
    chosen = []
    for number, document in enumerate(documents):
        draw = np.random.default_rng((seed, number)).random()
        if document.messages is None:
            ids = tokenizer((tokenizer.bos_token or "") + document.text, add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
            chosen.append(list(ids[: max(1, int(len(ids) * (1 + draw) / 4))]))
            continue
        turns = answer_turns(document.messages)
        end = turns[int(draw * len(turns))] if turns else len(document.messages)
        text = apply_template(document, tokenizer, document.messages[:end], prompt=True)
        chosen.append(list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))
    return chosen
