"""torch.set_default_device is the user's: attach, steps, the loop do not mind.

"meta" stands in for "cuda": a tensor that were made without a device of its own would have no values.
"""

import pytest
import torch
import toy

import hd_pissa


@pytest.fixture(autouse=True)
def an_optimizer_works_elsewhere():
    """AdamW keeps its count of steps on the default device before torch 2.13: "meta" has no count."""
    p = torch.zeros(2, requires_grad=True)
    p.grad = torch.ones(2)
    torch.set_default_device("meta")
    try:
        torch.optim.AdamW([p]).step()
    except RuntimeError as e:
        pytest.skip(f"this torch's own AdamW takes no step here: {e}")
    finally:
        torch.set_default_device(None)


@pytest.fixture
def elsewhere():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


OPTIONS = [{}, {"init": "lora"}, {"init": "random"}, {"gradients": "global"},
           {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "rounding": "stochastic"}]  # fmt: skip


def trained(options: dict, where) -> list[torch.Tensor]:
    """The weights after five steps on the CPU, while the default device is `where`."""
    weights, bias, data = toy.problem(torch.float32)
    dtype, model = options.get("dtype", torch.float32), toy.module(weights, bias)
    torch.set_default_device(where)
    try:
        adapters = toy.attach(model, toy.R, shards=toy.K, **options)
        model[0].bias.data = model[0].bias.data.to(dtype)
        optimizer = torch.optim.AdamW(adapters.parameters(), 1e-2, weight_decay=0.0)
        adapters.check(optimizer)
        for batch in data:
            for i, (x, y) in enumerate(batch):
                with adapters.shard(i):
                    (model(x.to(dtype)) - y).float().square().mean().backward()
            adapters.clip_grad_norm_(1.0)
            optimizer.step()
            adapters.merge_()
    finally:
        torch.set_default_device(None)
    return [slot.module.weight.detach().clone() for slot in adapters.slots]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_run_is_the_same_under_another_default_device(options):
    for a, b in zip(trained(options, None), trained(options, "meta"), strict=True):
        assert torch.equal(a, b) and a.device.type == "cpu"


def test_the_loop_under_another_default_device(elsewhere):
    with torch.device("cpu"):
        table = torch.nn.Embedding(16, 8)
        model = torch.nn.Sequential(table, torch.nn.Linear(8, 8), torch.nn.Linear(8, 16))
    adapters = hd_pissa.attach(model, 1, shards=2)
    rows = [(list(range(i, i + 6)), 2) for i in range(4)]
    records = list(hd_pissa.train(model, adapters, [rows] * 2, lr=1e-2, max_steps=2, progress=False))
    assert len(records) == 2 and records[1]["loss"] < records[0]["loss"]
