"""Rank growth on toy matrices (DESIGN fact 7 and section 6 of the paper), exactly, in float64."""

import pytest
import torch
import toy
import twin

import hd_pissa


def rank_of(before, after) -> int:
    return int(torch.linalg.matrix_rank(after - before, rtol=1e-11))


def update(steps, shards, rank, **attach):
    """(before, after) of the 20 x 24 weight; a large lr so that second-order terms stand above rounding."""
    weights, bias, data = toy.problem(shards=shards, steps=steps)
    return weights[0], toy.run(weights, bias, data, lr=attach.pop("lr", 0.1), rank=rank, **attach)[0][0]


@pytest.mark.parametrize("shards, rank", [(1, 1), (1, 3), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_one_update_has_rank_2Kr(shards, rank):
    """min(2Kr, m, n), so it grows with K at fixed r."""
    assert rank_of(*update(1, shards, rank)) == min(2 * shards * rank, 20)


@pytest.mark.parametrize("steps, shards, rank", [(2, 1, 2), (3, 2, 1), (4, 1, 3), (3, 2, 2), (5, 2, 2)])
def test_T_updates_have_rank_T_plus_1_Kr(steps, shards, rank):
    """min((T+1) Kr, m, n): every step's second-order term adds Kr directions."""
    assert rank_of(*update(steps, shards, rank)) == min((steps + 1) * shards * rank, 20)


def test_lora_init_starts_at_Kr():
    """With B_i = 0 one update is sum_i A_i dB_i + dA_i dB_i, and g_A = 0 makes dA_i = 0."""
    assert rank_of(*update(1, 4, 2, init="lora")) == 8


def test_residual_pissa_stays_at_2r():
    """The oracle's own adapters: A, B trained, W_res fixed; after many steps W moved by rank 2r at most."""
    weights, bias, data = toy.problem(shards=1, steps=6)
    (A0, B0), r = twin.slices(weights[0], 1, 3)[0], 3
    A, B = A0.clone().requires_grad_(), B0.clone().requires_grad_()
    optimizer = torch.optim.AdamW([A, B], lr=0.1, weight_decay=0.0)
    for ((x, y),) in data:
        hidden = torch.tanh(x @ (weights[0] - A0 @ B0) + (x @ A) @ B + bias)
        (hidden @ weights[1] - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert rank_of(A0 @ B0, (A @ B).detach()) == 2 * r


def test_spectrum_drops_at_2Kr_in_proportion_to_lr():
    """sigma_{2Kr+1} / sigma_1 after 5 steps is second order: ten times smaller at a tenth of the lr."""
    tails = []
    for lr in (1e-2, 1e-3, 1e-4):
        S = hd_pissa.update_spectrum(*update(5, 2, 2, lr=lr))
        assert hd_pissa.effective_rank(S) <= 8
        tails.append(float(S[8] / S[0]))
    assert tails[0] / tails[1] == pytest.approx(10, rel=0.3) and tails[1] / tails[2] == pytest.approx(
        10, rel=0.3
    )


def test_effective_rank_counts_above_one_percent():
    """By hand, and 0 for no update at all."""
    assert hd_pissa.effective_rank(torch.tensor([5.0, 1.0, 0.051, 0.049])) == 3
    assert hd_pissa.effective_rank(torch.zeros(4)) == 0


def test_rounding_floor_against_simulated_additions():
    """The largest singular value of what float32 additions lose, within 15 %."""
    report = pytest.importorskip("training.report")
    g = torch.Generator().manual_seed(0)
    W = torch.randn((200, 300), generator=g) / 14
    exact, rounded = W.double(), W.clone()
    for _ in range(20):
        step = 1e-4 * torch.randn(W.shape, generator=g)
        exact, rounded = exact + step, rounded + step
    lost = float(hd_pissa.update_spectrum(exact, rounded.double())[0])
    assert report.rounding_floor(W, 20) == pytest.approx(lost, rel=0.15)
