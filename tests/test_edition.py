"""The HTML edition of the tutorial: its structure in plain pytest, its behaviour in a browser with `-m slow`.

    pytest tests/test_edition.py -m "slow or not slow"

Oracles: the chapters' own text, a dense update by tests/twin.py for the figures' numbers, and Chromium,
driven by playwright, for console errors, sliders, widths, colours, print. No browser: they skip and say so.
"""

import builtins
import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import twin

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "tutorial"
sys.path[:0] = [str(TUTORIAL), str(TUTORIAL / "interactive")]

import compute  # noqa: E402
import edition  # noqa: E402

CHAPTERS = sorted(TUTORIAL.glob("[0-9][0-9]_*.md"))

SAMPLE = r"""# 1. Slices of `W`

> The idea in a sentence.

Inline $W \in \mathbb{R}^{m \times n}$, prices of $5 and $6, see [the file](../hd_pissa.py#L3-L5), [the
next](02_next.md#a-heading-with-code), [tests](../tests) and [the README](../README.md).

$$W_{t+1} = W_t + \frac{1}{K} \sum_{i=0}^{K-1} \Delta U_i$$

A product $`K r \le m`$ in a sentence.

```math
\Delta U_i = \Delta A_i B_i + A_i \Delta B_i < 1
```
<!-- check: dU -->

<!-- excerpt: hd_pissa.py:rank -->

```python
def rank() -> int:
    return 0 if 1 < 2 else 1
```

[hd_pissa.py, lines 3 to 5](../hd_pissa.py#L3-L5)

<!-- end -->

| a | b |
| --- | --- |
| 1 | 2 |

```math
\lVert \text{rest} \rVert^2 = 0
```
<!-- definition -->

<!-- program: 01_sample.py -->

<details><summary>Imports and data</summary>

```python
import folded
```

</details>

```python
shown = folded
```

[01_sample.py, 2 lines](01_sample.py)

<!-- end -->

It prints

<!-- output: 01_sample.py -->

```text
ok  <1e-3>
```

<!-- end -->

<details><summary>Hint</summary>

```python
hidden = 1
```

</details>

<!-- interactive: step -->
"""


class Page(html.parser.HTMLParser):
    """Links, loaded addresses, ids, text by tag, and labels of one page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids, self.open, self.pre, self.images = [], [], [], [], [], []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "link", "br", "hr", "input"):
            self.open.append(tag)
        if tag == "pre":
            self.pre.append("")
        if tag == "img":
            self.images.append(attributes.get("src"))
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        elif tag != "a":
            loading = attributes.keys() & {"href", "src", "data", "srcset", "poster"}
            self.loads += [attributes[k] for k in loading]
        if "id" in attributes:
            self.ids.append(attributes["id"])

    def handle_startendtag(self, tag, attributes):      # <img ... />
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.text += data
        if "pre" in self.open:
            self.pre[-1] += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The edition of the real chapters."""
    pytest.importorskip("markdown_it", reason="pip install '.[tutorial]'")
    folder = tmp_path_factory.mktemp("edition") / "html"
    edition.build(folder)
    return folder


@pytest.fixture(scope="module")
def pages(folder) -> dict[str, Page]:
    return {path.name: Page(path.read_text()) for path in folder.glob("*.html")}


@pytest.fixture
def sample(tmp_path, monkeypatch) -> Path:
    """A tutorial of two small chapters, built."""
    pytest.importorskip("markdown_it", reason="pip install '.[tutorial]'")
    (tmp_path / "tutorial").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "hd_pissa.py").write_text('"""One."""\n\ndef rank() -> int:\n    """<b>"""\n    return 0\n')
    (tmp_path / "README.md").write_text("# Read me\n\n[first](tutorial/01_sample.md) [licence](LICENSE)\n")
    (tmp_path / "LICENSE").write_text("MIT\n")
    (tmp_path / "tutorial" / "01_sample.md").write_text(SAMPLE)
    (tmp_path / "tutorial" / "02_next.md").write_text("# 2. Next\n\n> More.\n\n## A heading with `code`\n")
    for name in ("edition.css", "interactive"):
        (tmp_path / "tutorial" / name).symlink_to(TUTORIAL / name)
    monkeypatch.setattr(edition, "HERE", tmp_path / "tutorial")
    monkeypatch.setattr(edition, "ROOT", tmp_path)
    monkeypatch.setattr(compute, "step", lambda: {"K": 4})
    edition.build(tmp_path / "html")
    return tmp_path / "html"


