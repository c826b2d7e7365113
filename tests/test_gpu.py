"""What only a GPU can show, marked gpu; and the command that measures there, rehearsed on the CPU.

    pytest -m gpu tests/test_gpu.py             # where torch sees a GPU
"""

import datetime
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import toy
from conftest import ROOT

import hd_pissa
import hd_pissa_extra

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))


# How far the CPU's weights may be, as a share of what training changed. The CPU has no TF32, and other sums.
KINDS = {"float32": 1e-4, "float64": 1e-9, "tf32": 1e-2, "autocast": 0.1}


def on(device, kind="float32", **options):
    """Weights after five steps of the toy problem, computed as `kind` says, and its adapters."""
    weights, bias, data = toy.problem(torch.float64 if kind == "float64" else torch.float32)
    products = hd_pissa_extra.float32_products("tf32" if kind == "tf32" else "ieee")
    with torch.device(device), products, torch.autocast(device, torch.bfloat16, enabled=kind == "autocast"):
        data = [[(x.to(device), y.to(device)) for x, y in batch] for batch in data]
        return toy.run([W.to(device) for W in weights], bias.to(device), data, **options)


class OneOfSeveral(int):
    """1 process that goes the way of several: its collectives are really called."""

    def __eq__(self, other):
        return other != 1 and int(self) == other

    def __gt__(self, other):
        return other == 1 or int(self) > other

    __hash__ = int.__hash__


def joined_equals_alone(device, backend, options, tmp_path, monkeypatch) -> set[str]:
    """A run with every collective through `backend` against one without; names of those that were called."""
    alone, called = on(device, **options)[0], set()
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/met", rank=0, world_size=1,
                            timeout=datetime.timedelta(seconds=60))
    for owner in (hd_pissa, hd_pissa_extra):
        monkeypatch.setattr(owner, "world_size", lambda: OneOfSeveral(1))
    for name in ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single",
                 "reduce_scatter_tensor", "all_reduce", "broadcast", "all_gather_object"):
        if real := getattr(dist, name, None):
            monkeypatch.setattr(dist, name, lambda *a, real=real, name=name, **k: (
                called.add(name.replace("_single", "").replace("_into_tensor", "").replace("_tensor", "")),
                real(*a, **k))[1])
    try:
        joined = on(device, **options)[0]
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(a, b) for a, b in zip(alone, joined))
    return called


@pytest.mark.parametrize("options, collectives", [
    ({}, {"all_gather"}), (dict(exchange="all_reduce"), {"all_reduce"}),
    (dict(gradients="global"), {"reduce_scatter"}), (dict(kind="autocast"), {"all_gather"}),
    (dict(gradients="global", send="backward", init="random"), {"reduce_scatter"})])  # fmt: skip
def test_gloo_with_one_process_is_really_asked(options, collectives, tmp_path, monkeypatch):
    """What the test of NCCL below does, where there is no GPU: so that it tests what it says."""
    called = joined_equals_alone("cpu", "gloo", options, tmp_path, monkeypatch)
    assert called >= collectives | {"all_gather", "all_gather_object"}
    assert "broadcast" in called or "init" in options       # a seed's basis is sent by nobody


@pytest.mark.parametrize("options", [{}, dict(exchange="all_reduce"), dict(gradients="global"),
                                     dict(gradients="global", send="backward"), dict(init="random"),
                                     dict(clip=0.1), dict(basis="resend", bucket_mb=0),
                                     dict(kind="float64"), dict(kind="tf32"), dict(kind="autocast")])
class TestOnAGpu:
    pytestmark = pytest.mark.gpu

    def test_weights_are_the_cpus_within_rounding(self, options):
        here, there = on("cpu", **options)[0], on("cuda", **options)[0]
        for W, a, b in zip(toy.problem()[0], here, there):
            assert torch.dist(b.cpu(), a) < KINDS[options.get("kind", "float32")] * torch.dist(W.to(a), a)

    def test_two_runs_have_equal_bits(self, options):
        assert all(torch.equal(a, b) for a, b in zip(on("cuda", **options)[0], on("cuda", **options)[0]))

    def test_nccl_with_one_process_changes_no_bit(self, options, tmp_path, monkeypatch):
        joined_equals_alone("cuda", "nccl", options, tmp_path, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ["exact", "stochastic"])
