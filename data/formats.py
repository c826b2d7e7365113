"""Rows as people have them: files and folders to raw rows, raw rows to conversations.

    containers   JSONL, a JSON list, CSV and TSV (each also as .gz), Parquet, a folder saved by
                 `datasets`
    formats      FORMATS, below; told from the first rows, or named

A conversation is a list of turns {"role": "system" | "user" | "assistant", "content": text}; text
for continued pretraining is one turn of role "text". A row that holds none is dropped and counted;
a file that cannot be read is a ValueError of one line, with file, line and remedy.
"""

import contextlib
import csv
import gzip
import hashlib
import importlib
import itertools
import json
import os
import re
import stat
import unicodedata
import zlib

# format: the fields that make it. The first that fits is taken: rows may carry the same text twice.
FORMATS = {"messages": ("messages",), "sharegpt": ("conversations",),
           "instruction": ("instruction", "response"),
           "alpaca": ("instruction", "output"), "prompt": ("prompt", "completion"),
           "text": ("text",)}
MORE = ("input", "context", "history")      # what instruction and alpaca may have beside them
SYSTEM = ("system", "system_prompt")        # what any of them may have
KNOWN = ("domain", "answer", "id")          # of use elsewhere, or no text
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
         "assistant": "assistant",
         **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "bing", "bard", "ai"), "assistant")}
SPOKEN = ("role", "content", "from", "value")       # the fields of a turn
CALLS = ("tool_calls", "function_call")             # of an answer that is none in words
NEEDED = ("rows need " + ", ".join("+".join(fields) for fields in FORMATS.values())
          + "; columns of other names: data/prepare.py rows --from FILE --fields OURS=FILE'S,...")
FILES = "a JSONL, JSON, CSV or Parquet file (.gz too), or a folder saved by datasets"
PACKED = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\3\4": "zip", b"\x28\xb5\x2f\xfd": "zstd"}
MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16",
         b"\xfe\xff": "UTF-16"}
KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}


class Dropped(str):
    """The reason why a row is left out."""


class Row(dict):
    """A raw row as its file has it; `turns` is its conversation."""

    turns: list[dict]


@contextlib.contextmanager
def one_line(what: str, remedy: str):
    """Errors in the block as ValueError(what: their first sentence; remedy)."""
    try:
        yield
    except Exception as e:      # damaged files make the libraries raise anything, KeyError included
        text = " ".join(str(e).split()) or repr(e)
        raise ValueError(f"{what}: {text.split('. ')[0][:300].rstrip('.')}; {remedy}") from e


# ---- Containers: each yields (place, raw row) ----------------------------------------------------


def regular(path, remedy: str = f"give {FILES}") -> None:
    """ValueError unless `path` is a file: a pipe or a device would block or never end."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise ValueError(f"{path}: no such data file; {remedy}") from None
    except (OSError, ValueError) as e:                  # a loop of links, a name that no system has
        raise ValueError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e}); "
                         f"{remedy}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: a {KINDS.get(stat.S_IFMT(mode), 'device')}, no file; {remedy}")


def parsed(data: bytes, path, line: int = 0):
    """The JSON value of one line, or with line = 0 of a whole file."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
        if re.search(rb"\\u[dD][89a-fA-F]", data):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as e:
        at = line or 1 + data.count(b"\n", 0, e.start)
        raise ValueError(f"{path}:{at}: not UTF-8 (byte 0x{data[e.start]:02x}); save the file as "
                         "UTF-8") from None
    except UnicodeEncodeError:
        raise ValueError(f"{path}:{line or 1}: half a surrogate pair, as in \"\\ud800\", is no "
                         "text; mend that row or leave it out") from None
    except RecursionError:
        raise ValueError(f"{path}:{line or 1}: nested too deeply; mend that row or leave it "
                         "out") from None
    except ValueError as e:                 # JSONDecodeError, or an integer of 5000 digits
        raise ValueError(f"{path}:{line or getattr(e, 'lineno', 1)}: not JSON ({e}); give a row a "
                         "line, or one list") from None


