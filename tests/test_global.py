"""gradients="global": K shards of rank r learn from the whole batch as one shard of rank K r would."""

import pytest
import torch
import torch.nn as nn
import toy
from spawned import spawn
from torch.utils.checkpoint import checkpoint

import hd_pissa
import hd_pissa_extra

MAKES = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


def train(model, adapters, data, make):
    """Every process backpropagates its own rows; losses add up to the mean over the whole batch."""
    optimizer, K = make(adapters.parameters()), len(data[0])
    adapters.check(optimizer)
    share, first = K // hd_pissa.world_size(), hd_pissa.process_index()
    mine = range(first * share, (first + 1) * share)
    for batch in data:
        for i in mine:
            ((model(batch[i][0]) - batch[i][1]).square().mean() / K).backward()
        optimizer.step()
        adapters.merge_()
        optimizer.zero_grad()
    return [slot.module.weight.detach().clone() for slot in adapters.slots]


def single(name, alpha=None):
    """The oracle: K=1, rank K r, gradients accumulated over the whole batch."""
    weights, bias, data = toy.problem()
    model = toy.module(weights, bias)
    alpha = None if alpha is None else alpha * toy.K  # alpha / rank the same
    adapters = hd_pissa.attach(model, toy.K * toy.R, shards=1, alpha=alpha)
    return train(model, adapters, data, MAKES[name])


def run(name, exchange="auto", alpha=None, send="step"):
    weights, bias, data = toy.problem()
    model = toy.module(weights, bias)
    adapters = hd_pissa_extra.attach(
        model, toy.R, shards=toy.K, gradients="global", aggregate="sum", exchange=exchange, alpha=alpha,
        send=send,
    )  # fmt: skip
    Ws = train(model, adapters, data, MAKES[name])
    state = sum(p.numel() for p in adapters.parameters())
    return [W.tolist() for W in Ws], state


CASES = [
    ("adamw", "auto", None),
    ("adamw", "all_reduce", 3.0),
    ("sgd", "auto", 3.0),
    ("sgd", "all_reduce", None),
    ("adamw", "auto", 3.0, "backward"),
]


def close(a, b):
    torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64), b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_one_process_equals_one_shard_of_rank_Kr(case):
    got, state = run(*case)
    for a, b in zip(got, single(case[0], case[2]), strict=True):
        close(a, b)
    assert state == toy.K * toy.R * sum(sum(W.shape) for W in toy.problem()[0])


def all_cases():
    return [run(*case) for case in CASES]


@pytest.mark.parametrize("world", [2, 4])
def test_processes_equal_one_shard_of_rank_Kr(world, tmp_path):
    """And each process keeps optimizer state for its own shards alone."""
    expected = [single(case[0], case[2]) for case in CASES]
    ranks = spawn(world, all_cases, tmp_path)
    assert all(rank == ranks[0] for rank in ranks)
    for (got, state), Ws in zip(ranks[0], expected, strict=True):
        for a, b in zip(got, Ws, strict=True):
            close(a, b)
        assert state == toy.K // world * toy.R * sum(sum(W.shape) for W in toy.problem()[0])


def test_mean_is_a_Kth_of_the_step():
    weights = toy.problem()[0]
    first = toy.problem(steps=1)[2]
    moved = {}
    for aggregate in ("sum", "mean"):
        model = toy.module(*toy.problem()[:2])
        adapters = hd_pissa_extra.attach(model, toy.R, shards=toy.K, gradients="global", aggregate=aggregate)
        moved[aggregate] = train(model, adapters, first, MAKES["adamw"])[0] - weights[0].T
    torch.testing.assert_close(moved["mean"] * toy.K, moved["sum"], rtol=1e-6, atol=1e-12)


