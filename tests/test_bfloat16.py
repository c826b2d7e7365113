"""bfloat16 weights: (high, low) is the float32 weight that the same updates give, bit for bit."""

import struct

import pytest
import torch
import toy

import hd_pissa
import hd_pissa_extra


def bits(values):
    return torch.tensor(values, dtype=torch.int64).to(torch.int32).view(torch.float32)


EDGES = {
    "ties": bits([0x3F808000, 0x3F818000, 0x40008000, 0x3F807FFF, 0x3F808001]),
    "negative ties": bits([0xBF808000, 0xBF818000, 0xBF807FFF, 0xBF808001]),
    "subnormals": bits([0x00000001, 0x00007FFF, 0x00008000, 0x00400001, 0x807FFFFF, 0x80000001]),
    "zeros and small": bits([0, 0x80000000, 0x00800000, 0x80800000]),
    "carry into the exponent": bits([0x3FFFFFFF, 0x3FFF8000, 0x00FFFFFF, 0xBFFF8000]),
    "random": torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 1e-3,
    "every exponent": bits([(e << 23) | 0x2B8123 for e in range(254)]),
}


@pytest.mark.parametrize("kind", EDGES)
def test_split_and_join_are_inverse_and_round_half_up(kind):
    """join(split(W)) is W in every bit; high by Python integers, one number at a time."""
    W = EDGES[kind]
    high, low = hd_pissa_extra.split(W)
    assert high.dtype == torch.bfloat16 and low.dtype == torch.int16
    assert torch.equal(hd_pissa_extra.join(high, low).view(torch.int32), W.view(torch.int32))
    for value, got in list(zip(W.tolist(), high.view(torch.int16).tolist()))[:300]:
        (pattern,) = struct.unpack("<I", struct.pack("<f", value))
        assert got & 0xFFFF == (pattern + 0x8000) >> 16
    assert ((high.float() - W).abs() <= W.abs() * 2**-8 + 2**-134).all()


def problem():
    weights, bias, data = toy.problem(shards=4, steps=20)
    return [W.float() for W in weights], bias.float(), data


def updates(dtype, exchange, loaded_as=torch.float32):
    """Twenty merges of given increments of the size that lr 2e-5 makes; the stored weights as float32."""
    weights, bias, _ = problem()
    if loaded_as == torch.bfloat16:
        weights, bias = [W.bfloat16().float() for W in weights], bias.bfloat16().float()
    model = toy.module(weights, bias)
    if loaded_as == torch.bfloat16 and dtype == torch.bfloat16:
        model, dtype = model.bfloat16(), None
    adapters = hd_pissa_extra.attach(model, 2, shards=4, dtype=dtype, exchange=exchange)
    if not torch.is_floating_point(model[0].weight) or model[0].weight.dtype == torch.bfloat16:
        model.bfloat16()
    g, start = torch.Generator().manual_seed(1), adapters.state_dict()
    applied = []
    for _ in range(20):
        for leaf in adapters.parameters():
            leaf.data.copy_(2e-5 * torch.randn(leaf.shape, generator=g))
        adapters.merge_()
        applied.append(float(adapters.applied))
    Ws = [hd_pissa_extra.stored(slot)[0] for slot in adapters.slots]
    return [W.detach().clone() for W in Ws], applied, start, adapters, weights


@pytest.mark.parametrize("exchange", ["all_gather", "all_reduce"])
@pytest.mark.parametrize("loaded_as", [torch.float32, torch.bfloat16])
def test_halves_equal_the_float32_weight_after_twenty_merges(exchange, loaded_as):
    """From a float32 and from a bfloat16 checkpoint; the same basis, so that updates are the same."""
    wide, applied, start, *_ = updates(None, exchange, loaded_as)
    halves, applied16, start16, adapters, weights = updates(torch.bfloat16, exchange, loaded_as)
    assert all(torch.equal(start[name], start16[name]) for name in start if ".shard" in name)
    assert all(slot.module.weight.dtype == torch.bfloat16 for slot in adapters.slots)
    for a, b, W in zip(wide, halves, weights):
        assert torch.equal(a, b) and not torch.equal(a, W.T)
    assert applied == applied16 and all(abs(share - 1) < 0.02 for share in applied)


def test_plain_bfloat16_addition_would_lose_the_update():
    """What the halves are for: the same increments added to bfloat16 weights move almost none of them."""
    wide, _, _, adapters, weights = updates(None, "all_gather")
    for a, W in zip(wide, weights):
        step = (a - W.T) / 20
        plain = W.T.bfloat16()
        for _ in range(20):
            plain += step
        moved = ((plain.float() - W.T.bfloat16().float()) * (20 * step)).sum() / (20 * step).square().sum()
        assert abs(float(moved)) < 0.5


def test_state_dict_carries_the_low_halves():
    halves, _, _, adapters, _ = updates(torch.bfloat16, "all_gather")
    state = adapters.state_dict()
    for slot in adapters.slots:
        slot.low.zero_()
    adapters.load_state_dict(state)
    for W, slot in zip(halves, adapters.slots):
        assert torch.equal(hd_pissa_extra.join(slot.module.weight, slot.low), W)


def test_step_0_logits_and_gradients_in_bfloat16():
    """The forward is the plain bfloat16 layer's bit for bit; gradients are as long as float32's."""
    weights, bias, data = problem()
    plain, model, wide = (toy.module(weights, bias) for _ in range(3))
    plain.bfloat16()
    adapters = hd_pissa_extra.attach(model.bfloat16(), 2)
    reference = hd_pissa.attach(wide, 2)
    x = data[0][0][0].bfloat16()
    assert torch.equal(plain(x), model(x))
    for m, inputs in ((model, x), (wide, x.float())):
        m(inputs).float().square().mean().backward()
    for a, b in zip(adapters.parameters(), reference.parameters()):
        assert a.grad.dtype == torch.float32
        # signs of singular vectors may differ between the two weights, so gradients are compared by size
        assert float(a.grad.norm()) == pytest.approx(float(b.grad.norm()), rel=0.05)
