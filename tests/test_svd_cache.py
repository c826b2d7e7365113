"""The cache of decompositions: any K r is sliced from it, and it never hands out a wrong or damaged one."""

import os
import resource
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
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


WRITER = """
import signal, sys, torch
sys.path[:0] = sys.argv[1:2]
from training.svd_cache import cached_components
def half(found, file):
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    signal.pause()
torch.save = half
cached_components(sys.argv[2])(torch.eye(32), 8, "W")
"""


def test_what_killed_runs_were_writing_is_removed(tmp_path):
    """Not while the writer lives; not another host's, nor anyone's files with or without such a name."""
    own = f"{'0' * 32}_32x24_float32.{socket.gethostname()}."
    foreign = ["notes.txt", f"{own}xyz", f"my {own}12", f"{'0' * 32}_32x24_float32.elsewhere.12ab"]
    for name in foreign:
        (tmp_path / name).write_text("precious")
    (tmp_path / f"{own}12").mkdir()
    (tmp_path / f"{own}34").symlink_to(tmp_path / "notes.txt")
    os.mkfifo(tmp_path / f"{own}56")
    before = {*os.listdir(tmp_path)}
    command = [sys.executable, "-c", WRITER, str(ROOT), str(tmp_path)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert writer.stdout.readline() == b"writing\n"
        cached_components(tmp_path)
        (unfinished,) = {*os.listdir(tmp_path)} - before
    finally:
        writer.kill()
        writer.communicate()
    assert (tmp_path / unfinished).read_bytes() == b"half"
    cached_components(tmp_path)
    assert {*os.listdir(tmp_path)} == before
    assert all((tmp_path / name).read_text() == "precious" for name in foreign)


def test_a_file_removed_by_another_host_ends_no_run(tmp_path, monkeypatch):
    """It is a cache: what was computed is used."""
    save = torch.save

    def removed(found, file):
        save(found, file)
        os.unlink(file.name)

    monkeypatch.setattr(torch, "save", removed)
    U, S, Vt = cached_components(tmp_path)(torch.eye(32), 8, "W")
    assert S.shape == (8,) and not os.listdir(tmp_path)


def test_a_full_disk_is_named_and_left_clean(tmp_path):
    """A limit on the size of files stands for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(ValueError, match=r"\.pt cannot be written .*another --svd_cache"):
            cached_components(tmp_path)(torch.eye(32), 8, "W")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not os.listdir(tmp_path)


def test_a_cache_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(ValueError, match=f"--svd_cache {path} is no folder"):
            cached_components(path)


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
