"""What ships with the project: a small chat target, what drafts for it, and the evaluation prompts."""

from pathlib import Path

_HERE = Path(__file__).parent
TARGET = _HERE / "target"
ADAPTER = _HERE / "adapter"
PROMPTS = _HERE / "prompts.jsonl"
FILES: dict[str, str | Path] = {
    "adapter": ADAPTER,
    "heads": _HERE / "medusa",
    "draft_model": _HERE / "draft-model",
    "datastore": _HERE / "datastore.rest",
}
"""What each kind of drafter needs, by the name of its setting."""
