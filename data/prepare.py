"""Prepare a set for training: its rows, of the public source or a file, as tokens on the disk.

    python data/prepare.py --list
    python data/prepare.py metamathqa --model DIR                           # from the hub
    python data/prepare.py metamathqa --model DIR --from MetaMathQA-395K.json
    python data/prepare.py multitask --model DIR --from boolq=boolq.jsonl   # ten from the hub
    python data/prepare.py commonsense --model DIR --from mix.json          # finished rows
    python data/prepare.py rows --model DIR --from chat.parquet             # a file of your own
    python data/prepare.py rows --model DIR --from own.csv --fields instruction=q,response=a
    python train.py --model DIR --data prepared/metamathqa

The result is a folder that data/rows.py reads. It is written as OUT.tmp, in parts, and renamed when
it is whole. The same command goes on where a killed one stopped, and ends with the same bytes.
"""

import argparse
import contextlib
import difflib
import hashlib
import io
import itertools
import json
import os
import re
import socket
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)   # run as a file

import numpy as np
import torch
from tqdm import tqdm

from data.formats import (
    FORMATS,
    Dropped,
    conversation,
    domain_of,
    drop,
    entry,
    is_saved,
    note,
    one_line,
    recognise,
    records,
    regular,
    usable,
)
from data.rows import FORMAT, PARTS, digest, identity, pack, read_manifest, seal, seed_of, temporary
from data.sets import MIXES, SETS, SPELLINGS, as_in_paper, in_thousands, paper_rows
from data.tokenizer import open_tokenizer

PART = 5000         # source rows a part: what a killed preparation does again, at most


