"""Parameters that train whole beside the adapters: their gradients are those of the whole step batch.

Oracle: plain autograd of the mean loss over all rows through a copy of the model.
"""

import copy
import re

import pytest
import torch
import torch.nn as nn
from spawned import spawn

import hd_pissa
import hd_pissa_extra

K, STEPS = 4, 3


def problem():
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 12), nn.Tanh(),
                          nn.Linear(12, 5)).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, generator=g)
    return model, torch.randn((STEPS, K, 6, 12), generator=g, dtype=torch.float64)


def run(gradients="local", clip=None):
    """(weights after training, gradients of `also` at the first step)"""
    model, data = problem()
    adapters = hd_pissa_extra.attach(model, 2, shards=K, gradients=gradients, also=["5", "2"])
    optimizer, first = torch.optim.SGD(adapters.parameters(), 1e-2), None
    adapters.check(optimizer)
    for x in data:
        for i in range(adapters.S):
            with adapters.shard(i):
                loss = model(x[adapters.first + i]).square().mean()
                (loss / K if gradients == "global" else loss).backward()
        if clip:
            adapters.clip_grad_norm_(clip)
        else:
            adapters.collect_()
        first = first or [p.grad.tolist() for p in adapters.also.values()]
        optimizer.step()
        adapters.merge_()
    return [p.tolist() for p in model.parameters()], first


@pytest.mark.parametrize("gradients", ["local", "global"])
def test_gradients_are_the_whole_batch_s(gradients):
    model, data = problem()
    model(data[0].flatten(0, 1)).square().mean().backward()
    expected = [p.grad for name, p in model.named_parameters() if name[0] in "25"]
    weights, first = run(gradients)
    for a, b in zip(first, expected, strict=True):
        torch.testing.assert_close(torch.tensor(a, dtype=torch.float64), b, rtol=1e-10, atol=1e-14)
    moved = [torch.tensor(a, dtype=torch.float64) for a in weights]
    for (name, p), a in zip(problem()[0].named_parameters(), moved):
        assert torch.equal(p, a) == (name in ("0.bias", "3.bias")), "weights and `also` move, biases stay"


@pytest.mark.parametrize("gradients", ["local", "global"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_any_processes_and_shards_give_the_same(gradients, clip, tmp_path):
    expected, _ = run(gradients, clip)
    ranks = spawn(2, run, tmp_path, gradients, clip)
    assert ranks[0][0] == ranks[1][0]
    for a, b in zip(ranks[0][0], expected):
        a, b = (torch.tensor(x, dtype=torch.float64) for x in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_clipping_is_joint():
    model, data = problem()
    adapters = hd_pissa_extra.attach(model, 2, shards=1, also="5")
    model(data[0].flatten(0, 1)).square().mean().backward()
    grads = [p.grad.clone() for p in adapters.parameters()]
    norm = adapters.clip_grad_norm_(1e-2)
    expected = torch.cat([g.flatten() for g in grads]).norm()
    torch.testing.assert_close(norm, expected)
    for p, g in zip(adapters.parameters(), grads):
        torch.testing.assert_close(p.grad, g * 1e-2 / (expected + 1e-6))


@pytest.mark.parametrize("clip", [False, True])
def test_what_is_frozen_later_stays_and_trains_again_once_it_may(clip):
    """Oracle: a step of AdamW leaves out what has no gradient, its momentum too."""
    model, data = problem()
    adapters = hd_pissa_extra.attach(model, 2, also=["5", "2"])
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-2, weight_decay=0.0)

    def step():
        before = [p.detach().clone() for p in model.parameters()]
        model(data[0, 0]).square().mean().backward()
        if clip:
            adapters.clip_grad_norm_(1e-3)
        optimizer.step()
        adapters.merge_()
        return {name for (name, p), old in zip(model.named_parameters(), before) if not torch.equal(p, old)}

    everything = {"0.weight", "3.weight", "2.weight", "2.bias", "5.weight", "5.bias"}
    assert step() == everything
    model[5].requires_grad_(False)
    assert step() == step() == everything - {"5.weight", "5.bias"}
    model[5].requires_grad_(True)
    assert step() == everything


def test_what_was_named_trains_on_after_detach():
    """A step whose gradients were summed, for clipping say, and which was then not made."""
    model, data = problem()
    adapters = hd_pissa_extra.attach(model, 2, also=["5"])
    model(data[0, 0]).square().mean().backward()
    adapters.clip_grad_norm_(1.0)
    adapters.detach_()
    before = model[5].weight.detach().clone()
    model[5].zero_grad()
    model(data[0, 0]).square().mean().backward()
    torch.optim.SGD(model[5].parameters(), 0.1).step()
    assert not torch.equal(model[5].weight, before)


@pytest.mark.parametrize("together", [True, False])
def test_decay_and_rules_of_what_trains_beside_are_its_own(together):
    """Oracle: the same optimizer on a copy's head, with the gradients of plain autograd."""
    model, data = problem()
    plain = copy.deepcopy(model)
    adapters = hd_pissa_extra.attach(model, 2, also=["5"])
    increments = [p for name, p in adapters.named_parameters() if ".shard" in name]
    mine = dict(params=increments, weight_decay=0.0)
    head = dict(params=list(model[5].parameters()), weight_decay=0.1)
    optimizers = ([torch.optim.AdamW([mine, head], lr=1e-2)] if together else
                  [torch.optim.AdamW([mine], lr=1e-2), torch.optim.Adafactor([head], lr=1e-2)])
    other = type(optimizers[-1])(plain[5].parameters(), lr=1e-2, weight_decay=0.1)
    for net, steppers in ((model, optimizers), (plain, [other])):
        net(data[0, 0]).square().mean().backward()
        for optimizer in steppers:
            optimizer.step()
    adapters.merge_()
    for a, b in zip(model[5].parameters(), plain[5].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="reads the parameter"):
        adapters.check(torch.optim.AdamW(adapters.parameters(), weight_decay=0.1))


def test_a_name_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="also='scores' names no module"):
        hd_pissa_extra.attach(problem()[0], 2, also="scores")


def test_what_trains_beside_is_not_adapted_and_the_model_keeps_its_names():
    model, _ = problem()
    names = list(copy.deepcopy(model).state_dict())
    adapters = hd_pissa_extra.attach(model, 2, also=["5.weight"])
    assert [slot.name for slot in adapters.slots] == ["0", "3"] and list(model.state_dict()) == names
    assert model[5].weight.requires_grad and not model[5].bias.requires_grad


# ---- A head that was drawn, not loaded ---------------------------------------------------------------------


def classifiers():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                 vocab_size=64)  # fmt: skip
    vision = dict(image_size=8, patch_size=4, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                  num_attention_heads=4)  # fmt: skip
    return {
        "classifier": (transformers.BertModel(transformers.BertConfig(**small)),
                       transformers.BertForSequenceClassification),
        "score": (transformers.LlamaModel(transformers.LlamaConfig(**small, pad_token_id=0)),
                  transformers.LlamaForSequenceClassification),
        "qa_outputs": (transformers.BertModel(transformers.BertConfig(**small)),
                       transformers.BertForQuestionAnswering),
        "a vision model's": (transformers.ViTModel(transformers.ViTConfig(**vision)),
                             transformers.ViTForImageClassification),
        "a convolution": (transformers.ViTModel(transformers.ViTConfig(**vision)),
                          transformers.ViTForMaskedImageModeling),
        "beside another": (transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_embd=32, n_layer=1, n_head=2, vocab_size=64)), transformers.GPT2DoubleHeadsModel),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["classifier", "score", "qa_outputs", "a vision model's", "a convolution",
                                  "beside another"])  # fmt: skip
