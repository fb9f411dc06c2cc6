"""The generated pages of the book: the front page, five indexes, and the library with its line numbers.

Every entry is read from the chapters, but for two small tables in docs/: equations.toml says which names and checks
belong to an equation, chapters.toml which question a chapter answers. What they name and the chapters lack is an error.
"""

import base64
import html
import io
import re
import tomllib
from collections import Counter

from chapters import ROOT, Chapter, Check, homes, parts, picture, read_book

KINDS = {"identity": "holds", "symbolic": "holds", "expectation": "holds", "rejects": "refused", "raises": "misuse"}


def table(name: str) -> dict:
    "Return a table of docs/."
    return tomllib.loads((ROOT / "docs" / f"{name}.toml").read_text(encoding="utf-8"))


def plain(name: str) -> str:
    "Return a check's name without the size of its sample, which the output adds."
    return re.sub(r" \(n = \d+\)$", "", name)


def link(text: str, href: str, kind: str = "") -> str:
    "Return a link, its text escaped for HTML and for Markdown."
    text = re.sub(r"([\\`*_{}\[\]()#+.!|~$^-])", r"\\\1", html.escape(text))
    return f'<a{f" class={kind!r}" if kind else ""} href="{href}">{text}</a>'


def counts(book: list[Chapter]) -> Counter:
    "Return how many checks hold, how many wrong formulas are refused and how many misuses."
    return Counter(KINDS[check.kind] for chapter in book for check in chapter.checks)


# ----------------------------------------------------------------------------------------------------- the front page


def front(book: list[Chapter]) -> str:
    "Return the front page, but for the tables of contents: docs/index.md with its numbers and its table of questions."
    questions, n = table("chapters"), counts(book)
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    rows = ""
    for name, chapters in parts(book).items():
        rows += f"\n\n### {name}\n\n| | the question | where |\n| --- | --- | --- |"
        for chapter in chapters:
            question = questions.get(chapter.stem, chapter.promise)
            rows += f"\n| {chapter.number} | {question} | [{chapter.title}]({chapter.stem}.ipynb) |"
    values = {"holds": n["holds"], "refused": n["refused"], "misuse": n["misuse"], "all": n.total()}
    for key, value in values.items():
        text = text.replace(f"{{{{{key}}}}}", f"{value:,}")
    return text.replace("{{questions}}", rows.strip())


def lost_questions(book: list[Chapter]) -> list[str]:
    "Return the chapters of docs/chapters.toml that are gone."
    return sorted(set(table("chapters")) - {chapter.stem for chapter in book})


# ------------------------------------------------------------------------------------------------------- the equations


def find_check(book: list[Chapter], stem: str, name: str, kind: str | None = None) -> tuple[Chapter, Check] | None:
    "Return a check by its name, from the equation's own chapter if it is there, else from the first that has it."
    for chapter in sorted(book, key=lambda chapter: chapter.stem != stem):
        for check in chapter.checks:
            if plain(check.name) == name and (kind is None or KINDS[check.kind] == kind):
                return chapter, check
    return None


def lost_equations(book: list[Chapter], equations: dict | None = None) -> list[str]:
    "Return what docs/equations.toml names and the chapters lack: chapters, sections, exported names, checks."
    chapters, exported, lost = {chapter.stem: chapter for chapter in book}, homes(book), []
    for paper in (equations or table("equations"))["paper"]:
        for entry in paper["equation"]:
            here = f"{paper['name']}, {entry['number']}: "
            if entry["chapter"] not in chapters:
                lost.append(f"{here}chapter {entry['chapter']}")
            elif not chapters[entry["chapter"]].section(entry["section"]):
                lost.append(f"{here}section {entry['section']}")
            lost += [f"{here}name {name}" for name in entry["exports"] if name not in exported]
            for key, kind in (("checks", "holds"), ("refused", "refused")):
                names = entry[key]
                lost += [f"{here}{key} {n}" for n in names if not find_check(book, entry["chapter"], n, kind)]
                lost += [] if names else [f"{here}no {key}"]
    return lost


