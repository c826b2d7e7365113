"""A run that is interrupted and started again is, bit for bit, the run that was not."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn as nn
from conftest import ROOT
from few_rows import ROWS
from spawned import spawn

import hd_pissa
import hd_pissa_extra
import train
from training import checkpoint

SMALL = ["--max_steps", "6", "--shards", "4", "--batch_size", "16", "--micro_batch_size", "2",
         "--eval_rows", "8", "--threads", "1", "--save_every", "2", "--data", str(ROWS)]  # fmt: skip


class Killed(Exception):
    """Stands for a kill: raised inside the loop, nothing after it runs."""


def main(flags, out, kill_after=None) -> dict | None:
    """train.main in this process, cut off behind the log line of step `kill_after`."""
    original = hd_pissa.train

    def cut(*args, **kwargs):
        for record in original(*args, **kwargs):
            yield record
            if record["step"] == kill_after:
                raise Killed

    hd_pissa.train = cut
    try:
        return train.main([*SMALL, *flags, "--out", str(out)])
    except Killed:
        return None
    finally:
        hd_pissa.train = original


def outcome(out):
    """(weights, losses of the log) of a finished run; every step stands in the log once."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == list(range(1, len(log) + 1))
    losses = [(record["loss"], record["lr"], record["grad_norm"]) for record in log]
    return torch.load(out / "model.pt", weights_only=True), losses


def names(out) -> list[str]:
    """Of the checkpoints in a run's folder."""
    return sorted(path.name for path in (out / "checkpoint").iterdir())


def equal(a, b) -> bool:
    return a[1] == b[1] and list(a[0]) == list(b[0]) and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


VARIANTS = {
    "plain": "",
    "dropout and clipping": "--dropout 0.3 --max_grad_norm 0.05",
    "bfloat16": "--dtype bfloat16",
    "float64": "--dtype float64",
    "global": "--gradients global --aggregate sum",
    "resend": "--basis resend",
    "dense": "--exchange all_reduce",
    "lora": "--method lora",
    "pissa": "--method pissa",
    "full": "--method full",
}


@pytest.mark.parametrize("kind", [kind if kind in ("plain", "bfloat16") else pytest.param(
    kind, marks=pytest.mark.slow) for kind in VARIANTS])  # fmt: skip
def test_resumed_equals_uninterrupted(kind, tmp_path, capsys):
    """Killed after step 5, so that step 5 of the log is cut and done again from the checkpoint of step 4."""
    flags = VARIANTS[kind].split()
    main(flags, tmp_path / "whole")
    assert main(flags, tmp_path / "cut", kill_after=5) is None
    assert names(tmp_path / "cut") == ["step_2", "step_4"]
    main(flags, tmp_path / "cut")
    assert "going on after step 4" in capsys.readouterr().out
    a, b = outcome(tmp_path / "whole"), outcome(tmp_path / "cut")
    assert equal(a, b)


def test_the_comparison_can_fail(tmp_path, monkeypatch):
    """Moments that are not loaded, and W that is not, both show."""
    main([], tmp_path / "whole")
    for lost in ("moments.", "model."):
        out = tmp_path / lost
        main([], out, kill_after=5)
        original = checkpoint.tensors_of

        def forgetful(*args, lost=lost, original=original):
            return {k: v for k, v in original(*args).items() if not k.startswith(lost)}

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "tensors_of", forgetful)
            if lost == "moments.":
                patch.setattr(checkpoint, "pieces", lambda name, *rest, p=checkpoint.pieces: (
                    (["none"], (), 0, 0) if name.startswith("moments.") else p(name, *rest)))  # fmt: skip
            try:
                main([], out)
            except SystemExit:
                continue                        # the checksum of W saw it
        assert not equal(outcome(tmp_path / "whole"), outcome(out))


