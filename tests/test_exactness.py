"""The same bits in any pass: how it is brought about, how it is found out, and what is said where it is not so."""

import contextlib
import copy
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

import kangaroo.settle
import kangaroo.trial
from chat_model import save_chat_model
from kangaroo.attention import NAME, attend, config_of, make_steady, ways
from kangaroo.bench.bits import digest
from kangaroo.bench.check import CheckReport, check, expect, find_divergence, tie_bound
from kangaroo.decoder import Decoder, load
from kangaroo.drafters.copying.prompt_lookup import LookupConfig, PromptLookup
from kangaroo.drafters.kangaroo.chain import ChainConfig, Kangaroo
from kangaroo.drafters.kangaroo.tree import KangarooTree, TreeConfig
from kangaroo.drafters.none import NoDrafter
from kangaroo.errors import ModelError
from kangaroo.families import FAMILIES, LIKE_LLAMA
from kangaroo.fused import FusedLayer, in_fewer_calls
from kangaroo.linears import Packed, PackedLinear, PackedProduct, SteadyLinear, can_pack, count_weights
from kangaroo.model import Target
from kangaroo.parts import find_rows, is_even
from kangaroo.passes import Pass, Rows, computing
from kangaroo.sampling import Sampling
from kangaroo.tree import place, place_chain
from kangaroo.trial import Exactness
from kangaroo.verdicts import Verdicts
from runs import PROMPTS
from tiny import EXIT, VOCAB, build, make_adapter, target

CPU = torch.device("cpu")
NATIVE_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bf16 = pytest.mark.skipif(not NATIVE_BF16, reason="this CPU does not multiply bfloat16 natively")
# Its router multiplies in float32, as many rows at once as there are tokens.
ROUTED_IN_FLOAT32 = {"deepseek_v3"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANGAROO_CACHE", str(tmp_path / "cache"))


def wide(dtype: torch.dtype, **changes: Any) -> PreTrainedModel:
    """A Llama so wide that a product over several rows sums in another order than one over a single row."""
    sizes = {"hidden_size": 256, "intermediate_size": 2112, "head_dim": 64, "num_hidden_layers": 3}
    return build("llama", initializer_range=0.02, **(sizes | changes)).to(dtype)


# --- what is promised of which family


@pytest.mark.parametrize("family", sorted(FAMILIES - ROUTED_IN_FLOAT32))
def test_every_listed_family_takes_its_attention_from_here_and_is_exact(family: str) -> None:
    run = target(family)
    assert run.exactness.level == "bitwise", run.exactness
    assert run.config._attn_implementation in ("sdpa", "eager"), "outside of a pass the model is as it was"


@needs_bf16
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pack", [False, True])
def test_short_precisions_are_exact(dtype: torch.dtype, pack: bool) -> None:
    run = Target(wide(dtype), pack=pack)
    assert run.exactness.level == "bitwise", run.exactness
    assert any(isinstance(module, PackedLinear) for module in run.model.modules()) == pack


@needs_bf16
@pytest.mark.parametrize("drafter", ["chain", "tree", "lookup"])
def test_drafts_leave_every_bit_of_the_logits_as_it_is(drafter: str) -> None:
    run = Target(wide(torch.bfloat16), pack=True)
    make = {
        "chain": lambda: Kangaroo(run, make_adapter(run), EXIT, ChainConfig(max_draft=4, threshold=0)),
        "tree": lambda: KangarooTree(run, make_adapter(run), EXIT, TreeConfig(top_k=3, max_draft=4, threshold=0)),
        "lookup": lambda: PromptLookup(LookupConfig(max_draft=5, longest=1)),
    }[drafter]
    report = compare_bits(run, make, tokens=70)
    assert report.bits == 0
    assert not report.differences
    assert report.rounds.some + report.rounds.all > 0


@needs_bf16
def test_without_the_care_taken_bits_do_differ() -> None:
    """The tests above can fail: passes as transformers computes them are not exact."""
    run = Target(wide(torch.bfloat16), exact=False)
    assert run.exactness == Exactness("ties", "not asked for")
    run._exactness = Exactness("bitwise", "falsely said")
    report = compare_bits(run, lambda: PromptLookup(LookupConfig(max_draft=5, longest=1)), tokens=70)
    assert report.bits > 0
    assert "differ" in (report.problem or "")


def compare_bits(run: Target, make_drafter: Any, tokens: int) -> CheckReport:
    plain = Decoder(run, NoDrafter, None, ())  # type: ignore[arg-type]
    expected = expect(plain, PROMPTS, [Sampling(), Sampling(temperature=0.9, seed=3)], max_tokens=tokens)
    return check(Decoder(run, make_drafter, None, ()), expected, batches=[1, 3])  # type: ignore[arg-type]


def test_a_single_bit_is_noticed() -> None:
    logits = torch.randn(2, 3, 50, dtype=torch.bfloat16)
    other = logits.clone()
    other.view(torch.int16)[1, 2, 7] ^= 1
    same = digest(logits) == digest(other)
    assert same.tolist() == [[True, True, True], [True, True, False]]


# --- linears


def test_pieces_are_cut_and_filled_up() -> None:
    seen: list[int] = []

    def product(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x * 2

    x = torch.randn(10, 3)
    assert torch.equal(Rows(4, 4).apply(product, x), x * 2)
    assert seen == [4, 4, 4]
    seen.clear()
    assert torch.equal(Rows(4, 1).apply(product, x), x * 2)
    assert seen == [4, 4, 2]
    seen.clear()
    assert torch.equal(Rows(4, 3).apply(product, x), x * 2)
    assert torch.equal(Rows(4, 3).apply(product, x[:1]), x[:1] * 2)
    assert seen == [4, 4, 3, 3]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(24, 48), (64, 2112)])
