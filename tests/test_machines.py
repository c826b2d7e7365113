"""Two machines joined by a network: the result of one process, and an end for both when the cable is cut."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hosts import two_hosts, unavailable

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
FLAGS = ["--max_steps", "4", "--shards", "4", "--batch_size", "16", "--eval_rows", "8", "--threads", "1"]
TIMEOUT = 60  # seconds for a run of FLAGS; it takes about ten

pytestmark = pytest.mark.slow


@pytest.fixture
def hosts():
    if reason := unavailable():
        pytest.skip(reason)
    with two_hosts() as hosts:
        yield hosts


def launch(hosts, out: Path, *flags):
    """train.py on both hosts; (processes, function that returns what they have printed)."""
    files = [out.with_suffix(f".host{host}") for host in range(2)]
    command, processes = [TRAIN, *flags, "--out", out], []
    for host, file in enumerate(files):
        with open(file, "w") as output:
            processes.append(hosts.torchrun(host, command, stdout=output, stderr=subprocess.STDOUT))
    return processes, lambda: "\n".join(f"---- host {i}:\n{f.read_text()}" for i, f in enumerate(files))


def on_two_hosts(hosts, out: Path, *flags) -> str:
    processes, printed = launch(hosts, out, *flags)
    try:
        codes = [process.wait(timeout=TIMEOUT) for process in processes]
    except subprocess.TimeoutExpired:
        codes = [process.poll() for process in processes]
    assert codes == [0, 0], f"exit codes {codes}\n{printed()}"
    return printed()


def in_one_process(out: Path, *flags) -> None:
    done = subprocess.run(
        [sys.executable, TRAIN, *flags, "--out", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout


def results(out: Path):
    """(weights, [(loss, gradient norm) of each step]) of a finished run."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return torch.load(out / "model.pt", weights_only=True), [(r["loss"], r["grad_norm"]) for r in records]


@pytest.mark.parametrize("sharded", [[], ["--shard_weights"]], ids=["replicated", "shard_weights"])
def test_two_hosts_equal_one_process_bit_for_bit(hosts, tmp_path, sharded):
    """The default exchange moves factors and sums them in shard order, wherever the shards are."""
    in_one_process(tmp_path / "one", *FLAGS)
    printed = on_two_hosts(hosts, tmp_path / "two", *FLAGS, *sharded)
    (one, log), (two, log_two) = results(tmp_path / "one"), results(tmp_path / "two")
    assert log_two == log and len(log) == 4, printed
    assert two.keys() == one.keys(), printed
    assert all(torch.equal(two[name], one[name]) for name in one), printed
    base = torch.load(TRAIN.parent / "data" / "base.pt", weights_only=True)
    assert not all(torch.equal(one[name], base[name]) for name in one), "nothing was trained"


def test_dense_exchange_equals_one_process(hosts, tmp_path):
    """all_reduce adds the two hosts' sums, which is another order of the same terms."""
    flags = [*FLAGS, "--exchange", "all_reduce"]
    in_one_process(tmp_path / "one", *flags)
    printed = on_two_hosts(hosts, tmp_path / "two", *flags)
    (one, log), (two, log_two) = results(tmp_path / "one"), results(tmp_path / "two")
    for a, b in zip(log, log_two, strict=True):
        assert b == pytest.approx(a, rel=1e-5), printed
    assert two.keys() == one.keys(), printed
    for name in one:
        print(name)
        torch.testing.assert_close(
            two[name], one[name], rtol=1e-5, atol=1e-7, msg=lambda text: f"{text}\n{printed}"
        )


def test_a_cut_cable_ends_both_hosts(hosts, tmp_path):
    """No packet says that the other host is gone: only --timeout ends the collective, on each host alone."""
    out = tmp_path / "two"
    long = [*FLAGS, "--max_steps", "100000", "--timeout", "20"]
    processes, printed = launch(hosts, out, *long)
    start, log = time.monotonic(), out / "log.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert time.monotonic() - start < TIMEOUT and all(p.poll() is None for p in processes), printed()
        time.sleep(0.1)
    hosts.cut()
    cut = time.monotonic()
    while any(hosts.alive(host) for host in range(2)) and time.monotonic() - cut < 90:
        time.sleep(0.1)
    alive = [hosts.alive(host) for host in range(2)]
    assert alive == [[], []], f"processes {alive} are still there 90 s after the cut\n{printed()}"
    codes = [process.wait() for process in processes]
    print(f"ended {time.monotonic() - cut:.1f} s after the cut, exit codes {codes}\n{printed()}")
    assert all(codes), f"exit codes {codes}\n{printed()}"
