"""The web book: it builds without a warning, no link in it is dead, and in a real browser every page works.

The browser is Chromium, headless. Without one these tests are skipped, and say so; `-m browser` runs them alone.
"""

import asyncio
import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import chapters  # noqa: E402
import index  # noqa: E402
import launch  # noqa: E402
import student  # noqa: E402

from ddpm_lit.ddpm import DDPM  # noqa: E402
from ddpm_lit.exact import GaussianData, MixtureData, exact_ddpm  # noqa: E402
from ddpm_lit.forward import cosine_schedule, linear_schedule, q_sample  # noqa: E402
from ddpm_lit.guidance import classifier_free  # noqa: E402
from ddpm_lit.sampler import ancestral_plan, ddim_plan, ddim_sample  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: the web book is not tested in a browser"
)
BOOK = chapters.read_book()


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    "The book, built from the stored chapters as `make book` builds it."
    pytest.importorskip("sphinx_book_theme", reason="the extra `book` is not installed")
    out = tmp_path_factory.mktemp("site") / "book"
    done = subprocess.run([sys.executable, ROOT / "tools" / "book.py", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@functools.cache
def texts(site: Path) -> dict[str, str]:
    "The pages, by their addresses."
    paths = sorted(path for path in site.rglob("*.html") if "_static" not in path.parts)
    return {str(path.relative_to(site)): path.read_text(encoding="utf-8") for path in paths}


# ---------------------------------------------------------------------------------------------------- without a browser


def dead_links(site: Path) -> list[str]:
    "Return the links and the resources of the pages that lead nowhere within the book."
    pages, dead = texts(site), []
    ids = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in pages.items()}
    for page, text in pages.items():
        for href in set(re.findall(r'(?:href|src|srcset)="([^"]+)"', re.sub(r"(?s)<script\b.*?</script>", "", text))):
            url = urlsplit(href.replace("&amp;", "&"))
            if url.scheme or url.netloc:
                continue
            file = (site / page).parent / unquote(url.path) if url.path else site / page
            there = str(file.resolve().relative_to(site.resolve()))
            if not file.is_file() or (url.fragment and there in ids and unquote(url.fragment) not in ids[there]):
                dead.append(f"{page}: {href}")
    return dead


@pytest.mark.slow
@pytest.mark.processes
def test_no_link_is_dead_and_every_page_is_light(site):
    assert dead_links(site) == []
    for page, text in texts(site).items():
        images = {unquote(src) for src in re.findall(r'<img[^>]* src="(?!data:)([^"?]+)', text)}
        weight = len(text.encode()) + sum(((site / page).parent / src).stat().st_size for src in images)
        assert weight <= 1_500_000, f"{page}: {weight:,} bytes"
        loaded = re.findall(r'<(?:script|img|source|iframe)\b[^>]*\bsrc(?:set)?="(https?:[^"]+)"', text)
        loaded += re.findall(r'<link\b[^>]*rel="(?:stylesheet|preload|icon)"[^>]*href="(https?:[^"]+)"', text)
        assert not loaded, f"{page} loads from elsewhere: {loaded}"


@pytest.mark.slow
@pytest.mark.processes
def test_every_chapter_is_there_with_its_marks(site):
    pages, front = texts(site), texts(site)["index.html"]
    for chapter in BOOK:
        page = pages[f"{chapter.stem}.html"]
        assert f'href="{chapter.stem}.html"' in front and ("prev-next" in page)
        assert all(f'id="export-{name}"' in page for name in chapter.exports), chapter.stem
        assert page.count('id="question-') == len(chapter.questions), chapter.stem
        assert page.count("<details><summary>Solution") == chapter.section("Exercises").count("<summary>Solution")
        colab = f"colab.research.google.com/github/{chapters.settings()['user']}/{chapters.settings()['repo']}/blob/"
        assert colab in page and f"{chapter.path.name}" in page
    played = {stem for stem, page in pages.items() if 'class="play ' in page or ' play"' in page}
    assert played == {f"{path.stem}.html" for path in (ROOT / "nbs").glob("*.json")}
    assert set(re.findall(r"\b(\d\d[a-z]?_\w+)\.html", front)) == {chapter.stem for chapter in BOOK}


def test_the_indexes_name_what_is_there():
    assert index.lost_equations(BOOK) == [] and index.lost_questions(BOOK) == []
    numbers = {entry["number"] for entry in index.table("equations")["paper"][0]["equation"]}
    assert {str(n) for n in range(1, 17)} | {"17–22", "23–26"} <= numbers, "every numbered equation of the first paper"


@pytest.mark.parametrize("key", ["chapter", "section", "exports", "checks", "refused"])
def test_the_index_notices_what_is_gone(key):
    equations = index.table("equations")
    entry = equations["paper"][0]["equation"][1]
    entry[key] = "gone" if isinstance(entry[key], str) else [*entry[key][1:], "gone"]
    (lost,) = index.lost_equations(BOOK, equations)
    assert lost.startswith("Ho, Jain & Abbeel 2020, 2: ") and lost.endswith(" gone")
    if isinstance(entry[key], list) and key != "exports":
        entry[key] = []
        assert index.lost_equations(BOOK, equations) == [f"Ho, Jain & Abbeel 2020, 2: no {key}"]


# ----------------------------------------------------------------------------------------------------------- a browser


@pytest.fixture(scope="session")
def address(site) -> str:
    "The address of a server of the book on this machine."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # one connection for many files

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


READY = "window.MathJax?.startup ? MathJax.startup.promise.then(() => document.fonts.ready).then(() => true) : true"
WIDE = """() => [...document.querySelectorAll('.bd-article *')]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('mjx-container, pre, table'))
  .slice(0, 3).map(e => e.outerHTML.slice(0, 90))"""


async def look(context, address: str, page: str) -> list[str]:
    "Open a page in a new tab and return what is wrong with it."
    tab, wrong = await context.new_page(), []
    tab.on("console", lambda m: m.type in ("error", "warning") and wrong.append(f"{m.type}: {m.text}"))
    tab.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    tab.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or wrong.append(f"asks for {r.url}"))
    tab.on("response", lambda r: r.status < 400 or wrong.append(f"{r.status}: {r.url}"))
    await tab.goto(address + page, wait_until="load")
    await tab.evaluate(READY)
    if errors := await tab.locator("mjx-merror, [data-mjx-error]").count():
        wrong.append(f"{errors} mathematical errors")
    if await tab.evaluate("document.documentElement.scrollWidth") > 375:
        wrong.append(f"scrolls sideways: {await tab.evaluate(WIDE)}")
    await tab.close()
    return [f"{page}: {fault}" for fault in wrong]


