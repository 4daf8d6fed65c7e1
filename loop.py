"""What both training loops share and nobody edits to do research: flags, ranks, batches, optimizer, schedule, files.

Plain functions. The loops themselves stand in train_sft.py and train_kto.py.
"""

import argparse
import hashlib
import json
import math
import os
import pickle
import random
import sys
import time

import torch
import torch.distributed as dist

from chat import Tokenizer, micro_batches, pack
from model import Checkpoint, InputError, Qwen2, atomic_write, token_logps

# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities of packed examples


def example_logps(model, examples):
    """The log-probability that the model gives to the supervised tokens of each example, summed: (len(examples),) fp32.

    examples: (ids, supervised) pairs, run as one packed row. The head runs on the supervised positions alone.
    """
    ids, lengths, at, targets, owner = pack(examples, model.device)
    hidden = model.hidden(ids, lengths)[0]  # (T, C)
    logps = token_logps(hidden[at], model.head_weight, targets)  # (N,)
    return torch.zeros(len(examples), device=logps.device).index_add(0, owner, logps)


@torch.no_grad()
def sequence_logps(model, examples, micro_tokens, rank=0, world=1, progress=None):
    """example_logps without gradients for any number of examples, at most micro_tokens tokens at a time: (n,) on the CPU.

    With world > 1 the ranks share the work and all get the whole result.
    """
    out = torch.zeros(len(examples), device=model.device)
    for micro in my_share([len(ids) for ids, _ in examples], micro_tokens, rank, world) if examples else []:
        out[micro] = example_logps(model, [examples[i] for i in micro])
        if progress is not None:
            progress.update(len(micro))
    return (sum_over_ranks(out) if world > 1 else out).cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def setup(device):
    """-> (rank, world, device). Under torchrun joins the process group: nccl on GPUs, gloo on CPUs."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return rank, world, device


def sum_over_ranks(x):
    """The tensor summed over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def my_share(lengths, micro_tokens, rank, world):
    """This rank's micro-batches of a step: lists of indices into the step's examples.

    All ranks compute the same cut and take theirs: largest micro-batch first, each to the rank with the least so far.
    """
    fair = max(max(lengths), math.ceil(sum(lengths) / world))  # no rank idles while another holds all of a small step
    bins = micro_batches(lengths, min(micro_tokens, fair))
    load, mine = [0] * world, []
    for b in sorted(bins, key=lambda b: -sum(lengths[i] for i in b)):
        r = load.index(min(load))
        load[r] += sum(lengths[i] for i in b)
        if r == rank:
            mine.append(b)
    return mine


# ---------------------------------------------------------------------------------------------------------------------
# Batches of indices, drawn before training starts


