"""Targets that torchao keeps in eight or four bits: adapters are taught for them, draft for them, and are exported."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import tiny
from kangaroo.decode import decode, start
from kangaroo.drafters.base import Drafter
from kangaroo.drafters.kangaroo.adapter import Adapter, AdapterConfig
from kangaroo.drafters.kangaroo.chain import ChainConfig, Kangaroo
from kangaroo.drafters.none import NoDrafter
from kangaroo.errors import ConfigError, ModelError
from kangaroo.exchange.standalone import build_standalone, load_standalone, prove
from kangaroo.fingerprint import same_model
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import Request
from kangaroo.tree import sequence

torchao = pytest.importorskip("torchao.quantization", reason="the package torchao is not installed")
STEPS, LENGTH = 60, 40
KINDS = {
    "int8": torchao.Int8WeightOnlyConfig(),
    # Of torchao's kinds with four bits, the one whose kernels need no accelerator.
    "int4": torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerAxis(0)),
}


@pytest.fixture(scope="module", params=KINDS)
def target(request: pytest.FixtureRequest) -> Target:
    model = tiny.build("llama").float()
    torchao.quantize_(model, KINDS[request.param], filter_fn=_in_layers)
    model.set_attn_implementation("eager")
    return Target(model)


def _in_layers(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def agreement(target: Target, adapter: Adapter, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The soft cross-entropy of the draft distribution, and how often its best token is the target's."""
    where = sequence(*tokens.shape)
    with torch.no_grad():
        x, states = target.run(target.embed(tokens), where, None, taps=(tiny.EXIT,))
        wanted = target.logits(target.norm(x))
    got = adapter.logits(adapter(states[tiny.EXIT], where))
    loss = functional.cross_entropy(got.flatten(0, 1), wanted.softmax(-1).flatten(0, 1))
    return loss, float((got.argmax(-1) == wanted.argmax(-1)).float().mean())


@pytest.fixture(scope="module")
def adapter(target: Target) -> Adapter:
    adapter = Adapter(target, AdapterConfig(exit_layer=tiny.EXIT, variant="full-layer"))
    adapter.initialise(0, from_target=False)
    optimiser = torch.optim.AdamW(adapter.parameters(), 1e-2)
    first = agreement(target, adapter, torch.randint(tiny.VOCAB, (4, 32)))[0]
    for _ in range(STEPS):
        loss, _ = agreement(target, adapter, torch.randint(tiny.VOCAB, (4, 32)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < first
    return adapter.eval().requires_grad_(False)


def answer(target: Target, drafter: Drafter, prompt: list[int]) -> tuple[list[int], int]:
    """Its greedy tokens, and in how many rounds they came."""
    requests = [Request(prompt, Sampling(), LENGTH)]
    rounds = list(decode(target, drafter, start(target, drafter, requests, eos=[])))
    return [token for done in rounds for token in done.emitted[0]], len(rounds)


def test_an_adapter_taught_for_it_drafts_for_it(target: Target, adapter: Adapter) -> None:
    print(f"\nweights packed by torchao: {target.exactness.level}, {target.exactness.reason}")
    prompt, chain = [5, 17, 40], ChainConfig(max_draft=4, threshold=0.0)
    plain, steps = answer(target, NoDrafter(), prompt)
    drafted, rounds = answer(target, Kangaroo(target, adapter, tiny.EXIT, chain), prompt)
    assert rounds < steps
    if drafted == plain:
        return
    # Its kernels give a token other bits in other company. Two tokens equally good to rounding are a tie; else it is a
    # mistake.
    assert target.exactness.level == "ties"
    at = next(place for place, pair in enumerate(zip(plain, drafted, strict=False)) if pair[0] != pair[1])
    logits = target.model(torch.tensor([prompt + plain[:at]])).logits[0, -1]
    assert abs(float(logits[plain[at]] - logits[drafted[at]])) < 1e-3


def test_it_is_not_packed_again(target: Target) -> None:
    again = Target(target.model, pack=True)
    assert again.exactness.level == target.exactness.level
    assert answer(again, NoDrafter(), [5, 17, 40]) == answer(target, NoDrafter(), [5, 17, 40])


def test_weights_packed_for_another_precision_are_named() -> None:
    model = tiny.build("llama").float()
    torchao.quantize_(model, KINDS["int4"], filter_fn=_in_layers)
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            module._apply(lambda tensor: tensor.bfloat16(), recurse=False)
    with pytest.raises(ModelError, match="quantised model cannot be run as it was loaded"):
        Target(model)


def test_it_is_told_from_others_by_what_is_not_quantised(target: Target) -> None:
    assert target.hides_weights
    plain = Target(tiny.build("llama").float(), exact=False)
    assert same_model(plain.fingerprint, target.fingerprint, weights_hidden=True)
    other = Target(tiny.build("llama", seed=1).float(), exact=False)
    assert not same_model(other.fingerprint, target.fingerprint, weights_hidden=True)


def test_its_layers_are_exported_unpacked_and_not_copied_into_adapters(
    target: Target, adapter: Adapter, tmp_path: Path
) -> None:
    build_standalone(adapter).save_pretrained(tmp_path)
    proof = prove(adapter, load_standalone(tmp_path, target))
    assert proof.largest < 1e-3
    with pytest.raises(ConfigError, match="quantised"):
        adapter.initialise(0, from_target=True)
