"""Fine-tune a language model with HD-PiSSA, LoRA, PiSSA, or all weights, through the same loop.

    python train.py                           # embedded GPT and data, all 8 shards in one process
    torchrun --nproc_per_node=2 train.py      # the same experiment on two processes
    torchrun --nproc_per_node=8 train.py --model DIR --data FILE.jsonl --rank 16 --lr 2e-5
    python train.py --method lora             # a baseline

The method is hd_pissa.py. Here is a run of it, from top to bottom: configuration, model, data,
loop, result. What a run wants beside these is in training/. Data is rows of chats, of questions and
answers or of plain text, as data/formats.py lists them; the loss covers the answers alone.
Results: OUT/model.pt (plain state_dict) or OUT/model/ (Hugging Face files), OUT/log.jsonl.
"""

import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import hd_pissa
import hd_pissa_extra
from data.rows import enough, load, packed_batches, preview, step_batches, table
from data.tokenizer import GPTTokenizer
from training import checkpoint, folder, models, processes, recipes, report
from training.arguments import DATA, FLAGS, LR, STEPS, parse  # noqa: F401
from training.baselines import Baseline
from training.dry_run import dry_run
from training.evaluate import evaluate, examiner, first_logits, lowest
from training.models import save
from training.processes import Lost, Stopped, everywhere, fail, say
from training.svd_cache import cached_components

# ---- Configuration: training/arguments.py has every flag, its default, unit and "off" value ------

# ---- Model: nanoGPT's shape, pre-norm, learned positions, tied head, no biases -------------------

class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.attn_proj = nn.Linear(width, width, bias=False)
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.mlp_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x, mask=None):
        b, t, c = x.shape                                              # batch, tokens, width
        qkv = self.c_attn(self.ln_1(x)).view(b, t, 3, self.heads, -1)  # (b, t, 3, heads, c/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                           # each (b, heads, t, c/heads)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, block_size=128, layers=4, width=128, seed: int = 0):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(Block(width, width // 32) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02 / math.sqrt(2 * layers) if name.endswith("proj.weight") else 0.02
                nn.init.normal_(p, std=std, generator=generator)
        self.lm_head.weight = self.wte.weight

    @classmethod
    def from_state_dict(cls, state: dict) -> "GPT":
        """Rebuild the model whose plain state_dict this is; its sizes are the tensors' shapes."""
        layers = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
        vocabulary, width = state["wte.weight"].shape
        model = cls(vocabulary, state["wpe.weight"].shape[0], layers, width)
        if (dtype := state["wte.weight"].dtype) != torch.float32:
            model.to(dtype)
        model.load_state_dict(state)
        return model

    def forward(self, x, position_ids=None, attention_mask=None):      # these two for --packing
        at = slice(x.shape[1]) if position_ids is None else position_ids
        h = self.wte(x) + self.wpe.weight[at]                           # (b, t, width)
        for block in self.blocks:
            h = block(h, attention_mask)
        return self.lm_head(self.ln_f(h))                               # (b, t, vocabulary)


def embeddings(model) -> int:
    """How many token ids the model knows."""
    table = model.wte if isinstance(model, GPT) else model.get_input_embeddings()
    return table.weight.shape[0]


def load_small(path: str) -> GPT:
    """The small GPT in a .pt file that an earlier run has written."""
    state = {name: W.float() for name, W in models.read_state(path).items()}
    with models.one_line(f"--model {path}", "give a model.pt that train.py has written"):
        return GPT.from_state_dict(state)


def load_model(name: str, seed: int, weights: bool = True, tokenizer: str | None = None):
    """(float32 model, its tokenizer, context) of "scratch", a .pt file or a Hugging Face name."""
    if not models.is_small(name):
        return models.hugging_face(name, weights, tokenizer)
    tokenizer = GPTTokenizer(tokenizer)
    model = GPT(tokenizer.vocabulary, seed=seed) if name == "scratch" else load_small(name)
    if embeddings(model) != tokenizer.vocabulary:
        raise ValueError(
            f"--model {name} has {embeddings(model)} embeddings, the tokenizer "
            f"{tokenizer.vocabulary} tokens; give the --tokenizer that its config.json names")
    return model, tokenizer, model.wpe.weight.shape[0]