def plan(n, batch_size, epochs, max_steps, smallest=1, order=None):
    """The whole run's batches: a list of steps, each a list of indices into the n examples.

    order(epoch, sizes) gives the epoch's permutation, where sizes are the batch sizes it will be cut into. The last
    batch of an epoch may be short; a remainder under `smallest` joins the batch before. max_steps, where given, decides
    over epochs.
    """
    sizes = [batch_size] * (n // batch_size) + ([n % batch_size] if n % batch_size else [])
    if sizes[-1] < smallest and len(sizes) > 1:
        last = sizes.pop()
        sizes[-1] += last
    steps, epoch = [], 0
    while len(steps) < max_steps if max_steps else epoch < epochs:
        indices = order(epoch, sizes) if order else list(range(n))
        for size in sizes:
            steps.append(indices[:size])
            indices = indices[size:]
        epoch += 1
    return steps[:max_steps] if max_steps else steps


def shuffled(n, seed):
    """plan()'s order for a shuffled epoch: another permutation each epoch, the same for the same seed."""

    def order(epoch, sizes):
        indices = list(range(n))
        random.Random(f"{seed} {epoch}").shuffle(indices)
        return indices

    return order


# ---------------------------------------------------------------------------------------------------------------------
# Optimisation


def lr_at(step, total, peak, warmup, schedule):
    """The learning rate of step 0 .. total - 1, as transformers' get_scheduler has it: step 0 of a warmup has rate 0."""
    if step < warmup:
        return peak * step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def schedule_advice(a, steps):
    """A list of warnings about the learning rate's schedule."""
    return [f"all {len(steps)} steps are warmup; lower --warmup or --batch-size"] if len(steps) <= a.warmup else []


def make_optimizer(model, a):
    """AdamW (arXiv 1711.05101). Matrices decay, biases and norms do not."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": a.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=a.lr, betas=(a.beta1, a.beta2), eps=a.eps, fused=True)


def optimizer_step(model, optimizer, lr, clip):
    """Sums the gradients over the ranks, clips, steps, clears. -> the gradient's norm before clipping."""
    parameters = list(model.parameters())
    for p in parameters:
        if p.grad is None:  # a rank that had no micro-batch in this step
            p.grad = torch.zeros_like(p)
    if dist.is_initialized():
        pending = [dist.all_reduce(p.grad, async_op=True) for p in parameters]
        for work in pending:
            work.wait()
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip if clip > 0 else math.inf).item()
    if not math.isfinite(norm):
        raise InputError(f"the gradient's norm is {norm}: training has diverged; lower --lr and --resume from the last save")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def add_flags(p, epochs, batch_size, lr):
    """The flags that both training scripts have; the three arguments are their own defaults."""
    # checkpoints
    p.add_argument("--ckpt", required=True, help="model to start from: hub id, directory or .pt file")
    p.add_argument("--out", required=True, help="checkpoint to write: a directory, or a .pt file by its suffix")
    # data
    p.add_argument("--data", nargs="+", required=True, help="JSON Lines files to train on")
    p.add_argument("--eval-data", nargs="+", help="held-out JSON Lines files")
    p.add_argument("--max-len", type=at_least(2), default=1024, help="tokens; longer examples lose their end")
    p.add_argument("--no-shuffle", action="store_true", help="keep the order of the files in every epoch")
    p.add_argument("--seed", type=int, default=0, help="of the order of the data")
    # optimisation
    p.add_argument("--epochs", type=at_least(1), default=epochs, help="passes over the data")
    p.add_argument("--max-steps", type=at_least(1), help="optimizer steps, instead of --epochs")
    p.add_argument("--batch-size", type=at_least(1), default=batch_size, help="examples per optimizer step, over all ranks")
    p.add_argument("--lr", type=float, default=lr, help="peak learning rate")
    p.add_argument("--schedule", choices=["cosine", "linear", "constant"], default="cosine", help="of the learning rate")
    p.add_argument("--warmup", type=at_least(0), default=10, help="steps over which the learning rate rises from 0")
    p.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's, on matrices")
    p.add_argument("--beta1", type=float, default=0.9, help="AdamW's decay of the first moment")
    p.add_argument("--beta2", type=float, default=0.999, help="AdamW's decay of the second moment")
    p.add_argument("--eps", type=float, default=1e-8, help="AdamW's epsilon")
    p.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient; 0 does not clip")
    # machine
    cuda = torch.cuda.is_available()
    p.add_argument("--micro-tokens", type=at_least(1), default=16384 if cuda else 2048, help="tokens of one forward on one device")
    p.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16" if cuda else "fp32", help="to compute in; weights stay fp32")
    p.add_argument("--device", default="cuda" if cuda else "cpu", help="torch device")
    # saving
    p.add_argument("--save-every", type=at_least(0), default=100, help="steps between saves into OUT.run/; 0 saves at the end only")
    p.add_argument("--eval-every", type=at_least(0), default=0, help="steps between evaluations; 0 evaluates at the end only")
    p.add_argument("--resume", action="store_true", help="go on from the last save in OUT.run/")


