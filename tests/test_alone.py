"""hd_pissa.py copied alone, without hd_pissa_extra.py: the same weights, and a sentence for what it lacks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import json, sys
import torch, toy, hd_pissa
torch.set_num_threads(1)
assert not hd_pissa.extra
said = []
weights, bias, data = toy.problem()
for options in ({"dropout": 0.1}, {"gradients": "global"}, {"dtype": torch.bfloat16}):
    try:
        toy.run(weights, bias, data, **options)
    except ValueError as e:
        said.append(str(e))
after, _ = toy.run(weights, bias, data)
json.dump([said, [W.tolist() for W in after]], sys.stdout)
"""


def test_one_file_is_enough_for_the_method(tmp_path):
    """Weights of a run with the file alone equal those with both files, bit for bit."""
    for name in ("hd_pissa.py", "tests/toy.py"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, weights = json.loads(done.stdout)
    assert len(said) == 3 and all("need hd_pissa_extra.py" in text for text in said)
    expected, _ = toy.run(*toy.problem())
    for W, other in zip(expected, weights):
        assert torch.equal(W, torch.tensor(other, dtype=torch.float64))


@pytest.mark.parametrize("file, limit", [("hd_pissa.py", 650), ("train.py", 550)])
def test_it_can_be_read_in_one_sitting(file, limit):
    lines = (ROOT / file).read_text().splitlines()
    assert len(lines) <= limit and max(map(len, lines)) <= 110
