"""Chapter 5: two processes bring their updates into one W, densely and as factors; the bytes are counted."""

import itertools
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lesson import check, received, save_figure

import hd_pissa_extra

K, N, LR, RANKS = 2, 256, 1e-3, (1, 4, 16, 64, 128)     # K processes of one shard each; W is (N, N)
WAYS = {"dense": {"exchange": "all_reduce"}, "factors": {}, "factors, resent": {"basis": "resend"}}
g = torch.Generator().manual_seed(0)
W = torch.randn((N, N), generator=g) / N**0.5
DATA = torch.randn((K, 2, 64, N), generator=g)          # X, Y of each device


def components(W, k, name="W"):
    U, S, Vt = torch.linalg.svd(W.double())
    return U[:, :k], S[:k], Vt[:k]


# %% The oracle, and what each of two processes does
def oracle(r):
    """dW of one step by the equations, in one process and float64. Adam's first step is -lr g / |g|."""
    (U, S, Vt), dW = components(W, K * r), torch.zeros((N, N), dtype=torch.float64)
    for i, (X, Y) in enumerate(DATA.double()):
        A, B = (U * S.sqrt())[:, i * r:(i + 1) * r], (S.sqrt()[:, None] * Vt)[i * r:(i + 1) * r]
        G = X.T @ (X @ W.double() - Y) * 2 / Y.numel()  # gradient of device i's loss with respect to W
        dA, dB = (-LR * g / (g.abs() + 1e-8) for g in (G @ B.T, A.T @ G))
        dW += (dA @ B + A @ dB + dA @ dB) / K
    return dW


def device(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=K)
    result = {}
    for r, way in itertools.product(RANKS, WAYS):
        model = torch.nn.Linear(N, N, bias=False)
        model.weight.data = W.T.clone()
        adapters = hd_pissa_extra.attach(model, r, decompose=components, **WAYS[way])
        (model(DATA[rank, 0]) - DATA[rank, 1]).square().mean().backward()
        torch.optim.AdamW(adapters.parameters(), lr=LR, weight_decay=0.0).step()
        result[r, way] = received(adapters.merge_), model.weight.detach().T - W
    torch.save(result, f"{folder}/{rank}.pt")


# %% fold: Figure, start of the processes, checks
def draw(axes):
    for way, line, dots in zip(WAYS, zip(*formulas), zip(*counted)):
        axes.loglog(RANKS, line, label=way)
        axes.loglog(RANKS, dots, "o", color=axes.lines[-1].get_color())
    axes.set(xlabel="r   (at the right end K r = m = n)", ylabel="bytes received, one weight, one step")
    axes.legend(title="lines: formula, dots: counted")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(device, (folder,), nprocs=K)
        first, second = (torch.load(f"{folder}/{rank}.pt") for rank in range(K))
    counted = [[first[r, way][0] for way in WAYS] for r in RANKS]
    formulas = [[2 * (K - 1) * N * N * 4 // K, *((K - 1) * r * 2 * N * b for b in (4, 8))] for r in RANKS]
    print(f"bytes received by a process in one step, {N} x {N} float32, K = {K}\n   r", *WAYS, sep="  ")
    print(*(f"{r:4}  {a:7,}  {b:7,}  {c:7,}" for r, (a, b, c) in zip(RANKS, counted)), sep="\n")
    dW, other = (torch.stack([result[key][1] for key in first]) for result in (first, second))
    check("both processes hold the same W", dW, other)
    check("dW by the equations", dW, torch.stack([oracle(r) for r, way in first]), rtol=1e-3)
    check("counted bytes", counted, formulas, atol=100)
    save_figure(__file__, draw)
