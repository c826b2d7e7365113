"""The results page as text: numbers are formatted from the runs, words are chosen by comparisons of them."""

import math
import statistics

from tutorial.experiments import real, real_table, verdict
from tutorial.experiments.arms import ARMS, COMMON, FIXED, LONG, MEDIUM, SHORT, complete
from tutorial.experiments.table import Arm, compare

NAMES = {
    "full": "full fine-tuning", "linear": "full, linear layers alone",
    "lora": "LoRA r=2", "pissa": "PiSSA r=2", "hd": "HD-PiSSA K=8 r=2",
    "hd global": "HD-PiSSA, whole-batch gradients",
    "dora": "DoRA r=2", "hira": "HiRA r=2", "mora": "MoRA, budget of r=2", "hd top": "top r on every shard",
    "hd lora init": "LoRA init, direct update", "intermediate": "Intermediate Method",
    "hd sum": "HD-PiSSA, sum", "hd global mean": "whole-batch gradients, mean",
    "global orthonormal": "whole batch, orthonormal U, V",
    "global orthonormal muon": "whole batch, orthonormal, Muon",
    "global random": "whole batch, random basis", "hd interleaved": "HD-PiSSA, interleaved",
    "hd dct": "HD-PiSSA, basis from a seed", "hd beta2": "HD-PiSSA, AdamW with a smaller beta2",
    "hd shared moments": "HD-PiSSA, shared first moments",
    "hd feedback": "HD-PiSSA, error feedback of rank r",
    "hd feedback all": "HD-PiSSA, error feedback of rank 2Kr",
    "hd group=2": "HD-PiSSA, gradients of 2 devices", "hd group=4": "HD-PiSSA, gradients of 4 devices",
    "global": "whole-batch gradients, K=8", "global Kr=128": "whole-batch gradients, K·r=128",
    "random Kr=128": "whole batch, random basis, K·r=128",
    "linear norms": "full, linear layers and norms", "linear positions": "full, linear layers and positions",
    "linear embedding": "full, linear layers and embedding",
    "lora plus": "LoRA+ r=2", "lora alpha=16": "LoRA r=2, alpha=16", "rslora": "rsLoRA r=2",
    "galore": "GaLore, memory of r=2", "apollo": "APOLLO, memory of r=2",
    "global drawn": "whole batch, random basis drawn by seed", "global dct": "whole batch, basis from a seed",
}
METHODS = ("full", "linear", "lora", "lora plus", "lora alpha=16", "pissa", "dora", "hira", "mora", "galore",
           "apollo", "hd", "hd global", "global random", "global drawn", "global dct", "pissa r=16",
           "lora r=16", "lora plus r=16", "rslora r=16", "dora r=16", "hira r=16", "galore r=16",
           "apollo r=16", "global Kr=128", "random Kr=128")
DEVICES_TRIED = ((1, "hd K=1"), (2, "hd K=2"), (4, "hd K=4"), (8, "hd"), (16, "hd K=16"))
DEVICES = 8             # over which ZeRO-1 spreads a peer's moments
FACTORED = ("lora", "pissa", "dora", "hira", "mora", "intermediate")    # methods that hold what they train
WHERE = " Verdicts: [every comparison](#every-comparison)."
MORE = ("hd global", "global K=16", "global Kr=128", "global random", "random Kr=128", "linear", "full")
PARTS = ("linear", "linear norms", "linear positions", "linear embedding", "full")
CEILING = 0.9           # share of all ranks beyond which a larger one could not be seen
EMBEDDING = ("lora embedding", "pissa r=16 embedding", "lora r=16 embedding", "hd global embedding",
             "global random embedding", "global dct embedding", "random Kr=128 embedding")
# The pairs of PROTOCOL.md, then those that stand for a basis from a seed until its runs are there.
DECIDING = (("hd", "lora"), ("hd global", "hd"), ("global dct", "lora r=16"), ("global dct", "hd global"),
            ("global dct", "global random"), ("global dct embedding", "lora r=16 embedding"),
            ("global dct embedding", "full"), ("global dct", "hira"), ("global dct", "hira r=16"),
            ("global random", "lora r=16"), ("global random", "hd global"),
            ("global random embedding", "lora r=16 embedding"), ("global random embedding", "full"))
TRIES = ("hd interleaved", "hd dct", "hd beta2", "hd shared moments", "hd feedback", "hd feedback all",
         "hd group=2", "hd group=4")        # to improve the local form, one change at a time
BEYOND = (*TRIES, "hd global mean", "global orthonormal", "global orthonormal muon", "global random")


# ---- Numbers -----------------------------------------------------------------------------------------------


def pm(arm: Arm, what: int = 0, domain: str = "all", digits: int = 3) -> str:
    """mean ± standard deviation over the seeds at the best learning rate."""
    sd = arm.sd(what, domain)
    spread = " (one seed)" if math.isnan(sd) else f" ± {sd:.{digits}f}"
    return f"{arm.mean(what, domain):.{digits}f}{spread}"


def bytes_(numbers: int) -> str:
    return f"{4 * numbers / 1024:.1f} KiB"


def median_rank(arm: Arm) -> float:
    return statistics.median(arm.first["effective_rank"])


