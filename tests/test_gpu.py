"""What only a GPU can show, marked gpu; and the command that measures there, rehearsed on the CPU.

    pytest -m gpu tests/test_gpu.py             # where torch sees a GPU
"""

import datetime
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import toy

import hd_pissa_extra

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")]


def on(device, **options):
    """Weights after five steps of the toy problem in float32, and its adapters."""
    weights, bias, data = toy.problem(torch.float32)
    with torch.device(device):
        data = [[(x.to(device), y.to(device)) for x, y in batch] for batch in data]
        return toy.run([W.to(device) for W in weights], bias.to(device), data, **options)


@pytest.mark.parametrize("options", [{}, dict(exchange="all_reduce"), dict(gradients="global"),
                                     dict(init="random"), dict(clip=0.1)])
class TestOnAGpu:
    pytestmark = gpu

    def test_weights_are_the_cpus_within_rounding(self, options):
        here, there = on("cpu", **options)[0], on("cuda", **options)[0]
        for a, b in zip(here, there):
            torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-6)

    def test_two_runs_have_equal_bits(self, options):
        assert all(torch.equal(a, b) for a, b in zip(on("cuda", **options)[0], on("cuda", **options)[0]))

    def test_nccl_with_one_process_changes_no_bit(self, options, tmp_path):
        alone = on("cuda", **options)[0]
        dist.init_process_group("nccl", init_method=f"file://{tmp_path}/met", rank=0, world_size=1,
                                timeout=datetime.timedelta(seconds=60))
        try:
            joined = on("cuda", **options)[0]
        finally:
            dist.destroy_process_group()
        assert all(torch.equal(a, b) for a, b in zip(alone, joined))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
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


@pytest.mark.slow
def test_the_command_runs_all_stages_at_toy_size(tmp_path):
    """Every stage leaves rows, none failed; a stage that cannot run says why and the others go on."""
    import gpu as command
    rows = command.main(["--rehearse", "--json", str(tmp_path / "gpu.json"), "--minutes", "30"])
    assert json.loads((tmp_path / "gpu.json").read_text()) == json.loads(json.dumps(rows))
    assert set(rows) == {"about", *command.STAGES}
    failed = [row for stage in command.STAGES for row in rows[stage] if "failed" in row]
    assert not [row for row in failed if "is not installed" not in row["failed"]], failed


def test_what_is_late_or_fails_says_so_and_the_next_stage_begins(tmp_path, monkeypatch):
    import gpu as command

    def broken(results, toy):
        results.add("one", fine=1)
        raise RuntimeError("out of memory")

    def fine(results, toy):
        results.add("two", fine=2)

    monkeypatch.setattr(command, "STAGES", {"one": broken, "two": fine})
    flags = ["--rehearse", "--json", str(tmp_path / "a.json"), "--stages", "one,two"]
    rows = command.main(flags)
    assert rows["one"] == [{"fine": 1}, {"failed": "RuntimeError: out of memory"}]
    assert rows["two"] == [{"fine": 2}]
    rows = command.main([*flags, "--minutes", "0"])
    assert "not reached" in rows["one"][0]["failed"] and "not reached" in rows["two"][0]["failed"]
