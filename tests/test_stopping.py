"""When chains stop: calibrated confidences, and drafting on only while it pays."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chat_model import save_chat_model
from kangaroo.decode import Round, collect, decode, start, step
from kangaroo.decoder import load
from kangaroo.drafters import chain
from kangaroo.drafters.chain import Threshold
from kangaroo.drafters.kangaroo.calibration import Calibration, calibrate
from kangaroo.drafters.kangaroo.chain import ChainConfig, Kangaroo
from kangaroo.drafters.kangaroo.stopping import CostAware, DraftCosts
from kangaroo.errors import AdapterError, ConfigError
from kangaroo.sampling import Sampling
from kangaroo.state import Committed, Request, State
from kangaroo.tree import Stop, place_chain
from oracle import EVERYTHING, GREEDY, oracle
from runs import CALIBRATION, DRAFTERS, PROMPTS, drive, generate, requests
from tiny import EXIT, make_adapter, target

# --- calibration


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=200))
def test_a_calibration_rises_and_keeps_the_mean(drafted: list[tuple[float, bool]]) -> None:
    confidence, right = [c for c, _ in drafted], [r for _, r in drafted]
    found = calibrate(confidence, right)
    assert list(found.confidence) == sorted(set(found.confidence))
    assert list(found.right) == sorted(found.right)
    assert all(0 <= chance <= 1 for chance in found.right)
    between = [found.chance(i / 50) for i in range(51)]
    assert between == sorted(between)
    if len(found.right) == 1:
        assert found.right[0] == pytest.approx(sum(right) / len(right))


def test_a_calibration_finds_the_curve_that_tokens_were_drawn_from() -> None:
    confidence = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right = torch.rand(20_000, generator=torch.Generator().manual_seed(1)) < confidence**2
    found = calibrate(confidence.tolist(), right.tolist())
    assert [found.chance(c) for c in (0.2, 0.5, 0.8)] == pytest.approx([0.04, 0.25, 0.64], abs=0.04)
    assert found.after_right == pytest.approx(1 / 3, abs=0.02)


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    CALIBRATION.save(tmp_path)
    assert Calibration.load(tmp_path) == CALIBRATION
    table = json.loads((tmp_path / "calibration.json").read_text())
    (tmp_path / "calibration.json").write_text(json.dumps(table | {"confidence": [0.5, 0.5, 0.9]}))
    with pytest.raises(AdapterError, match="damaged"):
        Calibration.load(tmp_path)
    (tmp_path / "calibration.json").write_text("{")
    with pytest.raises(AdapterError, match="damaged"):
        Calibration.load(tmp_path)


# --- the rule


def goes_on(rule: CostAware, *confidences: float) -> list[bool]:
    """What the rule says of rows whose newest tokens were drafted with these confidences."""
    return rule.go_on(torch.tensor(confidences, dtype=torch.float64)).tolist()  # type: ignore[no-any-return]


def two_rows() -> State:
    model = target("llama")
    return start(model, Kangaroo(model, None, EXIT, ChainConfig()), requests(PROMPTS[:2], GREEDY, 9))


def round_over(
    state: State,
    rule: CostAware,
    emitted: list[int],
    drafted: list[int],
    confidences: tuple[list[float], ...] = ([], []),
) -> None:
    count = torch.tensor(emitted)
    where = place_chain(state.lengths, 1, state.longest + 1)
    text = [[0] * n for n in emitted]
    rule.observe(state, Committed(state.pending, where, count, {}, torch.zeros(2, 1), text, drafted, (), confidences))


@torch.inference_mode()
def test_the_rule_goes_on_while_the_next_token_is_expected_to_pay() -> None:
    """By hand: chances 0.9 after a sure token and 0.5 after an unsure one, 0.6 for a token not yet drafted."""
    state = two_rows()
    rule = CostAware(CALIBRATION, lambda _: DraftCosts(token=0.3), longest=6)
    assert rule.begin(state) == [True, True]  # 0.6 > 0.3 x 1
    assert goes_on(rule, 0.9, 0.5) == [True, False]  # 0.9 x 0.6, 0.5 x 0.6 = 0.3
    assert goes_on(rule, 0.9, 0.9) == [True, False]  # 0.81 x 0.6
    round_over(state, rule, [3, 1], [2, 2], ([0.9, 0.9], [0.5, 0.9]))
    # The first row emitted 3 for 1.6 steps: its rate is (4 + 3) / (4 + 1.6), and drafting has to beat it.
    rule.begin(state)
    # It kept 2 of a promised 1.8 tokens, the second none of a promised 0.5: chances there count (4 + 0) / (4 + 0.5).
    assert goes_on(rule, 0.7, 0.7) == [
        0.7 * 0.6 > 0.3 * 1.25,
        0.7 * 0.6 * (4 / 4.5) ** 2 > 0.3 * 5 / 5.6,
    ]


@torch.inference_mode()
@pytest.mark.parametrize(("start", "longest", "begins"), [(0.8, 6, True), (0.95, 6, False), (0.8, 2, False)])
def test_a_draft_must_make_up_for_its_start(start: float, longest: int, begins: bool) -> None:
    """Tokens at 0.1 each, right with 0.6 after one that is: 0.5 + 0.26 + 0.116 + 0.03 = 0.91, two of them 0.76."""
    rule = CostAware(CALIBRATION, lambda _: DraftCosts(token=0.1, start=start), longest)
    assert rule.begin(two_rows()) == [begins] * 2


@torch.inference_mode()
def test_where_first_tokens_are_never_right_nothing_is_drafted_for_a_while() -> None:
    state = two_rows()
    rule, begun = CostAware(CALIBRATION, lambda _: DraftCosts(token=0.4), longest=6), []
    for _ in range(40):
        goes = rule.begin(state)
        begun.append(goes[0])
        assert goes[1]  # the other row's are right
        round_over(state, rule, [1, 2], [int(goes[0]), 1])
    assert begun[0]
    assert 0 < sum(begun) < 30
    assert any(begun[-15:]), "after a while one is tried again"


@torch.inference_mode()
def test_what_drafting_costs_is_that_of_the_rows_at_hand() -> None:
    """Tokens at 0.2: of two rows the other has 0.6 of a chance to last, so that a second one costs 0.2 x 2 / 1.6."""
    state, asked = two_rows(), []

    def costs(rows: int) -> DraftCosts:
        asked.append(rows)
        return DraftCosts(token=0.2, rows=rows)

    rule = CostAware(CALIBRATION, costs, longest=6)
    assert rule.begin(state) == [True, True]  # the first costs 0.2
    assert goes_on(rule, 0.5, 0.3) == [0.5 * 0.6 > 0.25, 0.35 * 0.6 > 0.25] == [True, False]
    state.weighed = True
    assert rule.begin(state) == [True, True]
    assert goes_on(rule, 0.5, 0.3) == [True, 0.35 * 0.6 > 0.2] == [True, True]
    assert asked == [2, 1], "whoever keeps an account of rounds measures what more rows cost"


@torch.inference_mode()
@pytest.mark.parametrize(("token", "begins"), [(0.25, True), (0.35, False)])
def test_several_rows_draft_all_or_none_and_only_for_much(token: float, begins: bool) -> None:
    """Promised are 0.6 - 0.25 + 0.36 - 0.3125 + ... = 0.4 tokens a round, or 0.6 - 0.35 = 0.25."""
    rule = CostAware(CALIBRATION, lambda rows: DraftCosts(token, rows=rows), longest=6)
    state = two_rows()
    for _ in range(9):
        assert rule.begin(state)[1] == begins
        round_over(state, rule, [1, 2], [int(begins)] * 2, ([0.5], [0.5]))
    alone = CostAware(CALIBRATION, lambda _: DraftCosts(token), longest=6)
    assert alone.begin(state) == [True, True]


def test_chains_without_hope_are_not_drafted_and_say_why() -> None:
    model = target("llama")
    rule = CostAware(CALIBRATION, lambda _: DraftCosts(token=2), longest=6)
    drafter = Kangaroo(model, make_adapter(model), EXIT, ChainConfig(), rule)
    state = start(model, drafter, requests(PROMPTS, GREEDY, 6))
    with torch.inference_mode():
        draft = drafter.draft(state)
    assert draft.tokens.shape[1] == 1
    assert draft.stops == (Stop.CONFIDENCE,) * 3
    run = drive(model, drafter, state)
    assert all(count == 0 for row in run.drafted for count in row)


def test_dearer_drafts_are_shorter() -> None:
    model = target("llama")

    def drafted(cost: float) -> int:
        rule = CostAware(CALIBRATION, lambda _: DraftCosts(token=cost + 0.01), longest=6)
        drafter = Kangaroo(model, make_adapter(model), EXIT, ChainConfig(), rule)
        return sum(map(sum, generate(model, drafter, requests(PROMPTS, GREEDY, 40)).drafted))

    assert drafted(0.02) > drafted(0.2) > drafted(0.6)


def test_a_threshold_of_zero_does_not_look() -> None:
    assert not Threshold(0.0).looks
    assert Threshold(0.5).looks
    assert Threshold(0.5).go_on(torch.tensor([0.49, 0.5, 1.0])).tolist() == [False, True, True]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(0, 99))
def test_chances_are_the_same_to_the_last_bit_wherever_they_are_looked_up(looked_up: list[float], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    confidence = torch.rand(50, generator=random, dtype=torch.float64)
    curve = calibrate(confidence.tolist(), (torch.rand(50, generator=random) < confidence).tolist())
    looked_up += curve.confidence
    assert curve.chances(torch.tensor(looked_up, dtype=torch.float64)).tolist() == [curve.chance(c) for c in looked_up]


# --- where a look is dear


CHAINS = [
    "kangaroo",
    "kangaroo-auto",
    "kangaroo-deep",
    "early-exit",
    "kangaroo+lookup",
    "kangaroo+lookup-of-few",
    "eagle3",
]
HOT = Sampling(temperature=0.8, top_p=0.95, seed=3)


def rounds_of(name: str, prompts: Sequence[Sequence[int]], sampling: Sampling, rule: str) -> list[Round]:
    model = target("llama")
    drafter = DRAFTERS[name](model)
    state = start(model, drafter, [Request(p, sampling, 24 + 3 * i) for i, p in enumerate(prompts)], rule=rule)
    return [replace(done, draft_seconds=0, verify_seconds=0) for done in decode(model, drafter, state)]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("sampling", "rule"), [(GREEDY, "match"), (EVERYTHING, "match"), (HOT, "reject")])
@pytest.mark.parametrize("name", CHAINS)
def test_a_draft_is_the_same_whether_or_not_the_host_looks(
    name: str, sampling: Sampling, rule: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round by round: what was drafted, what was emitted, and why drafting stopped."""
    looking = rounds_of(name, PROMPTS[-rows:], sampling, rule)
    monkeypatch.setattr(chain, "CHEAP_READS", ())
    blind = rounds_of(name, PROMPTS[-rows:], sampling, rule)
    assert blind == looking
    assert len({drafted for done in blind for drafted in done.drafted}) > (rows > 1)
    if rule == "match":
        texts = collect(iter(blind), rows)
        for i, (text, prompt) in enumerate(zip(texts, PROMPTS[-rows:], strict=True)):
            assert text == oracle(target("llama").model, prompt, sampling, 24 + 3 * i)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.9, 1.0])
