"""Nothing of anyone's is lost: whose OUT is, what is deleted in it, and that any kill leaves a whole end."""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import families
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from few_rows import ROWS

import hd_pissa
import train
from training import checkpoint, folder

TINY = ["--device", "cpu", "--threads", "1", "--shards", "2", "--rank", "1", "--batch_size", "4",
        "--micro_batch_size", "4", "--eval_rows", "2", "--max_steps", "2", "--data", str(ROWS)]  # fmt: skip


class Killed(BaseException):
    """Stands for a kill: nothing after it runs."""


def run(out, *flags):
    return train.main([*TINY, *map(str, flags), "--out", str(out)])


def refused(capsys, out, *flags) -> str:
    """The sentence with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(out, *flags)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: error: ")]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def contents(path: Path) -> dict:
    """{name: bytes, or where a link leads} of all that lies in a folder."""
    return {str(p.relative_to(path)): os.readlink(p) if p.is_symlink() else p.read_bytes()
            for p in sorted(path.rglob("*")) if p.is_symlink() or p.is_file()}  # fmt: skip


def weights(out):
    return torch.load(out / "model.pt", weights_only=True)


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("done") / "out"
    run(out)
    return out


@pytest.fixture
def copy(done, tmp_path):
    shutil.copytree(done, tmp_path / "out")
    return tmp_path / "out"


# ---- Whose folder it is ------------------------------------------------------------------------------------


def test_a_foreign_folder_is_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    """Whatever its files are called; Hugging Face's folders have a config.json too."""
    monkeypatch.setattr(train, "load_model", lambda *_: pytest.fail("a model was loaded"))
    names = ["checkpoint/epoch=3.ckpt", "checkpoint/step_2/mine", "lora/adapter_model.safetensors",
             "answers/mine.txt", "model/config.json", "model.pt", "log.jsonl", "result.json", "files.json",
             "thesis.tex", "config.json"]  # fmt: skip
    for number, name in enumerate(names):
        out = tmp_path / str(number)
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text('{"model_type": "llama"}')
        for flags in ([], ["--resume", "never"]):
            error = refused(capsys, out, *flags)
            assert name.split("/")[0] in error and "new or an empty folder" in error
        assert contents(out) == {name: b'{"model_type": "llama"}'}


def test_an_empty_name_is_the_current_folder(tmp_path, capsys, monkeypatch):
    """--out "$UNSET" among one's own work."""
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("precious")
    assert "mine.txt" in refused(capsys, "")
    assert contents(tmp_path) == {"mine.txt": b"precious"}


def test_the_base_model_is_never_replaced(copy, capsys):
    """--model OUT/model.pt --out OUT, by its name, by a link to it, or where OUT/model.pt is the link."""
    before = contents(copy)
    (copy.parent / "link.pt").symlink_to(copy / "model.pt")
    for model in (copy / "model.pt", copy.parent / "link.pt"):
        error = refused(capsys, copy, "--model", model, "--lr", "1e-3", "--resume", "never")
        assert f"{model} lies in --out {copy}" in error
    assert contents(copy) == before
    base = copy.parent / "base.pt"
    (copy / "model.pt").rename(base)
    (copy / "model.pt").symlink_to(base)
    before = base.read_bytes()
    error = refused(capsys, copy, "--model", base, "--lr", "1e-3", "--resume", "never")
    assert "a link there leads to it" in error and base.read_bytes() == before


def test_nothing_that_a_run_reads_is_replaced(copy, capsys):
    """A data file at a name that a run writes, alone, in a list with weights, or of a list of sets."""
    rows = copy / "eval.jsonl"
    rows.write_text("{}")
    for text in (rows, f"0.5:{rows},0.5:elsewhere.jsonl", f"elsewhere.jsonl, {rows}", copy / "model.pt"):
        with pytest.raises(ValueError, match="a result would replace it"):
            folder.check_ours(copy, "scratch", None, str(text))
    folder.check_ours(copy, "scratch", None, str(copy.parent / "elsewhere.jsonl"))
    for flag in ("--data", "--eval_data"):      # as the command asks
        assert "a result would replace it" in refused(capsys, copy, flag, str(rows))


