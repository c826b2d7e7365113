"""tutorial/using: its programs on one and two processes, and what README.md there says about each trainer.

Oracle: the same training written out, on the very rows that the trainer took, or the twin.
"""

import copy
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
import toy
import twin
from conftest import ROOT

import hd_pissa
import hd_pissa_extra

USING = ROOT / "tutorial" / "using"
NEEDS = {"trainer": ["accelerate"], "with_accelerate": ["accelerate"], "sft": ["trl"],
         "with_lightning": ["lightning"]}  # fmt: skip
PROGRAMS = ["bare_loop", "nanogpt", *NEEDS]
SAVES = ["nanogpt", "trainer", "with_accelerate", "sft"]    # and deal the same rows to the same shards


def program(name: str):
    """The module tutorial/using/<name>.py, loaded from its path as the folder is no package."""
    for package in ["transformers", *NEEDS[name]] if name in NEEDS else ():
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("using_" + name, USING / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torchrun(*command) -> str:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*start, *map(str, command)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def checks(text: str) -> list[str]:
    """What a program claims to have found; it ends with an error where that is not so."""
    lines = [line for line in text.splitlines() if line.startswith("CHECK ")]
    assert lines and all(line.endswith(": True") for line in lines), text
    return lines


@pytest.fixture(scope="module")
def using():
    return program("trainer")


@pytest.fixture(scope="module")
def sft():
    return program("sft")


@pytest.fixture(scope="module")
def lightning():
    return program("with_lightning")


@pytest.fixture(scope="module")
def shards():
    return program("shards")


# ---- The programs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_on_one_process(name, capfd):
    module = program(name)
    module.main()
    assert checks(capfd.readouterr().out)


def weights_in(path) -> dict:
    if path.is_dir():
        from safetensors.torch import load_file
        return load_file(path / "model.safetensors")
    return torch.load(path, weights_only=True)["model"]


def equal_files(one, two) -> bool:
    one, two = weights_in(one), weights_in(two)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_on_two_processes(name, tmp_path, capfd):
    """torchrun's weights are those of one process with all four shards, bit for bit: same rows, same K.
    (Lightning deals the rows of an epoch in turn, so two processes train on others.)"""
    saves = name in SAVES
    text = torchrun(USING / f"{name}.py", *([tmp_path / "two"] if saves else []))
    module = program(name)
    module.main(*([tmp_path / "one"] if saves else []))
    assert len(checks(text)) == len(checks(capfd.readouterr().out))
    if saves:
        assert equal_files(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("name", ["bare_loop", "trainer", *(
    pytest.param(name, marks=pytest.mark.slow) for name in PROGRAMS if name not in ("bare_loop", "trainer"))])
def test_the_checks_can_fail(name, monkeypatch):
    """A merge that adds nothing, or something else once, does not pass for a finding."""
    module = program(name)
    if name == "bare_loop":
        step, count = hd_pissa.Adapters.merge_, []

        def merge_(self):
            count.append(step(self))
            if len(count) == 7:
                self.slots[0].module.weight.data[0, 0] += 1e-3

        monkeypatch.setattr(hd_pissa.Adapters, "merge_", merge_)
    else:
        for file in (hd_pissa, hd_pissa_extra):
            monkeypatch.setattr(file.Adapters, "exchange_and_fold", lambda *args: None)
    with pytest.raises(AssertionError):
        module.main()


# ---- What they share: rows to shards, the state of all shards in the optimizer's ---------------------------


def test_rows_are_dealt_alike_on_any_number_of_processes(shards):
    """As even as may be, in order, each row once; the shards of two processes get what those of one get."""
    for n, S in ((6, 4), (7, 4), (16, 4), (5, 5), (23, 6)):
        parts = shards.deal(list(range(n)), S)
        sizes = [len(part) for part in parts]
        assert sum(parts, []) == list(range(n)) and max(sizes) - min(sizes) <= 1 and len(parts) == S
        assert [part.tolist() for part in shards.deal(torch.arange(n), S)] == parts
        halves = shards.deal(list(range(n)), S) + shards.deal(list(range(n, 2 * n)), S)
        assert halves == shards.deal(list(range(2 * n)), 2 * S)
    with pytest.raises(ValueError, match="3 rows for the 4 shards .* Use a batch of 4 rows or more"):
        shards.deal([0, 1, 2], 4)


@pytest.mark.parametrize("closure", [False, True])
def test_clipping_with_and_without_a_closure(closure, shards):
    """A backward inside optimizer.step(closure) is clipped inside it, too: the twin's weights."""
    weights, bias, data = toy.problem()
    model = toy.module(weights, bias)
    adapters = hd_pissa.attach(model, toy.R, shards=toy.K)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.0)
    shards.bind(adapters, optimizer)
    for batch in data:
        def backward(batch=batch):
            optimizer.zero_grad()
            for s, (x, y) in enumerate(batch):
                with adapters.shard(s):
                    (model(x) - y).square().mean().backward()
            adapters.clip_grad_norm_(0.05)
        if closure:
            optimizer.step(backward)
        else:
            backward()
            optimizer.step()
    found = [model[0].weight.T, model[2].weight.T]
    expected = twin.run(weights, bias, data, toy.K, toy.R, 1e-2, clip=0.05)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(found[0], twin.run(weights, bias, data, toy.K, toy.R, 1e-2)[0])


def trained(data, state=None, make=torch.optim.AdamW, bound=True, **settings):
    """(model, adapters, optimizer) of the toy problem, from a checkpoint (W, optimizer's state) if given."""
    from_path = program("shards")
    weights, bias, _ = toy.problem()
    model = toy.module(weights, bias)
    if state:
        model.load_state_dict(state[0])         # before attach: the decomposition is that of the trained W
    adapters = toy.attach(model, toy.R, shards=toy.K, **settings)
    optimizer = make(adapters.parameters(), lr=1e-2, weight_decay=0.0)
    if bound:
        from_path.bind(adapters, optimizer)
    if state:
        optimizer.load_state_dict(state[1])
    for batch in data:
        for s in range(adapters.S):
            with adapters.shard(s):
                x, y = batch[adapters.first + s]
                (model(x) - y).square().mean().backward()
        optimizer.step()
        if not bound:
            adapters.merge_()
    return model, adapters, optimizer


def checkpoint(model, optimizer, path):
    """(W, optimizer's state) as they come back from a file that torch reads without pickle."""
    torch.save((model.state_dict(), optimizer.state_dict()), path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("settings", [{}, dict(make=torch.optim.SGD), dict(also=["0.bias"])], ids=str)
def test_the_optimizers_state_holds_the_run(settings, tmp_path):
    """2 steps, a file, 3 more, bit for bit as 5, though attach decomposed the trained W; twice over."""
    data = toy.problem(steps=6)[2]
    whole, _, _ = trained(data, **settings)
    model, _, optimizer = trained(data[:2], **settings)
    state = checkpoint(model, optimizer, tmp_path / "a")
    model, adapters, optimizer = trained(data[2:5], state, **settings)
    assert adapters.step == 5
    model, _, _ = trained(data[5:], checkpoint(model, optimizer, tmp_path / "b"), **settings)
    for a, b in zip(model.parameters(), whole.parameters()):
        assert torch.equal(a, b)


def test_a_state_without_the_adapters_is_refused(tmp_path):
    """The moments would meet other A_i, B_i, and the run go on without a word."""
    data = toy.problem()[2]
    model, _, optimizer = trained(data, bound=False)
    with pytest.raises(ValueError, match="holds no adapters"):
        trained(data, checkpoint(model, optimizer, tmp_path / "a"))
    model, _, optimizer = trained(data)
    with pytest.raises(ValueError, match="aggregate is sum here, mean there"):
        trained(data, checkpoint(model, optimizer, tmp_path / "b"), aggregate="sum")


def test_a_state_in_the_middle_of_a_step_is_told():
    """What has been added up so far is in no checkpoint: neither a plain loop's nor a trainer's."""
    data = toy.problem()[2]
    model, adapters, optimizer = trained(data[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.state_dict()
    with adapters.shard(1):
        model(data[0][1][0]).square().mean().backward()
    with pytest.warns(UserWarning, match="saved in the middle of a step: gradients .* Save after"):
        optimizer.state_dict()


def elastic(path):
    """On each of two processes: steps 3 to 5 from a file of one process; a file of its own."""
    data = toy.problem()[2]
    model, adapters, optimizer = trained(data[2:4], torch.load(path, weights_only=True))
    state = (model.state_dict(), optimizer.state_dict())
    if hd_pissa.process_index() == 0:
        torch.save(state, path.with_name("two"))
    assert len(optimizer.state) == len(adapters.parameters())       # none of other shards


@pytest.mark.slow
def test_the_number_of_processes_may_change(tmp_path):
    """2 steps of one process with four shards, 2 of two processes, the last of one: as 5, to rounding."""
    from spawned import spawn
    data = toy.problem()[2]
    whole, _, _ = trained(data)
    model, _, optimizer = trained(data[:2])
    checkpoint(model, optimizer, tmp_path / "one")
    spawn(2, elastic, tmp_path, tmp_path / "one")
    model, _, _ = trained(data[4:], torch.load(tmp_path / "two", weights_only=True))
    for a, b in zip(model.parameters(), whole.parameters()):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_nanogpt_resumes(tmp_path):
    """5 steps, its checkpoint and 5 more, on two processes, are 10 on one, bit for bit."""
    module = program("nanogpt")
    torchrun(USING / "nanogpt.py", tmp_path / "half", "", 5)
    torchrun(USING / "nanogpt.py", tmp_path / "two", tmp_path / "half")
    module.main(tmp_path / "one")
    assert equal_files(tmp_path / "one", tmp_path / "two")


# ---- Trainer -----------------------------------------------------------------------------------------------


def run(using, folder, rows=None, steps=4, collator=None, **settings):
    """(trainer, the batches of each shard in order) after training."""
    trainer, _ = using.make(folder, max_steps=steps, **settings)
    trainer.train_dataset = trainer.train_dataset if rows is None else rows
    seen, collate = [], collator or trainer.data_collator
    trainer.data_collator = lambda rows: seen.append(collate(rows)) or seen[-1]
    trainer.train()
    return trainer, seen


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def apart(a, b) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def logged(trainer, what: str) -> list[float]:
    return [line[what] for line in trainer.state.log_history if "loss" in line]


def written_out(model, seen, rates, clip=1.0, accumulate=1, loss=None, make=torch.optim.AdamW):
    """The training in a loop of its own: (model, norms). A shard's loss is the mean over its tokens.

    accumulate      micro-batches of a step, of all or of each
    """
    def loss_of(batch):                 # sum over its tokens
        logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
        labels = batch["labels"][:, 1:].flatten()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum")

    loss = loss or loss_of
    adapters = hd_pissa.attach(model, rank=2, shards=4)
    optimizer = make(adapters.parameters(), lr=1e-2, weight_decay=0.0)
    norms, seen = [], iter(seen)
    for lr, n in zip(rates, [accumulate] * len(rates) if isinstance(accumulate, int) else accumulate):
        optimizer.param_groups[0]["lr"] = lr
        mine = list(itertools.islice(seen, 4 * n))
        for s in range(4):
            tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in mine[s::4])
            for batch in mine[s::4]:
                with adapters.shard(s):
                    (loss(batch) / tokens).backward()
        norms.append(float(torch.stack([p.grad.square().sum() for p in adapters.parameters()]).sum().sqrt()))
        for p in adapters.parameters():
            p.grad.mul_(min(1.0, clip / (norms[-1] + 1e-6)))
        optimizer.step()
        adapters.merge_()
    return model, norms


def uneven_rows(n=96) -> list[dict]:
    """Rows with 1 to 11 tokens of loss, so that a mean of means is not the mean."""
    rows = [(torch.arange(12) * 3 + 7 * i) % 64 for i in range(n)]
    return [{"input_ids": x, "labels": torch.where(torch.arange(12) < 1 + i % 11, -100, x)}
            for i, x in enumerate(rows)]


def near(found, expected, base) -> None:
    """Weights agree to 1e-4 of the largest change, which is not nothing."""
    assert 0 < apart(expected, base) and apart(found, expected) < 1e-4 * apart(expected, base)


@pytest.mark.parametrize("max_grad_norm", [1.0, 1e-3, 0.0])
def test_it_clips_and_logs_the_norm(using, tmp_path, max_grad_norm):
    """To TrainingArguments' own max_grad_norm, jointly over all shards; 0 = off. The norm that is logged is
    that of all gradients before clipping."""
    trainer, seen = run(using, tmp_path, uneven_rows(), max_grad_norm=max_grad_norm)
    model, norms = written_out(using.small_model(), seen, logged(trainer, "learning_rate"),
                               max_grad_norm or math.inf)  # fmt: skip
    near(trainer.model, model, using.small_model())
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-4) and min(norms) > 0.01


def test_its_learning_rate_and_optimizer_are_those_of_the_arguments(using, tmp_path):
    def rmsprop(params, lr, weight_decay):
        return torch.optim.RMSprop(params, lr)

    trainer, seen = run(using, tmp_path, optim="rmsprop", learning_rate=3e-3, warmup_steps=0)
    rates = logged(trainer, "learning_rate")
    assert max(rates) == 3e-3
    near(trainer.model, written_out(using.small_model(), seen, rates, make=rmsprop)[0], using.small_model())


def test_an_optimizer_of_ones_own_is_bound_too(using, tmp_path):
    trainer, adapters = using.make(tmp_path, max_steps=4)
    own = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.0)
    trainer = using.HDPissaTrainer(trainer.model, trainer.args, train_dataset=using.small_data(),
                                   optimizers=(own, None), adapters=adapters)  # fmt: skip
    trainer.train()
    assert adapters.step == 4 and len(own.state) == len(adapters.parameters())
    assert "hd_pissa" in own.state_dict()


@pytest.mark.parametrize("settings, message", [
    (dict(weight_decay=0.1), "weight_decay"),
    (dict(per_device_train_batch_size=3), "3 rows for the 4 shards")])
def test_what_cannot_work_is_refused(using, tmp_path, settings, message):
    """Before W has moved."""
    trainer, _ = using.make(tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert same(trainer.model, using.small_model())


def test_what_the_mixin_refuses(using, tmp_path, monkeypatch):
    """Another model than attach got, float16 with its scaler, nn.DataParallel, FSDP."""
    trainer, adapters = using.make(tmp_path)

    def again(model):
        return using.HDPissaTrainer(model, trainer.args, train_dataset=using.small_data(), adapters=adapters)

    with pytest.raises(ValueError, match="the model that attach got"):
        again(using.small_model())
    again(trainer.model)
    for name, value in (("fp16", True), ("_n_gpu", 2)):
        before = getattr(trainer.args, name)
        monkeypatch.setattr(type(trainer.args), "n_gpu", property(lambda self: self._n_gpu))
        object.__setattr__(trainer.args, name, value)
        with pytest.raises(ValueError, match="fp16=True" if name == "fp16" else "2 GPUs a process"):
            monkeypatch.setattr(using.Trainer, "__init__", lambda self, model, args, **_: vars(self).update(
                model=model, args=args, accelerator=trainer.accelerator, optimizer=None))
            again(trainer.model)
        monkeypatch.undo()
        object.__setattr__(trainer.args, name, before)


def test_gradient_accumulation(using, tmp_path):
    """Two micro-batches a step: a shard's gradient is that of the mean over its tokens in both, one merge."""
    trainer, seen = run(using, tmp_path, uneven_rows(), steps=3, gradient_accumulation_steps=2)
    assert trainer.adapters.step == 3 and len(seen) >= 3 * 2 * 4
    model, norms = written_out(using.small_model(), seen, logged(trainer, "learning_rate"), accumulate=2)
    near(trainer.model, model, using.small_model())
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-4)


@pytest.mark.slow
def test_a_last_cycle_of_fewer_micro_batches(using, tmp_path):
    """Six batches an epoch, four a step: the second step of an epoch has two. A resumed run goes the same
    way from the middle of an epoch."""
    saving = dict(gradient_accumulation_steps=4, save_strategy="steps", save_steps=1)
    trainer, seen = run(using, tmp_path / "whole", uneven_rows(), **saving)
    assert len(seen) == 4 * 12
    model, norms = written_out(using.small_model(), seen, logged(trainer, "learning_rate"),
                               accumulate=[4, 2, 4, 2])  # fmt: skip
    near(trainer.model, model, using.small_model())
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-4)
    for step in (1, 3):
        resumed, _ = using.make(tmp_path / "resumed", max_steps=4, **saving)
        resumed.train_dataset = uneven_rows()
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.global_step == 4 and same(resumed.model, trainer.model)


