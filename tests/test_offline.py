"""Without a network: folders and what is in a cache work; what is missing is one line, at once."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys

import families
import pytest
from conftest import ROOT

# A network namespace has no interface that is up. Without the right to make one, sockets themselves refuse.
COMMANDS = """
import json, socket, sys, time
if sys.argv[1] == "refuse":
    def refuse(*args, **kwargs):
        raise OSError(101, "Network is unreachable")
    socket.getaddrinfo = socket.socket.connect = refuse
else:
    try:
        socket.create_connection(("192.0.2.1", 443), timeout=1)
    except OSError:
        pass
    else:
        raise SystemExit("there is a network")
import train
for argv in json.loads(sys.argv[2]):
    start, status = time.perf_counter(), 0
    try:
        train.main(argv)
    except SystemExit as e:
        status = e.code
    print("ENDED", json.dumps([status, time.perf_counter() - start]), file=sys.stderr, flush=True)
"""


def alone() -> list[str]:
    """The command that starts another without a network, or nothing."""
    for command in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which("unshare") and not subprocess.run([*command, "true"], capture_output=True).returncode:
            return command
    return []


def offline(commands, **environment) -> list[tuple[int, float, list[str]]]:
    """(status, seconds, lines of stderr that train.py wrote) of each command line, in one process."""
    prefix = alone()
    how = [sys.executable, "-c", COMMANDS, "alone" if prefix else "refuse", json.dumps(commands)]
    done = subprocess.run([*prefix, *how], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, **environment})  # fmt: skip
    parts = done.stderr.split("ENDED ")
    assert len(parts) == len(commands) + 1, done.stderr
    answers = [json.loads(part.splitlines()[0]) for part in parts[1:]]
    return [(status, seconds, [line for line in text.splitlines() if line.startswith("train.py:")])
            for (status, seconds), text in zip(answers, parts)]  # fmt: skip


TINY = """
from tiktoken.load import load_tiktoken_bpe

def tiny(name, digest):
    ranks = load_tiktoken_bpe("https://example.invalid/" + name + ".tiktoken", expected_hash=digest)
    end = {"<|endoftext|>": 256}
    return dict(name=name, pat_str=r"\\\\S+|\\\\s+", mergeable_ranks=ranks, special_tokens=end)

ENCODING_CONSTRUCTORS = {n: lambda n=n: tiny(n, "DIGEST") for n in ("tiny", "spoilt", "absent")}
"""


@pytest.fixture
def tiktoken_cache(tmp_path):
    """Environment with tiktoken's cache: a file for "tiny", one with a wrong digest for "spoilt", none for
    "absent". The three encodings come as a plugin of tiktoken; its code and its rules are the real ones."""
    ranks = b"".join(base64.b64encode(bytes([b])) + f" {b}\n".encode() for b in range(256))
    plugin = TINY.replace("\\\\", "\\").replace("DIGEST", hashlib.sha256(ranks).hexdigest())
    (tmp_path / "plugins" / "tiktoken_ext").mkdir(parents=True)
    (tmp_path / "plugins" / "tiktoken_ext" / "tiny.py").write_text(plugin)
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, content in (("tiny", ranks), ("spoilt", ranks[:-9])):
        key = hashlib.sha1(f"https://example.invalid/{name}.tiktoken".encode()).hexdigest()
        (cache / key).write_bytes(content)
    return {"TIKTOKEN_CACHE_DIR": str(cache), "PYTHONPATH": str(tmp_path / "plugins")}


def test_the_small_gpt_and_tiktoken(tiktoken_cache, tmp_path):
    """The default model trains, a cached encoding too; a missing or spoilt file is one line."""
    rows = families.rows(tmp_path / "rows.jsonl")
    common = ["--data", str(rows), "--lr", "1e-3", "--batch_size", "8", "--shards", "2", "--max_steps", "1",
              "--threads", "1", "--out"]  # fmt: skip
    scratch = [*common[:-1], "--model", "scratch", "--tokenizer"]
    missing = {"spoilt": ("has another digest", "example.invalid/spoilt"),
               "absent": ("is not there", "example.invalid/absent"),
               "cl100k_base": ("is not there", "encodings/cl100k_base.tiktoken"),
               "gpt2": ("is not there", "vocab.bpe")}  # fmt: skip
    answers = offline(
        [[*common, str(tmp_path / "default")],
         *([*scratch, name, "--out", str(tmp_path / name)] for name in ("tiny", *missing))],
        **tiktoken_cache)  # fmt: skip
    assert [status for status, *_ in answers] == [0, 0, 2, 2, 2, 2]
    assert (tmp_path / "default" / "model.pt").exists() and (tmp_path / "tiny" / "model.pt").exists()
    for (name, (why, url)), (_, seconds, lines) in zip(missing.items(), answers[2:]):
        (line,) = lines
        assert why in line and url in line and "TIKTOKEN_CACHE_DIR" in line
        assert not (tmp_path / name).exists() and seconds < 20


def hub_cache(path, name: str, source):
    """A hub cache as the hub's own client lays it out, holding `source` as the model `name`."""
    there = path / ("models--" + name.replace("/", "--"))
    shutil.copytree(source, there / "snapshots" / "0123")
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text("0123")


def test_hugging_face_models(tmp_path):
    """A folder trains; an id in the hub's cache too, without HF_HUB_OFFLINE; another is one line.
    Within seconds: transformers, given an id, would spend 23 s on each of its files."""
    pytest.importorskip("transformers")
    base = families.folder(tmp_path / "base", "llama")
    hub_cache(tmp_path / "hub", "people/small-llama", base)
    flags = families.flags(base)
    answers = offline(
        [[*flags, "--out", str(tmp_path / "a")],
         [*flags, "--model", "people/small-llama", "--out", str(tmp_path / "b")],
         [*flags, "--model", "people/large-llama", "--out", str(tmp_path / "c")],
         [*flags, "--model", "gpt2", "--dry_run", "--out", str(tmp_path / "d")]],
        HF_HUB_CACHE=str(tmp_path / "hub"))  # fmt: skip
    assert [status for status, *_ in answers] == [0, 0, 2, 2]
    assert (tmp_path / "a" / "model").is_dir() and (tmp_path / "b" / "model").is_dir()
    a, b = ((tmp_path / d / "model" / "model.safetensors").read_bytes() for d in "ab")
    assert a == b and answers[1][1] < 15
    for name, folder, (_, seconds, lines) in zip(("people/large-llama", "gpt2"), "cd", answers[2:]):
        assert len(lines) == 1 and f"hf download {name} --local-dir" in lines[0], lines
        assert not (tmp_path / folder).exists() and seconds < 15


def test_the_tests_themselves_are_offline():
    """In the namespace is no interface but the loopback."""
    if not alone():
        pytest.skip("no right to make a network namespace; sockets are made to refuse instead")
    done = subprocess.run([*alone(), "cat", "/proc/net/dev"], capture_output=True, text=True)
    names = [line.split(":")[0].strip() for line in done.stdout.splitlines()[2:]]
    assert names == ["lo"]