def anchor(heading: str) -> str:
    "Return the anchor that Sphinx gives a heading."
    from docutils.nodes import make_id

    return make_id(re.sub(r"[$`*]", "", heading))


def equations(book: list[Chapter]) -> str:
    "Return the index of equations."
    if lost := lost_equations(book):
        raise SystemExit("docs/equations.toml names what is gone:\n" + "\n".join(lost))
    exported, titles = homes(book), {chapter.stem: chapter.title for chapter in book}
    text = "# Equations\n\nFrom the paper's number to where it is derived, to the code that computes it, "
    text += "to the checks that hold it and the wrong formulas that they refuse.\n"
    for paper in table("equations")["paper"]:
        text += f"\n## {paper['name']}\n\n{paper['note']}\n"
        for entry in paper["equation"]:
            stem, section = entry["chapter"], entry["section"]
            number = f"Eq. {entry['number']}" if entry["number"][0].isdigit() else entry["number"]
            text += f"\n### {number}: {entry['what']}\n\n$$\n{entry['latex']}\n$$\n\n"
            text += f"derived in\n: {link(f'{titles[stem]}: {section}', f'{stem}.html#{anchor(section)}')}\n\n"
            names = [link(n, f"{exported[n][0].stem}.html#export-{n}", "name") for n in entry["exports"]]
            text += f"computed by\n: {', '.join(names)}\n\n"
            for key, word, kind in (("checks", "checked by", "holds"), ("refused", "wrong, and refused", "refused")):
                places = [(n, *find_check(book, stem, n, kind)) for n in entry[key]]
                items = [link(n, f"{chapter.stem}.html#cell-{check.cell}", kind) for n, chapter, check in places]
                text += f"{word}\n: {' · '.join(items)}\n\n"
    return text


# ---------------------------------------------------------------------------------------------------- the other indexes


def questions(book: list[Chapter]) -> str:
    "Return the index of the questions that readers ask."
    text = "# Questions readers ask\n\nEach is answered by a cell that runs.\n"
    for chapter in book:
        if chapter.questions:
            text += f"\n## {chapter.title}\n\n"
            for k, question in enumerate(chapter.questions, 1):
                text += f'- {question} <a href="{chapter.stem}.html#question-{k}">answer</a>\n'
    return text


def checks(book: list[Chapter]) -> str:
    "Return the index of all checks that ran."
    n = counts(book)
    text = f"# Checks\n\n{n['holds']:,} checks hold; {n['refused']:,} wrong formulas and {n['misuse']:,} misuses "
    text += "are refused.\n"
    for chapter in book:
        text += f'\n## {chapter.title}\n\n<ul class="checks">\n'
        for (cell, kind, name), times in Counter((c.cell, c.kind, plain(c.name)) for c in chapter.checks).items():
            many = f" × {times}" if times > 1 else ""
            href = f"{chapter.stem}.html#cell-{cell}"
            item = f'<a href="{href}">{html.escape(name)}</a>{many}'
            text += f'<li><span class="kind {KINDS[kind]}">{kind}</span> {item}</li>\n'
        text += "</ul>\n"
    return text


def thumbnail(png: str) -> str:
    "Return a picture of at most 240 × 160 pixels as a data address."
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.thumbnail((240, 160))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=55)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def figures(book: list[Chapter]) -> str:
    "Return the index of figures, with small pictures of them."
    text = "# Figures\n"
    for chapter in book:
        items = ""
        for cell, heading in chapter.figures:
            png = next(filter(None, map(picture, chapter.cells[cell].outputs)))
            words = html.escape(re.sub(r"[$\\{}`]", "", heading))
            items += (
                f'<a href="{chapter.stem}.html#cell-{cell}"><img src="{thumbnail(png)}" alt="{words}">{words}</a>\n'
            )
        text += f'\n## {chapter.title}\n\n<div class="gallery">\n{items}</div>\n' if items else ""
    return text


