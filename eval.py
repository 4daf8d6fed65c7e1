"""Benchmarks of checkpoints, with standard errors and paired tests: one table for all checkpoints given.

    python eval.py --ckpt Qwen/Qwen2-0.5B-Instruct sft.pt --tasks gsm8k mmlu --limit 200 --out runs/eval
    python eval.py compare Qwen2-0.5B-Instruct sft --out runs/eval       # the questions on which two of them differ

--protocol paper: greedy chat replies, read as the paper's scripts read them. --protocol loglik: the likeliest of the
choices, as lm-evaluation-harness asks it. A score belongs to its protocol; the two never share a column.
OUT/replies.jsonl grows with each reply: a run that is started again only asks what is missing, --rescore reads the
replies again without the model, and torchrun spreads the questions over its ranks.
"""

import collections
import contextlib
import gc
import glob
import hashlib
import itertools
import json
import math
import os
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

from attention import to_device
from benchmarks import BENCHMARKS, prepare, read
from chat import Tokenizer, read_jsonl, write_jsonl
from checkpoint import Checkpoint, InputError, append, atomic_write, cli, code_hash, read_json
from flags import DEVICE, DTYPE, DTYPES, Parser, at_least, number, torch_device
from generate import common_prefix, generate_iter
from model import Qwen2, token_logps
from ranks import join, leave_group, own_device
from stats import POWER, calibration, compare, holm, mean_stderr, ratio_stderr, subjects_mean_stderr

GENERATION = ("max_new_tokens", "batch_size", "cache_gb", "repetition_penalty")  # flags that are arguments of generate_iter
CHECKPOINTS = "checkpoints.json"
CACHE_TOKENS = 1 << 15  # of one forward's cache, all rows together, where --batch-size would take more

# ---------------------------------------------------------------- likelihoods


@torch.no_grad()
def choice_logps(m, tokenizer, contexts, choices, where="--tasks"):
    """The log-likelihoods of the choices of each of the contexts, whose common prefix is computed once.

    contexts: n texts. choices: n lists of texts, each with the space before it -> n lists of sums over a choice's tokens.
    Context and choice are encoded together and split at the context's own length, as the harness does. where: what an
    error names.
    """
    starts = [len(tokenizer.encode(context)) for context in contexts]
    wholes = [[tokenizer.encode(context + choice) for choice in some] for context, some in zip(contexts, choices)]
    # one feed per context where every choice is a single token, as letters are
    feeds = list(dict.fromkeys(tuple(ids[:-1]) for some in wholes for ids in some))
    longest = max(map(len, feeds))
    if longest > m.config.max_position_embeddings:
        raise InputError(f"{where}: a question with its examples takes {longest} tokens; the model ends at "
                         f"{m.config.max_position_embeddings}: leave the task out")
    shared = min(common_prefix(feeds) if len(feeds) > 1 else 0, min(starts) - 1)
    cache = m.new_cache(len(feeds), longest)
    if shared:
        first = m.new_cache(1, shared)
        m.prefill([feeds[0][:shared]], first)
        for row in range(len(feeds)):
            cache.copy_start(row, first, 0, shared)
    rest = [len(feed) - shared for feed in feeds]
    ends = dict(zip(feeds, itertools.accumulate(rest)))                                          # of each feed in the packed row
    at, targets, counts = [], [], []                                                             # of all choices' tokens, in turn
    for start, some in zip(starts, wholes):
        for ids in some:
            at += range(ends[tuple(ids[:-1])] - len(ids) + start, ends[tuple(ids[:-1])])
            targets += ids[start:]
            counts.append(len(ids) - start)
    ids, at, targets = (to_device(x, m.device) for x in ([[t for feed in feeds for t in feed[shared:]]], at, targets))
    logps = token_logps(m.hidden(ids, rest, cache, at)[0], m.head_weight, targets).double().cpu()  # (tokens of all choices,)
    sums = iter(part.sum().item() for part in logps.split(counts))
    return [[next(sums) for _ in some] for some in wholes]


@torch.no_grad()
def text_logp(m, tokenizer, text):
    """(log-likelihood, tokens) of a text, every token given those before it, the first the tokenizer's prefix token.

    The harness' windows: a text longer than the model's positions is predicted by one full window after the other, each
    from the last token before it on; the last one reaches back as far as the positions go.
    """
    ids, size, total = [tokenizer.prefix, *tokenizer.encode(text)], m.config.max_position_embeddings, 0.0
    for start in range(1, len(ids), size):
        end = min(start + size, len(ids))
        window = to_device(ids[max(0, end - 1 - size) : end], m.device)                          # at most size + 1
        targets = window[start - end :]
        at = torch.arange(len(window) - 1 - len(targets), len(window) - 1, device=m.device)
        hidden = m.hidden(window[None, :-1], [len(window) - 1], at=at)[0]
        total += token_logps(hidden, m.head_weight, targets).double().sum().item()
    return total, len(ids) - 1


