"""Oracles 1 and 3: the mute against residual PiSSA, PEFT's PiSSA and the published gamma variant."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import hd_pissa

M, N, RANK, K = 10, 14, 2, 3


def make_linear(bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(M, N, bias=bias).double()


def make_conv1d(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(N, M).double()


def inputs(*shape, seed=1):
    return torch.randn(*shape, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def objective(y):
    return (y.sin() + 0.1 * y * y).sum()


def weight_of(layer):
    return layer.weight.detach() if not isinstance(layer, nn.Linear) else layer.weight.detach().T  # (m, n)


@pytest.mark.parametrize("alpha", [None, 4.0])
@pytest.mark.parametrize("shape", [(7,), (2, 5)])
@pytest.mark.parametrize(
    "layer",
    [lambda: make_linear(True), lambda: make_linear(False), make_conv1d],
    ids=["linear", "no_bias", "conv1d"],
)
def test_gradients_equal_residual_pissa(layer, shape, alpha):
    """dA, dB and X get the gradients of Y = X (W - s A_i B_i) + s (X A_i) B_i by plain autograd."""
    layer, x = layer(), inputs(*shape).requires_grad_()
    W, bias = weight_of(layer).clone(), layer.bias
    adapters = hd_pissa.attach(nn.ModuleDict({"l": layer}), RANK, shards=K, alpha=alpha)
    factors, grads = adapters.state_dict(), dict(adapters.named_parameters())
    s = 1.0 if alpha is None else alpha / RANK
    for i in range(K):
        A, B = factors[f"l.shard{i}.A"].requires_grad_(), factors[f"l.shard{i}.B"].requires_grad_()
        y = x @ (W - s * (A @ B).detach()) + s * (x @ A) @ B + (0 if bias is None else bias)
        expected = torch.autograd.grad(objective(y), (A, B, x))
        with adapters.shard(i):
            out = layer(x)
            (dX,) = torch.autograd.grad(objective(out), x, retain_graph=True)
        objective(out).backward()  # outside the context: the shard was captured in the forward
        torch.testing.assert_close(grads[f"l.shard{i}.dA"].grad, expected[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(grads[f"l.shard{i}.dB"].grad, expected[1], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(dX, expected[2], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("conv1d", [False, True])
def test_gradcheck_of_the_residual_layer_at_zero(conv1d):
    """Numerical derivatives of X (W + s((A+dA)(B+dB) - AB)) at dA = dB = 0 equal the backward of Mute."""
    g = torch.Generator().manual_seed(0)
    shapes = ((3, M), (M, N), (M, RANK), (RANK, N))
    x, W, A, B = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    bias, s = torch.randn(N, generator=g, dtype=torch.float64), 0.7
    zA, zB = torch.zeros_like(A).requires_grad_(), torch.zeros_like(B).requires_grad_()
    x.requires_grad_()

    def by_mute(x, dA, dB):
        return hd_pissa.Mute.apply(x, W if conv1d else W.T, bias, A[None], B[None], dA, dB, s, conv1d, None)

    direction = torch.randn((3, N), generator=g, dtype=torch.float64)
    got = torch.autograd.grad((by_mute(x, zA, zB) * direction).sum(), (x, zA, zB))

    def residual(x, dA, dB):
        return x @ (W + s * ((A + dA) @ (B + dB) - A @ B)) + bias

    assert torch.autograd.gradcheck(residual, (x, zA, zB))
    expected = torch.autograd.grad((residual(x, zA, zB) * direction).sum(), (x, zA, zB))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("alpha", [4, 8])
def test_gradients_equal_peft_pissa(alpha):
    """Shard 0 of a Llama against PEFT's init_lora_weights="pissa"; sign-free products are compared, fp64."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        vocab_size=50,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    base = transformers.LlamaForCausalLM(config)
    lora = peft.LoraConfig(
        r=4, lora_alpha=alpha, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"]
    )
    theirs, base = peft.get_peft_model(copy.deepcopy(base), lora).double(), base.double()  # it wants fp32
    adapters = hd_pissa.attach(base, 4, shards=1, targets=["q_proj", "down_proj"], alpha=alpha)
    x = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    for model in (base, theirs):
        F.cross_entropy(model(x).logits.flatten(0, 1), x.flatten()).backward()
    factors, grads = adapters.state_dict(), dict(adapters.named_parameters())
    modules = dict(theirs.named_modules())
    for slot in adapters.slots:
        layer = modules["base_model.model." + slot.name]
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # (r, m), (n, r)
        mine_A, mine_B = factors[slot.name + ".shard0.A"], factors[slot.name + ".shard0.B"]
        dA, dB = grads[slot.name + ".shard0.dA"].grad, grads[slot.name + ".shard0.dB"].grad
        for got, expected in (
            (mine_A @ mine_B * alpha / 4, (B @ A).T * alpha / 4),
            (dA @ mine_B, (B @ A.grad).T),
            (mine_A @ dB, (B.grad @ A).T),
        ):
            # PEFT decomposes in float32, so its factors carry that rounding: 1e-4 of the largest entry.
            torch.testing.assert_close(
                got, expected, rtol=0, atol=1e-4 * float(expected.detach().abs().max())
            )
        assert dA.abs().max() > 1e-8


