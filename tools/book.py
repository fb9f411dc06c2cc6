"""Build the web book from the chapters as they are stored: `python tools/book.py [folder]`, by default build/book.

The chapters are copied as they are, the generated pages (`index.py`) and the pages of docs/ beside them; then Sphinx
makes the book of it. Nothing is executed and nothing is fetched.
"""

import shutil
import sys
import time
from pathlib import Path

from chapters import ROOT, Chapter, parts, read_book
from index import front, generated


def contents(book: list[Chapter]) -> str:
    "Return the tables of contents, one for each part: what the sidebar shows."
    text = ""
    pages = {name: [f"{c.number} {c.title} <{c.stem}>" for c in some] for name, some in parts(book).items()}
    pages["Things to play with"] = ["play/schedule", "play/mixture", "play/guidance"]
    pages["Indexes"] = ["equations", "questions", "checks", "figures", "symbols", "library/index"]
    for name, entries in pages.items():
        text += f"\n```{{toctree}}\n:hidden:\n:caption: {name}\n\n" + "\n".join(entries) + "\n```\n"
    return text


def collect(source: Path, book: list[Chapter]) -> None:
    "Write all pages of the book into a folder, where Sphinx reads them."
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    for chapter in book:
        shutil.copy(chapter.path, source)
    for name, text in ({"index.md": front(book) + contents(book)} | generated(book)).items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text, encoding="utf-8")


def build(out: Path, book: list[Chapter] | None = None) -> int:
    "Build the book into a folder; return Sphinx's exit status: any warning is an error."
    from sphinx.cmd.build import main as sphinx

    source = out.parent / f"{out.name}-source"
    collect(source, book or read_book())
    options = ["--builder", "html", "--conf-dir", str(ROOT / "docs"), "--doctree-dir", str(source / ".doctrees")]
    return sphinx([*options, "--fail-on-warning", "--keep-going", "--quiet", "--jobs", "auto", str(source), str(out)])


if __name__ == "__main__":
    start, out = time.perf_counter(), Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "book").resolve()
    status = build(out)
    print(f"{out}/index.html, in {time.perf_counter() - start:.0f} s" if status == 0 else "the book is not built")
    sys.exit(status)
