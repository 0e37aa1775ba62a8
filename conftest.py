"""What the examples in docstrings and README.md take as imported."""

import importlib

import numpy
import pytest
import torch


def pytest_configure():
    """Import semshift before pytest imports its modules by their paths, which would make a second copy of them.

    Not above: with torch 2.4 this imports Triton, which must find what tests/conftest.py sets.
    """
    importlib.import_module("semshift")


@pytest.fixture(autouse=True)
def imported(doctest_namespace):
    """Add them to every example."""
    semshift = importlib.import_module("semshift")
    doctest_namespace.update({"np": numpy, "semshift": semshift, "torch": torch})
