"""Several processes against one: equal weights, replicas bit for bit, refusals alike on every rank."""

import itertools
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn as nn
import toy
import twin
from link import Clock, Link, two_alike
from spawned import received_bytes, spawn

import hd_pissa
import hd_pissa_extra
import train
from data.rows import read_rows
from training import baselines
from training.processes import check_machine, everywhere

CONFIGS = [
    dict(exchange=e, aggregate=a) for e, a in itertools.product(("all_gather", "all_reduce"), ("mean", "sum"))
] + [dict(exchange="all_gather", basis="resend", bucket_mb=0)]


def numpy(tensors):
    """Plain lists: tensors sent through a queue would live in files of a process that has ended."""
    return [t.tolist() for t in tensors]


def problem32(shards):
    weights, bias, data = toy.problem(shards=shards)
    return [W.float() for W in weights], bias.float(), [[(x.float(), y.float()) for x, y in b] for b in data]


def toy_runs(shards):
    """Every configuration in one spawn, since a spawn costs seconds; clipping gathers too."""
    return [
        numpy(toy.run(*problem32(shards), clip=0.3, decompose=hd_pissa.components, **config)[0])
        for config in CONFIGS
    ]


@pytest.mark.parametrize("world, shards", [(2, 2), (2, 4), (4, 4)])
def test_weights_do_not_depend_on_processes(world, shards, tmp_path):
    """K shards on 2 and 4 processes: replicas are equal bit for bit, with all_gather the one process too."""
    alone = toy_runs(shards)
    ranks = spawn(world, toy_runs, tmp_path, shards)
    assert all(rank == ranks[0] for rank in ranks[1:])
    assert ranks[0][-1] == ranks[0][0]  # A_i, B_i sent again, in buckets of one layer
    for config, one, many in zip(CONFIGS, alone, ranks[0]):
        if config["exchange"] == "all_gather":
            assert one == many, config
        for a, b in zip(one, many):  # all_reduce sums in another order
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-5, atol=1e-6)
        assert one != numpy(problem32(shards)[0])


def double_run():
    return numpy(toy.run(*toy.problem(), aggregate="mean", exchange="all_gather")[0])


def test_four_processes_equal_the_twin(tmp_path):
    """Float64, the dense simulation of four devices against four real processes."""
    expected = twin.run(*toy.problem(), toy.K, toy.R, 1e-2)
    for rank in spawn(4, double_run, tmp_path):
        for a, b in zip(rank, expected):
            torch.testing.assert_close(torch.tensor(a, dtype=torch.float64), b, rtol=1e-9, atol=1e-10)


def loop(method="hd_pissa"):
    """Three steps of the shipped loop on the small GPT; (losses, weights of one layer)."""
    torch.manual_seed(0)
    model = train.GPT(60, block_size=16, layers=1, width=32)
    g = torch.Generator().manual_seed(1)
    rows = [
        (torch.randint(0, 60, (int(n),), generator=g).tolist(), 2)
        for n in torch.randint(5, 14, (8,), generator=g)
    ]
    if method == "hd_pissa":
        adapters = hd_pissa.attach(model, 2, shards=4)
    else:
        adapters = baselines.Baseline(model, method, 2, 4, "all-linear", None, 0)
    log = list(
        hd_pissa.train(
            model,
            adapters,
            [rows] * 3,
            lr=1e-2,
            max_steps=3,
            micro_batch_size=2,
            max_grad_norm=0.7,
            progress=False,
        )
    )
    adapters.detach_()
    return [r["loss"] for r in log] + [r["grad_norm"] for r in log], numpy([model.blocks[0].c_fc.weight])


def loops():
    return [loop(method) for method in ("hd_pissa", "lora", "pissa", "full")]


def test_loop_does_not_depend_on_processes(tmp_path):
    """HD-PiSSA bit for bit; baselines average gradients in another order, hence 1e-5."""
    alone = loops()
    for rank in spawn(2, loops, tmp_path):
        assert rank[0] == alone[0]
        for (a, weights_a), (b, weights_b) in zip(rank[1:], alone[1:]):
            assert a == pytest.approx(b, rel=1e-5)
            torch.testing.assert_close(
                torch.tensor(weights_a[0]), torch.tensor(weights_b[0]), rtol=1e-4, atol=1e-5
            )


def told():
    def own():
        if hd_pissa.process_index() == 2:
            raise OSError("no \u0394A here")
        return "fine"

    texts = hd_pissa.everywhere(lambda: "\u0394A " * hd_pissa.process_index()), hd_pissa.everywhere(str)
    return *texts, everywhere(lambda: hd_pissa.process_index()), message_of(lambda: hd_pissa.everywhere(own))


