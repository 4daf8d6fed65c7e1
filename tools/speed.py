"""Compares speed and memory of our scripts with another library, in one run on one machine.

    python -m tools.speed sft --ckpt C --data sft.jsonl --vs trl
    python -m tools.speed kto --ckpt C --data kto.jsonl --vs trl
    python -m tools.speed kto --ckpt C --data kto.jsonl --vs ../older-checkout      # before and after a change
    python -m tools.speed generate --ckpt C --data prompts.jsonl --vs transformers
    python -m tools.speed merge --ckpt A B --base BASE --vs mergekit
    python -m tools.speed merge --synthetic FOLDER --method ties       # 7B, bf16: reads 15 GB twice, writes 15 GB

Each side is a new process, from loading to its last step. The sides take turns, --repeats times. Before each turn, the
machine's rate is measured: a large matmul, or for merge a plain copy. Prints the medians and their ratios. The other
libraries are in requirements-dev.txt.
"""

import core.interrupt  # noqa: F401  isort: skip (first: Ctrl-C while torch loads ends silently)
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace

import numpy as np
import torch

from core.checkpoint import Checkpoint
from core.config import parse_config
from core.conversations import kto_examples, sft_conversations
from core.devices import DEVICE, DTYPE, DTYPES
from core.files import InputError, atomic_write, cli
from core.flags import Parser, at_least, file_out, torch_device
from core.records import read_records
from core.tokenizer import Tokenizer
from tools.rates import copy_rate, matmul_rate, merge_bytes, synthetic_7b
from tools.sides import SIDES
from training.examples import count_supervised, encode_chats
from training.feedback import encode_feedback, pair_sequence
from training.memory import forward_flops

# mode: {--vs: the settings of that peer to try; the fastest one counts}
PEERS = {
    "sft": {"trl": ["trl", "trl-padding-free"]},
    "kto": {"trl": ["trl"]},
    "generate": {"transformers": ["transformers-8", "transformers-16", "transformers-32", "transformers-1"]},
    "merge": {"mergekit": ["mergekit"]},
}
# flags passed to the process of a side
PASSED_ON = (
    "base method steps batch_size peer_batch max_len max_new_tokens limit dtype device micro_tokens scratch compile"
).split()


