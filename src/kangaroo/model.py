"""The target: a loaded Hugging Face causal LM that can be run one span of layers at a time.

The only file that touches transformers' internals. It drives the model's own decoder layers, rotary embedding, norm and
head; a start-up check compares its logits with the model's own forward pass, so that a family whose layers need more
than this is refused instead of decoded wrongly.
"""

import copy
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kangaroo.attention import make_steady
from kangaroo.cache import KVCache, LayerShape, check_room
from kangaroo.errors import ConfigError, ModelError
from kangaroo.families import (
    FAMILIES,
    FULL,
    LEAST_CONTEXT,
    LIKE_LLAMA,
    ROTARY_IN_SLIDING_LAYERS_ONLY,
    SLIDING,
    context_limit,
    embedding_scale,
    keep_soft_cap,
    layer_kinds,
    lengthened,
    refuse_what_cannot_work,
    scale_logits,
)
from kangaroo.fingerprint import fingerprint, is_readable
from kangaroo.fused import in_fewer_calls
from kangaroo.graphs import Function, StaticPasses, Wanted, set_graphs
from kangaroo.kernels import CompiledLayer, Kernels, Seen
from kangaroo.linears import count_weights
from kangaroo.norms import with_fused_norms
from kangaroo.passes import Attention, Pass, computing
from kangaroo.rotary import RotaryTables
from kangaroo.settle import settle
from kangaroo.tree import Placement, place_chain, sequence
from kangaroo.trial import Exactness
from kangaroo.window import CacheWindow, Recorder, attention_mask, cache_argument, extent

