"""Checks of chapter 5's exercises: python tutorial/exercises/05_exchange.py my_answers.py"""

import torch
from grade import main


def ring(K, pieces, reduce):
    """Numbers that device 0 receives. Device i sends to i + 1; `pieces` (K, size), one a device, goes round.

    all-gather: every piece travels until all have it. reduce: first each chunk of every tensor is added up on
    its way, then the sums are gathered. The messages are really passed, so the result proves the count.
    """
    got = 0
    if reduce:
        chunks = [list(piece.chunk(K)) for piece in pieces]
        for step in range(K - 1):
            sent = [chunks[i][(i - step) % K] for i in range(K)]
            for i in range(K):
                chunks[i][(i - 1 - step) % K] = chunks[i][(i - 1 - step) % K] + sent[i - 1]
            got += sent[-1].numel()
        held = [{(i + 1) % K: chunks[i][(i + 1) % K]} for i in range(K)]
    else:
        held = [{i: pieces[i]} for i in range(K)]
    for step in range(K - 1):
        sent = [(i + reduce - step) % K for i in range(K)]
        for i in range(K):
            held[i][sent[i - 1]] = held[i - 1][sent[i - 1]]
        got += held[0][sent[-1]].numel()
    whole = torch.cat([held[0][j] for j in range(K)])
    assert torch.equal(whole, pieces.sum(0) if reduce else pieces.flatten())
    return got


def check_1(answer):
    """Oracle: messages passed round a ring, counted."""
    for K, r, m, n in ((2, 1, 4, 6), (4, 2, 12, 10), (8, 2, 16, 32)):
        got = answer(K, r, m, n)
        assert isinstance(got, tuple) and len(got) == 2, "return the pair (dense, factors)"
        g = torch.Generator().manual_seed(0)
        for name, mine, size in (("dense", got[0], m * n), ("factors", got[1], r * (m + n))):
            count = ring(K, torch.randint(100, (K, size), generator=g), reduce=name == "dense")
            assert mine == count, (f"{name}: with K = {K}, r = {r}, m = {m}, n = {n} a process receives "
                                   f"{count} numbers, not {mine}")


def check_2(answer):
    """Oracle: the increments that the messages were made of."""
    g, K, r, shapes = torch.Generator().manual_seed(0), 3, 2, [(5, 4), (4, 7), (3, 3)]
    sent = [(torch.randn((K, m, r), generator=g), torch.randn((K, r, n), generator=g)) for m, n in shapes]
    messages = torch.cat([part for dA, dB in sent for part in (dA.flatten(1), dB.flatten(1))], dim=1)
    got = answer(messages, shapes, r)
    assert isinstance(got, list) and len(got) == 3, "return a list with (dA, dB) of each of the 3 layers"
    for j, ((dA, dB), pair) in enumerate(zip(sent, got)):
        assert isinstance(pair, tuple) and len(pair) == 2, f"layer {j}: return the pair (dA, dB)"
        for name, wanted, mine in (("dA", dA, pair[0]), ("dB", dB, pair[1])):
            assert mine.shape == wanted.shape, f"layer {j}: {name} has the shape {tuple(wanted.shape)}"
            assert torch.equal(mine, wanted), f"layer {j}: {name} does not hold what the devices have sent"


def check_3(answer):
    """Oracle: the sum in float64, and the same parts arriving in other orders."""
    parts = torch.randn((5, 1000), generator=torch.Generator().manual_seed(0))
    orders = (0, 1, 2, 3, 4), (4, 2, 0, 3, 1), (3, 4, 1, 2, 0)
    sums = [answer({i: parts[i] for i in order}) for order in orders]
    for got in sums:
        wrong = (got.double() - parts.double().sum(0)).abs().max()
        assert wrong < 1e-5, f"that is off the sum of the parts by up to {wrong:.1e}"
        assert torch.equal(got, sums[0]), "another order of arrival gave other bits: copies of W would drift"


WRONG_3 = [lambda parts: sum(parts.values())]

if __name__ == "__main__":
    main(globals())
