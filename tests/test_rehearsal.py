"""What a GPU would see of a step, rehearsed: devices, waits of the host, launches, bytes, memory.

Oracle: torch's own dispatch of every operation (rehearsal.py), and the CPU's bits. Budgets are raised
knowingly, never to make a test pass. A rehearsal runs in a process of its own: torch asks once for a CUDA.
"""

import functools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="the rehearsal compiles its CUDA: no g++ here"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA of its own"),
]
SMALL = "local,all_reduce,bfloat16,clipped"


def rehearse(*words, fails: bool = False, **environment):
    command = [sys.executable, str(ROOT / "tests" / "rehearsal.py"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode != 0) == fails, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stderr if fails else json.loads(done.stdout.splitlines()[-1])


def within_budget(told) -> None:
    """What a step may take: the host waits once, for what all processes agree about."""
    assert sum(told["waits"].values()) == 1, told["waits by line"]
    assert told["launches"]["clip"] <= 14 * told["shards"], told["by line"]
    assert told["launches"]["adamw"] <= 8 + told["layers"] / 4, told["by line"]


def beside_products(told) -> int:
    """A merge's launches but for the products and what adds them to W: some per part of W."""
    products = "fold_", "fold_rows_", "product", "add_to_halves_", "add_rounded_"
    return told["launches"]["merge"] - sum(n for line, n in told["by line"].items()
                                           if line.startswith("merge") and line.split()[-1] in products)


@functools.cache
def llama_7b() -> dict:
    """The table's first row, made anew: 32 layers, continued from 2 and 4."""
    return rehearse("row", "name=local")


def test_what_cuda_and_nccl_refuse_is_refused():
    assert rehearse("faults") == []


def test_a_step_on_a_gpu_gives_the_bits_of_the_cpu():
    for name, told in rehearse("toy", f"variants={SMALL}").items():
        # Halves are merged by tensor cores there, off by 4e-6 of dU: a high half may round otherwise.
        assert told["other"] < (0.02 if name == "bfloat16" else 1e-9), name
        within_budget(told)
        most = {"bfloat16": 92, "all_reduce": 70}.get(name, 64)
        assert told["launches"]["merge"] <= most, told["by line"]


@pytest.mark.slow
def test_halves_take_dU_to_five_digits():
    assert rehearse("halves") < 1e-5 < 1e-3 < rehearse("halves", "plant=piece")


@pytest.mark.slow
def test_so_do_the_other_variants():
    everything = rehearse("toy", "variants=global,seed,autocast,Llama")
    llama = everything.pop("Llama")     # transformers reads a number in every forward, to find packed rows
    assert sum(llama["waits"].values()) == 1 + llama["micro"] * llama["shards"], llama["waits by line"]
    for name, told in everything.items():
        # As halves: the product of tensor cores, here rounded at random.
        assert told["other"] < (0.02 if name == "seed" else 1e-9), name
        within_budget(told)


@pytest.mark.parametrize("fault, said", [
    ("cpu", "tensors of ['cpu', 'cuda:0']"), ("item", ""), pytest.param("loose", "", marks=pytest.mark.slow)])
def test_planted_faults_turn_it_red(fault, said):
    if said:
        assert said in rehearse("toy", "variants=local", f"plant={fault}", fails=True)
        return
    told = rehearse("toy", "variants=local", f"plant={fault}")["local"]
    with pytest.raises(AssertionError):
        within_budget(told)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--dtype bfloat16 --exchange all_reduce", "--method lora",
                                   "--gradients global --dropout 0.1 --max_grad_norm 1", "--dtype autocast",
                                   "--init random --dtype bfloat16 --rounding stochastic", "--method full"])
def test_a_whole_run_on_one_gpu(flags, tmp_path):
    """attach, steps, checkpoint, evaluation, result: no tensor on a wrong device."""
    rehearse("command", *few(tmp_path), *flags.split())
    assert (tmp_path / "out" / "model.pt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {}, dict(dtype="autocast"), dict(dtype="bfloat16"), dict(dtype="bfloat16", gradients="global"),
    dict(dtype="bfloat16", shard_weights=True), dict(exchange="all_reduce"),
    dict(dtype="bfloat16", gradients="global", send="backward"),
    dict(dtype="bfloat16", init="random", rounding="stochastic")],
    ids=lambda options: " ".join(map(str, options.values())) or "float32")