def symbols(book: list[Chapter]) -> str:
    "Return the glossary: the tables of symbols and of words in CONTRIBUTING.md, and every public name."
    rules = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tables = {t.split("\n")[0]: t for t in re.findall(r"(?:^\|.*\n)+", rules, re.M)}
    text = "# Symbols and names\n\n## Symbols\n\n" + tables["| symbol | name in code | what it is |"]
    text += "\n## Words\n\n" + tables["| we write | not |"] + "\n## Names\n\n"
    public = {
        n: where for n, where in homes(book).items() if re.search(r"^#\|\s*export\s*$", where[0].code[where[1]], re.M)
    }
    for name in sorted(public, key=str.lower):
        chapter, cell = public[name]
        doc = re.search(r'^\s+"{1,3}([^"\n]+)', chapter.code[cell].split(name, 1)[-1], re.M)
        where = link(name, f"{chapter.stem}.html#export-{name}", "name")
        text += f"- {where}: {doc[1].strip() if doc else chapter.title}\n"
    return text


def toys(book: list[Chapter]) -> dict[str, str]:
    "Return the pages to play with: those of docs/play, with a chapter's numbers and its figure as the still picture."
    chapters, pages = {chapter.stem: chapter for chapter in book}, {}

    def toy(match: re.Match) -> str:
        name, stem, section = match.groups()
        cell = next(cell for cell, heading in chapters[stem].figures if heading == section)
        png = next(filter(None, map(picture, chapters[stem].cells[cell].outputs))).replace("\n", "")
        numbers = chapters[stem].path.with_suffix(".json").read_text(encoding="utf-8").strip()
        still = f'<img src="data:image/png;base64,{png}" alt="A figure of the section “{section}” of the chapter">'
        return (
            f'<div class="toy" data-toy="{name}">\n<form aria-label="controls"></form>\n'
            f'<div class="toy-stage">{still}</div>\n'
            f'<p class="toy-say" aria-live="polite">Without JavaScript: a still picture.</p>\n'
            f'<script type="application/json">{numbers}</script>\n</div>\n'
            '<script src="../_static/diffusion.js"></script>\n<script src="../_static/toys.js"></script>'
        )

    for path in sorted((ROOT / "docs" / "play").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        pages[f"play/{path.name}"] = re.sub(r"\{\{toy (\w+) (\w+): (.+)\}\}", toy, text)
    return pages


def library(book: list[Chapter]) -> dict[str, str]:
    "Return the pages of the library: every module as it is generated."
    modules = [chapter for chapter in book if chapter.module]
    listed = "\n".join(
        f"- [`{c.module}`]({c.module}.md), from [{c.title}](../{c.stem}.ipynb): {c.promise}" for c in modules
    )
    contents = "\n".join(chapter.module for chapter in modules)
    text = f"# The library\n\nGenerated from the cells marked *exported*.\n\n{listed}\n\n"
    text += f"```{{toctree}}\n:hidden:\n\n{contents}\n```\n"
    pages = {"library/index.md": text}
    for chapter in modules:
        source = (ROOT / "ddpm_lit" / f"{chapter.module}.py").read_text(encoding="utf-8")
        head = f"# `ddpm_lit/{chapter.module}.py`\n\nGenerated from [{chapter.title}](../{chapter.stem}.ipynb).\n\n"
        pages[f"library/{chapter.module}.md"] = (
            f"{head}`````{{code-block}} python\n:linenos:\n\n{source.rstrip()}\n`````\n"
        )
    return pages


def generated(book: list[Chapter]) -> dict[str, str]:
    "Return every generated page but the front page, by its file name."
    pages = {function.__name__: function(book) for function in (equations, questions, checks, figures, symbols)}
    return {f"{name}.md": text for name, text in pages.items()} | toys(book) | library(book)


if __name__ == "__main__":
    book = read_book()
    print(*lost_equations(book), *lost_questions(book), sep="\n")
