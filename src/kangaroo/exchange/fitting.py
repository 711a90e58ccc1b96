"""Calibrating what others trained: on text that the target writes, how often a draft of some confidence is right."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from kangaroo.decode import collect, decode, start
from kangaroo.decoder import Decoder
from kangaroo.documents import Document, prompts
from kangaroo.drafters.chain import top_probability
from kangaroo.drafters.kangaroo.adapter import Adapter
from kangaroo.drafters.kangaroo.calibration import Calibration, calibrate
from kangaroo.drafters.none import NoDrafter
from kangaroo.errors import DataError
from kangaroo.sampling import Sampling
from kangaroo.state import Request
from kangaroo.tree import sequence

PROMPTS, TOKENS, BATCH = 64, 64, 8
"""How many answers are written at most, how long each may be, and how many at once."""


@torch.inference_mode()
def fit_calibration(
    decoder: Decoder,
    documents: Sequence[Document],
    exit_layer: int,
    adapter: Adapter | None = None,
    advance: Callable[[int, int], object] = lambda done, total: None,
) -> Calibration:
    """The calibration of a chain drafted from `exit_layer` on the target's greedy answers to prompts from documents.

    Without an adapter it is that of early exit. Draft inputs are exact, so that one pass over an answer tells every
    token that could be drafted. `advance` is called with answers done and answers in all.

    Raises DataError if no prompt leaves room for an answer.
    """
    target = decoder.target
    found = prompts(documents, decoder.tokenizer.wrapped, seed=0)
    asked = list(islice((p for p in found if p and len(p) + TOKENS <= target.context), PROMPTS))
    if not asked:
        raise DataError(
            f"no document has a prompt that leaves {TOKENS} tokens of the target's {target.context} for an answer"
        )
    judged: list[tuple[bool, float]] = []
    for begin in range(0, len(asked), BATCH):
        some, drafter = asked[begin : begin + BATCH], NoDrafter()
        state = start(target, drafter, [Request(p, Sampling(), TOKENS) for p in some], eos=decoder.eos)
        answers = collect(decode(target, drafter, state), len(some))
        for prompt, answer in zip(some, answers, strict=True):
            judged += _judge(decoder, prompt, answer, exit_layer, adapter)
        advance(begin + len(some), len(asked))
    return calibrate([confidence for _, confidence in judged], [right for right, _ in judged])


def _judge(
    decoder: Decoder, prompt: Sequence[int], answer: Sequence[int], exit_layer: int, adapter: Adapter | None
) -> Iterator[tuple[bool, float]]:
    """Per token of the answer: would it be drafted right, and how sure would the draft model be?"""
    target, text = decoder.target, [*prompt, *answer]
    where = sequence(1, len(text) - 1, target.device)
    tokens = torch.tensor([text], device=target.device)
    x, _ = target.run(target.embed(tokens[:, :-1]), where, None, stop=exit_layer)
    y: Tensor = target.norm(x) if adapter is None else adapter(x, where)
    y = y[:, len(prompt) - 1 :]
    logits = target.logits(y) if adapter is None else adapter.logits(y)
    right = logits.argmax(-1) == tokens[:, len(prompt) :]
    return zip(right[0].tolist(), top_probability(logits)[0].tolist(), strict=True)
