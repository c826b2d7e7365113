"""TF32 is for forward, backward and the fold. What must be exact is so, however TF32 was asked for:
components, their checks and caches, `applied`. Oracle: the same without it, bit for bit, or in float64.

tests/tf32.py simulates it. --dtype tf32 on a whole run: here where it is refused, in test_rehearsal on a GPU.
"""

import math
import os
import subprocess
import sys

import pytest
import tf32
import torch
import toy

import hd_pissa
import hd_pissa_extra
import train
from training import processes
from training.svd_cache import cached_components

SETTINGS = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
}  # fmt: skip
if not tf32.OLD:        # since torch 2.9; after these alone the settings above cannot even be read
    SETTINGS |= {
        "CUDA's": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        "all backends'": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        "high and CUDA's": lambda: (SETTINGS["high"](), SETTINGS["CUDA's"]()),
        "all backends' and high": lambda: (SETTINGS["all backends'"](), SETTINGS["high"]()),
    }  # fmt: skip


def state() -> list:
    """All that can be read of torch's settings."""
    def read(get):
        try:
            return get()
        except (AttributeError, RuntimeError) as e:
            return type(e)
    matmul, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn
    return [*map(read, (torch.get_float32_matmul_precision, lambda: matmul.allow_tf32,
                        lambda: matmul.fp32_precision, lambda: cpu.matmul.fp32_precision,
                        lambda: torch.backends.fp32_precision))]


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    torch.set_float32_matmul_precision("highest")
    if not tf32.OLD:
        for place in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            place.fp32_precision = "none"


@pytest.fixture(params=SETTINGS)
def asked(request):
    """TF32 is asked for, in every way that torch has."""
    SETTINGS[request.param]()
    return state()


def weights(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) / shape[0] ** 0.5 for shape in shapes]


def attached(**options):
    W, V = weights((60, 90), (90, 40))
    model = torch.nn.Sequential(torch.nn.Linear(60, 90), torch.nn.Tanh(), torch.nn.Linear(90, 40))
    model[0].weight.data, model[2].weight.data = W.T.contiguous(), V.T.contiguous()
    return model, hd_pissa_extra.attach(model, 2, shards=4, **options)


def test_the_simulation_is_as_coarse_as_tf32(asked):
    """10 bits: 2^-11 of each factor at most, and of that size. Products alone, in float32 alone."""
    A, B = weights((50, 60), (60, 70))
    exact = A.double() @ B.double()
    for nearest, least in ((True, 1e-4), (False, 3e-4)):
        with tf32.TF32(nearest) as seen:
            off = ((A @ B).double() - exact).norm() / exact.norm()
            assert least < off < 1e-3 and seen.seen == 1
            assert torch.equal(A.double() @ B.double(), exact) and torch.equal(A + 1, 1 + A)
    some = torch.tensor([1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -1 - 2**-11, float("inf")])
    assert tf32.rounded(some, False).tolist() == [1 + 2**-10, 1, 1, -1, float("inf")]
    assert tf32.rounded(some, True).tolist() == [1 + 2**-10, 1 + 2**-10, 1, -1 - 2**-10, float("inf")]


@pytest.mark.parametrize("nearest", [True, False])
@pytest.mark.parametrize("init", ["hd_pissa", "top"])
def test_components_are_those_without(asked, nearest, init):
    """Bit for bit, by the same driver; what the user has set comes back."""
    settings = state()
    with tf32.TF32(nearest):
        coarse = attached(init=init)[1]
    assert state() == settings == asked
    assert torch.equal(coarse.basis, attached(init=init)[1].basis)


def test_an_orthonormal_basis_passes_its_check(asked):
    """A driver of the user's, whose components are float32."""
    Q, R = (torch.linalg.qr(W).Q for W in weights((600, 200), (900, 200)))
    with tf32.TF32(nearest=False) as seen:
        hd_pissa.shard_factors(Q @ R.T, 4, 50, "hd_pissa", 1.0, 0, lambda *_: (Q, torch.ones(200), R.T))
    assert seen.seen == 1               # the product above


