"""Sphinx configuration."""

import internlm

project = "InternEvo"
author = "InternEvo contributors"
project_copyright = author
version = release = internlm.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_typehints = "signature"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = f"{project} {version}"