def in_browser(task, **context):
    "Run an asynchronous function of a browser context, in a browser of its own."

    async def run():
        async_playwright = pytest.importorskip("playwright.async_api").async_playwright

        async with async_playwright() as p:
            chromium = await p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            try:
                fresh = await chromium.new_context(**context)
                fresh.set_default_timeout(300_000)  # for machines that do much else
                return await task(fresh)
            finally:
                await chromium.close()

    return asyncio.run(run())


@browser
@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.processes
def test_every_page_opens_without_a_fault_on_a_phone(site, address):
    async def all_pages(context):
        tabs = asyncio.Semaphore(3)

        async def one(page):
            async with tabs:
                return await look(context, address, page)

        pages = [page for page in texts(site) if not page.startswith("library/")]  # the library's are of one kind
        return await asyncio.gather(*map(one, [*pages, "library/index.html", "library/gaussian.html"]))

    start = time.perf_counter()
    faults = in_browser(all_pages, viewport={"width": 375, "height": 800})
    print(f"{len(faults)} pages in {time.perf_counter() - start:.0f} s")
    assert [fault for page in faults for fault in page] == []


def test_the_workflow_runs_what_the_makefile_has():
    workflow = (ROOT / ".github" / "workflows" / "pages.yml").read_text(encoding="utf-8")
    assert re.findall(r"run: (.+)", workflow) == ["make book", "make test"] and "path: build/book" in workflow
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target, command in (("book", "tools/book.py"), ("student", "tools/student.py")):
        assert re.search(rf"^{target}: install ##.*\n\t\$\(BIN\)/python {command} \$\(ARGS\)$", makefile, re.M), target


# ------------------------------------------------------------------------------------------- three things to play with


def numbers(stem: str) -> dict:
    "The numbers that a chapter wrote for its toy."
    return json.loads((ROOT / "nbs" / f"{stem}.json").read_text(encoding="utf-8"))


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(page, library, rtol=1e-6) -> None:
    torch.testing.assert_close(tensor(page), torch.as_tensor(library, dtype=torch.float64), rtol=rtol, atol=rtol)


def two_gaussians(s, given, every) -> DDPM:
    "The exact model of two Gaussians, guided: class 0 is `given`, the null label 1 is `every`."
    models = [exact_ddpm(GaussianData([mean], var), s) for mean, var in (given, every)]

    def net(x, t, class_labels):
        return torch.where(class_labels[:, None] == 0, *(m(x, t)[0] for m in models))

    return DDPM(net, s, clip=False)


