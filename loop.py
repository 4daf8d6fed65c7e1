"""What both training loops share and nobody edits to do research: models, batches, optimizer, schedule, flags.

Plain functions. Files, saves and resuming are in saving.py; ranks, sharding and signals in ranks.py; the memory of a step in
memory.py. The loops themselves stand in train_sft.py and train_kto.py.
"""

import functools
import itertools
import math
import os
import random

import torch
import torch.utils.checkpoint

from attention import to_device
from chat import Tokenizer, pack
from checkpoint import Checkpoint, InputError, same
from flags import DEVICE, DTYPE, DTYPES, at_least, checkpoint_out, number, torch_device
from memory import GIB, free_memory, memory_needed
from model import Qwen2, finite, token_logps
from ranks import STOP, cut, fill, is_sharded, my_share, shard, stop_asked, sum_over_ranks

# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities of packed examples


def packed(examples, device):
    """chat.pack, on the device."""
    ids, lengths, *others = pack(examples)
    ids, at, targets, owner = (to_device(x, device) for x in (ids, *others))
    return ids, lengths, at, targets, owner


def supervised_logps(model, examples):
    """The log-probability that the model gives to each supervised token: (logps (N,) fp32, owner (N,): its example's index).

    examples: (ids, supervised) pairs, run as one packed row. The head runs on the supervised positions alone. Without
    examples N is 0, but the model runs all the same: a sharded rank without work must join the others' calls.
    """
    ids, lengths, at, targets, owner = packed(examples or [([0, 0], [False, True])], model.device)
    logps = model(ids, lengths, at, targets)
    return (logps, owner) if examples else (logps[:0], owner[:0])


def example_logps(model, examples):
    """supervised_logps summed over the tokens of each example: (len(examples),) fp32."""
    logps, owner = supervised_logps(model, examples)
    return logps.new_zeros(len(examples)).index_add(0, owner, logps)


@torch.no_grad()
def shared_logps(model, examples, micro_tokens):
    """example_logps without gradients, where several examples begin alike: each context is computed once, and what follows it
    at most micro_tokens tokens at a time.

    The context is what stands before the first supervised token, less its own last token: that one is fed with the rest,
    since its state predicts the first supervised token."""
    starts = [max(0, supervised.index(True) - 1) for _, supervised in examples]
    contexts = [tuple(ids[:n]) for (ids, _), n in zip(examples, starts)]
    unique = {context: i for i, context in enumerate(dict.fromkeys(filter(None, contexts)))}
    if len(unique) == sum(map(bool, contexts)):
        return example_logps(model, examples)
    known = model.new_cache(len(unique), max(map(len, unique)))
    model.prefill(list(unique), known)
    rest = [(ids[n:], supervised[n:]) for (ids, supervised), n in zip(examples, starts)]
    out = torch.zeros(len(examples), device=model.device)
    for chosen in cut([len(ids) for ids, _ in rest], micro_tokens, 1):
        cache = model.new_cache(len(chosen), max(len(examples[i][0]) for i in chosen))
        for row, i in enumerate(chosen):
            if contexts[i]:
                cache.copy_start(row, known, unique[contexts[i]], starts[i])
        ids, lengths, at, targets, owner = packed([rest[i] for i in chosen], model.device)
        logps = token_logps(model.hidden(ids, lengths, cache, at)[0], model.head_weight, targets)  # (N,)
        out.index_add_(0, to_device(chosen, model.device)[owner], logps)
    return out


@torch.no_grad()
def sequence_logps(model, examples, micro_tokens, rank=0, world=1, heed_stop=False):
    """example_logps without gradients, at most micro_tokens tokens at a time: (len(examples),) fp32.

    Examples of one context, such as the completions of one prompt, stay together and share its computation, in several forwards
    if need be; but not if the model is sharded, whose weights are whole only inside its forward, nor on a GPU, where the many
    small calls that it takes would cost more than they save. With world > 1 the ranks share the work and all get the whole
    result.

    heed_stop: after SIGTERM the rest is left at 0. The caller must then ask stop_asked() before it uses the result.
    """
    out = torch.zeros(len(examples), device=model.device)
    share = model.device.type == "cpu" and not is_sharded(model)
    units, costs, unit_of = [], [], {}  # lists of indices; tokens to compute; {context: the unit that it adds to}
    for i, (ids, supervised) in enumerate(examples):
        n = supervised.index(True) if share else 0
        unit = unit_of.get(tuple(ids[:n])) if n else None
        if unit is None or costs[unit] + len(ids) - n > 4 * micro_tokens:  # a unit is one rank's
            unit = unit_of[tuple(ids[:n])] = len(units)
            units.append([])
            costs.append(n)
        units[unit].append(i)
        costs[unit] += len(ids) - n
    for micro in my_share(costs, micro_tokens, rank, world, is_sharded(model)):
        if heed_stop and (stop_asked(model.device) if is_sharded(model) else STOP["asked"]):  # sharded ranks leave together
            break
        indices = [i for unit in micro for i in units[unit]]
        some = [examples[i] for i in indices]
        logps = shared_logps(model, some, micro_tokens) if share else example_logps(model, some)
        out[to_device(torch.tensor(indices, dtype=torch.long), model.device)] = logps
    return sum_over_ranks(out) if world > 1 else out


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


