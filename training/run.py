"""A training run's files: its log, its saves, going on from the last of them, and how it ends.

Plain functions over Run, which holds what they must know. OUT.run/ holds
  args.json, log.jsonl
  step-N                    checkpoints to use (N.pt if OUT is a .pt)
  optimizer-N.safetensors   the optimizer's moments after step N, for --resume
  state.json                which step that is. Written last: until then the save before it counts
"""

import argparse
import contextlib
import glob
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError, safe_open

from core.checkpoint import Checkpoint, write_checkpoint, write_safetensors
from core.distributed import (
    STOP,
    from_rank_0,
    gathered,
    is_sharded,
    leave_group,
    load_into,
    overlapped_reduction,
    stop_asked,
    sum_over_ranks,
)
from core.files import InputError, atomic_write, code_hash, read_json
from model import Qwen2
from training.logps import sequence_logps
from training.setup import make_optimizer


@dataclass
class Run:
    """What the functions that end a step or write files must know of the run. start_run makes it."""

    a: argparse.Namespace
    rank: int
    world: int
    model: Qwen2
    optimizer: torch.optim.Optimizer
    expect: object  # the two functions of overlapped_reduction
    finish: object
    files: dict  # the side files of its checkpoints
    identity: dict
    total: int  # steps
    done: int = 0  # steps, when it was started
    saved: int = 0  # the step of the last save to resume from
    skips: list = field(default_factory=list)  # (step, [where its offending examples stand])
    best: tuple = (math.inf, 0)  # the lowest eval_loss and its step
    pending: dict | None = None  # the log's entry of the last step, if the run was stopped in its evaluation
    events: object = None  # TensorBoard's writer
    started: float = field(default_factory=time.time)


# What may differ between a run and its resumption: none of these changes the result beyond rounding.
FREE_TO_CHANGE = {"resume", "out", "ckpt", "data", "ref", "ref_cache", "eval_data", "eval_every", "save_every", "keep"}
FREE_TO_CHANGE |= {"micro_tokens", "device", "shard", "activation_checkpointing", "compile", "max_skips", "tensorboard"}
CODE = "the code"  # may differ too, with a warning: an edit may be a mend


def run_identity(a, examples, fingerprint):
    """What a resumed run must share with the one it continues: the arguments that matter, the model and the token ids."""
    data = hashlib.sha256()
    for example in examples:  # one at a time: all of them as one text would be gigabytes
        data.update(json.dumps(example).encode() + b"\n")
    code = code_hash("train_sft.py", "train_kto.py")
    own = {"the data": data.hexdigest(), "the model": fingerprint, CODE: code}
    return {k: v for k, v in vars(a).items() if k not in FREE_TO_CHANGE} | own


CHECKPOINTS, MOMENTS = r"step-(\d+)(?:\.pt)?", r"optimizer-(\d+)\.safetensors"


def run_file(a, name):
    return os.path.join(f"{a.out}.run", name)


def step_path(a, step):
    return run_file(a, f"step-{step}" + (".pt" if a.out.endswith(".pt") else ""))


def start_run(a, rank, world, model, ckpt, identity, total):
    """Opens OUT.run/ and, with --resume, restores the last save. total: the run's steps. -> Run."""
    expect, finish = overlapped_reduction(model, world)
    run = Run(a, rank, world, model, make_optimizer(model, a), expect, finish, ckpt.files, identity, total)
    foreign = [n for n, _ in model.named_parameters() if n not in ckpt.names]
    if foreign and rank == 0:
        print(
            f"warning: OUT will hold {foreign[0]}{' and more' * (len(foreign) > 1)}, which no script here loads: fold it into the "
            "checkpoint's own weights before the run ends"
        )
    path = run_file(a, "state.json")
    if a.resume and os.path.isfile(path):
        state = read_json(path)
        changed = {k for k in identity if state["identity"].get(k) != identity[k]}
        if others := sorted(changed - {CODE}):
            raise InputError(
                f"{path}: was saved by a run that differs in {', '.join(others)}; undo that or drop --resume"
            )
        if changed and rank == 0:
            print(
                f"warning: the code has changed since step {state['step']} was saved; the steps after it run with the new code"
            )
        if not state["finished"]:
            run.done = run.saved = state["step"]
            run.pending = state.get("pending")
        elif os.path.exists(a.out):
            run.done = total
    elif a.resume and rank == 0:
        print(f"{path}: no save to resume from; starting at step 1", file=sys.stderr)

    STOP["training"] = True  # before the ranks meet: none may leave alone once another can be past this
    others = from_rank_0(torch.tensor([float(run.done)], device=model.device)).item() != run.done
    if sum_over_ranks(torch.tensor([float(others)], device=model.device)).item():
        raise InputError(
            f"{path}: not all ranks find the same save; {a.out}.run must lie on a disk that all nodes share"
        )
    if run.saved:
        restore(run)
    lines = read_log(run) if run.done else []
    if run.done == total and not run.pending:
        if rank == 0:
            tidy(run)
            print(f"{a.out}: finished before, after {total} steps; without --resume the run starts again")
        sys.exit(0)
    if rank == 0:
        run.events = event_writer(run) if a.tensorboard else None
        tidy(run)
        call = {
            "step": run.done,
            "command": sys.argv,
            "torch": torch.__version__,
            "ranks": world,
            "threads": torch.get_num_threads(),
        }
        args = read_json(run_file(a, "args.json")) if run.done else vars(a) | identity | call | {"resumed": []}
        args["resumed"] += [call] if run.done else []
        for name, text in ("log.jsonl", "".join(lines)), ("args.json", json.dumps(args, indent=2)):
            with atomic_write(run_file(a, name)) as f:
                f.write(text)
    return run


