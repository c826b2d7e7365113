"""Experts that a model keeps side by side in 3-D parameters train as layers of their own.

Oracles: the same mixture written with one nn.Linear an expert, trained by hd_pissa; autograd through the
stack plus s A B; the frozen model's logits; PEFT's share of the weights.
"""

import copy
import functools
import gc
import importlib.util
import io
import pickle
import threading
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from spawned import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import hd_pissa
import hd_pissa_extra

BENCH = Path(__file__).parent / "bench"
E, WIDTH, HIDDEN, K, R = 4, 10, 12, 2, 2


class Experts(nn.Module):
    """A loop over the experts that have tokens, as in transformers; stacks are (E, n, m) or (E, m, n)."""

    def __init__(self, up, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        self.up, self.down = (nn.Parameter(torch.empty(E, *(shape[::-1] if is_transposed else shape)))
                              for shape in ((up, WIDTH), (WIDTH, up)))

    def apply_one(self, x, e):
        up, down = self.up[e], self.down[e]
        if self.is_transposed:
            return torch.tanh(x @ up) @ down
        return F.linear(torch.tanh(F.linear(x, up)), down)

    def forward(self, x, chosen):
        y = torch.zeros_like(x)
        for e in chosen.unique().tolist():
            y = y.index_add(0, torch.where(chosen == e)[0], self.apply_one(x[chosen == e], e))
        return y


class Lists(Experts):
    """The same of one nn.Linear an expert, by the same names."""

    def __init__(self, up, is_transposed):
        nn.Module.__init__(self)
        self.up = nn.ModuleList(nn.Linear(WIDTH, up, bias=False) for _ in range(E))
        self.down = nn.ModuleList(nn.Linear(up, WIDTH, bias=False) for _ in range(E))

    def apply_one(self, x, e):
        return self.down[e](torch.tanh(self.up[e](x)))


class Mixture(nn.Module):
    def __init__(self, kind=Experts, is_transposed=False, dtype=torch.float64):
        super().__init__()
        self.first, self.experts = nn.Linear(WIDTH, WIDTH), kind(HIDDEN, is_transposed)
        self.transposed = is_transposed
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.first.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64))
            for name in ("up", "down"):
                for e in range(E):
                    W = self.matrix(name, e)
                    W.copy_(0.3 * torch.randn(W.shape, generator=g, dtype=torch.float64))
        self.to(dtype)

    def matrix(self, name, e):
        """(n, m)"""
        there = getattr(self.experts, name)[e]
        return there.weight if isinstance(there, nn.Linear) else there.T if self.transposed else there

    def matrices(self):
        return [self.matrix(name, e).detach().clone() for name in ("up", "down") for e in range(E)]

    def forward(self, x, chosen):
        return self.experts(torch.tanh(self.first(x)), chosen)


