"""The processes of a run: how they are joined, who speaks, how an error ends them, who waits."""

import contextlib
import datetime
import json
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

import hd_pissa


def say(*text) -> None:
    """Print on process 0 alone."""
    if hd_pissa.process_index() == 0:
        print(*text, flush=True)


def together(work):
    """What work() gives on this process; if it fails on any, its error as ValueError on all of them."""
    kept = []
    hd_pissa.everywhere(lambda: kept.append(work()))
    return kept[0]


def cpu_threads(given: int | None, small: bool) -> int:
    """--threads, else OMP_NUM_THREADS, else this process's share of the CPUs that it may use.

    small       one thread for the small GPT: two spend their time waiting for each other
    """
    if given:
        return given
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    if small:
        return 1
    # A container or taskset may allow fewer CPUs than the machine has. No such call on macOS.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def start_processes(device: str, threads: int, timeout: float) -> torch.device:
    """Join the process group that torchrun announces; return this process's device.

    device      "cpu", "cuda", or "auto": a GPU for each process, or CPUs for all of them
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if device == "cuda" and not gpus:
        raise ValueError("--device cuda: torch sees no GPU here; use --device cpu")
    if device == "cuda" and processes > gpus:
        raise ValueError(f"--device cuda: {processes} processes for {gpus} GPUs; start one a GPU, "
                         "each holds several of the --shards, or use --device cpu")
    if device == "auto":
        device = "cuda" if gpus >= processes else "cpu"
        if 0 < gpus < processes and int(os.environ.get("RANK", 0)) == 0:
            print(f"--device auto: {processes} processes for {gpus} GPUs, so they use CPUs; for GPUs"
                  " start one process a GPU, each holds several of the --shards", flush=True)
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    if "RANK" in os.environ and not dist.is_initialized():
        join_processes("nccl" if device == "cuda" else "gloo", timeout)
    return torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")


def join_processes(backend: str, timeout: float) -> None:
    """init_process_group for what torchrun has started; a collective waits `timeout` seconds.

    After a restart torchrun's store still has the addresses at which killed workers listened: gloo
    would call there. On one machine restarts are counted alike everywhere, so each gets own keys.
    """
    wait = datetime.timedelta(seconds=timeout)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=wait))
    alike = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alike else "any"
    dist.init_process_group(backend, store=dist.PrefixStore(f"attempt {attempt}", store), rank=rank,
                            world_size=world_size, timeout=wait)


def fail(message: str) -> None:
    """Exit with status 2 and `message`: once, from process 0, where all processes fail alike.

    torchrun ends with a report of its own. It shows what is in the file that TORCHELASTIC_ERROR_FILE
    names, so the sentence of a process that fails alone is not lost.
    """
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if int(os.environ.get("RANK", 0)) == 0 or not report:
        print(f"train.py: error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(1)       # torchrun ends all when it sees one end: where 0 fails too, it is first
    if report:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(report, "w") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
    raise SystemExit(2)


@contextlib.contextmanager
def heartbeat(seconds: float, timeout: float):
    """Yields a function to call after every step; without a call for `seconds`, it is said."""
    last, over = [time.monotonic(), 0], threading.Event()

    def beat(step: int) -> None:
        last[:] = time.monotonic(), step

    def watch():
        said = time.monotonic()
        while not over.wait(min(1.0, seconds)):
            now = time.monotonic()
            if now - max(last[0], said) >= seconds:
                said = now
                print(f"process {hd_pissa.process_index()}: {now - last[0]:.0f} s since step {last[1]} ended; "
                      f"a collective gives up after --timeout {timeout:g} s", file=sys.stderr,
                      flush=True)

    thread = threading.Thread(target=watch, daemon=True)
    if seconds:
        thread.start()
    try:
        yield beat
    finally:
        over.set()


@contextlib.contextmanager
def signals_kept():
    """Yields the list of SIGTERM and SIGINT that arrive in the block, instead of being ended by them."""
    caught, before = [], {}
    if threading.current_thread() is threading.main_thread():       # Python allows it there alone
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
