"""The documents speak of what is there: links resolve, files named exist, lists match the code.

`python tests/test_docs.py` writes the list of modules in docs/architecture.md anew, from the first sentences of their
docstrings, in the order of `house.py`.
"""

import re
from pathlib import Path

import pytest

from house import NAMES, ORDER, TOP, USES, group, summary
from kangaroo.drafters import DRAFTERS
from kangaroo.model import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "kangaroo"
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
MODULES = re.compile(r"(?<=<!-- modules -->\n).*?(?=<!-- /modules -->)", re.DOTALL)


def render_modules() -> str:
    """Every module, in the order of imports."""
    others = [name for top in (*USES, TOP) for name in sorted(NAMES) if group(name) == top]
    rows = [f"| `{name}` | {summary(name)} |" for name in (*ORDER, *others)]
    return "\n".join(["| module | what it is |", "|---|---|", *rows]) + "\n"


def _slugs(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        linked = document.parent / name if name else document
        assert linked.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in _slugs(linked), f"{link}: there is no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_named_in_prose_exist(document: Path) -> None:
    roots = (ROOT, PACKAGE, ROOT / "tests")
    for name in re.findall(r"`([\w./-]+\.(?:py|toml|jsonl|md))`", document.read_text(encoding="utf-8")):
        found = any((root / name).exists() for root in roots) or any(PACKAGE.glob(f"**/{name}"))
        assert found, f"`{name}` is not in the repository"


def test_the_list_of_modules_matches_the_files() -> None:
    written = MODULES.search(ARCHITECTURE.read_text(encoding="utf-8"))
    assert written, "docs/architecture.md has lost its <!-- modules --> block"
    assert written[0] == render_modules(), "out of date; `make fmt` renews it"


def test_the_readmes_map_has_every_folder() -> None:
    written = README.read_text(encoding="utf-8").partition("<!-- map -->")[2].partition("<!-- /map -->")[0]
    folders = {f"{path.parent.relative_to(ROOT)}/" for path in PACKAGE.rglob("__init__.py")}
    assert folders <= set(re.findall(r"`([\w/]+/)`", written))


def test_readme_lists_every_family_and_drafter() -> None:
    text = README.read_text(encoding="utf-8")
    listed = text.partition("<!-- families -->")[2].partition("<!-- /families -->")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == FAMILIES
    assert set(DRAFTERS) <= set(re.findall(r"`([\w+-]+)`", text))


if __name__ == "__main__":
    text = ARCHITECTURE.read_text(encoding="utf-8")
    ARCHITECTURE.write_text(MODULES.sub(lambda _: render_modules(), text), encoding="utf-8")