def rows(seed, experts=E):
    """Nine tokens and the expert of each; all have some."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn((9, WIDTH), generator=g, dtype=torch.float64),
            torch.randperm(9, generator=g) % experts)


def train(model, adapters, steps=3, start=0, call=None, **more):
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.0)
    dtype = next(model.parameters()).dtype
    for t in range(start, start + steps):
        for i in range(adapters.S):
            x, chosen = rows(adapters.K * t + adapters.first + i, **more)
            with adapters.shard(i):
                (call or model)(x.to(dtype), chosen).square().mean().backward()
        optimizer.step()
        adapters.merge_()
    return model.matrices()


def refused(work, error=ValueError) -> str:
    with pytest.raises(error) as info:
        work()
    return str(info.value)


OPTIONS = [{}, dict(aggregate="sum"), dict(alpha=6.0), dict(init="top"), dict(init="lora"),
           dict(exchange="all_reduce"), dict(init="random"), dict(gradients="global"), dict(basis="resend"),
           dict(gradients="global", init="random", alpha=6.0)]  # fmt: skip


@pytest.mark.parametrize("is_transposed", [False, True], ids=["(E, n, m)", "(E, m, n)"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_stack_trains_as_its_experts_would_as_layers(options, is_transposed):
    """To rounding, in float64; the core knows the layers, hd_pissa_extra the stack."""
    core = options.keys() <= {"aggregate", "alpha", "init", "exchange"} and options.get("init") != "random"
    attach = hd_pissa.attach if core else hd_pissa_extra.attach
    lists, stack = Mixture(Lists), Mixture(is_transposed=is_transposed)
    ours, theirs = (f(m, R, shards=K, decompose=hd_pissa.components, **options)
                    for f, m in ((hd_pissa_extra.attach, stack), (attach, lists)))
    assert [*(slot.name for slot in ours.slots)] == [*(slot.name for slot in theirs.slots)]
    for before, a, b in zip(Mixture().matrices(), train(stack, ours), train(lists, theirs)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert (a - before).abs().max() > 1e-3


def shards_on_processes(gradients):
    model = Mixture()
    adapters = hd_pissa_extra.attach(model, R, shards=4, gradients=gradients)
    return [W.tolist() for W in train(model, adapters)]


@pytest.mark.parametrize("gradients", ["local", "global"])
def test_two_processes_equal_one(gradients, tmp_path):
    """Two shards on each: a second backward adds to the gradients of the first."""
    expected = shards_on_processes(gradients)
    for result in spawn(2, shards_on_processes, tmp_path, gradients):
        for a, b in zip(result, expected):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-12, atol=1e-13)


# ---- Families of transformers ------------------------------------------------------------------------------

FAMILIES = ["Mixtral", "Qwen3-MoE", "OLMoE", "DeepSeek-V3", "gpt-oss"]


@functools.cache
def bench():
    """tests/bench/families.py; tests/families.py has the same name."""
    pytest.importorskip("transformers", "5"), pytest.importorskip("peft")
    spec = importlib.util.spec_from_file_location("bench_families", BENCH / "families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def family(name, implementation="grouped_mm"):
    families = bench()
    model = families.build(name)
    model.set_experts_implementation(implementation)
    return model, families.batch(name, 0)[0]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", FAMILIES)
def test_step_0_logits_are_the_frozen_models(name, implementation):
    """Bit for bit, and every stack trains: none is left out, none without gradient."""
    model, inputs = family(name, implementation)
    model.requires_grad_(False)
    frozen = model(**inputs).logits
    adapters = hd_pissa_extra.attach(model, R, decompose=hd_pissa.components)
    logits = model(**inputs).logits
    assert torch.equal(logits, frozen) and logits.requires_grad
    logits.square().mean().backward()
    stacks = {n.rpartition(".")[0] for n in (slot.name for slot in adapters.slots) if n[-1].isdigit()}
    assert stacks == {n for n, p in model.named_parameters() if p.dim() == 3} and stacks
    assert all(p.grad is not None for p in adapters.parameters())
    assert not any("experts" in skipped for skipped in adapters.skipped)


@pytest.mark.parametrize("gradients", ["local", "global"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
def test_gradients_are_those_of_residual_pissa(name, implementation, gradients):
    """Autograd through each stack as W - s A B + s (A + dA)(B + dB), written out for all experts."""
    model, inputs = family(name, implementation)
    plain, alpha = copy.deepcopy(model), 6.0
    adapters = hd_pissa_extra.attach(model, R, shards=K, alpha=alpha, targets="experts", gradients=gradients,
                                     decompose=hd_pissa.components)
    with adapters.shard(1):
        model(**inputs).logits.square().mean().backward()
    leaves, swapped = {}, {}
    factors = adapters.tensors()
    for key, W in plain.named_parameters():
        for i in range(K) if W.dim() == 3 else ():
            sides = [torch.stack([factors[f"{key}.{e}.shard{i}.{side}"] for e in range(len(W))])
                     for side in "AB"]
            A, B = leaves[key, i] = [side.requires_grad_() for side in sides]
            moved = alpha / R * (A @ B - (A @ B).detach())
            swapped[key] = swapped.get(key, W.detach()) + (moved if name == "gpt-oss" else moved.mT)
    torch.func.functional_call(plain, swapped, (), inputs).logits.square().mean().backward()
    for i in range(K) if gradients == "global" else [1]:
        for n, p in adapters.named_parameters():
            stack, e, shard, side = n.rsplit(".", 3)
            if shard == f"shard{i}":
                expected = leaves[stack, i]["dA dB".split().index(side)].grad[int(e)]
                near = 1e-7 + 1e-5 * float(expected.abs().max())
                torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=near)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_less_is_adapted_than_by_peft_and_the_folder_loads(name):
    row = bench().measure(name)
    assert row["step0"] and row["saved"] and row["moved"] == row["layers"]
    assert row["loss"][-1] < row["loss"][0]
    assert row["share"] > 0.95 and row["share"] > row["peft"] - 0.02    # PEFT takes routers, no linear layers


# ---- What is selected --------------------------------------------------------------------------------------

ALL = {f"experts.{key}.{e}" for key in ("up", "down") for e in range(E)}
NAMED = "a 3-D parameter (experts), 44.9% of the model"


@pytest.mark.parametrize("arguments, found, skipped", [
    ({}, {"first"} | ALL, {}),
    (dict(targets="experts"), ALL, {"first": "not in targets"}),
    (dict(targets=["experts.up"]), {n for n in ALL if "up" in n},
     {"first": "not in targets", "experts.down": NAMED}),
    (dict(targets=["up", "first"]), {"first"} | {n for n in ALL if "up" in n}, {"experts.down": NAMED}),
    (dict(exclude="experts"), {"first"}, {"experts.up": "in exclude", "experts.down": "in exclude"}),
    (dict(exclude=["down"]), {"first"} | {n for n in ALL if "up" in n}, {"experts.down": "in exclude"}),
    (dict(exclude=["experts.up.3"]), {"first"} | {n for n in ALL if "down" in n},
     {"experts.up": "in exclude"}),
    (dict(targets=["first"]), {"first"}, {"experts.up": NAMED, "experts.down": NAMED}),
])  # fmt: skip
def test_suffixes_select_modules_parameters_and_experts(arguments, found, skipped):
    adapters = hd_pissa_extra.attach(Mixture(), R, init="random", **arguments)
    assert {slot.name for slot in adapters.slots} == found
    assert adapters.skipped == skipped


def test_what_is_left_out_is_named_with_the_reason():
    model = Mixture()
    model.other = nn.Module()
    model.other.table = nn.Parameter(torch.zeros(3, 8, 8, dtype=torch.float64))     # it is not called experts
    model.more_experts = copy.deepcopy(model.experts)
    model.more_experts.up = model.experts.up
    model.own_experts = copy.deepcopy(model.experts)
    model.own_experts.forward = lambda *args: None
    skipped = hd_pissa_extra.attach(model, R, init="random").skipped
    assert skipped.pop("other.table").startswith("a 3-D parameter")
    own, tied = "a forward of its own", "tied weight"
    assert skipped == {"experts.up": tied, "more_experts.up": tied,
                       "own_experts.up": own, "own_experts.down": own}
    text = refused(lambda: hd_pissa_extra.attach(Mixture(), 11, init="random", targets="experts"))
    assert "experts.up is (4, 12, 10): K r = 11" in text and "it has 10" in text
    model = Mixture()
    model.first = nn.Linear(WIDTH, 30).double()
    model.second = nn.Linear(30, 30).double()
    said = hd_pissa_extra.attach(model, 11, init="random").skipped
    assert said == {"first": "fewer than K r = 11 components", "experts.up": "fewer than K r = 11 components",
                    "experts.down": "fewer than K r = 11 components"}
    text = refused(lambda: hd_pissa_extra.attach(Mixture(), 2, targets="expert"))
    assert "'expert' (targets, exclude) ends no linear layer's name" in text


def test_an_expert_without_rank_is_refused_with_a_remedy():
    model = Mixture()
    with torch.no_grad():
        model.experts.up[2] = 0
    text = refused(lambda: hd_pissa_extra.attach(model, R, shards=K))
    assert "experts.up.2" in text and "exclude=['.experts.up.2']" in text
    assert hd_pissa_extra.attach(model, R, shards=K, exclude=[".experts.up.2"]).skipped == {
        "experts.up": "in exclude"}


def test_experts_that_train_whole_are_not_adapted():
    model = Mixture()
    adapters = hd_pissa_extra.attach(model, R, shards=K, also="experts.up")
    assert adapters.skipped == {"experts.up": "in exclude"} and model.experts.up.requires_grad
    before = model.matrices()
    assert all(not torch.equal(a, b) for a, b in zip(before, train(model, adapters)))


# ---- What is refused, and what works as on the plain module ------------------------------------------------

def replaced(model, adapters):
    model.experts = copy.deepcopy(model.experts)

def trainable(model, adapters):
    model.experts.down.requires_grad_(True)

def cast(model, adapters):
    model.float()

def tied(model, adapters):
    model.other = nn.Module()
    model.other.W = model.experts.up

def parametrized(model, adapters):
    nn.utils.parametrize.register_parametrization(model.experts, "up", nn.Identity())


@pytest.mark.parametrize("change, words", [
    (replaced, "experts.up.0.weight is of a layer that was replaced"),
    (trainable, "experts.down.0.weight was made trainable"),
    (cast, "was Parameter torch.float64"), (tied, "is another module's too"),
    (parametrized, "experts.up.0.weight is no parameter any more"),
])  # fmt: skip
def test_a_merge_that_would_not_reach_the_stack_is_refused(change, words):
    model = Mixture()
    adapters = hd_pissa_extra.attach(model, R, shards=K, init="random", targets="experts")
    change(model, adapters)
    for i in range(K):
        with adapters.shard(i):
            adapters.slots[0].leaves[i][0].grad = torch.ones_like(adapters.slots[0].leaves[i][0])
    before = model.experts.up.detach().clone()
    assert words in refused(adapters.merge_)
    assert torch.equal(model.experts.up, before)


def sharded():
    from torch.distributed.fsdp import fully_shard
    said = []
    model = Mixture(dtype=torch.float32)
    adapters = hd_pissa_extra.attach(model, R, shards=K, init="random")
    said.append(refused(lambda: hd_pissa_extra.shard_over_processes(model, torch.device("cpu"))))
    fully_shard(model)
    x, chosen = rows(0)
    model(x.float(), chosen).square().mean().backward()
    return [*said, refused(adapters.merge_)]


def test_sharded_stacks_are_refused(tmp_path):
    for flag, merge in spawn(2, sharded, tmp_path):
        assert "experts.up.0.weight is sharded, but experts cannot be" in merge and "exclude" in merge
        assert "--shard_weights: experts cannot be sharded" in flag and "--targets" in flag


def test_dropout_of_experts_is_refused_with_a_remedy():
    """A layer that is called as a stack is keeps its place in the remedy."""
    def model():
        mixture = Mixture()
        mixture.dense = nn.Module()
        mixture.dense.up = nn.Linear(WIDTH, WIDTH).double()
        return mixture

    text = refused(lambda: hd_pissa_extra.attach(model(), R, dropout=0.1))
    assert "the input of one expert is not known" in text
    assert text.endswith("exclude=['experts'], or --targets dense.up,first")
    for remedy in (dict(exclude=["experts"]), dict(targets=["dense.up", "first"])):
        adapters = hd_pissa_extra.attach(model(), R, dropout=0.1, **remedy)
        assert [slot.name for slot in adapters.slots] == ["first", "dense.up"]


def test_a_run_knows_before_its_svd_what_it_cannot_do():
    from training import models
    layers, _ = hd_pissa_extra.find_layers(Mixture())
    no = SimpleNamespace(shard_weights=False, export_lora=False)
    models.check_layers(no, None, layers)
    shard = SimpleNamespace(shard_weights=True, export_lora=False)
    assert refused(lambda: models.check_layers(shard, None, layers)).endswith("--targets first")
    models.check_layers(shard, None, layers[:1])


def test_second_derivatives_a_forgotten_merge_and_a_second_attach_are_refused():
    model, (x, chosen) = Mixture(), rows(0)
    adapters = hd_pissa_extra.attach(model, R, targets="experts")
    loss = model(x, chosen).square().mean()
    text = refused(lambda: torch.autograd.grad(loss, adapters.parameters(), create_graph=True,
                                               allow_unused=True), NotImplementedError)
    assert "first derivatives alone" in text
    assert "already" in refused(lambda: hd_pissa_extra.attach(model, R, targets="experts"))
    model(x, chosen).square().mean().backward()
    torch.optim.SGD(adapters.parameters(), 0.1).step()
    assert "not merged" in refused(lambda: model(x, chosen))
    adapters.merge_()


def test_a_backward_after_the_merge_is_refused_as_on_a_plain_layer():
    model, (x, chosen) = Mixture(), rows(0)
    adapters = hd_pissa_extra.attach(model, R, targets="experts")
    loss = model(x, chosen).square().mean()
    loss.backward(retain_graph=True)
    torch.optim.SGD(adapters.parameters(), 0.1).step()
    adapters.merge_()
    assert "modified" in refused(loss.backward, RuntimeError)


def test_to_everybody_else_the_module_is_the_plain_one():
    """Its parameter, keys, pickles and copies; detach_ gives the class back, and may be called twice."""
    model, (x, chosen) = Mixture(), rows(0)
    keys = list(model.state_dict())
    adapters = hd_pissa_extra.attach(model, R, shards=K)
    trained, expected = train(model, adapters), model(x, chosen)
    assert list(model.state_dict()) == keys and type(model.experts.up) is nn.Parameter
    assert isinstance(model.experts, Experts) and type(model.experts) is not Experts
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
                  torch.load(file, weights_only=False)):  # fmt: skip
        assert type(other.experts) is Experts and not hasattr(other.experts, "hd_pissa")
        assert torch.equal(other(x, chosen), expected)
    for _ in range(2):
        adapters.detach_()
        assert type(model.experts) is Experts and not hasattr(model.experts, "hd_pissa")
    assert torch.equal(model(x, chosen), expected) and not model(x, chosen).requires_grad
    assert all(torch.equal(a, b) for a, b in zip(trained, model.matrices()))


def test_a_forward_in_another_thread_changes_nothing(monkeypatch):
    """It begins before this one reads the stack, and ends in between: this one's gradients are all there."""
    model, (x, chosen), inside, ended = Mixture(), rows(0), threading.Event(), threading.Event()
    adapters = hd_pissa_extra.attach(model, R, targets="experts")
    model(x, chosen).square().mean().backward()
    expected = [p.grad.clone() for p in adapters.parameters()]
    adapters.next_step()
    one, in_time = Experts.apply_one, []

    def paused(self, x, e):
        if threading.current_thread() is other:
            inside.set()
            in_time.append(ended.wait(30))
        elif not inside.is_set():
            other.start()
            in_time.append(inside.wait(30))
        return one(self, x, e)

    monkeypatch.setattr(Experts, "apply_one", paused)
    other = threading.Thread(target=lambda: model(x, chosen).square().mean().backward())
    with torch.no_grad():
        model(x, chosen)
    ended.set()
    other.join(30)
    assert len(in_time) > 1 and all(in_time)
    assert all(torch.equal(p.grad, g) for p, g in zip(adapters.parameters(), expected))


