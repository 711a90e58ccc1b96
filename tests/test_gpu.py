"""The same promises on an accelerator."""

import pytest
import torch

import kangaroo
from chat_model import save_chat_model
from kangaroo.sampling import Sampling, gumbel, mix

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
