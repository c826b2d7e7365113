"""Two hosts on one machine: network namespaces joined by a cable that can be throttled and cut.

A namespace has its own interfaces and ports, so processes of the two hosts reach each other over the cable
alone, as on two machines. The file system is shared, and so are the cores.
"""

import contextlib
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time

ADDRESSES = "10.77.0.1", "10.77.0.2"
CABLE = "cable0"  # on both hosts; loopback stays lo
PORT = 29500  # free on both, since nothing else runs in a new namespace
counter = itertools.count()


def ip(*arguments, tool: str = "ip") -> str:
    """Output of an `ip` command; OSError with the tool's own words if it fails."""
    done = subprocess.run([tool, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{tool} {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


class Hosts:
    """Hosts 0 and 1, at ADDRESSES; made by `two_hosts`."""

    def __init__(self):
        number = next(counter)
        self.names = [f"hosts-{os.getpid()}-{number}-{i}" for i in range(2)]
        self.started = []

    def build(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        # Both ends are born in their namespaces, the machine's own never sees them.
        ip("-n", self.names[0], "link", "add", CABLE, "type", "veth",
           "peer", "name", CABLE, "netns", self.names[1])  # fmt: skip
        for name, address in zip(self.names, ADDRESSES):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            for interface in ("lo", CABLE):
                ip("-n", name, "link", "set", interface, "up")

    def throttle(self, rate: float | None) -> None:
        """`rate` Mbit/s in each direction, frames with their headers; None for no limit."""
        for name in self.names:
            if rate is None:
                with contextlib.suppress(OSError):  # there was none
                    ip("-n", name, "qdisc", "del", "dev", CABLE, "root", tool="tc")
                continue
            # What passes at once after a pause: 1 ms worth, so that small messages pay for their bytes too.
            burst = max(16_000, int(rate * 125))
            ip("-n", name, "qdisc", "replace", "dev", CABLE, "root", "tbf", "rate", f"{rate}mbit",
               "burst", str(burst), "latency", "50ms", tool="tc")  # fmt: skip

    def cut(self) -> None:
        """No frame passes any more, and nobody is told: the connections stay open and silent."""
        ip("-n", self.names[0], "link", "set", CABLE, "down")

    def start(self, host: int, command, env=None, **options) -> subprocess.Popen:
        """`command` on a host; the libraries of torch.distributed are told which interface is the cable."""
        interface = {"GLOO_SOCKET_IFNAME": CABLE, "TP_SOCKET_IFNAME": CABLE}
        self.started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *map(str, command)],
                env={**(os.environ if env is None else env), **interface},
                start_new_session=True,
                **options,
            )
        )
        return self.started[-1]

    def torchrun(self, host: int, command, **options) -> subprocess.Popen:
        """`command` by torchrun, one process on each of the two hosts."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        torchrun += [f"--node_rank={host}", f"--master_addr={ADDRESSES[0]}", f"--master_port={PORT}"]
        return self.start(host, [*torchrun, *command], **options)

    def alive(self, host: int) -> list[int]:
        """Ids of all processes on a host, whoever started them."""
        return [int(pid) for pid in ip("netns", "pids", self.names[host]).split()]

    def remove(self) -> None:
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        # torchrun gives its workers sessions of their own, hence by namespace too.
        for host, name in enumerate(self.names):
            with contextlib.suppress(OSError):
                while pids := self.alive(host):
                    for pid in pids:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    time.sleep(0.05)
                ip("netns", "del", name)
        for process in self.started:
            process.wait()


@contextlib.contextmanager
def two_hosts():
    """Hosts, joined and up; their processes are killed and the namespaces removed at the end."""
    hosts = Hosts()
    try:
        hosts.build()
        yield hosts
    finally:
        hosts.remove()


@functools.cache
def unavailable() -> str:
    """Why there can be no two hosts here, "" if there can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid():
        return "network namespaces need root"
    for tool in ("ip", "tc"):
        if not shutil.which(tool):
            return f"no `{tool}` here (package iproute2)"
    try:
        with two_hosts():
            return ""
    except OSError as e:
        return f"no network namespaces here: {e}"
