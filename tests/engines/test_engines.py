"""Exported drafts in the engines they are for, on SmolLM2 with the shipped adapter (`make test-engines`).

KANGAROO_ENGINE_PROMPTS and KANGAROO_ENGINE_TOKENS ask for more than the quick form does. What an engine accepts and
takes is printed: `pytest -s`.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engines import FIXED, Answers, Request, ask_llama_cpp, ask_openvino, ask_transformers, ask_vllm
from kangaroo import demo
from kangaroo.bench.questions import interleave_kinds, read_prompts
from kangaroo.decoder import load
from kangaroo.demo.smollm2 import find_package_file, smollm2
from kangaroo.exchange.export import export
from kangaroo.exchange.gguf import write_gguf
from kangaroo.exchange.launch import GGUF_FILE
from kangaroo.loading import load_model, load_tokenizer

pytestmark = pytest.mark.engines
PROMPTS = int(os.environ.get("KANGAROO_ENGINE_PROMPTS", "6"))
TOKENS = int(os.environ.get("KANGAROO_ENGINE_TOKENS", "32"))
ASK: dict[str, Callable[[Request], Answers]] = {
    "transformers": ask_transformers,
    "llama.cpp": ask_llama_cpp,
    "openvino": ask_openvino,
    "vllm": ask_vllm,
}
READS_GGUF = {"llama.cpp": torch.float32, "openvino": torch.float16}
"""In which precision; OpenVINO reads no files of single precision, and computes in it all the same."""


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer("demo")
    chosen = interleave_kinds(read_prompts())[:PROMPTS]
    texts = [tokenizer.apply_chat_template(p.messages, add_generation_prompt=True, tokenize=False) for p in chosen]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def write_models(engine: str, place: Path) -> tuple[Path, Path]:
    """Target and draft as the engine reads them, to be computed in single precision: no two tokens are equally good."""
    if engine not in READS_GGUF:
        export(demo.ADAPTER, "transformers", place / "draft", dtype="float32")
        return smollm2(), place / "draft"
    kind = READS_GGUF[engine]
    export(demo.ADAPTER, "llama.cpp", place / "draft", dtype=str(kind).removeprefix("torch."))
    write_gguf(load_model("demo", kind), place / "target.gguf", load_tokenizer("demo"), find_package_file())
    return place / "target.gguf", place / "draft" / GGUF_FILE


@pytest.fixture(scope="module")
def ours(prompts: list[list[int]]) -> float:
    """The share of drafted tokens that Kangaroo itself accepts, with drafts of a fixed length."""
    decoder = load("demo", dtype=torch.float32, exact=False, max_draft=FIXED, threshold=0.0)
    answers = [decoder.generate([p], max_tokens=TOKENS, ignore_eos=True)[0] for p in prompts]
    drafted, accepted = (sum(getattr(a.stats, name) for a in answers) for name in ("drafted", "accepted"))
    return accepted / drafted


@pytest.mark.parametrize("engine", ASK)
def test_the_engines_text_is_its_own_and_it_accepts_what_we_do(
    engine: str, prompts: list[list[int]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    target, draft = write_models(engine, tmp_path)
    plain = ASK[engine](Request(target=target, draft=None, prompts=prompts, tokens=TOKENS))
    drafted = ASK[engine](Request(target=target, draft=draft, prompts=prompts, tokens=TOKENS))
    ours: float = request.getfixturevalue("ours")
    share = drafted.accepted / drafted.drafted
    print(
        f"\n{engine}: accepted {share:.3f} of {drafted.drafted} drafted (Kangaroo {ours:.3f}); "
        f"{plain.seconds:.1f} s without, {drafted.seconds:.1f} s with: {plain.seconds / drafted.seconds:.2f} times"
    )
    assert [len(answer) for answer in plain.tokens] == [TOKENS] * len(prompts)
    assert drafted.tokens == plain.tokens
    assert share == pytest.approx(ours, rel=0.05)
