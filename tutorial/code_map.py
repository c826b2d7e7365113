"""The one-page map of hd_pissa.py, tutorial/MAP.md: equation -> lines -> chapter, then every function.

    python tutorial/code_map.py             writes MAP.md
    python tutorial/code_map.py --check     changes nothing; exit 1 if MAP.md is out of date

Nothing is entered by hand. Equations are those that hd_pissa.py cites from the paper, in a comment or a
docstring, such as "dU_i = dA_i B_i + ...     (section 4.2)" or "g_B = s (X A_i)^T dY     (4.3)". Functions
and their lines come from the syntax tree, headings from the banners "# ---- Heading ----". A chapter is named
where it shows the function as an excerpt or, if none does, where its prose names it.
"""

import argparse
import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
FILE = HERE.parent / "hd_pissa.py"
CITED = re.compile(r"^(.+?(?: = | <- ).+?)\s+\((?:section |appendix )?([A-D]|\d(?:\.\d)?)(?:;[^)]*)?\)")
BANNER = re.compile(r"# -+ (.+?) -+$")


class Item(NamedTuple):
    """A function, class or method with its lines (1-based, inclusive, decorators too)."""

    name: str
    first: int
    last: int
    node: ast.AST


class Equation(NamedTuple):
    """An equation that cites the paper, and the lines that compute it."""

    text: str
    paper: str
    first: int
    last: int
    item: str           # the function around it


def items(tree: ast.AST) -> list[Item]:
    """All functions, classes and methods, in order; functions inside functions belong to their outer one."""
    found = []

    def visit(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                found.append(Item(prefix + node.name, first, node.end_lineno, node))
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{node.name}.")

    visit(tree.body, "")
    return found


def equations(lines: list[str], found: list[Item]) -> list[Equation]:
    """Equations that cite the paper, inside functions and classes, and the lines that compute them.

    One in a comment belongs to the statement below it, one in a docstring to its whole function.
    """
    result = []
    for item in found:
        docstring = item.node.body[0] if ast.get_docstring(item.node) is not None else None
        statements = [node for node in ast.walk(item.node) if isinstance(node, ast.stmt)]
        for number in range(item.first, item.last + 1):
            line = lines[number - 1].strip()
            inside = docstring and docstring.lineno <= number <= docstring.end_lineno
            inner = any(item.first < other.first <= number <= other.last for other in found)
            if inner or not (inside or line.startswith("#")):
                continue
            if not (match := CITED.search(line.lstrip('#" '))):
                continue
            text, paper = match.groups()
            text = re.sub(r"^(hd_pissa|top|lora) +", "", text)  # the choice that an equation stands beside
            first, last = item.first, item.last
            if not inside:
                first, below = number, [node for node in statements if node.lineno > number]
                below.sort(key=lambda node: node.lineno)
                last = below[0].end_lineno
                if isinstance(below[0], ast.If) and isinstance(below[0].body[-1], ast.Return):
                    last = next(node for node in below if node.lineno > last).end_lineno    # the other case
            result.append(Equation(text, paper, first, last, item.name))
    return sorted(result, key=lambda e: (e.first, e.last))


def chapters_of(name: str, texts: dict[str, str]) -> list[str]:
    """Chapters, {file name: text}, with an excerpt of `name`; if none has, those whose prose names it."""
    owner, short = name.split(".")[0], name.split(".")[-1]
    shown = re.compile(rf"<!-- excerpt: hd_pissa\.py:({re.escape(name)}(\.\w+)?|{owner}) ")
    named = re.compile(rf"`(hd_pissa\.|adapters\.|Adapters\.)?{re.escape(name)}\b|"
                       rf"(hd_pissa|adapters|Adapters)\.{re.escape(short)}\b")
    prose = {file: re.sub(r"^```.*?^```", "", text, flags=re.M | re.DOTALL) for file, text in texts.items()}
    for pattern in (shown, named):
        if hits := [file for file, text in prose.items() if pattern.search(text)]:
            return hits
    return []


def link(first: int, last: int) -> str:
    label = f"{first}" if first == last else f"{first}–{last}"
    return f"[{label}](../{FILE.name}#L{first}-L{last})"


def chapter_links(files: list[str]) -> str:
    return ", ".join(f"[{int(file[:2])}]({file})" for file in files) or "–"


def map_text() -> str:
    """The text of MAP.md."""
    lines = FILE.read_text().splitlines()
    found = items(ast.parse("\n".join(lines)))
    texts = {path.name: path.read_text() for path in sorted(HERE.glob("[0-9][0-9]_*.md"))}
    out = ["# Map of hd_pissa.py", "",
           f"The {len(lines)} lines of the file on one page, generated by `tutorial/code_map.py`. First the "
           "equations that it cites from the paper, then every function.", "",
           "| equation | paper | lines | in | chapter |", "| --- | --- | --- | --- | --- |"]
    for e in equations(lines, found):
        text = e.text.replace("|", "\\|")
        out.append(f"| `{text}` | {e.paper} | {link(e.first, e.last)} | `{e.item}` "
                   f"| {chapter_links(chapters_of(e.item, texts))} |")
    out += ["", "| part | functions and their lines | chapters |", "| --- | --- | --- |"]
    banners = [(number, match[1]) for number, line in enumerate(lines, 1) if (match := BANNER.match(line))]
    for (start, title), (stop, _) in zip(banners, [*banners[1:], (len(lines) + 1, "")]):
        inside = [item for item in found if start < item.first < stop]
        names = [f"`{item.name.split('.')[-1]}` {link(item.first, item.last)}" if "." in item.name
                 else f"**`{item.name}`** {link(item.first, item.last)}" for item in inside]
        files = sorted({file for item in inside for file in chapters_of(item.name, texts)})
        out.append(f"| {title} | {', '.join(names)} | {chapter_links(files)} |")
    return "\n".join(out) + "\n"


def committed() -> dict[Path, str]:
    """For build.py: the generated file that is in git."""
    return {HERE / "MAP.md": map_text()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if out of date")
    args = parser.parse_args()
    for path, text in committed().items():
        current = path.is_file() and path.read_text() == text
        if args.check:
            sys.exit(None if current else f"{path.name} is out of date; run python tutorial/code_map.py")
        path.write_text(text)
        print(f"{path.name}: {text.count('#L')} line ranges, {'as before' if current else 'changed'}")