def test_the_stack_is_muted_once_a_forward(monkeypatch):
    """Not once an expert: dW of all experts comes back in one piece."""
    model, (x, chosen), calls = Mixture(), rows(0), []
    hd_pissa_extra.attach(model, R)
    apply = hd_pissa_extra.MuteExperts.apply
    monkeypatch.setattr(hd_pissa_extra.MuteExperts, "apply",
                        lambda *args: calls.append(1) or apply(*args))
    model(x, chosen)
    assert len(calls) == 2 and len(chosen.unique()) > 2
    model(x, chosen)
    with torch.no_grad():
        model(x, chosen)
    assert len(calls) == 4


def test_the_shard_is_that_of_the_forward():
    """A backward behind the context trains it too."""
    model, (x, chosen), found = Mixture(), rows(0), []
    adapters = hd_pissa_extra.attach(model, R, shards=K, targets="experts")
    for inside in (True, False):
        adapters.next_step()
        with adapters.shard(1):
            loss = model(x, chosen).square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append([p.grad for p in adapters.parameters()])
    half = len(found[0]) // 2
    assert all(p is None for grads in found for p in grads[:half])
    assert all(torch.equal(a, b) for a, b in zip(found[0][half:], found[1][half:]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same(reentrant):
    plain, again = Mixture(), Mixture()
    a, b = (hd_pissa_extra.attach(model, R, shards=K) for model in (plain, again))

    def recomputed(x, chosen):
        return checkpoint(again, x.requires_grad_(), chosen, use_reentrant=reentrant)

    for x, y in zip(train(plain, a), train(again, b, call=recomputed)):
        assert torch.equal(x, y)


def test_autocast_is_the_frozen_models_and_leaves_float32_gradients():
    """Also where the backward runs under it: what autocast would do to the products of dW is not wanted."""
    model, (x, chosen) = Mixture(dtype=torch.float32).requires_grad_(False), rows(0)
    with torch.autocast("cpu", torch.bfloat16):
        frozen = model(x.float(), chosen)
    adapters = hd_pissa_extra.attach(model, R, targets="experts")

    def gradients(autocast, inside):
        adapters.next_step()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(x.float(), chosen)
            loss = out.float().square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert torch.equal(out, frozen) == autocast
        return [p.grad for p in adapters.parameters()]

    coarse, within, fine = gradients(True, False), gradients(True, True), gradients(False, False)
    for a, b, c in zip(coarse, within, fine):
        assert a.dtype == torch.float32 and torch.equal(a, b)
        assert 0 < (a - c).norm() < 0.03 * c.norm()


def test_an_expert_without_tokens_stays_and_is_no_fault():
    model = Mixture()
    before, adapters = model.matrices(), hd_pissa_extra.attach(model, R, shards=K)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = train(model, adapters, experts=3)
    model(*rows(0, experts=3)).square().mean().backward()
    zeros = {slot.name for slot in adapters.slots if not any(p.grad.any() for p in slot.leaves[0])}
    assert zeros == {"experts.up.3", "experts.down.3"}, "zeros, as of any tensor: Adam's momentum goes on"
    adapters.next_step()
    assert [torch.equal(a, b) for a, b in zip(before, after)] == 2 * [False, False, False, True]
    assert not any(torch.equal(a, b) for a, b in zip(after, train(model, adapters)))


@pytest.mark.parametrize("rank, shards", [(1, 2), (2, 2)])
def test_one_update_of_an_expert_has_rank_2_k_r(rank, shards):
    model = Mixture()
    before, adapters = model.matrices(), hd_pissa_extra.attach(model, rank, shards=shards)
    for a, b in zip(before, train(model, adapters, steps=1)):
        assert hd_pissa.effective_rank(hd_pissa.update_spectrum(a, b), 1e-9) == 2 * rank * shards


@pytest.mark.parametrize("gradients", ["local", "global"])
def test_a_basis_from_a_seed_is_drawn_once(gradients, monkeypatch):
    """However many experts there are and shards that take turns: signs and orders of every layer are drawn in
    the first step, kept in a byte a row and four a column of A_i, B_i, and go with the adapters."""
    draw, calls = hd_pissa_extra.ingredients, []
    monkeypatch.setattr(hd_pissa_extra, "ingredients", lambda *args: calls.append(draw(*args)) or calls[-1])
    model = Mixture()
    adapters = hd_pissa_extra.attach(model, R, shards=K, init="random", gradients=gradients)
    train(model, adapters, steps=2)
    assert len(calls) == len(adapters.slots) == 1 + 2 * E
    held = sum(part.nbytes for drawn in calls for side in drawn for part in side[:2])
    assert held == sum(slot.m + slot.n + 2 * 4 * K * R for slot in adapters.slots)
    last = weakref.ref(calls[-1][0][0])
    calls.clear()
    assert last() is not None
    adapters.detach_()
    del adapters
    gc.collect()
    assert last() is None


def test_experts_of_a_stack_are_made_together(monkeypatch):
    """One gather for all of a stack's experts, and what each gets alone."""
    model, calls = Mixture(), []
    adapters = hd_pissa_extra.attach(model, R, shards=K, init="random", targets="experts", alpha=6.0)
    columns = hd_pissa_extra.seeded_columns
    monkeypatch.setattr(hd_pissa_extra, "seeded_columns", lambda *args: calls.append(1) or columns(*args))
    model(*rows(0)).square().mean().backward()
    assert len(calls) == 2
    both = hd_pissa_extra.make_all([slot.A for slot in adapters.slots[:E]], "cpu", torch.float64)
    for e, slot in enumerate(adapters.slots[:E]):
        assert all(torch.equal(a[e], b) for a, b in zip(both, slot.A.make("cpu", torch.float64)))


# ---- W in bfloat16, checkpoints ----------------------------------------------------------------------------

def updates(dtype, rounding="exact", is_transposed=False):
    """Five merges of the same increments; every expert's weight to its last bit."""
    model = Mixture(dtype=torch.float32, is_transposed=is_transposed)
    adapters = hd_pissa_extra.attach(model, R, shards=K, dtype=dtype, rounding=rounding)
    g, start = torch.Generator().manual_seed(1), model.matrices()
    for _ in range(5):
        for leaf in adapters.parameters():
            leaf.data.copy_(2e-5 * torch.randn(leaf.shape, generator=g))
        adapters.merge_()
    return [slot.read()[0].detach().clone() for slot in adapters.slots], model, adapters, start


@pytest.mark.parametrize("is_transposed", [False, True])
def test_halves_of_a_stack_are_the_float32_experts(is_transposed):
    wide, _, _, _ = updates(None, is_transposed=is_transposed)
    halves, model, adapters, start = updates(torch.bfloat16, is_transposed=is_transposed)
    assert model.experts.up.dtype == model.experts.down.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(wide, halves))
    assert all(slot.low.any() for slot in adapters.slots)
    state, lows = adapters.state_dict(), [slot.low.clone() for slot in adapters.slots]
    for slot in adapters.slots:
        slot.low.zero_()
    adapters.load_state_dict(state)
    assert all(torch.equal(slot.low, low) for slot, low in zip(adapters.slots, lows))


def test_stochastic_rounding_keeps_two_bytes_a_weight():
    _, model, adapters, start = updates(torch.bfloat16, "stochastic")
    assert model.experts.up.dtype == torch.bfloat16
    assert all(slot.low is None for slot in adapters.slots)
    moved = [(a != b.bfloat16()).float().mean() for a, b in zip(model.matrices(), start)]
    assert all(0 < share < 0.5 for share in moved), "a few numbers, to a neighbour"


@pytest.mark.parametrize("assign", [False, True])
def test_another_stack_that_is_loaded_trains_without_the_old_rest(assign):
    """In place or another parameter: as on a plain layer the new W trains, and the old low halves go."""
    _, model, adapters, _ = updates(torch.bfloat16)
    new = {name: 2 * p.detach() for name, p in model.state_dict().items()}
    model.load_state_dict(new, assign=assign)
    model.requires_grad_(False)         # which assign= brings back
    for leaf in adapters.parameters():
        leaf.data.fill_(1e-9)
    with pytest.warns(UserWarning, match="experts.up.0.weight was loaded or swapped"):
        adapters.merge_()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, new[name], rtol=1e-2, atol=1e-6)
    assert all(slot.low.abs().float().mean() < 2**13 for slot in adapters.slots)


