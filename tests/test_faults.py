"""Every comparison with the twin must be able to fail: plant each fault and see it go red."""

import pytest
import torch
import toy
import twin

import hd_pissa


def agrees(**attach) -> bool:
    """Does training through hd_pissa equal the twin?"""
    weights, bias, data = toy.problem()
    expected = twin.run(weights, bias, data, toy.K, toy.R, 1e-2)
    got, _ = toy.run(weights, bias, data, **attach)
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(got, expected))


original_factors, original_update, original_select = (
    hd_pissa.shard_factors,
    hd_pissa.update_factors,
    hd_pissa.Adapters.select,
)
original_backward, original_merge = hd_pissa.Mute.backward, hd_pissa.Adapters.merge_


def wrong_slice(W, K, r, init, s, seed, *rest):
    return original_factors(W, K, r, init, s, seed, *rest).roll(1, 0)[[0, 0, *range(2, K)]]


def all_top(W, K, r, init, s, seed, *rest):
    return original_factors(W, K, r, "top", s, seed, *rest)


def unrooted(W, K, r, init, s, seed, *rest):
    return original_factors(W, K, r, init, 2 * s, seed)


def no_cross_term(A, B, dA, dB):
    return original_update(A - dA, B, dA, dB)


def no_second_order(A, B, dA, dB):
    return torch.stack((dA.mT, A.mT)).flatten(0, 2), torch.stack((B, dB)).flatten(0, 2)


def dropped_shard(A, B, dA, dB):
    keep = torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None, None]
    return original_update(A, B, dA * keep, dB * keep)


def stale_basis(self, i):
    original_select(self, 0)
    for slot in self.slots:
        slot.dA, slot.dB = slot.leaves[i]


def wrong_gradient(ctx, dY):
    grads = list(original_backward(ctx, dY))
    grads[5] = grads[5] * torch.linspace(1, -1, grads[5].shape[0])[:, None].to(dY)
    return tuple(grads)


def wrong_dX(ctx, dY):
    grads = list(original_backward(ctx, dY))
    return (None if grads[0] is None else grads[0] * 0.5, *grads[1:])


def increments_kept(self):
    kept = self.increments.clone()
    original_merge(self)
    self.increments.copy_(kept)
    self.merged = self.increments._version  # and hidden from the check for unmerged increments


FAULTS = [
    ("shard_factors", wrong_slice),
    ("shard_factors", all_top),
    ("shard_factors", unrooted),
    ("update_factors", no_cross_term),
    ("update_factors", no_second_order),
    ("update_factors", dropped_shard),
    ("Adapters.select", stale_basis),
    ("Mute.backward", wrong_gradient),
    ("Mute.backward", wrong_dX),
    ("Adapters.merge_", increments_kept),
]


def test_no_fault_is_green():
    """The comparison that the faults below must turn red."""
    assert agrees()


@pytest.mark.parametrize("where, fault", FAULTS, ids=lambda v: getattr(v, "__name__", v))
def test_planted_fault_is_red(where, fault, monkeypatch):
    """One fault each, by monkeypatch, in otherwise unchanged code."""
    owner, name = hd_pissa, where
    if "." in where:
        owner, name = getattr(hd_pissa, where.split(".")[0]), where.split(".")[1]
    monkeypatch.setattr(owner, name, staticmethod(fault) if where == "Mute.backward" else fault)
    assert not agrees()


@pytest.mark.parametrize(
    "attach", [{"aggregate": "sum"}, {"alpha": 2.0 * toy.R}, {"clip": 1e-3}, {"lr": 1.01e-2}], ids=str
)
def test_another_setting_is_red(attach):
    """Sum for mean, another scale, clipping, one percent of the learning rate: none passes."""
    assert not agrees(**attach)


def test_truncation_for_rounding_is_red():
    """Halves that truncate still join exactly; what tells them apart is the weight that the forward sees."""
    split = pytest.importorskip("hd_pissa_extra").split
    W = torch.randn(4096, generator=torch.Generator().manual_seed(0))

    def within_half_a_unit(high):
        return bool(((high.float() - W).abs() <= W.abs() * 2**-8).all())

    truncated = (W.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    assert within_half_a_unit(split(W)[0]) and not within_half_a_unit(truncated)