def at_least(low):
    """An argparse type: an integer from `low` on."""

    def integer(text):
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is less than {low}")
        return value

    return integer


# ---------------------------------------------------------------------------------------------------------------------
# The run's files


def load_model(source, device, dtype):
    """-> (model, tokenizer, checkpoint): fp32 weights that compute in dtype ("fp32" or "bf16")."""
    ckpt = Checkpoint(source)
    tokenizer = Tokenizer(ckpt)
    model = Qwen2.from_pretrained(ckpt, torch.float32, device)
    model.compute_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    return model, tokenizer, ckpt


# What may differ between a run and its resumption: none of these changes the result beyond rounding.
FREE_TO_CHANGE = {"resume", "out", "micro_tokens", "device", "save_every", "eval_every", "eval_data", "ref_cache", "ckpt", "data", "ref"}


def run_identity(a, examples, fingerprint):
    """What a resumed run must share with the one it continues: the arguments that matter, the model and the token ids."""
    data = hashlib.sha256(json.dumps(examples).encode()).hexdigest()
    return {k: v for k, v in vars(a).items() if k not in FREE_TO_CHANGE} | {"the data": data, "the model": fingerprint}


def start_run(a, model, optimizer, identity, rank):
    """Opens OUT.run/ and, with --resume, restores the last save. -> the step to start with."""
    folder, done = f"{a.out}.run", 0
    state_path = os.path.join(folder, "state.pt")
    if a.resume and os.path.isfile(state_path):
        try:
            state = torch.load(state_path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as e:
            raise InputError(f"{state_path}: corrupt ({str(e).splitlines()[0]}); remove it and start again") from None
        changed = [k for k in identity if state["identity"].get(k) != identity[k]]
        if changed:
            raise InputError(f"{state_path}: was saved by a run that differs in {', '.join(changed)}; undo that or drop --resume")
        model.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    elif a.resume and rank == 0:
        print(f"{state_path}: no save to resume from; starting at step 1", file=sys.stderr)
    if rank == 0:
        log = os.path.join(folder, "log.jsonl")
        lines = []
        if done:
            with open(log, encoding="utf-8") as f:  # steps after the save are about to be repeated
                lines = [line for line in f if json.loads(line)["step"] <= done]
        with atomic_write(log) as f:
            f.writelines(lines)
        with atomic_write(os.path.join(folder, "args.json")) as f:
            json.dump(vars(a) | {"command": sys.argv, "torch": torch.__version__}, f, indent=2)
    return done


def write_log(a, record):
    """Appends one object to OUT.run/log.jsonl."""
    with open(f"{a.out}.run/log.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(record) + "\n")


def save_state(a, model, optimizer, files, identity, step):
    """Writes OUT.run/step-N, a checkpoint to use, and OUT.run/state.pt, the state to resume from."""
    model.save(os.path.join(f"{a.out}.run", f"step-{step}" + (".pt" if a.out.endswith(".pt") else "")), files)
    state = {"identity": identity, "step": step, "weights": model.state_dict(), "optimizer": optimizer.state_dict()}
    with atomic_write(os.path.join(f"{a.out}.run", "state.pt"), "wb") as f:
        torch.save(state, f)


def finish_run(a, model, files, started, steps, facts, rank):
    """Writes OUT, drops the state to resume from, and says what was done. facts: lines for the summary."""
    if rank == 0:
        model.save(a.out, files)
        state_path = os.path.join(f"{a.out}.run", "state.pt")
        if os.path.isfile(state_path):
            os.remove(state_path)
        for line in facts:
            print(line)
        print(f"{steps} steps in {time.time() - started:.0f} s")
        print(f"wrote {a.out} (checkpoint, fp32) and {a.out}.run/log.jsonl")
        print(f"next: python eval.py --ckpt {a.ckpt} {a.out} --tasks gsm8k --out {a.out}.eval")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
