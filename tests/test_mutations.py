"""Every file that a run reads back, spoilt in every way: one sentence or no harm, never a traceback.

HD_PISSA_MUTATIONS is how many are tried, 200 by default; each reader prints what became of its share.
"""

import collections
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

import hd_pissa
import hd_pissa_extra
import train
from training import checkpoint, folder, report, report_html

MUTATIONS = int(os.environ.get("HD_PISSA_MUTATIONS", 200))
CONFIG = {"method": "hd_pissa", "resume": "auto", "rows": "0", "rank": 2, "shards": 2, "processes": 1,
          "init": "hd_pissa", "alpha": None, "exchange": "auto", "device": "cpu", "max_steps": 4, "lr": 1e-3,
          "out": "out", "model": "m", "data": "d", "batch_size": 4}  # fmt: skip
TABLE = {name: {"loss": 1.5, "exact_match": 2.0, "rows": 3} for name in ("math", "all")}
EVAL = {"step": 2, "set": "s", "loss": 1.0, "exact_match": 1.0, "rows": 3, "unended": 0, "not_asked": 0}
VALUES = [None, True, -1, 0, 1, 2**70, 1e308, float("inf"), float("nan"), "", "x", "\ud800", "../x", [],
          [[]], {}, {"all": 1}]  # fmt: skip


def model_and_all():
    model = train.GPT(60, block_size=16, layers=1, width=32)
    adapters = hd_pissa_extra.attach(model, 2, shards=2)
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-3, weight_decay=0.0, foreach=True)
    return model, adapters, optimizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small OUT with every file of a finished run, and the weights that belong to it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    out.mkdir()
    model, adapters, optimizer = model_and_all()
    rows = [([1 + (i * j) % 50 for j in range(6)], 1) for i in range(1, 5)]
    for record in hd_pissa.train(model, adapters, [rows] * 4, lr=1e-3, max_steps=4, micro_batch_size=4,
                                 optimizer=optimizer, progress=False):  # fmt: skip
        folder.append_log(out / "log.jsonl", record, CONFIG)
        if record["step"] % 2 == 0:
            checkpoint.save(out / "checkpoint", record["step"], model, adapters, optimizer, CONFIG,
                            {"before": TABLE, "base": {}}, "cpu")  # fmt: skip
    state = {name: W.clone() for name, W in model.state_dict().items()}
    torch.save(state, out / "model.pt")
    result = {"before": TABLE, "after": TABLE, "eval": [EVAL], "files": {"model.pt": 0},
              "effective_rank": {"l": {"effective_rank": 2, "of": 4, "rounding_floor": 1e-7}}}  # fmt: skip
    result["files"]["model.pt"] = os.path.getsize(out / "model.pt")
    files = {"config.json": CONFIG, "result.json": result, "files.json": ["answers/s.step_2.jsonl"],
             "spectra.json": {"l": [3.0, 2.0, 1.0, 0.5]}}  # fmt: skip
    for name, value in files.items():
        folder.write(out / name, json.dumps(value))
    folder.write(out / "eval.jsonl", json.dumps(EVAL) + "\n")
    return out, state


# ---- Mutations ---------------------------------------------------------------------------------------------


def places(value, path=()):
    """Paths of keys and indices to every value in a JSON document."""
    found = [path]
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            found += places(value[key], (*path, key))
    return found


def retyped(text: str, draw: random.Random, name: str) -> str:
    """One value of the document, or of one line, replaced, removed or put under another name."""
    lines = text.splitlines() if name.endswith("l") else [text]
    at = draw.randrange(len(lines))
    document = json.loads(lines[at])
    *path, last = draw.choice(places(document)[1:])
    owner = document
    for key in path:
        owner = owner[key]
    how = draw.randrange(4)
    if how == 0:
        del owner[last]
    elif how == 1 and isinstance(owner, dict):
        owner[draw.choice(["x", "all", "", "../x"])] = owner.pop(last)
    else:
        owner[last] = draw.choice(VALUES)
    if name == "manifest.json" and draw.random() < 0.8:
        document = checkpoint.sealed(document)                  # on purpose, with a digest that fits
    return "\n".join([*lines[:at], json.dumps(document), *lines[at + 1:]])


def spoil(file: Path, draw: random.Random) -> str:
    """Do one thing to a file; what."""
    data = bytearray(file.read_bytes())
    retypes = 0 if file.suffix == ".pt" else 6
    how = draw.choice(["truncate", "flip", "insert", "kind", "nest", *["retype"] * retypes])
    if how == "truncate":
        del data[draw.randrange(len(data)):]
    elif how == "flip":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif how == "insert":
        data[draw.randrange(len(data)):0] = draw.randbytes(draw.randrange(1, 20))
    elif how == "nest":
        data = bytearray(b"[" * 100_000)
    elif how == "retype":
        text = retyped(data.decode(), draw, file.name)
        if file.name == "manifest.json" and draw.random() < 0.5:        # by someone who does it on purpose
            text, how = json.dumps(checkpoint.sealed(json.loads(text))), "sealed"
        data = bytearray(text.encode())
    else:
        file.unlink()
        how = draw.choice(["pipe", "folder", "loop", "/dev/zero", "/dev/null", "nothing", "nowhere"])
        if how == "pipe":
            os.mkfifo(file)
        elif how == "folder":
            file.mkdir()
        elif how != "nothing":
            file.symlink_to({"loop": file.name}.get(how, how if how[0] == "/" else "nowhere"))
        return how
    file.write_bytes(data)
    return how


