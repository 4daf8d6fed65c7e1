"""Alignment data guided by a large model: from open instructions to sft.jsonl and kto.jsonl, in six steps.

    python make_data.py --sources 'data/*.json*' --teacher http://localhost:8000/v1 --teacher-model Qwen2.5-7B-Instruct \\
        --small Qwen/Qwen2-0.5B-Instruct --out data/aligned

Each step reads one JSON Lines file and writes the next, beside N_*.dropped.jsonl with what it left out and why:
1_collect, 2_dedup, 3_classify, 4_balance, 5_respond, 6_score, then sft.jsonl, kto.jsonl, report.md and report.json.
A step whose input and arguments are unchanged is not run again; one that was killed goes on from the replies in
replies.jsonl. The method is that of arXiv 2411.02939; where an answer can be verified, verification outranks every score.
"""

import argparse
import contextlib
import glob
import hashlib
import json
import math
import os
import random
from collections import Counter, defaultdict

import numpy as np
from tqdm import tqdm

import dedup
import sources
import teacher as models
import verify
from chat import read_jsonl
from model import InputError, atomic_write, cli
from prompts import (
    AGAIN_CLASSIFY, AGAIN_JUDGE, CLASSIFY, JUDGE,
    category_name, classify_request, clip, judge_request, parse_category, parse_grades, render,
)  # fmt: skip
from tasktypes import language, task_type

WRITERS = ("original", "teacher", "small")
STEPS = ("1_collect", "2_dedup", "3_classify", "4_balance", "5_respond", "6_score", "7_label")
CHUNK = 10_000  # records held in memory while models are asked

# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic of balancing, scoring and labelling


def water_level(counts, target):
    """counts: {category: n} -> (quotas, level): the most even quotas <= n whose sum is `target` (or all).

    Categories up to the level stay whole, the others are cut to the level; the remainder of the division goes one each to
    the largest. No quota exceeds level + 1."""
    order = sorted(counts, key=lambda c: (counts[c], c))
    quotas, left = {}, min(target, sum(counts.values()))
    level = max(counts.values(), default=0)
    for i, c in enumerate(order):
        share, rest = divmod(left, len(order) - i)
        if counts[c] <= share:
            quotas[c] = counts[c]
            left -= counts[c]
        else:
            level = share
            quotas |= {c: share + (k >= len(order) - i - rest) for k, c in enumerate(order[i:])}
            break
    return quotas, level


def evenness(counts):
    """{category: n} -> (entropy in nats, exp(entropy): the number of equally filled categories that would have it)."""
    n = np.array([c for c in counts.values() if c], float)
    entropy = float(-(n / n.sum() * np.log(n / n.sum())).sum()) if len(n) else 0.0
    return entropy, math.exp(entropy)


def composite(verified, quality, safety, perplexity, weights):
    """The score that orders the responses to one instruction:

        2 if verified, -2 if refuted, 0 if unknown  +  (wq*Q + ws*S + wp*P) / (wq + ws + wp)
        Q = (quality - 1) / 4,  S = (safety - 1) / 4,  P = 1 / perplexity,  each in [0, 1]

    so that what a program checked outranks every judgement. Ungraded: Q = 1/2, S = 1; without perplexity P = 0. P is the
    geometric mean of the token probabilities under the small model: of two equals the one nearer to it is easier to learn.
    weights: (wq, ws, wp). The formula is ours: the paper names the ingredients only."""
    q = 0.5 if quality is None else (quality - 1) / 4
    s = 1.0 if safety is None else (safety - 1) / 4
    p = 0.0 if perplexity is None else 1 / perplexity
    wq, ws, wp = weights
    return {True: 2, False: -2, None: 0}[verified] + (wq * q + ws * s + wp * p) / (wq + ws + wp)