def chapter_with(folder, figure):
    return next(c.stem + ".html" for c in CHAPTERS
                if f'data-interactive="{figure}"' in (folder / f"{c.stem}.html").read_text())


# ---- Structure ---------------------------------------------------------------------------------------------


def test_every_chapter_has_a_page_and_every_page_leads_to_all(pages):
    assert CHAPTERS
    for chapter in CHAPTERS:
        title = re.search(r"^# (.+)$", chapter.read_text(), re.M)[1].replace("`", "")
        page = pages[chapter.stem + ".html"]
        assert title in page.text
        assert {c.stem + ".html" for c in CHAPTERS} | {"index.html"} <= set(page.links)
        assert page.images and None not in page.images, f"{chapter.name}: a figure is missing"
    assert "map.html" in pages


def test_internal_links_resolve(pages, folder):
    assert sum(len(page.links) for page in pages.values()) > 20
    for name, page in pages.items():
        assert len(page.ids) == len(set(page.ids)), f"{name}: an id twice"
        for link in [*page.links, *page.loads]:
            if re.match(r"https?:|mailto:|data:", link):
                continue
            file, _, fragment = link.partition("#")
            assert not file or (folder / file).is_file(), f"{name} links to {link}"
            if fragment:
                assert fragment in pages[file or name].ids, f"{name} links to {link}"


def test_nothing_is_loaded_from_a_network(pages, folder):
    for name, page in pages.items():
        assert [a for a in page.loads if not re.match(r"data:,$|[\w.-]+$", a)] == [], name
        assert "edition.css" in page.loads
    css = (folder / "edition.css").read_text()
    assert "@import" not in css and "url(" not in css
    scripts = list(folder.glob("*.js"))
    assert len(scripts) == 3
    for script in scripts:
        text = script.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//\w+\.|fetch\(|XMLHttpRequest|import ", text), script.name


def test_pages_hold_every_code_block_of_their_chapter(pages):
    for chapter in CHAPTERS:
        fences = [code for kind, code in re.findall(r"^```(\w*)\n(.*?)^```$", chapter.read_text(),
                                                    re.M | re.DOTALL) if kind != "math"]
        shown = [text.strip("\n") for text in pages[chapter.stem + ".html"].pre]
        for fence in fences:
            assert fence.strip("\n") in shown, f"{chapter.name}: {fence[:200]}"


def test_source_page_numbers_the_lines_of_the_file(pages):
    source = (ROOT / "hd_pissa.py").read_text()
    page, lines = pages["hd_pissa.py.html"], source.splitlines()
    assert page.ids[-1] == f"L-{len(lines)}"
    shown = [re.sub(r"^ *\d+", "", line, count=1).rstrip() for line in page.pre[0].splitlines()]
    assert shown == [line.rstrip() for line in lines]


def test_both_interactive_figures_stand_in_chapters(folder):
    texts = {c.stem: (folder / f"{c.stem}.html").read_text() for c in CHAPTERS}
    for name in edition.FIGURES:
        inside = [stem for stem, text in texts.items() if f'data-interactive="{name}"' in text]
        assert inside, f"no chapter says <!-- interactive: {name} -->"
        assert f'<script src="{name}.js" defer>' in texts[inside[0]]


