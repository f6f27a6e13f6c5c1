"""Tests must not depend on how busy the machine is, nor on chance: one thread, and the same seeds before each test."""

import os
import random

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start


@pytest.fixture(autouse=True)
def seeds():
    """A network that a test draws without a seed is the same in every run, whatever ran before it."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - tests may call code that uses it
    torch.manual_seed(0)
