"""Held-out loss and exact match of a language model, and the answers that it generates."""

import contextlib
import itertools
import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import hd_pissa
from data.rows import questions, split_list
from training import folder
from training.answers import is_right, isolation, kind_of
from training.processes import everywhere, say, together

HELD = "held out"               # its name beside the --eval sets
SAMPLES, SAMPLE_TOKENS = 3, 64  # held-out prompts that are answered before and after, tokens of an answer


def dealt(lengths: list[int], batch_size: int, desc: str):
    """Yield (row indices, is it new) of the batches of this process, rows of like length together.

    Sharded weights are gathered in every forward, so each process gets as many batches: some repeat the last.
    The batches are the same for any number of processes.
    """
    order = sorted(range(len(lengths)), key=lambda j: (lengths[j], j))
    starts, world = range(0, len(lengths), batch_size), hd_pissa.world_size()
    rounds = range(hd_pissa.process_index(), -(-len(starts) // world) * world, world)
    for j in tqdm(rounds, desc=desc, unit="batch", leave=False, disable=hd_pissa.process_index() > 0):
        a = starts[min(j, len(starts) - 1)]
        yield order[a:a + batch_size], j < len(starts)


@contextlib.contextmanager
def evaluating(model):
    """The enclosed forwards are in eval mode and keep nothing for a backward."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(was_training)


def evaluate(model, rows, device, batch_size: int = 32, desc: str = "evaluate") -> dict[str, dict]:
    """Per domain and in "all": loss in nats per response token, exact match in percent, rows.

    Exact match: the greedy continuation of the prompt equals the whole response, end of text included. It
    does if and only if the reference token has the largest logit at every position of one forward over the
    reference: greedy decoding departs from it at the first position where that fails.
    """
    result = torch.zeros((len(rows), 3), dtype=torch.float64, device=device)        # loss sum, tokens, hit
    with evaluating(model):
        for chosen, new in dealt([len(row[0]) for row in rows], batch_size, desc):
            x, y = hd_pissa.pad([rows[j][:2] for j in chosen], device)
            logits = hd_pissa.logits_of(model, x)                       # (b, t, vocabulary)
            loss = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")     # (b, t), 0 where y = -100
            if new:
                result[chosen, 0] = loss.double().sum(1)
                result[chosen, 1] = (y >= 0).double().sum(1)
                result[chosen, 2] = ((logits.argmax(-1) == y) | (y < 0)).all(1).double()
    if hd_pissa.world_size() > 1:
        dist.all_reduce(result)             # one process has a row, the others add zeros: exact in any order
    table = {}
    for domain in sorted({row[2] for row in rows} - {"all"}) + ["all"]:
        part = result[[j for j, row in enumerate(rows) if domain in ("all", row[2])]]
        loss, tokens, hits = part.sum(0).tolist()
        table[domain] = {"loss": loss / tokens, "exact_match": 100 * hits / len(part), "rows": len(part)}
    return table


def first_logits(model, rows, device) -> torch.Tensor:
    """Logits of eight rows, the weights frozen meanwhile: some matmuls differ by whether one is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        with evaluating(model):
            return hd_pissa.logits_of(model, hd_pissa.pad([row[:2] for row in rows[:8]], device)[0])
    finally:
        for p in trained:
            p.requires_grad_(True)


# ---- Generated answers -------------------------------------------------------------------------------------


def read_sets(paths: str | None, limit: int, run_code: bool) -> dict[str, list[dict]]:
    """{file's stem: its first `limit` rows} of comma-separated JSONL files with an `answer` in every row."""
    sets = {}
    for path in split_list(paths) if paths else ():
        rows, name = questions(path)[:limit], Path(path).stem
        for i, row in enumerate(rows, 1):
            if not isinstance(row.get("answer"), str) or not row["answer"].strip():
                raise ValueError(f"{path}: row {i} has no text in 'answer', which generated text is compared "
                                 "with; use --eval_data for rows without")
            if kind_of(row["answer"]) == "code" and not run_code:
                raise ValueError(f"{path}: row {i} is answered by a program that would have to be run; leave "
                                 "the file out of --eval, or, on a machine where that does no harm, give "
                                 "--execute_generated_code")
        if name in (HELD, *sets):
            raise ValueError(f"--eval {paths}: two sets are called {name}; rename one")
        sets[name] = rows
    return sets


def generate(model, prompts: list[list[int]], ends: list[int], new_tokens: int, device) -> list[list[int]]:
    """Greedy continuations of at most `new_tokens` tokens, each up to and with its first token of `ends`.

    A transformers model runs its own `generate`: prompts padded on the left, keys and values cached. A plain
    module that maps (b, t) to logits has no cache: one forward over everything for each token, padded on the
    right. Other than by rounding of near ties a continuation does not depend on the rest of the batch.
    Collective where weights are sharded: every process then runs as many forwards as the slowest needs.
    """
    sharded = hd_pissa.world_size() > 1 and any(hasattr(p, "to_local") for p in model.parameters())
    b, lengths = len(prompts), torch.tensor([len(p) for p in prompts], device=device)
    width = int(lengths.max())
    x = torch.full((b, width + new_tokens), ends[0], device=device)
    if hasattr(model, "generate"):
        from transformers import GenerationConfig
        for i, p in enumerate(prompts):
            x[i, width - len(p):width] = torch.tensor(p)
        mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()      # (b, width)
        # The model's own configuration may sample or penalise repetition: greedy is neither.
        own, model.generation_config = model.generation_config, GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, use_cache=True, eos_token_id=ends,
            pad_token_id=ends[0])
        try:
            x = model.generate(input_ids=x[:, :width], attention_mask=mask, synced_gpus=sharded)
        finally:
            model.generation_config = own
        said = [row[width:] for row in x.tolist()]
    else:
        for i, p in enumerate(prompts):
            x[i, :len(p)] = torch.tensor(p)
        at, rows, stop = lengths.clone(), torch.arange(b, device=device), torch.tensor(ends, device=device)
        done = torch.zeros(b, dtype=torch.bool, device=device)
        for _ in range(new_tokens):
            logits = hd_pissa.logits_of(model, x[:, :int(at.max())])    # (b, t, vocabulary)
            token = logits[rows, at - 1].argmax(-1)                     # (b,)
            x[rows, at] = torch.where(done, x[rows, at], token)
            at += ~done
            done |= torch.isin(token, stop)
            left = (~done).sum()
            if sharded:
                dist.all_reduce(left)
            if not left:
                break
        said = [x[i, len(p):int(at[i])].tolist() for i, p in enumerate(prompts)]
    cut = [next((k + 1 for k, token in enumerate(row) if token in ends), len(row)) for row in said]
    return [row[:k] for row, k in zip(said, cut)]


def ends_of(model, tokenizer) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and an instruction model may have more."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None) or []
    return list(dict.fromkeys([*tokenizer.ends, *(own if isinstance(own, list) else [own])]))


def text_of(row: list[int], tokenizer, ends) -> str:
    """The text of generated tokens, without what ended it."""
    if hasattr(tokenizer, "hf"):
        return tokenizer.hf.decode(row, skip_special_tokens=True)
    return tokenizer.decode(row[:-1] if row and row[-1] in ends else row)


def answered(model, tokenizer, held, device, context: int, new_tokens: int) -> list[dict]:
    """{"prompt", "answer", "text"} of a few held-out rows of different domains: what the model generates."""
    new_tokens = min(new_tokens, SAMPLE_TOKENS, context // 2)
    queues: dict[str, dict] = {}
    for tokens, loss, domain in held:
        start, stop = (loss, len(tokens)) if isinstance(loss, int) else loss[0]
        if 1 < start <= context - new_tokens:           # a text for continued training has no prompt
            queues.setdefault(domain, {})[tuple(tokens[:start])] = tokens[:start], tokens[start:stop]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*(q.values() for q in queues.values())))
    rows = list(itertools.islice(filter(None, turns), SAMPLES))
    if not rows:
        return []
    ends = ends_of(model, tokenizer)
    with evaluating(model):
        said = generate(model, [prompt for prompt, _ in rows], ends, new_tokens, device)
    return [{"prompt": tokenizer.decode(prompt), "answer": text_of(answer, tokenizer, ends),
             "text": text_of(row, tokenizer, ends)} for (prompt, answer), row in zip(rows, said)]