def choose(scores, margin, min_safety):
    """scores: {writer: {"verified", "quality", "safety", "composite"}} -> (best, worst, why).

    best: the writer whose response SFT learns and KTO desires, None when even it is refuted or unsafe. worst: the one KTO
    rejects, None where there is no pair: the two score within the margin, or the worst is verified and so no bad example."""
    order = sorted(scores, key=lambda w: (-scores[w]["composite"], WRITERS.index(w)))
    best, worst = order[0], order[-1]
    if scores[best]["verified"] is False:
        return None, None, "every response failed verification"
    if scores[best]["safety"] is not None and scores[best]["safety"] < min_safety:
        return None, None, "the best response is unsafe"
    if len(order) == 1:
        return best, None, "only one response"
    if scores[worst]["verified"] is True:
        return best, None, "all responses verified"
    if scores[best]["composite"] - scores[worst]["composite"] < margin - 1e-9:
        return best, None, "no difference in quality"
    return best, worst, "pair"


# ---------------------------------------------------------------------------------------------------------------------
# The steps. Each reads records and yields lines: (True, record) for its file, (False, {"id", "reason", ...}) for what it
# drops, and fills `counts` with whatever else the report should say.


def dropped(record, reason, **more):
    return False, {"id": record["id"], "reason": reason, **more, "instruction": clip(render(record["prompt"]), 200)}


def collect(args, files, counts):
    """Step 1: every source in its own shape -> one record each, with its task type by rule."""
    counts["by source"] = {}
    for path, label in zip(files, sources.labels(files)):
        taken = 0
        for n, (line, obj) in enumerate(tqdm(sources.read_objects(path), desc=label, unit="record", disable=None), 1):
            if args.limit and taken >= args.limit:
                break
            try:
                found = sources.instructions(obj, f"{path}:{line}", args.max_chars)
            except sources.Drop as reason:
                yield False, {"id": f"{label}:{n}", "reason": str(reason)}
                continue
            for i, record in enumerate(found):
                text = record["prompt"][-1]["content"]
                about = {"language": language(text), "task_type": task_type(text)}
                # the n-th record, not the line: an array may stand on one line
                name = f"{label}:{n}" + (f".{i}" if len(found) > 1 else "")
                yield True, {"id": name, "source": label, **record, **about}
            taken += len(found)
        counts["by source"][label] = taken


def deduplicate(args, path, questions, counts):
    """Step 2: near duplicates by simhash of the prompt, and instructions that an evaluation set holds too."""
    texts = lambda: (render(r["prompt"]) for _, r in read_jsonl(path))  # noqa: E731  (read again, not held)
    hashes = dedup.simhash(tqdm(texts(), desc="simhash", unit="record", disable=None))
    # the better copy: one whose answer can be checked, then the longer response (none is 0), then the first
    merit = [(r["reference"] is None, -min(len(r["response"] or ""), 2000)) for _, r in read_jsonl(path)]
    rank = np.empty(len(merit), np.int64)
    rank[sorted(range(len(merit)), key=lambda i: (*merit[i], i))] = np.arange(len(merit))
    keep, twin = dedup.keep_best(hashes, rank, args.hamming)
    grams = dedup.ngram_set(q for p in questions for q in sources.evaluation_questions(p))
    seen = dedup.shares_ngram(texts(), grams)
    names = [r["id"] for _, r in read_jsonl(path)]
    for i, (_, record) in enumerate(read_jsonl(path)):
        if seen[i]:
            yield dropped(record, "shares a 13-gram with an evaluation question")
        elif not keep[i] and not seen[twin[i]]:
            yield dropped(record, "near duplicate", of=names[twin[i]])
        elif not keep[i]:
            yield dropped(record, "near duplicate of an evaluation question", of=names[twin[i]])
        else:
            yield True, record


