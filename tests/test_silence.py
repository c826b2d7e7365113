"""What a user believes is trained is trained, on every process alike, or one sentence says otherwise.

Oracles: plain autograd for gradients of what trains beside the adapters, W before and after for what moved,
the sentences themselves for what is refused, and the remedy they print, which has to work.
"""

import copy
import math
import pickle
import re
import sys
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import toy
from spawned import spawn

import hd_pissa
import hd_pissa_extra

X = torch.randn((5, 12), generator=torch.Generator().manual_seed(0))


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10))


def adamw(adapters, **options):
    return torch.optim.AdamW(adapters.parameters(), 1e-2, weight_decay=0.0, **options)


def one_step(model, adapters, optimizer, x=X, merge=True):
    for i in range(adapters.S):
        with adapters.shard(i):
            model(x).square().mean().backward()
    optimizer.step()
    if merge:
        adapters.merge_()


def warned(work) -> list[str]:
    """Texts of the warnings that come out of work()."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        work()
    return [str(w.message) for w in said]


def refused(work) -> str:
    with pytest.raises(ValueError) as error:
        work()
    return str(error.value)


# ---- Steps that are not merged, or not made ----------------------------------------------------------------


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_a_forgotten_merge_is_refused_at_the_next_forward(options):
    """With kernels that mark the tensors they change, and fused ones that do not; merging is the remedy."""
    model = small()
    adapters = hd_pissa.attach(model, 2)
    optimizer, before = adamw(adapters, **options), model[0].weight.clone()
    one_step(model, adapters, optimizer, merge=False)
    text = refused(lambda: model(X))
    assert "not merged" in text and "adapters.merge_() after every optimizer.step()" in text
    assert torch.equal(model[0].weight, before)
    adapters.merge_()
    assert not torch.equal(model[0].weight, before)
    one_step(model, adapters, optimizer)


def test_a_step_that_is_left_out_on_purpose_is_not_a_forgotten_one():
    model = small()
    adapters = hd_pissa.attach(model, 2)
    one_step(model, adapters, adamw(adapters), merge=False)
    adapters.next_step()
    assert not any(p.any() for p in adapters.parameters())
    model(X)


@pytest.mark.parametrize("where", ["hd_pissa", "hd_pissa_extra"])
def test_backwards_without_a_merge_are_noticed(where):
    """A Trainer without the adapters' optimizer: after some hundred backwards, once, with its reason."""
    model = small()
    options = {"gradients": "global"} if where == "hd_pissa_extra" else {}
    adapters = toy.attach(model, 1, **options)

    def loop(n):
        for _ in range(n):
            model(X).sum().backward()
            model.zero_grad()

    assert not warned(lambda: loop(400))
    said = warned(lambda: loop(800))
    assert said and all("without adapters.merge_()" in t and "adapters.parameters()" in t for t in said)
    assert len(said) <= len(adapters.slots)
    adapters.next_step()
    assert not warned(lambda: loop(400))


def test_another_optimizer_that_steps_in_vain_is_stopped():
    """It holds no increments, their gradients wait: the fourth such step raises, W is as it was."""
    model = small()
    adapters = hd_pissa_extra.attach(model, 2)
    before, stray = model[0].weight.clone(), torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.1)

    def loop():
        for _ in range(10):
            model(X).sum().backward()
            stray.step()

    text = refused(loop)
    assert "SGD steps, but holds no increments" in text and "adapters.parameters()" in text
    assert torch.equal(model[0].weight, before)
    adapters.next_step()
    ours = adamw(adapters)
    for _ in range(10):                                 # side by side they are fine
        one_step(model, adapters, ours)
        stray.step()


@pytest.mark.parametrize("hook", [False, True])
def test_another_model_that_waits_is_none_of_its_business(hook):
    """One has had a backward and no step yet; the other trains, merged by hand or by its optimizer's hook."""
    waiting, model = small(), small()
    kept, adapters = hd_pissa.attach(waiting, 2), hd_pissa.attach(model, 2)
    waiting(X).square().mean().backward()
    optimizer, before = adamw(adapters), model[0].weight.clone()
    if hook:
        optimizer.register_step_post_hook(lambda *_: adapters.merge_())
    for _ in range(6):
        one_step(model, adapters, optimizer, merge=not hook)
    assert adapters.step == 6 and not torch.equal(model[0].weight, before)
    one_step(waiting, kept, adamw(kept))


# ---- Layers that nobody calls ------------------------------------------------------------------------------


class Unused(nn.Module):
    """Two layers that train, one that no forward reaches, one whose output the loss does not see."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.never, self.aside = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x):
        x = self.b(torch.tanh(self.a(x)))
        self.aside(x)
        return x


def test_layers_without_gradient_are_named_once():
    """Per layer: both shards have gradients. The remedy that the sentence names leaves nothing to say."""
    model = Unused()
    adapters = hd_pissa.attach(model, 2, shards=2)
    optimizer = adamw(adapters)
    said = warned(lambda: one_step(model, adapters, optimizer))
    assert len(said) == 1 and "2 of 4 adapted layers got no gradient" in said[0]
    assert "'never'" in said[0] and "'aside'" in said[0] and "exclude=" in said[0]
    assert not warned(lambda: one_step(model, adapters, optimizer))
    adapters.detach_()
    adapters = hd_pissa.attach(model, 2, shards=2, exclude=["never", "aside"])
    assert [slot.name for slot in adapters.slots] == ["a", "b"]
    assert adapters.skipped == {"never": "in exclude", "aside": "in exclude"}
    assert not warned(lambda: one_step(model, adapters, adamw(adapters)))


def test_a_layer_that_one_shard_reaches_is_no_dead_one():
    model = Unused()
    adapters = hd_pissa.attach(model, 2, shards=2, exclude="aside")
    optimizer = adamw(adapters)
    for i in range(2):
        with adapters.shard(i):
            (model.never(X) if i else model(X)).square().mean().backward()
    optimizer.step()
    assert not warned(adapters.merge_)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_with_a_forward_of_their_own_are_left_out():
    """On the instance, in a subclass, read by attention: with their reason, and the output is the same."""
    model = nn.ModuleDict({"own": nn.Linear(12, 12), "sub": Doubling(12, 12), "plain": nn.Linear(12, 12),
                           "attention": nn.MultiheadAttention(12, 2), "last": nn.Linear(12, 12)})  # fmt: skip
    kept = model["own"].forward
    model["own"].forward = lambda x: kept(x) + 1

    def run():
        y = model["last"](model["sub"](model["own"](model["plain"](X))))
        return model["attention"](y, y, y)[0]

    expected = run()
    adapters = hd_pissa_extra.attach(model, 2)
    assert [slot.name for slot in adapters.slots] == ["plain", "last"]
    for name in ("own", "sub"):
        assert "forward of its own" in adapters.skipped[name]
    assert "never calls it" in adapters.skipped["attention.out_proj"]
    assert torch.equal(run(), expected)
    text = refused(lambda: hd_pissa_extra.attach(nn.MultiheadAttention(12, 2), 2))
    assert "no layer to adapt, of out_proj (a weight or a forward of its own kind)" in text


@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_trains_or_says_that_it_does_not(training):
    """torch's encoder in eval mode computes without its submodules: no layer stands still without a word."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(3, 5, 16)
    adapters = hd_pissa.attach(model, 2)
    before = {slot.name: slot.module.weight.clone() for slot in adapters.slots}
    optimizer = adamw(adapters)
    said = []
    try:
        said = warned(lambda: one_step(model, adapters, optimizer, x))
    except (RuntimeError, ValueError) as e:             # no gradient at all: autograd says so itself
        said = [str(e)]
    still = [slot.name for slot in adapters.slots if torch.equal(before[slot.name], slot.module.weight)]
    assert not still or said and any("grad" in text for text in said)


