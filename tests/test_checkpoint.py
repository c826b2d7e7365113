"""Damaged, foreign and hostile checkpoints are refused with file and reason; a flipped bit in W is found."""

import json
import os
import shutil

import pytest
import torch
import torch.nn as nn
from spawned import spawn
from test_resume import equal, main, names, outcome

import hd_pissa
import hd_pissa_extra
import train
from training import checkpoint


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run that was killed behind its checkpoint of step 4."""
    folder = tmp_path_factory.mktemp("killed")
    main(["--keep", "1"], folder / "out", kill_after=5)
    return folder / "out"


@pytest.fixture
def copy(killed, tmp_path):
    shutil.copytree(killed, tmp_path / "out")
    return tmp_path / "out"


def edited(change, sealed=True):
    """Change the manifest; its digest is renewed, as by someone who does it on purpose."""
    def spoil(step):
        manifest = json.loads((step / "manifest.json").read_text())
        change(manifest)
        manifest = checkpoint.sealed(manifest) if sealed else manifest
        (step / "manifest.json").write_text(json.dumps(manifest))
    return spoil  # fmt: skip


def truncated(step):
    file = step / "tensors_0.bin"
    file.write_bytes(file.read_bytes()[:-1000])


def flipped(step):
    data = bytearray((step / "tensors_0.bin").read_bytes())
    data[len(data) // 2] ^= 4
    (step / "tensors_0.bin").write_bytes(data)


def linked(name):
    def spoil(step):
        (step / name).rename(step.parent.parent / name)
        (step / name).symlink_to(step.parent.parent / name)
    return spoil  # fmt: skip


def pipe(name):
    def spoil(step):
        (step / name).unlink()
        os.mkfifo(step / name)
    return spoil  # fmt: skip


def foreign(step):
    """Tensors of a smaller model under this run's configuration."""
    model = train.GPT(60, block_size=16, layers=1, width=32)
    adapters = hd_pissa_extra.attach(model, 2, shards=4)
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-3, weight_decay=0.0)
    old = json.loads((step / "manifest.json").read_text())
    other = checkpoint.save(step.parent / "x" / "checkpoint", 4, model, adapters, optimizer, old["config"],
                            old["extra"], "cpu")  # fmt: skip
    shutil.rmtree(step)
    other.rename(step)
    shutil.rmtree(step.parent / "x")


def wrong_sum(manifest):
    name = next(iter(manifest["sums"]))
    manifest["sums"][name] ^= 1


def other_file(manifest):
    """Every tensor lies in a file outside, which is listed."""
    manifest["files"]["../../log.jsonl"] = manifest["files"].pop("tensors_0.bin")
    for _, _, parts in manifest["tensors"].values():
        parts[0][0] = "../../log.jsonl"


def beyond(manifest):
    next(iter(manifest["tensors"].values()))[2][0][1] += 1 << 40


def unseal(manifest):
    manifest["extra"]["mean_over"] += 1


SPOILT = {
    "truncated tensors": (truncated, "tensors_0.bin has", "bytes"),
    "one flipped bit": (flipped, "tensors_0.bin is damaged", "digest"),
    "no tensors": (lambda step: (step / "tensors_0.bin").unlink(), "tensors_0.bin is missing", ""),
    "tensors elsewhere": (linked("tensors_0.bin"), "tensors_0.bin is missing", ""),
    "tensors from a pipe": (pipe("tensors_0.bin"), "tensors_0.bin is missing", ""),
    "half a manifest": (lambda step: (step / "manifest.json").write_text('{"f'), "manifest.json is not", ""),
    "a list": (lambda step: (step / "manifest.json").write_text("[]"), "manifest.json is not", ""),
    "nested": (lambda step: (step / "manifest.json").write_text("[" * 100_000), "manifest.json is not", ""),
    "manifest elsewhere": (linked("manifest.json"), "manifest.json is not", ""),
    "manifest from a pipe": (pipe("manifest.json"), "manifest.json is not", ""),
    "older format": (edited(lambda m: m.update(format=1)), "of format 1", "older"),
    "newer format": (edited(lambda m: m.update(format=3)), "of format 3", "newer"),
    "format in words": (edited(lambda m: m.update(format="x"), False), "manifest.json is damaged", ""),
    "one digit changed": (edited(unseal, False), "manifest.json is damaged", "its own digest"),
    "a file outside": (edited(other_file), "manifest.json is not", "files"),
    "bytes behind the file": (edited(beyond), "manifest.json is not", "tensors"),
    "no table": (edited(lambda m: m["extra"].update(before={})), "manifest.json is not", "extra"),
    "another model": (foreign, "does not hold", "another model"),
    "a weight that is not the saved one": (edited(wrong_sum), "is not the weight that was saved", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILT)
def test_refused_with_file_and_reason(kind, copy, capsys):
    """Before training, with exit status 2 and one line; the log and the finished checkpoint stay."""
    spoil, *words = SPOILT[kind]
    spoil(copy / "checkpoint" / "step_4")
    log = (copy / "log.jsonl").read_text()
    with pytest.raises(SystemExit) as stop:
        main([], copy)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("train.py: error:"), error
    assert all(word in error for word in words), error
    assert (copy / "log.jsonl").read_text() == log and names(copy) == ["step_4"]


def test_the_newest_whole_checkpoint_is_used_and_the_other_named(tmp_path, capsys):
    """--keep 2: one may rot. The weights are those of a run that nothing has happened to."""
    out = tmp_path / "out"
    main([], out, kill_after=5)
    assert names(out) == ["step_2", "step_4"]
    flipped(out / "checkpoint" / "step_4")
    main([], out)
    text = capsys.readouterr().out
    assert "not used: " in text and "tensors_0.bin is damaged" in text and "going on after step 2" in text
    assert names(out) == ["step_4", "step_6"]
    main([], tmp_path / "whole")
    assert equal(outcome(out), outcome(tmp_path / "whole"))
    checkpoint.read_manifest(out / "checkpoint" / "step_4")             # written anew


def test_nothing_is_half_loaded(copy):
    """Where names do not fit, not one tensor has been touched."""
    step = copy / "checkpoint" / "step_4"
    manifest = checkpoint.read_manifest(step)
    model = train.GPT(60, block_size=16, layers=1, width=32)
    adapters = hd_pissa_extra.attach(model, 2, shards=4)
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-3, weight_decay=0.0)
    before = {k: v.clone() for k, v in model.state_dict().items()} | adapters.state_dict()
    with pytest.raises(ValueError, match="another model"):
        checkpoint.load(step, manifest, model, adapters, optimizer, manifest["config"], "cpu")
    after = model.state_dict() | adapters.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items() if isinstance(v, torch.Tensor))


