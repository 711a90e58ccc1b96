"""What `--json` prints, verb by verb: one object on one line. Numbers that are not finite are null."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Promise(_Facts):
    """What the model promises of its texts, and why."""

    level: str
    """"bitwise" or "ties"."""
    reason: str


class Answer(_Facts):
    """One completed prompt."""

    prompt: str
    text: str
    tokens: list[int]
    """Every emitted token, an end-of-sequence token included."""
    drafted: list[bool]
    """Which of them were drafted and accepted."""
    finish_reason: str
    stopped_by: str | int | None
    """The stop string, or the token, that ended it; null if its length did."""
    prompt_tokens: int


class RunStats(_Facts):
    """Of all answers together."""

    emitted: int
    rounds: int
    drafted: int
    """Tokens proposed."""
    accepted: int
    """Of them, tokens emitted."""
    cr: float
    """Tokens per round."""
    tokens_per_second: float


class Generate(_Facts):
    """`generate`, the same for one prompt and for a file of them."""

    answers: list[Answer]
    stats: RunStats


class Difference(_Facts):
    """Where an answer departs from plain decoding's."""

    prompt: int
    temperature: float
    batch: int
    position: int
    expected: int
    got: int
    gap: float | None
    bound: float
    """The widest gap that rounding explains."""
    float64: int | None
    tie: bool
    """Whether rounding explains it."""


class Rounds(_Facts):
    """How many rounds accepted none, some or all of their drafts, or had none."""

    none: int
    some: int
    all: int
    undrafted: int


class Checked(_Facts):
    """One drafter's check."""

    exactness: Promise
    tokens: int
    answers: int
    bits: int
    """Tokens whose logits differ in some bit from plain decoding's."""
    rounds: Rounds
    differences: list[Difference]
    problem: str | None
    """Why the check did not pass: answers that differ, or, without any, why it says nothing."""


class Check(_Facts):
    """`check`."""

    lossless: bool
    exactness: Promise
    drafters: dict[str, Checked]
    left_out: dict[str, str]


class ComparedLine(_Facts):
    """One drafter's answer."""

    method: str
    tokens: list[int]
    identical: bool
    seconds: float
    speedup: float
    rounds: int
    drafted: int
    accepted: int
    prefill: float
    draft: float
    verify: float
    rest: float
    tie: bool | None = None
    """Of an answer that differs: whether rounding explains it."""


class Compare(_Facts):
    """`compare`."""

    identical: bool
    exactness: Promise
    drafters: list[ComparedLine]
    left_out: dict[str, str]


class Demo(_Facts):
    """`demo`."""

    identical: bool
    differing: int
    ties: int
    speedup: float
    cr: float
    tokens_per_second: float
    baseline_tokens_per_second: float
    decode_speedup: float
    speedup_without_repetitions: float | None
    cr_without_repetitions: float | None
    prompts: int
    prompts_without_repetitions: int
    tokens: int
    temperature: float
    exactness: Promise
    dtype: str
    threads: int


class Build(_Facts):
    """`datastore build`."""

    documents: int
    tokens: int
    bytes: int
    seconds: float


class Percentiles(_Facts):
    """Of seconds."""

    p50: float
    p90: float
    p99: float


class Level(_Facts):
    """So many clients at once."""

    at_once: int
    speculation: bool
    requests: int
    tokens: int
    seconds: float
    tokens_per_second: float
    """Of all clients together."""
    time_to_first_token: Percentiles
    time_per_token: Percentiles
    """After the first."""
    whole: Percentiles


class LoadTest(_Facts):
    """`loadtest`."""

    levels: list[Level]
    identical: int
    """Texts that are the same with speculation and without."""
    compared: int


Info = dict[str, Any]
"""`info`: sizes, and costs as shares of a full step; which there are depends on the drafter."""

VERBS: dict[str, Any] = {
    "generate": Generate,
    "check": Check,
    "compare": Compare,
    "demo": Demo,
    "datastore build": Build,
    "loadtest": LoadTest,
    "info": Info,
}
