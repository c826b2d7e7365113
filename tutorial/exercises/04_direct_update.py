"""Checks of chapter 4's exercises: python tutorial/exercises/04_direct_update.py my_answers.py"""

import torch
from grade import main

import hd_pissa

M, N, R, K = 10, 8, 2, 3


def draw(*shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def check_1(answer):
    """Oracle: the product of the factors, and the signs of their columns and rows."""
    A, B = draw((M, R), (R, N))
    for signs in ((1.0, -1.0), (-1.0, -1.0), (1.0, 1.0)):
        D = torch.tensor(signs, dtype=torch.float64)
        got = answer(A.clone(), B.clone(), D)
        assert isinstance(got, tuple) and len(got) == 2, "return the pair of turned factors"
        assert got[0].shape == A.shape and got[1].shape == B.shape, "the factors keep their shapes"
        assert float((got[0] @ got[1] - A @ B).abs().max()) < 1e-12, "the slice A B has changed"
        for k, sign in enumerate(signs):
            turned = torch.equal(got[0][:, k], sign * A[:, k]) and torch.equal(got[1][k], sign * B[k])
            assert turned, f"for D = {signs}, component {k} must be multiplied by {sign:+.0f} in both factors"


def check_2(answer):
    """Oracle: sum_i (A_i + dA_i)(B_i + dB_i) - A_i B_i."""
    A, B, dA, dB = (draw(*[shape] * K, seed=seed) for seed, shape in enumerate([(M, R), (R, N)] * 2))
    P, Q = answer(A, B, dA, dB)
    assert P.shape == (M, 2 * K * R) and Q.shape == (2 * K * R, N), "P is (m, 2Kr) and Q is (2Kr, n)"
    expected = sum((a + da) @ (b + db) - a @ b for a, b, da, db in zip(A, B, dA, dB))
    error = float((P @ Q - expected).abs().max())
    assert error < 1e-12, f"P Q is off by {error:.1e} from the sum of all dU_i"


def moved(aggregate, lr):
    """What two steps of hd_pissa add to a weight."""
    (W,), data = draw((M, N)), [draw(*[(6, M), (6, N)] * K, seed=seed) for seed in (1, 2)]
    layer = torch.nn.Linear(M, N, bias=False, dtype=torch.float64)
    layer.weight.data = W.T.clone()
    adapters = hd_pissa.attach(torch.nn.Sequential(layer), rank=R, shards=K, aggregate=aggregate)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=lr, weight_decay=0.0)
    for batch in data:
        for i in range(K):
            with adapters.shard(i):
                (layer(batch[2 * i]) - batch[2 * i + 1]).square().mean().backward()
        optimizer.step()
        adapters.merge_()
        optimizer.zero_grad()
    return layer.weight.detach().T - W


def check_3(answer):
    """Oracle: hd_pissa, run with both."""
    for has, wants in (("mean", "sum"), ("sum", "mean"), ("mean", "mean")):
        lr = answer(1e-6, K, has, wants)
        assert isinstance(lr, float) and lr > 0, f"return a learning rate above 0, not {lr!r}"
        before, after = moved(has, 1e-6), moved(wants, lr)
        ratio = float((before * after).sum() / before.square().sum())
        assert abs(ratio - 1) < 1e-3, f"from {has} to {wants} with K = {K}: W moves {ratio:.2f} times as far"


if __name__ == "__main__":
    main(globals())
