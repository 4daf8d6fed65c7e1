"""Benchmarks of checkpoints, with standard errors and paired tests: one table for all checkpoints given.

    python eval.py --ckpt Qwen/Qwen2-0.5B-Instruct sft.pt --tasks gsm8k mmlu --limit 200 --out runs/eval

--protocol paper: greedy chat replies, read as the paper's scripts read them. --protocol loglik: five worked examples and
the likeliest of the letters, as lm-evaluation-harness asks it. A score belongs to its protocol; the two never share a
column. OUT/replies.jsonl grows with each reply: a run that is started again only asks what is missing.
"""
import argparse
import collections
import contextlib
import csv
import functools
import gc
import glob
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import tempfile
import urllib.request
import zlib

import torch
from huggingface_hub import hf_hub_download
from tqdm import tqdm

from chat import Tokenizer, read_jsonl
from generate import common_prefix, generate_iter
from loop import at_least
from model import Checkpoint, InputError, KVCache, Qwen2, atomic_write, cli
from verify import check, extract_choice, extract_code, extract_program, last_number, numbers_equal, run_program

# ---------------------------------------------------------------- the statistics


def mean_stderr(x):
    """Mean of n numbers and its standard error sqrt(s^2 / n), s^2 the sample variance (for 0/1: sqrt(p(1-p)/(n-1))).

    The standard error of a single number is not known: None.
    """
    n = len(x)
    mean = sum(x) / n
    return mean, math.sqrt(sum((v - mean) ** 2 for v in x) / (n - 1) / n) if n > 1 else None


def subjects_mean_stderr(x, subjects):
    """Mean over subjects of the subjects' means, and its standard error. x, subjects: n numbers and n names.

    The subjects are those of the benchmark, not a sample: only the questions vary, so the S subjects' squared errors
    add up, sqrt(sum_s se_s^2) / S. Where a subject has one question and so no se_s, the spread of the subjects' means
    stands in, sqrt(s^2 / S): too large rather than too small, as it also holds how much the subjects differ.
    """
    groups = collections.defaultdict(list)
    for value, subject in zip(x, subjects, strict=True):
        groups[subject].append(value)
    means, errors = zip(*(mean_stderr(group) for group in groups.values()))
    if None in errors:
        return mean_stderr(means)
    return sum(means) / len(means), math.sqrt(sum(e * e for e in errors)) / len(means)


def mcnemar(a, b):
    """Exact two-sided McNemar p-value of two lists of verdicts on the same questions.

    Under the null each of the n discordant questions falls to either side with probability 1/2:
    p = min(1, 2 P[Binomial(n, 1/2) <= the smaller side]).
    """
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n, term, total = only_a + only_b, 1, 0
    for i in range(min(only_a, only_b) + 1):             # exact integers: n may be thousands
        total += term                                    # term = C(n, i)
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * total / 2**n)


# ---------------------------------------------------------------- finding and reading the data

LETTERS = "ABCD"
GITHUB = "https://raw.githubusercontent.com/"
FOUR_SHOTS = "25974f0a5d980c8e6b432422e959cb3293b6d715a99a90d1a4c8ab1ae207c54f"       # SHA-256 of the rendered examples


