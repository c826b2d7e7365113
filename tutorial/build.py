"""Refresh everything in the tutorial that is generated: excerpts, program texts, outputs, figures, counts.

    python tutorial/build.py                  all chapters, notebooks and, if edition.py is there, HTML
    python tutorial/build.py 03 04            these chapters alone
    python tutorial/build.py --check          change nothing; exit 1 and name what would change
    python tutorial/build.py --quick          run no program: outputs and figures stay as they are

A chapter is NN_name.md (prose), NN_name.py (its program), exercises/NN_name.py and solutions/NN_name.py. In
any Markdown file here, and in the README above, what stands between a marker and `<!-- end -->` is generated:

    <!-- excerpt: hd_pissa.py:Mute.backward -->   source of a function, class or method, linked to its lines
    <!-- excerpt: FILE:NAME nodoc [a:b] -->       without docstrings; from the line with text a to that with b
    <!-- program: 03_muted_layer.py -->           the program: its beginning and cells "# %% fold: ..." folded
    <!-- output: 03_muted_layer.py -->            what it prints
    <!-- contents -->                             the table of chapters
    <!-- lines: hd_pissa.py -->600<!-- end -->    a line count, inside a sentence

FILE is relative to the repository. Either text in [a:b] may be left out; " : " splits where a text holds a
colon. A displayed equation is LaTeX in a fence of the language `math`, one in a sentence stands in $`...`$.
The line below a fence names its check, by the text that the chapter's program passes to `check` or as a test,
or says that it defines its letters:

    <!-- check: g_A by hand -->
    <!-- check: tests/test_rank.py::test_one_update_has_rank_2Kr -->
    <!-- definition -->

Optional modules beside this file, `code_map` and `edition`, add to the build: `committed() -> {path: text}`
for generated files that are in git, `build(folder)` for what is not, written into html/.
"""

import argparse
import ast
import difflib
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FIGURES = HERE / "figures"
BLOCK = re.compile(r"<!-- (excerpt|program|output|contents|lines)(?:: (.*?))? -->.*?<!-- end -->", re.DOTALL)


def chapters() -> list[Path]:
    """The prose of every chapter, in order."""
    return sorted(HERE.glob("[0-9][0-9]_*.md"))


# ---- Excerpts ----------------------------------------------------------------------------------------------


def find(path: Path, name: str) -> ast.AST:
    """The definition of a dotted `name` in a Python file; ValueError if there is none."""
    if not path.is_file():
        raise ValueError(f"there is no {path.relative_to(ROOT)}; fix the excerpt's marker")
    node = ast.parse(path.read_text())
    for part in name.split("."):
        there = [child.name for child in getattr(node, "body", []) if hasattr(child, "name")]
        inside = [child for child in getattr(node, "body", []) if getattr(child, "name", None) == part]
        if not inside:
            like = difflib.get_close_matches(part, there, 3, 0.4)
            raise ValueError(f"{path.relative_to(ROOT)} has no {name}; fix the excerpt's marker"
                             + (f" ({part} may now be {' or '.join(like)})" if like else ""))
        node = inside[-1]
    return node


def excerpt(spec: str) -> tuple[str, str, int, int]:
    """(source, file, first line, last line) of "FILE:NAME [nodoc] [[a:b]]"."""
    where, _, options = spec.partition(" ")
    file, name = where.split(":")
    path, node = ROOT / file, find(ROOT / file, name)
    lines = path.read_text().splitlines()
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    keep = list(range(first, node.end_lineno + 1))
    if part := re.search(r"\[(.*)\]$", options):
        a, b = part[1].split(" : " if " : " in part[1] else ":", 1)
        for text, end in ((a.strip(), 0), (b.strip(), 1)):
            hits = [i for i in keep if text in lines[i - 1]]
            if not hits:
                raise ValueError(f"{where} has no line with {text!r}; fix the excerpt's marker")
            if text:
                keep = keep[:keep.index(hits[0]) + 1] if end else keep[keep.index(hits[0]):]
    first, last = keep[0], keep[-1]
    if "nodoc" in options.split():
        for inner in ast.walk(node):
            if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner) is not None:
                gone = range(inner.body[0].lineno, inner.body[0].end_lineno + 1)
                keep = [i for i in keep if i not in gone]
    text = [lines[i - 1] for i in keep]
    indent = min(len(line) - len(line.lstrip()) for line in text if line.strip())
    return "\n".join(line[indent:] for line in text).strip("\n"), file, first, last