def by_rank(data, family: str) -> list:
    base = {"hd": 2, "lora": 2, "pissa": 2}
    arms = [(r, data[family] if r == base[family] else data.get(f"{family} r={r}")) for r in
            (1, 2, 4, 8, 16, 32, 64)]
    return [(r, arm) for r, arm in arms if arm and arm.there]


def tails(data) -> dict:
    """{(lr, steps, dtype): sigma_{2Kr+1} / sigma_1 of one layer's dW} of the fixed runs."""
    wanted = [complete(config) for config in FIXED["tail"]]
    edge = 2 * wanted[0]["K"] * wanted[0]["r"]
    return {(c["lr"], c["steps"], c["dtype"]): r["spectrum"]["sigma"][edge] / r["spectrum"]["sigma"][0]
            for r in data["records"] if (c := r["config"]) in wanted and r["final"]}


def domain_ranks(data) -> dict:
    """{(domain, lr): effective ranks of all layers} of full fine-tuning on one domain."""
    wanted = [complete(config) for config in FIXED["domains"]]
    return {(c["domain"], c["lr"]): r["effective_rank"] for r in data["records"]
            if (c := r["config"]) in wanted and r["final"]}


def against(data, a: Arm, b: Arm) -> str:
    """"ahead", "behind", "equivalent" or "undecided": the verdict on a's loss against b's, noted for the
    table of all comparisons."""
    found = data["compared"].setdefault((a.name, b.name), compare(a, b))
    return found.outcome


def versus(data, a: Arm, b: Arm) -> str:
    """"behind LoRA r=2 by (the gap)", "undecided against PiSSA r=2"."""
    outcome = against(data, a, b)
    word = {"ahead": "ahead of", "equivalent": "equivalent to", "undecided": "undecided against"}
    by = f" by {abs(data['compared'][a.name, b.name].gap):.3f}" if outcome in ("ahead", "behind") else ""
    return f"{word.get(outcome, outcome)} {name_of(b)}{by}"


def label(name: str) -> str:
    """What the page calls an arm."""
    name = name.split(",")[0]
    if name.endswith(" embedding") and name not in NAMES:
        return label(name.removesuffix(" embedding")) + " + embedding"
    for letter, default in (("r", 2), ("K", 8)):
        family, _, number = name.partition(f" {letter}=")
        if number and name not in NAMES:
            return NAMES[family].replace(f"{letter}={default}", f"{letter}={number}")
    return NAMES[name]


def name_of(arm: Arm) -> str:
    return label(arm.name)


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |",
            *("| " + " | ".join(row) + " |" for row in rows), ""]


def joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


# ---- Claims of the paper -----------------------------------------------------------------------------------


def claimed(outcomes: list[str], wanted: str = "ahead", on: str = "") -> str:
    """holds / does not hold / depends / undecided, from the comparisons that the claim rests on."""
    if all(outcome == wanted for outcome in outcomes):
        return "holds here"
    if all(outcome in (wanted, "undecided") for outcome in outcomes):
        return "undecided"
    return f"depends on {on}" if wanted in outcomes else "does not hold here"


def at_lengths(data, name: str, others) -> list[tuple[int, Arm, list[Arm]]]:
    """(steps, arm, baselines) at every length of run where the arm and a baseline are there."""
    found = []
    for steps, suffix in ((SHORT, ""), (MEDIUM, ", medium"), (LONG, ", long")):
        arm = data.get(name + suffix)
        there = [data[other + suffix] for other in others if data.get(other + suffix)
                 and data[other + suffix].there]
        if arm and arm.there and there:
            found.append((steps, arm, there))
    return found


def claim_methods(data):
    claim = "HD-PiSSA beats LoRA and PiSSA of the same r (tables 1, 2; figure 4)"
    found = at_lengths(data, "hd", ("lora", "pissa"))
    if not found:
        return claim, None, ""
    outcomes = [against(data, arm, other) for _, arm, others in found for other in others]
    text = " ".join(f"{steps} steps: {joined([versus(data, arm, other) for other in others])}."
                    for steps, arm, others in found)
    large = "hd, large batch", "lora, large batch", "pissa, large batch"
    if all(data[name].there for name in large):
        arm, *others = (data[name] for name in large)
        outcomes += [against(data, arm, other) for other in others]
        text += f" {arm.config['steps']} steps of {arm.config['batch']} rows: " \
                f"{joined([versus(data, arm, other) for other in others])}."
    return claim, claimed(outcomes, on="the batch, the baseline and the length of the run"), text


def claim_recent(data):
    claim = "HD-PiSSA beats DoRA, MoRA and HiRA (table 2)"
    found = at_lengths(data, "hd", ("dora", "mora", "hira"))
    if not found:
        return claim, None, ""
    outcomes = [against(data, arm, other) for _, arm, others in found for other in others]
    text = " ".join(f"{steps} steps: {joined([versus(data, arm, other) for other in others])}."
                    for steps, arm, others in found)
    return claim, claimed(outcomes, on="the baseline"), text


