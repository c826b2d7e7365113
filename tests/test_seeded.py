"""A basis from a seed and stochastic rounding: numbers that are made again instead of kept.

Oracles: the same basis stored by decompose=, a DCT written from its definition by NumPy, the mean and the
two neighbours of a rounded number by exact arithmetic.
"""

import numpy as np
import pytest
import torch
import toy
from spawned import spawn

import hd_pissa
import hd_pissa_extra


def orthogonal(sizes: tuple[int, ...], seed: int) -> list[np.ndarray]:
    """Of each size: random signs times the DCT-II matrix, columns in a random order, by definition."""
    generator, made = torch.Generator().manual_seed(seed), []
    for size in sizes:
        signs = torch.randint(0, 2, (size, 1), generator=generator, dtype=torch.float64).numpy() * 2 - 1
        j, f = np.arange(size)[:, None], torch.randperm(size, generator=generator).numpy()
        C = np.sqrt(2 / size) * np.cos(np.pi * (2 * j + 1) * f / (2 * size))
        C[:, f == 0] /= np.sqrt(2)
        made.append(signs * C)
    return made


def stored(seed: int):
    """The basis of init="random" as a decomposition that is kept."""
    def decompose(W, k, name):
        U, V = (Q[:, :k] for Q in orthogonal((*W.shape,), hd_pissa.seed_of("dct", seed, name)))
        return torch.from_numpy(U), torch.ones(k, dtype=torch.float64), torch.from_numpy(V).T
    return decompose


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (7, 64), (129, 7)])
def test_columns_are_a_signed_dct(sizes):
    """All of them, and a part in the middle; orthonormal, and other ones for another seed."""
    seed = hd_pissa.seed_of("test", sizes)
    every = hd_pissa_extra.seeded_columns(sizes, 0, max(sizes), seed, "cpu", torch.float64)
    for size, rows, wanted in zip(sizes, every, orthogonal(sizes, seed)):
        torch.testing.assert_close(rows @ rows.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(rows.T, torch.from_numpy(wanted), rtol=0, atol=1e-12)
    part = hd_pissa_extra.seeded_columns(sizes, 1, 1, seed, "cpu", torch.float64)
    assert all(torch.equal(a, b[1:2]) for a, b in zip(part, every))


@pytest.mark.parametrize("size", [2**15, 2**15 + 1])
def test_the_largest_frequency_of_a_long_side(size):
    """Where its products with the positions are the largest whole numbers, and beyond."""
    generator = torch.Generator().manual_seed(3)
    signs = 2 * torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) - 1
    place = int(torch.randperm(size, generator=generator).argmax())
    column, = hd_pissa_extra.seeded_columns((size,), place, 1, 3, "cpu", torch.float64)
    angles = torch.arange(1, 2 * size, 2, dtype=torch.float64) * (size - 1) * (torch.pi / (2 * size))
    torch.testing.assert_close(column[0], signs * (2 / size) ** 0.5 * angles.cos(), rtol=0, atol=1e-9)


def test_signs_and_frequencies_are_drawn_anew_for_every_seed():
    """Half of the signs are equal in two draws, and few of 40 in 4000 columns."""
    draws = [hd_pissa_extra.ingredients((4000,), 40, hd_pissa.seed_of(i), "cpu")[0] for i in range(4)]
    for i, (signs, f, _) in enumerate(draws):
        assert 0.46 < (signs > 0).double().mean() < 0.54 and 1500 < f.double().mean() < 2500
        assert all(0.46 < (signs == other).double().mean() < 0.54 and len({*f.tolist()} &
                   {*places.tolist()}) < 5 for other, places, _ in draws[:i])