class Branch(nn.Module):
    """The second layer runs for some rows only, as an expert of a mixture does."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 12).double(), nn.Linear(12, 12).double()
        self.last = nn.Linear(12, 12).double()

    def forward(self, x, expert):
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.second(h)) if expert else h)


def branched(recompute=False):
    g = torch.Generator().manual_seed(0)
    model = Branch()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, generator=g)
    adapters = hd_pissa_extra.attach(model, 2, shards=2, gradients="global", aggregate="sum")
    optimizer, seen = MAKES["sgd"](adapters.parameters()), []
    for _ in range(3):
        x = torch.randn((2, 5, 12), generator=g, dtype=torch.float64)
        for i in range(adapters.first, adapters.first + adapters.S):
            y = checkpoint(model, x[i], i == 1, use_reentrant=False) if recompute else model(x[i], i == 1)
            y.square().mean().backward()
        optimizer.step()
        # No owner's gradient is missing, and after the merge no gradient of rank K r is left.
        seen += [p.grad is not None for p in adapters.parameters()]
        adapters.merge_()
        seen += [leaf.grad is None for s in adapters.slots for leaf in s.caught]
        optimizer.zero_grad()
    return [slot.module.weight.tolist() for slot in adapters.slots], all(seen)


def test_a_layer_unused_on_one_process_contributes_zeros(tmp_path):
    """Process 0 never runs the second layer: no hang, and the weights of one process with both shards."""
    expected, seen = branched()
    assert seen
    for result, seen in spawn(2, branched, tmp_path):
        assert seen
        for a, b in zip(result, expected, strict=True):
            close(a, torch.tensor(b, dtype=torch.float64))


def test_checkpointed_forward_gives_the_same():
    assert branched(recompute=True) == branched()


def test_a_failed_backward_leaves_nothing_behind():
    """A backward that dies in its middle, dropped by next_step: the run goes on as if it had not been."""
    class Dies(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dY):
            raise MemoryError("planted")

    def steps(fail: bool):
        weights, bias, data = toy.problem()
        model = toy.module(weights, bias)
        adapters = hd_pissa_extra.attach(model, toy.R, shards=toy.K, gradients="global", aggregate="sum")
        optimizer = MAKES["sgd"](adapters.parameters())
        for t, batch in enumerate(data):
            if fail and t == 1:
                x, y = batch[0]
                with pytest.raises(MemoryError):
                    (model[2](Dies.apply(model[1](model[0](x)))) - y).square().mean().backward()
                optimizer.zero_grad()
                adapters.next_step()
            for x, y in batch:
                ((model(x) - y).square().mean() / toy.K).backward()
            optimizer.step()
            adapters.merge_()
            optimizer.zero_grad()
        return [slot.module.weight.detach() for slot in adapters.slots]

    for a, b in zip(steps(fail=False), steps(fail=True)):
        assert torch.equal(a, b)


# ---- Whatever the order in which gradients come ------------------------------------------------------------


class Dies(torch.autograd.Function):
    """The identity, whose backward ends in an error while `on`."""

    on = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dY):
        if Dies.on:
            raise MemoryError("planted")
        return dY


class Backwards(nn.Module):
    """Registered in the opposite order of their use, with a place in the middle where a backward may end."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.last, self.middle, self.first = (nn.Linear(12, 12).double() for _ in range(3))
        for p in self.parameters():
            nn.init.normal_(p, std=0.3, generator=g)

    def forward(self, x, reentrant=False):
        h = torch.tanh(self.first(x))
        h = checkpoint(self.middle, h, use_reentrant=True) if reentrant else self.middle(h)
        return self.last(Dies.apply(torch.tanh(h)))


