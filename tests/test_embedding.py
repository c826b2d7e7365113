"""Adapters of the tied embedding in tutorial/baselines against autograd through an explicit W_res + A B."""

import pytest
import torch
from torch.func import functional_call

import hd_pissa
import train
from tutorial.baselines import bases
from tutorial.baselines.embedding import LowRank, Shards
from tutorial.experiments.arms import complete

K, R = 4, 2


def small():
    model = train.GPT(60, block_size=16, layers=1, width=32, seed=3).double()
    x = torch.randint(0, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    return model, x, x.roll(-1, 1)


def loss_at(model, W, x, y):
    """Loss with W in both places of the tied weight."""
    logits = functional_call(model, {"wte.weight": W}, (x,), tie_weights=True)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


@pytest.mark.parametrize("decompose", [hd_pissa.components, bases.drawn()])
def test_shards_take_the_step_of_k_separate_shards(decompose):
    model, x, y = small()
    W0 = model.wte.weight.detach().clone()
    one = Shards(model.wte.weight, K, R, decompose, "wte.weight")
    optimizer = torch.optim.AdamW(one.parameters(), 0.01, weight_decay=0.0)
    one.join(optimizer)
    # K shards of their own: residual PiSSA by autograd, one AdamW each, dU_i written out.
    U, S, Vt = decompose(W0, K * R, "wte.weight")
    A, B = U.double() * S.double().sqrt(), S.double().sqrt()[:, None] * Vt.double()
    shards = [(A[:, i:i + R], B[i:i + R]) for i in range(0, K * R, R)]
    leaves = [(torch.zeros_like(a).requires_grad_(), torch.zeros_like(b).requires_grad_()) for a, b in shards]
    adams = [torch.optim.AdamW(pair, 0.01, weight_decay=0.0) for pair in leaves]
    W = W0.clone()
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        total = torch.zeros_like(W)
        for (a, b), (dA, dB), adam in zip(shards, leaves, adams):
            loss_at(model, W - a @ b + (a + dA) @ (b + dB), x, y).backward(inputs=[dA, dB])
            adam.step()
            with torch.no_grad():
                total += (a + dA) @ (b + dB) - a @ b
                dA.zero_()
                dB.zero_()
            adam.zero_grad()
        W += total
        torch.testing.assert_close(model.wte.weight.detach(), W, rtol=1e-9, atol=1e-11)
    assert model.lm_head.weight is model.wte.weight and (W - W0).abs().max() > 0.01


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_low_rank_is_lora_and_pissa(method):
    model, x, y = small()
    W0 = model.wte.weight.detach().clone()
    one = LowRank(model.wte.weight, R, method, "wte.weight", seed=1)
    A, B = (t.clone().requires_grad_() for t in one.parameters())
    W_res = W0 - (A @ B).detach()
    if method == "lora":
        assert not B.any() and A.any()
    else:
        S = torch.linalg.svdvals(W0)
        torch.testing.assert_close(torch.linalg.svdvals(W_res)[0], S[R])    # the top r are taken out
    ours = torch.optim.AdamW(one.parameters(), 0.01, weight_decay=0.0)
    one.join(ours)
    theirs = torch.optim.AdamW([A, B], 0.01, weight_decay=0.0)
    for _ in range(3):
        torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        ours.step()
        theirs.zero_grad()
        loss_at(model, W_res + A @ B, x, y).backward(inputs=[A, B])
        theirs.step()
        torch.testing.assert_close(model.wte.weight.detach(), (W_res + A @ B).detach(), rtol=1e-9, atol=1e-11)
    assert (model.wte.weight - W0).abs().max() > 0.005


@pytest.mark.parametrize("config, words", [
    ({"method": "hd_pissa", "r": 2, "also": "wte"}, "see all rows"),
    ({"method": "hd_pissa", "r": 2, "also": "wte", "gradients": "global", "aggregate": "sum",
      "optimizer": "muon"}, "adamw"),
    ({"method": "hd_pissa", "r": 2, "also": "ln_", "gradients": "global", "aggregate": "sum"}, "one of"),
    ({"method": "full", "also": "wte"}, "one of"),
    ({"method": "lora", "r": 2, "also": ""}, "one of")])
def test_what_cannot_be_trained_beside(config, words):
    with pytest.raises(ValueError, match=words):
        complete(config)