def shares(run, lengths):
    """Yields this rank's micro-batches of a step, each of which must be run backward. Ends early after SIGTERM."""
    micros = my_share(lengths, run.a.micro_tokens, run.rank, run.world, is_sharded(run.model))
    run.expect(len(micros))
    for micro in micros:
        if STOP["asked"] and not is_sharded(run.model):  # sharded ranks would wait for this one in their next layer
            return
        yield micro


def clip_gradients(model, clip):
    """Scales the gradients down to the norm `clip` (0: leaves them). -> their norm before, a scalar tensor."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip if clip > 0 else math.inf)
    return (norm.full_tensor() if is_sharded(model) else norm).to(model.device)


def clear_gradients(run):
    run.optimizer.zero_grad(set_to_none=run.world == 1 or is_sharded(run.model))  # replicas' gradients are views


def optimizer_step(run, lr, seen):
    """Ends a step: sums gradients and `seen` over the ranks, clips, updates the weights, clears.

    seen: fp32, any shape; what this rank found in the step, zeros where another did. -> (verdict, seen summed, on the
    CPU, the gradient's norm before clipping). Verdict: "step"; "skip" if any of these numbers is not finite; "stop" if
    SIGTERM came to any rank. The last two change nothing. All ranks decide by the same sums, so they decide alike.
    """
    run.finish()
    norm = clip_gradients(run.model, run.a.clip)
    numbers = sum_over_ranks(torch.cat((seen.flatten(), seen.new_full((1,), float(STOP["asked"])))))
    numbers = torch.cat((numbers, norm[None])).cpu()  # the step's only wait for the device
    verdict = "stop" if numbers[-2] > 0 else "step" if numbers.isfinite().all() else "skip"
    if verdict == "step":
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
    clear_gradients(run)
    return verdict, numbers[:-2].view(seen.shape), numbers[-1].item()


def note_skipped(run, step, examples, where, known=()):
    """Notes that a step was skipped. -> the log's entries about it.

    examples: the step's. where: their "file:line". known: indices of those that are known to be at fault.
    """
    names = [where[i] for i in (list(known) or offenders(run, examples))[:5]]
    run.skips.append((step, names))
    return {"skipped": len(run.skips), "offending": names}


def offenders(run, examples):
    """Indices of examples whose log-probability, or else its gradient, is not finite by itself."""
    logps = sequence_logps(run.model, examples, run.a.micro_tokens, run.rank, run.world)
    bad = [i for i, finite in enumerate(logps.isfinite().tolist()) if not finite]
    for i in range(len(examples)) if not bad else []:  # every rank all of them: a rare case, and so they agree
        example_logps(run.model, [examples[i]]).sum().backward()
        bad += [] if clip_gradients(run.model, 0).isfinite() else [i]
        clear_gradients(run)
    return bad


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def add_flags(p, epochs, batch_size, lr):
    """The flags that both training scripts have; the three arguments are their own defaults."""
    # checkpoints
    p.add_argument("--ckpt", required=True, help="model to start from: hub id, directory or .pt file")
    p.add_argument("--out", type=checkpoint_out, required=True, help="checkpoint to write: a directory, or a .pt file by its suffix")
    # data
    p.add_argument("--data", nargs="+", required=True, help="JSON Lines files to train on")
    p.add_argument("--eval-data", nargs="+", help="held-out JSON Lines files")
    p.add_argument("--max-len", type=at_least(2), default=1024, help="tokens; longer examples lose their end")
    p.add_argument("--no-shuffle", action="store_true", help="keep the order of the files in every epoch")
    p.add_argument("--seed", type=int, default=0, help="seed of the order of the data")
    # optimisation
    p.add_argument("--epochs", type=at_least(1), default=epochs, help="passes over the data")
    p.add_argument("--max-steps", type=at_least(1), help="optimizer steps, instead of --epochs")
    p.add_argument("--batch-size", type=at_least(1), default=batch_size, help="examples per optimizer step, over all ranks")
    p.add_argument("--lr", type=number(0), default=lr, help="peak learning rate")
    p.add_argument("--schedule", choices=["cosine", "linear", "constant"], default="cosine", help="of the learning rate")
    p.add_argument("--warmup", type=at_least(0), default=10, help="steps over which the learning rate rises from 0")
    p.add_argument("--weight-decay", type=number(0), default=0.0, help="AdamW's, on matrices")
    p.add_argument("--beta1", type=number(0, below=1), default=0.9, help="AdamW's decay of the first moment")
    p.add_argument("--beta2", type=number(0, below=1), default=0.999, help="AdamW's decay of the second moment")
    p.add_argument("--eps", type=number(0), default=1e-8, help="AdamW's epsilon")
    p.add_argument("--clip", type=number(0), default=1.0, help="largest norm of the gradient; 0 does not clip")
    p.add_argument("--max-skips", type=at_least(1), default=3, help="end after so many steps in a row without finite loss and gradient")
    # machine
    micro_tokens = 16384 if DEVICE == "cuda" else 1024
    p.add_argument("--micro-tokens", type=at_least(1), default=micro_tokens, help="tokens of one forward on one device")
    p.add_argument("--dtype", choices=DTYPES, default=DTYPE, help="to compute in; weights stay fp32")
    p.add_argument("--device", type=torch_device, default=DEVICE, help="torch device")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks: pays after some hundred micro-batches")
    p.add_argument("--shard", action="store_true", help="spread weights, gradients and moments over the ranks of a torchrun")
    p.add_argument("--activation-checkpointing", nargs="?", choices=["auto", "on", "off"], default="auto", const="on",
                   help="compute blocks again in the backward, to save memory; auto: if a step would not fit otherwise")  # fmt: skip
    # saving
    p.add_argument("--save-every", type=at_least(0), default=100, help="steps between saves into OUT.run/; 0 saves at the end only")
    p.add_argument("--keep", type=at_least(1), default=2, help="newest saves to keep; with --eval-every the best is kept too")
    p.add_argument("--eval-every", type=at_least(0), default=0, help="steps between evaluations; 0 evaluates at the end only")
    p.add_argument("--resume", action="store_true", help="go on from the last save in OUT.run/")
    p.add_argument("--tensorboard", action="store_true", help="write the log into OUT.run/ as TensorBoard's event files too")


# ---------------------------------------------------------------------------------------------------------------------
# Models


def load_model(ckpt, a, device):
    """An open Checkpoint -> the model: fp32 weights that compute in --dtype, sharded as a.shard asks."""
    dtype = DTYPES[a.dtype]
    model = Qwen2.from_pretrained(ckpt, torch.float32, "meta" if a.shard else device)
    if a.shard:  # no rank ever holds the whole model
        shard(model, device, dtype)
        model.to_empty(device=device)
        for name, p in model.named_parameters():
            fill(p, finite(ckpt, name, ckpt.tensor(name)))
    model.compute_dtype = dtype
    if a.compile:
        model.compile()
    return model


def open_checkpoint(source, a, device):
    """-> (model, tokenizer, checkpoint)."""
    for flag, path in (("ckpt", a.ckpt), ("ref", getattr(a, "ref", None))):
        if path and (same(a.out, path) or same(f"{a.out}.run", os.path.dirname(os.path.realpath(path)))):
            raise InputError(f"--out {a.out}: --{flag} starts from it or a save of it, as --resume would, and the run replaces them; "
                             "give another name")  # fmt: skip
    ckpt = Checkpoint(source)
    tokenizer, model = Tokenizer(ckpt), load_model(ckpt, a, device)
    if a.max_len > model.config.max_position_embeddings:
        a.max_len = model.config.max_position_embeddings
        if os.environ.get("RANK", "0") == "0":
            print(f"--max-len: the model's positions end at {a.max_len}; longer examples lose their end there")
    return model, tokenizer, ckpt


def checkpoint_activations(model, a, batches, rank, world):
    """Has the backward recompute the blocks if --activation-checkpointing says so; with auto, if a step would not fit otherwise.

    batches: yields the lengths of each step's examples. All ranks do as the one with the least memory must. A tenth of
    what is free is left for what the count does not see: the allocator's gaps, the kernels' own workspaces.
    """
    on = a.activation_checkpointing == "on"
    if a.activation_checkpointing == "auto":
        some = itertools.islice(batches, 1000)  # enough to meet the largest micro-batch, or nearly
        tokens = max(sum(lengths[i] for i in cut(lengths, a.micro_tokens, world)[0]) for lengths in some)
        item, shards = DTYPES[a.dtype].itemsize, world if is_sharded(model) else 1
        settings = item, shards, model.device.type, a.compile
        without, with_it = (memory_needed(model.config, tokens, again, *settings) for again in (False, True))
        held = without["state"] // 4  # the weights, which are there already
        free = free_memory(model.device)
        room = held + (free * 0.9 if free else math.inf)
        short = [sum(need.values()) > room for need in (without, with_it)]
        on, too_large = (sum_over_ranks(torch.tensor(short, dtype=torch.float32, device=model.device)) > 0).tolist()
        if rank == 0:
            parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in without.items())
            there = f"{(held + free) / GIB:.2f} are free" if free else "how many are free is not known"
            print(f"memory: a step of {tokens:,} tokens at a time takes {sum(without.values()) / GIB:.2f} GiB ({parts}), {there}: "
                  f"activation checkpointing {'on, with it ' + format(sum(with_it.values()) / GIB, '.2f') if on else 'off'}")  # fmt: skip
            if too_large:
                print("warning: too much even so; lower --micro-tokens" + ("" if a.shard else ", or --shard over several ranks"))
    for block in model.model["layers"] if on else []:
        recompute(block)


def recompute(block):
    """Makes the block keep only its input and recompute the rest in the backward. It draws no random numbers to restore."""
    block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
