"""Replies of checkpoints to questions, kept in OUT."""

import contextlib
import gc
import glob
import hashlib
import json
import os

import torch.distributed as dist
from tqdm import tqdm

from core.checkpoint import Checkpoint
from core.files import InputError, append, atomic_write, code_hash, read_json
from core.flags import DEVICE, DTYPE, DTYPES, at_least, number, torch_device
from core.tokenizer import Tokenizer
from evaluation.benchmarks import BENCHMARKS
from evaluation.likelihoods import ask_likelihoods
from generate import generate_iter
from model import Qwen2

GENERATION = (
    "max_new_tokens",
    "batch_size",
    "cache_gb",
    "repetition_penalty",
)  # flags that are arguments of generate_iter
CHECKPOINTS = "checkpoints.json"


def ask_checkpoint(m, tokenizer, questions, a):
    """Yields (index, record) as each question is done. questions: the dicts of prepare(), of any tasks, which are asked
    together: rows of all of them share the batches, so that the last long reply is waited for once."""
    if a.protocol == "loglik":
        yield from ask_likelihoods(m, tokenizer, questions, a.batch_size)
        return
    prompts, end = [q["messages"] for q in questions], m.config.max_position_embeddings
    sizes = [len(tokenizer.prompt_ids(p)) for p in prompts]
    for q, size in zip(questions, sizes):
        if size >= end:
            raise InputError(
                f"--tasks {q['task']}: question {q['row']['id']} takes {size} tokens; the model ends at {end}: "
                "leave the task out"
            )
    settings = {name: value for name, value in vars(a).items() if name in GENERATION}
    for i, reply, finish in generate_iter(m, tokenizer, prompts, **settings):
        yield (
            i,
            {
                "reply": reply,
                "finish_reason": finish,
                "prompt_tokens": sizes[i],
                "reply_tokens": len(tokenizer.encode(reply)),
            },
        )


def question_keys(a, work, fingerprint, stop_ids):
    """{task: the key of each of its replies}: all that a reply depends on but the code, of which collect() warns."""
    settings = [a.protocol, a.dtype, a.max_new_tokens, *([] if a.repetition_penalty == 1.0 else [a.repetition_penalty])]
    return {task: [hashlib.sha256(json.dumps([fingerprint, stop_ids, task, *settings, q["messages"], *q["also"]]).encode())
                   .hexdigest() for q in questions] for task, questions in work.items()}  # fmt: skip


def collect_replies(a, names, work, rank=0, world=1, device="cpu"):
    """Asks each checkpoint what OUT does not hold yet -> {name: {task: [record of each question]}}.

    Of several ranks each asks every world-th question and writes a file of its own; what is returned is complete on all.
    OUT/checkpoints.json remembers what the keys need of a checkpoint, for recall().
    """
    replies, log = open_reply_log(a.out, rank)
    if world > 1:
        dist.barrier()  # all have read the same replies before one writes another
    penalty = {} if a.repetition_penalty == 1.0 else {"repetition_penalty": a.repetition_penalty}
    code = code_hash("generate.py", "evaluation")
    keys = {}  # name: question_keys
    for source, name in zip(a.ckpt, names):
        ckpt = Checkpoint(source)
        tokenizer, fingerprint = Tokenizer(ckpt), ckpt.fingerprint()
        stop_ids = sorted(tokenizer.stop_ids)
        keys[name] = question_keys(a, work, fingerprint, stop_ids)
        if rank == 0:
            known = known_checkpoints(a.out) | {source: {"fingerprint": fingerprint, "stop_ids": stop_ids}}
            with atomic_write(os.path.join(a.out, CHECKPOINTS)) as f:
                json.dump(known, f, indent=1)
            old = sum(
                replies[key].get("code", code) != code for task in work for key in keys[name][task] if key in replies
            )
            if old:
                print(
                    f"warning: {old} replies of {name} in {a.out} are those of other code than is here now; another --out asks anew"
                )
        todo = {key: q for task in work for key, q in zip(keys[name][task], work[task]) if key not in replies}
        todo = dict(list(todo.items())[rank::world])
        if todo:
            m = Qwen2.from_pretrained(ckpt, DTYPES[a.dtype], device)
            order, hidden = list(todo), True if rank else None  # None: hidden where there is no terminal
            asked = ask_checkpoint(m, tokenizer, list(todo.values()), a)
            for i, record in tqdm(asked, name, total=len(todo), unit="reply", disable=hidden):
                key, q = order[i], todo[order[i]]
                replies[key] = record = {**record, **penalty, "code": code}
                line = {"key": key, "checkpoint": name, "task": q["task"], "id": q["row"]["id"], **record}
                append(log, json.dumps(line, ensure_ascii=False) + "\n")
            del m
            gc.collect()
    log.close()
    if world > 1:
        dist.barrier()
        replies = read_replies(a.out)
    return {name: {task: [replies[key] for key in keys[name][task]] for task in work} for name in names}