def ask(model, tokenizer, rows, device, context: int, new_tokens: int, batch_size: int, desc="answers",
        beat=lambda: None) -> list[dict]:
    """Per row what the model generates: {"text", "right", "ended"}; collective, the same on every process.

    A row whose prompt and `new_tokens` exceed `context` is not asked: its text is None, and it is not right.
    """
    ends = ends_of(model, tokenizer)
    prompts = [tokenizer.prompt(row["instruction"]) for row in rows]
    fit = [j for j, prompt in enumerate(prompts) if len(prompt) + new_tokens <= context]
    said = {}
    with evaluating(model), together():
        for chosen, new in dealt([len(prompts[j]) for j in fit], batch_size, desc):
            batch = [fit[j] for j in chosen]
            tokens = generate(model, [prompts[j] for j in batch], ends, new_tokens, device)
            for j, row in zip(batch, tokens) if new else ():
                ended, text = bool(row) and row[-1] in ends, text_of(row, tokenizer, ends)
                beat()                                                  # running a program may take seconds
                said[j] = {"text": text, "right": is_right(text, rows[j]), "ended": ended}
    said = {j: answer for part in hd_pissa.everywhere(said.copy) for j, answer in part.items()}
    return [said.get(j, {"text": None, "right": False, "ended": False}) for j in range(len(rows))]


