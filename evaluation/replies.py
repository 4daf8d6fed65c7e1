"""Ask checkpoints the questions and keep their replies in OUT, so that no question is asked twice.

OUT/replies.jsonl: one record per reply, by key; further ranks write replies.rankN.jsonl. OUT/checkpoints.json: each
checkpoint's part of the keys, for --rescore.
"""

import gc
import glob
import hashlib
import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

import torch.distributed as dist
from tqdm import tqdm

from core.checkpoint import Checkpoint
from core.distributed import ONE_RANK, Ranks, is_main
from core.files import InputError, atomic_write, code_hash, read_json
from core.flags import DEVICE, DTYPE, DTYPES, at_least, number, torch_device
from core.reply_log import ReplyLog
from core.tokenizer import Tokenizer
from evaluation.benchmarks import BENCHMARKS
from evaluation.likelihoods import ask_likelihoods
from generate import generate_iter
from model import Qwen2

GENERATION_FLAGS = ("max_new_tokens", "batch_size", "cache_gb", "repetition_penalty")  # arguments of generate_iter
CHECKPOINTS = "checkpoints.json"
FIELDS = {"reply": str}  # of every record of the reply log
Work = dict[str, list[dict]]  # {task: its questions}, see benchmarks.load_questions
Replies = dict[str, dict[str, list[dict]]]  # {checkpoint: {task: the record of each question}}


def ask_checkpoint(
    model: Qwen2, tokenizer: Tokenizer, questions: list[dict], args: Namespace
) -> Iterator[tuple[int, dict]]:
    """Yields (index, record) as each question is done. Questions of all tasks share the batches."""
    if args.protocol == "loglik":
        yield from ask_likelihoods(model, tokenizer, questions, args.batch_size)
        return
    prompts, end = [q["messages"] for q in questions], model.config.max_position_embeddings
    sizes = [len(tokenizer.prompt_ids(p)) for p in prompts]
    for q, size in zip(questions, sizes):
        if size >= end:
            what = f"--tasks {q['task']}: question {q['row']['id']} takes {size} tokens"
            raise InputError(f"{what}, the model has {end} positions; leave the task out")
    settings = {name: value for name, value in vars(args).items() if name in GENERATION_FLAGS}
    for i, reply, finish in generate_iter(model, tokenizer, prompts, **settings):
        counts = {"prompt_tokens": sizes[i], "reply_tokens": len(tokenizer.encode(reply))}
        yield i, {"reply": reply, "finish_reason": finish, **counts}


def question_keys(args: Namespace, work: Work, fingerprint: str, stop_ids: list[int]) -> dict[str, list[str]]:
    """{task: the key of each reply}. A key is a hash of everything that a reply depends on, except the code."""
    settings = [args.protocol, args.dtype, args.max_new_tokens]
    settings += [] if args.repetition_penalty == 1.0 else [args.repetition_penalty]

    def key(task: str, q: dict) -> str:
        content = [fingerprint, stop_ids, task, *settings, q["messages"], *q["also"]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    return {task: [key(task, q) for q in questions] for task, questions in work.items()}


def read_replies(out: str) -> dict[str, dict]:
    """{key: record} of all reply logs in OUT."""
    replies = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(out), "replies*.jsonl"))):
        with ReplyLog(path, FIELDS, read_only=True) as log:
            replies |= {key: log[key] for key in log}
    return replies


def known_checkpoints(out: str) -> dict[str, dict]:
    """OUT/checkpoints.json: {checkpoint as it was given: {"fingerprint", "stop_ids"}}."""
    path = os.path.join(out, CHECKPOINTS)
    return read_json(path) if os.path.exists(path) else {}


def remember_checkpoint(args: Namespace, source: str, name: str, known: dict, found: list[dict], code: str) -> None:
    """Adds a checkpoint to OUT/checkpoints.json. Warns if kept replies were made by another version of the code."""
    with atomic_write(os.path.join(args.out, CHECKPOINTS)) as f:
        json.dump(known_checkpoints(args.out) | {source: known}, f, indent=1)
    old = sum(record.get("code", code) != code for record in found)
    if old:
        print(f"warning: {old} replies of {name} in {args.out} were given by other code; a new --out asks again")