# ---- What trains beside the adapters -----------------------------------------------------------------------


def conv1d(n: int, m: int):
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(n, m)


@pytest.mark.parametrize("make", [lambda: nn.Linear(12, 16), lambda: conv1d(16, 12)], ids=["linear", "conv"])
def test_a_bias_made_trainable_gets_its_gradient(make):
    """Against autograd through the plain layer; and it moves while W is merged."""
    torch.manual_seed(0)
    layer = make()
    plain = torch.randn(16, requires_grad=True)
    W = layer.weight.detach() if layer.weight.shape[0] == 12 else layer.weight.detach().T
    layer.bias.data.copy_(plain)
    adapters = hd_pissa.attach(nn.Sequential(layer), 2)
    layer.bias.requires_grad_()
    optimizer = torch.optim.SGD([*adapters.parameters(), layer.bias], 1e-2)
    adapters.check(optimizer)
    (X @ W + plain).sin().sum().backward()
    layer(X).sin().sum().backward()
    torch.testing.assert_close(layer.bias.grad, plain.grad)
    start = layer.bias.detach().clone()
    optimizer.step()
    adapters.merge_()
    torch.testing.assert_close(layer.bias.detach(), start - 1e-2 * plain.grad)


def test_a_weight_made_trainable_is_refused():
    model = small()
    adapters = hd_pissa_extra.attach(model, 2)
    before = model[2].weight.detach().clone()
    one_step(model, adapters, adamw(adapters), merge=False)
    model[2].weight.requires_grad_()
    assert "merge_: 2.weight was made trainable" in refused(adapters.merge_)
    model[2].weight.requires_grad_(False)
    adapters.merge_()
    assert not torch.equal(model[2].weight, before)
    model.requires_grad_()                  # a second stage, whose loop never merges
    assert "0.weight was made trainable" in refused(lambda: model(X))
    adapters.detach_()                      # the remedy
    model(X).square().sum().backward()
    assert model[0].weight.grad.any()


def test_weights_that_a_functional_call_wants_gradients_of_are_refused():
    model = small()
    hd_pissa.attach(model, 2)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    assert "detach_()" in refused(lambda: torch.func.functional_call(model, weights, X))


def beside():
    """On two processes: messages of `check` for a bias beside the adapters, another rate, another rule."""
    second, out = hd_pissa.process_index() == 1, []
    model = small()
    adapters = hd_pissa.attach(model, 2)
    mine = adapters.parameters()

    def message(optimizer):
        try:
            adapters.check(optimizer)
        except ValueError as e:
            return str(e)

    out.append(message(torch.optim.SGD([*mine, model[0].bias.requires_grad_()], 1e-2)))
    out.append(message(torch.optim.SGD(mine, 1e-2 if second else 2e-2)))
    out.append(message(torch.optim.RMSprop(mine, 1e-2) if second else torch.optim.SGD(mine, 1e-2)))
    out.append(message(torch.optim.AdamW(mine, 1e-2, weight_decay=0.1 if second else 0.0)))
    out.append(message(torch.optim.SGD(mine, 1e-2)))
    return out


def test_processes_have_the_same_optimizer_and_nothing_beside_it(tmp_path):
    """No one adds up the gradients of others; the remedy is also=. All processes say the same."""
    first, second = spawn(2, beside, tmp_path)
    assert first == second
    others, rate, rule, decay, fine = first
    assert "1 tensors beside the increments" in others and "also=" in others
    for text in (rate, rule):
        assert "processes have different optimizers" in text
    assert "0.02" in rate and "0.01" in rate and "RMSprop" in rule and "SGD" in rule
    assert "weight_decay" in decay and fine is None


# ---- Nothing to train with ---------------------------------------------------------------------------------


def test_a_basis_that_was_never_loaded_is_refused():
    """attach(decompose=None) waits for load_state_dict; with it training goes on as with the stored run."""
    whole, later = small(), small()
    adapters, empty = hd_pissa_extra.attach(whole, 2), hd_pissa_extra.attach(later, 2, decompose=None)
    optimizer = adamw(empty)
    text = refused(lambda: one_step(later, empty, optimizer))
    assert "decompose=None" in text and "load_state_dict" in text
    assert "A_i, B_i stay empty" in refused(lambda: hd_pissa.attach(small(), 2, decompose=None))
    empty.load_state_dict(adapters.state_dict())
    one_step(whole, adapters, adamw(adapters))
    one_step(later, empty, adamw(empty))
    assert torch.equal(whole[0].weight, later[0].weight) and torch.equal(whole[2].weight, later[2].weight)


