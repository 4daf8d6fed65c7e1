"""The log: OUT.run/log.jsonl with one object per step, and the same numbers for TensorBoard."""

import contextlib
import json
import math
import os

from core.files import InputError
from training.saves import run_file
from training.state import Run


def json_safe(record: dict) -> dict:
    """The record with None in place of infinity and NaN, which JSON does not have."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def write_log(run: Run, record: dict) -> None:
    """Appends one object to OUT.run/log.jsonl. Numbers that are not finite become null."""
    record = json_safe(record)
    try:
        with open(run_file(run.args, "log.jsonl"), "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
    except OSError as e:
        fault = f"{run.args.out}.run/log.jsonl: cannot be written: {e.strerror}"
        raise InputError(f"{fault}; --resume continues from the last save") from None
    if run.events:
        for key, value in record.items():
            if isinstance(value, int | float):
                run.events.add_scalar(key, value, record["step"])


def kept_lines(run: Run) -> list[str]:
    """The lines of the log up to step run.done. Later steps will run again. Restores run.skips and run.best."""
    lines, path = [], run_file(run.args, "log.jsonl")
    last = run.done - (run.pending is not None)
    if not os.path.isfile(path):
        raise InputError(f"{path}: missing, so the saved run is incomplete; drop --resume to start again")
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a full disk may have truncated the last line
                record = json.loads(line)
                if record["step"] <= last:
                    lines.append(line.strip() + "\n")
                    read_skip(run, record)
                    if run.args.eval_every and record.get("eval_loss") is not None:
                        run.best = min(run.best, (record["eval_loss"], record["step"]))
    read_skip(run, run.pending or {})
    return lines


def read_skip(run: Run, record: dict) -> None:
    if "skipped" in record:
        run.skips.append((record["step"], record["offending"]))


def require_tensorboard() -> type:
    """TensorBoard's writer class. InputError if its package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard: needs a package; pip install tensorboard, or leave the flag out") from None
    return SummaryWriter


def event_writer(run: Run) -> object:
    """TensorBoard's writer. It discards old events of steps that will run again."""
    return require_tensorboard()(f"{run.args.out}.run", purge_step=run.done + 1)