def examiner(args, tokenizer, context: int, device):
    """A function that asks all sets of --eval, adds to OUT/eval.jsonl, and returns its lines.

    With --eval_every the held-out loss has a line too. The texts, and at both ends of the training the
    answers to some held-out prompts, go to OUT/answers/SET.step_N.jsonl. Lines of this step and later ones
    are replaced: a run that goes on does them again.
    """
    out, size, encoded = Path(args.out), max(8, args.micro_batch_size), {}
    sets = everywhere(
        lambda: read_sets(args.eval, args.eval_rows, args.execute_generated_code))
    if any(kind_of(row["answer"]) == "code" for rows in sets.values() for row in rows):
        say(isolation())
    new_tokens = min(args.eval_tokens, context // 2)
    for name, rows in sets.items():
        pairs = [(tokenizer.prompt(row["instruction"]), tokenizer.response(row["response"])) for row in rows]
        encoded[name] = [((p + r)[:context], len(p), "all") for p, r in pairs if len(p) < context]
        if not encoded[name]:
            raise ValueError(f"--eval: no prompt of {name} fits the model's context of {context} tokens; "
                             "leave that set out")

    def examine(model, held, step: int, table=None, beat=lambda: None) -> list[dict]:
        """table: of `evaluate` for the held-out rows, where it is known; beat: called as a sign of life."""
        lines, texts = [], {}
        if step in (0, args.max_steps):
            said = answered(model, tokenizer, held, device, context, args.eval_tokens)
            texts |= {HELD: [json.dumps(sample) for sample in said]} if said else {}
        if args.eval_every:
            table = table or evaluate(model, held, device, size, f"{HELD}: loss")
            lines.append({"step": step, "set": HELD, **table["all"], "unended": 0, "not_asked": 0})
            beat()
        for name, rows in sets.items():
            loss = evaluate(model, encoded[name], device, size, f"{name}: loss")["all"]["loss"]
            beat()
            said = ask(model, tokenizer, rows, device, context, new_tokens, size, name, beat)
            texts[name] = [json.dumps({"answer": row["answer"], **answer}) for row, answer in zip(rows, said)]
            lines.append({"step": step, "set": name, "loss": loss,
                          "exact_match": 100 * sum(answer["right"] for answer in said) / len(rows),
                          "rows": len(rows), "unended": sum(not answer["ended"] for answer in said),
                          "not_asked": sum(answer["text"] is None for answer in said)})
        for line in lines if hd_pissa.process_index() == 0 else ():
            tqdm.write(describe(line, new_tokens, context))         # above the bar of the training

        def write():
            path, kept = out / "eval.jsonl", []
            if hd_pissa.process_index() > 0:
                return []
            if step:
                kept = [line for line in folder.read_lines(path) if fits(line) and line["step"] < step]
            if texts:
                (out / "answers").mkdir(exist_ok=True)
                folder.remember(out, [f"answers/{name}.step_{step}.jsonl" for name in texts])
            for name, said in texts.items():
                folder.write(out / "answers" / f"{name}.step_{step}.jsonl", "\n".join(said) + "\n")
            if not lines:
                return kept
            folder.write(path, "".join(json.dumps(line) + "\n" for line in kept + lines))
            return kept + lines

        lines = everywhere(write)
        return hd_pissa.everywhere(lambda: lines)[0]

    return examine


def lowest(exams: list[dict]) -> dict | None:
    """The line of eval.jsonl with the lowest held-out loss after a step; None without such lines."""
    lines = [line for line in exams if line["set"] == HELD and line["step"] > 0]
    return min(lines, key=lambda line: line["loss"], default=None)


def fits(line: dict) -> bool:
    """Is this a line of eval.jsonl?"""
    return isinstance(line.get("set"), str) and all(isinstance(line.get(key), (int, float)) for key in (
        "step", "loss", "exact_match", "rows", "unended", "not_asked"))


def describe(line: dict, new_tokens: int, context: int) -> str:
    """A line of eval.jsonl in words."""
    text = (f"step {line['step']}, {line['set']}: loss {line['loss']:.4f}, right {line['exact_match']:.1f} % "
            f"of {line['rows']} rows")
    if unended := line["unended"] - line["not_asked"]:
        text += f", {unended} not ended within --eval_tokens {new_tokens}"
    if line["not_asked"]:
        text += (f", {line['not_asked']} not asked (prompt and --eval_tokens {new_tokens} exceed the context "
                 f"of {context})")
    return text
