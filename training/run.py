"""Starts a training run, ends its steps, and stops or finishes it. training/saves.py and log.py write its files."""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm

from core.card import model_card
from core.distributed import (
    STOP,
    broadcast_replicas,
    from_rank_0,
    is_main,
    is_sharded,
    leave_group,
    overlapped_reduction,
    stop_asked,
    sum_over_ranks,
)
from core.files import InputError, atomic_write, code_hash, print0, print_next, read_json
from core.outputs import discard_checkpoint
from core.tokenizer import with_end_token
from model import Qwen2
from training.log import event_writer, json_safe, kept_lines, write_log
from training.logps import sequence_logps
from training.saves import (
    CHECKPOINTS,
    claim_save,
    clean_run_folder,
    numbered_files,
    prune,
    release_lock,
    restore,
    run_file,
    save_model,
    save_run,
    step_path,
    take_lock,
    write_state,
)
from training.setup import Setup
from training.state import Run
from training.step import make_optimizer

# ---------------------------------------------------------------------------------------------------------------------
# What a resumed run must share with the one it continues

# Arguments that do not change the result, or only by rounding
FREE_TO_CHANGE = {"resume", "out", "ckpt", "data", "ref", "ref_cache", "eval_data", "eval_every", "save_every", "keep"}
FREE_TO_CHANGE |= {"micro_tokens", "device", "shard", "activation_checkpointing", "compile", "max_skips", "tensorboard"}
CODE = "the code"  # may change between runs, with a warning: the edit may be a bug fix

# Flags that a model card shows
CARD_SETTINGS = (
    "lr schedule warmup epochs max_steps batch_size max_len weight_decay clip seed dtype beta desirable_weight "
    "undesirable_weight ref"
).split()


def run_identity(args: argparse.Namespace, examples: Iterable, fingerprint: str) -> dict:
    """What a resumed run must share: arguments that affect the result, and hashes of model, token ids and code."""
    data = hashlib.sha256()
    for example in examples:  # one at a time, because the text of all examples may take gigabytes
        data.update(json.dumps(example).encode() + b"\n")
    script = getattr(sys.modules["__main__"], "__file__", None) or ""
    code = code_hash("model.py", "core", "training", "train_sft.py", "train_kto.py", os.path.abspath(script))
    own = {"the data": data.hexdigest(), "the model": fingerprint, CODE: code}
    return {k: v for k, v in vars(args).items() if k not in FREE_TO_CHANGE} | own


# ---------------------------------------------------------------------------------------------------------------------
# Starting


def start_run(setup: Setup, identity: dict) -> Run | None:
    """Opens OUT.run/ and, with --resume, restores the last save. identity: see run_identity.

    -> Run, or None if --resume finds that the run is finished. Afterwards all ranks have equal parameters and buffers.
    """
    args, model, total = setup.args, setup.model, len(setup.steps)
    check_shards(model)
    start_sync, wait_sync = overlapped_reduction(model, setup.ranks.world)
    files = with_end_token(setup.ckpt.files, setup.tokenizer.im_end, setup.tokenizer.stop_ids)
    run = Run(args, setup.ranks, model, make_optimizer(model, args), start_sync, wait_sync, files, identity, total)
    if is_main():
        take_lock(args.out)
    find_save(run)
    STOP["training"] = True  # before the first collective call, after which no rank may stop alone
    check_same_save(run)
    if run.saved:
        restore(run)
    lines = kept_lines(run) if run.done else []
    if run.done == total and not run.pending:
        if is_main():
            clean_run_folder(run)
            print(f"{args.out}: already finished after {total} steps; without --resume the run starts again")
        close_run(run)
        return None
    broadcast_replicas(model)
    if is_main():
        run.events = event_writer(run) if args.tensorboard else None
        clean_run_folder(run)
        write_args_and_log(run, lines)
    return run


def check_shards(model: Qwen2) -> None:
    """InputError if a sharded model trains a parameter that is not sharded: its gradients would not be summed."""
    whole = [name for name, p in model.named_parameters() if p.requires_grad and not hasattr(p, "full_tensor")]
    if whole and is_sharded(model):
        raise InputError(
            f"--shard: {whole[0]} is not sharded, because it was added after loading; train without --shard"
        )