def claim_full(data):
    claim = "HD-PiSSA comes close to full fine-tuning (sections 1, 7)"
    found = at_lengths(data, "hd", ("full",))
    if not found:
        return claim, None, ""
    text = []
    for steps, arm, (full,) in found:
        low = [o for s, _, o in at_lengths(data, "lora", ("full",)) if s == steps]
        lora, closed = data[arm.name.replace("hd", "lora", 1)], ""
        if low and lora.there:
            share = (lora.mean() - arm.mean()) / (lora.mean() - full.mean())
            closed = f"; {100 * share:.0f} % of the way from LoRA to it" if share > 0 else \
                "; LoRA is closer to it"
        text.append(f"{steps} steps: {versus(data, arm, full)}{closed}.")
    outcomes = [against(data, arm, full) for _, arm, (full,) in found]
    return claim, claimed(outcomes, "equivalent", "the length"), " ".join(text)


def claim_rank(data):
    claim = "one device's memory of rank r gives updates of rank far above r (figure 3, section 6)"
    arms = [data[name] for name in ("lora", "pissa", "hd", "full") if data[name].there]
    if data["hd"] not in arms or len(arms) < 2:
        return claim, None, ""
    K, r = data["hd"].config["K"], data["hd"].config["r"]
    ranks = joined([f"{NAMES[arm.name]} {median_rank(arm):g}" for arm in arms])
    text = ("Effective rank of ΔW (singular values above 1 % of the largest; median of the layers, of 128): "
            f"{ranks}. 2Kr is {2 * K * r}.")
    return claim, "holds here" if median_rank(data["hd"]) > 2 * r else "does not hold here", text


def claim_beyond_edge(data):
    claim = "the singular values beyond 2Kr stay one to two orders above LoRA's and PiSSA's (figure 7)"
    found = tails(data)
    lrs = sorted({lr for lr, _, _ in found})
    steps = max((s for _, s, _ in found), default=0)
    if len(lrs) < 2 or any((lr, steps, d) not in found for lr in lrs for d in ("float32", "float64")):
        return claim, None, ""
    low, high = lrs[0], lrs[-1]
    ratio = found[low, steps, "float32"] / found[low, steps, "float64"]
    at = {(lr, d): f"{found[lr, steps, d]:.0e}" for lr in (low, high) for d in ("float32", "float64")}
    large = found[high, steps, "float32"] / found[high, steps, "float64"]
    text = (f"The largest value beyond 2Kr, relative to σ₁, after {steps} steps: in float64, where it is the "
            f"second-order term ΔA ΔB alone, {at[low, 'float64']} at lr {low:g} and {at[high, 'float64']} "
            f"at lr "
            f"{high:g}; in float32 {at[low, 'float32']} and {at[high, 'float32']}. The ratio of the two is "
            f"{ratio:.1f} at the small rate and {large:.1f} at the large one; what exceeds 1 is rounding "
            f"of W.")
    return claim, "depends on the learning rate" if ratio > 2 * large else "holds here", text


def claim_devices(data):
    claim = "more devices are better at the same total batch (figure 5)"
    arms = [(K, data[name]) for K, name in DEVICES_TRIED if data[name].there]
    if len(arms) < 3:
        return claim, None, ""
    text = "Tuned held-out loss at " + joined([f"K={K} {pm(arm)}" for K, arm in arms]) + "."
    outcomes = [against(data, b, a) for (_, a), (_, b) in zip(arms, arms[1:])]
    words = joined([f"K={K} {outcome}" for (K, _), outcome in zip(arms[1:], outcomes)])
    return claim, claimed(outcomes, on="K"), f"{text} Each against the one before it: {words}."


def claim_ranks(data):
    claim = "HD-PiSSA is ahead at every r (figure 6)"
    both = [(r, arm, other) for r, arm in by_rank(data, "hd") for family in ("lora", "pissa")
            for s, other in by_rank(data, family) if s == r]
    if len({r for r, _, _ in both}) < 3:
        return claim, None, ""
    text = "; ".join(versus(data, arm, other) for _, arm, other in both)
    outcomes = [against(data, arm, other) for _, arm, other in both]
    return claim, claimed(outcomes, on="r and the baseline"), f"HD-PiSSA, K=8: {text}."


def claim_ablations(data):
    claim = "orthogonal slices and direct update are both needed (table 7, figure 2b)"
    others = [data[name] for name in ("hd top", "hd lora init", "intermediate") if data[name].there]
    if not data["hd"].there or not others:
        return claim, None, ""
    text = f"Full method {joined([versus(data, data['hd'], other) for other in others])}."
    return claim, claimed([against(data, data["hd"], other) for other in others], on="the ablation"), text


def claim_mute(data):
    claim = "any γ from 1e-4 to 1e-16 works, 1e-2 and 1e-32 do not (figure 8)"
    found = {(r["gamma"], r["reading"]): r for r in data["mute"]}
    if not found:
        return claim, None, ""
    at = lambda gamma, what="gradients", s="skinny": found[gamma, s][what]      # noqa: E731
    inside = max(at(g) for g in (1e-4, 1e-8, 1e-16))
    text = (f"Relative error of the gradients: {at(1e-2):.0e} at 1e-2 ({at(1e-2, 'logits'):.0e} of the "
            f"logits), at most {inside:.0e} from 1e-4 to 1e-16, "
            f"{found[0.0, 'exact mute']['gradients']:.0e} for "
            f"the exact mute. At 1e-32 it is {at(1e-32):.0e} where subnormal numbers are kept, "
            f"{at(1e-32, s='skinny, loss / 1e4'):.0e} there for gradients 10⁴ times smaller, and "
            f"{at(1e-32, s='skinny, flushed'):.0e} where subnormals are flushed. Too large a γ errs in the "
            "forward, too small a one in the gradients. No training was run for this claim.")
    small = max(at(1e-32), at(1e-32, s="skinny, flushed"))
    if inside >= at(1e-2):
        return claim, "does not hold here", text
    return claim, "holds here" if at(1e-32) > 2 * inside else "depends on subnormal numbers" \
        if small > 2 * inside else "does not hold here", text


