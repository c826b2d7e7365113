"""tutorial/using: its programs on one and two processes, and what README.md there says about Trainer."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import hd_pissa

USING = ROOT / "tutorial" / "using"
PROGRAMS = ["bare_loop", "nanogpt", "trainer", "with_accelerate"]


def program(name: str):
    """The module tutorial/using/<name>.py, loaded from its path as the folder is no package."""
    if name in ("trainer", "with_accelerate"):
        pytest.importorskip("transformers"), pytest.importorskip("accelerate")
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
    return torch.load(path, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_on_two_processes(name, tmp_path, capfd):
    """torchrun's weights are those of one process with all four shards, bit for bit: same rows, same K."""
    text = torchrun(USING / f"{name}.py", *([tmp_path / "two"] if name != "bare_loop" else []))
    module = program(name)
    module.main(*([tmp_path / "one"] if name != "bare_loop" else []))
    assert len(checks(text)) == len(checks(capfd.readouterr().out))
    if name != "bare_loop":
        one, two = weights_in(tmp_path / "one"), weights_in(tmp_path / "two")
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_checks_can_fail(name, monkeypatch):
    """A merge that adds nothing, or on process 0 alone, does not pass for a finding."""
    module = program(name)
    if name == "bare_loop":
        step, count = hd_pissa.Adapters.merge_, []

        def merge_(self):
            count.append(step(self))
            if len(count) == 7:
                self.slots[0].module.weight.data[0, 0] += 1e-3

        monkeypatch.setattr(hd_pissa.Adapters, "merge_", merge_)
    else:
        monkeypatch.setattr(hd_pissa.Adapters, "fold", lambda *args: None)
    with pytest.raises(AssertionError):
        module.main()


# ---- Trainer: what reaches adapters outside the model, and what does not -----------------------------------


def run(using, folder, seen=None, rows=None, steps=4, **settings):
    """(trainer, adapters) after training; `seen` gets the batches in order."""
    trainer, adapters = using.make(folder, max_steps=steps, **settings)
    if rows is not None:
        trainer.train_dataset = rows
    if seen is not None:
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: seen.append(collate(rows)) or seen[-1]
    trainer.train()
    return trainer, adapters


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def rates(trainer) -> list[float]:
    return [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]


def uneven_rows() -> list[dict]:
    """Rows with 1 to 11 tokens of loss, so that a mean of means is not the mean."""
    rows = [(torch.arange(12) * 3 + 7 * i) % 64 for i in range(96)]
    return [{"input_ids": x, "labels": torch.where(torch.arange(12) < 1 + i % 11, -100, x)}
            for i, x in enumerate(rows)]


def test_its_own_clipping_does_nothing_and_the_hook_clips(using, tmp_path):
    """max_grad_norm=1e-9 of TrainingArguments leaves the weights as without; the log says grad_norm 0."""
    def trained(**settings):
        return run(using, tmp_path, **settings)[0]

    seen = []
    off, own = trained(max_grad_norm=0.0), using.TrainingArguments(str(tmp_path), use_cpu=True).max_grad_norm
    assert own == 1.0, "Trainer clips by default"
    trainer, _ = using.make(tmp_path, max_grad_norm=0.0, max_steps=4)
    trainer.args.max_grad_norm = 1e-9
    trainer.train()
    assert same(trainer.model, off.model)
    assert {float(line["grad_norm"]) for line in off.state.log_history if "loss" in line} == {0.0}
    clipped = run(using, tmp_path, seen, max_grad_norm=1e-8)[0]
    assert not same(clipped.model, off.model)
    plain = using.bare_loop(seen, rates(clipped), "cpu", max_grad_norm=1e-8)
    assert same(clipped.model, plain)


