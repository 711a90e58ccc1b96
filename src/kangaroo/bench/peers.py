"""transformers' own generate as a method of a benchmark: plain, assisted by a draft model, or by prompt lookup.

What it is given is what this library is given: the same model object, prompts, ends and barred tokens, greedily. Its
other settings keep transformers' defaults. It does not tell prefill, drafting and verifying apart: all its time is
`rest`. How many tokens each of its rounds emitted is seen by a streamer.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from kangaroo.bench.methods import finish_reason, forget_peak, peak_bytes
from kangaroo.bench.records import Measured
from kangaroo.decoder import Decoder
from kangaroo.drafters.draft_model import check_vocabulary
from kangaroo.drafters.settings import configure
from kangaroo.errors import ConfigError
from kangaroo.loading import load_model
from kangaroo.machine import synchronise
from kangaroo.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConfig:
    """What assists transformers' generate, if anything does. Names are transformers', but for the first."""

    draft_model: str | None = None
    """A folder or hub name, or "demo" for what ships with the demo model."""
    num_assistant_tokens: int | None = None
    assistant_confidence_threshold: float | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None

    def __post_init__(self) -> None:
        if self.draft_model is not None and self.prompt_lookup_num_tokens is not None:
            raise ConfigError("transformers takes draft_model or prompt_lookup_num_tokens, not both")
        for needed, names in (
            ("draft_model", ("num_assistant_tokens", "assistant_confidence_threshold")),
            ("prompt_lookup_num_tokens", ("max_matching_ngram_size",)),
        ):
            for name in names:
                if getattr(self, name) is not None and getattr(self, needed) is None:
                    raise ConfigError(f"{name} needs {needed} beside it")

    @property
    def assisted(self) -> bool:
        """Whether anything is drafted."""
        return self.draft_model is not None or self.prompt_lookup_num_tokens is not None


class Peer:
    """Answers with `model.generate`."""

    def __init__(self, decoder: Decoder, assistant: PreTrainedModel | None, config: PeerConfig):
        self._model, self._eos = decoder.target.model, decoder.eos
        self._assistant, self._config = assistant, config

    def answer(self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_tokens: int) -> list[Measured]:
        """Prompts of different lengths are padded on the left."""
        device = self._model.device
        ids, mask = _padded(prompts, self._pad, device)
        settings, rounds = self._settings(sampling, max_tokens), _Rounds()
        forget_peak(device)
        synchronise(device)
        began = time.perf_counter()
        texts = self._model.generate(
            ids, attention_mask=mask, generation_config=settings, assistant_model=self._assistant, streamer=rounds
        )
        synchronise(device)
        seconds = time.perf_counter() - began
        answers = [self._without_padding(text) for text in texts[:, ids.shape[1] :].tolist()]
        return [
            Measured(
                tokens=tokens,
                finish_reason=finish_reason(tokens, self._eos),
                prefill=0.0,
                draft=0.0,
                verify=0.0,
                rest=seconds / len(prompts),
                emitted=rounds.of(len(tokens)),
                peak_bytes=peak_bytes(device),
            )
            for tokens in answers
        ]

    def _settings(self, sampling: Sampling, max_tokens: int) -> GenerationConfig:
        assert sampling.temperature == 0, "a recipe with peers is greedy"
        lookup = _given(self._config, "prompt_lookup_num_tokens", "max_matching_ngram_size")
        return GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # said, so that the model's own defaults do not take its place
            no_repeat_ngram_size=0,
            eos_token_id=list(self._eos) or None,
            pad_token_id=self._pad,
            suppress_tokens=[token for token, bias in sampling.logit_bias.items() if bias == -torch.inf] or None,
            **lookup,
        )

    @property
    def _pad(self) -> int:
        return self._eos[0] if self._eos else 0

    def _without_padding(self, tokens: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(tokens) if token in self._eos]
        return tokens[: ends[0] + 1] if ends else tokens


class _Rounds:
    """A streamer that counts: transformers hands it the prompts, then what every round added to the rows."""

    def __init__(self) -> None:
        self._emitted: list[int] = []
        self._prompt_seen = False

    def put(self, tokens: Tensor) -> None:
        if self._prompt_seen:
            # Several rows get a token each; one row that is assisted gets several.
            self._emitted.append(tokens.shape[-1] if tokens.dim() == 2 else 1)
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""

    def of(self, tokens: int) -> list[int]:
        """Rounds of a row that ended after so many tokens; the other rows may have gone on."""
        counts: list[int] = []
        while sum(counts) < tokens:
            counts.append(min(self._emitted[len(counts)], tokens - sum(counts)))
        return counts


def _padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [B, N], of prompts that end together."""
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _given(config: PeerConfig, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}


def make_peer(decoder: Decoder, settings: Mapping[str, Any], batch: int) -> Peer:
    """The peer that a recipe's settings describe, on a decoder's model.

    Raises ConfigError for settings that transformers has not, ModelError for a draft model that cannot be loaded.
    """
    config = configure(PeerConfig, settings)
    if config.assisted and batch > 1:
        raise ConfigError(f"transformers assists one prompt at a time, got batch = {batch}; leave the method out")
    if config.draft_model is None:
        return Peer(decoder, None, config)
    name = str(decoder.files.get("draft_model", "")) if config.draft_model == "demo" else config.draft_model
    if not name:
        raise ConfigError('draft_model = "demo": no draft model came with this model; give a folder or hub name')
    assistant = load_model(name, decoder.target.dtype).to(decoder.target.device)
    size = assistant.config.get_text_config().vocab_size
    check_vocabulary(name, size, decoder.target, decoder.tokenizer.wrapped)
    # transformers reads these from the assistant's own settings.
    assistant.generation_config.update(**_given(config, "num_assistant_tokens", "assistant_confidence_threshold"))
    return Peer(decoder, assistant, config)
