"""Which documents a run learns from, and which it holds out."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kangaroo.documents import Document, read_documents
from kangaroo.errors import DataError
from kangaroo.training.recipe import DataSection


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
        if not path.is_file():
            raise DataError(f"no data file at {path}")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
