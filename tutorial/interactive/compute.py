"""Numbers of the interactive figures: one real update of a small weight by hd_pissa, in float64.

    python tutorial/interactive/compute.py      prints the ranks that the figures show

The layer is Y = X W with squared error. W (m, n) has singular values that fall like those of a trained
weight; the target is another weight, so the gradient has full rank and rank is lost by the methods alone.
"""

import sys
from pathlib import Path

import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import hd_pissa  # noqa: E402

M, N, ROWS, LR = 96, 64, 840, 1e-3      # 840 rows: whole mini-batches for K = 1 .. 8
DEVICES, RANKS = range(1, 9), range(1, 9)
STEP = dict(m=24, n=20, K=4, r=2, rows=96)
NUMERICAL_ZERO = 1e-9                   # relative to sigma_1; float64 rounding of W lies near 1e-13


def problem(m: int, n: int, rows: int):
    """W (m, n), X (rows, m) and the target X W*, float64, from one seed."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    U, V = torch.linalg.qr(draw(m, n)).Q, torch.linalg.qr(draw(n, n)).Q
    W = U * torch.arange(1, n + 1, dtype=torch.float64) ** -0.7 @ V.T
    X = draw(rows, m)
    return W, X, X @ (W + 0.05 * draw(m, n) / m ** 0.5)


def update(W, X, target, K: int, r: int, init: str = "hd_pissa"):
    """AdamW's step on K shards, shard i on the i-th part of the rows: (layer, adapters), not yet merged."""
    layer = nn.Linear(*W.shape, bias=False, dtype=torch.float64)
    layer.weight.data = W.T.clone()
    adapters = hd_pissa.attach(nn.Sequential(layer), r, shards=K, init=init)
    optimizer = torch.optim.AdamW(adapters.parameters(), LR, weight_decay=0.0)
    for i, (x, y) in enumerate(zip(X.chunk(K), target.chunk(K))):
        with adapters.shard(i):
            (layer(x) - y).square().mean().backward()
    optimizer.step()
    return layer, adapters


def spectrum(W, X, target, K: int, r: int, init: str = "hd_pissa") -> torch.Tensor:
    """Singular values of dW of one update, relative to the largest."""
    layer, adapters = update(W, X, target, K, r, init)
    adapters.merge_()
    S = hd_pissa.update_spectrum(W, layer.weight.T)
    return S / S[0]


def devices() -> dict:
    """Figure "devices": spectra for every K and r, as log10 in tenths; -160 is 1e-16 or less.

    Data-parallel LoRA and PiSSA average the gradients of equal adapters, so their update is that of one
    device on the whole batch and does not depend on K.
    """
    def tenths(S):
        return [max(-160, round(10 * v)) for v in S.clamp_min(1e-300).log10().tolist()]

    W, X, target = problem(M, N, ROWS)
    return {"m": M, "n": N, "lr": LR, "zero": NUMERICAL_ZERO, "S": tenths(torch.linalg.svdvals(W)),
            "lora": {r: tenths(spectrum(W, X, target, 1, r, "lora")) for r in RANKS},
            "pissa": {r: tenths(spectrum(W, X, target, 1, r)) for r in RANKS},
            "hd_pissa": {f"{K},{r}": tenths(spectrum(W, X, target, K, r)) for K in DEVICES for r in RANKS}}


def step() -> dict:
    """Figure "step": every matrix of one update over K devices, with its numerical rank."""
    K, r = STEP["K"], STEP["r"]
    W, X, target = problem(STEP["m"], STEP["n"], STEP["rows"])
    layer, adapters = update(W, X, target, K, r)
    state, leaves = adapters.state_dict(), dict(adapters.named_parameters())
    shown = {"W": W}
    for i in range(K):
        A, B = state[f"0.shard{i}.A"], state[f"0.shard{i}.B"]
        dA, dB = leaves[f"0.shard{i}.dA"], leaves[f"0.shard{i}.dB"]
        Pt, Q = hd_pissa.update_factors(A[None], B[None], dA.detach()[None], dB.detach()[None])
        shown |= {f"A{i}": A, f"B{i}": B, f"gA{i}": dA.grad, f"gB{i}": dB.grad,
                  f"dA{i}": dA.detach().clone(), f"dB{i}": dB.detach().clone(), f"dU{i}": Pt.T @ Q}
    before = (X @ W - target).square().mean()
    adapters.merge_()
    new = layer.weight.detach().T
    loss = [float(f"{v:.5g}") for v in (before, (X @ new - target).square().mean())]
    shown |= {"dW": new - W, "new": new}
    matrices = {name: matrix(value) for name, value in shown.items()}
    return {**STEP, "lr": LR, "loss": loss, "matrices": matrices}


def matrix(value: torch.Tensor) -> dict:
    """Shape, rank, largest entry, and the entries in percent of it."""
    largest = value.abs().max()
    return {"shape": list(value.shape), "largest": float(f"{largest:.2g}"),
            "rank": hd_pissa.effective_rank(torch.linalg.svdvals(value), NUMERICAL_ZERO),
            "percent": (100 * value / largest).round().int().tolist()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    data = devices()
    above = {name: {key: sum(v > -90 for v in S) for key, S in data[name].items()}
             for name in ("lora", "pissa", "hd_pissa")}
    print(f"devices: W ({M}, {N}), singular values of dW above {NUMERICAL_ZERO} of the largest")
    print("  r         " + "".join(f"{r:4}" for r in RANKS))
    for name in ("lora", "pissa"):
        print(f"  {name:10}" + "".join(f"{n:4}" for n in above[name].values()))
    for K in DEVICES:
        print(f"  K = {K}     " + "".join(f"{above['hd_pissa'][f'{K},{r}']:4}" for r in RANKS))
    data = step()
    print(f"step: K = {data['K']}, r = {data['r']}, loss {data['loss'][0]} -> {data['loss'][1]}")
    for name, value in data["matrices"].items():
        print(f"  {name:4} {str(tuple(value['shape'])):9} rank {value['rank']:2}, largest {value['largest']}")
