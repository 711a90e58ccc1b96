"""A second model that drafts: what it has seen, how far it goes, which it may be."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chat_model import save_chat_model
from kangaroo.decode import decode, prefill, start, step
from kangaroo.decoder import load
from kangaroo.drafters.draft_model import DraftModel, DraftModelConfig
from kangaroo.errors import ConfigError, ModelError
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import State
from kangaroo.tree import sequence
from oracle import EVERYTHING, GREEDY, oracle
from runs import PROMPTS, generate, requests
from tiny import VOCAB, build, make_draft_model, target

CONFIG = DraftModelConfig(first_draft=3, max_draft=6)


@torch.inference_mode()
def draft_logits(model: Target, text: torch.Tensor) -> torch.Tensor:
    """[N, V] of one text run in one go."""
    x, _ = model.run(model.embed(text[None]), sequence(1, len(text)), None)
    return model.logits(model.norm(x))[0]


@pytest.mark.parametrize("draft_family", ["llama", "qwen3"])
@torch.inference_mode()
def test_drafts_are_what_the_draft_model_says_of_the_whole_text(draft_family: str) -> None:
    """In every row and round, whatever was accepted before, and after rows have changed hands."""
    model = target("llama")
    draft_model = make_draft_model(model) if draft_family == "llama" else Target(build(draft_family, seed=3))
    drafter = DraftModel(draft_model, VOCAB, CONFIG)
    counts = (6, 30, 12)
    work = [requests([p], GREEDY, n)[0] for p, n in zip(PROMPTS, counts, strict=True)]
    state = start(model, drafter, work, capacity=45)
    rounds = 0
    while state.active.any():
        check_drafts(draft_model, drafter, state)
        step(model, drafter, state)
        rounds += 1
        if rounds == 8:
            state.assign(0, requests([[9, 8, 7, 6, 5]], GREEDY, 20)[0])
            prefill(model, drafter, state, torch.tensor([0]))
    assert rounds > 12


def check_drafts(draft_model: Target, drafter: DraftModel, state: State) -> None:
    draft = drafter.draft(state)
    for row in state.active.nonzero()[:, 0].tolist():
        text = torch.cat([state.tokens[row, : state.lengths[row]], draft.tokens[row]])
        said = draft_logits(draft_model, text).argmax(-1)[state.lengths[row] :]
        drafted = draft.valid[row, 1:]
        assert torch.equal(draft.tokens[row, 1:][drafted], said[:-1][drafted])


def test_a_draft_model_that_is_the_target_is_always_right() -> None:
    model = target("mistral")
    for sampling in (GREEDY, EVERYTHING, Sampling(temperature=1.5, seed=2)):
        run = generate(model, DraftModel(model, VOCAB, CONFIG), requests(PROMPTS, sampling, 30))
        assert run.texts == [oracle(model.model, p, sampling, 30) for p in PROMPTS]
        assert run.drafted[0][:3] == [3, 5, 6]  # two more each time, up to max_draft
        assert run.accepted == [n for row in run.drafted for n in row]


def test_lengths_fall_by_one_after_a_refusal_row_by_row() -> None:
    model, other = target("llama"), Target(build("llama", seed=9))
    run = generate(model, DraftModel(other, VOCAB, CONFIG), requests(PROMPTS, GREEDY, 30))
    assert run.texts == [oracle(model.model, p, GREEDY, 30) for p in PROMPTS]
    for rounds, drafted in zip(run.rounds, run.drafted, strict=True):
        length = 3
        for emitted, count in zip(rounds[:-3], drafted[:-3], strict=True):
            assert count == length
            length = min(6, length + 2) if len(emitted) > count else max(1, length - 1)
    fixed = DraftModelConfig(first_draft=3, adaptive=False)
    run = generate(model, DraftModel(other, VOCAB, fixed), requests(PROMPTS, GREEDY, 30))
    assert {count for row in run.drafted for count in row[:-3]} == {3}


def test_drafting_ends_where_the_draft_models_context_does() -> None:
    model, short = target("llama"), Target(build("llama", max_position_embeddings=16, seed=0))
    prompts = [[3, 1, 4], list(range(40))]
    run = generate(model, DraftModel(short, VOCAB, CONFIG), requests(prompts, GREEDY, 30))
    assert run.texts == [oracle(model.model, p, GREEDY, 30) for p in prompts]
    assert sum(run.drafted[0]) > 0
    assert run.drafted[0][-1] == 0
    assert sum(run.drafted[1]) == 0


@pytest.mark.parametrize("size", [90, 97, 128])
@pytest.mark.parametrize("rule", ["match", "reject"])
def test_logits_padded_to_another_size_are_cut_or_barred(size: int, rule: str) -> None:
    model, other = target("llama"), Target(build("llama", vocab_size=size))
    run = generate(model, DraftModel(other, VOCAB, CONFIG), requests(PROMPTS[::2], GREEDY, 20), rule=rule)
    assert run.texts == [oracle(model.model, p, GREEDY, 20) for p in PROMPTS[::2]]


# --- from the outside


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def test_a_draft_model_from_a_folder(chat: Path) -> None:
    decoder = load(chat / "target", drafter="draft-model", draft_model=chat / "target", dtype=torch.float64)
    plain = decoder.plain().generate(["Where?", "The answer"], max_tokens=20)
    got = decoder.generate(["Where?", "The answer"], max_tokens=20)
    assert [c.tokens for c in got] == [c.tokens for c in plain]
    assert any(answer.stats.accepted for answer in got)


def test_another_vocabulary_is_refused(chat: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat / "target")
    model = AutoModelForCausalLM.from_pretrained(chat / "target")
    model.save_pretrained(tmp_path)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="another vocabulary: token '<another>'"):
        load(chat / "target", drafter="draft-model", draft_model=tmp_path)


def test_what_cannot_draft_is_refused(chat: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs draft_model"):
        load(chat / "target", drafter="draft-model")
    with pytest.raises(ModelError, match="cannot load a causal LM"):
        load(chat / "target", drafter="draft-model", draft_model=tmp_path)
    with pytest.raises(ConfigError, match="first_draft"):
        load(chat / "target", drafter="draft-model", draft_model=chat / "target", first_draft=0)


def test_rounds_go_on_when_one_row_has_no_room() -> None:
    model = target("llama")
    work = [requests([p], GREEDY, n)[0] for p, n in zip(PROMPTS, (1, 2, 9), strict=True)]
    drafter = DraftModel(make_draft_model(model), VOCAB, CONFIG)
    state = start(model, drafter, work)
    texts: list[list[int]] = [[], [], []]
    for done in decode(model, drafter, state):
        for text, emitted in zip(texts, done.emitted, strict=True):
            text.extend(emitted)
    assert texts == [oracle(model.model, p, GREEDY, n) for p, n in zip(PROMPTS, (1, 2, 9), strict=True)]
