"""The configuration of the site. `python -m sphinx -W --keep-going -q docs docs/_build` builds it without a network."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jaxlm  # noqa: E402 - from this checkout

project = "jaxlm"
author = "the authors of jaxlm"
copyright = "the authors of jaxlm, Apache-2.0"
version = release = jaxlm.__version__
html_title = f"jaxlm {release}"
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["narrow.css"]
html_show_sourcelink = False
html_copy_source = False

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "from_code"]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]

# Pages are Markdown. Notebooks are shown with their stored outputs.
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "off"

# The reference is generated from docstrings: text in backticks is code, and types are shown as in the source.
default_role = "code"
highlight_language = "none"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 72
python_use_unqualified_type_names = True
python_display_short_literal_types = True
toc_object_entries = False