def test_a_finished_folder_prints_its_result_and_trains_nothing(tmp_path, capsys):
    first = main([], tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    again = main([], tmp_path / "out")
    text = capsys.readouterr().out
    assert "--out" in text and "--resume never" in text and "exact match" in text
    assert again["after"] == first["after"] and before == {p: p.stat().st_mtime_ns for p in before}
    main(["--resume", "never"], tmp_path / "out")
    assert len(outcome(tmp_path / "out")[1]) == 6


def test_a_result_that_was_cut_is_written_again(tmp_path):
    """A full disk or a kill in the last write: the same command ends with the same result."""
    first = main([], tmp_path / "out")
    whole = (tmp_path / "out" / "result.json").read_text()
    for text in ("", whole[:40]):
        (tmp_path / "out" / "result.json").write_text(text)
        assert main([], tmp_path / "out")["after"] == first["after"]
        assert (tmp_path / "out" / "result.json").read_text() == whole


def test_resume_from_a_path_leaves_that_folder_alone(tmp_path):
    main([], tmp_path / "whole")
    main([], tmp_path / "cut", kill_after=5)
    main(["--resume", str(tmp_path / "cut")], tmp_path / "new")
    assert names(tmp_path / "cut") == ["step_2", "step_4"]
    a, b = (torch.load(tmp_path / d / "model.pt", weights_only=True) for d in ("whole", "new"))
    assert all(torch.equal(a[k], b[k]) for k in a)


# ---- Other numbers of processes and shards -----------------------------------------------------------------


def rank_main(flags, out, kill_after=None):
    """`main` on one of several processes; its result stays there."""
    main(flags, out, kill_after)


@pytest.mark.parametrize("processes, flags", [
    ([4, 1], ""), ([2, 1], "--shard_weights"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ([1, 8, 4, 2], "--shards 8 --max_steps 8"), ([4, 2, 4], "--shard_weights --dtype bfloat16"))),
])  # fmt: skip
def test_other_numbers_of_processes(processes, flags, tmp_path):
    """Weights of a run that changed its processes are those of one that did not; sharded ones too."""
    flags, kills = flags.split(), [*range(3, 2 * len(processes), 2), None]
    main([flag for flag in flags if flag != "--shard_weights"], tmp_path / "whole")
    for count, kill in zip(processes, kills):
        if count == 1:
            main([flag for flag in flags if flag != "--shard_weights"], tmp_path / "cut", kill)
        else:
            spawn(count, rank_main, tmp_path, flags, tmp_path / "cut", kill)
    assert equal(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))


@pytest.mark.parametrize("shards, r", [(2, 4), (1, 8), (8, 1)])
def test_components_dealt_to_other_shards(shards, r, tmp_path, monkeypatch):
    """4 x 2 becomes shards x r: the same components and moments in the same order, the step's size kept."""
    seen = {}

    def norm_of_a_step(flags, name):
        """Norm of what step 5 adds to each weight, and all factors and moments before it."""
        original = hd_pissa.Adapters.merge_

        def merge(self, told=None):
            if self.step == 4:
                seen[name] = self
                W = [slot.module.weight.clone() for slot in self.slots]
                original(self)
                raise Killed([(slot.module.weight - w).norm().item() for w, slot in zip(W, self.slots)])
            return original(self, told)

        with monkeypatch.context() as patch:
            patch.setattr(hd_pissa.Adapters, "merge_", merge)
            with pytest.raises(Killed) as killed:
                train.main([*SMALL, *flags, "--out", str(tmp_path / "out")])
        return torch.tensor(killed.value.args[0])

    main([], tmp_path / "out", kill_after=5)
    old = norm_of_a_step([], "old")
    new = norm_of_a_step(["--shards", str(shards), "--rank", str(r)], "new")
    assert seen["new"].K == shards and seen["new"].mean_over == 4
    for a, b in zip(seen["old"].slots, seen["new"].slots):
        (A, B), (A2, B2) = a.views(seen["old"].basis), b.views(seen["new"].basis)
        assert torch.equal(A.mT.flatten(0, 1), A2.mT.flatten(0, 1))     # (K, m, r) -> (K r, m)
        assert torch.equal(B.flatten(0, 1), B2.flatten(0, 1))           # (K, r, n) -> (K r, n)
    torch.testing.assert_close(new, old, rtol=0.15, atol=0)


