"""A suffix array over tokens: every place where a run of tokens has occurred, found by bisection.

Only memory is compared, a few dozen times a query, so the arrays may lie in a file that is never read whole.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from kangaroo.errors import ConfigError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Places = np.ndarray[Any, np.dtype[np.uint32 | np.uint64]]
Ids = np.ndarray[Any, np.dtype[np.int64]]
_PIECE = 1 << 22


class SuffixArray:
    """Where every suffix of a text begins, in the order of the suffixes.

    tokens [T, W] uint8 are ids of W bytes each, the most significant first: bytes then compare as tokens do. Ids lie
    below `vocab_size`. The id `vocab_size` itself, larger than any that a query can hold, ends every document.
    order [T] are places in the text.
    """

    def __init__(self, tokens: Bytes, order: Places, vocab_size: int):
        assert len(tokens) == len(order)
        self.tokens, self.order, self.vocab_size = tokens, order, vocab_size
        self._width, self._text, self._places = tokens.shape[1], tokens.reshape(-1).data, order.data
        self._ids = tokens.reshape(-1).view(f">u{self._width}")

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.order) - self._first(self._end)

    def find(self, context: Sequence[int], shortest: int, longest: int) -> tuple[int, range]:
        """The longest run at the end of a context, of `shortest` to `longest` tokens, that occurs and is continued.

        (its length, the places in `order` of its occurrences), or (0, an empty range). Occurrences at the end of a
        document do not count: nothing follows them.
        """
        key = encode(self._known(context[-longest:]), self.vocab_size)
        lengths = range(shortest * self._width, len(key) + 1, self._width)
        # What ends a run that occurs, occurs: one bisection finds the longest.
        found = bisect_left(lengths, True, key=lambda length: not self._continues(key[-length:]))
        if not found:
            return 0, range(0)
        key = key[-lengths[found - 1] :]
        # The end of a document is larger than every token, so the occurrences that it follows are the last ones.
        return len(key) // self._width, range(self._first(key), self._first(key + self._end))

    def continuations(self, length: int, places: range, width: int, most: int) -> Ids:
        """[n, width] the tokens after runs of `length` at `places`; of more than `most` places, evenly spread ones.

        Rows are in order. An id of `vocab_size` ends a document: what follows it means nothing.
        """
        count = min(len(places), most)
        chosen = places.start + np.arange(count) * len(places) // count
        begins = self.order[chosen].astype(np.int64)[:, None] + np.arange(length, length + width)
        # The text ends with the end of a document, and so do all reads past it.
        found: Ids = self._ids[np.minimum(begins, len(self._ids) - 1)].astype(np.int64)
        return found

    @property
    def _end(self) -> bytes:
        return self.vocab_size.to_bytes(self._width, "big")

    def _known(self, context: Sequence[int]) -> Sequence[int]:
        """What follows the last id that is not in the vocabulary, as a model with spare embeddings may emit."""
        foreign = [place for place, token in enumerate(context) if token >= self.vocab_size]
        return context[foreign[-1] + 1 :] if foreign else context

    def _continues(self, key: bytes) -> bool:
        first = self._first(key)
        if first == len(self.order):
            return False
        found = self._suffix(first, len(key) + self._width)
        return found.startswith(key) and not found.endswith(self._end)

    def _first(self, key: bytes) -> int:
        """How many suffixes come before the key."""
        return bisect_left(range(len(self.order)), key, key=lambda place: self._suffix(place, len(key)))

    def _suffix(self, place: int, size: int) -> bytes:
        begin = self._places[place] * self._width
        return bytes(self._text[begin : begin + size])


def id_bytes(vocab_size: int) -> int:
    """Bytes per token: 1, 2 or 4, enough for all ids and the one that ends documents."""
    return np.min_scalar_type(vocab_size).itemsize


def encode(tokens: Sequence[int], vocab_size: int) -> bytes:
    """Token ids as bytes that compare as they do."""
    return np.array(tokens, dtype=f">u{id_bytes(vocab_size)}").tobytes()


def join(documents: Iterable[Sequence[int]], vocab_size: int) -> Bytes:
    """Documents one after another, each with its end: [T, W] bytes."""
    joined = bytearray()
    for document in documents:
        joined += encode([*document, vocab_size], vocab_size)
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, id_bytes(vocab_size))


def load_sorter() -> Callable[[Bytes], Places]:
    """`sort_suffixes`. Raises ConfigError if what it needs is not installed."""
    try:
        from pydivsufsort import divsufsort
    except ImportError:
        raise ConfigError(
            "building a datastore needs the datastore extra: pip install 'kangaroo-decoding[datastore]'"
        ) from None

    def sort_suffixes(tokens: Bytes) -> Places:
        """Where the suffixes of tokens [T, W] begin, in order."""
        text, width = np.ascontiguousarray(tokens).reshape(-1), tokens.shape[1]
        # Of the suffixes of the bytes, those that begin a token; their order is that of the tokens' suffixes.
        order, kind = divsufsort(text), np.min_scalar_type(max(len(tokens) - 1, 1 << 16))
        pieces = (order[begin : begin + _PIECE] for begin in range(0, len(order), _PIECE))
        return np.concatenate([(piece[piece % width == 0] // width).astype(kind) for piece in pieces])

    return sort_suffixes


def bytes_to_sort(tokens: int, width: int) -> int:
    """Memory that sorting takes at most, beside the text: the order of its bytes, and that of its tokens twice."""
    size = tokens * width
    return size * (4 if size <= np.iinfo(np.int32).max else 8) + 2 * tokens * (4 if tokens <= 1 << 32 else 8)
