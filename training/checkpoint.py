"""A run on disk: everything that changes, written whole or not at all, and read back on any processes.

    OUT/checkpoint/step_N/          a checkpoint; step_N.tmp is one that was never finished
        __0_0.distcp ...            tensors, by torch.distributed.checkpoint, each process its own
        .metadata                   where each tensor lies
        manifest.json               format, config, digest of every file, checksum of every trained weight

Names in it do not depend on the number of processes: "model.<name>", "adapters.<module path>.shard<i>.A" with
i the global shard, "moments.<increment>.exp_avg". The order of rows and every random draw are functions of
the seed, the step and the shard, so the step number is the whole state of data and generators.
"""

import collections
import contextlib
import json
import pickle
import re
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import hd_pissa
import hd_pissa_extra
from training.folder import digest, sync
from training.processes import say, together

FORMAT = 1
# What may differ when a run goes on; the last two lose bit equality. Anything else is another run.
MAY_CHANGE = {"out", "resume", "save_every", "save_minutes", "check_every", "skip_nonfinite", "heartbeat",
              "timeout", "bucket_mb", "basis", "svd_cache", "shard_weights", "dry_run", "torch", "processes",
              "threads", "device", "exchange", "eval", "eval_every", "eval_tokens",
              "execute_generated_code"}  # fmt: skip


class _Metadata(pickle.Unpickler):
    """Opens .metadata, a pickle of torch's, with the few names that one needs: it can call nothing else."""

    names = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties",
            "ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16", "int32",
                  "int64", "bool"},
        "collections": {"OrderedDict"},
        "pathlib": {"PosixPath", "WindowsPath"},
    }  # fmt: skip

    def find_class(self, module, name):
        if name not in self.names.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args, **kwargs):
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = _Metadata(file).load()
        except (OSError, EOFError, AttributeError, IndexError, pickle.UnpicklingError) as e:
            raise ValueError(f"{path} cannot be read: {e}; the checkpoint cannot be used; give an "
                             "older one to --resume, or never") from None
        if getattr(metadata, "storage_meta", None) is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


