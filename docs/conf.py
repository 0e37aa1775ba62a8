"""How the site is built: `sphinx-build -W -n docs OUT`, without a network."""

import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx.pycode import ModuleAnalyzer

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

import semshift

project = "semshift"
author = "The semshift maintainers"
copyright = author
version = release = semshift.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["drawings"]
nitpicky = True

# Tables that `python -m examples.workbench study` writes begin with a second-level heading.
suppress_warnings = ["myst.header"]
myst_enable_extensions = ["colon_fence", "attrs_inline"]
myst_heading_anchors = 3

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "special-members": "__add__, __call__, __iter__, __len__"}
autodoc_typehints_format = "short"
maximum_signature_line_length = 72
add_module_names = False
napoleon_include_init_with_doc = False
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = f"semshift {version}"
html_static_path = ["static", "figures/logo-light.svg", "figures/logo-dark.svg"]
html_css_files = ["site.css"]
html_favicon = "figures/logo-light.svg"
html_show_sourcelink = False
html_show_copyright = False
html_theme_options = {"light_logo": "logo-light.svg", "dark_logo": "logo-dark.svg"}

# Names of others, and where they are explained: an inventory of our own, since the build has no network.
_TORCH, _PYTHON = "https://docs.pytorch.org/docs/stable/", "https://docs.python.org/3/library/"
NAMES = {
    "numpy.ndarray": "https://numpy.org/doc/stable/reference/generated/numpy.ndarray.html",
    "torch._C.Generator": f"{_TORCH}generated/torch.Generator.html",
    "torch.Generator": f"{_TORCH}generated/torch.Generator.html",
    "torch.Tensor": f"{_TORCH}tensors.html",
    "torch.distributed": f"{_TORCH}distributed.html",
    "torch.nn.modules.module.Module": f"{_TORCH}generated/torch.nn.Module.html",
    "torch.nn.Module": f"{_TORCH}generated/torch.nn.Module.html",
    "torch.nn.functional.interpolate": f"{_TORCH}generated/torch.nn.functional.interpolate.html",
    "torch.utils.data.DataLoader": f"{_TORCH}data.html#torch.utils.data.DataLoader",
    "torch.utils.data.default_collate": f"{_TORCH}data.html#torch.utils.data.default_collate",
    "None": f"{_PYTHON}constants.html#None",
    **{name: f"{_PYTHON}functions.html#{name}" for name in ("bool", "float", "int", "object")},
    **{name: f"{_PYTHON}stdtypes.html#{name}" for name in ("dict", "list", "str", "tuple")},
    **{name: f"{_PYTHON}exceptions.html#{name}" for name in ("RuntimeError", "TypeError", "ValueError")},
}
# As docstrings and signatures write them.
_SHORT = {"DistributedDataParallel": f"{_TORCH}generated/torch.nn.parallel.DistributedDataParallel.html"}
_SHORT |= {name.rsplit(".", 1)[-1]: url for name, url in NAMES.items()}
# An alias has no docstring of its own: it stands below the line that defines it.
_ALIASES = {
    f"semshift.{name}": lines
    for module in ("semshift.losses", "semshift.schedules")
    for (_, name), lines in ModuleAnalyzer.for_module(module).find_attr_docs().items()
}


def _link(app, env, node, contnode):
    """A name of others, as an outside link."""
    target = node.get("reftarget", "")
    url = NAMES.get(target) or _SHORT.get(target)
    for module in ("collections.abc", "typing"):
        if target.startswith(f"{module}."):
            url = f"{_PYTHON}{module}.html#{target}"
    if url is None:
        return None
    return nodes.reference("", "", contnode, internal=False, refuri=url, reftitle=target)


def _read_docstring(app, what, name, obj, options, lines):
    """Docstrings write code in single backticks; a public name among them becomes a link to it."""
    if what == "data":
        lines[:] = _ALIASES[name]

    def role(match):
        text = match[1]
        if text in semshift.__all__ and f"semshift.{text}" != name:
            return f":py:obj:`{text} <semshift.{text}>`"
        if text in NAMES and "." in text:
            return f":py:obj:`{text}`"
        return f"``{text}``"

    lines[:] = [re.sub(r"(?<!`)(?<!:)`([^`]+)`(?!`)", role, line) for line in lines]
    # Napoleon would take what stands before a colon for the type, which the signature has already. Of an attribute it
    # looks at the first line alone: an empty comment.
    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]
    if "Returns:" in lines:
        start = lines.index("Returns:")
        end = next((i for i in range(start + 1, len(lines)) if lines[i][:1].strip()), len(lines))
        body = [line.strip() for line in lines[start + 1 : end] if line.strip()]
        lines[start:end] = [f":returns: {body[0]}", *(f"    {line}" for line in body[1:]), ""]


def setup(app):
    """Called by Sphinx."""
    app.connect("missing-reference", _link)
    # Before napoleon, which rewrites the sections.
    app.connect("autodoc-process-docstring", _read_docstring, priority=400)
