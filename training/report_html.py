"""A run in one page: OUT/report.html from the files of a run, with drawings and without network or scripts.

    python training/report_html.py OUT

train.py does this at the end of a run; the command is for one that was stopped. It needs the standard
library alone.
"""

import collections
import html
import json
import math
import sys
from pathlib import Path

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 620, 290, 64, 14, 10, 48        # of a drawing, in its own units
HELD = "held out"       # its name in eval.jsonl, beside the --eval sets

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --faint: #d9d9d9; --paper: #ffffff; --soft: #666666; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --faint: #3a3a3a; --paper: #161616; --soft: #a0a0a0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1320px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
.drawings { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1em; }
figure { margin: 0; min-width: 0; } svg { width: 100%; height: auto; display: block; overflow: visible; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
figcaption { font-weight: 600; font-size: 13px; }
figure p { font-size: 12px; margin: 0; color: var(--soft); }
svg .soft { fill: var(--soft); }
.key { display: flex; flex-wrap: wrap; gap: 0 1.2em; font-size: 12px; }
.key span::before { content: ""; display: inline-block; width: 14px; height: 3px; margin-right: 5px;
  vertical-align: middle; background: var(--c); }
.table { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 2px 12px; border-bottom: 1px solid var(--faint); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
p { max-width: 75ch; overflow-wrap: anywhere; }
pre, dd { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 1em; }
dd { margin: 0; } dt { color: var(--soft); }
@media (max-width: 480px) { svg text { font-size: 20px; } }     /* drawings shrink, their letters do not */
"""


def ticks(low: float, high: float, log: bool) -> list[float]:
    """About five round numbers from low to high; `log`: both and they are exponents of ten."""
    if log:
        first, last = math.ceil(low), math.floor(high)
        if last - first < 1:
            few = [k + math.log10(s) for k in range(first - 1, last + 1) for s in (1, 2, 5)]
            return [k for k in few if low <= k <= high]
        every = math.ceil((last - first + 1) / 6)
        return [float(k) for k in range(first, last + 1) if (k - last) % every == 0]
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= (high - low) / 5)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def thinned(points: list[tuple], most: int = 1000) -> list[tuple]:
    """At most about `most` points that still show every peak: the lowest and the highest of each bucket."""
    if len(points) <= most:
        return points
    kept, size = [], math.ceil(2 * len(points) / most)
    for a in range(0, len(points), size):
        bucket = [p for p in points[a:a + size] if p[1] is not None] or points[a:a + 1]
        ends = {min(bucket, key=lambda p: p[1] or 0), max(bucket, key=lambda p: p[1] or 0)}
        kept += sorted(ends, key=lambda p: p[0])
    return kept


def running_mean(points, size: int) -> list[tuple[float, float | None]]:
    """Mean of each value and the `size` - 1 before it that there are; None before the first."""
    means, last = [], collections.deque(maxlen=size)
    for x, y in points:
        last.extend([] if y is None else [y])
        means.append((x, sum(last) / len(last) if last else None))
    return means


def drawing(title: str, series, *, x_label="step", log=False, marks=(), levels=(), within=(), note="") -> str:
    """An SVG of curves in a figure.

    series      (label, [(x, y or None)], style), style one of line, faint, dots (on a line) and points
    log         powers of ten on the y axis; values of zero or less are left out
    marks       (label, x): vertical lines; levels (label, y): horizontal ones
    within      values that the y axis reaches in any case
    """
    def height(y):
        return None if y is None or not math.isfinite(y) or log and y <= 0 else math.log10(y) if log else y

    series = [(label, [(x, height(y)) for x, y in points], style) for label, points, style in series]
    levels = [(label, height(y)) for label, y in levels if height(y) is not None]
    values = [y for _, points, _ in series for _, y in points if y is not None]
    parts, escape = [], html.escape

    def figure(keys=()):
        return (f'<figure><figcaption>{escape(title)}</figcaption>'
                f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
                + "".join(parts) + f'</svg><div class="key">{"".join(keys)}</div>'
                + (f"<p>{escape(note)}</p>" if note else "") + "</figure>")

    if not values:
        parts.append(f'<text class="soft" x="{LEFT}" y="{HEIGHT // 2}">no values</text>')
        return figure()
    xs = [x for _, points, _ in series for x, _ in points] + [x for _, x in marks]
    values += [y for _, y in levels] + [height(y) for y in within]
    x0, x1, y0, y1 = min(xs), max(xs), min(values), max(values)
    x0, x1 = (x0, x1) if x0 < x1 else (x0 - 0.5, x1 + 0.5)
    margin = 0.05 * (y1 - y0) or 0.05 * abs(y0) or 1.0
    y0, y1 = y0 - margin, y1 + margin
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(x, y):
        return LEFT + (x - x0) / (x1 - x0) * (right - LEFT), bottom - (y - y0) / (y1 - y0) * (bottom - TOP)

    for y in ticks(y0, y1, log):
        text, b = f"{10 ** y:.0e}" if log else f"{y:.6g}", at(x0, y)[1]
        parts.append(f'<path d="M{LEFT} {b:.1f}H{right}" stroke="var(--faint)"/>'
                     f'<text x="{LEFT - 6}" y="{b + 4:.1f}" text-anchor="end">{text}</text>')
    for x in ticks(x0, x1, False):
        if abs(x - round(x)) < 1e-6:        # there is no half step or layer
            parts.append(f'<text x="{at(x, y0)[0]:.1f}" y="{bottom + 18}" text-anchor="middle">{x:.6g}'
                         "</text>")
    parts.append(f'<text x="{(LEFT + right) // 2}" y="{HEIGHT - 6}" text-anchor="middle">'
                 f"{escape(x_label)}</text>")
    for i, (label, x) in enumerate(marks):
        a, side = at(x, y0)[0], (4, "start") if x < (x0 + x1) / 2 else (-4, "end")
        parts.append(f'<path class="mark" d="M{a:.1f} {TOP}V{bottom}" stroke="var(--soft)" '
                     f'stroke-dasharray="4 3"/><text class="soft" x="{a + side[0]:.1f}" '
                     f'y="{TOP + 14 + 20 * i}" text-anchor="{side[1]}">{escape(label)}</text>')
    for label, y in levels:
        b = at(x0, y)[1]
        parts.append(f'<path class="level" d="M{LEFT} {b:.1f}H{right}" stroke="var(--soft)" '
                     f'stroke-dasharray="1 3"/><text class="soft" x="{LEFT + 4}" y="{b - 3:.1f}">'
                     f"{escape(label)}</text>")
    names = list(dict.fromkeys(label for label, _, _ in series))
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    for label, points, style in series:
        path, pen, points = [], "M", thinned(points)
        for x, y in points:
            path += [] if y is None else ["{}{:.1f} {:.1f}".format(pen, *at(x, y))]
            pen = "M" if y is None else "L"
        if len(path) == 1 or style in ("dots", "points"):
            dot = '<circle cx="{:.1f}" cy="{:.1f}" r="3" fill="{}"/>'
            parts += [dot.format(*at(x, y), colors[label]) for x, y in points if y is not None]
        if style != "points":
            opacity = 0.3 if style == "faint" else 1
            parts.append(f'<path class="curve" d="{"".join(path)}" fill="none" stroke-width="1.5" '
                         f'stroke="{colors[label]}" stroke-opacity="{opacity}">'
                         f"<title>{escape(label)}</title></path>")
    keys = [f'<span style="--c:{colors[name]}">{escape(name)}</span>' for name in names]
    return figure(keys if len(keys) > 1 else ())


def table(head, rows) -> str:
    """An HTML table of texts and numbers."""
    def cell(tag, value):
        return f"<{tag}>{html.escape(str(value))}</{tag}>"
    lines = ["".join(cell("th", h) for h in head), *("".join(cell("td", v) for v in row) for row in rows)]
    return '<div class="table"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


# ---- The page ----------------------------------------------------------------------------------------------


def training(log: list[dict], result: dict, exams: list[dict]) -> str:
    """Drawings over the steps."""
    def column(key):
        return [(line["step"], line.get(key)) for line in log]

    size, loss = len(log) // 50, [("step batch", column("loss"), "line")]
    if size > 3:
        mean = running_mean(column("loss"), size)
        loss = [("step batch", column("loss"), "faint"), ("step batch", mean, "line")]
    sets = {name: [line for line in exams if line["set"] == name] for name in names_of(exams)}
    if result and HELD not in sets:
        ends = (0, "before"), (log[-1]["step"] if log else 0, "after")
        loss.append((HELD, [(step, result[when]["all"]["loss"]) for step, when in ends], "points"))
    loss += [(name, [(e["step"], e["loss"]) for e in lines], "dots") for name, lines in sets.items()]
    sets.pop(HELD, None)
    right = [(name, [(e["step"], e["exact_match"]) for e in lines], "dots") for name, lines in sets.items()]
    return '<h2>Training</h2><div class="drawings">' + "".join((
        drawing("loss, nats per response token", loss,
                note=f"Faint: every step. Full: mean of the last {size}." if size > 3 else ""),
        drawing("learning rate", [("lr", column("lr"), "line")], within=[0]),
        drawing("share of dW applied", [("applied", column("applied"), "line")], within=[0, 1],
                note="What rounding let through into W, seen in one weight a step. 1 is all of it."),
        drawing("tokens per second, all processes", [("tokens", column("tokens_per_second"), "line")],
                within=[0]),
        drawing("gradient norm before clipping", [("norm", column("grad_norm"), "line")], log=True),
        drawing("generated answers that are right, %", right, within=[0]) if sets else "")) + "</div>"


def names_of(exams: list[dict]) -> list[str]:
    return list(dict.fromkeys(line["set"] for line in exams))


def answers(exams: list[dict]) -> str:
    """What was generated for the --eval sets, by set and step."""
    exams = [e for e in exams if e["set"] != HELD]
    rows = [(e["set"], e["step"], e["rows"], f"{e['loss']:.4f}", f"{e['exact_match']:.1f}", e["unended"],
             e["not_asked"]) for e in sorted(exams, key=lambda e: names_of(exams).index(e["set"]))]
    head = "set", "step", "rows", "loss", "right, %", "not ended", "not asked"
    return ("<h2>Generated answers</h2>" + table(head, rows)
            + "<p>The texts are in answers/SET.step_N.jsonl beside this page.</p>" if exams else "")


def held_out(before: dict, after: dict) -> str:
    """Loss and exact match by domain."""
    head = "domain", "rows", "loss before", "after", "exact match before, %", "after"
    return "<h2>Held out</h2>" + table(head, [
        (domain, a["rows"], f"{a['loss']:.4f}", f"{after[domain]['loss']:.4f}", f"{a['exact_match']:.1f}",
         f"{after[domain]['exact_match']:.1f}") for domain, a in before.items()])


def samples(some: list[dict]) -> str:
    """Held-out prompts with the row's answer and the model's, before and after."""
    def entry(sample):
        texts = (("prompt", sample["prompt"]), ("row", sample["answer"]), ("before", sample["before"]),
                 ("after", sample["after"]))
        return "<dl>" + "".join(f"<dt>{name}</dt><dd>{html.escape(str(text or '').strip())}</dd>"
                                for name, text in texts) + "</dl>"

    return "<h2>Answers before and after</h2>" + "".join(map(entry, some)) if some else ""


def layer_of(name: str) -> int | None:
    """The number of the model's layer in a module's name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def update_rank(method: str, K: int, r: int, ranks: dict, spectra: dict) -> str:
    """The spectrum of each layer's dW against 2r and 2Kr, and its effective rank."""
    longest = max(map(len, spectra.values()))
    lines = [("r = {}, LoRA", r)] if method == "lora" else []
    lines += [("2r = {}, PiSSA", 2 * r), ("2Kr = {}, HD-PiSSA", 2 * K * r)]
    lines = [(label.format(x), x) for label, x in lines if x <= longest]
    curves = [(name, list(enumerate((sigma / S[0] for sigma in S), 1)), "line")
              for name, S in spectra.items() if S[0] > 0]
    floor = [("rounding of W alone", max(v["rounding_floor"] for v in ranks.values()))] if ranks else []
    kinds: dict[str, list] = {}
    for name, v in ranks.items():
        if layer_of(name) is not None:
            kinds.setdefault(name.rpartition(".")[2], []).append((layer_of(name), v["effective_rank"]))
    effective = [(kind, points, "points") for kind, points in kinds.items()]
    rows = [(name, v["effective_rank"], v["of"], f"{v['beyond_edge']:.1e}" if "beyond_edge" in v else "",
             f"{v['rounding_floor']:.0e}") for name, v in ranks.items()]
    head = "weight", "effective rank", "of", "first value beyond the edge", "rounding alone"
    return '<h2>Rank of the whole update dW</h2><div class="drawings">' + drawing(
        "singular values of dW, over the largest", curves, x_label="index", log=True, marks=lines,
        levels=floor, note="The updates of a run lie in one space of rank 2Kr, but for terms of second order "
                           "in the learning rate.") + drawing(
        "effective rank of dW: singular values above 1 % of the largest", effective,
        x_label="layer of the model", levels=lines, within=[0]) + "</div>" + table(head, rows)


def page(config: dict, log: list[dict], result: dict, exams: list[dict], spectra: dict) -> str:
    """The report's HTML; every argument may be empty, as for a run that was stopped.

    config      config.json      log     lines of log.jsonl     result      result.json
    exams       lines of eval.jsonl      spectra {layer: singular values of dW, descending}
    """
    method, K, r = config.get("method", "?"), config.get("shards", 1), config.get("rank", 1)
    belongs = f" for aggregate {config.get('aggregate')}" if method == "hd_pissa" else ""
    title = f"{method}, r = {r}" + (f", K = {K}" if method == "hd_pissa" else "")
    text = (f"{config.get('model')} on {config.get('data')}: {log[-1]['step'] if log else 0} of "
            f"{config.get('max_steps')} steps of {config.get('batch_size')} rows, peak learning rate "
            f"{config.get('lr')}{belongs}.")
    parts = [f"<h1>{html.escape(title)}</h1><p>{html.escape(text)}</p>", training(log, result, exams),
             answers(exams)]
    if result:
        parts += held_out(result["before"], result["after"]), samples(result.get("samples", []))
    if spectra:
        parts.append(update_rank(method, K, r, result.get("effective_rank", {}), spectra))
    parts.append("<h2>Settings</h2><details><summary>config.json</summary><pre>"
                 + html.escape(json.dumps(config, indent=1)) + "</pre></details>")
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
            f'<link rel="icon" href="data:,"/><title>{html.escape(title)}</title><style>{STYLE}</style>'
            "</head><body>\n" + "\n".join(parts) + "\n</body></html>\n")


def write_text(path: Path, text: str) -> None:
    path.write_text(text, "utf-8", "backslashreplace")


def write_report(folder, result: dict | None = None, write=write_text) -> Path:
    """Write FOLDER/report.html from what the run has left there; ValueError if that is nothing.

    result      what will be result.json, where that is not written yet
    write       of a path and its text
    """
    folder = Path(folder)

    def read(name, kind):
        """The objects of a file; without a line, or all of it, that is no JSON or of another kind."""
        path, found = folder / name, []
        text = path.read_text("utf-8", "replace") if path.is_file() else ""
        for line in text.splitlines() if name.endswith("l") else [text]:
            try:
                found += [value] if isinstance(value := json.loads(line), dict) else []
            except (ValueError, RecursionError):
                continue
        return found if kind is list else found[0] if found else {}

    if not (folder / "log.jsonl").is_file():
        raise ValueError(f"{folder} holds no log.jsonl; give the --out folder of a run")
    try:
        text = page(read("config.json", dict), read("log.jsonl", list), result or read("result.json", dict),
                    read("eval.jsonl", list), read("spectra.json", dict))
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as e:
        raise ValueError(f"{folder}: its files are not what a run writes ({type(e).__name__}: {e})") from None
    write(folder / "report.html", text)
    return folder / "report.html"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python training/report_html.py OUT")
    try:
        print(write_report(sys.argv[1]))
    except (ValueError, OSError) as e:
        raise SystemExit(f"report_html.py: error: {e}") from None
