"""API reference: every public name has a page, an example that runs, its arguments and the errors it raises."""

import ast
import doctest
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import semshift

ROOT = Path(__file__).parent.parent.parent
TREES = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "src" / "semshift").glob("*.py")}
# Users call these methods through the class, so the docstring of the class lists their errors.
OF_THE_CLASS = ("__init__", "__post_init__", "__call__", "__add__", "__iter__", "__len__")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def top(module):
    """Functions, classes and aliases of a module by name, with those it imports from other semshift modules."""
    found = {}
    for node in TREES[module].body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            found[node.name] = (module, node)
        elif isinstance(node, ast.AnnAssign):
            found[node.target.id] = (module, node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("semshift."):
            other = node.module.split(".")[1]
            found |= {a.asname or a.name: (other, a.name) for a in node.names}
    return found


def methods(node):
    return {part.name: part for part in node.body if isinstance(part, FUNCTIONS)}


def raised(module, node, owner=None, seen=None):
    """Names of the errors that a function raises, directly or through semshift functions that it calls."""
    seen = set() if seen is None else seen
    if id(node) in seen:
        return set()
    seen.add(id(node))
    names, errors = top(module), set()
    for part in ast.walk(node):
        if isinstance(part, ast.Raise) and part.exc is not None:
            error = part.exc.func if isinstance(part.exc, ast.Call) else part.exc
            if isinstance(error, ast.Name) and error.id.endswith("Error"):
                errors.add(error.id)
        if not isinstance(part, ast.Call):
            continue
        called = part.func
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "self":
            if owner is not None and called.attr in methods(owner):
                errors |= raised(module, methods(owner)[called.attr], owner, seen)
            continue
        if isinstance(called, ast.Name) and called.id in names:
            where, what = names[called.id]
            if isinstance(what, str):
                where, what = top(where)[what]
            if isinstance(what, FUNCTIONS):
                errors |= raised(where, what, None, seen)
            elif isinstance(what, ast.ClassDef):
                for special in ("__init__", "__post_init__"):
                    if special in methods(what):
                        errors |= raised(where, methods(what)[special], what, seen)
    return errors


def docstring(module, name):
    node = top(module)[name][1]
    if not isinstance(node, ast.AnnAssign):
        return ast.get_docstring(node) or ""
    body = TREES[module].body
    after = body[body.index(node) + 1]
    return after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""


def section(text, title):
    found = re.search(rf"^{title}:\n((?:[ ]+.*\n?|\n)+)", text, flags=re.MULTILINE)
    return found[1] if found else ""


def entries(text, title):
    """Names that a section of a docstring describes: the text before the colon at its first indentation."""
    return set(re.findall(r"^ {4}(\w+): ", section(text, title), flags=re.MULTILINE))


def public(module):
    """The module's `__all__`."""
    (names,) = (
        ast.literal_eval(node.value)
        for node in TREES[module].body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    )
    return names


MODULES = sorted(module for module in TREES if not module.startswith("_"))
NAMES = [(module, name) for module in MODULES for name in public(module)]
DOCUMENTED = []
"""(name, module, node, class or None, docstring) of every public function and method."""
for module, name in NAMES:
    node = top(module)[name][1]
    if isinstance(node, FUNCTIONS):
        DOCUMENTED.append((name, module, node, None, docstring(module, name)))
    elif isinstance(node, ast.ClassDef):
        DOCUMENTED += [
            (f"{name}.{method}", module, part, node, ast.get_docstring(part) or "")
            for method, part in methods(node).items()
            if not method.startswith("_")
        ]
CLASSES = [(module, name) for module, name in NAMES if isinstance(top(module)[name][1], ast.ClassDef)]


TEXTS = [path for where in ("src/semshift/*.py", "docs/*.md", "docs/*/*.py") for path in sorted(ROOT.glob(where))]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_names_are_written_without_their_module(path):
    """`semshift.class_sums`, not `semshift.pooling.class_sums`; inside the package modules import from modules."""
    modules, names = "|".join(MODULES), "|".join(semshift.__all__)
    assert not re.search(rf"(?:`|semshift\.)(?:{modules})\.(?:{names})\b", path.read_text())
    if path.parent.name != "semshift":
        assert not re.search(rf"from semshift\.(?:{modules}) import", path.read_text())


def test_every_public_name_is_of_one_module():
    assert sorted(name for _, name in NAMES) == sorted(semshift.__all__)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_page_with_its_names(module):
    page = (ROOT / "docs" / "api" / f"{module}.md").read_text()
    assert f".. automodule:: semshift.{module}\n   :no-members:\n" in page
    table = re.search(r"^\.\. autosummary::\n   :nosignatures:\n\n((?:   \w+\n)+)", page, flags=re.MULTILINE)[1].split()
    documented = re.findall(r"^\.\. auto(?:class|data|function):: (\w+)$", page, flags=re.MULTILINE)
    assert table == documented
    assert sorted(documented) == sorted(public(module))
    # The table and the entries use `semshift.NAME`. The automodule between them would set its own module.
    assert page.split("automodule")[0].count(".. py:currentmodule:: semshift\n") == 1
    assert page.split("automodule")[1].count(".. py:currentmodule:: semshift\n") == 1
    # The page links to a guide that uses these names.
    before = re.split(r"^\.\. auto(?:class|data|function)::", page, flags=re.MULTILINE)[0]
    assert re.search(r"\]\(\.\./[\w-]+\.md[)#]", before)
    index = (ROOT / "docs" / "api" / "index.md").read_text()
    assert f"]({module}.md)" in index
    (row,) = (line for line in index.splitlines() if f"]({module}.md)" in line)
    assert re.findall(r"\{py:obj\}`~semshift\.(\w+)`", row) == table


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[name for _, name in NAMES])
def test_every_name_has_an_example_that_runs(module, name):
    text = docstring(module, name)
    assert "Example:\n" in text
    names = {"np": np, "semshift": semshift, "torch": torch}
    test = doctest.DocTestParser().get_doctest(text, names, f"semshift.{name}", None, 0)
    assert test.examples
    # Examples write `semshift.NAME`, as users do, and never a module.
    used = {used for example in test.examples for used in re.findall(r"\bsemshift\.(\w+)", example.source)}
    assert used
    assert used <= set(semshift.__all__)
    assert doctest.DocTestRunner(verbose=False).run(test).failed == 0


