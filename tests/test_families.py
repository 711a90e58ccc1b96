"""Every family on the list is run exactly; every other one is refused by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kangaroo.drafters.kangaroo.adapter import Adapter
from kangaroo.drafters.kangaroo.chain import ChainConfig, Kangaroo
from kangaroo.drafters.kangaroo.tree import KangarooTree, TreeConfig
from kangaroo.errors import ModelError
from kangaroo.model import FAMILIES, Target
from kangaroo.norms import FusedNorm, with_fused_norms
from kangaroo.tree import place, place_chain, sequence
from oracle import EVERYTHING, GREEDY, oracle
from runs import PROMPTS, generate, requests
from tiny import EXIT, SPECIAL, VOCAB, WIDTH, WINDOW, build, make_adapter, target

ALL = sorted(FAMILIES)
WINDOWED = sorted(name for name, special in SPECIAL.items() if special.get("sliding_window") == WINDOW)


@torch.inference_mode()
def own_logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, use_cache=False).logits


def test_every_windowed_family_is_tested_with_a_window_shorter_than_the_prompts() -> None:
    assert set(WINDOWED) >= {"mistral", "starcoder2", "phi3", "mixtral", "qwen2", "gemma2", "gemma3_text", "gpt_oss"}
    for family in WINDOWED:
        assert "sliding_attention" in target(family)._kinds
        assert target(family).config.sliding_window == WINDOW < len(PROMPTS[0])


@pytest.mark.parametrize("family", ALL)
@torch.inference_mode()
def test_logits_are_the_models_own(family: str) -> None:
    """In one pass, and with the shallow layers running ahead token by token and the deep ones in chunks of three."""
    run, tokens = target(family), torch.randint(VOCAB, (2, 3 * WINDOW))
    want = own_logits(run.model, tokens)
    whole, _ = run.run(run.embed(tokens), sequence(2, tokens.shape[1]), None)
    assert close(run.logits(run.norm(whole)), want)
    cache, zero = run.new_cache(2, tokens.shape[1]), torch.zeros(2, dtype=torch.int64)
    ahead = [
        run.run(run.embed(tokens[:, i : i + 1]), place_chain(zero + i, 1, i + 1), cache, stop=EXIT)[0]
        for i in range(tokens.shape[1])
    ]
    for i in range(0, tokens.shape[1], 3):
        x, _ = run.run(torch.cat(ahead[i : i + 3], 1), place_chain(zero + i, 3, i + 3), cache, start=EXIT)
        assert close(run.logits(run.norm(x)), want[:, i : i + 3])


@pytest.mark.parametrize("family", ALL)
@torch.inference_mode()
def test_each_path_of_a_tree_is_a_text_of_its_own(family: str) -> None:
    """Nodes of a tree get the logits of their own paths, after committed texts of different lengths."""
    run, parents = target(family), [-1, 0, 0, 1, 2, 2, 4, 6]
    prompts = [torch.randint(VOCAB, (n,)) for n in (9, 6)]
    nodes, lengths = torch.randint(VOCAB, (2, len(parents))), torch.tensor([9, 6])
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    cache = run.new_cache(2, 9 + len(parents))
    run.run(run.embed(tokens), place_chain(torch.zeros_like(lengths), 9, 9), cache)
    where = place(lengths, torch.tensor([parents, parents]), 9 + len(parents))
    x, _ = run.run(run.embed(nodes), where, cache)
    got = run.logits(run.norm(x))
    for row, prompt in enumerate(prompts):
        for node in (1, 3, 5, 7):
            text = torch.cat([prompt, nodes[row, path_to(node, parents)]])
            assert close(got[row, node], own_logits(run.model, text[None])[0, -1])


def path_to(node: int, parents: Sequence[int]) -> list[int]:
    return [*path_to(parents[node], parents), node] if node >= 0 else []


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    # Weights are float64, but transformers' norms, rotary tables, routers and softmaxes pass through float32.
    return torch.allclose(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("family", ALL)
def test_kangaroo_is_lossless_on_a_ragged_batch(family: str) -> None:
    run, accepted, drafted = target(family), 0, 0
    for sampling in (GREEDY, EVERYTHING):
        drafter = Kangaroo(run, make_adapter(run), EXIT, ChainConfig(max_draft=3, threshold=0))
        got = generate(run, drafter, requests(PROMPTS, sampling, 10))
        assert got.texts == [oracle(run.model, prompt, sampling, 10) for prompt in PROMPTS]
        accepted, drafted = accepted + sum(got.accepted), drafted + sum(map(sum, got.drafted))
    assert 0 < accepted < drafted, "identity proves little unless some drafts are right and some are wrong"


@pytest.mark.parametrize("family", WINDOWED)
def test_trees_are_lossless_under_a_window(family: str) -> None:
    run = target(family)
    drafter = KangarooTree(run, make_adapter(run), EXIT, TreeConfig(top_k=3, max_draft=3, threshold=0))
    got = generate(run, drafter, requests(PROMPTS, EVERYTHING, 10))
    assert got.texts == [oracle(run.model, prompt, EVERYTHING, 10) for prompt in PROMPTS]
    assert sum(got.accepted) > 0


@pytest.mark.parametrize("family", ALL)
@torch.inference_mode()
def test_an_adapter_has_the_familys_own_attention(family: str, tmp_path: Path) -> None:
    """Initialised from the exit layer it does what that layer's attention does, after a trip to the disk as well."""
    run = target(family)
    adapter = make_adapter(run)
    adapter.float().initialise(0, from_target=True)
    adapter.save(tmp_path, {})
    again = Adapter.load(tmp_path, run)
    x, where = torch.randn(1, 6, run.width, dtype=torch.float64), sequence(1, 6)
    assert torch.equal(adapter.double()(x, where), again(x, where))
    layer = run.layers[EXIT].self_attn
    assert again.layers[0].attention is not None
    attended = run.attend(again.layers[0].attention, x, where, None)
    assert close(attended, run.attend(layer, x, where, None))
    swapped = run.attend(again.layers[0].attention, x[:, [1, 0, 2, 3, 4, 5]], where, None)
    assert not close(attended[:, 2:], swapped[:, 2:]), "it should know the order of the tokens"


