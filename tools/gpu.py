"""Checks and measures this code on one GPU in at most nine minutes. Prints a Markdown table.

    python -m tools.gpu                            # on a machine with one CUDA GPU; no network, no other files
    python -m tools.gpu --device cpu --small       # the same code on a CPU, in about two minutes
    python -m tools.gpu --table gpu.jsonl          # the table of an earlier or interrupted run

Each result is written to --out as soon as it is known, the most important first. Each part is a process with its own
time limit, so a crash or hang in one part does not stop the others. Peers (TRL, transformers) and
pytest are used where they are installed.
"""

import core.interrupt  # noqa: F401  isort: skip (first: Ctrl-C while torch loads ends silently)
import argparse
import contextlib
import functools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time

import torch

from core.card import table_row
from core.devices import DEVICE, DTYPE, DTYPES
from core.files import ROOT, InputError, atomic_write, cli
from core.flags import Parser, number, torch_device
from core.outputs import check_file
from tools import gpu_parts, gpu_training
from tools.gpu_parts import LARGE, SMALL, Bench, append_row

# {name: (function, time limit in seconds)}, the most important first
PARTS = {
    "correctness": (gpu_training.correctness, 100),
    "suite": (gpu_parts.suite, 60),
    "machine": (gpu_parts.machine, 30),
    "sft": (gpu_training.sft_training, 60),
    "kto": (gpu_training.kto_training, 60),
    "operations": (gpu_parts.operations, 30),
    "headline": (gpu_training.headline, 60),
    "generation": (gpu_parts.generation, 60),
    "trl_kto": (functools.partial(gpu_parts.trl_peer, mode="kto"), 80),
    "trl_sft": (functools.partial(gpu_parts.trl_peer, mode="sft"), 80),
    "transformers": (gpu_parts.transformers_peer, 60),
    "compiled": (gpu_training.compiled_training, 120),
    "full": (gpu_training.headline_in_full, 400),
}


def read_rows(path: str) -> list[dict]:
    """The results so far. A last line that was cut off is left out. InputError if the file cannot be read."""
    rows = []
    try:
        with open(path, encoding="utf-8") as f:
            for line in f:
                with contextlib.suppress(ValueError):
                    rows.append(json.loads(line))
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read: {e}; give a file that this command wrote") from None
    rows = [row for row in rows if isinstance(row, dict) and "part" in row and "what" in row]
    if not rows:
        raise InputError(f"{path}: holds no results; give a file that this command wrote")
    return rows


def measurement_table(rows: list[dict]) -> str:
    """| part | measurement | result | note |, one line per result."""
    lines = ["| part | measurement | result | note |", "|---|---|---|---|"]
    for row in rows:
        value = row.get("value", "")
        text = value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        result = f"{text} {row.get('unit', '')}".strip()
        lines.append(table_row([row["part"], row["what"], result, row.get("note", "")]))
    return "\n".join(lines)


def describe_machine(args: argparse.Namespace) -> None:
    """Writes the card, the versions, the commit and the command as the first results."""
    card = platform.processor() or platform.machine()
    if args.device != "cpu":
        found = torch.cuda.get_device_properties(args.device)
        card = f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
    commit = ""
    with contextlib.suppress(OSError):  # git is not installed
        git = subprocess.run(["git", "log", "-1", "--format=%h"], cwd=ROOT, capture_output=True, text=True)
        commit = git.stdout.strip()
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}"
    facts = {"card": card, "versions": versions, "commit": commit or "unknown"}
    facts["command"] = "python -m tools.gpu " + " ".join(sys.argv[1:])
    for what, value in facts.items():
        append_row(args.out, part="setup", what=what, value=value)


def run_part(args: argparse.Namespace, name: str, seconds: float) -> None:
    """Runs one part in a process with a time limit in seconds. Writes a failed result if it fails."""
    command = [sys.executable, "-m", "tools.gpu", "--part", name, "--seconds", str(seconds), "--out", args.out]
    command += ["--device", args.device, "--dtype", args.dtype, "--compile", args.compile, *["--small"] * args.small]
    files = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"), tempfile.TemporaryDirectory()
    with files[0] as said, files[1] as folder:
        command += ["--folder", folder]
        child = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, start_new_session=True)
        try:
            fault = f"exit code {code}" if (code := child.wait(seconds)) else ""
        except subprocess.TimeoutExpired:
            fault = f"stopped after its limit of {seconds:.0f} s"
        finally:  # also its own children, also on Ctrl-C
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if fault:
            said.seek(0)
            last = ([line for line in said.read().splitlines() if line.strip()] or [""])[-1]
            reason = fault if fault.startswith("stopped") else f"{fault}: {last[:300]}"
            append_row(args.out, part=name, what="failed", value=reason)


def run_own_part(args: argparse.Namespace) -> None:
    """The process of one part. An exception ends it; run_part writes the last line of its traceback as the reason."""
    signal.alarm(int(args.seconds) + 5)  # ends this process if its parent is gone
    sizes, deadline = SMALL if args.small else LARGE, time.time() + args.seconds
    compiles = args.compile == "on"
    PARTS[args.part][0](Bench(args.part, args.device, args.dtype, sizes, args.out, args.folder, deadline, compiles))


def parse_args() -> argparse.Namespace:
    p = Parser(description=__doc__)
    p.add_argument("--out", default="gpu.jsonl", help="JSON Lines file of the results; an earlier one is replaced")
    p.add_argument("--table", metavar="FILE", help="only print the table of the results in this file")
    p.add_argument("--minutes", type=number(above=0), default=8.5, help="time limit of all parts together")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to run, in the fixed order")
    p.add_argument("--small", action="store_true", help="tiny shapes: runs the code without meaningful measurements")
    p.add_argument("--compile", choices=["on", "off"], default="on", help="whether torch.compile is tried")
    # machine
    p.add_argument("--device", type=torch_device, default=DEVICE, help="torch device")
    p.add_argument("--dtype", choices=DTYPES, default=DTYPE, help="compute dtype of the measurements")
    p.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    p.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    p.add_argument("--folder", help=argparse.SUPPRESS)
    args = p.parse_args()
    args.out = os.path.abspath(args.out)
    return args


def main() -> None:
    args = parse_args()
    if args.part:
        return run_own_part(args)
    if args.table:
        return print(measurement_table(read_rows(args.table)))
    check_file(args.out, '"part"')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that `finally` ends the running part
    end = time.time() + 60 * args.minutes
    with atomic_write(args.out):  # an empty file
        pass
    describe_machine(args)
    skipped = ["compiled"] if args.compile == "off" else []
    for name in [name for name in PARTS if name in args.parts and name not in skipped]:
        left = min(PARTS[name][1], end - time.time())
        if left < 5:
            append_row(args.out, part=name, what="not run", value="no time was left")
            continue
        print(f"{name}, at most {left:.0f} s", file=sys.stderr, flush=True)
        run_part(args, name, left)
    print(measurement_table(read_rows(args.out)))


if __name__ == "__main__":
    cli(main)
