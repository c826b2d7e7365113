"""Solutions of chapter 9's exercises."""

import torch


def answer_1(T, K, r, m, n):
    return min((T + 1) * K * r, m, n)


def answer_2(A, B, sum_dA, sum_dB):
    return torch.cat((*sum_dA, *A), dim=1) / len(A), torch.cat((*B, *sum_dB))


def answer_3(P, Q, k):
    (P, left), (Q, right) = torch.linalg.qr(P), torch.linalg.qr(Q.T)     # orthonormal columns, (2Kr, 2Kr)
    U, S, Vt = torch.linalg.svd(left @ right.T)
    return P @ (U[:, :k] * S[:k]), Vt[:k] @ Q.T
