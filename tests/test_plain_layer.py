"""An attached layer is the plain layer in all that a program does to it, or one sentence says what to do.

Oracle: the same program on the plain frozen layer, or on weights written out by hand.
"""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import toy

import hd_pissa
import hd_pissa_extra

X = torch.randn((2, 5, 12), generator=torch.Generator().manual_seed(0))


def conv1d(n: int, m: int):
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(n, m)


LAYERS = {"linear": lambda: nn.Linear(12, 16), "no bias": lambda: nn.Linear(12, 16, bias=False),
          "conv1d": lambda: conv1d(16, 12)}  # fmt: skip
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def made(make) -> nn.Module:
    torch.manual_seed(0)
    return make()


def small(dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10)).to(dtype)


def adamw(adapters, lr=1e-2, **options):
    return torch.optim.AdamW(adapters.parameters(), lr, weight_decay=0.0, **options)


def step(model, adapters, optimizer, x=X):
    model(x).square().mean().backward()
    optimizer.step()
    adapters.merge_()


def weights(model) -> list[torch.Tensor]:
    return [layer.weight.detach().clone() for layer in model if hasattr(layer, "weight")]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def refused(work, kind=ValueError) -> str:
    with pytest.raises(kind) as error:
        work()
    return str(error.value)


# ---- In a program ------------------------------------------------------------------------------------------


@each_layer
@pytest.mark.parametrize("change", [
    lambda y: y.mul_(2), lambda y: F.relu(y, inplace=True), lambda y: y.add_(y),
    lambda y: y.clamp_(-0.5, 0.5)])  # fmt: skip
def test_in_place_operations_on_the_output(make, change):
    """Output and dX are those of the plain layer, bit for bit."""
    results = []
    for attach in (False, True):
        layer, x = made(make).requires_grad_(False), X.clone().requires_grad_()
        if attach:
            hd_pissa.attach(nn.Sequential(layer), 2)
        y = change(layer(x))
        y.sum().backward()
        results.append((y.detach(), x.grad))
    assert same(*results)


@each_layer
@pytest.mark.parametrize("shape", [(12,), (3, 12), (0, 12), (2, 3, 4, 12)])
def test_inputs_of_any_shape(make, shape):
    """One vector, none at all, many dimensions, not contiguous: as the plain layer."""
    x = torch.randn(shape[::-1], generator=torch.Generator().manual_seed(1)).permute(*range(len(shape))[::-1])
    x = x.contiguous() if make is LAYERS["conv1d"] else x           # the plain Conv1D refuses the other
    layer = made(make)
    expected = layer(x).detach()
    adapters = hd_pissa.attach(nn.Sequential(layer), 2)
    y = layer(x)
    assert torch.equal(y.detach(), expected)
    y.sum().backward()
    grads = [p.grad for p in adapters.parameters()]
    A, B = (adapters.state_dict()[f"0.shard0.{kind}"] for kind in "AB")
    X2, dY = x.reshape(-1, 12), torch.ones(x.numel() // 12, 16)
    torch.testing.assert_close(grads[0], X2.T @ (dY @ B.T), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads[1], (X2 @ A).T @ dY, rtol=1e-4, atol=1e-4)


def test_keyword_input():
    layer = made(LAYERS["linear"])
    expected = layer(X).detach()
    hd_pissa.attach(nn.Sequential(layer), 2)
    assert torch.equal(layer(input=X).detach(), expected)


def test_hooks_of_the_layer_see_what_they_saw():
    seen = []
    for attach in (False, True):
        layer = made(LAYERS["linear"])
        layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output.detach())))
        if attach:
            hd_pissa.attach(nn.Sequential(layer), 2)
        layer(X)
    assert same(*seen)


@each_layer
@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy", "copy of the layer"])
def test_a_copy_is_the_plain_model_with_what_was_merged(make, how):
    """Of the plain class, with W as it is now, attachable itself; training it leaves the original alone."""
    layer = made(make)
    model, kind = nn.Sequential(layer, nn.Tanh()), type(layer)
    adapters = hd_pissa.attach(model, 2)
    step(model, adapters, adamw(adapters))
    if how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    elif how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        other = nn.Sequential(copy.deepcopy(layer), nn.Tanh())
    assert type(other[0]) is kind and not hasattr(other[0], "hd_pissa") and type(layer) is not kind
    assert torch.equal(other(X), model(X).detach()) and not any(p.requires_grad for p in other.parameters())
    before = layer.weight.clone()
    again = hd_pissa.attach(other, 2)
    step(other, again, adamw(again))
    assert torch.equal(layer.weight, before) and not torch.equal(other[0].weight, before)
    step(model, adapters, adamw(adapters))
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_layer_that_is_compiled_in_place_calls_its_own_weights(how):
    """Module.compile() keeps a bound method of the layer, which nn.Module leaves out of copies."""
    model = small()
    model[0].compile(backend="aot_eager")
    hd_pissa.attach(model, 2)
    copied = how(model)
    with torch.no_grad():
        model[0].weight.add_(1)
        expected = F.linear(X, copied[0].weight, copied[0].bias)
        torch.testing.assert_close(copied[0](X), expected)