def test_w_of_too_low_rank_is_refused_and_the_printed_remedy_works():
    """W of zeros and W of rank 3 for 4 components; with B = 0 ("lora") W may be anything."""
    for spoil, rank in ((lambda W: W.zero_(), 0), (lambda W: W[3:].zero_(), 3)):
        model = small()
        spoil(model[2].weight.data)
        text = refused(lambda model=model: hd_pissa.attach(model, 2, shards=2))
        assert f"2.weight has rank {rank}, 4 components" in text
        exclude = eval(re.search(r"exclude=(\[.+?\])", text)[1])
        adapters = hd_pissa.attach(model, 2, shards=2, exclude=exclude)
        assert [slot.name for slot in adapters.slots] == ["0"]
        adapters.detach_()
        adapters = hd_pissa.attach(model, 2, shards=2, init="lora")
        before = model[2].weight.clone()
        one_step(model, adapters, adamw(adapters))
        assert not torch.equal(before, model[2].weight)


# ---- What is adapted, and what is said about it ------------------------------------------------------------


def named() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(12, 12), "not_q_proj": nn.Linear(12, 12),
                                                "gate": nn.Linear(12, 2)}) for _ in range(2))  # fmt: skip
    model.wte = nn.Embedding(20, 12)
    model.lm_head = nn.Linear(12, 20, bias=False)
    return model


def names(adapters) -> list[str]:
    return [slot.name for slot in adapters.slots]


def test_a_string_is_one_suffix():
    q = ["layers.0.q_proj", "layers.1.q_proj"]
    assert names(hd_pissa.attach(named(), 2, targets="q_proj")) == q
    assert names(hd_pissa.attach(named(), 2, targets=["q_proj"])) == q
    assert names(hd_pissa.attach(named(), 2, targets="0.q_proj")) == q[:1]
    assert names(hd_pissa.attach(named(), 3, exclude="not_q_proj")) == q
    assert names(hd_pissa.attach(named(), 2, targets="lm_head")) == ["lm_head"]      # named: the head too


@pytest.mark.parametrize("arguments", [{"targets": ["q_proj", "qproj"]}, {"exclude": ["qproj"]},
                                       {"targets": "qproj"}, {"targets": "_proj"}])  # fmt: skip
def test_a_suffix_that_matches_nothing_is_an_error(arguments):
    """With the names that there are."""
    text = refused(lambda: hd_pissa.attach(named(), 2, **arguments))
    assert "ends no linear layer's name" in text and "gate, lm_head, not_q_proj, q_proj" in text


@pytest.mark.parametrize("file", [hd_pissa, hd_pissa_extra])
def test_small_layers_are_left_out_and_the_summary_says_so(file):
    """A gate of two outputs does not refuse a model; the summary's numbers are those of the tensors."""
    model = named()
    adapters = file.attach(model, 2, shards=2)
    assert names(adapters) == [f"layers.{i}.{x}" for i in range(2) for x in ("q_proj", "not_q_proj")]
    assert adapters.skipped == {"layers.0.gate": "fewer than K r = 4 components",
                                "layers.1.gate": "fewer than K r = 4 components",
                                "lm_head": "output head"}  # fmt: skip
    adapted, every = 4 * 144, sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in adapters.parameters()) // adapters.S
    assert str(adapters) == (
        f"HD-PiSSA: 4 layers, {adapted} weights ({adapted / every:.1%} of the model); 2 shards of rank 2, 2 "
        f"here, each trains {trained} numbers. Left out: 2 x fewer than K r = 4 components; 1 x output head")
    text = refused(lambda: hd_pissa_extra.attach(named(), 2, shards=2, targets=["gate"]))
    assert "layers.0.gate is (2, 12)" in text and "K r = 4" in text and "it has 2" in text


def test_attach_twice_also_on_a_part():
    model = named()
    adapters = hd_pissa.attach(model.layers[0], 2)
    text = refused(lambda: hd_pissa.attach(model, 2))
    assert "layers.0.q_proj has adapters" in text and "detach_()" in text
    other = hd_pissa.attach(model.layers[1], 2)                     # another part is another model
    adapters.detach_()
    other.detach_()
    hd_pissa.attach(model, 2)


def test_a_peft_model_is_refused_and_works_once_it_is_merged():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=20))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert "merge_and_unload()" in refused(lambda: hd_pissa.attach(wrapped, 2))
    assert len(hd_pissa.attach(wrapped.merge_and_unload(), 2).slots) == 7


# ---- All processes alike -----------------------------------------------------------------------------------


def unequal_in_the_core():
    """Checksums after attach of a model drawn by another seed, one whose rows stand in another order, and one
    with other buffers; what is said of a buffer that cannot be written."""
    turned, normed = small(), nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12))
    for name, buffer in {"expanded": torch.arange(4.0).expand(3, 4), "sparse": torch.eye(3).to_sparse(),
                         "bare": torch.zeros(2, device=("cpu", "meta")[hd_pissa.process_index()])}.items():
        normed.register_buffer(name, buffer)            # equal, or nobody's
    with torch.inference_mode():
        normed.register_buffer("inference", torch.ones(3))
    if hd_pissa.process_index():
        turned[0].weight.data = turned[0].weight.data.flip(0)
        normed[1].num_batches_tracked += 3
    with torch.device("meta"):
        bare = small()
    hd_pissa_extra.attach(bare, 2, decompose=None)
    sums = []
    for model in (small(seed=hd_pissa.process_index()), turned, normed):
        hd_pissa.attach(model, 2)
        sums.append([hd_pissa_extra.checksum(t) for name, t in model.state_dict().items()
                     if name not in ("sparse", "bare")])
    said = []
    for attach in (hd_pissa.attach, hd_pissa_extra.attach):
        model = small()
        model.register_buffer("expanded", torch.arange(4.0 + hd_pissa.process_index())[-4:].expand(3, 4))
        said.append(refused(lambda attach=attach, model=model: attach(model, 2)))
    return sums, said


def test_the_core_gives_all_processes_the_model_of_process_0(tmp_path):
    (first, said), (second, also_said) = spawn(2, unequal_in_the_core, tmp_path)
    assert first == second and first[0] == [hd_pissa_extra.checksum(t) for t in small().state_dict().values()]
    assert said == also_said and all("written-to tensor" in text for text in said)


def test_attached_models_keep_their_order():
    """The hooks of several go through collectives, so in one order on all processes."""
    made = [hd_pissa.attach(small(), 2) for _ in range(8)]
    made.pop(3).detach_()
    live = [adapters for adapters in hd_pissa.LIVE.values() if adapters in made]
    assert live == made