def guided_ends(s, plan, scale, given, every) -> tuple[float, float]:
    "Mean and variance of what a sampler draws: the library's table of it, and the library's guided network at 0 and 1."
    m = classifier_free(two_gaussians(s, given, every), scale, dict(class_labels=1))
    n = len(plan.t)
    x, t = tensor([[0.0], [1.0]]).repeat(n, 1), plan.t.repeat_interleave(2)
    x0 = m.x0_hat(x, t, m(x, t, class_labels=torch.zeros(2 * n).long())[0], False)
    steps = plan.x0_coef[:, None] * x0.reshape(n, 2) + plan.x_t_coef[:, None] * x.reshape(n, 2)
    mean, variance = 0.0, 1.0
    for (at_0, at_1), std in zip(steps.tolist(), plan.std.tolist(), strict=True):
        mean, variance = at_0 + (at_1 - at_0) * mean, (at_1 - at_0) ** 2 * variance + std**2
    return mean, variance


def test_the_chapters_numbers_are_those_of_the_library():
    s, forward, exact, guidance = linear_schedule(), *map(numbers, ("02_forward", "07_exact", "32_guidance"))
    close(forward["x_t"], q_sample(s, tensor(forward["digit"]), 299, tensor(forward["noise"])), 1e-5)
    close(forward["linear"], s.alpha_bar[[0, 49, 99, 199, 299, 399, 599, 999]], 1e-5)
    blades = MixtureData(*(exact[name] for name in ("weights", "means", "covs")))
    close(exact["scores at t = 120"], blades.marginal(s, 119).score(tensor(exact["places"])), 1e-2)
    for name, plan in (("DDIM", ddim_plan(s, s.T)), ("Algorithm 2", ancestral_plan(s))):
        assert len(guidance[name]) == len(guidance["scales"])
        ends = guided_ends(s, plan, guidance["scales"][4][0], *(sum(guidance[n], []) for n in ("given", "every")))
        close(guidance[name][4], ends)
    c = linear_schedule(100, 1e-3, 0.2)
    m = classifier_free(two_gaussians(c, (0.3, 0.8), (-0.1, 2.0)), 3.0, dict(class_labels=1))
    ends = ddim_sample(m, (2, 1), 100, x_T=tensor([[0.0], [1.0]]), cond=dict(class_labels=torch.zeros(2).long()))
    by_table = guided_ends(c, ddim_plan(c, 100), 3.0, (0.3, 0.8), (-0.1, 2.0))
    close([ends[0].item(), (ends[1] - ends[0]).item() ** 2], by_table)


SAY = "() => ({...document.querySelector('.toy-say').dataset})"


async def press(tab, control: str, *keys: str) -> dict[str, float]:
    "Press keys on a control that has the focus, and return the numbers that the page then gives."
    await tab.locator(f"#toy-{control}").focus()
    for key in keys:
        await tab.keyboard.press(key)
    return {name: float(value) for name, value in (await tab.evaluate(SAY)).items()}


async def toy(context, address: str, name: str):
    "Open the page of a toy; check that every control has a label and can be reached by the keyboard."
    tab = await context.new_page()
    await tab.goto(f"{address}play/{name}.html", wait_until="load")
    await tab.wait_for_selector(".toy[data-ready=yes]")
    for control in await tab.locator(".toy input, .toy select").all():
        label = tab.locator(f"label[for={await control.get_attribute('id')}]")
        assert await label.count() == 1 and await label.inner_text() and await control.get_attribute("tabindex") != "-1"
    return tab


async def play_schedule(context, address):
    tab, stored, s = await toy(context, address, "schedule"), numbers("02_forward"), linear_schedule()
    close(await tab.evaluate("diffusion.schedule('linear', 1000, 1e-4, 0.02).alpha_bar"), s.alpha_bar, 1e-12)
    close(await tab.evaluate("diffusion.schedule('cosine', 1000).beta"), cosine_schedule(1000).beta, 1e-9)
    program = "([x0, eps]) => diffusion.noised(diffusion.schedule('linear', 1000, 1e-4, 0.02), x0, 299, eps)"
    digit, noise = tensor(stored["digit"]), tensor(stored["noise"])
    close(await tab.evaluate(program, [stored["digit"], stored["noise"]]), q_sample(s, digit, 299, noise), 1e-12)
    assert (await tab.evaluate(SAY))["t"] == "299"
    now = await press(tab, "T", "ArrowLeft")
    t = int(now["t"])
    fewer = linear_schedule(990, 1e-4, 10**-1.7)
    close([now["alpha_bar"], now["beta"]], [fewer.alpha_bar[t].item(), fewer.beta[t].item()])
    now = await press(tab, "kind", "ArrowDown")
    close(now["last"], cosine_schedule(990).alpha_bar[-1], 1e-9)


