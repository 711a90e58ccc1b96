"""A short form of `make fuzz-server`: the same requests every time."""

from fuzz_server import fuzz


def test_no_request_is_more_than_refused() -> None:
    assert len(fuzz(240, None)) == 2
