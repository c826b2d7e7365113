"""Held-out loss and exact match of a language model, per domain."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import hd_pissa


@torch.no_grad()
def evaluate(model, rows, device, batch_size: int = 32, desc: str = "evaluate") -> dict[str, dict]:
    """Per domain and in "all": loss in nats per response token, exact match in percent, rows.

    Exact match: the greedy continuation of the prompt equals the whole response, end of text included. It
    does if and only if the reference token has the largest logit at every position of one forward over the
    reference: greedy decoding departs from it at the first position where that fails.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda j: (len(rows[j][0]), j))
    result = torch.zeros((len(rows), 3), dtype=torch.float64, device=device)        # loss sum, tokens, hit
    starts, world = range(0, len(rows), batch_size), hd_pissa.world_size()
    rounds = range(hd_pissa.rank(), -(-len(starts) // world) * world, world)
    for j in tqdm(rounds, desc=desc, unit="batch", leave=False, disable=hd_pissa.rank() > 0):
        # Sharded weights are gathered in every forward, so each process runs as many: some repeat the last.
        a = starts[min(j, len(starts) - 1)]
        chosen = order[a:a + batch_size]
        x, y = hd_pissa.pad([rows[j][:2] for j in chosen], device)
        logits = hd_pissa.logits_of(model, x)                           # (b, t, vocabulary)
        loss = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")         # (b, t), 0 where y = -100
        if j >= len(starts):
            continue
        result[chosen, 0] = loss.double().sum(1)
        result[chosen, 1] = (y >= 0).double().sum(1)
        result[chosen, 2] = ((logits.argmax(-1) == y) | (y < 0)).all(1).double()
    if hd_pissa.world_size() > 1:
        dist.all_reduce(result)             # one process has a row, the others add zeros: exact in any order
    model.train(was_training)
    table = {}
    for domain in sorted({row[2] for row in rows} - {"all"}) + ["all"]:
        part = result[[j for j, row in enumerate(rows) if domain in ("all", row[2])]]
        loss, tokens, hits = part.sum(0).tolist()
        table[domain] = {"loss": loss / tokens, "exact_match": 100 * hits / len(part), "rows": len(part)}
    return table
