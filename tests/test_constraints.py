"""What requests forbid, and log-probabilities: the same with every drafter as without any, and as the model has it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kangaroo.constraints
from kangaroo.decode import decode, start
from kangaroo.drafters.none import NoDrafter
from kangaroo.errors import ConfigError
from kangaroo.logprobs import Logprobs, TokenLogprobs
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import Request
from oracle import EVERYTHING, GREEDY, GREEDY_PENALISED, Rule, oracle, reference_scores
from runs import DRAFTERS, PROMPTS, generate
from scripted import ScriptedDrafter
from tiny import VOCAB, target

TOKENS = 14


def no_repeats(prompt: Sequence[int], output: Sequence[int], scores: Tensor) -> Tensor:
    """Forbids the last three tokens, of prompt and output alike."""
    scores[list(dict.fromkeys([*prompt, *output][-3:]))] = -math.inf
    return scores


def parity(prompt: Sequence[int], output: Sequence[int], scores: Tensor) -> Tensor:
    """Even and odd tokens in turn, counted from the beginning of the output: what a grammar would do."""
    wrong = torch.arange(len(scores)) % 2 != len(output) % 2
    return scores.masked_fill(wrong, -math.inf)


def lifted(prompt: Sequence[int], output: Sequence[int], scores: Tensor) -> Tensor:
    """Likes what stands in the prompt."""
    scores[list(set(prompt))] += 2.0
    return scores


def requests(sampling: Sampling) -> list[Request]:
    """A ragged batch: rows of different lengths under different processors, one under none."""
    processors = (parity, no_repeats, lifted, None)
    prompts = (*PROMPTS, PROMPTS[0])
    return [Request(p, sampling, TOKENS, processor=q) for p, q in zip(prompts, processors, strict=True)]


def expected(model: Target, work: Sequence[Request], eos: Sequence[int] = ()) -> list[list[int]]:
    return [oracle(model.model, r.prompt, r.sampling, r.max_tokens, eos, rule_of(r, eos)) for r in work]


_rules: dict[tuple[object, ...], Rule] = {}


def rule_of(request: Request, eos: Sequence[int]) -> Rule:
    """The request's rules in plain Python."""
    ends = list(request.ends(eos))

    def rule(prompt: Sequence[int], output: Sequence[int], scores: Tensor) -> Tensor:
        if len(output) < request.min_tokens:
            scores = scores.index_fill(0, torch.tensor(ends), -math.inf)
        return scores if request.processor is None else request.processor(prompt, output, scores)

    return _rules.setdefault((request.min_tokens, tuple(ends), request.processor), rule)