def claim_domains(data):
    claim = "complex tasks need higher-rank updates (figure 1)"
    found = domain_ranks(data)
    lrs = sorted({lr for _, lr in found})
    if len(found) < len(FIXED["domains"]):
        return claim, None, ""
    text, least, width = [], math.inf, len(next(iter(data["records"]))["spectrum"]["sigma"])
    for lr in lrs:
        mean = {d: statistics.mean(ranks) for (d, rate), ranks in found.items() if rate == lr}
        error = {d: statistics.stdev(found[d, lr]) / math.sqrt(len(found[d, lr])) for d in mean}
        text.append(f"lr {lr:g}: " + ", ".join(f"{d} {mean[d]:.1f} ± {error[d]:.1f}" for d in mean))
        least = min(least, *mean.values())
    text = (f"Mean effective rank of ΔW over the layers ± its standard error, of {width}, full fine-tuning "
            f"on one domain: {'; '.join(text)}. One seed, and synthetic domains.")
    if least > CEILING * width:
        return claim, "cannot be tested here", text + " All lie at the ceiling: a layer has no more ranks."
    return claim, "undecided", text


CLAIMS = (claim_methods, claim_recent, claim_full, claim_rank, claim_beyond_edge, claim_devices, claim_ranks,
          claim_ablations, claim_mute, claim_domains)


# ---- Sections ----------------------------------------------------------------------------------------------


def shown(data, names, suffix: str = "") -> list[Arm]:
    return [data[name + suffix] for name in names if name + suffix in data and data[name + suffix].there]


def memory(arm: Arm) -> dict[str, int]:
    """Numbers of one device: AdamW's moments, the same where ZeRO-1 spreads those of replicated numbers over
    the devices, A and B that are held, what is received in a step."""
    first, c = arm.first, arm.config
    sharded = c["method"] in ("hd_pissa", "intermediate")
    K = c["K"] if sharded else DEVICES
    if c["method"] == "hd_pissa":
        held = 0 if c["basis"] == "dct" else first["constants"]
        others = K - 1 if c["gradients"] == "global" else c.get("group", 1) - 1     # who send gradients too
        received = (K - 1 + others) * first["trained"] + first["trained"] // c["r"] * c.get("feedback", 0)
        if "shared" in c:       # blocks of r x r with each of the others, of dA_i and of dB_i
            received += 2 * (K - 1) * c["r"] ** 2 * len(first["effective_rank"])
    else:       # an all-reduce of gradients, or ZeRO-1's scatter and gather; the Intermediate Method: none
        held = first["trained"] if c["method"] in FACTORED else 0
        received = 0 if sharded else 2 * (K - 1) * first["trained"] // K
    return {"moments": first["moments"], "zero1": first["moments"] // (1 if sharded else K), "held": held,
            "received": received}


def method_table(data, names, suffix: str = "") -> list[str]:
    speed, rows = {row["arm"]: row["seconds_per_step"] for row in data["speed"]}, []
    for arm in shown(data, names, suffix):
        first, name, held = arm.first, arm.name.split(",")[0], memory(arm)
        timed = name in speed and arm.config["batch"] == COMMON["batch"]        # speed.py's batch
        rows.append([name_of(arm), f"{arm.best:g}", pm(arm), pm(arm, 1, digits=1), str(len(arm.tuned)),
                     f"{first['trained']:,}", *(bytes_(n) for n in held.values()),
                     f"{speed[name]:.3f}" if timed else "", str(len(arm.sweep))])
    if not rows:
        return ["Not run yet.", ""]
    return markdown(["method", "best lr", "held-out loss", "exact match, %", "seeds", "trained numbers",
                     "moments a device", "with ZeRO-1", "factors held", "received a step", "s a step",
                     "rates tried"], rows)


def domain_table(data, names, suffix: str = "") -> list[str]:
    arms = shown(data, names, suffix)
    if not arms:
        return []
    domains = [d for d in arms[0].first["final"] if d != "all"]
    return markdown(["held-out loss; exact match, %", *domains],
                    [[name_of(arm), *(f"{arm.mean(0, d):.3f}; {arm.mean(1, d):.1f}" for d in domains)]
                     for arm in arms])


def one_rate_table(data, names, unfinished: bool = False) -> list[str]:
    arms = [data[name] for name in names if name in data and data[name].sweep] if unfinished \
        else shown(data, names)
    lrs = sorted({lr for arm in arms for lr in arm.sweep})
    if not arms:
        return []

    def cell(arm, lr):
        if lr not in arm.sweep:
            return ""
        text = "diverged" if math.isinf(arm.sweep[lr]) else f"{arm.sweep[lr]:.3f}"
        return f"**{text}**" if lr == arm.best else text

    return markdown(["held-out loss at lr", *(f"{lr:g}" for lr in lrs)],
                    [[name_of(arm), *(cell(arm, lr) for lr in lrs)] for arm in arms])


