"""A drop-in for transformers: `model.generate(**inputs, custom_generate=kangaroo.custom_generate(adapter=...))`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import generation

from kangaroo.decode import Round, collect, decode, start
from kangaroo.drafters import DrafterChoice, MakeDrafter, choose_drafter
from kangaroo.errors import ConfigError
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import Request

# What transformers makes of the settings that are covered here; any other processor would be ignored silently.
_COVERED = {
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "RepetitionPenaltyLogitsProcessor",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "MaxLengthCriteria",
    "EosTokenCriteria",
}
_UNSUPPORTED_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_KEPT = "_kangaroo_prepared"


class Streamer(Protocol):
    """What transformers' TextStreamer and TextIteratorStreamer are."""

    def put(self, value: Tensor) -> None:
        """Take the prompt [1, N], then tokens [1] as they come."""
        ...

    def end(self) -> None:
        """There are no more."""
        ...


class _Prepared:
    """What has been made of a model, kept by the model itself: it lives as long as the model does and no longer."""

    def __init__(self) -> None:
        self.by_function: WeakKeyDictionary[Callable[..., Any], tuple[Target, MakeDrafter]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type["_Prepared"], tuple[()]]:
        return _Prepared, ()  # copies of the model, and models read from disk, begin anew


def custom_generate(
    *,
    drafter: DrafterChoice = "kangaroo",
    tokenizer: Any = None,
    seed: int | None = None,
    streamer: Streamer | None = None,
    **settings: Any,
) -> Callable[..., Any]:
    """A function for `custom_generate=`, which decodes as the GenerationConfig says, token for token the same.

    `settings` are the drafter's, where its files lie among them; `tokenizer` is for drafters that read text.
    Sampling draws its noise from `seed`, or from torch's global generator if None, so torch.manual_seed works.
    A `streamer` belongs here: transformers drops the one that `model.generate` is given together with a
    `custom_generate`. It takes one prompt at a time.

    Returns what `model.generate` returns: token ids, or with `return_dict_in_generate` an output with `sequences`.
    Processors, stopping criteria and outputs that have no equivalent here raise ConfigError.
    """
    choice = choose_drafter(drafter, settings)

    def generate(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        with _ended(streamer):
            _refuse_uncovered([*logits_processor, *stopping_criteria], generation_config)
            if streamer is not None and len(input_ids) > 1:
                raise ConfigError(f"a streamer takes one prompt at a time, got {len(input_ids)}; leave it out")
            prepared = model.__dict__.setdefault(_KEPT, _Prepared()).by_function
            if generate not in prepared:
                target = Target(model)
                prepared[generate] = target, choice.build(target, tokenizer, choice.settings)
            requests = _requests(input_ids, model_kwargs.get("attention_mask"), generation_config, seed)
            target, make_drafter = prepared[generate]
            rounds = _rounds(target, make_drafter, requests, _ends(generation_config))
            texts = collect(rounds if streamer is None else _streamed(rounds, streamer, input_ids), len(requests))
        sequences = _joined(input_ids, texts, generation_config.pad_token_id)
        if generation_config.return_dict_in_generate:
            return generation.GenerateDecoderOnlyOutput(sequences=sequences)
        return sequences

    return generate


@contextmanager
def _ended(streamer: Streamer | None) -> Iterator[None]:
    try:
        yield
    finally:  # after an error too, or whoever reads from it would wait for ever
        if streamer is not None:
            streamer.end()


def _requests(input_ids: Tensor, mask: Tensor | None, config: Any, seed: int | None) -> list[Request]:
    kept = torch.ones_like(input_ids) if mask is None else mask
    width = input_ids.shape[1]  # transformers' lengths count padding
    room = config.max_length - width
    least = min(max(0, (config.min_length or 0) - width, config.min_new_tokens or 0), room)
    return [
        Request(row[keep.bool()].tolist(), sampling, room, min_tokens=least)
        for row, keep, sampling in zip(input_ids, kept, _samplings(config, len(input_ids), seed), strict=True)
    ]


def _ends(config: Any) -> list[int]:
    eos = config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _rounds(target: Target, make_drafter: MakeDrafter, requests: list[Request], eos: list[int]) -> Iterator[Round]:
    engine = make_drafter()
    return decode(target, engine, start(target, engine, requests, eos=eos))


def _streamed(rounds: Iterator[Round], streamer: Streamer, input_ids: Tensor) -> Iterator[Round]:
    streamer.put(input_ids.cpu())
    for done in rounds:
        for token in done.emitted[0]:
            streamer.put(torch.tensor([token]))
        yield done


def _refuse_uncovered(processors: list[Any], config: Any) -> None:
    for processor in processors:
        if type(processor).__name__ not in _COVERED:
            raise ConfigError(f"{type(processor).__name__} has no equivalent in lossless drafting here; remove it")
    if (config.num_beams or 1) > 1:
        raise ConfigError(f"beam search is not supported, got num_beams={config.num_beams}")
    for name in _UNSUPPORTED_OUTPUTS:
        if config.return_dict_in_generate and getattr(config, name, False):
            raise ConfigError(f"{name} is not supported; leave it out")


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
