"""Killed at any moment, out of disk, without its folder: the same command ends at the same bits, or says why.

The helpers at the top are used by tests/bench/stress.py too.
"""

import collections
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from few_rows import ROWS

import train

pytestmark = pytest.mark.slow

SMALL = ["--device", "cpu", "--threads", "1", "--shards", "4", "--batch_size", "8", "--micro_batch_size", "4",
         "--eval_rows", "8", "--data", str(ROWS)]  # fmt: skip
PATIENCE = 120              # seconds until a run that does not move is taken for hung
SPACING = 6                 # most steps from one kill to the next


# ---- Helpers: processes by /proc, so that nothing has to be installed --------------------------------------


def command(out, *flags, processes=2, restarts=0) -> list[str]:
    launch = [sys.executable]
    if processes:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                   f"--max-restarts={restarts}"]  # fmt: skip
    return [*launch, str(ROOT / "train.py"), *SMALL, *map(str, flags), "--out", str(out)]


def environment() -> dict:
    """torchrun sets one thread itself otherwise, and prints a paragraph about it."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def alive(pid: int) -> bool:
    """Runs still; one that is dead and waits for its parent to notice does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def workers_of(torchrun: int) -> dict[int, int]:
    """{rank: pid} of the running workers of a torchrun; they are its children, in sessions of their own."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, KeyError):
            pid = int(entry.name)
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == torchrun and alive(pid):
                pairs = (pair.partition("=") for pair in (entry / "environ").read_text().split("\0"))
                found[int({name: value for name, _, value in pairs}["RANK"])] = pid
    return found


def resident(pid: int) -> int:
    """KiB of a process's memory that lie in RAM."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def wait(condition, why: str, process=None):
    """The first true value of condition(); AssertionError after PATIENCE, or once the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {PATIENCE} s: {why}"
        assert process is None or process.poll() is None, f"ended with {process.returncode} before: {why}"
        time.sleep(0.002)
    return value


def kill(*pids: int) -> None:
    """kill -9, and they are gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait(lambda: not any(map(alive, pids)), "killed processes to be gone")


@contextlib.contextmanager
def started(out: Path, *flags, processes=2, restarts=0):
    """(process, files of its stdout and stderr) of a command in the background; it does not outlive this."""
    text, errors = (out.with_name(f"{out.name}.{stream}") for stream in ("stdout", "stderr"))
    with open(text, "w") as stdout, open(errors, "w") as stderr:
        process = subprocess.Popen(command(out, *flags, processes=processes, restarts=restarts),
                                   stdout=stdout, stderr=stderr, env=environment())  # fmt: skip
    try:
        yield process, text, errors
    finally:
        workers = workers_of(process.pid)
        kill(process.pid, *workers.values())
        process.wait()


def finish(out: Path, *flags, processes=2) -> tuple[str, str]:
    """Run a command to its end; (stdout, stderr)."""
    done = subprocess.run(command(out, *flags, processes=processes), capture_output=True, text=True,
                          timeout=2 * PATIENCE, env=environment())  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def undisturbed(out: Path, *flags) -> Path:
    """A run to compare with: on one process, this one, since the bits do not depend on their number."""
    train.main([*SMALL, *map(str, flags), "--out", str(out)])
    return out


def log_steps(out: Path) -> list[int]:
    """Steps of the log's whole lines, as far as it is written by now."""
    try:
        lines = (out / "log.jsonl").read_text().split("\n")[:-1]
    except OSError:
        return []
    return [json.loads(line)["step"] for line in lines]


def newest(out: Path) -> int:
    """Step of the newest finished checkpoint, 0 without one."""
    folders = (out / "checkpoint").glob("step_*")
    return max((int(path.name[5:]) for path in folders if path.name[5:].isdigit()), default=0)


def at_step(out: Path, step: int):
    return lambda: log_steps(out)[-1:] >= [step]


def differences(a: Path, b: Path) -> list[str]:
    """What differs between the results of two folders: weights by their bits, and the log but for speeds."""
    found = []
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (a, b)]
    for out, log in zip((a, b), logs):
        if [record["step"] for record in log] != list(range(1, len(log) + 1)):
            found.append(f"{out.name}: steps of the log are not 1, 2, 3, ... once each")
    keys = "step", "loss", "lr", "grad_norm"
    if [[r[key] for key in keys] for r in logs[0]] != [[r[key] for key in keys] for r in logs[1]]:
        found.append("losses")
    x, y = (torch.load(out / "model.pt", weights_only=True) for out in (a, b))
    if list(x) != list(y):
        return [*found, "names of the weights"]
    return found + [name for name in x if x[name].dtype != y[name].dtype or x[name].shape != y[name].shape
                    or not torch.equal(x[name].view(torch.uint8), y[name].view(torch.uint8))]  # fmt: skip


