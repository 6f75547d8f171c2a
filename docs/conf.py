"""How Sphinx makes the site: `make docs` writes it to build/docs."""

from dataclasses import is_dataclass
from importlib.metadata import files
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

import pyro_subnet
from pyro_subnet.selection import Selector

project = "pyro_subnet"
author = "The pyro-subnet developers"
version = release = pyro_subnet.__version__

extensions = [
    "myst_nb",  # Markdown pages, and notebooks as they are committed
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",  # each entry's source, on a page of the site's own
    "sphinx_copybutton",
]
# The source folder is the repository, so that links between its pages are the same here
# and in a checkout; what follows is all that Sphinx reads of it.
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "benchmarks/**.md",
    "tutorials/*.md",
    "tutorials/*.ipynb",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = [".*", "build", "dist", "**/.ipynb_checkpoints"]
nb_execution_mode = "off"  # notebooks keep the outputs they were committed with
myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3

add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as a list, like arguments
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

# Where other projects' names lead. Nothing is fetched, so that a build gives the same
# site with a network or without: docs/inventories holds the names that pages link.
INVENTORIES = {
    "arviz": "https://python.arviz.org/en/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "python": "https://docs.python.org/3/",
    "pyro": "https://docs.pyro.ai/en/stable/",
    "torch": "https://docs.pytorch.org/docs/stable/",
}
intersphinx_mapping = {
    name: (url, str(Path(__file__).with_name("inventories") / f"{name}.inv"))
    for name, url in INVENTORIES.items()
}
# By the names under which they are documented, not by the modules that define them.
DOCUMENTED_AS = {
    "Tensor": "torch.Tensor",
    "pyro.distributions.delta.Delta": "pyro.distributions.Delta",
    "pyro.infer.autoguide.guides.AutoContinuous": "pyro.infer.autoguide.AutoContinuous",
    "pyro.infer.mcmc.api.MCMC": "pyro.infer.mcmc.MCMC",
    "torch._C.Generator": "torch.Generator",
    "torch.nn.modules.module.Module": "torch.nn.Module",
}

# Programs and commands are copied, what they print is not.
copybutton_selector = ", ".join(
    f"div.highlight-{language} pre" for language in ("python", "ipython3", "sh")
)

html_theme = "furo"
html_title = f"pyro_subnet {release}"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
html_css_files = ["site.css"]
# Equations are drawn by one file of the site's own, so that it needs no network. The
# package with the file cannot be imported: its name has hyphens.
mathjax_path = "tex-svg.js"
(mathjax,) = [
    path.locate()
    for path in files("sphinx-mathjax-offline") or ()
    if path.name == mathjax_path
]
html_static_path = ["site.css", str(mathjax)]


def callables_as_written(
    app: Sphinx, what: str, name: str, obj: object, options: object, *given: str | None
) -> tuple[str | None, ...]:
    """Undoes Sphinx's brackets around the dots of ``Callable[..., Any]``."""
    return tuple(text and text.replace("[[...], ", "[..., ") for text in given)


def name_as_documented(app: Sphinx, doctree: Any, *docname: str) -> None:
    """Gives references to names of other projects the name that their pages have."""
    for node in doctree.findall(pending_xref):
        target = node.get("reftarget")
        node["reftarget"] = DOCUMENTED_AS.get(target, target)


def alternative_texts(app: Sphinx, doctree: nodes.document) -> None:
    """Says of a notebook's picture, which has no text, in which section it stands."""
    for image in doctree.findall(nodes.image):
        section = image.parent
        while section is not None and not isinstance(section, nodes.section):
            section = section.parent
        if "alt" not in image and section is not None:
            title = section.next_node(nodes.title).astext()
            image["alt"] = f"Picture of the section: {title}"


def errors_beside_means(app: Sphinx, doctree: nodes.document) -> None:
    """Keeps a mean and its standard error in one line, where columns are narrow."""
    together = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"
    for text in list(doctree.findall(nodes.Text)):
        if " ± " in text:
            text.parent.replace(text, nodes.Text(text.replace(" ± ", together)))


def fields_of_selectors_as_parameters(  # noqa: PLR0917 - Sphinx's own order
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Heads the options of a selector Parameters: users pass them, to make one."""
    if what == "class" and issubclass(obj, Selector) and is_dataclass(obj):
        lines[:] = ["Args:" if line == "Attributes:" else line for line in lines]


def redirect_to_the_first_page(app: Sphinx, error: Exception | None) -> None:
    """Writes an index.html where people look for one: above the folder docs/."""
    if error is None:
        url = f"{root_doc}.html"
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={url}">'
        Path(app.outdir, "index.html").write_text(page, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", callables_as_written)
    # Before napoleon, whose own priority is 500, reads the sections.
    app.connect(
        "autodoc-process-docstring", fields_of_selectors_as_parameters, priority=400
    )
    app.connect("doctree-read", alternative_texts)
    app.connect("doctree-read", errors_beside_means)
    app.connect("doctree-read", name_as_documented)
    app.connect("build-finished", redirect_to_the_first_page)
