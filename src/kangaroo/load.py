"""Whether drafts pay under the present load: an account of what they bring and take, kept while requests run.

With many rows a pass computes as long as it reads weights, and verifying a draft costs what it brings. Where that
begins differs from machine to machine and from text to text. So every round with drafts is booked, in plain rounds: the
tokens it brought, less the time it took. Drafts begin with a loan and are made until it is spent. What one draft brings
is mostly chance. With a mean gain m a round, of variance v, a loan L is ever spent with a probability of about
exp(-2 m L / v), as a Brownian motion with drift is ruined; many rows average chance out, so theirs may be small. Drafts
that do not pay cost no more than the loan, and the same again when that is a small share of the rounds since.
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from statistics import median

LOAN, LEAST_LOAN = 8.0, 1.0
"""Plain rounds that drafts may lose: with one row, shared among more; and at least."""
WAIT, LONGEST_WAIT = 256, 4096
"""Rounds until the next loan: after the first that is spent, then twice as many each time, and at most."""
OFTEN, KNOWN = 20, 3
"""Rounds with drafts until one without; and how many of these, the last ones, others are measured by."""
LOOKS = 2
"""Rounds without drafts before a loan counts as spent: the machine may have become slower in the meantime."""
SHORT, FEW = 2, 2
"""Tokens of drafts that tell whether any pay, as the first bring most; and rows that need not be so careful."""
REMEMBERED = 64
"""Rounds with drafts after which what earlier ones cost counts little."""


@dataclass(slots=True)
class _Size:
    """What is known of rounds of about so many rows."""

    loan: float
    most: int | None
    """Tokens that drafts may have; None for as many as the drafter would."""
    careful: bool
    """Whether drafts are short until these have paid."""
    overdrawn: bool = False
    """Whether longer ones have lost what short ones had brought."""
    wait: int = 0
    """Rounds until the next loan; 0 while there is one."""
    next_wait: int = WAIT
    balance: float = 0.0
    """What drafts have brought, as far as it is settled."""
    brought: float = 0.0
    """Since then, in plain rounds' tokens."""
    took: float = 0.0
    """Since then, in plain rounds' time."""
    plain: defaultdict[int, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=KNOWN)))
    """Seconds of the last rounds without drafts, by rows."""
    drafted: int = 0
    """Rounds with drafts since the last without."""
    looks: int = 0
    """Rounds without drafts since the last with."""
    extra: float = 0.0
    """Plain rounds that drafts have added."""
    steps: float = 0.0
    """Tokens that they had."""

    @property
    def worth(self) -> float:
        """What drafts have brought, by what is known now."""
        return self.balance + self.brought - self.took

    def drafts(self, rows: int) -> bool:
        """Whether the next round is to draft."""
        known = len(self.plain[rows]) == KNOWN and self.drafted < OFTEN
        return known and not self.wait and self.worth > -self.loan

    def book(self, rows: int, tokens: int, steps: int, seconds: float) -> None:
        """A round with drafts is over."""
        first, self.drafted, self.looks = self.drafted == 0, self.drafted + 1, 0
        if first or not self.plain[rows]:  # the first after one without has that one's tokens to catch up with
            return
        cost, kept = seconds / median(self.plain[rows]), 1 - 1 / REMEMBERED
        self.extra, self.steps = self.extra * kept + cost - 1, self.steps * kept + steps
        self.brought, self.took = self.brought + tokens / rows, self.took + cost
        if self.worth >= self.loan:
            self._paid_back()

    def look(self, rows: int, drafting: bool, seconds: float) -> None:
        """A round without drafts is over, if only because there was nothing to draft."""
        known = self.plain[rows]
        before = median(known) if known else 0.0
        known.append(max(seconds, 1e-9))
        if before:  # what was booked since may have taken long for other reasons
            self.took *= before / median(known)
        self.drafted, self.looks, self.wait = int(drafting), self.looks + 1, max(0, self.wait - 1)
        if self.worth > -self.loan:
            self._settle(self.worth)
        elif self.looks >= LOOKS:
            self._spent()

    def _settle(self, balance: float) -> None:
        self.balance, self.brought, self.took = min(balance, self.loan), 0.0, 0.0

    def _paid_back(self) -> None:
        """Drafts pay; short ones that do may be longer."""
        self.next_wait = WAIT
        longer = self.most is not None and not self.overdrawn
        self._settle(0.0 if longer else self.loan)
        self.most = None if longer else self.most

    def _spent(self) -> None:
        """Longer drafts have lost: back to short ones. Short ones have: none for a while."""
        self._settle(0.0)
        if self.careful and self.most is None:
            self.most, self.overdrawn = SHORT, True
        else:
            self.wait, self.overdrawn = self.next_wait, False
            self.next_wait = min(LONGEST_WAIT, 2 * self.next_wait)


class Load:
    """Decides round by round whether to draft."""

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}
        """By the power of two that holds so many rows: 1, 2, 3 to 4, 5 to 8, ..."""

    def _of(self, rows: int) -> _Size:
        exponent = (rows - 1).bit_length()
        if exponent not in self._sizes:
            careful, loan = rows > FEW, max(LEAST_LOAN, LOAN / 2**exponent)
            # Where drafts do not pay with fewer rows, they will hardly do so with more.
            wait = max((known.wait for fewer, known in self._sizes.items() if fewer < exponent), default=0)
            self._sizes[exponent] = _Size(loan, SHORT if careful else None, careful, wait=wait)
        return self._sizes[exponent]

    def drafts(self, rows: int) -> bool:
        """Whether the next round, of so many rows, is to draft."""
        return self._of(rows).drafts(rows)

    def pays(self, rows: int) -> bool:
        """Whether drafts pay as far as is known, though the next round may do without."""
        return not self._of(rows).wait

    def most(self, rows: int) -> int | None:
        """Tokens that a row's draft may have; None for as many as its drafter would."""
        return self._of(rows).most

    def price(self, rows: int) -> float | None:
        """Cost of drafting a token and verifying it, in plain rounds; None while that is not known."""
        size = self._of(rows)
        return max(0.0, size.extra / size.steps) if size.steps else None

    def learn(self, rows: int, drafting: bool, tokens: int, steps: int, seconds: float) -> None:
        """A round is over: how many tokens its rows emitted, how many the longest draft had, how long it took."""
        size = self._of(rows)
        if steps:
            size.book(rows, tokens, steps, seconds)
        else:
            size.look(rows, drafting, seconds)