def test_sample_chapter(sample):
    text, page = (sample / "01_sample.html").read_text(), Page((sample / "01_sample.html").read_text())
    assert text.count("<math") == 5 and text.count('display="block"') == 3 and "$5 and $6" in text
    assert "`" not in text and "\\" not in page.text and "ΔUi=ΔAiBi+AiΔBi<1" in page.text
    assert "def rank() -> int:\n    return 0 if 1 < 2 else 1\n" in page.pre
    assert {"hd_pissa.py.html#L-3", "02_next.html#a-heading-with-code", "README.md.html"} <= set(page.links)
    assert 'class="outside">tests</a>' in text and "<!--" not in text
    # excerpt, program and output stand in the code column, equations, tables and the hint in the prose
    column = r'<div class="(prose after|prose|code)">(.*?)</div>\n(?=<div|</div>)'
    columns = re.findall(column, text, re.DOTALL)
    needles = {"<mi>U</mi>": "prose", "rest": "prose", "<table>": "prose", "hidden": "prose",
               "lines 3 to 5": "code", "ok  ": "code", "import": "code", "2 lines": "code"}
    kind = {needle: name[:5].strip() for needle in needles for name, body in columns if needle in body}
    assert kind == needles
    assert '<details><summary>Imports and data</summary>' in text
    assert "LICENSE" not in [p.name for p in sample.iterdir()] and (sample / "hd_pissa.py.html").is_file()
    assert (sample / "README.md.html").read_text().count('href="01_sample.html"') == 2     # menu and text


def test_every_equation_becomes_mathml():
    """As many displayed equations as the chapters have fences; no command and no & is left as text."""
    xml = pytest.importorskip("xml.etree.ElementTree")
    convert = pytest.importorskip("latex2mathml.converter").convert
    found = 0
    for chapter in CHAPTERS:
        text = chapter.read_text()
        fences = re.findall(r"^```math\n(.*?)^```$", text, re.M | re.S)
        for latex in fences + re.findall(r"\$`(.+?)`\$", text):
            words = "".join(xml.fromstring(convert(latex)).itertext())
            assert words.strip() and not re.search(r"[\\&{}]", words), latex
            found += 1
    assert found > 40


def test_the_edition_needs_the_requirements_of_the_tutorial_alone(tmp_path):
    """torch, numpy, tqdm and the extra [tutorial]; and what it builds leaves the repository as it was."""
    pytest.importorskip("markdown_it", reason="pip install '.[tutorial]'")
    others = ["transformers", "peft", "accelerate", "safetensors", "datasets", "hypothesis", "gguf",
              "lm_eval", "playwright", "pytest", "tiktoken"]
    script = (f"import sys\nfor name in {others}: sys.modules[name] = None\n"
              f"sys.path.insert(0, {str(TUTORIAL)!r})\nimport edition\n"
              f"edition.build({str(tmp_path / 'html')!r})\n")
    state = [(p, p.stat().st_mtime_ns) for p in sorted(TUTORIAL.rglob("*.md"))]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    assert (tmp_path / "html" / "index.html").is_file()
    assert state == [(p, p.stat().st_mtime_ns) for p in sorted(TUTORIAL.rglob("*.md"))]


def test_the_table_of_chapters_names_its_columns(folder):
    """So that a phone can show a row as a card: every cell says which column it is of."""
    text = (folder / "index.html").read_text()
    table = re.search(r'<table class="cards">.*?</table>', text, re.S)[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.S)[1:]
    assert len(rows) == len(CHAPTERS)
    for row in rows:
        assert re.findall(r'data-column="(\w+)"', row) == ["chapter", "idea", "program", "reading"]


def test_another_folder_is_not_emptied(sample, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="give another folder"):
        edition.build(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"
    edition.build(sample)                       # an edition is


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *rest):
        if name == "latex2mathml.converter":
            raise ImportError(name, name="latex2mathml")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r'needs latex2mathml: pip install "\.\[tutorial\]"'):
        edition.build(tmp_path)


def test_an_unknown_figure_is_refused():
    with pytest.raises(ValueError, match="interactive: devises is none of devices, step"):
        edition.figure("devises")