def test_detached_it_is_the_plain_layer_and_is_freed():
    model = small()
    adapters = hd_pissa.attach(model, 2)
    step(model, adapters, adamw(adapters))
    expected = model(X).detach()
    adapters.detach_()
    assert type(model[0]) is nn.Linear and not hasattr(model[0], "hd_pissa")
    assert torch.equal(model(X).detach(), expected)
    gone = weakref.ref(adapters)
    del adapters
    gc.collect()
    assert gone() is None


@each_layer
def test_second_derivatives_are_refused(make):
    """A gradient penalty would train without the adapter's share; keeping the graph alone is fine."""
    layer, x = made(make), X.clone().requires_grad_()
    adapters = hd_pissa.attach(nn.Sequential(layer), 2)

    def penalty():
        dX, = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
        dX.square().sum().backward()

    text = refused(penalty, NotImplementedError)
    assert "first derivatives alone" in text and "adapters.detach_()" in text
    y = layer(x).sin().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)
    assert same(first, torch.autograd.grad(y, x))
    adapters.detach_()
    penalty()


# ---- Precision, modes and scalers --------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["hd_pissa", "hd_pissa_extra"])
@pytest.mark.parametrize("exchange", ["all_gather", "all_reduce"])
def test_autocast_around_everything_is_autocast_around_the_forward(where, exchange):
    """attach, clipping and merge_ inside too: bit for bit, so W has got every digit of its update."""
    results = []
    for inside in (False, True):
        model = small()
        around = torch.autocast("cpu", torch.bfloat16, enabled=inside)
        with around:
            extra = {"bucket_mb": 1} if where == "hd_pissa_extra" else {}
            adapters = toy.attach(model, 2, exchange=exchange, **extra)
            optimizer = adamw(adapters, 1e-4)
            for _ in range(3):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(X).float().square().mean()
                loss.backward()
                adapters.clip_grad_norm_(1e-2)
                optimizer.step()
                adapters.merge_()
        results.append(weights(model))
    assert same(*results) and not same(results[0], weights(small()))


@each_layer
def test_autocast_gives_the_plain_layers_output_and_dX(make):
    results = []
    for attach in (False, True):
        layer, x = made(make).requires_grad_(False), X.clone().requires_grad_()
        if attach:
            hd_pissa.attach(nn.Sequential(layer), 2)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().sin().sum().backward()
        results.append((y.detach(), x.grad))
    assert same(*results)


def test_inference_mode():
    """A forward under it is the plain one and disturbs no training; attach may stand under it."""
    plain, results = small(), []
    with torch.inference_mode():
        expected = plain(X)
    for between in (False, True):
        model = small()
        adapters = hd_pissa.attach(model, 2)
        optimizer = adamw(adapters)
        step(model, adapters, optimizer)
        if between:
            with torch.inference_mode():
                model(X)
            with torch.no_grad():
                model(X)
        step(model, adapters, optimizer)
        results.append(weights(model))
    assert same(*results)
    with torch.inference_mode():
        adapters = hd_pissa.attach(plain, 2)
        assert torch.equal(plain(X), expected)
    step(plain, adapters, adamw(adapters))


def test_a_model_made_under_inference_mode_is_refused():
    with torch.inference_mode():
        model = small()
    assert "inference" in refused(lambda: hd_pissa_extra.attach(model, 2))


