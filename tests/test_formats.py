"""Readers of data: every format gives the same tokens, every container the same rows, every damage one line.

HD_PISSA_MUTATIONS (200) is the number of damaged sources in the last test; 5000 takes some minutes.
"""

import collections
import csv
import gzip
import io
import json
import os
import random
import shutil
import signal
import sys

import pytest
from conftest import ROOT

from data import formats, prepare, rows
from data.tokenizer import GPTTokenizer

MUTATIONS = int(os.environ.get("HD_PISSA_MUTATIONS", 200))

# ---- Formats -------------------------------------------------------------------------------------


def turns(*texts, system=None):
    made = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + made


def share(chat):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in chat]


ONE, TWO = turns("Add.\n2 and 3", "5"), turns("Hi", "Ho", "And?", "Done.")
SYSTEM = turns("Hi", "Ho", system="Be kind.")
# the same conversation in every format that can hold it
SAME = {
    "one": (ONE, [
        {"messages": ONE}, {"conversations": share(ONE)},
        {"instruction": "Add.", "input": "2 and 3", "output": "5"},
        {"instruction": "Add.\n2 and 3", "response": "5"},
        {"instruction": "Add.", "context": "2 and 3", "response": "5"},
        {"prompt": "Add.\n2 and 3", "completion": "5"}, {"prompt": ONE[:1], "completion": ONE[1:]},
        {"instruction": "Add.", "input": "2 and 3", "context": None, "system": "", "history": [],
         "output": "5"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Add.\n"},
                                                   {"type": "text", "text": "2 and 3"}],
                       "name": None}, ONE[1]]},
        {"conversations": [{"role": "human", "content": "Add.\n2 and 3"}, {"from": "GPT", "value": "5"}]},
        {"conversations": [share(ONE)[0], {"from": "bing", "value": "5"}]},
        {"messages": [{"from": None, "value": None, **turn} for turn in ONE]},      # as Parquet fills gaps
    ]),
    "two": (TWO, [
        {"messages": TWO}, {"conversations": share(TWO)}, {"prompt": TWO[:3], "completion": TWO[3:]},
        {"instruction": "And?", "output": "Done.", "history": [["Hi", "Ho"]]},
        {"instruction": "And?", "response": "Done.", "history": [["Hi", "Ho"]]},
    ]),
    "system": (SYSTEM, [
        {"messages": SYSTEM}, {"conversations": share(SYSTEM)},
        {"conversations": share(SYSTEM[1:]), "system": "Be kind."},
        {"instruction": "Hi", "output": "Ho", "system": "Be kind."},
        {"prompt": SYSTEM[:2], "completion": SYSTEM[2:]},
        {"prompt": "Hi", "completion": "Ho", "system": "Be kind."},
        {"messages": SYSTEM[1:], "system": "Be kind."},
        {"instruction": "Hi", "output": "Ho", "system_prompt": "Be kind."},
        {"prompt": "Hi", "completion": "Ho", "system": None, "system_prompt": "Be kind."},
        {"messages": [{"role": "system", "content": ""}, *SYSTEM]},
        {"messages": [{"role": "developer", "content": "Be kind."}, *SYSTEM[1:]]},
    ]),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_the_same_conversation_in_every_format(case):
    chat, dresses = SAME[case]
    tokenizer = GPTTokenizer()
    wanted = rows.encode([{"messages": chat}], tokenizer, 500, "a")
    assert wanted[0][0] and len({formats.text_key(rows.turns_of(row)) for row in dresses}) == 1
    for row in dresses:
        assert formats.conversation(row, formats.recognise([row], "a:1")) == chat, row
        assert rows.encode([row], tokenizer, 500, "a") == wanted, row


