"""The HTML edition of the tutorial: static pages in one folder that load nothing from a network.

    python tutorial/edition.py                    writes tutorial/html/; open index.html there
    python tutorial/edition.py --folder DIR

Every chapter, tutorial/NN_name.md, becomes a page: prose on the left, code on the right, stacked on a phone.
README.md and MAP.md here become pages too. Whatever they link to inside the repository comes along: programs
as highlighted pages with line numbers, other Markdown as pages, figures as files. Equations, in ```math
and in $`...`$, become MathML. An interactive figure stands where a chapter says

    <!-- interactive: devices -->       or "step"; its data are computed now, by interactive/compute.py

Needs markdown-it-py, mdit-py-plugins, Pygments and latex2mathml: pip install ".[tutorial]".
"""

import argparse
import html
import json
import os
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PROSE, CODE = 27, 19    # height of a line in pixels, about: decides which prose fits beside long code

SOURCE = "The numbers are those of hd_pissa.py (<code>python tutorial/interactive/compute.py</code>)."
FIGURES = {             # name: (title, what to look for)
    "devices": (
        "Slide K and r",
        "Which components of W each device holds, and the singular values of ΔW after one update. W is "
        "96 × 64 in float64; the gradient has full rank, so the method alone limits the rank of ΔW. Rank "
        f"counts singular values above 1e-9 of the largest. {SOURCE}"),
    "step": (
        "Step through one update",
        "One update of a 24 × 20 weight over four devices. Blue entries are positive, orange ones negative; "
        f"every map has its own scale, and below it stand its rank and its largest entry. {SOURCE}"),
}


class Libraries:
    """The optional packages, imported when an edition is written; ValueError with the remedy without them."""

    def __init__(self):
        try:
            import pygments
            import pygments.formatters
            import pygments.lexers
            from latex2mathml.converter import convert
            from markdown_it import MarkdownIt
            from mdit_py_plugins.anchors import anchors_plugin
            from mdit_py_plugins.dollarmath import dollarmath_plugin
        except ImportError as e:
            raise ValueError(f"the HTML edition needs {e.name}: "
                             'pip install ".[tutorial]"') from None
        self.pygments, self.convert = pygments, convert
        self.markdown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
        self.markdown.use(anchors_plugin, max_level=4).use(
            dollarmath_plugin, allow_digits=False, double_inline=True,
            renderer=lambda text, options: convert(
                text.strip("`"), display="block" if options["display_mode"] else "inline"))
        self.markdown.add_render_rule("fence", lambda _, tokens, i, *rest: self.fence(tokens[i]))

    def highlight(self, code: str, language: str, **options) -> str:
        try:
            lexer = self.pygments.lexers.get_lexer_by_name(language, stripnl=False)
        except self.pygments.util.ClassNotFound:
            lexer = self.pygments.lexers.get_lexer_by_name("text")
        return self.pygments.highlight(code, lexer, self.pygments.formatters.HtmlFormatter(**options))

    def fence(self, token) -> str:
        """A fenced block: code, a displayed equation, or plain text. All scroll inside themselves."""
        language = (token.info.split() or ["text"])[0]
        if language == "math":
            math = self.convert(token.content, display="block")
            return f'<div class="equation" tabindex="0">{math}</div>\n'
        code = self.highlight(token.content, language, nowrap=True)
        return f'<pre class="{html.escape(language)}" tabindex="0"><code>{code}</code></pre>\n'


# ---- Prose beside code -------------------------------------------------------------------------------------


