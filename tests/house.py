"""The order of the modules: the order in which to read them, and a file imports only from those above it.

The one list of its kind. What tests enforce, the README's map and the table in docs/architecture.md derive from it.
"""

import ast
from pathlib import Path

import kangaroo

ROOT = Path(kangaroo.__file__).parent

ORDER = """
    errors checks inputs files sealed toml cgroup machine chat documents
    tree cache sampling constraints logprobs state
    fingerprint norms families passes kernels linears attention window fused rotary
    verdicts parts trial settle graphs model tensors weights model_files demo demo.smollm2 gguf_file loading threads
    drafters.base drafters.settings drafters.draft_vocabulary drafters.chain drafters.branching drafters.last_states
    drafters.none drafters.draft_model
    drafters.kangaroo drafters.kangaroo.calibration drafters.kangaroo.exit_calibration
    drafters.kangaroo.adapter drafters.kangaroo.stopping
    drafters.kangaroo.self_draft drafters.kangaroo.costs drafters.kangaroo.chain drafters.kangaroo.tree
    drafters.copying drafters.copying.arrivals drafters.copying.ngrams drafters.copying.prompt_lookup
    drafters.copying.llma drafters.copying.suffixes drafters.copying.datastore drafters.copying.rest
    drafters.kangaroo.lookup
    drafters.medusa drafters.medusa.heads drafters.medusa.drafter
    drafters.eagle3 drafters.eagle3.head drafters.eagle3.drafter
    drafters
    accept decode
    stops text grammar forced completion arguments load prefixes scheduler streaming schedulers tickets
    worker engine decoder hf
""".split()  # noqa: SIM905 (a list would take 45 lines)
USES = ["training", "bench", "serve", "exchange"]
"""Folders that may use everything in ORDER, and none of one another."""
TOP = "cli"
"""May use everything, and alone prints."""
PUBLIC = "__init__"
"""The public names. Inside the project nothing imports them from there."""
BESIDE = {("hf", "decoder")}
"""Two doors into the same house."""
FILES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    """The module's name within the package: "drafters.base"; a package has its folder's."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


NAMES = {name_of(path): path for path in FILES}


def group(name: str) -> str:
    """The folder or file at the top that a module belongs to."""
    return name.split(".")[0]


def summary(name: str) -> str:
    """The first sentence of a module's docstring, without its source."""
    docstring = ast.get_docstring(ast.parse(NAMES[name].read_text(encoding="utf-8")))
    assert docstring, f"{name} has no docstring: its first sentence goes into the documents"
    return " ".join(docstring.split("\n\n")[0].split()).split(". ")[0].rstrip(".")
