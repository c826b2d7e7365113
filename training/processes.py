"""The processes of a run: how they are joined, who speaks, how an error ends them, who waits."""

import atexit
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
import torch.distributed.nn.functional  # noqa: F401  before a group exists: see leave_processes

import hd_pissa
import hd_pissa_extra


class Patient:
    """A stream that cannot end a run: what a terminal cannot show is escaped; once its pipe is closed or its
    disk full, or where there is none, nothing more is shown."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        return self.tried(self.stream.write, text) or len(text)

    def flush(self) -> None:
        self.tried(self.stream.flush)

    def tried(self, act, *args):
        try:
            return act(*args)
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):      # what is in its buffer goes there at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def patient_streams():
    """Standard output and error as `Patient` in the block. A closed descriptor is opened, or the next file
    would have its number, and get what libraries print."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)          # the lowest free number
    with contextlib.redirect_stdout(Patient(sys.stdout)), contextlib.redirect_stderr(Patient(sys.stderr)):
        yield


def say(text: str) -> None:
    """Print on process 0 alone."""
    if hd_pissa.process_index() == 0:
        print(text, flush=True)


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
    global _store, _patience
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=wait))
    except dist.DistError as e:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ValueError(f"the processes cannot meet at {where} ({' '.join(str(e).split())[:200]}); another "
                         "run may use that port: give torchrun --standalone, or another --master_port, "
                         "and on every machine the same") from e
    alike = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alike else "any"
    dist.init_process_group(backend, store=dist.PrefixStore(f"attempt {attempt}", store), rank=rank,
                            world_size=world_size, timeout=wait)
    _store, _patience = dist.PrefixStore(f"life {attempt}", store), timeout
    if backend == "gloo":           # NCCL might wait for processes that have failed
        atexit.register(leave_processes)


def leave_processes() -> None:
    """End gloo's threads while Python still runs.

    Such a thread takes Python's lock to let go of a collective's tensor. If Python ends meanwhile, it ends
    the thread inside C++, and the process aborts ("terminate called without an active exception"). Nothing
    may hold the group beyond this: torch.distributed.nn.functional has it as default argument, forever, if
    its first import, which making an optimizer brings about, comes when there is a group. Under
    --shard_weights a cache of DTensor's has it too, and gloo's threads stay.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU. A GPU's is filled behind its work: wait for something later before you read it."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def check_machine(args, device: torch.device) -> None:
    """ValueError, on every process, where a run here would not be what its flags say."""
    hd_pissa.everywhere(lambda: args.dtype == "tf32" and check_tf32(device))
    # Every process adds products of its own to a W of its own.
    copies = args.method == "hd_pissa" and args.exchange != "all_reduce" and not args.shard_weights
    said = hd_pissa_extra.unlike_machines(device)
    if said and copies:
        raise ValueError(f"{said}. Use equal machines and versions, or --exchange all_reduce, which sends "
                         "the sums, or --shard_weights, which keeps one W")


def check_tf32(device: torch.device) -> None:
    """ValueError where a float32 product cannot be done in TF32."""
    name, has = "a CPU", (0, 0)
    if device.type == "cuda":
        name, has = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        name += f" of compute capability {has[0]}.{has[1]}"
    if has < (8, 0):
        raise ValueError(f"--dtype tf32: {name} has no TF32, GPUs of 8.0 and later have; use --dtype "
                         "float32 here")


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
                print(f"process {hd_pissa.process_index()}: {now - last[0]:.0f} s since step {last[1]} "
                      f"ended; a collective gives up after --timeout {timeout:g} s", file=sys.stderr,
                      flush=True)

    thread = threading.Thread(target=watch, daemon=True)
    if seconds:
        thread.start()
    try:
        yield beat
    finally:
        over.set()
        if seconds:
            thread.join()       # a thread that outlives the interpreter may abort the process as it ends


class Stopped(BaseException):
    """A signal has ended the run: its number, and where, in words. No `except Exception` holds it."""

    def __init__(self, number: int, where: str):
        super().__init__(number, where)
        self.number, self.where = number, where


class Lost(BaseException):
    """Another process shows no sign of life: no collective can agree on that."""


@contextlib.contextmanager
def handling(handler):
    """SIGTERM and SIGINT go to handler(number) in the block; Python allows it in the main thread alone."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, lambda number, frame: handler(number))
    try:
        yield
    finally:
        for number, one in before.items():
            signal.signal(number, one)


def stoppable():
    """A context in which a signal ends the run at once, with a sentence."""
    def stop(number):
        raise Stopped(number, "outside of training; nothing saved is lost, and the same command goes on "
                      "from the last checkpoint, or begins anew")

    return handling(stop)


@contextlib.contextmanager
def signals_kept():
    """Yields the list of signals that arrive in the block, where a step is finished and saved first."""
    caught = []

    def keep(number):
        if not caught and hd_pissa.process_index() == 0:     # not by print: it may be in the middle of one
            os.write(2, b"\nstopping after this step or the next, or the evaluation under way, and a save\n")
        caught.append(number)

    with handling(keep):
        yield caught


# ---- Waiting for each other ------------------------------------------------------------------------

BEAT = 1.0                      # seconds between signs of life
_store, _patience, _met = None, 600.0, 0        # of join_processes; blocks that were left together


@contextlib.contextmanager
def together():
    """Leave the block together: whoever is first waits as long as the others live.

    A collective waits --timeout seconds. One process may need longer than that to write a model or to
    run generated programs, so it gives a sign of life meanwhile, by a thread, through torchrun's store.
    """
    global _met
    if _store is None or hd_pissa.world_size() == 1:
        yield
        return
    _met, met = _met + 1, _met
    rank, over = hd_pissa.process_index(), threading.Event()
    others = [r for r in range(hd_pissa.world_size()) if r != rank]

    def beat():
        count = 0
        while not over.is_set():
            _store.set(f"beat {met} {rank}", str(count))
            count += 1
            over.wait(BEAT)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _store.set(f"done {met} {rank}", "1")
        last = {r: ("", time.monotonic()) for r in others}
        while others := [r for r in others if not _store.check([f"done {met} {r}"])]:
            for r in others:
                key = f"beat {met} {r}"
                seen = _store.get(key).decode() if _store.check([key]) else ""
                if seen != last[r][0]:
                    last[r] = seen, time.monotonic()
                elif time.monotonic() - last[r][1] > _patience:
                    raise Lost(f"process {r} has shown no sign of life for --timeout {_patience:g} s; "
                               "end it, the same command continues from the last checkpoint")
            time.sleep(0.01)


def everywhere(work):
    """work() on every process, however long one needs; an error on one is raised on all of them."""
    kept = []

    def and_wait():
        with together():
            kept.append(work())

    hd_pissa.everywhere(and_wait)
    return kept[0]
