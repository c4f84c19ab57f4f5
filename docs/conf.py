"""The site: uv run --group docs sphinx-build -W docs docs/_build/html"""

import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # autodoc imports the checkout, wherever it lies
shutil.copyfile(HERE.parent / "examples" / "gaussians_2d.ipynb", HERE / "notebook.ipynb")

project, copyright = "Bellman Diffusion", "the authors of the repository"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 1800
nb_execution_raise_on_error = True

html_theme = "furo"
html_title = "Bellman Diffusion"
html_static_path = ["_static"]
html_css_files = ["wide.css"]

napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True, "special-members": "__call__"}
default_role = "code"
add_module_names = False


LINKS = {
    r"\]\(docs/": "](",
    r"\]\(examples/gaussians_2d.ipynb": "](notebook.ipynb",
    r"\]\(CONTRIBUTING.md": "](contributing.md",
    r"\]\(CHANGELOG.md": "](changes.md",
    r"\[([^]]+)\]\((?:CITATION.cff|LICENSE)\)": r"\1",
}
"""Links of the README, as the site has them."""


def put_readme(app, docname, source):
    """The first page is the README."""
    if docname == "index":
        text = (HERE.parent / "README.md").read_text()
        for old, new in LINKS.items():
            text = re.sub(old, new, text)
        source[0] = source[0].replace("<!-- README -->", text)


def to_rst(app, what, name, obj, options, lines):
    """Docstrings are plain text with a few marks of Markdown: tables, formulas in indented blocks, stars in shapes."""
    out: list[str] = []
    i = 0
    while i < len(lines):
        line, blank_before = lines[i], not out or not out[-1].strip()
        if line.startswith("|") and i + 1 < len(lines) and re.fullmatch(r"\|[-|]+\|", lines[i + 1]):
            rows = []
            while i < len(lines) and lines[i].startswith("|"):
                rows.append([_escaped(cell.strip()) for cell in lines[i].strip("| ").split(" | ")])
                i += 1
            out += [".. list-table::", "   :header-rows: 1", ""]
            for row in [rows[0], *rows[2:]]:
                out += [f"   {'* -' if k == 0 else '  -'} {cell}" for k, cell in enumerate(row)]
            out.append("")
        elif blank_before and line.startswith("    ") and out and _paragraph_before(out):
            out += ["::", ""]
            while i < len(lines) and (lines[i].startswith("    ") or not lines[i].strip()):
                out.append(lines[i])
                i += 1
            out.append("")
        else:
            out.append(_escaped(line))
            i += 1
    lines[:] = out


def _paragraph_before(out):
    """Whether the last text stands at the margin, so that an indented block after it is a formula."""
    last = next((line for line in reversed(out) if line.strip()), "")
    return bool(last) and not last.startswith(" ")


def _escaped(line):
    """Stars of shapes and keyword arguments escaped; `code` and *emphasis* left."""
    parts = re.split(r"(`[^`]*`|(?<![\w*])\*[A-Za-z][\w -]*\*(?![\w*]))", line)
    return "".join(part if k % 2 else part.replace("*", "\\*") for k, part in enumerate(parts))


def setup(app):
    """Connect both."""
    app.connect("source-read", put_readme)
    app.connect("autodoc-process-docstring", to_rst, priority=400)  # before napoleon
