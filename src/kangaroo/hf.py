"""A drop-in for transformers: `model.generate(**inputs, custom_generate=kangaroo.custom_generate(adapter=...))`."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kangaroo.decode import collect, decode, start
from kangaroo.drafters import MakeDrafter, find_drafter
from kangaroo.errors import ConfigError
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import Request

# What transformers makes of the settings that Sampling covers; any other processor would be ignored silently.
_COVERED = {
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "RepetitionPenaltyLogitsProcessor",
    "MaxLengthCriteria",
    "EosTokenCriteria",
}


def custom_generate(
    *, drafter: str = "kangaroo", tokenizer: Any = None, seed: int | None = None, **settings: Any
) -> Callable[..., Tensor]:
    """A function for `custom_generate=`, which decodes as the GenerationConfig says, token for token the same.

    `settings` are the drafter's, where its files lie among them; `tokenizer` is for drafters that read text.
    Sampling draws its noise from `seed`, or from torch's global generator if None, so torch.manual_seed works.
    Processors and stopping criteria that have no equivalent here raise ConfigError.
    """
    entry = find_drafter(drafter)
    prepared: WeakKeyDictionary[Any, tuple[Target, MakeDrafter]] = WeakKeyDictionary()

    def generate(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        _refuse_uncovered([*logits_processor, *stopping_criteria], generation_config)
        if model not in prepared:
            target = Target(model)
            prepared[model] = target, entry.build(target, tokenizer, settings)
        target, make_drafter = prepared[model]
        mask = model_kwargs.get("attention_mask")
        kept = torch.ones_like(input_ids) if mask is None else mask
        samplings = _samplings(generation_config, len(input_ids), seed)
        room = generation_config.max_length - input_ids.shape[1]
        requests = [
            Request(row[keep.bool()].tolist(), sampling, room)
            for row, keep, sampling in zip(input_ids, kept, samplings, strict=True)
        ]
        eos = generation_config.eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        engine = make_drafter()
        state = start(target, engine, requests, eos=eos)
        texts = collect(decode(target, engine, state), len(requests))
        return _joined(input_ids, texts, generation_config.pad_token_id)

    return generate


def _refuse_uncovered(processors: list[Any], config: Any) -> None:
    for processor in processors:
        if type(processor).__name__ not in _COVERED:
            raise ConfigError(f"{type(processor).__name__} has no equivalent in lossless drafting here; remove it")
    if (config.num_beams or 1) > 1:
        raise ConfigError(f"beam search is not supported, got num_beams={config.num_beams}")
    if config.return_dict_in_generate:
        raise ConfigError("return_dict_in_generate is not supported")


def _samplings(config: Any, rows: int, seed: int | None) -> list[Sampling]:
    penalty = config.repetition_penalty or 1.0
    if not config.do_sample:
        return [Sampling(repetition_penalty=penalty)] * rows
    if seed is None:
        seed = int(torch.randint(2**62, (1,)))
    return [
        Sampling(
            repetition_penalty=penalty,
            temperature=1.0 if config.temperature is None else config.temperature,
            top_k=config.top_k or None,
            top_p=1.0 if config.top_p is None else config.top_p,
            min_p=config.min_p or 0.0,
            seed=seed,
            index=row,
        )
        for row in range(rows)
    ]


def _joined(input_ids: Tensor, texts: list[list[int]], pad: Any) -> Tensor:
    width = max(map(len, texts))
    fill = int(pad[0]) if isinstance(pad, list) else int(pad or 0)
    padded = [text + [fill] * (width - len(text)) for text in texts]
    return torch.cat([input_ids, torch.tensor(padded, device=input_ids.device)], 1)