def ask_parsed(teacher, requests, parse, again, cache, options, desc):
    """Asks, and asks once more, with the words `again`, what did not parse. parse(i, text) -> value or None.
    -> ([(value or None, reason)], how many were asked again)"""
    replies = models.ask(teacher, requests, cache, desc=desc, **options)
    out = [(parse(i, r.get("text", "")), f"the teacher failed: {r.get('error', '')[:60]}") for i, r in enumerate(replies)]
    failed = [i for i, r in enumerate(replies) if out[i][0] is None and "error" not in r]
    second = [[*requests[i], {"role": "assistant", "content": clip(replies[i]["text"], 500) or "(nothing)"},
               {"role": "user", "content": again}] for i in failed]  # fmt: skip
    for i, reply in zip(failed, models.ask(teacher, second, cache, desc=f"{desc}, again", **options)):
        out[i] = (parse(i, reply.get("text", "")), "the teacher's reply did not parse, twice")
    return out, len(failed)


def classify(args, path, teacher, cache, options, counts):
    """Step 3: a primary and a secondary category from the teacher."""
    spellings, counts["asked again"] = defaultdict(set), 0
    for batch in dedup.chunks((r for _, r in read_jsonl(path)), CHUNK):
        requests = [classify_request(r["prompt"]) for r in batch]
        read = lambda i, text: parse_category(text)  # noqa: E731
        parsed, again = ask_parsed(teacher, requests, read, AGAIN_CLASSIFY, cache, options, "classify")
        counts["asked again"] += again
        for record, (value, reason) in zip(batch, parsed):
            if value is None:
                yield dropped(record, reason)
                continue
            name = category_name(value[1])
            spellings[name].add(value[1])
            yield True, record | {"primary": value[0], "secondary": name}
    counts["merged spellings"] = {name: sorted(s) for name, s in sorted(spellings.items()) if len(s) > 1}


def balance(args, path, counts):
    """Step 4: rare secondary categories go, the others are sampled down to one water level. Which records of a category
    stay is drawn by a hash of seed and id: the same whatever the order of the input."""
    names, keys = [], []
    for _, r in read_jsonl(path):
        names.append(f"{r['primary']}/{r['secondary']}")
        keys.append(hashlib.sha256(f"{args.seed}:{r['id']}".encode()).digest()[:8])
    before = Counter(names)
    quotas, level = water_level({c: n for c, n in before.items() if n >= args.min_category}, args.target)
    left, chosen = dict(quotas), set()
    for i in sorted(range(len(names)), key=lambda i: keys[i]):
        if left.get(names[i], 0):
            left[names[i]] -= 1
            chosen.add(i)
    for i, (_, record) in enumerate(read_jsonl(path)):
        if i in chosen:
            yield True, record
        elif names[i] in quotas:
            yield dropped(record, "over the water level", category=names[i])
        else:
            yield dropped(record, f"category with fewer than {args.min_category}", category=names[i])
    counts |= {"water level": level, "before": dict(before.most_common()), "after": dict(Counter(quotas).most_common())}


def respond(args, path, teacher, small, cache, options, counts):
    """Step 5: the original response, the teacher's and the small model's. One that is empty or was cut off is left out."""
    counts["left out"] = Counter()
    for batch in dedup.chunks((r for _, r in read_jsonl(path)), CHUNK):
        prompts = [r["prompt"] for r in batch]
        replies = {w: models.ask(m, prompts, cache, desc=f"respond: {w}", **options)
                   for w, m in (("teacher", teacher), ("small", small))}  # fmt: skip
        for i, record in enumerate(batch):
            original = record.pop("response")
            texts = {"original": {"text": original or "", "finish_reason": "stop"}, **{w: r[i] for w, r in replies.items()}}
            record["responses"] = {}
            for writer, reply in texts.items():
                text = sources.clean(reply.get("text", ""))
                why = "refused by the endpoint" if "error" in reply else "empty" if not text else \
                    "cut off" if reply["finish_reason"] == "length" else None  # fmt: skip
                if why:
                    counts["left out"][f"{writer}: {why}"] += 1
                else:
                    record["responses"][writer] = {"text": text}
            yield (True, record) if record["responses"] else dropped(record, "no response is left")