TRIAL = LEAST_CONTEXT  # tokens of the check at load time
PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Target:
    """A causal LM as embedding, layers, norm and head.

    Raises ModelError if the model cannot be run exactly: an unsupported family, an attention implementation that
    ignores masks, NaN weights, or logits that differ from the model's own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        exact: bool = True,
        pack: bool = False,
        compile: bool = False,
        graphs: Wanted = False,
    ):
        """`exact` has every pass give a token the same bits, where this machine can; without it, whatever is fastest.

        `pack` lets the model's linears be replaced by packed ones that keep no plain copy: for models nobody else uses;
        `compile` packs them for kernels that are compiled for this processor. `graphs` has passes over few tokens
        captured as CUDA graphs; "auto": where they can be. Raises ConfigError if something cannot be had.
        """
        self.model, self.config = model.eval(), model.config.get_text_config()
        refuse_what_cannot_work(model, self.config)
        keep_soft_cap(model, self.config)
        base = model.base_model
        self.layers: nn.ModuleList = base.layers
        self._run_as: list[Any] = [with_fused_norms(layer) for layer in self.layers]
        first = self.layers[0]
        self._past, self._attention_past = map(cache_argument, (first, getattr(first, "self_attn", first)))
        self._norm = base.norm if hasattr(base, "norm") else base.final_layernorm
        self._embedding, self._head = model.get_input_embeddings(), model.lm_head
        self.num_layers, self.width = len(self.layers), int(self.config.hidden_size)
        self.vocab_size = int(self._head.weight.shape[0])
        self.device, self.dtype = self._embedding.weight.device, model.dtype
        self.context, self._kinds = context_limit(self.config), layer_kinds(self.config, self.num_layers)
        self._window = int(getattr(self.config, "sliding_window", None) or 0)
        self._embedding_scale: float = 1.0
        self._rotary = RotaryTables(base.rotary_emb, self.width, self.context, self.device)
        self.way: Attention | None = None
        """How attention is computed in passes with a cache; None leaves it to the model."""
        self.static: StaticPasses | None = None
        """Where passes over few tokens have fixed addresses; None: nowhere."""
        self.kernels = Kernels(self.dtype, self.device) if compile else None
        """Compiled for this target's linears and layers, if that was asked for."""
        self._check()
        self.fingerprint, self.parameters = self._fingerprint(), count_weights(model)
        """What tells this target from others, equal in whatever precision it was loaded; how many weights it has."""
        self._threads = torch.get_num_threads()
        self._exactness = settle(self, exact=exact, pack=pack)
        self.graphs = set_graphs(self, graphs)
        """Whether passes are captured: "on", or "off" and why."""

    def compute_by(self, way: Attention | None) -> None:
        """Have passes with a cache take their attention this way; None leaves it to the model."""
        self.way, self._head = way, self.model.lm_head
        for layer in self.layers if way is not None else ():
            make_steady(layer.self_attn)
        self._run_as = [with_fused_norms(layer) for layer in self.layers]
        if way is not None and self.config.model_type in LIKE_LLAMA:
            for index, layer in enumerate(self._run_as):
                self._run_as[index] = in_fewer_calls(layer, partial(self._tried, index), self.kernels)

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
        layers = range(start, self.num_layers if stop is None else stop)
        inside = tuple(tap for tap in taps if tap - 1 in layers)
        span = partial(self._span, layers, inside)
        done, *tapped = self.in_place((layers, inside), span, x, where, cache) if layers else (x,)
        features = {start: x} if start in taps else {}
        return done, features | dict(zip(inside, tapped, strict=True))

    def _span(
        self, layers: range, taps: Sequence[int], x: Tensor, where: Placement, cache: KVCache | None
    ) -> list[Tensor]:
        """What comes out of some layers, and the states after those in `taps`."""
        way = None if cache is None else self.way
        past = None if cache is None else CacheWindow(cache, where, layers, extent(where, way))
        inputs = {kind: self._layer_inputs(kind, where, x, way) for kind in {self._kinds[index] for index in layers}}
        features = {}
        with self._computing(where, way):
            for index in layers:
                kind = self._kinds[index]
                x = self._run_as[index](x, **{self._past: past}, use_cache=past is not None, **inputs[kind])
                if index + 1 in taps:
                    features[index + 1] = x.to(self.device)
        return [x.to(self.device), *(features[tap] for tap in taps)]

    def in_place(
        self, name: Hashable, function: Function, x: Tensor, where: Placement | None, cache: KVCache | None
    ) -> Sequence[Tensor]:
        """function(x, where, cache), tensors [B, N, ...], at fixed addresses if passes like it have them.

        `name` tells the function from others.
        """
        if self.static is None or x.dtype != self.dtype or not self.static.takes(x, where, cache):
            return function(x, where, cache)
        return self.static.run(name, function, x, None if where is None else self.prepare(where), cache)

    def _computing(self, where: Placement, way: Attention | None) -> AbstractContextManager[None]:
        if way is None:
            return nullcontext()
        assert where.start is not None or not where.prompt, "prompts stand at the same positions in all rows"
        return computing(Pass(way, where.start if where.prompt else None, self._paths(where, way)))

    def _paths(self, where: Placement, way: Attention) -> Tensor | None:
        if not where.branches:
            return None
        key = ("paths", way)  # targets that share a placement may look at blocks of different sizes
        if key not in where.derived:
            where.derived[key] = (where.paths(extent(where, way)),)
        return where.derived[key][0]

    def prepare(self, where: Placement) -> Placement:
        """The same placement with masks and rotary embeddings made, for callers that run it slice by slice."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        for kind in set(self._kinds):
            self._layer_inputs(kind, where, like, self.way)
        if self.way is not None:
            self._paths(where, self.way)
        return where

    def norm(self, x: Tensor) -> Tensor:
        """The final norm."""
        return self._norm(x).to(self.device)  # type: ignore[no-any-return]

    def logits(self, x: Tensor) -> Tensor:
        """The head alone, its scaling and soft-cap included: normed states [B, N, D] -> [B, N, V]."""

        def head(x: Tensor, *_: object) -> list[Tensor]:
            with computing(None if self.way is None else Pass(self.way)):
                return [self.scale_logits(self._head(x)).to(self.device)]

        return self.in_place("head", head, x, None, None)[0]

    def scale_logits(self, logits: Tensor) -> Tensor:
        """What the family does to the output of the head's matrix."""
        return scale_logits(self.config, logits)

    def attend(self, attention: nn.Module, x: Tensor, where: Placement, cache: KVCache | None) -> Tensor:
        """Run an attention module made by `new_attention` on normed states x [B, N, D]."""
        own = cast(int, attention.layer_idx)
        # Of a tree, the target's masks are in the order of paths; else they will do.
        way = None if cache is None or where.branches else self.way
        past = None if cache is None else CacheWindow(cache, where, range(own, own + 1), extent(where, way))
        inputs = self._layer_inputs(self.adapter_kind, where, x, way)
        with self._computing(where, way):
            return attention(x, **{self._attention_past: past}, **inputs)[0]  # type: ignore[no-any-return]

    def run_compiled(self, layer: CompiledLayer, place: int, x: Tensor, where: Placement, cache: KVCache) -> Tensor:
        """Run a compiled layer of a drafter's on x [B, N, D]; its keys and values are the cache's layer `place`."""
        way = None if where.branches else self.way
        inputs = self._layer_inputs(self.adapter_kind, where, x, way)
        seen = Seen(where.slots, where.rows, inputs["attention_mask"], inputs["position_embeddings"], None)
        return layer(x, seen, *cache.layer(place))

    def new_attention(self, place: int = 0) -> nn.Module:
        """An untrained attention module of the family's own class that stores K/V as one more layer of the cache.

        `place` counts such layers, from 0, behind the target's own.
        """
        config = lengthened(self.config, self.num_layers, place + 1, self.adapter_kind)
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
        inputs = self._layer_inputs(self.adapter_kind, sequence(1, 1, device), x)
        with torch.no_grad():
            attention(x, **{self._attention_past: recorder}, **inputs)
        return next(iter(recorder.shapes.values()))

    def new_cache(self, batch: int, slots: int, extra: Sequence[LayerShape] = ()) -> KVCache:
        """Storage for `batch` rows of `slots` tokens, with `extra` layers for a drafter behind the target's own.

        Raises CapacityError, before anything is allocated, if it cannot fit.
        """
        shapes, block = [*self.shapes, *extra], 1 if self.way is None else self.way.block
        check_room(shapes, batch, slots, block)
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
            rotary = self._rotary.rows(kind, where.positions, where.mask.shape[-1], x.dtype)
            window = self._window if kind == SLIDING else None
            where.derived[key] = (attention_mask(where, x.dtype, way, window), *rotary)
        blocked, cos, sin = where.derived[key]
        return {"attention_mask": blocked, "position_ids": where.positions, "position_embeddings": (cos, sin)}

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
        self._embedding_scale = embedding_scale(self.config, self._embedding(tokens), first_input)
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
        except RuntimeError as error:
            if not self.hides_weights:
                raise
            why = f"({str(error).splitlines()[0]}); its weights may be packed for another dtype than {self.dtype}"
            raise ModelError(f"the quantised model cannot be run as it was loaded {why}") from None
        finally:
            hook.remove()
        return logits, inputs[0]

    def _record_shapes(self, tokens: Tensor) -> list[LayerShape]:
        recorder, where = Recorder(), sequence(1, tokens.shape[1], self.device)
        x = self.embed(tokens)
        for index in range(self.num_layers):
            inputs = self._layer_inputs(self._kinds[index], where, x)
            x = self.layers[index](x, **{self._past: recorder}, use_cache=True, **inputs)
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


def check_exit_layer(exit_layer: int, target: Target) -> None:
    """Raise ConfigError unless some layers lie before and some after the exit."""
    layers = target.num_layers
    if not 0 <= exit_layer < layers:
        raise ConfigError(f"exit layer must be in 0..{layers - 1} for a target of {layers} layers, got {exit_layer}")
