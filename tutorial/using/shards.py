"""What the programs here share: rows dealt out to shards, and an optimizer that merges and saves it all.

Copy this file beside the recipe that you take.
"""

import warnings
from itertools import chain

import torch

import hd_pissa


def deal(rows, S: int) -> list:
    """Rows of a process, a list or a tensor, in S parts: one for each of its shards, as even as may be."""
    n = len(rows)
    if n < S:
        raise ValueError(f"{n} rows for the {S} shards of a process: every shard needs one. Use a batch of "
                         f"{S} rows or more, and drop the last batch of an epoch where it is smaller")
    return [rows[i * n // S:(i + 1) * n // S] for i in range(S)]    # alike for any number of processes


def bind(adapters, optimizer) -> None:
    """Merge after every optimizer.step(), and keep the adapters in what optimizer.state_dict() returns.

    A trainer saves W, as the model, and the optimizer. A_i and B_i belong to the W that the run began with:
    cut anew from a W that has trained, they would not fit the moments. And one process has the moments of its
    own shards alone. So here the state holds both, of all shards, by name: every process calls state_dict(),
    one writes what it returns, all load it. The number of processes may change, that of shards may not.
    """
    adapters.check(optimizer)       # refuses optimizers that read the parameter, and weight decay
    optimizer.register_step_post_hook(lambda *_: adapters.merge_())
    named = {id(p): name for name, p in adapters.named_parameters(adapters.first)}

    def names(optimizer) -> list[list[str]]:
        return [[named.get(id(p), f"{g}.{i}") for i, p in enumerate(group["params"])]
                for g, group in enumerate(optimizer.param_groups)]

    def save(optimizer, state):
        if any(p.grad is not None for p in adapters.parameters()):
            warnings.warn("saved in the middle of a step: gradients of its micro-batches so far are not in "
                          "this state, and whoever resumes from it makes that step without them. Save after "
                          "optimizer.step()", stacklevel=2)
        if adapters.step == 0:
            return {**state, "hd_pissa": None}      # nothing has trained; Accelerate asks for it then
        order = [*chain(*names(optimizer))]
        moments = {order[i]: to_cpu(moment) for i, moment in state["state"].items()}
        parts = hd_pissa.everywhere(lambda: (to_cpu(adapters.state_dict()), moments, names(optimizer)))
        groups = [{**group, "params": [*dict.fromkeys(chain(*(part[2][g] for part in parts)))]}
                  for g, group in enumerate(state["param_groups"])]
        return {"state": dict(chain(*(part[1].items() for part in parts))), "param_groups": groups,
                "hd_pissa": dict(chain(*(part[0].items() for part in parts)))}

    def load(optimizer, state):
        if "hd_pissa" not in state:
            raise ValueError("this optimizer state holds no adapters: A_i and B_i cut from today's W would "
                             "not fit its moments. Load a state that was saved after bind(), or begin a new "
                             "run from W, without one")
        if state["hd_pissa"] is None:
            return state
        adapters.load_state_dict(state["hd_pissa"])
        own = names(optimizer)
        mine = {*chain(*own)}
        return {"state": {name: moment for name, moment in state["state"].items() if name in mine},
                "param_groups": [{**group, "params": n} for group, n in zip(state["param_groups"], own)]}

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)


def to_cpu(tensors: dict) -> dict:
    """Process 0 has no use for a tensor on the device of another."""
    return {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in tensors.items()}
