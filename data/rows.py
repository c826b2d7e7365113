"""Rows to train on: of JSONL files, prepared sets and weighted lists of both; held out, in step batches.

A prepared set (data/prepare.py makes it) is a folder:

    tokens.bin      token ids of all rows, one row after the other, uint16 or uint32
    index.bin       per row: where it starts, its length, the length of its prompt, domain, hash of its tokens
    manifest.json   source, what was kept and dropped, tokenizer, size and digest of both files

The loss covers the tokens behind the prompt: that length is the row's loss mask. Both files are mapped, not
read: a row becomes a list when it is asked for.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import hd_pissa
from training.processes import say

FORMAT = 1
INDEX = np.dtype([("start", "<u8"), ("length", "<u4"), ("prompt", "<u4"), ("domain", "<u2"), ("hash", "<u8")])


# ---- One JSONL file, held as lists -------------------------------------------------------------------------


def read_rows(path: str) -> list[dict]:
    """Rows of a JSONL file; ValueError with file and line for one that cannot be trained on."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such data file; give a JSONL file with instruction and response a row")
    rows = []
    with open(path, encoding="utf-8") as lines:
        for i, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as e:
                raise ValueError(f"{path}:{i}: not JSON ({e})") from None
            for field in ("instruction", "response"):
                if not isinstance(row, dict) or not isinstance(row.get(field), str) or not row[field]:
                    raise ValueError(f"{path}:{i}: no text in {field!r}; rows need instruction and response")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: holds no rows; give one with instruction and response a row")
    return rows


def domain_of(row: dict) -> str:
    """Its `domain`, or "all" where that is missing or no text (null, say, as tables write a gap)."""
    domain = row.get("domain")
    return domain if isinstance(domain, str) and domain else "all"


def held_out_number(rows: int) -> int:
    """5 %, at most 500, at least one."""
    return max(1, min(500, round(0.05 * rows)))


def hold_out(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """(train, held out): 5 % of the rows, at most 500, chosen by hash, so that equal rows stay together."""
    keys = [hashlib.blake2b(json.dumps(row, sort_keys=True).encode()).digest() for row in rows]
    chosen = set(sorted(set(keys))[:held_out_number(len(set(keys)))])
    return ([row for row, key in zip(rows, keys) if key not in chosen],
            [row for row, key in zip(rows, keys) if key in chosen])


def encode(rows: list[dict], tokenizer, block_size: int, what: str) -> list[tuple[list[int], int, str]]:
    """(tokens, prompt length, domain) a row, cut on the right at block_size, dropped without a response."""
    encoded, cut, dropped = [], 0, 0
    quiet = hd_pissa.process_index() > 0 or len(rows) < 20_000
    for row in tqdm(rows, desc=f"tokenize {what}", unit="row", disable=quiet):
        prompt = tokenizer.prompt(row["instruction"])
        tokens = prompt + tokenizer.response(row["response"])
        cut += len(tokens) > block_size
        if len(prompt) >= block_size:
            dropped += 1
            continue
        encoded.append((tokens[:block_size], len(prompt), domain_of(row)))
    say(f"{what}: {len(encoded)} rows, {cut - dropped} cut at --block_size {block_size}, "
        f"{dropped} dropped because no response was left")
    return encoded


# ---- Prepared sets, and lists of them ----------------------------------------------------------------------


class TokenFile(NamedTuple):
    """One source of rows: token ids, an INDEX array, names of the domains, path, digest of all that."""

    tokens: np.ndarray
    index: np.ndarray
    domains: list[str]
    name: str
    digest: str


def pack(rows, tokenizer, dtype=np.uint32) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Tokens, index and domains of (instruction, response, domain) rows, uncut.

    The hash is that of the tokens and the prompt's length, so that equal rows are equal in every source.
    """
    parts, index, domains, start = [], [], {}, 0
    for instruction, response, domain in rows:
        prompt = tokenizer.prompt(instruction)
        tokens = np.array(prompt + tokenizer.response(response), dtype="<u4")
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=8, salt=len(prompt).to_bytes(8, "little"))
        number = domains.setdefault(domain, len(domains))
        index.append((start, len(tokens), len(prompt), number, int.from_bytes(digest.digest(), "little")))
        parts.append(tokens.astype(dtype))
        start += len(tokens)
    tokens = np.concatenate(parts) if parts else np.zeros(0, dtype)
    return tokens, np.array(index, INDEX), list(domains)


# What a tokenizer does with this tells it from others: words, digits, code, several scripts, white space.
PROBE = ("The 3 quick brown foxes aren't 12,345.67 km away.\n\n\tdef f(x):\n        return x**2  # twice\n"
         "Größe, naïve café, Привет мир, 你好世界, שלום, 😀 ∑ₖ∂ℒ/∂W ≤ ∞   \r\n<b>\\frac{1}{2}</b>")


def identity(tokenizer) -> str:
    """A digest that equal tokenizers share. A chat template counts as its text: it may print today's date."""
    hf = getattr(tokenizer, "hf", None)
    if hf is not None:
        parts = [hf.chat_template, len(hf), hf(PROBE)["input_ids"], tokenizer.response(PROBE)]
    else:
        parts = [tokenizer.vocabulary, tokenizer.prompt(PROBE), tokenizer.response(PROBE)]
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def open_prepared(folder: str, tokenizer) -> TokenFile:
    """A prepared set, mapped; ValueError if it is damaged, of another format or of another tokenizer."""
    path = Path(folder)
    again = "make it again with data/prepare.py"
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        form, files, domains = manifest["format"], manifest["files"], manifest["domains"]
        known, model = manifest["settings"]["tokenizer"], manifest["settings"]["model"]
    except FileNotFoundError:
        raise ValueError(f"{folder}: no manifest.json, so no prepared set; {again}") from None
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path / 'manifest.json'}: not a prepared set's manifest ({type(e).__name__}); "
                         f"{again}") from None
    if form != FORMAT:
        raise ValueError(f"{folder} is of format {form}, this program reads format {FORMAT}; {again}")
    if known != identity(tokenizer):
        raise ValueError(f"{folder} holds tokens of {model}, whose tokenizer is not this --model's; prepare "
                         "it for this model, under another --out")
    for name in ("tokens.bin", "index.bin"):
        there = (path / name).stat().st_size if (path / name).is_file() else 0
        if there != files[name][0]:
            raise ValueError(f"{path / name} has {there} of its {files[name][0]} bytes; {again}")
    tokens = np.memmap(path / "tokens.bin", dtype=manifest["dtype"], mode="r")
    index = np.memmap(path / "index.bin", dtype=INDEX, mode="r")
    return TokenFile(tokens, index, domains, folder, repr([files["tokens.bin"], files["index.bin"]]))