def json_rows(path, file, is_list: bool):
    if is_list:
        values = parsed(file.read(), path)
        yield from ((f"{path} row {i}", value) for i, value in enumerate(values, 1))
    else:
        for i, line in enumerate(file, 1):
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield f"{path}:{i}", parsed(line, path, i)


def csv_rows(path, file, tabs: bool):
    """All cells are text; one that is missing is null."""
    def lines():
        for i, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if i == 1 else "utf-8")
            except UnicodeDecodeError as e:
                raise ValueError(f"{path}:{i}: not UTF-8 (byte 0x{line[e.start]:02x}); save the "
                                 "file as UTF-8") from None

    csv.field_size_limit(1 << 30)                       # its own is 128 KiB a cell
    reader = csv.DictReader(lines(), strict=True, delimiter="\t" if tabs else ",")
    try:
        if len(set(reader.fieldnames or ())) < len(reader.fieldnames or ()):
            raise ValueError(f"{path}:1: two columns have one name; rename one")
        for row in reader:
            if None in row:
                raise ValueError(f"{path}:{reader.line_num}: more cells than columns; mend that "
                                 "row")
            yield f"{path}:{reader.line_num}", row
    except csv.Error as e:          # DictReader's own number is that of the last row it gave
        raise ValueError(f"{path}:{reader.reader.line_num}: not CSV ({str(e).split(' - ')[0]}); "
                         "mend that row") from None


def needed(module: str, path):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{path}: reading it needs {module.split('.')[0]}: pip install "
                         "datasets") from None


def arrow_rows(path, batches):
    """Checked first: the library does not look where a damaged file points."""
    i = 0
    for batch in batches:
        batch.validate(full=True)
        for row in batch.to_pylist():
            i += 1
            yield f"{path} row {i}", row


def parquet_rows(path):
    module = needed("pyarrow.parquet", path)
    with one_line(f"{path}: not whole Parquet", "write it again"), module.ParquetFile(path) as file:
        yield from arrow_rows(path, file.iter_batches(1000))


def is_saved(path) -> bool:
    """A folder of datasets' save_to_disk?"""
    return any(os.path.isfile(os.path.join(path, name))
               for name in ("state.json", "dataset_dict.json"))


def saved_rows(path):
    datasets = needed("datasets", path)
    for folder, _, names in os.walk(path):      # the library would wait for a pipe for ever
        for name in names:
            regular(os.path.join(folder, name), "save the folder again with save_to_disk")
    with one_line(f"{path}: no folder saved whole by datasets", "save it again with save_to_disk"):
        data = datasets.load_from_disk(str(path))
        splits = dict(data) if isinstance(data, dict) else {"train": data}
    if "train" not in splits and len(splits) != 1:
        raise ValueError(f"{path}: has the splits {', '.join(splits)}, none of them train; give "
                         f"the folder of one, {os.path.join(path, next(iter(splits), ''))}")
    data = splits.get("train") or next(iter(splits.values()))
    with one_line(f"{path}: no folder saved whole by datasets", "save it again with save_to_disk"):
        yield from arrow_rows(path, data.with_format("arrow").iter(1000))


def records(path):
    """(place, raw row) of all rows of a container, in order; ValueError for what cannot be read."""
    if os.path.isdir(path) and is_saved(path):
        yield from saved_rows(path)
        return
    regular(path)
    try:
        with open(path, "rb") as plain:
            head = plain.read(8)
            kinds = [kind for magic, kind in PACKED.items() if head.startswith(magic)]
            if kinds:
                raise ValueError(f"{path}: packed by {kinds[0]}; unpack it, or pack it by gzip")
            name = str(path).lower()
            if head[:4] == b"PAR1" or name.endswith(".parquet"):
                yield from parquet_rows(path)
                return
            plain.seek(0)
            is_gzip = head[:2] == b"\x1f\x8b"
            with gzip.open(plain) if is_gzip else contextlib.nullcontext(plain) as file:
                head = file.read(1 << 16)
                if kind := next((kind for mark, kind in MARKS.items() if head.startswith(mark)), ""):
                    raise ValueError(f"{path}:1: not UTF-8 but {kind}; save the file as UTF-8 "
                                     f"(iconv -f {kind} -t UTF-8)")
                file.seek(0)
                name = name.removesuffix(".gz")
                if name.endswith((".csv", ".tsv")):
                    yield from csv_rows(path, file, name.endswith(".tsv"))
                else:
                    is_list = head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
                    yield from json_rows(path, file, is_list)
    except (OSError, EOFError, zlib.error) as e:
        why = getattr(e, "strerror", None) or e
        raise ValueError(f"{path}: cannot be read to its end ({why}); copy or download it "
                         "again") from None


