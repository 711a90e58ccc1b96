"""From the arguments of a call to its rows: prompts to tokens, one Sampling or many, indices for samples."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kangaroo.checks import counted, need_type, need_whole, shown
from kangaroo.constraints import Processor
from kangaroo.errors import ConfigError, DataError
from kangaroo.logprobs import Logprobs
from kangaroo.sampling import Sampling
from kangaroo.state import Request
from kangaroo.text import TextStream, Tokenizer

Samplings = Sampling | Sequence[Sampling] | None
Processors = Processor | Sequence[Processor | None] | None
MOST_ANSWERS = 1 << 16
"""To one prompt in one call, more than memory has rows for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """How the prompts of a call are to be answered: its arguments. Raises ConfigError for what they cannot be."""

    sampling: Samplings = None
    """One for all prompts, or one for each; None is greedy."""
    n: int = 1
    """Answers to every prompt."""
    max_tokens: int = 256
    min_tokens: int = 0
    """Tokens before anything may end an answer."""
    stop: str | Sequence[str] = ()
    """A string to stop before, or several."""
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: Logprobs | int | None = None
    """A number of candidates is short for Logprobs of so many."""
    processor: Processors = None
    """One for all prompts, or one for each."""
    speculate: bool = True
    """Whether anything may be drafted."""
    max_draft: int | None = None
    """Tokens to draft at once, if fewer than the drafter would."""

    def __post_init__(self) -> None:
        if not 1 <= need_whole("n", self.n) <= MOST_ANSWERS:
            raise ConfigError(f"n is a number of answers to each prompt, in 1..{MOST_ANSWERS}, got {self.n}")
        for name in ("max_tokens", "min_tokens"):
            need_whole(name, getattr(self, name), largest=2**63 - 1)
        need_type("ignore_eos", self.ignore_eos, bool)
        need_type("speculate", self.speculate, bool)
        if self.max_draft is not None and need_whole("max_draft", self.max_draft, largest=2**63 - 1) < 1:
            raise ConfigError(f"max_draft must be at least 1, got {self.max_draft}; to draft nothing, do not speculate")
        if not _are_ids(self.stop_token_ids):
            raise ConfigError(f"stop_token_ids is a list of token ids, got {shown(self.stop_token_ids)}")
        if not isinstance(self.logprobs, Logprobs | int | None):
            raise ConfigError(f"logprobs is a number of candidates, or Logprobs, got {shown(self.logprobs)}")

    def requests(self, prompts: Sequence[Sequence[int]]) -> list[Request]:
        """The rows of these prompts: prompt by prompt, the answers to each beside one another."""
        sampling = Sampling() if self.sampling is None else self.sampling
        samplings = _for_each(sampling, _is_sampling, "sampling", len(prompts))
        processors = _for_each(self.processor, _is_processor, "processor", len(prompts))
        # Processors may not be hashable, and two are the same only if they are one.
        texts = [(tuple(prompt), id(processor)) for prompt, processor in zip(prompts, processors, strict=True)]
        groups = spread(texts, samplings, self.n)
        logprobs = Logprobs(self.logprobs) if isinstance(self.logprobs, int) else self.logprobs
        return [
            Request(
                prompt,
                sampling,
                self.max_tokens,
                min_tokens=self.min_tokens,
                stop_token_ids=tuple(self.stop_token_ids),
                ignore_eos=self.ignore_eos,
                processor=processor,
                logprobs=logprobs,
                speculate=self.speculate,
                max_draft=self.max_draft,
            )
            for prompt, processor, group in zip(prompts, processors, groups, strict=True)
            for sampling in group
        ]

    def texts(self, tokenizer: Tokenizer, rows: int) -> list[TextStream]:
        """Empty texts for so many answers."""
        return [TextStream(tokenizer, self.stop, self.min_tokens) for _ in range(rows)]


def encode_all(prompts: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of a list of prompts. Raises DataError for a single prompt outside a list, and for what is none."""
    if isinstance(prompts, str):
        raise DataError(f"prompts must be a list, got the text {shown(prompts)}; write generate([prompt])")
    try:
        listed = list(prompts)
    except TypeError:
        raise DataError(f"prompts must be a list of prompts, got {shown(prompts)}") from None
    single = {dict: "a conversation", int: "a list of token ids"}.get(type(listed[0])) if listed else None
    if single is not None or getattr(prompts, "ndim", 2) == 1:
        raise DataError(f"prompts must be a list of prompts, got {single or 'token ids'}; write generate([prompt])")
    return [tokenizer.encode(prompt) for prompt in listed]


def _are_ids(given: Any) -> bool:
    return isinstance(given, Sequence) and all(type(token) is int for token in given)


def _is_sampling(given: object) -> bool:
    return isinstance(given, Sampling)


def _is_processor(given: object) -> bool:
    return given is None or callable(given)


def _for_each(given: Any, fits: Callable[[object], bool], name: str, prompts: int) -> list[Any]:
    if fits(given):
        return [given] * prompts
    if not isinstance(given, Sequence) or not all(fits(each) for each in given):
        raise ConfigError(f"{name} must be one for all prompts or a list of one for each, got {shown(given)}")
    if len(given) != prompts:
        raise ConfigError(f"{name} has {len(given)} entries for {counted(prompts, 'prompt')}; give one, or as many")
    return list(given)


def spread(asked: Sequence[Hashable], samplings: Sequence[Sampling], n: int) -> list[list[Sampling]]:
    """n Samplings for each of what is asked: the one given and its successors by index.

    A text is a function of what is asked and its Sampling, so a pair that occurs again in one call takes the next
    indices that the call has not used for it; pairs that differ get what they would get alone.
    """
    found, used, nexts = list[list[Sampling]](), dict[Hashable, set[int]](), dict[Hashable, int]()
    pairs = [((what, replace(sampling, index=0)), sampling) for what, sampling in zip(asked, samplings, strict=True)]
    for key, sampling in pairs:
        used.setdefault(key, set()).update(range(sampling.index, sampling.index + n))
    for key, sampling in pairs:
        first = nexts.get((key, sampling.index), sampling.index)
        if (key, sampling.index) in nexts:
            while not used[key].isdisjoint(range(first, first + n)):
                first += 1
            used[key].update(range(first, first + n))
        nexts[key, sampling.index] = first + n
        found.append([replace(sampling, index=index) for index in range(first, first + n)])
    return found