def test_a_fused_optimizer_whose_first_step_overflows():
    """Its scaler hands it what is not finite as an attribute, which no copy should keep."""
    model = small()
    adapters, scaler = hd_pissa_extra.attach(model, 2), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = adamw(adapters, fused=True)
    before = model[0].weight.clone()
    for factor in (math.inf, 1.0):
        scaler.scale(model(X).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model[0].weight)
        adapters.merge_()
    assert not torch.equal(before, model[0].weight)


def also_left_out_on_one_process():
    model = small()
    adapters = hd_pissa_extra.attach(model, 2, also=["2.bias"])
    optimizer = adamw(adapters)
    one_step(model, adapters, optimizer)
    model(X).square().mean().backward()
    if hd_pissa.process_index() == 0:
        optimizer.step()
    return refused(adapters.merge_)


def test_a_step_that_one_process_leaves_out_does_not_part_what_trains_beside(tmp_path):
    for said in spawn(2, also_left_out_on_one_process, tmp_path):
        assert "processes stepped by different optimizers or rates" in said


def stepped_on_one_process(module):
    """What is said where process 0 alone steps, at a rate of 0: after the first merge and the second."""
    model = small()
    adapters = sys.modules[module].attach(model, 2)
    optimizer = torch.optim.SGD(adapters.parameters(), 0.0)
    said = []
    for _ in range(2):
        model(X).square().mean().backward()
        if hd_pissa.process_index() == 0:
            optimizer.step()
        try:
            adapters.merge_()
            said.append(adapters.step)
        except ValueError as e:
            said.append(str(e))
    return said


@pytest.mark.parametrize("module", ["hd_pissa", "hd_pissa_extra"])
def test_all_processes_merge_or_none(module, tmp_path):
    """One whose optimizer moves nothing does not leave the other alone in a collective."""
    for first, second in spawn(2, stepped_on_one_process, tmp_path, module):
        assert first == 1 and "zero in two successive merges" in second


def rows_that_part():
    """Processes whose batches are alike in the first step, not in the second."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 12), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 32))
    adapters = hd_pissa.attach(model, 2)
    alike, own = ([([1, 2, 3, last], 1)] * 4 for last in (4, 5 + hd_pissa.process_index()))
    steps = hd_pissa.train(model, adapters, [alike, own], lr=1e-2, max_steps=2, progress=False)
    next(steps)
    return refused(lambda: next(steps))


def test_rows_that_part_later_are_refused(tmp_path):
    for said in spawn(2, rows_that_part, tmp_path):
        assert "step 2: the processes have different rows" in said


@pytest.mark.parametrize("file", [hd_pissa, hd_pissa_extra])
def test_a_step_that_moves_nothing_may_zero_its_gradients_before_the_merge(file):
    """A rate that begins at 0, a scaler that leaves the step out: there were gradients."""
    model = small()
    adapters = file.attach(model, 2)
    optimizer = torch.optim.AdamW(adapters.parameters(), 0.0, weight_decay=0.0)
    model(X).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    adapters.merge_()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(X).sum() * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    adapters.merge_()
    assert adapters.step == 2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("file", [hd_pissa, hd_pissa_extra])
def test_an_optimizer_of_the_models_own_parameters_is_stopped(file, compiled):
    """Taken before attach, it holds frozen tensors alone."""
    model = small()
    stray = torch.optim.SGD(model.parameters(), 0.1)
    file.attach(model, 2)
    call = torch.compile(model, backend="eager") if compiled else model

    def loop():
        for _ in range(6):
            call(X).sum().backward()
            stray.step()

    assert "SGD steps, but holds no increments" in refused(loop)


def test_the_core_names_what_was_done_to_a_weight():
    model = small()
    adapters = hd_pissa.attach(model, 2)
    model.double()
    model(X.double()).sum().backward()
    adamw(adapters).step()
    assert "is Parameter torch.float64" in refused(adapters.merge_)


def test_a_resumed_run_counts_idle_merges_anew():
    model = small()
    adapters = hd_pissa.attach(model, 2)
    optimizer = torch.optim.SGD(adapters.parameters(), 0.0)
    for _ in range(2):
        one_step(model, adapters, optimizer)
        adapters.load_state_dict(adapters.state_dict())


def unequal():
    """(what was said, W of process 0 before, W after attach, W after steps, buffers) on this process."""
    i = hd_pissa.process_index()
    model = nn.Sequential(small(seed=7), nn.BatchNorm1d(10), nn.Linear(10, 10))     # one seed, alike so far
    if i:
        model[0].load_state_dict(small(seed=8).state_dict())
        model[1].running_mean += 1
    mine = [p.detach().clone() for p in (*model.parameters(), *model.buffers())]
    made = []
    said = warned(lambda: made.append(hd_pissa_extra.attach(model, 2)))
    adapters, = made
    equal = [torch.equal(a, b) for a, b in zip(mine, (*model.parameters(), *model.buffers()))]
    after = [p.tolist() for p in (*model.parameters(), *model.buffers())]
    optimizer = adamw(adapters)
    for t in range(2):
        x = torch.randn((6, 12), generator=torch.Generator().manual_seed(10 * t + i))
        one_step(model, adapters, optimizer, x)
    again = warned(lambda: hd_pissa.attach(small(seed=3), 2))
    return said, equal, after, [slot.module.weight.tolist() for slot in adapters.slots], again


def test_unequal_models_get_those_of_process_0_and_it_is_said(tmp_path):
    """As DDP does. Process 0 keeps its own bit for bit; what was equal is not counted."""
    (said, kept, one, trained, again), (quiet, other, two, same, _) = spawn(2, unequal, tmp_path)
    assert all(kept) and one == two and trained == same and not quiet and not again
    assert other.count(False) == 5                      # two weights, two biases, a running mean
    assert len(said) == 1 and "5 parameters and buffers differed" in said[0]


class Drops(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.drop = nn.Embedding(32, 16), nn.Dropout(0.5)
        self.fc, self.lm_head = nn.Linear(16, 16), nn.Linear(16, 32)

    def forward(self, x):
        return self.lm_head(self.drop(torch.tanh(self.fc(self.wte(x)))))


def shuffled():
    """Rows in the order in which this process's own shuffling loader has dealt them to `train`."""
    model, seen = Drops(), []
    adapters = hd_pissa.attach(model, 2, shards=2)
    torch.manual_seed(5)                                # the user's, alike on all processes
    loader = torch.utils.data.DataLoader([([i] * 8, 3) for i in range(8)], 4, shuffle=True, collate_fn=list)

    def batches():
        while True:
            for batch in loader:
                seen.append([tokens[0] for tokens, _ in batch])
                yield batch

    list(hd_pissa.train(model, adapters, batches(), lr=1e-2, max_steps=6, progress=False))
    return seen, [tokens.tolist() for tokens in (torch.rand(2), model.fc.weight)]