# ---- Programs ----------------------------------------------------------------------------------------------


def run(program: Path, figures: Path) -> str:
    """What a program prints, on one thread, its figure written into `figures`; ValueError if it fails."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TUTORIAL_FIGURES": str(figures)}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=env, cwd=ROOT)
    if done.returncode:
        raise ValueError(f"{program.name} exits with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout.rstrip()


def cells(code: str) -> list[tuple[str | None, str]]:
    """(title or None, lines) of a program's cells, split at "# %%"; those with a title fold away."""
    parts = []
    for part in re.split(r"^(?=# %%)", code, flags=re.M):
        folded = re.match(r"# %% fold: (.+)\n", part)
        title = folded[1] if folded else None if part.startswith("# %%") else "Imports and data"
        if part.strip():
            parts.append((title, part.strip("\n")))
    return parts


def program(name: str) -> str:
    """A program in a chapter: its folded cells in <details>, the others as they are, a link to the file."""
    code, out = (HERE / name).read_text(), []
    for title, part in cells(code):
        fence = f"```python\n{part}\n```"
        head = f"<details><summary>{title}</summary>" if title else ""
        out.append(f"{head}\n\n{fence}\n\n</details>" if title else fence)
    return "\n\n".join([*out, f"[{name}, {len(code.splitlines())} lines]({name})"])


NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]?\d+)?")


def same_figure(old: str, new: str) -> bool:
    """Equal but for half a point in any coordinate: another processor rounds differently."""
    old, new = (re.sub(r"\b[mpC][0-9a-f_]{8,}\b", "id", text) for text in (old, new))
    a, b = NUMBER.findall(old), NUMBER.findall(new)
    close = all(abs(float(x) - float(y)) < 0.5 for x, y in zip(a, b))
    return close and NUMBER.split(old) == NUMBER.split(new)


def drawn_by(figure: str) -> str:
    """The matplotlib that drew an SVG; another version draws the same figure with other bytes."""
    found = re.search(r"Matplotlib v[\d.]+", figure)
    return found[0] if found else ""


# ---- Blocks ------------------------------------------------------------------------------------------------


def title_and_idea(chapter: Path) -> tuple[str, str]:
    """The first heading, and the quotation below it that says the idea in a sentence."""
    text = chapter.read_text()
    title, idea = re.search(r"^# (.+)$", text, re.M), re.search(r"^> (.+(?:\n> .+)*)$", text, re.M)
    if not title or not idea:
        raise ValueError(f"{chapter.name}: begin with '# title' and '> the idea in a sentence'")
    return title[1], idea[1].replace("\n> ", " ")


def minutes(chapter: Path) -> int:
    """Reading time, in steps of five: 130 words of prose or 10 lines of the program a minute."""
    prose, program = BLOCK.sub("", chapter.read_text()), chapter.with_suffix(".py").read_text()
    return 5 * math.ceil((len(prose.split()) / 130 + len(program.splitlines()) / 10) / 5)


def contents() -> str:
    """The table of chapters."""
    rows = ["| chapter | idea | program | reading |", "| --- | --- | --- | --- |"]
    for chapter in chapters():
        title, idea = title_and_idea(chapter)
        program = chapter.with_suffix(".py").name
        rows.append(f"| [{title}]({chapter.name}) | {idea} | [`{program}`]({program}) "
                    f"| {minutes(chapter)} min |")
    return "\n".join(rows)


def refresh(text: str, outputs: dict[str, str]) -> str:
    """`text` with every generated block made anew; an output that is not in `outputs` stays."""

    def block(found):
        kind, spec = found.groups()
        marker = found[0][:found[0].index("-->") + 3]
        if kind == "lines":
            return f"{marker}{len((ROOT / spec).read_text().splitlines())}<!-- end -->"
        if kind == "contents":
            new = contents()
        elif kind == "excerpt":
            code, file, first, last = excerpt(spec)
            new = (f"```python\n{code}\n```\n\n"
                   f"[{file}, lines {first} to {last}](../{file}#L{first}-L{last})")
        elif kind == "program":
            new = program(spec)
        elif spec not in outputs:
            return found[0]
        else:
            new = f"```text\n{outputs[spec]}\n```"
        return f"{marker}\n\n{new}\n\n<!-- end -->"

    return BLOCK.sub(block, text)


# ---- Notebooks ---------------------------------------------------------------------------------------------


def cell(kind: str, text: str, number: int, hidden: bool) -> dict:
    extra = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": f"cell-{number}",
            "metadata": {"jupyter": {"source_hidden": True}} if hidden else {},
            "source": text.splitlines(keepends=True), **extra}


