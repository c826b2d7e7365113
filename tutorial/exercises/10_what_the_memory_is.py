"""Checks of chapter 10's exercises: python tutorial/exercises/10_what_the_memory_is.py my_answers.py"""

import torch
from grade import main

import hd_pissa_extra


def check_1(answer):
    """Oracle: columns of the DCT are the eigenvectors of second differences with free ends, of length 1."""
    for N in (6, 17):
        signs = (torch.randint(2, (N,), generator=torch.Generator().manual_seed(N)) * 2 - 1).double()
        frequencies = [0, N - 1, 2, 3]
        got = answer(signs, list(frequencies))
        assert got.shape == (N, 4), f"return a matrix of size {(N, 4)}, a column for each frequency"
        ends = torch.eye(N, dtype=torch.float64) * 2
        ends[0, 0] = ends[-1, -1] = 1
        L = ends - torch.ones(N - 1).double().diag(1) - torch.ones(N - 1).double().diag(-1)
        values = 2 - 2 * torch.cos(torch.pi * torch.tensor(frequencies) / N).double()
        waves = signs[:, None] * got
        assert torch.allclose(got.norm(dim=0), torch.ones(4).double(), atol=1e-6), "columns need length 1"
        assert torch.allclose(L @ waves, waves * values, atol=1e-6), \
            "D times a column is no wave of its frequency; look at the angle and at the signs"
        assert (waves[0] > 0).all(), "a cosine begins above zero; D flips rows, not columns"


def check_2(answer):
    """Oracle: 20,000 walks of hd_pissa_extra.round_stochastically, drawn anew at every step."""
    start, d, T = torch.tensor([1.0, 1.5, 0.265625, 5.0]).bfloat16(), 2e-4, 30
    W = start.repeat(20_000, 1)
    for t in range(T):
        W = hd_pissa_extra.round_stochastically(W.float() + d, 1000 + 7919 * t)
    got = answer(start, d, T)
    assert isinstance(got, tuple) and len(got) == 2, "return the pair (expected value, standard deviation)"
    walks = W.double()
    close = (got[0] - walks.mean(0)).abs() <= 5 * walks.std(0) / len(walks)**0.5
    assert close.all(), f"walks end at {walks.mean(0).tolist()} on average, not at {got[0].tolist()}"
    close = (got[1] / walks.std(0) - 1).abs() < 0.05
    assert close.all(), f"walks end {walks.std(0).tolist()} apart, not {got[1].tolist()}"


WRONG_2 = [lambda W, d, T: (W.double() + T * d, W.double() * 2**-7 * (T * d / 0.0078125)**0.5)]


def play(K, r, sizes, M, once):
    """Device 0's tensors and what arrives, one after another, by number of elements."""
    held, arrived = {}, 0
    for layer, (m, n) in enumerate(sizes):
        own = torch.empty((m, r)).numel() + torch.empty((r, n)).numel()
        held[layer, "increments"] = held[layer, "gradients"] = own
        held[layer, "moments"] = sum(torch.empty(own).numel() for _ in ("mean", "square"))
        if once:
            held[layer, "gradients"] = torch.empty((K, own)).numel()
        for _ in range(1 if once else M):
            arrived += sum(own for other in range(K) if other != 0)     # pieces of a ring's reduce-scatter
        arrived += sum(own for other in range(K) if other != 0)         # increments of the other shards
    return sum(held.values()), arrived


def check_3(answer):
    """Oracle: a device's tensors counted one by one."""
    for K, r, sizes, M in ((8, 2, [(16, 48), (64, 32)], 4), (4, 3, [(10, 10)], 1)):
        for once in (True, False):
            got, wanted = answer(K, r, sizes, M, once), play(K, r, sizes, M, once)
            assert isinstance(got, tuple) and len(got) == 2, "return the pair (held, received)"
            for what, x, y in zip(("held", "received"), got, wanted):
                assert x == y, f"K = {K}, r = {r}, M = {M}, once = {once}: {y} numbers are {what}, not {x}"


if __name__ == "__main__":
    main(globals())
