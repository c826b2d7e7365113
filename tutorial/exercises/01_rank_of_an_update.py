"""Checks of chapter 1's exercises: python tutorial/exercises/01_rank_of_an_update.py my_answers.py"""

import torch
from grade import main


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_1(answer):
    """Oracle: Eckart-Young. No matrix of rank k is nearer than the root of the sum of sigma^2 beyond k."""
    for k in (1, 3):
        W = draw(7, 9)
        got, sigma = answer(W.clone(), k), torch.linalg.svdvals(W)
        assert isinstance(got, torch.Tensor) and got.shape == W.shape, "return a matrix of W's shape, (7, 9)"
        rank = int(torch.linalg.matrix_rank(got, rtol=1e-10))
        assert rank <= k, f"your matrix has rank {rank}, asked for {k}"
        distance, best = (W - got).norm(), sigma[k:].square().sum().sqrt()
        assert distance < best * (1 + 1e-9), f"|W - yours| is {distance:.4f}, but {best:.4f} is possible"


def check_2(answer):
    """Oracle: the difference itself."""
    A_0, A, B_0, B = draw(8, 2), draw(8, 2, seed=1), draw(2, 6, seed=2), draw(2, 6, seed=3)
    got = answer(A_0, B_0, A, B)
    assert isinstance(got, tuple) and len(got) == 2, "return the pair (P, Q)"
    P, Q = got
    assert P.shape == (8, 4) and Q.shape == (4, 6), "for m = 8, n = 6, r = 2, P is (8, 4) and Q is (4, 6)"
    error = float((P @ Q - (A @ B - A_0 @ B_0)).abs().max())
    assert error < 1e-12, f"P Q differs from A B - A_0 B_0 by up to {error:.1e}"


def check_3(answer):
    """Oracle: spectra whose sums of squares are known by hand."""
    for sigma, share, k in (((2.0, 1.0, 1.0, 1.0, 1.0), 0.5, 1), ((2.0, 1.0, 1.0, 1.0, 1.0), 0.6, 2),
                            ((3.0, 0.0, 0.0), 0.9, 1), ((1.0,) * 10, 0.85, 9), ((1.0,) * 10, 1.0, 10)):
        got = answer(torch.tensor(sigma), share)
        assert got == k, f"sigma = {sigma} needs {k} values for {share:.0%} of the sum of squares, not {got}"


if __name__ == "__main__":
    main(globals())