@contextlib.contextmanager
def quiet():
    """One process without a process group is what `no_dist` says; torch warns of it all the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


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
        sums.append(sum(hd_pissa.checksum(part, start) for part in parts))
        sharded |= cut
    signed = [(s + 2**63) % 2**64 - 2**63 for s in sums]
    table = hd_pissa.gather_shards(torch.tensor([signed], dtype=torch.int64, device=device)).tolist()
    if sharded:
        return {name: sum(column) % 2**64 for name, column in zip(names, zip(*table))}
    for name, column in zip(names, zip(*table)):
        most = collections.Counter(column).most_common(1)[0][0]
        if others := [i for i, s in enumerate(column) if s != most]:
            raise ValueError(f"W differs between processes: {name} on processes {others} is not that of the "
                             "others. A bit flipped in memory or on a link; start the same command again, it "
                             "continues from the last checkpoint")
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


def clean(folder: Path) -> None:
    """Remove what a killed save has left."""
    for stale in folder.glob("step_*.tmp") if folder.is_dir() else ():
        shutil.rmtree(stale, ignore_errors=True)


def save(folder: Path, step: int, model, adapters, optimizer, config: dict, extra: dict, device) -> Path:
    """Write folder/step_N under a temporary name, flush it, rename it, then remove what it replaces.

    ValueError on every process if any of them cannot write; the checkpoint before is untouched then.
    """
    temporary, final = folder / f"step_{step}.tmp", folder / f"step_{step}"

    def prepare():
        if hd_pissa.process_index() == 0:
            clean(folder)
            temporary.mkdir(parents=True)

    def visible():
        if not temporary.is_dir():
            raise OSError(f"{temporary} is not there on process {hd_pissa.process_index()}; --out must lie on a "
                          "file system that all machines share")

    def write():
        try:
            with quiet():
                dcp.save(state, storage_writer=dcp.FileSystemWriter(temporary),
                         no_dist=hd_pissa.world_size() == 1)
        except CheckpointException as e:
            why = "; ".join(f"process {i}: {error}" for i, (error, _) in e.failures.items())
            # torch's file writer may hide the reason: "unexpected pos 64 vs 0"
            full = shutil.disk_usage(temporary).free < 2**20 and "No space left" not in why
            raise OSError(f"No space left on device ({why})" if full else why) from e

    def digests():
        own = [*temporary.glob(f"__{hd_pissa.process_index()}_*")]
        own += [temporary / ".metadata"] if hd_pissa.process_index() == 0 else []
        return {path.name: digest(path) for path in own}

    def finish():
        if hd_pissa.process_index() == 0:
            more = extra | {"merges": adapters.step, "mean_over": adapters.mean_over}
            manifest = dict(format=FORMAT, step=step, config=config, extra=more, sums=sums, files=files)
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
            sync(temporary / "manifest.json")
            sync(temporary)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            sync(folder)
            for path in steps(folder):
                if path != final:
                    shutil.rmtree(path, ignore_errors=True)

    state = tensors_of(model, adapters, optimizer)          # first: it lets go of weights gathered whole
    sums = check_replicas(adapters, device)
    try:
        together(prepare)
        together(visible)
        together(write)
        files = {}
        for part in hd_pissa.everywhere(digests):
            files |= part
        together(finish)
    except ValueError as e:
        if hd_pissa.process_index() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        before = [path.name for path in steps(folder)]
        kept = f"{before[-1]} is whole, the same command continues from it" if before else "no other yet"
        raise ValueError(f"the checkpoint of step {step} was not written: {e}. Make room or repair {folder}; "
                         f"{kept}") from e
    return final


# ---- Reading -----------------------------------------------------------------------------------------------


def steps(folder: Path) -> list[Path]:
    """The finished checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("step_*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def find(resume: str, out: Path) -> Path | None:
    """The checkpoint that `--resume` means: the newest in `out`, or of the path given; None to begin anew."""
    if resume == "never":
        return None
    where = out if resume == "auto" else Path(resume)
    if re.fullmatch(r"step_\d+", where.name) and where.is_dir():
        return where
    newest = (steps(where / "checkpoint") or steps(where) or [None])[-1]
    if newest is None and resume != "auto":
        raise ValueError(f"--resume {resume}: no finished checkpoint there; give an --out folder of a run or "
                         "its checkpoint/step_N, or --resume never")
    return newest


def read_manifest(path: Path) -> dict:
    """The manifest of a checkpoint; ValueError names a file that is not as it was written.

    Processes share the reading; all raise alike.
    """
    unusable = "this checkpoint cannot be used; give another --resume, or --resume never"

    def check():
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            files, there = manifest["files"], manifest["format"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path / 'manifest.json'} is not a checkpoint's manifest ({type(e).__name__}): "
                             f"{unusable}") from None
        if there != FORMAT:
            age = "newer" if there > FORMAT else "older"
            raise ValueError(f"{path} is of format {there}, this program reads format {FORMAT}; use the "
                             f"{age} program that wrote it, or --resume never")
        for name in sorted(files)[hd_pissa.process_index()::hd_pissa.world_size()]:
            file, (size, _) = path / name, files[name]
            if Path(name).name != name or not file.is_file():
                raise ValueError(f"{file} is missing: {unusable}")
            if file.stat().st_size != size:
                raise ValueError(f"{file} has {file.stat().st_size} of its {size} bytes: {unusable}")
            if digest(file) != files[name]:
                raise ValueError(f"{file} is damaged, its digest is not the manifest's: {unusable}")
        return manifest

    return together(check)