@pytest.mark.parametrize("gamma", [1e-4, 1e-8, 1e-16])
def test_published_gamma_variant_has_the_same_gradients_in_float64(gamma):
    """d/dA of X (W + gamma A B), divided by gamma, at a fixed dY equals Mute's gradient."""
    g = torch.Generator().manual_seed(0)
    X, dY, A, B = (
        torch.randn(s, generator=g, dtype=torch.float64) for s in ((5, M), (5, N), (M, RANK), (RANK, N))
    )
    A.requires_grad_(), B.requires_grad_()
    published = torch.autograd.grad((X @ (gamma * A @ B) * dY).sum(), (A, B))
    dA, dB = torch.zeros_like(A).requires_grad_(), torch.zeros_like(B).requires_grad_()
    W = torch.randn((N, M), generator=g, dtype=torch.float64)
    out = hd_pissa.Mute.apply(X, W, None, A.detach()[None], B.detach()[None], dA, dB, 1.0, False, None)
    for mine, theirs in zip(torch.autograd.grad((out * dY).sum(), (dA, dB)), published):
        torch.testing.assert_close(mine, theirs / gamma, rtol=1e-10, atol=1e-10)


def test_gamma_window_in_float32():
    """gamma = 1e-2 moves the output, 1e-32 quantises a small gradient; the mute does neither."""
    g = torch.Generator().manual_seed(0)
    X, W, A, B = (torch.randn(s, generator=g) for s in ((5, M), (M, N), (M, RANK), (RANK, N)))
    dY = 1e-12 * torch.randn((5, N), generator=g)
    exact = X.double().T @ (dY.double() @ B.double().T)
    Z = A.clone().requires_grad_()
    (published,) = torch.autograd.grad((X @ (1e-32 * Z @ B) * dY).sum(), Z)
    error = ((published.double() / 1e-32 - exact).norm() / exact.norm()).item()
    zero = torch.zeros_like(A).requires_grad_()
    out = hd_pissa.Mute.apply(X, W.T, None, A[None], B[None], zero, torch.zeros_like(B), 1.0, False, None)
    (mine,) = torch.autograd.grad((out * dY).sum(), zero)
    assert error > 1e-3 and ((mine.double() - exact).norm() / exact.norm()).item() < 1e-6
    assert torch.equal(out, F.linear(X, W.T)) and (X @ (W + 1e-2 * A @ B) - out).abs().max() > 1e-2


def test_only_input_and_weight_are_saved():
    """What autograd keeps for a muted layer: its input and its weight, nothing else."""
    layer, x, saved = make_linear(True), inputs(7), []
    hd_pissa.attach(nn.Sequential(layer), RANK, shards=K)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr(), layer.weight.data_ptr()]


