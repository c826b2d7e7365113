"""What a run prints and logs: what is trained, losses, the rank of dW."""

import contextlib
import itertools
import json
import math
from collections import ChainMap
from pathlib import Path

import torch

import hd_pissa
from training import folder
from training.evaluate import HELD, SAMPLE_TOKENS
from training.folder import read_result
from training.processes import say, together
from training.report_html import write_report


def kind_of(name: str) -> str:
    """The last part of a layer's name, or what an expert is the how many-th of."""
    return next((part for part in reversed(name.split(".")) if not part.isdecimal()), name)


def sampled(names: list[str]) -> list[str]:
    """Up to eight layers whose dW is looked at: of every kind in turn, spread over the depth."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    turns = zip(range(8), itertools.cycle(kinds.values()))
    return list(dict.fromkeys(group[(2 * i + 1) * len(group) // 16] for i, group in turns))


def report_layers(args, adapters, names) -> None:
    kinds: dict[str, int] = {}
    for name in names:
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0) + 1
    trained = "all weights" if args.method == "full" else ", ".join(f"{k} x{v}" for k, v in kinds.items())
    numbers = sum(p.numel() for p in adapters.parameters())
    say(f"trained: {trained}; {numbers:,} numbers with AdamW moments in this process")
    for name, why in adapters.skipped.items():
        say(f"skipped: {name} ({why})")


def finished(out: Path, what: Path) -> dict | None:
    """The result of a run that has ended, printed again; None where there is more to do.

    what        OUT or its last checkpoint, to be named
    """
    result = hd_pissa.everywhere(lambda: read_result(out))[0]
    if result:
        report_losses(result["before"], result["after"])
        say(f"\n{what} is the end of this run; choose another --out, or --resume never to train again")
    return result


def report_losses(before, after) -> None:
    say(f"\n{'held out':14} {'rows':>5} {'loss before':>12} {'after':>8} {'exact match, before':>19} "
        f"{'after':>8}")
    for domain, a in before.items():
        b = after[domain]
        say(f"{domain:14} {a['rows']:5} {a['loss']:12.4f} {b['loss']:8.4f} {a['exact_match']:17.1f} % "
            f"{b['exact_match']:6.1f} %")


@torch.no_grad()
def rounding_floor(W: torch.Tensor, steps: int) -> float:
    """Largest singular value that rounding alone puts into W in `steps` in-place additions, estimated.

    One addition errs uniformly by up to half an ulp: deviation ulp / sqrt(12) an entry. A random (m, n)
    matrix of that deviation has norm (sqrt(m) + sqrt(n)) times it, and independent steps add in square.
    """
    ulp = torch.finfo(W.dtype).eps * torch.exp2(torch.frexp(W.double()).exponent - 1.0)
    return float(ulp.square().mean().sqrt() * math.sqrt(steps / 12) * sum(math.sqrt(d) for d in W.shape))


def rank_of_update(args, watched, trained) -> tuple[dict, dict]:
    """(what report_rank prints, {layer: singular values of dW}), each layer's by one process.

    watched     {name: W before}; trained(name): W after, which all processes ask for together
    """
    r, table, spectra = args.rank, {}, {}
    edge = {"lora": r, "pissa": 2 * r, "hd_pissa": 2 * args.shards * r}.get(args.method)
    own = {}
    for j, name in enumerate(watched):
        W = trained(name)               # FSDP2's is gathered: all processes ask for each
        if j % hd_pissa.world_size() == hd_pissa.process_index():
            own[name] = W

    def look():
        with together():                # one may have larger weights than another
            for name, W in own.items():
                S = hd_pissa.update_spectrum(watched[name].to(W.device), W)
                spectra[name] = [float(f"{sigma:.6g}") for sigma in S.tolist()]
                floor = rounding_floor(W, args.max_steps) / float(S[0] or 1)
                table[name] = {"effective_rank": hd_pissa.effective_rank(S), "of": len(S),
                               "rounding_floor": floor}
                if edge is not None and edge < len(S) and S[0] > 0:
                    table[name] |= {"edge": edge, "beyond_edge": float(S[edge] / S[0])}
        return table, spectra

    of_all = (ChainMap(*parts) for parts in zip(*hd_pissa.everywhere(look)))
    return tuple({name: told[name] for name in watched} for told in of_all)


def report_rank(args, table: dict) -> None:
    r, K = args.rank, args.shards
    say("\neffective rank of dW: singular values above 1 % of the largest "
        f"(LoRA {r}, PiSSA {2 * r}, HD-PiSSA about 2Kr = {2 * K * r})")
    for name, row in table.items():
        text = f"  {name:34} {row['effective_rank']:4} of {row['of']}"
        if "edge" in row:
            text += (f", sigma_{row['edge'] + 1}/sigma_1 = {row['beyond_edge']:.1e} (rounding alone: "
                     f"{row['rounding_floor']:.0e})")
        say(text)


def samples(out: Path, last: int) -> list[dict]:
    """{"prompt", "answer", "before", "after"} of the held-out prompts answered at step 0 and the last."""
    before, after = (folder.read_lines(out / "answers" / f"{HELD}.step_{step}.jsonl") for step in (0, last))
    told = {line.get("prompt"): line.get("text") for line in before}
    return [{"prompt": line["prompt"], "answer": line["answer"], "before": told.get(line["prompt"]),
             "after": line["text"]} for line in after]


def report_samples(some: list[dict]) -> None:
    def short(text, width=240):
        text = json.dumps(text, ensure_ascii=False)[1:-1] if text is not None else "?"
        return text if len(text) <= width else f"{text[:width // 2]} ... {text[-width // 2:]}"

    if some:
        say(f"\nheld-out prompts, and greedy answers of at most {SAMPLE_TOKENS} tokens")
    for sample in some:
        say("\n".join((f"  prompt  {short(sample['prompt'])}", f"  row     {short(sample['answer'])}",
                       f"  before  {short(sample['before'])}", f"  after   {short(sample['after'])}")))


def drop_best(out: Path, best: dict | None, last: int) -> None:
    """Delete OUT/best where the last model is the best: before result.json says that all is done."""
    if best and best["step"] == last:
        for name in folder.listed(out):
            if Path(name).parts[0] in ("best", "best.pt"):
                folder.remove(out / name)
        with contextlib.suppress(OSError):
            (out / "best").rmdir()


def report_best(out: Path, best: dict | None, last: int, small: bool) -> None:
    """Where the model of the lowest held-out loss is."""
    if best is None:
        return
    where = out / ("best.pt" if small else "best")
    text = "the result" if best["step"] == last else str(where) if where.exists() else "not kept"
    say(f"\nlowest held-out loss {best['loss']:.4f} after step {best['step']} of {last}: {text}")


@contextlib.contextmanager
def board(log: str | None, out: Path, start: int):
    """Yields write(step, {name: number}): to OUT/tensorboard on process 0, or nowhere without --log."""
    if log is None or hd_pissa.process_index() > 0:
        yield lambda step, values: None
        return
    from torch.utils.tensorboard import SummaryWriter
    with SummaryWriter(str(out / "tensorboard"), purge_step=start + 1) as writer:
        folder.remember(out, [f"tensorboard/{path.name}" for path in (out / "tensorboard").iterdir()])

        def write(step, values):
            for name, value in values.items():
                if isinstance(value, (int, float)) and math.isfinite(value) and name != "step":
                    writer.add_scalar(name, value, step)

        yield write


def report_files(out: Path, small: bool) -> None:
    path = str(out / ("model.pt" if small else "model"))
    how = (f"train.GPT.from_state_dict(torch.load({path!r}, weights_only=True))" if small else
           f"transformers.AutoModelForCausalLM.from_pretrained({path!r})")
    say(f"\nthe result is a plain model under the base model's names:\n  {how}")


def report_page(out: Path, result: dict) -> None:
    """OUT/report.html; what another program may have left in a log or eval.jsonl costs no result."""
    try:
        write_report(out, result, folder.write)
    except ValueError as e:
        say(f"no report.html: {e}")
