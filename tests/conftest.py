"""Settings of every test: one thread, and nothing left over from another test's random numbers."""

import os
import tempfile
import warnings

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# Nothing that an earlier run has kept is read; what this one keeps goes with it. Processes that tests start share it.
_cache = tempfile.TemporaryDirectory(prefix="kangaroo-tests-")
os.environ["KANGAROO_CACHE"] = _cache.name
warnings.filterwarnings("ignore", module="transformers")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# Speed is measured elsewhere: a busy machine must not fail a property test.
settings.register_profile("kangaroo", deadline=None)
settings.load_profile("kangaroo")