def test_pages_hold_the_data_of_their_figures(folder):
    found = {}
    for name in edition.FIGURES:
        text = (folder / chapter_with(folder, name)).read_text()
        inside = rf'data-interactive="{name}".*?<script type="application/json">(.*?)</script>'
        found[name] = json.loads(re.search(inside, text, re.DOTALL)[1])
    assert set(found["devices"]["hd_pissa"]) == {f"{K},{r}" for K in range(1, 9) for r in range(1, 9)}
    S = compute.spectrum(*compute.problem(compute.M, compute.N, compute.ROWS), 5, 2)
    shown = torch.tensor(found["devices"]["hd_pissa"]["5,2"]) / 10
    assert torch.allclose(shown[:20], S[:20].log10().float(), atol=0.051) and (shown[20:] < -12).all()
    assert found["step"]["matrices"]["dW"]["rank"] == 16


# ---- Numbers of the figures --------------------------------------------------------------------------------


def dense_update(W, X, target, factors):
    """(increments, mean of dU_i) of AdamW's first step, device by device; gradients of the mean square."""
    total, K = torch.zeros_like(W), len(factors)
    increments = []
    for (A, B), x, y in zip(factors, X.chunk(K), target.chunk(K)):
        dW = 2 * x.T @ (x @ W - y) / y.numel()
        dA, dB = (twin.adamw(g, [0.0, 0.0, 0], compute.LR) for g in (dW @ B.T, A.T @ dW))
        increments.append((dA, dB))
        total += (dA @ B + A @ dB + dA @ dB) / K
    return increments, total


def test_spectra_are_those_of_a_dense_update():
    W, X, target = compute.problem(compute.M, compute.N, compute.ROWS)
    for K, r in ((1, 3), (3, 2), (8, 1), (4, 8)):
        shown = compute.spectrum(W, X, target, K, r)
        S = torch.linalg.svdvals(dense_update(W, X, target, twin.slices(W, K, r))[1])
        end = min(2 * K * r, compute.N)
        assert torch.allclose(shown[:end], (S / S[0])[:end], rtol=1e-6), (K, r)
        assert shown[end:].max() < 1e-12 if end < compute.N else shown[-1] > 1e-6
    assert (compute.spectrum(W, X, target, 1, 3, "lora") > compute.NUMERICAL_ZERO).sum() == 3


def test_matrices_of_the_step_are_those_of_a_dense_update():
    data = compute.step()
    W, X, target = compute.problem(data["m"], data["n"], data["rows"])
    factors = twin.slices(W, data["K"], data["r"])
    increments, total = dense_update(W, X, target, factors)

    def shown(name):
        value = data["matrices"][name]
        return torch.tensor(value["percent"]) / 100 * value["largest"]

    for i, ((A, B), (dA, dB)) in enumerate(zip(factors, increments)):
        for name, expected in (("A", A), ("B", B), ("dA", dA), ("dB", dB),
                               ("dU", dA @ B + A @ dB + dA @ dB)):
            # signs of singular vectors are free: A_i, B_i may both be negated, then so are dA_i, dB_i
            got = shown(f"{name}{i}").double()
            error = min(torch.dist(got, expected), torch.dist(got, -expected) if name != "dU" else 9)
            assert error < 0.06 * expected.norm(), f"{name}{i}"
            assert data["matrices"][f"{name}{i}"]["rank"] == (2 if name != "dU" else 4)
    assert torch.dist(shown("dW").double(), total) < 0.06 * total.norm()
    assert data["matrices"]["dW"]["rank"] == 2 * data["K"] * data["r"] == torch.linalg.matrix_rank(total)
    assert data["loss"][1] == pytest.approx(float((X @ (W + total) - target).square().mean()), rel=1e-4)


