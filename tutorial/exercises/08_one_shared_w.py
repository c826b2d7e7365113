"""Checks of chapter 8's exercises: python tutorial/exercises/08_one_shared_w.py my_answers.py"""

import torch
import torch.nn as nn
from grade import main

import hd_pissa


def cut(n, P):
    """[(first row, end)] of each of P processes, from torch.chunk, which FSDP2 uses."""
    parts = [(int(rows[0]), int(rows[-1]) + 1) for rows in torch.arange(n).chunk(P)]
    return parts + [(n, n)] * (P - len(parts))


def check_1(answer):
    """Oracle: torch.chunk."""
    for n, P in ((8, 2), (31, 2), (10, 4), (5, 4), (3, 4)):
        got = [answer(n, P, p) for p in range(P)]
        assert got == cut(n, P), f"{n} rows on {P} processes lie as {cut(n, P)}, not {got}"


def check_2(answer):
    """Oracle: sum_i dU_i / K densely on the whole W, then cut."""
    g = torch.Generator().manual_seed(0)
    K, m, n, r = 4, 6, 11, 2
    A, dA = torch.randn((2, K, m, r), generator=g, dtype=torch.float64)
    B, dB = torch.randn((2, K, r, n), generator=g, dtype=torch.float64)
    W = torch.randn((n, m), generator=g, dtype=torch.float64)           # as nn.Linear stores it
    P, Q = torch.cat((*dA, *A), dim=1), torch.cat((*(B + dB), *dB))
    wanted = W + ((A + dA) @ (B + dB) - A @ B).mean(0).T
    for a, b in cut(n, 3):
        got = answer(W[a:b].clone(), a, b, P, Q, K)
        assert got.shape == (b - a, m), f"rows {a} to {b - 1} of W^T are {(b - a, m)}, not {tuple(got.shape)}"
        error = float((got - wanted[a:b]).abs().max())
        assert error < 1e-12, f"rows {a} to {b - 1} differ from those of the whole W by up to {error:.1e}"


def check_3(answer):
    """Oracle: tensors counted in a run; a process of P is a run with its K / P shards."""
    for m, n, r, K, P in ((12, 16, 2, 4, 2), (20, 10, 1, 8, 4), (9, 9, 3, 3, 1)):
        counts = []
        for shards in (K, K // P):
            layer = nn.Linear(m, n, bias=False, dtype=torch.float64)
            adapters = hd_pissa.attach(layer, r, shards=shards)
            optimizer = torch.optim.AdamW(adapters.parameters(), weight_decay=0.0)
            for s in range(shards):
                with adapters.shard(s):
                    layer(torch.ones(1, m, dtype=torch.float64)).sum().backward()
            optimizer.step()
            basis = sum(t.numel() for t in adapters.state_dict().values() if isinstance(t, torch.Tensor))
            leaves = [t for p in adapters.parameters() for t in (p, p.grad)]
            moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
            counts.append((basis, sum(t.numel() for t in leaves + moments)))
        wanted = len(torch.arange(n).chunk(P)[0]) * m, counts[0][0], counts[1][1]
        got = answer(m, n, r, K, P)
        assert got == wanted, (f"m = {m}, n = {n}, r = {r}, K = {K}, P = {P}: process 0 holds {wanted} "
                               f"numbers of W, of A_i and B_i, and of training state, not {got}")


if __name__ == "__main__":
    main(globals())