@pytest.mark.parametrize("exchange", ["all_gather", "all_reduce"])
@pytest.mark.parametrize("gradients", ["local", "global"])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_training_equals_the_stored_basis(gradients, exchange, alpha):
    weights, bias, data = toy.problem()
    options = dict(gradients=gradients, exchange=exchange, alpha=alpha)
    made, adapters = toy.run(weights, bias, data, init="random", **options)
    kept, _ = toy.run(weights, bias, data, decompose=stored(0), **options)
    for a, b, W in zip(made, kept, weights):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert (a - W).abs().max() > 1e-3
    assert adapters.basis.numel() == 0 and not any(".A" in name for name in adapters.tensors())
    other, _ = toy.run(weights, bias, data, init="random", seed=1, **options)
    assert not torch.allclose(made[0], other[0])


def two_processes():
    return [W.tolist() for W in toy.run(*toy.problem(torch.float32), init="random", gradients="global")[0]]


def test_processes_make_the_same_basis(tmp_path):
    expected = two_processes()
    for result in spawn(2, two_processes, tmp_path):
        for a, b in zip(result, expected):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-5, atol=1e-6)


def test_state_of_another_seed_is_refused():
    weights, bias, _ = toy.problem()
    a, b = (hd_pissa_extra.attach(toy.module(weights, bias), 2, shards=2, init="random", seed=seed)
            for seed in (0, 1))
    with pytest.raises(ValueError, match="seed is 1 here, 0 there"):
        b.load_state_dict(a.state_dict())


def test_rounding_goes_to_a_neighbour_and_its_mean_is_exact():
    """Over many steps: only the two bfloat16 neighbours occur, and their mean is W within its own noise."""
    W = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 2000)
    draws = torch.stack([hd_pissa_extra.round_stochastically(W, hd_pissa.seed_of(t)).double()
                         for t in range(400)])
    bits = W.view(torch.int32)
    below = (bits >> 16 << 16).view(torch.float32).double()             # towards zero
    above = ((bits >> 16) + 1 << 16).view(torch.float32).double()
    assert ((draws == below) | (draws == above)).all()
    gap = (above - below).abs()
    off = (draws.mean(0) - W.double()).abs() / gap
    assert off.max() < 5 * 0.5 / 400**0.5 and abs(((draws.mean(0) - W.double()) / gap).mean()) < 3e-3


def test_rows_round_alike_whoever_holds_them():
    W = torch.randn((40, 30), generator=torch.Generator().manual_seed(0))
    whole = hd_pissa_extra.round_stochastically(W, 5)
    assert torch.equal(hd_pissa_extra.round_stochastically(W[13:], 5, 13 * 30), whole[13:])
    assert not torch.equal(hd_pissa_extra.round_stochastically(W, 6), whole)


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
def test_two_bytes_a_weight_keep_the_mean_of_small_updates(loaded):
    """Steps of 1e-3 of a unit of bfloat16: nearest rounding loses all, stochastic none in the mean."""
    weights, bias, _ = toy.problem(torch.float32)
    share = []
    model = toy.module(weights, bias).to(loaded)
    adapters = toy.attach(model, 2, shards=toy.K, dtype=torch.bfloat16, rounding="stochastic")
    assert model[0].weight.dtype == torch.bfloat16 and not any("low" in name for name in adapters.tensors())
    g = torch.Generator().manual_seed(1)
    for _ in range(200):
        adapters.increments.copy_(1e-4 * torch.randn(adapters.increments.shape, generator=g))
        adapters.merge_()
        share.append(float(adapters.applied))
    assert abs(sum(share) / len(share) - 1) < 4 * torch.tensor(share).std() / len(share) ** 0.5 < 1


def test_every_seed_step_and_layer_rounds_by_bits_of_its_own():
    """Weights half way between two neighbours: which go up in one draw says nothing of another."""
    half_way, draws = torch.full((64, 64), 1 + 2**-8), []
    for seed in (0, 1):
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        adapters = toy.attach(model, 2, dtype=torch.bfloat16, rounding="stochastic", init="random", seed=seed)
        for _ in range(2):
            for slot in adapters.slots:
                slot.write(half_way)
                draws.append(slot.W > 1)
            adapters.next_step()
    for i, a in enumerate(draws):
        assert 0.46 < a.double().mean() < 0.54
        assert all(0.46 < (a == b).double().mean() < 0.54 for b in draws[:i])
