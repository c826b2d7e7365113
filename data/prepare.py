"""Prepare a set of the paper for training: its rows, from the public source or a file, as tokens on the disk.

    python data/prepare.py --list
    python data/prepare.py metamathqa --model DIR                           # from the hub
    python data/prepare.py metamathqa --model DIR --from MetaMathQA-395K.json
    python data/prepare.py multitask --model DIR --from boolq=boolq.jsonl   # the other ten from the hub
    python data/prepare.py commonsense --model DIR --from mix.json          # one file of finished text
    python data/prepare.py rows --model DIR --from own.jsonl --fields instruction=question,response=answer
    python train.py --model DIR --data prepared/metamathqa

The result is a folder that data/rows.py reads. It is written as OUT.tmp, in parts, and renamed when it is
whole. The same command goes on where a killed one stopped, and ends with the same bytes.
"""

import argparse
import difflib
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)       # run as a file: imports begin at the root

import numpy as np
import torch
from tqdm import tqdm

import hd_pissa
from data.rows import FORMAT, identity, pack
from data.sets import MIXES, SETS, SPELLINGS, Dropped, as_in_paper, conversion, in_thousands, paper_rows
from data.tokenizer import GPTTokenizer
from training import models
from training.folder import alone, digest, sync
from training.processes import say

PART = 5000         # source rows a part: what a killed preparation does again, at most


# ---- Sources: each yields (where, row) from row `start` on, and an identity that changes with its bytes ----


class File:
    """A JSONL file, or a JSON file that is one list; `names` maps the set's fields to the file's."""

    def __init__(self, path: str, names: dict[str, str]):
        if not os.path.isfile(path):
            raise ValueError(f"--from {path}: no such file; give a JSONL or JSON file of rows")
        self.path, self.names = path, names
        with open(path, "rb") as file:
            head = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
        self.is_list = head.startswith(b"[")
        self.identity = {"file": Path(path).name, "digest": digest(Path(path)), "names": names}
        self.total = None

    def lines(self, start: int):
        """(line, text) of the rows of JSONL; blank lines are none."""
        with open(self.path, "rb") as file:
            numbered = ((i, line) for i, line in enumerate(file, 1) if line.strip())
            yield from itertools.islice(numbered, start, None)

    def elements(self, start: int):
        """(line, value) of the elements of a JSON list, one at a time: the file's text alone is kept."""
        text = Path(self.path).read_bytes().decode("utf-8-sig")
        decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
        at, line, count = text.index("[") + 1, 1, 0
        line += text.count("\n", 0, at)

        def skip(position):
            nonlocal line
            end = blank.match(text, position).end()
            line += text.count("\n", position, end)
            return end, text[end:end + 1]

        at, sign = skip(at)
        while sign != "]":
            value, end = decoder.raw_decode(text, at)
            if count >= start:
                yield line, value
            count += 1
            line += text.count("\n", at, end)
            at, sign = skip(end)
            if sign == ",":
                at, sign = skip(at + 1)
                if sign == "]":
                    raise json.JSONDecodeError("a comma before ]", text, at)
            elif sign != "]":
                raise json.JSONDecodeError("neither , nor ] after a row", text, at)
        end, sign = skip(at + 1)
        if sign:
            raise json.JSONDecodeError("text after the list", text, end)

    def rows(self, start: int = 0):
        line = 0
        try:
            for line, row in self.elements(start) if self.is_list else self.lines(start):
                if not self.is_list:
                    row = json.loads(row.decode("utf-8-sig"))
                if not isinstance(row, dict):
                    raise ValueError(f"{self.path}:{line}: a {type(row).__name__}, not an object with fields")
                named = {ours: row[theirs] for ours, theirs in self.names.items() if theirs in row}
                yield f"{self.path}:{line}", row | named
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            line = e.lineno if self.is_list and isinstance(e, json.JSONDecodeError) else line or 1
            raise ValueError(f"{self.path}:{line}: not JSON ({e}); a row a line, or one list") from None
        except RecursionError:
            raise ValueError(f"{self.path}:{line + 1}: nested too deeply") from None