def load_replies(a, names, work):
    """As collect(), from what OUT holds; no checkpoint is opened: of each, the one that was evaluated last under its path."""
    replies, known, said = read_replies(a.out), known_checkpoints(a.out), {}
    for source, name in zip(a.ckpt, names):
        if source not in known:
            raise InputError(
                f"{a.out}/{CHECKPOINTS}: no {source}, only {', '.join(known) or 'nothing'}; name it as "
                "the run did, or leave --rescore out: no reply that is there is asked for again"
            )
        for task, keys in question_keys(a, work, **known[source]).items():
            said.setdefault(name, {})[task] = found = [replies.get(key) for key in keys]
            if None in found:
                raise InputError(
                    f"{a.out}/replies.jsonl: {found.count(None)} of the {len(found)} replies of {name} to "
                    f"{task} ({protocol_name(a)}, {a.dtype}, at most {a.max_new_tokens} tokens) are missing; give "
                    "the flags and the data of that run; without --rescore they are asked for"
                )
    return said


def checkpoint_names(sources):
    """Short names, the last part of each path without .pt, if they differ; else the sources as they were given."""
    short = [os.path.basename(s.rstrip("/")).removesuffix(".pt") for s in sources]
    names = short if len(set(short)) == len(sources) else list(sources)
    if len(set(names)) < len(names):
        raise InputError(f"--ckpt: {max(names, key=names.count)} is given twice")
    return names


def protocol_name(a):
    """What a score is headed by; a repetition penalty makes another protocol of the paper's, which has none."""
    return a.protocol if a.repetition_penalty == 1.0 else f"{a.protocol}, repetition penalty {a.repetition_penalty:g}"


# ---------------------------------------------------------------- the run


def read_replies(out):
    """OUT/replies*.jsonl -> {key: record}. A line that was cut short is passed over."""
    replies = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(out), "replies*.jsonl"))):
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                with contextlib.suppress(ValueError, TypeError):
                    record = json.loads(line)
                    if "key" in record and "reply" in record:
                        replies[record["key"]] = record
    return replies


def open_reply_log(out, rank=0):
    """-> what read_replies finds, and the file that this rank appends to."""
    path = os.path.join(out, f"replies.rank{rank}.jsonl" if rank else "replies.jsonl")
    try:
        os.makedirs(out, exist_ok=True)
        with open(path, "a+b") as log:
            if log.tell():
                log.seek(-1, os.SEEK_END)
                if log.read(1) != b"\n":
                    log.write(b"\n")
        return read_replies(out), open(path, "a", encoding="utf-8")
    except OSError as e:
        raise InputError(f"{path}: cannot be written: {e.strerror}; give another --out") from None


def known_checkpoints(out):
    """OUT/checkpoints.json -> {source as it was given: {"fingerprint", "stop_ids"}}, of those evaluated there."""
    path = os.path.join(out, CHECKPOINTS)
    return read_json(path) if os.path.exists(path) else {}


def add_reply_flags(p):
    """Of eval.py and `eval.py judge`."""
    p.add_argument("--out", required=True, help="directory of everything that is written")
    # questions
    p.add_argument("--tasks", nargs="+", required=True, help=f"of {', '.join(BENCHMARKS)}")
    p.add_argument("--data-dir", default="data", help="where the benchmarks lie, or are downloaded to")
    p.add_argument("--limit", type=at_least(1), help="questions per task, in turn from its subjects (default: all)")
    # generation
    p.add_argument("--max-new-tokens", type=at_least(1), default=1000, help="most tokens of a reply")
    p.add_argument(
        "--repetition-penalty",
        type=number(above=0),
        default=1.0,
        help="1.0, none, is the paper's; transformers' "
        "generate takes it from the checkpoint's generation_config.json (1.1 in Qwen2-0.5B-Instruct), greedy or not",
    )
    p.add_argument("--batch-size", type=at_least(1), default=32, help="questions in flight; changes no reply")
    p.add_argument(
        "--cache-gb", type=number(above=0), default=4.0, help="GiB of keys and values: questions that do not fit wait"
    )
    # machine
    p.add_argument("--dtype", choices=DTYPES, default=DTYPE, help="of weights and computation")
    p.add_argument("--device", type=torch_device, default=DEVICE, help="torch device")
