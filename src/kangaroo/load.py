"""Whether drafts pay under the present load, by what rounds of so many rows have cost and brought.

With many rows a pass computes as long as it reads weights, and verifying a draft costs what it brings. Where that
begins differs from machine to machine and from text to text, so it is measured while requests run: of rounds with
drafts and of rounds without, those are run that emit more tokens per second, and now and then the others are tried.
"""

from dataclasses import dataclass, field

FIRST, TRIAL = 6, 4
"""Rounds before the first trial, and of a trial."""
AGAIN = {True: 512, False: 256}
"""Rounds until the other way is tried again, where drafts pay (plain rounds cost the same for ever) and where not."""
FORGET = 0.95
"""Share of what is known that a round leaves."""


@dataclass(slots=True)
class _Way:
    """What rounds with drafts, or without, have been like."""

    tokens: float = 0.0
    seconds: float = 0.0
    steps: float = 0.0
    weight: float = 0.0

    def learn(self, tokens: int, steps: int, seconds: float) -> None:
        self.tokens = self.tokens * FORGET + tokens
        self.seconds = self.seconds * FORGET + seconds
        self.steps = self.steps * FORGET + steps
        self.weight = self.weight * FORGET + 1

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class _Size:
    """What is known of rounds of one number of rows."""

    pays: bool = True
    trial: int = 0
    """Rounds that are left of a trial of the other way."""
    since: int = 0
    """Rounds since the last trial."""
    ways: dict[bool, _Way] = field(default_factory=lambda: {True: _Way(), False: _Way()})


class Load:
    """Decides round by round whether to draft."""

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}

    def _of(self, rows: int) -> _Size:
        if rows not in self._sizes:
            # Where drafts do not pay with fewer rows, they will hardly do so with more.
            self._sizes[rows] = _Size(pays=all(size.pays for fewer, size in self._sizes.items() if fewer < rows))
        return self._sizes[rows]

    def drafts(self, rows: int) -> bool:
        """Whether the next round, of so many rows, is to draft."""
        size = self._of(rows)
        return size.pays != (size.trial > 0)

    def pays(self, rows: int) -> bool:
        """Whether drafts pay, trials aside."""
        return self._of(rows).pays

    def price(self, rows: int) -> float | None:
        """Cost of drafting a token and verifying it, in plain rounds; None while that is not known."""
        drafted, plain = self._of(rows).ways[True], self._of(rows).ways[False]
        if not (drafted.steps and plain.weight):
            return None
        each = plain.seconds / plain.weight
        return max(0.0, (drafted.seconds / drafted.weight - each) / each * drafted.weight / drafted.steps)

    def learn(self, rows: int, drafting: bool, tokens: int, steps: int, seconds: float) -> None:
        """A round is over: how many tokens its rows emitted, how many the longest draft had, how long it took."""
        size = self._of(rows)
        size.ways[drafting].learn(tokens, steps, seconds)
        if size.trial:
            size.trial -= 1
            if not size.trial:
                size.pays, size.since = size.ways[True].rate >= size.ways[False].rate, 0
            return
        size.since += 1
        if size.since >= (AGAIN[size.pays] if size.ways[not size.pays].weight else FIRST):
            size.trial, size.ways[not size.pays] = TRIAL, _Way()
