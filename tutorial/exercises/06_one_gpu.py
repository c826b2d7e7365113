"""Checks of chapter 6's exercises: python tutorial/exercises/06_one_gpu.py my_answers.py"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from grade import main

import hd_pissa


def check_1(answer):
    """Oracle: rows and shards as lists, cut into equal runs."""
    for B, K, processes in ((8, 4, 2), (12, 6, 3), (16, 8, 1), (6, 3, 3)):
        rows, shards = torch.arange(B).chunk(K), torch.arange(K).chunk(processes)
        for i in range(K):
            where = next(p for p in range(processes) if i in shards[p])
            wanted = int(rows[i][0]), int(rows[i][-1]) + 1, where, shards[where].tolist().index(i)
            got = answer(i, B, K, processes)
            assert got == wanted, (f"shard {i} of {K} on {processes} processes, {B} rows: (first row, end, "
                                   f"process, place there) are {wanted}, not {got}")


def problem():
    torch.manual_seed(0)
    inputs, labels = (torch.randn((3, 12, width), dtype=torch.float64) for width in (6, 5))
    return nn.Linear(6, 5, dtype=torch.float64), inputs, labels


def check_2(answer):
    """Oracle: K = 3 devices simulated densely; two-term Adam without its library."""
    (model, inputs, labels), K, lr = problem(), 3, 0.1
    W, bias = model.weight.detach().T.clone(), model.bias.detach().clone()
    adapters = hd_pissa.attach(model, 1, shards=K)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=lr, weight_decay=0.0)
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    basis = [((U * S.sqrt())[:, i:i + 1], (S.sqrt()[:, None] * Vt)[i:i + 1]) for i in range(K)]
    first, second = [[[0.0, 0.0] for _ in range(K)] for _ in range(2)]
    for t, (x, y) in enumerate(zip(inputs, labels), 1):
        loss, total = 0.0, torch.zeros_like(W)
        for i, (X, Y) in enumerate(zip(x.chunk(K), y.chunk(K))):
            (A, B), error = basis[i], X @ W + bias - Y
            loss += float(error.square().mean()) / K
            G = X.T @ error * 2 / error.numel()
            for j, g in enumerate((G @ B.T, A.T @ G)):
                first[i][j] = 0.9 * first[i][j] + 0.1 * g
                second[i][j] = 0.999 * second[i][j] + 0.001 * g * g
            dA, dB = (-lr * first[i][j] / (1 - 0.9**t) / ((second[i][j] / (1 - 0.999**t)).sqrt() + 1e-8)
                      for j in range(2))
            total += (A + dA) @ (B + dB) - A @ B
        got = answer(model, adapters, optimizer, x, y)
        assert isinstance(got, float) and abs(got - loss) < 1e-9, (
            f"step {t}: return the loss before the update, the mean over the shards, as a float: {loss:.4f}")
        W += total / K
        off = float((model.weight.detach().T - W).abs().max())
        assert off < 1e-9, (f"step {t}: W is off by {off:.1e}. Shard i trains on rows i B/K to (i + 1) B/K, "
                            "then come optimizer.step(), one merge_() and zero_grad()")


def wrong_rows(model, adapters, optimizer, x, y):
    """Every shard on the mini-batch of shard 0."""
    loss = 0.0
    for s in range(adapters.S):
        with adapters.shard(s):
            part = F.mse_loss(model(x[:4]), y[:4])
            part.backward()
        loss += part.item() / adapters.S
    optimizer.step()
    adapters.merge_()
    optimizer.zero_grad()
    return sum(F.mse_loss(model(a), b).item() for a, b in zip(x.chunk(3), y.chunk(3))) / 3


WRONG_2 = [wrong_rows]


def check_3(answer):
    """Oracle: all tokens of the mini-batch in one forward."""
    torch.manual_seed(1)
    model = nn.Linear(4, 3, dtype=torch.float64)
    micro_batches = [(torch.randn((2, 5, 4)).double(), torch.randint(3, (2, 5))) for _ in range(3)]
    for (_, y), cut in zip(micro_batches, (1, 4, 2)):
        y[:, cut:] = -100
    whole = copy.deepcopy(model)
    x, y = (torch.cat([part.flatten(0, 1) for part in parts]) for parts in zip(*micro_batches))
    loss = F.cross_entropy(whole(x), y, ignore_index=-100)
    loss.backward()
    wanted = loss.item()
    got = answer(model, micro_batches)
    assert model.weight.grad is not None, "call backward() for every micro-batch"
    assert torch.allclose(model.weight.grad, whole.weight.grad, rtol=1e-9), (
        "the gradients are not those of the mean over all tokens; micro-batches have 2, 8 and 4 of them")
    assert isinstance(got, float) and abs(got - wanted) < 1e-9, f"return that mean, {wanted:.4f}, as a float"


def mean_of_means(model, micro_batches):
    loss = sum(F.cross_entropy(model(x).flatten(0, 1), y.flatten()) for x, y in micro_batches)
    (loss / len(micro_batches)).backward()
    return loss.item() / len(micro_batches)


WRONG_3 = [mean_of_means]

if __name__ == "__main__":
    main(globals())