def from_url(path, url, sha256=None, convert=lambda data: data):
    """Download one file, check it, and put it in its place whole."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise OSError("HF_HUB_OFFLINE is set")
    with urllib.request.urlopen(url, timeout=30) as reply:
        data = reply.read()
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError("the file's SHA-256 is not the expected one")
    data = convert(data)
    with atomic_write(path, "wb") as f:
        f.write(data)


def from_archive(path, repo, name, sha256):
    """Take a split's folder of CSV files (the last part of path) out of an archive in a Hugging Face dataset.

    sha256: of the rows (csv_digest), which unlike the archive's does not depend on how it was packed.
    """
    archive = hf_hub_download(repo, name, repo_type="dataset")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
        shutil.unpack_archive(archive, folder)
        found = glob.glob(os.path.join(folder, "**", os.path.basename(path)), recursive=True)
        split = next(f for f in sorted(found) if "__MACOSX" not in f)
        if csv_digest(split) != sha256:
            raise ValueError("the rows' SHA-256 is not the expected one")
        os.rename(split, path)                           # the split appears whole


def csv_digest(folder):
    h = hashlib.sha256()
    for path in sorted(glob.glob(os.path.join(folder, "*.csv"))):
        with open(path, encoding="utf-8-sig", newline="") as f:
            h.update(json.dumps([os.path.basename(path), list(csv.reader(f))]).encode())
    return h.hexdigest()


def four_shots(data):
    """chain-of-thought-hub's prompt file -> its first four examples as JSON Lines."""
    blocks = [block.partition("\nLet's think step by step\n") for block in data.decode().split("\n\n")[:4]]
    shots = [{"question": q.removeprefix("Question: "), "answer": a.strip()} for q, _, a in blocks]
    if hashlib.sha256(render_shots(shots).encode()).hexdigest() != FOUR_SHOTS:
        raise ValueError("its first four examples are not the protocol's")
    return "".join(json.dumps(shot) + "\n" for shot in shots).encode()