def find_save(run: Run) -> None:
    """With --resume, sets run.done, run.saved and run.pending from OUT.run/state.json."""
    path = run_file(run.args, "state.json")
    try:
        state = read_json(path) if os.path.isfile(path) else {}
    except InputError:
        state = {}
    if run.args.resume and os.path.isfile(path):
        kinds = {"identity": dict, "step": int, "finished": bool, "pending": dict | None}
        if not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
            raise InputError(f"{path}: is not the state of a run; drop --resume to start again")
        changed = {k for k in run.identity if state["identity"].get(k) != run.identity[k]}
        if others := sorted(changed - {CODE}):
            raise InputError(
                f"{path}: was saved by a run that differs in {', '.join(others)}; undo that or drop --resume"
            )
        if changed:
            since = f"the code has changed since step {state['step']} was saved"
            print0(f"warning: {since}; the remaining steps run the new code")
        if not state["finished"]:
            run.done = run.saved = state["step"]
            run.pending = state.get("pending")
        elif os.path.exists(run.args.out):
            run.done = run.total
    elif run.args.resume and is_main():
        print(f"{path}: no save to resume from; starting at step 1", file=sys.stderr)
    elif state.get("finished") is False and is_main():
        lost = f"the unfinished run that was saved there after step {state.get('step')}"
        print(f"note: {run.args.out}.run: without --resume this run replaces {lost}", file=sys.stderr)


def check_same_save(run: Run) -> None:
    """InputError on all ranks if some rank resumes from another step."""
    device = run.model.device
    differs = from_rank_0(torch.tensor([float(run.done)], device=device)).item() != run.done
    if sum_over_ranks(torch.tensor([float(differs)], device=device)).item():
        out = run.args.out
        raise InputError(
            f"{out}.run/state.json: not all ranks find the same save; {out}.run must be on a disk that all nodes share"
        )


def write_args_and_log(run: Run, lines: list[str]) -> None:
    """Writes args.json and log.jsonl. lines: the lines of the log to keep."""
    call = {"step": run.done, "command": sys.argv, "torch": torch.__version__, "ranks": run.ranks.world}
    call |= {"threads": torch.get_num_threads()}
    if run.done:
        args = read_json(run_file(run.args, "args.json"))
        args["resumed"] = [*args.get("resumed", []), call]
    else:
        args = vars(run.args) | run.identity | call | {"resumed": []}
    for name, text in ("log.jsonl", "".join(lines)), ("args.json", json.dumps(args, indent=2)):
        with atomic_write(run_file(run.args, name)) as f:
            f.write(text)


def warn_of_added_parameters(setup: Setup) -> None:
    """Warns if the model has parameters that no checkpoint of this architecture has."""
    added = [name for name, _ in setup.model.named_parameters() if name not in setup.ckpt.names]
    if added:
        more = " and more" * (len(added) > 1)
        advice = "fold it into the checkpoint's own weights before the run ends (before_save of main)"
        print0(f"warning: OUT will hold {added[0]}{more}, which no script here loads; {advice}")


# ---------------------------------------------------------------------------------------------------------------------
# A step's end


def progress(run: Run, name: str) -> tqdm:
    """The remaining steps, run.done .. total - 1, with a progress bar on rank 0."""
    hidden = None if is_main() else True  # None: hidden where stderr is no terminal
    return tqdm(range(run.done, run.total), name, run.total, initial=run.done, unit="step", disable=hidden)


def print_progress(run: Run, record: dict) -> None:
    """Prints a step's loss and speed, at most once a minute, where stderr is no terminal and so has no progress bar."""
    if sys.stderr.isatty() or time.time() < run.printed + 60:
        return
    run.printed = time.time()
    speed = f", {record['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in record else ""
    print(f"step {record['step']} of {run.total}: loss {record['loss']:.4g}, lr {record['lr']:.3g}{speed}", flush=True)


def due(step: int, total: int, every: int) -> bool:
    """True after every `every` steps and after the last one (every=0: only after the last one)."""
    return step == total or every > 0 and step % every == 0


def eval_due(run: Run, record: dict) -> bool:
    """True if the held-out data are evaluated after this record's step."""
    return due(record["step"], run.total, run.args.eval_every)


def eval_logps(run: Run, record: dict, examples: list) -> Tensor | None:
    """Log-probabilities (len(examples),) of held-out examples after this record's step.

    None if SIGTERM or Ctrl-C interrupts. The run is then saved and closed, and --resume repeats this evaluation first.
    """
    logps = sequence_logps(run.model, examples, run.args.micro_tokens, run.ranks, heed_stop=True)
    if stop_asked(run.model.device):
        stop_run(run, record["step"], record)
        return None
    return logps