def collect_replies(args: Namespace, names: list[str], work: Work, ranks: Ranks = ONE_RANK) -> Replies:
    """The reply of each checkpoint to each question. Asks only questions without a reply in OUT.

    Each rank asks every world-th question and writes its own file. The result is complete on all ranks.
    """
    own = os.path.join(args.out, f"replies.rank{ranks.rank}.jsonl" if ranks.rank else "replies.jsonl")
    penalty = {} if args.repetition_penalty == 1.0 else {"repetition_penalty": args.repetition_penalty}
    code, keys = code_hash("generate.py", "evaluation"), {}
    with ReplyLog(own, FIELDS) as log:
        replies = read_replies(args.out)
        if ranks.world > 1:
            dist.barrier()  # every rank reads the old replies before any rank writes
        for source, name in zip(args.ckpt, names):
            ckpt = Checkpoint(source)
            tokenizer = Tokenizer(ckpt)
            known = {"fingerprint": ckpt.fingerprint(), "stop_ids": sorted(tokenizer.stop_ids)}
            keys[name] = question_keys(args, work, **known)
            asked = {key: q for task in work for key, q in zip(keys[name][task], work[task])}
            if is_main():
                found = [replies[key] for key in asked if key in replies]
                remember_checkpoint(args, source, name, known, found, code)
            missing = {key: q for key, q in asked.items() if key not in replies}
            missing = dict(list(missing.items())[ranks.rank :: ranks.world])
            if not missing:
                continue
            model = Qwen2.from_pretrained(ckpt, DTYPES[args.dtype], ranks.device)
            order, hidden = list(missing), True if ranks.rank else None  # None: hidden where there is no terminal
            asking = ask_checkpoint(model, tokenizer, list(missing.values()), args)
            for i, record in tqdm(asking, name, total=len(missing), unit="reply", disable=hidden):
                key, q = order[i], missing[order[i]]
                replies[key] = {
                    "checkpoint": name,
                    "task": q["task"],
                    "id": q["row"]["id"],
                    **record,
                    **penalty,
                    "code": code,
                }
                log.append(key, replies[key])
            del model
            gc.collect()
    if ranks.world > 1:
        dist.barrier()
        replies = read_replies(args.out)
    return {name: {task: [replies[key] for key in keys[name][task]] for task in work} for name in names}


def load_replies(args: Namespace, names: list[str], work: Work) -> Replies:
    """collect_replies() from OUT only, without opening a checkpoint. A path stands for its last evaluated content."""
    replies, known, found = read_replies(args.out), known_checkpoints(args.out), {}
    for source, name in zip(args.ckpt, names):
        if source not in known:
            there = ", ".join(known) or "nothing"
            advice = "name it as that run did, or leave --rescore out: kept replies are not asked for again"
            raise InputError(f"{args.out}/{CHECKPOINTS}: no {source}, only {there}; {advice}")
        for task, keys in question_keys(args, work, **known[source]).items():
            found.setdefault(name, {})[task] = records = [replies.get(key) for key in keys]
            if None in records:
                settings = f"{protocol_name(args)}, {args.dtype}, at most {args.max_new_tokens} tokens"
                missing = (
                    f"{records.count(None)} of the {len(records)} replies of {name} to {task} ({settings}) are missing"
                )
                advice = "give the flags and data of that run, or leave --rescore out"
                raise InputError(f"{args.out}/replies.jsonl: {missing}; {advice}")
    return found


def checkpoint_names(sources: list[str]) -> list[str]:
    """The last part of each path, without .pt. If two of them are equal, the sources as they were given."""
    short = [os.path.basename(s.rstrip("/")).removesuffix(".pt") for s in sources]
    names = short if len(set(short)) == len(sources) else list(sources)
    if len(set(names)) < len(names):
        raise InputError(f"--ckpt: {max(names, key=names.count)} is given twice")
    return names


def protocol_name(args: Namespace) -> str:
    """The protocol's name in tables. It includes a repetition penalty, because the paper's protocol has none."""
    penalty = args.repetition_penalty
    return args.protocol if penalty == 1.0 else f"{args.protocol}, repetition penalty {penalty:g}"


def add_reply_flags(p: ArgumentParser, out: str | None = None) -> None:
    """The flags that eval.py and `eval.py judge` share. out: the default of --out."""
    p.add_argument("--out", required=out is None, default=out, help="directory for replies and results")
    # questions
    p.add_argument("--tasks", nargs="+", required=True, help=f"one or several of {', '.join(BENCHMARKS)}")
    p.add_argument("--data-dir", default="data", help="directory of the benchmark files; missing ones are downloaded")
    p.add_argument("--limit", type=at_least(1), help="questions per task, in turn from its subjects; default: all")
    # generation
    p.add_argument("--max-new-tokens", type=at_least(1), default=1000, help="most tokens of a reply")
    penalty = "1.0: none, as in the paper. Unlike in transformers, generation_config.json does not set it"
    p.add_argument("--repetition-penalty", type=number(above=0), default=1.0, help=penalty)
    p.add_argument("--batch-size", type=at_least(1), default=32, help="questions in flight; changes no reply")
    p.add_argument(
        "--cache-gb", type=number(above=0), default=4.0, help="size of the KV cache in GiB; other questions wait"
    )
    # machine
    p.add_argument("--dtype", choices=DTYPES, default=DTYPE, help="dtype of weights and computation")
    p.add_argument("--device", type=torch_device, default=DEVICE, help="torch device")
