"""What is released: a source archive and a wheel, built as they would be uploaded, and the wheel installed."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import kangaroo
from little_model import ADAPTER, TARGET

pytest.importorskip("hatchling", reason="the package hatchling, which builds releases, is not installed")
ROOT = Path(__file__).resolve().parent.parent
LARGEST = 20_000_000
SHIPPED = (
    *("kangaroo/demo/adapter/adapter.safetensors", "kangaroo/demo/prompts.jsonl"),
    *("kangaroo/kernels.cpp", "kangaroo/products.h", "kangaroo/py.typed"),
)


def run(*command: str | Path, where: Path = ROOT) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run([*map(str, command)], cwd=where, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder)
    (archive,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return archive, wheel


def test_the_wheel_holds_the_package_and_its_adapter_and_nothing_else(built: tuple[Path, Path]) -> None:
    wheel = built[1]
    assert wheel.name == f"kangaroo_decoding-{kangaroo.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < LARGEST
    names = set(zipfile.ZipFile(wheel).namelist())
    assert set(SHIPPED) <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"kangaroo", "kangaroo_command", f"kangaroo_decoding-{kangaroo.__version__}.dist-info"}
    modules = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "kangaroo").rglob("*.py")}
    assert modules <= names


def test_the_source_archive_holds_what_the_wheel_is_built_from(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", *[f"src/{name}" for name in SHIPPED]} <= names
    assert not [name for name in names if name.startswith((".venv", "runs/")) or "__pycache__" in name]


@pytest.mark.slow
def test_the_wheel_runs_in_an_environment_of_its_own(built: tuple[Path, Path], tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", built[1])
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch and the like, not this project
    clean = ("env", "-u", "PYTHONPATH", "OMP_NUM_THREADS=1")
    found = run(*clean, python, "-c", "import kangaroo; print(kangaroo.__file__)", where=tmp_path)
    assert Path(found.strip()).is_relative_to(tmp_path)
    command = (*clean, python.with_name("kangaroo"))
    assert run(*command, "--version", where=tmp_path) == f"kangaroo {kangaroo.__version__}\n"
    options = ("--model", TARGET, "--adapter", ADAPTER, "--dtype", "float32", "--threads", "1", "--no-exact")
    assert run(*command, "generate", *options, "--prompt", "Where", "--max-tokens", "4", where=tmp_path).strip()
