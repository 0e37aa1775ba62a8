"""What the examples in docstrings and README.md take as imported."""

import numpy
import pytest
import torch

import semshift


@pytest.fixture(autouse=True)
def imported(doctest_namespace):
    """Add them to every example."""
    doctest_namespace.update({"np": numpy, "semshift": semshift, "torch": torch})
