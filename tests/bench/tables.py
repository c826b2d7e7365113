"""Put what the bench scripts measured into README.md, here and above: each table is made from a JSON file.

    python tests/bench/tables.py                   # after step.py, parts.py, network.py, stress.py or real.py
"""

import json
import re
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).resolve().parent
PAGES = HERE / "README.md", HERE.parents[1] / "README.md"
TARGETS = {512: (1.08, 0.92, 0.92, 0.48, 0.76), 2048: (1.05, 0.92, 0.92, 0.48, 0.76)}

# JSON files of step.py: the variant that makes its numbers again, what it makes, the bound
MADE = {"step_seed": ("hd_pissa_seed", "A, B from a seed", 1.03),
        "step_seed_wide": ("hd_pissa_seed", "A, B from a seed", 1.03),
        "step_rounding": ("hd_pissa_stochastic", "bfloat16 W rounded stochastically, no low halves", None)}


def table(head, rows) -> str:
    """A Markdown table; numbers with three significant digits."""
    def cell(v):
        if not isinstance(v, (int, float)):
            return "" if v is None else str(v)
        return f"{v:.3g}" if abs(v) < 1000 else f"{v:,.0f}"

    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell(v) for v in line) + " |" for line in lines)


def step(result) -> str:
    variants = result["shape"]["variants"]
    rows = []
    for tokens, seconds in result["seconds"].items():
        rows.append([f"{tokens} tokens, s a step", *(seconds[v] for v in variants)])
        ours = seconds["hd_pissa"]
        rows.append([f"{tokens} tokens, hd_pissa over it", *(ours / seconds[v] for v in variants)])
        names = ("frozen", "lora", "pissa", "published", "full")
        wanted = dict(zip(names, TARGETS.get(int(tokens), ())))
        rows.append([f"{tokens} tokens, wanted at most", *(wanted.get(v) for v in variants)])
    peak = result["peak"]
    rows.append(["peak memory, MiB", *(peak[v] for v in variants)])
    rows.append(["hd_pissa over it", *(peak["hd_pissa"] / peak[v] for v in variants)])
    return f"{result['device']}, torch {result['torch']}\n\n" + table(["", *variants], rows)


def made_again(results: list) -> str:
    """Step times where numbers are made again instead of kept."""
    rows = []
    for result, (variant, what, wanted) in zip(results, MADE.values()):
        shape, ((tokens, seconds),) = result["shape"], result["seconds"].items()
        kept, made = seconds["hd_pissa"], seconds[variant]
        rows.append([what, f"{shape['layers']} layers, K r = {shape['rank']}, {tokens} tokens", kept, made,
                     made / kept, wanted])  # fmt: skip
    head = ["", "", "kept, s a step", "made again, s a step", "ratio", "wanted at most"]
    return f"{results[0]['device']}, torch {results[0]['torch']}\n\n" + table(head, rows)


def rounding(result) -> str:
    """Losses and the share of dW that arrives, over the seeds of each rate and kind of W."""
    kinds: dict[tuple, list] = {}
    for name, run in result.items():
        rate, kind = name.rpartition(", seed ")[0].split(", ", 1)
        kinds.setdefault((rate, kind), []).append(run)
    rows = []
    for (rate, kind), runs in kinds.items():
        losses, shares = ([run[key] for run in runs] for key in ("after", "applied"))
        rows.append([rate, kind, f"{mean(losses):.4f} ± {stdev(losses):.4f}", f"{mean(shares):.4f}",
                     f"{mean(run['spread'] for run in runs):.4f}",
                     f"{stdev(shares) / len(shares) ** 0.5:.4f}"])
    return table(["rate", f"W, {len(runs)} seeds each", "held-out loss", "share of dW that arrives",
                  "its spread from step to step", "standard error of the share"], rows)


def network(result) -> str:
    return f"{result['title']}\n\n" + table(result["columns"], result["rows"])


def stress(result) -> str:
    names = {"processes": "processes", "kills": "kills", "in_save": "inside a save", "resumed": "resumed",
             "bit_identical": "bit-identical", "seconds_per_save": "s a save", "megabytes": "MB a save"}
    row = [("yes" if v else "no") if isinstance(v := result[k], bool) else v for k in names]
    return table(list(names.values()), [row])


def longest(result) -> list[dict]:
    """The runs of as many steps as the longest has: shorter ones are of an earlier try."""
    return [row for row in result if row["steps"] == max(row["steps"] for row in result)]


def real(result) -> str:
    rows = [[row["data"], row["method"], f"{row['lr']:g}", str(row["steps"]), f"{row['before']:.4f}",
             f"{row['after']:.4f}"] for row in longest(result)]  # fmt: skip
    return table(["data", "method", "lr", "steps", "held-out loss before", "after"], rows)


