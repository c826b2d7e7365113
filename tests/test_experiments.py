"""Experiments: baselines against PEFT, loops and hand-made twins; the sweep; the page against its data.

Oracles: PEFT's PiSSA for the Intermediate Method of one device, K residual models for several, complex
multiplication for MoRA's rotation, float64 products for the mute, statistics of the JSON lines for the page.
Every experiment runs at its --quick size.
"""

import ast
import copy
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import ROOT

import hd_pissa
from tutorial.baselines import bases, intermediate, loraplus, mora, plain, projected
from tutorial.experiments import arms, job, local, mute, page, run, speed, table

RESULTS = ROOT / "tutorial" / "results"
QUICK = {"steps": 2, "batch": 16, "rows": 16}


def two_layers(dtype=torch.float64, seed=0):
    """A model with a wide and a tall weight, and a batch of inputs."""
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(24, 40, bias=False), nn.Tanh(), nn.Linear(40, 20, bias=False)).to(dtype)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype) / p.shape[1] ** 0.5
    return model, torch.randn((32, 24), generator=g, dtype=torch.float64).to(dtype)


# ---- Baselines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "pissa", "dora", "hira"])
def test_peft_baselines_end_as_plain_modules_with_the_trained_function(method):
    pytest.importorskip("peft")
    model, x = two_layers(torch.float32)
    before = model(x).detach()
    adapters = plain.with_peft(model, method, 2, 1)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)      # every one of them starts at W
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-2, weight_decay=0.0)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model(x).detach()
    assert (trained - before).abs().max() > 1e-3
    adapters.detach_()
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear]
    torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-5)


def test_peft_lora_trains_the_numbers_of_rank_r():
    pytest.importorskip("peft")
    model, _ = two_layers(torch.float32)
    adapters = plain.with_peft(model, "lora", 2, 1)
    assert sum(p.numel() for p in adapters.parameters()) == 2 * (24 + 40) + 2 * (40 + 20)


@pytest.mark.parametrize("alpha, rslora, scale", [(None, False, 1.0), (6, False, 1.5), (6, True, 3.0)])
def test_peft_lora_is_scaled_by_alpha(alpha, rslora, scale):
    pytest.importorskip("peft")
    model, x = two_layers(torch.float32)
    W = model[0].weight.detach().clone()
    adapters = plain.with_peft(model, "lora", 4, 1, alpha=alpha, rslora=rslora)
    for p in adapters.parameters():
        p.data.normal_(generator=torch.Generator().manual_seed(len(p)))
    (A, B), (kind, other) = adapters.parameters()[:2], [name for name, _ in adapters.named_parameters()][:2]
    assert "lora_A" in kind and "lora_B" in other
    adapters.detach_()
    torch.testing.assert_close(model[0].weight, W + scale * B @ A)


def adam_direction(history, betas=(0.9, 0.999), eps=1e-8):
    """Adam's direction after the gradients in `history`, as sums over all of them."""
    t = len(history)
    m, v = (sum((1 - b) * b ** (t - 1 - k) * g ** power for k, g in enumerate(history)) / (1 - b ** t)
            for b, power in zip(betas, (1, 2)))
    return m / (v.sqrt() + eps)