def perplexities(scorer, pairs, max_len, micro_tokens):
    """pairs: [(prompt, response text)] -> exp(-mean log p) of each response's tokens under the scorer, its <|im_end|> and
    newline included; None for a prompt that fills max_len tokens alone."""
    from loop import sequence_logps

    m, tokenizer = models.load(scorer)
    examples = []
    for prompt, text in pairs:
        context, reply = tokenizer.prompt_ids(prompt), tokenizer.completion_ids(text)
        examples.append(((context + reply)[:max_len], ([False] * len(context) + [True] * len(reply))[:max_len]))
    n = [sum(supervised) for _, supervised in examples]
    some = [i for i in range(len(pairs)) if n[i]]
    out = [None] * len(pairs)
    if some:
        for i, logp in zip(some, sequence_logps(m, [examples[i] for i in some], micro_tokens).tolist()):
            out[i] = round(math.exp(min(-logp / n[i], 50.0)), 4)
    return out


def score(args, path, teacher, scorer, cache, options, counts):
    """Step 6: verification, perplexity, and the teacher's grades for quality and safety. Equal texts are scored once.

    All responses to an instruction are judged in one request, under letters dealt by the seed. Where verification has a
    verdict on each of them the judge is not asked, unless --judge-verified: what it could add is not worth its price, and
    the responses then count as safe."""
    counts |= {"verification": {w: {"checked": 0, "right": 0} for w in WRITERS}, "asked again": 0, "judged": 0,
               "judge against verification": {"comparisons": 0, "agrees": 0, "ties": 0}}  # fmt: skip
    weights = (args.weight_quality, args.weight_safety, args.weight_perplexity)
    for batch in dedup.chunks((r for _, r in read_jsonl(path)), CHUNK):
        found = [{} for _ in batch]  # per record {text: {"verified", "quality", "safety", "perplexity"}}
        for record, texts in zip(tqdm(batch, desc="verify", unit="record", disable=None), found):
            reference = record["reference"]
            for response in record["responses"].values():
                if response["text"] not in texts:
                    verdict = None
                    if reference and (reference["kind"] != "code" or args.allow_code_execution):
                        verdict = verify.check(reference["kind"], response["text"], reference["value"])
                    texts[response["text"]] = {"verified": verdict, "quality": None, "safety": None}
        flat = [(i, text) for i, texts in enumerate(found) for text in texts]
        scored = [(batch[i]["prompt"], text) for i, text in flat]
        for (i, text), p in zip(flat, perplexities(scorer, scored, args.max_len, args.micro_tokens)):
            found[i][text]["perplexity"] = p

        unknown = [any(t["verified"] is None for t in texts.values()) for texts in found]
        judged = [i for i in range(len(batch)) if unknown[i] or args.judge_verified]
        letters = []
        for i in judged:
            order = sorted(found[i])  # sorted, then dealt: the letter tells nothing of the writer
            random.Random(f"{args.seed}:{batch[i]['id']}").shuffle(order)
            letters.append(dict(zip("ABC", order)))
        requests = [judge_request(batch[i]["prompt"], shown) for i, shown in zip(judged, letters)]
        read = lambda k, text: parse_grades(text, letters[k])  # noqa: B023, E731  (used within this turn of the loop)
        grades, again = ask_parsed(teacher, requests, read, AGAIN_JUDGE, cache, options, "judge")
        counts["judged"] += len(judged)
        counts["asked again"] += again
        failed = {}
        for i, shown, (value, reason) in zip(judged, letters, grades):
            if value is not None:
                for letter, text in shown.items():
                    found[i][text]["quality"], found[i][text]["safety"] = value[letter]
                compare_judge(found[i].values(), counts["judge against verification"])
            elif unknown[i]:
                failed[i] = reason
        for i, record in enumerate(batch):
            if i in failed:
                yield dropped(record, failed[i])
                continue
            for writer, response in record["responses"].items():
                s = found[i][response["text"]]
                total = composite(s["verified"], s["quality"], s["safety"], s["perplexity"], weights)
                response |= s | {"composite": round(total, 6)}
                if s["verified"] is not None:
                    counts["verification"][writer]["checked"] += 1
                    counts["verification"][writer]["right"] += s["verified"]
            yield True, record


