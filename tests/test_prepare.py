"""Prepared sets: templates against real files, tokens against plain Python, kills, mixtures, bad input."""

import collections
import hashlib
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import time
import tracemalloc

import families
import numpy as np
import pytest
import torch
from conftest import ROOT

import train
from data import prepare, rows, sets
from data.tokenizer import GPTTokenizer, HFTokenizer
from training import recipes

EMBEDDED = train.DATA / "multi_domain.jsonl"


def jsonl(path, some):
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return str(path)


def embedded(n):
    return [json.loads(line) for line in EMBEDDED.read_text().splitlines()[:n]]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def by_hand(folder, width=2):
    """(tokens, loss, domain) of every row, from the bytes: 40 of index a row, little-endian."""
    tokens, index, spans = ((folder / f"{name}.bin").read_bytes() for name in ("tokens", "index", "spans"))
    domains, found = json.loads((folder / "manifest.json").read_text())["domains"], []
    for at in range(0, len(index), 40):
        start, length, prompt, domain, turns, _, first = struct.unpack_from("<QIIIIQQ", index, at)
        row = struct.unpack_from(f"<{length}{'H' if width == 2 else 'I'}", tokens, start * width)
        several = struct.unpack_from(f"<{2 * turns}I", spans, 8 * first)
        found.append((row, tuple(zip(several[::2], several[1::2])) or prompt, domains[domain]))
    return found


def expected(some, tokenizer, domain=None):
    """The same from the source rows."""
    pairs = [(tokenizer.prompt(r["instruction"]), tokenizer.response(r["response"]), r) for r in some]
    return [(tuple(p + a), len(p), domain or r.get("domain", "all")) for p, a, r in pairs]


# ---- Templates -----------------------------------------------------------------------------------

LETTERS = "ABCDE"


def raw_of(row):
    """(set, raw row) that the publisher's row must have been, from a finished row's text alone."""
    text, answer = row["instruction"], row["answer"]
    if match := re.fullmatch(r"Please answer the following question with true or false, question: (.*)\?\n\n"
                             r"Answer format: true/false", text, re.S):  # fmt: skip
        return "boolq", {"question": match[1], "answer": answer == "true", "passage": "unused"}
    right, options = int(answer[-1]) - 1, len(text.rsplit("Answer format: ", 1)[1].split("/"))
    word = answer[:-1].capitalize()
    whole = rf"Please choose the correct [^:]*?: (.*?)\n\n({word}1: .*)"
    head, rest = re.fullmatch(whole, text, re.S).groups()
    listed = rest.rsplit("Answer format", 1)[0]
    listed = listed.removesuffix(" " if word == "Option" else "\n\n")
    pattern = (" " if word != "Solution" else "\n\n").join(rf"{word}{i + 1}: (.*)" for i in range(options))
    choices = re.fullmatch(pattern, listed, re.S).groups()
    if word == "Solution":
        return "piqa", {"goal": head, "sol1": choices[0], "sol2": choices[1], "label": right}
    if word == "Option":
        return "winogrande", {"sentence": head, "option1": choices[0], "option2": choices[1],
                              "answer": str(right + 1)}  # fmt: skip
    if word == "Ending":
        topic, _, context = head.partition(": ")
        return "hellaswag", {"activity_label": topic, "ctx": context, "endings": list(choices),
                             "label": str(right)}  # fmt: skip
    if options == 3:
        context, _, question = head.rpartition(" ")
        return "siqa", {"context": context, "question": question, "label": str(right + 1),
                        **{f"answer{letter}": choice for letter, choice in zip("ABC", choices)}}  # fmt: skip
    labels = list(LETTERS[:options])
    name = ("arc-e", "obqa")[len(head) % 2]
    return name, {"question" if name == "arc-e" else "question_stem": head, "answerKey": labels[right],
                  "choices": {"text": list(choices), "label": labels}}  # fmt: skip


def test_templates_give_the_real_strings(real_dir):
    """6000 rows of eight sets, taken apart by patterns: the template makes each again, to the character."""
    seen = collections.Counter()
    for path in sorted(real_dir.glob("commonsense_*.jsonl")):
        for row in map(json.loads, path.read_text().removesuffix("\n").split("\n")):
            name, raw = raw_of(row)
            assert sets.SETS[name].convert(raw) == (row["instruction"], row["response"]), (path, raw)
            seen[name] += 1
    assert sum(seen.values()) == 6000 and len(seen) == 7 and min(seen.values()) > 200, seen


RAW = {
    "metamathqa": ({"query": "1+1?", "response": "2\nThe answer is: 2", "type": "GSM_AnsAug"},
                   ("1+1?", "2\nThe answer is: 2")),
    "codefeedback": ({"query": "Add.", "answer": "a + b", "lang": "python"}, ("Add.", "a + b")),
    "codefeedback, no language": ({"query": "Add.", "answer": "a + b"}, ("Add.", "a + b")),
    "codefeedback, another": ({"query": "Add.", "answer": "a + b", "lang": "ruby"}, "not in Python"),
    "wizardlm": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
                 ("Hi", "Ho")),
    "wizardlm, longer": ({"conversations": [{"from": "human", "value": "Hi"}]},
                         "not one question with one answer"),
    "boolq": ({"question": "is ice cold", "answer": True}, (
        "Please answer the following question with true or false, question: is ice cold?\n\n"
        "Answer format: true/false", "the correct answer is true")),
    "piqa": ({"goal": "boil", "sol1": "heat", "sol2": "cool ", "label": 0}, (
        "Please choose the correct solution to the question: boil\n\nSolution1: heat\n\nSolution2: cool \n\n"
        "Answer format: solution1/solution2", "the correct answer is solution1")),
    "piqa, hidden": ({"goal": "boil", "sol1": "heat", "sol2": "cool", "label": -1}, "no label"),
    "siqa": ({"context": "A left.", "question": "Why?", "answerA": "x", "answerB": "y", "answerC": "z",
              "label": "3"}, (
        "Please choose the correct answer to the question: A left. Why?\n\nAnswer1: x Answer2: y Answer3: z"
        "\n\nAnswer format: answer1/answer2/answer3", "the correct answer is answer3")),
    "hellaswag": ({"activity_label": "Tea", "label": "1",
                   "endings": ["[substeps] Sip.", "Pour [title] Add milk.", "see [note]", ", x"],
                   "ctx": "[header] How to make tea [title] Boil water. [step] Use a pot."}, (
        "Please choose the correct ending to complete the given sentence: Tea: How to make tea. Boil water. "
        "Use a pot.\n\nEnding1: Sip. Ending2: Pour. Add milk. Ending3: see [note] Ending4: , x\n\n"
        "Answer format: ending1/ending2/ending3/ending4", "the correct answer is ending2")),
    "hellaswag, hidden": ({"activity_label": "Tea", "label": "", "endings": ["a", "b"], "ctx": "c"},
                          "no label"),
    "winogrande": ({"sentence": "A saw B so _ ran.", "option1": "A", "option2": "B", "answer": "2"}, (
        "Please choose the correct answer to fill in the blank to complete the given sentence: A saw B so _ "
        "ran.\n\nOption1: A Option2: B Answer format: option1/option2", "the correct answer is option2")),
    "arc-c": ({"question": "Which?", "answerKey": "4",
               "choices": {"text": ["a", "b", "c", "d"], "label": ["1", "2", "3", "4"]}}, (
        "Please choose the correct answer to the question: Which?\n\nAnswer1: a Answer2: b Answer3: c "
        "Answer4: d\n\nAnswer format: answer1/answer2/answer3/answer4", "the correct answer is answer4")),
    "arc-e": ({"question": "Which?", "answerKey": "C",
               "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}}, (
        "Please choose the correct answer to the question: Which?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
        "Answer format: answer1/answer2/answer3", "the correct answer is answer3")),
    "obqa": ({"question_stem": "Ice is", "answerKey": "B",
              "choices": {"text": ["hot", "cold"], "label": ["A", "B"]}}, (
        "Please choose the correct answer to the question: Ice is\n\nAnswer1: hot Answer2: cold\n\n"
        "Answer format: answer1/answer2", "the correct answer is answer2")),
}  # fmt: skip


