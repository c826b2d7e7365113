"""The experiments: which configurations are compared, at which steps, from which first guess of the rate."""

# What a configuration may hold, with the value that is meant when it is left out.
COMMON = {"method": None, "r": None, "lr": None, "seed": 0, "steps": 120, "batch": 64, "domain": "all",
          "schedule": "cosine", "dtype": "float32", "rows": 400}
SHARDED = {"K": 8, "init": "hd_pissa", "aggregate": "mean", "gradients": "local", "basis": "svd",
           "optimizer": "adamw"}
GLOBAL = dict(gradients="global", aggregate="sum")
# What is trained beside the linear layers, by a part of the parameters' names; left out of a run's key if
# nothing is. Full fine-tuning of the linear layers takes any, adapters the tied embedding and output head.
ALSO = {"linear": ("ln_", "wpe", "wte"), "hd_pissa": ("wte",), "lora": ("wte",), "pissa": ("wte",)}
# Other settings that are left out of a run's key unless they are given, and the methods that know them:
# PEFT's lora_alpha and use_rslora, how much further than A the B of LoRA+ steps, AdamW's second beta, and
# the tries of local.py: devices in a group, share of the other's first moment, rank of what is handed on.
TRIES = ("group", "shared", "feedback")
OPTIONAL = {"alpha": ("lora",), "rslora": ("lora",), "ratio": ("lora",), "beta2": ("hd_pissa",),
            **{name: ("hd_pissa",) for name in TRIES}}


def complete(config: dict) -> dict:
    """`config` with every default written out: the key of a run."""
    known = COMMON | (SHARDED if config["method"] == "hd_pissa" else
                      {"K": 8} if config["method"] == "intermediate" else {})
    optional = {name for name, methods in OPTIONAL.items() if config["method"] in methods}
    if unknown := set(config) - set(known) - optional - {"also"}:
        raise ValueError(f"{unknown} mean nothing to method {config['method']!r}; it knows {sorted(known)}")
    if "also" in config and config["also"] not in (there := ALSO.get(config["method"], ())):
        raise ValueError(f"also={config['also']!r} with method {config['method']!r}: it takes one of {there}")
    if "ratio" in config and "also" in config:
        raise ValueError("ratio with also: LoRA+ says nothing of an embedding here; leave one of them out")
    needs = GLOBAL | {"optimizer": "adamw"}
    if config.get("also") and config["method"] == "hd_pissa" and needs.items() - (known | config).items():
        raise ValueError(f"also={config['also']!r} needs {needs}: an embedding's shards see all rows")
    tries, needs = [name for name in TRIES if name in config], {"gradients": "local", "optimizer": "adamw"}
    if tries and needs.items() - (known | config).items():
        raise ValueError(f"{tries[0]} needs {needs}: it is a try to improve the local form")
    if (known | config).get("K", 1) % config.get("group", 1):
        raise ValueError(f"group={config['group']}: K = {(known | config)['K']} is not a multiple of it")
    return known | config


def grid(index: int) -> float:
    """Learning rate number `index`: 1e-3 times a power of two. All arms share the grid."""
    return float(f"{1e-3 * 2.0 ** index:.6g}")


def hd(**kw) -> dict:
    return {"method": "hd_pissa", "r": 2, **kw}


SEEDS = (0, 1, 2)
SHORT, MEDIUM, LONG = 120, 240, 480       # steps of 64 rows; an epoch is 118

