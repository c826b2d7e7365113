"""FSDP2: every process folds into its own rows of W, and the gathered weights are the replicated run's."""

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from spawned import spawn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hd_pissa
import hd_pissa_extra

SIZES = {"even": (32, 48, 16), "odd": (33, 47, 15), "fewer rows than processes": (33, 3, 17)}


def build(sizes):
    m, h, n = sizes
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(nn.Linear(m, m), nn.Tanh(), Conv1D(h, m), nn.Tanh(), nn.Linear(h, n, bias=False))
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5, generator=g)
    return model


def steps(model, adapters, sizes, count=4):
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.0)
    g = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn((4, 6, sizes[0]), generator=g)
        for i in range(adapters.S):
            with adapters.shard(i):
                model(x[adapters.first + i]).square().mean().backward()
        optimizer.step()
        adapters.merge_()
        optimizer.zero_grad()
        with torch.no_grad():
            model(x[0])  # gathers the root's weights and leaves them gathered


def run(sizes, sharded, dtype=None, **options):
    model = build(sizes)
    init = "top" if min(sizes) < 4 else "hd_pissa"  # K r <= min(m, n) leaves no row-less process else
    adapters = hd_pissa_extra.attach(model, 1, shards=4, dtype=dtype, init=init, **options)
    if dtype is not None:
        model.to(dtype)
        model.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(dtype),))
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        if sharded == "nested":
            fully_shard(model[2], mesh=mesh)
        fully_shard(model, mesh=mesh)
    steps(model, adapters, sizes)
    rows = [(p.to_local() if sharded else p).shape[0] for p in adapters_weights(adapters)]
    full = [(p.full_tensor() if sharded else p).tolist() for p in adapters_weights(adapters)]
    low = adapters.slots[0].low
    if low is not None and sharded:
        assert low.shape == adapters.slots[0].module.weight.to_local().shape
    return full, rows


def adapters_weights(adapters):
    hd_pissa_extra.reshard(adapters.model)
    return [slot.module.weight for slot in adapters.slots]


CONFIGS = [
    {},
    {"basis": "resend"},
    {"exchange": "all_reduce"},
    {"gradients": "global"},
    {"dtype": torch.bfloat16},
]


def compare():
    out = []
    for sizes in SIZES.values():
        for options in CONFIGS:
            out.append(
                (run(sizes, None, **options), run(sizes, "root", **options), run(sizes, "nested", **options))
            )
    return out


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_run_equals_replicated_run_bit_for_bit(world, tmp_path):
    """Linear and Conv1D, even and odd sizes, every exchange, whole-batch gradients, bfloat16 halves."""
    ranks = spawn(world, compare, tmp_path)
    cases = [(name, options) for name in SIZES for options in CONFIGS]
    for case, *results in zip(cases, *ranks, strict=True):
        replicated = results[0][0][0]
        for (full, _), (root, _), (nested, _) in results:
            assert full == replicated, case
            if "exchange" in case[1]:  # dense sums in another order
                for a, b in zip(root, replicated):
                    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-5, atol=1e-6)
            else:
                assert root == replicated, case
            assert nested == root, case
        for layer in range(3):  # W is cut, and nothing of it is held twice
            assert sum(r[1][1][layer] for r in results) == len(replicated[layer])


def attach_late():
    model = build(SIZES["even"])
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    try:
        hd_pissa.attach(model, 1, shards=2)
    except ValueError as e:
        return str(e)


def test_attach_after_sharding_is_refused(tmp_path):
    messages = spawn(2, attach_late, tmp_path)
    assert messages[0] == messages[1] and "DTensor" in messages[0] and "FSDP2 after it" in messages[0]