def test_other_shards_after_lora_init_are_another_run(tmp_path, capsys):
    """Random factors are no components of W: they cannot be dealt anew."""
    main(["--init", "lora"], tmp_path / "out", kill_after=5)
    with pytest.raises(SystemExit):
        main(["--init", "lora", "--shards", "2", "--rank", "4"], tmp_path / "out")
    assert "--rank is 4 here, 2 there" in capsys.readouterr().err


# ---- What may not be resumed -------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    ("--lr 0.5", "--lr is 0.5 here, 0.02 there"),
    ("--seed 3", "--seed is 3 here, 0 there"),
    ("--rank 4", "--rank is 4 here, 2 there"),
    ("--max_steps 7", "--max_steps is 7 here, 6 there"),
    ("--method lora", "--method is lora here, hd_pissa there"),
    ("--dtype bfloat16", "--dtype is bfloat16 here, float32 there"),
    ("--resume nowhere", "no finished checkpoint there"),
])  # fmt: skip
def test_another_run_is_refused_with_both_values(flags, words, tmp_path, capsys):
    main([], tmp_path / "out", kill_after=5)
    capsys.readouterr()
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "out").rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(flags.split(), tmp_path / "out")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and len(error.strip().splitlines()) == 1
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "out").rglob("*"))


def test_another_data_file_is_refused(tmp_path, capsys):
    """Under the same name."""
    file = tmp_path / "rows.jsonl"
    file.write_text(ROWS.read_text())
    main(["--data", str(file)], tmp_path / "out", kill_after=5)
    file.write_text("".join(ROWS.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(SystemExit):
        main(["--data", str(file)], tmp_path / "out")
    assert "the digest of --data's rows is" in capsys.readouterr().err


def test_model_and_rows_by_other_names_are_the_same_run(tmp_path, capsys):
    """A moved model, rows, held-out rows and tokenizer: it goes on, says so, and ends with the same bits.

    Another model under the old name is refused.
    """
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        shutil.copy(train.DATA / "base.pt", tmp_path / place / f"{place}.pt")
        shutil.copy(train.DATA / "tokenizer.tiktoken", tmp_path / place / "x.tiktoken")
        (tmp_path / place / "rows.jsonl").write_text(ROWS.read_text())

    def flags(place):
        given = {"model": f"{place}.pt", "data": "rows.jsonl", "eval_data": "rows.jsonl",
                 "tokenizer": "x.tiktoken"}  # fmt: skip
        return ["--lr", "0.02", *(x for k, v in given.items() for x in (f"--{k}", str(tmp_path / place / v)))]

    main(flags("a"), tmp_path / "whole")
    main(flags("a"), tmp_path / "cut", kill_after=5)
    capsys.readouterr()
    main(flags("b"), tmp_path / "cut")
    text = capsys.readouterr().out
    assert f"model was {tmp_path}/a/a.pt, is {tmp_path}/b/b.pt; data was " in text
    assert equal(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))
    main(flags("a"), tmp_path / "other", kill_after=5)
    state = torch.load(tmp_path / "a" / "a.pt", weights_only=True)
    state["wpe.weight"][0, 0] += 1
    torch.save(state, tmp_path / "a" / "a.pt")
    with pytest.raises(SystemExit):
        main(flags("a"), tmp_path / "other")
    assert "the digest of --model's weights is" in capsys.readouterr().err


# ---- Another --max_steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup, first", [("2", None), ("0.3", 5)])
def test_a_constant_rate_goes_on_longer(warmup, first, tmp_path, capsys):
    """From the end of a run, or from where it was killed; with the warm-up in steps, as if never ended.

    A share of the steps was another number of them: what is past is past, the later rates are the same.
    """
    flags = ["--schedule", "constant", "--warmup", warmup]
    main(flags, tmp_path / "out", kill_after=first)
    done = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    capsys.readouterr()
    main([*flags, "--max_steps", "9"], tmp_path / "out")
    start = 6 if first is None else 4
    said = capsys.readouterr().out
    assert f"going on after step {start} of" in said and "max_steps was 6, is 9" in said
    weights, losses = outcome(tmp_path / "out")
    log = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert len(losses) == 9 and log[:start] == done[:start]
    if first is None:
        main([*flags, "--max_steps", "9"], tmp_path / "whole")
        assert equal((weights, losses), outcome(tmp_path / "whole"))
    else:
        assert [lr for _, lr, _ in losses] == [0.01, *[0.02] * 8]


@pytest.mark.parametrize("flags, other", [
    ("", "--max_steps 9"), ("--schedule linear", "--max_steps 9"), ("--warmup 5", "--max_steps 9"),
    ("--schedule constant", "--max_steps 2"),                           # it is at step 4
    ("--schedule constant --warmup 0.5", "--max_steps 12"),             # would warm up again
    ("--schedule constant --warmup 2", "--max_steps 9 --schedule cosine"),
])  # fmt: skip
def test_other_rates_are_another_run(flags, other, tmp_path, capsys):
    main(flags.split(), tmp_path / "out", kill_after=5)
    with pytest.raises(SystemExit):
        main([*flags.split(), *other.split()], tmp_path / "out")
    error = capsys.readouterr().err
    assert f"--max_steps is {other.split()[1]} here, 6" in error and "--schedule constant, after its" in error


# ---- Signals -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path):
    """SIGTERM, then SIGINT to the run that goes on, then to the end: the bits of a run left alone."""
    flags, log = ["--max_steps", "40", "--save_every", "0"], tmp_path / "cut" / "log.jsonl"
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, *flags, "--out", str(tmp_path / "cut")]
    for number, step in ((signal.SIGTERM, 2), (signal.SIGINT, 20)):
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not (log.exists() and len(log.read_text().splitlines()) >= step):
            assert run.poll() is None and time.monotonic() < deadline, run.communicate()
            time.sleep(0.01)
        run.send_signal(number)
        text, error = run.communicate(timeout=60)
        assert run.returncode == 128 + number and f"stopped by {number.name} after step" in text, text + error
        assert "Traceback" not in error and ("going on after step" in text) == (step == 20)
    main(flags, tmp_path / "cut")
    main(flags, tmp_path / "whole")
    assert equal(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))