def notebook(chapter: Path) -> dict:
    """A chapter as a notebook: prose, and its program in cells split at `# %%`."""
    program = chapter.with_suffix(".py")
    first = f"import sys\n\nsys.path.insert(0, '..')  # where lesson.py is\n__file__ = '../{program.name}'"
    parts = [("code", first, True)]
    text, end = chapter.read_text(), 0
    for found in BLOCK.finditer(text):
        if found[1] != "program":
            continue
        parts.append(("markdown", text[end:found.start()], False))
        code, end = (HERE / found[2]).read_text(), found.end()
        if "spawn" in code:             # processes cannot be started from functions of a notebook
            code = ("# %%\nimport subprocess\n\n"
                    f"print(subprocess.run([sys.executable, \"../{found[2]}\"], check=True, text=True,\n"
                    "                     stdout=subprocess.PIPE).stdout)")
        parts += [("code", part, title is not None) for title, part in cells(code)]
    parts.append(("markdown", text[end:], False))
    book = []
    for kind, part, hidden in parts:
        if kind == "markdown":          # links are relative to the chapter, one folder above
            part = re.sub(r"<!--.*?-->", "", part)
            part = re.sub(r"(\]\()(?![a-z]+:|#)", r"\1../", part)
            part = re.sub(r"^```math\n(.*?)\n```$", r"$$\n\1\n$$", part, flags=re.M | re.S)
            part = re.sub(r"\$`(.+?)`\$", r"$\1$", part)
        if part.strip():
            book.append(cell(kind, part.strip(), len(book), hidden))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": book, "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
            "nbformat": 4, "nbformat_minor": 5}


# ---- All of it ---------------------------------------------------------------------------------------------


def generated(selected: list[Path], quick: bool) -> dict[Path, str]:
    """{path: text} of every generated file that is in git, as it should be."""
    outputs, files = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for chapter in [] if quick else selected:
            program = chapter.with_suffix(".py")
            outputs[program.name] = run(program, Path(folder))
        for figure in sorted(Path(folder).glob("*.svg")):
            new, path = figure.read_text(), FIGURES / figure.name
            old = path.read_text() if path.is_file() else ""
            # An old figure that differs by rounding alone stays, so that a build leaves no needless changes.
            files[path] = old if drawn_by(old) not in ("", drawn_by(new)) or same_figure(old, new) else new
    broken = []
    for path in [*selected, HERE / "README.md", ROOT / "README.md"]:
        try:
            if path.is_file():
                files[path] = refresh(path.read_text(), outputs)
        except ValueError as e:
            broken.append(f"{path.relative_to(ROOT)}: {e}")
    if broken:                          # all at once: a renamed function is shown in several chapters
        raise ValueError("\n".join(broken))
    for module in extras("committed"):
        files |= module.committed()
    return files


def extras(wanted: str) -> list:
    """The optional modules that have a function `wanted`."""
    sys.path.insert(0, str(HERE))
    modules = [importlib.import_module(m) for m in ("code_map", "edition") if (HERE / f"{m}.py").is_file()]
    return [module for module in modules if hasattr(module, wanted)]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("chapter", nargs="*", help="beginnings of chapter names, e.g. 03; none: all chapters")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a file would change")
    parser.add_argument("--quick", action="store_true", help="run no program: outputs and figures stay")
    args = parser.parse_args(argv)
    selected = [c for c in chapters() if not args.chapter or c.name.startswith(tuple(args.chapter))]
    if not selected:
        parser.error(f"no chapter begins with {args.chapter}; there are {[c.stem for c in chapters()]}")
    stale = []
    try:
        files = generated(selected, args.quick)
    except ValueError as e:
        parser.error(str(e))
    for path, text in files.items():
        if not path.is_file() or path.read_text() != text:
            stale.append(str(path.relative_to(ROOT)))
            if not args.check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)
    if args.check:
        print(f"out of date: {', '.join(stale)}; run python tutorial/build.py" if stale else "all current")
        return int(bool(stale))
    (HERE / "notebooks").mkdir(exist_ok=True)
    for chapter in selected:
        path = HERE / "notebooks" / f"{chapter.stem}.ipynb"
        path.write_text(json.dumps(notebook(chapter), indent=1, ensure_ascii=False) + "\n")
    for module in extras("build"):
        module.build(HERE / "html")
    print(f"{len(selected)} chapters built; changed: {', '.join(stale) or 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