def training_flops(args: Namespace) -> tuple[int, int, int, list[int]]:
    """-> (tokens, supervised tokens and FLOPs of a training run, the FLOPs of each step), without recomputation."""
    import train_kto

    tokenizer, config = Tokenizer(args.ckpt[0]), parse_config(Checkpoint(args.ckpt[0]).config)

    def count(examples):
        """(tokens, supervised tokens, FLOPs of a forward) as an array."""
        lengths, supervised = [len(ids) for ids, _ in examples], count_supervised(examples)
        return np.array([sum(lengths), supervised, forward_flops(config, lengths, supervised)])

    if args.mode == "sft":
        examples, *_ = encode_chats(read_records([args.data], sft_conversations), tokenizer, args.max_len)
        steps = [count(examples[k : k + args.batch_size]) for k in range(0, len(examples), args.batch_size)]
        tokens, supervised, forward = sum(steps)
        return tokens, supervised, 3 * forward, [3 * step[2] for step in steps]
    rows, *_ = encode_feedback(read_records([args.data], kto_examples), tokenizer, args.max_len)
    steps = []  # (matched pairs, mismatched pairs) of each step
    for k in range(0, len(rows), args.batch_size):
        pairs = train_kto.all_pairs(range(len(rows))[k : k + args.batch_size])
        examples = [pair_sequence(rows, args.max_len, *pair) for pair in pairs]
        steps.append((count(examples[: len(pairs) // 2]), count(examples[len(pairs) // 2 :])))
    tokens, supervised, forward = sum(map(sum, steps))
    flops = [3 * matched[2] + mismatched[2] for matched, mismatched in steps]
    return tokens, supervised, sum(flops) + forward, flops  # plus the reference's forward of all pairs


def run_side(args: Namespace) -> None:
    """Runs one side in this process and prints what it measured as one line of JSON."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        found = SIDES[args.mode, args.side.split("-")[0]](args, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    if args.device != "cpu":
        peak = torch.cuda.max_memory_allocated(args.device) / 2**30
    print("\n" + json.dumps({"peak_gb": peak} | found))


def measure(args: Namespace, side: str, data: str | None) -> dict:
    """Runs one side in a new process. Returns its numbers, "wall_s", and the machine's "rate" just before it."""
    if args.mode == "merge":
        rate = copy_rate(*merge_bytes([*args.ckpt, *[args.base] * bool(args.base)], DTYPES[args.dtype]), args.scratch)
    else:
        rate = matmul_rate(args.device, DTYPES[args.dtype])
    command = [sys.executable, "-m", "tools.speed", args.mode, "--side", side, "--ckpt", *args.ckpt]
    for name in PASSED_ON:
        if getattr(args, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    started = time.time()
    done = subprocess.run(command + (["--data", data] if data else []), capture_output=True, text=True)
    wall = time.time() - started
    if done.returncode:
        raise InputError(f"{side} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"wall_s": wall, "rate": rate}


# ---------------------------------------------------------------------------------------------------------------------
# The summary


def report_training(args: Namespace, runs: dict, ours: dict, work: tuple) -> None:
    tokens, supervised, flops, step_flops = work
    warm = 1 if len(step_flops) > 1 else 0  # the first step loads kernels and compiles
    rate = statistics.median(sum(step_flops[warm:]) / sum(r["step_times"][warm:]) for r in runs["ours"])
    per_second = [n / ours["step_s"] for n in (args.limit, tokens, supervised)]
    print(
        f"ours: {per_second[0]:.2f} examples/s, {per_second[1]:,.0f} tokens/s, {per_second[2]:,.0f} supervised/s; "
        f"{rate / 1e9:,.0f} GFLOP/s in the steps{' after the first' * warm}, {rate / ours['rate']:.0%} of the matmul rate; "
        f"{flops / ours['wall_s'] / ours['rate']:.0%} from start to end"
    )


def report_merging(args: Namespace, medians: dict) -> None:
    files, written = merge_bytes([*args.ckpt, *[args.base] * bool(args.base)], DTYPES[args.dtype])
    read = sum(map(os.path.getsize, files))
    for side, found in medians.items():
        copy_s = (read + written) / found["rate"]
        print(
            f"{side}: {read / 1e9:.1f} GB read and {written / 1e9:.1f} GB written take {copy_s:.1f} s as a plain copy, "
            f"{found['step_s']:.1f} s as a merge: {copy_s / found['step_s']:.0%} of the copy rate"
        )


def report_generation(runs: dict, medians: dict) -> None:
    for side, turns in runs.items():
        medians[side]["per_token"] = statistics.median(r["step_s"] / r["made"] for r in turns)
        same = [x == y for x, y in zip(runs["ours"][0]["texts"], turns[0]["texts"]) if y is not None]
        print(f"{side}: {1 / medians[side]['per_token']:.1f} tokens/s; {sum(same)} of {len(same)} replies equal ours")


def summarise_runs(args: Namespace, runs: dict[str, list[dict]], work: tuple | None) -> None:
    """Prints the medians of the turns and their ratios. work: training_flops() of a training run."""
    keys = ("wall_s", "step_s", "peak_gb", "rate")
    medians = {side: {k: statistics.median(r[k] for r in turns) for k in keys} for side, turns in runs.items()}
    ours, peers, key = medians["ours"], list(runs)[1:], "wall_s"
    if work:
        report_training(args, runs, ours, work)
    if args.mode == "merge":
        report_merging(args, medians)
    if args.mode == "generate":
        report_generation(runs, medians)
        key = "per_token"
    one_at_a_time = [side for side in peers if side.endswith("-1")]  # reported separately
    for group in ([side for side in peers if side not in one_at_a_time], one_at_a_time):
        if group:
            best = min(group, key=lambda side: medians[side][key])
            speed, memory = medians[best][key] / ours[key], ours["peak_gb"] / medians[best]["peak_gb"]
            print(f"against {best}: {speed:.2f} x its speed, {memory:.2f} x its peak memory")
    if work and peers:
        pairs = zip(runs["ours"][0]["losses"], runs[peers[0]][0]["losses"])
        print("losses, ours and theirs: " + ", ".join(f"{x:.6f} {y:.6f}" for x, y in pairs))


# ---------------------------------------------------------------------------------------------------------------------
# The command


def add_speed_flags(p: Parser) -> None:
    p.add_argument("mode", choices=list(PEERS), help="what to measure")
    p.add_argument("--ckpt", nargs="+", help="checkpoint; for merge: the folders to merge")
    p.add_argument("--vs", help="peer: trl, transformers, mergekit, or for training another checkout's folder")
    p.add_argument("--repeats", type=at_least(1), default=1, help="runs of each side")
    # training and generation
    p.add_argument("--data", help="JSON Lines: SFT or KTO examples; for generate, lines with a prompt (a message list)")
    p.add_argument(
        "--limit", type=at_least(1), help="lines of --data to use (default: 32, in training steps x batch size)"
    )
    p.add_argument("--steps", type=at_least(1), default=4, help="optimizer steps")
    p.add_argument("--batch-size", type=at_least(1), default=8, help="examples per step; generate: rows in flight")
    p.add_argument("--peer-batch", type=at_least(1), default=8, help="examples per forward in TRL")
    p.add_argument(
        "--micro-tokens", type=at_least(1), help="maximum tokens of one forward of ours (default: as in training)"
    )
    p.add_argument("--compile", choices=["auto", "on", "off"], help="--compile of ours (default: as in training)")
    p.add_argument("--max-len", type=at_least(2), default=1024, help="maximum length of an example, in tokens")
    p.add_argument("--max-new-tokens", type=at_least(1), default=128, help="maximum length of a reply, in tokens")
    # merging
    p.add_argument("--base", help="base model of the merge")
    p.add_argument("--synthetic", metavar="FOLDER", help="merge 7B checkpoints, written there first (15 GB) if missing")
    p.add_argument("--method", default="ties", help="merge method; TIES and DARE-TIES have density 0.2")
    # machine
    p.add_argument("--dtype", choices=DTYPES, default=DTYPE, help="dtype of computation; merge: of the output")
    p.add_argument("--device", type=torch_device, default=DEVICE, help="torch device")
    p.add_argument("--scratch", help="folder for temporary files (default: the system's)")
    p.add_argument("--out", type=file_out('"settings"'), help="JSON file to write: settings and all measurements")
    p.add_argument("--side", help=argparse.SUPPRESS)


def parse_args() -> Namespace:
    p = Parser(description=__doc__)
    add_speed_flags(p)
    args = p.parse_args()
    args.limit = args.limit or (args.steps * args.batch_size if args.mode in ("sft", "kto") else 32)
    if args.mode != "merge" and not args.data:
        raise InputError(f"--data: missing; {args.mode} needs a file")
    if args.mode == "merge":
        args.device = "cpu"
    if args.synthetic:
        (*args.ckpt, args.base), args.dtype = synthetic_7b(args.synthetic), "bf16"
    if not args.ckpt:
        raise InputError("--ckpt: missing; give the checkpoint to measure with")
    return args


def sides_of(args: Namespace) -> list[str]:
    """The values of --side to compare: "ours" and the settings of the peer."""
    if not args.vs:
        return ["ours"]
    if args.mode in ("sft", "kto") and os.path.isfile(os.path.join(args.vs, f"train_{args.mode}.py")):
        return ["ours", f"checkout-{os.path.abspath(args.vs)}"]
    if args.vs not in PEERS[args.mode]:
        raise InputError(f"--vs {args.vs}: {args.mode} is compared with {', '.join(PEERS[args.mode])}")
    peers = PEERS[args.mode][args.vs]
    if args.mode == "generate":  # more rows than prompts make no difference
        peers = [side for side in peers if int(side.rsplit("-")[-1]) <= args.limit]
    return ["ours", *peers]


def main() -> None:
    args = parse_args()
    if args.side:
        return run_side(args)
    sides, work = sides_of(args), None
    with tempfile.TemporaryDirectory() as folder:
        data = None
        if args.data:
            data = os.path.join(folder, "data.jsonl")
            with open(args.data, encoding="utf-8") as f, open(data, "w", encoding="utf-8") as out:
                out.writelines(line for line, _ in zip(f, range(args.limit)))
        if args.mode in ("sft", "kto"):
            args.data = data
            work = tokens, supervised, flops, _ = training_flops(args)
            counts = f"{args.limit} examples, {tokens:,} tokens, {supervised:,} supervised"
            print(f"{counts}; {flops / 1e12:.2f} TFLOP of maths")
        runs = {side: [] for side in sides}
        for side in sides * args.repeats:
            found = measure(args, side, data)
            runs[side].append(found)
            giga = found["rate"] / 1e9
            rate = f"copy {giga:.2f} GB/s" if args.mode == "merge" else f"matmul {giga:,.0f} GFLOP/s"
            seconds = f"{found['wall_s']:7.1f} s in all, {found['step_s']:7.1f} s of work"
            print(f"{side:<18} {seconds}, peak {found['peak_gb']:.2f} GiB, {rate}", flush=True)
    summarise_runs(args, runs, work)
    if args.out:
        with atomic_write(args.out) as f:
            settings = {k: v for k, v in vars(args).items() if k != "side"}
            json.dump({"settings": settings, "torch": torch.__version__, "runs": runs}, f, indent=1)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    cli(main)
