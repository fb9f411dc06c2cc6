"""A small Sphinx extension: what the book adds to the chapters as they are stored.

Exported cells are marked, with a link to the generated line. Every name that the library exports is linked to the cell
that exports it, in prose and in code. Cells and questions get anchors, figures a text in place of the picture.
"""

import ast
import html
import re
import shutil
from functools import cache
from pathlib import PurePosixPath

from chapters import ROOT, homes, line_of, read_book
from docutils import nodes
from sphinx.util.fileutil import copy_asset

BOOK = {chapter.stem: chapter for chapter in read_book()}
HOMES = homes(list(BOOK.values()))
PLAY = {"02_forward": "schedule", "07_exact": "mixture", "32_guidance": "guidance"}
SET_UP = '<details class="setup"><summary>Set-up, for a machine without the package</summary>'


@cache
def target(name: str) -> str:
    "Return the address, from the root of the book, of the cell that exports a name."
    chapter, _ = HOMES[name]
    return f"{chapter.stem}.html#export-{name}"


def up(docname: str) -> str:
    "Return what leads from a page to the root of the book."
    return "../" * (len(PurePosixPath(docname).parts) - 1)


def mark_cells(app, doctree) -> None:
    "Give every cell of a chapter an anchor, and every exported cell its mark."
    chapter = BOOK.get(app.env.docname)
    if chapter is None:
        return
    for cell in doctree.findall(nodes.container):
        if cell.get("nb_element") != "cell_code":
            continue
        index = cell["cell_index"]
        cell["ids"].append(f"cell-{index}")
        if re.search(r"#\| default_exp|find_spec\(.ddpm_lit.\)", chapter.code[index]):
            cell.insert(0, nodes.raw("", SET_UP, format="html"))
            cell.append(nodes.raw("", "</details>", format="html"))
        names = [name for name, where in chapter.exports.items() if where == index]
        if names:
            cell["classes"].append("exported")
            cell.insert(0, nodes.raw("", export_mark(chapter, names), format="html"))
        heading = html.escape(chapter.heading(index))
        for image in cell.findall(nodes.image):
            image["alt"] = f"Figure of the section “{html.unescape(heading)}”, drawn by the cell above"


def export_mark(chapter, names: list[str]) -> str:
    "Return the line over an exported cell: which names, into which file, on which lines."
    links = []
    for name in names:
        line = line_of(name, chapter.module)
        links.append(f'<a id="export-{name}" href="library/{chapter.module}.html#L-{line}">{name}</a>')
    file = f'<a href="library/{chapter.module}.html">ddpm_lit/{chapter.module}.py</a>'
    return f'<div class="export-mark"><span>exported</span> {", ".join(links)} → {file}</div>'


def mark_questions(app, doctree) -> None:
    "Give every question that readers ask an anchor."
    if app.env.docname not in BOOK:
        return
    for section in doctree.findall(nodes.section):
        if section.next_node(nodes.title).astext() == "Questions readers ask":
            first = ((next((c for c in p if c.astext()), None), p) for p in section.findall(nodes.paragraph))
            questions = [p for c, p in first if isinstance(c, nodes.strong) and c.astext().rstrip().endswith("?")]
            for k, paragraph in enumerate(questions, 1):
                paragraph["ids"].append(f"question-{k}")


def mark_play(app, doctree) -> None:
    "Link the paragraph that speaks of sliders to the page that has them."
    name = PLAY.get(app.env.docname)
    for paragraph in doctree.findall(nodes.paragraph) if name else ():
        if paragraph.astext().startswith(("Under sliders.", "Under a slider.")):
            link = nodes.reference("", "Play with it.", refuri=f"play/{name}.html", internal=True, classes=["play"])
            paragraph += [nodes.Text(" "), link]


def link_names(app, doctree, docname: str) -> None:
    "Link every name in code type to where it is exported, but for links, headings and the cell itself."
    for literal in list(doctree.findall(nodes.literal)):
        name = re.sub(r"\(.*\)$", "", literal.astext()).removeprefix("ddpm_lit.")
        inside = literal.parent
        while inside is not None and not isinstance(inside, nodes.reference | nodes.title):
            inside = inside.parent
        if name in HOMES and inside is None:
            link = nodes.reference("", "", literal.deepcopy(), refuri=up(docname) + target(name), internal=True)
            link["classes"].append("name")
            literal.replace_self(link)


def number_lines(app, doctree) -> None:
    "Give every line of the library's pages an anchor."
    if app.env.docname.startswith("library/"):
        for block in doctree.findall(nodes.literal_block):
            block["highlight_args"] = {"lineanchors": "L", "anchorlinenos": False}


# A name in highlighted code that is neither an attribute nor a keyword argument.
WORD = re.compile(r'(?<!<span class="o">\.</span>)<span class="n">(\w+)</span>(?!<span class="o">=</span>)')


@cache
def imported(pagename: str) -> set[str]:
    "Return the exported names that a page's code imports from the library or defines."
    if pagename in BOOK:
        sources, own = list(BOOK[pagename].code.values()), set(BOOK[pagename].exports)
    else:
        module = pagename.removeprefix("library/")
        sources = [(ROOT / "ddpm_lit" / f"{module}.py").read_text(encoding="utf-8")]
        own = {name for name, (chapter, _) in HOMES.items() if chapter.module == module}
    for node in (node for source in sources for node in ast.walk(ast.parse(re.sub(r"(?m)^[%!].*$", "", source)))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ddpm_lit"):
            own |= {alias.name for alias in node.names}
    return own & set(HOMES)


def link_code(app, pagename, templatename, context, doctree) -> None:
    "Link the names in highlighted code to where they are exported."
    if pagename in BOOK or (pagename.startswith("library/") and pagename != "library/index"):
        names = imported(pagename)

        def link(match: re.Match) -> str:
            name = match[1]
            return f'<a class="n name" href="{up(pagename)}{target(name)}">{name}</a>' if name in names else match[0]

        context["body"] = WORD.sub(link, context["body"])


def copy_mathjax(app, error) -> None:
    "Copy the parts of MathJax that the book loads; remove two templates that the themes leave among their files."
    if error is None:
        for template in (app.outdir / "_static").glob("*webpack-macros.html"):
            template.unlink()
        folder = app.outdir / "_static" / "mathjax"
        for part in app.config.MATHJAX_PARTS:
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            source = app.config.MATHJAX / part
            copy_asset(source, folder / part) if source.is_dir() else shutil.copyfile(source, folder / part)


def setup(app) -> dict:
    "Register the handlers with Sphinx."
    app.add_config_value("MATHJAX", None, "")
    app.add_config_value("MATHJAX_PARTS", [], "")
    for handler in (mark_cells, mark_questions, mark_play, number_lines):
        app.connect("doctree-read", handler)
    app.connect("doctree-resolved", link_names)
    app.connect("html-page-context", link_code)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
