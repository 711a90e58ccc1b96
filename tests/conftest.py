"""Settings of every test: one thread, and nothing left over from another test's threads and random numbers."""

import os
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from kangaroo.files import cache_folder

torch.set_num_threads(1)
# Nothing that an earlier run has kept is read; what this one keeps goes with it. Processes that tests start share it.
_cache = tempfile.TemporaryDirectory(prefix="kangaroo-tests-")
for _model in cache_folder().glob("smollm2-*"):  # but for the demo's model, which takes long to make
    (Path(_cache.name) / _model.name).symlink_to(_model.resolve())
os.environ["KANGAROO_CACHE"] = _cache.name
warnings.filterwarnings("ignore", module="transformers")


@pytest.fixture(autouse=True)
def _as_before_any_test() -> None:
    # With several, a process that a later test forks would wait for ever: OpenMP's own threads are not forked with it.
    torch.set_num_threads(1)
    torch.manual_seed(0)


# Speed is measured elsewhere: a busy machine must not fail a property test.
settings.register_profile("kangaroo", deadline=None)
settings.load_profile("kangaroo")