@pytest.mark.parametrize(("called", "module", "node", "owner", "text"), DOCUMENTED, ids=[d[0] for d in DOCUMENTED])
def test_functions_name_errors_arguments_and_results(called, module, node, owner, text):
    assert raised(module, node, owner) <= entries(text, "Raises")
    arguments = [a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs] if a.arg != "self"]
    assert arguments == sorted(entries(text, "Args"), key=lambda name: section(text, "Args").index(f"    {name}: "))
    is_property = any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)
    returns = node.returns is not None and not (isinstance(node.returns, ast.Constant) and node.returns.value is None)
    if returns and not is_property and node.name != "extra_repr":
        assert section(text, "Returns")


@pytest.mark.parametrize(("module", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_classes_name_errors_and_arguments(module, name):
    node, text = top(module)[name][1], docstring(module, name)
    parts = methods(node)
    errors = set().union(*(raised(module, parts[special], node) for special in OF_THE_CLASS if special in parts))
    assert errors <= entries(text, "Raises")
    if "__init__" in parts:
        arguments = parts["__init__"].args
        expected = {a.arg for a in [*arguments.args, *arguments.kwonlyargs]} - {"self"}
        assert entries(text, "Args") == expected
    elif any(isinstance(d, ast.Call) and getattr(d.func, "id", "") == "dataclass" for d in node.decorator_list):
        assert entries(text, "Args") == {a.target.id for a in node.body if isinstance(a, ast.AnnAssign)}
    else:
        # Each field of a named tuple has its own docstring below it.
        for field, after in zip(node.body, node.body[1:]):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(after, ast.Expr)
                assert isinstance(after.value, ast.Constant)


def test_raised_finds_errors_of_other_modules_and_of_methods():
    # A test of `raised`: an error of a private checker in another module, two calls away, and an error of a method.
    assert raised("pooling", top("pooling")["class_sums"][1]) == {"TypeError", "ValueError"}
    bank = top("prototypes")["PrototypeBank"][1]
    assert raised("prototypes", methods(bank)["means"], bank) == {"TypeError"}
    assert raised("schedules", top("schedules")["_progress"][1]) == {"TypeError", "ValueError"}
