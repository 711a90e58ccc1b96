"""The same promises on an accelerator."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import kangaroo
from chat_model import save_chat_model
from kangaroo.decode import decode, start, step
from kangaroo.drafters.base import Drafter
from kangaroo.graphs import StaticPasses
from kangaroo.model import Target
from kangaroo.sampling import Sampling, gumbel, mix
from kangaroo.state import Request, State
from runs import CALIBRATION
from test_graphs import passes
from tiny import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PROMPTS = ["Where would", "I need 3 tickets", "The"]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_p=0.9, presence_penalty=0.3, seed=4)])
@pytest.mark.parametrize("drafter", ["kangaroo", "kangaroo-tree", "early-exit"])
def test_texts_are_those_of_plain_decoding(tmp_path, drafter: str, sampling: Sampling) -> None:
    folder = save_chat_model(tmp_path)
    adapter = folder / "adapter" if drafter.startswith("kangaroo") else None
    decoder = kangaroo.load(folder / "target", drafter=drafter, adapter=adapter, dtype=torch.float64, threshold=0.05)
    assert decoder.target.device.type == "cuda"
    got = decoder.generate(PROMPTS, max_tokens=24, sampling=sampling)
    assert any(answer.stats.accepted for answer in got)
    for prompt, completion in zip(PROMPTS, got, strict=True):
        assert decoder.plain().generate([prompt], max_tokens=24, sampling=sampling)[0].tokens == completion.tokens


def test_the_noise_is_the_same_on_every_device() -> None:
    keys = mix(torch.arange(64).reshape(1, 32, 2))
    there = gumbel(keys.cuda(), 1000).cpu()
    torch.testing.assert_close(there, gumbel(keys, 1000), rtol=1e-12, atol=1e-12)


def test_half_precision_differences_are_ties(tmp_path) -> None:
    from kangaroo.bench.check import check, expect

    folder = save_chat_model(tmp_path)
    decoder = kangaroo.load(folder / "target", adapter=folder / "adapter", dtype=torch.bfloat16, threshold=0.05)
    prompts = [decoder.tokenizer.encode(prompt) for prompt in PROMPTS]
    report = check(decoder, expect(decoder, prompts, max_tokens=64), batches=[1, 3])
    assert all(found.is_tie for found in report.differences)


# --- graphs


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [[59], [61, 58, 70]], ids=["alone", "ragged"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_captured_passes_give_the_bits_of_others(family: str, dtype: torch.dtype, lengths: list[int]) -> None:
    target = Target(build(family).to("cuda", dtype), graphs=True)
    assert target.graphs == "on"
    captured = target.static
    assert isinstance(captured, StaticPasses)
    target.static = None
    wanted = passes(target, list(lengths))
    target.static = captured
    for _ in range(3):  # run aside, captured, replayed
        got = passes(target, list(lengths))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_p=0.9, seed=4)])
def test_texts_are_the_same_with_graphs_and_without(tmp_path: Path, sampling: Sampling) -> None:
    folder = save_chat_model(tmp_path)
    decoder = kangaroo.load(folder / "target", adapter=folder / "adapter", graphs=True, threshold=0.05)
    captured = decoder.generate(PROMPTS, max_tokens=200, sampling=sampling)
    assert len(decoder.target.static) > 0
    decoder.target.static = None
    plain = decoder.generate(PROMPTS, max_tokens=200, sampling=sampling)
    assert [answer.tokens for answer in captured] == [answer.tokens for answer in plain]


def begun(tmp_path: Path, graphs: bool, rows: int, **settings: Any) -> tuple[Target, Drafter, State]:
    """So many rounds into a text that all that is made once has been made."""
    folder = save_chat_model(tmp_path)
    CALIBRATION.save(folder / "adapter")
    decoder = kangaroo.load(folder / "target", adapter=folder / "adapter", graphs=graphs, **settings)
    target, drafter = decoder.target, decoder.make_drafter()
    hot = Sampling(temperature=0.9, top_p=0.9, presence_penalty=0.3, seed=4)
    state = start(target, drafter, [Request([5, 9, 11][: 1 + i % 3], hot, 400) for i in range(rows)])
    for _ in range(20):
        step(target, drafter, state)
    return target, drafter, state


RULES = [{"threshold": 0.3}, {"stop": "auto", "draft_cost": 0.02, "node_cost": 0.01, "start_cost": 0.01}]


@torch.inference_mode()
@pytest.mark.parametrize("settings", RULES, ids=["threshold", "auto"])
@pytest.mark.parametrize("graphs", [True, False])
def test_nothing_is_read_while_drafting(tmp_path: Path, graphs: bool, settings: dict[str, Any]) -> None:
    _, drafter, state = begun(tmp_path, graphs, 3, **settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        draft = drafter.draft(state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert draft.tokens.shape[1] > 2


@pytest.mark.parametrize("settings", RULES, ids=["threshold", "auto"])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("graphs", [True, False])
def test_a_round_waits_once(tmp_path: Path, graphs: bool, rows: int, settings: dict[str, Any]) -> None:
    target, drafter, state = begun(tmp_path, graphs, rows, **settings)
    rounds = decode(target, drafter, state)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for _ in range(5):
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                next(rounds)
            assert len([each for each in found if "synchroniz" in str(each.message)]) == 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