def test_a_step_that_has_run_out_of_memory_leaves_nothing(using, tmp_path, monkeypatch):
    """auto_find_batch_size begins anew with fewer rows: without the gradients that there were."""
    trainer, _ = using.make(tmp_path, max_steps=3, auto_find_batch_size=True)
    seen, collate, loader, calls = [], trainer.data_collator, trainer.get_train_dataloader, []
    trainer.data_collator = lambda rows: seen.append(collate(rows)) or seen[-1]
    trainer.get_train_dataloader = lambda: seen.clear() or loader()
    step = using.Trainer.training_step

    def fails_once(self, *args):
        loss = step(self, *args)
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("CUDA out of memory.")
        return loss

    monkeypatch.setattr(using.Trainer, "training_step", fails_once)
    trainer.train()
    assert sum(len(batch["input_ids"]) for batch in seen[:4]) == trainer._train_batch_size < 16
    model, norms = written_out(using.small_model(), seen, logged(trainer, "learning_rate")[-3:])
    near(trainer.model, model, using.small_model())
    assert logged(trainer, "grad_norm")[-3:] == pytest.approx(norms, rel=1e-4)


def evaluating(using, folder, **settings):
    """A trainer that evaluates on its way."""
    trainer, _ = using.make(folder, **settings)
    trainer.eval_dataset = using.small_data(13)
    trainer.args.eval_strategy = using.transformers.IntervalStrategy.STEPS
    return trainer


