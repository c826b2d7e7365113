"""Rows to train on: of files, prepared sets and weighted lists of both; held out, in step batches.

A row of the training loop is (tokens, loss, domain). `loss` is the number of tokens of the prompt,
where the loss covers all that follows, or else the list of (start, stop) of the tokens that it
covers: the answers of a conversation. A prepared set (data/prepare.py makes it) is a folder:

    tokens.bin      token ids of all rows, one row after the other, uint16 or uint32
    index.bin       INDEX of each row: where it starts, its length, where its first answer starts,
                    domain, hash of its text, and its place in spans.bin with its number of answers
                    (0: all behind the prompt)
    spans.bin       (start, stop) of the answers of rows that have several, uint32
    manifest.json   source, what was kept and dropped, tokenizer, size and digest of the other
                    files and of itself
    verified.json   size and time of these files when their digests were last found right

The files are mapped, not read: a row becomes a list when it is asked for.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data.formats import (
    FILES,
    Dropped,
    Row,
    conversation,
    domain_of,
    drop,
    entry,
    is_saved,
    note,
    read_rows,
    recognise,
    regular,
    text_key,
)
from data.tokenizer import TemplateError

FORMAT = 2
INDEX = np.dtype([("start", "<u8"), ("length", "<u4"), ("prompt", "<u4"), ("domain", "<u4"),
                  ("turns", "<u4"),
                  ("hash", "<u8"), ("spans", "<u8")])
DTYPES = ("<u2", "<u4")                 # of tokens.bin; NumPy knows others, among them pointers
PARTS = ("tokens.bin", "index.bin", "spans.bin")


def seed_of(*parts) -> int:
    """A 63-bit seed, by the training loop's formula, written again: data/ imports nothing of it."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


# ---- Rows of one file, held as lists -------------------------------------------------------------


def turns_of(row: dict) -> list[dict]:
    """The conversation of a row that `read_rows` gave, or of a plain dict in one of the formats."""
    turns = row.turns if isinstance(row, Row) else conversation(row, recognise([row], "a row"))
    if isinstance(turns, Dropped):
        raise ValueError(f"a row has {turns}")
    return turns


def questions(path: str, form: str | None = None) -> list[dict]:
    """Rows to be asked: their fields, with the last answer as `response`, and as `instruction` the
    question, or all turns before that answer where there are several."""
    made = []
    for row in read_rows(path, form):
        *before, answer = row.turns
        if answer["role"] != "assistant" or not before:
            raise ValueError(f"{path}: row {len(made) + 1} does not end with an answer to a "
                             "question; leave it out")
        question = before[0]["content"] if len(before) == 1 else before
        made.append(row | {"instruction": question, "response": answer["content"]})
    return made


def held_out_number(rows: int) -> int:
    """5 %, at most 500, at least one."""
    return max(1, min(500, round(0.05 * rows)))


