"""The little model: 5 million parameters that the project trained itself, small enough for tests; what drafts for it.

`recipes/little/` made it, `results/little/` is what was measured on it.
"""

from pathlib import Path

LITTLE = Path(__file__).parent / "little"
TARGET = LITTLE / "target"
ADAPTER = LITTLE / "adapter"
FILES = {
    "adapter": ADAPTER,
    "heads": LITTLE / "medusa",
    "draft_model": LITTLE / "draft-model",
    "datastore": LITTLE / "datastore.rest",
}
