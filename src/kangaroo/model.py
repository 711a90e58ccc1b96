"""The target: a loaded Hugging Face causal LM that can be run one span of layers at a time.

The only file that touches transformers' internals. It drives the model's own decoder layers, rotary embedding, norm and
head; a start-up check compares its logits with the model's own forward pass, so that a family whose layers need more
than this is refused instead of decoded wrongly.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from kangaroo.cache import KVCache, LayerShape, Views
from kangaroo.errors import CapacityError, ConfigError, ModelError
from kangaroo.fingerprint import fingerprint
from kangaroo.machine import available_bytes, human_bytes
from kangaroo.norms import with_fused_norms
from kangaroo.tree import Placement, place_chain, sequence

# Families whose layers are driven exactly by one loop (embedding, layers, final norm, head). Others must prove it.
FAMILIES = frozenset(
    """
    llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 olmo olmo2 olmo3 smollm3 granite
    starcoder2 cohere cohere2 stablelm helium glm glm4 nemotron exaone4 ministral seed_oss apertus arcee
    ernie4_5 mixtral qwen2_moe qwen3_moe gpt_oss deepseek_v3
    """.split()  # noqa: SIM905 (a list of 33 would take 33 lines)
)
FULL, SLIDING = "full_attention", "sliding_attention"
# Families without layer types that look through `sliding_window` in every layer.
WINDOWED_THROUGHOUT = frozenset({"mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2"})
TRIAL = 8  # tokens of the check at load time
PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Families that rotate keys and queries in their sliding layers only: an adapter needs a layer that knows positions.
ROTARY_IN_SLIDING_LAYERS_ONLY = frozenset({"cohere2", "exaone4"})


class _Window(Cache):  # type: ignore[misc]
    """A placement's slots of some layers of a KVCache, presented through transformers' public cache interface."""

    def __init__(self, cache: KVCache, where: Placement, layers: range):
        super().__init__(layers=[])
        self._cache, self._where, self._extent = cache, where, where.mask.shape[-1]
        self._seen: Views | None = None
        self._new: Views | None = None
        if where.rows is None:
            self._seen = cache.visible(self._extent)
            if where.start is not None:  # then slots are written by a copy: no index, no scatter
                self._new = cache.views(layers, where.start, where.start + where.slots.shape[1])

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        if self._new is None:
            self._cache.write(layer_idx, self._where.slots, key_states, value_states, self._where.rows)
        else:
            keys, values = self._new[layer_idx]
            keys.copy_(key_states)
            values.copy_(value_states)
        if self._seen is not None:
            return self._seen[layer_idx]
        return self._cache.read(layer_idx, self._extent, self._where.rows)


class _Recorder(Cache):  # type: ignore[misc]
    """Notes what a layer would store, and stores nothing."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: dict[int, LayerShape] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        heads, key_dim, value_dim = key_states.shape[1], key_states.shape[-1], value_states.shape[-1]
        self.shapes[layer_idx] = LayerShape(heads, key_dim, value_dim, key_states.dtype, key_states.device)
        return key_states, value_states


