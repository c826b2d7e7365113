"""A cable that carries a step's exchange on a clock of its own: what the order of calls hides, and no more.

Two machines on one computer share its cores, so a time that is measured between them holds their work too.
Here one process believes that it is process 0 of two alike. Its layers spend time on the clock and not on the
CPU; what it sends has arrived when the cable has carried it, and `wait` moves the clock on to that moment.

    exact(hd_pissa_extra.attach, layers=16, rate=1e9)   # {"work": s, "exchange": s, "step": s}
"""

import contextlib
import math
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn as nn

import hd_pissa

COLLECTIVES = ("all_reduce", "all_gather_single", "all_gather_into_tensor", "reduce_scatter_single",
               "reduce_scatter_tensor")  # fmt: skip
WIDTH, RANK = 1024, 64
# Seconds of a layer's forward, backward and fold. Backward and fold are near the time that the layer's
# gradients and increments are on their way at 1 Gbit/s, 4.2 ms, where they have most to gain from each other.
AWAY = 0.003, 0.008, 0.0045


class Clock:
    def __init__(self):
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Sent:
    """The handle of a collective."""

    def __init__(self, clock: Clock, arrives: float):
        self.clock, self.arrives = clock, arrives

    def wait(self) -> None:
        self.clock.now = max(self.clock.now, self.arrives)


class Link:
    """Collectives between two processes that send the same, over a cable of `rate` bits a second each way."""

    def __init__(self, clock: Clock, rate: float = math.inf):
        self.clock, self.rate, self.free, self.received = clock, rate, 0.0, 0

    def make(self, name: str, real):
        """In place of torch.distributed's `name`: the other process has the same numbers."""
        def call(out, own=None, async_op=False, **_):
            if own is None:
                out.mul_(2)
            elif len(out) > len(own):
                out.view(2, *own.shape).copy_(own)
            else:
                torch.mul(own[:len(out)], 2, out=out)
            came = out.nbytes if own is None else min(out.nbytes, own.nbytes)
            self.received += came
            self.free = max(self.free, self.clock.now) + 8 * came / self.rate
            sent = Sent(self.clock, self.free)
            return sent if async_op else sent.wait()
        return call


@contextlib.contextmanager
def instead(make):
    """torch.distributed's collectives replaced by make(name, the real one)."""
    with contextlib.ExitStack() as stack:
        for name in (name for name in COLLECTIVES if hasattr(dist, name)):
            stack.enter_context(mock.patch.object(dist, name, make(name, getattr(dist, name))))
        yield


@contextlib.contextmanager
def two_alike(link: Link):
    """This process as number 0 of two that have and do the same."""
    told = dict(is_initialized=lambda: True, get_world_size=lambda: 2, get_rank=lambda: 0,
                all_gather_object=lambda out, own: None,
                broadcast=lambda tensor, src: src and tensor.fill_(0.01))   # factors that the other has made
    with contextlib.ExitStack() as stack:
        for name, call in told.items():
            stack.enter_context(mock.patch.object(dist, name, call))
        stack.enter_context(instead(link.make))
        yield


class Away(torch.autograd.Function):
    """The time of a layer's forward and backward, without its work."""

    @staticmethod
    def forward(ctx, x, sleep):
        ctx.sleep = sleep
        sleep(AWAY[0])
        return x.clone()

    @staticmethod
    def backward(ctx, dY):
        ctx.sleep(AWAY[1])
        return dY.clone(), None


class Layer(nn.Linear):
    """Square, without bias; with `sleep` it also takes the time of its passes."""

    def __init__(self, sleep=None):
        super().__init__(WIDTH, WIDTH, bias=False)
        if sleep is not None:
            self.register_forward_hook(lambda module, inputs, y: Away.apply(y, sleep))


def training(attach, layers: int, rank: int, tokens: int, sleep=None, **options):
    """The adapters of a model of square layers, one shard a process, K = 2; and a step of it."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(sleep) for _ in range(layers)))
    adapters = attach(model, rank, **options)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-6, weight_decay=0.0)
    x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(hd_pissa.process_index()))

    def step():
        model(x).square().mean().backward()
        optimizer.step()
        adapters.merge_()
        optimizer.zero_grad()

    return adapters, step


def exact(attach, layers: int, rate: float, **options) -> dict:
    """Seconds on the clock of a step at `rate` bits a second, of its work and of its exchange alone."""
    clock = Clock()
    link = Link(clock)
    with two_alike(link), mock.patch.object(hd_pissa, "fold_", lambda *_: clock.sleep(AWAY[2])):
        adapters, step = training(attach, layers, RANK, 1, clock.sleep, init="lora", **options)
        step()                          # the first merge compares the models
        began = clock.now
        step()
        work, link.rate, link.received, began = clock.now - began, rate, 0, clock.now
        step()
        adapters.detach_()
    return {"work": work, "exchange": 8 * link.received / rate, "step": clock.now - began}
