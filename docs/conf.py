"""Sphinx over the repository as it is: `make docs` writes build/docs from these pages, the READMEs of the folders and
the docstrings. No file is copied: a link that works in the source tree works on the site, and one that does not fails
the build. Other files that a page links to (a script, a table) come along as downloads.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

project, author, copyright = "zeroblock", "the zeroblock developers", "the zeroblock developers, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]

# The pages, in the order of the menu. The README of the repository is the first.
PAGES = {
    "Use": ("docs/quickstart", "docs/models", "docs/zero-branches", "docs/precision", "docs/training", "docs/serving"),
    "Know": (
        "docs/gpu",
        "benchmarks/README",
        "benchmarks/roofline",
        "docs/troubleshooting",
        "examples/README",
        "CHANGELOG",
    ),
    "Reference": ("docs/api/convert", "docs/api/functions", "docs/api/modules", "docs/api/examine"),
    "Inside": (
        "CONTRIBUTING",
        "docs/architecture",
        "docs/extending",
        "zeroblock/convert/README",
        "zeroblock/plan/README",
        "kernels/README",
        "csrc/README",
        "csrc/cuda/README",
        "tests/cuda/simt/README",
    ),
}
root_doc = "README"
include_patterns = [f"{page}.md" for pages in [(root_doc,), *PAGES.values()] for page in pages]
exclude_patterns = [".*", "build", "dist", "*.egg-info"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
autodoc_typehints = "none"
autodoc_preserve_defaults = True
default_role = "code"
pygments_style, pygments_dark_style = "friendly", "monokai"

html_theme = "furo"
html_title = "zeroblock"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = html_copy_source = False


def add_menu(app, name, source):
    """The menu, which stands under the README on the site alone."""
    if name == root_doc:
        for caption, pages in PAGES.items():
            source[0] += "\n\n```{toctree}\n:hidden:\n:caption: " + caption + "\n\n" + "\n".join(pages) + "\n```\n"


def as_text(app, what, name, obj, options, lines):
    """Docstrings are plain text: stars are products and arguments, not emphasis; `Args:` and `Raises:` are lists, whose
    items keep their names together; `Returns`, `Raises` and `Source` are paragraphs."""
    found, inside = [], False
    for line in lines:
        if not line.lstrip().startswith((">>>", "... ")):
            line = re.sub(r"(?<!`)([*|])(?!`)", r"\\\1", line)
        inside = inside and (not line or line.startswith(" "))
        item = re.fullmatch(r" {4}([^\s(:][^(:]*): (.+)", line) if inside else None
        if line in ("Args:", "Raises:"):
            inside, line = True, f"**{ {'Args:': 'Arguments', 'Raises:': 'Raises'}[line] }**\n"
        elif item:
            line = f"- **{item[1]}**: {item[2]}"
        elif inside:
            line = line[6:]
        elif re.match(r"(Returns|Raises|Saved for backward|Source:) ", line):
            found.append("")
        found += line.split("\n")
    lines[:] = found


def first_page(app, error):
    """build/docs/index.html leads to the README's page."""
    if error is None and app.builder.format == "html":
        page = '<!doctype html><title>zeroblock</title><meta http-equiv="refresh" content="0; url={}.html">'
        (Path(app.outdir) / "index.html").write_text(page.format(root_doc))


def setup(app):
    app.connect("source-read", add_menu)
    app.connect("autodoc-process-docstring", as_text)
    app.connect("build-finished", first_page)
