"""--dry_run: its numbers against shapes counted by hand, autograd's own storage, and what it must not do."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import hd_pissa_extra
import train
from training import dry_run

SMALL = ["--rank", "2", "--shards", "4", "--batch_size", "32", "--micro_batch_size", "4", "--threads", "1",
         "--dry_run"]  # fmt: skip


def base_shapes():
    state = torch.load(ROOT / "data" / "base.pt", weights_only=True)
    adapted = [tuple(v.shape) for k, v in state.items() if k.startswith("blocks.") and v.dim() == 2]
    return adapted, sum(v.numel() for k, v in state.items() if k != "lm_head.weight")


def test_memory_and_traffic_by_hand(tmp_path, capsys):
    said = train.main([*SMALL, "--max_steps", "7", "--out", str(tmp_path / "out")])
    adapted, everything = base_shapes()
    factors = 2 * sum(m + n for m, n in adapted)  # numbers of one shard's A_i, B_i at r = 2
    memory = list(said["memory"].values())
    assert memory[0] == 4 * everything and memory[1] == 0
    assert memory[2] == 4 * 4 * factors  # 4 bytes, 4 shards
    # increments, gradients, moments
    assert memory[3:6] == [4 * 4 * factors, 4 * 4 * factors, 2 * 4 * 4 * factors]
    assert said["traffic"] == {"all_gather": 0, "all_reduce": 0}  # one process
    assert said["steps"] == 7
    assert not (tmp_path / "out").exists()
    text = capsys.readouterr().out
    assert "MiB" in text and "all_gather" in text and "7, about" in text


@pytest.mark.parametrize("flags, factor, low", [
    (["--dtype", "bfloat16"], 0.5, True),
    (["--dtype", "float64"], 2, False),
    (["--dtype", "autocast"], 1, False),
])  # fmt: skip
def test_dtypes(flags, factor, low):
    said, plain = train.main([*SMALL, *flags]), train.main(SMALL)
    a, b = list(said["memory"].values()), list(plain["memory"].values())
    assert a[0] == factor * b[0]
    assert a[1] == (2 * sum(m * n for m, n in base_shapes()[0]) if low else 0)


def test_activations_grow_with_rows_as_the_real_model_saves():
    """Twice the rows keep twice the bytes for the backward; more than the layers' own inputs alone."""
    few = train.main([*SMALL, "--micro_batch_size", "4"])
    many = train.main([*SMALL, "--micro_batch_size", "8"])
    a, b = list(few["memory"].values())[-1], list(many["memory"].values())[-1]
    assert 1.9 < b / a < 2.1


def test_too_large_a_rank_is_said_before_anything_loads(capsys):
    with pytest.raises(SystemExit):
        train.main(["--rank", "64", "--shards", "8", "--dry_run"])
    assert "K r may be 128 at most" in capsys.readouterr().err


