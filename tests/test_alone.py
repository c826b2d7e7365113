"""hd_pissa.py copied alone, into an empty folder and into a package: all oracles of the core are green there.

The copy must be the whole method, so hd_pissa_extra, training and data cannot be imported there.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORACLES = ["test_gradients.py", "test_update.py", "test_rank.py", "test_faults.py"]
# conftest.py of the copy: where hd_pissa is, and that nothing else of the project is found.
CONFTEST = """
import importlib, sys
import torch
torch.set_num_threads(1)

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hd_pissa_extra", "training", "data", "train"):
            raise ModuleNotFoundError(f"No module named {name!r} beside the copy", name=name)

sys.meta_path.insert(0, Hidden())
sys.modules["hd_pissa"] = importlib.import_module("PLACE")
"""
# Oracles that are about another file, as their skips say.
OF_OTHERS = {"hd_pissa_extra", "training.report"}


def copied(folder: Path, place: str) -> Path:
    """`folder` with the oracles, their two helpers and hd_pissa.py at the dotted name `place`."""
    for name in [*ORACLES, "toy.py", "twin.py"]:
        shutil.copy(ROOT / "tests" / name, folder)
    target = folder.joinpath(*place.split(".")).with_suffix(".py")
    target.parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / "hd_pissa.py", target)
    if target.parent != folder:
        (target.parent / "__init__.py").touch()
    (folder / "conftest.py").write_text(CONFTEST.replace("PLACE", place))
    return target


def outcome(folder: Path, *more) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *more, *ORACLES]
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environ)
    return done.stdout + done.stderr


@pytest.mark.parametrize("place", ["hd_pissa", pytest.param("package.hd_pissa", marks=pytest.mark.slow)])
def test_all_oracles_of_the_core_hold_for_the_file_alone(place, tmp_path):
    """None fails; what skips is about another file, and no more than here."""
    copied(tmp_path, place)
    text = outcome(tmp_path, "-k", "not peft and not step_0")       # these compare with other libraries
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}
    assert not counts.get("failed") and not counts.get("error") and counts["passed"] > 80, text
    lines = [line for line in text.splitlines() if line.startswith("SKIPPED")]
    other = [line for line in lines if not any(f"import '{name}'" in line for name in OF_OTHERS)]
    assert not [line for line in other if "transformers" not in line], text


def test_it_is_the_packages_copy_that_runs(tmp_path):
    """The dense simulation agrees with it, and no longer once a fault is planted in that copy."""
    file = copied(tmp_path, "package.hd_pissa")
    assert "1 passed" in (text := outcome(tmp_path, "-k", "no_fault")), text
    file.write_text(file.read_text().replace("(self.K if config", "(1 if config"))
    assert "1 failed" in (text := outcome(tmp_path, "-k", "no_fault")), text


@pytest.mark.parametrize("file, limit", [("hd_pissa.py", 881)])
def test_it_can_be_read_in_one_sitting(file, limit):
    lines = (ROOT / file).read_text().splitlines()
    assert len(lines) <= limit and max(map(len, lines)) <= 110