def test_the_format_is_told_from_the_first_rows_and_can_be_named(tmp_path):
    """The order of FORMATS where a row fits several; null fields do not count; `format` overrides."""
    both = {"instruction": "a", "output": "b", "text": "prompt: a, answer: b"}
    assert formats.recognise([both], "x") == "alpaca"
    assert formats.recognise([{"messages": None, "text": "a"}], "x") == "text"
    assert formats.recognise([{"id": 3}, {"prompt": "a", "completion": "b"}], "x") == "prompt"
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(both) + "\n")
    report = {}
    assert formats.read_rows(path, "text", report)[0].turns == [{"role": "text", "content": both["text"]}]
    assert set(report[str(path)]["notes"]) == {
        "field 'instruction' is not used",
        "field 'output' is not used",
    }
    with pytest.raises(ValueError, match="--format chat: give one of messages, sharegpt"):
        formats.read_rows(path, "chat")
    path.write_text(json.dumps({"question": "a", "reply": "b"}) + "\n")
    with pytest.raises(ValueError) as error:
        formats.read_rows(path)
    assert all(word in str(error.value) for word in ("a.jsonl:1", "(question, reply)", "prompt+completion"))


DROPS = {
    "null": ({"instruction": "a", "response": None}, "no text in 'response'"),
    "missing": ({"instruction": "a"}, "no text in 'response'"),
    "blank": ({"instruction": "a", "response": " \n"}, "no text in 'response'"),
    "no question": ({"instruction": "", "response": "a"}, "no text in 'instruction'"),
    "null turns": ({"messages": None}, "no text in 'messages'"),
    "no turns": ({"messages": []}, "no answer to a question"),
    "no answer": ({"messages": TWO[:1]}, "no answer to a question"),
    "answer first": ({"messages": TWO[1:]}, "no answer to a question"),
    "null turn": ({"messages": [TWO[0], {"role": "assistant", "content": None}]}, "no text in 'messages'"),
    "empty turn": ({"messages": [*TWO[:3], {"role": "assistant", "content": ""}]}, "an empty turn"),
    "another role": ({"messages": [*TWO, {"role": "tool", "content": "x"}]}, "a turn of role 'tool'"),
    "calls": ({"messages": [*TWO, TWO[0], {"role": "assistant", "content": "I see.", "tool_calls": [
        {"type": "function", "function": {"name": "f"}}]}]}, "a turn of role 'tool_calls'"),
    "a call without words": ({"messages": [TWO[0], {"role": "assistant", "content": None, "function_call": {
        "name": "f", "arguments": "{}"}}]}, "a turn of role 'function_call'"),
    "empty text": ({"text": ""}, "no text in 'text'"),
}  # fmt: skip


@pytest.mark.parametrize("case", DROPS)
def test_rows_without_a_conversation_are_dropped_and_counted(case, tmp_path):
    row, reason = DROPS[case]
    path, name = tmp_path / "a.jsonl", next(f for f in ("messages", "text", "instruction") if f in row)
    good = {
        "messages": {"messages": TWO},
        "text": {"text": "x"},
        "instruction": {"instruction": "q", "response": "r"},
    }[name]
    path.write_text("".join(json.dumps(x) + "\n" for x in (good, row, good, row)))
    report = {}
    assert len(formats.read_rows(path, None, report)) == 2
    assert report[str(path)]["dropped"] == {reason: [2, f"{path}:2"]} and report[str(path)]["kept"] == 2
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"a.jsonl:1: {reason}, and no row is left of 1; rows need"):
        formats.read_rows(path, name)


@pytest.mark.parametrize("text", ["null\n%s\nnull\n", "[null, %s, null]"])
def test_a_row_of_null_is_dropped_and_counted(text, tmp_path):
    path, report = tmp_path / "a.json", {}
    path.write_text(text % json.dumps({"text": "a"}))
    assert [row.turns[0]["content"] for row in formats.read_rows(path, None, report)] == ["a"]
    assert report[str(path)]["dropped"]["a row of null"][0] == 2 and report[str(path)]["read"] == 3


