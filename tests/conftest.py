"""Markers and hypothesis profiles. `--hypothesis-profile=thorough` looks ten times longer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

# the first example of a shape may compile or import; time says nothing here
_quiet = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=30, **_quiet)
settings.register_profile("thorough", max_examples=300, **_quiet)
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def machine(monkeypatch):
    """What stands for a CUDA device (tests/machine.py)."""
    from tests.machine import in_place_of_a_device

    yield from in_place_of_a_device(monkeypatch)
