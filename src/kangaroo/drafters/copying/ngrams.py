"""Where short runs of tokens have occurred, as an index that grows with the text."""

from collections.abc import Sequence
from typing import Literal

from kangaroo.errors import ConfigError

Keep = Literal["first", "latest"]
LONGEST_RUN, LONGEST_COPY = 64, 1023
"""Every length of a run costs an entry per token; and no draft is longer than that."""


class NgramIndex:
    """Finds the longest run of tokens at the end of a text that has occurred before.

    Appending costs one dictionary entry per token and length, a query one look-up per length: neither depends on how
    much text there is.
    """

    def __init__(self, shortest: int, longest: int, keep: Keep):
        """Runs of `shortest` to `longest` tokens; of several occurrences the first or the latest is found."""
        self.tokens: list[int] = []
        self._keep, self._lengths = keep, range(longest, shortest - 1, -1)
        self._ends: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        begin = len(self.tokens)
        self.tokens.extend(tokens)
        for end in range(begin + 1, len(self.tokens) + 1):
            for length in self._lengths:
                if length <= end:
                    run = tuple(self.tokens[end - length : end])
                    if self._keep == "latest" or run not in self._ends:
                        self._ends[run] = end

    def find(self, tail: Sequence[int]) -> tuple[int, int]:
        """(length of the longest run at the end of `tail` that occurs, place after that occurrence), or (0, 0)."""
        for length in self._lengths:
            if length <= len(tail):
                end = self._ends.get(tuple(tail[len(tail) - length :]))
                if end is not None:
                    return length, end
        return 0, 0

    def continuation(self, pending: int, count: int, *, loop: bool = False) -> tuple[int, list[int]]:
        """(length of the match, at most `count` tokens that followed it) for the text and one token after it.

        (0, []) on a miss. Where known text ends the copy does, unless it may `loop`: then it goes on with what has just
        been copied, as data compressors do.
        """
        known = len(self.tokens)
        # The token after the text is not indexed, so that no run is found to follow itself.
        length, end = self.find([*self.tokens[max(0, known + 1 - self._lengths[0]) :], pending])
        if not length:
            return 0, []
        copy = [*self.tokens[end : end + count], pending][:count]
        while loop and len(copy) < count:
            copy.append(copy[len(copy) - (known + 1 - end)])
        return length, copy


def check_lengths(shortest: int, longest: int, copied: int) -> None:
    """Raise ConfigError for runs to look for, or tokens to copy, that cannot be."""
    if not 1 <= shortest <= longest <= LONGEST_RUN:
        raise ConfigError(
            f"n-grams need 1 <= shortest <= longest <= {LONGEST_RUN}, got shortest {shortest} and longest {longest}"
        )
    if not 1 <= copied <= LONGEST_COPY:
        raise ConfigError(f"tokens copied at most (max_draft, max_copy) must be in 1..{LONGEST_COPY}, got {copied}")