def orders(gradients="global", fail=False, reentrant=False, micro=1, send="step"):
    """Weights of the three layers after three steps of four rows of each of two shards."""
    model = Backwards()
    attach = hd_pissa_extra.attach
    if gradients == "one shard":        # the oracle: rank K r on the whole batch, nothing caught or dealt out
        adapters = attach(model, 4, shards=1)
    else:
        adapters = attach(model, 2, shards=2, gradients=gradients, aggregate="sum", send=send)
    optimizer, g = torch.optim.SGD(adapters.parameters(), 0.1, momentum=0.9), torch.Generator().manual_seed(1)
    whole = gradients == "one shard"
    mine = range(2) if whole else range(adapters.first, adapters.first + adapters.S)
    for t in range(3):
        x = torch.randn((2, 4, 12), generator=g, dtype=torch.float64)
        if fail and t == 1:
            Dies.on = True
            try:
                (3 * model(x[0])).square().sum().backward()
            except MemoryError:
                optimizer.zero_grad()
            finally:
                Dies.on = False
        for i in mine:
            for rows in x[i].chunk(micro):
                y = model(rows.requires_grad_(), reentrant)
                (y.square().sum() / 96).backward()
        optimizer.step()
        adapters.merge_()
        optimizer.zero_grad()
    return [layer.weight.tolist() for layer in (model.first, model.middle, model.last)]


CASES_OF_ORDER = {"reverse order": {}, "a failed backward, zero_grad, and on": dict(fail=True),
                  "reentrant checkpointing": dict(reentrant=True), "micro-batches": dict(micro=4),
                  "all": dict(fail=True, reentrant=True, micro=2),
                  "sent by every backward": dict(fail=True, reentrant=True, micro=2, send="backward"),
                  }  # fmt: skip


def all_orders():
    return [orders(**case) for case in CASES_OF_ORDER.values()]


def test_the_order_of_gradients_does_not_matter(tmp_path):
    """On one process and on two, against one shard of rank K r, which catches and sends nothing."""
    expected = orders("one shard")
    for results in [all_orders(), *spawn(2, all_orders, tmp_path)]:
        for weights in results:
            for a, b in zip(weights, expected, strict=True):
                close(a, torch.tensor(b, dtype=torch.float64))


# ---- Sent by every backward --------------------------------------------------------------------------------


def sent():
    """Numbers that this process held for gradients at once, and received, in three micro-batches."""
    out = {}
    for send in ("step", "backward"):
        model = toy.module(*toy.problem()[:2])
        adapters = hd_pissa_extra.attach(model, toy.R, shards=2, gradients="global", send=send)
        held, moved, reduce = [], [], hd_pissa_extra.reduce_later

        def counted(whole, moved=moved, reduce=reduce):
            own, wait = reduce(whole)
            moved.append(own.numel())
            return own, wait

        hd_pissa_extra.reduce_later = counted
        try:
            for x, _ in toy.problem()[2][0][:3]:
                model(x).square().mean().backward()
                caught = [leaf.grad for slot in adapters.slots for leaf in slot.caught]
                held.append(sum(grad.numel() for grad in caught if grad is not None))
            adapters.collect_()
        finally:
            hd_pissa_extra.reduce_later = reduce
        out[send] = max(held), sum(moved), adapters.increments.numel(), len(moved)
    return out


def test_what_each_way_of_sending_holds_and_moves(tmp_path):
    """step: K times the increments, once. backward: nothing is kept, but each micro-batch sends, a layer's at
    once: of two collectives the second would wait for the first, in the middle of the backward."""
    for out in spawn(2, sent, tmp_path):
        held, moved, own, calls = out["step"]
        assert held == 2 * own and moved == own + 1 and calls == 1      # one number says that all are finite
        held, moved, own, calls = out["backward"]
        assert calls == 2 * 3                               # layers and micro-batches
        assert held == 0 and moved == 3 * own + calls       # one number with each says whose it is


def experts():
    """Each process runs another layer of the same shape: what the merge says."""
    layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
    adapters = hd_pissa_extra.attach(layers, 2, gradients="global", send="backward")
    layers[hd_pissa.process_index()](torch.ones(3, 12)).sum().backward()
    before = layers[0].weight.clone()
    try:
        MAKES["sgd"](adapters.parameters()).step()
        adapters.merge_()
    except ValueError as e:
        return str(e), torch.equal(before, layers[0].weight)


def test_layers_that_only_some_processes_run_are_refused_where_each_backward_sends(tmp_path):
    for said, untouched in spawn(2, experts, tmp_path):
        assert "different layers, so gradients were mixed" in said and 'send="step"' in said and untouched