def same_run(manifest: dict, config: dict, path: Path) -> None:
    """Raise ValueError with both values where `config` is not that of the run which wrote the checkpoint."""
    there = manifest["config"]
    config = json.loads(json.dumps(config))
    other = {key for key in config.keys() | there.keys() if config.get(key) != there.get(key)} - MAY_CHANGE
    product = [c.get("shards", 0) * c.get("rank", 0) for c in (config, there)]
    plain = config.get("method") == config.get("init") == "hd_pissa" and config.get("alpha") is None
    if plain and product[0] == product[1]:
        other -= {"shards", "rank"}         # the same K r components, dealt anew
    if other:
        pairs = "; ".join(f"--{k} is {config.get(k)} here, {there.get(k)} there" for k in sorted(other))
        raise ValueError(f"{path} is of another run: {pairs}. Give its values, or another --out, or "
                         "--resume never to overwrite it")


def look(resume: str, out: Path, config: dict) -> tuple[Path, dict] | None:
    """(checkpoint, its manifest) that this command goes on from; None to begin anew."""
    path = together(lambda: find(resume, out))
    if path is None:
        return None
    manifest = read_manifest(path)
    same_run(manifest, config, path)
    return path, manifest


def go_on(path: Path, manifest: dict, model, adapters, optimizer, config: dict, device) -> tuple[int, dict]:
    """Load the checkpoint; (its step, what the run knew from its start), and say what has changed since."""
    start = load(path, manifest, model, adapters, optimizer, config, device)
    was = {key: manifest["config"][key] for key in ("exchange", "device", "shards", "processes")}
    say(f"going on after step {start} of {path}" + "".join(
        f"; {key} was {value}, is {config[key]}" for key, value in was.items() if value != config[key]))
    return start, manifest["extra"]


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
    r, there = config["rank"], manifest["config"]["rank"]
    reader = _Reader(path)
    stored = together(reader.read_metadata).state_dict_metadata
    wanted = tensors_of(model, adapters, optimizer)
    names = dict(adapters.named_parameters(adapters.first))
    for name, p in names.items():                                       # moments: a new optimizer has none
        (first, *_), *_ = pieces(f"moments.{name}", p.shape, r, there)
        for key in (k[len(first) + 1:] for k in stored if k.startswith(first + ".")):
            old = stored[f"{first}.{key}"]
            shape = p.shape if len(old.size) else old.size
            where = p.device if len(shape) else "cpu"
            moment = torch.zeros(shape, dtype=old.properties.dtype, device=where)
            if len(shape):              # strides of p as well, as the optimizer itself would make it
                moment = torch.zeros_like(p, dtype=old.properties.dtype)
            optimizer.state[p][key] = moment
            wanted[f"moments.{name}.{key}"] = optimizer.state[p][key]
    state, plan = {}, []
    wrong = []
    for name, tensor in wanted.items():
        parts, shape, dim, start = pieces(name, tuple(tensor.shape), r, there)
        for part in parts:
            if part not in stored or tuple(stored[part].size) != tuple(shape):
                wrong.append(f"{part} {tuple(shape)}")
            elif ".shard" in name:
                state[part] = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
            else:
                state[part] = tensor
        plan.append((tensor, parts, dim, start))

    def check():
        if wrong:
            raise ValueError(f"{path} does not hold {', '.join(wrong[:3])}; it is of another "
                             "model; give another --resume, or --resume never")

    together(check)
    with quiet():
        dcp.load(state, storage_reader=reader, no_dist=hd_pissa.world_size() == 1)
    for tensor, parts, dim, start in plan:
        if tensor is not state[parts[0]]:
            joint = torch.cat([state[part] for part in parts], dim) if tensor.dim() else state[parts[0]]
            tensor.copy_(joint.narrow(dim, start, tensor.shape[dim]) if tensor.dim() else joint)
    adapters.resume(manifest["extra"]["merges"], manifest["extra"]["mean_over"])
    sums = check_replicas(adapters, device)
    if off := [name for name, value in sums.items() if value != manifest["sums"].get(name)]:
        raise ValueError(f"{path}: {off[0]} is not the weight that was saved, although its file is whole; "
                         "memory or the link is at fault: start the same command again, here or elsewhere")
    return manifest["step"]
