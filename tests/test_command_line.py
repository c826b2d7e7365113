"""What a user of train.py meets: help, default folder, threads, devices, one sentence for an error."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from few_rows import ROWS

import train
from training import processes

ROOT = Path(__file__).resolve().parent.parent


def test_help_shows_the_everyday_flags_first(capsys):
    """A dozen of them, then groups of more; every flag has its default and a line of help."""
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    text = capsys.readouterr().out
    first, *more = re.split(r"^(?:every day|more: [\w ]+):\n", text, flags=re.M)[1:]
    assert len(re.findall(r"^  --", first, re.M)) == 12 and len(more) >= 4
    assert all(f"--{name}" in first for name in "method model data rank shards lr max_steps out".split())
    assert text.count("(default:") == len(re.findall(r"^  --", text, re.M))
    assert text.index("usage") < 20 and text.index("every day") < 300, "no wall of flags above"


def test_each_method_has_a_folder_of_its_own():
    """The obvious next command, --method lora, does not meet the results of the first."""
    outs = {train.parse(["--method", method]).out for method in ("hd_pissa", "lora", "pissa", "full")}
    assert outs == {"out/hd_pissa", "out/lora", "out/pissa", "out/full"}
    assert train.parse(["--out", "here"]).out == "here"


@pytest.mark.parametrize("given, omp, small, local, threads", [
    (3, "2", True, "2", 3), (None, "2", False, "1", 2), (None, "2", True, "1", 2), (None, None, True, "1", 1),
    (None, None, False, "1", 6), (None, None, False, "4", 1), (None, "", False, "2", 3),
    (None, "0", False, "1", 1),
])  # fmt: skip
def test_threads(given, omp, small, local, threads, monkeypatch):
    """--threads, else OMP_NUM_THREADS, else one for the small GPT, else a share of the allowed CPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    assert processes.cpu_threads(given, small) == threads


