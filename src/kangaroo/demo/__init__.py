"""What ships with the project: a small chat target, its adapter, and the evaluation prompts."""

from pathlib import Path

_HERE = Path(__file__).parent
TARGET = _HERE / "target"
ADAPTER = _HERE / "adapter"
PROMPTS = _HERE / "prompts.jsonl"
