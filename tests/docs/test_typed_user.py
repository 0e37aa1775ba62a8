"""The user's file that mypy checks: it runs, and it uses every public name, so that none goes unchecked."""

import ast
import importlib.util
import math
from pathlib import Path

import semshift

USER = Path(__file__).parent / "typed_user.py"


def test_it_runs():
    spec = importlib.util.spec_from_file_location("typed_user", USER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert math.isfinite(module.main())


def test_it_uses_every_public_name():
    tree = ast.parse(USER.read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "semshift"
    }
    assert used == set(semshift.__all__)


def test_mypy_is_told_of_it():
    settings = (Path(__file__).parent.parent.parent / "pyproject.toml").read_text()
    assert '"tests/docs/typed_user.py"' in settings.split("[tool.mypy]")[1].split("[[")[0]