def real_output(result) -> str:
    """What hd_pissa's runs left on the disk."""
    percent = lambda value: None if value is None else f"{value:.0f} %"        # noqa: E731
    rows = [[row["data"], f"{row['logits']:g}", f"{row['lora_error']:.1e}", percent(row.get("harness_base")),
             percent(row.get("harness"))] for row in longest(result) if "logits" in row]
    return table(["data", "largest difference of logits, saved folder against model in memory",
                  "relative error of the LoRA of rank 256", "lm-eval, ARC-Easy, base", "result"], rows)


def real_commands(result) -> str:
    lines = [f"python train.py --model smollm2 {row['flags']}" for row in longest(result)]
    return "\n".join(["```", *lines, "```"])


def gpu(result, about: str) -> str:
    """What gpu.py has measured of a stage; before that, that it has not."""
    rows = result.get(about, [])
    if not any("failed" not in row for row in rows):
        return "Not measured: no GPU has run `python tests/bench/gpu.py` yet."
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in ("flags", "failed")))
    cells = [[row.get(key, row.get("failed", "")) if key == keys[-1] else row.get(key) for key in keys]
             for row in rows]  # fmt: skip
    cells = [["yes" if c is True else "no" if c is False else " ".join(c).strip("= ")
              if isinstance(c, list) else c for c in row] for row in cells]  # fmt: skip
    here = result["about"]
    return f"{here['device']}, torch {here['torch']}\n\n" + table(keys, cells)


def gpu_step(result, about: str) -> str:
    """Seconds and GiB of every method, side by side."""
    rows = [row for row in result.get(about, []) if "failed" not in row]
    if not rows:
        return gpu(result, about)
    kinds = list(dict.fromkeys((row["dtype"], row["tokens"]) for row in rows))
    cells = {(row["variant"], row["dtype"], row["tokens"]):
             f"{row['seconds']:.3f} s, {row['peak'] / 1024:.1f} GiB" for row in rows}  # fmt: skip
    here = result["about"]
    return f"{here['device']}, torch {here['torch']}\n\n" + table(
        ["", *(f"{dtype}, {tokens} tokens" for dtype, tokens in kinds)],
        [[variant, *(cells.get((variant, *kind)) for kind in kinds)]
         for variant in dict.fromkeys(row["variant"] for row in rows)])


def hardware(result) -> str:
    rows = [[row["where"], row["model"], f"`{row['flags']}`", row["GiB"], "yes" if row["fits"] else "no"]
            for row in result]  # fmt: skip
    return table(["where", "model", "flags beside --rank 16 --micro_batch_size 1", "GiB a process, computed",
                  "fits"], rows)


def hardware_short(result) -> str:
    """The largest model that fits each machine."""
    best = {row["where"]: row for row in result if row["fits"]}
    rows = [[row["where"], row["model"], f"`{row['flags']}`", row["GiB"]] for row in best.values()]
    return table(["where", "model", "flags", "GiB a process"], rows)


def memory(result) -> str:
    """What processes held and received against the formula of --dry_run."""
    rows = [[row["row"], row["processes"], row["held"] / 2**20, row["formula"] / 2**20, row["ratio"],
             row["received"] / 2**20, None if row["received_formula"] is None else
             row["received_formula"] / 2**20] for row in result["rows"]]  # fmt: skip
    return table(["", "processes", "held, MiB", "formula", "ratio", "received a step, MiB", "formula"], rows)


def gpu_tables(path: Path) -> dict[str, str]:
    result = json.loads(path.read_text()) if path.exists() else {}
    return {f"gpu {name}": (gpu_step if name in ("step", "compiled") else gpu)(result, name)
            for name in ("tests", "main job", "step", "compiled", "fold", "memory", "attach", "SmolLM2",
                         "profile")}  # fmt: skip


def tables() -> dict[str, str]:
    """{marker: text} of all that has been measured."""
    functions = {"step": step, "hardware": hardware, "hardware short": hardware_short, "memory": memory,
                 "network": network, "rounding": rounding, "stress": stress, "real": real,
                 "real output": real_output, "real commands": real_commands}
    found = {name: file for name in functions if (file := HERE / f"{name.split()[0]}.json").exists()}
    made = {name: functions[name](json.loads(path.read_text())) for name, path in found.items()}
    made |= gpu_tables(HERE / "gpu.json")
    made["made again"] = made_again([json.loads((HERE / f"{name}.json").read_text()) for name in MADE])
    for name, part in json.loads((HERE / "parts.json").read_text()).items():
        made[f"parts {name}"] = table(part["columns"], part["rows"])
    return made


def filled(text: str) -> str:
    """A page with every block between <!-- NAME --> and <!-- end --> made anew."""
    made = tables()

    def block(match):
        if match[1] not in made:
            raise ValueError(f"a page asks for {match[1]!r}; there are {', '.join(made)}")
        return f"<!-- {match[1]} -->\n\n{made[match[1]]}\n\n<!-- end -->"

    return re.sub(r"<!-- (?!end )(\w[\w ]*) -->\n.*?<!-- end -->", block, text, flags=re.S)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