@pytest.mark.parametrize("gpus, local, device, expected", [
    (0, 1, "auto", "cpu"), (1, 2, "auto", "cpu"), (2, 2, "auto", "cuda"), (2, 1, "auto", "cuda"),
    (2, 2, "cpu", "cpu"), (2, 2, "cuda", "cuda"), (1, 2, "cuda", "2 processes for 1 GPUs; start one a GPU"),
    (0, 1, "cuda", "use --device cpu"),
])  # fmt: skip
def test_devices(gpus, local, device, expected, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.delenv("RANK", raising=False)
    if expected in ("cpu", "cuda"):
        assert processes.start_processes(device, 1, 60.0).type == expected
    else:
        with pytest.raises(ValueError, match=expected):
            processes.start_processes(device, 1, 60.0)
    said = "so they use CPUs" in capsys.readouterr().out
    assert said == (device == "auto" and 0 < gpus < local)


def test_a_busy_port_is_named(monkeypatch):
    """A port that something else listens at: where, and what to give instead."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        environ = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": port}  # fmt: skip
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"cannot meet at 127.0.0.1:{port}.*--master_port"):
            processes.start_processes("cpu", 1, 5.0)


def torchrun(program, *argv):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program, *argv],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("flag", [["--data", "missing.jsonl"], ["--rank", "0"]])
def test_an_error_of_all_processes_is_said_once(flag, tmp_path):
    """One line by process 0, status 2; torchrun's report then ends with the same sentence."""
    done = torchrun(ROOT / "train.py", *flag, "--out", str(tmp_path / "out"), "--device", "cpu")
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: error: ")]
    assert len(lines) == 1 and done.returncode == 1 and "(most recent call last)" not in done.stdout
    sentence = lines[0].removeprefix("train.py: error: ")
    assert "exitcode  : 2" in done.stderr and sentence in done.stderr.splitlines()[-2]
    assert "To enable traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_an_error_of_one_process_is_not_lost(tmp_path):
    """Process 1 fails alone while process 0 waits for it: torchrun's report has the sentence."""
    program = tmp_path / "program.py"
    program.write_text(f"import os, sys, time; sys.path[:0] = [{str(ROOT)!r}]\n"
                       "from training.processes import fail\n"
                       "fail('disk of machine 1 is full') if os.environ['RANK'] == '1' else time.sleep(60)\n")
    done = torchrun(program)
    assert "traceback : disk of machine 1 is full" in done.stderr and "rank      : 1" in done.stderr


def test_a_fault_in_the_program_shows_its_traceback_at_once():
    """destroy_process_group may wait for other processes, so nothing calls it on the way out of an error."""
    text = (ROOT / "train.py").read_text()
    tail = text[text.rindex('if __name__ == "__main__":'):]
    program = f"""
import time
class dist:
    is_initialized = staticmethod(lambda: True)
    destroy_process_group = staticmethod(lambda: time.sleep(60))
def main(): raise MemoryError("out of memory in a step")
{tail}"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and "MemoryError: out of memory in a step" in done.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are read from /proc")
@pytest.mark.parametrize("flags", [
    ["--max_steps", "1", "--shards", "2", "--batch_size", "4", "--eval_rows", "4"],
    ["--data", "missing.jsonl"],
])  # fmt: skip
def test_gloo_ends_before_python(flags, tmp_path):
    """A gloo thread that lives while Python ends may abort the process: at exit, none is left."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import atexit, os, pathlib, runpy, sys
def threads():          # registered first, so it is called last
    names = [(task / "comm").read_text() for task in pathlib.Path("/proc/self/task").iterdir()]
    os.write(2, f"gloo threads: {{sum('gloo' in name for name in names)}}\\n".encode())
atexit.register(threads)
sys.path[:0] = [{str(ROOT)!r}]
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
""")
    data = [] if "--data" in flags else ["--data", ROWS]
    done = torchrun(program, *flags, *data, "--out", tmp_path / "out", "--device", "cpu", "--threads", "1")
    assert {*re.findall(r"gloo threads: (\d+)", done.stderr)} == {"0"}, done.stderr


def test_flags_of_a_file(tmp_path, capsys):
    """As in a shell: lines, quotes, comments; what comes later wins, in the file or behind it."""
    file = tmp_path / "my flags.txt"
    file.write_text("--rank 4  # r\n--max_steps 7\n\n--out 'a folder'\n# --rank 9\n", "utf-8")
    args = train.parse(["--rank", "3", f"@{file}", "--max_steps", "8"])
    assert (args.rank, args.max_steps, args.out) == (4, 8, "a folder")
    file.write_text("--recipe paper-math --model a/llama")
    assert train.parse([f"@{file}"]).rank == 16
    os.mkfifo(tmp_path / "pipe")
    file.write_text("--out 'no end")
    for bad, words in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory"),
                       (tmp_path / "pipe", "no file"), (file, "No closing quotation")):
        with pytest.raises(SystemExit) as exit:
            train.parse([f"@{bad}"])
        lines = capsys.readouterr().err.splitlines()
        assert exit.value.code == 2 and len(lines) == 1 and words in lines[0] and str(bad) in lines[0]


def test_tensorboard_without_the_package_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit:
        train.parse(["--log", "tensorboard"])
    message = capsys.readouterr().err
    assert exit.value.code == 2 and "needs tensorboard: pip install tensorboard" in message


def test_tensorboard_has_what_the_log_has(tmp_path):
    """Every number of log.jsonl and the held-out losses, read back by tensorboard's own reader; a new run in
    the folder leaves none of the old one."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    argv = ["--max_steps", "4", "--batch_size", "16", "--eval_rows", "8", "--eval_every", "2", "--threads",
            "1", "--log", "tensorboard", "--out", str(tmp_path)]  # fmt: skip
    train.main([*argv, "--seed", "1"])
    train.main([*argv, "--resume", "never"])
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for name in log[0].keys() - {"step"}:
        there = [(event.step, event.value) for event in events.Scalars(name)]
        assert there == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in log]
    exams = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    (event,) = events.Scalars("held out: loss")
    assert (event.step, event.value) == (2, pytest.approx(exams[1]["loss"], rel=1e-6))
