"""Mistakes that other implementations have shipped: each is put in here, and the promise it breaks must notice."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kangaroo.accept
import kangaroo.drafters.chain as chain_drafter
from chat_model import save_chat_model
from distributions import BROKEN, CHANCE, sample, small_target
from kangaroo.bench.check import check, expect
from kangaroo.completion import Stats, Transcript
from kangaroo.decode import start
from kangaroo.decoder import Decoder, load
from kangaroo.drafters.base import Drafter
from kangaroo.drafters.copying.prompt_lookup import LookupConfig, PromptLookup
from kangaroo.drafters.kangaroo.chain import ChainConfig, Kangaroo
from kangaroo.drafters.none import NoDrafter
from kangaroo.sampling import Prefix, Sampler, Sampling
from kangaroo.state import State
from kangaroo.tree import Draft, Verdict
from oracle import GREEDY, oracle
from runs import PROMPTS, drive, generate, requests
from scripted import ScriptedDrafter
from tiny import VOCAB, make_adapter, target

HONEST_CHOICE, HONEST_CLIP = chain_drafter.choose, kangaroo.accept.clip
Choice = Callable[[Tensor, Tensor, State, object], tuple[Tensor, Tensor]]


def sampled_chain() -> Drafter:
    model = small_target()
    return Kangaroo(model, make_adapter(model, 1, scale=2.0), 1, ChainConfig(max_draft=2, threshold=0))


def copies() -> PromptLookup:
    """Certain drafts, often wrong."""
    return PromptLookup(LookupConfig(max_draft=2, longest=1))


# --- 1. a greedy draft scored with a softmax q


def test_greedy_drafts_scored_with_a_softmax_bias_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def misreported(logits: Tensor, tokens: Tensor, state: State, _: object) -> tuple[Tensor, Tensor]:
        return logits.argmax(-1), logits.softmax(-1)

    monkeypatch.setattr(chain_drafter, "choose", misreported)
    assert sample(sampled_chain(), "reject") > BROKEN


def test_copied_drafts_said_to_be_uncertain_bias_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sample(copies(), "reject") < CHANCE
    drafter = copies()
    honest = drafter.draft

    def misreported(state: State) -> Draft:
        draft = honest(state)
        uniform = torch.full((*draft.tokens.shape, small_target().vocab_size), 1 / small_target().vocab_size)
        return replace(draft, probs=uniform.double())

    monkeypatch.setattr(drafter, "draft", misreported)
    assert sample(drafter, "reject") > BROKEN


# --- 2. a draft drawn and scored at different temperature or precision


def scored_at_temperature_one(logits: Tensor, tokens: Tensor, state: State, _: object) -> tuple[Tensor, Tensor]:
    token, _ = HONEST_CHOICE(logits, tokens, state, None)
    return token, logits.softmax(-1)


def scored_in_eight_bits(logits: Tensor, tokens: Tensor, state: State, _: object) -> tuple[Tensor, Tensor]:
    token, q = HONEST_CHOICE(logits, tokens, state, None)
    assert q is not None
    coarse = (q * 4).round().clamp_min(1) / 4
    return token, coarse / coarse.sum(-1, keepdim=True)


@pytest.mark.parametrize("wrong", [scored_at_temperature_one, scored_in_eight_bits])
def test_drafts_scored_otherwise_than_they_were_drawn_bias_the_output(
    wrong: Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_drafter, "choose", wrong)
    assert sample(sampled_chain(), "reject") > BROKEN


# --- 3. processors applied to the target's own token but not to drafted positions


def test_processors_left_out_at_drafted_positions_change_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling = target("llama"), Sampling(min_p=0.2, temperature=0.9, repetition_penalty=1.4, logit_bias={3: 4.0})
    want = [oracle(model.model, p, sampling, 30) for p in PROMPTS]
    texts = [[*p, *text] for p, text in zip(PROMPTS, want, strict=True)]

    def run() -> list[list[int]]:
        drafter = ScriptedDrafter(texts, (2, 4, 0), 4, VOCAB)
        return generate(model, drafter, requests(PROMPTS, sampling, 30)).texts

    assert run() == want
    processed = Sampler.scores

    def last_only(self: Sampler, logits: Tensor, prefix: Prefix) -> Tensor:
        scores = processed(self, logits, prefix)
        return torch.cat([logits[:, :-1], scores[:, -1:]], 1)

    monkeypatch.setattr(Sampler, "scores", last_only)
    assert run() != want


# --- 4. output that ends too early or too late


def uncut(verdict: Verdict, draft: Draft, state: State) -> Verdict:
    return verdict


def cut_a_draft_early(verdict: Verdict, draft: Draft, state: State) -> Verdict:
    state.room = (state.room - 4).clamp_min(1) * (state.room > 0)
    return HONEST_CLIP(verdict, draft, state)


def blind_to_ends_inside(verdict: Verdict, draft: Draft, state: State) -> Verdict:
    ends, state.ends = state.ends, state.ends[:, :0]
    cut = HONEST_CLIP(verdict, draft, state)
    state.ends = ends
    return cut


@pytest.mark.parametrize("wrong", [uncut, cut_a_draft_early, blind_to_ends_inside])
def test_texts_that_end_elsewhere_are_noticed(wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model = target("llama")
    free = [oracle(model.model, p, GREEDY, 23) for p in PROMPTS]
    texts, eos = [[*p, *text] for p, text in zip(PROMPTS, free, strict=True)], (free[0][7],)
    want = [oracle(model.model, p, GREEDY, 23, eos) for p in PROMPTS]

    def run() -> Sequence[Sequence[int]]:
        drafter = ScriptedDrafter(texts, (4, 3), 4, VOCAB)
        state = start(model, drafter, requests(PROMPTS, GREEDY, 23), eos=eos, capacity=60)
        return drive(model, drafter, state).texts

    assert run() == want
    monkeypatch.setattr(sys.modules["kangaroo.decode"], "clip", wrong)
    assert run() != want


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def always_right(folder: Path) -> Decoder:
    """Drafts by the target itself: whole rounds are accepted, and stop strings fall inside them."""
    return load(folder / "target", drafter="draft-model", draft_model=folder / "target", dtype=torch.float64)


def stops_in(text: str) -> list[str]:
    """Pieces of a text, from all over it."""
    return [text[at : at + 2] for at in range(1, len(text) - 2, 4)]


def test_a_stop_string_inside_a_draft_ends_the_text_where_plain_decoding_ends_it(
    chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = always_right(chat)
    stops = stops_in(decoder.plain().generate(["I need"], max_tokens=40)[0].text)

    def answers(decoder: Decoder) -> list[kangaroo.Completion]:
        return [decoder.generate(["I need"], stop=[stop], max_tokens=40)[0] for stop in stops]

    want = answers(decoder.plain())
    assert {answer.finish_reason for answer in want} == {"stop"}
    assert [(a.text, a.tokens) for a in answers(decoder)] == [(a.text, a.tokens) for a in want]

    def whole_rounds(self: Transcript, done: kangaroo.Round, row: int) -> list[kangaroo.Piece]:
        pieces = [self._piece(token, True, None) for token in done.emitted[row]]
        reasons = [piece.finish_reason for piece in pieces if piece.finish_reason]
        if reasons:
            self._complete(reasons[0])
        return pieces

    monkeypatch.setattr(Transcript, "read", whole_rounds)
    assert [a.tokens for a in answers(decoder)] != [a.tokens for a in want]


# --- 5. tokens after the end counted as speed


def test_only_what_is_in_the_answer_counts_as_speed(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, prompts = always_right(chat), ["Where", "I need"]
    stop = stops_in(decoder.plain().generate(prompts[1:], max_tokens=40)[0].text)[:1]
    done = decoder.generate(prompts, stop=stop, max_tokens=40)
    stats = Stats.total(c.stats for c in done)
    assert stats.emitted == sum(len(c.tokens) for c in done) == sum(stats.lengths)
    assert stats.accepted == sum(sum(c.drafted) for c in done)
    honest = Stats.add

    def drafts_count_as_well(self: Stats, pieces: Sequence[kangaroo.Piece], drafted: int) -> None:
        honest(self, pieces, drafted)
        self.emitted += max(0, drafted + 1 - len(pieces))

    monkeypatch.setattr(Stats, "add", drafts_count_as_well)
    done = decoder.generate(prompts, stop=stop, max_tokens=40)
    assert Stats.total(c.stats for c in done).emitted > sum(len(c.tokens) for c in done)


# --- 6. plain decoding shown as speculation


def test_a_drafter_that_silently_drafts_nothing_does_not_pass_a_check(chat: Path) -> None:
    honest = load(chat / "target", drafter="early-exit", exit_layer=1, threshold=0.02, dtype=torch.float64)
    prompts = [honest.tokenizer.encode("I need 3 tickets")] * 30
    expected = expect(honest, prompts, [Sampling()], max_tokens=70)
    assert check(honest, expected, batches=[30]).problem is None
    fallen_back = Decoder(honest.target, NoDrafter, honest.tokenizer, honest.eos)
    problem = check(fallen_back, expected, batches=[30]).problem
    assert problem == "no drafted token was ever accepted, so nothing was tested"
