"""Put what the bench scripts measured into README.md, here and above: each table is made from a JSON file.

    python tests/bench/tables.py                   # after step.py, parts.py, network.py, stress.py or real.py
"""

import functools
import importlib.util
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


def gpu_head(result, about: str) -> str:
    """The machine; the commit, the day and the seconds that a stage's rows are of."""
    here = result["about"]
    run = here.get("stages", {}).get(about, {})
    words = [here["device"], f"torch {here['torch']}", f"commit {run.get('commit') or 'unknown'}"]
    words += [str(run["date"])] if "date" in run else []
    words += [f"{run['seconds']} s in all"] if "seconds" in run else []
    return ", ".join(words)


def because(row) -> str:
    """Why a row was not measured, in one line."""
    return " ".join(row["failed"].split())


def reasons(rows) -> str:
    """Why the stage itself failed; where single rows did, their cells tell."""
    ended = [row for row in rows if set(row) == {"failed"}]
    what = "Ended early" if len(rows) > len(ended) else "Not measured"
    return "".join(f"\n\n{what}: {because(row)}." for row in ended)


def computed(row) -> dict:
    """A row of stage memory, and what --dry_run's formula gives today for its model and options.

    Needs transformers.
    """
    import hardware as models
    words = row["options"].replace("(none)", "").split()
    options = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2])}
    size = models.needed(row["model"], options) / 2**30
    over = {"peak over computed": row["peak, GiB"] / size} if "peak, GiB" in row else {}
    return row | {"computed, GiB": size} | over


def gpu(result, about: str) -> str:
    """What gpu.py has measured of a stage; else why it has not."""
    rows = result.get(about, [])
    if not rows:
        return "Not measured: no GPU has run this stage of `python tests/bench/gpu.py` yet."
    here, why = gpu_head(result, about), reasons(rows)
    rows = [row for row in rows if set(row) != {"failed"}]
    if not rows:
        return here + why
    rows = [computed(row) for row in rows] if about == "memory" else rows
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "failed"))

    def cell(row, key):
        value = row.get(key)
        if key == keys[-1] and "failed" in row:
            return because(row)
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, list):
            return " ".join(value).strip("= ")
        if isinstance(value, float) and key.split(",")[0] in ("before", "after", "validation", "test"):
            return f"{value:.4f}"                       # losses that are nearly equal
        return value

    return f"{here}\n\n{table(keys, [[cell(row, key) for key in keys] for row in rows])}{why}"


def gpu_step(result, about: str) -> str:
    """Seconds and GiB of every method, side by side."""
    rows = [row for row in result.get(about, []) if "variant" in row]
    if not rows:
        return gpu(result, about)
    kinds = list(dict.fromkeys((row["dtype"], row["tokens"]) for row in rows))
    cells = {(row["variant"], row["dtype"], row["tokens"]):
             f"{row['seconds']:.3f} s, {row['peak'] / 1024:.1f} GiB" if "seconds" in row
             else because(row)[:60] for row in rows}  # fmt: skip

    def empty(variant, dtype):
        return "bfloat16 only" if "stochastic" in variant and dtype != "bfloat16" else "not measured"

    made = table(["", *(f"{dtype}, {tokens} tokens" for dtype, tokens in kinds)],
                 [[variant, *(cells.get((variant, *kind), empty(variant, kind[0])) for kind in kinds)]
                  for variant in dict.fromkeys(row["variant"] for row in rows)])
    return f"{gpu_head(result, about)}\n\n{made}{reasons(result[about])}"


def rehearsal(result) -> str:
    """A step at 7B as a GPU would see it: launches by phase, waits, bytes, memory."""
    names = dict(forward="forward", backward="backward", clip="clip", adamw="optimizer", merge="merge")
    rows = []
    for row in result["rows"]:
        launches, peak, computed = row["launches"], row["peak"] / 2**30, row.get("dry_run")
        rows.append([row["row"], sum(launches.values()), *(launches[name] for name in names),
                     sum(row["waits"].values()), row["gathered"], row["summed"],
                     row.get("passes"), f"{peak:.1f}", computed and f"{computed / 2**30:.1f}"])
    head = ["", "launches", *names.values(), "waits", "gathered, MiB", "summed, MiB",
            "merge, passes over W", "peak, GiB", "--dry_run, GiB"]
    return f"torch {result['torch']}, transformers {result['transformers']}\n\n" + table(head, rows)


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


def gpu_tables(path: Path) -> dict[str, str | None]:
    """None for the table that is computed by transformers, where it is not installed."""
    result = json.loads(path.read_text()) if path.exists() else {}
    lacking = () if importlib.util.find_spec("transformers") else ("memory",)
    return {f"gpu {name}": None if name in lacking else
            (gpu_step if name in ("step", "compiled") else gpu)(result, name)
            for name in ("tests", "main job", "fold", "step", "compiled", "memory", "attach", "SmolLM2",
                         "profile")}  # fmt: skip


@functools.cache
def tables() -> dict[str, str | None]:
    """{marker: text} of all that has been measured; None: the page's text stays."""
    functions = {"step": step, "hardware": hardware, "hardware short": hardware_short, "memory": memory,
                 "network": network, "rehearsal": rehearsal, "rounding": rounding, "stress": stress,
                 "real": real, "real output": real_output, "real commands": real_commands}
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
        if made[match[1]] is None:
            return match[0]
        return f"<!-- {match[1]} -->\n\n{made[match[1]]}\n\n<!-- end -->"

    return re.sub(r"<!-- (?!end )(\w[\w ]*) -->\n.*?<!-- end -->", block, text, flags=re.S)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