def test_evaluation_on_the_way_and_the_tokens_seen(using, tmp_path):
    """It sees W, it changes no bit; tokens of all shards are counted."""
    plain = run(using, tmp_path)[0]
    trainer = evaluating(using, tmp_path, max_steps=4, eval_steps=2, per_device_eval_batch_size=5,
                         include_num_input_tokens_seen="all")  # fmt: skip
    trainer.train()
    assert same(trainer.model, plain.model)
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert losses[-1] == pytest.approx(trainer.evaluate()["eval_loss"]) and losses[0] > losses[1]
    assert trainer.state.num_input_tokens_seen == 4 * 16 * 12


@pytest.mark.slow
def test_early_stopping_and_the_best_model(using, tmp_path):
    """The worst one here, so that it is an earlier one: it stays in the model, where training goes on."""
    from safetensors.torch import load_file
    trainer = evaluating(using, tmp_path, eval_steps=1, save_strategy="steps", save_steps=1, warmup_steps=0,
                         metric_for_best_model="eval_loss", greater_is_better=True)  # fmt: skip
    trainer.args.load_best_model_at_end = True
    trainer.add_callback(using.transformers.EarlyStoppingCallback(2))
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.state.best_model_checkpoint.endswith("-1")
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    W = trainer.model.state_dict()
    assert all(torch.equal(best[key], W[key]) for key in best)
    trainer.train()
    assert trainer.adapters.step == 6 and any(not torch.equal(best[key], W[key]) for key in best)


