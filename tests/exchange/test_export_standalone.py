"""The self-draft model as a model of its own: its logits are the drafter's, or it is not exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from kangaroo.drafters.kangaroo.adapter import Adapter
from kangaroo.errors import ModelError
from kangaroo.exchange.standalone import build_standalone, load_standalone, prove, read_weight
from kangaroo.loading import load_model
from kangaroo.model import Target

VARIANTS: dict[str, dict[str, Any]] = {
    "attention": {"variant": "kangaroo"},
    "two-whole-layers": {"variant": "full-layer", "layers": 2},
    "own-head": {"variant": "own-head"},
    "feed-forward": {"variant": "mlp-only"},
}


def eager_target(family: str, **changes: Any) -> Target:
    model = tiny.build(family, **changes)
    model.set_attn_implementation("eager")
    return Target(model, exact=False)


def written(adapter: Adapter, folder: Path) -> Any:
    build_standalone(adapter).save_pretrained(folder)
    return load_standalone(folder, adapter.target)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_copy_has_the_drafters_logits_bit_for_bit(family: str, variant: str, tmp_path: Path) -> None:
    adapter = tiny.make_adapter(eager_target(family), **VARIANTS[variant])
    model = written(adapter, tmp_path)
    proof = prove(adapter, model)
    assert proof.largest == proof.largest_drafted == 0
    assert model.config.num_hidden_layers == tiny.EXIT + len(adapter.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_in_every_precision_with_the_head_tied_or_not(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    tiny.build("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / "target")
    target = Target(load_model(tmp_path / "target", dtype, attn_implementation="eager"), exact=False)
    adapter = tiny.make_adapter(target, variant="full-layer")
    copied = written(adapter, tmp_path / "draft")
    assert prove(adapter, copied).largest == 0
    assert (copied.lm_head.weight is copied.model.embed_tokens.weight) == tied


def test_a_draft_vocabulary_is_part_of_the_whole_one(tmp_path: Path) -> None:
    adapter = tiny.make_adapter(eager_target("llama"), variant="full-layer", draft_vocabulary=40)
    copied = written(adapter, tmp_path)
    proof = prove(adapter, copied)
    assert proof.largest == 0
    assert proof.largest_drafted < 1e-12
    assert copied.config.vocab_size == tiny.VOCAB
    assert "own slice" in proof.in_words() or proof.largest_drafted == 0


def test_scaled_logits_and_embeddings_are_the_familys_own(tmp_path: Path) -> None:
    adapter = tiny.make_adapter(eager_target("cohere"))
    assert prove(adapter, written(adapter, tmp_path)).largest == 0
    plain = eager_target("granite", residual_multiplier=1.0)
    adapter = tiny.make_adapter(plain, variant="full-layer")
    assert prove(adapter, written(adapter, tmp_path)).largest == 0


@pytest.mark.parametrize(
    ("family", "variant", "why"),
    [
        ("granite", "kangaroo", "logits differ"),  # it scales what a layer adds
        ("gemma", "full-layer", "logits differ"),  # another activation
        ("gemma2", "kangaroo", "pre_feedforward_layernorm"),
        ("cohere", "full-layer", "no place for the adapter's 'norm_mid"),
        ("qwen3_moe", "kangaroo", "mlp.experts"),
        ("phi3", "kangaroo", "gate_up_proj"),
    ],
)
def test_other_families_are_refused_by_name(family: str, variant: Any, why: str, tmp_path: Path) -> None:
    adapter = tiny.make_adapter(eager_target(family), variant=variant)
    with pytest.raises(ModelError, match=rf"{family} models cannot be exported.*{why}"):
        prove(adapter, written(adapter, tmp_path))


def test_the_proof_fails_for_a_copy_that_is_another(tmp_path: Path) -> None:
    adapter = tiny.make_adapter(eager_target("llama"))
    model = written(adapter, tmp_path)
    model.requires_grad_(False).model.layers[tiny.EXIT].self_attn.o_proj.weight.mul_(1.001)
    with pytest.raises(ModelError, match="logits differ"):
        prove(adapter, model)


class Packed(nn.Module):
    """A linear that keeps its weights where nobody can read them."""

    in_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randint(-8, 8, (4, 6), dtype=torch.int8), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codes.to(x.dtype) * 0.5).T + self.bias.to(x.dtype)


def test_a_quantised_linear_is_read_by_what_it_makes_of_unit_vectors() -> None:
    packed = Packed()
    assert torch.allclose(read_weight(packed), packed.codes.float() * 0.5, atol=1e-6)
    assert read_weight(packed, "bias") is packed.bias
    with pytest.raises(ModelError, match="cannot read 'scales'"):
        read_weight(packed, "scales")


def test_offloaded_weights_are_refused() -> None:
    with pytest.raises(ModelError, match="offloaded"):
        read_weight(nn.Linear(2, 2, device="meta"))