def test_everywhere(tmp_path):
    """Texts of different lengths, beyond ASCII and empty, own results, and one process's error on all."""
    texts = ["", "\u0394A ", "\u0394A \u0394A "], ["", "", ""]
    assert spawn(3, told, tmp_path) == [(*texts, i, "no \u0394A here") for i in range(3)]


def message_of(work):
    try:
        work()
    except ValueError as e:
        return str(e)
    return None


def refusals():
    """[(message, W untouched)] on this rank for faults that rank 1 alone has, or has found."""
    second, out = hd_pissa.process_index() == 1, []
    weights, bias, data = problem32(2)

    def nan_weight():
        model = toy.module(weights, bias)
        if not second:          # process 0's model is sent to the others; process 1 decomposes this layer
            model[2].weight.data[0, 0] = float("nan")
        hd_pissa.attach(model, 2)

    def too_large_rank():
        hd_pissa.attach(toy.module(weights, bias), 99 if second else 2)

    out += [(message_of(work), True) for work in (nan_weight, too_large_rank)]
    for fault in ("no gradient", "nan increment"):
        model = toy.module(weights, bias)
        adapters = hd_pissa.attach(model, 2)
        x, y = data[0][hd_pissa.process_index()]
        if not (second and fault == "no gradient"):
            (model(x) - y).square().mean().backward()
        torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.0).step()
        if second and fault == "nan increment":
            adapters.parameters()[0].data[0, 0] = float("nan")
        out.append((message_of(adapters.merge_), bool(torch.equal(model[0].weight.T, weights[0]))))
    out.append((message_of(lambda: everywhere(lambda: read_rows("missing.jsonl") if second else None)), True))
    out.append((message_of(lambda: hd_pissa.attach(toy.module(weights, bias), 2, shards=3)), True))
    other = dict(alpha=2.0 if second else 4.0)
    out.append((message_of(lambda: hd_pissa.attach(toy.module(weights, bias), 2, **other)), True))

    model = train.GPT(60, block_size=16, layers=1, width=32)
    adapters = hd_pissa.attach(model, 2)
    if second:
        model.ln_f.weight.data.fill_(float("nan"))
    rows = [([1, 2, 3, 4], 1)] * 4
    steps = hd_pissa.train(model, adapters, [rows], lr=1e-2, max_steps=1, progress=False)
    before = model.blocks[0].c_fc.weight.clone()
    out.append((message_of(lambda: next(steps)), bool(torch.equal(before, model.blocks[0].c_fc.weight))))
    return out


def test_a_fault_on_rank_1_stops_both_with_one_message(tmp_path):
    """NaN weight, rank, no gradient, NaN increment, missing file, K, another alpha, NaN loss; none hangs."""
    ranks = spawn(2, refusals, tmp_path)
    assert ranks[0] == ranks[1]
    words = [
        "2.weight holds NaN",
        "no layer to adapt, of 0 (fewer than K r = 198 components)",
        "shards [1] of 2 got no gradient",
        "shards [1] hold NaN",
        "missing.jsonl: no such data file",
        "shards=3 is not a multiple of the 2 processes",
        "process 0 attaches ('alpha', 4.0), others [('alpha', 2.0)]",
        "not finite: loss of shards [1]",
    ]
    for (message, untouched), expected in zip(ranks[0], words, strict=True):
        assert message is not None and expected in message and untouched


def received():
    """Bytes that reach this process in one merge_, counted at torch.distributed, per exchange."""
    weights, bias, data = problem32(8)
    counts = {}
    for name, options in {
        "cached": {},
        "resend": {"basis": "resend"},
        "dense": {"exchange": "all_reduce"},
    }.items():
        model = toy.module(weights, bias)
        adapters = toy.attach(model, 1, shards=8, **options)
        for i in range(adapters.S):
            with adapters.shard(i):
                model(data[0][0][0]).square().mean().backward()
        adapters.increments.fill_(1e-3)
        counts[name] = received_bytes(adapters.merge_)
    return counts