def test_train_leaves_torchs_generator_alone(tmp_path):
    """A loader that shuffles by it deals alike on every process, and as it would without any training."""
    alone = shuffled()
    for rank in spawn(2, shuffled, tmp_path):
        assert rank == alone
    torch.manual_seed(5)
    expected = []
    loader = torch.utils.data.DataLoader(range(8), 4, shuffle=True)
    while len(expected) < 6:
        expected += [batch.tolist() for batch in loader]
    assert alone[0][:6] == expected[:6] and len({str(rows) for rows in expected}) > 2


# ---- The loop ----------------------------------------------------------------------------------------------


def lm():
    model = Drops().eval()
    model.drop.p = 0.0
    return model


ROWS = [([1 + (i * j) % 30 for j in range(6)], 2) for i in range(1, 5)]


def test_groups_keep_their_own_rates():
    """The schedule scales each group's peak; a run that goes on does not scale it twice."""
    model, seen = lm(), []
    adapters = hd_pissa.attach(model, 2)
    p = adapters.parameters()
    optimizer = torch.optim.SGD([{"params": p[:1], "lr": 0.3}, {"params": p[1:], "lr": 0.1}], lr=1.0)

    def go(start, steps):
        for record in hd_pissa.train(model, adapters, [ROWS] * steps, lr=0.2, max_steps=6, warmup=2,
                                     schedule="linear", optimizer=optimizer, start=start, progress=False):
            seen.append([group["lr"] for group in optimizer.param_groups] + [record["lr"]])

    go(0, 3)
    go(3, 3)
    factors = [1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4]
    for rates, factor in zip(seen, factors, strict=True):
        assert rates == pytest.approx([0.3 * factor, 0.1 * factor, 0.3 * factor])       # told: the first's


def test_batches_that_end_early_are_told():
    def run(steps):
        model = lm()
        return warned(lambda: [*hd_pissa.train(model, hd_pissa.attach(model, 2), [ROWS] * 2, lr=0.1,
                                               max_steps=steps, progress=False)])
    assert run(2) == [] and "ended after step 2 of 3" in run(3)[0]


@pytest.mark.parametrize("arguments, words", [
    ({"max_steps": 0}, ["max_steps=0"]), ({"micro_batch_size": 0}, ["micro_batch_size=0"]),
    ({"schedule": "cosin"}, ["schedule='cosin'", "cosine, linear, constant"]),
    ({"lr": 0.0}, ["lr=0.0", "above 0"]), ({"lr": -1e-3}, ["lr=-0.001"]), ({"lr": float("inf")}, ["lr=inf"]),
])  # fmt: skip
def test_the_loop_refuses_what_would_train_nothing(arguments, words):
    model = lm()
    adapters = hd_pissa.attach(model, 2)
    text = refused(lambda: list(hd_pissa.train(model, adapters, [ROWS], progress=False,
                                               **{"lr": 1e-3, "max_steps": 1, **arguments})))  # fmt: skip
    assert all(word in text for word in words)


@pytest.mark.parametrize("row", [([1, 2, 3], 3), ([1, 2, 3], 5), ([1, 2, 3], [(3, 9)]), ([1, 2, 3], [])])
def test_a_row_without_response_is_refused(row):
    """Cut before its response, or given none: not a loss of zero among the others' means."""
    model = lm()
    adapters = hd_pissa.attach(model, 2)
    before = model.fc.weight.clone()
    text = refused(lambda: list(hd_pissa.train(model, adapters, [[*ROWS, row]], lr=1e-3, max_steps=1,
                                               progress=False)))  # fmt: skip
    assert "step 1" in text and "1 of them cut before their response" in text
    assert torch.equal(model.fc.weight, before)


def test_loss_of_several_spans_is_that_of_their_tokens():
    """Against cross entropy by hand over exactly these tokens."""
    tokens, where = [3, 1, 4, 1, 5, 9, 2, 6], [(0, 2), (4, 6), (7, 20)]
    x, y = hd_pissa.pad([(tokens, where)], "cpu")
    logits = lm()(x)
    by_hand = [F.cross_entropy(logits[0, t - 1], torch.tensor(tokens[t])) for t in (1, 4, 5, 7)]
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")
    torch.testing.assert_close(loss, sum(by_hand))


def test_process_groups_are_looked_for(monkeypatch):
    """Started by torchrun without a process group, replicas would drift apart."""
    assert not dist.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "WORLD_SIZE=4, but no process group" in refused(lambda: hd_pissa.attach(small(), 2))


# ---- Weights that are one memory, shards that nobody steps, processes that part ----------------------------


def test_weights_tied_by_memory_are_tied_weights():
    """As one object, through .data, or as a view that is turned; on the meta device nothing looks tied."""
    model = nn.ModuleDict({"wte": nn.Embedding(20, 12), "mid": nn.Linear(12, 12), "dec": nn.Linear(12, 20)})
    model["dec"].weight.data = model["wte"].weight.data
    adapters = hd_pissa_extra.attach(model, 2)
    assert names(adapters) == ["mid"] and adapters.skipped["dec"] == "tied weight"
    turned = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12))
    turned[2].weight = nn.Parameter(turned[0].weight.t())
    assert "tied weight" in refused(lambda: hd_pissa_extra.attach(turned, 2))
    with torch.device("meta"):
        two = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    assert len(hd_pissa.find_layers(two)[0]) == 2
    assert "meta device: load the weights first" in refused(lambda: hd_pissa_extra.attach(two, 2))