def test_a_fresh_head_is_refused_whatever_its_name_and_the_remedies_work(name, tmp_path):
    """Loaded from a base model without one. Saved with the head and loaded again, it is one like others."""
    base, kind = classifiers()[name]
    base.save_pretrained(tmp_path / "base")
    fresh = lambda: kind.from_pretrained(tmp_path / "base")     # noqa: E731
    with pytest.raises(ValueError, match="a head that was drawn, not loaded") as error:
        hd_pissa_extra.attach(fresh(), 2)
    also, exclude = (eval(part) for part in re.findall(r"(?:also|exclude)=(\[.+?\])", str(error.value)))
    adapters = hd_pissa_extra.attach(fresh(), 2, also=also)
    assert {part for part in also if any(k.startswith(f"{part}.") for k in adapters.also)} == {*also}
    frozen = hd_pissa_extra.attach(fresh(), 2, exclude=exclude)
    assert not {*also} & {slot.name for slot in frozen.slots}
    fresh().save_pretrained(tmp_path / "whole")
    again = hd_pissa_extra.attach(kind.from_pretrained(tmp_path / "whole"), 2)
    assert not {*also} & {slot.name for slot in again.slots}


# ---- Steps that a GradScaler leaves out --------------------------------------------------------------------


def scaled():
    """On two processes, the second of which overflows at first: (scale, checksum of the head, message), for
    whole-batch gradients, for also= with gradients summed before they are unscaled, and after."""
    out = []
    for options, order in ((dict(gradients="global"), 1), (dict(also=["2"]), 1), (dict(also=["2"]), 0)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10))
        x = torch.randn((5, 12), generator=torch.Generator().manual_seed(0))
        adapters, message = hd_pissa_extra.attach(model, 2, **options), ""
        optimizer = torch.optim.SGD(adapters.parameters(), 1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=4)
        try:
            for t in range(20):
                loud = 300.0 if hd_pissa.process_index() and t < 8 else 1.0
                with torch.autocast("cpu", torch.float16):
                    loss = model(loud * x).float().square().sum()
                scaler.scale(loss).backward()
                if order:
                    adapters.collect_()
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                adapters.merge_()
        except ValueError as e:
            message = str(e)
        out.append((scaler.get_scale(), hd_pissa_extra.checksum(model[2].weight), message))
    return out


def test_scalers_of_all_processes_leave_the_same_steps_out(tmp_path):
    """Else sums mix scales, or one process puts the other's Inf into the head. The other order is refused."""
    pairs = [*zip(*spawn(2, scaled, tmp_path))]
    for a, b in pairs[:2]:
        assert a == b and a[2] == "" and a[0] < 2**16
    assert all("collect_() before scaler.unscale_()" in message for _, _, message in pairs[2])


def apart():
    try:
        dtype = torch.bfloat16 if hd_pissa.process_index() else None
        hd_pissa_extra.attach(nn.Sequential(nn.Linear(12, 12)), 2, dtype=dtype)
    except ValueError as e:
        return str(e)


def test_a_dtype_on_one_process_alone_is_refused(tmp_path):
    assert all("processes disagree" in text for text in spawn(2, apart, tmp_path))