@pytest.mark.parametrize("sampling", [GREEDY, GREEDY_PENALISED, EVERYTHING], ids=["greedy", "penalised", "sampled"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_processors_of_ones_own_act_on_every_drafted_position(drafter: str, sampling: Sampling) -> None:
    model, work = target("llama"), requests(sampling)
    want = expected(model, work)
    assert want[0] != want[3], "the processor should change something"
    run = generate(model, DRAFTERS[drafter](model), work)
    assert run.texts == want
    for row in (0, 1):
        assert generate(model, DRAFTERS[drafter](model), work[row : row + 1]).texts == [want[row]]


@pytest.mark.parametrize("branches", [1, 3], ids=["chain", "tree"])
def test_drafts_that_a_processor_allows_are_accepted(branches: int) -> None:
    model, work = target("llama"), requests(EVERYTHING)
    want = expected(model, [replace(r, max_tokens=30) for r in work])
    texts = [[*r.prompt, *text] for r, text in zip(work, want, strict=True)]
    run = generate(model, ScriptedDrafter(texts, (3, 0, 4, 1), 4, VOCAB, branches), work)
    assert run.texts == [text[:TOKENS] for text in want]
    assert sum(run.accepted) > 20


def test_a_processor_left_out_at_drafted_positions_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, work = target("llama"), requests(GREEDY)[:1]
    want = expected(model, work)
    free = oracle(model.model, PROMPTS[0], GREEDY, 40)  # as if there were no processor
    honest = kangaroo.constraints.Constraints._process

    def root_only(self: kangaroo.constraints.Constraints, scores: Tensor, prefix: object) -> Tensor:
        return torch.cat([honest(self, scores, prefix)[:, :1], scores[:, 1:]], 1)  # type: ignore[arg-type]

    texts = [[*PROMPTS[0], want[0][0], *free]]
    monkeypatch.setattr(kangaroo.constraints.Constraints, "_process", root_only)
    assert generate(model, ScriptedDrafter(texts, (4,), 4, VOCAB), work).texts != want


@pytest.mark.parametrize("sampling", [GREEDY, EVERYTHING], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_ends_of_a_rows_own_and_their_bar(drafter: str, sampling: Sampling) -> None:
    model = target("llama")
    free = [oracle(model.model, p, sampling, TOKENS) for p in PROMPTS]
    eos = (free[0][1], free[1][2], free[2][0])
    work = [
        Request(PROMPTS[0], sampling, TOKENS, min_tokens=5),
        Request(PROMPTS[1], sampling, TOKENS, ignore_eos=True, stop_token_ids=(free[1][7],)),
        Request(PROMPTS[2], sampling, TOKENS, min_tokens=3, stop_token_ids=(free[2][1], free[2][2])),
        Request(PROMPTS[0], sampling, TOKENS),
    ]
    want = expected(model, work, eos)
    want[1] = oracle(model.model, PROMPTS[1], sampling, TOKENS, (free[1][7],))
    want[2] = oracle(model.model, PROMPTS[2], sampling, TOKENS, work[2].ends(eos), rule_of(work[2], eos))
    assert len(want[0]) > 5
    assert len(want[2]) > 3
    assert want[3] == free[0][:2]
    assert generate(model, DRAFTERS[drafter](model), work, eos).texts == want


def test_a_row_that_changes_hands_takes_the_newcomers_rules() -> None:
    model, drafter = target("llama"), DRAFTERS["kangaroo"](target("llama"))
    free = oracle(model.model, PROMPTS[1], GREEDY, TOKENS)
    work = Request(PROMPTS[1], GREEDY, 9, min_tokens=4, stop_token_ids=(free[1], free[2]), processor=parity)
    state = start(model, drafter, [Request(PROMPTS[0], GREEDY, 3)], capacity=30)
    list(decode(model, drafter, state))
    state.assign(0, work)
    from kangaroo.decode import prefill

    prefill(model, drafter, state, rows=torch.tensor([0]))
    got = [token for done in decode(model, drafter, state) for token in done.emitted[0]]
    assert got == oracle(model.model, PROMPTS[1], GREEDY, 9, work.ends(()), rule_of(work, ()))


@pytest.mark.parametrize(
    ("processor", "named"),
    [
        (lambda prompt, output, scores: scores[:-1], "96"),
        (lambda prompt, output, scores: scores.float(), "float32"),
        (lambda prompt, output, scores: scores[None], "(1, 97)"),
        (lambda prompt, output, scores: None, "NoneType"),
        (lambda prompt, output, scores: scores * math.nan, "not numbers"),
        (lambda prompt, output, scores: scores + math.inf, "not numbers"),
    ],
)
def test_what_a_processor_may_not_return(processor: Callable[..., object], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        start(target("llama"), NoDrafter(), [Request([1, 2], GREEDY, 4, processor=processor)])  # type: ignore[arg-type]
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rule", ["match", "reject"])
@pytest.mark.parametrize("sampling", [GREEDY, EVERYTHING], ids=["greedy", "sampled"])
def test_a_processor_that_forbids_everything_is_refused_when_its_node_is_reached(sampling: Sampling, rule: str) -> None:
    def until_three(prompt: Sequence[int], output: Sequence[int], scores: Tensor) -> Tensor:
        return scores if len(output) < 3 else torch.full_like(scores, -math.inf)

    model = target("llama")
    for drafter in ("none", "kangaroo-fixed", "kangaroo-tree"):
        for tokens, refused in ((3, False), (4, True)):
            draft = DRAFTERS[drafter](model)
            work = [Request(PROMPTS[0], sampling, tokens, processor=until_three)]
            rounds = decode(model, draft, start(model, draft, work, rule=rule))
            if refused:
                with pytest.raises(ConfigError, match="forbids every token"):
                    list(rounds)
            else:
                assert sum(len(done.emitted[0]) for done in rounds) == 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"min_tokens": 5}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop_token_ids": (VOCAB,)}, "stop_token_ids"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
    ],
)
def test_rules_out_of_range(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        start(target("llama"), NoDrafter(), [replace(Request([1, 2], GREEDY, 4), **changes)])  # type: ignore[arg-type]


def test_a_bias_and_a_bar_that_leave_nothing_together() -> None:
    bias = {token: -math.inf for token in range(VOCAB) if token not in (3, 5)}
    request = Request([1, 2], Sampling(logit_bias=bias), 4, stop_token_ids=(3,))
    barred = replace(request, min_tokens=2)
    start(target("llama"), NoDrafter(), [request], eos=[5])
    start(target("llama"), NoDrafter(), [barred])
    with pytest.raises(ConfigError, match="every token but those that end the text"):
        start(target("llama"), NoDrafter(), [barred], eos=[5])


# --- log-probabilities


def model_logprobs(model: Target, request: Request, text: Sequence[int]) -> list[Tensor]:
    """[V] per position, by the model's own forward pass over the whole text."""
    assert request.logprobs is not None
    with torch.inference_mode():
        logits = model.model(torch.tensor([[*request.prompt, *text]]), use_cache=False).logits[0]
    found = []
    for place in range(len(text)):
        scores = logits[len(request.prompt) - 1 + place]
        if not request.logprobs.raw:
            scores = reference_scores(scores, request.prompt, text[:place], request.sampling, rule_of(request, ()))
        found.append(scores.log_softmax(-1))
    return found


@pytest.mark.parametrize("sampling", [GREEDY, GREEDY_PENALISED, EVERYTHING], ids=["greedy", "penalised", "sampled"])
@pytest.mark.parametrize(
    "drafter", ["none", "kangaroo", "kangaroo-tree", "kangaroo+lookup", "medusa-tree", "eagle3-tree", "rest"]
)
def test_logprobs_are_the_models_own_of_accepted_drafts_too(drafter: str, sampling: Sampling) -> None:
    model = target("llama")
    work = [
        Request(PROMPTS[0], sampling, TOKENS, logprobs=Logprobs(3)),
        Request(PROMPTS[1], sampling, TOKENS, logprobs=Logprobs(2, raw=True)),
        Request(PROMPTS[2], sampling, TOKENS),
        Request(PROMPTS[2], sampling, TOKENS, processor=parity, logprobs=Logprobs()),
    ]
    draft = DRAFTERS[drafter](model)
    rounds = list(decode(model, draft, start(model, draft, work)))
    for row, request in enumerate(work):
        text = [token for done in rounds for token in done.emitted[row]]
        got = [each for done in rounds if done.logprobs for each in done.logprobs[row]]
        if request.logprobs is None:
            assert got == []
            continue
        assert [each.token for each in got] == text == expected(model, [request])[0]
        for each, want in zip(got, model_logprobs(model, request, text), strict=True):
            check_position(each, want, request.logprobs.top)


def check_position(got: TokenLogprobs, want: Tensor, top: int) -> None:
    assert got.logprob == pytest.approx(float(want[got.token]), abs=1e-9)
    best = [(value, token) for value, token in zip(*want.topk(top), strict=True) if value > -math.inf]
    assert [token for token, _ in got.top] == [int(token) for _, token in best]
    assert [log for _, log in got.top] == pytest.approx([float(value) for value, _ in best], abs=1e-9)


def test_rounds_carry_no_logprobs_unless_asked() -> None:
    model, draft = target("llama"), NoDrafter()
    state = start(model, draft, [Request([1], GREEDY, 2)])
    assert [done.logprobs for done in decode(model, draft, state)] == [None, None]


@pytest.mark.parametrize("top", [-1, 1.5, True])
def test_counts_of_logprobs_that_cannot_be(top: object) -> None:
    with pytest.raises(ConfigError, match="logprobs"):
        Logprobs(top)  # type: ignore[arg-type]


def test_samplings_can_be_hashed_and_do_not_change() -> None:
    bias = {3: 1.0}
    sampling = Sampling(logit_bias=bias)
    bias[3] = 2.0
    assert sampling.logit_bias[3] == 1.0
    assert len({sampling, Sampling(logit_bias={3: 1.0}), Sampling(logit_bias=bias), Sampling()}) == 3
    assert repr(Sampling()).startswith("Sampling(logit_bias={}, repetition_penalty=1.0")
    with pytest.raises(TypeError):
        sampling.logit_bias[3] = 5.0  # type: ignore[index]