def end_step(run: Run, record: dict | None) -> bool:
    """Writes the log and the saves that are due. -> False if record is None (the evaluation was interrupted), else True.

    InputError after --max-skips skipped steps in a row.
    """
    if record is None:
        return False
    step, args = record["step"], run.args
    if is_main():
        write_log(run, record)
        print_progress(run, record)
    check_skips(run, step)
    best = args.eval_every and record.get("eval_loss", math.inf) < run.best[0]
    if best:
        run.best = (record["eval_loss"], step)
    if step in (run.total, run.saved):  # finish_run saves the last step; stop_run saved an interrupted one
        return True
    if due(step, run.total, args.save_every):
        save_run(run, step)
    elif best:
        claim_save(run, step)
        save_model(run, step_path(args, step))
        if is_main():
            prune(run, step)
    return True


def check_skips(run: Run, step: int) -> None:
    """InputError if the last --max-skips steps were all skipped."""
    most = run.args.max_skips
    in_a_row = run.skips[-most:]
    if len(in_a_row) == most and in_a_row[0][0] == step - most + 1:
        names = ", ".join(dict.fromkeys(name for _, names in in_a_row for name in names)) or "no example by itself"
        raise InputError(
            f"{most} steps in a row, up to step {step}, had a loss or gradient that is not finite: {names}; "
            "correct these lines or lower --lr and start again, or --resume with more --max-skips"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The end


def close_run(run: Run) -> None:
    if run.events:
        run.events.close()
    release_lock(run.args.out)  # only rank 0 holds it
    leave_group()


def stop_run(run: Run, step: int, pending: dict | None = None) -> None:
    """Saves and closes a run that was asked to stop, after `step` whole steps. The caller then returns.

    pending: the log record of that step, if its evaluation was interrupted.
    """
    if step > run.saved:
        save_run(run, step, json_safe(pending) if pending else None)
    if is_main():
        print(f"stopped after step {step} of {run.total}; the same command with --resume continues", file=sys.stderr)
    close_run(run)


def log_records(run: Run) -> list[dict]:
    """The records of OUT.run/log.jsonl. Numbers that were not finite are None."""
    with open(run_file(run.args, "log.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def first_and_last(records: list[dict]) -> list[str]:
    """A line of the summary: loss, reward margin and eval_loss, where known, in the first and last step with a loss."""
    known = [record for record in records if record["loss"] is not None]
    ends = known[:1] + known[1:][-1:]
    value = lambda x: f"{x:.4g}" if abs(x) >= 1e-5 else "0"  # the first margin is 0 up to rounding
    figures = []
    for key, label in (("loss", "loss"), ("rewards/margins", "reward margin"), ("eval_loss", "eval_loss")):
        values = [f"{value(record[key])} in step {record['step']}" for record in ends if record.get(key) is not None]
        figures += [f"{label} {', '.join(values)}"] if values else []
    return ["; ".join(figures)] if figures else []


def run_card(run: Run, last: dict) -> str:
    """The model card of OUT: method, data, settings and the last record of the log."""
    args = vars(run.args)
    settings = {name: args[name] for name in CARD_SETTINGS if args.get(name) is not None}
    figures = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in last.items()}
    versions = {"torch": torch.__version__, "ranks": run.ranks.world}
    name = os.path.basename(os.path.abspath(run.args.out))
    done = f"Trained by {args['method']} for {run.total} steps. The weights are stored in fp32."
    return model_card(name, done, [run.args.ckpt], "finetune", settings, run.args.data, figures, versions)


def finish_run(run: Run, facts: list[str], next_commands: list[list[str]]) -> None:
    """Writes OUT, removes the saves that only --resume needs, and prints a summary.

    facts: lines of the summary. next_commands: suggested commands, as lists of words.
    """
    out, records = run.args.out, log_records(run) if is_main() else []
    save_model(run, out, run_card(run, records[-1]) if is_main() else None)
    write_state(run, run.total, finished=True)
    run.saved = 0
    if is_main():
        discard_checkpoint(step_path(run.args, run.total))  # exists if the last evaluation was interrupted
        prune(run, run.total)
        for line in facts + first_and_last(records):
            print(line)
        if run.skips:
            print(
                f"{len(run.skips)} steps skipped because of a loss or gradient that is not finite; see 'offending' in the log"
            )
        if run.best[1] in numbered_files(run.args.out, CHECKPOINTS):
            print(f"lowest eval_loss, before the last step: {run.best[0]:.4g}, {step_path(run.args, run.best[1])}")
        print(f"{run.total} steps in {time.time() - run.started:.0f} s")
        print(f"wrote {out} (checkpoint, fp32) and {out}.run/log.jsonl")
        for words in next_commands:
            print_next(*words)
    close_run(run)
