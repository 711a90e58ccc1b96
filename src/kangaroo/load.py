"""Whether drafts pay under the present load: an account of what they bring and cost, kept while requests run.

With many rows a pass computes as long as it reads weights, and verifying a draft costs what it brings. Where that
begins differs from machine to machine and from text to text. So every round with drafts is booked, in plain rounds:
what it emitted, less the time it took. Drafts begin with a loan, and are made until it is spent. What a single draft
brings is mostly chance, of which many rows see more at once: the fewer they are, the larger the loan. Drafts that pay
hardly ever spend it; those that do not cost no more than that, and once more when it is a small share of the rounds
since.
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from statistics import median

LOAN, LEAST_LOAN = 8.0, 1.0
"""Plain rounds that drafts may lose: with one row, shared among more, and at least."""
WAIT, LONGEST_WAIT = 256, 4096
"""Rounds until the next loan: after the first that is spent, then twice as many each time, and at most."""
SURE, DOUBTFUL = 32, 4
"""Rounds with drafts until one without, which tells what those cost: while drafts bring something, and otherwise."""
KNOWN = 3
"""Rounds without drafts by which others are measured: the last ones."""
SHORT, FEW = 2, 2
"""Tokens of drafts that tell whether any pay, as the first bring most; and rows that need not be so careful."""
REMEMBERED = 64
"""Rounds with drafts after which what earlier ones cost counts little."""


@dataclass(slots=True)
class _Size:
    """What is known of rounds of about so many rows."""

    loan: float
    careful: bool
    """Whether drafts are short until these have paid."""
    most: int | None
    """Tokens that drafts may have; None for as many as the drafter would."""
    wait: int = 0
    """Rounds until the next loan; 0 while there is one."""
    balance: float = 0.0
    """Plain rounds that drafts have brought, no more of them than they may lose."""
    next_wait: int = WAIT
    overdrawn: bool = False
    """Whether longer drafts have spent what short ones had brought."""
    since: int = 0
    """Rounds with drafts since the last without."""
    plain: defaultdict[int, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=KNOWN)))
    """Seconds of rounds without drafts, by rows."""
    extra: float = 0.0
    """Plain rounds that drafts have cost."""
    steps: float = 0.0
    """Tokens that they had."""

    def drafts(self, rows: int) -> bool:
        """Whether the next round is to draft."""
        often = SURE if self.balance > 0 else DOUBTFUL
        return not self.wait and len(self.plain[rows]) == KNOWN and self.since < often

    def rest(self, rows: int, drafting: bool, seconds: float) -> None:
        """A round is over in which nothing was drafted, if only because there was nothing to draft."""
        self.plain[rows].append(max(seconds, 1e-9))
        self.since, self.wait = int(drafting), max(0, self.wait - 1)

    def book(self, rows: int, tokens: int, steps: int, seconds: float) -> None:
        """A round with drafts is over."""
        first, self.since = self.since == 0, self.since + 1
        if first or not self.plain[rows]:  # the first after one without has more to do
            return
        cost, kept = seconds / median(self.plain[rows]), 1 - 1 / REMEMBERED
        self.extra, self.steps = self.extra * kept + cost - 1, self.steps * kept + steps
        self.balance = min(self.balance + tokens / rows - cost, self.loan)
        if self.balance <= -self.loan:
            self._spent()
        elif self.balance == self.loan:
            self._paid_back()

    def _spent(self) -> None:
        """Longer drafts have lost: back to short ones. Short ones have: none for a while."""
        self.balance = 0.0
        if self.careful and self.most is None:
            self.most, self.overdrawn = SHORT, True
        else:
            self.wait, self.overdrawn = self.next_wait, False
            self.next_wait = min(LONGEST_WAIT, 2 * self.next_wait)

    def _paid_back(self) -> None:
        """Drafts pay; short ones that do may be longer."""
        self.next_wait = WAIT
        if not self.overdrawn and self.most is not None:
            self.most, self.balance = None, 0.0


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
            self._sizes[exponent] = _Size(loan, careful, SHORT if careful else None, wait)
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
            size.rest(rows, drafting, seconds)
