"""The map of the project: what may import what, and how long things may get.

ORDER is the order in which to read the files, and a file imports only from those above it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kangaroo

ROOT = Path(kangaroo.__file__).parent
ORDER = [
    "errors",
    "files",
    "toml",
    "memory",
    "clock",
    "environment",
    "documents",
    "suffixes",
    "datastore",
    "fingerprint",
    "demo",
    "demo.smollm2",
    "tree",
    "cache",
    "sampling",
    "state",
    "model",
    "loading",
    "weights",
    "draft_vocabulary",
    "adapter",
    "medusa",
    "parameters",
    "calibration",
    "drafters.base",
    "drafters.settings",
    "drafters.stopping",
    "drafters.chain",
    "drafters.ngrams",
    "drafters.copying",
    "drafters.self_draft",
    "drafters.self_chain",
    "drafters.costs",
    "drafters.none",
    "drafters.kangaroo",
    "drafters.kangaroo_tree",
    "drafters.kangaroo_lookup",
    "drafters.medusa",
    "drafters.draft_model",
    "drafters.prompt_lookup",
    "drafters.llma",
    "drafters.rest",
    "drafters",
    "accept",
    "decode",
    "text",
    "decoder",
    "hf",
]
USES = ["training", "bench", "serve", "export"]  # each may use everything in ORDER, and none of the others
TOP = ["terminal", "cli", "__main__"]  # may use everything above
PUBLIC = "__init__"  # the public names; inside the project nothing imports them from there
BESIDE = {("hf", "decoder")}  # two doors into the same house
FILES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


NAMES = {name_of(path) for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """Modules of this project that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("kangaroo.") for alias in node.names if is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            module = node.module or ""
            if is_ours(module):
                inner = module.removeprefix("kangaroo").removeprefix(".")
                for alias in node.names:
                    full = f"{inner}.{alias.name}".removeprefix(".")
                    yield full if full in NAMES else inner or PUBLIC


def is_ours(module: str) -> bool:
    return module == "kangaroo" or module.startswith("kangaroo.")


def group(name: str) -> str:
    return name.split(".")[0]


def may_import(name: str, other: str) -> bool:
    if name == PUBLIC:
        return other in ORDER
    if group(name) in TOP:
        above = TOP[: TOP.index(group(name)) + 1]
        return other in ORDER or group(other) in USES or group(other) in above
    if group(name) in USES:
        return other in ORDER or group(other) == group(name)
    return (name, other) not in BESIDE and other in ORDER[: ORDER.index(name)]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_only_from_above(path: Path) -> None:
    name = name_of(path)
    assert name in ORDER or group(name) in TOP or name == PUBLIC or group(name) in USES, (
        f"{name} has no place in the order"
    )
    for other in imports(path):
        assert may_import(name, other), f"{name} may not import {other}"


def test_the_rule_allows_and_forbids_what_it_should() -> None:
    assert may_import("decode", "accept")
    assert may_import("bench.check", "decoder")
    assert may_import("training.loop", "training.recipe")
    assert may_import("cli", "terminal")
    for name, other in [
        ("accept", "decode"),
        ("drafters.kangaroo", "accept"),
        ("drafters.base", "drafters.kangaroo"),
        ("bench.check", "training.loop"),
        ("hf", "decoder"),
        ("model", "adapter"),
        ("decoder", "cli"),
        ("errors", PUBLIC),
        ("training.adapter", PUBLIC),
    ]:
        assert not may_import(name, other), f"{name} imports {other}"


def test_every_name_in_the_order_is_a_file() -> None:
    assert set(ORDER) <= NAMES


def test_of_transformers_only_public_names_are_imported() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            inner = module.startswith("transformers.") and module != "transformers.utils.logging"
            assert not inner, f"{name_of(path)} imports from {module}"


def test_only_the_command_line_prints() -> None:
    for path in FILES:
        if group(name_of(path)) in TOP:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
            assert called != "print", f"{name_of(path)} prints"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is too long"