def test_peak_memory_is_the_dry_runs(options, monkeypatch):
    """LLaMA-2-7B's shapes, two layers, process 0 of 8: the highest allocated memory against the formula; a
    checkpoint and an evaluation stay below."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    import hardware

    from training.dry_run import needs
    dtype = options.get("dtype", "float32")
    shapes, everything, units, kept = hardware.sizes("LLaMA-2-7B", 2, dtype, rows=4, tokens=512)
    memory, own = needs(shapes, everything, units, kept, rank=16, shards=8, processes=8, gpu=True, **options)
    words = [f"{key}={value}".replace("shard_weights=True", "shard=1") for key, value in options.items()]
    told = rehearse("llama", "layers=2", "micro=4", "max_grad_norm=1", "after=1", f"dtype={dtype}",
                    *(w for w in words if "dtype" not in w))
    assert 0.95 < told["peak"] / sum(memory.values()) < 1.05, (told["peaks"], memory)
    assert max(told["peaks"]["checkpoint"], told["peaks"]["evaluation"]) < 1.05 * sum(memory.values())
    # What a process receives: 7 of 8 parts of what is gathered.
    increments = sum(n for line, n in told["sent"].items() if line == "merge")
    if "exchange" in options:
        assert increments < 1.01 * 4 * told["adapted"]
        return
    assert increments < 1.01 * own["received"] * 4 * 8 / 7
    if "init" not in options:           # a basis from a seed is made again
        assert beside_products(told) <= 2 * told["layers"] + 45, told["by line"]


@pytest.mark.slow
def test_a_step_of_7b_keeps_to_its_budget():
    """LLaMA-2-7B, K = 8 processes, 8 micro-batches: one wait of the host, at most 48,000 launches."""
    told = llama_7b()
    assert sum(told["waits"].values()) == 1, told["waits"]
    launches = sum(told["launches"].values())
    assert launches <= 48_000, told["launches"]
    table = json.loads((ROOT / "tests" / "bench" / "rehearsal.json").read_text())
    known, = (sum(row["launches"].values()) for row in table["rows"] if row["row"] == told["row"])
    assert abs(launches - known) < 0.02 * known, "run python tests/rehearsal.py table, then tables.py"


@pytest.mark.slow
def test_launches_are_linear_in_layers():
    """Which the table continues. In a merge 9 for each group of equal shapes, of which three may be small."""
    three = rehearse("llama", "layers=3")
    every = {2: llama_7b()["seen"]["2"], 3: three, 4: llama_7b()["seen"]["4"]}
    for phase in ("forward", "backward"):
        two, three, four = (told["launches"][phase] for told in every.values())
        assert 2 * three == two + four, phase
    for told in every.values():
        assert beside_products(told) <= 2 * told["layers"] + 45, told["by line"]
    two, four = every[2], every[4]
    assert beside_products(four) - beside_products(two) <= 2 * (four["layers"] - two["layers"])
    # With products and what adds them to W, 4 parts of a weight by two kernels each: 9.5 a layer.
    assert llama_7b()["launches"]["merge"] <= 10 * 7 * 32


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["item", "packed"])
def test_a_number_read_in_every_forward_of_7b_is_seen(fault):
    assert sum(rehearse("llama", "layers=2", "rows=32", f"plant={fault}")["waits"].values()) == 1 + 2


@pytest.mark.slow
def test_the_tests_that_want_a_gpu_pass_on_this_one():
    told = rehearse("tests", "-m", "gpu", "-k", "not waits_once", str(ROOT / "tests" / "test_gpu.py"))
    assert told["status"] == 0 and {line.split(": ")[-1] for line in told["calls"]} >= {
        "_allgather_base_", "_reduce_scatter_base_", "broadcast_", "allreduce_"}


@pytest.mark.slow
def test_tf32_is_for_steps_alone(tmp_path):
    """--dtype tf32 has the components and the base's loss of float32, and other weights; what a container has
    set is nothing to --dtype float32."""
    ran = {}
    for name, dtype, asked in (("exact", "float32", "0"), ("tf32", "tf32", "0"), ("asked", "float32", "1")):
        cache = tmp_path / name / "svd"
        rehearse("command", *few(tmp_path / name), "--dtype", dtype, "--svd_cache", str(cache),
                 TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=asked)
        parts = [torch.load(file, "cpu", weights_only=True) for file in sorted(cache.iterdir())]
        result = json.loads((tmp_path / name / "out" / "result.json").read_text())
        model = torch.load(tmp_path / name / "out" / "model.pt", weights_only=True)
        ran[name] = parts, result["before"], model

    def equal(a, b, what):
        return all(torch.equal(x, y) for x, y in zip(what(ran[a]), what(ran[b]), strict=True))

    def components(run):
        return [t for part in run[0] for t in part]

    def weights(run):
        return run[2].values()

    assert components(ran["exact"]) and equal("exact", "tf32", components)
    assert ran["exact"][1] == ran["tf32"][1] == ran["asked"][1]         # the base's loss
    assert equal("exact", "asked", weights) and not equal("exact", "tf32", weights)


def few(tmp_path):
    return ["--out", str(tmp_path / "out"), *("--max_steps 2 --batch_size 16 --eval_rows 16 --threads 1 "
            "--shards 2 --save_every 1 --check_every 1").split()]  # fmt: skip


@pytest.mark.slow
def test_a_run_waits_once_a_step(tmp_path):
    """With log, signals and clock of train.py; without evaluations, whose answers differ."""
    common = "--batch_size 16 --eval_rows 16 --threads 1 --shards 2".split()
    two, five = (rehearse("command", "--out", str(tmp_path / steps), "--max_steps", steps, *common)["waits"]
                 for steps in ("2", "5"))
    more = {line: n - two.get(line, 0) for line, n in five.items() if "evaluate.py" not in line}
    assert [n for n in more.values() if n] == [3], more


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--shard_weights --dtype bfloat16", "--basis resend --bucket_mb 0",
                                   "--gradients global --exchange all_reduce"])
def test_a_whole_run_on_two_gpus(flags, tmp_path):
    """Collectives as NCCL takes them: of tensors on this process's GPU, also where torch sends objects."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "tests" / "rehearsal.py"), "command", *few(tmp_path), *flags.split()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    from training.models import read_state
    there = read_state(str(tmp_path / "out" / "model.pt"))
    import train
    alone = [*few(tmp_path / "one"), *flags.replace("--shard_weights", "").split()]
    if "bfloat16" in flags:             # halves are folded otherwise on a GPU, cut or whole alike
        rehearse("command", *alone)
    else:
        train.main([*alone, "--device", "cpu"])
    here = read_state(str(tmp_path / "one" / "out" / "model.pt"))
    if "all_reduce" not in flags:       # sums of two parts, in another order
        assert all(torch.equal(here[name], there[name]) for name in here)
