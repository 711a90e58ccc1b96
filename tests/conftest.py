"""Settings of every test: one thread, and nothing left over from another test's random numbers."""

import warnings

import pytest
import torch

torch.set_num_threads(1)
warnings.filterwarnings("ignore", module="transformers")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