# --- what sets families apart, one feature at a time


@pytest.mark.parametrize("window", [WINDOW, 20], ids=["short", "longer-than-the-check"])
@pytest.mark.parametrize("family", ["llama", "granite", "gemma", "olmo2", "phi"])
@torch.inference_mode()
def test_a_window_in_the_config_of_a_family_that_ignores_it_is_ignored(family: str, window: int) -> None:
    run, tokens = Target(build(family, sliding_window=window)), torch.randint(VOCAB, (1, 30))
    x, _ = run.run(run.embed(tokens), sequence(1, 30), None)
    assert close(run.logits(run.norm(x)), own_logits(run.model, tokens))
    assert run.config.sliding_window == window


@pytest.mark.parametrize("own_window", [True, False])
def test_an_unlisted_family_must_prove_its_window_however_long(own_window: bool) -> None:
    """The check at load time looks past any window, so a family that ignores its own is refused, not run wrongly."""
    model = build("mistral" if own_window else "llama", sliding_window=100)
    model.config.model_type = "cousin"
    if own_window:
        assert Target(model).config.sliding_window == 100
    else:
        with pytest.raises(ModelError, match="cousin models are not supported"):
            Target(model)


def test_rotary_scaling_that_grows_with_the_text_is_held_to_the_length_where_it_does_not() -> None:
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    model = build(
        "phi3",
        rope_parameters={**scaling, "original_max_position_embeddings": 24, "partial_rotary_factor": 1.0},
        original_max_position_embeddings=24,
        max_position_embeddings=96,
    )
    run = Target(model)
    assert run.context == 24
    dynamic = build("llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
    assert Target(dynamic).context == dynamic.config.max_position_embeddings


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_static_rotary_scaling_is_lossless(kind: str) -> None:
    more: dict[str, Any] = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}.get(kind, {})
    settings = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32, **more}
    run = Target(build("llama", rope_parameters=settings))
    drafter = Kangaroo(run, make_adapter(run), EXIT, ChainConfig(max_draft=3, threshold=0))
    got = generate(run, drafter, requests(PROMPTS, GREEDY, 8))
    assert got.texts == [oracle(run.model, prompt, GREEDY, 8) for prompt in PROMPTS]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_tied_heads_and_single_key_value_heads(family: str) -> None:
    run = Target(build(family, tie_word_embeddings=True, num_key_value_heads=1))
    drafter = Kangaroo(run, make_adapter(run), EXIT, ChainConfig(max_draft=3, threshold=0))
    got = generate(run, drafter, requests(PROMPTS, GREEDY, 8))
    assert got.texts == [oracle(run.model, prompt, GREEDY, 8) for prompt in PROMPTS]