def test_a_gradient_scaler_that_leaves_steps_out():
    """Its first steps overflow by design: W stays, no complaint, and then it trains as a scale of 1 would."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10))
    adapters = hd_pissa.attach(model, 2)
    optimizer = adamw(adapters)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 40, growth_interval=10 ** 6)
    moved, before = [], weights(model)
    for _ in range(40):
        with torch.autocast("cpu", torch.float16):
            loss = model(X).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        adapters.merge_()
        moved.append(not same(before, before := weights(model)))
    skipped = moved.index(True)
    assert 3 <= skipped < 30 and all(moved[skipped:]), "steps are left out first, then none"
    reference = small()
    other = hd_pissa.attach(reference, 2)
    optimizer = adamw(other)
    for _ in range(40 - skipped):
        with torch.autocast("cpu", torch.float16):
            loss = reference(X).float().square().mean()
        (256 * loss).backward()
        for p in other.parameters():
            p.grad /= 256
        optimizer.step()
        other.merge_()
    for a, b, start in zip(before, weights(reference), weights(small())):
        assert (a - b).norm() < 0.05 * (b - start).norm()


# ---- Gradients ---------------------------------------------------------------------------------------------


def test_gradients_that_the_user_fills_in():
    """autograd.grad, changed or averaged by hand and put into .grad, is a backward."""
    results = []
    for by_hand in (False, True):
        model = small()
        adapters = hd_pissa.attach(model, 2)
        optimizer = adamw(adapters)
        for _ in range(3):
            loss = model(X).square().mean()
            if by_hand:
                grads = torch.autograd.grad(loss, adapters.parameters())
                for p, g in zip(adapters.parameters(), grads):
                    p.grad = g
            else:
                loss.backward()
            optimizer.step()
            adapters.merge_()
        results.append(weights(model))
    assert same(*results)


def test_a_loop_that_zeroes_the_model_alone():
    """merge_ drops the gradients it has used: the next step's are not added to them."""
    results = []
    for zero in ("optimizer", "model", "nothing"):
        model = small()
        adapters = hd_pissa.attach(model, 2)
        optimizer = torch.optim.SGD(adapters.parameters(), 1e-2, momentum=0.9)
        for _ in range(3):
            step(model, adapters, optimizer)
            {"optimizer": optimizer.zero_grad, "model": model.zero_grad, "nothing": lambda: None}[zero]()
        results.append(weights(model))
    assert same(results[0], results[1]) and same(results[0], results[2])


@pytest.mark.parametrize("kind", ["foreach", "fused", "forloop"])
def test_reloaded_moments_of_any_layout(kind):
    """Contiguous, as another program stores them, or as they were: the step is the same.

    Fused kernels pair numbers by their place in memory, so increments have to lie as such a file does.
    """
    options = {} if kind == "forloop" else {kind: True}
    results = []
    for reload in (None, "as it was", "contiguous"):
        model = small()
        adapters = hd_pissa.attach(model, 2)
        optimizer = adamw(adapters, **options)
        step(model, adapters, optimizer)
        if reload:
            state = copy.deepcopy(optimizer.state_dict())
            for moments in state["state"].values():
                for name in ("exp_avg", "exp_avg_sq"):
                    moments[name] = moments[name].contiguous() if reload == "contiguous" else moments[name]
            optimizer = adamw(adapters, **options)
            optimizer.load_state_dict(state)
        step(model, adapters, optimizer)
        results.append(weights(model))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_threads_take_turns():
    """A second thread in shard() is refused at once: it would train the first one's shard."""
    model = small()
    adapters = hd_pissa_extra.attach(model, 2, shards=2)
    said = []

    def other():
        try:
            with adapters.shard(1):
                pass
        except ValueError as e:
            said.append(str(e))

    with adapters.shard(0):
        with adapters.shard(1):                         # the same thread may nest
            pass
        assert adapters.current == 0
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(said) == 1 and "another thread" in said[0] and adapters.current == 0
    other()
    assert len(said) == 1


# ---- Kinds of layers ---------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """Another layer that happens to have the name of transformers'."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.weight, self.bias = nn.Parameter(torch.randn(12, 12)), nn.Parameter(torch.zeros(12))

    def forward(self, x):
        return F.gelu(x @ self.weight.T + self.bias)


def test_a_layer_is_what_it_does_not_what_it_is_called():
    model = nn.Sequential(Conv1D(), nn.Linear(12, 12), conv1d(16, 12))
    expected = model(X).detach()
    adapters = hd_pissa.attach(model, 2)
    assert [slot.name for slot in adapters.slots] == ["1", "2"]
    assert torch.equal(model(X).detach(), expected)


@pytest.mark.parametrize("lazy", [lambda: nn.LazyLinear(10), nn.LazyBatchNorm1d], ids=["linear", "norm"])
def test_lazy_layers_are_refused_until_they_have_a_shape(lazy):
    model = nn.Sequential(nn.Linear(12, 12), lazy())
    assert "uninitialized parameter" in refused(lambda: hd_pissa.attach(model, 2))
    assert "1.weight has no shape yet: run one forward" in refused(lambda: hd_pissa_extra.attach(model, 2))
    model(X)
    assert hd_pissa_extra.attach(model, 2).slots[0].name == "0"


# ---- W that somebody changes -------------------------------------------------------------------------------