def attach(args, model, device, resumed: bool):
    """The adapters of --method; from here on the model has its final dtype and place."""
    if args.method == "hd_pissa":
        decompose = hd_pissa_extra.components
        decompose = cached_components(args.svd_cache) if args.svd_cache else decompose
        adapters = hd_pissa_extra.attach(
            model, args.rank, shards=args.shards, targets=args.targets, also=args.also,
            alpha=args.alpha, init=args.init, dropout=args.dropout, rounding=args.rounding,
            aggregate=args.aggregate, exchange=args.exchange, basis=args.basis,
            gradients=args.gradients, send=args.send, seed=args.seed, bucket_mb=args.bucket_mb,
            device=device, dtype=torch.bfloat16 if args.dtype == "bfloat16" else None,
            progress=True, decompose=None if resumed else decompose, accumulate=args.export_lora)
    else:
        adapters = Baseline(model, args.method, args.rank, args.shards, args.targets, args.alpha,
                            args.seed, args.dropout)
    adapters.skip_nonfinite = args.skip_nonfinite
    if args.dtype == "bfloat16":
        for p in model.parameters():    # but no buffers: rotary frequencies stay float32
            p.data = p.data.bfloat16()
    if args.shard_weights:
        hd_pissa_extra.shard_over_processes(model, device)
    return adapters

# ---- Data ----------------------------------------------------------------------------------------