def test_what_a_turn_has_beside_its_words_is_named(tmp_path):
    """weight, thinking, ...: rows that have them are counted, once each; null and empty calls are nothing."""
    chat = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b", "weight": 0,
            "tool_calls": []}, {"role": "user", "content": "c", "weight": 1}, TWO[1]]
    share_ = [{"from": "human", "value": "a", "markdown": None}, {"from": "gpt", "value": "b", "text": "b"}]
    for row, field in (({"messages": chat}, "weight"), ({"conversations": share_}, "text"),
                       ({"prompt": chat[:1], "completion": chat[1:2]}, "weight")):
        path, report = tmp_path / "a.jsonl", {}
        path.write_text((json.dumps(row) + "\n") * 3)
        assert len(formats.read_rows(path, None, report)) == 3
        assert report[str(path)]["notes"] == {f"field {field!r} of a turn is not used": 3}


WRONG = {
    "a number": ({"instruction": "a", "response": 3}, "int in field 'response'"),
    "a list": ({"instruction": ["a"], "response": "b"}, "list in field 'instruction'"),
    "an input": ({"instruction": "a", "input": 3, "response": "b"}, "int in field 'input'"),
    "a system": ({"instruction": "a", "system": {}, "response": "b"}, "dict in field 'system'"),
    "a history": ({"instruction": "a", "history": [["a"]], "response": "b"}, "'history' is no list of pairs"),
    "a text": ({"messages": "hello"}, "'messages' is no list of turns"),
    "a turn": ({"messages": ["hello"]}, "'messages' is no list of turns"),
    "a role": ({"messages": [{"role": 3, "content": "a"}]}, "int in field 'role'"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
                  "list in field 'content'"),
    "a value": ({"conversations": [{"from": "human", "value": 4}]}, "int in field 'value'"),
    "a prompt": ({"prompt": [3], "completion": "a"}, "'prompt' is no list of turns"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_fields_of_another_type_are_refused_with_their_place(case, tmp_path):
    row, words = WRONG[case]
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError) as error:
        formats.read_rows(path)
    assert (
        str(error.value).startswith(f"{path}:2: ")
        and words in str(error.value)
        and "mend that row" in str(error.value)
    )


# ---- Containers ----------------------------------------------------------------------------------

FLAT = [{"instruction": f"Größe {i}?\nzwei", "response": f'"😀", {i}', "id": str(i)} for i in range(7)]
DEEP = [{"messages": [*TWO, *turns(f"{i}?", f"{i}!")], "domain": "ab"[i % 2]} for i in range(7)]


def lines(some):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some).encode(
        "utf-8", "surrogatepass"
    )


def as_csv(some, tabs=False):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(some[0]), delimiter="\t" if tabs else ",")
    writer.writeheader()
    writer.writerows(some)
    return text.getvalue().encode()


def write_parquet(path, some):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(some), path)


def write_saved(path, some, splits=None):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(some)
    if splits:      # the first has other rows
        parts = {name: data.select([0] if name == "test" else range(7)) for name in splits}
        data = datasets.DatasetDict(parts)
    data.save_to_disk(str(path))


