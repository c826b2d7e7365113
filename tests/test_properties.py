"""Over random shapes, K, r, dtypes, settings: training agrees with the twin, and identities hold."""

import math

import pytest
import torch
import torch.nn as nn
import twin

import hd_pissa
import hd_pissa_extra
from training import checkpoint

hypothesis = pytest.importorskip("hypothesis", reason="pip install -r requirements-extra.txt")
from hypothesis import HealthCheck, assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

PROFILE = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
sizes = st.integers(1, 24)


def draw(seed, *shape):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def sgd(grad, state, lr):
    return -lr * grad


@settings(max_examples=60, **PROFILE)
@given(
    shape=st.tuples(sizes, sizes, sizes), K=st.integers(1, 5), r=st.integers(1, 4), tokens=st.integers(1, 9),
    seed=st.integers(0, 2**30), wide=st.sampled_from([torch.float64, torch.float32]),
    exchange=st.sampled_from(["auto", "all_gather", "all_reduce"]),
    basis=st.sampled_from(["cached", "resend"]), aggregate=st.sampled_from(["mean", "sum"]),
    alpha=st.sampled_from([None, 0.5, 3.0]), conv1d=st.booleans(), bucket_mb=st.sampled_from([0, 256]),
)  # fmt: skip
def test_training_equals_the_twin(shape, K, r, tokens, seed, wide, exchange, basis, aggregate, alpha, conv1d,
                                  bucket_mb):  # fmt: skip
    """Three steps of every shard; AdamW in float64, SGD in float32, whose error does not grow by signs."""
    a, b, c = shape
    assume(K * r <= min(shape))
    weights = [draw(seed, a, b) / math.sqrt(a), draw(seed + 1, b, c) / math.sqrt(b)]
    spectra = [torch.linalg.svdvals(W) for W in weights]
    assume(all((S[:-1] - S[1:] > 0.02 * S[0]).all() and S[-1] > 0.02 * S[0] for S in spectra))
    bias = draw(seed + 2, b)
    seeds = [[seed + 3 + 7 * t + i for i in range(K)] for t in range(3)]
    data = [[(draw(s, tokens, a), draw(s + 99, tokens, c)) for s in step] for step in seeds]
    exact = wide == torch.float64
    optimizer = {} if exact else {"optimizer": sgd}
    expected = twin.run(weights, bias, data, K, r, 1e-2, aggregate=aggregate, alpha=alpha, **optimizer)

    layers = [nn.Linear(a, b), nn.Linear(b, c, bias=False)]
    if conv1d:
        conv = pytest.importorskip("transformers").pytorch_utils.Conv1D
        layers[0] = conv(b, a)
    layers[0].weight.data = (weights[0] if conv1d else weights[0].T).to(wide, copy=True)
    layers[0].bias.data, layers[1].weight.data = bias.to(wide), weights[1].T.to(wide, copy=True)
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    adapters = hd_pissa_extra.attach(model, r, shards=K, exchange=exchange, basis=basis, aggregate=aggregate,
                               alpha=alpha, bucket_mb=bucket_mb)  # fmt: skip
    make = torch.optim.AdamW if exact else torch.optim.SGD
    params = make(adapters.parameters(), lr=1e-2, weight_decay=0.0)
    for batch in data:
        for i, (x, y) in enumerate(batch):
            with adapters.shard(i):
                (model(x.to(wide)) - y.to(wide)).square().mean().backward()
        params.step()
        adapters.merge_()
        params.zero_grad()
    got = [layers[0].weight if conv1d else layers[0].weight.T, layers[1].weight.T]
    for mine, theirs, before in zip(got, expected, weights):
        moved = (theirs - before).norm()
        error = (mine.double() - theirs).norm() - (0 if exact else 1e-6 * before.norm())
        assert error <= (1e-6 if exact else 5e-4) * moved, (error / moved, shape)


@settings(max_examples=60, **PROFILE)
@given(m=sizes, n=sizes, K=st.integers(1, 5), r=st.integers(1, 4), seed=st.integers(0, 2**30))
def test_factors_of_the_update_are_exact(m, n, K, r, seed):
    """Pt^T Q is the sum over shards of (A + dA)(B + dB) - A B, whatever the shapes."""
    A, dA = draw(seed, K, m, r), draw(seed + 1, K, m, r)
    B, dB = draw(seed + 2, K, r, n), draw(seed + 3, K, r, n)
    Pt, Q = hd_pissa.update_factors(A, B, dA, dB)
    assert Pt.shape == (2 * K * r, m) and Q.shape == (2 * K * r, n)
    torch.testing.assert_close(Pt.T @ Q, ((A + dA) @ (B + dB) - A @ B).sum(0), rtol=1e-10, atol=1e-10)


@settings(max_examples=100, **PROFILE)
@given(rows=st.integers(1, 3000), columns=st.integers(1, 5), cuts=st.lists(st.integers(0, 3000), max_size=4),
       seed=st.integers(0, 2**30))  # fmt: skip
def test_fold_in_parts_is_fold_in_whole_bit_for_bit(rows, columns, cuts, seed):
    W, left, right = draw(seed, rows, columns).float(), draw(seed + 1, rows, 6), draw(seed + 2, 6, columns)
    left, right = left.float(), right.float()
    whole = W.clone()
    hd_pissa_extra.fold_rows_(whole, slice(0, rows), left, right, 0.25)
    edges = [0, *sorted(min(c, rows) for c in cuts), rows]
    for a, b in zip(edges, edges[1:]):
        part = W[a:b].clone()
        hd_pissa_extra.fold_rows_(part, slice(a, b), left, right, 0.25)
        assert torch.equal(part, whole[a:b])
    torch.testing.assert_close(whole, W + 0.25 * left @ right, rtol=1e-5, atol=1e-5)


@settings(max_examples=200, **PROFILE)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_halves_join_to_every_finite_float(bits):
    W = torch.tensor(bits).to(torch.int32).view(torch.float32)
    W = W[W.isfinite() & (W.abs() < 3.3e38)]            # above, rounding would carry into infinity
    assert torch.equal(hd_pissa_extra.join(*hd_pissa_extra.split(W)).view(torch.int32), W.view(torch.int32))


@settings(max_examples=100, **PROFILE)
@given(product=st.integers(1, 24), data=st.data())
def test_pieces_deal_components_in_order(product, data):
    """Shard i of rank r takes components ir .. (i+1)r - 1 out of whatever shards were stored."""
    divisors = [d for d in range(1, product + 1) if product % d == 0]
    r, there = data.draw(st.sampled_from(divisors)), data.draw(st.sampled_from(divisors))
    whole = torch.arange(3 * product).view(3, product)                                  # (m, K r)
    stored = {f"adapters.x.shard{j}.A": whole[:, j * there:(j + 1) * there] for j in range(product // there)}
    for i in range(product // r):
        names, shape, dim, start = checkpoint.pieces(f"adapters.x.shard{i}.A", (3, r), r, there)
        assert shape == (3, there) and dim == 1
        joint = torch.cat([stored[name] for name in names], 1)
        assert torch.equal(joint.narrow(1, start, r), whole[:, i * r:(i + 1) * r])
