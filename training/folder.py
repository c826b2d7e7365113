"""OUT, the folder of a run: whose it is, whole files, and what may be deleted in it.

A folder is a run's if the config.json of a run is in it; any other must be new or empty. What a run
writes has fixed names, or stands in OUT/files.json before it is written. Nothing else is deleted: no
folder with all that is in it, nothing behind a symbolic link. Links are followed to write.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
import tempfile
from datetime import datetime
from pathlib import Path

import hd_pissa
from data.rows import split_list, weighted
from training.processes import everywhere, say

FIXED = ("result.json", "spectra.json", "report.html", "eval.jsonl", "model.pt")
MARKS = ("config.json", "log.jsonl", "files.json")
FOLDERS = ("checkpoint", "model", "best", "lora", "answers")
CHECKPOINT = r"tensors_\d+\.bin|manifest\.json"       # names of the files in a checkpoint


# ---- Whole files -----------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """The file or folder is on the disk, not only in the kernel's cache, if the file system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():           # some network disks cannot do it for folders
            raise
    finally:
        os.close(handle)


def digest(path: Path) -> list:
    """[size, blake2b] of a file."""
    h = hashlib.blake2b(digest_size=32)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            h.update(block)
    return [path.stat().st_size, h.hexdigest()]


@contextlib.contextmanager
def writing(what: Path):
    """OSError, one sentence that names `what`, where it cannot be written; safetensors has errors of its own.

    ValueError and RuntimeError, which a collective raises, pass unless `everywhere` made them of an OSError.
    """
    try:
        yield
    except Exception as e:
        if isinstance(e, (ValueError, RuntimeError)) and not isinstance(e.__cause__, OSError):
            raise
        raise OSError(f"{what} was not written ({' '.join(str(e).split())}); mend that, or make room, and "
                      "the same command goes on") from e


def put(path: Path, write) -> None:
    """write(temporary path), then the file under its name: the whole new one, or the one before."""
    path = Path(os.path.realpath(path))                                 # a link is followed
    unfinished = path.with_name(path.name + ".tmp")
    with writing(path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)       # left by a kill; and through a link or pipe nothing is written
        write(unfinished)
        sync(unfinished)
        os.replace(unfinished, path)
        sync(path.parent)


def write(path: Path, text: str) -> None:
    """The whole text, or the file before; what no encoding can show is written as \\udc80."""
    put(path, lambda unfinished: unfinished.write_text(text, "utf-8", "backslashreplace"))


def read(path: Path, most: int = 1 << 28) -> str:
    """The text of a regular file; ValueError for anything else, without waiting at a pipe."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(handle, "rb") as file:
        there = os.fstat(handle)
        if not stat.S_ISREG(there.st_mode) or there.st_size > most:
            raise ValueError(f"{path} is no file, or one of more than {most >> 20} MiB; remove it")
        return file.read().decode("utf-8", "replace")


def inside(path: Path, folder: Path) -> bool:
    """Does the path lead into the folder, links followed? (Path.resolve raises for links in a circle.)"""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def parsed(text: str):
    """json.loads, with ValueError for what is nested too deeply as well."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


# ---- Whose folder it is ----------------------------------------------------------------------------


