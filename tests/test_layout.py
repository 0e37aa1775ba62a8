"""The house: which module may import which, what importing semshift touches, that modules name their exports."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "semshift"
MODULES = sorted(path.stem for path in SOURCE.glob("*.py") if not path.stem.startswith("_"))

# Every arrow between modules of ours. One that is not here is forbidden.
ARROWS = {
    ("pooling", "labels"),
    ("pooling", "_pooling_ops"),
    ("_pooling_ops", "labels"),
    ("_pooling_ops", "_pooling_triton"),
    ("mixing", "labels"),
    ("prototypes", "pooling"),
    ("prototypes", "distributed"),
}


def imports(path):
    """Every module that a file imports, dotted, relative ones included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "semshift" if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_arrows():
    # The package itself imports its modules.
    found = {
        (path.stem, name.split(".")[1])
        for path in SOURCE.glob("*.py")
        if path.stem != "__init__"
        for name in imports(path)
        if name.split(".")[0] == "semshift"
    }
    assert found == ARROWS


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*.py")), ids=lambda path: path.stem)
def test_dependencies(path):
    roots = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    allowed = {"torch", "numpy", "typing_extensions", "semshift"} | (
        {"triton"} if path.stem == "_pooling_triton" else set()
    )
    assert roots <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda path: path.stem)
def test_examples_use_public_names(path):
    for name in imports(path):
        if name.split(".")[0] == "semshift":
            assert not any(part.startswith("_") and part != "__version__" for part in name.split("."))


@pytest.mark.parametrize("name", MODULES)
def test_exports(name):
    module = importlib.import_module(f"semshift.{name}")
    assert len(set(module.__all__)) == len(module.__all__)
    for export in module.__all__:
        assert hasattr(module, export)
    public = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }
    assert public <= set(module.__all__)


def test_import_touches_nothing():
    probe = (
        "import sys\n"
        "def watch(event, _):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'): raise SystemExit('the network was touched')\n"
        "sys.addaudithook(watch)\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        "import semshift\n"
        # In torch 2.4 `torch.export.register_dataclass` imports Dynamo, and with it Triton.
        "old = torch.__version__.startswith('2.4.')\n"
        "assert old or 'triton' not in set(sys.modules) - before\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(semshift.__version__)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == importlib.import_module("semshift").__version__
    assert done.stderr == ""