def test_a_way_is_found_that_gives_rows_the_same_bits_in_any_company(shape: tuple[int, int], packed: bool) -> None:
    linear = nn.Linear(shape[1], shape[0], bias=True).requires_grad_(False)
    packs = packed and can_pack(torch.float32, CPU)
    rows = find_rows([linear], packs, Verdicts(CPU))
    assert rows is not None
    steady_linear = PackedLinear(linear, PackedProduct([linear], rows)) if packs else SteadyLinear(linear, rows)
    x = torch.randn(2, 9, shape[1]) * 100
    with computing(Pass(ways("sdpa")[0])):
        together = steady_linear(x)
        alone = [steady_linear(x[b : b + 1, n : n + 1]) for b in range(2) for n in range(9)]
    assert torch.equal(torch.cat(alone, 1).view_as(together), together)
    assert torch.allclose(together, linear(x), rtol=1e-4, atol=1e-3)


def test_a_product_whose_order_depends_on_the_number_of_rows_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fickle(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        half = x.shape[-1] // 2
        if len(x) % 3 == 2:
            return x[..., half:] @ weight[:, half:].T + x[..., :half] @ weight[:, :half].T
        return (x[..., None, :] * weight).cumsum(-1)[..., -1]

    monkeypatch.setattr(functional, "linear", fickle)
    linear = nn.Linear(48, 24, bias=False).requires_grad_(False)
    found = find_rows([linear], False, Verdicts(CPU))
    assert found is not None
    assert found.least > 1


def test_where_no_way_is_found_ties_are_all_that_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kangaroo.settle, "find_rows", lambda *_: None)
    run = Target(build("llama"))
    assert run.exactness.level == "ties"
    assert "linears of shape" in run.exactness.reason