def one_rate_text(data) -> str:
    """What the paper's protocol, one learning rate for all, would have concluded at each rate."""
    arms = shown(data, ("lora", "pissa", "hd"))
    if len(arms) < 3:
        return ""
    common = [lr for lr in arms[0].sweep if all(lr in arm.sweep for arm in arms)]
    if not common:
        return "No learning rate was run for all three methods of rank 2."
    winners = joined([f"{name_of(min(arms, key=lambda arm: arm.sweep[lr]))} at {lr:g}"     # noqa: B023
                      for lr in common])
    return ("Were one learning rate given to LoRA, PiSSA and HD-PiSSA alike (the paper's protocol; seed "
            "0), the "
            f"best of the three would be {winners}.")


def aggregation_text(data) -> list[str]:
    mean, total = data["hd"], data["hd sum"]
    if not (mean.there and total.there):
        return ["Not run yet.", ""]
    K, rows = mean.config["K"], []
    for lr, loss in mean.sweep.items():
        rows += [[f"{lr:g}", f"{small:g}", f"{loss:.4f}", f"{other:.4f}"]
                 for small, other in total.sweep.items() if abs(small * K / lr - 1) < 1e-6]
    text = (f"Tuned: mean {pm(mean)} at {mean.best:g}, sum {pm(total)} at {total.best:g} ({K} devices). "
            f"At matched "
            "rates, sum at lr / K, the two differ in the second-order term alone:")
    return [text, "", *markdown(["lr, mean", "lr, sum", "loss, mean", "loss, sum"], rows)]


def global_text(data) -> str:
    found = at_lengths(data, "hd global", ("pissa r=16", "lora r=16", "full", "lora", "pissa", "hd"))
    if not found:
        return "Not run yet."
    for _, arm, others in found:
        for other in others:
            against(data, arm, other)
    text = ("With `gradients=\"global\"` and the sum, the run is the fixed basis of rank 16 with all data: K "
            "devices give the update of one device with rank K·r (tests/test_experiments.py). A device of a "
            "peer of rank 16 has as few moments with ZeRO-1.")
    same, one = complete(FIXED["same"][0]), data["global Kr=128"]
    ends = [r["final"]["all"][0] for r in data["records"] if r["config"] == same and r["final"]]
    if one.there and ends and (same["lr"], same["seed"]) in one.runs:
        text += (f" K·r = {one.config['r']}, all of W's rank, is what {same['K']} devices of r = {same['r']} "
                 f"reach, each with 1/{same['K']} of that row's moments. It is run as one shard, which gives "
                 f"the same update in less time: at lr {same['lr']:g}, {same['K']} shards ended at "
                 f"{ends[0]:.4f}, one at {one.runs[same['lr'], same['seed']]['final']['all'][0]:.4f}. "
                 f"Full fine-tuning on {same['K']} devices with ZeRO-1 keeps 1/{same['K']} of its moments "
                 "too. It trains embeddings and norms, which none of these adapters does; \"linear layers "
                 "alone\" is the fair one.")
    for name in ("hd global", "global random", "global Kr=128", "random Kr=128"):
        for _, arm, others in at_lengths(data, name, ("full", "linear")):
            for other in others:
                against(data, arm, other)
    return text + WHERE


def parts_text(data) -> str:
    """Which part of the model full fine-tuning owes its lead over the linear layers to."""
    linear, full = data["linear"], data["full"]
    arms = [arm for arm in shown(data, PARTS) if arm not in (linear, full)]
    if not (linear.there and full.there and arms):
        return "Not run yet."
    each = "; ".join(f"{name_of(arm)}: {versus(data, arm, linear)}, {versus(data, arm, full)}"
                     for arm in arms)
    return (f"Full fine-tuning trains more than the linear layers. Each part added to them alone, {SHORT} "
            f"steps: {each}.")


def embedding_text(data) -> str:
    """Adapters on the embedding too: is full fine-tuning's loss reached?"""
    for name in EMBEDDING:
        for _, arm, others in at_lengths(data, name, ("full", *EMBEDDING[:3])):
            for other in others:
                if other is not arm:
                    against(data, arm, other)
    return ("K·r=128 is run as one shard, as above. The gradient of the whole embedding is formed before it "
            "is multiplied by the factors; the table does not count it. LoRA's adapter there draws "
            "the factor at the vocabulary, where PEFT's has zeros." + WHERE)


def summary(data) -> str:
    """The table of the main README: both models, short and long runs."""
    seeded = "global dct" if data["global dct"].there else "global random"
    rows = []
    for name, other in (("full", "full"), ("lora", "lora"), ("lora r=16", "lora r=16"), ("hd", "published"),
                        (seeded, {"global dct": "dct", "global random": "random"}[seeded])):
        arms = [data[name], data[name + ", long"]]
        if any(arm.there for arm in arms):
            held = memory(next(arm for arm in arms if arm.there))
            tests = list(data["real"][other].tests.values())
            big = f"{statistics.mean(tests):.3f} ± {statistics.stdev(tests):.3f}" if len(tests) > 1 \
                else "not run yet"
            rows.append([label(name), *map(bytes_, held.values()),
                         *(pm(arm) if arm.there else "not run yet" for arm in arms), big])
    steps = real.COMMON["steps"]
    head = ["method", "moments a device", "with ZeRO-1", "factors held", "received a step",
            f"{SHORT} steps", f"{LONG} steps", f"SmolLM2-135M, {steps} steps"]
    return "\n".join(markdown(head, rows)).rstrip()


