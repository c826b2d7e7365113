"""Optimizers by what they do: their step must depend on gradients and their own state, not on the parameter.

Increments begin every step at zero. Oracle: the same optimizer on plain parameters with the same gradients,
of which two go on, from zero and from one, and one is set to zero after every step. `check` has to accept
those whose steps are equal, and refuse the others with their reason.
"""

import copy

import pytest
import torch
import torch.nn as nn
from spawned import spawn

import hd_pissa
import hd_pissa_extra

FILES = [hd_pissa, hd_pissa_extra]      # the core goes by a list of names, the other tries them out


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10))


def attached(file=hd_pissa_extra):
    model = small()
    return model, file.attach(model, 2)


X = torch.randn((6, 12), generator=torch.Generator().manual_seed(0))


# ---- Rules that are not in torch, written from their papers ------------------------------------------------


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023: the sign of an interpolated momentum."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_((0.9 * m + 0.1 * p.grad).sign(), alpha=group["lr"])
                m.lerp_(p.grad, 0.01)


class ScheduleFree(torch.optim.Optimizer):
    """Defazio et al. 2024: z takes plain steps, x is their mean, and the parameter is y between the two."""

    def __init__(self, params, lr=1e-2, beta=0.9):
        super().__init__(params, dict(lr=lr, beta=beta, t=0))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["t"] += 1
            beta, c = group["beta"], 1 / group["t"]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                x = (p - (1 - beta) * z) / beta
                z.sub_(p.grad, alpha=group["lr"])
                x = (1 - c) * x + c * z
                p.copy_((1 - beta) * z + beta * x)


class Prodigy(torch.optim.Optimizer):
    """Mishchenko and Defazio 2023, without momentum: the rate grows with the distance from the start."""

    def __init__(self, params, lr=1.0, d=1e-6):
        super().__init__(params, dict(lr=lr, d=d, s=0.0))

    @torch.no_grad()
    def step(self, closure=None):
        group, = self.param_groups
        d, beta = group["d"], 0.999
        numerator, denominator = beta * group["s"], 0.0
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state.update(start=p.clone(), sum=torch.zeros_like(p), v=torch.zeros_like(p))
            numerator += (1 - beta) * d * float((p.grad * (state["start"] - p)).sum())
            state["sum"].mul_(beta).add_(p.grad, alpha=(1 - beta) * d)
            state["v"].mul_(beta).addcmul_(p.grad, p.grad, value=(1 - beta) * d * d)
            denominator += float(state["sum"].abs().sum())
        group["s"] = numerator
        group["d"] = d = max(d, numerator / denominator) if denominator else d
        for p in group["params"]:
            state = self.state[p]
            p.sub_(group["lr"] * d * d * p.grad / (state["v"].sqrt() + d * 1e-8))


class TrustRatio(torch.optim.Optimizer):
    """LARS: the rate of a tensor is as large as the tensor."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=float(group["lr"] * (1 + p.norm()) / p.grad.norm()))


# Decay is off where a class has it on by itself: refused decay has a test of its own.
OFF = {"AdamW": dict(weight_decay=0.0), "Muon": dict(weight_decay=0.0)}
STOCK = {name: kind for name, kind in vars(torch.optim).items()
         if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
         and kind is not torch.optim.Optimizer}  # fmt: skip
MAKES = {name: (lambda p, kind=kind, name=name: kind(p, **OFF.get(name, {})))
         for name, kind in STOCK.items()} | {
    "Lion": Lion, "ScheduleFree": ScheduleFree, "Prodigy": Prodigy, "TrustRatio": TrustRatio,
    "SGD, momentum": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True),
    "RMSprop, centered": lambda p: torch.optim.RMSprop(p, 1e-2, centered=True, momentum=0.9),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "Adam, maximize": lambda p: torch.optim.Adam(p, 1e-2, maximize=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.0, fused=True),
    "AdamW, for loop": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.0, foreach=False),
    "AdamW, rate in a tensor": lambda p: torch.optim.AdamW(p, torch.tensor(1e-2), weight_decay=0.0,
                                                           foreach=False),
    "NAdam, decoupled": lambda p: torch.optim.NAdam(p, 1e-2, decoupled_weight_decay=True),
}  # fmt: skip


def increments(make, start: float, reset: bool):
    """What 12 steps add to a matrix with given gradients; None if the class takes no such step."""
    p = nn.Parameter(torch.full((5, 3), start, dtype=torch.float64))
    optimizer, g, added = make([p]), torch.Generator().manual_seed(0), []
    for _ in range(12):
        before = p.detach().clone()
        p.grad = 1 + torch.rand(p.shape, generator=g, dtype=p.dtype)
        try:
            optimizer.step()
        except (TypeError, RuntimeError):
            return None
        added.append(p.detach() - before)
        if reset:
            p.data.zero_()
    return torch.stack(added)


def reads_the_parameter(make) -> bool:
    kept, reset = [increments(make, start, False) for start in (0.0, 1.0)], increments(make, 0.0, True)
    return reset is None or not all(torch.allclose(steps, reset, rtol=1e-6, atol=0) for steps in kept)


def verdict(adapters, optimizer) -> str | None:
    try:
        adapters.check(optimizer)
    except ValueError as e:
        return str(e)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", MAKES)
def test_check_goes_by_what_an_optimizer_does(name, file):
    """Accepted where a reset to zero changes no step, refused with its reason where it does."""
    model, adapters = attached(file)
    said = verdict(adapters, MAKES[name](adapters.parameters()))
    assert (said is not None) is reads_the_parameter(MAKES[name]), said
    if said:
        assert "reads the parameter" in said or "takes no step on a copy" in said
        assert "AdamW" in said and "SGD" in said


class Signs(Lion):
    """Lion by a name of somebody's own."""