@pytest.mark.parametrize("name, value", [("wte.weight", float("inf")), ("ln_f.bias", float("nan"))])
def test_a_damaged_model_is_named(name, value, tmp_path, capsys):
    """In whatever weight, adapted or not: its logits are NaN, which the step-0 check would call unlike."""
    state = torch.load(ROOT / "data" / "base.pt", weights_only=True)
    state[name].view(-1)[3] = value
    torch.save(state, tmp_path / "damaged.pt")
    error = refused(capsys, tmp_path / "out", "--model", tmp_path / "damaged.pt", "--lr", "1e-2")
    assert f"{name} holds NaN or Inf; the file is damaged" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("shell", ["exec >/dev/full 2>/dev/full", "exec <&- >&- 2>&-", "| head -1"])
def test_a_run_survives_its_terminal(shell, tmp_path):
    """A full disk behind the output, none at all, or a pipe whose reader has gone: the result is there."""
    pipe = shell if shell[0] == "|" else ""
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--out", str(tmp_path / "out")]
    script = f'{"" if pipe else shell + "; "}"$@" {pipe}; exit ${{PIPESTATUS[0]}}'
    ended = subprocess.run(["bash", "-c", script, "-", *command], capture_output=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / "result.json").is_file() and weights(tmp_path / "out")


def test_links_to_empty_folders_are_followed_to_write(tmp_path):
    """OUT/checkpoint on another disk: its files lie there, and the link stays."""
    (tmp_path / "out").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "out" / "checkpoint").symlink_to(tmp_path / "disk")
    run(tmp_path / "out")
    assert (tmp_path / "out" / "checkpoint").is_symlink()
    assert (tmp_path / "disk" / "step_2" / "manifest.json").is_file()


def test_a_failed_command_leaves_no_folder(tmp_path, capsys):
    assert "missing.jsonl" in refused(capsys, tmp_path / "a" / "out", "--data", "missing.jsonl")
    assert not (tmp_path / "a").exists()


def test_what_a_run_cannot_write_is_known_at_once(done, tmp_path, capsys, monkeypatch):
    """No folder, or one with folders where a run writes files, and the reverse: else hours later."""
    monkeypatch.setattr(train, "load_model", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("precious")
    for out in ("/proc/nowhere", tmp_path / "file", tmp_path / "file" / "out"):
        assert f"--out {out} is no folder" in refused(capsys, out)
    assert (tmp_path / "file").read_text() == "precious"
    spoil = {"model.pt": Path.mkdir, "result.json.tmp": Path.mkdir, "log.jsonl": os.mkfifo,
             "checkpoint": lambda path: path.write_text(""), "answers": lambda path: path.write_text(""),
             "model": lambda path: path.symlink_to("no disk")}  # fmt: skip
    for name, make in spoil.items():
        out = tmp_path / f"out {name}"
        out.mkdir()
        shutil.copy(done / "config.json", out)
        make(out / name)
        before = os.listdir(out)
        assert f"{out / name} is no" in refused(capsys, out)
        assert os.listdir(out) == before


def test_nothing_is_written_through_a_link_at_an_unfinished_file(tmp_path, done):
    """What a kill has left there, or someone has put there, is replaced."""
    (tmp_path / "thesis.txt").write_text("precious")
    (tmp_path / "out").mkdir()
    shutil.copy(done / "config.json", tmp_path / "out")
    for name in ("config.json", "log.jsonl", "model.pt", "report.html", "result.json"):
        (tmp_path / "out" / f"{name}.tmp").symlink_to(tmp_path / "thesis.txt")
    run(tmp_path / "out")
    assert (tmp_path / "thesis.txt").read_text() == "precious" and folder.read_result(tmp_path / "out")
    assert not (tmp_path / "out" / "model.pt").is_symlink()


def test_a_folder_named_like_a_checkpoint_is_an_output_folder(tmp_path, capsys):
    """To write, to look at again, and to go on from."""
    for _ in range(2):
        run(tmp_path / "step_5")
    assert "step_5/checkpoint/step_2 is the end of this run" in capsys.readouterr().out
    run(tmp_path / "out", "--resume", tmp_path / "step_5")
    assert f"going on after step 2 of {tmp_path}/step_5/checkpoint/step_2" in capsys.readouterr().out


def test_the_lock_covers_the_whole_run(tmp_path, capsys, monkeypatch):
    """A second command is refused while the first loads its model, and while it writes its result."""
    out, errors = tmp_path / "out", []

    def meanwhile(name):
        work = getattr(train, name)

        def at_work(*args):
            with monkeypatch.context() as patch:
                patch.setattr(train, name, lambda *_: pytest.fail("no lock"))
                errors.append(refused(capsys, out, "--resume", "never"))
            return work(*args)

        monkeypatch.setattr(train, name, at_work)

    meanwhile("load_model")
    meanwhile("save")
    run(out)
    assert len(errors) == 2 and all(f"another run is writing to {out}" in error for error in errors)
    assert folder.read_result(out)


def test_no_lock_is_on_a_folder_that_is_gone(tmp_path, monkeypatch):
    """A run that failed removes the folder that it made before it lets go; who came meanwhile is refused."""
    fcntl = pytest.importorskip("fcntl")
    out, rmdir, flock, refused = tmp_path / "out", Path.rmdir, fcntl.flock, "another run is writing to"

    def meanwhile(path):
        with pytest.raises(ValueError, match=refused), folder.alone(out):
            pass
        rmdir(path)

    with monkeypatch.context() as patch, folder.alone(out):
        patch.setattr(Path, "rmdir", meanwhile)
    assert not out.exists()
    monkeypatch.setattr(fcntl, "flock", lambda *args: rmdir(out) or flock(*args))
    with pytest.raises(ValueError, match=refused), folder.alone(out):
        pass


def test_a_folder_that_another_run_has_taken_is_left(tmp_path, capsys, monkeypatch):
    """Removed and made again meanwhile, or on a disk without locks: the first ends at its next step."""
    out, inner = tmp_path / "out", train.hd_pissa.train

    def meanwhile(*args, **kwargs):
        for record in inner(*args, **kwargs):
            if record["step"] == 2:
                shutil.rmtree(out)
                with monkeypatch.context() as patch:
                    patch.setattr(train.hd_pissa, "train", inner)
                    run(out, "--seed", "5")
                seen.append(contents(out))
            yield record

    seen = []
    monkeypatch.setattr(train.hd_pissa, "train", meanwhile)
    assert f"another run has taken {out}, begun by process" in refused(capsys, out, *SIX)
    assert contents(out) == seen[0]


# ---- Room --------------------------------------------------------------------------------------------------


def test_room_is_reckoned_before_the_first_step(tmp_path, capsys, monkeypatch):
    """Too little for one checkpoint and the result: refused with both figures. For all of --keep: said."""
    free, usage = [0], shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    for mib in (0, 6):
        free[0] = mib << 20
        error = refused(capsys, tmp_path / "out")
        assert f"has {mib} MiB free" in error and "a checkpoint needs about 4 MiB, the result 4 MiB" in error
    free[0] = 9 << 20
    run(tmp_path / "out")
    assert "too little for --keep 2" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--method", "lora"], ["--method", "full"], ["--dtype", "bfloat16"],
                                   ["--dtype", "float64", "--shards", "4", "--rank", "4"]])
