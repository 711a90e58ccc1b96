"""A datastore: tokenised text with its suffix array, in one file that is memory-mapped and never changes.

The file is in safetensors format: `tokens` and `order` as in SuffixArray, and what they were made of as metadata.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kangaroo.checks import shown
from kangaroo.documents import Document, read_as_model
from kangaroo.drafters.copying.suffixes import Bytes, SuffixArray, bytes_to_sort, id_bytes, join, load_sorter
from kangaroo.errors import CapacityError, ConfigError, DataError
from kangaroo.files import need_file_or_nothing, write_atomically, writing
from kangaroo.inputs import is_file, is_folder, name_path, need_file
from kangaroo.machine import available_bytes, human_bytes

KIND, VERSION = "kangaroo datastore", 2
"""From version 2 on a file holds a digest of its facts and arrays, which is compared whenever it is opened."""
_CHUNK, _PIECE = 256, 1 << 22

Stage = Literal["tokenise", "sort", "write"]
BuildReport = Callable[[Stage, int], None]
"""Called with what is being done and how many more documents are done."""


@dataclass(frozen=True, slots=True)
class Datastore:
    """An open datastore. Any number of drafters may share one."""

    suffixes: SuffixArray
    vocab_size: int
    """Token ids that the model can make use of lie below this."""

    @property
    def documents(self) -> int:
        """Number of documents."""
        return self.suffixes.documents

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return len(self.suffixes.order) - self.documents

    @classmethod
    def open(cls, path: Path, tokenizer: Any, vocab_size: int) -> "Datastore":
        """Map a file into memory, for a model of that tokenizer and vocabulary size.

        Raises DataError if there is none, if it is damaged or of a newer version, or if its tokenizer is another.
        """
        if not is_file(path):
            raise DataError(f"there is no datastore at {name_path(path)}: build one with `kangaroo datastore build`")
        suffixes, built_with = _read(path)
        if built_with != _fingerprint(tokenizer):
            name = getattr(tokenizer, "name_or_path", "") or "this model"
            raise DataError(
                f"{path} was built with another tokenizer than that of {name}: "
                f"build one with `kangaroo datastore build --model {name}`"
            )
        return cls(suffixes, min(suffixes.vocab_size, vocab_size))


def build_datastore(
    documents: Iterable[Document], tokenizer: Any, path: Path, report: BuildReport = lambda stage, done: None
) -> Datastore:
    """Tokenise documents, sort their suffixes, and write the file, which appears whole or not at all.

    Raises ConfigError without the datastore extra, DataError for documents that cannot be rendered, CapacityError if
    sorting needs more memory than there is.
    """
    sort, vocab_size = load_sorter(), max(tokenizer.get_vocab().values()) + 1
    if is_folder(path):
        raise ConfigError(f"a datastore is one file, but {path} is a folder: name a file in it")
    need_file_or_nothing(path)  # before minutes of work, not after them
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    tokens = join(_tokenise(documents, tokenizer, report), vocab_size)
    if not len(tokens):
        raise DataError("there are no documents to build a datastore from")
    _check_memory(tokens)
    report("sort", 0)
    suffixes = SuffixArray(tokens, sort(tokens), vocab_size)
    report("write", 0)
    write_atomically(path, lambda part: _write(part, suffixes, _fingerprint(tokenizer)))
    return Datastore.open(path, tokenizer, vocab_size)


def _tokenise(documents: Iterable[Document], tokenizer: Any, report: BuildReport) -> Iterator[list[int]]:
    remaining = iter(documents)
    while chunk := list(islice(remaining, _CHUNK)):
        texts = [read_as_model(document, tokenizer) for document in chunk]
        yield from tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        report("tokenise", len(chunk))


def _check_memory(tokens: Bytes) -> None:
    need, free = bytes_to_sort(*tokens.shape), available_bytes(torch.device("cpu"))
    if need > free:
        raise CapacityError(
            f"sorting {len(tokens):,} tokens needs {human_bytes(need)} of memory, but {human_bytes(free)} are free: "
            "build the datastore from less text"
        )


def _fingerprint(tokenizer: Any) -> str:
    """Equal for tokenizers whose ids stand for the same strings."""
    vocabulary = sorted((token, name) for name, token in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def _write(path: Path, suffixes: SuffixArray, tokenizer: str) -> None:
    facts = {
        "kind": KIND,
        "version": str(VERSION),
        "tokenizer": tokenizer,
        "vocab_size": str(suffixes.vocab_size),
        "documents": str(suffixes.documents),
        "tokens": str(len(suffixes.order) - suffixes.documents),
    }
    facts["digest"] = _digest(facts, suffixes)
    save_file({"tokens": suffixes.tokens, "order": suffixes.order}, path, metadata=facts)


def _read(path: Path) -> tuple[SuffixArray, str]:
    """(what a file holds, mapped into memory, the fingerprint of the tokenizer it was built with)."""
    try:
        # Of safetensors' frameworks torch is the one that maps arrays instead of copying them.
        with safe_open(need_file(path, "datastore", DataError), framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("kind") != KIND:
                raise DataError(f"{path} is not a datastore: build one with `kangaroo datastore build`")
            numbers = {name: _number(facts, name, path) for name in ("version", "vocab_size", "documents", "tokens")}
            if numbers["version"] > VERSION:
                raise DataError(
                    f"{path} is a datastore of version {facts['version']}, this release reads up to {VERSION}: "
                    "install a newer one, or build it again with `kangaroo datastore build`"
                )
            tokens, order = (file.get_tensor(name) for name in ("tokens", "order"))
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path} is not a datastore, or is cut short ({error}): build it again with `kangaroo datastore build`"
        ) from None
    _check_arrays(tokens, order, numbers, path)
    suffixes = SuffixArray(tokens.numpy(), order.numpy(), numbers["vocab_size"])
    _check_content(suffixes, facts, numbers, path)
    return suffixes, facts.get("tokenizer", "")


def _number(facts: dict[str, str], name: str, path: Path) -> int:
    text = facts.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise _damaged(path, f"its {name} is {shown(text)}")
    return int(text)


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path} is damaged ({what}): build it again with `kangaroo datastore build`")


def _check_arrays(tokens: torch.Tensor, order: torch.Tensor, numbers: dict[str, int], path: Path) -> None:
    """Arrays of the types and sizes that the facts speak of, so that no place is looked for outside them."""
    count, width = numbers["documents"] + numbers["tokens"], id_bytes(min(numbers["vocab_size"], 2**32 - 1))
    if tokens.dtype != torch.uint8 or order.dtype not in (torch.uint16, torch.uint32, torch.uint64):
        raise _damaged(path, f"arrays of {tokens.dtype} and {order.dtype}")
    if not 1 <= numbers["vocab_size"] < 2**32 or tokens.shape != (count, width) or order.shape != (count,) or not count:
        raise _damaged(path, f"arrays of {list(tokens.shape)} and {list(order.shape)} for {count} tokens")


def _check_content(suffixes: SuffixArray, facts: dict[str, str], numbers: dict[str, int], path: Path) -> None:
    """The digest; without one, in files of version 1, at least that every place lies in the text."""
    if numbers["version"] != 1 or "digest" in facts:  # whatever a damaged version claims
        if facts.get("digest") != _digest({k: v for k, v in facts.items() if k != "digest"}, suffixes):
            raise _damaged(path, "its content is not what was written")
    elif any(int(piece.max()) >= len(suffixes.order) for piece in _pieces(suffixes.order)):
        raise _damaged(path, "places outside its text")


def _digest(facts: dict[str, str], suffixes: SuffixArray) -> str:
    """SHA-256 of the facts and both arrays, read in pieces: the file may be larger than memory."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for array in (suffixes.tokens, suffixes.order):
        for piece in _pieces(array):
            found.update(np.ascontiguousarray(piece).data)
    return found.hexdigest()


def _pieces(array: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    return (array[begin : begin + _PIECE] for begin in range(0, len(array), _PIECE))