def test_what_a_killed_save_leaves_is_ignored_and_removed(copy, tmp_path):
    stale = copy / "checkpoint" / "step_6.tmp"
    shutil.copytree(copy / "checkpoint" / "step_4", stale)
    main([], copy)
    assert not stale.exists() and names(copy) == ["step_4", "step_6"]
    main([], tmp_path / "whole")
    assert equal(outcome(copy), outcome(tmp_path / "whole"))


def test_two_finished_checkpoints_the_newer_counts(copy, capsys):
    """A kill between the renaming of the new one and the removal of older ones leaves more."""
    main([], copy, kill_after=None)
    (copy / "result.json").unlink()
    main([], copy)
    assert "going on after step 6" in capsys.readouterr().out


# ---- Checksums of W ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int16])
def test_weight_sum_by_hand(dtype):
    """Python integers say the same; every single bit and every swap shows; parts add up."""
    W = torch.randn((7, 5), generator=torch.Generator().manual_seed(0)).mul(50).to(dtype)
    integers = W.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[W.element_size()]).flatten().tolist()
    total = sum(v * (2 * p + 1) for p, v in enumerate(integers)) % 2**64
    assert hd_pissa_extra.checksum(W) % 2**64 == total
    assert (hd_pissa_extra.checksum(W[:3]) + hd_pissa_extra.checksum(W[3:], 15)) % 2**64 == total
    bits = W.view(torch.uint8).clone()
    for at in range(bits.numel()):
        for bit in range(8):
            bits.view(-1)[at] ^= 1 << bit
            assert hd_pissa_extra.checksum(bits.view(dtype)) % 2**64 != total
            bits.view(-1)[at] ^= 1 << bit
    swapped = W.clone()
    swapped[0, 0], swapped[4, 2] = W[4, 2], W[0, 0]
    assert hd_pissa_extra.checksum(swapped) % 2**64 != total


def flip(process, which):
    """Compare replicas, flip one bit on one process, compare again; the messages."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 16))
    adapters = hd_pissa_extra.attach(model, 2, dtype=torch.bfloat16 if which == "low" else None)
    sums, out = checkpoint.check_replicas(adapters, "cpu"), []
    if hd_pissa.process_index() == process:
        target = adapters.slots[1].low if which == "low" else model[1].weight.data
        target.view(torch.int16).view(-1)[7] ^= 1
    try:
        checkpoint.check_replicas(adapters, "cpu")
    except ValueError as e:
        out.append(str(e))
    return sorted(sums), out


@pytest.mark.parametrize("which", ["weight", pytest.param("low", marks=pytest.mark.slow)])
def test_one_flipped_bit_is_caught_on_every_process(which, tmp_path):
    """With the first layer concerned and, of three processes, the one that differs."""
    for layers, messages in spawn(3, flip, tmp_path, 2, which):
        assert layers == ["0", "1"]
        assert len(messages) == 1 and "1 on processes [2]" in messages[0] and "last checkpoint" in messages[0]


def flip_in_training(flags, out):
    """train.main on two processes; process 1 suffers a flipped bit in step 3."""
    original = hd_pissa.Adapters.merge_

    def merge(self, told):
        rows = original(self, told)
        if self.step == 3 and hd_pissa.process_index() == 1:
            # the lowest bit might be rounded away by the next sum
            self.slots[5].module.weight.data.view(torch.int32)[0, 0] ^= 1 << 20
        return rows

    hd_pissa.Adapters.merge_ = merge
    try:
        main(flags, out)
    except SystemExit as stop:
        return stop.code
    finally:
        hd_pissa.Adapters.merge_ = original


@pytest.mark.slow
def test_a_flipped_bit_stops_the_run_and_the_last_checkpoint_is_good(tmp_path):
    """--check_every 2: the bit of step 3 is seen at 4, before it is saved; the run goes on from step 2."""
    assert spawn(2, flip_in_training, tmp_path, ["--check_every", "2"], tmp_path / "cut") == [2, 2]
    assert names(tmp_path / "cut") == ["step_2"]
    main(["--check_every", "2"], tmp_path / "cut")
    main([], tmp_path / "whole")
    assert equal(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))


def test_a_smaller_micro_batch_is_the_same_run_another_batch_is_not():
    """After running out of memory one goes on with fewer rows a forward; rows a step make another run."""
    config = {"micro_batch_size": 32, "batch_size": 64, "lr": 0.02}
    checkpoint.same_run(config, config | {"micro_batch_size": 4}, "it")
    with pytest.raises(ValueError, match="--batch_size is 32 here, 64 there"):
        checkpoint.same_run(config, config | {"batch_size": 32}, "it")