def test_bfloat16_takes_the_whole_update(rounding):
    """W's change in float32 is dW: for halves to their rounding, at random on average."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False, device="cuda"))
    adapters = hd_pissa_extra.attach(model, 4, shards=2, dtype=torch.bfloat16, rounding=rounding)
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-3, weight_decay=0.0)
    for s in range(2):
        with adapters.shard(s):
            model(torch.randn(8, 256, device="cuda", dtype=torch.bfloat16)).square().sum().backward()
    optimizer.step()
    adapters.merge_()
    assert abs(float(adapters.applied) - 1) < (1e-2 if rounding == "exact" else 0.5)


def test_where_triton_does_not_work_halves_are_folded_in_more_passes(monkeypatch):
    """Said to be there it is asked, and fails: for lack of itself, of a GPU, or of a C compiler."""
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", None)
    hd_pissa_extra.kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Triton does not work here.*more passes over W; is there a C"):
            assert hd_pissa_extra.kernels() == {}
    finally:
        hd_pissa_extra.kernels.cache_clear()


INTERPRETED = """
import torch, torch.utils._triton, hd_pissa_extra
from unittest import mock
torch.utils._triton.has_triton = lambda: True
g = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(shape, generator=g) * 10.0 ** torch.randint(-44, 30, shape, generator=g)
plain = {name: getattr(hd_pissa_extra, name) for name in ("add_to_halves_", "add_rounded_", "pieces")}
zeros = torch.zeros
with mock.patch.object(torch, "zeros", lambda *a, device=None: zeros(*a)):
    made = hd_pissa_extra.kernels()
assert made.keys() == plain.keys()
for shape in ((1, 1), (37, 45), (64, 64)):
    W, dU = draw(*shape), draw(*shape)
    for share in (1.0, 0.125, 1 / 3):
        halves = [[t.clone() for t in hd_pissa_extra.split(W)] for _ in range(2)]
        plain["add_to_halves_"](*halves[0], dU, share)
        made["add_to_halves_"](*halves[1], dU, share)
        assert all(map(torch.equal, *halves)), (shape, share)
        assert W.numel() == 1 or not torch.equal(halves[0][1], hd_pissa_extra.split(W)[1])
        for seed, start in ((0, 0), (1, 16), (2**62 + 12345, 2**31 - 7)):
            rounded = [W.bfloat16() for _ in range(2)]
            plain["add_rounded_"](rounded[0], dU, share, seed, start)
            made["add_rounded_"](rounded[1], dU, share, seed, start)
            assert torch.equal(*rounded), (shape, share, seed)
    both = torch.stack((W, dU))
    for order in ((0, 0, 1), (0, 1, 0)):
        for x in (both, both[1:], both.mT):
            assert torch.equal(plain["pieces"](x, order), made["pieces"](x, order)), (shape, order)
"""


def test_tritons_kernels_have_the_bits_of_plain_torch():
    """By Triton's interpreter, which needs no GPU; numbers of many sizes, so that each bit matters."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "TRITON_INTERPRET": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1), (37, 45), (4096, 1111)])
def test_tritons_kernels_have_the_bits_of_plain_torch_on_a_gpu(shape, monkeypatch):
    W, dU = (torch.randn(shape, device="cuda") * 10.0 ** torch.randint(-44, 30, shape, device="cuda")
             for _ in range(2))
    halves = [[t.clone() for t in hd_pissa_extra.split(W)] for _ in range(2)]
    both = torch.stack((W, dU))
    cut = hd_pissa_extra.pieces(both, (0, 1, 0))
    assert hd_pissa_extra.kernels()
    rounded = [W.bfloat16() for _ in range(2)]
    hd_pissa_extra.add_to_halves_(*halves[0], dU, 1 / 3)
    hd_pissa_extra.add_rounded_(rounded[0], dU, 1 / 3, 2**62 + 12345, 7)
    monkeypatch.setattr(hd_pissa_extra, "kernels", dict)
    hd_pissa_extra.add_to_halves_(*halves[1], dU, 1 / 3)
    hd_pissa_extra.add_rounded_(rounded[1], dU, 1 / 3, 2**62 + 12345, 7)
    assert torch.equal(*rounded) and all(map(torch.equal, *halves))
    assert torch.equal(cut, hd_pissa_extra.pieces(both, (0, 1, 0)))


