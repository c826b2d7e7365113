"""Solutions of chapter 10's exercises."""

import math

import torch


def answer_1(signs, frequencies):
    N = len(signs)
    j, f = torch.arange(N, dtype=torch.float64)[:, None], torch.tensor(frequencies, dtype=torch.float64)
    C = math.sqrt(2 / N) * torch.cos(math.pi * (2 * j + 1) * f / (2 * N))
    return signs[:, None] * torch.where(f == 0, C / math.sqrt(2), C)


def answer_2(W, d, T):
    W = W.double()
    u = 2.0 ** (torch.floor(torch.log2(W)) - 7)
    return W + T * d, torch.sqrt(T * d * (u - d))


def answer_3(K, r, sizes, M, once):
    unit = r * sum(m + n for m, n in sizes)
    if once:
        return (1 + K + 2) * unit, 2 * (K - 1) * unit
    return (1 + 1 + 2) * unit, (M + 1) * (K - 1) * unit
