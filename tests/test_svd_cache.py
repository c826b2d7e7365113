"""The cache of decompositions: any K r is sliced from it, and it never hands out a wrong or damaged one."""

import pytest
import torch
from spawned import spawn
from toy import module, problem

import hd_pissa
import hd_pissa_extra
from training.svd_cache import cached_components


@pytest.fixture
def counted(monkeypatch):
    """Names of the weights that were really decomposed."""
    names, original = [], hd_pissa_extra.components

    def counting(W, k, name="W"):
        names.append(name)
        return original(W, k)

    monkeypatch.setattr(hd_pissa_extra, "components", counting)
    return names


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_a_stored_rank_serves_every_smaller_one(shape, tmp_path, counted):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    decompose = cached_components(tmp_path)
    decompose(W, 24, "first")
    expected = torch.linalg.svd(W.double(), full_matrices=False)
    for k in (24, 8, 1):
        U, S, Vt = decompose(W, k, "again")
        assert U.shape == (shape[0], k) and Vt.shape == (k, shape[1])
        torch.testing.assert_close(S.double(), expected[1][:k], rtol=1e-5, atol=0)
        product = (expected[0][:, :k] * expected[1][:k]) @ expected[2][:k]
        torch.testing.assert_close(((U * S) @ Vt).double(), product, rtol=0, atol=1e-4)
    assert counted == ["first"]
    decompose(W, 32, "more than is stored")
    decompose(W.T, 8, "another layout")
    assert counted == ["first", "more than is stored", "another layout"]


def test_adapters_from_the_cache_are_the_same(tmp_path, counted):
    plain = hd_pissa_extra.attach(module(*problem(torch.float32)[:2]), rank=2, shards=2)
    stored = hd_pissa_extra.attach(module(*problem(torch.float32)[:2]), rank=2, shards=2,
                                   decompose=cached_components(tmp_path))  # fmt: skip
    again = hd_pissa_extra.attach(module(*problem(torch.float32)[:2]), rank=2, shards=2,
                                  decompose=cached_components(tmp_path))  # fmt: skip
    assert len(counted) == 2  # one each for the two layers, at the first of the two
    assert torch.equal(plain.basis, stored.basis) and torch.equal(plain.basis, again.basis)


def damaged(tmp_path, how):
    """A cache of two weights whose first file is then spoilt."""
    W, other = (torch.randn(32, 24, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    decompose = cached_components(tmp_path)
    decompose(W, 8, "W")
    (file,) = tmp_path.glob("*.pt")
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "another weight":
        torch.save([t.contiguous() for t in hd_pissa.components(other, 8)], file)
    elif how == "one component turned":
        U, S, Vt = torch.load(file, weights_only=True)
        U[:, 3] *= -1
        torch.save([U, S, Vt], file)
    elif how == "not a tensor":
        torch.save({"U": 1}, file)
    return W


@pytest.mark.parametrize("how", ["truncated", "another weight", "one component turned", "not a tensor"])
def test_a_spoilt_file_is_named(how, tmp_path):
    W = damaged(tmp_path, how)
    with pytest.raises(ValueError, match=r"\.pt .*delete it"):
        cached_components(tmp_path)(W, 8, "W")


def attach_with(folder):
    """On each rank, the message with which attach refuses."""
    model = torch.nn.Sequential(torch.nn.Linear(32, 24, bias=False), torch.nn.Linear(24, 24, bias=False))
    for seed, layer in enumerate(model):
        generator = torch.Generator().manual_seed(seed)
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator)
    cached = cached_components(folder)
    try:
        hd_pissa.attach(model, rank=2, shards=2, decompose=cached)
    except ValueError as e:
        return str(e)
    return ""


def test_a_spoilt_file_stops_every_rank_alike(tmp_path):
    """The file concerns one rank's layer alone; the other must not wait for it."""
    cache = tmp_path / "cache"
    assert spawn(2, attach_with, tmp_path, cache) == ["", ""]
    for file in sorted(cache.glob("*_32x24_*.pt")):
        file.write_bytes(file.read_bytes()[:50])
    first, second = spawn(2, attach_with, tmp_path, cache)
    assert first == second and "damaged" in first and "32x24" in first