def packed(path: str, tokenizer) -> TokenFile:
    """A JSONL file as one of the sources of a list, in memory, four bytes a token."""
    rows = read_rows(path)
    bar = tqdm(rows, desc=f"tokenize {path}", unit="row", disable=hd_pissa.process_index() > 0 or len(rows) < 20_000)
    tokens, index, domains = pack(((r["instruction"], r["response"], domain_of(r)) for r in bar),
                                  tokenizer)
    digest = hashlib.blake2b(tokens.tobytes() + index.tobytes() + repr(domains).encode(), digest_size=16)
    return TokenFile(tokens, index, domains, path, digest.hexdigest())


class Rows(Sequence):
    """(tokens, prompt length, domain) rows of several sources, each made when it is asked for.

    files       the sources
    which, at   (rows,) source and row of each
    block_size  tokens a row, at most
    shares      of an epoch's rows, one a source; None: every row once
    """

    def __init__(self, files: list[TokenFile], which, at, block_size: int, shares=None):
        self.files, self.which, self.at = files, which, at
        self.block_size, self.shares = block_size, shares

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, j):
        if isinstance(j, slice):
            return self.take(np.arange(len(self))[j])
        file = self.files[self.which[j]]
        start, length, prompt, domain, _ = file.index[self.at[j]].item()
        tokens = file.tokens[start:start + min(length, self.block_size)].tolist()
        return tokens, prompt, file.domains[domain]

    def take(self, positions) -> "Rows":
        return Rows(self.files, self.which[positions], self.at[positions], self.block_size, self.shares)

    def column(self, name: str) -> np.ndarray:
        """One column of the index, for all rows."""
        result = np.empty(len(self), INDEX[name])
        for k, file in enumerate(self.files):
            mine = self.which == k
            result[mine] = file.index[name][self.at[mine]]
        return result

    def lengths(self) -> np.ndarray:
        return np.minimum(self.column("length"), self.block_size)

    def hold_out(self) -> tuple["Rows", "Rows"]:
        """As the function of that name; the held-out rows in the order of their hashes, so mixed."""
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
        for k in np.argsort(draws - exact, kind="stable")[:len(self) - draws.sum()]:   # largest remainders
            draws[k] += 1
        return draws.tolist()

    def order(self, generator: torch.Generator) -> list[int]:
        """Positions of one epoch. A source gives no row once more before it has given all of them."""
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
        place = hashlib.blake2b(self.which.tobytes() + self.at.tobytes(), digest_size=16).hexdigest()
        return repr([[file.digest for file in self.files], place, self.block_size, self.shares])


# ---- What --data and --eval_data mean ----------------------------------------------------------------------


def sources(text: str) -> list[tuple[float | None, str]]:
    """(weight or None, path) of a path or a comma-separated list "0.7:a.jsonl,0.3:prepared/b"."""
    if os.path.exists(text):
        return [(None, text)]
    found = []
    for item in text.split(","):
        match = re.fullmatch(r"([0-9.eE+-]+):(.+)", item.strip())
        weight, path = (match[1], match[2]) if match else (None, item.strip())
        try:
            weight = None if weight is None else float(weight)
        except ValueError:
            weight = math.nan
        if weight is not None and not 0 < weight < math.inf:
            raise ValueError(f"{item}: the weight of a source must be a finite number above 0")
        found.append((weight, path))
    if len({weight is None for weight, _ in found}) > 1:
        raise ValueError(f"{text}: give a weight to every source (0.7:a.jsonl,0.3:b.jsonl) or to none")
    for _, path in found:
        if not os.path.exists(path):
            begun = os.path.isdir(path + ".tmp")
            raise ValueError(f"{path}: no such data file or prepared set; " + (
                "its preparation was cut off: start that command again, it goes on" if begun else
                "give a JSONL file with instruction and response a row, or prepare a set "
                "(data/prepare.py --list)"))
    return found


