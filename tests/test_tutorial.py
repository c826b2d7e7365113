"""The tutorial keeps its promises: programs, outputs, excerpts, exercises, equations, links and counts.

Chapters are found by their names, so a new one is covered when its files are there. Fast tests read; the slow
ones run every program and every cell of every notebook.
"""

import ast
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "tutorial"
sys.path[:0] = [str(TUTORIAL), str(TUTORIAL / "exercises")]

import build  # noqa: E402
import grade  # noqa: E402

CHAPTERS = build.chapters()
each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
PAGES = [p for p in sorted(ROOT.rglob("*.md"))
         if not any(part.startswith(".") or part in ("html", "notebooks") or part.startswith("out")
                    for part in p.relative_to(ROOT).parts)]


def module_of(chapter, folder):
    return grade.load(TUTORIAL / folder / f"{chapter.stem}.py")


FENCES = re.compile(r"^```.*?^```", re.S | re.M)


def without_code(text: str) -> str:
    """Markdown without its fenced blocks and inline code."""
    return re.sub(r"`[^`\n]*`", "", FENCES.sub("", text))


# ---- Shape of a chapter ------------------------------------------------------------------------------------


@each_chapter
def test_files_of_a_chapter(chapter):
    """Prose with program, output, figure and three exercises; of the program's lines, 110 at most, at most
    25 are shown and the others fold away."""
    text, program = chapter.read_text(), chapter.with_suffix(".py")
    assert len(program.read_text().splitlines()) <= 110, f"{program.name} has more than 110 lines"
    block = re.search(rf"<!-- program: {program.name} -->(.*?)<!-- end -->", text, re.S)[1]
    open_ = re.sub(r"<details>.*?</details>", "", block, flags=re.S)
    shown = "".join(re.findall(r"```python\n(.*?)```", open_, re.S))
    assert 5 <= len([line for line in shown.splitlines() if line.strip()]) <= 25, "fold more, or less"
    assert "save_figure" not in shown
    every = "\n".join(re.findall(r"```python\n(.*?)\n```", block, re.S))
    assert every.split() == program.read_text().split(), "the chapter does not hold the whole program"
    prose = build.BLOCK.sub("", text)
    assert len(prose.split()) < 1800, f"{chapter.name} has {len(prose.split())} words beside its code"
    for wanted in (f"<!-- program: {program.name} -->", f"<!-- output: {program.name} -->",
                   f"](figures/{chapter.stem}.svg)", "## Exercises"):
        assert wanted in text, f"{chapter.name} lacks {wanted}"
    assert f"# {int(chapter.stem[:2])}. " in text
    exercises, solutions = module_of(chapter, "exercises"), module_of(chapter, "solutions")
    for n in (1, 2, 3):
        assert callable(getattr(exercises, f"check_{n}")) and callable(getattr(solutions, f"answer_{n}"))


@each_chapter
def test_figures_do_not_depend_on_the_day(chapter):
    """An SVG with a date or random ids would change at every build."""
    figure = (TUTORIAL / "figures" / f"{chapter.stem}.svg").read_text()
    assert "dc:date" not in figure and "<svg" in figure


def test_generated_text_is_current():
    """Excerpts, programs, line counts and the table of contents; outputs and figures in the slow test."""
    stale = [path.name for path, text in build.generated(CHAPTERS, quick=True).items()
             if not path.is_file() or path.read_text() != text]
    assert not stale, f"{stale} differ from their sources; run python tutorial/build.py"


@pytest.mark.slow
@each_chapter
def test_program_passes_prints_and_draws_what_the_chapter_shows(chapter):
    """Exit code 0 in under 30 s of one processor; output and figure equal the committed ones."""
    pytest.importorskip("matplotlib")

    def seconds():      # of finished child processes: other work on the machine does not count
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    began = seconds()
    files = build.generated([chapter], quick=False)
    assert seconds() - began < 30
    for path in (chapter, TUTORIAL / "figures" / f"{chapter.stem}.svg"):
        assert path.read_text() == files[path], f"{path.name} is out of date; run python tutorial/build.py"


@each_chapter
def test_program_ends_in_a_check(chapter):
    """What it prints, as committed, ends in a line that says what agreed."""
    shown = re.search(rf"<!-- output: {chapter.stem}.py -->\s*```text\n(.*?)\n```", chapter.read_text(), re.S)
    assert shown and re.search(r"\b(ok|passed|agree|equal)\b", shown[1].splitlines()[-1], re.I)


# ---- The build itself --------------------------------------------------------------------------------------


