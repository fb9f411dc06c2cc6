"""Configuration of the web book. `tools/book.py` collects the pages in build/book-source and calls Sphinx with this."""

import sys
from importlib.metadata import distribution
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tools")]

from chapters import settings  # noqa: E402

config = settings()
project = config["title"]
author = config["author"]
copyright = config["copyright"]
language = "en"

extensions = ["myst_nb", "sphinx_copybutton", "marks"]
myst_enable_extensions = ["amsmath", "attrs_inline", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = [str(HERE / "_static")]
html_css_files = ["book.css"]
html_favicon = str(HERE / "_static" / "icon.svg")
html_context = {"default_mode": "auto"}
html_show_sourcelink = False
html_copy_source = True
html_sourcelink_suffix = ""
html_permalinks_icon = "#"
html_theme_options = {
    "repository_url": config["git_url"],
    "repository_branch": config["branch"],
    "path_to_docs": config["nbs_path"],
    "use_repository_button": True,
    "use_issues_button": False,
    "use_download_button": True,
    "launch_buttons": {
        "colab_url": "https://colab.research.google.com",
        "binderhub_url": "https://mybinder.org",
        "notebook_interface": "jupyterlab",
    },
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "home_page_in_toc": True,
}
copybutton_exclude = ".linenos, .gp, .go"

# MathJax comes from a package and is served from the book: its core, TeX, the CSS output with its fonts.
MATHJAX = Path(distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static/mathjax"))
MATHJAX_PARTS = ["startup.js", "core.js", "input/tex.js", "input/tex/extensions", "output/chtml.js", "output/chtml"]
MATHJAX_PARTS += ["a11y/assistive-mml.js"]
mathjax_path = "mathjax/startup.js"
mathjax3_config = {
    "loader": {"load": ["input/tex", "output/chtml", "a11y/assistive-mml"]},
    "chtml": {"mtextInheritFont": True},
}