@pytest.mark.parametrize("change, words", [
    (lambda m: m.bfloat16(), "torch.bfloat16"), (lambda m: m.double(), "torch.float64"),
    (lambda m: nn.utils.parametrizations.weight_norm(m[2]), "no parameter"),
    (lambda m: setattr(m[2], "weight", nn.Parameter(torch.randn(10, 12), requires_grad=False)), "(10, 12)"),
    (lambda m: m[2].weight.requires_grad_(), "made trainable"),
    (lambda m: setattr(m.append(nn.Linear(16, 10))[3], "weight", m[2].weight), "another module's too"),
], ids=["bfloat16", "double", "parametrized", "another shape", "trainable", "tied"])  # fmt: skip
def test_w_of_another_kind_is_refused_at_the_merge(change, words):
    """It names the layer, what W is and was; nothing has been added to any W."""
    model = small()
    adapters = hd_pissa_extra.attach(model, 2)
    step(model, adapters, optimizer := adamw(adapters))
    model(X).square().mean().backward()
    optimizer.step()
    change(model)
    before = model[0].weight.detach().clone()
    text = refused(adapters.merge_)
    assert "2.weight" in text and words in text
    assert torch.equal(model[0].weight, before)


def expected_update(adapters, slot) -> torch.Tensor:
    """dU of the increments that wait for a merge, in W's layout, by the definition."""
    A, B = (t[0] for t in slot.views(adapters.basis))
    dA, dB = (t[0] for t in slot.views(adapters.increments))
    dU = ((A + dA) @ (B + dB) - A @ B).double()
    return dU if slot.conv1d else dU.T


LOADS = {
    "load_state_dict": lambda model, new: model.load_state_dict(new),
    "copy_": lambda model, new: [torch.no_grad()(p.copy_)(new[n]) for n, p in model.named_parameters()],
    "data.copy_": lambda model, new: [p.data.copy_(new[n]) for n, p in model.named_parameters()],
    "data": lambda model, new: [setattr(p, "data", new[n].clone()) for n, p in model.named_parameters()],
    "another parameter": lambda model, new: [
        setattr(model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2],
                nn.Parameter(new[n].clone(), requires_grad=False)) for n in new],
    "assign": lambda model, new: model.load_state_dict({n: t.clone() for n, t in new.items()}, assign=True),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", LOADS)
def test_weights_loaded_after_attach_are_those_that_train(dtype, how):
    """W becomes the new one plus dU; of bfloat16 halves no rest of the old W is left in it."""
    model = small(dtype)
    adapters = toy.attach(model, 2, **({"bucket_mb": 1} if dtype == torch.bfloat16 else {}))
    x, optimizer = X.to(dtype), adamw(adapters, 1e-3)
    for _ in range(3):
        step(model, adapters, optimizer, x)
    torch.manual_seed(5)
    new = {name: torch.randn_like(t) for name, t in model.state_dict().items()}
    LOADS[how](model, new)
    model.requires_grad_(False)
    exact = getattr(adapters.slots[0], "read", None)
    adapters.tensors()
    if exact:
        assert torch.equal(exact()[0], new["0.weight"].float())
    assert torch.equal(model(x), F.linear(torch.tanh(F.linear(x, new["0.weight"], new["0.bias"])),
                                          new["2.weight"], new["2.bias"]))  # fmt: skip
    model(x).float().square().mean().backward()
    optimizer.step()
    dU = expected_update(adapters, adapters.slots[0])
    adapters.merge_()
    W = exact()[0] if exact else model[0].weight
    torch.testing.assert_close(W.double(), new["0.weight"].double() + dU, rtol=1e-6, atol=1e-6)
    assert dU.abs().max() > 1e-4


def test_a_forward_of_another_dtype_than_bfloat16_weights_says_what_to_do():
    """Under autocast, or with the rest cast too, it works."""
    extra = pytest.importorskip("hd_pissa_extra")
    model = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 10))
    extra.attach(model, 2, dtype=torch.bfloat16)
    text = refused(lambda: model(X))
    assert "0 is bfloat16, its input torch.float32" in text and "autocast" in text
    text = refused(lambda: model(X.bfloat16()))
    assert "0 is bfloat16, its bias torch.float32" in text and "autocast" in text
    with torch.autocast("cpu", torch.bfloat16):
        model(X).float().sum().backward()
    model.bfloat16()(X.bfloat16())


def test_moving_the_model_to_where_it_is_changes_nothing():
    model = small()
    adapters = hd_pissa.attach(model, 2)
    optimizer = adamw(adapters)
    model.to("cpu").float().train().eval()
    step(model, adapters, optimizer)
    assert not same(weights(model), weights(small()))
