"""What holds for every test."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read once, when torch is imported

import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs CUDA where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _end_workers() -> Iterator[None]:
    """End the worker pools, if any test started them."""
    yield
    if "tests.harness.pool" in sys.modules:
        sys.modules["tests.harness.pool"].close_pools()