@pytest.mark.slow
def test_torch_compile(using, tmp_path):
    """torch_compile=True compiles the muted model; the weights are those of the run without."""
    plain, _ = run(using, tmp_path)
    trainer, _ = run(using, tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    near(trainer.model, plain.model, using.small_model())


def test_a_batch_that_is_no_multiple_of_the_shards(using, tmp_path):
    trainer, seen = run(using, tmp_path, uneven_rows(), per_device_train_batch_size=6)
    assert sorted(len(batch["input_ids"]) for batch in seen[:4]) == [1, 1, 2, 2]
    near(trainer.model, written_out(using.small_model(), seen, logged(trainer, "learning_rate"))[0],
         using.small_model())  # fmt: skip


def test_a_last_batch_that_is_too_small_is_refused_at_once(using, tmp_path):
    """Trainer keeps the last batch by default: the end of the first epoch may be hours away."""
    trainer, adapters = using.make(tmp_path, dataloader_drop_last=False)
    for rows, fits in ((82, False), (84, True), (96, True)):
        trainer.train_dataset = using.small_data(rows)
        if fits:
            trainer.get_train_dataloader()
            continue
        with pytest.raises(ValueError, match="2 rows for the 4 shards .* drop the last batch"):
            trainer.train()
    assert adapters.step == 0


def test_labels_that_train_nothing_are_refused(using, tmp_path):
    """All -100: no weight would move, and the log would say loss 0. One shard without is not in the loss."""
    rows, none = using.small_data(16), torch.full((12,), -100)
    trainer, adapters = using.make(tmp_path, max_steps=2)
    trainer.train_dataset = [row | {"labels": none} for row in rows]
    with pytest.raises(ValueError, match="a step without a token to train: all its labels are -100"):
        trainer.train()
    assert adapters.step == 0
    trainer, _ = using.make(tmp_path, max_steps=1)
    rows = [row | {"labels": none} if i < 4 else row for i, row in enumerate(rows)]
    trainer.train_dataset, trainer._get_train_sampler = rows, lambda *_: range(16)
    before = [trainer.model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.item()
              for row in rows[4:]]
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(before) / 12, rel=1e-4)


