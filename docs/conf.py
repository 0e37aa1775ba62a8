"""Sphinx configuration: `sphinx-build -W -n docs OUT` builds the site without a network."""

import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.images import get_image_size

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

# The pages that `python -m examples.workbench study` writes begin with a second-level heading.
suppress_warnings = ["myst.header"]
myst_enable_extensions = ["colon_fence", "attrs_inline"]
myst_heading_anchors = 3

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_default_options = {
    "members": True,
    "special-members": "__add__, __call__, __iter__, __len__",
    "exclude-members": "extra_repr",
}
autodoc_typehints_format = "short"
# No signature is that long: `_lay_out_signatures` decides which ones break.
maximum_signature_line_length = 10_000
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

# Where names of other libraries are documented. The build has no network, so it cannot download their inventories.
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
# The same names as docstrings and signatures write them, without their module.
_SHORT = {"DistributedDataParallel": f"{_TORCH}generated/torch.nn.parallel.DistributedDataParallel.html"}
_SHORT |= {name.rsplit(".", 1)[-1]: url for name, url in NAMES.items()}
# The docstrings of type aliases, which stand below the line that defines the alias.
_ALIASES = {
    f"semshift.{name}": lines
    for module in ("semshift.losses", "semshift.schedules")
    for (_, name), lines in ModuleAnalyzer.for_module(module).find_attr_docs().items()
}


def _link(app, env, node, contnode):
    """Link a name of another library to its documentation."""
    target = node.get("reftarget", "")
    url = NAMES.get(target) or _SHORT.get(target)
    for module in ("collections.abc", "typing"):
        if target.startswith(f"{module}."):
            url = f"{_PYTHON}{module}.html#{target}"
    if url is None:
        return None
    return nodes.reference("", "", contnode, internal=False, refuri=url, reftitle=target)


def _read_docstring(app, what, name, obj, options, lines):
    """Turn code in single backticks into links where it is a public name, and into plain code elsewhere."""
    if what == "data":
        lines[:] = _ALIASES[name]

    def role(match):
        text = match[1]
        if text in semshift.__all__ and f"semshift.{text}" != name:
            return f":py:obj:`{text} <semshift.{text}>`"
        if text in NAMES and "." in text:
            return f":py:obj:`{text}`"
        if page := re.fullmatch(r"docs/([\w-]+)\.md", text):
            return f":doc:`/{page[1]}`"
        return f"``{text}``"

    lines[:] = [re.sub(r"(?<!`)(?<!:)`([^`]+)`(?!`)", role, line) for line in lines]
    # Napoleon would read text before a colon as a type, but the signature already gives the type. Napoleon checks only
    # the first line of an attribute's docstring, so this adds an empty comment above that line.
    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]
    if "Returns:" in lines:
        start = lines.index("Returns:")
        end = next((i for i in range(start + 1, len(lines)) if lines[i][:1].strip()), len(lines))
        body = [line.strip() for line in lines[start + 1 : end] if line.strip()]
        lines[start:end] = [f":returns: {body[0]}", *(f"    {line}" for line in body[1:]), ""]


# How users call the special methods.
_CALLS = {
    "__add__": "sums + other",
    "__call__": "schedule",
    "__iter__": "iter(sampler)",
    "__len__": "len(sampler)",
}
# The longest signature that fits on one line in a window 1280 pixels wide, beside the link to the source.
_COLUMNS = 98


def _lay_out_signatures(app, doctree):
    """Break the signatures that do not fit on one line, and show special methods as calls.

    Sphinx itself would measure the full text, with `~torch.Tensor` for `Tensor`, and break signatures that fit.
    """
    index = app.env.get_domain("index").entries
    index[app.env.docname] = [entry for entry in index[app.env.docname] if not entry[1].startswith("__")]
    for signature in doctree.findall(addnodes.desc_signature):
        columns = len(signature.astext())
        for parameters in signature.findall(addnodes.desc_parameterlist):
            parameters["multi_line_parameter_list"] = columns > _COLUMNS
        for name in signature.findall(addnodes.desc_name):
            call = _CALLS.get(name.astext())
            if call is None:
                continue
            name.children = [addnodes.desc_sig_name(call, call)]
            for parameters in list(signature.findall(addnodes.desc_parameterlist)):
                if call != "schedule":
                    parameters.parent.remove(parameters)
            signature["_toc_name"] = f"{call}()" if call == "schedule" else call


def _keep_units_together(app, doctree):
    """Keep `36 ms`, `64 x 96` and `1.2 ± 0.3` on one line."""
    for text in list(doctree.findall(nodes.Text)):
        tied = re.sub(r"(\d) ([x±]) (?=\d)", "\\1\u00a0\\2\u00a0", text)
        tied = re.sub(r"(\d) (?=(?:%|ms|s|MB|MiB|GB)(?!\w))", "\\1\u00a0", tied)
        if tied != text and not isinstance(text.parent, (nodes.literal, nodes.FixedTextElement)):
            text.parent.replace(text, nodes.Text(tied))


def _keep_short_code_together(app, doctree):
    """Mark code of a few words, such as `train --check`, so that the browser does not break it."""
    for code in doctree.findall(nodes.literal):
        if len(code.astext()) <= 40:
            code["classes"].append("short")


def _prepare_tables(app, doctree):
    """Mark short cells of tables of numbers, and let a table of text become a list of rows on a phone.

    `site.css` keeps the short cells on one line. In the list, each cell has a label: its column heading. `site.css`
    hides the labels in a wide window. Tables of numbers stay tables, and so do tables of two columns, unless long names
    in the first column leave little room for the second.
    """
    for table in doctree.findall(nodes.table):
        head = next(iter(table.findall(nodes.thead)), None)
        body = next(iter(table.findall(nodes.tbody)))
        if any("text-right" in entry["classes"] for entry in table.findall(nodes.entry)):
            for entry in body.findall(nodes.entry):
                if len(entry.astext()) <= 26:
                    entry["classes"].append("whole")
            continue
        if head is None:
            continue
        labels = [entry.astext() for entry in head[0]]
        names = [code.astext() for row in body for code in row[0].findall(nodes.literal)]
        explained = sum(len(row[1].astext()) for row in body) / len(body)
        if len(labels) == 2 and (max(map(len, names), default=0) <= 14 or explained <= 30):
            continue
        table["classes"].append("stacked")
        if len(labels) > 2:
            for row in body:
                for label, entry in zip(labels[1:], row[1:]):
                    if entry.astext().strip():
                        entry.insert(0, nodes.paragraph("", label, classes=["cell-label"]))


def _link_pictures(app, doctree):
    """Link every picture to its file, which a phone can enlarge: Sphinx does so for pictures that have a width."""
    for image in doctree.findall(nodes.image):
        size = get_image_size(Path(app.srcdir) / image["uri"])
        if size is not None:
            image["width"] = f"{size[0]}px"


def setup(app):
    """Connect the functions above to Sphinx."""
    app.connect("missing-reference", _link)
    # Must run before napoleon, which rewrites the sections.
    app.connect("autodoc-process-docstring", _read_docstring, priority=400)
    # Must run before viewcode adds its links and before Sphinx collects the table of contents.
    app.connect("doctree-read", _lay_out_signatures, priority=400)
    app.connect("doctree-read", _prepare_tables)
    app.connect("doctree-read", _keep_units_together)
    app.connect("doctree-read", _keep_short_code_together)
    # Must run before Sphinx looks for pictures that have a width.
    app.connect("doctree-read", _link_pictures)