def test_a_cache_is_believed_with_and_without(asked, tmp_path):
    W, = weights((80, 60))
    with tf32.TF32(nearest=False):
        first = cached_components(str(tmp_path))(W, 8, "W")
        again = cached_components(str(tmp_path))(W, 8, "W")
    assert len(list(tmp_path.iterdir())) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("exchange", ["all_gather", "all_reduce"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_applied_is_computed_exactly(asked, exchange, dtype):
    """Against its definition in float64, from the weight before and after; the fold itself may be coarse."""
    model, adapters = attached(exchange=exchange, dtype=dtype)
    slot = adapters.slots[0]
    for leaf in adapters.parameters():
        leaf.data.normal_(std=1e-3, generator=torch.Generator().manual_seed(1))
        leaf.grad = torch.ones_like(leaf)
    A, B = (factor.double() for factor in slot.views(adapters.own))
    dA, dB = (leaf.double() for leaf in slot.views(adapters.increments.clone()))
    dW = (adapters.share * ((A + dA) @ (B + dB) - A @ B).sum(0)).T[:8]          # (n, m) as stored
    before = slot.read()[0].double()[:8].clone()
    with tf32.TF32(nearest=False) as seen:
        adapters.merge_()
    assert seen.seen == len(adapters.slots)                                     # the fold follows the user
    applied = float(((slot.read()[0].double()[:8] - before) * dW).sum() / dW.square().sum())
    assert abs(applied - 1) < 2e-3
    # all_reduce compares with the sum that was sent, which is coarse already
    assert abs(float(adapters.applied) - applied) < (1e-7 if exchange == "all_gather" else 2e-3)


def test_a_coarse_fold_is_off_by_less_than_W_rounds():
    """At the paper's rate, K = 8, r = 16, W of the size that models have: so the fold may be TF32's."""
    generator, (n, K, r) = torch.Generator().manual_seed(0), (512, 8, 16)
    W = 0.02 * torch.randn(n, n, generator=generator)
    A, B = hd_pissa.shard_factors(W, K, r, "hd_pissa", 1.0, 0).float().split(n * r, dim=1)
    A, B = A.unflatten(1, (n, r)), B.unflatten(1, (r, n))
    dA, dB = (2e-5 * torch.randn(f.shape, generator=generator).sign() for f in (A, B))     # as Adam steps
    Pt, Q = hd_pissa.update_factors(A, B, dA, dB)
    dW, off = Pt.T.double() @ Q.double() / K, {}
    for precision in ("ieee", "tf32"):
        with hd_pissa_extra.float32_products(precision), tf32.TF32():
            folded, alone = W.clone(), torch.zeros_like(W)
            hd_pissa.fold_(folded, Pt.T, Q, 1 / K)
            hd_pissa.fold_(alone, Pt.T, Q, 1 / K)
        moved = folded.double() - W
        off[precision] = [float((x - dW).norm() / dW.norm()) for x in (moved, alone.double())]
        assert abs(float((moved * dW).sum() / dW.square().sum()) - 1) < 5e-4            # the share applied
    once = float(((W + dW).float() - W - dW).norm() / dW.norm())        # the least that float32 W can be off
    assert off["ieee"][1] < 1e-6 < 1e-4 < off["tf32"][1] < once < 1.05 * off["ieee"][0]
    # A CPU's kernel rounds W once or, where it adds in parts, several times: beside that, TF32 and no more.
    assert off["tf32"][0] < 1.05 * math.hypot(off["ieee"][0], off["tf32"][1])


def test_training_in_tf32_stays_close(asked):
    """Weights after five steps against those of float32: what TF32 costs is small, and not nothing."""
    problem = toy.problem(torch.float32)
    with tf32.TF32() as seen:
        coarse = toy.run(*problem, accumulate=False, bucket_mb=256)[0]
    torch.set_float32_matmul_precision("highest")
    exact = toy.run(*problem, accumulate=False, bucket_mb=256)[0]
    moved = max(float((a - W).norm()) for a, W in zip(exact, problem[0]))
    off = max(float((a - b).norm()) for a, b in zip(coarse, exact))
    assert seen.seen and 0 < off < 0.05 * moved


# ---- train.py --dtype tf32 -------------------------------------------------------------------------


def few(tmp_path, *flags):
    return ["--out", str(tmp_path / "out"), "--device", "cpu", "--threads", "1", "--max_steps", "2",
            "--batch_size", "16", "--eval_rows", "16", *flags]  # fmt: skip


@pytest.mark.parametrize("flags", [[], ["--method", "lora"], ["--method", "full"]])
def test_where_there_is_no_tf32_it_is_refused(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(few(tmp_path, "--dtype", "tf32", *flags))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "--dtype tf32" in said and "use --dtype float32" in said
    assert not (tmp_path / "out").exists()


def test_an_older_gpu_has_none_either(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match="Tesla T4.*7.5.*use --dtype float32"):
        processes.check_tf32(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    processes.check_tf32(torch.device("cuda", 0))


def test_a_dry_run_describes_it_anywhere(tmp_path):
    """W, factors and moments are float32."""
    told = [train.main(few(tmp_path, "--dry_run", "--dtype", dtype)) for dtype in ("tf32", "float32")]
    assert told[0]["memory"] == told[1]["memory"] and told[0]["traffic"] == told[1]["traffic"]


def test_float32_is_float32_whatever_was_set(tmp_path):
    """A container's setting, say, changes no run, and comes back behind it."""
    SETTINGS["high"]()
    settings = state()
    with tf32.TF32() as seen:
        train.main(few(tmp_path))
    assert not seen.seen and state() == settings


def test_steps_alone_are_coarse(monkeypatch, tmp_path):
    """attach, evaluation and the result's comparison with what was saved are float32's."""
    monkeypatch.setattr(processes, "check_tf32", lambda device: None)
    seen, plain = [], hd_pissa.train

    def watched(*args, **options):
        for record in plain(*args, **options):
            seen.append(tf32.wanted())
            yield record

    monkeypatch.setattr(hd_pissa, "train", watched)
    exam, looked = train.evaluate, []
    monkeypatch.setattr(train, "evaluate", lambda *a: (looked.append(tf32.wanted()), exam(*a))[1])
    save, saved = train.save, []
    monkeypatch.setattr(train, "save", lambda *a: (saved.append(tf32.wanted()), save(*a))[1])
    settings = state()
    train.main(few(tmp_path, "--dtype", "tf32", "--eval_every", "1"))
    assert seen == [True, True] and looked == [False] * 2 and saved and not any(saved)
    assert state() == settings
    config = (tmp_path / "out" / "config.json").read_text()
    assert '"dtype": "tf32"' in config


def test_torch_has_the_setting_that_is_pinned():
    """An empty pin would pass where torch has renamed it."""
    with hd_pissa_extra.float32_products("tf32"):
        assert tf32.wanted()
        with hd_pissa_extra.float32_products():
            assert not tf32.wanted()
        assert tf32.wanted()
    assert not tf32.wanted()


def test_a_containers_variable_asks_for_it():
    """TORCH_ALLOW_TF32_CUBLAS_OVERRIDE of NVIDIA's images is read when torch is imported."""
    program = ("import torch, tf32, hd_pissa_extra\nassert tf32.wanted()\n"
               "with hd_pissa_extra.float32_products(): assert not tf32.wanted()")
    environment = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | environment, capture_output=True,
                          text=True)
    assert not done.returncode, done.stderr
