"""Exported drafts in the engines they are for, on SmolLM2 with the shipped adapter (`make test-engines`).

KANGAROO_ENGINE_PROMPTS and KANGAROO_ENGINE_TOKENS ask for more than the quick form does. What an engine accepts and
takes is printed: `pytest -s`. Speed is measured by speed.py beside this file.
"""

import os
from pathlib import Path

import pytest
import torch

from engines import ENGINES, FIXED, NotInstalled, Setup, preference, write_draft, write_target
from kangaroo import demo
from kangaroo.bench.questions import interleave_kinds, read_prompts
from kangaroo.decoder import Decoder, load
from kangaroo.exchange.export import export
from kangaroo.loading import load_tokenizer
from kangaroo.text import Tokenizer

pytestmark = pytest.mark.engines
PROMPTS = int(os.environ.get("KANGAROO_ENGINE_PROMPTS", "6"))
TOKENS = int(os.environ.get("KANGAROO_ENGINE_TOKENS", "32"))
TIE = 1e-3
"""Logits, of 25 or so, that single precision may put in either order."""


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = Tokenizer(load_tokenizer("demo"))
    return [tokenizer.encode(chosen.messages) for chosen in interleave_kinds(read_prompts())[:PROMPTS]]


@pytest.fixture(scope="module")
def ours(prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> tuple[float, float]:
    """The share of drafted tokens that Kangaroo itself accepts, in drafts of a fixed length: (exported, adapter).

    The adapter drafts over part of the vocabulary and the exported draft over all of it, so engines should accept what
    the first does, and come close to the second.
    """
    folder = tmp_path_factory.mktemp("ours") / "draft"
    export(demo.ADAPTER, "transformers", folder, dtype="float32")
    decoder = load("demo", dtype=torch.float32, exact=False, max_draft=FIXED, threshold=0.0)
    fixed = {"first_draft": FIXED, "max_draft": FIXED, "adaptive": False}
    exported = decoder.with_drafter("draft-model", draft_model=folder, **fixed)
    return _share(exported, prompts), _share(decoder, prompts)


def _share(decoder: Decoder, prompts: list[list[int]]) -> float:
    answers = [a for n in range(0, len(prompts), 8) for a in decoder.generate(prompts[n : n + 8], max_tokens=TOKENS)]
    drafted, accepted = (sum(getattr(a.stats, name) for a in answers) for name in ("drafted", "accepted"))
    return accepted / drafted


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engines_text_is_its_own_and_it_accepts_what_we_do(
    engine: str, prompts: list[list[int]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In single precision, so that texts part only where the engine's own rounding decides."""
    run = ENGINES[engine]
    target, draft = write_target(engine, tmp_path), write_draft(engine, tmp_path / "draft")
    try:
        with run(Setup(target=target)) as ask:
            plain = [ask(prompt, TOKENS) for prompt in prompts]
    except NotInstalled as reason:
        pytest.skip(str(reason))
    with run(Setup(target=target, draft=draft)) as ask:
        drafted = [ask(prompt, TOKENS) for prompt in prompts]
    texts = [(p, a.tokens, b.tokens) for p, a, b in zip(prompts, plain, drafted, strict=True)]
    gaps = [preference(*text) for text in texts if text[1] != text[2]]
    total = sum(answer.drafted for answer in drafted)
    share = sum(answer.accepted for answer in drafted) / total
    print(f"\n{engine}: {len(texts) - len(gaps)} of {len(texts)} texts equal, gaps of the others {gaps};")
    exported, adapter = request.getfixturevalue("ours")
    print(f"{share:.3f} of {total} drafted tokens accepted; in Kangaroo {exported:.3f}, as an adapter {adapter:.3f}")
    assert max(len(answer.tokens) for answer in plain) == TOKENS
    assert all(gap < TIE for gap in gaps)
    if engine == "openvino" and share < 0.95 * exported:
        pytest.xfail("OpenVINO accepts about a token a text less than others do, however long the text: docs/export.md")
    assert share == pytest.approx(exported, rel=0.05)