def open_rows(text: str, tokenizer, block_size: int, what: str) -> Rows:
    """All rows that a list of sources has, without those that keep no response at block_size."""
    listed = sources(text)
    files = [open_prepared(path, tokenizer) if os.path.isdir(path) else packed(path, tokenizer)
             for _, path in listed]
    shares = [weight for weight, _ in listed] if listed[0][0] is not None else None
    which = np.concatenate([np.full(len(file.index), k, np.uint16) for k, file in enumerate(files)])
    at = np.concatenate([np.arange(len(file.index), dtype=np.uint32) for file in files])
    rows = Rows(files, which, at, block_size, shares)
    fits = rows.column("prompt") < block_size
    cut = int((rows.column("length")[fits] > block_size).sum())
    rows = rows.take(fits)
    say(f"{what}: {len(rows)} rows, {cut} cut at --block_size {block_size}, {int((~fits).sum())} dropped "
        "because no response was left")
    for k, file in enumerate(files):
        if not (rows.which == k).any():
            raise ValueError(f"{file.name}: no row has a response within --block_size {block_size}; give a "
                             "larger one, or leave that source out")
    return rows


def load(data: str, eval_data: str | None, eval_rows: int, tokenizer, block_size: int):
    """(rows to train on, at most eval_rows held-out rows, hash of both) of --data and --eval_data.

    Rows of one JSONL file are a list; of anything else `Rows`, which leaves the tokens on the disk.
    """
    def plain(text):
        return len(listed := sources(text)) == 1 and listed[0][0] is None and not os.path.isdir(text)

    held = None
    if eval_data and sources(eval_data)[0][0] is not None:
        raise ValueError(f"--eval_data {eval_data}: every row is evaluated, so its sources have no weights")
    if eval_data and plain(eval_data):
        held = read_rows(eval_data)
    if plain(data):
        rows = read_rows(data)
        rows, held = (rows, held) if eval_data else hold_out(rows)
        rows = encode(rows, tokenizer, block_size, "train")
    else:
        rows = open_rows(data, tokenizer, block_size, "train")
        if not eval_data:
            rows, held = rows.hold_out()
            held = list(held[:eval_rows])
            for k, file in enumerate(rows.files):
                if not (rows.which == k).any():
                    raise ValueError(f"{file.name}: all its rows are held out; give more, or --eval_data")
            say(f"held out: {len(held)} of them")
    if held is None:
        held = open_rows(eval_data, tokenizer, block_size, "held out")
        order = np.argsort(held.column("hash"), kind="stable")          # the first rows are a sample of all
        held = list(held.take(order[:eval_rows]))
    elif held and isinstance(held[0], dict):
        held = encode(held[:eval_rows], tokenizer, block_size, "held out")
    if isinstance(rows, Rows) and rows.shares is not None:
        for file, draws, there in zip(rows.files, rows.draws(), np.bincount(rows.which)):
            say(f"  {file.name}: {draws} of an epoch's {len(rows)} rows, each of its {there} rows "
                f"{draws / there:.2f} times")
    seen = (rows.digest() if isinstance(rows, Rows) else rows, held)
    return rows, held, hashlib.blake2b(repr(seen).encode(), digest_size=16).hexdigest()


def enough(args, rows, held) -> None:
    """ValueError where --data leaves no whole batch or nothing held out."""
    if len(rows) < args.batch_size or not held:
        raise ValueError(f"{args.data}: {len(rows)} rows to train on, {len(held)} held out: too few for "
                         f"--batch_size {args.batch_size}; give more rows or a larger --block_size")


def lengths(rows) -> np.ndarray:
    """Tokens of every row."""
    return rows.lengths() if isinstance(rows, Rows) else np.array([len(row[0]) for row in rows])


def step_batches(rows, batch_size: int, seed: int, start: int = 0):
    """Endless step batches of (tokens, prompt length), ordered by the seed alone, without partial batches.

    start       batches left out at the beginning, without a row of them being read
    """
    epoch, skipped = divmod(start, len(rows) // batch_size)
    while True:
        generator = torch.Generator().manual_seed(hd_pissa.seed_of("epoch", seed, epoch))
        order = (rows.order(generator) if isinstance(rows, Rows) else
                 torch.randperm(len(rows), generator=generator).tolist())
        for a in range(skipped * batch_size, len(rows) - batch_size + 1, batch_size):
            yield [rows[j][:2] for j in order[a:a + batch_size]]
        epoch, skipped = epoch + 1, 0