class Target:
    """A causal LM as embedding, layers, norm and head.

    Raises ModelError if the model cannot be run exactly: an unsupported family, an attention implementation that
    ignores masks, NaN weights, or logits that differ from the model's own.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.config = model.eval(), model.config.get_text_config()
        self._refuse_what_cannot_work()
        base = model.base_model
        self.layers: nn.ModuleList = base.layers
        self._run_as = [with_fused_norms(layer) for layer in self.layers]
        self._norm = base.norm if hasattr(base, "norm") else base.final_layernorm
        self._embedding, self._head = model.get_input_embeddings(), model.lm_head
        self._rotary = base.rotary_emb
        self.num_layers, self.width = len(self.layers), int(self.config.hidden_size)
        self.vocab_size = int(self._head.weight.shape[0])
        self.device, self.dtype = self._embedding.weight.device, model.dtype
        self.context, self._kinds = context_limit(self.config), layer_kinds(self.config, self.num_layers)
        self._window = int(getattr(self.config, "sliding_window", None) or 0)
        self._embedding_scale: float = 1.0
        self._tables: dict[tuple[str, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._check()

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
        past = None if cache is None else _Window(cache, where, range(start, stop))
        inputs = {kind: self._layer_inputs(kind, where, x) for kind in set(self._kinds[start:stop])}
        for index in range(start, stop):
            x = self._run_as[index](x, past_key_values=past, use_cache=past is not None, **inputs[self._kinds[index]])
            if index + 1 in taps:
                features[index + 1] = x.to(self.device)
        return x.to(self.device), features

    def prepare(self, where: Placement) -> Placement:
        """The same placement with masks and rotary embeddings made, for callers that run it slice by slice."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        for kind in set(self._kinds):
            self._layer_inputs(kind, where, like)
        return where

    def norm(self, x: Tensor) -> Tensor:
        """The final norm."""
        return self._norm(x).to(self.device)  # type: ignore[no-any-return]

    def logits(self, x: Tensor) -> Tensor:
        """The head alone, its scaling and soft-cap included: normed states [B, N, D] -> [B, N, V]."""
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
        past = None if cache is None else _Window(cache, where, range(own, own + 1))
        return attention(x, past_key_values=past, **self._layer_inputs(self._adapter_kind, where, x))[0]  # type: ignore[no-any-return]

    def new_attention(self, place: int = 0) -> nn.Module:
        """An untrained attention module of the family's own class that stores K/V as one more layer of the cache.

        `place` counts such layers, from 0, behind the target's own.
        """
        config, added = copy.deepcopy(self.config), place + 1
        config.num_hidden_layers = self.num_layers + added
        if getattr(config, "layer_types", None):
            config.layer_types = [*config.layer_types[: self.num_layers], *[self._adapter_kind] * added]
        for rope_switch in ("no_rope_layers", "no_rope_layer_interval"):
            if isinstance(getattr(config, rope_switch, None), list):
                setattr(config, rope_switch, [*getattr(config, rope_switch)[: self.num_layers], *[1] * added])
        family: Any = type(self.layers[0].self_attn)
        return cast(nn.Module, family(config, layer_idx=self.num_layers + place))

    def new_norm(self) -> nn.Module:
        """A copy of the final norm."""
        return cast(nn.Module, copy.deepcopy(self._norm))

    @property
    def head(self) -> nn.Module:
        """The LM head's matrix."""
        return cast(nn.Module, self._head)

    @property
    def _adapter_kind(self) -> str:
        if self.config.model_type in ROTARY_IN_SLIDING_LAYERS_ONLY and SLIDING in self._kinds:
            return SLIDING
        return FULL if FULL in self._kinds else self._kinds[0]

    def storage_shape(self, attention: nn.Module) -> LayerShape:
        """What a module made by `new_attention` stores per slot."""
        recorder, like = _Recorder(), next(attention.parameters())
        x = torch.zeros(1, 1, self.width, dtype=like.dtype, device=like.device)
        where = sequence(1, 1, like.device)
        with torch.no_grad():
            attention(x, past_key_values=recorder, **self._layer_inputs(self._adapter_kind, where, x))
        (shape,) = recorder.shapes.values()
        return shape

    def new_cache(self, batch: int, slots: int, extra: Sequence[LayerShape] = ()) -> KVCache:
        """Storage for `batch` rows of `slots` tokens, with `extra` layers for a drafter behind the target's own.

        Raises CapacityError, before anything is allocated, if it cannot fit.
        """
        shapes = [*self._shapes, *extra]
        for device in {shape.device for shape in shapes}:
            needed = sum(s.bytes_per_slot for s in shapes if s.device == device) * batch * slots
            free = available_bytes(device)
            if needed > free:
                raise CapacityError(
                    f"the KV cache of {batch} rows of {slots} tokens needs {human_bytes(needed)} on {device}, where "
                    f"{human_bytes(free)} are free; use a smaller batch, shorter prompts or fewer max_tokens"
                )
        return KVCache(shapes, batch, slots)

    @property
    def fingerprint(self) -> str:
        """What tells this target from others; equal in whatever precision it was loaded."""
        config = self.config
        structure = [config.model_type, self.width, self.num_layers, self.vocab_size, self._kinds, self._window]
        plain = [self._embedding.weight, *self._norm.parameters()]
        return fingerprint(structure, plain, self.model.parameters())

    @property
    def hides_weights(self) -> bool:
        """Whether some weights cannot be read as they were trained: quantised, or offloaded to disk."""
        quantised = getattr(self.config, "quantization_config", None) is not None
        return quantised or any(parameter.device.type == "meta" for parameter in self.model.parameters())

    def _layer_inputs(self, kind: str, where: Placement, x: Tensor) -> dict[str, Any]:
        key = (kind, x.dtype)
        if key not in where.derived:
            where.derived[key] = (self._attention_mask(kind, where, x.dtype), *self._rotate(kind, where, x))
        blocked, cos, sin = where.derived[key]
        return {"attention_mask": blocked, "position_ids": where.positions, "position_embeddings": (cos, sin)}

    def _attention_mask(self, kind: str, where: Placement, dtype: torch.dtype) -> Tensor:
        """The additive attention mask [B, 1, N, S]."""
        visible = where.mask
        if kind == SLIDING:
            near = where.slot_positions[:, None] > where.positions[..., None] - self._window
            visible = visible & near
        blocked = torch.zeros_like(visible, dtype=dtype)
        return blocked.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]

    def _rotate(self, kind: str, where: Placement, x: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary_table(kind, where.mask.shape[-1], x)
        at = where.positions.clamp_max(cos.shape[0] - 1)  # only padding can lie past the context
        return cos[at], sin[at]

    def _rotary_table(self, kind: str, extent: int, x: Tensor) -> tuple[Tensor, Tensor]:
        # One table per layer type: gathering rows is far cheaper than the rotary module at every step, and its values
        # do not depend on which other rows share the batch.
        size = min(extent, self.context)
        table = self._tables.get((kind, x.dtype))
        if table is None or len(table[0]) < size:
            size = min(self.context, max(size, 2 * (0 if table is None else len(table[0]))))
            positions = torch.arange(size, device=self.device)[None]
            typed = "layer_type" in inspect.signature(self._rotary.forward).parameters
            with torch.inference_mode(False), torch.no_grad():
                like = torch.zeros(1, 1, self.width, dtype=x.dtype, device=self.device)
                cos, sin = self._rotary(like, positions, kind) if typed else self._rotary(like, positions)
            table = self._tables[kind, x.dtype] = (cos[0], sin[0])
        return table

    def _refuse_what_cannot_work(self) -> None:
        implementation = self.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
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
            readable = parameter.device.type != "meta" and parameter.dtype in PLAIN_DTYPES
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
        self._shapes = self._record_shapes(tokens)
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
        recorder, where = _Recorder(), sequence(1, tokens.shape[1], self.device)
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
        cache = KVCache(self._shapes, 1, length)
        ahead = []
        for i in range(length):
            where = place_chain(torch.tensor([i], device=self.device), 1, length)
            ahead.append(self.run(self.embed(tokens[:, i : i + 1]), where, cache, stop=half)[0])
        where = sequence(1, length, self.device)
        x, _ = self.run(torch.cat(ahead, 1), where, cache, start=half)
        return self.logits(self.norm(x))


def layer_kinds(config: Any, layers: int) -> list[str]:
    """The attention type of every layer, as masks and rotary embeddings are chosen by it."""
    if kinds := getattr(config, "layer_types", None):
        unknown = set(kinds) - {FULL, SLIDING}
        if unknown:
            raise ModelError(f"layers of type {sorted(unknown)[0]!r} are not supported")
        return list(kinds[:layers])
    # Some checkpoints carry a window that their family ignores.
    windowed = config.model_type in WINDOWED_THROUGHOUT or config.model_type not in FAMILIES
    return [SLIDING if windowed and getattr(config, "sliding_window", None) else FULL] * layers


def context_limit(config: Any) -> int:
    """The longest text a model may see.

    Rotary embeddings that change with the length of the text (dynamic NTK, longrope) would make a row depend on its
    neighbours and on the past; such models are held to the length up to which they do not change.
    """
    limit = int(config.max_position_embeddings)
    parameters = getattr(config, "rope_parameters", None) or {}
    for settings in [parameters, *(v for v in parameters.values() if isinstance(v, dict))]:
        if settings.get("rope_type") == "longrope":
            limit = min(limit, int(settings.get("original_max_position_embeddings") or limit))
    return limit


def check_exit_layer(exit_layer: int, target: Target) -> None:
    """Raise ConfigError unless some layers lie before and some after the exit."""
    if not 0 <= exit_layer < target.num_layers:
        raise ConfigError(
            f"exit layer must be in 0..{target.num_layers - 1} for a target of {target.num_layers} layers, "
            f"got {exit_layer}"
        )