# ---- The loop's own parts ----------------------------------------------------------------------------------


class Dropping(nn.Module):
    """A model with dropout of its own, which draws from torch's global generator."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.drop, self.fc = nn.Embedding(32, 24), nn.Dropout(0.5), nn.Linear(24, 32, bias=False)

    def forward(self, x):
        return self.fc(self.drop(self.wte(x)))


def dropping_run(start=0, model=None, shards=4):
    model = model or Dropping()
    adapters = hd_pissa.attach(model, 2, shards=shards)
    rows = [([1 + (i * j) % 30 for j in range(6)], 1) for i in range(1, 17)]
    optimizer = torch.optim.SGD(adapters.parameters(), 1.0)
    list(hd_pissa.train(model, adapters, [rows] * 4, lr=1.0, max_steps=2 + start, warmup=0,
                        schedule="constant", start=start, optimizer=optimizer, progress=False))  # fmt: skip
    adapters.detach_()
    return model


def test_the_models_own_dropout_is_a_function_of_the_step():
    """Whatever was drawn before: another state of torch's generator changes nothing, another step does."""
    first = dropping_run().fc.weight
    torch.manual_seed(12345)
    model = Dropping()
    torch.rand(100)
    assert torch.equal(first, dropping_run(model=model).fc.weight)
    assert not torch.equal(first, dropping_run(start=7).fc.weight)