def test_its_warm_up_begins_at_zero(using, tmp_path):
    """The first step changes nothing and no complaint is made; the second one does."""
    base = using.small_model()
    first = run(using, tmp_path, steps=1)[0]
    assert logged(first, "learning_rate") == [0.0] and same(first.model, base)
    assert not same(run(using, tmp_path, steps=2)[0].model, base)


def test_checkpoints_are_plain_and_resume_exactly(using, tmp_path, monkeypatch):
    """A checkpoint's model file has the base model's keys. 4 steps, a new program and 4 more are 8 steps bit
    for bit, although that program attaches to the checkpoint's W rather than to the base model's."""
    from safetensors.torch import load_file
    whole = run(using, tmp_path / "whole", steps=8)[0]
    saving = dict(save_strategy="steps", save_steps=4)
    run(using, tmp_path / "parts", steps=8, **saving)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-8")
    folder = tmp_path / "parts" / "checkpoint-4"
    assert set(load_file(folder / "model.safetensors")) == set(using.small_model().state_dict())

    small_model = using.small_model
    monkeypatch.setattr(using, "small_model", lambda: type(small_model()).from_pretrained(folder))
    trainer, _ = using.make(tmp_path / "parts", max_steps=8, **saving)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8 and same(trainer.model, whole.model)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-8")

    # the optimizer's state without what bind adds; no state at all
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    state.pop("hd_pissa")
    for damage, message in ((lambda: torch.save(state, folder / "optimizer.pt"), "holds no adapters"),
                            (lambda: (folder / "optimizer.pt").unlink(), "has no optimizer.pt")):
        damage()
        trainer, _ = using.make(tmp_path / "parts", max_steps=8, **saving)
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_gradient_checkpointing_and_evaluation(using, tmp_path):
    """The same weights bit for bit; evaluate() takes batches as they are and sees W."""
    plain = run(using, tmp_path)[0]
    for reentrant in (True, False):
        trainer = run(using, tmp_path, gradient_checkpointing=True,
                      gradient_checkpointing_kwargs={"use_reentrant": reentrant})[0]  # fmt: skip
        assert same(trainer.model, plain.model)
    rows = using.small_data(15)
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        loss = float(trainer.model.eval()(**batch).loss)
    trainer.args.per_device_eval_batch_size = 15
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_bfloat16_autocast(using, tmp_path):
    """bf16=True: matmuls in bfloat16, weights and increments float32; near the float32 run."""
    base, plain = using.small_model(), run(using, tmp_path)[0].model
    model = run(using, tmp_path, bf16=True)[0].model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    moved = torch.cat([(a - b).flatten() for a, b in zip(plain.parameters(), base.parameters())]).norm()
    far = torch.cat([(a - b).flatten() for a, b in zip(plain.parameters(), model.parameters())]).norm()
    assert 0 < far < 0.5 * moved


# ---- Packed rows: no row sees another, each shard has packed rows of its own -------------------------------


def documents(model):
    """loss(batch) of a packed batch: the sum over its documents, each run alone."""
    def loss(batch):
        starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
        total = 0.0
        for a, b in zip(starts, starts[1:]):
            logits = model(input_ids=batch["input_ids"][:, a:b]).logits
            total = total + F.cross_entropy(logits[0, :-1], batch["labels"][0, a + 1:b], reduction="sum")
        return total
    return loss


def test_packed_rows_of_the_collator(using, tmp_path):
    from transformers import DataCollatorWithFlattening
    trainer, seen = run(using, tmp_path, uneven_rows(), collator=DataCollatorWithFlattening())
    assert all(batch["input_ids"].shape[0] == 1 for batch in seen)
    model = using.small_model()
    rates = logged(trainer, "learning_rate")
    near(trainer.model, written_out(model, seen, rates, loss=documents(model))[0], using.small_model())


@pytest.mark.parametrize("settings", [
    {}, dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_grad_norm=1e-3)], ids=str)