def kill_many(folder: Path, kills: int, seed: int = 0, processes: int = 2, progress=iter) -> dict:
    """Start one command again and again, kill it `kills` times, let it finish; counts and what went wrong.

    By turns one worker dies, and torchrun ends the others; or all processes die at once as in a power cut;
    or torchrun alone, and its workers go on for a while.
    The moment is random, after training has begun; --save_every 1 makes most of a step a save.
    """
    draw, out, whole = random.Random(seed), folder / "killed", folder / "whole"
    flags = ["--max_steps", (SPACING + 2) * kills]
    undisturbed(whole, *flags)
    flags += ["--save_every", 1]
    in_save = resumed = 0
    wrong, start = [], time.monotonic()
    for attempt in progress(range(kills + 1)):
        saved = newest(out)
        with started(out, *flags, processes=processes) as (process, text, errors):
            if attempt < kills:
                # An earlier attempt has logged step saved + 1 at most: the one after is this attempt's.
                wait(at_step(out, saved + 2), f"step {saved + 2} of attempt {attempt + 1}", process)
                moment = time.monotonic() + draw.uniform(0, 0.5)
                while time.monotonic() < moment and not at_step(out, saved + SPACING)():
                    time.sleep(0.001)
                workers = workers_of(process.pid)
                if attempt % 3 == 1:
                    kill(process.pid, *workers.values())
                elif attempt % 3 == 2:
                    kill(process.pid)
                    time.sleep(draw.uniform(0, 0.2))
                    kill(*workers.values())
                else:
                    kill(workers[draw.choice(sorted(workers))])
                    process.wait(PATIENCE)
                    wait(lambda workers=workers: not any(map(alive, workers.values())), "torchrun's workers")
                in_save += any((out / "checkpoint").glob("step_*.tmp"))
            elif process.wait(4 * PATIENCE):
                wrong.append(f"last attempt: exit code {process.returncode}: {errors.read_text()[-2000:]}")
            if attempt and f"going on after step {saved} of" in text.read_text():
                resumed += 1
            elif attempt:
                wrong.append(f"attempt {attempt + 1} did not go on after step {saved}")
    return {"kills": kills, "in_save": in_save, "resumed": resumed, "steps": len(log_steps(out)),
            "seconds": time.monotonic() - start, "wrong": wrong + differences(whole, out)}  # fmt: skip


def kill_throughout(folder: Path, kills: int, processes: int) -> dict:
    """Kill a short command at moments spread over the time that it takes; where it was, and what is wrong.

    Each time it goes on where it was, so that the later moments meet later parts; then it may end.
    """
    out, met, flags = folder / "killed", collections.Counter(), ["--max_steps", 4, "--save_every", 1]
    whole, began = folder / "whole", time.monotonic()
    finish(whole, *flags, processes=processes)
    seconds = time.monotonic() - began
    for part in range(kills):
        with started(out, *flags, processes=processes) as (process, _, errors):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait((part + 1) / (kills + 1) * seconds)
            bars = [part for part in ("SVD", "evaluate base", "train", "evaluate result")
                    if part + ":" in errors.read_text()]
            met["ended" if process.poll() == 0 else bars[-1] if bars else "before SVD"] += 1
            kill(process.pid, *workers_of(process.pid).values())
    finish(out, *flags, processes=processes)
    wrong = differences(whole, out)
    if {path.name for path in out.iterdir()} != {path.name for path in whole.iterdir()}:
        wrong.append("names of files")
    return {"met": dict(met), "wrong": wrong}


# ---- Kills -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four steps that nobody disturbs."""
    return undisturbed(tmp_path_factory.mktemp("undisturbed") / "whole", "--max_steps", 4)


def test_many_kills_change_no_bit(tmp_path):
    """kill -9 at random moments, of one worker or of all: each restart goes on, the end is equal."""
    seen = kill_many(tmp_path, 10)          # tests/bench/stress.py does any number
    print({key: value for key, value in seen.items() if key != "wrong"})
    assert not seen["wrong"] and seen["resumed"] == 10 and seen["steps"] == 10 * (SPACING + 2)
    assert seen["in_save"] > 0, "no kill has met a save: the moments are badly chosen"
    left = {path.name for path in (tmp_path / "killed" / "checkpoint").iterdir()}
    assert left == {f"step_{seen['steps'] - 1}", f"step_{seen['steps']}"}