CONTAINERS = {
    "a.jsonl": lines, "bom.jsonl": lambda some: b"\xef\xbb\xbf" + lines(some),
    "crlf.jsonl": lambda some: lines(some).replace(b"\n", b"\r\n"),
    "blank.jsonl": lambda some: b"\n  \n" + lines(some).replace(b"\n", b"\n\n \t\n"),
    "unended.jsonl": lambda some: lines(some)[:-1],
    "joined.jsonl": lambda some: lines(some[:3]) + b"\xef\xbb\xbf" + lines(some[3:]),
    "escaped.jsonl": lambda some: "".join(json.dumps(row) + "\n" for row in some).encode(),
    "a.json": lambda some: json.dumps(some).encode(), "noname": lines,
    "pretty.json": lambda some: b"\xef\xbb\xbf\n" + json.dumps(some, indent=2, ensure_ascii=False).encode(),
    "a.jsonl.gz": lambda some: gzip.compress(lines(some)),
    "a.json.gz": lambda some: gzip.compress(json.dumps(some).encode()),
    "two.gz": lambda some: gzip.compress(lines(some[:3])) + gzip.compress(lines(some[3:])),
    "a.csv": as_csv, "a.tsv": lambda some: as_csv(some, True),
    "A.CSV.gz": lambda some: gzip.compress(as_csv(some)),
    "bom.csv": lambda some: b"\xef\xbb\xbf" + as_csv(some),
    "lf.csv": lambda some: as_csv(some).replace(b"\r\n", b"\n"),
    "a.parquet": write_parquet, "parquet without a name": write_parquet, "saved": write_saved,
    "splits": lambda path, some: write_saved(path, some, ("test", "train")),
    "one split": lambda path, some: write_saved(path, some, ("all",)),
}  # fmt: skip


def made(name, folder, some):
    path, how = folder / name, CONTAINERS[name]
    if how.__code__.co_argcount - len(how.__defaults__ or ()) == 1:
        path.write_bytes(how(some))
    else:
        pytest.importorskip("pyarrow")
        how(path, some)
    return path


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_holds_the_same_rows(name, tmp_path):
    """Read alike by the reader, by load and by prepare.py; texts with commas, quotes and line ends."""
    tokenizer = GPTTokenizer()
    for some in (FLAT, DEEP) if "sv" not in name.lower() else (FLAT,):
        (tmp_path / str(len(some[0]))).mkdir()
        path = made(name, tmp_path / str(len(some[0])), some)
        found = formats.read_rows(str(path))
        assert [row.turns for row in found] == [rows.turns_of(row) for row in some]
        assert [dict(row) for row in found] == some
        wanted = [repr(row) for row in rows.encode(some, tokenizer, 500, "a")]
        train, held, _ = rows.load(str(path), None, 5, tokenizer, 500)
        assert len(held) == 1 and sorted(map(repr, [*train, *held])) == sorted(wanted)
        out = tmp_path / f"prepared{len(some[0])}"
        prepare.main(["rows", "--from", str(path), "--out", str(out)])
        assert sorted(map(repr, rows.open_rows(str(out), tokenizer, 500, "a"))) == sorted(wanted)


