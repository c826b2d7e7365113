"""Does a run survive being killed again and again, and what does a checkpoint cost?

    python tests/bench/stress.py                   # 20 kills and 3 x 8 more, some minutes on two cores
    python tests/bench/stress.py --kills 100 --seed 1

One command of the embedded GPT, with a checkpoint at every step, is killed at random moments and started
again until it ends: one worker, all, or torchrun alone. Weights and losses are compared with those of a run
that nobody killed. Then short commands are killed at moments spread from their start to their end: a run on
one process and on several, and data/prepare.py. Prints a table and writes stress.json.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from few_rows import ROWS  # noqa: E402
from spawned import spawn  # noqa: E402
from test_crash import SMALL, kill_many, kill_throughout  # noqa: E402

import train  # noqa: E402
from training import checkpoint  # noqa: E402


def save_seconds(out: str, steps: int) -> list[float]:
    """Seconds of each checkpoint.save of a short run on this process, the first left out."""
    seconds, original = [], checkpoint.save

    def timed(*args):
        start = time.perf_counter()
        path = original(*args)
        seconds.append(time.perf_counter() - start)
        return path

    checkpoint.save = timed
    try:
        train.main([*SMALL, "--max_steps", str(steps), "--save_every", "1", "--out", out])
    finally:
        checkpoint.save = original
    return seconds[1:]


def kill_prepare(folder: Path, kills: int) -> dict:
    """As `kill_throughout`, of data/prepare.py: its files are those of a command that nobody killed."""
    def prepare(out):
        return subprocess.Popen([sys.executable, ROOT / "data" / "prepare.py", "rows", "--from", ROWS,
                                 "--out", folder / out], stdout=subprocess.DEVNULL)  # fmt: skip

    began, met = time.monotonic(), {"ended": 0, "killed": 0}
    wrong = ["an undisturbed command"] if prepare("prepared").wait() else []
    seconds = time.monotonic() - began
    for part in range(kills + 1):
        process = prepare("again")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait((part + 1) / (kills + 1) * seconds if part < kills else None)
        met["killed" if process.poll() is None else "ended"] += 1
        process.kill()
        process.wait()
    files = [{path.name: path.read_bytes() for path in (folder / name).iterdir()}
             for name in ("prepared", "again")]  # fmt: skip
    return {"met": met, "wrong": wrong + [n for n in files[0] if files[0][n] != files[1].get(n)]}


def main():
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--seed", type=int, default=0, help="of the moments and of the worker that is killed")
    p.add_argument("--processes", type=int, default=2)
    p.add_argument("--saves", type=int, default=20, help="checkpoints whose writing is timed")
    p.add_argument("--out", default=str(Path(__file__).with_name("stress.json")))
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        seen = kill_many(folder, args.kills, args.seed, args.processes,
                         lambda attempts: tqdm(attempts, "attempts", leave=False))  # fmt: skip
        # Process 0 is timed; a save ends on all processes together.
        saves = spawn(args.processes, save_seconds, folder, str(folder / "timed"), args.saves + 1)[0]
        last = next((folder / "timed" / "checkpoint").iterdir())
        size = sum(path.stat().st_size for path in last.iterdir())
        shutil.rmtree(folder / "timed")
        throughout = {"prepare": kill_prepare(folder, 8)}
        for processes in (0, args.processes):
            (folder / str(processes)).mkdir()
            name = f"{processes} processes" if processes else "one process"
            throughout[name] = kill_throughout(folder / str(processes), 8, processes)
    seen["wrong"] += [f"{name}: {wrong}" for name, one in throughout.items() for wrong in one.pop("wrong")]
    seen |= {"processes": args.processes, "seed": args.seed, "seconds_per_save": statistics.median(saves),
             "throughout": {name: one["met"] for name, one in throughout.items()},
             "megabytes": size / 1e6, "bit_identical": not seen["wrong"]}  # fmt: skip
    print("\n| processes | kills | inside a save | resumed | steps | bit-identical | seconds per save | MB |")
    print("|---:|---:|---:|---:|---:|---|---:|---:|")
    print(f"| {args.processes} | {seen['kills']} | {seen['in_save']} | {seen['resumed']} | {seen['steps']} "
          f"| {'yes' if seen['bit_identical'] else 'no'} | {seen['seconds_per_save']:.3f} "
          f"| {seen['megabytes']:.1f} |")  # fmt: skip
    for name, met in seen["throughout"].items():
        print(f"killed throughout, {name}:", ", ".join(f"{where} {n}" for where, n in met.items()))
    for line in seen["wrong"]:
        print("WRONG:", line)
    Path(args.out).write_text(json.dumps(seen, indent=1) + "\n")
    raise SystemExit(1 if seen["wrong"] else 0)


if __name__ == "__main__":
    main()