@pytest.mark.parametrize("processes", [0, 2])
def test_kills_from_the_first_second_to_the_last(processes, tmp_path):
    """While it loads, decomposes, evaluates, trains, saves: the same command ends with the same bits.

    Once more it has nothing to do.
    """
    seen = kill_throughout(tmp_path, 6, processes)
    print(seen["met"])
    assert not seen["wrong"] and len(seen["met"]) > 1
    flags = ["--max_steps", 4, "--save_every", 1]
    assert "is the end of this run" in finish(tmp_path / "killed", *flags, processes=0)[0]


def test_torchrun_restarts_killed_workers(tmp_path):
    """--max-restarts=2: two workers are killed, one after the other, and the job ends well by itself."""
    out, flags = tmp_path / "killed", ["--max_steps", 40]
    undisturbed(tmp_path / "whole", *flags)
    with started(out, *flags, "--save_every", 2, restarts=2) as (process, text, errors):
        for rank, step in ((1, 8), (0, 20)):
            wait(at_step(out, step), f"step {step}", process)
            workers = workers_of(process.pid)
            kill(workers[rank])
            wait(lambda w=workers: not set(workers_of(process.pid).values()) & set(w.values()), "restart")
        assert process.wait(PATIENCE) == 0, errors.read_text()
        assert text.read_text().count("going on after step") == 2
    assert not differences(tmp_path / "whole", out)


def test_workers_that_outlive_torchrun_spoil_nothing(tmp_path):
    """kill -9 of torchrun alone leaves its workers running: the same command is refused as long as they do.

    Once nobody runs any more it leads to the right end.
    """
    out, flags = tmp_path / "out", ["--max_steps", 40, "--save_every", 10]
    undisturbed(tmp_path / "whole", *flags)
    with started(out, *flags) as (process, *_):
        wait(at_step(out, 15), "step 15", process)
        orphans = workers_of(process.pid).values()
        try:
            for pid in orphans:
                os.kill(pid, signal.SIGSTOP)                    # until the refusal
            kill(process.pid)
            assert f"another run is writing to {out}" in refused(out, *flags)
            for pid in orphans:
                os.kill(pid, signal.SIGCONT)
            wait(lambda: not any(map(alive, orphans)), "the workers without torchrun to end")
        finally:
            kill(*orphans)
    finish(out, *flags)
    assert not differences(tmp_path / "whole", out)


# ---- Disk and folders --------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A function that gives a tmpfs of so many KiB; called again, it changes the size or other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        how = ["remount"] if os.path.ismount(folder) else []
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join([*how, *options]), "tmpfs", folder],
                              capture_output=True, text=True)  # fmt: skip
        if done.returncode:
            pytest.skip(f"mount is not permitted here: {done.stderr.strip()}")
        return folder

    if not shutil.which("mount"):
        pytest.skip("no mount command")
    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", folder], check=True)


def refused(out, *flags, processes=0, code=2) -> str:
    """The one distinct line of error with which a command ends; each process may print it."""
    done = subprocess.run(command(out, *flags, processes=processes), capture_output=True, text=True,
                          timeout=PATIENCE, env=environment())  # fmt: skip
    return error_line(done.stderr, done.returncode, processes, code)


def error_line(stderr: str, returncode: int, processes: int, code: int = 2) -> str:
    if processes:
        # torchrun answers 1, and behind its own traceback, the last one, reports each worker's exit code.
        stderr, _, report = stderr.rpartition("Traceback (most recent call last):")
        codes = {int(n) for n in re.findall(r"exitcode  : (-?\d+)", report)}
        assert returncode == 1 and code in codes and codes <= {code, -signal.SIGTERM}, report
    else:
        assert returncode == code, stderr
    assert "Traceback" not in stderr, stderr
    # Besides the sentence there are progress bars, which it may follow in a line, and torchrun's remarks.
    lines = [line for line in stderr.splitlines() if "torch/distributed/elastic/" not in line]
    told = {line[line.index("train.py: error: "):] for line in lines if "train.py: error: " in line}
    assert len(told) == 1, stderr
    assert not [line for line in lines if line.strip() and not re.search(r"train.py: error: |%\|", line)]
    return told.pop()


@pytest.mark.parametrize("processes", [0, 2])
def test_disk_full_while_saving(processes, small_disk, whole):
    """No room for the second checkpoint: one sentence; the first is kept, with more room all ends well.

    On one process, which fails by itself, it says that the disk is full.
    """
    flags = ["--max_steps", 4]
    saved = (whole / "checkpoint" / "step_4").iterdir()
    one = sum(path.stat().st_blocks for path in saved) / 2              # blocks of 512 bytes, in KiB
    # Enough for one and the result, which is reckoned with at the start, not for two.
    disk = small_disk(f"size={int(1.85 * one)}k")
    out, flags = disk / "out", [*flags, "--save_every", 1]
    line = refused(out, *flags, processes=processes)
    assert "the checkpoint of step 2 was not written" in line and "Make room" in line
    assert processes or "No space left" in line
    assert "step_1 is whole, the same command continues from it" in line
    assert [path.name for path in (out / "checkpoint").iterdir()] == ["step_1"]
    small_disk(f"size={int(16 * one)}k")
    assert "going on after step 1" in finish(out, *flags, processes=processes)[0]
    assert not differences(whole, out)


