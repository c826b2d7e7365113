"""Solutions of chapter 2's exercises."""

import torch


def answer_1(W, K, r):
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    cuts = [slice(i * r, (i + 1) * r) for i in range(K)]
    return [(U[:, c] * S[c].sqrt(), S[c].sqrt()[:, None] * Vt[c]) for c in cuts]


def answer_2(shapes, K):
    return min(min(shape) for shape in shapes) // K


def answer_3(A_1, A_2):
    # Orthonormal bases of both spaces; the singular values of Q_1^T Q_2 are the cosines of the angles.
    Q_1, Q_2 = torch.linalg.qr(A_1).Q, torch.linalg.qr(A_2).Q
    return torch.linalg.svdvals(Q_1.T @ Q_2)[0]
