"""The map of hd_pissa.py is current, complete, and its line ranges hold what they name.

Oracle: the text of hd_pissa.py by regular expressions and indentation; code_map.py uses the syntax tree.
"""

import ast
import re
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tutorial"))

import code_map  # noqa: E402

MAP = (ROOT / "tutorial" / "MAP.md").read_text()
LINES = (ROOT / "hd_pissa.py").read_text().splitlines()
RANGE = r"\[(\d+)(?:–(\d+))?\]\(\.\./hd_pissa\.py#L(\d+)-L(\d+)\)"


def ranges(text):
    """(label's first and last line, link's first and last line) of every range in `text`."""
    return [(int(a), int(b or a), int(c), int(d)) for a, b, c, d in re.findall(RANGE, text)]


def functions():
    """[(dotted name, first line, last line)] of the map, in its order, from 1."""
    named = re.findall(r"(\*\*)?`(\w+)`(?:\*\*)? " + RANGE, MAP)
    result, owner = [], ""
    for bold, name, first, last, *_ in named:
        owner = name if bold else owner
        result.append((name if bold else f"{owner}.{name}", int(first), int(last or first)))
    return result


def equations():
    """[(text, paper, function, lines of its range)] of the map."""
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \| " + RANGE + r" \| `(.+?)` \|", MAP, re.M)
    return [(text.replace("\\|", "|"), paper, name, LINES[int(a) - 1:int(b or a)])
            for text, paper, a, b, _, _, name in rows]


def test_map_is_current():
    assert code_map.map_text() == MAP, "run python tutorial/code_map.py"
    assert f"The {len(LINES)} lines" in MAP


def test_labels_agree_with_links():
    assert ranges(MAP)
    for a, b, c, d in ranges(MAP):
        assert (a, b) == (c, d) and 1 <= a <= b <= len(LINES)


def test_every_function_class_and_method_is_on_the_map_once():
    written, owner = [], ""
    for line in LINES:
        if found := re.match(r"(class|def) (\w+)", line):
            written.append(found[2])
            owner = found[2] if found[1] == "class" else ""
        elif owner and (found := re.match(r"    def (\w+)", line)):
            written.append(f"{owner}.{found[1]}")
    assert len(written) > 30
    assert [name for name, *_ in functions()] == written


def test_ranges_hold_the_function_they_name():
    for name, first, last in functions():
        held = LINES[first - 1:last]
        head = next(line for line in held if not line.lstrip().startswith("@"))
        assert re.match(rf"\s*(class|def) {name.split('.')[-1]}\b", head), name
        body = r"\s" * (len(head) - len(head.lstrip()) + 1)
        assert re.match(body, held[-1]) and held[-1].strip(), f"{name} has ended before its range does"
        following = next((line for line in LINES[last:] if line.strip()), "")
        assert not re.match(body, following), f"{name} goes on after its range"
        assert first == 1 or not LINES[first - 2].lstrip().startswith("@"), f"{name} has a decorator above"


def test_ranges_hold_the_equation_they_name():
    found = equations()
    assert len(found) >= 6
    for text, paper, name, held in found:
        citing = [i for i, line in enumerate(held) if text in line]
        assert len(citing) == 1, text
        assert paper in held[citing[0]], text
        assert name in [function for function, *_ in functions()]
        if held[0].lstrip().startswith("#"):        # a comment: whole statements stand below it
            code = textwrap.indent(textwrap.dedent("\n".join(held)), "    ")
            body = ast.parse(f"def f():\n{code}").body[0].body
            assert len(body) == 1 or isinstance(body[0], ast.If) and len(body) == 2, text


def test_equations_of_the_method_are_there():
    """The method's equations by hand from the paper: the muted forward, g_A, g_B, dU_i and the mean."""
    names = {name for _, _, name, _ in equations()}
    assert names >= {"shard_factors", "Mute.forward", "Mute.backward", "update_factors",
                     "Adapters.merge_"}
    assert {paper for _, paper, _, _ in equations()} >= {"4.1", "4.2", "4.3"}


def test_chapters_named_show_or_name_the_function():
    rows = re.findall(r"\| `([\w.]+)` \| (.+) \|$", MAP, re.M)
    assert any("](" in cell for _, cell in rows), "no equation has a chapter"
    for name, cell in rows:
        for file in re.findall(r"\]\((\d\d_\w+\.md)\)", cell):
            text = (ROOT / "tutorial" / file).read_text()
            assert name.split(".")[-1] in text or name.split(".")[0] in text, (name, file)


def test_a_moved_function_makes_the_map_stale(tmp_path, monkeypatch):
    path = tmp_path / "hd_pissa.py"
    path.write_text("\n".join(["", *LINES]) + "\n")
    monkeypatch.setattr(code_map, "FILE", path)
    moved, text = ranges(code_map.map_text()), code_map.map_text()
    assert text != MAP
    assert [a - 1 for a, *_ in moved] == [a for a, *_ in ranges(MAP)]


@pytest.mark.parametrize("broken", ["(section 4.2)", "(4.3)"])
def test_equations_come_from_the_citations(tmp_path, monkeypatch, broken):
    path = tmp_path / "hd_pissa.py"
    path.write_text("\n".join(LINES).replace(broken, "") + "\n")
    monkeypatch.setattr(code_map, "FILE", path)
    assert code_map.map_text().count("| 4.") < MAP.count("| 4.")