# An arm: configuration without lr and seed, index of the first guess in the grid, number of rates (5).
# The guesses for hd_pissa, pissa, lora and full are the sweep in data/README.md; others were guessed by size.
ARMS = {
    "full": ({"method": "full"}, 2),
    "linear": ({"method": "linear"}, 2),
    "lora": ({"method": "lora", "r": 2}, 5),
    "pissa": ({"method": "pissa", "r": 2}, 4),
    "hd": (hd(), 5),
    "hd global": (hd(**GLOBAL), 3),
    "pissa r=16": ({"method": "pissa", "r": 16}, 3),
    "lora r=16": ({"method": "lora", "r": 16}, 4),
    "dora": ({"method": "dora", "r": 2}, 5),
    "hira": ({"method": "hira", "r": 2}, 6),
    "mora": ({"method": "mora", "r": 2}, 3),
    "dora r=16": ({"method": "dora", "r": 16}, 4),
    "hira r=16": ({"method": "hira", "r": 16}, 5),
    "lora plus": ({"method": "lora", "r": 2, "ratio": 16}, 2),
    "lora plus r=16": ({"method": "lora", "r": 16, "ratio": 16}, 1),
    "lora alpha=16": ({"method": "lora", "r": 2, "alpha": 16}, 3),
    "rslora r=16": ({"method": "lora", "r": 16, "alpha": 16, "rslora": True}, 3),
    "galore": ({"method": "galore", "r": 2}, 4),
    "galore r=16": ({"method": "galore", "r": 16}, 3),
    "apollo": ({"method": "apollo", "r": 2}, 4),
    "apollo r=16": ({"method": "apollo", "r": 16}, 3),
    "global drawn": (hd(basis="drawn", **GLOBAL), 3),
    "global dct": (hd(basis="dct", **GLOBAL), 3),
    "hd lora init": (hd(init="lora"), 5),
    "hd top": (hd(init="top"), 5),
    "intermediate": ({"method": "intermediate", "r": 2}, 5),
    "hd sum": (hd(aggregate="sum"), 2),
    "hd global mean": (hd(gradients="global"), 6),
    "global orthonormal": (hd(basis="orthonormal", **GLOBAL), 3),
    "global orthonormal muon": (hd(basis="orthonormal", optimizer="muon", **GLOBAL), 2),
    "global random": (hd(basis="random", **GLOBAL), 3),
    "hd interleaved": (hd(basis="interleaved"), 5),
    "hd dct": (hd(basis="dct"), 5),
    "hd beta2": (hd(beta2=0.95), 5),
    "hd group=2": (hd(group=2), 5),
    "hd group=4": (hd(group=4), 5),
    "hd shared moments": (hd(shared=0.5), 5),
    "hd feedback": (hd(feedback=2), 5),
    "hd feedback all": (hd(feedback=32), 5),       # 2 K r: nothing is lost
    "global K=16": (hd(K=16, **GLOBAL), 2),
    "global Kr=128": (hd(K=1, r=128, **GLOBAL), 1),      # as 64 devices of r = 2 would: see FIXED["same"]
    "random Kr=128": (hd(K=1, r=128, basis="random", **GLOBAL), 2),
    "linear norms": ({"method": "linear", "also": "ln_"}, 1),
    "linear positions": ({"method": "linear", "also": "wpe"}, 1),
    "linear embedding": ({"method": "linear", "also": "wte"}, 1),
    **{f"hd K={K}": (hd(K=K), 5) for K in (1, 2, 4, 16)},
    **{f"hd r={r}": (hd(r=r), 5) for r in (1, 4, 8, 16)},
    **{f"lora r={r}": ({"method": "lora", "r": r}, 5 if r < 8 else 4) for r in (1, 4, 8, 32, 64)},
    **{f"pissa r={r}": ({"method": "pissa", "r": r}, 4 if r < 8 else 3) for r in (1, 4, 8, 32, 64)},
    **{f"{name}, {length}": (config | {"steps": steps}, guess, 3 if steps == LONG else 5)
       for length, steps in (("medium", MEDIUM), ("long", LONG)) for name, config, guess in (
        ("hd", hd(), 4), ("lora", {"method": "lora", "r": 2}, 4), ("pissa", {"method": "pissa", "r": 2}, 4),
        ("hd global", hd(**GLOBAL), 2), ("global Kr=128", hd(K=1, r=128, **GLOBAL), 2),
        ("random Kr=128", hd(K=1, r=128, basis="random", **GLOBAL), 3),
        ("global random", hd(basis="random", **GLOBAL), 3),
        ("full", {"method": "full"}, 2), ("linear", {"method": "linear"}, 1),
        ("pissa r=16", {"method": "pissa", "r": 16}, 3), ("lora r=16", {"method": "lora", "r": 16}, 3))},
    **{f"{name}, long": (config | {"steps": LONG}, guess, 3) for name, config, guess in (
        ("dora", {"method": "dora", "r": 2}, 4), ("dora r=16", {"method": "dora", "r": 16}, 3),
        ("hira", {"method": "hira", "r": 2}, 7), ("hira r=16", {"method": "hira", "r": 16}, 5),
        ("lora plus", {"method": "lora", "r": 2, "ratio": 16}, 1),
        ("lora plus r=16", {"method": "lora", "r": 16, "ratio": 16}, 0),
        ("galore", {"method": "galore", "r": 2}, 3), ("apollo", {"method": "apollo", "r": 2}, 3),
        ("global drawn", hd(basis="drawn", **GLOBAL), 3), ("global dct", hd(basis="dct", **GLOBAL), 3))},
    **{f"{name} embedding{suffix}": (config | {"also": "wte", "steps": steps}, guess, points)
       for suffix, steps, points in (("", SHORT, 5), (", long", LONG, 3)) for name, config, guess in (
        ("lora", {"method": "lora", "r": 2}, 4), ("pissa r=16", {"method": "pissa", "r": 16}, 3),
        ("lora r=16", {"method": "lora", "r": 16}, 3), ("hd global", hd(**GLOBAL), 3),
        ("global random", hd(basis="random", **GLOBAL), 3), ("global dct", hd(basis="dct", **GLOBAL), 3),
        ("random Kr=128", hd(K=1, r=128, basis="random", **GLOBAL), 1))},
    **{f"{name}, large batch": (config | {"batch": 256, "steps": 60}, guess) for name, config, guess in (
        ("hd", hd(), 5), ("lora", {"method": "lora", "r": 2}, 4), ("pissa", {"method": "pissa", "r": 2}, 4),
        ("hd global", hd(**GLOBAL), 2))},
}

