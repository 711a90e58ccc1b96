"""What people, programs and disks put into files: values of every kind, and damage to what was whole."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

NASTY = (
    "\ud800",
    "\0",
    "a\nb",
    "\u2028",
    "x" * 5000,
    "nan",
    "-1",
    "1e999",
    "../..",
    "/dev/zero",
    "{{",
    "[bold]",
    "é",
    "",
)
texts = st.one_of(st.text(max_size=8), st.sampled_from(NASTY))
whole = st.one_of(
    st.integers(-3, 12), st.sampled_from([2**31 - 1, 2**31, 2**63, -(2**63), 2**64, 10**25, 10**400]), st.booleans()
)
numbers = st.one_of(whole, st.floats(), st.sampled_from([1e-46, 1e-300, 1e12, 1e39, 1e308, 0.5, 1.0]))
scalars = st.one_of(st.none(), numbers, texts)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
like_number = st.one_of(numbers, numbers, numbers, values)


def to_json(value: Any) -> str:
    """As JSON, numbers of hundreds of digits and half characters included."""
    return json.dumps(value)


@st.composite
def changed(draw: st.DrawFn, table: dict[str, Any]) -> dict[str, Any]:
    """A table in which some values, at any depth, are others, or gone."""
    result = copy.deepcopy(table)
    for _ in range(draw(st.integers(1, 2))):
        place: Any = result
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            if draw(st.integers(0, 4)):
                place[key] = draw(values)
            else:
                del place[key]
            break
    return result


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes of which one is flipped, or a piece is cut out, repeated, or replaced."""
    at = draw(st.integers(0, max(0, len(whole) - 1)))
    how = draw(st.integers(0, 4))
    if how == 0 and whole:
        return whole[:at] + bytes([whole[at] ^ 1 << draw(st.integers(0, 7))]) + whole[at + 1 :]
    if how == 1:
        return whole[:at]
    size = draw(st.integers(1, 40))
    if how == 2:
        return whole[:at] + whole[at + size :]
    if how == 3:
        return whole[:at] + whole[at : at + size] + whole[at:]
    return whole[:at] + draw(st.binary(max_size=size)) + whole[at + size :]
