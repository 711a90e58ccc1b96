"""Compiled kernels: what the layers say that they stand for, with the same bits in any company."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kangaroo.kernels
from command import invoke
from kangaroo.decoder import load
from kangaroo.drafters.base import Drafter
from kangaroo.drafters.kangaroo.chain import ChainConfig, Kangaroo
from kangaroo.drafters.kangaroo.tree import KangarooTree, TreeConfig
from kangaroo.drafters.none import NoDrafter
from kangaroo.errors import ConfigError
from kangaroo.families import LIKE_LLAMA
from kangaroo.fused import OneCall
from kangaroo.kernels import COMPILERS, Kernels
from kangaroo.linears import PackedLinear
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.tree import Placement, place, place_at, place_chain
from little_model import TARGET
from oracle import GREEDY
from runs import PROMPTS, generate_ids
from tiny import EXIT, build, make_adapter

pytestmark = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler")
CPU, FILLED = torch.device("cpu"), 100
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled once for all of these tests, and not found by others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KANGAROO_CACHE", str(tmp_path_factory.mktemp("cache")))
        kangaroo.kernels._compiled.cache_clear()
        yield
    kangaroo.kernels._compiled.cache_clear()


def model(family: str, dtype: torch.dtype, **changes: Any) -> Any:
    """Of a size that vectors fit."""
    sizes = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32}
    return build(family, **(sizes | changes)).to(dtype)


@pytest.fixture(params=[None, "amx_bf16", "avx512_bf16", "avx512f"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Kernels]]:
    """Compiled for this processor, and as for one without some of its instructions."""
    lacking = request.param
    if lacking:
        facts = Path("/proc/cpuinfo")
        if not facts.is_file() or lacking not in facts.read_text():
            pytest.skip("this processor has no more to do without")
        option = "-mno-" + lacking.replace("512_", "512").replace("_", "-")
        monkeypatch.setattr(kangaroo.kernels, "_FLAGS", [*kangaroo.kernels._FLAGS, option])
        kangaroo.kernels._compiled.cache_clear()
    yield Kernels
    if lacking:
        kangaroo.kernels._compiled.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_product_gives_a_row_the_same_bits_in_any_company(kernels: type[Kernels], dtype: torch.dtype) -> None:
    compiled = kernels(dtype, CPU)
    for outer, inner in ((250, 577), (250, 576), (32, 64), (7, 1)):
        weight, bias, x = (torch.randn(*size).to(dtype) for size in ((outer, inner), (outer,), (2, 41, inner)))
        for given in (None, bias):
            product = compiled.pack(weight, given)
            exact = x.double() @ weight.double().T + (0 if given is None else given.double())
            got = product(x)
            assert ((got - exact).abs() <= 64 * torch.finfo(dtype).eps * exact.abs().clamp_min(inner**0.5)).all()
            alone = torch.cat([product(row[None]) for row in x.flatten(0, 1)])
            assert torch.equal(alone.view_as(got), got)
            for rows in range(2, 41):
                assert torch.equal(product(x[1, :rows]), got[1, :rows])
        assert torch.equal(product.dense(), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    product, x = Kernels(dtype, CPU).pack(torch.randn(500, 96).to(dtype), None), torch.randn(5, 96).to(dtype)
    got = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        got.append(product(x))
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])


def write(run: Target, drafter: Drafter, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    return generate_ids(run, drafter, prompts, sampling, max_tokens=40)


def placements(run: Target) -> Iterator[tuple[int, Placement]]:
    """Chains in rows alike and in rows of several lengths, a tree, a piece of prompts, and some of the rows."""
    yield 1, place_chain(torch.tensor([20]), 1, 21, 20)
    yield 3, place_chain(torch.tensor([20, 7, 13]), 5, 25)
    yield 2, place(torch.tensor([9, 20]), torch.tensor([[-1, 0, 0, 1, 2]] * 2), 25)
    yield 2, place_at(torch.arange(4, 24).expand(2, 20), 24, start=4, prompt=True)
    yield 2, place_chain(torch.tensor([91, 33]), 9, FILLED)
    yield 2, place(torch.tensor([70, 95]), torch.tensor([[-1, 0, 0, 1, 2]] * 2), FILLED)
    yield 1, place_at(torch.arange(40, FILLED)[None], FILLED, start=40, prompt=True)
    yield 1, place_at(torch.arange(6, 9)[None], 9, rows=torch.tensor([2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", sorted(LIKE_LLAMA))
@torch.inference_mode()
def test_a_compiled_layer_is_the_layer_but_for_rounding(
    kernels: type[Kernels], family: str, dtype: torch.dtype
) -> None:
    windowed = {"sliding_window": 8} if family == "mistral" else {}
    plain, native = (Target(model(family, precision, **windowed)) for precision in (torch.float64, dtype))
    run = Target(model(family, dtype, **windowed), compile=True)
    assert all(isinstance(layer, OneCall) for layer in run._run_as)
    for batch, where in placements(run):
        held, got = 3 if where.rows is not None else batch, []
        x = torch.randn(batch, where.positions.shape[1], run.width, dtype=torch.float64)
        for one in (plain, native, run):
            cache, random = one.new_cache(held, 128), torch.Generator().manual_seed(0)
            for tensor in (tensor for _, *pair in cache._storage for tensor in pair):
                sizes = (*tensor.shape[:3], FILLED, tensor.shape[-1])
                tensor[:, :, :, :FILLED] = torch.randn(sizes, generator=random, dtype=torch.float64)
            done, _ = one.run(x.to(one.dtype), where, cache)
            got.append([done.double(), *(side.double() for pair in cache.visible(FILLED).values() for side in pair)])
        for exact, theirs, ours in zip(*got, strict=True):
            bound = 1.5 * (theirs - exact).norm() + torch.finfo(dtype).eps * exact.norm()
            assert (ours - exact).norm() < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, top_p=0.9, seed=3)], ids=["greedy", "sampled"])
def test_texts_are_those_of_plain_decoding(dtype: torch.dtype, sampling: Sampling) -> None:
    run = Target(model("llama", dtype), compile=True)
    assert run.exactness.level == "bitwise", run.exactness
    assert "compiled" in run.exactness.reason
    adapter = make_adapter(run)
    adapter.prepare()
    plain = write(run, NoDrafter(), PROMPTS, sampling)
    for make in (
        lambda: Kangaroo(run, adapter, EXIT, ChainConfig(max_draft=4, threshold=0.0)),
        lambda: KangarooTree(run, adapter, EXIT, TreeConfig()),
    ):
        assert write(run, make(), PROMPTS, sampling) == plain
        assert [write(run, make(), [prompt], sampling)[0] for prompt in PROMPTS] == plain


@pytest.mark.parametrize("variant", ["kangaroo", "full-layer"])
@torch.inference_mode()
def test_an_adapter_drafts_the_same_from_compiled_layers(variant: Any) -> None:
    run = Target(model("llama", torch.float32), compile=True)
    adapter = make_adapter(run, variant=variant, layers=2, draft_vocabulary=20)
    shapes, got = adapter.cache_layers, []
    x, where = torch.randn(2, 3, run.width), place_chain(torch.tensor([2, 4]), 3, 8)
    for _ in range(2):
        cache = run.new_cache(2, 8, shapes)
        got.append(adapter.logits(adapter(x, where, cache)))
        adapter.prepare()
    assert all(layer._compiled is not None for layer in adapter.layers)
    assert torch.allclose(*got, atol=1e-4)


@torch.inference_mode()
def test_linears_alone_are_compiled_where_layers_are_of_another_kind() -> None:
    run, plain = Target(model("gemma2", torch.float32), compile=True), Target(model("gemma2", torch.float32))
    assert not any(isinstance(layer, OneCall) for layer in run._run_as)
    assert any(isinstance(module, PackedLinear) for module in run.model.modules())
    assert write(run, NoDrafter(), PROMPTS, GREEDY) == write(plain, NoDrafter(), PROMPTS, GREEDY)
    other = model("llama", torch.float32, hidden_act="gelu")
    assert not any(isinstance(layer, OneCall) for layer in Target(other, compile=True)._run_as)


def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    Kernels(torch.float32, CPU)
    kangaroo.kernels._compiled.cache_clear()
    monkeypatch.setattr(kangaroo.kernels, "_compile", lambda *_: pytest.fail("compiled again"))
    Kernels(torch.float32, CPU)


def _no_compiler(monkeypatch: pytest.MonkeyPatch, _: Path) -> str:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    return "there is none of c++, g++, clang++"


def _absent(monkeypatch: pytest.MonkeyPatch, _: Path) -> str:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    return "CXX names '/nowhere/c++', which is not there"


def _failing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    script = folder / "compiler"
    script.write_text("#!/bin/sh\n[ $1 = --version ] && echo 1 && exit\necho 'error: what is this?' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return "error: what is this?"


@pytest.mark.skipif(sys.platform == "win32", reason="scripts have another form there")
@pytest.mark.parametrize("break_it", [_no_compiler, _absent, _failing])
def test_without_a_compiler_it_is_refused_in_one_line(
    break_it: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kangaroo.kernels._compiled.cache_clear()
    reason = break_it(monkeypatch, tmp_path)
    with pytest.raises(ConfigError) as refused:
        Target(model("llama", torch.float32), compile=True)
    assert reason in str(refused.value)
    assert "leave compile out" in str(refused.value)
    assert "\n" not in str(refused.value)
    options = ("--model", str(TARGET), "--dtype", "float32", "--threads", "1", "--drafter", "none", "--compile")
    capfd.readouterr()
    assert invoke("generate", *options, "--prompt", "x") == 2
    assert capfd.readouterr().err.splitlines() == [f"error: {refused.value}"]


def test_it_is_for_what_it_knows() -> None:
    with pytest.raises(ConfigError, match="float32 or bfloat16, got float64 on cpu"):
        load(model("llama", torch.float64), compile=True, drafter="none", tokenizer=object())


def test_other_users_of_the_model_get_what_they_got() -> None:
    shared, tokens = model("llama", torch.float32), torch.tensor([PROMPTS[0]])
    with torch.inference_mode():
        before = shared(tokens).logits
        Target(shared, compile=True)
        assert torch.allclose(shared(tokens).logits, before, atol=1e-4)
    assert not any(type(module) is nn.Linear for module in shared.model.layers.modules())
