"""The layout: which imports are forbidden, what each module exports, what importing semshift touches and costs."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

import semshift

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "semshift"
FILES = sorted(path for path in SOURCE.glob("*.py") if path.stem != "__init__")
MODULES = {path.stem for path in FILES}
PUBLIC = sorted(name for name in MODULES if not name.startswith("_"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
USERS = EXAMPLES + sorted((ROOT / "benchmarks").rglob("*.py"))


def in_file(paths):
    return pytest.mark.parametrize("path", paths, ids=[path.relative_to(ROOT).as_posix() for path in paths])


def imports(tree, path):
    """Every name that is imported, dotted and absolute, and the name that it gets."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.asname or alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folders = path.parent.relative_to(SOURCE.parent if SOURCE in path.parents else ROOT).parts
            base = folders[: len(folders) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", alias.asname or alias.name) for alias in node.names)


def used(path):
    """Every dotted name of what a file imports: the imported names themselves and the attributes asked of them."""
    tree = ast.parse(path.read_text())
    found = list(imports(tree, path))
    # What `import a.b` binds is `a`.
    bound = {local: local if full.split(".")[0] == local else full for full, local in found}
    names = {full for full, _ in found}
    for node in ast.walk(tree):
        attributes = []
        while isinstance(node, ast.Attribute):
            attributes.append(node.attr)
            node = node.value
        if attributes and isinstance(node, ast.Name) and node.id in bound:
            names.add(".".join([bound[node.id], *reversed(attributes)]))
    return names


def of_semshift(path):
    return {name for name in used(path) if name.split(".")[0] == "semshift"}


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


# Arrows that are forbidden.


@in_file(FILES)
def test_no_module_uses_the_private_names_of_another(path):
    """Private modules may be shared; what begins with an underscore within a module is its own."""
    assert not {name for name in of_semshift(path) if any(map(is_private, name.split(".")[2:]))}


@in_file(FILES)
def test_no_module_imports_the_package_itself(path):
    """Modules import from modules, or the order of imports in `__init__` would matter."""
    assert not {name for name in of_semshift(path) if name == "semshift" or name.split(".")[1] not in MODULES}


@in_file([path for path in FILES if path.stem not in ("alignment", "_adversarial")])
def test_the_parts_do_not_know_what_is_composed_of_them(path):
    assert not {name for name in of_semshift(path) if name.split(".")[1:2] in (["alignment"], ["_adversarial"])}


@in_file([path for path in FILES if not path.stem.endswith("_triton")])
def test_kernels_are_imported_by_kernels_alone(path):
    """Elsewhere `launched` imports them by their name, on the first call of an op."""
    assert not {name for name in of_semshift(path) if name.split(".")[1].endswith("_triton")}
    named = {
        f"_{node.args[0].value}_triton"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "launched"
    }
    assert named <= MODULES


def test_every_kernel_is_imported_somewhere():
    text = "".join(path.read_text() for path in FILES)
    for path in (path for path in FILES if path.stem.endswith("_triton")):
        called = path.stem.removeprefix("_").removesuffix("_triton")
        assert f'launched("{called}"' in text or f"from semshift.{path.stem} import" in text


@in_file([*FILES, SOURCE / "__init__.py"])
def test_dependencies(path):
    roots = {name.split(".")[0] for name, _ in imports(ast.parse(path.read_text()), path)}
    allowed = {"torch", "numpy", "typing_extensions", "semshift"}
    allowed |= {"triton"} if path.stem.endswith("_triton") else set()
    assert roots - set(sys.stdlib_module_names) <= allowed


@in_file(USERS)
def test_examples_and_benchmarks_use_public_names(path):
    assert not {name for name in of_semshift(path) if any(map(is_private, name.split(".")))}


@in_file([path for path in EXAMPLES if "workbench" not in path.relative_to(ROOT).parts])
def test_what_is_read_first_needs_nothing_of_the_workbench(path):
    assert not {name for name in used(path) if "workbench" in name.split(".")}


WORKBENCH = ROOT / "examples" / "workbench"
# A part of the workbench, and the parts that it may use beside the files at the top.
BELOW = {
    "data": set(),
    "networks": set(),
    "reporting": {"data", "networks"},
    "training": {"data", "networks", "reporting"},
    "studies": {"reporting"},
    "inference": {"data", "networks", "reporting", "training"},
}


@pytest.mark.parametrize("part", BELOW)
def test_arrows_of_the_workbench_go_one_way(part):
    for path in sorted((WORKBENCH / part).glob("*.py")):
        parts = {name.split(".")[2] for name in used(path) if name.startswith("examples.workbench.")}
        assert parts & set(BELOW) <= BELOW[part] | {part}, path
        assert not parts & {"__main__"}, path


@in_file([path for path in sorted(WORKBENCH.glob("*.py")) if path.stem != "__main__"])
def test_the_top_of_the_workbench_is_below_its_parts(path):
    assert not {name.split(".")[2] for name in used(path) if name.startswith("examples.workbench.")} & set(BELOW)


# Exports.


@in_file([*FILES, SOURCE / "__init__.py"])
def test_every_module_has_all(path):
    """By its text, since Triton may be missing."""
    tree = ast.parse(path.read_text())
    exports = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
    ]
    assert len(exports) == 1
    assert exports[0]
    assert len(set(exports[0])) == len(exports[0])


