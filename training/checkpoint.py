"""A run on disk: everything that changes, written whole or not at all, and read back on any processes.

    OUT/checkpoint/step_N/          a checkpoint; step_N.tmp is one that was never finished
        tensors_0.bin ...           the bytes of tensors, one file by each process
        manifest.json               where each tensor lies, config, digest of every file and of itself

Names of tensors do not depend on the number of processes: "model.<name>", "adapters.<path>.shard<i>.A"
with i the global shard, "moments.<increment>.exp_avg". The order of rows and every random draw are
functions of the seed, the step and the shard, so the step number is the whole state of data and
generators. Reading runs no code and opens no file but these: the manifest is JSON, the rest plain bytes.
"""

import collections
import hashlib
import json
import math
import os
import re
import stat
from pathlib import Path

import torch

import hd_pissa
import hd_pissa_extra
from training import folder, report
from training.folder import digest, sync
from training.processes import everywhere, say

FORMAT = 2
DTYPES = {str(d)[6:]: d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool,
                                  torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)}
# What may differ when a run goes on; the last three lose bit equality. Anything else is another run. Of
# model, data and tokenizer not the path counts but what was read there: the digests "weights" and "rows".
MAY_CHANGE = {"out", "resume", "save_every", "save_minutes", "keep", "check_every", "skip_nonfinite", "log",
              "save_dtype", "gradient_checkpointing", "packing", "heartbeat", "timeout", "bucket_mb", "basis",
              "svd_cache", "shard_weights", "dry_run", "torch",
              "processes", "eval", "eval_every", "eval_tokens", "execute_generated_code", "threads", "begun",
              "model", "data", "eval_data", "tokenizer", "epochs",
              "device", "exchange", "micro_batch_size"}  # fmt: skip
CHANGES = ("model", "data", "max_steps", "warmup", "shards", "processes", "device", "exchange",
           "micro_batch_size")                          # what is said of them where a run goes on


# ---- Checksums: one flipped bit in one replica changes them ------------------------------------------------


def trained(adapters):
    """(name, tensor or tensors of one weight, first position, sharded?) of all that the run changes."""
    for slot in adapters.slots:
        local, rows = slot.local()
        parts = [local] if slot.low is None else [local, slot.low]
        yield slot.name, parts, rows.start * local[:1].numel(), local is not slot.module.weight
    if not adapters.slots:
        yield from ((name, [p], 0, False) for name, p in adapters.named_parameters())


@torch.no_grad()
def check_replicas(adapters, device) -> dict[str, int]:
    """Checksums of the trained weights, after comparing them over the processes; ValueError where W differs.

    Parts of a sharded weight have no replica: their sums are added, to be compared after a checkpoint's load.
    """
    names, sums, sharded = [], [], False
    for name, parts, start, cut in trained(adapters):
        names.append(name)
        sums.append(sum(hd_pissa_extra.checksum(part, start) for part in parts))
        sharded |= cut
    signed = [(s + 2**63) % 2**64 - 2**63 for s in sums]
    table = hd_pissa.gather_shards(torch.tensor([signed], dtype=torch.int64, device=device)).tolist()
    if sharded:
        return {name: sum(column) % 2**64 for name, column in zip(names, zip(*table))}
    for name, column in zip(names, zip(*table)):
        most = collections.Counter(column).most_common(1)[0][0]
        if others := [i for i, s in enumerate(column) if s != most]:
            raise ValueError(f"W differs between processes: {name} on processes {others} is not that of the "
                             "others. A bit flipped in memory or on a link: start the same command again, it "
                             "continues from the last checkpoint. Or the processors are unlike, and round a "
                             "product in other ways: --exchange all_reduce does not mind")
    return {name: s % 2**64 for name, s in zip(names, table[0])}


# ---- Writing -----------------------------------------------------------------------------------------------