def test_weights_that_overlap_in_part_are_tied_weights():
    """Rows of an embedding, a part of a fused weight, a buffer; neighbours in one flat memory are not."""
    model = nn.ModuleDict({"wte": nn.Embedding(21, 12), "mid": nn.Linear(12, 12), "dec": nn.Linear(12, 20)})
    model["dec"].weight.data = model["wte"].weight.data[1:]
    assert hd_pissa_extra.attach(model, 2).skipped["dec"] == "tied weight"
    model = nn.ModuleDict({"qkv": nn.Linear(12, 36), "mid": nn.Linear(12, 12), "k": nn.Linear(12, 12)})
    model["k"].weight = nn.Parameter(model["qkv"].weight.detach()[12:24])
    assert names(hd_pissa_extra.attach(model, 2)) == ["mid"]
    model = small()
    model.register_buffer("first", model[0].weight.detach()[:1])
    assert names(hd_pissa_extra.attach(model, 2)) == ["2"]
    model, at = small(), 0
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    for p in model.parameters():
        p.data, at = flat[at:at + p.numel()].view_as(p), at + p.numel()
    assert names(hd_pissa_extra.attach(model, 2)) == ["0", "2"]
    other = small()
    other[0].weight = model[0].weight
    adapters = hd_pissa_extra.attach(other, 2)
    assert names(adapters) == ["2"] and "another model" in adapters.skipped["0"]


def test_increments_that_were_replaced_are_named():
    """Nothing of them would reach W. In place they are what they were."""
    for replace in (True, False):
        model = small()
        adapters, before = hd_pissa_extra.attach(model, 2), model[0].weight.clone()
        model(X).square().mean().backward()
        for p in adapters.parameters():
            step = p.detach() - 0.1 * p.grad
            p.data = step if replace else p.data.copy_(step)
        if replace:
            assert "change them in place" in refused(adapters.merge_)
        else:
            adapters.merge_()
        assert torch.equal(before, model[0].weight) == replace


@pytest.mark.parametrize("name", ["vmap", "jvp", "jacrev", "trace"])
def test_what_looks_into_a_layer_is_refused_in_a_sentence(name):
    work = {"vmap": lambda f: torch.func.vmap(f)(X[:, None]), "jacrev": lambda f: torch.func.jacrev(f)(X),
            "jvp": lambda f: torch.func.jvp(f, (X,), (X,)), "trace": lambda f: torch.jit.trace(f, X)}[name]
    model = small()
    adapters = hd_pissa_extra.attach(model, 2)
    with pytest.raises(NotImplementedError, match="detach_()"):
        work(model)
    adapters.detach_()
    work(model)


def biases_aside():
    """On two processes: what an optimizer of biases alone is told, and one of another model's."""
    model, other = small(), small()
    adapters = hd_pissa_extra.attach(model, 2)
    model[0].bias.requires_grad_()
    for mine in (other, model):
        aside = torch.optim.SGD([mine[0].bias], 0.1)
        one_step(model, adapters, adamw(adapters))
        try:
            aside.step()
        except ValueError as e:
            return mine is model and str(e)


def test_biases_in_an_optimizer_of_their_own_are_refused_on_several_processes(tmp_path):
    assert all("attach(also=...)" in text for text in spawn(2, biases_aside, tmp_path))


def test_weights_tied_by_memory_after_attach_are_refused():
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
    adapters = hd_pissa_extra.attach(model, 2)
    model[2].weight.data = model[0].weight.data
    assert "is another module's too" in refused(lambda: one_step(model, adapters, adamw(adapters)))


def test_a_shard_that_no_optimizer_steps_is_named():
    """Its increments stay zero while the other's move; and increments that nobody holds are told at once."""
    model = small()
    adapters = hd_pissa_extra.attach(model, 2, shards=2)
    half = torch.optim.SGD([p for name, p in adapters.named_parameters() if ".shard0." in name], 0.1)
    said = warned(lambda: one_step(model, adapters, half))
    assert any("4 of 8 increments are in no optimizer" in text for text in said)
    assert "increments of shards [1] are zero in two" in refused(lambda: one_step(model, adapters, half))


def test_a_head_that_is_put_in_after_attach_and_in_no_optimizer_is_told():
    model = small()
    adapters = hd_pissa_extra.attach(model, 2, exclude=["2"])
    model[2] = nn.Linear(16, 3)
    said = warned(lambda: one_step(model, adapters, adamw(adapters)))
    assert any("2 of 4 increments and other trained parameters are in no optimizer" in text for text in said)
    model = small()
    adapters = hd_pissa_extra.attach(model, 2, exclude=["2"])
    model[2] = nn.Linear(16, 3)
    optimizer = torch.optim.SGD([*adapters.parameters(), *model[2].parameters()], 0.1)
    assert warned(lambda: one_step(model, adapters, optimizer)) == []


def test_a_process_group_that_begins_after_attach_is_refused(monkeypatch):
    model = small()
    adapters = hd_pissa_extra.attach(model, 2)
    optimizer = adamw(adapters)
    one_step(model, adapters, optimizer)
    monkeypatch.setattr(hd_pissa, "world_size", lambda: 2)
    assert "init_process_group before attach" in refused(lambda: one_step(model, adapters, optimizer))


def steps_apart():
    """On two processes: what merge_ says where the second has another rate, rule, or left a step out."""
    second, out = hd_pissa.process_index() == 1, []
    for rule, rate, skip in (("SGD", 0.2, False), ("Adam", 0.1, False), ("SGD", 0.1, True)):
        model = small()
        adapters = hd_pissa_extra.attach(model, 2)
        kind, lr = (getattr(torch.optim, rule), rate) if second else (torch.optim.SGD, 0.1)
        optimizer = kind(adapters.parameters(), lr)
        model(X).square().mean().backward()
        if not (skip and second):
            optimizer.step()
        try:
            adapters.merge_()
            out.append("")
        except ValueError as e:
            out.append(str(e))
    return out


def test_processes_that_step_by_other_rules_or_rates_are_told_so(tmp_path):
    """A scheduler on one of them, say. One that leaves its step out, as a GradScaler does, is no fault."""
    for rate, rule, skipped in spawn(2, steps_apart, tmp_path):
        assert "different optimizers or rates" in rate and "different optimizers or rates" in rule
        assert skipped == ""


def states_of_one():
    """On two processes: what merge_ says once both have loaded the state of the first, and their own."""
    out = []
    for all_load_the_first in (True, False):
        model = small()
        adapters = hd_pissa_extra.attach(model, 2)
        optimizer = adamw(adapters)
        x = X + hd_pissa.process_index()
        one_step(model, adapters, optimizer, x)
        state = [optimizer.state_dict()]
        if all_load_the_first:
            dist.broadcast_object_list(state, src=0)
        optimizer.load_state_dict(state[0])
        before = model[0].weight.clone()
        try:
            one_step(model, adapters, optimizer, x)
            out.append("")
        except ValueError as e:
            out.append(f"{e} {torch.equal(before, model[0].weight)}")
    return out