class Hub:
    """The train split of a public set, through the `datasets` library and its cache."""

    def __init__(self, name: str):
        entry = SETS[name]
        files = f"--from FILE (JSONL or JSON with {', '.join(entry.fields)})"
        if entry.hub is None:
            raise ValueError(f"{name}: rows of your own; give --from FILE (JSONL or JSON)")
        try:
            import datasets
            import huggingface_hub
        except ImportError:
            raise ValueError(f"{name}: reading {entry.hub} needs the datasets library: pip install -r "
                             f"requirements-extra.txt; or give {files}") from None
        remedy = f"download it where there is a network, copy it here and give {files}"
        why = "the hub answers, but not with this set"
        try:                    # asked once: the library itself would ask for half a minute
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
        except Exception:       # of requests or httpx, by the version, or HF_HUB_OFFLINE=1
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
            why = "the hub cannot be reached, and its cache here has no copy"
        datasets.utils.logging.set_verbosity_error()
        with models.one_line(f"{name}: {entry.hub}: {why}", remedy):
            self.data = datasets.load_dataset(entry.hub, entry.config, split="train", revision=entry.revision)
        self.total, self.where = len(self.data), f"{entry.hub} row "
        self.identity = {"hub": entry.hub, "config": entry.config, "revision": entry.revision,
                         "rows": self.total, "fingerprint": self.data._fingerprint}

    def rows(self, start: int = 0):
        for i in range(start, self.total, 1000):
            block = self.data[i:i + 1000]                               # {column: values}
            for j, values in enumerate(zip(*block.values())):
                yield f"{self.where}{i + j}", dict(zip(block, values))


# ---- Rows to parts -----------------------------------------------------------------------------------------


def converted(rows, name: str, fields: dict, convert, counts: dict):
    """(instruction, response, domain) of raw rows; counts["dropped"] grows by reason.

    Raises ValueError, with the place, for a row without the fields or with other types in them.
    """
    for where, raw in rows:
        counts["read"] += 1
        for field, kind in fields.items():
            if not isinstance(raw.get(field), kind):
                there = "no" if field not in raw else f"{type(raw[field]).__name__} in"
                raise ValueError(f"{where}: {there} field {field!r}, which every row of {name} needs; mend "
                                 "that row, or name the file's own field: --fields "
                                 f"{field}=FIELD (it has {', '.join(map(str, list(raw)[:8]))})")
        try:
            result = convert(raw)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as e:
            raise ValueError(f"{where}: not as rows of {name} are made ({type(e).__name__}: {e}); mend that "
                             "row or leave it out") from None
        if not isinstance(result, Dropped):
            if not all(isinstance(text, str) for text in result):
                raise ValueError(f"{where}: its question or its answer is no text; mend that row or leave "
                                 "it out")
            if not all(text.strip() for text in result):
                result = Dropped("empty question or answer")
        if isinstance(result, Dropped):
            counts["dropped"][result] = counts["dropped"].get(result, 0) + 1
            continue
        domain = raw.get("domain") if name == "rows" or name in MIXES else name
        yield *result, domain if isinstance(domain, str) else "all"


