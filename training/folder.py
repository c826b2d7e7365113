"""OUT, the folder of a run: who may write there, whole files, the log."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import hd_pissa
from training.processes import together


@contextlib.contextmanager
def alone(out: Path):
    """Process 0 makes and holds the folder; ValueError on all processes if another run has it.

    Workers may outlive a torchrun that was killed; a second run would mix its files with theirs.
    """
    def lock():
        if hd_pissa.process_index() > 0:
            return None
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
        try:
            import fcntl
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ValueError(f"another run is writing to {out}; wait for it, or end it (pgrep -f train.py), "
                             "or give another --out") from None
        except (ImportError, OSError):
            pass                        # no such locks on this system, or on this network disk
        return handle

    handle = together(lock)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)            # and the kernel does so when a process is killed


def begin(out: Path, config: dict, start: int) -> None:
    """Process 0 makes OUT what it is after step `start`: nothing of later steps or another run."""
    if hd_pissa.process_index() > 0:
        return
    if not start:
        shutil.rmtree(out / "checkpoint", ignore_errors=True)
    for name in ("result.json", "spectra.json", "report.html"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "lora", ignore_errors=True)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for stale in (out / "checkpoint").glob("step_*.tmp"):               # a killed save's
        shutil.rmtree(stale, ignore_errors=True)
    cut_log(out / "log.jsonl", start)


def sync(path: Path) -> None:
    """The file or folder is on the disk, not only in the kernel's cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> list:
    """[size, blake2b] of a file."""
    h = hashlib.blake2b(digest_size=32)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            h.update(block)
    return [path.stat().st_size, h.hexdigest()]


def write(path: Path, text: str) -> None:
    """A whole file or the one before: written beside it and renamed."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def read_result(path: Path) -> dict | None:
    """OUT/result.json, or None where there is none, or one that a full disk or a kill has cut."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())


def cut_log(path: Path, step: int) -> None:
    """Drop the lines after `step`, and one that a kill has cut: those steps are done again."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        with contextlib.suppress(ValueError):
            kept += [line] if json.loads(line)["step"] <= step else []
    path.write_text("".join(kept))


def append_log(path: Path, record: dict) -> OSError | None:
    """Process 0 adds a line; an error is returned, for all processes to raise together."""
    if hd_pissa.process_index() > 0:
        return None
    line = {k: v if math.isfinite(v) else None for k, v in record.items()}
    try:
        with open(path, "a") as log:
            log.write(json.dumps(line) + "\n")
    except OSError as e:
        return e
