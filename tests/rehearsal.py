"""A rehearsal of what a GPU would see, on a machine that has none.

    import rehearsal                            # before torch, in a process of its own; needs g++
    with rehearsal.Counts() as seen:            # values: tensors of cuda:N, computed by CPU kernels
        model.to("cuda:1"); ...
    with rehearsal.Counts(shapes=True) as seen: # shapes alone (torch's fake tensors): 7B models in a minute
    seen.launches, seen.waits, seen.traffic, seen.sent, seen.peak

    python tests/rehearsal.py llama layers=2 exchange=all_reduce        # a step at LLaMA-2-7B's shapes
    python tests/rehearsal.py table                                     # tests/bench/rehearsal.json

rehearsal.cpp gives torch a CUDA of eight devices in this machine's memory. Devices, autograd's threads for
each of them, autocast and generators are then torch's own. Counts raises where a kernel would meet tensors of
two devices and where NCCL would refuse, and counts kernel launches, waits of the host for the device, bytes
of collectives and of memory, and the highest sum of allocated memory, each by the project's line. Products
are as coarse as TF32 where torch is set so. Not seen: time, CUDA's other rounding, races between streams.

Small tensors keep their numbers among shapes, since the loop reads flags from them; what only large ones know
is 1.
"""

import collections
import contextlib
import ctypes
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import types
import weakref
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]