# ---- Formats: a raw row to its conversation ------------------------------------------------------


def recognise(some: list[dict], place: str) -> str:
    """The format of the first row that has one; ValueError, naming its fields, if none does."""
    for row in some:
        for name, fields in FORMATS.items():
            if all(row.get(field) is not None for field in fields):
                return name
    there = ", ".join(str(field)[:40] for field in list(some[0])[:8]) or "none"
    raise ValueError(f"{place}: no format has the fields of this row ({there}); {NEEDED}")


def text_of(value, field: str) -> str:
    """The text of a field, empty for null; also of OpenAI's list of parts."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text"
                                       for part in value):
        return "".join(text_of(part.get("text"), field) for part in value)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} in field {field!r}, where text belongs; mend "
                         "that row or leave it out")
    return value or ""


def turns_of(value, field: str) -> list[dict]:
    """Turns of a list of {role, content} (OpenAI) or {from, value} (ShareGPT)."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"field {field!r} is no list of turns; mend that row or leave it out")
    made = []
    for turn in value:
        keys = ("from", "value") if turn.get("from") is not None else ("role", "content")
        role, content = text_of(turn.get(keys[0]), keys[0]), turn.get(keys[1])
        role = next((field for field in CALLS if turn.get(field)), role)
        made.append({"role": ROLES.get(role.lower(), role), "content": text_of(content, keys[1])})
    return made


def conversation(raw: dict, form: str) -> list[dict] | Dropped:
    """The turns of a raw row of a format, or why it has none. ValueError: a wrong type."""
    for field in FORMATS[form]:
        value = raw.get(field)
        blank = isinstance(value, str) and not value.strip()
        if value is None or blank and field != "instruction":       # which may be in `input`
            return Dropped(f"no text in {field!r}")
    first, last = raw[FORMATS[form][0]], raw[FORMATS[form][-1]]
    if form == "text":
        return [{"role": "text", "content": text_of(first, form)}]
    if form in ("messages", "sharegpt"):
        made = turns_of(first, FORMATS[form][0])
    elif form == "prompt":
        made = []
        for value, field, role in ((first, "prompt", "user"), (last, "completion", "assistant")):
            made += turns_of(value, field) if isinstance(value, list) else [
                {"role": role, "content": text_of(value, field)}]
    else:
        history = raw.get("history") or []
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2
                                                    for pair in history):
            raise ValueError("field 'history' is no list of pairs; mend that row or leave it out")
        question = [text_of(raw.get(field), field) for field in ("instruction", "input", "context")]
        texts = [text_of(text, "history") for pair in history for text in pair]
        texts += ["\n".join(text for text in question if text), text_of(last, FORMATS[form][-1])]
        made = [{"role": ("user", "assistant")[i % 2], "content": text}
                for i, text in enumerate(texts)]
    system = next((text_of(raw[field], field) for field in SYSTEM if raw.get(field) is not None), "")
    asked = [*itertools.dropwhile(lambda turn: turn["role"] == "system", made)]
    said = [turn["content"] for turn in made[:len(made) - len(asked)] if turn["content"].strip()]
    if said := said or [system] * bool(system.strip()):         # one turn: no template takes two
        asked.insert(0, {"role": "system", "content": "\n\n".join(said)})
    made = asked
    roles = [turn["role"] for turn in made]
    if other := [role for role in roles if role not in ROLES]:
        return Dropped(f"a turn of role {other[0][:40]!r}")
    if not all(turn["content"].strip() for turn in made):
        return Dropped("an empty turn" if len(made) > 2 else f"no text in {FORMATS[form][0]!r}")
    if "assistant" not in roles or roles[roles[0] == "system"] != "user":
        return Dropped("no answer to a question")
    return made


