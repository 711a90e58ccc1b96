"""The demo: a real chat model, SmolLM2-135M-Instruct, adapters for it, and evaluation prompts."""

from pathlib import Path

_HERE = Path(__file__).parent
NAME = "demo"
"""What the model is called wherever a folder or a hub name may be given."""
ADAPTER = _HERE / "adapter"
ADAPTERS = {"demo": ADAPTER, "demo-paper": _HERE / "adapter-paper"}
"""By the names that stand for their folders: the best one, and the paper's, one attention layer."""
PROMPTS = _HERE / "prompts.jsonl"
FILES: dict[str, str | Path] = {"adapter": ADAPTER}
"""What drafters for it load, by the name of their setting."""


def find_adapter(name: str | Path) -> Path:
    """The folder of an adapter that ships with the demo, or the folder that was named."""
    return ADAPTERS.get(str(name), Path(name))
