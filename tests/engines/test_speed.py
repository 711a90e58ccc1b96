"""The table of engines' speeds in docs/export.md says what was measured."""

import json

from speed import BEGIN, DOCUMENT, END, RESULTS, Asked, figures, table

from engines import Answer


def test_the_table_follows_from_the_figures() -> None:
    written = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert written == table(json.loads(RESULTS.read_text(encoding="utf-8")))


def test_costs_are_in_the_engines_own_steps() -> None:
    def asked(seconds: float, tokens: int = 9, drafted: int = 0, accepted: int = 0) -> Asked:
        whole = Answer(tokens=[5] * tokens, seconds=seconds + 1, drafted=drafted, accepted=accepted)
        return Asked(whole, first=1.0)

    # Plain: 8 steps of 2 s. Drafted: 4 rounds of 2 drafted tokens at 0.5 s and 3 s of verifying. Alone: 0.5 s a step.
    found = figures([[1, 2]] * 2, [asked(16)] * 2, [asked(16, drafted=8, accepted=4)] * 2, [asked(4)])
    assert (found["draft step"], found["verifying"]) == (0.25, 1.5)
    assert (found["tokens a round"], found["drafted a round"], found["share accepted"]) == (2.0, 2.0, 0.5)
    assert found["speed-up"][0] == found["decoding speed-up"][0] == 1.0
    assert found["texts equal"] == "2 of 2"