def library() -> str:
    """rehearsal.cpp compiled for this torch: ten seconds, once."""
    torch_folder = Path(find_spec("torch").origin).parent
    source = HERE / "rehearsal.cpp"
    key = source.read_bytes() + (torch_folder / "version.py").read_bytes() + str(torch_folder).encode()
    folder = Path(tempfile.gettempdir()) / f"rehearsal-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise OSError(f"{folder} belongs to somebody else; set TMPDIR")
    path = folder / f"{hashlib.blake2b(key, digest_size=8).hexdigest()}.so"
    if not path.exists():
        unfinished = f"{path}.{os.getpid()}"
        subprocess.run(
            ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", str(source), "-o", unfinished,
             *(f"-I{torch_folder}/include{part}" for part in ("", "/torch/csrc/api/include")),
             f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib", "-lc10", "-ltorch_cpu"], check=True)
        os.replace(unfinished, path)
    return str(path)


if "torch" in sys.modules:
    raise ImportError("import rehearsal before torch: torch asks once whether there is a CUDA")
gpu = ctypes.CDLL(library())
gpu.resize_storage.argtypes = ctypes.c_void_p, ctypes.c_size_t

import tf32  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  (looks at torch.cuda as it is)
import torch.distributed as dist  # noqa: E402
from torch._C._distributed_c10d import FakeWork  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only  # noqa: E402
from torch.utils.weak import WeakIdKeyDictionary  # noqa: E402

# ---- What Python asks of torch.cuda ------------------------------------------------------------------------


def index_of(device) -> int:
    index = device if isinstance(device, int) else torch.device(device).index
    return gpu.get_device() if index is None else index


def exchange(index: int) -> int:
    """Make another device current; which one it was."""
    before = gpu.get_device()
    if index >= 0:
        gpu.set_device(index)
    return before


class Stream:
    """A stream or an event on which everything has happened already."""

    def __init__(self, *_, **__):
        self.device = torch.device("cuda", gpu.get_device())

    def __getattr__(self, name):        # wait_stream, record, synchronize, ...
        return lambda *_, **__: Stream()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """A fused kernel, which keeps q, k, v, the output and a number a row: torch would look for CUDA's own."""
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def one_kernel(function):
    """What is one kernel on a GPU: it reads its arguments, writes its result and what it changes."""
    def one(*args):
        seen, given = Counts.entered[-1], [t for t in args if isinstance(t, torch.Tensor)]
        launches, traffic, versions = seen.launches.copy(), seen.traffic.copy(), [t._version for t in given]
        peak, peaks = seen.peak, seen.peaks.copy()
        out = function(*args)
        changed = [t for t, version in zip(given, versions) if t._version != version]
        made = [] if out is None else [out]
        seen.launches, seen.traffic, seen.peak, seen.peaks = launches, traffic, peak, peaks
        seen.highest()                  # what the function itself made on its way, the kernel does not
        seen.launches[seen.phase, project_line()] += 1
        seen.traffic[seen.phase, project_line()] += sum(map(size_of, given + changed + made))
        return out
    return one


def mm(left, right, out_dtype=None, plain=torch.mm):
    """bfloat16 in, float32 out, one kernel on a GPU; no kernel of the CPU's."""
    if out_dtype is None:
        return plain(left, right)
    return one_kernel(lambda a, b: plain(a.to(out_dtype), b.to(out_dtype)))(left, right)


def resize(storage, size):
    if storage.device.type == "cuda":
        gpu.resize_storage(storage._cdata, size)
    else:
        resize.plain(storage, size)
    for counts in Counts.entered:
        counts.hold(storage)
    return storage


resize.plain = torch.UntypedStorage.resize_
properties = types.SimpleNamespace(name="a rehearsal", total_memory=80 << 30, major=9, minor=0,
                                   multi_processor_count=132)
for name, value in dict(
        _lazy_init=lambda: None, is_available=lambda: True, is_initialized=lambda: True,
        device_count=lambda: 8,
        current_device=gpu.get_device, set_device=lambda device: gpu.set_device(index_of(device)),
        _exchange_device=exchange, _maybe_exchange_device=exchange,
        get_device_properties=lambda *_: properties, get_device_name=lambda *_: properties.name,
        get_device_capability=lambda *_: (9, 0), is_bf16_supported=lambda *_, **__: True,
        synchronize=lambda *_: None, empty_cache=lambda: None, _is_in_bad_fork=lambda: False,
        default_generators=tuple(torch.Generator(f"cuda:{i}") for i in range(8)), Stream=Stream, Event=Stream,
        stream=lambda stream: stream, current_stream=lambda *_: Stream(),
        default_stream=lambda *_: Stream()).items():  # fmt: skip
    setattr(torch.cuda, name, value)
    if hasattr(torch.cuda.random, name):
        setattr(torch.cuda.random, name, value)             # it has imported some by name
torch.UntypedStorage.resize_ = resize
torch.mm, torch.nn.functional.scaled_dot_product_attention = mm, attention

import hd_pissa_extra  # noqa: E402


def in_plain_torch(function):
    """Of one of Triton's kernels: the same bits (a test in test_gpu.py)."""
    def plain(*args):
        with mock.patch.object(hd_pissa_extra, "kernels", dict):
            return function(*args)
    return plain


class Kernels(dict):
    """Each of Triton's kernels has the name of the function that does the same in plain torch."""

    def __missing__(self, name):
        self[name] = one_kernel(in_plain_torch(getattr(hd_pissa_extra, name)))
        return self[name]


KERNELS = Kernels(there=True)
hd_pissa_extra.kernels = lambda: KERNELS


def processes(world: int) -> None:
    """torch's fake process group: this is process 0 of `world`, all others do as it does."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    dist.all_gather_object = lambda said, own, **_: said.__setitem__(slice(None), [own] * world)


def nccl(begin):
    """init_process_group where gloo carries what NCCL would."""
    def init(backend=None, *args, **kwargs):
        return begin("gloo" if backend and "nccl" in backend else backend, *args, **kwargs)
    return init


dist.distributed_c10d._get_object_coll_device = lambda group=None: "cuda"   # as of a group of NCCL's
dist.init_process_group = dist.distributed_c10d.init_process_group = nccl(dist.init_process_group)

# ---- Counts ------------------------------------------------------------------------------------------------

# Neither a view nor a kernel; and results for which the host waits.
NOTHING = set("""empty empty_like empty_strided new_empty new_empty_strided _unsafe_view _reshape_alias detach
alias lift_fresh lift_fresh_copy _local_scalar_dense set_ resize_ is_pinned _pin_memory record_stream
bytes_of""".split())
WAITS = set("""_local_scalar_dense nonzero masked_select equal _unique2 unique_dim bincount _linalg_eigh
_linalg_svd linalg_qr multinomial""".split())
NCCL = {torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
        torch.float64, torch.bool}
OVERWRITES = set("copy_ zero_ fill_ bernoulli_ normal_ uniform_ random_".split())   # and do not read
PICKS = set("embedding index index_select gather".split())      # read as much of the first as they write
SMALL = 4096        # numbers of a tensor that keeps them among shapes


class WrongDevice(RuntimeError):
    """What CUDA or NCCL would have refused."""


def project_line() -> str:
    """The innermost line of the project on this thread's stack; "autograd" where there is none."""
    frame = sys._getframe(1)
    while frame:
        name = frame.f_code.co_filename
        if name.startswith(str(HERE.parent)) and name != __file__ and "site-packages" not in name:
            return f"{os.path.basename(name)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "autograd"


def size_of(t) -> int:
    """Bytes of a tensor in memory: expanded, it is not larger for that."""
    return min(t.nbytes, t.untyped_storage().nbytes())


def kernels(name: str, args) -> int:
    """Launches of one operation: foreach kernels take many tensors at once where their layouts agree."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], torch.Tensor)]
    if not name.startswith(("_foreach", "_fused")):
        return 1
    pairs = ((a, b) for row in zip(*lists[:4]) for a, b in zip(row, row[1:]))
    if any(a.dtype != b.dtype or a.stride() != b.stride() for a, b in pairs):
        return len(lists[0])
    depth = min(len(lists), 4) + (not name.endswith("_"))       # counts of steps travel with a fused launch
    most = (110, 64, 48, 36, 30)[min(depth, 5) - 1]         # tensors a launch, as multi_tensor_apply cuts
    blocks = sum(-(-t.numel() // 65536) for t in lists[0])
    return max(-(-len(lists[0]) // most), -(-blocks // 320)) * (2 if name == "_foreach_norm" else 1)


class Counts(TorchDispatchMode):
    """Counters by (phase, line of the project); a phase is what `during` has named."""

    entered: list = []

    def __init__(self, shapes: bool = False):
        super().__init__()
        self.shapes, self.phase = shapes, "loop"
        self.held, self.allocated = {}, 0       # bytes by storage
        self.pinned, self.known = weakref.WeakSet(), WeakIdKeyDictionary()
        self.ends = WeakIdKeyDictionary()       # last numbers of a large tensor's rows: a tag of gradients
        self.begin()

    def begin(self) -> None:
        """Forget what was counted; memory stays."""
        self.launches, self.waits, self.traffic = (collections.Counter() for _ in range(3))
        self.sent, self.peaks, self.peak = collections.Counter(), collections.Counter(), self.allocated
        self.calls = collections.Counter()      # of collectives

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        if self.shapes:
            self.stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            for owner, name, value in ((FakeTensor, "tolist", lambda t: self.tolist(t)),
                                       (FakeTensor, "numpy", lambda _: b""),        # for a checkpoint's file
                                       (torch.random, "fork_rng", lambda *_: contextlib.nullcontext())):
                self.stack.enter_context(mock.patch.object(owner, name, value))
        Counts.entered.append(self)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        Counts.entered.remove(self)
        self.stack.close()

    @contextlib.contextmanager
    def during(self, phase: str):
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def watch(self, owner, name: str, phase: str) -> None:
        """Count what owner.name(...) does as `phase`."""
        function = getattr(owner, name)

        def call(*args, **kwargs):
            with self.during(phase):
                return function(*args, **kwargs)

        setattr(owner, name, call)

    # -- memory

    def hold(self, storage) -> None:
        key = storage._cdata
        if key not in self.held:
            weakref.finalize(storage, self.let_go, key)
        size = -(-storage.nbytes() // 512) * 512            # as CUDA's allocator rounds
        self.allocated += size - self.held.get(key, 0)
        self.held[key] = size
        self.highest()

    def highest(self) -> None:
        self.peak = max(self.peak, self.allocated)
        self.peaks[self.phase] = max(self.peaks[self.phase], self.allocated)

    def let_go(self, key) -> None:
        self.allocated -= self.held.pop(key, 0)

    # -- operations

    def wait(self, why: str) -> None:
        self.waits[self.phase, f"{project_line()}: {why}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":                        # the device of a fake tensor
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:                                      # is_nonzero, say: its parts are what is counted
                return func.decompose(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        if any(hasattr(t, "_local_tensor") for t in tensors):
            return NotImplemented                           # a DTensor comes back as its local parts
        if func.namespace == "c10d":
            return self.collective(func, name, args, kwargs, tensors)
        if name in ("_pin_memory", "pin_memory") or kwargs.pop("pin_memory", False):
            out = args[0].clone() if name.endswith("pin_memory") else func(*args, **kwargs)
            self.pinned.add(out.untyped_storage())
            if self.shapes and name.endswith("pin_memory") and out.numel() <= SMALL:
                self.known[out] = self.value(args[0])
            return out
        there = [t for t in tensors if t.device.type == "cuda"]
        place = torch.device(kwargs.get("device") or "cpu")
        if there or place.type == "cuda":
            self.check(func, name, args, kwargs, tensors, there)
            self.count(func, name, args, kwargs, tensors, place)
        if self.shapes and name in ("_local_scalar_dense", "equal", "allclose"):
            return self.computed(func, args, kwargs)
        args = tf32.coarse(func, args) if there and not self.shapes else args
        out = func(*args, **kwargs)
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor) and t.device.type == "cuda":
                self.hold(t.untyped_storage())
        if (there or place.type == "cuda") and not (func.is_view or name in NOTHING):
            self.traffic[self.phase, project_line()] += self.moved(func, name, args, kwargs, out)
        if self.shapes:
            self.remember(func, args, kwargs, out)
        return out

    def check(self, func, name, args, kwargs, tensors, there) -> None:
        """Raise where CUDA would: a number in a CPU tensor without dimensions may meet a GPU's tensors."""
        if name in ("copy_", "_to_copy", "set_", "resize_") or not there:
            return
        generators = [g for g in tree_flatten((args, kwargs))[0] if isinstance(g, torch.Generator)]
        if generators and generators[0].device != there[0].device:
            raise WrongDevice(f"{func} at {project_line()}: a generator of {generators[0].device}, a tensor "
                              f"of {there[0].device}")
        cpu_may = name.startswith("index") or name.startswith("_index") or name.startswith("_unsafe_index")
        devices = {t.device for t in tensors if t.device.type == "cuda" or t.dim() and not (
            cpu_may and t is not args[0])}                  # indices come from the host
        if len(devices) > 1:
            raise WrongDevice(f"{func} at {project_line()}: tensors of {sorted(map(str, devices))}")

    def count(self, func, name, args, kwargs, tensors, place) -> None:
        line, first = project_line(), args[0] if args else None
        if name in WAITS or name == "lift_fresh" and first.numel():     # torch.tensor(x, device="cuda")
            self.wait(name)
        copied = name == "copy_" and (args[1], args[0].device) or name == "_to_copy" and (
            first, place if "device" in kwargs else first.device)
        if copied and copied[0].device != copied[1]:
            source, target = copied
            eager = kwargs.get("non_blocking") or name == "copy_" and args[2:] == (True,)
            if not eager or target.type == "cuda" and source.untyped_storage() not in self.pinned:
                self.wait(f"copy from {source.device.type} to {target.type}")
        if name.startswith("index") and name != "index_select":        # whose indices are where it computes
            for t in (t for t in args[1] if t is not None):
                if t.device.type == "cpu" or t.dtype == torch.bool:
                    self.wait("indices of the host" if t.device.type == "cpu" else "nonzero of a mask")
        if not (func.is_view or name in NOTHING):
            self.launches[self.phase, line] += kernels(name, args)

    def moved(self, func, name, args, kwargs, out) -> int:
        """Bytes that an operation reads and writes in a GPU's memory."""
        def on_gpu(given) -> int:
            return sum(size_of(t) for t in tree_flatten(given)[0]
                       if isinstance(t, torch.Tensor) and t.device.type == "cuda")

        schema, read, written = func._schema, 0, 0
        named = {argument.name: argument for argument in schema.arguments}
        for argument, given in [*zip(schema.arguments, args), *((named[k], v) for k, v in kwargs.items())]:
            changed = argument.alias_info is not None and argument.alias_info.is_write
            picked = name in PICKS and argument is schema.arguments[0]
            written += on_gpu(given) if changed else 0
            if not (changed and (argument.is_out or name in OVERWRITES)):
                read += on_gpu(out if picked else given)
        return read + written + (0 if schema.is_mutable else on_gpu(out))

    def collective(self, func, name, args, kwargs, tensors):
        """Gloo moves the bytes that NCCL would, after NCCL's own conditions; among shapes nothing moves."""
        here = torch.device("cuda", gpu.get_device())
        for t in tensors if name != "barrier" else ():
            if t.device != here:
                raise WrongDevice(f"{name} at {project_line()}: a tensor of {t.device}, the process is on "
                                  f"{here}")
            if t.dtype not in NCCL or not t.is_contiguous():
                raise WrongDevice(f"{name} at {project_line()}: NCCL takes no {t.dtype} or no strides")
        self.calls[self.phase, f"{project_line()}: {name}"] += 1
        self.sent[self.phase, f"{project_line()}: {name}"] += max((t.nbytes for t in tensors), default=0)
        if not self.shapes:
            done = func(*tree_map_only(torch.Tensor, torch.ops.rehearsal.bytes_of, args), **kwargs)
            return tree_map(lambda new: new if not isinstance(new, torch.Tensor) else next(
                t for t in tensors if t.data_ptr() == new.data_ptr()), done)
        if name == "_allgather_base_" and args[0].numel() <= SMALL:     # all processes have the same
            parts = [args[1]] * (args[0].numel() // args[1].numel())
            self.known[args[0]] = self.computed(torch.cat, [parts], {})
        if name == "_reduce_scatter_base_" and args[1] in self.ends:    # the sum of as many equal ones
            out, whole = args[:2]
            world = len(whole) // len(out)
            self.ends[out] = self.computed(lambda ends: ends[:len(out)] * world, [self.ends[whole]], {})
        return (args[0], FakeWork().boxed()) if tensors else FakeWork().boxed()

    # -- numbers among shapes

    @unset_fake_temporarily()
    def value(self, t):
        if t not in self.known:
            shape = t.shape if t.numel() <= SMALL else 1
            self.known[t] = torch.ones(shape, dtype=t.dtype) if isinstance(t, FakeTensor) else t.cpu()
        return self.known[t]

    @unset_fake_temporarily()
    def computed(self, function, args, kwargs):
        return function(*tree_map_only(torch.Tensor, self.value, args), **kwargs)

    def tolist(self, t):
        if t.device.type == "cuda":
            self.wait("tolist")
        return self.computed(torch.Tensor.tolist, [t], {})

    def remember(self, func, args, kwargs, out) -> None:
        """Do the same with the numbers of small tensors."""
        name = func._schema.name.split("::")[1]
        if name == "cat" and args[1:] == (1,) and args[0][-1] in self.known:
            self.ends[out] = self.computed(lambda last: last[..., -1], [args[0][-1]], {})
        if name == "select" and args[0] in self.ends and args[1:] in ((1, -1), (1, args[0].shape[1] - 1)):
            self.known[out] = self.ends[args[0]]
            return
        if name.startswith("new_"):                         # of the first the kind alone matters
            args = (args[0].new_empty(0), *args[1:])
        every, made = tree_flatten((args, kwargs, out))[0], tree_flatten(out)[0]
        if any(isinstance(t, torch.Tensor) and t.numel() > SMALL for t in every):
            return
        with unset_fake_temporarily():
            args, kwargs = tree_map_only(torch.Tensor, self.value, (args, kwargs))
            kwargs |= {"device": "cpu"} if "device" in kwargs else {}
            for t, numbers in zip(made, tree_flatten(func(*args, **kwargs))[0]):
                if isinstance(t, torch.Tensor):
                    self.known[t] = numbers


# ---- What is rehearsed -------------------------------------------------------------------------------------

VARIANTS = {
    "local": {}, "all_reduce": dict(exchange="all_reduce"), "global": dict(gradients="global", dropout=0.1),
    "bfloat16": dict(dtype=torch.bfloat16), "clipped": dict(max_grad_norm=0.1),
    "autocast": dict(autocast=True),
    "seed": dict(init="random", dtype=torch.bfloat16, rounding="stochastic"), "Llama": {},
}  # fmt: skip


def total(counter) -> dict[str, int]:
    """A counter's sums by phase."""
    sums = collections.Counter()
    for (phase, _), n in counter.items():
        sums[phase] += n
    return dict(sums)


def by_line(counter) -> dict[str, int]:
    return {f"{phase} {line}": n for (phase, line), n in counter.most_common()}


def counted(seen, at_rest: int) -> dict:
    """What was seen of a step."""
    kinds = collections.Counter()       # bytes of each kind of collective
    for (_, line), n in seen.sent.items():
        kinds[line.split(": ")[-1]] += n
    return {"launches": total(seen.launches), "by line": by_line(seen.launches), "waits": total(seen.waits),
            "waits by line": by_line(seen.waits), "traffic": total(seen.traffic),
            "traffic by line": by_line(seen.traffic), "calls": total(seen.calls), "sent": total(seen.sent),
            "collectives": dict(kinds), "at rest": at_rest, "peak": seen.peak, "peaks": dict(seen.peaks)}


def steps(model, adapters, rows, seen, device, micro_batch_size, optimizer=None, **options) -> dict:
    """Three steps of hd_pissa.train, of which the last is counted."""
    import hd_pissa
    optimizer = optimizer or torch.optim.AdamW(adapters.parameters(), 1e-3, weight_decay=0.0, foreach=True)
    at_rest = 0
    if seen and seen.shapes:
        adapters.objection = lambda _: ""       # AdamW tried out on copies, before the first step: slow here
    if seen:
        for owner, name, phase in ((adapters, "merge_", "merge"), (adapters, "clip_grad_norm_", "clip"),
                                   (optimizer, "step", "adamw")):  # fmt: skip
            seen.watch(owner, name, phase)

    def batches():
        nonlocal at_rest
        few = rows[:adapters.K] if seen and seen.shapes else rows       # of shapes, to warm up
        yield few
        yield few
        if seen:
            at_rest = seen.allocated
            seen.begin()
        yield rows

    records = list(hd_pissa.train(model, adapters, batches(), lr=1e-3, max_steps=3, device=device,
                                  micro_batch_size=micro_batch_size, optimizer=optimizer, progress=False,
                                  **options))
    if not seen:
        return {"loss": records[-1]["loss"]}
    return counted(seen, at_rest) | {
        "loss": records[-1]["loss"], "layers": len(adapters.slots), "shards": adapters.S,
        "micro": -(-len(rows) // adapters.K // micro_batch_size),
        "adapted": sum(slot.m * slot.n for slot in adapters.slots)}


def small(variant: str):
    """Two layers of the repository's GPT, or of transformers' Llama, whose masks are code of its own."""
    torch.manual_seed(0)
    if variant != "Llama":
        import train
        return train.GPT(60, block_size=32, layers=2, width=64)
    import transformers
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, use_cache=False))


def toy(variants: str) -> dict:
    """A small model on cuda:0 and on the CPU: are all bits equal, what does a step take?"""
    told = {}
    rows = [(list(range(1 + i, 20 + i)), 4) for i in range(8)]
    for variant in variants.split(","):
        options, weights = dict(VARIANTS[variant]), []
        loop = {key: options.pop(key) for key in ("max_grad_norm", "autocast") if key in options}
        for device in ("cpu", "cuda"):
            with (Counts() if device == "cuda" else contextlib.nullcontext()) as seen:
                model = small(variant).to(device)
                adapters = hd_pissa_extra.attach(model, 2, shards=2, **options)
                for p in model.parameters() if "dtype" in options else ():
                    p.data = p.data.bfloat16()
                told[variant] = steps(model, adapters, rows, seen, device, 2, **loop)
            weights.append([p.detach().cpu() for p in model.parameters()])
        other = sum(int((a != b).sum()) for a, b in zip(*weights))
        told[variant]["other"] = other / sum(a.numel() for a in weights[0])     # share of numbers that differ
    return told


def llama(layers: int, world: int = 8, rank: int = 16, rows: int = 128, tokens: int = 512, micro: int = 2,
          dtype: str = "bfloat16", shard: int = 0, max_grad_norm: float = 0.0, after: int = 0, peft: int = 0,
          **options) -> dict:
    """LLaMA-2-7B's layers, shapes alone, on process 0 of `world` with a shard each.

    after       also a checkpoint and an evaluation; their highest memory is among the peaks
    peft        PEFT's LoRA instead, on a process's share of the rows, as DDP trains it
    """
    import transformers
    from transformers import masking_utils

    import hd_pissa
    from training import models
    # Of shapes alone transformers would not ask whether rows are packed. Of a GPU's tensors it does, where
    # train.py does not spare it that.
    masking_utils.is_tracing = lambda *_: False
    apart = contextlib.nullcontext() if peft else models.rows_apart(False)
    processes(world)
    hd_pissa_extra.checksum = lambda tensor, start=0: 0     # at the first merge, of every weight in parts
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096, use_cache=False)
    with apart, Counts(shapes=True) as seen:
        with torch.device("cuda"):
            model = transformers.LlamaForCausalLM(config)
        halves = torch.bfloat16 if dtype == "bfloat16" else None
        seen.watch(hd_pissa, "logits_of", "forward")
        seen.watch(torch.Tensor, "backward", "backward")
        batch = [(list(range(1, tokens + 2)), 100)] * rows
        if peft:
            for p in model.parameters():
                p.data = p.data.to(halves)
            return lora(model, rank, batch[:rows // world], seen, micro)
        adapters = hd_pissa_extra.attach(model, rank, shards=world, decompose=None, dtype=halves, **options)
        adapters.empty = False
        if halves:
            for p in model.parameters():
                p.data = p.data.bfloat16()
        if shard:
            from torch.distributed import device_mesh
            # it reads the ranks
            device_mesh.init_device_mesh = unset_fake_temporarily()(device_mesh.init_device_mesh)
            hd_pissa_extra.shard_over_processes(model, torch.device("cuda"))
        optimizer = torch.optim.AdamW(adapters.parameters(), 1e-3, weight_decay=0.0, foreach=True)
        told = steps(model, adapters, batch, seen, "cuda:0", micro, optimizer=optimizer,
                     autocast=dtype == "autocast", max_grad_norm=max_grad_norm)
        if after:
            told["peaks"] |= finish(model, adapters, optimizer, batch[:2 * world], seen, micro)
        return told


def finish(model, adapters, optimizer, rows, seen, micro) -> dict:
    """What train.py does beside steps: highest memory of a checkpoint, its file empty, and an evaluation."""
    from training import checkpoint, evaluate
    peaks, place = {}, "cuda:0"
    seen.begin()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), 3, model, adapters, optimizer, {}, {}, place)
    peaks["checkpoint"] = seen.peak
    seen.begin()
    evaluate.evaluate(model, [(*row, "all") for row in rows], place, micro)
    return peaks | {"evaluation": seen.peak}