def test_checkpointing_recomputes_nothing_wrong():
    """Non-reentrant checkpointing, backward outside the context: bit for bit."""
    results = []
    for use in (False, True):
        layer, x = make_linear(True), inputs(4)
        model = nn.Sequential(layer, nn.Tanh())
        adapters = pytest.importorskip("hd_pissa_extra").attach(model, RANK, shards=K, dropout=0.3)
        losses = []
        for i in range(K):
            with adapters.shard(i):
                y = checkpoint(model, x, use_reentrant=False) if use else model(x)
                losses.append(objective(y))
        sum(losses).backward()
        results.append([p.grad for p in adapters.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_reentrant_checkpointing_outside_its_shard_is_refused():
    """It recomputes in the backward, and would give shard 2's gradients to shard 0."""
    layer, x = make_linear(True), inputs(4).requires_grad_()
    adapters = pytest.importorskip("hd_pissa_extra").attach(nn.Sequential(layer), RANK, shards=K)
    with adapters.shard(2):
        loss = objective(checkpoint(layer, x, use_reentrant=True))
    if hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        with pytest.raises(ValueError, match="reentrant.*backward inside"):
            loss.backward()
    with adapters.shard(2):             # the first remedy
        objective(checkpoint(layer, x, use_reentrant=True)).backward()
    assert [p.grad is not None for p in adapters.parameters()] == [i // 2 == 2 for i in range(2 * K)]


def test_the_loop_allows_reentrant_checkpointing():
    """The forward that a backward runs again is of the shard in training: weights equal the plain run's."""

    class Tiny(nn.Module):
        def __init__(self, use):
            super().__init__()
            torch.manual_seed(0)
            self.use, self.wte, self.a, self.b, self.head = use, nn.Embedding(9, 8), *(
                nn.Linear(8, n) for n in (8, 8, 9))  # fmt: skip

        def forward(self, x):
            h = self.wte(x).requires_grad_()
            h = checkpoint(self.a, h, use_reentrant=True) if self.use else self.a(h)
            return self.head(self.b(h.tanh()))

    def weights(use):
        model = Tiny(use).double()
        adapters = hd_pissa.attach(model, 1, shards=4)
        rows = [([(3 * i + j) % 9 for j in range(5)], 2) for i in range(8)]
        for _ in hd_pissa.train(model, adapters, [rows] * 3, lr=1e-2, max_steps=3, progress=False):
            pass
        return [model.a.weight, model.b.weight]

    assert all(torch.equal(a, b) for a, b in zip(weights(False), weights(True)))


def test_dropout_touches_the_adapter_input_alone():
    """Y and dX are without mask; g_B = ((D X) A)^T dY for a 0-or-1/(1-p) mask that differs between shards."""
    layer, x = make_linear(False), torch.eye(M, dtype=torch.float64).requires_grad_()
    plain = layer(x).detach()
    attach = pytest.importorskip("hd_pissa_extra").attach
    adapters = attach(nn.Sequential(layer), RANK, shards=K, dropout=0.5)
    factors, masks = adapters.state_dict(), []
    for i in range(K):
        with adapters.shard(i):
            y = layer(x)
            assert torch.equal(y, plain)
            x.grad = None
            y.sum().backward()
        grads = dict(adapters.named_parameters())
        torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(M, M))
        # X = I and dY = 1: g_A[j, :] = (D^T 1)_j B 1, so the mask's column sums can be read off.
        B = factors[f"0.shard{i}.B"].sum(1)
        masks.append(grads[f"0.shard{i}.dA"].grad @ B / (B @ B))
        assert all(v in (0.0, 2.0) for v in masks[-1].round(decimals=9).tolist())
    assert not torch.equal(masks[0], masks[1])
    layer.eval()
    before = grads["0.shard0.dA"].grad.clone()
    layer(x).sum().backward()
    torch.testing.assert_close(
        grads["0.shard0.dA"].grad - before, factors["0.shard0.B"].sum(1).expand(M, RANK)
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_step_0_logits_are_the_base_models(family):
    """Same dtype, eval mode: bit for bit, through Linear with and without bias and through Conv1D."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    model = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)),
        "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**small)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32)
        ),
    }[family]().eval()
    x = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(x).logits
        names, keys = [n for n, _ in model.named_parameters()], list(model.state_dict())
        adapters = hd_pissa.attach(model, 2, shards=4)
        assert torch.equal(model(x).logits, before)
    assert keys == list(model.state_dict()) and names == [n for n, _ in model.named_parameters()]
    assert not any(p.requires_grad for p in model.parameters())
    assert len(adapters.slots) == {"llama": 14, "qwen2": 14, "gpt2": 8}[family]
    assert set(adapters.skipped) == {"lm_head"}
