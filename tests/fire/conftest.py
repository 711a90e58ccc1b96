"""A little chat model, made once for all tests of this folder, and the one way in which a command may refuse."""

from collections.abc import Callable
from pathlib import Path

import pytest

from chat_model import save_chat_model
from command import invoke


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def model(chat: Path) -> str:
    return str(chat / "target")


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused: with exit status 2 and one line on standard error, which is returned."""

    def run(*arguments: str) -> str:
        capfd.readouterr()
        status = invoke(*arguments)
        errors = capfd.readouterr().err.splitlines()
        assert status == 2, errors
        said = [line for line in errors if line.startswith("error: ")]
        assert len(said) == 1, errors
        assert not any("Traceback" in line for line in errors)
        return said[0]

    return run


@pytest.fixture
def copy(chat: Path, tmp_path: Path) -> Path:
    """The model and its adapter, to be damaged."""
    for file in chat.rglob("*"):
        if file.is_file():
            there = tmp_path / "copy" / file.relative_to(chat)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(file.read_bytes())
    return tmp_path / "copy"
