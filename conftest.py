"""What the examples in docstrings and README.md take as imported."""

import numpy
import pytest
import torch


@pytest.fixture(autouse=True)
def imported(doctest_namespace):
    """Add them to every example."""
    # Only now: with torch 2.4 this imports Triton, which must find what tests/conftest.py sets.
    import semshift

    doctest_namespace.update({"np": numpy, "semshift": semshift, "torch": torch})