def test_the_reckoned_size_of_a_checkpoint(flags, tmp_path):
    """Within a quarter of what is written."""
    run(tmp_path / "out", *flags)
    args = train.parse([*TINY, *flags])
    model = train.load_model(args.model, 0)[0]
    reckoned, result = checkpoint.bytes_of(args, model, hd_pissa.find_layers(model, "all-linear")[0])
    assert result == pytest.approx((tmp_path / "out" / "model.pt").stat().st_size, rel=0.1)
    written = (tmp_path / "out" / "checkpoint" / "step_2" / "tensors_0.bin").stat().st_size
    assert 0.75 * written < reckoned < 1.3 * written


# ---- What may be deleted -----------------------------------------------------------------------------------


def test_beginning_anew_deletes_by_name_alone(copy, capsys):
    """Files that someone has put between a run's own stay; the run's own go, also a later checkpoint."""
    (copy / "checkpoint" / "step_2").rename(copy / "checkpoint" / "step_7")
    mine = ["notes.txt", "model/LICENSE", "checkpoint/notes", "checkpoint/step_7/notes", "answers/mine.txt",
            "checkpoint/step_9/notes"]  # fmt: skip
    for name in mine:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("precious")
    run(copy, "--resume", "never", "--seed", "3")
    assert all((copy / name).read_text() == "precious" for name in mine)
    assert os.listdir(copy / "checkpoint" / "step_7") == ["notes"]
    capsys.readouterr()
    run(copy, "--resume", "never", "--seed", "3", "--max_steps", "3")
    run(copy, "--seed", "3", "--max_steps", "3")
    assert "is the end of this run" in capsys.readouterr().out