@pytest.mark.parametrize("case", RAW)
def test_raw_rows_of_every_set(case):
    """The row as its publisher has it, and the text written out; its fields are those of the table."""
    raw, text = RAW[case]
    entry = sets.SETS[case.split(",")[0]]
    assert entry.convert(raw) == text
    assert isinstance(entry.convert(raw), sets.Dropped) == isinstance(text, str)
    assert all(isinstance(raw[field], kind) for field, kind in entry.fields.items())


def test_counts_are_those_of_the_paper():
    """Table 6 as printed; its sum; and the published sizes of the train splits round to it."""
    table = {"metamathqa": "395K", "codefeedback": "105K", "wizardlm": "143K", "boolq": "9.4K",
             "piqa": "16.1K", "siqa": "33.4K", "hellaswag": "39.9K", "winogrande": "40.4K", "arc-c": "1.1K",
             "arc-e": "2.3K", "obqa": "5.0K"}  # fmt: skip
    assert {name: sets.in_thousands(sets.SETS[name].paper) for name in sets.MIXES["multitask"]} == table
    assert round(sum(sets.SETS[name].paper for name in table) / 1000) == 791
    assert set(sets.MIXES["multitask"]) - set(sets.MIXES["commonsense"]) == set(list(table)[:3])
    published = {"metamathqa": 395_000, "boolq": 9_427, "piqa": 16_113, "siqa": 33_410, "hellaswag": 39_905,
                 "winogrande": 40_398, "arc-c": 1_119, "arc-e": 2_251, "obqa": 4_957}  # fmt: skip
    for name, count in published.items():
        assert sets.as_in_paper(count, sets.SETS[name].paper), name
    assert not sets.as_in_paper(156_526, sets.SETS["codefeedback"].paper)       # all languages


def test_the_readme_shows_the_list_and_the_recipes(capsys):
    """data/README.md against the command's output; its table of recipes against their values."""
    text = (ROOT / "data" / "README.md").read_text()
    prepare.main(["--list"])
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 15 and all("    " + line + "\n" in text for line in listed)
    for name, (values, data, _) in recipes.RECIPES.items():
        line = next(line for line in text.splitlines() if line.startswith("|") and f"`{name}`" in line)
        assert f"| {values['rank']}, " in line and f"| {values['batch_size']}, {values['epochs']:g} |" in line
        assert data in sets.SETS or data in sets.MIXES


# ---- Files ---------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_rows(tmp_path, monkeypatch):
    """The bytes of a set against the tokenizer on the source's rows; another seed is another order."""
    monkeypatch.setattr(prepare, "PART", 64)
    some, tokenizer = embedded(300), GPTTokenizer()
    path, orders = jsonl(tmp_path / "a.jsonl", some), []
    for seed in ("0", "1"):
        out = tmp_path / f"set{seed}"
        manifest = prepare.main(["rows", "--from", path, "--out", str(out), "--seed", seed])
        orders.append(by_hand(out))
        assert collections.Counter(orders[-1]) == collections.Counter(expected(some, tokenizer))
        assert manifest["rows"] == {"read": 300, "kept": 300, "dropped": 0}
        assert manifest["tokens"] == sum(len(row[0]) for row in orders[-1])
        for name, (size, digest) in manifest["files"].items():
            data = (out / name).read_bytes()
            assert len(data) == size and hashlib.blake2b(data, digest_size=32).hexdigest() == digest
        assert manifest["settings"]["sources"]["rows"]["digest"][0][0] == os.path.getsize(path)
        opened = rows.open_rows(str(out), tokenizer, 10_000, "train")
        assert [(tuple(t), p, d) for t, p, d in opened] == orders[-1]
        assert opened[5:8][1] == opened[6] and opened[-1] == opened[299]
        assert not (tmp_path / f"set{seed}.tmp").exists()
    assert orders[0] != orders[1] and orders[0] != expected(some, tokenizer)


def test_a_wide_vocabulary_takes_four_bytes(tmp_path):
    class Wide(GPTTokenizer):
        vocabulary = property(lambda self: 100_000, lambda self, value: None)

        def response(self, text):
            return [99_999 - t for t in super().response(text)]

    some = embedded(20)
    source = prepare.File(jsonl(tmp_path / "a.jsonl", some), {})
    source.form = "instruction"
    prepare.prepare("rows", {"rows": source}, Wide(), "wide", tmp_path / "out", 0)
    assert collections.Counter(by_hand(tmp_path / "out", 4)) == collections.Counter(expected(some, Wide()))


@pytest.mark.parametrize("form", ["jsonl", "list", "pretty", "bom"])
def test_forms_of_files_and_field_names(form, tmp_path):
    """JSONL and a JSON list, compact or not, with columns of other names; text beyond ASCII."""
    some = [{"q": f"Größe {i}?", "a": f"😀 {i}", "x": [{"deep": "]"}]} for i in range(30)]
    path = tmp_path / "rows.json"
    jsonl(path, some)
    if form != "jsonl":
        path.write_text(json.dumps(some, indent=2 if form == "pretty" else None, ensure_ascii=False),
                        encoding="utf-8-sig" if form == "bom" else "utf-8")  # fmt: skip
    prepare.main(["metamathqa", "--from", str(path), "--fields", "query=q,response=a", "--out",
                  str(tmp_path / "out")])  # fmt: skip
    rows_ = [{"instruction": r["q"], "response": r["a"]} for r in some]
    assert collections.Counter(by_hand(tmp_path / "out")) == collections.Counter(
        expected(rows_, GPTTokenizer(), "metamathqa"))  # fmt: skip