SCHOOL_MATH = "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/test.jsonl"
HARDEST = "FranxYao/chain-of-thought-hub/main/gsm8k/lib_prompt/prompt_hardest.txt"
HUMAN_EVAL = "openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data/HumanEval.jsonl.gz"
HOMES = {  # where a file, or the folder of a split, comes from when it is not below --data-dir; and its SHA-256
    "gsm8k/test.jsonl":
        (from_url, GITHUB + SCHOOL_MATH, "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    "gsm8k/paper_4shot.jsonl": (from_url, GITHUB + HARDEST, None, four_shots),
    "humaneval/HumanEval.jsonl.gz":
        (from_url, GITHUB + HUMAN_EVAL, "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"),
    "mmlu/dev":
        (from_archive, "cais/mmlu", "data.tar", "09f2ee249586ba2079587107b1d69edb433f70d84b4d81084cc9391bf9959381"),
    "mmlu/test":
        (from_archive, "cais/mmlu", "data.tar", "576a47c310f39cec7b41ae743af815e4eb411481e2556eab8b2695bbe0cd86ac"),
    "cmmlu/test":
        (from_archive, "haonan-li/cmmlu", "cmmlu_v1_0_1.zip",
         "3d3754e52e8149acd078a7fa6a3062187226d9568a5596392929ad2eda3c66c5"),
    "ceval/val":
        (from_archive, "ceval/ceval-exam", "ceval-exam.zip",
         "0fa0abf440a3c8e1b6f726844369c39b277c2e66471afe3cb88646a98b7f2845"),
}  # fmt: skip


def locate(data_dir, name):
    """The path of a benchmark's file or folder, downloaded if it is not there."""
    path = os.path.join(data_dir, name)
    if not os.path.exists(path):
        if name not in HOMES:
            raise InputError(f"{path}: no such file; give the folder that holds {name} as --data-dir")
        fetch, *where = HOMES[name]
        try:
            fetch(path, *where)
        except Exception as e:  # of many kinds: the network's, the hub's, the archive's, the disk's
            reason = (str(e).splitlines() or [""])[0] or type(e).__name__
            home = f"{where[1]} of huggingface.co/datasets/{where[0]}" if fetch is from_archive else where[0]
            home += " (its first four examples as JSON Lines of question and answer)" if four_shots in where else ""
            raise InputError(f"{path}: not there, and not to be downloaded ({reason}); put it there from {home}, "
                             "or give another --data-dir") from None
    return path


def choice_rows(folder, suffix, header):
    """Rows of a folder of CSV files, one per subject: question, four choices, the answer's letter."""
    rows = []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*" + suffix))):
        subject = os.path.basename(path)[: -len(suffix)]
        try:
            with open(path, encoding="utf-8-sig", newline="") as f:
                reader = csv.reader(f)
                names = [n.strip() for n in next(reader, [])] if header else ["question", *LETTERS, "answer"]
                names = [n if n in LETTERS else n.lower() for n in names]
                if not {"question", *LETTERS, "answer"} <= set(names):
                    raise InputError(f"{path}:1: the header is {names}; it needs question, A, B, C, D and answer")
                for i, cells in enumerate(line for line in reader if line):
                    row = dict(zip(names, cells))
                    if len(cells) != len(names) or row["answer"].strip() not in tuple(LETTERS):
                        raise InputError(f"{path}:{reader.line_num}: expected {len(names)} columns, the answer one of "
                                         f"A, B, C, D; found {len(cells)} columns: fetch the file again")
                    rows.append({"id": f"{subject}/{i}", "subject": subject, "question": row["question"],
                                 "choices": {x: row[x] for x in LETTERS}, "answer": row["answer"].strip()})
        except (OSError, UnicodeDecodeError, csv.Error) as e:
            raise InputError(f"{path}: cannot be read: {e}; fetch it again") from None
    if not rows:
        raise InputError(f"{folder}: no rows in files named *{suffix}; see the layout in the README")
    return rows


def json_rows(path, keys):
    """Rows of a JSON Lines file (gzipped by its suffix); every row has the keys, all strings but `reference`."""
    if path.endswith(".gz"):
        try:
            with gzip.open(path, "rt", encoding="utf-8") as f:
                rows = [(i, json.loads(line)) for i, line in enumerate(f, 1) if line.strip()]
        except (OSError, EOFError, ValueError, zlib.error) as e:
            raise InputError(f"{path}: not gzipped JSON Lines: {e}; fetch it again") from None
    else:
        rows = list(read_jsonl(path))
    for number, row in rows:
        for key in keys:
            if not isinstance(row, dict) or not isinstance(row.get(key), dict if key == "reference" else str):
                raise InputError(f"{path}:{number}: {key!r} is missing or of a wrong type; a row has {', '.join(keys)}")
    if not rows:
        raise InputError(f"{path}: no rows")
    return [{"id": f"{i}", **row, "where": f"{path}:{n}"} for i, (n, row) in enumerate(rows)]


# ---------------------------------------------------------------- the benchmarks: rows, prompts, verdicts

INSTRUCTION = ("The following is a multiple-choice question. Please choose the most suitable one among A, B, C and D "
               "as the answer to this question.\n\n")


def lettered(choices):
    return "".join(f"{letter}. {text}\n" for letter, text in choices.items())


def choice_verdict(reply, row, stem=None):
    letter = extract_choice(reply, row["choices"], stem)
    return letter, letter == row["answer"]


def render_shots(shots):
    return "".join(f"Question: {s['question']}\nLet's think step by step\n{s['answer']}\n\n" for s in shots)


def gsm8k_rows(find):
    rows = json_rows(find("gsm8k/test.jsonl"), ("question", "answer"))
    shots = render_shots(json_rows(find("gsm8k/paper_4shot.jsonl"), ("question", "answer")))
    for row in rows:
        if last_number(row["answer"]) is None:
            raise InputError(f"{row['where']}: the answer has no number")
    return [{**row, "shots": shots} for row in rows]


def gsm8k_verdict(reply, row):
    value = last_number(reply)
    return value, numbers_equal(value, last_number(row["answer"]))


def humaneval_rows(find):
    rows = json_rows(find("humaneval/HumanEval.jsonl.gz"), ("task_id", "prompt", "entry_point", "test"))
    for row in rows:
        # the first triple-quoted text of the prompt, as the protocol has it, also where that is a helper's
        row["signature"] = re.search(rf"def\s+({re.escape(row['entry_point'])}.*?):\s*\n", row["prompt"])
        row["docstring"] = re.search(r'(?:"""|\'\'\')(.*?)(?:"""|\'\'\')', row["prompt"], re.DOTALL)
        if not (row["signature"] and row["docstring"]):
            raise InputError(f"{row['where']}: the prompt has no definition of {row['entry_point']} or no docstring")
    return [{**row, "id": row["task_id"]} for row in rows]


def humaneval_prompt(row):
    problem = "\n".join(line.strip() for line in row["docstring"].group(1).split("\n"))
    head = f"Write a Python function `{row['signature'].group(1)}` to solve the following problem:\n"
    return f"{head}{problem}\n{row['prompt']}"


def humaneval_verdict(reply, row):
    body = extract_code(reply, row["entry_point"])
    return body, run_program(f"{row['prompt']}{body}\n{row['test']}\ncheck({row['entry_point']})")[0]


def demo_rows(find):
    rows = json_rows(find("demo/heldout.jsonl"), ("prompt", "reference"))
    return [{"subject": row.get("task", ""), **row, "id": str(row["id"])} for row in rows]


def demo_verdict(reply, row):
    kind, value = row["reference"].get("kind"), row["reference"].get("value")
    correct = check(kind, reply, value)
    if correct is None:
        raise InputError(f"{row['where']}: the reference cannot be checked; see the kinds in verify.py")
    readers = {"number": last_number, "choice": lambda text: extract_choice(text, value["choices"]),
               "code": lambda text: extract_program(text, value.get("entry_point"))}
    return readers.get(kind, str.strip)(reply), correct


# One entry per benchmark. rows(find): its questions, find(name) being the path of a file of HOMES. prompt(row): the
# user turn. verdict(reply, row): (what was read, whether it is right). over: what the score averages over. shots, for
# loglik: the worked examples' folder, suffix and header, the line before them for a subject, the word before a letter.
BENCHMARKS = {
    "demo": dict(
        rows=demo_rows,
        prompt=lambda row: row["prompt"],
        verdict=demo_verdict,
        over="questions",
    ),
    "gsm8k": dict(
        rows=gsm8k_rows,
        prompt=lambda row: f"{row['shots']}Question: {row['question']}\nLet's think step by step",
        verdict=gsm8k_verdict,
        over="questions",
    ),
    "mmlu": dict(
        rows=lambda find: choice_rows(find("mmlu/test"), "_test.csv", header=False),
        prompt=lambda row: f"{INSTRUCTION}{row['question']}\n{lettered(row['choices'])}",
        verdict=choice_verdict,
        over="questions",
        shots=("mmlu/dev", "_dev.csv", False, "The following are multiple choice questions (with answers) about {}.",
               "Answer:"),
    ),
    "cmmlu": dict(
        rows=lambda find: choice_rows(find("cmmlu/test"), ".csv", header=True),
        prompt=lambda row: f"{INSTRUCTION}{row['question']}\n{lettered(row['choices'])}",
        verdict=choice_verdict,
        over="questions",
    ),
    "ceval": dict(
        rows=lambda find: choice_rows(find("ceval/val"), "_val.csv", header=True),
        prompt=lambda row: f"{row['question']}\n\n{lettered(row['choices'])}",
        verdict=lambda reply, row: choice_verdict(reply, row, stem=row["question"]),
        over="subjects",
    ),
    "humaneval": dict(rows=humaneval_rows, prompt=humaneval_prompt, verdict=humaneval_verdict, over="questions"),
}


def spread(rows, limit):
    """The first `limit` rows taken in turn from each subject (first questions first), in the order of the file."""
    rank, taken = collections.Counter(), []
    for i, row in enumerate(rows):
        taken.append((rank[row.get("subject")], i))
        rank[row.get("subject")] += 1
    return [rows[i] for i in sorted(i for _, i in sorted(taken)[:limit])]


# ---------------------------------------------------------------- asking a checkpoint


def five_shot_contexts(rows, shots, find):
    """lm-evaluation-harness's context for each row: a line on the subject, five worked examples, the question."""
    name, suffix, header, line, word = shots
    examples = collections.defaultdict(list)

    def block(row):
        return f"{row['question'].strip()}\n{lettered(row['choices'])}{word}"

    for row in choice_rows(find(name), suffix, header):
        examples[row["subject"]].append(f"{block(row)} {row['answer']}\n\n")
    return [f"{line.format(row['subject'].replace('_', ' '))}\n\n{''.join(examples[row['subject']][:5])}{block(row)}"
            for row in rows]


@torch.no_grad()
def letter_logps(m, tokenizer, contexts):
    """[log P(" A" | context), ... " D"] for each of the contexts, whose common prefix is computed once.

    Context and letter are encoded together and split at the context's own length, as the harness does.
    """
    starts = [len(tokenizer.encode(context)) for context in contexts]
    wholes = [[tokenizer.encode(f"{context} {letter}") for letter in LETTERS] for context in contexts]
    # one feed per context where " A" is a single token
    feeds = list(dict.fromkeys(tuple(ids[:-1]) for four in wholes for ids in four))
    longest = max(map(len, feeds))
    if longest > m.config.max_position_embeddings:
        end = m.config.max_position_embeddings
        raise InputError(f"a five-shot prompt takes {longest} tokens; the model ends at {end}")
    shared = min(common_prefix(feeds) if len(feeds) > 1 else 0, min(starts) - 1)
    cache = KVCache(m.config, len(feeds), longest, m.compute_dtype or m.head_weight.dtype, m.device)
    if shared:
        cache.lengths = [0]
        m.hidden(torch.tensor([feeds[0][:shared]], device=m.device), [shared], cache)
        for x in (cache.k, cache.v):
            x[:, 1:, :, :shared] = x[:, :1, :, :shared]
    cache.lengths = [shared] * len(feeds)
    rest = [len(feed) - shared for feed in feeds]
    ids = torch.tensor([[t for feed in feeds for t in feed[shared:]]], device=m.device)          # (1, T)
    hidden = dict(zip(feeds, m.hidden(ids, rest, cache)[0].split(rest)))                         # feed -> (tokens, C)

    def logp(ids, start):
        table = m.head(hidden[tuple(ids[:-1])][start - 1 - shared:]).float().log_softmax(-1)  # (the letter's tokens, V)
        return table.gather(1, torch.tensor(ids[start:], device=m.device)[:, None]).sum().item()

    return [[logp(ids, start) for ids in four] for start, four in zip(starts, wholes)]


def ask(m, tokenizer, questions, a):
    """Yields (index, what the checkpoint said) as each question is done. questions: the dicts of prepare()."""
    if a.protocol == "loglik":
        for _, group in itertools.groupby(range(len(questions)), key=lambda i: questions[i]["row"]["subject"]):
            group = list(group)
            for part in (group[i : i + a.batch_size] for i in range(0, len(group), a.batch_size)):
                contexts = [questions[i]["messages"][0]["content"] for i in part]
                for i, logps in zip(part, letter_logps(m, tokenizer, contexts)):
                    yield i, {"reply": LETTERS[max(range(4), key=logps.__getitem__)], "logps": logps}
        return
    prompts = [q["messages"] for q in questions]
    room = m.config.max_position_embeddings - max(len(tokenizer.prompt_ids(p)) for p in prompts)
    most = max(1, min(a.max_new_tokens, room))           # without room for any reply, generate says so
    for i, reply, finish in generate_iter(m, tokenizer, prompts, max_new_tokens=most, batch_size=a.batch_size):
        yield i, {"reply": reply, "finish_reason": finish}


# ---------------------------------------------------------------- the table


def checkpoint_names(sources):
    """Short names, the last part of each path without .pt, if they differ; else the sources as they were given."""
    short = [os.path.basename(s.rstrip("/")).removesuffix(".pt") for s in sources]
    names = short if len(set(short)) == len(sources) else list(sources)
    if len(set(names)) < len(names):
        raise InputError(f"--ckpt: {max(names, key=names.count)} is given twice")
    return names


def summarise(verdicts, subjects, over, first=None):
    """Score, standard error, n; against the first checkpoint's verdicts also the paired difference and its p-value."""
    def average(x):
        return subjects_mean_stderr(x, subjects) if over == "subjects" else mean_stderr(x)

    score, stderr = average([float(v) for v in verdicts])
    cell = {"score": score, "stderr": stderr, "n": len(verdicts)}
    if first is not None:
        difference, error = average([float(v) - float(w) for v, w in zip(verdicts, first, strict=True)])
        cell["vs_first"] = {"difference": difference, "stderr": error, "p": mcnemar(verdicts, first)}
    return cell


def table(results):
    """results.json's content as a Markdown table in percent; the first row is what the others are compared with."""
    def text(cell):
        error = "?" if cell["stderr"] is None else f"{100 * cell['stderr']:.1f}"
        versus = cell.get("vs_first")
        return f"{100 * cell['score']:.1f} ± {error}" + (
            f" ({100 * versus['difference']:+.1f}, p = {versus['p']:.2g})" if versus else "")

    first = next(iter(results))
    head = [f"{task} ({cell['protocol']}, n = {cell['n']})" for task, cell in results[first].items()]
    lines = [["checkpoint", *head], ["---"] * (len(head) + 1)]
    lines += [[name, *(text(cell) for cell in cells.values())] for name, cells in results.items()]
    note = "Percent ± one standard error"
    if len(results) > 1:
        note += f"; in brackets the difference to {first} on the same questions and its exact McNemar p-value"
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{note}.\n"


# ---------------------------------------------------------------- the run


def prepare(task, a):
    """The questions of a task: [{"row", "messages"}]. Refuses whatever can be refused before anything is run."""
    if task not in BENCHMARKS:
        raise InputError(f"--tasks: unknown task {task!r}; known are {', '.join(BENCHMARKS)}")
    bench = BENCHMARKS[task]
    if a.protocol == "loglik" and "shots" not in bench:
        able = ", ".join(name for name, b in BENCHMARKS.items() if "shots" in b)
        raise InputError(f"--protocol loglik is not implemented for {task}, only for {able}; use --protocol paper")
    closed = InputError(f"{task} runs programs that the checkpoints write; allow that with --allow-code-execution")
    if task == "humaneval" and not a.allow_code_execution:
        raise closed
    find = functools.partial(locate, a.data_dir)
    rows = bench["rows"](find)
    rows = spread(rows, a.limit or len(rows))
    if any(row.get("reference", {}).get("kind") == "code" for row in rows) and not a.allow_code_execution:
        raise closed
    turns = map(bench["prompt"], rows) if a.protocol == "paper" else five_shot_contexts(rows, bench["shots"], find)
    return [{"row": row, "messages": [{"role": "user", "content": turn}]} for row, turn in zip(rows, turns)]


def open_replies(out):
    """OUT/replies.jsonl -> ({key: what was said}, the file to append to). A line that was cut short is passed over."""
    path, replies = os.path.join(out, "replies.jsonl"), {}
    try:
        os.makedirs(out, exist_ok=True)
        log = open(path, "a+", encoding="utf-8", errors="replace")
    except OSError as e:
        raise InputError(f"{path}: cannot be written: {e.strerror}; give another --out") from None
    log.seek(0)
    line = "\n"
    for line in log:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            replies[record["key"]] = record
    if not line.endswith("\n"):
        log.write("\n")
    return replies, log


def main():
    describe = {"description": __doc__.split("\n\n")[0], "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    p = argparse.ArgumentParser(**describe)
    p.add_argument("--ckpt", nargs="+", required=True, help="hub ids, directories, .pt files; first the baseline")
    p.add_argument("--out", required=True, help="directory of results.json, results.md, samples.jsonl")
    # questions
    p.add_argument("--tasks", nargs="+", required=True, help=f"of {', '.join(BENCHMARKS)}")
    p.add_argument("--data-dir", default="data", help="where the benchmarks lie, or are downloaded to")
    p.add_argument("--limit", type=at_least(1), help="questions per task, in turn from its subjects; default all")
    p.add_argument("--protocol", choices=["paper", "loglik"], default="paper", help="chat, or 5-shot letters")
    p.add_argument("--allow-code-execution", action="store_true", help="run what the checkpoints write, in a sandbox")
    # generation
    p.add_argument("--max-new-tokens", type=at_least(1), default=1000, help="most tokens of a reply")
    p.add_argument("--batch-size", type=at_least(1), default=32, help="questions in flight; changes no reply")
    # machine
    p.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of weights and computation")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    a = p.parse_args()
    names = checkpoint_names(a.ckpt)
    work = {task: prepare(task, a) for task in dict.fromkeys(a.tasks)}
    for source in a.ckpt:
        Tokenizer(Checkpoint(source))                    # a broken one is better known now than in an hour
    for task, questions in work.items():
        subjects = len({q["row"].get("subject") for q in questions})
        print(f"{task}: {len(questions)} questions" + (f", {subjects} subjects" if subjects > 1 else ""), flush=True)

    replies, log = open_replies(a.out)
    results, samples, first = {}, [], {}
    for source, name in zip(a.ckpt, names):
        ckpt, m = Checkpoint(source), None               # m: loaded when there is something to ask; one in memory
        tokenizer, fingerprint, results[name] = Tokenizer(ckpt), ckpt.fingerprint(), {}
        for task, questions in work.items():
            settings = [fingerprint, sorted(tokenizer.stop_ids), task, a.protocol, a.dtype, a.max_new_tokens]
            keys = [hashlib.sha256(json.dumps([*settings, q["messages"]]).encode()).hexdigest() for q in questions]
            todo = [i for i, key in enumerate(keys) if key not in replies]
            if todo and m is None:
                m = Qwen2.from_pretrained(ckpt, {"fp32": torch.float32, "bf16": torch.bfloat16}[a.dtype], a.device)
            asked = ask(m, tokenizer, [questions[i] for i in todo], a) if todo else ()
            for j, record in tqdm(asked, f"{name} {task}", total=len(todo), disable=None):
                i = todo[j]
                replies[keys[i]] = record
                line = {"key": keys[i], "checkpoint": name, "task": task, "id": questions[i]["row"]["id"], **record}
                log.write(json.dumps(line, ensure_ascii=False) + "\n")
                log.flush()

            verdicts, cut = [], 0                        # always anew, also for earlier replies: reading is cheap
            for key, q in zip(tqdm(keys, f"{name} {task}: verdicts", disable=None, leave=False), questions):
                row = q["row"]
                said = {k: v for k, v in replies[key].items() if k in ("reply", "finish_reason", "logps")}
                if a.protocol == "loglik":
                    extracted, correct = said["reply"], said["reply"] == row["answer"]
                else:
                    extracted, correct = BENCHMARKS[task]["verdict"](said["reply"], row)
                verdicts.append(correct)
                cut += said.get("finish_reason") == "length"
                samples.append({"checkpoint": name, "task": task, "id": row["id"], "prompt": q["messages"], **said,
                                "extracted": extracted, "correct": correct, "protocol": a.protocol})
            subjects = [q["row"].get("subject") for q in questions]
            cell = summarise(verdicts, subjects, BENCHMARKS[task]["over"], first.get(task))
            results[name][task] = {**cell, "protocol": a.protocol, "cut_short": cut}
            first.setdefault(task, verdicts)
        del m
        gc.collect()
    log.close()

    with atomic_write(os.path.join(a.out, "samples.jsonl")) as f:
        f.writelines(json.dumps(s, ensure_ascii=False) + "\n" for s in samples)
    with atomic_write(os.path.join(a.out, "results.json")) as f:
        json.dump(results, f, indent=1)
    with atomic_write(os.path.join(a.out, "results.md")) as f:
        f.write(table(results))
    print(f"\n{table(results)}\nIn {a.out}: results.json, results.md, samples.jsonl (every prompt, reply and verdict)."
          "\nNext: another --ckpt or task with the same --out; replies that are there are not asked for again.")


if __name__ == "__main__":
    cli(main)