def test_sft_with_packing(sft, using, tmp_path, settings):
    """Default packing, checkpointing on as TRL has it: the weights of the documents run one by one."""
    trainer, seen = run(sft, tmp_path, **settings)
    assert all((batch["position_ids"] == 0).sum() > 1 for batch in seen[:4])
    model, rates = using.small_model(), logged(trainer, "learning_rate")
    model, norms = written_out(model, seen, rates, settings.get("max_grad_norm", 1.0),
                               settings.get("gradient_accumulation_steps", 1), documents(model))  # fmt: skip
    near(trainer.model, model, using.small_model())
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-4)


@pytest.mark.slow
def test_sft_with_a_last_cycle_of_fewer_micro_batches_and_evaluation(sft, using, tmp_path):
    trainer, seen = run(sft, tmp_path, steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    batches = len(trainer.train_dataset) // 4
    assert batches % 4, "nothing was tested"
    model = using.small_model()
    cycles = ([4] * (batches // 4) + [batches % 4]) * 3
    model, norms = written_out(model, seen, logged(trainer, "learning_rate"), accumulate=cycles,
                               loss=documents(model))  # fmt: skip
    near(trainer.model, model, using.small_model())
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-4)
    evaluated, adapters = sft.make(tmp_path, max_steps=3, per_device_train_batch_size=4, eval_steps=1,
                                   gradient_accumulation_steps=4)  # fmt: skip
    evaluated = sft.HDPissaSFTTrainer(evaluated.model, evaluated.args, train_dataset=sft.small_rows(),
                                      eval_dataset=sft.small_rows(40), processing_class=sft.small_tokenizer(),
                                      adapters=adapters)  # fmt: skip
    evaluated.args.eval_strategy = using.transformers.IntervalStrategy.STEPS
    evaluated.train()
    assert same(evaluated.model, trainer.model)
    assert len([line for line in evaluated.state.log_history if "eval_loss" in line]) == 3


@pytest.mark.slow
def test_sft_resumes(sft, tmp_path):
    saving = dict(save_strategy="steps", save_steps=4)
    whole = run(sft, tmp_path, steps=8, **saving)[0]
    shutil.rmtree(tmp_path / "checkpoint-8")
    trainer, _ = sft.make(tmp_path, **saving)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8 and same(trainer.model, whole.model)


# ---- Lightning ---------------------------------------------------------------------------------------------


def fit(lightning, folder, monkeypatch, **settings):
    """(model, trainer, batches, norms logged at each step)."""
    seen, norms = [], []
    with monkeypatch.context() as patch:
        step, clip = lightning.HDPissaModule.training_step, hd_pissa.Adapters.clip_grad_norm_

        def spy(self, max_norm):
            norm = clip(self, max_norm)
            if max_norm != math.inf or settings.get("gradient_clip_val", 1) is None:
                norms.append(float(norm))
            return norm

        patch.setattr(hd_pissa.Adapters, "clip_grad_norm_", spy)
        patch.setattr(lightning.HDPissaModule, "training_step",
                      lambda self, batch, i: seen.append(batch) or step(self, batch, i))
        module, trainer = lightning.fit(folder, **settings)
    return module.model, trainer, seen, norms


@pytest.mark.parametrize("clip, accumulate", [(1.0, 1), (1e-3, 1), (1e-3, 2)])
def test_lightning_clips_in_its_closure(lightning, tmp_path, monkeypatch, clip, accumulate):
    """gradient_clip_val and accumulate_grad_batches of its Trainer act as in the loop; the norm is logged."""
    found, trainer, seen, norms = fit(lightning, tmp_path, monkeypatch, gradient_clip_val=clip,
                                      accumulate_grad_batches=accumulate)  # fmt: skip
    assert same(found, lightning.bare_loop(seen, 4, accumulate, clip))
    assert 0.01 < norms[-1] == pytest.approx(float(trainer.callback_metrics["grad_norm"]))
    assert len(norms) == 12 / accumulate
    assert not same(found, lightning.bare_loop(seen, 4, accumulate, math.inf)) or clip == 1.0


@pytest.mark.slow
def test_lightning_with_checkpointing_and_bfloat16(lightning, tmp_path, monkeypatch):
    plain = fit(lightning, tmp_path, monkeypatch)[0]
    small_model, base = lightning.small_model, lightning.small_model()

    def checkpointed(reentrant=False):
        model = small_model()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model.train()

    monkeypatch.setattr(lightning, "small_model", checkpointed)
    assert same(fit(lightning, tmp_path, monkeypatch)[0], plain)
    # its backward runs outside of adapters.shard: what is recomputed there would be shard 0's
    monkeypatch.setattr(lightning, "small_model", lambda: checkpointed(reentrant=True))
    with pytest.raises(ValueError, match="reentrant checkpointing.*use_reentrant=False"):
        lightning.fit(tmp_path)
    monkeypatch.setattr(lightning, "small_model", checkpointed)
    rounded = fit(lightning, tmp_path, monkeypatch, precision="bf16-mixed")[0]
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}
    assert 0 < apart(rounded, plain) < apart(plain, base)


def test_what_lightning_refuses(lightning, tmp_path, monkeypatch):
    """Other precisions, clipping by value, and to go on from a checkpoint without the adapters."""
    for settings, message in ((dict(precision="bf16-true"), "32-true or bf16-mixed"),
                              (dict(gradient_clip_algorithm="value"), "use 'norm'")):
        with pytest.raises(ValueError, match=message):
            lightning.fit(tmp_path, **settings)

    def unbound(self):
        optimizer = torch.optim.AdamW(self.adapters.parameters(), self.lr, weight_decay=0.0)
        optimizer.register_step_post_hook(lambda *_: self.adapters.merge_())
        return optimizer

    with monkeypatch.context() as patch:
        patch.setattr(lightning.HDPissaModule, "configure_optimizers", unbound)
        _, trainer = lightning.fit(tmp_path, epochs=1)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="holds no adapters"):
        lightning.fit(tmp_path, ckpt_path=tmp_path / "x.ckpt")