def large_text(data) -> str:
    c, usual = complete(ARMS["hd, large batch"][0]), complete(ARMS["hd"][0])
    arms = shown(data, ("hd", "hd global"), ", large batch")
    others = shown(data, ("lora", "pissa"), ", large batch")
    text = (f"{c['steps']} steps of {c['batch']} rows: each of {c['K']} devices then learns from "
            f"{c['batch'] // c['K']} rows of its own instead of {usual['batch'] // usual['K']}, and the run "
            f"sees {c['steps'] * c['batch']:,} rows, {usual['steps']} steps of {usual['batch']} see "
            f"{usual['steps'] * usual['batch']:,}. ")
    return text + " ".join(f"{name_of(arm)} is {joined([versus(data, arm, o) for o in others])}."
                           for arm in arms if others)


def beyond_rows(data) -> list[str]:
    rows = []
    for suffix in ("", ", long"):
        for arm in shown(data, BEYOND, suffix):
            base = data[("hd" if arm.config["gradients"] == "local" else "hd global") + suffix]
            if base.there:
                costs = memory(arm)
                rows.append([name_of(arm), str(arm.config["steps"]), f"{arm.best:g}", pm(arm), pm(base),
                             bytes_(costs["moments"]), bytes_(costs["received"]), against(data, arm, base)])
    if not rows:
        return ["Not run yet.", ""]
    head = ["candidate", "steps", "best lr", "held-out loss", "without it", "moments a device",
            "received a step", "verdict"]
    return markdown(head, rows)


def tries_text(data) -> str:
    """What was tried to improve the local form, and which of it the rule keeps."""
    hd, lora, arms = data["hd"], data["lora"], shown(data, TRIES)
    if not (hd.there and lora.there and arms):
        return "Not run yet."
    text = ("Tries to improve the local form, one change each, beside "
            "[a larger batch](#a-larger-batch). *Shared first moments*: where two devices see the same "
            "numbers in their gradients, both go on with the mean. *Error feedback*: what a slice cannot "
            "express of a device's gradient goes on to the device of the next slice, as factors of rank r, "
            "or of rank 2Kr, which hold all of it. *Gradients of 2 or 4 devices*: a shard learns from the "
            "rows of its group, by a backward of as many times the rank; a group of all K is the whole batch "
            "(`tutorial/experiments/local.py`). ")
    kept = [arm for arm in arms if against(data, arm, hd) == "ahead"]
    if not kept:
        return text + f"By the rule none is ahead of {name_of(hd)}."
    said = [f"{name_of(arm)} is {versus(data, arm, hd)} and {versus(data, arm, lora)}" for arm in kept]
    return text + f"By the rule, {'; '.join(said)}; no other is ahead."


def recommendation(data) -> list[str]:
    out = []
    hd, lora, glob, wide = data["hd"], data["lora"], data["hd global"], data["lora r=16"]

    def each(name, other):
        """"120 steps, ahead of ...; 480 steps, undecided against ..."."""
        found = at_lengths(data, name, (other,))
        return "; ".join(f"{steps} steps, {versus(data, arm, b)}" for steps, arm, (b,) in found)

    if wide.there and data["global random"].there:
        out.append(
            "- First ask for LoRA of rank K·r whose optimizer state ZeRO-1 spreads over the same devices: "
            f"{bytes_(memory(wide)['zero1'])} of moments a device, as many as HD-PiSSA of rank r, and the "
            "same bytes a step as its whole-batch form. Whole batch with a random basis is, against it: "
            f"{each('global random', 'lora r=16')}.")
    if glob.there and hd.there:
        begin = {"ahead": "When several devices share a batch, use whole-batch gradients",
                 "equivalent": "Whole-batch gradients are equivalent to local ones",
                 "behind": "Keep the local gradients",
                 "undecided": "Whether whole-batch gradients help is undecided"}[against(data, glob, hd)]
        out.append(
            f"- {begin} (`gradients=\"global\"`, `aggregate=\"sum\"`, lr {glob.best:g} here): "
            f"{each('hd global', 'hd')}. They cost a backward of rank K·r on every device, the factors of "
            "all shards or their remaking, and twice the bytes of a step.")
    if glob.there and data["global random"].there:
        out.append(
            "- The basis need not come from the SVD. A random orthonormal one, with whole-batch gradients: "
            f"{each('global random', 'hd global')}. These runs share one draw, whatever the seed. "
            "`--init random` makes a basis from the seed and keeps none of it.")
    if hd.there and lora.there:
        out.append(
            f"- The published method (local gradients, mean): {each('hd', 'lora')}. Give it a learning "
            f"rate of its own: {hd.best:g} here for the mean over {hd.config['K']}, {lora.best:g} for LoRA.")
    if data["global random embedding"].there:
        out.append(
            "- Adapt the embedding too, if it is the output head as well "
            "(`tutorial/baselines/embedding.py`; `--also` trains it whole): with whole-batch "
            f"gradients and the random basis, {each('global random embedding', 'global random')}; "
            f"{each('global random embedding', 'full')}.")
    if data["hd sum"].there:
        out.append("- Mean or sum is a choice of learning rate: sum at lr / K is mean at lr.")
    if hd.there and lora.there and against(data, hd, lora) != "ahead":
        out.append("- Do not choose it for its rank alone: updates of effective rank "
                   f"{median_rank(hd):g} reach {pm(hd)} here, LoRA's of {median_rank(lora):g} reach "
                   f"{pm(lora)} after the same {SHORT} steps.")
    out.append("- Compare on your own data, each method with a learning rate of its own.")
    return [*out, ""]