def write_part(path: Path, tokens, index, counts: dict) -> None:
    """One file, its digest in front, under its name only when it is whole."""
    body = io.BytesIO()
    np.savez(body, tokens=tokens, index=index, counts=np.frombuffer(json.dumps(counts).encode(), np.uint8))
    body = body.getvalue()
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(hashlib.blake2b(body, digest_size=32).digest() + body)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_part(path: Path):
    """(tokens, index, counts) of a part; None if it is not there, or not as it was written."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if hashlib.blake2b(data[32:], digest_size=32).digest() != data[:32]:
        return None
    part = np.load(io.BytesIO(data[32:]), allow_pickle=False)
    return part["tokens"], part["index"], json.loads(part["counts"].tobytes())


def write_parts(work: Path, k: int, name: str, source, tokenizer, dtype) -> list[Path]:
    """Tokenize source k in parts of PART rows, after those that are whole already."""
    parts = []
    while (part := read_part(path := work / f"{k:02}_{len(parts):05}.part")) is not None:
        parts.append(path)
        if part[2]["read"] < PART:
            return parts
    rows = source.rows(len(parts) * PART)
    fields, convert, _ = source.how
    bar = tqdm(desc=name, unit="row", initial=len(parts) * PART, total=source.total, delay=2)
    with bar:
        while True:
            counts = {"read": 0, "dropped": {}}
            some = converted(itertools.islice(rows, PART), name, fields, convert, counts)
            tokens, index, counts["domains"] = pack(some, tokenizer, dtype)
            path = work / f"{k:02}_{len(parts):05}.part"
            write_part(path, tokens, index, counts)
            parts.append(path)
            bar.update(counts["read"])
            if counts["read"] < PART:
                return parts


def assemble(whole: Path, parts: list[tuple[str, Path]], settings: dict, dtype, seed: int) -> dict:
    """tokens.bin, index.bin in a shuffled order and manifest.json of all parts; the manifest."""
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    indices, domains, start, sets = [], {}, 0, {}
    with open(whole / "tokens.bin", "wb") as file:
        for name, path in tqdm(parts, desc="write", unit="part", delay=2):
            tokens, index, counts = read_part(path)
            file.write(tokens.astype(dtype).tobytes())
            numbers = [domains.setdefault(domain, len(domains)) for domain in counts["domains"]]
            index["start"] += start
            index["domain"] = np.array(numbers or [0], "<u2")[index["domain"]]
            start += len(tokens)
            indices.append(index)
            total = sets.setdefault(name, {"read": 0, "kept": 0, "dropped": {}, "paper": paper_rows(name)})
            total["read"] += counts["read"]
            total["kept"] += len(index)
            for reason, count in counts["dropped"].items():
                total["dropped"][reason] = total["dropped"].get(reason, 0) + count
    index = np.concatenate(indices)
    if not len(index):
        raise ValueError(f"{settings['set']}: no row is left, dropped: "
                         f"{[total['dropped'] for total in sets.values()]}")
    generator = torch.Generator().manual_seed(hd_pissa.seed_of("prepare", seed))
    index[torch.randperm(len(index), generator=generator).numpy()].tofile(whole / "index.bin")
    read = sum(total["read"] for total in sets.values())
    rows = {"read": read, "kept": len(index), "dropped": read - len(index)}
    manifest = {"format": FORMAT, "settings": settings, "dtype": np.dtype(dtype).str, "tokens": start,
                "domains": list(domains), "rows": rows, "sets": sets,
                "files": {name: digest(whole / name) for name in ("tokens.bin", "index.bin")}}
    (whole / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for path in (*whole.iterdir(), whole):
        sync(path)
    return manifest


def report(manifest: dict, out: Path) -> None:
    say(f"{'set':14} {'rows read':>9} {'kept':>7} {'paper':>6}  dropped")
    for name, s in manifest["sets"].items():
        why, paper = ", ".join(f"{n} {reason}" for reason, n in s["dropped"].items()) or "0", ""
        if s["paper"]:
            paper = in_thousands(s["paper"])
            why += "" if as_in_paper(s["kept"], s["paper"]) else "; not the paper's number of rows"
        say(f"{name:14} {s['read']:9} {s['kept']:7} {paper:>6}  {why}")
    say(f"{out}: {manifest['rows']['kept']} rows, {manifest['tokens']} tokens of {manifest['dtype'][1:]}, "
        f"tokenizer of {manifest['settings']['model']}")


def prepare(name: str, sources: dict, tokenizer, model: str, out: Path, seed: int) -> dict:
    """Write the folder `out` and return its manifest. Goes on with what an earlier call has left in out.tmp.

    sources     {set: File or Hub}, in the order in which their rows are numbered
    Raises ValueError if `out` holds something else, or a source has a row that cannot be used.
    """
    vocabulary = tokenizer.vocabulary if hasattr(tokenizer, "vocabulary") else len(tokenizer.hf)
    dtype = np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")
    settings = {"set": name, "model": model, "tokenizer": identity(tokenizer), "seed": seed, "part": PART,
                "sources": {key: source.identity | {"mapping": source.how[2]}
                            for key, source in sources.items()}}
    work = out.with_name(out.name + ".tmp")
    if out.exists():
        try:
            manifest = json.loads((out / "manifest.json").read_text())
            same = manifest["settings"] == settings and manifest["format"] == FORMAT
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"--out {out}: there is something else already; remove it or give another "
                             "--out") from None
        if not same:
            raise ValueError(f"--out {out}: holds a set that was prepared otherwise (its manifest.json says "
                             "how); remove it or give another --out")
        shutil.rmtree(work, ignore_errors=True)
        say(f"{out} is prepared already")
        report(manifest, out)
        return manifest
    with alone(work):
        try:
            known = json.loads((work / "settings.json").read_text())
        except (OSError, ValueError):
            known = None
        if known != settings:
            for path in work.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            (work / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
        elif there := len(list(work.glob("*.part"))):
            say(f"{work}: going on after {there} parts")
        try:
            parts = [(key, path) for k, (key, source) in enumerate(sources.items())
                     for path in write_parts(work, k, key, source, tokenizer, dtype)]
            manifest = assemble(work / "whole", parts, settings, dtype, seed)
        except ValueError:
            shutil.rmtree(work, ignore_errors=True)         # the same command would fail at the same row
            raise
        (work / "whole").rename(out)
        sync(out.parent)
        shutil.rmtree(work, ignore_errors=True)
    report(manifest, out)
    return manifest


# ---- The command -------------------------------------------------------------------------------------------


def list_sets() -> None:
    say(f"{'set':13} {'paper':>5}  {'public source':45} fields of a row")
    for name, s in SETS.items():
        source = [s.hub or "a file of yours", s.config, s.revision and "@" + s.revision]
        source = " ".join(filter(None, source))
        paper = in_thousands(s.paper) if s.paper else ""
        say(f"{name:13} {paper:>5}  {source:45} {', '.join(s.fields)}")
    for name, parts in MIXES.items():
        text = " + ".join(parts)
        for other in MIXES.keys() - {name}:
            text = text.replace(" + ".join(MIXES[other]), other)
        say(f"{name:13} {in_thousands(paper_rows(name)):>5}  {text}")


def load_tokenizer(model: str, tokenizer: str | None):
    """The tokenizer that train.py uses with this --model and --tokenizer."""
    if model == "scratch" or model.endswith(".pt"):
        return GPTTokenizer(tokenizer)
    with torch.device("meta"):              # the model's shapes alone, to see that both belong together
        return models.hugging_face(model, weights=False)[1]


def open_sources(name: str, given: list[str], fields: str | None) -> dict:
    """{set: File or Hub} of the command line, each with `how`: (fields, conversion, in words)."""
    parts, files = MIXES.get(name, [name]), {}
    for text in given:
        part, sign, path = text.partition("=")
        part, path = (part, path) if sign and part in SETS else (name, text)
        if part == name in MIXES:
            if files:
                raise ValueError(f"--from {text}: one file for a whole mix, or its parts, {parts[0]}=FILE")
            parts = [name]
        if part not in parts or part in files:
            raise ValueError(f"--from {text}: " + ("given twice" if part in files else
                                                   f"{part} is no part of {', '.join(parts)}"))
        files[part] = path
    names = {}
    for item in fields.split(",") if fields else ():
        ours, sign, theirs = item.partition("=")
        if not (ours and sign and theirs):
            raise ValueError(f"--fields {fields}: give pairs, OURS=FILE'S, such as response=answer")
        names[ours] = theirs
    if names and (parts != [name] or not files):
        raise ValueError("--fields names the columns of one --from file; prepare that part alone, then train "
                         "on a list: --data prepared/a,prepared/b")
    known = {"instruction", "response", *(SETS[name].fields if name in SETS else ())}
    if other := sorted(set(names) - known):
        raise ValueError(f"--fields {fields}: {other[0]!r} is no field of {name}; it has "
                         f"{', '.join(sorted(known))}")
    sources = {part: File(files[part], names) if part in files else Hub(part) for part in parts}
    for part, source in sources.items():
        where, row = next(source.rows(), (None, None))
        if row is None:
            raise ValueError(f"{part}: its source holds no rows; give another --from file")
        try:
            source.how = conversion(part, row)
        except KeyError:
            missing = [field for field in SETS.get(part, SETS["rows"]).fields if field not in row]
            pairs = ",".join(f"{field}=FIELD" for field in missing)
            raise ValueError(f"{where}: no {', '.join(missing)} in this row (it has "
                             f"{', '.join(map(str, list(row)[:8]))}); name the file's own: --fields {pairs} "
                             "(or instruction=FIELD,response=FIELD for finished text)") from None
    return sources


def main(argv=None) -> dict | None:
    """Run a command line; exit status 2 and one sentence on stderr for what the user can put right."""
    p = argparse.ArgumentParser(prog="prepare.py", description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: p.exit(2, f"{p.prog}: error: {message}\n")
    p.add_argument("name", nargs="?", help=f"{', '.join([*SETS, *MIXES])}; rows is a file of your own")
    p.add_argument("--model", default="scratch", help="as train.py's: its tokenizer makes the tokens")
    p.add_argument("--tokenizer", help="as train.py's, of the small GPT; None: data/'s")
    p.add_argument("--from", dest="files", action="append", default=[], metavar="[SET=]FILE",
                   help="JSONL or JSON in place of the public source; for a mix, of its part SET, or of all "
                   "in one file of instruction and response")
    p.add_argument("--fields", help="OURS=FILE'S,...: the columns of --from that hold what --list names")
    p.add_argument("--out", help="folder to write; None: prepared/NAME")
    p.add_argument("--seed", type=int, default=0, help="of the order of the rows")
    p.add_argument("--list", action="store_true", help="print the sets and stop")
    args = p.parse_args(argv)
    if args.list:
        return list_sets()
    known, lower = [*SETS, *MIXES], (args.name or "").lower()
    args.name = SPELLINGS.get(lower, lower) or None
    if args.name not in known:
        near = difflib.get_close_matches(lower, known, 1)
        p.error(f"{args.name or 'no name'}: unknown set" + (f", did you mean {near[0]}?" if near else ";")
                + f" There are {', '.join(known)} (--list says more)")
    try:
        tokenizer = load_tokenizer(args.model, args.tokenizer)
        sources = open_sources(args.name, args.files, args.fields)
        return prepare(args.name, sources, tokenizer, args.model, Path(args.out or f"prepared/{args.name}"),
                       args.seed)
    except KeyboardInterrupt:
        p.exit(130, f"{p.prog}: stopped; the same command goes on\n")
    except OSError as e:
        p.error(f"{e}; mend that and start the same command again, it goes on")
    except ValueError as e:
        p.error(" ".join(str(e).split()))


if __name__ == "__main__":
    main()
