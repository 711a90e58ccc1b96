"""The rounds that decoding a known text would take, without decoding it.

Draft inputs are exact: whatever was accepted, the draft model's next token depends on the text alone. One pass over the
text therefore tells every token that could be drafted, and the chain's rounds follow by walking. What would be drafted
after a wrong token does not matter: it is not accepted.
"""

from collections.abc import Sequence


def chain_rounds(correct: Sequence[bool], confident: Sequence[bool], *, max_draft: int, room: int) -> list[int]:
    """Tokens emitted by each round of the confidence-stopped chain.

    correct[i] says whether token i of the answer is the draft model's own choice there, confident[i] whether that
    choice's probability reaches the threshold. The unsure token is still drafted. `room` is how many tokens decoding
    was allowed to emit, at least as many as the answer has (an end token may have ended it sooner).
    """
    assert len(correct) == len(confident) <= room
    lengths, at = [], 0
    while at < len(correct):
        limit = min(max_draft, room - at - 1, len(correct) - at)
        accepted = 0
        while accepted < limit and correct[at + accepted]:
            accepted += 1
            if not confident[at + accepted - 1]:
                break
        # An accepted end token is the last: nothing of the target's own follows it.
        lengths.append(min(accepted + 1, len(correct) - at))
        at += lengths[-1]
    return lengths


def parallel_rounds(correct: Sequence[Sequence[float]]) -> list[int]:
    """Tokens emitted by each round of a chain that is drafted whole from one state, however unsure.

    correct[i][k] says whether a round that begins at token i of the answer would draft token i + k right.
    """
    lengths, at = [], 0
    while at < len(correct):
        accepted = list(correct[at]).index(False) if False in correct[at] else len(correct[at])
        # Whether room or an end token ended the answer, its last token is the round's last.
        lengths.append(min(accepted + 1, len(correct) - at))
        at += lengths[-1]
    return lengths