def read_log(run):
    """The log's lines up to step run.done (those after it are about to be repeated); what they say of skips and best."""
    lines, path = [], run_file(run.a, "log.jsonl")
    last = run.done - (run.pending is not None)
    if not os.path.isfile(path):
        raise InputError(
            f"{path}: missing, and with it what was saved is not the whole run; drop --resume to start again"
        )
    with open(path, encoding="utf-8") as f:
        for line in f:
            with contextlib.suppress(ValueError):  # the last line may be cut short by a full disk
                record = json.loads(line)
                if record["step"] <= last:
                    lines.append(line.strip() + "\n")
                    read_skip(run, record)
                    if run.a.eval_every and record.get("eval_loss") is not None:
                        run.best = min(run.best, (record["eval_loss"], record["step"]))
    read_skip(run, run.pending or {})
    return lines


def read_skip(run, record):
    if "skipped" in record:
        run.skips.append((record["step"], record["offending"]))


def restore(run):
    """Weights and moments of the save of step run.done."""
    weights = Checkpoint(step_path(run.a, run.done))
    path = run_file(run.a, f"optimizer-{run.done}.safetensors")
    try:
        moments = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: missing or corrupt ({e}); drop --resume to start again") from None
    parameters = dict(run.model.named_parameters())
    for name, p in parameters.items():
        load_into(p, weights.tensor(name))
    for key in moments.keys():
        kind, name = key.split("/")
        p, whole = parameters[name], moments.get_tensor(key)
        moment = torch.zeros_like(p) if whole.shape == p.shape else torch.zeros_like(whole, device=p.device)
        load_into(moment, whole)
        run.optimizer.state[p][kind] = moment


def tidy(run):
    """Removes what a killed run left half-written, in OUT.run/ and beside OUT, and saves of later steps than this one starts at."""
    beside = glob.glob(f"{glob.escape(run.a.out)}.tmp[0-9]*")  # .old: the checkpoint that was there before
    for path in [p for p in beside if not p.endswith(".old")] + glob.glob(f"{glob.escape(run.a.out)}.run/*.tmp[0-9]*"):
        remove(path)
    if not run.done:
        remove(run_file(run.a, "state.json"))
    prune(run, run.done)


def remove(path):
    """Removes a file or directory. It loses its name first, so that whatever has a name is whole."""
    if os.path.isdir(path):
        os.rename(path, f"{path}.tmp{os.getpid()}")
        shutil.rmtree(f"{path}.tmp{os.getpid()}")
    elif os.path.exists(path):
        os.remove(path)


def numbered(a, pattern):
    """{step: path} of what is in OUT.run/ under names of that pattern."""
    folder = f"{a.out}.run"
    found = (re.fullmatch(pattern, name) for name in (os.listdir(folder) if os.path.isdir(folder) else []))
    return {int(m[1]): os.path.join(folder, m[0]) for m in found if m}


def prune(run, step):
    """Of OUT.run/'s checkpoints up to that step keeps the last --keep and the best; of moments those to resume from."""
    newest = sorted(s for s in numbered(run.a, CHECKPOINTS) if s <= step and s < run.total)[
        -run.a.keep :
    ]  # the last is OUT
    for pattern, wanted in (CHECKPOINTS, {*newest, run.best[1], run.saved}), (MOMENTS, {run.saved}):
        for number, path in numbered(run.a, pattern).items():
            if number not in wanted:
                remove(path)


def json_safe(record):
    """The record with null for numbers that JSON cannot hold."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def write_log(run, record):
    """Appends one object to OUT.run/log.jsonl; numbers that are not finite become null."""
    record = json_safe(record)
    try:
        with open(run_file(run.a, "log.jsonl"), "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
    except OSError as e:
        fault = f"{run.a.out}.run/log.jsonl: cannot be written: {e.strerror}"
        raise InputError(f"{fault}; --resume goes on from the last save") from None
    if run.events:
        for key, value in record.items():
            if isinstance(value, int | float):
                run.events.add_scalar(key, value, record["step"])


def event_writer(run):
    """TensorBoard's writer, if its package is installed. Events from after the step that the run resumes at are discarded."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "--tensorboard: its package is missing; pip install tensorboard, or leave the flag out"
        ) from None
    return SummaryWriter(f"{run.a.out}.run", purge_step=run.done + 1)