def comparisons(data, pairs) -> list[str]:
    """The table of pairs of arms: names of the arms, compared at every length of run where both are there."""
    rows = []
    for a, b in pairs:
        there = data[a].there and data[b].there
        found = data["compared"].setdefault((a, b), compare(data[a], data[b])) if there else None
        rows.append((label(a), label(b), when(data[a].config), found))
    return [*verdict.table(rows, "run"), ""]


def when(config: dict) -> str:
    rows = f" of {config['batch']}" if config["batch"] != COMMON["batch"] else ""
    return f"{config['steps']} steps{rows}"


def deciding(data) -> list[str]:
    there = [(a + suffix, b + suffix) for suffix in ("", ", long") for a, b in DECIDING
             if a + suffix in data and b + suffix in data]
    return comparisons(data, there)


def all_pairs(data) -> list[str]:
    """What the texts of the page have compared, by the length of the run."""
    pairs = list(data["compared"])
    once = [(a, b) for i, (a, b) in enumerate(pairs) if (b, a) not in pairs[:i]]
    return comparisons(data, sorted(once, key=lambda pair: (
        data[pair[0]].config["batch"], data[pair[0]].config["steps"])))


def tuning_table(data) -> list[str]:
    arms = [data[name] for name in ARMS if data[name].runs]
    rows = [[arm.name, ", ".join(f"{lr:g}" for lr in arm.sweep), f"{arm.best:g}" if arm.best else "",
             str(len(arm.tuned)), "yes" if arm.interior else "not finished"] for arm in arms]
    return markdown(["arm", "learning rates, seed 0", "best", "seeds there", "best is interior"], rows)


def introduction(data) -> list[str]:
    records = data["records"]
    versions = sorted({f"Python {r['python']}, torch {r['torch']}, PEFT {r.get('peft', 'none')}"
                       for r in records})
    sources = sorted({f"commit {r['commit']}, sources {r['source']}, runner {r['runner']}" for r in records})
    there = [data[name] for name in ARMS if data[name].there]
    seeds = sum(len(arm.tuned) >= 3 for arm in there)
    return [
        "# Results", "",
        "Written by `python tutorial/experiments/figures.py` from the `*.jsonl` files of this folder, which "
        "`python tutorial/experiments/run.py` fills. Nothing here is typed by hand: a test writes the "
        "page again "
        "and compares.", "",
        f"The embedded GPT ({model_size(data)} parameters) and data, {len(records)} runs: {SHORT} steps of "
        f"{COMMON['batch']} rows where nothing else is said, {MEDIUM} and {LONG} for the main methods; "
        f"{COMMON['rows']} held-out rows; cosine schedule, warm-up of 3 %, AdamW without weight decay. "
        f"All methods "
        "see the same rows in the same order. Learning rates lie on one grid of factor 2, at least five "
        "an arm "
        f"(three at {LONG} steps), more until the best has a worse neighbour on either side, on seed 0; "
        f"then seeds "
        "1 and 2 at the best. An arm is shown once its best rate is inside. ± is the standard deviation over "
        "seeds. One rule decides every comparison ([PROTOCOL.md](../experiments/PROTOCOL.md)), on losses "
        "paired by seed: *ahead* or *behind* if |t| exceeds its 5 % limit and the gap is at least "
        f"{verdict.MARGIN} nats; *equivalent* if the 90 % interval of the gap lies within "
        f"±{verdict.MARGIN}; else *undecided*. Seed 0, which chose the rate, is left out where three others "
        "are there. No correction is made for the number of comparisons. The best rate was chosen on the "
        "held-out rows that are reported, for every method alike. The SVD and the random basis are the same "
        "for every seed. The K devices are simulated in one process. The model is small and the data "
        "synthetic: this page says what happens here.", "",
        *(f"- {text}" for text in (*versions, *sources)),
        f"- {seeds} of the {len(there)} arms shown have three seeds", "",
    ]