def test_eager_attention_gives_the_same_text_as_fused_attention() -> None:
    run = Target(build("mistral", attn_implementation="eager"))
    assert run.config._attn_implementation == "eager"
    drafter = Kangaroo(run, make_adapter(run), EXIT, ChainConfig(max_draft=3, threshold=0))
    got = generate(run, drafter, requests(PROMPTS, EVERYTHING, 8))
    assert got.texts == [oracle(target("mistral").model, prompt, EVERYTHING, 8) for prompt in PROMPTS]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@torch.inference_mode()
def test_grouped_experts_in_single_precision(family: str) -> None:
    """The implementation that transformers picks by default, which the float64 tests cannot use."""
    model = build(family).float()
    model.set_experts_implementation("grouped_mm")
    run, tokens = Target(model), torch.randint(VOCAB, (2, 7))
    x, _ = run.run(run.embed(tokens), sequence(2, 7), None)
    assert torch.allclose(run.logits(run.norm(x)), own_logits(model, tokens), rtol=1e-3, atol=1e-3)


# --- refused


REFUSED: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "llama4_text": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "intermediate_size_mlp": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 2,
        "attention_chunk_size": 8,
    },
}


@pytest.mark.parametrize("family", REFUSED)
def test_other_families_are_refused_by_name(family: str) -> None:
    settings = {"vocab_size": VOCAB, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = CONFIG_MAPPING[family](**settings, **REFUSED[family])
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=family) as error:
        Target(model)
    assert "not supported" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unlisted_family_that_passes_the_check_is_accepted() -> None:
    """`hunyuan` and the like: a plain stack of layers proves itself by its logits at load time."""
    model = build("llama")
    model.config.model_type = "llama-cousin"
    run = Target(model)
    assert generate(run, Kangaroo(run, None, EXIT, ChainConfig()), requests(PROMPTS[:1], GREEDY, 6)).texts == [
        oracle(target("llama").model, PROMPTS[0], GREEDY, 6)
    ]


def test_a_family_whose_layers_need_more_than_the_loop_gives_fails_the_check() -> None:
    model = build("llama")
    model.config.model_type = "llama-plus"

    def double(_: object, __: object, output: Any) -> Any:
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

    model.model.register_forward_hook(double)  # no loop over the layers can know of it
    with pytest.raises(ModelError, match=r"llama-plus models are not supported: .* logits differ"):
        Target(model)


def test_a_family_whose_layers_rely_on_what_the_model_prepares_is_refused() -> None:
    model, prepared = build("llama"), {}
    model.config.model_type = "llama-minus"
    model.model.register_forward_pre_hook(lambda *_: prepared.update(ready=True))
    model.model.register_forward_hook(lambda *_: prepared.clear())
    model.model.layers[1].register_forward_pre_hook(lambda *_: prepared["ready"] and None)
    with pytest.raises(ModelError, match="llama-minus models are not supported: their layers need more"):
        Target(model)


# --- norms


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_fused_norms_change_no_bit_and_leave_the_model_alone(kind: torch.dtype) -> None:
    layer = build("llama").to(kind).base_model.layers[0]
    own = dict(layer.named_children())
    view = with_fused_norms(layer)
    assert {name for name, child in view.named_children() if isinstance(child, FusedNorm)} == {
        "input_layernorm",
        "post_attention_layernorm",
    }
    assert dict(layer.named_children()) == own
    x = (torch.randn(7, 5, WIDTH) * 3).to(kind)
    assert torch.equal(view.input_layernorm(x), layer.input_layernorm(x))
    layer.input_layernorm.weight.mul_(2)
    assert torch.equal(view.input_layernorm(x), layer.input_layernorm(x))


def test_norms_that_would_differ_in_a_bit_are_left_as_they_are() -> None:
    for family in ("gemma", "phi"):  # one adds 1 to its weights, the other subtracts the mean
        layer = build(family).base_model.layers[0]
        assert with_fused_norms(layer) is layer
    layer = build("llama").float().base_model.layers[0]
    own: Any = type(layer.input_layernorm)

    class Another(own):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1 + 2**-23)

    layer.input_layernorm, layer.post_attention_layernorm = Another(WIDTH), Another(WIDTH)
    assert with_fused_norms(layer) is layer