def test_replicas_are_compared_and_a_run_goes_on(tmp_path):
    """The adapters' state and the model's bring back all: as if it had not stopped."""
    from training import checkpoint as saved
    half = Mixture()
    adapters = hd_pissa_extra.attach(half, R, shards=K)
    assert not any(cut for *_, cut in saved.trained(adapters)), "a part of a stack is no slice of a sharded W"
    train(half, adapters, 2)
    state, weights = adapters.state_dict(), copy.deepcopy(half.state_dict())
    expected = train(half, adapters, 2, start=2)
    other = Mixture()
    again = hd_pissa_extra.attach(other, R, shards=K, decompose=None)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(expected, train(other, again, 2, start=2)))


# ---- A run as a LoRA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, rank, name", [
    ({}, None, "Mixtral"), (dict(targets=["gate_up_proj"]), 3, "gpt-oss"),
    (dict(exclude="down_proj", init="random"), None, "OLMoE")])  # fmt: skip
def test_peft_loads_the_lora_of_experts(name, options, rank, tmp_path):
    """Oracle: the weights that PEFT merges are the trained ones, but for the error that is reported."""
    from peft import PeftModel
    model, inputs = family(name)
    base = copy.deepcopy(model).requires_grad_(False)
    adapters = hd_pissa_extra.attach(model, R, shards=K, accumulate=True, **options)
    bench().steps(model, adapters, name)
    error = hd_pissa_extra.export_lora(adapters, tmp_path / "lora", base.state_dict(), rank=rank)
    assert 0 < error < (0.08 if rank is None else 0.7)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    merged = dict(loaded.merge_and_unload().named_parameters())
    there, trained = ({key for key, W in weights.items() if not torch.equal(W, base.get_parameter(key))}
                      for weights in (merged, dict(model.named_parameters())))
    assert there == trained and any("experts" in key for key in there)
    off, moved = (torch.cat([(merged[key] - other.get_parameter(key)).flatten() for key in there]).norm()
                  for other in (model, base))  # fmt: skip
    assert off / moved == pytest.approx(error, rel=0.2)


