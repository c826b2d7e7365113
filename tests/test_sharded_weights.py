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


# ---- Other layouts than one mesh of all processes that cuts dim 0 ------------------------------------------


def laid_out(mesh, sizes, **options):
    """Full weights after four steps of every shard on its own rows, W cut over `mesh`; rows held here."""
    model = build(sizes)
    adapters = hd_pissa_extra.attach(model, 1, shards=4, **options)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    steps(model, adapters, sizes)
    weights = adapters_weights(adapters)
    rows = [(p.to_local() if mesh is not None else p).shape[0] for p in weights]
    return [(p.full_tensor() if mesh is not None else p).tolist() for p in weights], rows


def cut_otherwise():
    """The refusal of a weight whose columns are cut, and whether W is as it was."""
    from torch.distributed.tensor import Shard
    model = build(SIZES["even"])
    adapters = hd_pissa_extra.attach(model, 1, shards=4)
    mesh = init_device_mesh("cpu", (4,))
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 else None)
    before = [p.to_local().clone() for p in adapters_weights(adapters)]
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.0)
    model(torch.ones(6, 32)).square().mean().backward()
    optimizer.step()
    try:
        adapters.merge_()
    except ValueError as e:
        kept = [torch.equal(a, p.to_local()) for a, p in zip(before, adapters_weights(adapters))]
        return str(e), all(kept)


def layouts():
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    out = []
    for options in ({}, {"exchange": "all_reduce"}):
        out.append([laid_out(mesh, SIZES["odd"], **options) for mesh in (None, hybrid, hybrid["shard"])])
    return out, cut_otherwise()


def test_hybrid_sharding_and_a_part_of_the_processes_are_right_and_cut_columns_refused(tmp_path):
    """HSDP (2 x 2), and two pairs that hold W each: the replicated weights, bit for bit by all_gather.

    A weight whose columns are cut is refused by every process before anything is added.
    """
    ranks = spawn(4, layouts, tmp_path)
    for case in range(2):
        replicated = ranks[0][0][case][0][0]
        for results, _ in ranks:
            for full, rows in results[case][1:]:
                assert all(n <= -(-len(W) // 2) for n, W in zip(rows, replicated)), "W is not cut"
                if case == 0:
                    assert full == replicated
                for a, b in zip(full, replicated):
                    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-5, atol=1e-6)
    assert len({said for _, (said, _) in ranks}) == 1 and all(kept for _, (_, kept) in ranks)
    said = ranks[0][1][0]
    assert all(part in said for part in ("0.weight cannot be merged", "only dim 0 may be cut",
                                         "shard_placement_fn"))  # fmt: skip


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
