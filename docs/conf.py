"""How Sphinx makes the site: `make docs` writes it to build/docs."""

from importlib.metadata import files
from pathlib import Path

from sphinx.application import Sphinx

import pyro_subnet

project = "pyro_subnet"
author = "The pyro-subnet developers"
version = release = pyro_subnet.__version__

extensions = [
    "myst_nb",  # Markdown pages, and notebooks as they are committed
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
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


def redirect_to_the_first_page(app: Sphinx, error: Exception | None) -> None:
    """Writes an index.html where people look for one: above the folder docs/."""
    if error is None:
        url = f"{root_doc}.html"
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={url}">'
        Path(app.outdir, "index.html").write_text(page, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", callables_as_written)
    app.connect("build-finished", redirect_to_the_first_page)
