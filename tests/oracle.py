"""The reference that every drafter is held to: no cache, no batch, no draft, transformers' own logits processors.

For each token the model's own forward pass reads the whole text so far. Only the noise is the library's, because which
noise is drawn is a convention; that it is good noise is tested elsewhere.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kangaroo.sampling import Sampler, Sampling, Stream, gumbel

EVERYTHING = Sampling(
    temperature=0.8,
    top_k=40,
    top_p=0.97,
    min_p=0.01,
    repetition_penalty=1.15,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias={5: 1.0, 11: -2.0},
    seed=17,
    index=2,
)
GREEDY = Sampling()
GREEDY_PENALISED = Sampling(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, logit_bias={7: 0.5})


Rule = Callable[[Sequence[int], Sequence[int], Tensor], Tensor]
"""(prompt, output, scores [V]) -> scores: what else changes them, between penalties and temperature."""


def reference_scores(
    logits: Tensor, prompt: Sequence[int], output: Sequence[int], sampling: Sampling, rule: Rule | None = None
) -> Tensor:
    """Processed logits [V] of the token after prompt + output."""
    scores = logits.clone()
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    ids = torch.tensor([[*prompt, *output]])
    scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores[None])[0]
    for token, count in Counter(output).items():
        scores[token] -= sampling.presence_penalty + count * sampling.frequency_penalty
    if rule is not None:
        scores = rule(prompt, output, scores)
    if sampling.temperature == 0:
        return scores
    chain = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k is not None:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        chain.append(MinPLogitsWarper(sampling.min_p))
    return chain(ids, scores[None])[0]


_texts: dict[tuple[object, ...], list[int]] = {}


def oracle(
    model: PreTrainedModel,
    prompt: Sequence[int],
    sampling: Sampling,
    tokens: int,
    eos: Sequence[int] = (),
    rule: Rule | None = None,
) -> list[int]:
    """The continuation of a prompt: `tokens` tokens, fewer where an id of `eos` or the context ends it."""
    key = (id(model), tuple(prompt), sampling, rule)
    text = _texts.setdefault(key, [])  # without an end a longer text only continues a shorter one
    tokens = min(tokens, model.config.max_position_embeddings - len(prompt))
    while len(text) < tokens:
        text.append(_next_token(model, prompt, text, sampling, rule))
    ends = [i for i, token in enumerate(text[:tokens]) if token in eos]
    return text[: ends[0] + 1] if ends else text[:tokens]


@torch.inference_mode()
def _next_token(
    model: PreTrainedModel, prompt: Sequence[int], output: Sequence[int], sampling: Sampling, rule: Rule | None
) -> int:
    logits = model(torch.tensor([[*prompt, *output]]), use_cache=False).logits[0, -1]
    scores = reference_scores(logits, prompt, output, sampling, rule)
    if sampling.temperature > 0:
        position = torch.tensor([[len(prompt) + len(output)]])
        keys = Sampler([sampling], len(scores), torch.device("cpu")).keys(position, Stream.TARGET)
        scores = scores + gumbel(keys, len(scores))[0, 0]
    return int(scores.argmax())