def test_two_processes_halve_what_is_dealt(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "train.py"), *SMALL, "--shard_weights", "--exchange", "all_reduce"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    adapted, everything = base_shapes()
    factors = 2 * sum(m + n for m, n in adapted)
    for expected in (4 * everything // 2, 2 * 4 * factors, 2 * 2 * 4 * factors,
                     2 * 4 * sum(m * n for m, n in adapted) // 2):  # fmt: skip
        assert f"{expected / 2**20:12.1f} MiB" in done.stdout, (expected / 2**20, done.stdout)


def test_a_large_hugging_face_model_needs_no_weights(tmp_path):
    """The folder of a 1.1-billion-parameter Llama holds a config and a tokenizer alone."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "model")
    words = {"<unk>": 0, "</s>": 1, "word": 2} | {str(i): 3 + i for i in range(200)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(tmp_path / "model")
    rows = [{"instruction": f"word {i}", "response": "word word"} for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = train.main(["--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl"),
                       "--lr", "1", "--rank", "16", "--batch_size", "16", "--dry_run"])  # fmt: skip
    layer = [2048 * 2048, 256 * 2048, 256 * 2048, 2048 * 2048, *[5632 * 2048] * 3]
    everything = 22 * (sum(layer) + 2 * 2048) + 2 * 32000 * 2048 + 2048
    assert list(said["memory"].values())[0] == 4 * everything
    pytest.importorskip("peft")
    more = train.main(["--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl"),
                       "--lr", "1", "--rank", "16", "--batch_size", "16", "--dry_run", "--export_lora"])
    sides = 22 * (2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 5632))
    sums = sum(more["memory"].values()) - sum(said["memory"].values())
    assert sums == 8 * 4 * 16 * sides           # one more of the increments of eight shards


def test_numbers_beside_lora_are_those_of_llama_7b():
    """The table of a paper's reviewer, by hand: K = 8, r = 16, float32, GB a device."""
    shapes = 32 * ([(4096, 4096)] * 4 + [(4096, 11008)] * 3)
    factors, gb = 16 * sum(m + n for m, n in shapes), 4e-9

    def rounded(numbers):
        return [round(n * gb, 2) for n in numbers.values()]

    assert rounded(dry_run.lora(factors, 8, 8, 2)) == [1.28, 0, 0.16, 0.32, 2.24]
    assert rounded(dry_run.lora(factors, 8, 8, 3)) == [0.16, 0, 0.16, 0.32, 3.36]
    numbers = dry_run.hd_pissa_numbers
    assert rounded(numbers(factors, 8, 8)) == [1.28, 0.16, 0.16, 0.32, 1.12]
    best = numbers(factors, 8, 8, gradients="global", init="random")
    assert rounded(best) == [0, 0.16, 1.28, 0.32, 2.24]
    every = numbers(factors, 8, 8, gradients="global", init="random", send="backward")
    assert rounded(every) == [0, 0.16, 0.16, 0.32, 2.24]
    cached = numbers(factors, 8, 8, gradients="global", send="backward", micro_batches=8)
    assert rounded(cached) == [1.28, 0.16, 0.16, 0.32, 10.07]


@pytest.mark.parametrize("options", [{}, {"gradients": "global"}, {"init": "random"},
                                     {"init": "random", "gradients": "global"}, {"exchange": "all_reduce"}])
def test_numbers_are_those_that_tensors_hold(options):
    """One process: every tensor that a step leaves behind, counted."""
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Tanh(), torch.nn.Linear(40, 24))
    adapters = hd_pissa_extra.attach(model, 2, shards=4, **options)
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-3, weight_decay=0.0)
    for s in range(4):
        with adapters.shard(s):
            model(torch.ones(3, 24)).sum().backward()
    optimizer.step()
    storages = {p.grad.untyped_storage()._cdata: p.grad.untyped_storage().nbytes() // 4
                for p in adapters.parameters()}  # fmt: skip
    moments = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.dim())
    expected = dry_run.hd_pissa_numbers(2 * 2 * (24 + 40), 4, 1, **options)
    assert adapters.basis.numel() == expected["factors"]
    assert [adapters.increments.numel(), sum(storages.values()), moments] == [
        expected["increments"], expected["gradients"], expected["moments"]]


def test_units_of_fsdp2_are_blocks_and_the_rest():
    """Inner lists are units of their own, as in shard_over_processes; a tied weight counts once."""
    model = torch.nn.Module()
    model.head = torch.nn.Linear(5, 3, bias=False)
    model.blocks = torch.nn.ModuleList(torch.nn.Linear(4, n, bias=False) for n in (2, 6))
    model.blocks[1].experts = torch.nn.ModuleList([torch.nn.Linear(7, 1, bias=False)])
    model.blocks[0].tied = model.head
    assert dry_run.units(model) == (0, 24, 8 + 24 + 7 + 15)
    del model.blocks[0].tied
    assert dry_run.units(model) == (15, 24, 8 + 24 + 7)


