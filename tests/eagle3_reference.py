"""EAGLE-3 as the paper defines it (Li et al. 2025, section 3.1), in plain loops: no cache, no batch, no tree mask.

Everything is computed anew for every drafted token, from tensors by the names that the authors' release gives them and
the model's own hidden states as transformers returns them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Reference:
    """A head in the layout of the release, and the model that it was made for."""

    model: PreTrainedModel
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    norm_before_residual: bool = False
    taps: tuple[int, int, int] | None = None

    def features(self, text: Sequence[int]) -> Tensor:
        """[T, 3D] what the model says of every token of a text: its states, low, middle and high."""
        states = self.model(torch.tensor([list(text)]), output_hidden_states=True, use_cache=False).hidden_states
        layers = len(states) - 1
        taps = self.taps or (2, layers // 2, layers - 3)
        return torch.cat([states[count][0] for count in taps], -1)

    def state(self, text: Sequence[int], drafted: Sequence[int]) -> Tensor:
        """[D] the head's last state; `text` ends with the pending token, which the model has not seen."""
        inputs = list(self.features(text[:-1]) @ self.tensors["fc.weight"].T)
        tokens = list(text[1:])
        for token in drafted:  # a drafted token has no features: the head's last state stands in
            inputs.append(self._layer(torch.stack(inputs), tokens)[-1])
            tokens.append(token)
        return self._layer(torch.stack(inputs), tokens)[-1]

    def normed(self, state: Tensor) -> Tensor:
        """What the head to the vocabulary reads."""
        return self._norm(state, "norm")

    def logits(self, text: Sequence[int], drafted: Sequence[int]) -> Tensor:
        """[V] of the token after `drafted`; -inf for those the head does not know."""
        y = self.normed(self.state(text, drafted))
        known = y @ self.tensors["lm_head.weight"].T
        full = torch.full((self.config["vocab_size"],), -math.inf, dtype=y.dtype)
        for place, logit in enumerate(known):
            full[place + (int(self.tensors["d2t"][place]) if "d2t" in self.tensors else 0)] = logit
        return full

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return x * scale * self.tensors[f"{name}.weight"]

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        own = self.tensors.get("embed_tokens.weight")
        return (self.model.get_input_embeddings().weight if own is None else own)[list(tokens)]

    def _layer(self, inputs: Tensor, tokens: Sequence[int]) -> Tensor:
        """Features [T, D] and the tokens after theirs -> states [T, D]."""
        mid = "midlayer."
        normed = self._norm(inputs, mid + "hidden_norm")
        x = torch.cat([self._norm(self._embed(tokens), mid + "input_layernorm"), normed], -1)
        residual = normed if self.norm_before_residual else inputs
        x = residual + self._attention(x)
        y = self._norm(x, mid + "post_attention_layernorm")
        gate, up, down = (self.tensors[f"{mid}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return x + (functional.silu(y @ gate.T) * (y @ up.T)) @ down.T

    def _attention(self, x: Tensor) -> Tensor:
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        q, k, v = (self._project(x, name) for name in ("q_proj", "k_proj", "v_proj"))
        dim = q.shape[-1] // heads
        q, k = self._rotate(q, dim), self._rotate(k, dim)
        out = torch.zeros(len(x), heads * dim, dtype=x.dtype)
        for head in range(heads):
            own = slice(head * dim, (head + 1) * dim)
            shared = slice(head // (heads // groups) * dim, (head // (heads // groups) + 1) * dim)
            for now in range(len(x)):
                scores = [q[now, own] @ k[then, shared] / math.sqrt(dim) for then in range(now + 1)]
                out[now, own] = torch.stack(scores).softmax(0) @ v[: now + 1, shared]
        return self._project(out, "o_proj")

    def _project(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.tensors[f"midlayer.self_attn.{name}.weight"].T
        bias = self.tensors.get(f"midlayer.self_attn.{name}.bias")
        return y if bias is None else y + bias

    def _rotate(self, x: Tensor, dim: int) -> Tensor:
        """Heads [T, H * dim], each turned by its position (Su et al. 2021), halves instead of pairs as in Llama."""
        out, half = x.clone(), dim // 2
        for position in range(len(x)):
            # Angles are made in single precision everywhere.
            angle = float(position) * self.frequencies(dim)
            cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
            for begin in range(0, x.shape[1], dim):
                left, right = x[position, begin : begin + half], x[position, begin + half : begin + dim]
                out[position, begin : begin + half] = left * cos - right * sin
                out[position, begin + half : begin + dim] = right * cos + left * sin
        return out

    def frequencies(self, dim: int) -> Tensor:
        """[dim / 2], with what Llama 3.1 does to slow ones: divided by a factor, and in between in between."""
        found = 1.0 / self.config.get("rope_theta", 10000.0) ** (torch.arange(0, dim, 2).float() / dim)
        scaling = self.config.get("rope_scaling")
        if scaling is None:
            return found
        if scaling["rope_type"] == "linear":
            return found / scaling["factor"]
        for place, frequency in enumerate(found.tolist()):
            turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            share = min(1.0, max(0.0, (turns - low) / (high - low)))
            found[place] = share * frequency + (1 - share) * frequency / scaling["factor"]
        return found


def release_files(
    model: PreTrainedModel, drafted: int, seed: int = 0, **changes: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of a random head as the authors' release saves one: another shape and base than the model's."""
    theirs = model.config.get_text_config()
    width, vocabulary = theirs.hidden_size, theirs.vocab_size
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float16",
        "vocab_size": vocabulary,
        "draft_vocab_size": drafted,
        **changes,
    }
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        # Through single precision, in which weights are read.
        return (torch.randn(*shape, generator=random) * scale / math.sqrt(shape[-1])).double()

    dim = config.get("head_dim", width // 4)
    queries, keys, inner = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim, 40
    tensors = {
        "midlayer.self_attn.q_proj.weight": draw(queries, 2 * width),
        "midlayer.self_attn.k_proj.weight": draw(keys, 2 * width),
        "midlayer.self_attn.v_proj.weight": draw(keys, 2 * width),
        "midlayer.self_attn.o_proj.weight": draw(width, queries, scale=2.0),
        "midlayer.mlp.gate_proj.weight": draw(inner, width),
        "midlayer.mlp.up_proj.weight": draw(inner, width),
        "midlayer.mlp.down_proj.weight": draw(width, inner, scale=2.0),
        "fc.weight": draw(width, 3 * width),
        "lm_head.weight": draw(drafted, width, scale=8.0),
    }
    for name in ("midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm", "norm"):
        tensors[f"{name}.weight"] = (1 + 0.1 * torch.randn(width, generator=random)).double()
    if config.get("attention_bias"):
        for name, size in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys), ("o_proj", width)):
            tensors[f"midlayer.self_attn.{name}.bias"] = (0.1 * torch.randn(size, generator=random)).double()
    if drafted < vocabulary:
        held = torch.randperm(vocabulary, generator=random)[:drafted].sort().values
        tensors["d2t"] = held - torch.arange(drafted)
        tensors["t2d"] = torch.zeros(vocabulary, dtype=torch.bool).scatter_(0, held, True)
    return config, tensors
