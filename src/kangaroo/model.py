"""The target: a loaded Hugging Face causal LM that can be run one span of layers at a time.

The only file that touches transformers' internals. It drives the model's own decoder layers, rotary embedding, norm and
head; a start-up check compares its logits with the model's own forward pass, so that a family whose layers need more
than this is refused instead of decoded wrongly.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kangaroo.attention import OWN, make_steady
from kangaroo.cache import KVCache, LayerShape, round_up
from kangaroo.errors import CapacityError, ConfigError, ModelError
from kangaroo.families import (
    FAMILIES,
    FULL,
    LIKE_LLAMA,
    ROTARY_IN_SLIDING_LAYERS_ONLY,
    SLIDING,
    context_limit,
    layer_kinds,
)
from kangaroo.fingerprint import fingerprint, is_readable
from kangaroo.fused import in_fewer_calls
from kangaroo.linears import count_weights
from kangaroo.machine import available_bytes, human_bytes
from kangaroo.norms import with_fused_norms
from kangaroo.passes import Attention, Pass, computing
from kangaroo.rotary import RotaryTables
from kangaroo.settle import settle
from kangaroo.tree import Placement, place_chain, sequence
from kangaroo.trial import Exactness
from kangaroo.window import CacheWindow, Recorder

TRIAL = 8  # tokens of the check at load time
PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Target:
    """A causal LM as embedding, layers, norm and head.

    Raises ModelError if the model cannot be run exactly: an unsupported family, an attention implementation that
    ignores masks, NaN weights, or logits that differ from the model's own.
    """

    def __init__(self, model: PreTrainedModel, *, exact: bool = True, pack: bool = False):
        """`exact` has every pass give a token the same bits, where this machine can; without it, whatever is fastest.

        `pack` lets the model's linears be replaced by packed ones that keep no plain copy: for models nobody else uses.
        """
        self.model, self.config = model.eval(), model.config.get_text_config()
        self._refuse_what_cannot_work()
        if getattr(self.config, "attn_logit_softcapping", None) and self.config._attn_implementation == "sdpa":
            model.set_attn_implementation("eager")  # older transformers chose the other, which leaves the soft-cap out
        base = model.base_model
        self.layers: nn.ModuleList = base.layers
        self._run_as: list[Any] = [with_fused_norms(layer) for layer in self.layers]
        self._norm = base.norm if hasattr(base, "norm") else base.final_layernorm
        self._embedding, self._head = model.get_input_embeddings(), model.lm_head
        self.num_layers, self.width = len(self.layers), int(self.config.hidden_size)
        self.vocab_size = int(self._head.weight.shape[0])
        self.device, self.dtype = self._embedding.weight.device, model.dtype
        self.context, self._kinds = context_limit(self.config), layer_kinds(self.config, self.num_layers)
        self._window = int(getattr(self.config, "sliding_window", None) or 0)
        self._embedding_scale: float = 1.0
        self._rotary = RotaryTables(base.rotary_emb, self.width, self.context, self.device)
        self._way: Attention | None = None
        self._check()
        self.fingerprint, self.parameters = self._fingerprint(), count_weights(model)
        """What tells this target from others, equal in whatever precision it was loaded; how many weights it has."""
        self._threads = torch.get_num_threads()
        self._exactness = settle(self, exact=exact, pack=pack)

    def compute_by(self, way: Attention | None) -> None:
        """Have passes with a cache take their attention this way; None leaves it to the model."""
        self._way, self._head = way, self.model.lm_head
        for layer in self.layers if way is not None else ():
            make_steady(layer.self_attn)
        self._run_as = [with_fused_norms(layer) for layer in self.layers]
        if way is not None and self.config.model_type in LIKE_LLAMA:
            for index, layer in enumerate(self._run_as):
                self._run_as[index] = in_fewer_calls(layer, partial(self._tried, index))

    @torch.inference_mode()
    def _tried(self, index: int, layer: Any) -> list[Tensor]:
        """What a layer makes of some states if it is run as the index-th, and what it stores."""
        random = torch.Generator().manual_seed(index)
        x = torch.randn(1, TRIAL, self.width, generator=random).to(self.device, self.dtype)
        cache, self._run_as[index] = self.new_cache(1, TRIAL + 1), layer
        where = place_chain(torch.tensor([1], device=self.device), TRIAL, TRIAL + 1, 1)
        done, _ = self.run(x, where, cache, start=index, stop=index + 1)
        return [done, *cache.visible(TRIAL + 1)[index]]

    @property
    def exactness(self) -> Exactness:
        """What is promised of this target's texts, and why."""
        threads = torch.get_num_threads()
        if self._exactness.level == "bitwise" and threads != self._threads and self.device.type == "cpu":
            return Exactness("ties", f"tried with {self._threads} threads, but there are {threads} now")
        return self._exactness

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [B, N] -> the residual stream before the first layer, [B, N, D]."""
        x: Tensor = self._embedding(tokens)
        return x if self._embedding_scale == 1.0 else x * self._embedding_scale

    def run(
        self,
        x: Tensor,
        where: Placement,
        cache: KVCache | None,
        *,
        start: int = 0,
        stop: int | None = None,
        taps: Sequence[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run layers [start, stop) on x [B, N, D], writing K/V at `where.slots`.

        `taps` are layer counts; the second result holds the states [B, N, D] after that many layers. Without a cache
        the nodes attend to one another only, as in training.
        """
        stop = self.num_layers if stop is None else stop
        features = {start: x} if start in taps else {}
        way = None if cache is None else self._way
        past = None if cache is None else CacheWindow(cache, where, range(start, stop), _extent(where, way))
        inputs = {kind: self._layer_inputs(kind, where, x, way) for kind in set(self._kinds[start:stop])}
        with self._computing(where, way):
            for index in range(start, stop):
                kind = self._kinds[index]
                x = self._run_as[index](x, past_key_values=past, use_cache=past is not None, **inputs[kind])
                if index + 1 in taps:
                    features[index + 1] = x.to(self.device)
        return x.to(self.device), features

    @contextmanager
    def _computing(self, where: Placement, way: Attention | None) -> Iterator[None]:
        if way is None:
            yield
            return
        assert where.start is not None or not where.prompt, "prompts stand at the same positions in all rows"
        one = Pass(way, where.start if where.prompt else None, self._paths(where, way))
        with computing(one):
            yield

    def _paths(self, where: Placement, way: Attention) -> Tensor | None:
        if not where.branches:
            return None
        if "paths" not in where.derived:
            where.derived["paths"] = (where.paths(_extent(where, way)),)
        return where.derived["paths"][0]

    def prepare(self, where: Placement) -> Placement:
        """The same placement with masks and rotary embeddings made, for callers that run it slice by slice."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        for kind in set(self._kinds):
            self._layer_inputs(kind, where, like, self._way)
        if self._way is not None:
            self._paths(where, self._way)
        return where

    def norm(self, x: Tensor) -> Tensor:
        """The final norm."""
        return self._norm(x).to(self.device)  # type: ignore[no-any-return]

    def logits(self, x: Tensor) -> Tensor:
        """The head alone, its scaling and soft-cap included: normed states [B, N, D] -> [B, N, V]."""
        with computing(None if self._way is None else Pass(self._way)):
            return self.scale_logits(self._head(x)).to(self.device)

    def scale_logits(self, logits: Tensor) -> Tensor:
        """What the family does to the output of the head's matrix."""
        if divisor := getattr(self.config, "logits_scaling", None):
            logits = logits / divisor
        if (factor := getattr(self.config, "logit_scale", None)) is not None:
            logits = logits * factor
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    def attend(self, attention: nn.Module, x: Tensor, where: Placement, cache: KVCache | None) -> Tensor:
        """Run an attention module made by `new_attention` on normed states x [B, N, D]."""
        own = cast(int, attention.layer_idx)
        # Of a tree, the target's masks are in the order of paths; else they will do.
        way = None if cache is None or where.branches else self._way
        past = None if cache is None else CacheWindow(cache, where, range(own, own + 1), _extent(where, way))
        inputs = self._layer_inputs(self.adapter_kind, where, x, way)
        with self._computing(where, way):
            return attention(x, past_key_values=past, **inputs)[0]  # type: ignore[no-any-return]

    def new_attention(self, place: int = 0) -> nn.Module:
        """An untrained attention module of the family's own class that stores K/V as one more layer of the cache.

        `place` counts such layers, from 0, behind the target's own.
        """
        config, added = copy.deepcopy(self.config), place + 1
        config.num_hidden_layers = self.num_layers + added
        if getattr(config, "layer_types", None):
            config.layer_types = [*config.layer_types[: self.num_layers], *[self.adapter_kind] * added]
        for rope_switch in ("no_rope_layers", "no_rope_layer_interval"):
            if isinstance(getattr(config, rope_switch, None), list):
                setattr(config, rope_switch, [*getattr(config, rope_switch)[: self.num_layers], *[1] * added])
        family: Any = type(self.layers[0].self_attn)
        made = family(config, layer_idx=self.num_layers + place)
        make_steady(made)
        return cast(nn.Module, made)

    def new_norm(self) -> nn.Module:
        """A copy of the final norm."""
        return cast(nn.Module, copy.deepcopy(self._norm))

    @property
    def head(self) -> nn.Module:
        """The LM head's matrix."""
        return cast(nn.Module, self._head)

    @property
    def adapter_kind(self) -> str:
        """The attention type of layers made by `new_attention`."""
        if self.config.model_type in ROTARY_IN_SLIDING_LAYERS_ONLY and SLIDING in self._kinds:
            return SLIDING
        return FULL if FULL in self._kinds else self._kinds[0]

    def storage_shape(self, attention: nn.Module) -> LayerShape:
        """What a module made by `new_attention` stores per slot."""
        recorder, like = Recorder(), next(attention.parameters(), None)  # none if it is packed
        dtype, device = (self.dtype, self.device) if like is None else (like.dtype, like.device)
        x = torch.zeros(1, 1, self.width, dtype=dtype, device=device)
        where = sequence(1, 1, device)
        with torch.no_grad():
            attention(x, past_key_values=recorder, **self._layer_inputs(self.adapter_kind, where, x))
        (shape,) = recorder.shapes.values()
        return shape

    def new_cache(self, batch: int, slots: int, extra: Sequence[LayerShape] = ()) -> KVCache:
        """Storage for `batch` rows of `slots` tokens, with `extra` layers for a drafter behind the target's own.

        Raises CapacityError, before anything is allocated, if it cannot fit.
        """
        shapes, block = [*self.shapes, *extra], 1 if self._way is None else self._way.block
        for device in {shape.device for shape in shapes}:
            needed = sum(s.bytes_per_slot for s in shapes if s.device == device) * batch * round_up(slots, block)
            free = available_bytes(device)
            if needed > free:
                raise CapacityError(
                    f"the KV cache of {batch} rows of {slots} tokens needs {human_bytes(needed)} on {device}, where "
                    f"{human_bytes(free)} are free; use a smaller batch, shorter prompts or fewer max_tokens"
                )
        return KVCache(shapes, batch, slots, block)

    def _fingerprint(self) -> str:
        config = self.config
        structure = [config.model_type, self.width, self.num_layers, self.vocab_size, self._kinds, self._window]
        plain = [self._embedding.weight, *self._norm.parameters()]
        return fingerprint(structure, plain, self.model.parameters())

    @property
    def hides_weights(self) -> bool:
        """Whether some weights cannot be read as they were trained: quantised, or offloaded to disk."""
        quantised = getattr(self.config, "quantization_config", None) is not None
        return quantised or any(
            parameter.is_floating_point() and not is_readable(parameter) for parameter in self.model.parameters()
        )

    def _layer_inputs(self, kind: str, where: Placement, x: Tensor, way: Attention | None = None) -> dict[str, Any]:
        key = (kind, x.dtype, way)
        if key not in where.derived:
            extent = where.mask.shape[-1]
            rotary = self._rotary.rows(kind, where.positions, extent, x.dtype)
            where.derived[key] = (self._attention_mask(kind, where, x.dtype, way), *rotary)
        blocked, cos, sin = where.derived[key]
        return {"attention_mask": blocked, "position_ids": where.positions, "position_embeddings": (cos, sin)}

    def _attention_mask(self, kind: str, where: Placement, dtype: torch.dtype, way: Attention | None) -> Tensor:
        """The additive attention mask [B, 1, N, S]."""
        visible, positions, slots = where.mask, where.positions[..., None], where.slot_positions[:, None]
        if way is not None and where.branches:  # every node finds its own path in order
            slots = torch.arange(visible.shape[-1], device=visible.device)
            visible = slots <= positions
        if kind == SLIDING:
            visible = visible & (slots > positions - self._window)
        shape, hidden = (*visible.shape[:2], _extent(where, way)), torch.finfo(dtype).min
        blocked = torch.full(shape, hidden, dtype=dtype, device=visible.device)
        blocked[..., : visible.shape[-1]].masked_fill_(visible, 0.0)
        return blocked[:, None]

    def _refuse_what_cannot_work(self) -> None:
        implementation = self.config._attn_implementation
        if implementation not in OWN:
            raise ModelError(
                f"attention implementation {implementation!r} cannot take tree masks; load the model with "
                'attn_implementation="sdpa" (or "eager")'
            )
        base = self.model.base_model
        parts = hasattr(base, "layers") and hasattr(base, "rotary_emb") and hasattr(self.model, "lm_head")
        if not parts or not (hasattr(base, "norm") or hasattr(base, "final_layernorm")):
            raise ModelError(
                f"{self.config.model_type} models are not supported: their decoder is not a plain stack of layers with "
                f"a rotary embedding. Supported families: {', '.join(sorted(FAMILIES))}"
            )

    @torch.no_grad()
    def _check(self) -> None:
        """Compare with the model's own forward pass on a few tokens, shallow layers ahead of the deep ones."""
        family = self.config.model_type
        for name, parameter in self.model.named_parameters():
            readable = is_readable(parameter) and parameter.dtype in PLAIN_DTYPES
            if readable and not parameter.sum(dtype=torch.float32).isfinite():
                raise ModelError(f"{name} holds values that are not finite; the checkpoint is damaged")
        config, window = self.model.base_model.config, self._window
        if window:  # so short that the trial looks past it, whatever its real length
            config.sliding_window = self._window = TRIAL // 2
        try:
            error = self._trial_error()
        except (AttributeError, IndexError, KeyError, TypeError) as missing:
            raise ModelError(f"{family} models are not supported: their layers need more ({missing!r})") from missing
        finally:
            if window:
                config.sliding_window = self._window = window
        limit = 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.05
        if error > limit:
            known = "a listed family, so please report this" if family in FAMILIES else "not on the list of families"
            raise ModelError(
                f"{family} models are not supported: driven layer by layer, the logits differ from the model's own by "
                f"{error:.2g} (limit {limit:g}); it is {known}"
            )

    def _trial_error(self) -> float:
        tokens = (torch.arange(TRIAL, device=self.device) * 7919 + 13)[None] % self.vocab_size
        wanted, first_input = self._own_forward(tokens)
        if not torch.isfinite(wanted).all():
            raise ModelError("the model's logits are not finite; its weights are too large for its precision")
        self._embedding_scale = self._find_embedding_scale(tokens, first_input)
        self.shapes = self._record_shapes(tokens)
        got = self._check_logits(tokens)
        return float((got - wanted).abs().mean() / wanted.abs().mean().clamp_min(1e-9))

    def _own_forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        inputs: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append(args[0] if args else kwargs["hidden_states"])

        hook = self.layers[0].register_forward_pre_hook(note, with_kwargs=True)
        try:
            logits = self.model(tokens, use_cache=False).logits
        finally:
            hook.remove()
        return logits, inputs[0]

    def _find_embedding_scale(self, tokens: Tensor, first_input: Tensor) -> float:
        # Granite scales by a setting; Gemma by sqrt(D), in the embedding module or after it depending on the release.
        plain = self._embedding(tokens)
        root = torch.tensor(self.width**0.5, dtype=plain.dtype)
        for scale in (1.0, getattr(self.config, "embedding_multiplier", None), float(root)):
            if scale is not None and torch.allclose(plain * scale, first_input, rtol=1e-2, atol=1e-6):
                return float(scale)
        raise ModelError(f"{self.config.model_type} models are not supported: their embedding is not scaled uniformly")

    def _record_shapes(self, tokens: Tensor) -> list[LayerShape]:
        recorder, where = Recorder(), sequence(1, tokens.shape[1], self.device)
        x = self.embed(tokens)
        for index in range(self.num_layers):
            inputs = self._layer_inputs(self._kinds[index], where, x)
            x = self.layers[index](x, past_key_values=recorder, use_cache=True, **inputs)
        if len(recorder.shapes) != self.num_layers:
            raise ModelError(
                f"{self.config.model_type} models are not supported: not every layer stores keys and values"
            )
        return [recorder.shapes[index] for index in range(self.num_layers)]

    def _check_logits(self, tokens: Tensor) -> Tensor:
        length, half = tokens.shape[1], self.num_layers // 2
        cache = KVCache(self.shapes, 1, length)
        ahead = []
        for i in range(length):
            where = place_chain(torch.tensor([i], device=self.device), 1, length)
            ahead.append(self.run(self.embed(tokens[:, i : i + 1]), where, cache, stop=half)[0])
        where = sequence(1, length, self.device)
        x, _ = self.run(torch.cat(ahead, 1), where, cache, start=half)
        return self.logits(self.norm(x))


def _extent(where: Placement, way: Attention | None) -> int:
    """How many slots a pass looks at."""
    return round_up(where.mask.shape[-1], 1 if way is None else way.block)


def check_exit_layer(exit_layer: int, target: Target) -> None:
    """Raise ConfigError unless some layers lie before and some after the exit."""
    layers = target.num_layers
    if not 0 <= exit_layer < layers:
        raise ConfigError(f"exit layer must be in 0..{layers - 1} for a target of {layers} layers, got {exit_layer}")