def tensors_of(model, adapters, optimizer) -> dict[str, torch.Tensor]:
    """Everything that changes in a run, by names that do not depend on the number of processes."""
    hd_pissa_extra.reshard(model)
    state = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    cut = {slot.name + ".low": slot.module.weight for slot in adapters.slots
           if hasattr(slot.module.weight, "to_local")}  # fmt: skip
    for name, tensor in adapters.tensors().items():
        if name in cut:
            tensor = hd_pissa_extra.as_sharded(tensor, cut[name])
        state[f"adapters.{name}"] = tensor.detach()
    for name, p in adapters.named_parameters(adapters.first):
        for key, value in optimizer.state.get(p, {}).items():
            state[f"moments.{name}.{key}"] = value
    return state


def write_tensors(path: Path, state: dict) -> tuple[list, dict]:
    """Write this process's part of `state` to a file: ([size, digest], {name: [dtype, shape, part]}).

    part        [file, offset in it, first row, rows] of the rows that lie there
    A shard's tensors are on one process alone, and of a sharded weight each has its rows. All others
    are equal on all processes; these are dealt, by size.
    """
    loads, entries, h = [0] * hd_pissa.world_size(), {}, hashlib.blake2b(digest_size=32)
    with open(path, "wb") as file:
        for name, tensor in state.items():
            whole = tensor if tensor.dim() else tensor.view(1)
            local, rows = hd_pissa_extra.own_rows(whole)
            if local is whole and not re.search(r"\.shard\d+\.", name):
                owner = loads.index(min(loads))
                loads[owner] += local.nbytes
                if owner != hd_pissa.process_index():
                    continue
            data = local.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
            part = [path.name, file.tell(), rows.start, local.shape[0]]
            entries[name] = [str(tensor.dtype)[6:], list(tensor.shape), part]
            h.update(data)
            file.write(data)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return [size, h.hexdigest()], entries


def sealed(manifest: dict) -> dict:
    """The manifest with the digest of all that is in it."""
    text = json.dumps({k: v for k, v in manifest.items() if k != "digest"}, sort_keys=True)
    return manifest | {"digest": hashlib.blake2b(text.encode(), digest_size=32).hexdigest()}


def save(folder_: Path, step: int, model, adapters, optimizer, config: dict, extra: dict, device,
         keep: int = 2) -> Path:
    """Write folder_/step_N under a temporary name, flush it, rename it, then remove all but `keep`.

    ValueError on every process if any of them cannot write; the checkpoints before are untouched then.
    """
    temporary, final = folder_ / f"step_{step}.tmp", folder_ / f"step_{step}"

    def prepare():
        if hd_pissa.process_index() == 0:
            for stale in [*folder_.glob("step_*.tmp")]:                 # what a killed save has left
                folder.remove_folder(stale, folder.CHECKPOINT)
            temporary.mkdir(parents=True)

    def visible():
        if not temporary.is_dir():
            raise OSError(f"{temporary} is not there on process {hd_pissa.process_index()}; --out must lie "
                          "on a file system that all machines share")

    def finish():
        if hd_pissa.process_index() == 0:
            more = extra | {"merges": adapters.step, "mean_over": adapters.mean_over}
            manifest = sealed(dict(format=FORMAT, step=step, config=json.loads(json.dumps(config)),
                                   extra=more, sums=sums, files=files, tensors=tensors))
            (temporary / "manifest.json").write_text(json.dumps(manifest) + "\n")
            sync(temporary / "manifest.json")
            sync(temporary)
            folder.remove_folder(final, folder.CHECKPOINT)              # one that was found damaged
            if final.exists():                                          # someone's file is in it
                for path in sorted(temporary.iterdir(), key=lambda path: path.suffix == ".json"):
                    os.replace(path, final / path.name)
                temporary.rmdir()
            else:
                temporary.rename(final)
            sync(folder_)
            before = [path for path in steps(folder_) if int(path.name[5:]) <= step]
            for path in before[:-keep]:
                try:
                    folder.remove_folder(path, folder.CHECKPOINT)
                except OSError as e:                                    # someone protects it
                    say(f"{path} stays: {e}")

    state = tensors_of(model, adapters, optimizer)          # first: it lets go of weights gathered whole
    sums = check_replicas(adapters, device)
    file = temporary / f"tensors_{hd_pissa.process_index()}.bin"
    try:
        everywhere(prepare)
        everywhere(visible)
        own = everywhere(lambda: [file.name, *write_tensors(file, state)])
        files, tensors = {}, {}
        for name, written, entries in hd_pissa.everywhere(lambda: own):
            files[name] = written
            for key, (dtype, shape, part) in entries.items():
                tensors.setdefault(key, [dtype, shape, []])[2].append(part)
        everywhere(finish)
    except ValueError as e:
        if hd_pissa.process_index() == 0:
            folder.remove_folder(temporary, folder.CHECKPOINT)
        before = [path.name for path in steps(folder_) if path != final]
        kept = f"{before[-1]} is whole, the same command continues from it" if before else "no other yet"
        raise ValueError(f"the checkpoint of step {step} was not written: {e}. Make room or repair "
                         f"{folder_}; {kept}") from e
    return final