def test_a_run_writes_the_lora_of_experts(tmp_path, capsys):
    """train.py compares what PEFT loads with the run's logits; another base is refused."""
    import families

    import train as program
    folder = mixture_folder(tmp_path / "base", "Mixtral")
    flags = families.flags(folder, "--export_lora", "--out", tmp_path / "out")
    result = program.main(flags)
    assert 0 < result["lora_error"] < 0.05 and "in PEFT its logits are" in capsys.readouterr().out
    model, sums = program.load_model(str(folder), 0)[0], {"model.layers.0.mlp.experts.down_proj.1": 0}
    with pytest.raises(ValueError, match="experts.down_proj.1.weight differs"):
        program.models.export(program.parse(flags), model, None, sums, [([1, 2], 1)], "cpu",
                              program.load_model)  # fmt: skip


# ---- What a run of it needs, counted without weights -------------------------------------------------------


def mixture_folder(path, name):
    """A tiny member of the bench's family with tokenizer and rows, as files."""
    import families
    families.folder(path, "llama")
    bench().build(name, vocab_size=families.VOCABULARY).save_pretrained(path)
    return path


class Peak(TorchDispatchMode):
    """The most bytes that lived at once, of those made inside."""

    def __init__(self):
        super().__init__()
        self.live, self.most, self.sizes = 0, 0, {}

    def gone(self, key):
        self.live -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def storages(tree):
            return {t.untyped_storage()._cdata: t.untyped_storage() for t in tree_leaves(tree)
                    if isinstance(t, torch.Tensor)}

        taken, out = storages((args, kwargs)), function(*args, **(kwargs or {}))
        for key, storage in storages(out).items():
            if key not in taken.keys() | self.sizes.keys():
                self.sizes[key] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self.gone, key)
        self.most = max(self.most, self.live)
        return out


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
def test_a_dry_run_counts_experts(name, tmp_path, capsys):
    """Oracle: what attach, a backward and AdamW hold, and what autograd keeps of a real forward."""
    import families

    import train as program
    folder = mixture_folder(tmp_path, name)
    said = program.main(families.flags(folder, "--dry_run", "--micro_batch_size", 4, "--also", "model.norm"))
    memory, words = list(said["memory"].values()), capsys.readouterr().out
    model, _, _ = program.load_model(str(folder), 0)
    adapters, kept = hd_pissa_extra.attach(model, R, shards=K, also=["model.norm"]), {}
    layers, weights = repr(adapters).split()[1:5:2]
    assert f"{weights} of them in {layers} adapted layers" in words
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def keep(t):
        if t.untyped_storage()._cdata not in own:
            kept[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    x = torch.full((4, int(words.split("(4 rows of ")[1].split()[0])), 7)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        logits = hd_pissa.logits_of(model.train(), x)
        loss = F.cross_entropy(logits.flatten(0, 1), x.flatten(), reduction="sum")
    assert memory[-1] == sum(storage.nbytes() for storage in kept.values()) + 2 * logits.nbytes
    loss.backward()
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-3, weight_decay=0.0)
    optimizer.step()
    norm = model.get_parameter("model.norm.weight")
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
    assert memory[2] == adapters.basis.nbytes and memory[3] == memory[4] == adapters.increments.nbytes
    assert memory[5] == K * (moments - 2 * norm.nbytes) and memory[-3] == 3 * norm.nbytes