def domain_of(row: dict) -> str:
    """Its `domain`, or "all" where that is missing or no text (null, as tables write a gap)."""
    domain = row.get("domain")
    return domain if isinstance(domain, str) and domain else "all"


def text_key(turns: list[dict]) -> int:
    """64 bits that equal texts share, whatever their format, blanks, system prompt, spelling of
    accents, and turns behind the last answer, which is where training stops."""
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    parts = [f"{turn['role']}:{' '.join(turn['content'].split())}" for turn in turns[:last + 1]
             if turn["role"] != "system"]
    joined = unicodedata.normalize("NFC", "\0".join(parts)).encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big")


# ---- Reading, with an account of it --------------------------------------------------------------


def entry(report: dict | None, name: str) -> dict:
    """The account of one source in a report: {reason: [rows, place of the first]} in `dropped`."""
    empty = {"format": "", "read": 0, "kept": 0, "cut": 0, "doubled": 0, "dropped": {}, "notes": {}}
    return ({} if report is None else report).setdefault(name, empty)


def drop(account: dict, reason: str, place: str = "") -> None:
    account["dropped"].setdefault(reason, [0, place])[0] += 1


def note(account: dict, text: str, count: int = 1) -> None:
    account["notes"][text] = account["notes"].get(text, 0) + count


def usable(pairs, path, form: str | None, account: dict):
    """A `Row` of each (place, raw row) that holds a conversation; the account counts the others."""
    if form is not None and form not in FORMATS:
        raise ValueError(f"--format {form}: give one of {', '.join(FORMATS)}, or none to have it "
                         "recognised")
    pairs = iter(pairs)
    some = list(itertools.islice(pairs, 100))
    for place, raw in itertools.chain(some, pairs):
        account["read"] += 1
        if raw is None:
            drop(account, "a row of null", place)
            continue
        if not isinstance(raw, dict):
            raise ValueError(f"{place}: a {type(raw).__name__}, not an object with fields; "
                             f"{NEEDED}")
        if form is None:
            wrong = next((w for w, r in some if not isinstance(r, (dict, type(None)))), None)
            form = recognise([r for _, r in some if isinstance(r, dict)], wrong or place)
        account["format"] = form
        used = {*FORMATS[form], *KNOWN, *SYSTEM,
                *(MORE if form in ("instruction", "alpaca") else ())}
        for field, value in raw.items():
            if field not in used and value is not None:
                note(account, f"field {field[:40]!r} is not used")
            turns = value if field in used and isinstance(value, list) else ()
            for name in dict.fromkeys(name for turn in turns if isinstance(turn, dict) for name in turn
                                      if turn[name] is not None and name not in (*SPOKEN, *CALLS)):
                note(account, f"field {str(name)[:40]!r} of a turn is not used")
        try:
            turns = conversation(raw, form)
        except ValueError as e:
            raise ValueError(f"{place}: {e}") from None
        if isinstance(turns, Dropped):
            drop(account, turns, place)
            continue
        row = Row(raw)
        row.turns = turns
        account["kept"] += 1
        yield row


def read_rows(path, form: str | None = None, report: dict | None = None) -> list[Row]:
    """The usable rows of a container, each the dict that it is there, with its `turns`."""
    account = entry(report, str(path))
    rows = list(usable(records(path), path, form, account))
    if not account["read"]:
        raise ValueError(f"{path}: holds no rows; {NEEDED}")
    if not account["kept"]:
        reason, (count, place) = next(iter(account["dropped"].items()))
        raise ValueError(f"{place}: {reason}, and no row is left of {account['read']}; {NEEDED}")
    return rows
