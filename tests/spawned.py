"""Run a function on several gloo processes: rendezvous by a file, no ports, and a hang fails; count bytes."""

import datetime
import traceback
import uuid

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401  as training/processes.py does: gloo's threads end in time
import torch.multiprocessing as mp

TIMEOUT = 120  # seconds until processes that have not answered are killed


def _entry(rank, world, function, path, results, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=TIMEOUT / 2),
    )
    try:
        results.put((rank, "returned", function(*args)))
    except BaseException:
        results.put((rank, "raised", traceback.format_exc()))
    dist.destroy_process_group()


def spawn(world: int, function, tmp_path, *args) -> list:
    """[function(*args) on each rank] of a module-level function; AssertionError with a rank's traceback."""
    context = mp.get_context("spawn")
    results, path = context.Queue(), tmp_path / f"rendezvous-{uuid.uuid4().hex}"
    processes = [
        context.Process(target=_entry, args=(rank, world, function, path, results, args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        answers = {
            rank: (how, value) for rank, how, value in (results.get(timeout=TIMEOUT) for _ in processes)
        }
        for process in processes:
            process.join(timeout=TIMEOUT)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    for rank, (how, value) in sorted(answers.items()):
        assert how == "returned", f"rank {rank} of {world}:\n{value}"
    return [answers[rank][1] for rank in range(world)]


def received_bytes(work) -> int:
    """Bytes that reach this process while work() runs, counted at torch.distributed's collectives."""
    total, world = 0, dist.get_world_size()

    def counted(original, share):
        def call(out, *rest, **more):
            nonlocal total
            total += int(out.numel() * out.element_size() * share)
            return original(out, *rest, **more)

        return call

    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    # A ring: of a gathered tensor all but the own part arrives; a sum goes round twice.
    shares = {gather: (world - 1) / world, "all_reduce": 2 * (world - 1) / world}
    originals = {name: getattr(dist, name) for name in shares}
    for name, share in shares.items():
        setattr(dist, name, counted(originals[name], share))
    try:
        work()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return total