def test_finished_text_and_drops_are_counted(tmp_path, capsys):
    """instruction, input and output of the published mix pass as they are; empty answers are dropped."""
    some = [{"instruction": "a", "input": "", "output": "b", "answer": "b"},
            {"instruction": "a", "input": "c", "output": "d", "answer": "d"},
            {"instruction": "e", "input": "", "output": " \n", "answer": ""}]  # fmt: skip
    path = jsonl(tmp_path / "a.json", some)
    manifest = prepare.main(["boolq", "--from", path, "--out", str(tmp_path / "o")])
    wanted = [{"instruction": "a", "response": "b"}, {"instruction": "a\nc", "response": "d"}]
    assert sorted(by_hand(tmp_path / "o")) == sorted(expected(wanted, GPTTokenizer(), "boolq"))
    assert manifest["sets"]["boolq"] == {"read": 3, "kept": 2, "paper": 9400,
                                         "notes": {},
                                         "dropped": {"no text in 'output'": [1, f"{path}:3"]}}  # fmt: skip
    text = capsys.readouterr().out
    assert "1 no text in 'output'; not the paper's number of rows" in text and "9.4K" in text


def test_a_mix_keeps_its_parts_apart(tmp_path, monkeypatch):
    """Every part under its own name and count, in one shuffled set; all eight from files."""
    monkeypatch.setattr(prepare, "PART", 7)
    flags, wanted = [], []
    for k, name in enumerate(sets.MIXES["commonsense"]):
        raw, text = RAW[name]
        some = [{**raw, "id": i} for i in range(5 + 2 * k)]
        flags += ["--from", f"{name}={jsonl(tmp_path / name, some)}"]
        wanted += expected([{"instruction": text[0], "response": text[1]}] * len(some), GPTTokenizer(), name)
    manifest = prepare.main(["commonsense", *flags, "--out", str(tmp_path / "out")])
    assert [s["kept"] for s in manifest["sets"].values()] == list(range(5, 21, 2))
    got = by_hand(tmp_path / "out")
    assert collections.Counter(got) == collections.Counter(wanted)
    assert [d for *_, d in got] != sorted(d for *_, d in got)


def test_exchanged_columns(tmp_path):
    some = [{"query": "an answer", "response": "a question"}]
    prepare.main(["metamathqa", "--from", jsonl(tmp_path / "a.jsonl", some), "--fields",
                  "query=response,response=query", "--out", str(tmp_path / "out")])  # fmt: skip
    assert by_hand(tmp_path / "out") == expected([{"instruction": "a question", "response": "an answer"}],
                                                 GPTTokenizer(), "metamathqa")  # fmt: skip


def test_one_finished_file_for_a_mix(tmp_path, capsys):
    """Rows name their own domain or none; the count is compared with the whole mix."""
    some = [{**row, "output": row["response"]} for row in embedded(6)]
    del some[0]["domain"]
    prepare.main(["commonsense", "--from", jsonl(tmp_path / "a.jsonl", some), "--out", str(tmp_path / "out")])
    assert sorted(by_hand(tmp_path / "out")) == sorted(expected(some, GPTTokenizer()))
    assert "148K  0; not the paper's" in capsys.readouterr().out