def page(data, figures: set) -> str:
    """README.md of the results; `figures`: names of the SVG files that exist."""

    def picture(name, text):
        return [f"![{text}]({name}.svg)", ""] if f"{name}.svg" in figures else []

    claims = []
    for claim in CLAIMS:
        title, word, text = claim(data)
        claims.append([title, f"**{word or 'not run yet'}**", text])
    medium = method_table(data, METHODS, ", medium")
    ranks = [arm.name for family in ("hd", "lora", "pissa") for _, arm in by_rank(data, family)]
    lines = [
        *introduction(data),
        "## The pairs that decide", "",
        "Losses in nats per response token; a negative gap means that a's loss is lower.", "",
        *deciding(data),
        "## A real pretrained model", "", *real_text(data),
        "## Claims of the paper", "", *markdown(["claim", "verdict", "numbers"], claims),
        "## For a practitioner", "", *recommendation(data),
        "## Methods, each at its best learning rate", "", f"{SHORT} steps.", "", *method_table(data, METHODS),
        "LoRA, PiSSA, DoRA and HiRA are PEFT's; the rest is in `tutorial/baselines`. Trained numbers, "
        f"moments, factors and bytes are one device's, float32, on K devices or, for a peer, on {DEVICES}. "
        + speed_text(data), "",
        *domain_table(data, METHODS), *picture("rate", "Held-out loss against the learning rate"),
        "## One learning rate for all", "", "Seed 0; bold: the best of the row.", "",
        *one_rate_table(data, METHODS), one_rate_text(data), "",
        "## Longer runs", "", f"{LONG} steps.", "", *method_table(data, METHODS, ", long"),
        *domain_table(data, METHODS, ", long"),
        f"All learning rates at {LONG} steps, seed 0, unfinished sweeps too; no verdict rests on those:", "",
        *one_rate_table(data, [f"{name}, long" for name in METHODS], unfinished=True),
        *([f"{MEDIUM} steps.", "", *medium] if len(medium) > 2 else []),
        *picture("length", "Tuned held-out loss against the length of the run"),
        "## A larger batch", "", large_text(data), "", *method_table(data, METHODS, ", large batch"),
        "## Whole-batch gradients, and equal parameters", "", global_text(data), "",
        "More devices, the same r and so as many moments on each:", "", *method_table(data, MORE),
        "## The embedding too", "", parts_text(data), "", *method_table(data, PARTS),
        "The embedding is tied to the output head, so no linear layer's mute reaches it. "
        "`tutorial/baselines/embedding.py` gives every method the same adapter there: the gradients of its "
        "factors are products with the whole gradient of W.", "",
        *method_table(data, ("full", *EMBEDDING)),
        f"{LONG} steps.", "", *method_table(data, ("full", *EMBEDDING), ", long"), embedding_text(data), "",
        "## Ablations (table 7)", "", *method_table(data, ("hd", "hd top", "hd lora init", "intermediate")),
        *picture("ablations", "Ablations"),
        "The Intermediate Method trains each device's slice against its own residual weight, alone; the K "
        "results are averaged at the end. The paper does not say how they become one model, so this is one "
        "reading of it.", "",
        "## Devices at a fixed total batch", "", *method_table(data, [name for _, name in DEVICES_TRIED]),
        *picture("devices", "Held-out loss against K"),
        "## Mean or sum", "", *aggregation_text(data),
        "## Rank r", "", *method_table(data, ranks), *picture("ranks", "Held-out loss against r"),
        "## What the update looks like", "", *picture("spectrum", "Singular values of ΔW"),
        *picture("tail", "Beyond 2Kr against the learning rate"),
        *picture("domains", "Effective rank per domain"),
        "## Mute scalar", "", *picture("mute", "Errors against γ"),
        "## Beyond the paper", "", tries_text(data), "", *beyond_rows(data),
        *picture("beyond", "Beyond the paper"),
        "## Every comparison", "",
        "All that this page calls ahead, behind, equivalent or undecided, and the pairs beside them.", "",
        *all_pairs(data),
        "## Tuning", "", *tuning_table(data),
        "## Not run", "", not_run(data), "",
    ]
    return "\n".join(lines).rstrip() + "\n"


def real_text(data) -> list[str]:
    c, arms = real.COMMON, data["real"]
    if not any(arm.sweep for arm in arms.values()):
        return ["Not run yet.", ""]
    return [f"SmolLM2-135M-Instruct on data/{c['data']}.jsonl, {c['steps']} steps of {c['batch']} rows, "
            f"K = {c['K']} ([PROTOCOL.md](../experiments/PROTOCOL.md); `python "
            "tutorial/experiments/real.py`). Rates are chosen on validation rows with seed 0, results are "
            "those of other rows and seeds.", "",
            *real_table.rows(arms), "", *real_table.pairs(arms), ""]


def speed_text(data) -> str:
    if not data["speed"]:
        return "Step times were not measured yet."
    first = data["speed"][0]
    return (f"Seconds a step: median of {first['steps']} steps on one thread, all K shards in turn in one "
            f"process, "
            f"load of the machine before it {first['load']:g} (`python tutorial/experiments/speed.py`).")


def model_size(data) -> str:
    full = [r["trained"] for r in data["records"] if r["config"]["method"] == "full"]
    return f"{full[0] / 1e6:.1f}M" if full else "about one million"


def not_run(data) -> str:
    left = [name for name in ARMS if not data[name].runs]
    part = [name for name in ARMS if data[name].runs and (not data[name].there or len(data[name].tuned) < 3)]
    text = (f"Arms without a run: {', '.join(left) or 'none'}. Arms whose sweep or seeds are not finished: "
            f"{', '.join(part) or 'none'}.")
    left = [real_table.NAMES[name] for name, arm in data["real"].items() if len(arm.tests) < len(real.SEEDS)]
    return text + (f" On the real model: {', '.join(left) or 'nothing'}. Step times: "
                   + ("in the table." if data["speed"] else "not measured on a quiet machine yet."))