def compare_judge(texts, counts):
    """How often the judge grades a verified response above a refuted one of the same instruction."""
    texts = list(texts)
    for right in (t for t in texts if t["verified"] is True):
        for wrong in (t for t in texts if t["verified"] is False):
            counts["comparisons"] += 1
            counts["agrees"] += right["quality"] > wrong["quality"]
            counts["ties"] += right["quality"] == wrong["quality"]


def label(args, path, counts):
    """The labels: yields ("sft" or "kto", line) with each line's provenance."""
    counts |= {"outcomes": Counter(), "best": Counter(), "worst": Counter()}
    for _, r in read_jsonl(path):
        best, worst, why = choose(r["responses"], args.margin, args.min_safety)
        counts["outcomes"][why] += 1
        about = {k: r[k] for k in ("id", "source", "language", "task_type")}
        about["category"] = f"{r['primary']}/{r['secondary']}"

        def line(writer, **fields):
            scores = {k: v for k, v in r["responses"][writer].items() if k != "text"}
            return {**fields, **about, "writer": writer, "scores": scores}

        def reply(writer):
            return [{"role": "assistant", "content": r["responses"][writer]["text"]}]

        if best:
            counts["best"][best] += 1
            yield "sft", line(best, messages=r["prompt"] + reply(best))
        if best and worst:
            counts["worst"][worst] += 1
            yield "kto", line(best, prompt=r["prompt"], completion=reply(best), label=True)
            yield "kto", line(worst, prompt=r["prompt"], completion=reply(worst), label=False)


# ---------------------------------------------------------------------------------------------------------------------
# Running the steps


def file_hash(path):
    h = hashlib.sha256()
    try:
        with open(path, "rb") as f:
            while block := f.read(1 << 20):
                h.update(block)
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror or e}") from None
    return h.hexdigest()