def test_a_sharded_run_gathers_two_blocks_and_the_rest():
    shapes, common = [(10, 10)], dict(rank=1, shards=4, processes=4)
    plain, _ = dry_run.needs(shapes, 1000, (100, 50, 400), (0, 0), **common)
    cut, _ = dry_run.needs(shapes, 1000, (100, 50, 400), (0, 0), shard_weights=True, **common)
    key = "weights that FSDP2 gathers: two blocks and the rest"
    assert (plain[key], cut[key]) == (0, 4 * (100 + 2 * 50))
    assert (plain["W and all other weights"], cut["W and all other weights"]) == (4000, 1000)


@pytest.mark.slow
def test_the_table_by_hardware_is_computed(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    import hardware
    there = json.loads((ROOT / "tests" / "bench" / "hardware.json").read_text())
    assert hardware.rows() == there, "run python tests/bench/hardware.py and tables.py"
    assert {row["fits"] for row in there} == {True, False}


def test_the_formula_gives_what_a_gpu_measured(monkeypatch):
    """Peaks in gpu.json, of models whose queries share heads of keys: its steps of one shard, and its run."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    import hardware
    there = json.loads((ROOT / "tests" / "bench" / "gpu.json").read_text())
    steps = [row for row in there["step"] if row.get("variant") == "hd_pissa"]
    monkeypatch.setitem(hardware.MODELS, "step", (2048, 5632, steps[0]["layers"], 32, 8, 8192))
    for row in steps:
        options = {"dtype": row["dtype"].replace("tf32", "float32"), "shards": 1}
        computed = hardware.needed("step", options, rows=row["tokens"] // 512, tokens=512) / 2**20
        assert 0.98 < row["peak"] / computed < 1.02, row
    for row in (row for row in there["memory"] if "peak, GiB" in row and row["options"] == "(none)"):
        computed = hardware.needed(row["model"], {}) / 2**30
        assert 0.98 < row["peak, GiB"] / computed < 1.02


def kept_by(attend, dtype=torch.float32, shared=False, autocast=False, **options):
    """Bytes of all storages that one call keeps for its backward."""
    q, k, v = (torch.zeros(2, heads, 128, 16, dtype=dtype, requires_grad=True) for heads in (
        4, 2 if shared else 4, 2 if shared else 4))
    storages = []                       # alive, so that no address is given twice
    with (torch.autograd.graph.saved_tensors_hooks(lambda x: storages.append(x.untyped_storage()), print),
          torch.autocast("cpu", torch.bfloat16, enabled=autocast)):
        attend(q, k, v, enable_gqa=shared, **{"is_causal": True} | options)
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())


@pytest.mark.parametrize("case, fused", [
    (dict(), True), (dict(dtype=torch.bfloat16), True), (dict(autocast=True), True),
    (dict(is_causal=False, attn_mask=torch.ones(2, 1, 128, 128, dtype=torch.bool)), True),
    (dict(shared=True), False), (dict(dtype=torch.float64), False), (dict(shared=True, dropout_p=0.1), False),
])
def test_attention_keeps_what_torchs_own_kernels_keep(case, fused):
    """A CPU has both: forced to one or the other, their hooks are asked."""
    backend = torch.nn.attention.SDPBackend
    with torch.nn.attention.sdpa_kernel(backend.FLASH_ATTENTION if fused else backend.MATH):
        there = kept_by(torch.nn.functional.scaled_dot_product_attention, **case)
    assert kept_by(dry_run.attention_of_a_gpu, **case) == there
    assert (there < 2 * 4 * 128 * 128 * case.get("dtype", torch.float32).itemsize) == fused


@pytest.mark.parametrize("case", [dict(dtype=torch.bfloat16, shared=True), dict(autocast=True, shared=True)])
def test_in_16_bits_heads_may_share_keys(case):
    """q and the result of four heads, k and v of two, and a float32 number a row. The CPU's kernel does that
    since torch 2.7."""
    assert kept_by(dry_run.attention_of_a_gpu, **case) == 2 * 128 * (2 * (4 + 2 + 2 + 4) * 16 + 4 * 4)


def test_dropout_in_attention_is_free_on_a_gpu():
    """Its kernels draw again in the backward; a CPU keeps the pairs."""
    plain, dropped = (kept_by(dry_run.attention_of_a_gpu, dropout_p=p) for p in (0.0, 0.1))
    assert plain == dropped < kept_by(torch.nn.functional.scaled_dot_product_attention, dropout_p=0.1)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_with_shared_heads_is_counted_as_a_gpu_computes_it(autocast):
    """Queries that positions made float32: cast again under autocast, otherwise all pairs of tokens."""
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(64, 64, bias=False)

        def forward(self, x):
            x = x.float()[..., None].expand(1, T, 64)
            q = self.linear(x).view(1, T, 4, 16).transpose(1, 2).float()
            y = torch.nn.functional.scaled_dot_product_attention(
                q, q[:, :2], q[:, :2], is_causal=True, enable_gqa=True)
            return y.transpose(1, 2).flatten(2)

    T, kept = 128, {}
    for gpu in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=True):
            model, x = Attention(), torch.zeros((1, T), dtype=torch.long)
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                kept[gpu] = dry_run.saved_bytes(model, [("linear", model.linear)], x, autocast, gpu=gpu)[0]
    pairs = 4 * T * T * 4
    assert kept[True] < pairs < kept[False] if autocast else pairs < kept[True] == kept[False]


def test_memory_has_room_for_adamws_step():
    """foreach makes roots of all second moments at once: counted as they are made."""
    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **kwargs or {})
            if isinstance(made, (list, tuple)):
                self.most = max(self.most, sum(x.nbytes for x in made if isinstance(x, torch.Tensor)))
            return made

    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Tanh(), torch.nn.Linear(40, 24))
    adapters = hd_pissa_extra.attach(model, 2, shards=4)
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-3, weight_decay=0.0, foreach=True)
    for s in range(4):
        with adapters.shard(s):
            model(torch.ones(3, 24)).sum().backward()
    with Largest() as seen:
        optimizer.step()
    memory, _ = dry_run.needs([(40, 24), (24, 40)], 2000, (0, 0, 0), (0, 0), rank=2, shards=4, processes=1,
                              exchange="all_reduce")
    assert memory["the larger of activations and exchange"] == max(seen.most, 4 * 24 * 40)
    assert seen.most > 4 * 24 * 40


@pytest.mark.parametrize("gpus, processes, rank, expected", [
    (1, 1, 0, (100, "a GPU here")), (2, 2, 1, (101, "a GPU here")),
    (1, 2, 1, (100, "GPU 0 (GPUs here: 1, processes: 2)")),
    (2, 8, 1, (100, "GPU 0 (GPUs here: 2, processes: 8)")),
])
def test_a_run_on_more_gpus_is_planned_on_one(gpus, processes, rank, expected, monkeypatch):
    """What is compared with is what is there, and is said. torch asserts an index as this does."""
    def properties(index):
        assert index < gpus, "Invalid device id"
        return SimpleNamespace(total_memory=100 + index)

    for name, value in (("is_available", lambda: True), ("device_count", lambda: gpus),
                        ("get_device_properties", properties)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert dry_run.available("auto") == expected


def test_the_sentence_names_the_gpu_that_is_there(monkeypatch, capsys):
    where = "GPU 0 (GPUs here: 1, processes: 8)"
    monkeypatch.setattr(dry_run, "available", lambda device: (80 * 2**30, where))
    assert train.main(SMALL)["fits"]
    assert f"against 81920.0 MiB of {where}, of which 4096" in capsys.readouterr().out