@pytest.mark.gpu
def test_tf32_is_what_is_simulated():
    """tests/tf32.py against the hardware; attach under it has the bits of attach without."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TF32")
    torch.manual_seed(0)
    A, B = torch.randn(512, 512, device="cuda"), torch.randn(512, 512, device="cuda")
    off, bases = {}, []
    for precision in ("ieee", "tf32"):
        with hd_pissa_extra.float32_products(precision):
            off[precision] = float((A.double() @ B.double() - A @ B).norm() / (A @ B).norm())
            model = torch.nn.Sequential(torch.nn.Linear(512, 300, bias=False, device="cuda"))
            model[0].weight.data = B[:300].clone()
            bases.append(hd_pissa_extra.attach(model, 4, shards=8).basis)
    assert off["ieee"] < 1e-5 < 1e-4 < off["tf32"] < 1e-3
    assert torch.equal(*bases)


def waits(steps: int, dtype) -> int:
    """How often the host waits for the GPU in so many steps of `train`, after two that warm up."""
    import train
    torch.manual_seed(0)
    model = train.GPT(60, block_size=32, layers=2, width=64).cuda()
    adapters = hd_pissa_extra.attach(model, 2, shards=2, dtype=dtype)
    rows = [(list(range(1 + i, 20 + i)), 4) for i in range(8)]
    records = hd_pissa.train(model, adapters, [rows] * (steps + 2), lr=1e-3, max_steps=steps + 2,
                             device="cuda", micro_batch_size=2, max_grad_norm=1.0, progress=False)
    next(records), next(records)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert len(list(records)) == steps
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines = [str(w.message) + f" {w.filename}:{w.lineno}" for w in said if "synchronizing" in str(w.message)]
    print(*lines, sep="\n")
    return len(lines)


@pytest.mark.gpu
def test_a_step_of_the_loop_waits_once_for_the_gpu():
    """As the rehearsal counts; two runs, so that what the loop's end waits for does not count."""
    assert waits(4, None) - waits(2, None) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_fsdp2_on_nccl_changes_no_bit(dtype, tmp_path):
    """One process that shards its weights with itself, against the plain model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def weights(sharded):
        g = torch.Generator("cuda").manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(48, 48, device="cuda") for _ in range(3)))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1, generator=g)
        adapters = hd_pissa_extra.attach(model, 2, shards=4, dtype=dtype)
        model.to(dtype)
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cuda", (1,)))
        optimizer = torch.optim.AdamW(adapters.parameters(), 1e-3, weight_decay=0.0)
        for _ in range(3):
            for s in range(4):
                with adapters.shard(s):
                    x = torch.randn(8, 48, device="cuda", generator=g, dtype=dtype)
                    model(x).square().sum().backward()
            optimizer.step()
            adapters.merge_()
            optimizer.zero_grad()
        return [slot.read()[0].clone() for slot in adapters.slots]

    plain = weights(False)
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/met", rank=0, world_size=1,
                            timeout=datetime.timedelta(seconds=60))
    try:
        assert all(torch.equal(a, b) for a, b in zip(plain, weights(True), strict=True))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_the_command_runs_all_stages_at_toy_size(tmp_path):
    """Every stage leaves rows, none failed; a stage that cannot run says why and the others go on."""
    import gpu as command
    rows = command.main(["--rehearse", "--json", str(tmp_path / "gpu.json"), "--minutes", "30"])
    assert json.loads((tmp_path / "gpu.json").read_text()) == json.loads(json.dumps(rows))
    names = {name for *_, name in command.STAGES.values()}
    assert set(rows) == {"about", *names} and set(rows["about"]["stages"]) == names
    failed = [row for name in names for row in rows[name] if "failed" in row]
    assert not [row for row in failed if "is not installed" not in row["failed"]], failed


def test_what_is_late_or_fails_says_so_and_the_next_begins(tmp_path, monkeypatch):
    import gpu as command

    def broken(results, toy):
        results.add("one", fine=1)
        assert not results.measure("one", lambda: {"there": 1 / 0}, row=2)
        assert results.measure("one", lambda: {"there": 1}, row=3)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(command, "STAGES", {"broken": (broken, 1, "one")})
    path = tmp_path / "a.json"
    command.stage("broken", command.Results(path, time.time() + 60), None)
    assert json.loads(path.read_text())["one"] == [
        {"fine": 1}, {"row": 2, "failed": "ZeroDivisionError: division by zero"}, {"row": 3, "there": 1},
        {"failed": "broken: RuntimeError: out of memory"}]  # fmt: skip
    command.stage("broken", command.Results(path), None)             # a process of its own, too late
    assert "not reached" in json.loads(path.read_text())["one"][-1]["failed"]


def test_a_stage_that_hangs_or_dies_is_ended():
    import gpu as command
    run = [sys.executable, "-c"]
    assert command.apart([*run, "pass"], 60) == ""
    assert command.apart([*run, "import os; os.abort()"], 60) == "exit status -6"
    started = time.monotonic()
    assert "still at work" in command.apart([*run, "import time; time.sleep(60)"], 0.5)
    assert time.monotonic() - started < 30


def test_all_stages_end_in_eight_minutes_and_rows_keep_their_commit(tmp_path, monkeypatch):
    """The last stage may take 10 s more than its time, and torch's import comes before the first."""
    import gpu as command
    given = []
    monkeypatch.setattr(command, "STAGES", {"a": (None, 30, "a"), "b": (None, 10, "b")})
    monkeypatch.setattr(command, "apart", lambda line, seconds: given.append((line, seconds)) or "it hung")
    flags, started = ["--rehearse", "--json", str(tmp_path / "a.json")], time.time()
    command.main([*flags, "--commit", "old"])
    ends = [float(line[line.index("--until") + 1]) - started for line, _ in given]
    assert ends == pytest.approx([345, 460], abs=5) and given[-1][1] == pytest.approx(470, abs=5)
    rows = command.main([*flags, "--commit", "new", "--stages", "b"])
    assert {name: of["commit"] for name, of in rows["about"]["stages"].items()} == {"a": "old", "b": "new"}
    assert rows["a"] == [{"failed": "a: it hung"}] and rows["about"]["stages"]["a"]["seconds"] < 5