def test_a_name_that_is_not_in_the_list_is_refused_by_the_core_alone():
    _, adapters = attached(hd_pissa)
    said = verdict(adapters, Signs(adapters.parameters()))
    assert "Signs may have a rule that reads the parameter" in said and "AdamW" in said
    _, adapters = attached(hd_pissa_extra)
    assert verdict(adapters, Signs(adapters.parameters())) is None


@pytest.mark.parametrize("file", FILES)
def test_an_optimizer_is_looked_at_before_its_first_step(file):
    model, adapters = attached(file)
    model(X).square().mean().backward()
    with pytest.raises(ValueError, match="weight_decay"):
        torch.optim.AdamW(adapters.parameters(), 1e-2).step()
    assert not adapters.increments.any()


def test_the_oracle_tells_them_apart():
    """What must be accepted and refused, by name: it cannot be as blind as a check that finds nothing."""
    fine = {"SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adagrad", "Adadelta",
            "Lion"}  # fmt: skip
    read = {"ASGD", "Adafactor", "LBFGS", "SparseAdam", "ScheduleFree", "Prodigy", "TrustRatio"}
    assert {name for name in fine if reads_the_parameter(MAKES[name])} == set()
    assert {name for name in read & MAKES.keys() if not reads_the_parameter(MAKES[name])} == set()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", [n for n in STOCK if n not in ("LBFGS", "SparseAdam")])
def test_weight_decay_is_refused(name, file):
    """Of every class that has it: on increments of zero it would do nothing, whatever its rule."""
    _, adapters = attached(file)
    try:
        optimizer = STOCK[name](adapters.parameters(), weight_decay=0.1)
    except TypeError:
        pytest.skip(f"{name} has no weight_decay")
    said = verdict(adapters, optimizer)
    assert f"{name} has weight_decay" in said and "weight_decay=0.0" in said
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    assert (verdict(adapters, optimizer) is None) is not reads_the_parameter(
        lambda p: STOCK[name](p, weight_decay=0.0))


@pytest.mark.parametrize("file", FILES)
def test_decay_of_other_groups_is_their_own(file):
    """A bias beside the adapters may decay, and may have another rule's options."""
    model, adapters = attached(file)
    groups = [{"params": adapters.parameters(), "weight_decay": 0.0},
              {"params": [model[0].bias.requires_grad_()], "weight_decay": 0.1}]  # fmt: skip
    assert verdict(adapters, torch.optim.AdamW(groups)) is None
    groups[0]["weight_decay"], groups[1]["weight_decay"] = 0.1, 0.0
    assert "weight_decay" in verdict(adapters, torch.optim.AdamW(groups))


@pytest.mark.parametrize("lacking", [slice(1, None), slice(0, 0)])
def test_increments_that_no_optimizer_holds(lacking):
    _, adapters = attached()
    stray = nn.Parameter(torch.zeros(2))
    said = verdict(adapters, torch.optim.SGD([*adapters.parameters()[lacking], stray], 1e-2))
    count = 4 - len(adapters.parameters()[lacking])
    assert f"lacks {count} of the 4 increments" in said and "adapters.parameters()" in said


def test_check_leaves_everything_as_it_is():
    """Also after steps, with moments, hooks and a scheduler, which steps the optimizer through a wrapper."""
    model, adapters = attached()
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-2, weight_decay=0.0)
    scheduler, calls = torch.optim.lr_scheduler.StepLR(optimizer, 1), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: adapters.merge_())
    for _ in range(2):
        model(X).square().mean().backward()
        optimizer.step()
        scheduler.step()
    model(X).square().mean().backward()
    state, W = copy.deepcopy(optimizer.state_dict()), model[0].weight.clone()
    grads, steps = [p.grad.clone() for p in adapters.parameters()], adapters.step
    drawn = torch.get_rng_state()
    adapters.check(optimizer)
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert calls == ["before"] * 2 and adapters.step == steps
    for index, moments in state["state"].items():
        assert all(torch.equal(t, after["state"][index][k]) for k, t in moments.items())
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, adapters.parameters()))
    assert torch.equal(W, model[0].weight) and torch.equal(drawn, torch.get_rng_state())
    model(X)                                            # nothing waits for a merge
    optimizer.step()
    assert calls == ["before"] * 3 and not torch.equal(W, model[0].weight)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Lion", "Adagrad", "NAdam"])
def test_what_is_accepted_trains(name):
    """The loss of a layer falls by it, merge after merge."""
    model, adapters = attached()
    kind = MAKES[name]
    optimizer = kind(adapters.parameters())
    for group in optimizer.param_groups:
        group["lr"] = {"SGD": 0.5, "Adagrad": 5e-2}.get(name, 5e-3)
    losses = []
    for _ in range(25):
        loss = (model(X) - 1).square().mean()
        loss.backward()
        optimizer.step()
        adapters.merge_()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def zero_redundancy():
    """What check says of an optimizer that deals its parameters out to the processes, and of a plain one."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    _, adapters = attached()
    dealt = ZeroRedundancyOptimizer(adapters.parameters(), torch.optim.Adam, lr=1e-2)
    return verdict(adapters, dealt), verdict(adapters, torch.optim.Adam(adapters.parameters(), lr=1e-2))


def test_zero_redundancy_is_refused(tmp_path):
    """It would copy process 0's increments to all; every shard's state lies on one process already."""
    (said, fine), other = spawn(2, zero_redundancy, tmp_path)
    assert "ZeroRedundancyOptimizer" in said and "AdamW" in said and fine is None and other == (said, fine)