class Leftovers(nn.Module):
    """An activation that treats the last values otherwise than the others, as vectorised ones do."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.relu().flatten()
        flat[len(flat) // 64 * 64 :] += 1e-6
        return flat.view_as(x)


def test_an_activation_that_depends_on_the_number_of_values_is_found_out() -> None:
    verdicts = Verdicts(CPU)
    assert not is_even(Leftovers(), 48, torch.float32, CPU, verdicts)
    assert is_even(Leftovers(), 64, torch.float32, CPU, verdicts)
    assert is_even(nn.ReLU(), 48, torch.float32, CPU, verdicts)


def test_nothing_is_promised_of_an_uneven_activation() -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = Leftovers()
    exactness = Target(model).exactness
    assert exactness.level == "ties"


@needs_bf16
def test_products_that_were_not_tried_are_no_promise_in_a_short_precision() -> None:
    run = Target(build("mixtral").to(torch.bfloat16))
    assert run.exactness.level == "ties"
    assert "were not tried by themselves" in run.exactness.reason


@pytest.mark.skipif(not can_pack(torch.float32, CPU), reason="this build of torch cannot pack weights")
@torch.inference_mode()
def test_packed_linears_look_like_those_they_were_made_from() -> None:
    model = wide(torch.float32)
    plain = copy.deepcopy(model)
    weights, identity = count_weights(model), Target(plain).fingerprint
    run = Target(model, pack=True)
    assert count_weights(model) == run.parameters == weights
    assert run.fingerprint == identity
    assert torch.equal(run.head.weight, plain.lm_head.weight)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    again, tokens = copy.deepcopy(model), torch.tensor([PROMPTS[0]])
    assert not any(isinstance(module, PackedLinear) for module in again.modules())
    assert torch.equal(again(tokens).logits, plain(tokens).logits)
    assert torch.allclose(model(tokens).logits, plain(tokens).logits, atol=1e-4)
    taught = make_adapter(run)
    taught.initialise(0, from_target=True)
    assert torch.equal(taught.layers[0].attention.q_proj.weight, plain.model.layers[EXIT].self_attn.q_proj.weight)  # type: ignore[union-attr]


@pytest.mark.skipif(not can_pack(torch.float32, CPU), reason="this build of torch cannot pack weights")
@torch.inference_mode()
def test_linears_that_read_the_same_are_one_product() -> None:
    made = [nn.Linear(32, out, bias=True).requires_grad_(False) for out in (16, 8, 8)]
    product = PackedProduct(made, Rows(8, 2))
    parts = [PackedLinear(linear, product, part) for part, linear in enumerate(made)]
    asked: list[int] = []
    honest = product.packed
    product.packed = cast(Packed, lambda x: asked.append(len(x)) or honest(x))
    x, other = torch.randn(1, 3, 32), torch.randn(1, 3, 32)
    for linear, part in zip(made, parts, strict=True):
        assert torch.allclose(part(x), linear(x), atol=1e-5)
    assert len(asked) == 1
    got = [parts[0](x), parts[1](other), parts[0](x), parts[2](x)]
    wanted = [made[0](x), made[1](other), made[0](x), made[2](x)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, wanted, strict=True)), "in any order, of any input"
    assert product._latest is None, "nothing is kept once all have been asked"


@pytest.mark.skipif(not can_pack(torch.float32, CPU), reason="this build of torch cannot pack weights")
@torch.inference_mode()
def test_an_adapter_that_is_to_draft_says_the_same_from_packed_weights() -> None:
    run = Target(wide(torch.float32), pack=True)
    adapter = make_adapter(run, variant="full-layer", layers=2, draft_vocabulary=20)
    x, where, got = torch.randn(1, 3, run.width), place_chain(torch.tensor([2]), 3, 5, 2), []
    shapes, names = adapter.cache_layers, list(adapter.state_dict())
    for _ in range(2):
        cache = run.new_cache(1, 8, shapes)
        got.append(adapter.logits(adapter(x, where, cache)))
        adapter.prepare()
    assert got[0].shape == (1, 3, 20)
    assert torch.allclose(*got, atol=1e-4)
    assert any(isinstance(module, PackedLinear) for module in adapter.modules())
    assert adapter.cache_layers == shapes
    assert list(adapter.state_dict()) == names


def test_a_model_that_was_passed_in_keeps_its_weights(tmp_path: Path) -> None:
    model = wide(torch.float32)
    names = list(model.state_dict())
    Target(model)
    assert list(model.state_dict()) == names
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    model.save_pretrained(tmp_path)


# --- layers in fewer calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", sorted(LIKE_LLAMA))
@torch.inference_mode()
def test_layers_of_llama_s_kind_are_fused_to_the_same_bits(family: str, dtype: torch.dtype) -> None:
    run = Target(build(family).to(dtype), pack=True)
    assert all(isinstance(layer, FusedLayer) for layer in run._run_as)
    plain = [layer._layer for layer in run._run_as]
    for batch, nodes, parents in ((1, 1, None), (2, 5, None), (2, 4, [-1, 0, 0, 1])):
        at = torch.arange(3, 3 + batch)
        where = place_chain(at, nodes, 16) if parents is None else place(at, torch.tensor([parents] * batch), 16)
        x, got = torch.randn(batch, nodes, run.width, dtype=dtype), []
        for layers in (plain, run._run_as):
            run._run_as = layers
            cache = run.new_cache(batch, 16)
            got.append([run.run(x, where, cache)[0], *cache.visible(16)[1]])
        assert all(map(torch.equal, *got))


def test_a_layer_that_does_more_is_left_as_it_is() -> None:
    model = build("llama")
    honest, watched = type(model.model.layers[0].self_attn).forward, model.model.layers[1].mlp
    model.model.layers[0].self_attn.forward = lambda *args, **more: honest(
        model.model.layers[0].self_attn, *args, **more
    )
    watched.register_forward_hook(lambda *_: None)
    run = Target(model)
    assert [isinstance(layer, FusedLayer) for layer in run._run_as[:3]] == [False, False, True]
    kept = run._run_as[2]._layer
    assert isinstance(in_fewer_calls(kept, lambda layer: [torch.ones(1)], None), FusedLayer)
    assert in_fewer_calls(kept, lambda layer: [torch.tensor(float(layer is kept))], None) is kept, "other bits"


# --- attention


def test_a_tree_reads_its_paths_in_order() -> None:
    where = place(torch.tensor([3, 2]), torch.tensor([[-1, 0, 0, 2], [-1, 0, 1, 0]]), 8)
    paths = where.paths(64)
    assert paths.shape == (2, 4, 64)
    assert paths[0, 3, :6].tolist() == [0, 1, 2, 3, 5, 6]
    assert paths[1, 2, :5].tolist() == [0, 1, 2, 3, 4]
    assert not place_chain(torch.tensor([3]), 2, 5).branches


@torch.inference_mode()
def test_targets_that_look_at_other_blocks_may_share_a_placement() -> None:
    where, run = place(torch.tensor([3]), torch.tensor([[-1, 0, 0]]), 6), Target(build("llama"))
    for way in ways("eager"):
        run.compute_by(way)
        run.run(torch.randn(1, 3, run.width, dtype=run.dtype), where, run.new_cache(1, 8))


@torch.inference_mode()
def test_what_a_family_hands_over_and_nobody_knows_is_refused_by_name() -> None:
    query = torch.randn(1, 4, 1, 8)
    mask = torch.zeros(1, 1, 1, 64)
    with pytest.raises(ModelError, match=r"'position_bias'.*exact=False"):
        attend(
            Pass(ways("sdpa")[0]), query, torch.randn(1, 2, 64, 8), torch.randn(1, 2, 64, 8), mask, position_bias=mask
        )


def test_a_family_that_does_not_use_the_interface_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.config = copy.deepcopy(model.config)  # as if it had chosen its attention beforehand
    with pytest.raises(ModelError, match=r"llama.*interface.*exact=False"):
        Target(model)
    assert Target(model, exact=False).exactness.level == "ties"


def test_attention_is_taken_from_here_within_passes_only_and_by_no_other_thread() -> None:
    model = build("llama")
    attention = model.model.layers[0].self_attn
    make_steady(attention)
    make_steady(attention)
    one, others = Pass(ways("sdpa")[0]), list[str]()
    with computing(one):
        assert attention.config._attn_implementation == NAME
        thread = threading.Thread(target=lambda: others.append(attention.config._attn_implementation))
        thread.start()
        thread.join()
    with contextlib.suppress(ZeroDivisionError), computing(one):
        others.append(attention.config._attn_implementation * (1 // 0))
    assert [attention.config._attn_implementation, *others] == ["sdpa", "sdpa"]
    assert config_of(attention) is model.config
    copied = copy.deepcopy(model)
    assert config_of(copied.model.layers[0].self_attn) is copied.config


# --- the trial and its verdicts


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    tried: list[int] = []
    honest = kangaroo.trial._compared

    def counting(run: Target) -> Iterator[bool]:
        tried.append(1)
        return honest(run)

    monkeypatch.setattr(kangaroo.trial, "_compared", counting)
    return tried


def test_a_verdict_is_kept_and_another_version_s_is_not_believed(
    counted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Target(build("llama")).exactness
    assert Target(build("llama")).exactness == first
    assert len(counted) == 1
    (file,) = (tmp_path / "cache" / "trials").glob("*.json")
    table = json.loads(file.read_text())
    table["of"]["libraries"]["torch"] = "1.0"
    file.write_text(json.dumps(table))
    assert Target(build("llama")).exactness == first
    assert len(counted) == 2
    file.write_text("{")
    assert Target(build("llama")).exactness == first
    assert len(counted) == 3
    file.write_text(file.read_text().replace('"bitwise"', '"ties"'))
    assert Target(build("llama")).exactness == first, "what was changed since is not believed either"
    assert len(counted) == 4
    monkeypatch.setattr("kangaroo.verdicts.VERSION", 0)
    Target(build("llama"))
    assert len(counted) == 5
    Target(build("llama", seed=1))
    assert len(counted) == 6, "another model is another trial"
    monkeypatch.setattr("kangaroo.verdicts.machine", lambda: {"cpu": "another", "cpu_capability": "NONE"})
    Target(build("llama", seed=1))
    assert len(counted) == 7, "another machine too"


def test_a_verdict_that_cannot_be_kept_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KANGAROO_CACHE", str(tmp_path / "file"))
    exactness = Target(build("llama")).exactness
    assert exactness.level == "bitwise"
    assert "repeated at every load" in exactness.reason


def test_rows_that_differ_arecounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kangaroo.trial, "_compared", lambda run: iter([True, False, True]))
    run = Target(build("llama"))
    assert run.exactness.level == "ties"
    assert run.exactness.reason.startswith("1 of 3 rows differed")


def test_a_trial_that_fails_half_way_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: Target) -> Iterator[bool]:
        yield True
        raise RuntimeError("could not create a primitive\nand more")

    monkeypatch.setattr(kangaroo.trial, "_compared", broken)
    with pytest.raises(ModelError, match=r"^the trial of exactness failed \(could not create a primitive\); load with"):
        Target(build("llama"))


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError])
def test_a_trial_that_is_cut_short_leaves_no_verdict(
    end: type[BaseException], tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(run: Target) -> Iterator[bool]:
        yield True
        raise end

    with monkeypatch.context() as patch:
        patch.setattr(kangaroo.trial, "_compared", cut_short)
        with pytest.raises((KeyboardInterrupt, ModelError)):
            Target(build("llama"))
    assert not list((tmp_path / "cache").rglob("*.json"))
    assert Target(build("llama")).exactness.level == "bitwise"
    assert len(counted) == 1


def test_other_threads_than_those_of_the_trial_are_no_promise() -> None:
    run = Target(build("llama"))
    assert run.exactness.level == "bitwise"
    torch.set_num_threads(2)
    assert run.exactness.level == "ties"
    assert "1 threads" in run.exactness.reason


# --- the checker


def test_other_bits_fail_a_check_of_a_bitwise_promise_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = load(save_chat_model(tmp_path) / "target", drafter="none", dtype=torch.float64)
    honest, calls = Target.logits, iter(range(10**6))
    monkeypatch.setattr(Target, "logits", lambda self, x: honest(self, x) * (1 + 1e-9 * (next(calls) % 7)))
    prompts = [decoder.tokenizer.encode("Where would you")]
    report = check(decoder, expect(decoder, prompts, [Sampling()], max_tokens=12), batches=[1])
    assert not report.differences
    assert report.bits > 0
    assert report.problem == f"the logits of {report.bits} of 12 tokens differ in some bit"
    report.exactness = Exactness("ties", "for once")
    assert "tokens were compared" in (report.problem or "")


def test_the_bound_of_a_tie_is_what_rounding_explains() -> None:
    """It grows with the unit of the precision, and holds for what rounding does to logits without being loose."""
    bounds = [tie_bound(dtype, 30, 16.0, 0.0) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    assert bounds == sorted(bounds)
    assert tie_bound(torch.float32, 30, 16.0, 0.5) == 2 * tie_bound(torch.float32, 30, 16.0, 1.0)
    precise, tokens = wide(torch.float64), torch.randint(VOCAB, (4, 40))
    with torch.inference_mode():
        exact = precise(tokens).logits
        for dtype in (torch.float32, torch.bfloat16):
            rounded = wide(dtype)(tokens).logits.double()
            bound = tie_bound(dtype, 3, float(exact.abs().max()), 0.0)
            # Each of two scores is off by one error in each of two passes.
            worst = 4 * float((rounded - exact).abs().max())
            assert bound / 30 < worst, "a bound that nothing comes near excuses anything"
            assert float((rounded - exact).abs().mean()) * 4 < bound


def test_a_tie_needs_both_a_narrow_gap_and_float64(tmp_path: Path) -> None:
    decoder = load(save_chat_model(tmp_path) / "target", drafter="none", dtype=torch.float32)
    prompt = decoder.tokenizer.encode("I need")
    tokens = decoder.generate(["I need"], max_tokens=6)[0].tokens
    wrong = [*tokens[:3], (tokens[3] + 1) % 100, *tokens[4:]]
    found = find_divergence(decoder, prompt, tokens, wrong, Sampling())
    assert found.gap > found.bound
    assert not found.is_tie