DOMAINS = ("math", "code", "commonsense", "conversation")
# Runs without a sweep: Fig. 1 per domain, Fig. 7's tail against lr and steps in both precisions, and 64
# shards one after another, slower than the one of rank 128 that gives the same update.
FIXED = {
    "same": [hd(K=64, lr=grid(1), **GLOBAL)],
    "domains": [{"method": "full", "domain": d, "steps": 100, "batch": 32, "lr": grid(i)}
                for d in DOMAINS for i in (2, 0)],
    "tail": [hd(lr=lr, steps=steps, batch=16, schedule="constant", dtype=dtype, rows=32)
             for lr in (2e-5, 2e-4, 2e-3, 2e-2) for steps in (25, 100) for dtype in ("float32", "float64")],
}

# Arms of the pairs that decide, which get four seeds more: without seed 0, that chose the rate, they are six.
MORE = {f"{arm}, more seeds": arm for arm in (
    "hd", "lora", "hd global", "global drawn", "global dct", "lora r=16", "hira", "full",
    "global dct embedding", "lora r=16 embedding", "global dct embedding, long",
    "lora r=16 embedding, long", "full, long")}
MORE_SEEDS = (3, 4, 5, 6)

# Experiments in order of importance.
EXPERIMENTS = {
    "methods": ["hd", "lora", "pissa", "hd global", "full"],
    "equal parameters": ["pissa r=16"],
    "tail": ["tail"],
    "domains": ["domains"],
    "ablations": ["hd top", "hd lora init", "intermediate"],
    "long": ["hd, long", "lora, long", "pissa, long"],
    "K": ["hd K=4", "hd K=1", "hd K=16", "hd K=2"],
    "more methods": ["dora", "hira", "mora"],
    "long global": ["hd global, long", "pissa r=16, long", "full, long"],
    "aggregate": ["hd sum"],
    "beyond": ["global orthonormal muon", "global orthonormal", "global random", "hd interleaved"],
    "medium": ["hd, medium", "lora, medium", "pissa, medium", "hd global, medium", "full, medium",
               "pissa r=16, medium", "global Kr=128, medium", "random Kr=128, medium",
               "global random, medium", "linear, medium", "lora r=16, medium"],
    "beyond, long": ["global random, long"],
    "more devices": ["global Kr=128", "same", "random Kr=128, long", "random Kr=128"],
    "large batch": ["hd, large batch", "lora, large batch", "pissa, large batch", "hd global, large batch"],
    "linear layers": ["linear, long", "linear"],
    "more devices, long": ["global Kr=128, long", "global K=16"],
    "r": ["hd r=1", "hd r=4", "hd r=8", "hd r=16", "lora r=1", "lora r=4", "lora r=8", "lora r=16",
          "lora r=32", "lora r=64", "pissa r=1", "pissa r=4", "pissa r=8", "pissa r=32", "pissa r=64"],
    "global mean": ["hd global mean"],
    "embedding": ["global random embedding", "lora embedding", "pissa r=16 embedding"],
    "embedding, long": ["global random embedding, long", "lora embedding, long",
                        "pissa r=16 embedding, long"],
    "what full trains": ["linear embedding", "linear norms", "linear positions"],
    "LoRA of rank Kr": ["lora r=16, long", "lora r=16 embedding", "lora r=16 embedding, long"],
    "embedding, more": ["hd global embedding", "random Kr=128 embedding, long", "hd global embedding, long",
                        "random Kr=128 embedding"],
    "missing methods": ["hira r=16", "dora r=16", "lora plus", "lora plus r=16", "lora alpha=16",
                        "rslora r=16"],
    "projected gradients": ["galore", "apollo", "galore r=16", "apollo r=16"],
    "basis by seed": ["global drawn", "global dct", "global dct embedding"],
    "missing methods, long": ["hira, long", "hira r=16, long", "dora, long", "dora r=16, long",
                              "lora plus, long", "lora plus r=16, long"],
    "projected gradients, long": ["galore, long", "apollo, long"],
    "basis by seed, long": ["global drawn, long", "global dct, long", "global dct embedding, long"],
    "more seeds": list(MORE),
    "local": ["hd dct", "hd beta2", "hd shared moments", "hd feedback", "hd group=2", "hd group=4",
              "hd feedback all"],
}