def test_names_that_lead_elsewhere_are_not_deleted(copy, tmp_path):
    """files.json is read as what anyone may have written."""
    (tmp_path / "real").mkdir()
    outside = [tmp_path / "thesis.txt", tmp_path / "real" / "thesis.txt"]
    for path in outside:
        path.write_text("precious")
    (copy / "linked").symlink_to(tmp_path / "real")
    (copy / "checkpoint" / "step_1").symlink_to(tmp_path / "real")
    names = ["../thesis.txt", str(outside[0]), "linked/thesis.txt", "a/../../thesis.txt", "a\0/b", "x"]
    (copy / "files.json").write_text(json.dumps([*names, 5, None]))
    run(copy, "--resume", "never")
    assert all(path.read_text() == "precious" for path in outside)


def test_a_model_folder_is_replaced_file_by_file(tmp_path, capsys):
    """A second run in OUT: no weight of the first is left, and no file that someone added is gone."""
    base, out = tmp_path / "base", tmp_path / "out"
    families.model("llama").save_pretrained(base)
    families.tokenizer().save_pretrained(base)
    flags = ["--model", base, "--lr", "1e-2", "--block_size", "64"]
    run(out, *flags)
    first = (out / "model" / "model.safetensors").read_bytes()
    (out / "model" / "LICENSE").write_text("precious")
    (out / "model" / "model-00001-of-00002.safetensors").write_text("old")
    folder.remember(out, ["model/model-00001-of-00002.safetensors"])
    run(out, *flags, "--seed", "4", "--resume", "never")
    assert (out / "model" / "model.safetensors").read_bytes() != first
    assert not (out / "model" / "model-00001-of-00002.safetensors").exists()
    assert (out / "model" / "LICENSE").read_text() == "precious"


# ---- The end of a run --------------------------------------------------------------------------------------


def operations(monkeypatch, stop: int | None) -> list[str]:
    """Log what changes names in the file system; the one of number `stop` kills before it is done."""
    seen = []

    def watched(owner, name):
        original = getattr(owner, name)

        def operate(*args, **kwargs):
            seen.append(f"{name} {os.path.basename(args[-1] if name == 'replace' else args[0])}")
            if len(seen) - 1 == stop:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, operate)

    for owner, name in ((os, "replace"), (Path, "unlink"), (Path, "rename"), (Path, "rmdir")):
        watched(owner, name)
    return seen


@pytest.mark.parametrize("flags", [[], pytest.param(["--resume", "never"], marks=pytest.mark.slow)])
def test_a_kill_between_any_two_changes_of_files(flags, done, tmp_path, monkeypatch):
    """In a new run, and in one over a finished run of another seed: the same command completes."""
    def begin(out):
        if flags:
            shutil.copytree(tmp_path / "other", out)
        return out

    run(tmp_path / "other", "--seed", "5")
    with monkeypatch.context() as patch:
        out = begin(tmp_path / "counted")
        seen = operations(patch, None)
        run(out, *flags)
    assert len(seen) >= 8, seen
    for stop, what in enumerate(seen):
        out = begin(tmp_path / f"out{stop}")
        with monkeypatch.context() as patch:
            operations(patch, stop)
            with pytest.raises(Killed):
                run(out, *flags)
        other = (folder.config_of(out) or {}).get("seed") == 5          # no result is taken for another's
        assert other or not folder.read_result(out) or same(weights(out), weights(done)), what
        run(out, *flags)
        assert same(weights(out), weights(done)), what
        names = {"model.pt", "result.json", "report.html", "spectra.json", "config.json", "log.jsonl"}
        assert names <= {path.name for path in out.iterdir()}, what
        assert [line["step"] for line in folder.read_lines(out / "log.jsonl")] == [1, 2], what
        assert not list(out.glob("**/*.tmp")), what


def test_the_result_is_the_last_change(tmp_path, monkeypatch):
    """A best model that the last is not above is removed before: a kill would leave half of it for good."""
    with monkeypatch.context() as patch:
        seen = operations(patch, None)
        run(tmp_path / "out", "--eval_every", "1")
    assert "unlink best.pt" in seen
    assert [what for what in seen if what != "rmdir out"][-1] == "replace result.json"