def load_state(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise InputError(f"{path}: corrupt: {e}; delete it to run the steps again (no reply is asked twice)") from None


def save_state(path, state):
    with atomic_write(path) as f:
        json.dump(state, f, indent=1, ensure_ascii=False)


def run_step(out, state, name, inputs, arguments, work):
    """Runs work(counts), an iterator of (kind, line), into its files, unless they are there and came of the same input and
    arguments. kind True or False: the step's own file or its .dropped file; a text: that file. A file that was edited by hand
    since is kept, and what follows it is made anew. -> the step's counts."""
    files = {k: f"{out}/{k}.jsonl" for k in ("sft", "kto")} if name == STEPS[-1] else \
        {True: f"{out}/{name}.jsonl", False: f"{out}/{name}.dropped.jsonl"}  # fmt: skip
    key = hashlib.sha256(json.dumps([arguments, [file_hash(p) for p in inputs]], sort_keys=True).encode()).hexdigest()
    reused = state.get(name, {}).get("key") == key and all(map(os.path.exists, files.values()))
    if not reused:
        if state.pop(name, None):  # from here on the old files' key no longer holds
            save_state(f"{out}/state.json", state)
        counts, lines, reasons = {}, Counter(), Counter()
        with contextlib.ExitStack() as stack:
            opened = {kind: stack.enter_context(atomic_write(p)) for kind, p in files.items()}
            for kind, line in work(counts):
                opened[kind].write(json.dumps(line, ensure_ascii=False) + "\n")
                lines[kind] += 1
                if kind is False:
                    reasons[line["reason"]] += 1
        written = {"sft": lines["sft"], "kto": lines["kto"]}
        if True in files:
            written = {"in": lines[True] + lines[False], "out": lines[True], "dropped": dict(reasons.most_common())}
        state[name] = {"key": key, "counts": written | counts, "files": {p: file_hash(p) for p in files.values()}}
        save_state(f"{out}/state.json", state)
    counts = state[name]["counts"]
    edited = [p for p, h in state[name]["files"].items() if reused and file_hash(p) != h]
    what = ", ".join(f"{k} {v:,}" for k, v in counts.items() if isinstance(v, int))
    print(f"{name:<11} {what}{' (unchanged)' if reused else ''}", flush=True)
    for reason, n in counts.get("dropped", {}).items():
        print(f"{'':<11}   dropped {n:,}: {reason}")
    for path in edited:
        print(f"{'':<11}   {path} was edited since: kept as it is; delete it to have it made again")
    if counts.get("out") == 0:
        mend = "lower --min-category" if name == "4_balance" else "see its .dropped.jsonl"
        raise InputError(f"{files[True]}: no record is left; {mend}")
    return counts


def histogram(counts, most=40):
    """{name: n} -> Markdown rows with bars, the largest first."""
    rows, top = sorted(counts.items(), key=lambda kv: (-kv[1], kv[0])), max(counts.values(), default=1)
    text = [f"| {name} | {n:,} | {'#' * math.ceil(30 * n / top)} |" for name, n in rows[:most]]
    return text + [f"| ... {len(rows) - most} more | {sum(n for _, n in rows[most:]):,} | |"] * (len(rows) > most)


def write_report(out, args, counts):
    """report.json: every step's counts. report.md: the same to read."""
    before, after = counts["4_balance"]["before"], counts["4_balance"]["after"]
    shape = {name: dict(zip(("entropy", "effective categories"), (round(x, 3) for x in evenness(c))), categories=len(c))
             for name, c in (("before", before), ("after", after))}  # fmt: skip
    with atomic_write(f"{out}/report.json") as f:
        json.dump({"steps": counts, "diversity": shape}, f, indent=1, ensure_ascii=False)
        f.write("\n")
    text = ["# Alignment data", "", "| step | in | out | dropped |", "|---|---|---|---|"]
    for name in STEPS[:-1]:
        c = counts[name]
        why = "; ".join(f"{n:,} {reason}" for reason, n in c["dropped"].items())
        text.append(f"| {name} | {c['in']:,} | {c['out']:,} | {why or 'none'} |")
    labels = counts["7_label"]
    text += ["", f"sft.jsonl: {labels['sft']:,} examples. kto.jsonl: {labels['kto']:,} examples, {labels['kto'] // 2:,} pairs."]
    text += ["", "| what became of an instruction | n |", "|---|---|"]
    text += [f"| {k} | {v:,} |" for k, v in labels["outcomes"].items()]
    text += ["", "| writer | best | worst | checked | right | share |", "|---|---|---|---|---|---|"]
    for w in WRITERS:
        checked, right = counts["6_score"]["verification"][w].values()
        row = [w, labels["best"].get(w, 0), labels["worst"].get(w, 0), checked, right, f"{right / checked:.3f}" if checked else ""]
        text.append("| " + " | ".join(map(str, row)) + " |")
    text += ["", "Where the reference was read out of the original response (GSM8K, AQuA), the original is right by construction."]
    j = counts["6_score"]["judge against verification"]
    text += [f"The teacher judged {counts['6_score']['judged']:,} instructions, {counts['6_score']['asked again']:,} asked again. Of "
             f"{j['comparisons']:,} verified responses beside a refuted one it graded {j['agrees']:,} higher, {j['ties']:,} alike."]  # fmt: skip
    left_out = counts["5_respond"]["left out"]
    text += ["", "Responses left out: " + ("; ".join(f"{n:,} {k}" for k, n in left_out.items()) or "none") + "."]
    for title, c, s in (("before", before, shape["before"]), ("after", after, shape["after"])):
        text += ["", f"## Categories {title} balancing", "", f"{s['categories']} categories, entropy {s['entropy']} nats, as even as "
                 f"{s['effective categories']} equal ones. Water level: {counts['4_balance']['water level']:,}.", "",
                 "| category | n | |", "|---|---|---|", *histogram(c)]  # fmt: skip
    merged = counts["3_classify"]["merged spellings"]
    text += ["", "Spellings merged: " + ("; ".join(f"{k} ({', '.join(v)})" for k, v in merged.items()) or "none") + "."]
    with atomic_write(f"{out}/report.md") as f:
        f.write("\n".join(text) + "\n")


def parse_args():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # data
    p.add_argument("--sources", nargs="+", required=True, metavar="F", help="JSON Lines or JSON arrays, plain or .gz; globs")
    p.add_argument("--decontaminate", nargs="+", default=[], metavar="F", help="evaluation files: their questions must not be in the data")
    p.add_argument("--out", required=True, help="folder for all files of the run")
    p.add_argument("--limit", type=int, default=0, help="at most this many records of each source, its first; 0: all")
    p.add_argument("--max-chars", type=int, default=20_000, help="longest record kept, in characters of prompt and response")
    # models
    p.add_argument("--teacher", required=True, help="URL of an OpenAI-compatible endpoint (.../v1), or a checkpoint")
    p.add_argument("--teacher-model", help="the model's name at the endpoint")
    p.add_argument("--small", required=True, help="checkpoint of the small model, which responds too")
    p.add_argument("--perplexity", metavar="C", help="checkpoint that gives the perplexities; default: the small model")
    p.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of local checkpoints")
    p.add_argument("--max-new-tokens", type=int, default=512, help="tokens of a response; a longer one is left out")
    p.add_argument("--max-len", type=int, default=2048, help="tokens of prompt and response that perplexity looks at")
    p.add_argument("--batch-size", type=int, default=32, help="sequences that a local checkpoint generates at once")
    p.add_argument("--micro-tokens", type=int, default=8192, help="tokens of one forward when perplexities are computed")
    # the endpoint
    p.add_argument("--concurrency", type=int, default=16, help="requests in flight")
    p.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for one reply")
    p.add_argument("--retries", type=int, default=8, help="how often a failed request is sent again, with growing pauses")
    # selection
    p.add_argument("--hamming", type=int, default=3, help="near duplicates: simhashes that differ in this many of 64 bits, or fewer")
    p.add_argument("--min-category", type=int, default=10, help="secondary categories with fewer instructions are dropped")
    p.add_argument("--target", type=int, default=500_000, help="instructions left after balancing, at most")
    p.add_argument("--seed", type=int, default=0, help="of the balancing, and of the order of responses before the judge")
    # scores
    p.add_argument("--weight-quality", type=float, default=0.6, help="weight of the teacher's quality grade in the composite score")
    p.add_argument("--weight-safety", type=float, default=0.3, help="weight of the teacher's safety grade")
    p.add_argument("--weight-perplexity", type=float, default=0.1, help="weight of 1/perplexity; below --margin it makes no pair")
    p.add_argument("--margin", type=float, default=0.25, help="least difference of composite scores that makes a KTO pair")
    p.add_argument("--min-safety", type=int, default=3, help="safety grade, 1 to 5, below which a best response is not used")
    p.add_argument("--judge-verified", action="store_true", help="ask the judge also where verification has decided")
    p.add_argument("--allow-code-execution", action="store_true", help="run the tests of code references, in a sandbox")
    args = p.parse_args()
    for name in ("target", "min_category", "max_new_tokens", "batch_size", "micro_tokens", "concurrency", "max_len", "max_chars"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it is 1 or more")
    if not 0 <= args.hamming <= 16:
        raise InputError(f"--hamming is {args.hamming}; it is between 0 and 16")
    weights = args.weight_quality, args.weight_safety, args.weight_perplexity
    if min(weights) < 0 or not sum(weights) > 0:
        raise InputError("--weight-quality, --weight-safety and --weight-perplexity are not negative, and one is above 0")
    return args


def main():
    args = parse_args()
    out = args.out.rstrip("/") or "/"
    files, questions = sources.expand(args.sources), sources.expand(args.decontaminate)
    teacher = models.open_teacher(args.teacher, args.teacher_model, args.dtype)
    small = models.open_teacher(args.small, dtype=args.dtype)
    if small.url:
        raise InputError(f"--small {args.small}: the small model is a local checkpoint (it also gives the perplexities)")
    scorer = models.open_teacher(args.perplexity, dtype=args.dtype) if args.perplexity else small
    http = {"concurrency": args.concurrency, "timeout": args.timeout, "retries": args.retries, "batch_size": args.batch_size}
    short, long = {"max_tokens": 128, **http}, {"max_tokens": args.max_new_tokens, **http}  # a category or grades; a response

    def of(*names):  # the arguments that a step's result depends on
        return {name: getattr(args, name) for name in names}

    state, counts = load_state(f"{out}/state.json"), {}
    with models.open_cache(f"{out}/replies.jsonl") as cache:
        for stale in glob.glob(f"{glob.escape(out)}/*.tmp[0-9]*"):  # a killed run's: it is gone, we hold the cache's lock
            os.remove(stale)
        path = {name: f"{out}/{name}.jsonl" for name in STEPS}
        weighing = ("weight_quality", "weight_safety", "weight_perplexity", "judge_verified", "allow_code_execution", "max_len", "seed")
        teachers = {"teacher": teacher.identity}
        plan = [  # step, files it reads, arguments its result depends on, work
            ("1_collect", files, of("limit", "max_chars") | {"labels": sources.labels(files)},
             lambda c: collect(args, files, c)),
            ("2_dedup", [path["1_collect"], *questions], of("hamming"),
             lambda c: deduplicate(args, path["1_collect"], questions, c)),
            ("3_classify", [path["2_dedup"]], teachers | {"prompt": [CLASSIFY, AGAIN_CLASSIFY]},
             lambda c: classify(args, path["2_dedup"], teacher, cache, short, c)),
            ("4_balance", [path["3_classify"]], of("min_category", "target", "seed"),
             lambda c: balance(args, path["3_classify"], c)),
            ("5_respond", [path["4_balance"]], of("max_new_tokens") | teachers | {"small": small.identity},
             lambda c: respond(args, path["4_balance"], teacher, small, cache, long, c)),
            ("6_score", [path["5_respond"]], of(*weighing) | teachers | {"scorer": scorer.identity, "prompt": [JUDGE, AGAIN_JUDGE]},
             lambda c: score(args, path["5_respond"], teacher, scorer, cache, short, c)),
            ("7_label", [path["6_score"]], of("margin", "min_safety"),
             lambda c: label(args, path["6_score"], c)),
        ]  # fmt: skip
        for name, inputs, arguments, work in plan:
            counts[name] = run_step(out, state, name, inputs, arguments, work)
        write_report(out, args, counts)
    labels = counts["7_label"]
    print(f"\n{labels['sft']:,} SFT examples, {labels['kto'] // 2:,} KTO pairs.")
    print(f"Written: {out}/sft.jsonl, {out}/kto.jsonl, {out}/report.md. Next:")
    print(f"  torchrun train_sft.py --ckpt {args.small} --data {out}/sft.jsonl --out OUT/sft")
    print(f"  torchrun train_kto.py --ckpt OUT/sft --data {out}/kto.jsonl --out OUT/sft-kto")


if __name__ == "__main__":
    cli(main)
