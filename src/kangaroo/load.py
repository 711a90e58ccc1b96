"""Whether drafts pay under the present load, by what rounds of so many rows have cost and brought.

With many rows a pass computes as long as it reads weights, and verifying a draft costs what it brings. Where that
begins differs from machine to machine and from text to text, so it is measured while requests run. What a drafted
token costs is told by pairs of neighbouring rounds, one with drafts and one without; what drafts bring is seen in every
round that has any. The rarer the trials the less they can cost: where drafts do not pay, the next one comes when this
one's loss is a small share of the rounds since.
"""

from dataclasses import dataclass

PAIRS, EVIDENCE = 2, 16
"""Pairs of rounds, and drafts, by which a trial judges."""
SHORT, FEW = 2, 2
"""Tokens of drafts that tell whether any pay, as the first bring most; and rows that need not be so careful."""
HOPELESS = -0.5
"""Plain rounds' tokens that a round with drafts may lose: beyond that, half a trial is enough."""
SHARE = 0.005
"""Of the time until the next trial, what a trial may cost."""
LEAST, MOST, AGAIN = 64, 4096, 512
"""Rounds until the next trial where drafts do not pay, at least and at most; and where they do."""
REMEMBERED = 128
"""Drafts, row by row, after which what came before counts little."""


@dataclass(slots=True)
class _Size:
    """What is known of rounds of about so many rows."""

    pays: bool
    due: int
    """Rounds until the next trial; 0 during one."""
    most: int | None
    """Tokens that drafts may have; None for as many as the drafter would."""
    overdrawn: bool = False
    """Whether longer drafts have been found not to pay."""
    decided: bool = False
    """Whether there has been a trial."""
    warm: bool = True
    """Whether the trial's first draft is over, which has more to do than others after rounds without."""
    last: tuple[int, float, int] | None = None
    """(rows, seconds, steps) of a round with drafts that waits for one without beside it."""
    pairs: int = 0
    rounds: int = 0
    """With drafts, in this trial."""
    drafts: int = 0
    """Row by row, in this trial."""
    extra: float = 0.0
    """Seconds that drafts have added, in those of the plain rounds beside them."""
    paid: float = 0.0
    """Steps that they had."""
    tokens: float = 0.0
    """Emitted in rounds with drafts, in those of as many rows in plain rounds."""
    steps: float = 0.0
    weight: float = 0.0

    @property
    def price(self) -> float | None:
        """Of a step, in plain rounds."""
        return max(0.0, self.extra / self.paid) if self.paid else None

    @property
    def advantage(self) -> float:
        """Tokens that a round with drafts brings beyond what its time would bring without them, in plain rounds'."""
        if not self.weight:
            return 0.0
        return (self.tokens - (self.price or 0.0) * self.steps) / self.weight - 1

    def begin(self) -> None:
        """Try both ways; what is known from before counts half."""
        self.due, self.warm, self.last = 0, self.pays, None
        self.pairs = self.rounds = self.drafts = 0
        self.extra, self.paid = self.extra / 2, self.paid / 2
        if not self.pays:
            self.tokens, self.steps, self.weight = self.tokens / 2, self.steps / 2, self.weight / 2

    def drafted(self, rows: int, tokens: int, steps: int, seconds: float) -> None:
        """A round with drafts is over."""
        kept = 1 - min(rows, REMEMBERED // 2) / REMEMBERED
        self.tokens = self.tokens * kept + tokens / rows
        self.steps, self.weight = self.steps * kept + steps, self.weight * kept + 1
        if not self.due:
            self.rounds, self.drafts = self.rounds + 1, self.drafts + rows
            self.last = (rows, seconds, steps) if self.warm else None
            self.warm = True

    def plain(self, rows: int, seconds: float) -> None:
        """A round without drafts is over."""
        if self.last is not None and abs(self.last[0] - rows) * 8 <= rows and seconds:
            self.extra, self.paid = self.extra + self.last[1] / seconds - 1, self.paid + self.last[2]
            self.pairs += 1
        self.last = None

    def judge(self) -> None:
        """A round is over: end the trial, begin the next, or see that drafts no longer pay."""
        if self.due:
            self.due -= 1
            if self.pays and self.advantage < 0:
                self.pays, self.due = False, LEAST
                self.overdrawn, self.most = self.most is None, SHORT
            elif not self.due:
                self.begin()
        elif self._enough(1) or (self._enough(2) and self.advantage < HOPELESS):
            self.pays, self.decided = self.advantage >= 0, True
            loss = -self.advantage * self.rounds
            self.due = AGAIN if self.pays else min(MOST, max(LEAST, round(loss / SHARE)))
            self.most = None if self.pays and not self.overdrawn else self.most

    def _enough(self, part: int) -> bool:
        return self.pairs * part >= PAIRS and self.drafts * part >= EVIDENCE


class Load:
    """Decides round by round whether to draft."""

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}
        """By the power of two that holds so many rows: 1, 2, 3 to 4, 5 to 8, ..."""

    def _of(self, rows: int) -> _Size:
        exponent = (rows - 1).bit_length()
        size = self._sizes.setdefault(exponent, _Size(True, 0, None if rows <= FEW else SHORT))
        # Where drafts do not pay with fewer rows, they will hardly do so with more.
        if (
            not size.decided
            and size.pays
            and any(known.decided and not known.pays for fewer, known in self._sizes.items() if fewer < exponent)
        ):
            size.pays, size.due = False, LEAST
        return size

    def drafts(self, rows: int) -> bool:
        """Whether the next round, of so many rows, is to draft."""
        size = self._of(rows)
        return size.pays if size.due else size.last is None or size.pairs >= PAIRS

    def pays(self, rows: int) -> bool:
        """Whether drafts pay, trials aside."""
        return self._of(rows).pays

    def most(self, rows: int) -> int | None:
        """Tokens that a row's draft may have; None for as many as its drafter would."""
        return self._of(rows).most

    def price(self, rows: int) -> float | None:
        """Cost of drafting a token and verifying it, in plain rounds; None while that is not known."""
        return self._of(rows).price

    def learn(self, rows: int, drafting: bool, tokens: int, steps: int, seconds: float) -> None:
        """A round is over: how many tokens its rows emitted, how many the longest draft had, how long it took."""
        size = self._of(rows)
        if drafting:
            size.drafted(rows, tokens, steps, seconds)
        else:
            size.plain(rows, seconds)
        size.judge()