def test_moments_of_one_process_that_all_have_loaded_are_refused(tmp_path):
    """As it is done for DDP, whose processes have the same moments: saved by process 0, loaded by all."""
    for shared, own in spawn(2, states_of_one, tmp_path):
        assert "loaded the same optimizer state" in shared and shared.endswith("True")
        assert own == ""


class Lookahead:
    """Around an optimizer, as its users write it: every second step goes half the way from where it was."""

    def __init__(self, inner):
        self.inner, self.steps = inner, 0
        self.params = [p for group in inner.param_groups for p in group["params"]]
        self.slow = [p.detach().clone() for p in self.params]

    def step(self):
        self.inner.step()
        self.steps += 1
        for p, slow in zip(self.params, self.slow) if self.steps % 2 == 0 else ():
            p.data.copy_(slow.lerp_(p.detach(), 0.5))       # .data tells no version counter


@pytest.mark.parametrize("wrapped", [True, False])
def test_increments_that_a_wrapper_changes_after_the_step_are_told(wrapped):
    model = small()
    adapters = hd_pissa_extra.attach(model, 2, shards=2)
    optimizer = adamw(adapters)
    optimizer = Lookahead(optimizer) if wrapped else optimizer
    said = warned(lambda: [one_step(model, adapters, optimizer) for _ in range(2)])
    assert ["changed after optimizer.step()" in text for text in said] == [True] * wrapped


def test_weights_that_are_dequantized_for_every_use_are_refused_and_the_remedy_works():
    """Theirs is a float dtype, and an update in place runs through: on a copy that is dropped."""
    class Quantized(torch.Tensor):
        @staticmethod
        def __new__(cls, codes, scale):
            made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
            made.codes, made.scale = codes, scale
            return made

        @classmethod
        def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
            if op is torch.ops.aten.detach.default:
                return cls(args[0].codes, args[0].scale)
            plain = [x.codes * x.scale if isinstance(x, cls) else x for x in args]
            return op(*plain, **(kwargs or {}))

    def model():
        made = small()
        codes = (made[0].weight.detach() * 300).round().to(torch.int8)
        made[0].weight = nn.Parameter(Quantized(codes, 1 / 300), requires_grad=False)
        return made

    text = refused(lambda: hd_pissa_extra.attach(model(), 2))
    assert "an update would be lost" in text
    exclude = re.search(r"exclude=\['(.*)'\]", text)[1]
    adapters = hd_pissa_extra.attach(model(), 2, exclude=[exclude])
    assert [slot.name for slot in adapters.slots] == ["2"]


def test_a_scaler_that_overflows_in_one_shard_ends_no_run():
    """The step of all shards is left out, those with finite gradients too; in the end all train."""
    model = small()
    adapters = hd_pissa_extra.attach(model, 2, shards=2)
    optimizer, scaler, before = adamw(adapters), torch.amp.GradScaler("cpu"), model[0].weight.clone()
    for _ in range(20):
        for i in range(2):
            with adapters.shard(i), torch.autocast("cpu", torch.float16):
                loss = F.mse_loss(model(X).float(), torch.full((5, 10), 300.0 if i else 0.1), reduction="sum")
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        adapters.merge_()
    assert scaler.get_scale() < 2**14 and (model[0].weight - before).abs().max() > 1e-3


def test_adapters_are_not_copied_without_a_word():
    model = small()
    model.adapters = hd_pissa_extra.attach(model, 2)
    for copied in (pickle.dumps, copy.deepcopy):
        assert any("state_dict()" in text for text in warned(lambda: copied(model)))    # noqa: B023


def test_an_optimizer_that_passes_over_frozen_tensors_is_looked_at_all_the_same():
    """Its probe's stand-ins are leaves as increments are; and one that moves nothing proves nothing."""
    class Trust(torch.optim.SGD):
        def step(self, closure=None):
            for p in (p for g in self.param_groups for p in g["params"] if p.requires_grad):
                p.data -= 0.1 * p.grad * (1 + p.data.norm())

    class Idle(torch.optim.SGD):
        def step(self, closure=None):
            pass

    adapters = hd_pissa_extra.attach(small(), 2)
    assert "reads the parameter" in refused(lambda: adapters.check(Trust(adapters.parameters(), 0.1)))
    assert "moves nothing" in refused(lambda: adapters.check(Idle(adapters.parameters(), 0.1)))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("layer, why", [
    (lambda: Scaled(12, 12), "a forward of its own kind"),
    (lambda: nn.MultiheadAttention(12, 2).out_proj, "never calls it")])  # fmt: skip
def test_a_layer_that_is_named_and_cannot_be_adapted_is_refused(layer, why):
    def model():
        inner = nn.MultiheadAttention(12, 2) if "never" in why else nn.ModuleDict({"out_proj": layer()})
        return nn.ModuleDict({"q": nn.Linear(12, 12), "inner": inner})

    text = refused(lambda: hd_pissa_extra.attach(model(), 2, targets=["q", "out_proj"]))
    assert "'out_proj' (targets) names only" in text and why in text
    adapters = hd_pissa_extra.attach(model(), 2, targets=["q"])
    assert [slot.name for slot in adapters.slots] == ["q"] and "left out" in repr(adapters).lower()


def test_a_name_that_begins_with_a_dot_is_one_layer():
    """As the remedy for a layer of zeros prints it: others that end alike stay."""
    model = nn.ModuleDict({"proj": nn.Linear(12, 12), "block": nn.ModuleDict({"proj": nn.Linear(12, 12)})})
    model["proj"].weight.data.zero_()
    remedy = re.search(r"exclude=\['(.*?)'\]", refused(lambda: hd_pissa_extra.attach(model, 2)))[1]
    assert [slot.name for slot in hd_pissa_extra.attach(model, 2, exclude=[remedy]).slots] == ["block.proj"]
    model = nn.ModuleDict({"proj": nn.Linear(12, 12), "block": nn.ModuleDict({"proj": nn.Linear(12, 12)})})
    assert [slot.name for slot in hd_pissa_extra.attach(model, 2, targets=".proj").slots] == ["proj"]
    assert "'all-linear'" in refused(lambda: hd_pissa_extra.attach(small(), 2, exclude="all-linear"))


