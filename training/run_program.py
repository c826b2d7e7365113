"""Run program.py of the current folder with limits, and end all that it has started.

    python -I run_program.py SECONDS       standard input: a secret

Prints the secret if the program comes to its own end without an error: to leave early by exit() is not
enough. For training/answers.py, which starts this in a session of its own. The standard library alone.
"""

import contextlib
import ctypes
import os
import resource
import runpy
import signal
import sys
import time

NEW_USER, NEW_PROCESSES, NEW_NETWORK, ADOPT_ORPHANS = 0x10000000, 0x20000000, 0x40000000, 36
MIB = 1 << 20


def isolate() -> None:
    """As far as this system lets us: no network, and no process that outlives the first one's end."""
    with contextlib.suppress(OSError, AttributeError):
        system = ctypes.CDLL(None)
        system.prctl(ADOPT_ORPHANS, 1, 0, 0, 0)         # those that leave the session come to us
        for what in (NEW_USER, NEW_PROCESSES, NEW_NETWORK):     # one may be forbidden, and the next allowed
            system.unshare(what)


def limit(seconds: float) -> None:
    own = 0                             # processes of this user, which count too
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        with contextlib.suppress(OSError):
            own += name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid()
    limits = dict(AS=2048 * MIB, CPU=1 + int(seconds), FSIZE=MIB, CORE=0, NOFILE=64, NPROC=own + 64)
    for name, most in limits.items():
        with contextlib.suppress(ValueError, OSError, AttributeError):  # a system without that limit
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))


def run(answer: int, seconds: float, secret: bytes) -> None:
    """In the child: the program, and the secret behind its end."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    limit(seconds)
    runpy.run_path("program.py", run_name="__main__")
    os.write(answer, secret)


def children() -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{name}/stat") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                    found.append(int(name))
    return found


def end_all(deadline: float) -> None:
    """Kill children until there is none; orphans become ours."""
    with contextlib.suppress(ChildProcessError, OSError):
        while time.monotonic() < deadline:
            for pid in children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.01)


def main() -> None:
    seconds, secret = float(sys.argv[1]), sys.stdin.buffer.read(64)
    isolate()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        status = 1
        try:
            run(write, seconds, secret)
            status = 0
        finally:
            os._exit(status)            # not to come back here by the program's exception
    os.close(write)
    deadline, ended = time.monotonic() + seconds, 0
    while not ended and time.monotonic() < deadline:
        time.sleep(0.005)
        ended, _ = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
    end_all(time.monotonic() + 5)
    os.set_blocking(read, False)
    with contextlib.suppress(BlockingIOError):
        os.write(1, os.read(read, 64) if ended else b"")


if __name__ == "__main__":
    main()