def hold_out(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """(train, held out): 5 % of the texts, at most 500, by hash, so that equal texts stay together.

    Rows of one text go where the smallest of their own hashes goes.
    """
    keys = [hashlib.blake2b(json.dumps(row, sort_keys=True, default=str).encode()).digest()
            for row in rows]
    texts, first = [text_key(turns_of(row)) for row in rows], {}
    for text, key in zip(texts, keys):
        first[text] = min(key, first.get(text, key))
    number = held_out_number(len(first))
    chosen = set(sorted(first, key=first.get)[:number])
    return ([row for row, text in zip(rows, texts) if text not in chosen],
            [row for row, text in zip(rows, texts) if text in chosen])


def trained(tokens: list[int], spans, block_size: int, loss: str = "all"):
    """(tokens, loss) cut at block_size and behind the last token of the loss; None if none is left.

    spans       (start, stop) of the answers, from the left
    loss        "all" answers, or the "last" one alone
    """
    spans = spans[-1:] if loss == "last" else spans
    tokens = tokens[:min(block_size, spans[-1][1])]
    spans = [(max(a, 1), min(b, len(tokens))) for a, b in spans if max(a, 1) < len(tokens)]
    if not spans:
        return None
    return tokens, spans[0][0] if len(spans) == 1 else spans


def encode(rows, tokenizer, block_size: int, what: str, *, loss: str = "all",
           report: dict | None = None,
           progress: bool = False) -> list[tuple]:
    """(tokens, loss, domain) a row, cut on the right at block_size, dropped if no loss is left."""
    encoded, account, before = [], entry(report, what), dict(tokenizer.counts)
    for row in tqdm(rows, desc=f"tokenize {what}", unit="row",
                    disable=not progress or len(rows) < 20_000):
        account["read"] += 1
        try:
            tokens, spans = tokenizer.conversation(turns_of(row))
        except TemplateError as e:
            drop(account, f"refused by the chat template ({e})")
            continue
        if (made := trained(tokens, spans, block_size, loss)) is None:
            drop(account, f"no answer within --block_size {block_size}")
            continue
        account["cut"] += spans[-1][1] > block_size
        encoded.append((*made, domain_of(row)))
    account["kept"] = len(encoded)
    for text, count in tokenizer.counts.items():
        if count > before.get(text, 0):
            note(account, text, count - before.get(text, 0))
    return encoded


# ---- Prepared sets, and lists of them ------------------------------------------------------------


class TokenFile(NamedTuple):
    """One source: token ids, INDEX and (n, 2) span arrays, domains, path, digest of all that."""

    tokens: np.ndarray
    index: np.ndarray
    spans: np.ndarray
    domains: list[str]
    name: str
    digest: str


def pack(rows, tokenizer, dtype=np.uint32, account: dict | None = None):
    """(tokens, index, spans, domains) of (turns, domain) rows, uncut; refused ones are counted."""
    account = entry(None, "") if account is None else account
    parts, index, spans, domains, start = [], [], [], {}, 0
    for turns, domain in rows:
        try:
            tokens, mine = tokenizer.conversation(turns)
        except TemplateError as e:
            drop(account, f"refused by the chat template ({e})")
            continue
        tokens, several = tokens[:mine[-1][1]], mine if len(mine) > 1 else []
        number = domains.setdefault(domain, len(domains))
        index.append((start, len(tokens), max(1, mine[0][0]), number, len(several), text_key(turns),
                      len(spans)))
        parts.append(np.array(tokens, dtype))
        spans += several
        start += len(tokens)
    account["kept"] = len(index)
    tokens = np.concatenate(parts) if parts else np.zeros(0, dtype)
    return tokens, np.array(index, INDEX), np.array(spans, "<u4").reshape(-1, 2), list(domains)


# What a tokenizer does with this tells it from others: words, digits, code, scripts, white space.
PROBE = ("The 3 quick brown foxes aren't 12,345.67 km away.\n\n\tdef f(x):\n        return x**2  # "
         "twice\nGröße, naïve café, Привет мир, 你好世界, שלום, 😀 ∑ₖ∂ℒ/∂W ≤ ∞   "
         "\r\n<b>\\frac{1}{2}</b>")


def identity(tokenizer) -> str:
    """A digest that equal tokenizers share. A chat template is its text: it may print a date."""
    hf = getattr(tokenizer, "hf", None)
    if hf is not None:
        parts = [hf.chat_template, len(hf), hf(PROBE)["input_ids"], tokenizer.response(PROBE)]
    else:
        parts = [tokenizer.vocabulary, tokenizer.prompt(PROBE), tokenizer.response(PROBE)]
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def digest(path) -> list:
    """[size, blake2b] of a file."""
    h, size = hashlib.blake2b(digest_size=32), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            h.update(block)
            size += len(block)
    return [size, h.hexdigest()]


def seal(manifest: dict) -> str:
    """Digest of a manifest without its own entry `digest`."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=32).hexdigest()


def read_manifest(folder) -> dict:
    """The manifest of a prepared set; ValueError if it is none, of another format, or changed."""
    path, again = Path(folder) / "manifest.json", "make it again with data/prepare.py"
    if not os.path.lexists(path):
        raise ValueError(f"{folder}: no prepared set, which has a manifest.json, nor a folder saved by "
                         f"datasets; give a file in it, or {again}")
    regular(path, again)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        form, known = manifest["format"], manifest.get("digest")
        if form == FORMAT:
            files, domains = manifest["files"], manifest["domains"]
            settings = [manifest["settings"][key] for key in ("tokenizer", "model")]
            right = (all(isinstance(x, str) for x in [*domains, *settings])
                     and manifest["dtype"] in DTYPES
                     and all(isinstance(files[name], list) and len(files[name]) == 2
                             for name in PARTS))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path}: not a prepared set's manifest ({type(e).__name__}); "
                         f"{again}") from None
    if form != FORMAT:
        raise ValueError(f"{folder} is of format {str(form)[:40]}, this program reads format "
                         f"{FORMAT}; {again}")
    if not right or known != seal(manifest):
        raise ValueError(f"{path}: not as it was written; {again}")
    return manifest


def temporary(path: Path) -> Path:
    """A name beside `path` that no other process of any host takes."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def verify(folder: Path, files: dict) -> bool:
    """Compare the digests of a set's files, once for each size and time; was it done now?"""
    for name in PARTS:
        regular(folder / name, "make it again with data/prepare.py")
        if (there := (folder / name).stat().st_size) != files[name][0]:
            raise ValueError(f"{folder / name} has {there} of its {files[name][0]} bytes; make it "
                             "again with data/prepare.py")
    stamp = {name: [*files[name], (folder / name).stat().st_mtime_ns] for name in PARTS}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        known = folder / "verified.json"
        if known.is_file() and json.loads(known.read_text()) == stamp:
            return False
    for name in PARTS:
        if digest(folder / name) != files[name]:
            raise ValueError(f"{folder / name} has other bytes than data/prepare.py wrote; make it "
                             "again")
    with contextlib.suppress(OSError):          # a folder not to be written is compared every time
        new = temporary(folder / "verified.json")
        new.write_text(json.dumps(stamp))
        new.replace(folder / "verified.json")
    return True


def open_prepared(folder: str, tokenizer, report: dict | None = None) -> TokenFile:
    """A prepared set, mapped; ValueError if it is damaged, or of another format or tokenizer."""
    path, manifest = Path(folder), read_manifest(folder)
    files, domains = manifest["files"], manifest["domains"]
    if manifest["settings"]["tokenizer"] != identity(tokenizer):
        raise ValueError(f"{folder} holds tokens of {manifest['settings']['model']}, whose "
                         "tokenizer is not this --model's; prepare it for this model, under "
                         "another --out")
    again = "is not as data/prepare.py writes it; make it again"
    changed = verify(path, files)
    for name, dtype in zip(PARTS, kinds := (np.dtype(manifest["dtype"]), INDEX, np.dtype("<u4,<u4"))):
        if files[name][0] % dtype.itemsize:
            raise ValueError(f"{path / name} {again}")
    tokens, index, spans = (np.memmap(path / name, dtype, "r") if files[name][0]
                            else np.zeros(0, dtype) for name, dtype in zip(PARTS, kinds))
    spans = spans.view("<u4").reshape(-1, 2)
    vocabulary = tokenizer.vocabulary if hasattr(tokenizer, "vocabulary") else len(tokenizer.hf)
    if (not within(index["start"], index["length"], len(tokens)) or not (index["length"] > 0).all()
            or not within(index["spans"], index["turns"], len(spans))
            or not (index["domain"] < len(domains)).all()
            or changed and len(tokens) and tokens.max() >= vocabulary):
        raise ValueError(f"{path} {again}")
    entry(report, str(folder)).update(format="prepared", read=len(index), kept=len(index))
    return TokenFile(tokens, index, spans, domains, str(folder), repr([files[name] for name in PARTS]))


def within(start, length, total: int) -> bool:
    """Do parts from `start` on, all of them, end within `total`?"""
    return bool(((start <= total) & (length <= total - np.minimum(start, total))).all())


def packed(path: str, tokenizer, form: str | None = None, report: dict | None = None,
           progress: bool = False) -> TokenFile:
    """A file as one of the sources of a list, in memory, four bytes a token."""
    rows = read_rows(path, form, report)
    bar = tqdm(rows, desc=f"tokenize {path}", unit="row",
               disable=not progress or len(rows) < 20_000)
    made = pack(((row.turns, domain_of(row)) for row in bar), tokenizer,
                account=entry(report, path))
    digest = hashlib.blake2b(b"".join(x.tobytes() for x in made[:3]) + repr(made[3]).encode(),
                             digest_size=16)
    return TokenFile(*made, path, digest.hexdigest())


class Rows(Sequence):
    """(tokens, loss, domain) rows of several sources, each made when it is asked for.

    files       the sources
    which, at   (rows,) source and row of each
    block_size  tokens a row, at most
    shares      of an epoch's rows, one a source; None: every row once
    loss        "all" answers or the "last"
    """

    def __init__(self, files: list[TokenFile], which, at, block_size: int, shares=None,
                 loss: str = "all"):
        self.files, self.which, self.at = files, which, at
        self.block_size, self.shares, self.loss = block_size, shares, loss

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, j):
        if isinstance(j, slice):
            return self.take(np.arange(len(self))[j])
        file = self.files[self.which[j]]
        start, length, prompt, domain, turns, _, at = file.index[self.at[j]].item()
        tokens = file.tokens[start:start + min(length, self.block_size)].tolist()
        spans = [tuple(span) for span in file.spans[at:at + turns].tolist()] or [(prompt, length)]
        return (*trained(tokens, spans, self.block_size, self.loss), file.domains[domain])

    def take(self, positions) -> "Rows":
        return Rows(self.files, self.which[positions], self.at[positions], self.block_size,
                    self.shares, self.loss)

    def column(self, name: str) -> np.ndarray:
        """One column of the index, for all rows."""
        result = np.empty(len(self), INDEX[name])
        for k, file in enumerate(self.files):
            mine = self.which == k
            result[mine] = file.index[name][self.at[mine]]
        return result

    def starts(self) -> np.ndarray:
        """Where the loss of each row begins."""
        result = self.column("prompt")
        for k, file in enumerate(self.files) if self.loss == "last" else ():
            chosen = file.index[self.at[self.which == k]]
            last = (chosen["spans"] + chosen["turns"])[chosen["turns"] > 0].astype(int) - 1
            result[np.flatnonzero(self.which == k)[chosen["turns"] > 0]] = file.spans[last, 0]
        return result

    def lengths(self) -> np.ndarray:
        return np.minimum(self.column("length"), self.block_size)

    def hold_out(self) -> tuple["Rows", "Rows"]:
        """As the function of that name; held-out rows in the order of their hashes, so mixed."""
        keys = self.column("hash")
        chosen = np.unique(keys)
        held = np.isin(keys, chosen[:held_out_number(len(chosen))])
        at = np.flatnonzero(held)
        return self.take(~held), self.take(at[np.argsort(keys[at], kind="stable")])

    def draws(self) -> list[int]:
        """Rows an epoch takes of each source; in all as many as there are."""
        if self.shares is None:
            return np.bincount(self.which, minlength=len(self.files)).tolist()
        exact = np.array(self.shares) / sum(self.shares) * len(self)
        draws = np.floor(exact).astype(int)
        largest = np.argsort(draws - exact, kind="stable")      # remainders
        for k in largest[:len(self) - draws.sum()]:
            draws[k] += 1
        return draws.tolist()

    def order(self, generator: torch.Generator) -> list[int]:
        """Positions of one epoch. A source gives no row again before it has given all of them."""
        if self.shares is None:
            return torch.randperm(len(self), generator=generator).tolist()
        chosen = []
        for k, draws in enumerate(self.draws()):
            mine = torch.from_numpy(np.flatnonzero(self.which == k))
            times = [mine[torch.randperm(len(mine), generator=generator)]
                     for _ in range(-(-draws // len(mine)))]
            chosen += [torch.cat(times)[:draws]] if times else []
        chosen = torch.cat(chosen)
        return chosen[torch.randperm(len(chosen), generator=generator)].tolist()

    def digest(self) -> str:
        place = hashlib.blake2b(self.which.tobytes() + self.at.tobytes(),
                                digest_size=16).hexdigest()
        return repr([[file.digest for file in self.files], place, self.block_size, self.shares,
                     self.loss])


# ---- What --data, --eval_data and --eval mean ----------------------------------------------------


def weighted(item: str) -> tuple[float | None, str]:
    """(weight or None, path) of "0.7:a.jsonl". A drive's letter (E:/a.jsonl) is no weight."""
    match = re.fullmatch(r"([+-]?\.?[0-9][0-9.eE+-]*):(.+)", item.strip())
    if os.path.exists(item.strip()) or not match:
        return None, item.strip()
    try:
        weight = float(match[1])
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(f"{item}: the weight of a source must be a finite number above 0")
    return weight, match[2]


def split_list(text: str) -> list[str]:
    """Items of a comma-separated list; the path of a file that is there may have commas."""
    items, pieces = [], text.split(",")
    while pieces:
        whole = (k for k in range(len(pieces), 1, -1)
                 if os.path.exists(weighted(",".join(pieces[:k]))[1]))
        k = next(whole, 1)
        items.append(",".join(pieces[:k]).strip())
        del pieces[:k]
    return items


def sources(text: str) -> list[tuple[float | None, str]]:
    """(weight or None, path) of a path or a comma-separated list "0.7:a.jsonl,0.3:prepared/b"."""
    found = [weighted(item) for item in split_list(text)]
    if len({weight is None for weight, _ in found}) > 1:
        raise ValueError(f"{text}: give a weight to every source (0.7:a.jsonl,0.3:b.jsonl) or to "
                         "none")
    for _, path in found:
        if not os.path.exists(path) and not os.path.islink(path):
            begun = os.path.isdir(path + ".tmp")
            raise ValueError(f"{path}: no such data file or prepared set; " + (
                "its preparation was cut off: start that command again, it goes on" if begun else
                f"give {FILES}, or prepare a set (data/prepare.py --list)"))
    return found


def is_prepared(path: str) -> bool:
    return os.path.isdir(path) and not is_saved(path)


def open_rows(text: str, tokenizer, block_size: int, what: str, *, format: str | None = None,
              loss: str = "all",
              report: dict | None = None, progress: bool = False) -> Rows:
    """All rows that a list of sources has, without those that keep no answer at block_size."""
    listed = sources(text)
    files = [open_prepared(path, tokenizer, report) if is_prepared(path) else
             packed(path, tokenizer, format, report, progress) for _, path in listed]
    shares = [weight for weight, _ in listed] if listed[0][0] is not None else None
    which = np.concatenate([np.full(len(file.index), k, np.uint16) for k, file in enumerate(files)])
    at = np.concatenate([np.arange(len(file.index), dtype=np.uint32) for file in files])
    rows = Rows(files, which, at, block_size, shares, loss)
    account, fits = entry(report, what), rows.starts() < np.minimum(rows.column("length"),
                                                                    block_size)
    account["read"] = len(rows)
    account["cut"] = int((rows.column("length")[fits] > block_size).sum())
    rows = rows.take(fits)
    account["kept"] = len(rows)
    if not fits.all():
        account["dropped"][f"no answer within --block_size {block_size}"] = [int((~fits).sum()), ""]
    for k, file in enumerate(files):
        if not (rows.which == k).any():
            raise ValueError(f"{file.name}: no row has an answer within --block_size {block_size}; "
                             "give a larger one, or leave that source out")
    return rows


def text_keys(rows) -> list[int]:
    return rows.column("hash").tolist() if isinstance(rows, Rows) else [text_key(turns_of(row))
                                                                        for row in rows]


def load(data: str, eval_data: str | None, eval_rows: int, tokenizer, block_size: int, *,
         format: str | None = None,
         loss: str = "all", report: dict | None = None, progress: bool = False):
    """(rows to train on, at most eval_rows held-out rows, hash of both) of --data and --eval_data.

    format      of the rows of files, a key of FORMATS; None: recognised
    loss        on "all" answers of a conversation, or the "last"
    report      a dict that is filled by what was read, dropped, cut and doubled (`table` prints it)

    Rows of one file are a list; of anything else `Rows`, which leaves the tokens on the disk.
    """
    def plain(text):
        (weight, path), *more = sources(text)
        return weight is None and not more and not is_prepared(path)

    def opened(text, what):
        if plain(text):
            return read_rows(sources(text)[0][1], format, report)
        return open_rows(text, tokenizer, block_size, what, **how)

    if loss not in ("all", "last"):
        raise ValueError(f"--loss {loss}: give all or last")
    report = {} if report is None else report
    how, held = {"loss": loss, "report": report, "progress": progress}, None
    if eval_data and sources(eval_data)[0][0] is not None:
        raise ValueError(f"--eval_data {eval_data}: every row is evaluated, so its sources have no "
                         "weights")
    rows = opened(data, "to train on")
    keys = text_keys(rows)
    doubled = len(keys) - len(set(keys))
    if eval_data:
        held = opened(eval_data, "held out")
        if isinstance(held, Rows):      # the first rows are a sample of all
            held = held.take(np.argsort(held.column("hash"), kind="stable"))
        also = len({*text_keys(held)} & set(keys))
    else:
        rows, held = rows.hold_out() if isinstance(rows, Rows) else hold_out(rows)
        also = 0
    if isinstance(rows, Rows):
        for k, file in enumerate(rows.files):
            if not (rows.which == k).any():
                raise ValueError(f"{file.name}: all its rows are held out; give more, or "
                                 "--eval_data")
        report["to train on"]["kept"] = len(rows)
    else:
        rows = encode(rows, tokenizer, block_size, "to train on", **how)
    held = held[:eval_rows]
    if isinstance(held, Rows):
        held = list(held)
        entry(report, "held out").update(read=len(held), kept=len(held))
    else:
        held = encode(held, tokenizer, block_size, "held out", **how)
        if not eval_data and isinstance(rows, list):    # what --block_size has cut may be equal by now
            there, account = {tuple(row[0]) for row in held}, report["to train on"]
            rows = [row for row in rows if tuple(row[0]) not in there]
            if also_held := account["kept"] - len(rows):
                account["dropped"]["equal to a held-out row within --block_size"] = [also_held, ""]
                account["kept"] = len(rows)
    report["to train on"]["doubled"] = doubled
    if also:
        note(report["held out"], "texts of --eval_data that are trained on too", also)
    if isinstance(rows, Rows) and rows.shares is not None:
        for file, draws, there in zip(rows.files, rows.draws(), np.bincount(rows.which)):
            note(report["to train on"], f"{file.name}: {draws} of an epoch's {len(rows)} rows, "
                                        f"each of its {there} rows "
                 f"{draws / there:.2f} times", 0)
    seen = (rows.digest() if isinstance(rows, Rows) else rows, held)
    return rows, held, hashlib.blake2b(repr(seen).encode(), digest_size=16).hexdigest()


def table(report: dict) -> str:
    """What was read, kept, cut, doubled and dropped, a line a source, reasons and notes below."""
    lines = [f"{'rows of':24} {'format':11} {'read':>8} {'kept':>8} {'cut':>6} {'doubled':>7} "
             f"{'dropped':>7}"]
    for name, a in report.items():
        dropped = sum(count for count, _ in a["dropped"].values())
        lines.append(f"{name[-40:]:24} {a['format'] or '':11} {a['read']:8} {a['kept']:8} "
                     f"{a['cut']:6} {a['doubled']:7} {dropped:7}")
        lines += [f"  {count} dropped: {reason}" + (f" ({place} the first)" if place else "")
                  for reason, (count, place) in a["dropped"].items()]
        lines += [f"  {text}" + (f" ({count} rows)" if count else "") for text,
                  count in a["notes"].items()]
    return "\n".join(lines)


def preview(row, tokenizer, width: int = 300) -> str:
    """One row's tokens as text, in lines: "+" before what the loss covers, "-" before the rest."""
    tokens, loss = row[0], row[1]
    spans, lines, at = [(loss, len(tokens))] if isinstance(loss, int) else loss, [], 0
    for start, stop in [*spans, (len(tokens), len(tokens))]:
        for sign, a, b in (("-", at, start), ("+", start, stop)):
            text = json.dumps(tokenizer.decode(tokens[a:b]), ensure_ascii=False)[1:-1]
            text = text if len(text) <= width else f"{text[:width // 2]} ... {text[-width // 2:]}"
            lines += [f"{sign} {b - a:4} tokens: {text}"] if b > a else []
        at = stop
    return "\n".join(lines)


def enough(args, rows, held) -> None:
    """ValueError where --data leaves no whole batch or nothing held out."""
    if len(rows) < args.batch_size or not held:
        raise ValueError(f"{args.data}: {len(rows)} rows to train on, {len(held)} held out: too "
                         f"few for --batch_size {args.batch_size}; give more rows or a larger "
                         "--block_size")


def lengths(rows) -> np.ndarray:
    """Tokens of every row."""
    return rows.lengths() if isinstance(rows, Rows) else np.array([len(row[0]) for row in rows])


def step_batches(rows, batch_size: int, seed: int, start: int = 0):
    """Endless step batches of (tokens, loss), ordered by the seed alone, without partial batches.

    start       batches left out at the beginning, without a row of them being read
    """
    epoch, skipped = divmod(start, len(rows) // batch_size)
    while True:
        generator = torch.Generator().manual_seed(seed_of("epoch", seed, epoch))
        order = (rows.order(generator) if isinstance(rows, Rows) else
                 torch.randperm(len(rows), generator=generator).tolist())
        for a in range(skipped * batch_size, len(rows) - batch_size + 1, batch_size):
            yield [rows[j][:2] for j in order[a:a + batch_size]]
        epoch, skipped = epoch + 1, 0


def packed_batches(batches, K: int, block_size: int, vocabulary: int):
    """The step batches with the rows of each shard one after the other, in as few blocks as fit.

    Shards get equally many blocks, of at most block_size tokens. The token that begins a row is
    `vocabulary` more than it is, which no target ever is: by that a model keeps rows apart.
    """
    def joined(rows):
        tokens, places = [], []
        for row, loss in rows:
            spans = [(loss, len(row))] if isinstance(loss, int) else loss
            places += [(max(a, 1) + len(tokens), min(b, len(row)) + len(tokens)) for a, b in spans]
            tokens += [row[0] + vocabulary, *row[1:]]
        return tokens, places

    def dealt(rows, number):
        """`number` blocks of these rows, the longest first into the emptiest; None if one overflows."""
        made, sizes = [[] for _ in range(number)], [0] * number
        for row in sorted(rows, key=lambda row: -len(row[0])):
            k = sizes.index(min(sizes))
            made[k].append(row)
            sizes[k] += len(row[0])
        return made if max(sizes) <= block_size else None

    for batch in batches:
        size = len(batch) // K
        mini = [batch[i * size:(i + 1) * size] for i in range(K)]
        least = max(-(-sum(len(row[0]) for row in rows) // block_size) for rows in mini)
        for number in range(max(1, least), size + 1):
            if all(shards := [dealt(rows, number) for rows in mini]):
                break
        yield [joined(rows) for shard in shards for rows in shard]