@pytest.mark.parametrize("given", [re.compile("q"), nn.Linear, 5, ["q", 3]], ids=str)
def test_targets_of_another_kind_are_refused(given):
    for name in ("targets", "exclude"):
        assert "must be the end of layers' names" in refused(
            lambda: hd_pissa_extra.attach(small(), 2, **{name: given}))       # noqa: B023


def test_experts_whose_stack_is_called_weight_are_named():
    model = nn.ModuleDict({"q": nn.Linear(12, 12), "conv": nn.Conv1d(3, 3, 2), "experts": nn.Module()})
    model["experts"].weight = nn.Parameter(torch.randn(4, 6, 5))
    adapters = hd_pissa_extra.attach(model, 2)
    assert [name for name, why in adapters.skipped.items() if "3-D" in why] == ["experts.weight"]


def test_what_changes_in_an_optimizer_after_its_check_is_checked():
    model = small()
    adapters = hd_pissa_extra.attach(model, 2)
    optimizer = adamw(adapters)
    one_step(model, adapters, optimizer)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    assert "AdamW has weight_decay" in refused(lambda: one_step(model, adapters, optimizer))


def test_an_evaluation_between_two_steps_of_the_loop_ends_with_it():
    model, modes = Drops(), []
    model.drop.register_forward_hook(lambda module, *_: modes.append(module.training))
    adapters = hd_pissa_extra.attach(model, 2)
    for _ in hd_pissa.train(model, adapters, [ROWS] * 3, lr=1e-3, max_steps=3, progress=False):
        model.eval()
    assert modes and all(modes)


def test_a_forward_in_another_thread_does_not_take_the_shard_of_this_one():
    model, said = small(), []
    adapters = hd_pissa_extra.attach(model, 2, shards=2)
    with adapters.shard(1):
        thread = threading.Thread(target=lambda: said.append(refused(lambda: model(X))))
        thread.start()
        thread.join()
        model(X).sum().backward()
    assert "another thread is inside" in said[0]


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), lambda m: nn.Sequential(m)])
def test_a_layer_that_is_wrapped_after_attach_still_trains(wrap):
    """It has another name then; it is the same layer."""
    model = small()
    adapters = hd_pissa_extra.attach(model, 2)
    before, model[0] = model[0].weight.clone(), wrap(model[0])
    one_step(model, adapters, adamw(adapters))
    assert not torch.equal(before, adapters.slots[0].module.weight)


@pytest.mark.parametrize("arguments, words", [
    ({"alpha": "16"}, "alpha='16'"), ({"targets": None}, "no layer to adapt"),
])  # fmt: skip
def test_arguments_of_another_type_are_refused_in_words(arguments, words):
    assert words in refused(lambda: hd_pissa_extra.attach(small(), 2, **arguments))


def test_conv1d_takes_its_input_by_name():
    layer = conv1d(16, 12)
    expected = layer(x=X)
    hd_pissa_extra.attach(nn.Sequential(layer), 2)
    assert torch.equal(layer(x=X), expected)


def test_a_state_without_its_step_is_refused():
    adapters = hd_pissa_extra.attach(small(), 2)
    state = adapters.state_dict()
    del state["step"]
    assert "of another run or model (step)" in refused(lambda: adapters.load_state_dict(state))


def test_a_span_that_is_empty_takes_no_loss():
    assert hd_pissa.targets_of(([7, 8, 9, 5], [(0, 0), (2, 4)])) == [-100, 9, 5]
    assert hd_pissa.targets_of(([7, 8, 9, 5], [(2, 2), (1, 2)])) == [8, -100, -100]


def parting():
    """What each of two processes hears: stepping alone, loading alone, rows of its own, a basis alone."""
    second, out = hd_pissa.process_index() == 1, []

    def message(work):
        try:
            work()
        except ValueError as e:
            return str(e)

    model = small()
    adapters = hd_pissa_extra.attach(model, 2)
    optimizer = adamw(adapters)

    def alone():
        for _ in range(3):
            model(X).square().mean().backward()
            if not second:
                optimizer.step()
            adapters.merge_()

    out.append(message(alone))
    model = small()
    adapters = hd_pissa_extra.attach(model, 2)
    optimizer = adamw(adapters)
    one_step(model, adapters, optimizer)
    if second:
        model.load_state_dict({key: value + 0.1 for key, value in model.state_dict().items()})
    out.append(message(lambda: one_step(model, adapters, optimizer)))
    model = small()
    adapters = hd_pissa_extra.attach(model, 2)
    if second:                          # before the first merge: process 0's are sent, and it is said
        model.load_state_dict({key: value + 0.1 for key, value in model.state_dict().items()})
    said = warned(lambda: one_step(model, adapters, adamw(adapters)))
    assert second or "4 parameters and buffers differed" in said[0]
    model = lm()
    rows = [([1 + second, 2, 3, 4], 1), ([5, 6, 7, 8], 1)]
    out.append(message(lambda: list(hd_pissa.train(model, hd_pissa.attach(model, 2), [rows] * 2, lr=1e-3,
                                                   max_steps=2, progress=False))))  # fmt: skip
    basis = None if second else hd_pissa.components
    out.append(message(lambda: hd_pissa_extra.attach(small(), 2, decompose=basis)))
    return out


def test_processes_that_part_are_told_all_alike(tmp_path):
    first, second = spawn(2, parting, tmp_path)
    assert first == second
    for text, words in zip(first, ("increments of shards [1] are zero", ".weight differs between processes",
                                   "the processes have different rows", "processes disagree"), strict=True):
        assert text and words in text, first


def test_a_step_by_hand_whose_rate_begins_at_zero_is_a_step():
    model = small()
    adapters = hd_pissa.attach(model, 2)
    for t in range(3):
        model(X).square().sum().backward()
        with torch.no_grad():
            for p in adapters.parameters():
                p.sub_(p.grad, alpha=0.01 * t)
        adapters.merge_()
    assert adapters.step == 3


def test_a_layer_that_is_left_out_is_left_alone():
    """Spectral norm counts on whenever its weight is read."""
    model = nn.Sequential(nn.Linear(12, 12), nn.utils.parametrizations.spectral_norm(nn.Linear(12, 12)))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert [slot.name for slot in hd_pissa.attach(model, 2).slots] == ["0"]
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