def test_lightning_fits_again(lightning, tmp_path):
    """The adapters of a fit() before are taken off: the second is that of a new module on the same W."""
    module, _ = lightning.fit(tmp_path, epochs=1)
    other = copy.deepcopy(module.model)
    rows = lightning.DataLoader((torch.arange(96)[:, None] * 7 + 3 * torch.arange(12)) % 64, 16)

    def again(module):
        lightning.lightning.Trainer(default_root_dir=tmp_path, max_epochs=1, logger=False, accelerator="cpu",
                                    enable_checkpointing=False, enable_progress_bar=False,
                                    enable_model_summary=False).fit(module, rows)  # fmt: skip
        return module.model

    assert same(again(module), again(lightning.HDPissaModule(other, rank=2, shards=4, lr=1e-2)))
    assert module.adapters.step == 6


@pytest.mark.slow
def test_lightning_with_a_last_cycle_of_fewer_micro_batches(lightning, tmp_path, monkeypatch):
    """Lightning divides their losses by the four of a whole cycle."""
    found, _, seen, norms = fit(lightning, tmp_path, monkeypatch, accumulate_grad_batches=4)
    model = lightning.small_model()
    adapters = hd_pissa_extra.attach(model, rank=2, shards=4)
    optimizer, seen = torch.optim.AdamW(adapters.parameters(), 1e-2, weight_decay=0.0), iter(seen)
    for n in (4, 2, 4, 2):
        for batch in itertools.islice(seen, n):
            for s, rows in enumerate(lightning.deal(batch, 4)):
                with adapters.shard(s):
                    (model(input_ids=rows, labels=rows).loss / 4).backward()
        adapters.clip_grad_norm_(1.0)
        optimizer.step()
        adapters.merge_()
    assert same(found, model) and len(norms) == 4 and next(seen, None) is None


@pytest.mark.slow
def test_lightnings_tuner_leaves_no_trace(lightning, tmp_path):
    """It trains, puts W back, and the fit after it is that of a new module."""
    from lightning.pytorch.tuner import Tuner
    rows = (torch.arange(96)[:, None] * 7 + 3 * torch.arange(12)) % 64
    settings = dict(default_root_dir=tmp_path, max_epochs=1, logger=False, enable_checkpointing=False,
                    accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)

    def fitted(tuned: bool):
        module = lightning.HDPissaModule(lightning.small_model(), rank=2, shards=4, lr=1e-2)
        trainer, loader = lightning.lightning.Trainer(**settings), lightning.DataLoader(rows, 16)
        if tuned:
            Tuner(trainer).lr_find(module, loader, num_training=5, update_attr=False)
            assert module.adapters.step == 5 and same(module.model, lightning.small_model())
        trainer.fit(module, loader)
        return module.model

    assert same(fitted(True), fitted(False))


# ---- Accelerate --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_accelerate_with_a_last_cycle_of_fewer_micro_batches_and_compiled():
    module = program("with_accelerate")
    from accelerate.state import AcceleratorState
    plain, found = module.run(4)[1], []
    AcceleratorState._reset_state(True)
    compiled = module.run(4, dynamo_backend="aot_eager")[1]
    assert type(compiled).__name__ == "OptimizedModule" and same(compiled, plain)
    AcceleratorState._reset_state(True)
    _, found, seen, norms = module.run(4, gradient_accumulation_steps=4)
    AcceleratorState._reset_state(True)
    model = module.small_model()
    adapters = hd_pissa.attach(model, rank=2, shards=4)
    optimizer, seen = torch.optim.AdamW(adapters.parameters(), 1e-2, weight_decay=0.0), iter(seen)
    for n, norm in zip((4, 2, 4, 2), norms):
        for batch in itertools.islice(seen, n):
            for s, rows in enumerate(module.deal(batch, 4)):
                with adapters.shard(s):
                    (model(input_ids=rows, labels=rows).loss / 4).backward()
        assert float(adapters.clip_grad_norm_(1.0)) == pytest.approx(norm)
        optimizer.step()
        adapters.merge_()
    assert same(found, model)


@pytest.mark.slow
def test_accelerate_with_bfloat16(tmp_path):
    """Matmuls in bfloat16; and fp16, whose scaler may leave out one process's step, is refused."""
    module = program("with_accelerate")
    base, plain = module.small_model(), module.run(2)[1]
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state()
    rounded = module.run(2, mixed_precision="bf16")[1]
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}
    assert 0 < apart(rounded, plain) < apart(plain, base)
    AcceleratorState._reset_state()