def made_up_gradients(shape, steps: int):
    g = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=g, dtype=torch.float64) * (1 + k) for k in range(steps)]


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_galore_steps_in_the_leading_directions_of_a_recent_gradient(shape):
    lr, r, gap = 0.1, 3, 2
    W = torch.nn.Parameter(torch.ones(shape, dtype=torch.float64))
    optimizer = projected.GaLore([W], lr, r, gap=gap)
    expected, history = torch.ones((12, 20), dtype=torch.float64), []
    k = 2 * r * (12 + 20) // (2 * 20 + 12)
    for t, G in enumerate(made_up_gradients((12, 20), 5)):
        W.grad = G if shape == (12, 20) else G.T.contiguous()
        optimizer.step()
        if t % gap == 0:
            fresh = torch.linalg.eigh(G @ G.T).eigenvectors[:, -k:].flip(1)     # (d, k)
            # the moments stay when P changes, so the free signs of its columns must be those of the SVD
            P = fresh * (fresh * optimizer.state[W]["P"]).sum(0).sign()
        history.append(P.T @ G)
        expected -= lr * P @ adam_direction(history)
        torch.testing.assert_close(W.detach() if shape == (12, 20) else W.detach().T, expected)
    held = sum(value.numel() for value in optimizer.state[W].values() if isinstance(value, torch.Tensor))
    assert k == 3 and held == 2 * k * 20 + 12 * k <= 2 * r * (12 + 20)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_apollo_scales_every_column_of_the_gradient(shape):
    lr, r, gap, seed = 0.1, 3, 2, 5
    W = torch.nn.Parameter(torch.ones(shape, dtype=torch.float64))
    optimizer = projected.Apollo([W], lr, r, gap=gap, seed=seed)
    expected, history, before, limited = torch.ones((12, 20), dtype=torch.float64), [], None, 0
    k = 2 * r * (12 + 20) // (2 * 20)
    for t, G in enumerate(made_up_gradients((12, 20), 5)):
        W.grad = G if shape == (12, 20) else G.T.contiguous()
        optimizer.step()
        draw = torch.Generator().manual_seed(hd_pissa.seed_of("apollo", seed, 0, t // gap))
        P = torch.randn((k, 12), generator=draw).double() / math.sqrt(k)
        history.append(P @ G)
        direction = adam_direction(history)
        step = torch.stack([G[:, j] * math.sqrt(sum(x * x for x in direction[:, j].tolist()))
                            / (math.sqrt(sum(x * x for x in history[-1][:, j].tolist())) + 1e-8)
                            for j in range(20)], dim=1)
        if before is not None and step.norm() > 1.01 * before:
            step, limited = step * 1.01 * before / step.norm(), limited + 1
        before = step.norm()
        expected -= lr * step
        torch.testing.assert_close(W.detach() if shape == (12, 20) else W.detach().T, expected,
                                   rtol=1e-6, atol=1e-7)
    held = sum(v.numel() for v in optimizer.state[W].values() if isinstance(v, torch.Tensor) and v.dim())
    assert k == 4 and held == 2 * k * 20 <= 2 * r * (12 + 20) and 0 < limited < 4


def test_projected_optimizers_refuse_vectors():
    with pytest.raises(ValueError, match="give biases and norms another optimizer"):
        projected.GaLore([torch.nn.Parameter(torch.zeros(3))], 0.1, 2)


def test_lora_plus_steps_b_further_by_its_ratio():
    lr, ratio = 0.01, 16
    shapes = {"x.lora_A.default.weight": (2, 6), "x.lora_B.default.weight": (5, 2)}
    named = {name: nn.Parameter(torch.zeros(shape).double()) for name, shape in shapes.items()}
    optimizer = loraplus.adamw(named.items(), lr, ratio)
    history = {name: [] for name in named}
    expected = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for rate in (lr, lr / 2, lr / 4):
        for group in optimizer.param_groups:        # as hd_pissa.train does
            group["lr"] = rate
        for name, p in named.items():
            p.grad = made_up_gradients(p.shape, 3)[len(history[name])]
            history[name].append(p.grad)
        optimizer.step()
        for name in named:
            expected[name] -= rate * (ratio if "lora_B" in name else 1) * adam_direction(history[name])
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate]
    for name, p in named.items():
        torch.testing.assert_close(p.detach(), expected[name])
    with pytest.raises(ValueError, match="both factors"):
        loraplus.adamw([("a", named["x.lora_A.default.weight"])], lr, ratio)


def test_mora_rotation_is_complex_multiplication():
    q, x = 6, torch.randn((5, 16), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    padded = torch.cat((x, x[:, :2]), dim=1).view(5, 3, q)
    z = torch.complex(padded[..., :3], padded[..., 3:])
    theta = torch.tensor([1.0, 10000 ** (-2 / 6), 10000 ** (-4 / 6)], dtype=torch.float64)
    turned = torch.stack([z[:, j] * torch.exp(1j * j * theta) for j in range(3)], dim=1)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(mora.rotated_groups(x, q), expected)


@pytest.mark.parametrize("m, n", [(24, 40), (40, 24), (7, 50)])
def test_mora_merges_into_the_weight_and_uses_the_budget_of_lora(m, n):
    g = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(m, n, bias=False)).double()
    x = torch.randn((6, m), generator=g, dtype=torch.float64)
    adapters = mora.attach(model, 2, 1)
    (M,) = adapters.parameters()
    assert 0.7 * 2 * (m + n) <= M.numel() <= 2 * (m + n) and not M.any()
    before = model(x).detach()
    M.data.normal_(generator=g)
    after = model(x).detach()
    assert (after - before).abs().max() > 0.1
    adapters.detach_()
    torch.testing.assert_close(model(x), after)
    # one shared M in every block of features: dW has far more than LoRA's rank of 2
    dW = mora.mora(torch.eye(m, dtype=torch.float64), M.detach(), n)
    assert torch.linalg.matrix_rank(dW) >= min(m, n, M.shape[0]) > 2


def test_intermediate_of_one_device_is_peft_pissa():
    pytest.importorskip("peft")
    config = QUICK | {"r": 2, "lr": 1e-2, "steps": 4}
    one = job.run(config | {"method": "intermediate", "K": 1})
    other = job.run(config | {"method": "pissa"})
    assert one["final"]["all"][0] == pytest.approx(other["final"]["all"][0], rel=1e-4)
    assert one["moments"] == other["moments"]


def test_intermediate_is_the_mean_of_devices_trained_apart():
    """K models with their own W_res,i, each trained alone on its own data, against the one class."""
    K, r, lr, steps = 3, 2, 1e-2, 4
    model, _ = two_layers()
    data = torch.randn((steps, K, 8, 24), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    target = []
    for i in range(K):
        own, factors = copy.deepcopy(model), []
        for layer in (own[0], own[2]):
            U, S, Vh = torch.linalg.svd(layer.weight.detach().T, full_matrices=False)
            part = slice(i * r, (i + 1) * r)
            A = (U[:, part] * S[part].sqrt()).clone().requires_grad_()
            B = (S[part].sqrt()[:, None] * Vh[part]).clone().requires_grad_()
            factors.append((layer.weight.detach().T - (A @ B).detach(), A, B))
        optimizer = torch.optim.AdamW([p for _, A, B in factors for p in (A, B)], lr, weight_decay=0.0)
        for t in range(steps):
            (R1, A1, B1), (R2, A2, B2) = factors
            y = torch.tanh(data[t, i] @ (R1 + A1 @ B1)) @ (R2 + A2 @ B2)
            optimizer.zero_grad()
            (y - 1).square().mean().backward()
            optimizer.step()
        target.append([R + (A @ B).detach() for R, A, B in factors])
    adapters = intermediate.Intermediate(model, r, K)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr, weight_decay=0.0)
    for t in range(steps):
        for i in range(K):
            with adapters.shard(i):
                (model(data[t, i]) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with adapters.result():
        on_the_way = model(data[0, 0]).detach()
    adapters.detach_()
    torch.testing.assert_close(model(data[0, 0]), on_the_way)
    for layer, weights in zip((model[0], model[2]), zip(*target)):
        mean = torch.stack(weights).mean(0)
        torch.testing.assert_close(layer.weight.detach().T, mean, rtol=1e-7, atol=1e-9)


def test_bases():
    W = torch.randn((20, 28), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    u, s, vt = bases.orthonormal(W, 6)
    assert (s == 1).all()
    torch.testing.assert_close((u * (u.T @ W @ vt.T).diagonal()) @ vt, (U[:, :6] * S[:6]) @ Vh[:6])
    u, s, vt = bases.drawn()(W, 6, "a")
    torch.testing.assert_close(u.T @ u, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(vt @ vt.T, torch.eye(6, dtype=torch.float64))
    assert torch.equal(u, bases.drawn()(W, 6, "a")[0])
    assert not torch.equal(u, bases.drawn()(W, 6, "b")[0])
    assert not torch.equal(u, bases.drawn(1)(W, 6, "a")[0])
    u, s, vt = bases.interleaved(3)(W, 6)                       # r = 2: shards get (0, 3), (1, 4), (2, 5)
    torch.testing.assert_close(s, S[[0, 3, 1, 4, 2, 5]])
    torch.testing.assert_close((u * s) @ vt, (U[:, :6] * S[:6]) @ Vh[:6])


def test_muon_step_has_equal_singular_values_and_one_moment():
    p = torch.zeros((12, 3), dtype=torch.float64, requires_grad=True)
    optimizer = bases.Muon([p], 0.1)
    p.grad = torch.randn((12, 3), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    optimizer.step()
    S = torch.linalg.svdvals(p.detach())
    torch.testing.assert_close(S, torch.full((3,), 0.1 * 12**0.5, dtype=torch.float64))
    assert (p.detach() * p.grad).sum() < 0                      # downhill
    assert sum(t.numel() for t in optimizer.state[p].values()) == p.numel()


def test_global_gradients_with_the_sum_are_one_device_of_rank_kr():
    """The equal-parameter row: K devices of rank r do what one of rank K r does with the whole batch."""
    config = QUICK | {"method": "hd_pissa", "lr": 4e-3, "steps": 4}
    many = job.run(config | {"K": 8, "r": 2, "gradients": "global", "aggregate": "sum"})
    one = job.run(config | {"K": 1, "r": 16})
    assert many["final"]["all"][0] == pytest.approx(one["final"]["all"][0], rel=2e-3)
    assert many["moments"] * 8 == one["moments"]


# ---- Tries to improve the local form -----------------------------------------------------------------------


def test_a_group_shares_its_rows():
    rows = list("abcdefgh")
    assert local.grouped(rows, 4, 2) == list("abcd" + "abcd" + "efgh" + "efgh")
    assert local.grouped(rows, 4, 1) == rows and local.grouped(rows, 4, 4) == rows * 4


def test_groups_of_one_are_local_of_all_global_and_of_two_are_wider_shards():
    config = QUICK | {"method": "hd_pissa", "lr": 4e-3, "steps": 4, "r": 2, "K": 8}

    def loss(**kw):
        return job.run(config | kw)["final"]["all"][0]

    assert loss(group=1) == loss() != pytest.approx(loss(group=8), rel=2e-3)
    assert loss(group=8) == pytest.approx(loss(gradients="global"), rel=1e-4)
    assert loss(group=2, aggregate="sum") == pytest.approx(loss(K=4, r=4, aggregate="sum"), rel=1e-4)


def linear_losses(steps: int, K: int = 3, r: int = 2):
    """(adapters, A, B, backward, G): `backward(t)` gives shard i of step t the gradient G[t][i] of W,
    whatever W is; A (K, m, r) and B (K, r, n) from an SVD of their own."""
    m, n, g = 20, 16, torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)      # noqa: E731
    model = nn.Sequential(nn.Linear(m, n, bias=False)).double()
    model[0].weight.data = draw(n, m)
    x, c = draw(steps, K, 5, m), draw(steps, K, 5, n)
    U, S, Vt = torch.linalg.svd(model[0].weight.detach().T, full_matrices=False)
    parts = [slice(i * r, (i + 1) * r) for i in range(K)]
    A = torch.stack([U[:, p] * S[p].sqrt() for p in parts])
    B = torch.stack([S[p].sqrt()[:, None] * Vt[p] for p in parts])
    adapters = hd_pissa.attach(model, r, shards=K)

    def backward(t):
        for i in range(K):
            with adapters.shard(i):
                (model(x[t, i]) * c[t, i]).sum().backward()

    return model, adapters, A, B, backward, [[x[t, i].T @ c[t, i] for i in range(K)] for t in range(steps)]


def gradients_at_every_step(adapters, optimizer, backward, steps: int) -> list:
    """[(K, m, r) and (K, r, n) a step]: what the optimizer has stepped with, A B of one layer unsigned."""
    seen = []
    for t in range(steps):
        backward(t)
        optimizer.step()
        grads = {name.rpartition(".")[2]: [] for name, _ in adapters.named_parameters()}
        for name, p in adapters.named_parameters():
            grads[name.rpartition(".")[2]].append(p.grad.clone())
        seen.append((torch.stack(grads["dA"]), torch.stack(grads["dB"])))
        adapters.merge_()
    return seen


def test_shared_moments_agree_and_without_a_share_are_adamw():
    K, steps, seen = 3, 3, {}
    for share in (None, 0.0, 0.5):
        _, adapters, A, B, backward, G = linear_losses(steps)
        optimizer = torch.optim.AdamW(adapters.parameters(), 1e-2, weight_decay=0.0)
        if share is not None:
            local.SharedMoments(adapters, optimizer, share)
        seen[share] = gradients_at_every_step(adapters, optimizer, backward, steps)
    torch.testing.assert_close(seen[0.0], seen[None], rtol=0, atol=0)
    Q = A / A.norm(dim=1, keepdim=True)
    for t in range(steps):
        for j in range(K):
            # along the columns of A_i the mean of the gradients of both devices' rows, elsewhere the own
            means = sum(Q[i] @ Q[i].T @ (G[t][i] - G[t][j]) / 2 for i in range(K) if i != j)
            expected, got = (G[t][j] + means) @ B[j].T, seen[0.5][t][0][j]
            torch.testing.assert_close(got @ got.T, expected @ expected.T)      # signs of an SVD are free
    state, own = optimizer.state, adapters.state_dict()
    for i in range(K):
        for j in range(K):
            M_A, M_B = (state[dict(adapters.named_parameters())[f"0.shard{k}.{kind}"]]["exp_avg"]
                        for k, kind in ((j, "dA"), (i, "dB")))
            by_i, by_j = M_B @ own[f"0.shard{j}.B"].T, own[f"0.shard{i}.A"].T @ M_A
            torch.testing.assert_close(by_i, by_j)


def test_feedback_brings_every_gradient_to_every_slice_once():
    """With rank 2 K r, by sums: the gradient of a steps ago comes from a devices before, without what the
    slices between have learned of it."""
    K, r, steps = 3, 2, 7
    model, adapters, A, B, backward, G = linear_losses(steps)
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-2, weight_decay=0.0)
    local.Feedback(model, adapters, optimizer, 2 * K * r)
    seen = gradients_at_every_step(adapters, optimizer, backward, steps)
    Q = A / A.norm(dim=1, keepdim=True)                         # (K, m, r), (K, r, n)
    R = B / B.norm(dim=2, keepdim=True)
    for t in range(steps):
        for i in range(K):
            total = torch.zeros_like(G[0][0])
            for age in range(min(t + 1, K)):
                M = G[t - age][(i - age) % K]
                for between in range(1, age + 1):
                    k = (i - between) % K
                    M = M - Q[k] @ Q[k].T @ M
                    M = M - M @ R[k].T @ R[k]
                total += M
            for got, expected in ((seen[t][0][i], total @ B[i].T), (seen[t][1][i].T, total.T @ A[i])):
                torch.testing.assert_close(got @ got.T, expected @ expected.T)


def test_feedback_of_rank_r_holds_the_best_factors_and_counts_them():
    K, r = 3, 2
    model, adapters, _, _, backward, _ = linear_losses(2)
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-2, weight_decay=0.0)
    feedback = local.Feedback(model, adapters, optimizer, r)
    gradients_at_every_step(adapters, optimizer, backward, 2)
    held = [state["handed"].numel() for state in optimizer.state.values()]
    assert sorted(held) == sorted([20 * r, 16 * r] * K)
    U, S, Vt = torch.linalg.svd(torch.randn((20, 16), generator=torch.Generator().manual_seed(1)).double())
    M = (U[:, :16] * 0.3 ** torch.arange(16)) @ Vt
    L, right = feedback.compressed(M)
    assert torch.linalg.matrix_norm(M - L @ right, 2) == pytest.approx(0.3 ** r, rel=1e-2)
    backward(0)
    backward(1)
    with pytest.raises(ValueError, match="6 backwards for 3 shards"):
        optimizer.step()


# ---- Runner ------------------------------------------------------------------------------------------------


def sweep(name, loss, limit=60):
    """Run `missing` to its end with losses from a function of (lr, seed); the runs in order."""
    done, order = {}, []
    for _ in range(limit):
        need, best = run.missing(name, done, quick=False)
        if not need:
            return done, order, best
        for c in need:
            value = loss(c["lr"], c["seed"])
            final = None if math.isinf(value) else {"all": [value, 0.0]}
            done[run.key(c)] = {"config": c, "final": final}
            order.append((c["lr"], c["seed"]))
    raise AssertionError("the sweep does not end")


@pytest.mark.parametrize("optimum", [1e-4, 4e-3, 1.6e-2, 0.5])
def test_a_sweep_goes_on_until_its_best_is_inside_and_then_repeats_it(optimum):
    _, order, best = sweep("hd", lambda lr, seed: math.log(lr / optimum) ** 2 if lr < 1 else math.inf)
    tried = sorted(lr for lr, seed in order if seed == 0)
    nearest = min((arms.grid(i) for i in range(-12, 20)), key=lambda lr: abs(math.log(lr / optimum)))
    assert arms.grid(best) == nearest and tried[0] < nearest < tried[-1] and len(tried) >= 5
    assert all(b == pytest.approx(2 * a, rel=1e-4) for a, b in zip(tried, tried[1:]))
    assert [(lr, seed) for lr, seed in order if seed] == [(nearest, 1), (nearest, 2)]


def test_deciding_arms_get_more_seeds_at_the_rate_that_seed_0_chose():
    done, _, best = sweep("hd", lambda lr, seed: abs(math.log(lr / 4e-3)))
    need, again = run.missing("hd, more seeds", done, quick=False)
    assert again == best and [(c["lr"], c["seed"]) for c in need] == [(4e-3, s) for s in (3, 4, 5, 6)]
    assert run.missing("hd, more seeds", {}, quick=False) == run.missing("hd", {}, quick=False)


def test_keys_of_recorded_runs_are_those_of_today():
    """A default that changed would orphan them: every line belongs to an arm or to a run without a sweep."""
    def rest(config):
        return json.dumps({k: v for k, v in config.items() if k not in ("lr", "seed")}, sort_keys=True)

    configs = [config for config, *_ in arms.ARMS.values()] + sum(arms.FIXED.values(), [])
    known = {rest(arms.complete({"lr": 1.0} | config)) for config in configs}
    there = [record["config"] for record in run.read(RESULTS / "runs.jsonl").values()]
    assert len(there) > 500 and [config for config in there if rest(config) not in known] == []


def test_rates_that_diverge_bound_a_sweep():
    _, order, best = sweep("hd", lambda lr, seed: math.inf if lr > 0.02 else 1 / lr)
    assert arms.grid(best) == 0.016 and max(lr for lr, _ in order) > 0.016


def test_a_result_is_kept_and_a_line_cut_by_a_kill_is_not(tmp_path):
    config = arms.complete({"method": "full", "lr": 1e-3})
    (tmp_path / "runs.jsonl").write_text(json.dumps({"config": config, "final": None}) + '\n{"config": {"met')
    assert list(run.read(tmp_path / "runs.jsonl")) == [run.key(config)]


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="aggregate"):
        arms.complete({"method": "lora", "lr": 1e-3, "aggregate": "sum"})
    with pytest.raises(ValueError, match="alpha"):
        arms.complete({"method": "full", "lr": 1e-3, "alpha": 16})
    with pytest.raises(ValueError, match="leave one of them out"):
        arms.complete({"method": "lora", "lr": 1e-3, "ratio": 16, "also": "wte"})
    for wrong in (arms.GLOBAL, {"optimizer": "muon"}):
        with pytest.raises(ValueError, match="feedback needs .*it is a try to improve the local form"):
            arms.complete(arms.hd(lr=1e-3, feedback=2, **wrong))
    with pytest.raises(ValueError, match="group=3: K = 8 is not a multiple"):
        arms.complete(arms.hd(lr=1e-3, group=3))


FAST = ["methods", "ablations", "more methods", "missing methods", "projected gradients", "basis by seed",
        "local"]


def check_quick(out, names):
    wanted = set()              # long and short arms are the same two steps here
    for arm in {a for e in names for a in arms.EXPERIMENTS[e]}:
        base = arms.MORE.get(arm, arm)
        config = arms.FIXED[arm][0] if arm in arms.FIXED else arms.ARMS[base][0] | {
            "lr": arms.grid(arms.ARMS[base][1])}
        rows = {"batch": max(QUICK["batch"], config.get("K", 0))}       # one a shard at least
        wanted.add(run.key(arms.complete(config | QUICK | rows)))
    records = run.read(out / "runs.jsonl")
    assert set(records) == wanted
    for record in records.values():
        assert record["final"]["all"][0] > 0 and record["curve"][-1][1] == record["final"]["all"][0]
        assert set(record["final"]) == {"all", "code", "commonsense", "conversation", "math"}
        assert {"commit", "source", "runner", "torch", "trained", "moments", "constants"} <= set(record)
        assert len(record["spectrum"]["sigma"]) == 128 and max(record["effective_rank"]) > 0
    hd = next(r for r in records.values() if r["config"] == arms.complete(
        arms.ARMS["hd"][0] | QUICK | {"lr": arms.grid(arms.ARMS["hd"][1])}))
    sizes = sum(sum(module.weight.shape) for _, module in hd_pissa.find_layers(
        __import__("train").GPT(1024), "all-linear")[0])
    assert (hd["trained"], hd["moments"], hd["constants"]) == (2 * sizes, 4 * sizes, 16 * sizes)


def test_quick_experiments_fill_a_file_that_is_not_run_again(tmp_path):
    pytest.importorskip("peft")
    run.main([*FAST, "--quick", "--workers", "0", "--out", str(tmp_path)])
    check_quick(tmp_path, FAST)
    text = (tmp_path / "runs.jsonl").read_text()
    run.main([*FAST, "--quick", "--workers", "0", "--out", str(tmp_path)])
    assert (tmp_path / "runs.jsonl").read_text() == text


@pytest.mark.slow
def test_every_experiment_runs_at_its_quick_size_in_workers(tmp_path):
    pytest.importorskip("peft")
    command = [sys.executable, ROOT / "tutorial/experiments/run.py", "--quick", "--out", tmp_path]
    subprocess.run(command, check=True)
    check_quick(tmp_path, arms.EXPERIMENTS)


@pytest.mark.slow
def test_a_terminated_runner_leaves_whole_lines_and_goes_on(tmp_path):
    pytest.importorskip("peft")
    command = [sys.executable, ROOT / "tutorial/experiments/run.py", "--quick", "r", "K", "--out", tmp_path]
    process, path, deadline = subprocess.Popen(command), tmp_path / "runs.jsonl", time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    lines = path.read_text().splitlines()
    assert 0 < len(lines) and all(json.loads(line) for line in lines)
    subprocess.run(command, check=True)
    assert path.read_text().splitlines()[:len(lines)] == lines
    assert len(run.read(path)) == len(path.read_text().splitlines()) == 19      # none twice


@pytest.mark.slow
def test_a_killed_worker_ends_the_runner_with_a_remedy(tmp_path):
    """SIGKILL, as the kernel sends it for lack of memory: no waiting for a run that nobody makes."""
    pytest.importorskip("peft")
    command = [sys.executable, ROOT / "tutorial/experiments/run.py", "--quick", "r", "K", "--out", tmp_path]
    process, path = subprocess.Popen(command, stderr=subprocess.PIPE, text=True), tmp_path / "runs.jsonl"
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "a worker was killed" in said and "--workers 1" in said


def test_mute_errors_have_the_sizes_of_gamma_and_of_float32(tmp_path):
    mute.main(["--quick", "--out", str(tmp_path)])
    records = [json.loads(line) for line in (tmp_path / "mute.jsonl").read_text().splitlines()]
    at = {(r["reading"], r["gamma"]): r for r in records}
    assert at["exact mute", 0.0]["gradients"] < 1e-5 and at["exact mute", 0.0]["logits"] < 1e-6
    for reading in ("dense", "skinny"):
        assert 1e-3 < at[reading, 1e-2]["logits"] < 0.1         # proportional to gamma
        assert at[reading, 1e-20]["logits"] < 1e-6 and at[reading, 1e-20]["gradients"] < 1e-5
        assert at[reading, 1e-44]["zeros"] > 0.99                 # below the smallest subnormal number


@pytest.mark.slow
def test_step_times_are_positive_for_every_method(tmp_path):
    pytest.importorskip("peft")
    speed.main(["--quick", "--out", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [line["arm"] for line in lines] == list(speed.TIMED)
    assert all(line["seconds_per_step"] > 0 for line in lines)


# ---- Page --------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_data_say():
    data = table.load(RESULTS)
    assert data["records"], "no results"
    written = {path.name for path in RESULTS.glob("*.svg")}
    assert (RESULTS / "README.md").read_text() == page.page(data, written), \
        "run python tutorial/experiments/figures.py"


def test_numbers_of_the_page_are_those_of_the_lines():
    """Mean and deviation of every arm of the method table, from the JSON lines alone."""
    text = (RESULTS / "README.md").read_text()
    section = text.split("## Methods, each")[1].split("## One learning rate")[0]
    lines = [json.loads(line) for line in (RESULTS / "runs.jsonl").read_text().splitlines()]
    # the embedding has tables of its own; LoRA's variants have rows of their own
    lines = [r for r in lines if not {"also", "alpha", "rslora", "ratio"} & r["config"].keys()]
    checked = 0
    for row in re.findall(r"^\| ([^|]+) \| ([\d.e-]+) \| ([\d.]+) ± ([\d.]+) \|", section, re.M):
        name, lr, mean, sd = row[0], float(row[1]), row[2], row[3]
        wanted = {"full fine-tuning": ("full", None), "LoRA r=2": ("lora", 2), "PiSSA r=2": ("pissa", 2),
                  "DoRA r=2": ("dora", 2), "HiRA r=2": ("hira", 2), "PiSSA r=16": ("pissa", 16),
                  "LoRA r=16": ("lora", 16)}.get(name)
        if not wanted:
            continue
        losses = [r["final"]["all"][0] for r in lines if (r["config"]["method"], r["config"]["r"]) == wanted
                  and r["config"]["lr"] == lr and r["config"]["steps"] == arms.SHORT
                  and r["config"]["domain"] == "all"]
        assert (f"{statistics.mean(losses):.3f}", f"{statistics.stdev(losses):.3f}") == (mean, sd), name
        others = [r["final"]["all"][0] for r in lines if (r["config"]["method"], r["config"]["r"]) == wanted
                  and r["config"]["seed"] == 0 and r["config"]["steps"] == arms.SHORT and r["final"]
                  and r["config"]["domain"] == "all"]
        assert min(others) in losses, f"{name}: not the best learning rate"
        checked += 1
    assert checked or "Not run yet" in section


def test_the_main_readme_shows_the_results():
    from tutorial.experiments import figures
    text, data = (ROOT / "README.md").read_text(), table.load()
    [shown] = figures.SUMMARY.finditer(text)
    assert shown[0] == shown[1] + page.summary(data) + shown[2]
    assert f"{statistics.mean(data['lora'].values()):.3f} ±" in shown[0]


def test_every_comparison_of_the_page_is_the_rule_on_the_lines():
    """Gap, t and word of every row of the last table, from the JSON lines by hand: seeds in common, the
    limits of Student's t for two degrees of freedom (4.303, and 2.920 at 90 %), 0.02 nats."""
    lines = [json.loads(line) for line in (RESULTS / "runs.jsonl").read_text().splitlines()]
    text = (RESULTS / "README.md").read_text().split("## Every comparison")[1].split("## Tuning")[0]
    names, words = {}, set()
    for name, arm in table.load().items():
        if isinstance(arm, table.Arm) and arm.there:
            names[page.label(name), page.when(arm.config)] = arm
    row = r"^\| (.+?) \| (.+?) \| (\d+ steps.*?) \| (\S+) \| (\S+) \| 4.3 \|.+ 3 \| (.+) \|$"
    rows = re.findall(row, text, re.M)
    for a, b, when, gap, t, word in rows:
        losses = [{r["config"]["seed"]: r["final"]["all"][0] for r in lines if r["final"]
                   and {k: v for k, v in r["config"].items() if k not in ("lr", "seed")} == arm.config
                   and r["config"]["lr"] == arm.best} for arm in (names[a, when], names[b, when])]
        d = [losses[0][seed] - losses[1][seed] for seed in (0, 1, 2)]
        mean, error = statistics.mean(d), statistics.stdev(d) / math.sqrt(3)
        low, high = mean - 2.920 * error, mean + 2.920 * error
        expected = f"**decided: a is {'behind' if mean > 0 else 'ahead'}**" \
            if abs(mean / error) > 4.303 and abs(mean) >= 0.02 else \
            "equivalent" if -0.02 <= low and high <= 0.02 else "undecided"
        assert (gap, word) == (f"{mean:+.3f}", expected) and abs(float(t) - mean / error) < 0.06, (a, b, when)
        words.add(word.split(":")[0].strip("*"))
    assert len(rows) >= 80 and words == {"decided", "equivalent", "undecided"}


def test_memory_of_a_device():
    """By hand, at K = 8 and r = 2 of four blocks, whose four layers have 2,048 inputs and outputs."""
    data, n = table.load(), 2 * 4 * 2048
    for name, expected in {"hd": (2 * n, 2 * n, 8 * n, 7 * n), "hd global": (2 * n, 2 * n, 8 * n, 14 * n),
                           "lora": (2 * n, n // 4, n, 7 * n // 4),
                           "lora r=16": (16 * n, 2 * n, 8 * n, 14 * n),
                           "hd group=4": (2 * n, 2 * n, 8 * n, (7 + 3) * n),
                           "hd shared moments": (2 * n, 2 * n, 8 * n, 7 * n + 16 * 7 * (4 + 4)),
                           "hd feedback": ((2 + 1) * n, (2 + 1) * n, 8 * n, (7 + 1) * n)}.items():
        assert tuple(page.memory(data[name]).values()) == expected, name
    assert page.memory(data["full"])["held"] == 0


def test_words_of_a_claim():
    assert page.claimed(["ahead", "ahead"]) == "holds here"
    assert page.claimed(["ahead", "undecided"]) == page.claimed(["undecided"]) == "undecided"
    assert page.claimed(["ahead", "behind"], on="K") == page.claimed(["ahead", "equivalent"], on="K") == \
        "depends on K"
    assert page.claimed(["behind", "undecided"]) == page.claimed(["equivalent"]) == "does not hold here"


def test_every_arm_has_a_name():
    assert all(page.label(name) for name in arms.ARMS)


def test_no_measured_number_is_typed_into_the_page():
    """String literals of page.py hold no decimal fraction: a figure of the text can only be computed."""
    tree = ast.parse((ROOT / "tutorial/experiments/page.py").read_text())
    literals = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    assert [s for s in literals if re.search(r"\d\.\d", s)] == []


def test_other_data_give_another_verdict(tmp_path):
    """The words follow the numbers: HD-PiSSA's losses lowered, then raised."""
    records = []
    for factor in (0.5, 2.0):
        lines = []
        for name in ("hd", "lora", "pissa"):
            config, guess = arms.ARMS[name][0], arms.ARMS[name][1]
            for i in range(guess - 2, guess + 3):
                for seed in arms.SEEDS if i == guess else (0,):
                    loss = (1 + 0.1 * abs(i - guess) + 0.001 * seed) * (factor if name == "hd" else 1)
                    lines.append({"config": arms.complete(config | {"lr": arms.grid(i), "seed": seed}),
                                  "final": {"all": [loss, 1.0], "math": [loss, 1.0]},
                                  "trained": 1, "moments": 2, "constants": 3, "effective_rank": [4],
                                  "python": "3", "torch": "2",
                                  "commit": "c", "source": "s", "runner": "r", "curve": [[1, loss, 1.0]]})
        (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        records.append(page.page(table.load(tmp_path), set()))
    row = "| HD-PiSSA beats LoRA and PiSSA of the same r (tables 1, 2; figure 4) | **"
    assert row + "holds here**" in records[0] and row + "does not hold here**" in records[1]


def test_figures_are_drawn_from_the_results(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("runs.jsonl", "mute.jsonl", "speed.jsonl", "real_runs.jsonl"):
        (tmp_path / name).write_bytes((RESULTS / name).read_bytes())
    from tutorial.experiments import figures
    figures.main(["--results", str(tmp_path)])
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name for path in RESULTS.glob("*.svg")} and "mute.svg" in drawn
    assert (tmp_path / "README.md").read_text() == (RESULTS / "README.md").read_text()