def write_gathered(run, tensors, write):
    """Rank 0 calls write(pairs) with the gathered tensors; the others of a sharded run only help to gather."""
    pairs = gathered(tensors)
    if run.rank == 0:
        write(pairs)
    elif is_sharded(run.model):
        for _ in pairs:
            pass


def specs(tensors):
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


def save_model(run, out):
    """Writes a checkpoint, fp32."""
    weights = dict(run.model.named_parameters())
    write_gathered(
        run, weights, lambda pairs: write_checkpoint(out, run.model.raw_config, run.files, specs(weights), pairs)
    )


def save_state(run, step, pending=None):
    """Writes step-N and what --resume needs, then drops what --keep does not keep. pending: see stop_run."""
    names = {p: name for name, p in run.model.named_parameters()}
    moments = {f"{kind}/{names[p]}": t for p, state in run.optimizer.state.items() for kind, t in state.items()}

    def write_moments(pairs):
        with atomic_write(run_file(run.a, f"optimizer-{step}.safetensors"), "wb") as f:
            write_safetensors(f, specs(moments), pairs)

    try:
        save_model(run, step_path(run.a, step))
        write_gathered(run, moments, write_moments)
        write_state(run, step, pending=pending)
    except InputError as e:
        intact = f"the save of step {run.saved} is whole" if run.saved else "no save was made before"
        raise InputError(f"{e}; {intact}: make room and --resume") from None
    run.saved = step
    if run.rank == 0:
        prune(run, step)


def write_state(run, step, finished=False, pending=None):
    if run.rank == 0:
        with open(run_file(run.a, "log.jsonl"), "rb") as f:
            os.fsync(f.fileno())  # a log line must not be younger than the save that vouches for it
        with atomic_write(run_file(run.a, "state.json")) as f:
            json.dump({"step": step, "finished": finished, "identity": run.identity, "pending": pending}, f)


def due(step, total, every):
    """Whether something that is done every so many steps (0: only at the end) is done after this step."""
    return step == total or every > 0 and step % every == 0


def eval_logps(run, record, examples):
    """The log-probabilities of held-out examples where an evaluation is due after the step that record logs, else None.
    SIGTERM ends the run here as in a step."""
    if not examples or not due(record["step"], run.total, run.a.eval_every):
        return None
    logps = sequence_logps(run.model, examples, run.a.micro_tokens, run.rank, run.world, heed_stop=True)
    if stop_asked(run.model.device):
        stop_run(run, record["step"], record)
    return logps


def end_step(run, record):
    """Writes the log and the saves that are due; ends the run after --max-skips skipped steps in a row."""
    step, a = record["step"], run.a
    if run.rank == 0:
        write_log(run, record)
    in_a_row = run.skips[-a.max_skips :]
    if len(in_a_row) == a.max_skips and in_a_row[0][0] == step - a.max_skips + 1:
        names = ", ".join(dict.fromkeys(name for _, names in in_a_row for name in names)) or "no example by itself"
        raise InputError(
            f"{a.max_skips} steps in a row, the last step {step}, had no finite loss and gradient. Not finite: {names}; "
            "mend these lines or lower --lr and start again, or --resume with more --max-skips"
        )
    best = a.eval_every and record.get("eval_loss", math.inf) < run.best[0]
    if best:
        run.best = (record["eval_loss"], step)
    if step in (run.total, run.saved):  # finish_run saves; or it was saved when it was stopped in its evaluation
        return
    if due(step, run.total, a.save_every):
        save_state(run, step)
    elif best:
        save_model(run, step_path(a, step))
        if run.rank == 0:
            prune(run, step)


def close(run):
    if run.events:
        run.events.close()
    leave_group()


def stop_run(run, step, pending=None):
    """Ends a run that was asked to stop, after `step` whole steps, with exit code 0.

    pending: the log's entry of that step where its evaluation was abandoned; --resume begins with the evaluation.
    """
    if step > run.saved:
        save_state(run, step, json_safe(pending) if pending else None)
    if run.rank == 0:
        print(f"stopped after step {step} of {run.total}; the same command with --resume goes on", file=sys.stderr)
    close(run)
    sys.exit(0)


def finish_run(run, facts):
    """Writes OUT, drops what was kept to resume from, and says what was done. facts: lines for the summary."""
    save_model(run, run.a.out)
    write_state(run, run.total, finished=True)
    run.saved = 0
    if run.rank == 0:
        remove(step_path(run.a, run.total))  # of a run that was stopped in its last evaluation
        prune(run, run.total)
        for line in facts:
            print(line)
        if run.skips:
            print(f"{len(run.skips)} steps skipped, their loss or gradient was not finite; see 'offending' in the log")
        if run.best[1] in numbered(run.a, CHECKPOINTS):
            print(f"lowest eval_loss, not the last: {run.best[0]:.4g}, {step_path(run.a, run.best[1])}")
        print(f"{run.total} steps in {time.time() - run.started:.0f} s")
        print(f"wrote {run.a.out} (checkpoint, fp32) and {run.a.out}.run/log.jsonl")
        print(f"next: python eval.py --ckpt {run.a.ckpt} {run.a.out} --tasks gsm8k --out {run.a.out}.eval")
    close(run)
