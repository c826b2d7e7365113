"""How the project is built: no import points up, one list of requirements, files that can be read.

    train.py -> training/ -> hd_pissa_extra.py -> hd_pissa.py -> torch, tqdm, the standard library
                training/ -> data/ -> nothing of the project

Oracle: the imports of every file by its syntax tree, those inside functions too.
"""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [*ROOT.glob("*.py"), *(ROOT / "training").glob("*.py"), *(ROOT / "data").glob("*.py")]
LEVELS = {"hd_pissa": 0, "hd_pissa_extra": 1, "data": 1, "training": 2, "train": 3}
FOR_NOW = {}


def imported(source: str) -> set[str]:
    """Dotted names of all modules that a source imports; of "from a import b" both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def wrong(name: str, source: str) -> set[str]:
    """Imports of file `name` (data/rows.py, say) that the rules forbid."""
    own, bad = name.removesuffix(".py").split("/")[0], set()
    for module in imported(source):
        top = module.split(".")[0]
        if own == "hd_pissa":
            allowed = top in {*sys.stdlib_module_names, "torch", "tqdm"}
        elif top not in LEVELS or top == own:
            allowed = True                                              # a package; the same folder
        elif own == "hd_pissa_extra":
            allowed = top == "hd_pissa"
        else:
            allowed = own != "data" and LEVELS[top] < LEVELS[own]
        bad |= set() if allowed else {module}
    return bad


def excepted(name: str, module: str) -> bool:
    return any(module == m or module.startswith(m + ".") for m in FOR_NOW.get(name, ()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_points_up(path):
    name = path.relative_to(ROOT).as_posix()
    bad = {module for module in wrong(name, path.read_text()) if not excepted(name, module)}
    assert not bad, "allowed are the arrows at the top of this file"
    assert FOR_NOW.get(name, set()) <= imported(path.read_text()), "delete what FOR_NOW excepts in vain"


@pytest.mark.parametrize("name, source, bad", [
    ("hd_pissa.py", "import torch.nn\nimport math\nimport numpy", {"numpy"}),
    ("hd_pissa.py", "def f():\n    import hd_pissa_extra", {"hd_pissa_extra"}),
    ("hd_pissa_extra.py", "import hd_pissa\nfrom training import models", {"training", "training.models"}),
    ("hd_pissa_extra.py", "from data.rows import load", {"data.rows", "data.rows.load"}),
    ("data/sets.py", "import hd_pissa", {"hd_pissa"}),
    ("data/sets.py", "from data.tokenizer import GPTTokenizer", set()),
    ("training/models.py", "import train", {"train"}),
    ("training/models.py", "import hd_pissa_extra, training.report\nfrom data.rows import load", set()),
    ("train.py", "from training import models\nimport hd_pissa", set()),
])  # fmt: skip
def test_the_rules_find_what_they_forbid(name, source, bad):
    assert wrong(name, source) == bad


def test_no_circle():
    """Files import each other in one order, within a folder too."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    graph = {}
    for module, path in modules.items():
        name = path.relative_to(ROOT).as_posix()
        graph[module] = {m for m in imported(path.read_text()) & modules.keys() if not excepted(name, m)}
    while leaves := {module for module, names in graph.items() if not names}:
        graph = {module: names - leaves for module, names in graph.items() if module not in leaves}
    assert not graph, "these are in a circle, or import one that is"


def requirements(name: str) -> set[str]:
    lines = (ROOT / name).read_text().splitlines()
    return {line.split("#")[0].strip() for line in lines} - {""}


def test_extras_are_the_requirements_files():
    """requirements-extra.txt is what the extras add to requirements.txt, with the same ranges."""
    text = (ROOT / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    listed = {name: set(re.findall(r'"(.+?)"', body))
              for name, body in re.findall(r"^(\w+) = \[(.*?)^\]", extras, re.M | re.DOTALL)}  # fmt: skip
    assert list(listed) == ["hf", "tutorial", "dev"] and all(listed.values())
    main = requirements("requirements.txt")
    assert set.union(*listed.values()) - main == requirements("requirements-extra.txt")
    core = re.search(r"^dependencies = \[(.*?)\]", text, re.M)[1]
    assert set(re.findall(r'"(.+?)"', core)) <= main
    packages = [re.match(r"[\w-]+", line)[0] for line in main | set.union(*listed.values())]
    assert len(packages) == len(set(packages)), "one range for each package"


def test_train_can_be_read_in_one_sitting():
    lines = (ROOT / "train.py").read_text().splitlines()
    assert len(lines) <= 450 and max(map(len, lines)) <= 100


@pytest.mark.slow
def test_it_installs_without_a_warning(tmp_path):
    """pip install . : both modules, and torch finds its NumPy."""
    # a copy: setuptools leaves build/ beside the sources, where ruff takes it for a package of ours
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "hd_pissa.py", "hd_pissa_extra.py"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(source)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warn" not in (done.stdout + done.stderr).lower(), done.stdout + done.stderr
    assert {path.name for path in target.glob("*.py")} == {"hd_pissa.py", "hd_pissa_extra.py"}
