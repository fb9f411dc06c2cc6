"""Let every chapter begin with what installs the package outside a clone, as in Colab: `python tools/launch.py`.

It stands in the first code cell, below `#| default_exp` where the chapter has one; in a clone it does nothing. The
address is that of settings.ini: after a change there, run this again. It replaces what is there.
"""

import re

import nbformat
from chapters import ROOT, read_book, settings

CELL = """\
import os
from importlib.util import find_spec

if not find_spec("ddpm_lit"):  # in Colab, say: fetch the book, and install it
    if not os.path.isdir("../ddpm_lit"):
        get_ipython().run_cell("!git clone -q {git_url} book\\n%cd book/nbs")
    get_ipython().run_line_magic("pip", "install -q ..")"""


def install_lines() -> str:
    "Return the lines, with the repository's address."
    return CELL.format(git_url=settings()["git_url"])


def has_launch(source: str) -> bool:
    "Whether a cell installs the package where it is missing."
    return 'find_spec("ddpm_lit")' in source


def prepare(notebook) -> None:
    "Put the lines into the first code cell of a chapter that exports; give any other chapter such a cell."
    k = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    first = notebook.cells[k]
    head = re.findall(r"^#\|\s*default_exp\s+\w+\s*$", first.source, re.M)
    if not head and not has_launch(first.source):
        notebook.cells.insert(k, first := nbformat.v4.new_code_cell(execution_count=1))
        for cell in notebook.cells[k + 1 :]:
            if cell.cell_type == "code" and cell.execution_count:
                cell.execution_count += 1
                for output in cell.outputs:
                    if output.output_type == "execute_result":
                        output.execution_count += 1
    first.source = "\n".join([*head, install_lines()])
    for i, cell in enumerate(notebook.cells):
        cell.id = str(i)


if __name__ == "__main__":
    for chapter in read_book():
        notebook = nbformat.read(chapter.path, 4)
        prepare(notebook)
        text = nbformat.writes(notebook, version=4) + "\n"
        if text != chapter.path.read_text(encoding="utf-8"):
            chapter.path.write_text(text, encoding="utf-8")
            print(f"{chapter.path.relative_to(ROOT)} begins with the installation")