@contextlib.contextmanager
def limited(size: int):
    """No file may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_small_model_that_cannot_be_written(copy, done, capsys):
    """A limit on files stands for a full disk: the sentence has file and reason, which torch does not say."""
    (copy / "result.json").unlink()
    before = (copy / "model.pt").read_bytes()
    with limited(len(before) // 2):
        assert f"{copy / 'model.pt'} was not written ([Errno 27] File too large" in refused(capsys, copy)
    assert (copy / "model.pt").read_bytes() == before
    run(copy)
    assert same(weights(copy), weights(done)) and folder.read_result(copy)


@pytest.mark.slow
def test_an_export_that_is_killed_or_cannot_be_written(tmp_path, capsys, monkeypatch):
    """Safetensors leaves an unfinished file, or raises an error of its own: the same command goes on."""
    pytest.importorskip("peft")
    base, out = families.folder(tmp_path / "base", "llama"), tmp_path / "out"
    save_file = safetensors.torch.save_file
    flags = families.flags(base, "--device", "cpu", "--export_lora", "--out", out)

    def killed(tensors, path, *more):
        if "lora" not in str(path):
            return save_file(tensors, path, *more)
        Path(path).with_name(".tmpAb3dEf").write_text("half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", killed)
        with pytest.raises(Killed):
            train.main(flags)
    size = (out / "model" / "model.safetensors").stat().st_size
    capsys.readouterr()
    with limited(size // 2), pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert stop.value.code == 2 and f"error: {out / 'model'} was not written (" in capsys.readouterr().err
    train.main(flags)
    assert sorted(os.listdir(out / "lora")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert folder.read_result(out) and not list(out.glob("*/unfinished*"))


@pytest.mark.parametrize("spoil", [
    lambda out: (out / "model.pt").unlink(), lambda out: (out / "model.pt").write_bytes(b""),
    lambda out: (out / "result.json").write_text((out / "result.json").read_text().replace(
        '"exact_match": ', '"exact_match": "0", "x": ', 1)),
    lambda out: (out / "result.json").write_text("5"), lambda out: (out / "result.json").unlink(),
])  # fmt: skip
def test_a_result_that_is_not_whole_is_made_again(spoil, copy, done, capsys):
    spoil(copy)
    run(copy)
    assert "going on after step 2" in capsys.readouterr().out
    assert same(weights(copy), weights(done)) and folder.read_result(copy)


def test_a_result_whose_checkpoints_were_deleted_stays(copy, capsys):
    """The same command prints it; another is refused."""
    shutil.rmtree(copy / "checkpoint")
    before = contents(copy)
    run(copy)
    assert "is the end of this run" in capsys.readouterr().out
    assert "--seed is 7 here, 0 there" in refused(capsys, copy, "--seed", "7")
    assert contents(copy) == before


def test_what_no_terminal_can_show_ends_no_run(tmp_path, monkeypatch):
    """Letters that cp1252 lacks, as domains: printed escaped, after the save."""
    rows = [json.dumps({"instruction": f"a{i}", "response": "b", "domain": ("x\u0394", "\u6570")[i % 2]})
            for i in range(8)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "cp1252", errors="strict"))
    run(tmp_path / "out", "--eval_rows", "8", "--eval_data", tmp_path / "rows.jsonl")
    assert b"\\u0394" in printed.getvalue() and b"\\u6570" in printed.getvalue()
    assert folder.read_result(tmp_path / "out") and (tmp_path / "out" / "report.html").exists()


# ---- Going on ----------------------------------------------------------------------------------------------


def cut(monkeypatch, out, *flags, after, number=None):
    """Run a command that ends behind step `after`: killed, or by a signal that this process gets."""
    inner = hd_pissa.train

    def stopping(*args, **kwargs):
        for record in inner(*args, **kwargs):
            if record["step"] == after - 1 and number:      # it comes in the next step
                os.kill(os.getpid(), number)
            yield record
            if record["step"] == after:
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(hd_pissa, "train", stopping)
        with contextlib.suppress(Killed):
            run(out, *flags)


SIX = ["--max_steps", "6", "--save_every", "2"]


def test_never_goes_on_where_a_signal_stopped_the_same_command(tmp_path, capsys, monkeypatch):
    flags, out = [*SIX, "--resume", "never"], tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        cut(monkeypatch, out, *flags, after=3, number=signal.SIGTERM)
    said = capsys.readouterr()
    assert stop.value.code == 128 + signal.SIGTERM and "stopped by SIGTERM after step 3" in said.out
    run(out, *flags)
    assert "going on after step 3" in capsys.readouterr().out
    cut(monkeypatch, out, *flags, after=5)                              # a kill has promised nothing
    run(out, *flags)
    text = capsys.readouterr().out
    assert "going on" not in text and text.count("step-0 loss") == 2


def test_another_command_after_a_signal_begins_anew(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        cut(monkeypatch, tmp_path / "out", *SIX, after=3, number=signal.SIGTERM)
    capsys.readouterr()
    run(tmp_path / "out", *SIX, "--resume", "never", "--seed", "2")
    assert "going on" not in capsys.readouterr().out


def test_never_goes_on_under_max_restarts(copy, capsys, monkeypatch):
    """From its own checkpoint; killed before there is one, it begins anew over another run's."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    cut(monkeypatch, copy, *SIX, "--resume", "never", after=5)
    assert "going on" not in capsys.readouterr().out
    run(copy, *SIX, "--resume", "never")
    assert "going on after step 4" in capsys.readouterr().out