def test_tables_say_which_commit_and_why_something_is_missing():
    import tables
    row = dict(dtype="tf32", tokens=8)
    result = {"about": {"device": "a GPU", "torch": "3", "stages": {
                  "step": {"commit": "abc", "date": "2030-01-01", "seconds": 7}}},
              "step": [row | dict(variant="lora", seconds=0.5, peak=1024.0),
                       row | dict(variant="lora", dtype="float32", seconds=0.5, peak=1024.0),
                       row | dict(variant="full", failed="OutOfMemoryError: no\nroom"),
                       row | dict(variant="hd_pissa stochastic", dtype="bfloat16", seconds=0.5, peak=1024.0),
                       {"failed": "step: the time was over"}],
              "fold": [{"failed": "fold: it hung"}]}  # fmt: skip
    head, *_, last = (text := tables.gpu_step(result, "step")).splitlines()
    assert head == "a GPU, torch 3, commit abc, 2030-01-01, 7 s in all"
    assert last == "Ended early: step: the time was over."
    assert "| full | OutOfMemoryError: no room | not measured | not measured |" in text
    assert "| hd_pissa stochastic | bfloat16 only | bfloat16 only | 0.500 s, 1.0 GiB |" in text
    assert tables.gpu(result, "fold") == "a GPU, torch 3, commit unknown\n\nNot measured: fold: it hung."
    assert tables.gpu(result, "attach").startswith("Not measured: no GPU has run this stage")