def test_bytes_received(tmp_path):
    """K r (m + n) increments cached, twice that resent, 2 m n dense; and what the check of a merge sends.

    That is 8 x 4 float64 (8 x 11 where hd_pissa_extra asks for more). Texts and checksums travel as objects.
    """
    (a, b, c), (agreed, more) = toy.SIZES, (8 * n * 8 // 2 for n in (4, 11))
    factors, dense = 8 * (a + b + b + c) * 4 // 2, (a * b + b * c) * 4
    for counts in spawn(2, received, tmp_path):
        assert counts == {"cached": factors + agreed, "resend": 2 * factors + more, "dense": dense + agreed}


CRASH = """
import sys, torch, torch.distributed as dist
sys.path[:0] = sys.argv[1:]
import hd_pissa, toy
dist.init_process_group("gloo")
weights, bias, data = toy.problem(shards=2)
model = toy.module(weights, bias)
adapters = hd_pissa.attach(model, 2)
(model(data[0][0][0]) ** 2).mean().backward()
if hd_pissa.process_index() == 1:
    raise RuntimeError("no such luck")
adapters.merge_()
"""


def test_a_process_that_fails_takes_the_job_down(tmp_path):
    """A failure between collectives that nobody agreed on: torchrun ends within a minute, naming it."""
    (tmp_path / "crash.py").write_text(CRASH)
    root = Path(__file__).resolve().parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    start = time.monotonic()
    done = subprocess.run(
        [*command, tmp_path / "crash.py", root.parent, root], capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and "no such luck" in done.stderr and time.monotonic() - start < 60


ALIKE = dict(name="GPU 40GB", major=8, minor=0, multi_processor_count=108)
OTHERS = {      # what process 1 has; is that refused?
    "none": ({}, {}, False), "more memory": (dict(name="GPU 80GB"), {}, False),
    "more processors": (dict(multi_processor_count=114), {}, True), "newer": (dict(major=9), {}, True),
    "sums are sent": (dict(major=9), dict(exchange="all_reduce"), False),
    "one W": (dict(major=9), dict(shard_weights=True), False),
    "a baseline": (dict(major=9), dict(method="lora"), False),
}  # fmt: skip


def machines():
    said, rank = [], hd_pissa.process_index()
    flags = dict(method="hd_pissa", exchange="auto", shard_weights=False, dtype="tf32")

    def told(other, device):
        try:
            check_machine(SimpleNamespace(**flags | other), torch.device(device))
        except ValueError as e:
            return str(e)

    for planted, other, _ in OTHERS.values():
        gpu = SimpleNamespace(**ALIKE | (planted if rank else {}))
        with (mock.patch("torch.cuda.get_device_properties", lambda _, gpu=gpu: gpu),
              mock.patch("torch.cuda.get_device_name", lambda _, gpu=gpu: gpu.name),
              mock.patch("torch.cuda.get_device_capability", lambda _, gpu=gpu: (gpu.major, gpu.minor))):
            said.append(told(other, "cuda:0"))
    with mock.patch.object(torch, "__version__", f"2.{6 + rank}.0"):
        said.append(told(dict(dtype="float32"), "cpu"))
        for exchange in ("auto", "all_reduce"):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model = nn.Sequential(nn.Linear(8, 8))
                adapters = hd_pissa_extra.attach(model, 2, exchange=exchange)
                model(torch.ones(1, 8)).sum().backward()
                adapters.increments.fill_(1e-3)
                adapters.merge_()
                adapters.detach_()
            said.append([str(w.message) for w in caught if "round differently" in str(w.message)])
    return said


def test_text_travels_by_the_models_gpu(monkeypatch):
    """NCCL sends it by the current GPU, which is number 0 on every process unless somebody says otherwise."""
    class Set(Exception):
        pass

    def set_device(device):
        raise Set(device)

    model = nn.Linear(8, 8)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(model, "parameters", lambda: iter([SimpleNamespace(is_cuda=True, device="cuda:1")]))
    for attach in (hd_pissa.attach, hd_pissa_extra.attach):
        with two_alike(Link(Clock())), pytest.raises(Set, match="cuda:1"):
            attach(model, 2)


def test_unlike_machines_are_told_before_they_drift_apart(tmp_path):
    """Copies of W that are added to by other kernels differ in their last bits: at step 100 it would look as
    if a bit had flipped."""
    first, second = spawn(2, machines, tmp_path)
    assert first[:-2] == second[:-2]
    *gpus, versions, (warned,), sums = first            # in one's own loop, by process 0
    assert "torch 2.7.0" in warned and 'exchange="all_reduce"' in warned
    assert [sums, *second[-2:]] == [[], [], []]
    for (name, (_, _, refused)), said in zip(OTHERS.items(), gpus, strict=True):
        assert bool(said) == refused, (name, said)
    assert "GPU 40GB, compute capability 9.0" in gpus[3] and "--exchange all_reduce" in gpus[3]
    assert "torch 2.6.0" in versions and "torch 2.7.0" in versions
