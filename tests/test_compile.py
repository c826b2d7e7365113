"""torch.compile: no graph break, one graph for all shards, gradients and weights of the plain run."""

import pytest
import torch
import torch.nn as nn
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import hd_pissa
import hd_pissa_extra

SHARDS = 16


def train(compiled: bool, whole: bool = True, **options):
    """Three steps of 16 shards in one process; weights, and the number of graphs and of compilations."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 48), nn.Tanh(), nn.Linear(48, 36, bias=False)).double()
    adapters = hd_pissa_extra.attach(model, rank=2, shards=SHARDS, **options)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.0)
    eager = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph))
    counter = CompileCounterWithBackend(eager)
    call = torch.compile(model, backend=counter, fullgraph=whole) if compiled else model
    generator, grads = torch.Generator().manual_seed(1), []
    for _ in range(3):
        for s in range(SHARDS):
            x, y = (torch.randn(7, d, generator=generator, dtype=torch.float64) for d in (40, 36))
            with adapters.shard(s):
                (call(x) - y).square().mean().backward()
        grads += [p.grad.clone() for p in adapters.parameters()]
        optimizer.step()
        adapters.merge_()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()], grads, counter.frame_count


@pytest.mark.parametrize("gradients", ["local", "global"])
def test_compiled_run_equals_the_plain_one(gradients):
    """fullgraph=True makes any graph break an error; a graph for each shard would be 16 compilations."""
    weights, grads, none = train(False, gradients=gradients)
    compiled, their_grads, compilations = train(True, gradients=gradients)
    assert none == 0 and 1 <= compilations <= 2
    for a, b in zip(weights + grads, compiled + their_grads):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [dict(init="random"), dict(dropout=0.1)], ids=["from a seed", "dropout"])
@pytest.mark.parametrize("gradients", ["local", "global"])
def test_what_is_made_in_the_backward_breaks_the_graph_and_stays_right(gradients, options):
    """A_i, B_i or masks that a compiled backward had drawn once would be those of its first step for ever."""
    plain, compiled = (train(made, whole=False, gradients=gradients, **options)[:2] for made in (False, True))
    for a, b in zip(sum(plain, []), sum(compiled, []), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_equal_blocks_compile_to_one_graph():
    """Blocks compiled one by one: as many graphs with adapters as without, whatever the number of layers."""
    def graphs(attached: bool) -> int:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(10))).double()
        if attached:
            hd_pissa.attach(model, rank=2, shards=2)
        counter = CompileCounterWithBackend(aot_autograd(fw_compiler=lambda g, inputs: make_boxed_func(g)))
        x = torch.randn(3, 16, dtype=torch.float64)
        for block in model:
            x = torch.compile(block, backend=counter)(x)
        return counter.frame_count

    assert graphs(attached=True) <= graphs(attached=False) + 1
