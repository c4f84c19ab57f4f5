"""The site: uv run --group docs sphinx-build -W docs docs/_build"""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # autodoc imports the checkout, wherever it lies
shutil.copyfile(HERE.parent / "examples" / "gaussians_2d.ipynb", HERE / "notebook.ipynb")

project, author = "Bellman Diffusion", "the authors of the repository"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True

html_theme = "furo"
html_title = "Bellman Diffusion"
html_static_path: list[str] = []

napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_include_init_with_doc = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
default_role = "code"
add_module_names = False