# ---- In a browser ------------------------------------------------------------------------------------------

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
         "--disable-background-networking", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="pip install '.[tutorial]'")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium; apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, folder):
    """visit(name, width=..., scheme=...) opens a page of the edition; console errors and requests fail."""
    contexts, troubles = [], []

    def open_page(name, width=1440, height=900, scheme="light", folder=folder):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: troubles.append(str(e)))
        page.on("requestfailed", lambda r: troubles.append(f"failed: {r.url}"))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else troubles.append(r.url))
        page.goto((folder / name).as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


WIDER = """() => [...document.querySelectorAll("body *")].filter(e =>
    e.getBoundingClientRect().right > innerWidth + 1 && !e.closest("pre, .table, .menu nav, .equation")
    ).map(e => e.outerHTML.slice(0, 120))"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 768, 1440])
def test_pages_load_and_never_scroll_sideways(visit, pages, width):
    page = visit("index.html", width)
    for name in sorted(pages):
        page.goto(page.url.rsplit("/", 1)[0] + "/" + name)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, (name, page.evaluate(WIDER))
        assert page.evaluate(WIDER) == [], name
        broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
        assert page.evaluate(broken) == [], name


@pytest.mark.slow
def test_code_stands_beside_prose_and_below_it_on_a_phone(visit, folder):
    sides = """() => [...document.querySelectorAll(".paired")].map(row => {
        const [prose, code] = [".prose", ".code"].map(c => row.querySelector(`:scope > ${c}`));
        if (!prose) return null;
        const [a, b] = [prose, code].map(e => e.getBoundingClientRect());
        return [a.right <= b.left, Math.abs(a.top - b.top) < 60, a.bottom <= b.top + 1]; }).filter(Boolean)"""
    for chapter in CHAPTERS:
        wide = visit(chapter.stem + ".html").evaluate(sides)
        assert wide and all(beside and level for beside, level, _ in wide), chapter.name
        assert all(below for *_, below in visit(chapter.stem + ".html", 390).evaluate(sides)), chapter.name


@pytest.mark.slow
def test_the_table_of_chapters_is_cards_on_a_phone_and_text_fills_a_desktop(visit):
    """Each row a card of the phone's width below the one before; on a desktop a row again, and the text of a
    chapter reaches into the right half."""
    boxes = """() => [...document.querySelectorAll(".cards tbody tr")]
        .map(e => e.getBoundingClientRect().toJSON())"""
    phone = visit("index.html", 390)
    cards = phone.evaluate(boxes)
    assert all(300 < card["width"] <= 390 and card["height"] > 100 for card in cards)
    assert all(a["bottom"] < b["top"] for a, b in zip(cards, cards[1:]))
    assert phone.locator(".cards th").first.is_hidden()
    desktop = visit("index.html", 1440)
    assert all(row["height"] < 100 for row in desktop.evaluate(boxes))
    right = """() => [...document.querySelectorAll("main :is(p, pre, li, img)")]
        .filter(e => e.getBoundingClientRect().left > innerWidth / 3).length"""
    for chapter in CHAPTERS:
        assert visit(chapter.stem + ".html").evaluate(right) > 5, chapter.name


@pytest.mark.slow
def test_sliders_of_K_and_r_change_the_figure(visit, folder):
    page = visit(chapter_with(folder, "devices"), 390)
    figure = page.locator('[data-interactive="devices"]')
    sliders = {key: figure.get_by_label(re.compile(f"^{key}, ")) for key in "Kr"}   # found by their labels
    seen = set()

    def state(K, r):
        full = compute.N
        held = [float(rect.get_attribute("x")) for rect in figure.locator("rect.held").all()]
        assert len(held) == 2 * K               # PiSSA's slices, then HD-PiSSA's
        assert len(set(held[:K])) == 1 and held[K:] == sorted(set(held[K:]))
        text = figure.locator(".readout").inner_text()
        assert f"K = {K}, r = {r}." in text
        assert f"LoRA {r}, PiSSA {2 * r}, HD-PiSSA {min(2 * K * r, full)} of {full}" in text
        words = [figure.locator("svg[role=img]").nth(j).get_attribute("aria-label") for j in range(2)]
        assert f"device {K - 1}: {(K - 1) * r} to {K * r - 1}" in words[0]
        assert f"edge 2Kr = {2 * K * r}" in words[1]
        seen.add(figure.locator(".picture").inner_html())

    state(4, 2)
    sliders["K"].focus()
    page.keyboard.press("ArrowRight")
    state(5, 2)
    page.keyboard.press("End")
    state(8, 2)
    page.keyboard.press("Tab")                  # on to r
    page.keyboard.press("ArrowLeft")
    state(8, 1)
    page.keyboard.press("End")
    state(8, 8)
    sliders["K"].fill("1")
    state(1, 8)
    assert len(seen) == 6


@pytest.mark.slow
def test_stepping_through_one_update_changes_the_figure(visit, folder):
    page = visit(chapter_with(folder, "step"), 390)
    figure = page.locator('[data-interactive="step"]')
    back, following = figure.get_by_role("button", name="Back"), figure.get_by_role("button", name="Next")
    seen, said = [], []
    assert back.is_disabled()
    for phase in range(1, 7):
        seen.append(figure.locator(".picture").inner_html())
        said.append(figure.locator(".readout").inner_text())
        assert said[-1].startswith(f"{phase} of 6.")
        labels = [svg.get_attribute("aria-label") for svg in figure.locator("svg").all()]
        assert all(re.search(r"\d+ by \d+, rank \d+, largest entry", label) for label in labels)
        ranks = {re.match(r"[^,_]+", label)[0]: int(re.search(r"rank (\d+)", label)[1]) for label in labels}
        expected = ({"A": 2, "B": 2}, {"g": 2}, {"ΔA": 2, "ΔB": 2}, {"ΔU": 4}, {"ΔU": 4, "ΔW": 16},
                    {"ΔW": 16, "W + ΔW": 20})[phase - 1]
        assert ranks.items() >= expected.items(), phase
        if phase < 6:
            following.focus()
            page.keyboard.press("Enter")
    assert len(set(seen)) == len(set(said)) == 6
    assert following.is_disabled()
    back.click()
    assert figure.locator(".readout").inner_text() == said[4]


@pytest.mark.slow
def test_print_hides_controls_wraps_code_and_keeps_the_state(visit, folder):
    page = visit(chapter_with(folder, "devices"))
    page.get_by_label(re.compile("^K, ")).fill("6")
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF") and 1 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) < 40
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 680, "height": 960})       # A4 within its margins
    for hidden in ("header", "footer", ".controls"):
        assert not page.locator(hidden).first.is_visible(), hidden
    assert "K = 6, r = 2." in page.locator(".readout").first.inner_text()
    assert page.locator("rect.held").count() == 12 and page.locator(".picture svg").first.is_visible()
    wide = "[...document.querySelectorAll('pre')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert page.evaluate(wide) == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 680


@pytest.mark.slow
def test_map_prints_on_one_page(visit):
    pdf = visit("map.html").pdf(format="A4")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_and_size(visit, folder, scheme):
    """WCAG's ratio of 4.5 for all text, and no text below 10 px on a phone, in both colour schemes."""
    page = visit(chapter_with(folder, "devices"), 390, scheme=scheme)
    found = page.evaluate("""() => {
        const rgb = c => c.match(/[\\d.]+/g).map(Number);
        const light = c => rgb(c).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const ground = e => { for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor;
            if (rgb(c)[3] !== 0) return c;
        } };
        const out = [];
        for (const e of document.querySelectorAll("main *")) {
            const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
            if (!own || !e.getClientRects().length || e.closest("math, script, :disabled")) continue;
            const style = getComputedStyle(e), svg = e.closest("svg");
            const [a, b] = [light(svg ? style.fill : style.color), light(ground(e))].sort((x, y) => y - x);
            const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
            out.push([(a + 0.05) / (b + 0.05), parseFloat(style.fontSize) * scale, e.outerHTML.slice(0, 90)]);
        }
        return out; }""")
    assert len(found) > 50
    assert [row for row in found if row[0] < 4.5] == []
    assert [row for row in found if row[1] < 10] == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.search(r"\d+", dark)[0]) < 64) == (scheme == "dark")