# ---------------------------------------------------------------- asking a checkpoint


def ask_likelihoods(m, tokenizer, questions, batch_size):
    """Yields (index, record) of questions under --protocol loglik."""
    def topic(i):
        return questions[i]["task"], questions[i]["row"].get("subject")

    for (task, _), group in itertools.groupby(range(len(questions)), key=topic):
        group, by = list(group), BENCHMARKS[task]["by"]
        texts = {i: questions[i]["messages"][0]["content"] for i in group}
        sizes = {i: len(tokenizer.encode(texts[i])) for i in group}
        if by == "whole":
            for i in group:
                logp, tokens = text_logp(m, tokenizer, texts[i])
                yield i, {"reply": "", "logp": logp, "prompt_tokens": tokens}
            continue
        # letters: the questions of a subject share its examples; texts: the choices of one question share its context
        step = min(batch_size, max(1, CACHE_TOKENS // max(sizes.values()))) if by == "letter" else 1
        for part in (group[i : i + step] for i in range(0, len(group), step)):
            choices = [questions[i]["choices"] for i in part]
            for i, some, logps in zip(part, choices, choice_logps(m, tokenizer, [texts[i] for i in part], choices, f"--tasks {task}")):
                best = max(range(len(some)), key=logps.__getitem__)
                yield i, {"reply": some[best].strip(), "logps": logps, "prompt_tokens": sizes[i]}


def ask(m, tokenizer, questions, a):
    """Yields (index, record) as each question is done. questions: the dicts of prepare(), of any tasks, which are asked
    together: rows of all of them share the batches, so that the last long reply is waited for once."""
    if a.protocol == "loglik":
        yield from ask_likelihoods(m, tokenizer, questions, a.batch_size)
        return
    prompts, end = [q["messages"] for q in questions], m.config.max_position_embeddings
    sizes = [len(tokenizer.prompt_ids(p)) for p in prompts]
    for q, size in zip(questions, sizes):
        if size >= end:
            raise InputError(f"--tasks {q['task']}: question {q['row']['id']} takes {size} tokens; the model ends at {end}: "
                             "leave the task out")
    settings = {name: value for name, value in vars(a).items() if name in GENERATION}
    for i, reply, finish in generate_iter(m, tokenizer, prompts, **settings):
        yield i, {"reply": reply, "finish_reason": finish, "prompt_tokens": sizes[i], "reply_tokens": len(tokenizer.encode(reply))}


def question_keys(a, work, fingerprint, stop_ids):
    """{task: the key of each of its replies}: all that a reply depends on but the code, of which collect() warns."""
    settings = [a.protocol, a.dtype, a.max_new_tokens, *([] if a.repetition_penalty == 1.0 else [a.repetition_penalty])]
    return {task: [hashlib.sha256(json.dumps([fingerprint, stop_ids, task, *settings, q["messages"], *q["also"]]).encode())
                   .hexdigest() for q in questions] for task, questions in work.items()}  # fmt: skip


def collect(a, names, work, rank=0, world=1, device="cpu"):
    """Asks each checkpoint what OUT does not hold yet -> {name: {task: [record of each question]}}.

    Of several ranks each asks every world-th question and writes a file of its own; what is returned is complete on all.
    OUT/checkpoints.json remembers what the keys need of a checkpoint, for recall().
    """
    replies, log = open_replies(a.out, rank)
    if world > 1:
        dist.barrier()                                   # all have read the same replies before one writes another
    penalty = {} if a.repetition_penalty == 1.0 else {"repetition_penalty": a.repetition_penalty}
    code = code_hash("model", "layers", "attention", "chat", "generate", "eval")
    keys = {}                                            # name: question_keys
    for source, name in zip(a.ckpt, names):
        ckpt = Checkpoint(source)
        tokenizer, fingerprint = Tokenizer(ckpt), ckpt.fingerprint()
        stop_ids = sorted(tokenizer.stop_ids)
        keys[name] = question_keys(a, work, fingerprint, stop_ids)
        if rank == 0:
            known = known_checkpoints(a.out) | {source: {"fingerprint": fingerprint, "stop_ids": stop_ids}}
            with atomic_write(os.path.join(a.out, CHECKPOINTS)) as f:
                json.dump(known, f, indent=1)
            old = sum(replies[key].get("code", code) != code for task in work for key in keys[name][task] if key in replies)
            if old:
                print(f"warning: {old} replies of {name} in {a.out} are those of other code than is here now; another --out asks anew")
        todo = {key: q for task in work for key, q in zip(keys[name][task], work[task]) if key not in replies}
        todo = dict(list(todo.items())[rank::world])
        if todo:
            m = Qwen2.from_pretrained(ckpt, DTYPES[a.dtype], device)
            order, hidden = list(todo), True if rank else None  # None: hidden where there is no terminal
            asked = ask(m, tokenizer, list(todo.values()), a)
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


def recall(a, names, work):
    """As collect(), from what OUT holds; no checkpoint is opened: of each, the one that was evaluated last under its path."""
    replies, known, said = read_replies(a.out), known_checkpoints(a.out), {}
    for source, name in zip(a.ckpt, names):
        if source not in known:
            raise InputError(f"{a.out}/{CHECKPOINTS}: no {source}, only {', '.join(known) or 'nothing'}; name it as "
                             "the run did, or leave --rescore out: no reply that is there is asked for again")
        for task, keys in question_keys(a, work, **known[source]).items():
            said.setdefault(name, {})[task] = found = [replies.get(key) for key in keys]
            if None in found:
                raise InputError(f"{a.out}/replies.jsonl: {found.count(None)} of the {len(found)} replies of {name} to "
                                 f"{task} ({protocol_name(a)}, {a.dtype}, at most {a.max_new_tokens} tokens) are missing; give "
                                 "the flags and the data of that run; without --rescore they are asked for")
    return said


# ---------------------------------------------------------------- summing up


def average_metric(values):
    """Values of a metric, one a question: numbers, lists (several verdicts a question) or (numerator, denominator)."""
    pairs = [v if isinstance(v, tuple) else (sum(v), len(v)) if isinstance(v, list) else (v, 1) for v in values]
    score, stderr = ratio_stderr(*zip(*pairs))
    return {"score": score, "stderr": stderr}


def summarise(verdicts, subjects, over, first=None):
    """Score, standard error, n; against the first checkpoint's verdicts also the paired comparison."""
    subjects = subjects if over == "subjects" else None
    x = [float(v) for v in verdicts]
    score, stderr = subjects_mean_stderr(x, subjects) if subjects else mean_stderr(x)
    cell = {"score": score, "stderr": stderr, "n": len(verdicts)}
    if first is not None:
        cell["vs_first"] = compare(first, verdicts, subjects)
    return cell


def score(names, work, said, protocol):
    """What was said -> (the content of results.json, the lines of samples.jsonl)."""
    results, samples = {name: {} for name in names}, []
    first = {}                                           # the first checkpoint's verdicts on each task
    for name, (task, questions) in itertools.product(names, work.items()):
        records = said[name][task]
        bar = tqdm(records, f"{name} {task}: verdicts", disable=None, leave=False)
        found = [read(q, record) for record, q in zip(bar, questions)]  # anew for earlier replies too: reading is cheap
        extracted, verdicts, metrics, confidences = zip(*found)
        for q, record, text, correct in zip(questions, records, extracted, verdicts):
            kept = {k: v for k, v in record.items() if k not in ("key", "checkpoint", "task", "id", "code")}
            samples.append({"checkpoint": name, "task": task, "id": q["row"]["id"], "prompt": q["messages"], **kept,
                            "extracted": text, "correct": correct, "protocol": protocol})
        subjects = [q["row"].get("subject") for q in questions]
        cell = summarise(verdicts, subjects, BENCHMARKS[task]["over"], first.get(task))
        cell |= {"protocol": protocol, "cut_short": sum(r.get("finish_reason") == "length" for r in records)}
        if metrics[0]:
            cell["metrics"] = {metric: average_metric([m[metric] for m in metrics]) for metric in metrics[0]}
        if "nll_per_token" in metrics[0]:
            nll, error = cell["metrics"]["nll_per_token"].values()
            cell["metrics"]["perplexity"] = {"score": math.exp(nll), "stderr": error and math.exp(nll) * error}
        if None not in confidences:
            cell["calibration"] = calibration(confidences, verdicts)
        results[name][task] = cell
        first.setdefault(task, verdicts)
    correct_for_many(results)
    return results, samples


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


def correct_for_many(results):
    """Adds to each comparison its p-value corrected for all comparisons of the table, and what it could have shown."""
    pairs = [cell["vs_first"] for cells in results.values() for cell in cells.values() if "vs_first" in cell]
    for versus, p in zip(pairs, holm([versus["p"] for versus in pairs])):
        versus["p_holm"] = p
        versus["smallest"] = versus["stderr"] and POWER * versus["stderr"]


def table(results):
    """results.json's content as Markdown, in percent; the first row is what the others are compared with."""
    def text(cell):
        error = "?" if cell["stderr"] is None else f"{100 * cell['stderr']:.1f}"
        versus = cell.get("vs_first")
        return f"{100 * cell['score']:.1f} ± {error}" + (
            f" ({100 * versus['difference']:+.1f}, p = {versus['p_holm']:.2g})" if versus else "")

    first = next(iter(results))
    head = [f"{task} ({cell['protocol']}, n = {cell['n']})" for task, cell in results[first].items()]
    lines = [["checkpoint", *head], ["---"] * (len(head) + 1)]
    lines += [[name, *(text(cell) for cell in cells.values())] for name, cells in results.items()]
    note = "Percent ± one standard error"
    if len(results) > 1:
        m = (len(results) - 1) * len(head)
        note += (f"; in brackets the difference to {first} on the same questions and its p-value (exact McNemar test, or "
                 f"paired bootstrap for scores that are not 0 or 1, or that average over subjects), corrected by Holm for {m} "
                 f"comparison{'s' * (m > 1)}")
    rows = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return "\n".join([rows, f"{note}.\n", *in_words(results), *metric_lines(results)])


def in_words(results):
    """Which differences are more than noise, which are not, and how small a one these questions could have shown."""
    first, *others = results
    real, noise, power = [], [], []
    for task in results[first]:
        pairs = {name: results[name][task]["vs_first"] for name in others}
        for name, versus in pairs.items():
            low, high = versus["interval"]
            (real if versus["p_holm"] < 0.05 else noise).append(
                f"{name} on {task} ({100 * versus['difference']:+.1f}, 95% interval {100 * low:+.1f} to {100 * high:+.1f})")
        smallest = max((versus["smallest"] or 0.0 for versus in pairs.values()), default=0.0)
        if smallest:
            power.append(f"{100 * smallest:.1f} on {task} (n = {results[first][task]['n']})")
    lines = [f"More than noise, against {first}: {'; '.join(real)}.\n"] if real else []
    lines += [f"Noise, as far as these questions can tell: {'; '.join(noise)}.\n"] if noise else []
    if power:
        lines.append("Smallest true difference, in points, that would show at p < 0.05 (uncorrected) in four of five such "
                     f"evaluations: {'; '.join(power)}.\n")
    return lines


def metric_lines(results):
    """The other figures of a task, and its calibration, a line each."""
    lines = []
    for name, cells in results.items():
        for task, cell in cells.items():
            parts = [f"{metric} {value['score']:.4g}" + ("" if value["stderr"] is None else f" ± {value['stderr']:.2g}")
                     for metric, value in cell.get("metrics", {}).items()]  # fmt: skip
            if "calibration" in cell:
                parts.append(f"expected calibration error {cell['calibration']['ece']:.3f}")
            if parts:
                lines.append(f"- {name}, {task}: {', '.join(parts)}")
    return ["\n".join(["Further figures:", *lines]) + "\n"] if lines else []


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


def open_replies(out, rank=0):
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


def differences(argv):
    """eval.py compare A B: the questions that one of two checkpoints answered better, with both replies."""
    p = Parser(prog="eval.py compare", description=differences.__doc__)
    p.add_argument("names", nargs=2, help="names of two checkpoints, as the table has them")
    p.add_argument("--out", required=True, help="directory of an evaluation, which holds samples.jsonl")
    a = p.parse_args(argv)
    samples, path = {}, os.path.join(a.out, "samples.jsonl")
    for line, s in read_jsonl(path):
        try:
            samples[s["checkpoint"], s["task"], s["id"]] = s
        except KeyError as e:
            raise InputError(f"{path}:{line}: no {e}; run the evaluation again") from None
    known = list(dict.fromkeys(name for name, _, _ in samples))
    for name in a.names:
        if name not in known:
            raise InputError(f"{path}: no checkpoint {name!r}; it holds {', '.join(known)}")
    text, count = "", collections.defaultdict(lambda: [0, 0, 0])  # per task: A better, B better, n
    for (name, task, id), s in samples.items():
        t = samples.get((a.names[1], task, id))
        if name != a.names[0] or t is None:
            continue
        count[task][2] += 1
        if s["correct"] != t["correct"]:
            count[task][s["correct"] < t["correct"]] += 1
            text += f"## {task} {id}\n\n{s['prompt'][-1]['content']}\n\n"
            for x in (s, t):
                text += f"### {x['checkpoint']}: {float(x['correct']):g}, read as {x['extracted']!r}\n\n{x['reply']}\n\n"
    lines = [f"{task}: {a.names[0]} better on {x}, {a.names[1]} on {y}, of {n} questions"
             for task, (x, y, n) in count.items()]  # fmt: skip
    path = os.path.join(a.out, "-vs-".join(name.strip("/").replace("/", "_") for name in a.names) + ".md")
    with atomic_write(path) as f:
        f.write(f"# {a.names[0]} and {a.names[1]}\n\n" + "\n".join(f"- {line}" for line in lines) + f"\n\n{text}")
    print("\n".join(lines) + f"\nBoth replies to each of them are in {path}")


def add_flags(p):
    """Of eval.py and judge.py."""
    p.add_argument("--out", required=True, help="directory of everything that is written")
    # questions
    p.add_argument("--tasks", nargs="+", required=True, help=f"of {', '.join(BENCHMARKS)}")
    p.add_argument("--data-dir", default="data", help="where the benchmarks lie, or are downloaded to")
    p.add_argument("--limit", type=at_least(1), help="questions per task, in turn from its subjects (default: all)")
    # generation
    p.add_argument("--max-new-tokens", type=at_least(1), default=1000, help="most tokens of a reply")
    p.add_argument("--repetition-penalty", type=number(above=0), default=1.0, help="1.0, none, is the paper's; transformers' "
                   "generate takes it from the checkpoint's generation_config.json (1.1 in Qwen2-0.5B-Instruct), greedy or not")
    p.add_argument("--batch-size", type=at_least(1), default=32, help="questions in flight; changes no reply")
    p.add_argument("--cache-gb", type=number(above=0), default=4.0, help="GiB of keys and values: questions that do not fit wait")
    # machine
    p.add_argument("--dtype", choices=DTYPES, default=DTYPE, help="of weights and computation")
    p.add_argument("--device", type=torch_device, default=DEVICE, help="torch device")


def main():
    if sys.argv[1:2] == ["compare"]:
        return differences(sys.argv[2:])
    p = Parser(description=__doc__.split("\n\n")[0])
    p.add_argument("--ckpt", nargs="+", required=True, help="hub ids, directories, .pt files; first the baseline")
    p.add_argument("--protocol", choices=["paper", "loglik"], default="paper", help="chat, or likelihoods of the choices")
    p.add_argument("--allow-code-execution", action="store_true", help="run what the checkpoints write, in a sandbox")
    p.add_argument("--rescore", action="store_true", help="read the replies in OUT again; no checkpoint is opened, "
                   "the other flags are those of the run that asked for them")
    add_flags(p)
    a = p.parse_args()
    if a.protocol == "loglik" and a.repetition_penalty != 1.0:
        raise InputError("--repetition-penalty is for replies; --protocol loglik has none, leave it out")
    names = checkpoint_names(a.ckpt)
    work = {task: prepare(task, a) for task in dict.fromkeys(a.tasks)}
    rank, world = join(hours=7 * 24)                     # for two barriers: a rank may wait long for another
    if rank == 0:
        for task, questions in work.items():
            subjects = len({q["row"].get("subject") for q in questions})
            print(f"{task}: {len(questions)} questions" + (f", {subjects} subjects" if subjects > 1 else ""), flush=True)
    if a.rescore:
        said = recall(a, names, work)
    else:
        for source in a.ckpt:
            Tokenizer(Checkpoint(source))                # a broken one is better known now than in an hour
        said = collect(a, names, work, rank, world, own_device(a.device))
    leave_group()
    if rank:
        return

    results, samples = score(names, work, said, protocol_name(a))
    write_jsonl(os.path.join(a.out, "samples.jsonl"), samples)
    with atomic_write(os.path.join(a.out, "results.json")) as f:
        json.dump(results, f, indent=1)
    with atomic_write(os.path.join(a.out, "results.md")) as f:
        f.write(table(results))
    print(f"\n{table(results)}\nIn {a.out}: results.json, results.md, samples.jsonl (every prompt, reply and verdict)."
          "\nNext: the same command with another --ckpt or task added; replies that are there are not asked for again.")


if __name__ == "__main__":
    cli(main)
