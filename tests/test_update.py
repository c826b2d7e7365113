"""Oracles 2 and 4 in one process: attach, optimizer and merge_ against the reference twin, and invariants."""

import math

import pytest
import torch
import torch.nn as nn
import toy
import twin

import hd_pissa


@pytest.mark.parametrize("exchange", ["all_gather", "all_reduce"])
@pytest.mark.parametrize("aggregate", ["mean", "sum"])
@pytest.mark.parametrize("shards, alpha", [(1, None), (2, None), (4, None), (4, 2.0 * toy.R)])
def test_weights_equal_the_twin(shards, alpha, aggregate, exchange):
    """Five AdamW steps in float64 on K virtual devices; the same maths in another order, hence 1e-9."""
    weights, bias, data = toy.problem(shards=shards)
    expected = twin.run(weights, bias, data, shards, toy.R, 1e-2, aggregate, alpha)
    got, _ = toy.run(weights, bias, data, alpha=alpha, aggregate=aggregate, exchange=exchange)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert max(float((a - b).abs().max()) for a, b in zip(expected, weights)) > 1e-3


def test_float32_equals_the_twin_to_rounding():
    """float32 against float64, W of order 0.1 to 1: rtol 1e-5 with the rounding of W as the floor."""
    weights, bias, data = toy.problem()
    expected = twin.run(weights, bias, data, toy.K, toy.R, 1e-3)
    got, _ = toy.run(
        [W.float() for W in weights],
        bias.float(),
        [[(x.float(), y.float()) for x, y in batch] for batch in data],
        lr=1e-3,
    )
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", ["top", "lora"])
def test_ablation_inits_equal_the_twin(init):
    """Appendix C: the twin takes the drawn factors; "top" also equals slices of its own SVD."""
    weights, bias, data = toy.problem()
    got, adapters = toy.run(weights, bias, data, init=init)
    state = adapters.state_dict()
    factors = [
        [(state[f"{n}.shard{i}.A"], state[f"{n}.shard{i}.B"]) for i in range(toy.K)] for n in ("0", "2")
    ]
    for a, b in zip(got, twin.run(weights, bias, data, toy.K, toy.R, 1e-2, factors=factors)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    for W, layer in zip(weights, factors):
        if init == "top":
            A, B = twin.slices(W, 1, toy.R)[0]
            assert all(torch.dist(A_i @ B_i, A @ B) < 1e-10 for A_i, B_i in layer)
        else:
            bound = 1 / math.sqrt(W.shape[0])
            assert all(
                not B.any() and A.abs().max() <= bound and A.abs().max() > 0.8 * bound for A, B in layer
            )
            assert not torch.equal(layer[0][0], layer[1][0])


def test_other_optimizers_work_unchanged():
    """SGD with momentum through the increments equals the twin with a momentum of its own; RMSprop runs."""
    weights, bias, data = toy.problem()

    def momentum(grad, state, lr):
        state[0] = 0.9 * state[0] + grad
        return -lr * state[0]

    expected = twin.run(weights, bias, data, toy.K, toy.R, 1e-3, optimizer=momentum)
    got, _ = toy.run(weights, bias, data, make=lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    moved, _ = toy.run(weights, bias, data, make=lambda p: torch.optim.RMSprop(p, lr=1e-3))
    assert not torch.equal(moved[0], weights[0])


def test_joint_clipping_equals_the_twin():
    """The norm is over all shards and layers together."""
    weights, bias, data = toy.problem()

    def sgd(grad, state, lr):
        return -lr * grad

    expected = twin.run(weights, bias, data, toy.K, toy.R, 1.0, optimizer=sgd, clip=1e-2)
    got, _ = toy.run(weights, bias, data, make=lambda p: torch.optim.SGD(p, lr=1.0), clip=1e-2)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_clip_grad_norm_equals_torch():
    """Against torch.nn.utils.clip_grad_norm_ on the same gradients."""
    weights, bias, data = toy.problem()
    model = toy.module(weights, bias)
    adapters = hd_pissa.attach(model, toy.R, shards=toy.K)
    for i, (x, y) in enumerate(data[0]):
        with adapters.shard(i):
            (model(x) - y).square().mean().backward()
    copies = [nn.Parameter(p.detach().clone()) for p in adapters.parameters()]
    for c, p in zip(copies, adapters.parameters()):
        c.grad = p.grad.clone()
    expected, got = torch.nn.utils.clip_grad_norm_(copies, 0.05), adapters.clip_grad_norm_(0.05)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert float(got) > 0.05
    for c, p in zip(copies, adapters.parameters()):
        torch.testing.assert_close(p.grad, c.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("where", ["hd_pissa", "hd_pissa_extra"])
@pytest.mark.parametrize(
    "dtype, shape",
    [
        (torch.float32, (20, 33)),
        (torch.float32, (33, 20)),
        (torch.float64, (20, 33)),
        (torch.float32, (24, 24)),
    ],
)
def test_components_equal_the_full_svd(dtype, shape, where):
    """Singular values, best rank-k product and orthonormality, against torch.linalg.svd in float64."""
    components = pytest.importorskip(where).components
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    for k in (5, min(shape)):
        U, S, Vt = components(W, k)
        u, s, vt = torch.linalg.svd(W.double(), full_matrices=False)
        U, S, Vt = U.double(), S.double(), Vt.double()
        eps = 1e-11 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(S, s[:k], rtol=eps, atol=eps)
        torch.testing.assert_close((U * S) @ Vt, (u[:, :k] * s[:k]) @ vt[:k], rtol=eps, atol=eps)
        for Q in (U.T @ U, Vt @ Vt.T):
            torch.testing.assert_close(Q, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-5)


def test_rank_deficient_weight_falls_back_to_the_full_svd(capsys):
    """W of rank 3 asked for 8 components: orthonormal factors all the same."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn((20, 3), generator=g) @ torch.randn((3, 30), generator=g)
    U, S, Vt = pytest.importorskip("hd_pissa_extra").components(W, 8, "layer")
    said = capsys.readouterr().out
    assert "layer: squared singular values fall" in said and "layer: components by a float64" in said
    torch.testing.assert_close(U.T @ U, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close((U * S) @ Vt, W.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("failing", [("eigh float32",), ("svd float32",), ("eigh float32", "eigh float64")])
def test_a_driver_that_does_not_converge_is_followed_by_the_next(failing, monkeypatch, capsys):
    """LAPACK and cuSOLVER give up on some matrices that another of their drivers can do."""
    def planted(name, plain):
        def call(matrix, **how):
            if f"{name} {str(matrix.dtype)[6:]}" in failing:
                raise torch.linalg.LinAlgError(f"linalg.{name}: The algorithm failed to converge")
            return plain(matrix, **how)
        return call

    W = torch.randn((20, 33), generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(W.double(), full_matrices=False)
    for name in ("eigh", "svd"):
        monkeypatch.setattr(torch.linalg, name, planted(name, getattr(torch.linalg, name)))
    U, S, Vt = pytest.importorskip("hd_pissa_extra").components(W, 8, "layer")
    assert capsys.readouterr().out.count("next driver") == len(failing)
    torch.testing.assert_close((U * S).double() @ Vt.double(), (u[:, :8] * s[:8]) @ vt[:8], rtol=0, atol=1e-5)


def test_shards_are_orthogonal_and_their_products_the_best_approximation():
    """A_i^T A_j = 0 and B_i B_j^T = 0 for i != j; sum_i A_i B_i is the rank-Kr truncation of W."""
    weights, bias, _ = toy.problem()
    adapters = hd_pissa.attach(toy.module(weights, bias), toy.R, shards=toy.K)
    state = adapters.state_dict()
    for name, W in zip(("0", "2"), weights):
        A = [state[f"{name}.shard{i}.A"] for i in range(toy.K)]
        B = [state[f"{name}.shard{i}.B"] for i in range(toy.K)]
        assert A[0].shape == (W.shape[0], toy.R) and B[0].shape == (toy.R, W.shape[1])
        for i in range(toy.K):
            for j in range(i):
                assert (A[i].T @ A[j]).abs().max() < 1e-10 and (B[i] @ B[j].T).abs().max() < 1e-10
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        k = toy.K * toy.R
        torch.testing.assert_close(sum(a @ b for a, b in zip(A, B)), (U[:, :k] * S[:k]) @ Vt[:k])


def test_basis_never_moves_and_increments_return_to_zero():
    """A_i, B_i after five steps equal those before bit for bit; the leaves are zero and the same tensors."""
    weights, bias, data = toy.problem()
    fresh = hd_pissa.attach(toy.module(weights, bias), toy.R, shards=toy.K).state_dict()
    _, adapters = toy.run(weights, bias, data)
    state = adapters.state_dict()
    assert all(torch.equal(state[k], fresh[k]) for k in fresh if ".shard" in k) and state["step"] == len(data)
    assert not any(p.any() for p in adapters.parameters())


def test_interface_of_the_leaves_and_the_model():
    """Names and shapes; invisible to the model; detach_ gives plain modules; state_dict round trip."""
    weights, bias, data = toy.problem()
    model = toy.module(weights, bias)
    adapters = hd_pissa.attach(model, toy.R, shards=toy.K)
    shapes = {name: tuple(p.shape) for name, p in adapters.named_parameters()}
    expected = {
        f"{n}.shard{i}.{k}": shape
        for n, (m, o) in (("0", toy.SIZES[:2]), ("2", toy.SIZES[1:]))
        for i in range(toy.K)
        for k, shape in (("dA", (m, toy.R)), ("dB", (toy.R, o)))
    }
    assert shapes == expected and all(p.is_leaf and p.requires_grad for p in adapters.parameters())
    assert (
        list(model.state_dict()) == ["0.weight", "0.bias", "2.weight"] and len(list(model.parameters())) == 3
    )
    assert isinstance(model[0], nn.Linear)
    other = hd_pissa.attach(toy.module(*toy.problem(seed=5)[:2]), toy.R, shards=toy.K)
    other.load_state_dict(adapters.state_dict())
    assert all(
        torch.equal(a, b)
        for (k, a), (_, b) in zip(adapters.state_dict().items(), other.state_dict().items())
        if ".shard" in k
    )
    with pytest.raises(ValueError, match="another run"):
        hd_pissa.attach(toy.module(weights, bias), 1, shards=toy.K).load_state_dict(adapters.state_dict())
    adapters.detach_()
    assert type(model[0]) is nn.Linear and not hasattr(model[0], "hd_pissa")
    hd_pissa.attach(model, toy.R, shards=2)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_either_way(set_to_none):
    """The leaves survive both, and the weights are the same."""
    weights, bias, data = toy.problem()
    model, results = toy.module(weights, bias), toy.run(weights, bias, data)[0]
    adapters = hd_pissa.attach(model, toy.R, shards=toy.K)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.0)
    for batch in data:
        for i, (x, y) in enumerate(batch):
            with adapters.shard(i):
                (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)  # before merge_ is fine too
        adapters.merge_()
    assert torch.equal(model[0].weight.T, results[0])


def test_small_buckets_change_nothing():
    """One bucket per layer against one for all: bit for bit."""
    pytest.importorskip("hd_pissa_extra")
    weights, bias, data = toy.problem()
    one, many = toy.run(weights, bias, data)[0], toy.run(weights, bias, data, bucket_mb=0)[0]
    assert all(torch.equal(a, b) for a, b in zip(one, many))


def test_lr_factor_against_closed_forms():
    """First step 1/warmup, cosine and linear from 1 to 0, ratio and steps agree."""
    f = hd_pissa.lr_factor
    assert f(0, 100, 10, "cosine") == 0.1 and f(9, 100, 10, "cosine") == 1.0 == f(10, 100, 10, "cosine")
    assert [f(t, 100, 0.1, "linear") for t in range(100)] == [f(t, 100, 10, "linear") for t in range(100)]
    assert f(55, 100, 10, "linear") == pytest.approx(0.5) and f(100, 100, 10, "linear") == 0.0
    assert f(40, 100, 10, "cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))
    assert f(99, 100, 10, "constant") == 1.0 and f(0, 100, 0, "cosine") == 1.0


class Tiny(nn.Module):
    """Next-token model of two layers, so that the loop can be tested without a transformer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.lm_head = nn.Embedding(30, 16), nn.Linear(16, 24), nn.Linear(24, 30)

    def forward(self, x):
        return self.lm_head(torch.tanh(self.up(self.embed(x))))


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_equal_one_big_one(micro):
    """Rows of unequal length, weighted by tokens: micro-batches of 1 and 3 rows equal one of 4 in float64."""
    g = torch.Generator().manual_seed(0)
    rows = [
        ([int(v) for v in torch.randint(0, 30, (int(n),), generator=g)], int(n) // 3)
        for n in torch.randint(4, 12, (16,), generator=g)
    ]
    results = []
    for size in (4, micro):
        model = Tiny().double()
        adapters = hd_pissa.attach(model, 2, shards=4)
        log = list(
            hd_pissa.train(
                model,
                adapters,
                [rows, rows[::-1]],
                lr=1e-2,
                max_steps=2,
                micro_batch_size=size,
                max_grad_norm=0.5,
                progress=False,
            )
        )
        results.append((model.up.weight.detach(), [record["loss"] for record in log]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-12)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-12) and set(adapters.skipped) == {"lm_head"}


def test_loading_a_state_drops_what_was_not_merged():
    """Increments that an optimizer has filled before load_state_dict do not reach W at the next merge."""
    weights, bias, data = toy.problem()
    model = toy.module(weights, bias)
    adapters = hd_pissa.attach(model, toy.R, shards=toy.K)
    state = adapters.state_dict()
    optimizer = torch.optim.SGD(adapters.parameters(), lr=1.0)
    for i, (x, y) in enumerate(data[0]):
        with adapters.shard(i):
            (model(x) - y).square().mean().backward()
    optimizer.step()
    adapters.load_state_dict(state)
    with pytest.raises(ValueError, match="got no gradient"):
        adapters.merge_()
    assert torch.equal(model[0].weight.T, weights[0])
    assert not adapters.increments.any()


def test_overlapping_shards_are_refused():
    """A decomposition of other components than orthonormal ones: one sentence with the layer's name."""
    def wrong(W, k, name):
        U, S, Vt = hd_pissa.components(W, k, name)
        return torch.cat((U[:, :1], U[:, :-1]), dim=1), S, Vt

    extra, (weights, bias, _) = pytest.importorskip("hd_pissa_extra"), toy.problem()
    with pytest.raises(ValueError, match="0: components not orthonormal"):
        extra.attach(toy.module(weights, bias), toy.R, shards=toy.K, decompose=wrong)