def test_it_does_not_zero_the_increments_gradients(using, tmp_path, monkeypatch):
    """It zeroes the model's alone, so merge_ drops those of the increments: with a merge that keeps them
    the second step gets the sum of both gradients."""
    recipe, next_step, kept = using.hook, hd_pissa.Adapters.next_step, {True: [], False: []}

    def keeping(adapters):
        grads = [p.grad for p in adapters.parameters()]
        next_step(adapters)
        for p, g in zip(adapters.parameters(), grads):
            p.grad = g

    for drops in (True, False):
        def hook(optimizer, adapters, norm, seen=kept[drops]):
            optimizer.register_step_pre_hook(
                lambda *_: seen.append([p.grad.clone() for p in adapters.parameters()]) or None)
            recipe(optimizer, adapters)

        monkeypatch.setattr(using, "hook", hook)
        monkeypatch.setattr(hd_pissa.Adapters, "next_step", next_step if drops else keeping)
        _, adapters = run(using, tmp_path, steps=2, warmup_steps=0)
        assert all((p.grad is None) is drops for p in adapters.parameters())
    for first, second, piled in zip(*kept[True], kept[False][1]):
        torch.testing.assert_close(piled, first + second, rtol=1e-4, atol=1e-8)


def test_every_shard_takes_the_mean_over_its_own_tokens(using, tmp_path):
    """Rows of unequal length: equal to the bare loop. With num_items_in_batch, a shard's gradient would be
    scaled by its share of all tokens."""
    seen = []
    trainer, _ = run(using, tmp_path, seen, uneven_rows())
    assert same(trainer.model, using.bare_loop(seen, rates(trainer), "cpu"))

    adapters = trainer.adapters
    batch = trainer.data_collator(uneven_rows()[:16])
    tokens = (batch["labels"][:, 1:] != -100).sum(1).reshape(4, 4).sum(1)       # of each shard
    parent = super(using.ShardedTrainer, trainer)
    grads = {}
    for how, items in (("own", None), ("all", tokens.sum())):
        for s in range(4):
            with adapters.shard(s):
                parent.training_step(trainer.model, {k: v.chunk(4)[s] for k, v in batch.items()}, items)
        grads[how] = [p.grad.clone() for p in adapters.parameters()]
        for p in adapters.parameters():
            p.grad = None
    per_shard = len(grads["own"]) // 4
    for i, (own, shared) in enumerate(zip(grads["own"], grads["all"])):
        share = float(tokens[i // per_shard] / tokens.sum())
        torch.testing.assert_close(shared, share * own, rtol=1e-4, atol=1e-9)
    assert len(set(tokens.tolist())) > 1


def test_gradient_accumulation(using, tmp_path):
    """Two micro-batches a step: every shard's gradient is the mean of its two means; one merge a step."""
    seen = []
    trainer, adapters = run(using, tmp_path, seen, uneven_rows(), steps=3, gradient_accumulation_steps=2,
                            max_grad_norm=0.0)  # fmt: skip
    assert adapters.step == 3
    model = using.small_model()
    adapters = hd_pissa.attach(model, rank=2, shards=4)
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-2, weight_decay=0.0)
    for step, lr in enumerate(rates(trainer)):
        optimizer.param_groups[0]["lr"] = lr
        for s in range(4):
            with adapters.shard(s):
                for batch in seen[2 * step:2 * step + 2]:
                    (model(**{k: v.chunk(4)[s] for k, v in batch.items()}).loss / 2).backward()
        optimizer.step()
        adapters.merge_()
        optimizer.zero_grad()
    for a, b in zip(trainer.model.parameters(), model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)      # it sums micro-batches in another order


def test_its_warm_up_begins_at_zero(using, tmp_path):
    """The first step changes nothing and no complaint is made; the second one does."""
    base = using.small_model()
    first = run(using, tmp_path, steps=1)[0]
    assert rates(first) == [0.0] and same(first.model, base)
    assert not same(run(using, tmp_path, steps=2)[0].model, base)


def test_checkpoints_are_plain_and_resume_exactly(using, tmp_path):
    """A checkpoint's model file has the base model's keys. 4 steps, a new program and 4 more are 8 steps bit
    for bit, although that program attaches to the checkpoint's W rather than to the base model's."""
    from safetensors.torch import load_file
    whole = run(using, tmp_path / "whole", steps=8)[0]
    saving = dict(save_strategy="steps", save_steps=4)
    run(using, tmp_path / "parts", steps=8, **saving)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-8")
    folder = tmp_path / "parts" / "checkpoint-4"
    assert (folder / "hd_pissa_0.pt").is_file()
    kept = load_file(folder / "model.safetensors")
    assert set(kept) == set(using.small_model().state_dict())

    small_model = using.small_model
    using.small_model = lambda: small_model().__class__.from_pretrained(folder)
    try:
        for keep in (True, False):
            trainer, _ = using.make(tmp_path / "parts", max_steps=8, **saving)
            if not keep:
                trainer.pop_callback(using.KeepShards)
            trainer.train(resume_from_checkpoint=True)
            assert trainer.state.global_step == 8 and same(trainer.model, whole.model) is keep
            shutil.rmtree(tmp_path / "parts" / "checkpoint-8")
    finally:
        using.small_model = small_model


@pytest.mark.slow
def test_gradient_checkpointing_and_evaluation(using, tmp_path):
    """With use_reentrant=False the same weights bit for bit; evaluate() sees W."""
    plain = run(using, tmp_path)[0]
    trainer = run(using, tmp_path, gradient_checkpointing=True,
                  gradient_checkpointing_kwargs={"use_reentrant": False})[0]  # fmt: skip
    assert same(trainer.model, plain.model)
    rows = using.small_data(16)
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        loss = float(trainer.model.eval()(**batch).loss)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_bfloat16_autocast(using, tmp_path):
    """bf16=True: matmuls in bfloat16, weights and increments float32; near the float32 run."""
    base, plain = using.small_model(), run(using, tmp_path)[0].model
    model = run(using, tmp_path, bf16=True)[0].model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    moved = torch.cat([(a - b).flatten() for a, b in zip(plain.parameters(), base.parameters())]).norm()
    apart = torch.cat([(a - b).flatten() for a, b in zip(plain.parameters(), model.parameters())]).norm()
    assert 0 < apart < 0.5 * moved


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
using.hook(optimizer, adapters)
try:
    using.Trainer(model, args, train_dataset=using.small_data(), optimizers=(optimizer, None)).train()
    found["plain Trainer"] = "trained"
except RuntimeError as e:
    found["plain Trainer"] = str(e)

# resume, with and without the file of each process
def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

saving = dict(max_steps=8, save_strategy="steps", save_steps=4)
whole = using.make(folder / "whole", max_steps=8)[0]
whole.train()
using.make(folder / "parts", **saving)[0].train()
dist.barrier()
found["files"] = sorted(p.name for p in (folder / "parts" / "checkpoint-4").glob("hd_pissa_*"))
for keep in (True, False):
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "parts" / "checkpoint-8")
    dist.barrier()
    trainer = using.make(folder / "parts", **saving)[0]
    if not keep:
        trainer.pop_callback(using.KeepShards)
    trainer.train(resume_from_checkpoint=True)
    W = weights(trainer)
    both = hd_pissa.gather_shards(W[None])
    found[f"resumed, own files {keep}"] = [torch.equal(W, weights(whole)), torch.equal(both[0], both[1])]
print("FOUND" + str(dist.get_rank()), json.dumps(found), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_trainer_on_two_processes(tmp_path):
    """attach must come after TrainingArguments; DDP refuses the frozen model on CPUs; Trainer's checkpoint
    has the moments of process 0 alone, so that a resumed run without KeepShards goes another way."""
    pytest.importorskip("transformers", "5", "its Trainer could not resume on several CPU processes before")
    pytest.importorskip("accelerate")
    import json
    (tmp_path / "facts.py").write_text(FACTS)
    text = torchrun(tmp_path / "facts.py", USING / "trainer.py", tmp_path)
    lines = [line[6:] for line in text.splitlines() if line.startswith("FOUND")]
    assert len(lines) == 2
    for found in map(json.loads, lines):
        assert found["processes before the arguments"] == 1 and found["processes after the arguments"] == 2
        assert "DistributedDataParallel is not needed" in found["plain Trainer"]
        assert found["files"] == ["hd_pissa_0.pt", "hd_pissa_1.pt"]
        assert found["resumed, own files True"] == [True, True]
        assert found["resumed, own files False"] == [False, True]