async def play_mixture(context, address):
    tab, stored = await toy(context, address, "mixture"), numbers("07_exact")
    blades = MixtureData(*(stored[name] for name in ("weights", "means", "covs")))
    now, s = await press(tab, "t", "ArrowRight", "ArrowRight"), linear_schedule()
    assert now["t"] == 350
    score = blades.marginal(s, 349).score(torch.zeros(1, 2, dtype=torch.float64))[0]
    close([now["score_x"], now["score_y"]], score)
    await tab.get_by_role("button", name="Play from noise").press("Enter")
    await tab.wait_for_function("document.querySelector('.toy-say').dataset.t < 900")


async def play_guidance(context, address):
    tab, s = await toy(context, address, "guidance"), linear_schedule()
    now = await press(tab, "scale", "ArrowRight")
    assert now["scale"] == 3.1
    for name, plan in (("ddim", ddim_plan(s, s.T)), ("ddpm", ancestral_plan(s))):
        close([now[f"{name}_mean"], now[f"{name}_variance"]], guided_ends(s, plan, 3.1, (0.3, 0.8), (-0.1, 2.0)))
    now = await press(tab, "scale", "Home", *["ArrowRight"] * 10)
    close([now["ddim_mean"], now["ddpm_variance"]], [0.3, 0.8], 0.02)  # scale 1: the class


async def search(context, address):
    "The search finds names with an underscore and words with a hyphen, and every hit has its chapter."
    for words, stem in (("alpha_bar", "02_forward"), ("beta-tilde", "03_posterior")):
        tab = await context.new_page()
        await tab.goto(f"{address}search.html?q={words}", wait_until="load")
        await tab.wait_for_selector(f"#search-results a[href*='{stem}.html']")


@browser
@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.processes
def test_the_toys_react_to_the_keyboard_with_the_numbers_of_the_library(site, address):
    async def everything(context):
        tasks = (play_schedule, play_mixture, play_guidance, search)
        await asyncio.gather(*(task(context, address) for task in tasks))

    in_browser(everything, viewport={"width": 800, "height": 900})

    async def still(context):
        for name in ("schedule", "mixture", "guidance"):
            tab = await context.new_page()
            await tab.goto(f"{address}play/{name}.html")
            assert await tab.locator(".toy-stage img").evaluate("image => image.naturalWidth") > 300

    in_browser(still, java_script_enabled=False)


# ---------------------------------------------------------------------------------------- outside a clone, and students


def test_every_chapter_installs_the_package_where_it_is_missing():
    assert chapters.settings()["git_url"] in launch.install_lines()
    for chapter in BOOK:
        first = next(iter(chapter.code.values()))
        assert first.endswith(launch.install_lines()), f"{chapter.stem}: run `python tools/launch.py`"


@pytest.mark.parametrize("inside", [False, True])
def test_the_first_cell_fetches_and_installs(inside, tmp_path, monkeypatch):
    commands = []

    class Shell:
        run_cell = staticmethod(lambda text: commands.extend(text.split("\n")))
        run_line_magic = staticmethod(lambda *words: commands.append("%" + " ".join(words)))

    (tmp_path / "nbs").mkdir()
    if inside:
        (tmp_path / "ddpm_lit").mkdir()
    monkeypatch.chdir(tmp_path / "nbs")
    program = launch.install_lines()
    exec(program, {"get_ipython": Shell})
    assert commands == [], "the package is there"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(program, {"get_ipython": Shell})
    fetch = [f"!git clone -q {chapters.settings()['git_url']} book", "%cd book/nbs"]
    assert commands == ([] if inside else fetch) + ["%pip install -q .."]


@pytest.mark.parametrize("chapter", BOOK, ids=lambda chapter: chapter.stem)
def test_every_exercise_has_something_to_solve(chapter):
    cells = student.exercises(chapter)
    assert cells or not chapter.section("Exercises")
    for i in cells:
        source = student.opened(chapter.cells[i].source)
        assert source.count("...") > 1 and len(source) < len(chapter.cells[i].source) + len(student.HINT)
        compile(source, chapter.stem, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["01_gaussian"])
def test_an_open_exercise_fails_and_its_solution_passes(stem, monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "nbs")
    import matplotlib

    matplotlib.use("agg")
    chapter = next(chapter for chapter in BOOK if chapter.stem == stem)
    state, last = {"__name__": "__main__"}, student.exercises(chapter)[-1]
    for i, source in chapter.code.items():
        if i in student.exercises(chapter):
            with pytest.raises(Exception):  # noqa: B017
                exec(student.opened(source), dict(state))
        if i <= last:
            exec(source, state)
    assert "✓" in capsys.readouterr().out


def test_the_copy_for_students_is_complete(tmp_path):
    n = student.write(tmp_path)
    assert n >= len(BOOK) - 3
    assert {path.stem for path in tmp_path.glob("*.ipynb")} == {chapter.stem for chapter in BOOK}
    for path in (ROOT / "nbs").glob("*.json*"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