def test_resume_from_a_path_does_not_touch_another_run(done, tmp_path, capsys):
    """--out holds a finished run of another seed, whose checkpoints are there or were deleted."""
    run(tmp_path / "valuable", "--seed", "2")
    for checkpoints in ("kept", "deleted"):
        if checkpoints == "deleted":
            shutil.rmtree(tmp_path / "valuable" / "checkpoint")
        before = contents(tmp_path / "valuable")
        error = refused(capsys, tmp_path / "valuable", "--resume", done / "checkpoint" / "step_2")
        assert "--seed is 0 here, 2 there" in error
        assert ("would overwrite" in error) == (checkpoints == "kept")
        assert contents(tmp_path / "valuable") == before


def test_resume_from_a_path_goes_on_from_its_own_checkpoints(tmp_path, capsys, monkeypatch):
    """The same command again after a kill: not from the path, where OUT is further."""
    cut(monkeypatch, tmp_path / "a", *SIX, after=3)
    flags = [*SIX, "--resume", tmp_path / "a"]
    cut(monkeypatch, tmp_path / "b", *flags, after=5)
    assert f"going on after step 2 of {tmp_path / 'a'}" in capsys.readouterr().out
    run(tmp_path / "b", *flags)
    assert f"going on after step 4 of {tmp_path / 'b'}" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["evaluate", "load_model"])
def test_a_signal_outside_of_training_has_a_sentence(where, tmp_path, capsys, monkeypatch):
    original = getattr(train, where)

    def meanwhile(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(train, where, meanwhile)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "out")
    assert stop.value.code == 128 + signal.SIGINT
    assert "stopped by SIGINT outside of training" in capsys.readouterr().out


@contextlib.contextmanager
def protected(path: Path):
    """Nobody can remove what is in the folder, not even root."""
    def change(mode, flag):
        if os.geteuid():
            path.chmod(mode)
        elif not shutil.which("chattr") or subprocess.run(["chattr", flag, path]).returncode:
            pytest.skip("root, and no chattr that works here")

    change(0o555, "+i")
    try:
        yield
    finally:
        change(0o755, "-i")


def test_a_protected_checkpoint_ends_no_run(tmp_path, capsys, monkeypatch):
    """It stays beside the --keep others; a run that would begin anew says so before it deletes anything."""
    out, flags = tmp_path / "out", [*SIX, "--keep", "1"]
    cut(monkeypatch, out, *flags, after=3)
    with protected(out / "checkpoint" / "step_2"):
        run(out, *flags)
        assert f"{out / 'checkpoint' / 'step_2'} stays: " in capsys.readouterr().out
        assert {path.name for path in (out / "checkpoint").iterdir()} == {"step_2", "step_6"}
        before = contents(out)
        assert "step_2 is no folder that can be written" in refused(capsys, out, *flags, "--resume", "never")
        assert contents(out) == before
    run(tmp_path / "undisturbed", *flags)
    assert same(weights(out), weights(tmp_path / "undisturbed"))


# ---- Waiting -----------------------------------------------------------------------------------------------


def test_a_process_waits_as_long_as_the_other_works(tmp_path):
    """Process 0 needs three times --timeout: no error. Stopped, it gives no sign of life: one sentence."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import os, signal, sys, time
sys.path[:0] = [{str(ROOT)!r}]
from training import processes
processes.BEAT = 0.2
processes.start_processes("cpu", 1, 2.0)
first = os.environ["RANK"] == "0"
processes.everywhere(lambda: first and open("pid", "w").write(str(os.getpid())))
processes.everywhere(lambda: first and time.sleep(6))
print("all there", flush=True)
try:
    processes.everywhere(lambda: first and os.kill(os.getpid(), signal.SIGSTOP))
except processes.Lost as e:
    print(e, flush=True)
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(int(open("pid").read()), signal.SIGKILL)
""")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(program)],
        cwd=tmp_path, capture_output=True, text=True, timeout=100)  # fmt: skip
    assert done.stdout.count("all there") == 2, done.stdout + done.stderr
    assert "process 0 has shown no sign of life for --timeout 2 s" in done.stdout, done