def blocks(markdown, text: str):
    """(kind, HTML, height in pixels, about) of every top-level block; kind: prose, heading, code, figure.

    What a program prints, and its figure, are code: they stand beside the text about them.
    """
    tokens, start, generated, pending = markdown.parse(text), 0, "", ""
    for i, token in enumerate(tokens):
        if token.level or token.nesting == 1:
            continue
        part, start = tokens[start:i + 1], i + 1
        rendered = markdown.renderer.render(part, markdown.options, {})
        if token.type == "html_block":
            marker = r"<!-- (excerpt|program|output|contents|interactive|end)(?:: (\w+).*?)? -->"
            for name, value in re.findall(marker, rendered):
                generated = "" if name == "end" else name
                if name == "interactive":
                    yield "figure", value, 0
            rendered = re.sub(r"<!--.*?-->\s*", "", rendered, flags=re.DOTALL)
        pending += rendered
        if pending.count("<details") > pending.count("</details"):
            continue                            # one block until the element is closed
        rendered, pending, whole = pending, "", pending == rendered
        if not rendered.strip():
            continue
        kind, height = "prose", PROSE * (2 + len(re.sub(r"<.*?>", "", rendered)) // 65)
        if "<img" in rendered:
            kind, height = "code", 11 * PROSE
        if rendered.startswith("<details"):
            height = 2 * PROSE
        if token.type == "heading_close":
            kind = "heading"
        elif whole and token.type == "fence":
            height = CODE * (2 + token.content.count("\n"))
        if generated in ("excerpt", "program", "output") or (
                whole and token.type == "fence" and token.info == "python"):
            kind = "code"                       # with the link below an excerpt
        if generated == "contents" and "<table" in rendered:
            rendered = cards(rendered)
        yield kind, rendered, height


def cards(table: str) -> str:
    """The table with each cell's column named, so that a phone can show its rows as cards."""
    head = [re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<th.*?>(.*?)</th>", table)]
    count = iter(range(table.count("<td")))
    table = re.sub(r"<td", lambda _: f'<td data-column="{head[next(count) % len(head)]}"', table)
    return table.replace("<table", '<table class="cards"', 1)


def rows(markdown, text: str) -> str:
    """The body of a page: rows of prose, the code that follows it, then as much prose as fits beside that.

    Of the prose before a short piece of code only the end stands beside it, so that the two meet.
    """
    out, before, code, after = [], [], [], []       # lists of (HTML, height)

    def height(*lists):
        return sum(block[1] for blocks in lists for block in blocks)

    def flush():
        parts = ("prose", before), ("code", code), ("prose after", after)
        inner = "".join(f'<div class="{name}">{"".join(block[0] for block in part)}</div>\n'
                        for name, part in parts if part)
        if inner:
            out.append(f'<div class="row{" paired" if code else ""}">\n{inner}</div>\n')
        before.clear(), code.clear(), after.clear()

    def begin_code(needed):
        lead = [before.pop()] if before else []
        while before and height(lead, before[-1:]) < needed:
            lead.insert(0, before.pop())
        if before and before[-1][0].startswith("<h"):   # a heading stays with its text
            lead.insert(0, before.pop())
        flush()
        before.extend(lead)

    for kind, content, tall in blocks(markdown, text):
        if kind == "figure":
            flush()
            out.append(figure(content))
        elif kind == "code":
            if after:                               # "From hd_pissa.py:" goes beside what it announces
                lead = after.pop()
                flush()
                before.append(lead)
            elif not code:
                begin_code(tall)
            code.append((content, tall))
        elif code and height(before, after) + tall < height(code) + (3 if kind == "prose" else -8) * PROSE:
            after.append((content, tall))
        else:
            stays = [after.pop()] if after and after[-1][0].startswith("<h") else []
            if code or kind == "heading":
                flush()
            before.extend([*stays, (content, tall)])
    flush()
    return "".join(out)


def figure(name: str) -> str:
    """An interactive figure with its data; without JavaScript a sentence stands in its place."""
    if name not in FIGURES:
        raise ValueError(f"interactive: {name} is none of {', '.join(FIGURES)}; fix the marker")
    sys.path.insert(0, str(HERE / "interactive"))
    import compute
    title, text = FIGURES[name]
    data = json.dumps(getattr(compute, name)(), separators=(",", ":"))
    return (f'<figure class="interactive" data-interactive="{name}" aria-label="{title}">\n'
            f'<h3>{title}</h3>\n<div class="stage"><p>This figure needs JavaScript.</p></div>\n'
            f'<figcaption>{text}</figcaption>\n'
            f'<script type="application/json">{data}</script>\n</figure>\n')


# ---- Pages and their links ---------------------------------------------------------------------------------


def page_name(path: Path) -> str:
    """File name of a page in the edition for a file of the repository."""
    if path.parent == HERE and path.suffix == ".md":
        return {"README": "index", "MAP": "map"}.get(path.stem, path.stem) + ".html"
    return "-".join(path.relative_to(ROOT).parts) + ".html"


class Edition:
    """Pages to write and the files they have linked to so far."""

    def __init__(self, folder: Path):
        self.folder, self.lib = folder, Libraries()
        self.chapters = sorted(HERE.glob("[0-9][0-9]_*.md"))
        self.titles = {path: title_of(path.read_text(), path.stem) for path in self.chapters}
        self.queue = [p for p in (HERE / "README.md", *self.chapters, HERE / "MAP.md") if p.is_file()]
        contents = HERE / "README.md"
        self.name = title_of(contents.read_text(), "Contents") if contents.is_file() else "Contents"
        self.first = set(self.queue)            # pages in the navigation; links of all others end with them

    def link(self, target: str, base: Path, own: bool) -> str | None:
        """A link as the edition has it; None for what stays outside. `own`: may it bring a new page along?"""
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            return target
        file, _, fragment = target.partition("#")
        path = (base.parent / file).resolve()
        picture = path.suffix in (".svg", ".png", ".jpg")
        if ROOT not in path.parents or not path.is_file() or not (own or picture or path in self.queue):
            return None
        if picture:
            name = "-".join(path.relative_to(HERE if HERE in path.parents else ROOT).parts)
            shutil.copyfile(path, self.folder / name)
            return name
        if path not in self.queue:
            self.queue.append(path)
        lines = re.fullmatch(r"L(\d+)(-L\d+)?", fragment)
        return page_name(path) + (f"#L-{lines[1]}" if lines else f"#{fragment}" if fragment else "")

    def relink(self, body: str, base: Path) -> str:
        own = base in self.first

        def attribute(found):
            where = self.link(html.unescape(found[2]), base, own)
            return f'{found[1]}="{html.escape(where)}"' if where else 'class="outside"'

        return re.sub(r'\b(href|src)="([^"]*)"', attribute, body)

    def source(self, path: Path) -> str:
        """A program as a page, each line with an anchor."""
        language = {".py": "python", ".json": "json", ".toml": "toml", ".sh": "bash"}.get(path.suffix, "text")
        code = self.lib.highlight(path.read_text(), language, linenos="inline", linespans="L",
                                  cssclass="source")
        code = code.replace("<pre>", '<pre tabindex="0">', 1)
        return f"<h1><code>{path.relative_to(ROOT)}</code></h1>\n{code}\n"

    def page(self, path: Path, title: str, body: str) -> str:
        entries = [(p, "Contents" if p.stem == "README" else "Map of hd_pissa.py" if p.stem == "MAP"
                    else self.titles[p]) for p in self.queue if p in self.first]
        here = {path: " aria-current=page"}
        items = "".join(f'<li><a href="{page_name(p)}"{here.get(p, "")}>{html.escape(name)}</a></li>'
                        for p, name in entries)
        order = [p for p, _ in entries]
        at = order.index(path) if path in order else None
        steps = [(label, order[at + d]) for label, d in (("Previous", -1), ("Next", 1))
                 if at is not None and 0 <= at + d < len(order)]
        footer = "".join(f'<a rel="{label[:4].lower()}" href="{page_name(p)}">{label}: '
                         f'{html.escape(dict(entries)[p])}</a>' for label, p in steps)
        names = re.findall(r'data-interactive="(\w+)"', body)
        scripts = "".join(f'<script src="{name}.js" defer></script>\n' for name in ["draw", *names] if names)
        return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="edition.css">
{scripts}</head>
<body>
<a class="skip" href="#main">Skip to the text</a>
<header><a href="index.html">{html.escape(self.name)}</a>
<details class="menu"><summary>Chapters</summary><nav aria-label="Chapters"><ul>{items}</ul></nav></details>
</header>
<main id="main">
{body}</main>
<footer><nav aria-label="Neighbours">{footer}</nav></footer>
</body>
</html>
"""

    def write(self) -> list[str]:
        for name in ("edition.css", *(f"interactive/{s}.js" for s in ("draw", *FIGURES))):
            shutil.copyfile(HERE / name, self.folder / Path(name).name)
        if HERE / "README.md" not in self.queue:
            links = "".join(f'<li><a href="{page_name(p)}">{html.escape(t)}</a></li>'
                            for p, t in self.titles.items())
            body = f'<div class="row"><div class="prose"><h1>Contents</h1><ul>{links}</ul></div></div>\n'
            (self.folder / "index.html").write_text(self.page(HERE / "index", "Contents", body))
        for path in self.queue:                 # grows while pages link to more files
            text = path.read_text()
            if path.suffix == ".md":
                title = title_of(text, path.stem)
                body = rows(self.lib.markdown, text)
                body = re.sub(r"<table.*?</table>", r'<div class="table" tabindex="0">\g<0></div>', body,
                              flags=re.DOTALL)
            else:
                title, body = path.name, self.source(path)
            (self.folder / page_name(path)).write_text(self.page(path, title, self.relink(body, path)))
        return [page_name(path) for path in self.queue]


def title_of(text: str, otherwise: str) -> str:
    """The first heading, as plain text."""
    found = re.search(r"^# +(.+)$", text, re.M)
    return re.sub(r"[`*]", "", found[1]) if found else otherwise


def build(folder: Path) -> list[str]:
    """Write the edition into `folder`, emptied before; the names of its pages."""
    edition, folder = Edition(Path(folder)), Path(folder)
    if folder.is_dir():
        if any(folder.iterdir()) and not (folder / "edition.css").is_file():
            raise ValueError(f"{folder} holds something else than an edition; give another folder")
        shutil.rmtree(folder)
    os.makedirs(folder)
    return edition.write()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=HERE / "html", help="where to write; emptied before")
    args = parser.parse_args()
    try:
        print(f"{len(build(args.folder))} pages in {args.folder}")
    except ValueError as e:
        sys.exit(str(e))