@pytest.mark.parametrize("options", [{}, dict(gradients="global", init="random")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_of_a_stack_takes_what_the_dry_run_says(dtype, options):
    """Beside the gradients that stay: dW and factors of the larger stack, to 3 %."""
    from training.dry_run import saved_bytes
    bench()
    import transformers
    width, hidden, number, r = 256, 192, 16, 8
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=hidden, num_experts=number, num_experts_per_tok=2,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=64,
        max_position_embeddings=64)).to(dtype)  # fmt: skip
    x, columns = torch.arange(16)[None], r * (4 if options else 1)
    plain = copy.deepcopy(model)
    _, beside = saved_bytes(plain, hd_pissa_extra.find_layers(plain)[0], x, False, columns=columns)
    hd_pissa_extra.attach(model, r, shards=4, decompose=hd_pissa.components, **options)
    loss = model(x).logits.square().mean()
    with Peak() as peak:
        loss.backward()
    stay = 4 * columns * number * (width + 2 * hidden + hidden + width)
    assert beside > 1.3 * number * width * 2 * hidden * dtype.itemsize or not options, "factors matter here"
    assert peak.most == pytest.approx(beside + stay, rel=0.03)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["the small GPT", "Qwen3-MoE"])
def test_what_a_forward_keeps_is_what_the_dry_run_says(name, checkpointed):
    """With --gradient_checkpointing too: the bytes that live behind a forward to 2 %, the most in a backward
    to 15 %, as gradients of activations are not counted."""
    from training.dry_run import saved_bytes
    from training.models import checkpoint_activations
    if name == "the small GPT":
        from train import GPT
        model = GPT(64, layers=6)
    else:
        model = bench().build(name, num_hidden_layers=6, hidden_size=64, use_cache=False)
    model, x = model.train(), torch.arange(4 * 64).view(4, 64) % 64
    plain = copy.deepcopy(model)
    kept, beside = saved_bytes(plain, hd_pissa_extra.find_layers(plain)[0], x, False, columns=R,
                               checkpointed=checkpointed)  # fmt: skip
    if checkpointed:
        checkpoint_activations(model)
    hd_pissa_extra.attach(model, R, decompose=hd_pissa.components)

    def loss():
        return F.cross_entropy(hd_pissa.logits_of(model, x).flatten(0, 1), x.flatten(), reduction="sum")

    with Peak() as peak:
        loss, live, peak.most = loss(), peak.live, 0
        loss.backward()
    assert live == pytest.approx(kept, rel=0.02)
    assert 0.85 < (kept + beside) / peak.most < 1


