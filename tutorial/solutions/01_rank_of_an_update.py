"""Solutions of chapter 1's exercises."""

import torch


def answer_1(W, k):
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :k] * S[:k]) @ Vt[:k]


def answer_2(A_0, B_0, A, B):
    return torch.hstack((A, A_0)), torch.vstack((B, -B_0))


def answer_3(sigma, share):
    # effective_rank looks at each value against the first. A share of the sum may leave out many small values
    # that effective_rank counts, or need many small ones that it ignores.
    energy = sigma.double().square().cumsum(0)
    # A hair less than asked: sums of equal parts must not fail by rounding.
    return int((energy < (share - 1e-9) * energy[-1]).sum()) + 1