def test_a_long_draft_is_looked_at_now_and_then(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = target("llama"), PROMPTS[0]
    config = ChainConfig(max_draft=40, threshold=threshold)

    def rounds() -> tuple[list[Round], int]:
        drafter = Kangaroo(model, make_adapter(model), EXIT, config)
        state, steps = start(model, drafter, requests([prompt], GREEDY, 50)), 0
        found = []
        while state.running:
            with torch.inference_mode():
                nodes = drafter.draft(state).tokens.shape[1]
            steps = max(steps, nodes - 1)
            found.append(replace(step(model, drafter, state), draft_seconds=0, verify_seconds=0))
        return found, steps

    monkeypatch.setattr(chain, "BLIND", 4)
    looking, longest = rounds()
    monkeypatch.setattr(chain, "CHEAP_READS", ())
    blind, ran = rounds()
    assert blind == looking
    assert longest <= ran <= min(40, longest + 3)


def test_a_rule_hears_how_sure_the_drafter_was_of_every_token_and_of_no_padding() -> None:
    heard = list[tuple[Sequence[int], list[int]]]()

    class Listening(Threshold):
        def observe(self, state: State, committed: Committed) -> None:
            heard.append((committed.drafted, list(map(len, committed.confidences))))

    model = target("llama")
    generate(model, Kangaroo(model, None, EXIT, ChainConfig(), Listening(0.2)), requests(PROMPTS, GREEDY, 20))
    rounds = heard[1:]  # the first is the prompts'
    assert all(list(drafted) == confidences for drafted, confidences in rounds)
    assert any(len(set(drafted)) > 1 for drafted, _ in rounds)


# --- from the outside


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def test_auto_needs_a_calibration_and_measures_its_costs(chat: Path) -> None:
    settings = {"adapter": chat / "adapter", "dtype": torch.float64, "stop": "auto"}
    with pytest.raises(AdapterError, match="needs calibrated confidences"):
        load(chat / "target", **settings)
    CALIBRATION.save(chat / "adapter")
    decoder = load(chat / "target", **settings)
    hot = Sampling(temperature=0.9, seed=2)
    for sampling in (Sampling(), hot):
        got = decoder.generate(["Where would", "I need"], max_tokens=24, sampling=sampling)
        want = decoder.plain().generate(["Where would", "I need"], max_tokens=24, sampling=sampling)
        assert [c.tokens for c in got] == [c.tokens for c in want]


@pytest.mark.parametrize(
    ("drafter", "settings"),
    [
        ("kangaroo", {"stop": "soon"}),
        ("kangaroo", {"stop": "auto", "draft_cost": -1.0}),
        ("early-exit", {"stop": "auto"}),
    ],
)
def test_rules_that_cannot_be_are_refused(chat: Path, drafter: str, settings: dict[str, object]) -> None:
    files = {"adapter": chat / "adapter"} if drafter == "kangaroo" else {}
    with pytest.raises(ConfigError):
        load(chat / "target", drafter=drafter, **files, **settings)