def test_excerpt_against_hand_made_source(tmp_path, monkeypatch):
    """By hand: decorators come along, docstrings go on request, markers cut, a wrong name is refused."""
    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text(
        'class C:\n    """Doc."""\n\n    @staticmethod\n    def f(x):\n        """Doc\n        of f."""\n'
        "        y = x  # y: first\n        return y\n")
    head, doc = "@staticmethod\ndef f(x):\n", '    """Doc\n    of f."""\n'
    body = "    y = x  # y: first\n    return y"
    assert build.excerpt("a.py:C.f") == (head + doc + body, "a.py", 4, 9)
    assert build.excerpt("a.py:C.f nodoc")[0] == head + body
    assert build.excerpt("a.py:C.f [y = x:return]") == ("y = x  # y: first\nreturn y", "a.py", 8, 9)
    assert build.excerpt("a.py:C.f [y: first : y: first]")[2:] == (8, 8)
    for wrong in ("a.py:C.g", "a.py:C.f [nowhere:]"):
        with pytest.raises(ValueError, match="fix the excerpt's marker"):
            build.excerpt(wrong)


def test_broken_markers_are_all_named_with_their_chapters(tmp_path, monkeypatch, capsys):
    """A function that was renamed: chapter, marker and the name it may have now, and exit code 2."""
    (tmp_path / "tutorial").mkdir()
    (tmp_path / "core.py").write_text("class Slot:\n    def add_(self):\n        pass\n")
    for name, where in (("01_a.md", "core.py:Slot.add"), ("02_b.md", "gone.py:f")):
        text = f"# 1. A\n\n> B\n\n<!-- excerpt: {where} -->\n<!-- end -->\n"
        (tmp_path / "tutorial" / name).write_text(text)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "HERE", tmp_path / "tutorial")
    with pytest.raises(SystemExit) as ended:
        build.main(["--quick"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "tutorial/01_a.md: core.py has no Slot.add; fix" in said
    assert "(add may now be add_)" in said and "tutorial/02_b.md: there is no gone.py" in said


def test_cells_of_a_program():
    code = "import a\n\n# %% One\nb = 1\n\n\n# %% fold: Figure, checks\nc = 2\n"
    assert build.cells(code) == [("Imports and data", "import a"), (None, "# %% One\nb = 1"),
                                 ("Figure, checks", "# %% fold: Figure, checks\nc = 2")]


def test_refresh_replaces_blocks_alone(tmp_path, monkeypatch):
    """Text around stays; a drifted excerpt and a wrong count are put right; unknown outputs stay."""
    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("def f():\n    return 1\n")
    page = ("Before <!-- lines: a.py -->7<!-- end --> lines.\n<!-- excerpt: a.py:f -->\nold\n<!-- end -->\n"
            "After\n<!-- output: p.py -->\nkept\n<!-- end -->\n")
    new = build.refresh(page, {})
    assert "Before <!-- lines: a.py -->2<!-- end --> lines." in new and "kept" in new and "old" not in new
    assert "```python\ndef f():\n    return 1\n```" in new and "(../a.py#L1-L2)" in new and "After" in new
    assert build.refresh(new, {}) == new
    assert "```text\nprinted\n```" in build.refresh(page, {"p.py": "printed"})


def test_same_figure_sees_what_moves():
    """Half a point is rounding; a point, or another text, is a change."""
    figure = '<svg><use href="#m0123456789" x="12.25"/><text>loss</text></svg>'
    assert build.same_figure(figure, figure.replace("12.25", "12.4").replace("m0123456789", "mabcdef0123"))
    assert not build.same_figure(figure, figure.replace("12.25", "13.25"))
    assert not build.same_figure(figure, figure.replace("loss", "rank"))


def test_a_failing_program_stops_the_build(tmp_path):
    """Its exit code and what it said."""
    (tmp_path / "p.py").write_text("import sys\nprint('before')\nsys.exit('FAILED  x')\n")
    with pytest.raises(ValueError, match="p.py exits with 1:\nbefore\nFAILED  x"):
        build.run(tmp_path / "p.py", tmp_path)


def test_check_of_programs():
    """Exits for a difference above its limit, for another shape and for NaN; prints a line otherwise."""
    import lesson
    lesson.check("same", [1.0, 2.0], [1.0, 2.0])
    lesson.check("close", [1.0, 2.0 + 1e-9], [1.0, 2.0], rtol=1e-8)
    nan = [float("nan")]
    for got, expected, options in (([1.0], [1.1], {"atol": 0.05}), ([1.0], [1.0, 1.0], {}),
                                   ([1e-9], [0.0], {}), (nan, [1.0], {"atol": 10.0})):
        with pytest.raises(SystemExit, match="FAILED  x"):
            lesson.check("x", got, expected, **options)


# ---- Exercises ---------------------------------------------------------------------------------------------


def spoilt(value):
    """Answers that are wrong in one place: half as much again, one more, the opposite, or one part spoilt."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, float):
        return [1.5 * value + 1e-3]
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.bool:
            return [~value]
        if not value.is_floating_point():
            return [value + 1]
        return [1.5 * value + 1e-3 * (value == 0), torch.zeros_like(value) if value.any() else value + 1]
    if isinstance(value, tuple | list):
        return [type(value)([*value[:i], part, *value[i + 1:]])
                for i in range(len(value)) for part in spoilt(value[i])]
    return []


def wrong_answers(answer):
    """Functions that do what `answer` does and spoil its result in one way each."""
    tried = []
    index = 0
    while index == 0 or index < len(tried):
        def wrong(*args, index=index, **kwargs):
            choices = spoilt(answer(*args, **kwargs))
            tried.extend([None] * (len(choices) - len(tried)))
            return choices[index] if index < len(choices) else None
        yield wrong
        index += 1


@each_chapter
@pytest.mark.parametrize("n", [1, 2, 3])
def test_solution_passes_its_check_and_wrong_answers_fail(chapter, n):
    """Each check accepts the solution, quickly, and refuses it with one part of its result spoilt.

    An exercise may plant mistakes of its own in WRONG_n; one whose answer returns nothing has to.
    """
    check = getattr(module_of(chapter, "exercises"), f"check_{n}")
    answer = getattr(module_of(chapter, "solutions"), f"answer_{n}")
    planted = getattr(module_of(chapter, "exercises"), f"WRONG_{n}", [])
    began = time.process_time()
    check(answer)
    assert time.process_time() - began < 5, "make the exercise smaller"
    refused = 0
    for wrong in [*wrong_answers(answer), *planted]:
        with pytest.raises(AssertionError) as error:
            check(wrong)
        assert len(str(error.value).split()) > 3, "say what is wrong in a sentence"
        refused += 1
    assert refused >= 1


def graded(chapter, answers, capsys):
    """(exit code, printed text) of the chapter's checker on a file of answers."""
    with pytest.raises(SystemExit) as ended:
        grade.main(vars(module_of(chapter, "exercises")), [str(answers)])
    return int(ended.value.code), capsys.readouterr().out


def test_checker_names_what_is_wrong_or_missing(tmp_path, capsys):
    """The solutions score 3 and exit with 0; wrong, failing and missing answers are named and exit with 1."""
    code, text = graded(CHAPTERS[0], TUTORIAL / "solutions" / f"{CHAPTERS[0].stem}.py", capsys)
    assert code == 0 and text.count(": right") == 3
    (tmp_path / "mine.py").write_text("def answer_1(*args):\n    return None\ndef answer_3(one):\n    pass\n")
    code, text = graded(CHAPTERS[0], tmp_path / "mine.py", capsys)
    assert code == 1 and ": right" not in text
    for wanted in ("exercise 1: not yet. ", "exercise 2: no answer_2", "exercise 3: TypeError"):
        assert wanted in text


@pytest.mark.slow
@each_chapter
def test_exercises_run_as_the_chapter_says(chapter):
    """python tutorial/exercises/NN_name.py FILE, from the root of the repository."""
    command = f"python tutorial/exercises/{chapter.stem}.py my_answers.py"
    assert command in chapter.read_text()
    command = [sys.executable, *command.split()[1:2], f"tutorial/solutions/{chapter.stem}.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.count(": right") == 3, done.stdout + done.stderr


# ---- Equations, links, numbers -----------------------------------------------------------------------------


@each_chapter
def test_displayed_equations_name_their_check(chapter):
    """The check is a line that the program prints, a text it passes to `check`, or a test that exists."""
    text, program = chapter.read_text(), chapter.with_suffix(".py")
    strings = {node.value for node in ast.walk(ast.parse(program.read_text()))
               if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for equation, following in re.findall(r"^```math\n(.*?)^```\n+(.*?)$", text, re.M | re.S):
        named = re.match(r"<!-- (?:check: (.+?)|definition) -->", following)
        assert named, f"no check named below\n{equation}"
        if named[1] and "::" in named[1]:
            file, test = named[1].split("::")
            assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.M), f"no test {named[1]}"
        elif named[1]:
            assert any(named[1] in string for string in strings), f"{program.name} has no check {named[1]!r}"


CONSTANTS = "1.2e-38", "1.4e-45", "1.2e-7", "3.4e38"  # float32: least normal, least, spacing at 1, largest
MEASURED = re.compile(r"(?<![\w.])(\d+\.\d+(?:e[-+]?\d+)?|\d+e[-+]?\d+|\d+(?= ?%))")


@each_chapter
def test_numbers_in_prose_are_printed(chapter):
    """Decimals, powers of ten and percentages occur in the program, its output or a file that the chapter
    links to, are those of float32, or stand in a paragraph that names the paper."""
    text = chapter.read_text()
    linked = {(chapter.parent / name).resolve() for name in re.findall(r"\]\(([^)#\s:]+)\)", text)}
    shown = [path.read_text() for path in linked - {*CHAPTERS} if path.suffix in (".md", ".json")]
    shown += re.findall(r"<!-- (?:output|program|excerpt).*?<!-- end -->", text, re.DOTALL)
    printed = {float(n) for part in [*shown, *CONSTANTS] for n in MEASURED.findall(part)}
    prose = FENCES.sub("", re.sub(r"<!--.*?-->|\]\(.*?\)", "", text))
    for paragraph in re.split(r"\n\s*\n|\n(?=\d+\. |- )", prose):
        unknown = [n for n in MEASURED.findall(paragraph) if float(n) not in printed]
        assert not unknown or "paper" in paragraph, f"{unknown} printed nowhere:\n{paragraph}"


def test_arithmetic_in_prose_is_right():
    """`2 x 7/8 x 25.90 GB = 45.3 GB`: both sides agree to the digits shown."""
    found = 0
    for chapter in CHAPTERS:
        for left, right in re.findall(r"((?:[\d./]+ +x +)+[\d.]+) GB = +([\d.]+) GB", chapter.read_text()):
            value = math.prod(float(Fraction(factor.strip())) for factor in left.split("x"))
            assert abs(value - float(right)) <= 0.5 * 10.0 ** -len(right.partition(".")[2]), (chapter, left)
            found += 1
    assert found >= 2


def test_notebooks_write_equations_as_they_can_show_them(tmp_path):
    (tmp_path / "01_a.md").write_text("# 1. A\n\nIf $`a < b`$:\n\n```math\na + b\n```\n<!-- definition -->\n")
    (tmp_path / "01_a.py").write_text("")
    [_, cell] = build.notebook(tmp_path / "01_a.md")["cells"]
    assert "".join(cell["source"]).endswith("If $a < b$:\n\n$$\na + b\n$$")


def test_the_rewrite_has_as_many_lines_as_the_text_says():
    program = TUTORIAL / "13_using_it.py"
    [anew] = [node for node in ast.parse(program.read_text()).body if getattr(node, "name", "") == "anew"]
    for path in (program, program.with_suffix(".md"), TUTORIAL / "README.md"):
        said = re.findall(r"(?:method is|method in|anew in) (\d+) lines", path.read_text())
        assert said and set(said) == {str(anew.end_lineno - anew.lineno + 1)}, path


def slug(heading: str) -> str:
    """The anchor that code hosts give a heading."""
    heading = re.sub(r"\[(.+?)\]\(.*?\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_resolve(page):
    """Relative links name files in the repository; anchors name headings, or lines that exist."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists() and path.is_relative_to(ROOT), f"{page.name} links to {target}"
        if lines := re.fullmatch(r"L(\d+)(?:-L(\d+))?", anchor):
            assert int(lines[2] or lines[1]) <= len(path.read_text().splitlines()), target
        elif anchor:
            headings = re.findall(r"^#+ (.+)$", FENCES.sub("", path.read_text()), re.M)
            assert anchor in map(slug, headings), f"{page.name}: {path.name} has no heading #{anchor}"


# ---- Notebooks ---------------------------------------------------------------------------------------------


@each_chapter
def test_notebook_is_valid(chapter):
    """nbformat 4.5 by its required fields (and by nbformat if it is there); code cells compile."""
    book = json.loads(json.dumps(build.notebook(chapter)))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5) and book["metadata"]["kernelspec"]["name"]
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    for cell in book["cells"]:
        source = "".join(cell["source"])
        wanted = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            wanted |= {"execution_count", "outputs"}
            compile(source, "cell", "exec")
        else:
            for target in re.findall(r"\]\(([^)\s#]+)", without_code(source)):
                here = TUTORIAL / "notebooks" / target
                assert ":" in target or here.resolve().exists(), f"link to {target}"
        assert set(cell) == wanted
    try:
        import nbformat
    except ImportError:
        return
    nbformat.validate(book)


@pytest.mark.slow
@each_chapter
def test_notebook_runs(chapter, tmp_path):
    """All code cells, one after another in one namespace and in the notebooks' folder, as Jupyter would."""
    book = build.notebook(chapter)
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    script = f"namespace = {{'__name__': '__main__'}}\nfor cell in {cells!r}:\n    exec(cell, namespace)\n"
    (TUTORIAL / "notebooks").mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", script], cwd=TUTORIAL / "notebooks", text=True,
                          capture_output=True, env={**os.environ, "TUTORIAL_FIGURES": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
