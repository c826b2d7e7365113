"""Checks of chapter 13's exercises: python tutorial/exercises/13_using_it.py my_answers.py"""

import torch
import torch.nn as nn
from grade import main

import hd_pissa


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "not_q_proj"):
            setattr(self, name, nn.Linear(8, 8))


def check_1(answer):
    """Oracle: what attach then adapts, by name."""
    model = nn.Sequential(Block(), Block())
    targets = answer([name for name, _ in model.named_modules()])
    assert isinstance(targets, list | str), "return a list of name suffixes, as `targets` of attach"
    adapters = hd_pissa.attach(model, 1, targets=targets)
    got = sorted({name.rsplit(".shard", 1)[0] for name, _ in adapters.named_parameters()})
    wanted = sorted(f"{i}.{name}" for i in range(2) for name in ("q_proj", "v_proj"))
    assert got == wanted, f"these targets adapt {', '.join(got)}; wanted are {', '.join(wanted)}"


WRONG_1 = [lambda names: ["q_proj", "v_proj", "not_q_proj"], lambda names: ["1.q_proj", "1.v_proj"],
           lambda names: "all-linear"]


def check_2(answer):
    """Oracle: updates of known rank, on float32 weights that round."""
    before = {f"layer{i}.weight": draw(24, 20, seed=i).float() / 5 for i in range(3)}
    before |= {"norm.weight": torch.ones(20), "layer0.bias": torch.zeros(24)}
    after, wanted = {name: W.clone() for name, W in before.items()}, [7, 2]
    for i, rank in zip((0, 2), wanted):
        dW = 1e-3 * draw(24, rank, seed=5) @ torch.linalg.qr(draw(20, rank, seed=6)).Q.T
        after[f"layer{i}.weight"] += dW.float()
    got = answer(before, after)
    assert got == wanted, (f"layer0 and layer2 have moved, by updates of rank 7 and 2, so the answer is "
                           f"{wanted}, not {got}; does rounding count as rank?")


WRONG_2 = [lambda before, after: [int(torch.linalg.matrix_rank(after[k] - before[k])) for k in before
                                  if k in ("layer0.weight", "layer2.weight")]]


def check_3(answer):
    """Oracle: hd_pissa."""
    for K, r in ((1, 2), (3, 2)):
        batches = [(draw(K, 5, 8, seed=t), draw(K, 5, 7, seed=-t)) for t in range(2, 6)]
        W = draw(8, 7, seed=1)
        layer = nn.Linear(8, 7, bias=False, dtype=torch.float64)
        layer.weight.data = W.T.clone()
        adapters = hd_pissa.attach(layer, r, shards=K)
        optimizer = torch.optim.AdamW(adapters.parameters(), lr=0.05, weight_decay=0.0)
        for X, Y in batches:
            for i in range(K):
                with adapters.shard(i):
                    (layer(X[i]) - Y[i]).square().mean().backward()
            optimizer.step()
            adapters.merge_()
            optimizer.zero_grad()
        got, moved = answer(W.clone(), batches, K, r, 0.05), layer.weight.detach().T - W
        assert got.shape == W.shape, f"return W, {tuple(W.shape)}"
        error = float((got - W - moved).norm() / moved.norm())
        assert error < 1e-9, f"K = {K}, r = {r}: your dW is off by {error:.1e} of its size"


if __name__ == "__main__":
    main(globals())