# ---- Readers: what a command does with each file -----------------------------------------------------------


def resume(out, state):
    """Go on from the checkpoint, to the weights that were saved; there is none to fall back to."""
    shutil.rmtree(out / "checkpoint" / "step_2")
    found = checkpoint.look("auto", out, CONFIG)
    model, adapters, optimizer = model_and_all()
    start, extra = checkpoint.go_on(*found, model, adapters, optimizer, CONFIG, "cpu")
    report.report_losses(extra["before"], extra["before"])
    assert start != 4 or all(torch.equal(W, state[name]) for name, W in model.state_dict().items()), "other"


def begin(out, state):
    """Whose folder it is; the result of a finished run; a new run over it."""
    folder.check_ours(out, "scratch")
    if config := folder.config_of(out):
        checkpoint.finished("auto", out, None, config)
    folder.begin(out, CONFIG, 0)
    assert folder.config_of(out) == CONFIG and (out / "checkpoint").exists()


def continued(out, state):
    """What a run that goes on does with its log."""
    folder.begin(out, CONFIG, 2)
    assert all(line["step"] <= 2 for line in folder.read_lines(out / "log.jsonl"))


def page(out, state):
    checkpoint.finished("auto", out, (out / "checkpoint" / "step_4", None), CONFIG)
    report_html.write_report(out)


def load(out, state):
    model = train.load_small(str(out / "model.pt"))
    model(torch.zeros((1, 4), dtype=torch.long))


READERS = {
    "checkpoint/step_4/manifest.json": resume, "checkpoint/step_4/tensors_0.bin": resume,
    "config.json": begin, "files.json": begin, "log.jsonl": continued, "result.json": page,
    "eval.jsonl": page, "spectra.json": page, "model.pt": load,
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_spoilt(name, whole, tmp_path, capsys):
    seen, share = collections.Counter(), max(1, MUTATIONS // len(READERS))

    def hangs(*_):
        raise AssertionError("it hangs")

    for number in range(share):
        draw, out = random.Random(f"{name} {number}"), tmp_path / str(number)
        shutil.copytree(whole[0], out)
        if name.endswith(".bin"):
            data = bytearray((out / name).read_bytes())
            how = spoil_bytes(out / name, data, draw)
        else:
            how = spoil(out / name, draw)
        before = signal.signal(signal.SIGALRM, hangs)
        signal.alarm(20)
        try:
            READERS[name](out, whole[1])
            seen["survived"] += 1
        except (ValueError, OSError) as e:
            assert str(e) and "Traceback" not in str(e), (number, how)
            seen["refused"] += 1
        except Exception as e:
            raise AssertionError(f"{name}, mutation {number}, {how}: {type(e).__name__}") from e
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        shutil.rmtree(out)
    with capsys.disabled():
        print(f"\n{name}: {dict(seen)}", end=" ")


def spoil_bytes(file, data, draw) -> str:
    """As `spoil`, of a file that is no JSON."""
    how = draw.choice(["truncate", "flip", "pipe", "link", "folder"])
    if how in ("truncate", "flip"):
        at = draw.randrange(len(data))
        if how == "flip":
            data[at] ^= 1 << draw.randrange(8)
        file.write_bytes(data[:at] if how == "truncate" else data)
        return how
    file.unlink()
    if how == "pipe":
        os.mkfifo(file)
    elif how == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero")
    return how


# ---- Values of flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [flag[0] for flag in train.FLAGS if not isinstance(flag, str)])
def test_flag_values(flag, capsys):
    """Whatever stands behind a flag: parsed, or one line and status 2."""
    kinds = {flag[0]: flag[1] for flag in train.FLAGS if not isinstance(flag, str)}
    values = ["-1", "0", "1e308", "1e400", "nan", "inf", "-inf", "9" * 5000, "0x1", "", " ", "\ud800", "[]"]
    for value in [None] if kinds[flag] is bool else values:
        try:
            args = train.parse([f"--{flag}", *([] if value is None else [value])])
        except SystemExit as stop:
            assert stop.code == 2 and capsys.readouterr().err.count("\n") == 1, value
            continue
        number = getattr(args, flag)
        if isinstance(number, (int, float)) and flag != "dropout":
            assert 0 <= number <= 1e9, value