# ---- Finding -----------------------------------------------------------------------------------------------


def steps(folder_: Path) -> list[Path]:
    """The finished checkpoints in a folder, oldest first."""
    found = [path for path in folder_.glob("step_*") if path.is_dir() and path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def read_manifest(path: Path) -> dict:
    """The manifest of a checkpoint; ValueError names a file that is not as it was written.

    Processes share the reading; all raise alike.
    """
    unusable = "this checkpoint cannot be used; give another --resume, or --resume never"

    def check():
        file = path / "manifest.json"
        try:
            if file.is_symlink():
                raise ValueError("a link")
            manifest = folder.parsed(folder.read(file, 1 << 30))
            there = manifest["format"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{file} is not a checkpoint's manifest ({type(e).__name__}): "
                             f"{unusable}") from None
        if there != FORMAT and isinstance(there, int):
            age = "newer" if there > FORMAT else "older"
            raise ValueError(f"{path} is of format {there}, this program reads format {FORMAT}; use the "
                             f"{age} program that wrote it, or --resume never")
        if manifest.get("digest") != sealed(manifest)["digest"]:
            raise ValueError(f"{file} is damaged, it does not fit its own digest: {unusable}")
        if wrong := misfit(manifest):
            raise ValueError(f"{file} is not a checkpoint's manifest ({wrong}): {unusable}")
        files = manifest["files"]
        for name in sorted(files)[hd_pissa.process_index()::hd_pissa.world_size()]:
            file, (size, _) = path / name, files[name]
            if not file.is_file() or not stat.S_ISREG(os.lstat(file).st_mode):
                raise ValueError(f"{file} is missing: {unusable}")
            if file.stat().st_size != size:
                raise ValueError(f"{file} has {file.stat().st_size} of its {size} bytes: {unusable}")
            if digest(file) != files[name]:
                raise ValueError(f"{file} is damaged, its digest is not the manifest's: {unusable}")
        return manifest

    return everywhere(check)


def misfit(manifest: dict) -> str:
    """What in a manifest is not of the kind that `save` writes; "" if all is."""
    def count(value, least=0):
        return type(value) is int and least <= value < 1 << 62

    def part(value, shape, size):
        file, offset, first, rows = value
        width = size * math.prod(shape[1:])
        whole = shape[0] if shape else 1
        return (file in files and all(map(count, (offset, first, rows))) and first + rows <= whole
                and offset + rows * width <= files[file][0])

    def tensor(value):
        dtype, shape, parts = value
        return (dtype in DTYPES and all(map(count, shape)) and isinstance(shape, list)
                and all(part(p, shape, DTYPES[dtype].itemsize) for p in parts))

    def table(value):
        return all(isinstance(row[key], (int, float)) for row in (value["all"], *value.values())
                   for key in ("loss", "exact_match", "rows"))

    checks = {
        "step": lambda v: count(v, 1),
        "config": lambda v: all(count(v[key], 1) for key in ("rank", "shards", "processes")),
        "extra": lambda v: (count(v["merges"]) and count(v["mean_over"], 1) and table(v["before"])
                            and all(type(s) is int for s in v["base"].values())),
        "sums": lambda v: all(type(s) is int for s in v.values()),
        "files": lambda v: all(re.fullmatch(r"tensors_\d+\.bin", name) and count(size) and isinstance(h, str)
                               for name, (size, h) in v.items()),
        "tensors": lambda v: all(map(tensor, v.values())),
    }  # fmt: skip
    files = manifest.get("files")
    for key in ("files", *checks):
        try:
            if not checks[key](manifest[key]):
                return key
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            return key
    return ""


def weights_of(model) -> str:
    """A digest of the model's parameters, which its path may not tell; ValueError where one is NaN or Inf."""
    def check():
        for name, p in model.named_parameters():
            if not p.isfinite().all():
                raise ValueError(f"--model: {name} holds NaN or Inf; the file is damaged, get it again")

    everywhere(check)
    sums = [(name, hd_pissa_extra.checksum(p)) for name, p in model.named_parameters()]
    return hashlib.blake2b(repr(sums).encode(), digest_size=16).hexdigest()


def same_rates(there: dict, config: dict, step: int) -> bool:
    """Has every step after `step` the same rate under both, although --max_steps or --warmup differ?"""
    try:
        a, b = (hd_pissa.lr_factor(step, c["max_steps"], c["warmup"], c["schedule"]) for c in (there, config))
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return False
    return a == b and there["schedule"] == config["schedule"] == "constant" and step <= config["max_steps"]


def same_run(there: dict, config: dict, what, step: int | None = None) -> None:
    """Raise ValueError with both values where `config` is not `there`, that of the run of `what`.

    step        of the checkpoint to go on from: then only the rates of later steps count
    """
    config = json.loads(json.dumps(config))
    other = {key for key in config.keys() | there.keys() if config.get(key) != there.get(key)} - MAY_CHANGE
    if "weights" not in there:              # written before there was this digest
        other -= {"weights"}
    if step is not None and same_rates(there, config, step):
        other -= {"max_steps", "warmup"}
    plain = config.get("method") == config.get("init") == "hd_pissa" and config.get("alpha") is None
    counts = [c.get(key) for c in (config, there) for key in ("shards", "rank")]
    if plain and all(type(n) is int for n in counts) and math.prod(counts[:2]) == math.prod(counts[2:]):
        other -= {"shards", "rank"}         # the same K r components, dealt anew
    if other:
        of = {"weights": "the digest of --model's weights", "rows": "the digest of --data's rows"}
        pairs = "; ".join(f"{of.get(k, '--' + k)} is {config.get(k)} here, {there.get(k)} there"
                          for k in sorted(other))
        if "max_steps" in other:
            pairs += " (a run goes on to another --max_steps with --schedule constant, after its warm-up)"
        raise ValueError(f"{what} is of another run: {pairs}. Give its values, or another --out, or "
                         "--resume never to overwrite it")


def newest_whole(found: list[Path]) -> tuple[Path, dict] | None:
    """(checkpoint, manifest) of the newest one that can be used; ValueError of the newest if none can."""
    first = None
    for path in reversed(found):
        try:
            return path, read_manifest(path)
        except ValueError as e:
            say(f"not used: {e}")
            first = first or e
    if first:
        raise first
    return None


def given(path: Path) -> list[Path]:
    """The checkpoints that --resume PATH names: itself, or those in a run's folder or its checkpoint/."""
    found = [path] if (path / "manifest.json").exists() else steps(path / "checkpoint") or steps(path)
    if not found:
        raise ValueError(f"--resume {path}: no finished checkpoint there; give an --out folder of a run or "
                         "its checkpoint/step_N, or --resume never")
    return found


def look(resume: str, out: Path, config: dict) -> tuple[Path, dict] | None:
    """(checkpoint, its manifest) that this command goes on from; None to begin anew.

    never       begins anew; but not where torchrun has started this command again, nor where a signal
                has stopped it and it has promised to go on
    PATH        from there, until OUT has checkpoints of this run itself
    """
    own = everywhere(lambda: steps(out / "checkpoint"))
    if resume == "never":
        if not interrupted(own, config):
            return None
        say("--resume never: this command was interrupted and goes on; to begin anew, give another --out")
    elif resume != "auto":
        paths = everywhere(lambda: given(Path(resume)))
        if own and not folder.inside(Path(resume), out):
            path, manifest = newest_whole(own)
            same_run(manifest["config"], config, f"{path}, which --resume {resume} would overwrite,",
                     manifest["step"])
        else:
            own = paths
    found = newest_whole(own)
    if found:
        same_run(found[1]["config"], config, found[0], found[1]["step"])
    return found


def finished(resume: str, out: Path, resumed, config: dict) -> dict | None:
    """The result of this very run where it has ended: nothing is done again, or overwritten."""
    if resumed and resumed[0] == out / "checkpoint" / f"step_{config['max_steps']}":
        return report.finished(out, resumed[0])
    own = resumed and resumed[0].parent == out / "checkpoint"
    there = None if own or resume == "never" else folder.config_of(out)
    if there and everywhere(lambda: bool(folder.read_result(out))):     # its checkpoints were deleted
        same_run(there, config, out)
        return report.finished(out, out)
    return None


def interrupted(own: list[Path], config: dict) -> bool:
    """Is the newest checkpoint of this very command, which a signal has stopped or torchrun started again?"""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    try:
        manifest = read_manifest(own[-1]) if own else None
        if not manifest or not again and not manifest["extra"].get("stopped"):
            return False
        same_run(manifest["config"], config, own[-1])
    except ValueError:
        return False
    return True


# ---- Reading -----------------------------------------------------------------------------------------------


def go_on(path: Path, manifest: dict, model, adapters, optimizer, config: dict, device) -> tuple[int, dict]:
    """Load the checkpoint; (its step, what the run knew from its start), and say what has changed since."""
    start = load(path, manifest, model, adapters, optimizer, config, device)
    pairs = [(key, manifest["config"].get(key), config.get(key)) for key in CHANGES]
    say(f"going on after step {start} of {path}" + "".join(
        f"; {key} was {was}, is {now}" for key, was, now in pairs if was != now))
    return start, {key: manifest["extra"][key] for key in ("before", "base")}


def read_rows(path: Path, name: str, entry: list, first: int, rows: int) -> torch.Tensor:
    """Rows first, first + 1, ... of a tensor in a checkpoint, from the files that hold them."""
    dtype, shape, parts = entry
    width = DTYPES[dtype].itemsize * math.prod(shape[1:])               # bytes of a row
    out = torch.empty((rows, *shape[1:]), dtype=DTYPES[dtype])
    data, filled = memoryview(out.view(-1).view(torch.uint8).numpy()), 0
    for file, offset, start, count in sorted(parts, key=lambda part: part[2]):
        a, b = max(first + filled, start), min(first + rows, start + count)
        if a < b and a == first + filled:
            with open(path / file, "rb") as handle:
                handle.seek(offset + (a - start) * width)
                handle.readinto(data[filled * width:(b - first) * width])
            filled = b - first
    if filled < rows:
        raise ValueError(f"{path} holds {filled} of {rows} rows of {name}")
    return out if shape else out[0]


def pieces(name: str, shape, r: int, there: int) -> tuple[list[str], tuple, int, int]:
    """Where components of a shard of rank r lie in a checkpoint of rank `there`.

    Shard i holds components ir .. (i+1)r - 1 along one side of its tensors. Returns the stored tensors' names
    and shape, that side's dimension, and at which of their joint components the shard begins.
    """
    match = re.fullmatch(r"(.*\.shard)(\d+)(\.d?([AB])(?:\.\w+)?)", name)
    if not match or not shape:
        return [name if not match else f"{match[1]}{int(match[2]) * r // there}{match[3]}"], shape, 0, 0
    first = int(match[2]) * r // there
    last = -(-(int(match[2]) + 1) * r // there)
    dim = 1 if match[4] == "A" else 0
    stored = tuple(there if d == dim else size for d, size in enumerate(shape))
    names = [f"{match[1]}{j}{match[3]}" for j in range(first, last)]
    return names, stored, dim, int(match[2]) * r - first * there


@torch.no_grad()
def load(path: Path, manifest: dict, model, adapters, optimizer, config: dict, device) -> int:
    """Fill model, adapters and optimizer from a checkpoint; its step. Any number of processes, K r unchanged.

    Names and shapes are compared before the first tensor is touched, so that nothing is ever half loaded.
    """
    r, there, stored = config["rank"], manifest["config"]["rank"], manifest["tensors"]
    wanted = tensors_of(model, adapters, optimizer)
    for name, p in adapters.named_parameters(adapters.first):           # moments: a new optimizer has none
        (first, *_), *_ = pieces(f"moments.{name}", p.shape, r, there)
        for key in (k[len(first) + 1:] for k in stored if k.startswith(first + ".")):
            dtype, shape = DTYPES[stored[f"{first}.{key}"][0]], stored[f"{first}.{key}"][1]
            # Strides of p as well, as the optimizer itself would make it.
            moment = torch.zeros_like(p, dtype=dtype) if shape else torch.zeros((), dtype=dtype)
            wanted[f"moments.{name}.{key}"] = optimizer.state[p][key] = moment
    plan = []

    def check():
        wrong = []
        for name, tensor in wanted.items():
            parts, shape, dim, start = pieces(name, tuple(tensor.shape), r, there)
            kind = [str(tensor.dtype)[6:], list(shape)]
            wrong += [f"{part} {tuple(shape)}" for part in parts if stored.get(part, [])[:2] != kind]
            plan.append((tensor, parts, dim, start))
        if wrong:
            raise ValueError(f"{path} does not hold {', '.join(wrong[:3])}; it is of another model; give "
                             "another --resume, or --resume never")

    def fill():
        for tensor, parts, dim, start in plan:
            if not tensor.dim():
                tensor.copy_(read_rows(path, parts[0], stored[parts[0]], 0, 1))
                continue
            local, rows = hd_pissa_extra.own_rows(tensor)
            if len(parts) == 1 and stored[parts[0]][1] == list(tensor.shape):
                local.copy_(read_rows(path, parts[0], stored[parts[0]], rows.start, local.shape[0]))
            else:
                joint = [read_rows(path, name, stored[name], 0, stored[name][1][0]) for name in parts]
                tensor.copy_(torch.cat(joint, dim).narrow(dim, start, tensor.shape[dim]))

    everywhere(check)
    everywhere(fill)
    adapters.resume(manifest["extra"]["merges"], manifest["extra"]["mean_over"])
    sums = check_replicas(adapters, device)
    if off := [name for name, value in sums.items() if value != manifest["sums"].get(name)]:
        raise ValueError(f"{path}: {off[0]} is not the weight that was saved, although its file is whole; "
                         "memory or the link is at fault: start the same command again, here or elsewhere")
    return manifest["step"]


def bytes_of(args, model, layers) -> tuple[int, int]:
    """About how many bytes a checkpoint and the result of this run need, before anything is attached."""
    width = {"float64": 8, "bfloat16": 2}.get(args.dtype, 4)
    result = width * sum(p.numel() for p in model.parameters())
    sides = sum(sum(module.weight.shape) for _, module in layers)
    if args.method == "full":
        return 3 * result, result
    shards = args.shards if args.method == "hd_pissa" else 1
    # A_i, B_i, sums and increments' two moments; low halves beside bfloat16 weights
    factors = (4 + args.export_lora) * shards * args.rank * sides * max(width, 4)
    low = sum(module.weight.numel() for _, module in layers) * 2 if args.dtype == "bfloat16" else 0
    return result + factors + low, result