@pytest.mark.parametrize("name", ["gsm8k_test.jsonl", "mbpp.jsonl"])
def test_real_rows_in_every_format(name, real_dir, tmp_path):
    """Real questions and answers as each format and container: the tokens of the file as it is."""
    some = [json.loads(line) for line in (real_dir / name).read_text().split("\n")[:60] if line]
    tokenizer = GPTTokenizer()
    pairs = [(row["instruction"], row["response"]) for row in some]
    wanted = [
        row[:2]
        for row in rows.encode(formats.read_rows(str(real_dir / name))[: len(some)], tokenizer, 600, "a")
    ]
    dresses = {
        "messages": [{"messages": turns(q, a)} for q, a in pairs],
        "sharegpt": [{"conversations": share(turns(q, a))} for q, a in pairs],
        "alpaca": [
            {"instruction": q.partition("\n")[0], "input": q.partition("\n")[2], "output": a}
            for q, a in pairs
        ],
        "instruction": [{"instruction": q, "context": "", "response": a, "category": "x"} for q, a in pairs],
        "prompt": [{"prompt": q, "completion": a} for q, a in pairs],
    }
    for form, dressed in dresses.items():
        for container in ("a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "a.csv", "saved"):
            if container == "a.csv" and form in ("messages", "sharegpt"):
                continue
            (tmp_path / form).mkdir(exist_ok=True)
            path, report = made(container, tmp_path / form, dressed), {}
            found = formats.read_rows(str(path), None, report)
            assert report[str(path)]["format"] == form
            assert [row[:2] for row in rows.encode(found, tokenizer, 600, "a")] == wanted, (form, container)


def test_the_table_of_formats_is_current():
    """Made anew, it is the page that is there; every file gave the same tokens, every odd row was named."""
    pytest.importorskip("datasets")
    pytest.importorskip("transformers")
    sys.path.insert(0, str(ROOT / "tests" / "bench"))
    import formats_table
    text = formats_table.PAGE.read_text("utf-8")
    assert formats_table.page() == text, "run python tests/bench/formats_table.py"
    assert text.count(" same |") == 14 * 6 + 6 and "OTHER" not in text and "NOTHING" not in text


# ---- Refusals ------------------------------------------------------------------------------------

GOOD = json.dumps(FLAT[0], ensure_ascii=False).encode() + b"\n"
BAD = {
    "latin1.jsonl": (GOOD + b'{"instruction": "caf\xe9", "response": "x"}\n',
                     [":2: not UTF-8 (byte 0xe9)", "save the file"]),
    "utf16.jsonl": (GOOD.decode().encode("utf-16"), [":1: not UTF-8 but UTF-16", "iconv"]),
    "latin1.csv": (b"instruction,response\na,b\ncaf\xe9,x\n", [":3: not UTF-8", "save the file"]),
    "latin1.json": (b'[\n{"instruction": "a",\n"response": "\xff"}]', [":3: not UTF-8"]),
    "deep.jsonl": (GOOD + b"[" * 100_000 + b"]" * 100_000, [":2: nested too deeply"]),
    "deep.json": (b"[" * 100_000, [":1: nested too deeply"]),
    "half.jsonl": (GOOD + b'{"instruction": "\\ud800", "response": "x"}\n', [":2: half a surrogate pair"]),
    "half key.jsonl": (b'{"\\udc01": 1, "instruction": "a", "response": "x"}\n',
                       [":1: half a surrogate pair"]),
    "digits.jsonl": (b'{"id": ' + b"9" * 5000 + b"}\n", [":1: not JSON"]),
    "cut.jsonl": (GOOD + GOOD[:-9], [":2: not JSON", "a row a line"]),
    "object.json": (json.dumps({"data": [1]}, indent=1).encode(), [":1: not JSON", "one list"]),
    "number.jsonl": (GOOD + b"3\n", [":2: a int, not an object"]),
    "empty.jsonl": (b"", [": holds no rows", "rows need"]),
    "empty.csv": (b"", [": holds no rows"]),
    "header.csv": (b"instruction,response\n", [": holds no rows"]),
    "cells.csv": (b"instruction,response\na,b\na,b,c\n", [":3: more cells than columns"]),
    "twice.csv": (b"text,text\na,b\n", [":1: two columns have one name"]),
    "quote.csv": (b'instruction,response\na,b\n"a,b\n', [":3: not CSV"]),
    "cr.csv": (b"instruction,response\ra,b\r", [":1: not CSV"]),
    "utf32.jsonl": (GOOD.decode().encode("utf-32"), [":1: not UTF-8 but UTF-32", "iconv -f UTF-32"]),
    "cut.jsonl.gz": (gzip.compress(GOOD * 50)[:-20], ["cannot be read to its end", "download it again"]),
    "spoilt.gz": (gzip.compress(GOOD * 50)[:30] + b"\xff" * 40, ["cannot be read to its end"]),
    "a.zip": (b"PK\3\4aaaa", ["packed by zip", "unpack it"]),
    "a.zst": (b"\x28\xb5\x2f\xfdaaaa", ["packed by zstd"]),
    "no.parquet": (b"instruction", ["not whole Parquet", "write it again"]),
    "cut.parquet": (b"PAR1" + b"\0" * 50, ["not whole Parquet"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_files_that_cannot_be_read(name, tmp_path):
    """One line with file, place and remedy, from the reader, from load and from prepare.py's file."""
    data, words = BAD[name]
    path = tmp_path / name
    path.write_bytes(data)
    for read in (formats.read_rows, lambda p: rows.load(p, None, 5, GPTTokenizer(), 64)):
        with pytest.raises(ValueError) as error:
            read(str(path))
        text = str(error.value)
        assert text.startswith(str(path)) and "\n" not in text and len(text) < 500, text
        assert all(word in text for word in words), text


def test_what_is_no_file(tmp_path):
    """A pipe, a folder, a device, a loop of links, a dangling link, a name with a zero: at once, one line."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name, word in (
        ("pipe", "a pipe, no file"),
        ("folder", "a folder, no file"),
        ("/dev/zero", "a device, no file"),
        ("loop", "cannot be read"),
        ("dangling", "no such data file"),
        ("none", "no such data file"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(ValueError) as error:
            formats.read_rows(str(tmp_path / name))
        assert word in str(error.value) and "give a JSONL" in str(error.value)
        if "\0" not in name:
            with pytest.raises(ValueError):
                rows.load(str(tmp_path / name), None, 5, GPTTokenizer(), 64)


def test_without_the_libraries(tmp_path, monkeypatch):
    """Parquet and saved folders name what to install; everything else is read without them."""
    table, folder = made("a.parquet", tmp_path, FLAT), made("saved", tmp_path, FLAT)
    for module in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    for path, library in ((table, "pyarrow"), (folder, "datasets")):
        with pytest.raises(ValueError, match=f"reading it needs {library}: pip install"):
            formats.read_rows(str(path))
    for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.csv"):
        assert len(formats.read_rows(str(made(name, tmp_path, FLAT)))) == 7


def test_an_arrow_column_that_points_beyond_its_end():
    """As a damaged file may: checked before it is read, which the library does not do by itself."""
    arrow = pytest.importorskip("pyarrow")
    batch, sink = arrow.RecordBatch.from_pylist([{"text": "12345"}, {"text": "6789"}]), io.BytesIO()
    with arrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write(batch)
    offsets = [b"".join(n.to_bytes(4, "little") for n in (0, 5, end)) for end in (9, 12)]
    assert sink.getvalue().count(offsets[0]) == 1
    batches = list(arrow.ipc.open_stream(sink.getvalue().replace(*offsets)))
    with pytest.raises(ValueError), formats.one_line("x", "y"):
        list(formats.arrow_rows("x", batches))


def test_splits_without_train(tmp_path):
    write_saved(tmp_path / "saved", FLAT, ("test", "validation"))
    with pytest.raises(
        ValueError, match="has the splits test, validation, none of them train; give the folder of one"
    ):
        formats.read_rows(str(tmp_path / "saved"))
    assert len(formats.read_rows(str(tmp_path / "saved" / "validation"))) == 7


# ---- Mutations of valid sources ------------------------------------------------------------------

VALUES = [None, True, 0, -1, 3.5, float("nan"), 10**30, "", " ", "\0", "x" * 5000, [], [[]], {}, {"role": 1},
          [None], ["a"],
          [{"role": "user"}], [{"from": "gpt", "value": None}], "\ud800", "messages"]  # fmt: skip
SOURCES = ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.parquet", "saved", "prepared"]


def retyped(value, draw):
    """A copy with one value, at any depth, of another type."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.8:
        copied = dict(value) if isinstance(value, dict) else list(value)
        key = draw.choice(list(copied)) if isinstance(value, dict) else draw.randrange(len(copied))
        copied[key] = retyped(copied[key], draw)
        return copied
    return draw.choice(VALUES)


def damage(path, draw):
    """Change a file by one of the kinds; what was done, in words."""
    kind = draw.choice(
        [
            "cut",
            "flip",
            "flip",
            "flip",
            "insert",
            "pipe",
            "folder",
            "loop",
            "device",
            "gone",
            "empty",
            "twice",
        ]
    )
    data = bytearray(path.read_bytes())
    if kind in ("pipe", "folder", "loop", "device", "gone"):
        path.unlink()
        {"pipe": os.mkfifo, "folder": os.mkdir, "gone": lambda p: None, "loop": lambda p: os.symlink(p, p),
         "device": lambda p: os.symlink("/dev/zero", p)}[kind](path)  # fmt: skip
        return kind
    if kind == "cut":
        del data[draw.randrange(len(data) + 1) :]
    elif kind == "empty":
        data.clear()
    elif kind == "twice":
        data += bytes(data)
    else:
        for _ in range(draw.choice([1, 1, 3, 20])):
            at = draw.randrange(len(data)) if data else 0
            if kind == "flip" and data:
                data[at] ^= 1 << draw.randrange(8)
            else:
                data[at:at] = draw.choice([b"\0", b"\xff", b'"', b"[", b"\\ud800", b"\r", b",", b"{" * 3000])
    path.write_bytes(data)
    return kind


def mutated(name, folder, base, draw):
    """A damaged source of a kind in a folder of its own: (path, how)."""
    folder.mkdir()
    some = (FLAT if "csv" in name else draw.choice([FLAT, DEEP])) * 5
    if name == "prepared":
        path = folder / "set"
        path.mkdir()
        for file, data in base.items():
            (path / file).write_bytes(data)
        if draw.random() < 0.6:
            return path, damage(draw.choice(sorted(path.iterdir())), draw)
        manifest = retyped(json.loads(base["manifest.json"]), draw)
        if isinstance(manifest, dict) and draw.random() < 0.7:
            manifest["digest"] = rows.seal(manifest)  # by somebody who knows how
        (path / "manifest.json").write_text(json.dumps(manifest))
        return path, "retype"
    if draw.random() < 0.4 and name in ("a.jsonl", "a.json", "a.jsonl.gz"):
        at = draw.randrange(len(some))
        return made(
            name, folder, [retyped(row, draw) if j == at else row for j, row in enumerate(some)]
        ), "retype"
    path = made(name, folder, some)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return path, damage(draw.choice(files), draw)


def test_mutations_are_rows_or_one_line(tmp_path):
    """Each source damaged: load gives whole rows or raises a ValueError of one line; it never hangs."""
    pytest.importorskip("datasets")
    draw, tokenizer, seen = random.Random(0), GPTTokenizer(), collections.Counter()
    (tmp_path / "base").mkdir()
    prepare.main(["rows", "--from", str(made("a.jsonl", tmp_path / "base", DEEP * 5)), "--out",
                  str(tmp_path / "base" / "set")])  # fmt: skip
    base = {path.name: path.read_bytes() for path in (tmp_path / "base" / "set").iterdir()}

    def hangs(*args):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    for i in range(MUTATIONS):
        name = SOURCES[i % len(SOURCES)]
        path, how = mutated(name, tmp_path / str(i), base, draw)
        signal.alarm(60)
        try:
            report = {}
            train, held, _ = rows.load(str(path), None, 5, tokenizer, 64, report=report)
            for tokens, loss, domain in [*train, *held]:
                spans = [(loss, len(tokens))] if isinstance(loss, int) else loss
                assert spans and all(1 <= a < b <= len(tokens) for a, b in spans) and isinstance(domain, str)
                tokenizer.decode(tokens)
            assert rows.table(report) and all(rows.preview(row, tokenizer) for row in [*train, *held][:3])
            seen[name, "rows"] += 1
        except ValueError as e:
            assert "\n" not in str(e) and str(path) in str(e) and len(str(e)) < 1000, (i, name, how, str(e))
            seen[name, "refused"] += 1
        finally:
            signal.alarm(0)
        shutil.rmtree(tmp_path / str(i))
    signal.signal(signal.SIGALRM, before)
    print("\n".join(f"{name:12} {result:8} {count:5}" for (name, result), count in sorted(seen.items())))
    assert {name for name, result in seen if result == "refused"} == set(SOURCES)
    assert {name for name, result in seen if result == "rows"} >= {"a.jsonl", "a.csv"}