@pytest.mark.parametrize("name", sorted(MODULES))
def test_all_is_what_a_module_defines_in_public(name):
    if name.endswith("_triton"):
        pytest.importorskip("triton", reason="because the kernels need Triton")
    module = importlib.import_module(f"semshift.{name}")
    assert {export for export in module.__all__ if not hasattr(module, export)} == set()
    public = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }
    assert public <= set(module.__all__)


def test_the_package_exports_what_its_public_modules_do():
    exports = [name for module in PUBLIC for name in importlib.import_module(f"semshift.{module}").__all__]
    assert sorted(exports) == sorted(semshift.__all__)
    for module in PUBLIC:
        for name in importlib.import_module(f"semshift.{module}").__all__:
            assert getattr(semshift, name) is getattr(importlib.import_module(f"semshift.{module}"), name)


def test_no_public_name_is_that_of_a_module():
    """`semshift.pooling` would be one or the other, by the order of imports."""
    assert not set(semshift.__all__) & MODULES


# Importing.


def test_import_touches_nothing_and_prints_nothing():
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
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", probe], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.skipif(torch.__version__.startswith("2.4."), reason="register_dataclass of torch 2.4 imports Dynamo")
def test_import_is_quick_on_top_of_torch():
    """Of the processor's time, which other processes do not lengthen, the better of two."""
    probe = "import torch, time; before = time.process_time(); import semshift; print(time.process_time() - before)"
    took = [float(subprocess.check_output([sys.executable, "-c", probe])) for _ in range(2)]
    assert min(took) < 0.2


VALUES = {
    "AlignmentLosses": (torch.zeros(()), torch.ones(()), {"source_accuracy": torch.ones(())}),
    "ClassSums": (torch.ones(2, 3), torch.ones(2)),
    "DomainAccuracy": (torch.zeros(()), torch.ones(())),
    "FilledPrototypes": (torch.ones(2, 3), torch.ones(2, dtype=torch.bool)),
    "PseudoLabels": (torch.ones(1, 2), torch.ones(1), torch.ones(1, 2, dtype=torch.bool)),
}


def test_every_value_is_loaded_by_its_weights_only(tmp_path):
    """Checkpoints hold them, and `weights_only=True` is torch's default."""
    values = {name: getattr(semshift, name)(*arguments) for name, arguments in VALUES.items()}
    torch.save(values, tmp_path / "values.pt")
    loaded = torch.load(tmp_path / "values.pt", weights_only=True)
    for name, value in values.items():
        assert type(loaded[name]) is getattr(semshift, name)
        pairs = zip(*(pytree.tree_leaves(side) for side in (value, loaded[name])))
        assert all(torch.equal(*pair) for pair in pairs)


def test_no_value_is_forgotten():
    named = {n for n in semshift.__all__ if hasattr(getattr(semshift, n), "_fields") or n == "ClassSums"}
    assert named == set(VALUES)