def test_checkpointing_shows_in_a_dry_run(tmp_path):
    import train as program
    flags = ["--threads", "1", "--out", str(tmp_path), "--dry_run"]
    one, other = (list(program.main([*flags, *more])["memory"].values())[-1]
                  for more in ([], ["--gradient_checkpointing"]))
    assert other < 0.5 * one


def test_a_loop_over_experts_that_have_tokens_is_told(tmp_path, capsys, monkeypatch):
    """Which those are tensors without numbers do not say: activations are unknown, the rest is printed."""
    import families
    from transformers import PreTrainedModel

    import train as program
    monkeypatch.setattr(PreTrainedModel, "get_correct_experts_implementation", lambda *args: "eager")
    folder = mixture_folder(tmp_path, "Mixtral")
    assert program.main(families.flags(folder, "--dry_run"))["memory"]
    words = capsys.readouterr().out
    assert "activations (unknown: the forward depends on its tokens)" in words
    assert "fits: the sum, without activations, against" in words
    with pytest.raises(SystemExit):
        program.main(families.flags(folder, "--dry_run", "--shard_weights"))
    assert "experts in 3-D parameters cannot be sharded" in capsys.readouterr().err


def test_a_dry_run_reads_the_rows_as_the_run_does(tmp_path, capsys):
    import families

    import train as program
    with pytest.raises(SystemExit):
        program.main(families.flags(mixture_folder(tmp_path, "Mixtral"), "--dry_run", "--format", "sharegpt"))
    assert "no text in 'conversations'" in capsys.readouterr().err


def test_a_recipe_knows_experts(tmp_path, capsys):
    """Before a weight is read: as --targets, and where K r is too large for them."""
    import families

    import train as program
    flags = families.flags(mixture_folder(tmp_path, "Mixtral"), "--dry_run", "--recipe", "best", "--targets",
                           "experts")  # fmt: skip
    program.main(flags)
    assert " in 16 adapted layers" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        program.main([*flags, "--rank", "20"])
    assert "largest rank of each kind of layer is down_proj 16, gate_up_proj 16" in capsys.readouterr().err