def read_data(args, tokenizer, context: int):
    """(rows to train on, held-out rows, their hash); --max_steps is settled by their number."""
    told = {}
    rows, held, rows_hash = everywhere(lambda: load(
        args.data, args.eval_data, args.eval_rows, tokenizer, block_size(args, context),
        format=args.format, loss=args.loss, report=told, progress=hd_pissa.process_index() == 0))
    enough(args, rows, held)
    say(f"{table(told)}\nfirst row, + before what is trained:\n{preview(rows[0], tokenizer)}")
    if args.max_steps is None:
        epochs = args.epochs and max(1, round(args.epochs * (len(rows) // args.batch_size)))
        args.max_steps = epochs or STEPS
    return rows, held, rows_hash


def block_size(args, context: int) -> int:
    return min(args.block_size or min(context, 1024), context)


def batches_of(args, model, rows, context: int):
    """A function of the step to begin at: the step batches, packed where --packing wants it."""
    size, vocabulary = block_size(args, context), embeddings(model)
    if args.packing:
        everywhere(lambda: models.take_packed(model, vocabulary, size))

    def batches(start):
        made = step_batches(rows, args.batch_size, args.seed, start)
        return packed_batches(made, args.shards, size, vocabulary) if args.packing else made

    return batches

# ---- Loop ----------------------------------------------------------------------------------------

def fit(args, config, model, adapters, optimizer, batches, start, extra, device, examine) -> None:
    """Train from step `start`, log and save; a signal ends it after this step or the next.

    The host waits for the GPU once a step, when processes agree. What concerns all of them travels
    with that: a signal that one has caught, clock and log of process 0. A line of the log, whose
    `applied` is known only after the step, is written a step later.
    """
    out, saved, plain_step_ = Path(args.out), time.monotonic(), adapters.step_
    heard = late = unwritten = None
    with (processes.signals_kept() as caught, report.board(args.log, out, start) as chart,
          processes.heartbeat(args.heartbeat, args.timeout) as beat,
          models.rows_apart(args.packing)):

        def step_(optimizer, told):
            nonlocal heard
            own = [max(caught, default=0), time.monotonic() - saved, unwritten is not None]
            own = hd_pissa.sent(torch.tensor(own, dtype=torch.float64), device)
            rows = plain_step_(optimizer, torch.cat((told, own.expand(len(told), 3)), dim=1))
            heard = [*zip(*(row[-3:] for row in rows))]
            return [row[:-3] for row in rows]

        def log_late(wait: bool):
            """Log the last step. Its `applied` is on the host if another step has ended since."""
            nonlocal late, unwritten
            if late:
                (record, there, here), late = late, None
                record["applied"] = float(there if wait else here)
                unwritten = unwritten or folder.append_log(out / "log.jsonl", record, config)
                chart(record["step"], record)

        def check_log():
            if unwritten:
                raise unwritten

        adapters.step_ = step_
        try:
            for record in models.in_precision(args.dtype, hd_pissa.train(
                    model, adapters, batches, lr=args.lr, max_steps=args.max_steps, start=start,
                    warmup=args.warmup, schedule=args.schedule, max_grad_norm=args.max_grad_norm,
                    micro_batch_size=args.micro_batch_size, autocast=args.dtype == "autocast",
                    optimizer=optimizer, device=device)):
                log_late(wait=False)
                step, (signals, waited, failed) = record["step"], heard
                beat(step)
                late = record, adapters.applied, processes.to_host(adapters.applied)
                asked = args.eval_every and step % args.eval_every == 0 and step < args.max_steps
                due = (step == args.max_steps or args.save_every and step % args.save_every == 0
                       or args.save_minutes and waited[0] >= 60 * args.save_minutes)
                stopped = int(max(signals)) if step < args.max_steps else 0
                if any(failed) or asked or due or stopped:      # OUT may be another run's by now
                    log_late(wait=True)
                    everywhere(check_log)
                if args.check_every and step % args.check_every == 0:
                    checkpoint.check_replicas(adapters, device)
                if asked:
                    for line in examine(step, beat=lambda step=step: beat(step)):
                        if line["step"] == step:
                            chart(step, {f"{line['set']}: loss": line["loss"]})
                if due or stopped:
                    checkpoint.save(out / "checkpoint", step, model, adapters, optimizer, config,
                                    extra | {"stopped": stopped}, device, args.keep)
                    saved = time.monotonic()
                if stopped:
                    raise Stopped(stopped, f"after step {step}, which is saved; the same command "
                                  "continues")
        finally:
            log_late(wait=True)

# ---- Result --------------------------------------------------------------------------------------

def finish(args, model, tokenizer, adapters, held, watched, extra, device, examine) -> dict:
    """Take the adapters off, evaluate the plain model, write it all, and then print it."""
    out, slots = Path(args.out), {slot.name: slot for slot in adapters.slots}
    adapters.detach_()
    after = evaluate(model, held, device, max(8, args.micro_batch_size), "evaluate result")
    exams = examine(args.max_steps, after)
    files = save(out, model, tokenizer, held, device, args.save_dtype)

    def trained(name):
        slot = slots.get(name)
        return (hd_pissa_extra.whole(slot.W, slot.low) if slot else
                hd_pissa_extra.whole(model.get_parameter(name + ".weight")))

    ranks, spectra = report.rank_of_update(args, watched, trained)
    result = {"before": extra["before"], "after": after, "effective_rank": ranks, "eval": exams,
              "samples": report.samples(out, args.max_steps), "best": lowest(exams)}
    if args.export_lora:
        result["lora_error"] = models.export(args, model, adapters, extra["base"], held, device,
                                             load_model)

    def write():
        """The report, and last result.json, which says that all is there."""
        if hd_pissa.process_index() == 0:
            folder.write(out / "spectra.json", json.dumps(spectra))
            report.drop_best(out, result["best"], args.max_steps)
            report.report_page(out, result)
            whole = json.dumps(result | {"files": files}, indent=1)
            folder.write(out / "result.json", whole + "\n")

    everywhere(write)
    report.report_losses(extra["before"], after)
    report.report_best(out, result["best"], args.max_steps, isinstance(model, GPT))
    report.report_samples(result["samples"])
    report.report_rank(args, ranks)
    report.report_files(out, isinstance(model, GPT))
    return result

# ---- The run, stage by stage ---------------------------------------------------------------------

def run(args) -> dict:
    threads = processes.cpu_threads(args.threads, models.is_small(args.model))
    planned = args.dry_run and torch.cuda.is_available()    # perhaps for more GPUs than there are
    device = processes.start_processes("cpu" if planned else args.device, threads, args.timeout)
    recipes.begin(args, load_model)
    if args.dry_run:
        return dry_run(args, load_model, STEPS)
    processes.check_machine(args, device)
    with processes.stoppable(), folder.alone(Path(args.out)), hd_pissa_extra.float32_products():
        folder.check_ours(Path(args.out), *folder.inputs(args))
        return run_in_folder(args, Path(args.out), device)


def run_in_folder(args, out: Path, device) -> dict:
    model, tokenizer, context = everywhere(
        lambda: load_model(args.model, args.seed, True, args.tokenizer))
    everywhere(lambda: models.check_savable(args, model, tokenizer))
    exam = examiner(args, tokenizer, context, device)
    model = model.double() if args.dtype == "float64" else model
    model = model if args.shard_weights else model.to(device)
    rows, held, rows_hash = read_data(args, tokenizer, context)
    config = vars(args) | {"processes": hd_pissa.world_size(), "torch": torch.__version__,
                           "rows": rows_hash, "weights": checkpoint.weights_of(model)}
    resumed = checkpoint.look(args.resume, out, config)                 # (path, manifest) or None
    if result := checkpoint.finished(args.resume, out, resumed, config):
        return result
    least = args.rank * (args.shards if args.method == "hd_pissa" and args.init != "top" else 1)
    beside = everywhere(lambda: hd_pissa_extra.also_parameters(model, args.also))
    find = (hd_pissa_extra if args.method == "hd_pissa" else hd_pissa).find_layers    # also experts
    layers = [(name, module) for name, module in find(model, args.targets, least=least)[0]
              if not {name + ".weight", name.rpartition(".")[0]} & beside.keys()]
    needed, result = checkpoint.bytes_of(args, model, layers)
    folder.check_room(out, needed, result * (1 + bool(args.eval_every)), args.keep, not resumed)
    everywhere(lambda: models.check_layers(args, model, layers))
    batches = batches_of(args, model, rows, context)
    if args.gradient_checkpointing:
        models.checkpoint_activations(model)

    start_of = {name: module.weight.detach() for name, module in layers}
    watched = {name: start_of[name].to("cpu", copy=True) for name in report.sampled([*start_of])}
    sums = {name: hd_pissa_extra.checksum(W) for name, W in start_of.items() if args.export_lora}
    comparable = args.method == "hd_pissa" and args.dtype != "bfloat16" and not args.shard_weights
    logits = first_logits(model, held, device) if comparable and not resumed else None
    adapters = attach(args, model, device, bool(resumed))
    report.report_layers(args, adapters, [*start_of])
    optimizer = torch.optim.AdamW(adapters.parameters(), args.lr, weight_decay=0.0, foreach=True)
    if resumed:
        start, extra = checkpoint.go_on(*resumed, model, adapters, optimizer, config, device)
    else:
        before = evaluate(model, held, device, max(8, args.micro_batch_size), "evaluate base")
        start, extra = 0, {"before": before, "base": sums}
        if logits is not None:
            if not torch.equal(first_logits(model, held, device), logits):
                raise RuntimeError("step-0 logits differ from the base model's: not Y = X W")
            loss = before["all"]["loss"]
            say(f"step-0 loss {loss:.6f}: logits equal the base model's bit for bit")

    say(f"{args.method}: {args.max_steps} steps of {args.batch_size} rows, peak lr {args.lr:g}"
        + (f" (for aggregate={args.aggregate})" if args.method == "hd_pissa" else ""))
    everywhere(lambda: folder.begin(out, config, start))

    def examine(step, table=None, beat=lambda: None):
        """Evaluate after a step; the model of the lowest held-out loss stays in OUT/best."""
        exams = exam(model, held, step, table, beat)
        whole = args.eval_every and args.method in ("hd_pissa", "full")     # no W - A B
        if whole and 0 < step < args.max_steps and lowest(exams)["step"] == step:
            save(out, model, tokenizer, held, device, args.save_dtype, "best")
        return exams

    if not start:
        examine(0, extra["before"])
    fit(args, config, model, adapters, optimizer, batches(start), start, extra, device, examine)
    return finish(args, model, tokenizer, adapters, held, watched, extra, device, examine)


@processes.patient_streams()
def main(argv=None) -> dict:
    """Run a command line; one sentence and exit status 2 for what the user can put right."""
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        return run(args)
    except Stopped as e:
        say(f"stopped by {signal.Signals(e.number).name} {e.where}")
        raise SystemExit(128 + e.number) from None
    except (ValueError, OSError, Lost) as e:
        fail(" ".join(str(e).split()))
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        fail(f"a collective failed: {' '.join(str(e).split())}. Another process has died or the "
             "network is cut; the same command continues from the last checkpoint")


if __name__ == "__main__":
    main()
    # On success alone: after an error of one process NCCL would wait here for the others, and the
    # error's traceback would come after --timeout.
    if dist.is_initialized():
        dist.destroy_process_group()
