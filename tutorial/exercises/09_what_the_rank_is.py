"""Checks of chapter 9's exercises: python tutorial/exercises/09_what_the_rank_is.py my_answers.py"""

import torch
from grade import main


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_1(answer):
    """Oracle: matrix_rank of T updates with random increments, float64."""
    for T, K, r, m, n in ((1, 2, 3, 30, 40), (3, 2, 3, 30, 40), (4, 1, 2, 30, 20), (9, 4, 1, 30, 40)):
        A, B = draw(K, m, r, seed=1), draw(K, r, n, seed=2)
        dA, dB = draw(T, K, m, r, seed=3), draw(T, K, r, n, seed=4)
        rank = int(torch.linalg.matrix_rank(((A + dA) @ (B + dB) - A @ B).sum((0, 1)), rtol=1e-11))
        got = answer(T, K, r, m, n)
        assert got == rank, f"{T} updates with K = {K}, r = {r}, m = {m}, n = {n} have rank {rank}, not {got}"


def check_2(answer):
    """Oracle: first-order terms, added step by step."""
    T, K, m, n, r = 5, 3, 8, 6, 2
    A, B = draw(K, m, r, seed=1), draw(K, r, n, seed=2)
    dA, dB = draw(T, K, m, r, seed=3), draw(T, K, r, n, seed=4)
    got = answer(A, B, dA.sum(0), dB.sum(0))
    assert isinstance(got, tuple) and len(got) == 2, "return the pair (P, Q)"
    assert got[0].shape == (m, 2 * K * r), f"for K = 3, r = 2, m = 8, P is (8, 12), not {tuple(got[0].shape)}"
    wanted = sum(dA[t, i] @ B[i] + A[i] @ dB[t, i] for t in range(T) for i in range(K)) / K
    error = float((got[0] @ got[1] - wanted).abs().max())
    assert error < 1e-12, f"P Q differs from 1/K sum of dA_i B_i + A_i dB_i by up to {error:.1e}"


def check_3(answer):
    """Oracle: Eckart-Young on the product, which an (m, n) of this size still allows."""
    P, Q = draw(40, 12, seed=1) * 0.5 ** torch.arange(12), draw(12, 30, seed=2)
    sigma = torch.linalg.svdvals(P @ Q)
    for k in (1, 5, 12):
        got = answer(P.clone(), Q.clone(), k)
        assert isinstance(got, tuple) and len(got) == 2, "return two factors"
        shapes = [tuple(factor.shape) for factor in got]
        assert shapes == [(40, k), (k, 30)], f"for k = {k} factors are (40, {k}), ({k}, 30), not {shapes}"
        error, best = float((P @ Q - got[0] @ got[1]).norm()), float(sigma[k:].square().sum().sqrt())
        assert error <= best * (1 + 1e-9) + 1e-9, f"k = {k}: the error is {error:.2e}, {best:.2e} is possible"


if __name__ == "__main__":
    main(globals())