@pytest.mark.parametrize("processes", [0, 2])
def test_disk_full_while_logging(processes, small_disk, tmp_path):
    """A log line that cannot be written ends every process with one sentence."""
    disk = small_disk("size=32m")
    (disk / "out").mkdir()
    out = tmp_path / "out"
    out.symlink_to(disk / "out")            # what the command prints lies on another disk
    with started(out, "--max_steps", 400, processes=processes) as (process, text, errors):
        wait(at_step(out, 3), "step 3", process)
        with contextlib.suppress(OSError), open(disk / "filler", "wb") as file:
            while True:
                file.write(b" " * 4096)
                file.flush()
        process.wait(PATIENCE)
        assert "No space left" in error_line(errors.read_text(), process.returncode, processes)


def test_no_room_where_the_checkpoints_lie(small_disk, tmp_path):
    """OUT/checkpoint on another disk than OUT: known before the first step."""
    disk, out = small_disk("size=1m"), tmp_path / "out"
    out.mkdir()
    (out / "checkpoint").symlink_to(disk)
    assert f"{out}/checkpoint has 1 MiB free; a checkpoint needs" in refused(out, "--max_steps", 2)


def test_read_only_disk(small_disk):
    """There from the beginning, or since the run was begun."""
    disk = small_disk("size=64k")
    (disk / "there").mkdir()
    small_disk("ro")
    for name in ("new", "there"):
        line = refused(disk / name, "--max_steps", 2)
        assert "Read-only file system" in line and str(disk / name) in line


@pytest.mark.parametrize("processes", [0, 2])
def test_out_below_a_file(processes, tmp_path):
    (tmp_path / "file").write_text("kept\n")
    line = refused(tmp_path / "file" / "out", "--max_steps", 2, processes=processes)
    assert "Not a directory" in line and str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == "kept\n"


def removed_during_the_run(out, *flags, processes) -> tuple[str, int]:
    """(stderr, exit code) of a run whose folder is removed after step 8."""
    with started(out, *flags, processes=processes) as (process, _, errors):
        wait(at_step(out, 8), "step 8", process)
        # Removed whole at once: file by file, the run could put one back meanwhile.
        out.rename(out.with_name("gone"))
        shutil.rmtree(out.with_name("gone"), ignore_errors=True)
        process.wait(PATIENCE)
    return errors.read_text(), process.returncode


@pytest.mark.parametrize("processes", [0, 2])
def test_out_removed_between_checkpoints(processes, tmp_path):
    """Without --out the next log line cannot be written: one sentence names the file, no traceback."""
    stderr, code = removed_during_the_run(tmp_path / "out", "--max_steps", 400, processes=processes)
    line = error_line(stderr, code, processes)
    assert "No such file or directory" in line and str(tmp_path / "out" / "log.jsonl") in line


def test_out_removed_during_saves(tmp_path):
    """Either the log line or the save meets it: one sentence, or a new folder with the right weights."""
    undisturbed(tmp_path / "whole", "--max_steps", 30)
    out = tmp_path / "out"
    stderr, code = removed_during_the_run(out, "--max_steps", 30, "--save_every", 1, processes=0)
    assert "Traceback" not in stderr and code in (0, 2), stderr
    if code:
        assert str(out) in error_line(stderr, code, processes=0)
    else:
        assert not [d for d in differences(tmp_path / "whole", out) if d.endswith("weight")]


# ---- Soak --------------------------------------------------------------------------------------------------


def test_memory_does_not_grow(tmp_path):
    """300 steps on two processes, with 60 saves: memory grows by less than 5 % after step 100."""
    out = tmp_path / "out"
    with started(out, "--max_steps", 300, "--check_every", 10, "--save_every", 5) as (process, _, errors):
        sizes = []
        for step in (100, 290):             # after the last step the held-out rows need memory of their own
            wait(at_step(out, step), f"step {step}", process)
            workers = workers_of(process.pid)
            sizes.append([resident(workers[rank]) for rank in (0, 1)])
        assert process.wait(PATIENCE) == 0, errors.read_text()
    growth = [later / early - 1 for early, later in zip(*sizes)]
    print(f"VmRSS at step 100 {sizes[0]} KiB, grown by", [f"{g:.1%}" for g in growth])
    assert max(growth) < 0.05
    assert log_steps(out) == list(range(1, 301)) and "W differs" not in errors.read_text()