def config_of(out: Path) -> dict | None:
    """config.json of the run in OUT; None where there is none."""
    try:
        config = parsed(read(out / "config.json"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and {"method", "resume", "rows"} <= config.keys() else None


@contextlib.contextmanager
def alone(out: Path):
    """Process 0 makes and holds the folder; ValueError on all processes if another run has it.

    Workers may outlive a torchrun that was killed; a second run would mix its files with theirs.
    """
    def lock():
        if hd_pissa.process_index() > 0:
            return None, []
        try:
            made = [path for path in (out, *out.parents) if not path.exists()]
            out.mkdir(parents=True, exist_ok=True)
            handle = os.open(out, os.O_RDONLY)
        except OSError as e:
            raise ValueError(f"--out {out} is no folder and cannot be made one ({e}); give another") from e
        try:
            import fcntl
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not out.is_dir() or not os.path.samestat(os.fstat(handle), out.stat()):
                raise BlockingIOError   # who had it has failed, and removed what it had made
        except BlockingIOError:
            os.close(handle)
            raise ValueError(
                f"another run is writing to {out}; wait for it, or end it (pgrep -f train.py finds "
                "workers that outlived a killed torchrun too), or give another --out") from None
        except (ImportError, OSError):
            pass                        # no such locks on this system, or on this network disk
        return handle, made

    handle, made = everywhere(lock)
    try:
        yield
    finally:
        for path in made:               # where an error came before anything was written
            with contextlib.suppress(OSError):
                path.rmdir()
        if handle is not None:          # last: nobody else may be in what is removed
            os.close(handle)            # and the kernel does so when a process is killed


def inputs(args) -> list[str | None]:
    """What the flags of a run name that is read: paths, or lists of such."""
    return [getattr(args, flag) for flag in ("model", "data", "eval_data", "eval", "tokenizer")]


def check_ours(out: Path, *inputs: str | None) -> None:
    """ValueError if OUT holds what no run has written, cannot be written, or an input of the run lies in it.

    inputs      as the function of that name gives them
    """
    def foreign(path):
        unmarked = path.name == "config.json.tmp"           # killed before the mark had its name
        return not unmarked and (not path.is_dir() or any(path.iterdir()))

    def check():
        if hd_pissa.process_index() > 0:
            return
        read = [path for text in inputs if text for _, path in map(weighted, split_list(text))]
        places = [out, *(out / name for name in (*FIXED, *MARKS, *FOLDERS, "best.pt"))]     # links, maybe
        if risky := [p for p in read if os.path.exists(p) and any(inside(Path(p), q) for q in places)]:
            raise ValueError(f"{risky[0]} lies in --out {out}, or a link there leads to it: a result would "
                             "replace it; give another --out")
        if config_of(out) is None and (others := sorted(p.name for p in out.iterdir() if foreign(p))):
            raise ValueError(f"--out {out} holds {', '.join(others[:3])} and no config.json of a run: it "
                             "is not a run's; give a new or an empty folder")
        for path in (out / (name + end) for name in (*FIXED, *MARKS) for end in ("", ".tmp")):
            if path.exists() and not path.is_file():
                raise ValueError(f"{path} is no file, but a run writes one there; move it away, or give "
                                 "another --out")
        for path in (out, *(out / name for name in FOLDERS)):
            if os.path.lexists(path):
                check_writable(path)

    everywhere(check)


def check_writable(path: Path) -> None:
    """ValueError unless files can be made in the folder, and so be removed."""
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as e:
        raise ValueError(f"{path} is no folder that can be written ({e}); mend, move or remove it, or give "
                         "another --out") from e


def check_room(out: Path, checkpoint: int, result: int, keep: int, anew: bool) -> None:
    """ValueError unless there is room for a checkpoint and the result, and what is in their way can go.

    A warning if there is too little room for all of them.

    checkpoint, result  their bytes      keep  checkpoints that stay, while one more is written
    anew                the run's old checkpoints are removed before the first one
    """
    def check():
        needs = {}                      # of each disk: a folder on it, least, all; links may lead to others
        for name, least, most in (("checkpoint", checkpoint, (keep + 1) * checkpoint),
                                  ("model", result, result)):
            place = out / name if (out / name).is_dir() else out
            entry = needs.setdefault(place.stat().st_dev, [place, 0, 0])
            if anew and name == "checkpoint":
                for path in filter(Path.is_dir, out.glob("checkpoint/step_*")):
                    check_writable(path)
                old = sum(path.stat().st_size for path in out.glob("checkpoint/step_*/*"))
                least, most = least - old, most - old
            entry[1:] = entry[1] + least, entry[2] + most
        for place, least, most in needs.values():
            free = shutil.disk_usage(place).free
            text = (f"{place} has {free / 2**20:,.0f} MiB free; a checkpoint needs about "
                    f"{checkpoint / 2**20:,.0f} MiB, the result {result / 2**20:,.0f} MiB")
            if free < least:
                raise ValueError(f"{text}; make room, or give an --out on another disk")
            if free < most:
                say(f"{text}: too little for --keep {keep} of them and one being written")

    everywhere(lambda: hd_pissa.process_index() or check())


# ---- What may be deleted ---------------------------------------------------------------------------


def remove(path: Path) -> None:
    """Delete a file that a run has written; what a link leads to is emptied and stays."""
    if path.is_symlink():
        if path.is_file():
            path.write_text("")
    elif path.is_file():
        path.unlink()


def remove_folder(path: Path, names: str) -> None:
    """Delete a folder's files whose whole names match the pattern, and the folder if that was all."""
    if path.is_symlink() or not path.is_dir():
        return
    for file in path.iterdir():
        if re.fullmatch(names, file.name) and not file.is_symlink() and file.is_file():
            file.unlink()
    with contextlib.suppress(OSError):
        path.rmdir()


def listed(out: Path) -> list[str]:
    """The names in OUT/files.json, those that lead out of OUT or through a link left out."""
    try:
        names = parsed(read(out / "files.json"))
    except (OSError, ValueError):
        return []

    def safe(name):
        if not isinstance(name, str) or "\0" in name or os.path.isabs(name) or ".." in Path(name).parts:
            return False
        return not any((out / parent).is_symlink() for parent in Path(name).parents)

    return [name for name in names if safe(name)] if isinstance(names, list) else []


def remember(out: Path, names) -> None:
    """Add names, relative to OUT, to those that a later run may delete: before they are written."""
    write(out / "files.json", json.dumps(sorted({*listed(out), *names}), indent=0) + "\n")


def unfinished(out: Path, name: str) -> Path:
    """An empty folder beside whose files OUT/name/ has its own, for `settle`."""
    path = out / name / "unfinished"
    with writing(out / name):
        remove_folder(path, ".*")
        path.mkdir(parents=True, exist_ok=True)
    return path


def settle(out: Path, name: str) -> dict[str, int]:
    """Move the unfinished files of OUT/name/ to their places; {their names in OUT: sizes}.

    One by one: of the folder itself, which may be a link to another disk, nothing else is touched.
    """
    path, final = out / name / "unfinished", out / name
    files = {f"{name}/{file.name}": file.stat().st_size for file in sorted(path.iterdir())}
    remember(out, files)
    with writing(final):
        for file in sorted(path.iterdir()):
            sync(file)
            os.replace(file, final / file.name)
        path.rmdir()
        sync(final)
    return files


def forget(out: Path) -> None:
    """Delete what the run before has left: results and checkpoints."""
    for name in FIXED:
        remove(out / name)
    for name in listed(out):
        remove(out / name)
        with contextlib.suppress(OSError):
            (out / name).parent.rmdir()
    remove(out / "files.json")
    for path in [*out.glob("checkpoint/step_*")]:
        remove_folder(path, CHECKPOINT)


def begin(out: Path, config: dict, start: int) -> None:
    """Process 0 makes OUT what it is after step `start`, with nothing of another run, and marks it."""
    if hd_pissa.process_index() > 0:
        return
    if start:
        remove(out / "result.json")
    else:
        forget(out)
    config["begun"] = f"by process {os.getpid()} on {socket.gethostname()}, {datetime.now()}"
    write(out / "config.json", json.dumps(config, indent=1) + "\n")
    cut_log(out / "log.jsonl", start)


# ---- Log and result --------------------------------------------------------------------------------


def cut_log(path: Path, step: int) -> None:
    """Drop the lines after `step`, and one that a kill has cut: those steps are done again."""
    kept = []
    for line in read(path).splitlines(keepends=True) if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            kept += [line] if parsed(line)["step"] <= step else []
    write(path, "".join(kept))


def append_log(path: Path, record: dict, config: dict) -> OSError | None:
    """Process 0 adds a line; an error is returned, for all processes to raise together.

    It is one too if the folder has another run's mark by now: someone has removed and made it again, or
    it lies on a disk without locks.
    """
    if hd_pissa.process_index() > 0:
        return None
    line = {k: v if math.isfinite(v) else None for k, v in record.items()}
    try:
        if (there := config_of(path.parent)) and there.get("begun") != config.get("begun"):
            raise OSError(f"another run has taken {path.parent}, begun {there.get('begun')}; give this one "
                          "another --out")
        with writing(path), open(path, "a") as log:
            log.write(json.dumps(line) + "\n")
    except OSError as e:
        return e


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSONL file, without lines that hold none: a kill may have cut the last."""
    lines = []
    for line in read(path).splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines += [parsed(line)]
    return [line for line in lines if isinstance(line, dict)]


def read_result(out: Path) -> dict | None:
    """OUT/result.json of a whole result; None where it, or a file that it names, is missing or cut."""
    try:
        result = parsed(read(out / "result.json"))
        for table in (result["before"], result["after"]):
            if not all(isinstance(row[key], (int, float)) for row in (*table.values(), table["all"])
                       for key in ("loss", "exact_match", "rows")):
                return None
        whole = result["before"].keys() == result["after"].keys() and result["files"] and all(
            (out / name).stat().st_size == size for name, size in result["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return result if whole else None