def dropping_weights():
    return dropping_run().fc.weight.tolist()        # a tensor would lie in a file of the process


def test_the_models_own_dropout_does_not_depend_on_processes(tmp_path):
    one = dropping_weights()
    for weight in spawn(2, dropping_weights, tmp_path):
        assert one == weight


class Poisoned(Dropping):
    """Gives NaN in chosen forwards."""

    forwards, bad = 0, ()

    def forward(self, x):
        Poisoned.forwards += 1
        out = super().forward(x)
        return out * float("nan") if Poisoned.forwards in Poisoned.bad else out


def poisoned(bad, skip_nonfinite=0):
    """Records and weights after each of four steps of two shards whose forwards `bad` are NaN."""
    Poisoned.forwards, Poisoned.bad = 0, bad
    model = Poisoned()
    adapters = (hd_pissa_extra if skip_nonfinite else hd_pissa).attach(model, 2, shards=2)
    adapters.skip_nonfinite = skip_nonfinite
    rows = [([1 + (i * j) % 30 for j in range(6)], 1) for i in range(1, 9)]
    steps = hd_pissa.train(model, adapters, [rows] * 4, lr=1e-2, max_steps=4, progress=False)
    return [(record, model.fc.weight.clone()) for record in steps]


@pytest.mark.parametrize("file", [hd_pissa, hd_pissa_extra])
def test_after_a_step_that_is_not_finite_the_model_goes_on(file):
    """The error leaves no increments behind, which the next forward would refuse."""
    Poisoned.forwards, Poisoned.bad = 0, (2,)
    model = Poisoned()
    adapters = file.attach(model, 2, shards=2)
    rows = [([1 + (i * j) % 30 for j in range(6)], 1) for i in range(1, 9)]
    with pytest.raises(ValueError, match="step 1: not finite"):
        next(hd_pissa.train(model, adapters, [rows], lr=1e-2, max_steps=1, progress=False))
    assert model(torch.ones((1, 4), dtype=torch.long)).isfinite().all() and not adapters.increments.any()


def test_a_step_that_is_not_finite_is_named_and_not_merged():
    with pytest.raises(ValueError, match=r"step 2: not finite: loss of shards \[1\].*W is untouched"):
        poisoned(bad=(4,))
    done = poisoned(bad=(4,), skip_nonfinite=1)
    assert torch.equal(done[0][1], done[1][1]) and not torch.equal(done[1][1], done[2][1])
    with pytest.raises(ValueError, match="step 3"):
        poisoned(bad=(4, 5), skip_nonfinite=1)


def test_a_skipped_step_leaves_the_moments_alone():
    """Steps 1, 3, 4 of a run that dropped step 2 give what those gradients give without it."""
    skipped = poisoned(bad=(3,), skip_nonfinite=1)
    model = Poisoned()
    Poisoned.forwards, Poisoned.bad = 0, ()
    adapters = hd_pissa_extra.attach(model, 2, shards=2)
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-2, weight_decay=0.0, foreach=True)
    rows = [([1 + (i * j) % 30 for j in range(6)], 1) for i in range(1, 9)]
    for start, stop in ((0, 1), (2, 4)):
        batches = [rows] * (stop - start)
        for record in hd_pissa.train(model, adapters, batches, lr=1e-2, max_steps=4, start=start,
                                     optimizer=optimizer, progress=False):  # fmt: skip
            assert record["step"] <= stop
        if start == 0:
            adapters.step = 2
    assert torch.equal(skipped[-1][1], model.fc.weight)


def test_heartbeat_speaks_only_while_nothing_happens(capsys):
    with train.processes.heartbeat(0.15, 600) as beat:
        for step in range(5):
            time.sleep(0.05)
            beat(step)
        quiet = capsys.readouterr().err
        time.sleep(0.5)
    loud = capsys.readouterr().err
    assert quiet == "" and "since step 4 ended; a collective gives up after --timeout 600 s" in loud
