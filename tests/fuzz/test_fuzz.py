"""A short form of `make fuzz`: the same cases every time, some of every kind."""

import pytest

from fuzz import fuzz  # isort: skip (it says where the others are)
from place import Place
from targets import TARGETS


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_that_is_given_is_more_than_refused(name: str, place: Place) -> None:
    fuzz(place, name, cases=6, number=None)
