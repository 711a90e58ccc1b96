"""The documents speak of what is there: links resolve, files named exist, lists in the README match the code.

`python tests/test_docs.py` writes the README's tree of files anew, from the first sentences of the modules' docstrings.
"""

import ast
import re
from pathlib import Path

import pytest

from kangaroo.drafters import DRAFTERS
from kangaroo.model import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "kangaroo"
README = ROOT / "README.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TREE = re.compile(r"(?<=<!-- tree -->\n```\n).*?(?=```\n<!-- /tree -->)", re.DOTALL)
# The order of reading, which is the order of imports; names that are missing here come last.
ORDER = """
    errors memory files fingerprint toml environment documents tree cache sampling state model weights adapter medusa
    parameters loading suffixes datastore drafters accept decode demo text decoder hf training bench terminal cli
"""
RANK = {name: place for place, name in enumerate(ORDER.split())}
# What has no docstring to speak for it.
DATA = {
    "prompts.jsonl": "Evaluation prompts in six kinds",
    "target": "The demo target and its tokenizer",
    "adapter": "Its adapter",
    "medusa": "Its Medusa heads",
    "draft-model": "Its draft model",
    "datastore.rest": "Its datastore: what it wrote itself",
    "page.html.j2": "The template of the page",
}
WIDTH = 120


def render_tree() -> str:
    lines = ["src/kangaroo/"]
    for path in _ordered(PACKAGE):
        lines.append(_line(path, 1))
        if path.is_dir():
            lines += [_line(child, 2) for child in _ordered(path)]
    return "\n".join(lines) + "\n"


def _ordered(folder: Path) -> list[Path]:
    def rank(path: Path) -> tuple[int, str]:
        return RANK.get(path.stem, len(RANK)) if folder == PACKAGE else 0, path.name

    hidden = ("__", ".", "py.typed")
    return sorted((path for path in folder.iterdir() if not path.name.startswith(hidden)), key=rank)


def _line(path: Path, depth: int) -> str:
    source = path / "__init__.py" if path.is_dir() else path
    name = "  " * depth + path.name + ("/" if path.is_dir() else "")
    if source.suffix != ".py" or not source.is_file():
        return f"{name:<26}{DATA[path.name]}"
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
    assert docstring, f"{source.relative_to(ROOT)} has no docstring: its first sentence goes into the README"
    return f"{name:<26}{_shorten(docstring, WIDTH - 26)}"


def _shorten(docstring: str, width: int) -> str:
    """The first sentence, without its source; one that is too long ends at its last clause that fits."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    paragraph = re.sub(r" \([^()]*\d{4}[^()]*\)", "", paragraph)
    sentence = re.split(r"\.(?: |$)", paragraph, maxsplit=1)[0]
    if len(sentence) <= width:
        return sentence
    ends = [match.start() for match in re.finditer("[:;,] | ", sentence) if match.start() <= width]
    whole = [end for end in ends if sentence[:end].count("`") % 2 == 0 and "(" not in sentence[:end]]
    return sentence[: max((end for end in whole if sentence[end] != " "), default=whole[-1])]


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
        found = any((root / name).exists() for root in roots) or any(PACKAGE.glob(f"*/{name}"))
        assert found, f"`{name}` is not in the repository"


def test_readme_tree_matches_the_files() -> None:
    written = TREE.search(README.read_text(encoding="utf-8"))
    assert written, "the README has lost its <!-- tree --> block"
    assert written[0] == render_tree(), "out of date; `make fmt` renews it"


def test_readme_lists_every_family_and_drafter() -> None:
    text = README.read_text(encoding="utf-8")
    listed = text.partition("<!-- families -->")[2].partition("<!-- /families -->")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == FAMILIES
    assert set(DRAFTERS) <= set(re.findall(r"`([\w+-]+)`", text))


if __name__ == "__main__":
    README.write_text(TREE.sub(lambda _: render_tree(), README.read_text(encoding="utf-8")), encoding="utf-8")
