"""The demo: a real chat model, SmolLM2-135M-Instruct, an adapter for it, and evaluation prompts."""

from pathlib import Path

_HERE = Path(__file__).parent
NAME = "demo"
"""What the model is called wherever a folder or a hub name may be given."""
ADAPTER = _HERE / "adapter"
PROMPTS = _HERE / "prompts.jsonl"
FILES: dict[str, str | Path] = {"adapter": ADAPTER}
"""What drafters for it load, by the name of their setting."""
