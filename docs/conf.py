# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of Sphinx. ``make docs`` builds the pages; a warning is an error there."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import traceops

project = 'traceops'
author = 'the traceops authors'
copyright = '2026, the traceops authors'    # noqa: A001  (Sphinx's name)
release = version = traceops.__version__

extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.mathjax', 'sphinx.ext.napoleon']
myst_enable_extensions = ['dollarmath', 'colon_fence']
myst_heading_anchors = 3
exclude_patterns = ['README.md']

# Tutorials are notebooks in Markdown: they run at every build, and an error in one is an error.
nb_execution_mode = 'force'
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_typehints = 'none'                  # the docstrings give shapes and units
autodoc_member_order = 'bysource'
napoleon_google_docstring = False
napoleon_use_rtype = False
nitpicky = False

html_theme = 'furo'
html_title = f'traceops {release}'
html_static_path: list[str] = []
html_show_sourcelink = False
html_theme_options = {'navigation_with_keys': True}
