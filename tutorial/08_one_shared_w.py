"""Chapter 8: two processes share one W; each folds its own rows, and the bits are those of two copies."""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
from lesson import check, save_figure
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parameters_to_vector

import hd_pissa_extra

K, R, STEPS, SIZES = 4, 3, 5, (40, 56, 31)      # 31 rows do not divide by two


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(*SIZES[:2]), nn.Tanh(), nn.Linear(*SIZES[1:]))


# %% The same training, of copies and of one shared W
def train(model, adapters):
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.0)
    for X in torch.randn((STEPS, K, 16, SIZES[0]), generator=torch.Generator().manual_seed(1)):
        for s in range(adapters.S):
            with adapters.shard(s):
                model(X[adapters.first + s]).square().mean().backward()
        optimizer.step()
        adapters.merge_()
        optimizer.zero_grad()


def device(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    copies, shared = build(), build()
    train(copies, hd_pissa_extra.attach(copies, R, shards=K))

    adapters = hd_pissa_extra.attach(shared, R, shards=K)       # decomposes whole weights, so it comes first
    fully_shard(shared, mesh=init_device_mesh("cpu", (2,)))     # W is frozen, and no adapter is in sight
    train(shared, adapters)
    shared.reshard()                                            # drops what the last forward has gathered
    rows = [len(layer.weight.to_local()) for layer in (shared[0], shared[2])]
    whole = parameters_to_vector([p.full_tensor() for p in shared.parameters()])    # for the check alone
    torch.save((rows, parameters_to_vector(copies.parameters()).detach(), whole.detach()), f"{folder}/{rank}")


# %% fold: Rows by hand, figure, start of the processes, checks
def rows_by_hand():
    """Q[:, rows]^T P^T on each of 3 devices, and sum_i dU_i; both (n, m), as nn.Linear stores W."""
    g = torch.Generator().manual_seed(2)
    A, dA = torch.randn((2, K, 10, R), generator=g, dtype=torch.float64)
    B, dB = torch.randn((2, K, R, 7), generator=g, dtype=torch.float64)
    P, Q = torch.cat((*dA, *A), dim=1), torch.cat((*(B + dB), *dB))     # (m, 2Kr), (2Kr, n)
    parts = [Q[:, rows].T @ P.T for rows in torch.arange(7).chunk(3)]   # 3, 3 and 1 rows
    return torch.cat(parts), ((A + dA) @ (B + dB) - A @ B).sum(0).T


def draw(axes):
    parts = torch.stack(list(memory.values()), dim=1)
    for name, part, end in zip(("W", "A_i, B_i", "increments, gradients, AdamW"), parts, parts.cumsum(0)):
        axes.barh(list(memory), part, left=end - part, label=name)
    axes.invert_yaxis()
    axes.set(xlabel="GB on each of 8 devices, float32, without activations: LLaMA-2-7B, K = 8, r = 16")
    axes.legend()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(device, (folder,), nprocs=2)
        ranks = [torch.load(f"{folder}/{rank}") for rank in range(2)]
    W, one = 32 * 4096 * (4 * 4096 + 3 * 11008), 16 * 32 * (4 * 8192 + 3 * 15104)     # m n, r (m + n)
    numbers = (W, 8 * one, 4 * one), (W / 8, 8 * one, 4 * one), (W / 8, one, 4 * one)
    memory = dict(zip(("a copy each", "one shared W", "A_i, B_i resent"), torch.tensor(numbers) * 4e-9))
    print("GB a device      W, A_i and B_i, increments to AdamW")
    print(*(f"{name:15} {a:5.2f}, {b:.2f}, {c:.2f}" for name, (a, b, c) in memory.items()), sep="\n")
    save_figure(__file__, draw, size=(7.0, 2.4))
    for rank, (rows, copy, whole) in enumerate(ranks):
        check(f"process {rank}, with {rows} of {list(SIZES[1:])} rows: W against its copy", whole, copy)
    check("rows of the fold by hand", *rows_by_hand(), rtol=1e-12)