def lora(model, rank, rows, seen, micro) -> dict:
    """Three steps of PEFT's LoRA on all linear layers but the head, of which the last is counted."""
    import peft

    import hd_pissa
    torch.nn.Module.to = lambda module, *_, **__: module    # all is there, and fake parameters do not move
    with torch.device("cuda"):
        model = peft.get_peft_model(model, peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules="all-linear"), autocast_adapter_dtype=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3, weight_decay=0.0, fused=True)
    model.train()
    for _ in range(3):
        at_rest = seen.allocated
        seen.begin()
        for a in range(0, len(rows), micro):
            x, y = hd_pissa.pad(rows[a:a + micro], "cuda:0")
            loss = torch.nn.functional.cross_entropy(hd_pissa.logits_of(model, x).flatten(0, 1), y.flatten())
            (loss / (len(rows) // micro)).backward()
        with seen.during("backward"):
            for p in trained:                               # in DDP's buckets, which lie side by side already
                dist.all_reduce(p.grad)
        with seen.during("clip"):
            torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        with seen.during("adamw"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = loss.item()
    return counted(seen, at_rest) | {"loss": loss}


ROWS = {  # of the table: options of `llama`
    "local": {}, "whole batch": dict(gradients="global"),
    'whole batch, send="backward"': dict(gradients="global", send="backward"),
    "basis from a seed, stochastic rounding": dict(init="random", rounding="stochastic"),
    "all_reduce": dict(exchange="all_reduce"), "PEFT LoRA": dict(peft=1),
}  # fmt: skip
PHASES = "forward", "backward", "clip", "adamw", "merge", "loop"


def row(name: str) -> dict:
    """A step of all 32 layers, continued from rehearsals of 2 and 4: what grows, grows with the layers."""
    sys.path[:0] = [str(HERE / "bench")]
    import hardware
    options, told = ROWS[name], {}
    for n in (2, 4):                    # torch's fake processes are there once
        words = [f"{key}={value}" for key, value in (options | {"layers": n}).items()]
        done = subprocess.run([sys.executable, __file__, "llama", *words], stdout=subprocess.PIPE, text=True,
                              check=True)
        told[n] = json.loads(done.stdout.splitlines()[-1])

    def of_all(*keys) -> int:
        two, four = (functools.reduce(lambda seen, key: seen.get(key, 0), keys, told[n]) for n in (2, 4))
        return two + (four - two) * 15

    summed = of_all("collectives", "_reduce_scatter_base_") + of_all("collectives", "allreduce_")
    made = {
        "row": name, "launches": {phase: of_all("launches", phase) for phase in PHASES},
        "waits": told[4]["waits by line"], "gathered": of_all("collectives", "_allgather_base_") / 2**20,
        "summed": summed / 2**20, "peak": max(of_all("peaks", phase) for phase in PHASES), "seen": told}
    if "peft" not in options:
        made["passes"] = of_all("traffic", "merge") / (4 * of_all("adapted"))
        options = options | {"dtype": "bfloat16"}
        made["dry_run"] = hardware.needed("LLaMA-2-7B", options, 8, rows=2, tokens=512)
    return made


def rows(file: str = str(HERE / "bench" / "rehearsal.json")) -> list[str]:
    """All rows, into a file that tests/bench/tables.py reads."""
    import transformers
    made = [row(name) for name in ROWS if name != "PEFT LoRA" or find_spec("peft")]
    for one in made:
        del one["seen"]
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "rows": made}
    Path(file).write_text(json.dumps(about, indent=1) + "\n")
    return [one["row"] for one in made]


def faults() -> list[str]:
    """What must be refused, and was not."""
    passed, a = [], torch.randn(4, 4, device="cuda")
    for name, work in {
            "product": lambda: a @ torch.randn(4, 4), "sum": lambda: a + torch.randn(4, 4),
            "two GPUs": lambda: a @ torch.randn(4, 4, device="cuda:1"), "NumPy": lambda: a.numpy(),
            "embedding": lambda: torch.nn.functional.embedding(torch.tensor([1]), a),
            "generator": lambda: torch.empty_like(a).bernoulli_(0.5, generator=torch.Generator()),
            "in place": lambda: torch.zeros(4, 4).add_(a),
            "foreach": lambda: torch._foreach_add_([a], [a.cpu()]),
    }.items():  # fmt: skip
        with contextlib.suppress(WrongDevice, TypeError), Counts():
            work()
            passed.append(name)
    with Counts() as seen:                                  # and what must not be, with its waits
        assert (a + torch.tensor(1.0)).device == a.device
        torch.randn(3).pin_memory().to("cuda", non_blocking=True)
        passed += ["a wait too many"] * len(seen.waits)
        for i, work in enumerate((
                lambda: a.sum().item(), lambda: a.tolist(), lambda: torch.ones(3).to("cuda"),
                lambda: a[a > 0], lambda: torch.tensor([1.0], device="cuda"), lambda: a.cpu(),
                lambda: torch.ones(3).to("cuda", non_blocking=True))):  # fmt: skip
            seen.begin()
            work()
            passed += [f"wait {i}"] * (not seen.waits)
        high, low, one = a.to(torch.bfloat16), a.to(torch.int16), torch.ones((), device="cuda").expand(4, 4)
        second = torch.tensor([1, 2], device="cuda", dtype=torch.int32)
        for name, numbers, work in (                        # read and written, of 4 bytes
                ("sum", 48, lambda: a + a), ("in place", 48, lambda: a.add_(a)), ("zeros", 16, a.zero_),
                ("copy", 17, lambda: a.copy_(one)), ("one number", 33, lambda: a * one),
                ("rows", 18, lambda: a.index_select(0, second)),
                ("kernel", 48, lambda: hd_pissa_extra.add_to_halves_(high, low, a, 1.0)),
                ("pieces", 40, lambda: hd_pissa_extra.pieces(a[None], (0, 1, 0)))):  # fmt: skip
            seen.begin()
            work()
            moved = sum(seen.traffic.values())
            passed += [f"{moved} bytes by {name}"] * (moved != 4 * numbers)
    return passed


def halves() -> float:
    """Error of one merge into bfloat16 halves, |W' - W - dU| / |dU|, as a GPU does it; dU is large."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 600, bias=False))
    W = model[0].weight.detach().double()
    model.to("cuda")
    with Counts():
        adapters = hd_pissa_extra.attach(model, 4, shards=2, dtype=torch.bfloat16)
        slot, left, right = adapters.slots[0], torch.randn(600, 16), torch.randn(16, 96)
        cut = hd_pissa_extra.pieces(left.T[None].cuda(), (0, 0, 1)), hd_pissa_extra.pieces(
            right[None].cuda(), (0, 1, 0))
        slot.add_(cut[0][0].T, cut[1][0], 0.5)
        now, dU = slot.read()[0].double().cpu(), 0.5 * left.double() @ right.double()
    return float((now - W - dU).norm() / dU.norm())


def planted(fault: str) -> None:
    """A fault of the project's, for rehearsals that must turn red."""
    import hd_pissa
    if fault == "cpu":                  # a tensor that stays on the CPU, in merge_
        plain = hd_pissa.update_factors
        hd_pissa.update_factors = lambda A, B, dA, dB: plain(A, B, dA, dB.cpu())
    if fault == "item":                 # one number read in every forward
        logits_of = hd_pissa.logits_of
        hd_pissa.logits_of = lambda model, x: (out := logits_of(model, x), out.max().item())[0]
    if fault == "packed":               # transformers looks for packed rows in every forward
        from training import models
        models.rows_apart = lambda packed: contextlib.nullcontext()
    if fault == "piece":                # one of the three products of bfloat16 pieces
        pieces = hd_pissa_extra.pieces
        hd_pissa_extra.pieces = lambda x, order: pieces(x, order)[:, :2 * x.shape[1]]
    if fault == "loose":                # a kernel for every gradient, as clipping without foreach has
        torch._foreach_norm = lambda tensors: [t.norm() for t in tensors]


def command(words) -> dict:
    """train.py with these flags, on this process's GPU."""
    import train
    with Counts() as seen:
        train.main(["--device", "cuda", *words])
    return {"calls": by_line(seen.calls), "waits": by_line(seen.waits)}


def tests(words) -> dict:
    """pytest with these words."""
    import pytest
    with Counts() as seen:
        return {"status": int(pytest.main([*words, "-q", "-p", "no:cacheprovider"])),
                "calls": by_line(seen.calls)}


def main() -> None:
    torch.set_num_threads(1)
    what, *words = sys.argv[1:]
    if what in ("command", "tests"):
        told = {"command": command, "tests": tests}[what](words)
    else:
        options = dict(word.split("=") for word in words)
        planted(options.pop("plant", ""))
        for key, value in options.items():
            with contextlib.suppress(ValueError):
                options[key] = json.loads(value)            # a number
        known = {"toy": toy, "llama": llama, "faults": faults, "halves": halves,
                 "row": row, "table": rows}
        told = known[what](**options)
    print("\n" + json.dumps(told))


if __name__ == "__main__":
    main()
