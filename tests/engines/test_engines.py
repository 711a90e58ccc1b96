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
READS_GGUF = ("llama.cpp", "openvino")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer("demo")
    chosen = interleave_kinds(read_prompts())[:PROMPTS]
    texts = [tokenizer.apply_chat_template(p.messages, add_generation_prompt=True, tokenize=False) for p in chosen]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Target and draft in single precision, where no engine's kernels make two tokens equally good."""
    place = tmp_path_factory.mktemp("engines")
    export(demo.ADAPTER, "transformers", place / "draft", dtype="float32")
    export(demo.ADAPTER, "llama.cpp", place / "gguf", dtype="float32")
    target = load_model("demo", torch.float32)
    write_gguf(target, place / "target.gguf", load_tokenizer("demo"), find_package_file())
    gguf = {"target.gguf": place / "target.gguf", "draft.gguf": place / "gguf" / GGUF_FILE}
    return {"target": smollm2(), "draft": place / "draft", **gguf}


@pytest.fixture(scope="module")
def ours(prompts: list[list[int]]) -> float:
    """The share of drafted tokens that Kangaroo itself accepts, with drafts of a fixed length."""
    decoder = load("demo", dtype=torch.float32, exact=False, max_draft=FIXED, threshold=0.0)
    answers = [decoder.generate([p], max_tokens=TOKENS, ignore_eos=True)[0] for p in prompts]
    drafted, accepted = (sum(getattr(a.stats, name) for a in answers) for name in ("drafted", "accepted"))
    return accepted / drafted


@pytest.mark.parametrize("engine", ASK)
def test_the_engines_text_is_its_own_and_it_accepts_what_we_do(
    engine: str, prompts: list[list[int]], models: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    end = ".gguf" if engine in READS_GGUF else ""
    asked = {"target": models["target" + end], "prompts": prompts, "tokens": TOKENS}
    plain = ASK[engine](Request(draft=None, **asked))  # type: ignore[arg-type]
    drafted = ASK[engine](Request(draft=models["draft" + end], **asked))  # type: ignore[arg-type]
    ours: float = request.getfixturevalue("ours")
    share = drafted.accepted / drafted.drafted
    print(
        f"\n{engine}: accepted {share:.3f} of {drafted.drafted} drafted (Kangaroo {ours:.3f}); "
        f"{plain.seconds:.1f} s without, {drafted.seconds:.1f} s with: {plain.seconds / drafted.seconds:.2f} times"
    )
    assert [len(answer) for answer in plain.tokens] == [TOKENS] * len(prompts)
    assert drafted.tokens == plain.tokens
    assert share == pytest.approx(ours, rel=0.05)