def sync(path: Path) -> None:
    """The file or folder is on the disk, not only in the kernel's cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- Sources: each yields (place, raw row) from row `start` on; `identity` changes with its bytes


class File:
    """A file, or a folder saved by datasets; `names` maps the set's fields to the file's."""

    def __init__(self, path: str, names: dict[str, str]):
        files = [Path(path)]
        if os.path.isdir(path) and is_saved(path):
            files = sorted(file for file in Path(path).rglob("*") if file.is_file())
        for file in files:
            regular(file)
        self.path, self.names, self.total = path, names, None
        self.identity = {"file": Path(path).name, "digest": [digest(file) for file in files],
                         "names": names}

    def rows(self, start: int = 0):
        for place, row in itertools.islice(records(self.path), start, None):
            if not isinstance(row, dict):
                raise ValueError(f"{place}: a {type(row).__name__}, not an object with fields")
            named = {ours: row[theirs] for ours, theirs in self.names.items() if theirs in row}
            left = {field: row[field] for field in row if field not in self.names.values()}
            yield place, left | named


class Hub:
    """The train split of a public set, through the `datasets` library and its cache."""

    def __init__(self, name: str):
        entry = SETS[name]
        files = f"--from FILE (its rows with {', '.join(entry.fields)})"
        if entry.hub is None:
            raise ValueError(f"{name}: rows of your own; give --from FILE")
        try:
            import datasets
            import huggingface_hub
        except ImportError:
            raise ValueError(f"{name}: reading {entry.hub} needs the datasets library: pip install "
                             f"-r requirements-extra.txt; or give {files}") from None
        remedy = f"download it where there is a network, copy it here and give {files}"
        why = "the hub answers, but not with this set"
        try:                    # asked once: the library itself would ask for half a minute
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
        except Exception:       # of requests or httpx, by the version, or HF_HUB_OFFLINE=1
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
            why = "the hub cannot be reached, and its cache here has no copy"
        datasets.utils.logging.set_verbosity_error()
        with one_line(f"{name}: {entry.hub}: {why}", remedy):
            self.data = datasets.load_dataset(entry.hub, entry.config, split="train",
                                              revision=entry.revision)
        self.total, self.where = len(self.data), f"{entry.hub} row "
        self.identity = {"hub": entry.hub, "config": entry.config, "revision": entry.revision,
                         "rows": self.total, "fingerprint": self.data._fingerprint}

    def rows(self, start: int = 0):
        for i in range(start, self.total, 1000):
            block = self.data[i:i + 1000]                               # {column: values}
            for j, values in enumerate(zip(*block.values())):
                yield f"{self.where}{i + j}", dict(zip(block, values))


# ---- Rows to parts -------------------------------------------------------------------------------


def conversations(pairs, name: str, form: str, account: dict):
    """(turns, domain) of raw rows in a format, or by the template of a set; the rest is counted."""
    own = name == "rows" or name in MIXES
    if form in FORMATS:
        for row in usable(pairs, name, form, account):
            yield row.turns, domain_of(row) if own else name
        return
    _, _, _, _, fields, convert = SETS[form]
    for place, raw in pairs:
        account["read"] += 1
        for field, kind in fields.items():
            if raw.get(field) is not None and not isinstance(raw[field], kind):
                raise ValueError(f"{place}: {type(raw[field]).__name__} in field {field!r}, which "
                                 f"is of another type in rows of {name}; mend that row, or name "
                                 f"the file's own field: --fields {field}=FIELD (it has "
                                 f"{', '.join(map(str, list(raw)[:8]))})")
        try:
            lacking = [field for field in fields if raw.get(field) is None]
            result = Dropped(f"no {lacking[0]!r}") if lacking else convert(raw)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as e:
            raise ValueError(f"{place}: not as rows of {name} are made ({type(e).__name__}: {e}); "
                             "mend that row or leave it out") from None
        if not isinstance(result, Dropped):
            result = conversation(dict(zip(("instruction", "response"), result)), "instruction")
        if isinstance(result, Dropped):
            drop(account, result, place)
        else:
            yield result, name


def write_part(path: Path, tokens, index, spans, counts: dict) -> None:
    """One file, its digest in front, under its name only when it is whole."""
    body = io.BytesIO()
    np.savez(body, tokens=tokens, index=index, spans=spans,
             counts=np.frombuffer(json.dumps(counts).encode(), np.uint8))
    body = body.getvalue()
    whole(path, hashlib.blake2b(body, digest_size=32).digest() + body)


def whole(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all."""
    new = temporary(path)
    with open(new, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def read_part(path: Path):
    """(tokens, index, spans, counts) of a part; None if it is not there as it was written."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if hashlib.blake2b(data[32:], digest_size=32).digest() != data[:32]:
        return None
    part = np.load(io.BytesIO(data[32:]), allow_pickle=False)
    return part["tokens"], part["index"], part["spans"], json.loads(part["counts"].tobytes())


def write_parts(work: Path, k: int, name: str, source, tokenizer, dtype) -> list[Path]:
    """Tokenize source k in parts of PART rows, after those that are whole already."""
    parts = []
    while (part := read_part(path := work / f"{k:02}_{len(parts):05}.part")) is not None:
        parts.append(path)
        if part[-1]["read"] < PART:
            return parts
    rows = source.rows(len(parts) * PART)
    bar = tqdm(desc=name, unit="row", initial=len(parts) * PART, total=source.total, delay=2)
    with bar:
        while True:
            counts, before = entry(None, ""), tokenizer.counts.copy()
            some = conversations(itertools.islice(rows, PART), name, source.form, counts)
            tokens, index, spans, counts["domains"] = pack(some, tokenizer, dtype, counts)
            for text, count in (tokenizer.counts - before).items():
                note(counts, text, count)
            path = work / f"{k:02}_{len(parts):05}.part"
            write_part(path, tokens, index, spans, counts)
            parts.append(path)
            bar.update(counts["read"])
            if counts["read"] < PART:
                return parts


def assemble(made: Path, parts: list[tuple[str, Path]], settings: dict, dtype, seed: int) -> dict:
    """tokens.bin, spans.bin, a shuffled index.bin and manifest.json of all parts; the manifest."""
    discard(made)
    made.mkdir()
    indices, domains, start, spanned, sets = [], {}, 0, 0, {}
    with open(made / "tokens.bin", "wb") as file, open(made / "spans.bin", "wb") as spans_file:
        for name, path in tqdm(parts, desc="write", unit="part", delay=2):
            tokens, index, spans, counts = read_part(path)
            file.write(tokens.astype(dtype).tobytes())
            spans_file.write(spans.tobytes())
            numbers = [domains.setdefault(domain, len(domains)) for domain in counts["domains"]]
            index["start"] += start
            index["spans"] += spanned
            index["domain"] = np.array(numbers or [0], "<u4")[index["domain"]]
            start, spanned = start + len(tokens), spanned + len(spans)
            indices.append(index)
            total = sets.setdefault(name, {"read": 0, "kept": 0, "dropped": {}, "notes": {},
                                           "paper": paper_rows(name)})
            total["read"] += counts["read"]
            total["kept"] += len(index)
            for reason, (count, place) in counts["dropped"].items():
                total["dropped"].setdefault(reason, [0, place])[0] += count
            for text, count in counts["notes"].items():
                note(total, text, count)
    index = np.concatenate(indices)
    if not len(index):
        why = [f"{place}: {reason}" for total in sets.values()
               for reason, (_, place) in total["dropped"].items()]
        raise ValueError(f"{settings['set']}: no row is left; "
                         f"{why[0] if why else 'its source holds none'}")
    generator = torch.Generator().manual_seed(seed_of("prepare", seed))
    index[torch.randperm(len(index), generator=generator).numpy()].tofile(made / "index.bin")
    read = sum(total["read"] for total in sets.values())
    rows = {"read": read, "kept": len(index), "dropped": read - len(index)}
    manifest = {"format": FORMAT, "settings": settings, "dtype": np.dtype(dtype).str,
                "tokens": start,
                "domains": list(domains), "rows": rows, "sets": sets,
                "files": {name: digest(made / name) for name in PARTS}}
    manifest["digest"] = seal(manifest)
    (made / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for path in (*made.iterdir(), made):
        sync(path)
    return manifest


def report(manifest: dict, out: Path) -> None:
    print(f"{'set':14} {'rows read':>9} {'kept':>7} {'paper':>6}  dropped")
    for name, s in manifest["sets"].items():
        why = ", ".join(f"{n} {reason}" for reason, (n, _) in s["dropped"].items()) or "0"
        paper = ""
        if s["paper"]:
            paper = in_thousands(s["paper"])
            why += "" if as_in_paper(s["kept"], s["paper"]) else "; not the paper's number of rows"
        print(f"{name:14} {s['read']:9} {s['kept']:7} {paper:>6}  {why}")
        for text, count in s["notes"].items():
            print(f"  {text} ({count} rows)")
    print(f"{out}: {manifest['rows']['kept']} rows, {manifest['tokens']} tokens of "
          f"{manifest['dtype'][1:]}, tokenizer of {manifest['settings']['model']}", flush=True)


# ---- OUT.tmp: only names that this program writes are ever removed, and no link is followed ------

HOST = re.escape(socket.gethostname())
OURS = re.compile(r"(?:settings\.json|\d\d_\d{5,}\.part)(?:\..+\.\d+\.tmp)?")


def discard(folder: Path, itself: bool = True) -> None:
    """Remove what this program wrote there, and the folder itself if that was all."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "settings.json"):    # the mark last
        if path.name == "whole":
            discard(path)
        elif OURS.fullmatch(path.name) or (folder.name == "whole"
                                           and path.name in (*PARTS, "manifest.json")):
            path.unlink()
    if itself:
        with contextlib.suppress(OSError):              # something of others is in it
            folder.rmdir()


@contextlib.contextmanager
def alone(work: Path):
    """Make and hold the folder; ValueError if another process has it, or it is not ours."""
    foreign = work.is_symlink() or work.exists() and not work.is_dir()
    if not foreign and work.exists():
        there = {path.name for path in work.iterdir()}
        foreign = (not all(OURS.fullmatch(name) for name in there - {"whole"})
                   or (work / "whole").is_symlink()
                   or read_settings(work) is None
                   and not all(name.endswith(".tmp") for name in there))
    if foreign:
        raise ValueError(f"{work}: is needed for the parts, and holds what prepare.py did not "
                         "write; move it away, or give another --out")
    work.mkdir(parents=True, exist_ok=True)
    handle = os.open(work, os.O_RDONLY)
    try:
        try:
            import fcntl
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not work.is_dir() or not os.path.samestat(os.fstat(handle), work.stat()):
                raise BlockingIOError       # who had it has ended, and removed it
        except BlockingIOError:
            raise ValueError(f"another prepare.py is writing to {work}; wait for it, or give "
                             "another --out") from None
        except (ImportError, OSError):
            pass                        # no such locks on this system, or on this network disk
        for path in work.iterdir():     # of killed processes of this host: it is ours alone now
            if re.search(rf"\.{HOST}\.\d+\.tmp$", path.name):
                path.unlink()
        yield
    finally:
        os.close(handle)                # and the kernel does so when a process is killed


def read_settings(work: Path) -> dict | None:
    """What the parts in OUT.tmp were made of; None if no settings of this program are there."""
    try:
        regular(work / "settings.json")
        known = json.loads((work / "settings.json").read_text())
        return known if {"set", "part", "sources", "tokenizer"} <= known.keys() else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def prepare(name: str, sources: dict, tokenizer, model: str, out: Path, seed: int) -> dict:
    """Write the folder `out` and return its manifest. Goes on after what is whole in out.tmp.

    sources     {set: File or Hub}, in the order in which their rows are numbered, each with its
                `form`
    Raises ValueError if `out` holds something else, or a source cannot be read.
    """
    vocabulary = tokenizer.vocabulary if hasattr(tokenizer, "vocabulary") else len(tokenizer.hf)
    dtype = np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")
    described = {key: source.identity | {"form": source.form} for key, source in sources.items()}
    settings = {"set": name, "model": model, "tokenizer": identity(tokenizer), "seed": seed,
                "part": PART, "sources": described}
    out = out if out.name not in ("", "..") else Path(os.path.abspath(out))
    work = Path(f"{out}.tmp")
    if os.path.lexists(out):
        try:
            manifest = read_manifest(out)
        except ValueError as e:
            raise ValueError(f"--out {out}: there is something else already; remove it or give "
                             f"another --out ({e})") from None
        if manifest["settings"] != settings:
            raise ValueError(f"--out {out}: holds a set that was prepared otherwise (its "
                             "manifest.json says how); remove it or give another --out")
        if work.is_dir():                                   # left by a kill behind the last rename
            with contextlib.suppress(OSError, ValueError), alone(work):
                if read_settings(work) in (None, settings):
                    discard(work)
        print(f"{out} is prepared already")
        report(manifest, out)
        return manifest
    with alone(work):
        if os.path.lexists(out):
            with contextlib.suppress(OSError):
                work.rmdir()
            raise ValueError(f"another prepare.py has made {out} meanwhile; start the same command "
                             "again, it says whether that is this set")
        if read_settings(work) != settings:
            discard(work, itself=False)                     # the lock is on this folder
            whole(work / "settings.json", json.dumps(settings, indent=1).encode())
        elif there := len(list(work.glob("*.part"))):
            print(f"{work}: going on after {there} parts", flush=True)
        try:
            parts = [(key, path) for k, (key, source) in enumerate(sources.items())
                     for path in write_parts(work, k, key, source, tokenizer, dtype)]
            manifest = assemble(work / "whole", parts, settings, dtype, seed)
        except ValueError:
            discard(work)                   # the same command would fail at the same row
            raise
        (work / "whole").rename(out)
        sync(out.parent)
        discard(work)
    report(manifest, out)
    return manifest


# ---- The command ---------------------------------------------------------------------------------


def list_sets() -> None:
    print(f"{'set':13} {'paper':>5}  {'public source':45} fields of a row")
    for name, s in SETS.items():
        source = [s.hub or "a file of yours", s.config, s.revision and "@" + s.revision]
        source = " ".join(filter(None, source))
        paper = in_thousands(s.paper) if s.paper else ""
        print(f"{name:13} {paper:>5}  {source:45} {', '.join(s.fields) or 'any of --format'}")
    for name, parts in MIXES.items():
        text = " + ".join(parts)
        for other in MIXES.keys() - {name}:
            text = text.replace(" + ".join(MIXES[other]), other)
        print(f"{name:13} {in_thousands(paper_rows(name)):>5}  {text}")


def open_sources(name: str, given: list[str], fields: str | None, form: str | None) -> dict:
    """{set: File or Hub} of the command line, each with its `form`: a format or a set."""
    parts, files = MIXES.get(name, [name]), {}
    for text in given:
        part, sign, path = text.partition("=")
        part, path = (part, path) if sign and part in SETS else (name, text)
        if part == name in MIXES:
            if files:
                raise ValueError(f"--from {text}: one file for a whole mix, or its parts, "
                                 f"{parts[0]}=FILE")
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
        raise ValueError("--fields names the columns of one --from file; prepare that part alone, "
                         "then train on a list: --data prepared/a,prepared/b")
    known = {*(field for some in FORMATS.values() for field in some), "input", "context", "system",
             "domain",
             *(SETS[name].fields if name in SETS else ())}
    if other := sorted(set(names) - known):
        raise ValueError(f"--fields {fields}: {other[0]!r} is no field of {name}; it has "
                         f"{', '.join(sorted(known))}")
    sources = {part: File(files[part], names) if part in files else Hub(part) for part in parts}
    for part, source in sources.items():
        some = list(itertools.islice(source.rows(), 100))
        if not some:
            raise ValueError(f"{part}: its source holds no rows; give another --from file")
        own = SETS[part].fields if part in SETS else {}
        if own and form is None and set(own) <= set(some[0][1]):
            source.form = part
            continue
        try:
            source.form = form or recognise([row for _, row in some], some[0][0])
        except ValueError as e:
            wanted = [field for field in own
                      if field not in some[0][1]] or ["instruction", "response"]
            raise ValueError(f"{e}; or name the file's own: --fields "
                             f"{','.join(f'{f}=FIELD' for f in wanted)} (or "
                             "instruction=FIELD,response=FIELD for finished text)") from None
    return sources


def main(argv=None) -> dict | None:
    """Run a command line; status 2 and one sentence on stderr for what the user can put right."""
    p = argparse.ArgumentParser(prog="prepare.py", description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: p.exit(2, f"{p.prog}: error: {message}\n")
    p.add_argument("name", nargs="?",
                   help=f"{', '.join([*SETS, *MIXES])}; rows is a file of your own")
    p.add_argument("--model", default="scratch",
                   help="as train.py's: its tokenizer makes the tokens")
    p.add_argument("--tokenizer", help="as train.py's, of the small GPT; None: data/'s")
    p.add_argument("--from", dest="files", action="append", default=[], metavar="[SET=]FILE",
                   help="file in place of the public source (JSONL, JSON, CSV, Parquet, a folder "
                        "saved by datasets); "
                   "for a mix, of its part SET, or of all in one file of finished rows")
    p.add_argument("--format", choices=FORMATS, help="of the rows of --from; None: recognised")
    p.add_argument("--fields",
                   help="OURS=FILE'S,...: the columns of --from that hold what --list names")
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
        p.error(f"{args.name or 'no name'}: unknown set" +
                (f", did you mean {near[0]}?" if near else ";")
                + f" There are {', '.join(known)} (--list says more)")
    try:
        tokenizer = open_tokenizer(args.model, args.tokenizer)
        sources = open_sources(args.name, args.files, args.fields, args.format)
        return prepare(args.name, sources, tokenizer, args.model,
                       Path(args.out or f"prepared/{args.name}"),
                       args.seed)
    except KeyboardInterrupt:
        p.exit(130, f"{p.prog}: stopped; the same command goes on\n")
    except OSError as e:
        p.error(f"{e}; mend that and start the same command again, it goes on")
    except ValueError as e:
        p.error(" ".join(str(e).split()))


if __name__ == "__main__":
    main()
