"""A two-layer perceptron, its data and a training run through hd_pissa, comparable with the twin."""

import torch
import torch.nn as nn

import hd_pissa

CORE = ("shards", "targets", "exclude", "init", "alpha", "aggregate", "exchange", "seed", "decompose",
        "progress")  # fmt: skip
SIZES, K, R, STEPS = (20, 24, 18), 4, 2, 5  # m of the first weight, n, n of the second


def attach(model, rank, **arguments):
    """hd_pissa.attach, or hd_pissa_extra.attach where an argument is only its own."""
    if set(arguments) <= set(CORE) and arguments.get("init") != "random":
        return hd_pissa.attach(model, rank, **arguments)
    import hd_pissa_extra

    return hd_pissa_extra.attach(model, rank, **arguments)


def problem(dtype=torch.float64, shards=K, steps=STEPS, seed=0):
    """Weights (m, n), bias and data[t][i] = (x, y), all from one seed."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    weights = [draw(a, b) / a**0.5 for a, b in zip(SIZES, SIZES[1:])]
    return (
        weights,
        draw(SIZES[1]),
        [[(draw(6, SIZES[0]), draw(6, SIZES[2])) for _ in range(shards)] for _ in range(steps)],
    )


def module(weights, bias) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(*SIZES[:2]), nn.Tanh(), nn.Linear(*SIZES[1:], bias=False)).to(bias.dtype)
    with torch.no_grad():
        model[0].weight.copy_(weights[0].T)
        model[0].bias.copy_(bias)
        model[2].weight.copy_(weights[1].T)
    return model


def run(weights, bias, data, lr=1e-2, make=None, clip=None, **arguments):
    """Weights (m, n) after training with hd_pissa."""
    model = module(weights, bias)
    adapters = attach(
        model, arguments.pop("rank", R), shards=arguments.pop("shards", len(data[0])), **arguments
    )
    make = make or (lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=0.0))
    optimizer = make(adapters.parameters())
    adapters.check(optimizer)
    for batch in data:
        for i in range(adapters.S):
            x, y = batch[adapters.first + i]
            with adapters.shard(i):
                (model(x) - y).square().mean().backward()
        if clip is not None:
            adapters.clip_grad_norm_(clip)
        optimizer.step()
        adapters.merge_()
        optimizer.zero_grad()
    return [model[0].weight.detach().T.clone(), model[2].weight.detach().T.clone()], adapters
