"""The flags of eval.py and its commands. Does not import torch, as in core/flags.py."""

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from core.files import InputError
from core.flags import Parser, add_generation_flags, at_least, number, out_path
from evaluation.benchmarks import BENCHMARKS


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Parses eval.py's arguments. args.command: "compare" or "judge", or "" without a command."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {"compare": parse_compare_args, "judge": parse_judge_args}
    command = argv[0] if argv and argv[0] in commands else ""
    args = commands[command](argv[1:]) if command else parse_eval_args(argv)
    args.command = command
    return args


def parse_eval_args(argv: list[str]) -> Namespace:
    """The arguments of eval.py without a command."""
    about = (
        "Evaluates checkpoints on benchmarks: one table with standard errors and paired tests. "
        "`eval.py compare` shows on which questions two checkpoints differ. "
        "`eval.py judge` has a teacher compare their replies."
    )
    p = Parser(description=about)
    p.add_argument("--ckpt", nargs="+", required=True, help="hub ids, folders or .pt files; the first is the baseline")
    protocol = "paper: read the answer from a greedy chat reply; loglik: take the likeliest choice"
    p.add_argument("--protocol", choices=["paper", "loglik"], default="paper", help=protocol)
    code = "run code that the checkpoints write, in a sandbox"
    p.add_argument("--allow-code-execution", action="store_true", help=code)
    again = "score the replies in OUT again without loading a checkpoint; give the other flags of that run"
    p.add_argument("--rescore", action="store_true", help=again)
    add_reply_flags(p, out="eval")
    args = p.parse_args(argv)
    if args.protocol == "loglik" and args.repetition_penalty != 1.0:
        raise InputError("--repetition-penalty is for replies; --protocol loglik has none, leave it out")
    return args


def parse_compare_args(argv: list[str]) -> Namespace:
    """The arguments of `eval.py compare`."""
    about = "Writes the questions on which two checkpoints score differently, with both replies."
    p = Parser(prog="eval.py compare", description=about)
    p.add_argument("names", nargs=2, help="two checkpoints, by their paths or their names in the table")
    p.add_argument("--out", type=out_path, default="eval", help="folder of an evaluation, with samples.jsonl")
    return p.parse_args(argv)


def parse_judge_args(argv: list[str]) -> Namespace:
    """The arguments of `eval.py judge`."""
    p = Parser(prog="eval.py judge", description="Measures win rates: a teacher compares two replies, in both orders.")
    p.add_argument("--ckpt", nargs="+", required=True, help="two or more checkpoints; the first is the baseline")
    add = p.add_argument_group("judge").add_argument
    teacher = "URL of an OpenAI-compatible endpoint (its key in TEACHER_API_KEY), or a checkpoint"
    add("--teacher", required=True, help=teacher)
    add("--teacher-model", help="the model's name at the endpoint")
    thought = "for a teacher that thinks before it answers: maximum length of a thought, in tokens"
    add("--thought-tokens", type=at_least(0), default=0, help=thought)
    add("--concurrency", type=at_least(1), default=16, help="maximum number of requests in flight")
    add_reply_flags(p, out="judge")
    args = p.parse_args(argv)
    args.protocol, args.allow_code_execution = "paper", False
    if len(checkpoint_names(args.ckpt)) < 2:
        raise InputError("--ckpt: give two or more; the others are compared with the first")
    return args


def add_reply_flags(p: ArgumentParser, out: str) -> None:
    """Adds the flags that eval.py and `eval.py judge` share. out: the default of --out."""
    p.add_argument("--out", type=out_path, default=out, help="folder for replies and results")
    add_question_flags(p)
    generation = p.add_argument_group("generation")
    add_generation_flags(generation, max_new_tokens=1000)
    penalty = (
        "repetition penalty; 1.0: none, as in the paper. generation_config.json does not set it, unlike in transformers"
    )
    generation.add_argument("--repetition-penalty", type=number(0.01, below=100), default=1.0, help=penalty)
    cache = "size of the KV cache in GiB; questions that do not fit wait"
    generation.add_argument("--cache-gb", type=number(above=0), default=4.0, help=cache)


def add_question_flags(p: ArgumentParser, tasks: Sequence[str] | None = None) -> None:
    """Adds --tasks, --data-dir and --limit. tasks: the tasks to accept; None: load_questions() checks them."""
    add = p.add_argument_group("questions").add_argument
    names = f"one or several of {', '.join(tasks or BENCHMARKS)}"
    add("--tasks", nargs="+", required=True, choices=tasks, metavar="T", help=names)
    add("--data-dir", default="data", help="folder of the benchmark files; missing ones are downloaded")
    limit = "maximum number of questions per task, spread over its subjects (default: all)"
    add("--limit", type=at_least(1), help=limit)


def short_name(source: str) -> str:
    """The last part of a checkpoint's path, without .pt."""
    return os.path.basename(source.rstrip("/")).removesuffix(".pt")


def checkpoint_names(sources: list[str]) -> list[str]:
    """The short_name() of each path. If two of them are equal, the sources as they were given."""
    short = list(map(short_name, sources))
    names = short if len(set(short)) == len(sources) else list(sources)
    if len(set(names)) < len(names):
        raise InputError(f"--ckpt: {max(names, key=names.count)} is given twice")
    return names