@pytest.mark.parametrize("name, file, fields", [
    ("metamathqa", "gsm8k_test", "query=instruction"), ("rows", "humaneval", None),
    ("codefeedback", "mbpp", "query=instruction,answer=response"), ("boolq", "commonsense_test_boolq", None),
])  # fmt: skip
def test_real_files(name, file, fields, real_dir, tmp_path):
    """Real files through the command, with their own field names; 40 rows of each against the tokenizer."""
    out, flags = tmp_path / "out", ["--fields", fields] if fields else []
    path = real_dir / f"{file}.jsonl"
    manifest = prepare.main([name, "--from", str(path), *flags, "--out", str(out)])
    some = [json.loads(line) for line in path.read_text().split("\n") if line]
    assert manifest["rows"] == {"read": len(some), "kept": len(some), "dropped": 0}
    got = set(by_hand(out))
    assert set(expected(some[::-(-len(some) // 40)], GPTTokenizer(), None if name == "rows" else name)) <= got


# ---- Kills ---------------------------------------------------------------------------------------


def test_a_stopped_preparation_goes_on_to_the_same_bytes(tmp_path, monkeypatch, capsys):
    """Stopped at every part and while the parts are joined: nothing under --out, then the same three files.

    Parts that were whole are not tokenized again; one that was damaged meanwhile is.
    """
    monkeypatch.setattr(prepare, "PART", 50)
    path = jsonl(tmp_path / "a.jsonl", embedded(230))

    def command(out):
        return prepare.main(["rows", "--from", path, "--out", str(tmp_path / out)])

    command("whole")
    write, pack, packed = prepare.write_part, prepare.pack, []
    monkeypatch.setattr(prepare, "pack", lambda *args: packed.append(1) or pack(*args))
    for stop in range(5):
        out, written = tmp_path / f"stopped{stop}", []

        def stopping(path, *args, stop=stop, written=written):
            if len(written) == stop:
                raise KeyboardInterrupt
            written.append(path)
            write(path, *args)

        monkeypatch.setattr(prepare, "write_part", stopping)
        with pytest.raises(SystemExit) as exit_:
            command(out.name)
        assert exit_.value.code == 130 and not out.exists()
        if stop == 3:
            data = bytearray(written[1].read_bytes())
            data[-1] ^= 1
            written[1].write_bytes(bytes(data))
        monkeypatch.setattr(prepare, "write_part", write)
        packed.clear()
        capsys.readouterr()
        command(out.name)
        assert len(packed) == (4 if stop == 3 else 5 - stop)
        assert (f"going on after {stop} parts" in capsys.readouterr().out) == (stop > 0)
        assert files_of(out) == files_of(tmp_path / "whole"), stop
        assert not out.with_name(out.name + ".tmp").exists()

    assemble = prepare.digest
    monkeypatch.setattr(prepare, "digest", lambda path: assemble(path) if path.suffix != ".bin" else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("joining")
    monkeypatch.setattr(prepare, "digest", assemble)
    packed.clear()
    command("joining")
    assert not packed and files_of(tmp_path / "joining") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_kill_9(tmp_path, monkeypatch):
    """SIGKILL when two parts are there; the same command goes on behind them and ends with the same bytes."""
    path = jsonl(tmp_path / "a.jsonl", embedded(4000))

    def start(out):
        program = ("import sys; sys.path.insert(0, sys.argv.pop(1)); from data import prepare; "
                   "prepare.PART = 400; prepare.main(sys.argv[1:])")  # fmt: skip
        command = [sys.executable, "-c", program, str(ROOT), "rows", "--from", path, "--out", tmp_path / out]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    work = tmp_path / "killed.tmp"
    running, deadline, there = start("killed"), time.monotonic() + 60, 0
    while time.monotonic() < deadline and there < 2 and running.poll() is None:
        there = len(list(work.glob("*.part")))
        time.sleep(0.002)
    running.kill()
    running.communicate()
    assert there >= 2 and not (tmp_path / "killed").exists()
    running = start("killed")
    assert "going on after" in running.communicate()[0] and running.returncode == 0
    monkeypatch.setattr(prepare, "PART", 400)
    prepare.main(["rows", "--from", path, "--out", str(tmp_path / "whole")])
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_what_begins_anew_and_what_is_refused(tmp_path, monkeypatch, capsys):
    """Another source or seed drops old parts; a whole set stays; something else is not overwritten."""
    monkeypatch.setattr(prepare, "PART", 50)
    path, write = jsonl(tmp_path / "a.jsonl", embedded(120)), prepare.write_part
    command = ["rows", "--from", path, "--out", str(tmp_path / "out")]
    calls = []
    monkeypatch.setattr(prepare, "write_part", lambda *args: calls.append(write(*args)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare.main(command)
    monkeypatch.setattr(prepare, "write_part", write)
    jsonl(tmp_path / "a.jsonl", some := embedded(121)[1:])          # other rows, the same number
    prepare.main(command)
    assert sorted(by_hand(tmp_path / "out")) == sorted(expected(some, GPTTokenizer()))
    before = files_of(tmp_path / "out")
    assert "prepared already" not in capsys.readouterr().out
    prepare.main(command)
    assert "prepared already" in capsys.readouterr().out and files_of(tmp_path / "out") == before
    for more in (["--seed", "1"], ["--fields", "instruction=answer"]):
        with pytest.raises(SystemExit):
            prepare.main([*command, *more])
        assert "prepared otherwise" in capsys.readouterr().err and files_of(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("x")
    with pytest.raises(SystemExit):
        prepare.main([*command[:-1], str(tmp_path / "mine")])
    assert "something else already" in capsys.readouterr().err
    assert files_of(tmp_path / "mine") == {"thesis": b"x"}


@pytest.mark.parametrize("spelling, name", [("BoolQ", "boolq"), ("WizardLM-Evol-Instruct", "wizardlm"),
                                            ("ARC_Challenge", "arc-c"), ("Arc-easy", "arc-e")])  # fmt: skip
def test_names_as_the_paper_spells_them(spelling, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manifest = prepare.main([spelling, "--from", jsonl(tmp_path / "a.jsonl", [RAW[name][0]])])
    assert manifest["settings"]["set"] == name and (tmp_path / "prepared" / name / "tokens.bin").is_file()


def test_a_full_disk(tmp_path, monkeypatch, capsys):
    """The third part cannot be written: one line, nothing under --out; with room the same command goes on."""
    monkeypatch.setattr(prepare, "PART", 50)
    command = ["rows", "--from", jsonl(tmp_path / "a.jsonl", embedded(170)), "--out", str(tmp_path / "out")]
    sync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 4:             # the settings, two parts
            raise OSError(28, "No space left on device")
        sync(handle)

    monkeypatch.setattr(prepare.os, "fsync", full)
    assert "No space left on device" in (line := refused(command, capsys)) and "it goes on" in line
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(prepare.os, "fsync", sync)
    prepare.main(command)
    assert "going on after 2 parts" in capsys.readouterr().out and len(by_hand(tmp_path / "out")) == 170


# ---- Lists of sources ----------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    """A JSONL file of 40 rows and prepared sets of 100 and 30, all different."""
    some = embedded(170)
    parts = [some[:40], some[40:140], some[140:]]
    paths = [jsonl(tmp_path / f"{k}.jsonl", part) for k, part in enumerate(parts)]
    for k in (1, 2):
        prepare.main(["rows", "--from", paths[k], "--out", str(tmp_path / f"set{k}")])
    return [paths[0], str(tmp_path / "set1"), str(tmp_path / "set2")], parts


@pytest.mark.parametrize("shares", [(0.7, 0.2, 0.1), (1, 1, 1), (5, 3, 2), (0.05, 0.05, 0.9)])
def test_an_epoch_has_the_shares(shares, three):
    """Counts of an epoch's rows by source, exact to one row; rows of a source come equally often, to one."""
    paths, parts = three
    tokenizer = GPTTokenizer()
    mixed = rows.open_rows(",".join(f"{s}:{p}" for s, p in zip(shares, paths)), tokenizer, 512, "train")
    keys = [{row[0] for row in expected(part, tokenizer)} for part in parts]
    assert len(mixed) == 170
    epochs = []
    for seed in (0, 1):
        order = mixed.order(torch.Generator().manual_seed(seed))
        times = collections.Counter(tuple(mixed[j][0]) for j in order)
        assert len(order) == 170
        for share, key in zip(shares, keys):
            drawn = [times[k] for k in key]
            assert abs(sum(drawn) - 170 * share / sum(shares)) < 1
            assert max(drawn) - min(drawn) <= 1
        epochs.append(order)
    assert epochs[0] != epochs[1]
    assert mixed.order(torch.Generator().manual_seed(0)) == epochs[0]


def test_a_list_without_weights_is_every_row_once(three):
    paths, parts = three
    tokenizer = GPTTokenizer()
    joined = rows.open_rows(",".join(paths), tokenizer, 512, "train")
    wanted = collections.Counter(expected([row for part in parts for row in part], tokenizer))
    for seed in (0, 1):
        order = joined.order(torch.Generator().manual_seed(seed))
        got = [joined[j] for j in order]
        assert collections.Counter((tuple(t), p, d) for t, p, d in got) == wanted
    assert joined.draws() == [40, 100, 30]


def test_batches_of_a_list_are_full_and_skipped_unread(three):
    """Starting at batch n is dropping n batches, for a list of rows and for `Rows`; across epochs too."""
    paths, _ = three
    mixed = rows.open_rows(f"0.6:{paths[0]},0.4:{paths[1]}", GPTTokenizer(), 64, "train")
    for some in (mixed, list(mixed)):
        whole = list(itertools.islice(rows.step_batches(some, 32, 3), 14))
        assert all(len(batch) == 32 for batch in whole)
        for start in (1, 4, 5, 9):
            assert list(itertools.islice(rows.step_batches(some, 32, 3, start), 14 - start)) == whole[start:]


def test_cut_and_held_out(three, tmp_path):
    """A row is cut at the block size, dropped without a response; equal rows are never on both sides."""
    paths, parts = three
    tokenizer = GPTTokenizer()
    wanted = expected([row for part in parts for row in part], tokenizer)
    block = sorted(p for _, p, _ in wanted)[120]                # so that prompts are just as long as it
    wanted = {(t[:block], p) for t, p, _ in wanted if p < block}
    assert 50 < len(wanted) < 120 and any(len(t) == block for t, _ in wanted)
    twice = ",".join([*paths, jsonl(tmp_path / "again.jsonl", parts[1])])   # a part twice, once as JSONL
    all_rows = rows.open_rows(twice, tokenizer, block, "train")
    rest, held = all_rows.hold_out()
    assert len(rest) + len(held) == len(all_rows)
    uncut = {t for t, p, _ in expected([r for part in parts for r in part], tokenizer) if p < block}
    mine, theirs = ({(tuple(t), p) for t, p, _ in side} for side in (rest, held))
    assert len(theirs) <= round(0.05 * len(uncut)) and not {t for t, _ in held_keys(rest)} & {
        t for t, _ in held_keys(held)}  # fmt: skip
    assert mine | theirs == wanted
    other = rows.open_rows(",".join(reversed(twice.split(","))), tokenizer, block, "train").hold_out()[1]
    assert {tuple(t) for t, *_ in other} == {tuple(t) for t, *_ in held}


def held_keys(some):
    return set(zip(some.column("hash").tolist(), some.column("prompt").tolist()))


def test_one_jsonl_file_is_what_it_was(tmp_path):
    """Rows, held-out rows and the hash that checkpoints compare, by the formulas of a run without lists."""
    tokenizer, path = GPTTokenizer(), str(EMBEDDED)
    train_rows, held, digest = rows.load(path, None, 50, tokenizer, 64)
    kept, out = rows.hold_out(rows.read_rows(path))
    assert train_rows == rows.encode(kept, tokenizer, 64, "a")
    assert held == rows.encode(out[:50], tokenizer, 64, "b")
    whole = expected(kept, tokenizer)
    assert [(tuple(t), p, d) for t, p, d in train_rows] == [(t[:64], p, d) for t, p, d in whole if p < 64]
    block = whole[0][1]
    assert all(p < block for _, p, _ in rows.encode(kept[:9], tokenizer, block, "c"))
    assert digest == hashlib.blake2b(repr((train_rows, held)).encode(), digest_size=16).hexdigest()
    other = jsonl(tmp_path / "eval.jsonl", embedded(9))
    train_rows, held, _ = rows.load(path, other, 5, tokenizer, 64)
    assert len(train_rows) > 7000 and [row[0] for row in held] == [
        list(t[:64]) for t, p, _ in expected(embedded(5), tokenizer) if p < 64]  # fmt: skip


def test_the_digest_sees_one_token(three, tmp_path):
    """Of a file or a prepared set, of another block size, of other shares; not of another path."""
    paths, parts = three
    tokenizer, changed = GPTTokenizer(), [dict(row) for row in parts[1]]
    changed[50]["response"] = {"0": "1"}.get(changed[50]["response"][0], "0") + changed[50]["response"][1:]
    same, other = (jsonl(tmp_path / f"{k}.jsonl", some) for k, some in enumerate((parts[1], changed), 7))
    prepare.main(["rows", "--from", other, "--out", str(tmp_path / "other")])
    prepare.main(["rows", "--from", same, "--out", str(tmp_path / "same")])

    def digest(text, block=512):
        return rows.open_rows(text, tokenizer, block, "train").digest()

    a, b = f"1:{same},1:{paths[0]}", f"1:{other},1:{paths[0]}"
    assert len({digest(a), digest(b), digest(a, 500), digest(a.replace("1:", "2:", 1))}) == 4
    assert digest(paths[1]) == digest(str(tmp_path / "same")) != digest(str(tmp_path / "other"))


def test_training_on_a_list_resumes_and_refuses_other_rows(three, tmp_path, capsys):
    """Two steps, and one and one, are the same bits; the hash of the rows guards a changed source."""
    paths, parts = three
    data = f"0.7:{paths[1]},0.3:{paths[0]}"

    def command(out):
        return train.main(["--data", data, "--batch_size", "8", "--eval_rows", "2", "--max_steps", "2",
                           "--method", "lora", "--save_every", "1", "--device", "cpu", "--threads", "1",
                           "--out", str(tmp_path / out)])  # fmt: skip

    command("whole")
    batches = rows.step_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "step_batches", lambda *args: itertools.chain(
            itertools.islice(batches(*args), 1), iter(lambda: 1 / 0, None)))  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            command("cut")
    command("cut")
    a, b = (torch.load(tmp_path / out / "model.pt", weights_only=True) for out in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "of an epoch's" in capsys.readouterr().out
    (tmp_path / "cut" / "result.json").unlink()
    jsonl(tmp_path / "0.jsonl", parts[0][::-1])
    with pytest.raises(SystemExit):
        command("cut")
    assert "rows is" in capsys.readouterr().err


def test_prepared_eval_data_and_dry_run(three, tmp_path):
    """--eval_data takes the same forms; --dry_run counts tokens of a prepared set."""
    paths, parts = three
    tokenizer = GPTTokenizer()
    _, held, _ = rows.load(paths[0], paths[1], 1000, tokenizer, 512)
    assert collections.Counter((tuple(t), p, d) for t, p, d in held) == collections.Counter(
        expected(parts[1], tokenizer))  # fmt: skip
    said = train.main(["--data", paths[1], "--eval_data", paths[2], "--dry_run", "--batch_size", "16",
                       "--epochs", "2"])  # fmt: skip
    mean = sum(len(t) for t, *_ in expected(parts[1], tokenizer)) / 100
    assert said["steps"] == 12 and said["tokens"] == pytest.approx(12 * 16 * mean)


def test_a_large_set_stays_on_the_disk(tmp_path):
    """50,000 rows of 500 tokens, 50 MB: opened, held out and ordered in 10 MB; lists would take 200."""
    n, length, out = 50_000, 500, tmp_path / "big"
    prepare.main(["rows", "--from", jsonl(tmp_path / "a.jsonl", embedded(5)), "--out", str(out)])
    manifest = json.loads((out / "manifest.json").read_text())
    index = np.zeros(n, rows.INDEX)
    index["start"], index["length"], index["prompt"] = np.arange(n) * length, length, 10
    index["hash"] = np.random.default_rng(0).integers(0, 2**63, n)
    index.tofile(out / "index.bin")
    os.truncate(out / "tokens.bin", 2 * n * length)                     # sparse: zeros
    manifest["files"] = {name: rows.digest(out / name) for name in rows.PARTS}
    manifest["digest"] = rows.seal(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))
    tracemalloc.start()
    some, held, _ = rows.load(str(out), None, 500, GPTTokenizer(), 512)
    next(rows.step_batches(some, 128, 0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(held) == 500 and len(some) == n - 500 and isinstance(some.files[0].tokens, np.memmap)
    assert peak < 10e6, peak


# ---- The hub -------------------------------------------------------------------------------------


def test_the_library_reads_a_set(tmp_path, monkeypatch):
    """Through `datasets` itself, from a local folder of the set's name, split and columns as published."""
    datasets = pytest.importorskip("datasets")
    raw, text = RAW["arc-e"]
    (tmp_path / "allenai" / "ai2_arc" / "ARC-Easy").mkdir(parents=True)
    many = [{**raw, "id": str(i)} for i in range(1203)]
    jsonl(tmp_path / "allenai" / "ai2_arc" / "ARC-Easy" / "train.jsonl", many)
    (tmp_path / "allenai" / "ai2_arc" / "README.md").write_text(
        "---\nconfigs:\n- config_name: ARC-Easy\n  data_files:\n  - split: train\n"
        "    path: ARC-Easy/train.jsonl\n---\n")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    offline(monkeypatch)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    manifest = prepare.main(["arc-e", "--out", "out"])
    assert manifest["rows"]["kept"] == 1203
    assert manifest["settings"]["sources"]["arc-e"]["hub"] == "allenai/ai2_arc"
    assert set(by_hand(tmp_path / "out")) == set(
        expected([{"instruction": text[0], "response": text[1]}], GPTTokenizer(), "arc-e"))  # fmt: skip
    source = prepare.Hub("arc-e")
    assert source.identity == prepare.Hub("arc-e").identity
    assert [row["id"] for _, row in source.rows(997)] == [str(i) for i in range(997, 1203)]


def offline(monkeypatch):
    """The hub is at a port where nobody listens."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)      # put back at the end
    if "datasets" in sys.modules:
        config = sys.modules["datasets"].config
        monkeypatch.setattr(config, "HF_HUB_OFFLINE", config.HF_HUB_OFFLINE)


def test_a_source_that_is_down(tmp_path, monkeypatch, capsys):
    """Every set of the table: at once, one line that says how to use --from, nothing left behind."""
    pytest.importorskip("datasets")
    offline(monkeypatch)
    monkeypatch.chdir(tmp_path)
    for name in [name for name, entry in sets.SETS.items() if entry.hub] + list(sets.MIXES):
        start = time.monotonic()
        line = refused([name], capsys)
        assert "the hub cannot be reached" in line and "--from FILE" in line and time.monotonic() - start < 5
    assert not list(tmp_path.iterdir())


def test_without_the_library(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    line = refused(["boolq"], capsys)
    assert "pip install -r requirements-extra.txt" in line and "--from FILE" in line
    assert not list(tmp_path.iterdir())


# ---- Bad input -----------------------------------------------------------------------------------


def refused(argv, capsys):
    """The one line of a command that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        prepare.main([str(part) for part in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and lines[-1].startswith("prepare.py: error: "), lines
    return lines[-1]


GOOD = {"query": "a", "response": "b"}
PRETTY = json.dumps([GOOD, GOOD], indent=1)
FILES = {
    "no such file": (None, ["no such data file", "JSONL"]),
    "empty": ("\n", ["holds no rows"]),
    "empty list": ("[ ]", ["holds no rows"]),
    "no row with the field": (json.dumps(GOOD | {"response": None}),
                              ["bad.json:1", "no 'response'", "no row is left"]),
    "a field missing at once": (json.dumps({"query": "a", "label": "b"}),
                                ["bad.json:1", "(query, label)", "response=FIELD"]),
    "a number": (json.dumps({"query": "a", "response": 3}), ["bad.json:1", "int in field 'response'"]),
    "not JSON": (json.dumps(GOOD) + "\n{oops}\n", ["bad.json:2", "not JSON"]),
    "not JSON in a list": ("[\n" + json.dumps(GOOD) + ",\n{oops}]", ["bad.json:3", "not JSON"]),
    "an open list": ("[\n" + json.dumps(GOOD) + "\n", ["bad.json:3", "not JSON"]),
    "a comma too many": ("[" + json.dumps(GOOD) + ",]", ["bad.json:1", "not JSON"]),
    "two lists": ("[" + json.dumps(GOOD) + "]\n[]", ["bad.json:2", "not JSON"]),
    "not an object": (json.dumps(GOOD) + "\n[1]\n", ["bad.json:2", "a list, not an object"]),
    "one object over lines": (json.dumps(GOOD, indent=1), ["bad.json:1", "a row a line, or one list"]),
    "not UTF-8": (b"\xff\x00", ["bad.json:1", "not UTF-8"]),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), ["bad.json:1", "UTF-16"]),
    "nothing left": (json.dumps({"query": "a", "response": " "}),
                     ["no row is left", "no text in 'response'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_bad_files(case, tmp_path, capsys, monkeypatch):
    """One line with file and line and what to do; no folder, whole or half."""
    text, words = FILES[case]
    monkeypatch.setattr(prepare, "PART", 1)
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refused(["metamathqa", "--from", path, "--out", tmp_path / "out"], capsys)
    assert all(word in line for word in words), line
    assert {p.name for p in tmp_path.iterdir()} <= {"bad.json"}


def test_a_row_of_another_shape(tmp_path, capsys):
    """Right field, wrong inside."""
    path = jsonl(tmp_path / "w.jsonl", [RAW["wizardlm"][0], {"conversations": [{"value": "x"}]}])
    assert "w.jsonl:2: not as rows of wizardlm are made (KeyError" in refused(
        ["wizardlm", "--from", path, "--out", tmp_path / "out"], capsys)  # fmt: skip


COMMANDS = {
    "metamath": ["metamath: unknown set", "did you mean metamathqa?", "--list"],
    "": ["no name", "metamathqa"],
    "multitask --from FILE": ["no format has the fields of this row", "instruction=FIELD,response=FIELD"],
    "commonsense --from wizardlm=FILE": ["wizardlm is no part of boolq, piqa"],
    "commonsense --from FILE --from boolq=FILE": ["boolq is no part of commonsense"],
    "commonsense --from boolq=FILE --from FILE": ["one file for a whole mix, or its parts, boolq=FILE"],
    "boolq --from boolq=FILE --from FILE": ["given twice"],
    "rows": ["rows of your own", "--from FILE"],
    "boolq --from FILE --fields question": ["give pairs"],
    "boolq --from FILE --fields passage=a": ["'passage' is no field of boolq", "question"],
    "boolq --fields question=a": ["--from file", "--data prepared/a,prepared/b"],
    "boolq --from FILE --seed x": ["--seed", "'x'"],
    "boolq --from FILE --model ./nowhere": ["--model ./nowhere", "no such directory"],
    **{f"boolq --from FILE --out {out}": ["something else already", "another --out"]
       for out in (".", "x/..", "/", "./", "link")},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_commands(command, tmp_path, capsys, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", [RAW["boolq"][0]])
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    line = refused(command.replace("FILE", path).split(), capsys)
    assert all(word in line for word in COMMANDS[command]), line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "link"]


def test_models_and_their_tokenizers(tmp_path, capsys, monkeypatch):
    """A folder's own tokenizer is used; without eos, or a hub id without a network: one line."""
    pytest.importorskip("transformers")
    some = embedded(30)
    path = jsonl(tmp_path / "a.jsonl", some)
    for name, eos in (("good", families.END), ("no_eos", None)):
        families.config("llama").save_pretrained(tmp_path / name)
        families.tokenizer(eos).save_pretrained(tmp_path / name)
    prepare.main(["rows", "--from", path, "--model", str(tmp_path / "good"), "--out", str(tmp_path / "out")])
    tokenizer = HFTokenizer(str(tmp_path / "good"))
    assert sorted(by_hand(tmp_path / "out")) == sorted(expected(some, tokenizer))
    with pytest.raises(ValueError, match="holds tokens of .*good, whose tokenizer is not this --model's"):
        rows.open_rows(str(tmp_path / "out"), GPTTokenizer(), 64, "train")
    command = ["rows", "--from", path, "--out", tmp_path / "none", "--model"]
    assert "no eos token" in refused([*command, tmp_path / "no_eos"], capsys)
    offline(monkeypatch)
    line = refused([*command, "someone/a-model"], capsys)
    assert "someone/a-model" in line and "--model DIR" in line
    assert not (tmp_path / "none").exists() and not (tmp_path / "none.tmp").exists()


def spoil_manifest(change):
    def spoil(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return spoil


SPOILT = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), ["no prepared set", "data/prepare.py"]),
    "no JSON": (lambda f: (f / "manifest.json").write_text("{"), ["not a prepared set's manifest"]),
    "no digests": (spoil_manifest(lambda m: m.pop("files")), ["not a prepared set's manifest", "KeyError"]),
    "newer": (spoil_manifest(lambda m: m.update(format=9)), ["format 9", "format 2"]),
    "cut": (lambda f: os.truncate(f / "tokens.bin", 10), ["tokens.bin has 10 of its", "make it again"]),
    "no index": (lambda f: (f / "index.bin").unlink(), ["index.bin: no such", "make it again"]),
}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_sets_are_refused(case, three, capsys, tmp_path):
    spoil, words = SPOILT[case]
    spoil(tmp_path / "set1")
    with pytest.raises(SystemExit):
        train.main(["--data", three[0][1], "--out", str(tmp_path / "out"), "--device", "cpu"])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("train.py: error:") and all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_one_changed_bit_is_seen_once_and_for_all(three, tmp_path, monkeypatch):
    """Any bit of any file; the digests are taken at the first opening alone, and again if a file changes."""
    folder, tokenizer = tmp_path / "set1", GPTTokenizer()
    for name in ("tokens.bin", "index.bin"):
        data = (folder / name).read_bytes()
        for at in (0, len(data) // 2, len(data) - 1):
            (folder / name).write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1:])
            with pytest.raises(ValueError, match=f"{name} has other bytes than"):
                rows.open_prepared(str(folder), tokenizer)
        (folder / name).write_bytes(data)
    taken = []
    monkeypatch.setattr(rows, "digest", lambda path: taken.append(path.name) or prepare.digest(path))
    for _ in range(3):
        assert len(rows.open_prepared(str(folder), tokenizer).index) == 100
    assert taken == list(rows.PARTS) and not list(folder.glob("*.tmp"))
    os.utime(folder / "tokens.bin", ns=(1, 1))
    rows.open_prepared(str(folder), tokenizer)
    assert len(taken) == 6


MANIFESTS = {
    "a digit": (lambda m: m.update(tokens=m["tokens"] + 1), False, "not as it was written"),
    "pointers": (lambda m: m.update(dtype="O"), True, "not as it was written"),
    "another type": (lambda m: m.update(dtype="<f4"), True, "not as it was written"),
    "domains": (lambda m: m.update(domains=[3]), True, "not as it was written"),
    "no domains": (lambda m: m.pop("domains"), True, "KeyError"),
    "a list": (None, False, "TypeError"),
}  # fmt: skip


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_changed_manifest_is_refused(case, three, tmp_path):
    """Sealed by its own digest; and by whoever seals it anew, the types are still from a list."""
    change, sealed, words = MANIFESTS[case]
    path = tmp_path / "set1" / "manifest.json"
    manifest = json.loads(path.read_text())
    if change:
        change(manifest)
        manifest["digest"] = rows.seal(manifest) if sealed else manifest["digest"]
    path.write_text(json.dumps(manifest if change else [manifest]))
    with pytest.raises(ValueError) as error:
        rows.open_prepared(str(tmp_path / "set1"), GPTTokenizer())
    assert words in str(error.value) and "make it again" in str(error.value) and str(path) in str(error.value)


def spoil_index(field, value):
    def spoil(folder):
        index = np.fromfile(folder / "index.bin", rows.INDEX)
        index[field][7] = value
        index.tofile(folder / "index.bin")

    return spoil


SEALED_ANEW = {
    **{f"{field} {value}": spoil_index(field, value) for field, value in (
        ("start", 1 << 40), ("start", (1 << 64) - 1), ("length", (1 << 32) - 1), ("length", 0),
        ("domain", 99), ("turns", 3), ("spans", (1 << 64) - 1))},
    "no token": lambda f: (f / "tokens.bin").write_bytes(b""),
    "half a token": lambda f: os.truncate(f / "tokens.bin", (f / "tokens.bin").stat().st_size - 1),
    "half a row": lambda f: os.truncate(f / "index.bin", (f / "index.bin").stat().st_size - 1),
    "half a span": lambda f: (f / "spans.bin").write_bytes(b"1234"),
    "ids beyond the vocabulary": lambda f: (f / "tokens.bin").write_bytes(
        b"\xff" * (f / "tokens.bin").stat().st_size),
}  # fmt: skip


@pytest.mark.parametrize("case", SEALED_ANEW)
def test_a_set_that_points_beyond_itself_is_refused(case, three, tmp_path):
    """Whoever changes a file and writes the digests anew: one line, and no row is read."""
    folder = tmp_path / "set1"
    SEALED_ANEW[case](folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: rows.digest(folder / name) for name in rows.PARTS}
    manifest["digest"] = rows.seal(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "verified.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="is not as data/prepare.py writes it; make it again"):
        rows.open_prepared(str(folder), GPTTokenizer())


# ---- OUT.tmp -------------------------------------------------------------------------------------


def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
            for p in sorted(folder.rglob("*"))}


FOREIGN = {
    "a file": lambda work, other: (work.mkdir(), (work / "thesis.txt").write_text("x")),
    "a folder": lambda work,
    other: ((work / "sub").mkdir(parents=True), (work / "sub" / "00_00000.part").write_text("x")),
    "a file of that name": lambda work, other: work.write_text("x"),
    "a link to a folder": lambda work, other: work.symlink_to(other),
    "settings of another program": lambda work,
    other: (work.mkdir(), (work / "settings.json").write_text('{"theme": 1}')),
    "settings that are a link": lambda work,
    other: (work.mkdir(), (work / "settings.json").symlink_to(other)),
    "a link called whole": lambda work, other: (work.mkdir(), (work / "whole").symlink_to(other)),
    "our names without settings": lambda work,
    other: (work.mkdir(), (work / "00_00000.part").write_text("x")),
    "a whole set without settings": lambda work,
    other: ((work / "whole").mkdir(parents=True), (work / "whole" / "tokens.bin").write_text("x")),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_what_others_have_in_out_tmp_stays(case, tmp_path, capsys):
    """Refused in one line; nothing in it, nor behind a link, is touched."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokens.bin").write_text("precious")
    FOREIGN[case](tmp_path / "out.tmp", tmp_path / "other")
    jsonl(tmp_path / "a.jsonl", embedded(30))
    before = everything(tmp_path)
    line = refused(["rows", "--from", tmp_path / "a.jsonl", "--out", tmp_path / "out"], capsys)
    assert "out.tmp: is needed for the parts" in line and "move it away" in line
    assert everything(tmp_path) == before


def test_what_came_in_while_it_worked_stays(tmp_path, monkeypatch, capsys):
    """A file of others in OUT.tmp outlives the end of the command, and so does a link's target."""
    path, write = jsonl(tmp_path / "a.jsonl", embedded(30)), prepare.write_part
    (tmp_path / "other").write_text("precious")

    def and_more(part, *args):
        write(part, *args)
        (part.parent / "thesis").write_text("x")
        (part.parent / "00_00009.part").symlink_to(tmp_path / "other")

    monkeypatch.setattr(prepare, "write_part", and_more)
    prepare.main(["rows", "--from", path, "--out", str(tmp_path / "out")])
    assert len(by_hand(tmp_path / "out")) == 30 and (tmp_path / "other").read_text() == "precious"
    assert [p.name for p in (tmp_path / "out.tmp").iterdir()] == ["thesis"]


def test_two_at_once_and_files_of_killed_ones(tmp_path, monkeypatch, capsys):
    """A second command is refused while one works; temporary files of this host's dead are removed."""
    path, write = jsonl(tmp_path / "a.jsonl", embedded(30)), prepare.write_part
    work, lines = tmp_path / "out.tmp", []
    work.mkdir()
    mine = rows.temporary(work / "00_00000.part")
    mine.write_text("half")

    def twice(*args):
        if not lines:
            lines.append("")
            lines.append(refused(["rows", "--from", path, "--out", tmp_path / "out"], capsys))
        write(*args)

    monkeypatch.setattr(prepare, "write_part", twice)
    prepare.main(["rows", "--from", path, "--out", str(tmp_path / "out")])
    assert "another prepare.py is writing to" in lines[1] and len(by_hand(tmp_path / "out")) == 30
    assert not mine.exists()


def test_two_that_end_at_the_same_moment(tmp_path, monkeypatch, capsys):
    """Nobody works in a folder that is gone, makes a set twice, or removes what the other is removing."""
    fcntl = pytest.importorskip("fcntl")
    out, work, alone, flock = tmp_path / "out", tmp_path / "out.tmp", prepare.alone, fcntl.flock
    command = ["rows", "--from", jsonl(tmp_path / "a.jsonl", embedded(30)), "--out", out]

    def late(folder):
        monkeypatch.setattr(prepare, "alone", alone)
        prepare.main([str(part) for part in command])
        return alone(folder)

    monkeypatch.setattr(prepare, "alone", late)         # between the look at OUT and the lock
    assert f"another prepare.py has made {out} meanwhile" in refused(command, capsys)
    before = everything(out)
    assert before and not work.exists()
    work.mkdir()                                        # a kill before the very last step
    prepare.main([str(part) for part in command])
    assert not work.exists()
    work.mkdir()
    settings = json.dumps(json.loads((out / "manifest.json").read_text())["settings"])
    (work / "settings.json").write_text(settings)
    with alone(work):                                   # the other is not yet done
        prepare.main([str(part) for part in command])
        assert (work / "settings.json").exists()
    prepare.main([str(part) for part in command])
    assert not work.exists() and everything(out) == before
    monkeypatch.setattr(fcntl, "flock", lambda *args: work.rmdir() or flock(*args))
    with pytest.raises(ValueError, match="another prepare.py is writing to"), alone(work):
        pass


def test_many_domains(tmp_path):
    """More than two bytes count."""
    some = [{"instruction": f"a{i}", "response": "b", "domain": f"d{i}"} for i in range(66_000)]
    prepare.main(["rows", "--from", jsonl(tmp_path / "a.jsonl", some), "--out", str(tmp_path / "out")])
    opened = rows.open_rows(str(tmp_path / "out"), GPTTokenizer(), 20, "train")
    assert len(np.unique(opened.column("domain"))) == 66_000
    assert opened.files[0].domains[-1] == "d65999"


def test_conversations_in_parts(tmp_path, monkeypatch):
    """Several answers a row over several parts: spans stand beside their tokens, in any order."""
    monkeypatch.setattr(prepare, "PART", 7)
    some = [{"conversations": [{"from": ("human", "gpt")[j % 2], "value": f"{i} {j}"}
                               for j in range(2 + 2 * (i % 4))],
             "domain": "x"} for i in range(30)]  # fmt: skip
    prepare.main(["rows", "--from", jsonl(tmp_path / "a.jsonl", some), "--out", str(tmp_path / "out")])
    tokenizer, wanted = GPTTokenizer(), []
    for row in some:
        tokens, spans = tokenizer.conversation(rows.turns_of(row))
        wanted.append((tuple(tokens), tuple(spans) if len(spans) > 1 else spans[0][0], "x"))
    assert sorted(map(repr, by_hand(tmp_path / "out"))) == sorted(map(repr, wanted))


LISTS = {
    "A,0.5:B": ["weight to every source", "or to none"],
    "0:A,1:B": ["0:", "above 0"],
    "1e:A": ["finite number"],
    "A,missing": ["missing", "no such data file or prepared set", "--list"],
    "A,begun": ["its preparation was cut off", "start that command again"],
}


@pytest.mark.parametrize("text", LISTS)
def test_bad_lists(text, three, tmp_path):
    words = LISTS[text]
    (tmp_path / "begun.tmp").mkdir()
    for word, path in (("begun", tmp_path / "begun"), ("A", three[0][0]), ("B", three[0][1])):
        text = re.sub(rf"\b{word}\b", str(path), text)
    with pytest.raises(ValueError) as error:
        rows.load(text, None, 10, GPTTokenizer(), 64)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_source_without_a_row_that_fits(three, tmp_path):
    with pytest.raises(ValueError, match="no row has an answer within --block_size 2"):
        rows.load(f"{three[0][1]},{three[0][2]}", None, 10, GPTTokenizer(), 2)
    one = tmp_path / "one.jsonl"
    with pytest.raises(ValueError, match="all its rows are held out; give more, or --eval_data"):
        for text in range(400):         # until the hash holds that row out
            jsonl(one, [{"instruction": f"again {text}", "response": "and again"}] * 3)
            rows.load(f"0.9:{three[0][1]},0.1:{one}", None, 10, GPTTokenizer(), 64)
    with pytest.raises(ValueError, match="every row is evaluated, so its sources have no weights"):
        rows.load(three[0][0], f"0.5:{three[0][1]}", 10, GPTTokenizer(), 64)