# ---- Trainer on two processes ------------------------------------------------------------------------------


FACTS = """
import json, os, sys, shutil, importlib.util
from pathlib import Path
import torch, torch.distributed as dist, transformers
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("using_trainer", sys.argv[1])
using = importlib.util.module_from_spec(spec)
spec.loader.exec_module(using)
transformers.logging.set_verbosity_error()
import hd_pissa
folder, found = Path(sys.argv[2]), {}
found["processes before the arguments"] = hd_pissa.world_size()
args = using.TrainingArguments(str(folder), use_cpu=True, report_to=[])
args.device
found["processes after the arguments"] = hd_pissa.world_size()

# Trainer as it is: DDP around the frozen model
model = using.small_model()
adapters = hd_pissa.attach(model, rank=2, shards=4)
optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.0)
try:
    using.Trainer(model, args, train_dataset=using.small_data(), optimizers=(optimizer, None)).train()
    found["plain Trainer"] = "trained"
except RuntimeError as e:
    found["plain Trainer"] = str(e)

def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

saving = dict(max_steps=8, save_strategy="steps", save_steps=4)
whole = using.make(folder / "whole", max_steps=8)[0]
whole.train()
using.make(folder / "parts", **saving)[0].train()
dist.barrier()
if dist.get_rank() == 0:
    shutil.rmtree(folder / "parts" / "checkpoint-8")
dist.barrier()
trainer = using.make(folder / "parts", **saving)[0]
trainer.train(resume_from_checkpoint=True)
both = hd_pissa.gather_shards(weights(trainer)[None])
found["resumed"] = [torch.equal(weights(trainer), weights(whole)), torch.equal(both[0], both[1])]
found["step"] = trainer.adapters.step
(folder / f"found.{dist.get_rank()}.json").write_text(json.dumps(found))      # two processes share one stdout
if dist.get_rank() == 0:
    trainer.save_model(str(folder / "two"))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_trainer_on_two_processes(using, tmp_path):
    """attach must come after TrainingArguments; DDP refuses the frozen model on CPUs; a checkpoint resumes
    exactly, on two processes and on one."""
    pytest.importorskip("transformers", "5", "its Trainer could not resume on several CPU processes before")
    (tmp_path / "facts.py").write_text(FACTS)
    torchrun(tmp_path / "facts.py", USING / "trainer.py", tmp_path)
    for process in range(2):
        found = json.loads((tmp_path / f"found.{process}.json").read_text())
        assert found["processes before the arguments"] == 1 and found["processes after the arguments"] == 2
        assert "DistributedDataParallel is not needed" in found["plain Trainer"]
        assert found["resumed"] == [True, True] and found["step"] == 8
    trainer, _ = using.make(tmp_path / "parts", max_steps=8)
    trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    trainer.save_model(str(tmp_path / "one"))
    assert equal_files(tmp_path / "one", tmp_path / "two")


# ---- The table of families ---------------------------------------------------------------------------------


def bench():
    pytest.importorskip("transformers", "5"), pytest.importorskip("peft")
    spec = importlib.util.spec_from_file_location("bench_families", ROOT / "tests" / "bench" / "families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_families_is_current():
    """It stands in README.md as measured, and says of 30 families and more that nothing differs."""
    module = bench()
    result = json.loads((module.HERE / "families.json").read_text())
    page = module.PAGE.read_text()
    assert module.table(result) in page and module.filled(page, result) == page
    good = [row for row in result["rows"] if "error" not in row]
    assert [row["family"] for row in result["rows"]] == list(module.FAMILIES) and len(good) >= 30
    assert all(row["step0"] and row["saved"] and row["loss"][-1] < row["loss"][0] for row in good)
    assert {row["family"] for row in good if row["moved"] < row["layers"]} <= {"Mamba", "FalconMamba"}


@pytest.mark.parametrize("family", ["Qwen3", "ViT", pytest.param("T5", marks=pytest.mark.slow),
                                    pytest.param("DeBERTa-v2", marks=pytest.mark.slow)])  # fmt: skip
def test_families_are_measured(family, monkeypatch):
    """What the table says, again; and a forward that is off, or layers that do not move, show."""
    module = bench()
    row = module.measure(family)
    result = json.loads((module.HERE / "families.json").read_text())
    kept = {r["family"]: r for r in result["rows"]}[family]
    if importlib.metadata.version("transformers") == result["transformers"]:    # others draw other weights
        assert row["loss"] == pytest.approx(kept["loss"], rel=1e-3)
    assert {k: v for k, v in row.items() if k != "loss"} == {k: v for k, v in kept.items() if k != "loss"}
    forward = hd_pissa.Mute.forward
    monkeypatch.setattr(hd_pissa.Mute, "forward", staticmethod(lambda *a: forward(*a) * (1 + 1e-6)))
    monkeypatch.setattr(hd_pissa_extra.Adapters, "exchange_and_fold", lambda *args: None)
    monkeypatch.setattr(module, "share_of_peft", lambda family: 0.0)
    row = module.measure(family)
    assert not row["step0"] and row["moved"] == 0
