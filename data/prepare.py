"""Rows of instruction data: read, held out, encoded and ordered into step batches."""

import hashlib
import json
import os

import torch
from tqdm import tqdm

import hd_pissa


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
        raise ValueError(f"{path}: holds no rows")
    return rows


def hold_out(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """(train, held out): 5 % of the rows, at most 500, chosen by hash, so that equal rows stay together."""
    keys = [hashlib.blake2b(json.dumps(row, sort_keys=True).encode()).digest() for row in rows]
    chosen = set(sorted(set(keys))[:max(1, min(500, round(0.05 * len(set(keys)))))])
    return ([row for row, key in zip(rows, keys) if key not in chosen],
            [row for row, key in zip(rows, keys) if key in chosen])


def encode(rows: list[dict], tokenizer, block_size: int, what: str) -> list[tuple[list[int], int, str]]:
    """(tokens, prompt length, domain) a row, cut on the right at block_size, dropped without a response."""
    encoded, cut, dropped = [], 0, 0
    quiet = hd_pissa.rank() > 0 or len(rows) < 20_000
    for row in tqdm(rows, desc=f"tokenize {what}", unit="row", disable=quiet):
        prompt = tokenizer.prompt(row["instruction"])
        tokens = prompt + tokenizer.response(row["response"])
        cut += len(tokens) > block_size
        if len(prompt) >= block_size:
            dropped += 1
            continue
        encoded.append((tokens[:block_size], len(prompt), row.get("domain", "all")))
    hd_pissa.say(f"{what}: {len(encoded)} rows, {cut - dropped} cut at --block_size {block_size}, "
        f"{dropped} dropped because no response was left")
    return encoded


def step_batches(rows, batch_size: int, seed: int):
    """Endless step batches of (tokens, prompt length), ordered by the seed alone, without partial batches."""
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(hd_pissa.seed_of("epoch", seed, epoch))
        order = torch.randperm(len(rows), generator=generator).tolist()
        for a in range(0, len(rows) - batch_size + 1, batch_size):
            yield [rows[j][:2] for j in order[a:a + batch_size]]
        epoch += 1
