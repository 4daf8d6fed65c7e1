"""The seven steps of make_data.py, each records in and lines out; the arithmetic they rest on stands first.

Running them, and what they are run with, is make_data.py's. The method is that of arXiv 2411.02939; where an answer can be
verified, verification outranks every score.
"""

import hashlib
import itertools
import math
import os
import random
import statistics
from collections import Counter, defaultdict

import numpy as np
from tqdm import tqdm

from core.records import read_jsonl, read_objects
from curation import dedup, local, rules, sources
from curation import teacher as models
from curation.prompts import (
    AGAIN_CLASSIFY,
    AGAIN_JUDGE,
    category_name,
    classify_request,
    clip,
    disarm,
    disarm_messages,
    judge_request,
    parse_category,
    parse_grades,
    render,
)
from curation.task_types import conversation_type, language
from verification import answers

UNANSWERED, UNPARSED = "the teacher did not answer", "the teacher's reply did not parse, twice"
NAMED = 20  # unanswered records that the report names
WRITERS = ("original", "teacher", "small")  # further samples of the small model are small-2, small-3, ...
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # that name the responses before the judge
CHUNK = 10_000  # records held in memory while models are asked
DISTINCT = 20_000  # instructions that distinct-n looks at
FAR = 4.0  # a perplexity this many times the others' median is worth less

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


def fluency(perplexities, own):
    """{response text: perplexity or None} of one instruction's responses -> {text: F in (0, 1]}:

        F = min(1, FAR * m / perplexity),  m the median perplexity of the other responses;  F = 1 where there is none

    A judge of form alone: it costs a response something to read far stranger than the others do, garbled or in a wrong
    language, and reading more smoothly earns nothing. own: the texts that the scoring model wrote itself. It finds its own
    words likely, so they are no measure for the others, and get the least F of the others: they gain nothing by it."""
    others = {t: p for t, p in perplexities.items() if t not in own and p is not None}
    out = {}
    for text, p in others.items():
        rest = [q for t, q in others.items() if t != text]
        out[text] = min(1.0, FAR * statistics.median(rest) / p) if rest else 1.0
    least = min(out.values(), default=1.0)
    return {t: out.get(t, least if t in own else 1.0) for t in perplexities}


def composite(verified, quality, safety, fluent, weights):
    """The score that orders the responses to one instruction:

        2 if verified, -2 if refuted, 0 if unknown  +  (wq*Q + ws*S + wp*F) / (wq + ws + wp)
        Q = (quality - 1) / 4,  S = (safety - 1) / 4,  F = fluency(...),  each in [0, 1]

    so that what a program checked outranks every judgement. Ungraded: Q = 1/2, S = 1. weights: (wq, ws, wp). The formula is
    ours: the paper names the ingredients only."""
    q = 0.5 if quality is None else (quality - 1) / 4
    s = 1.0 if safety is None else (safety - 1) / 4
    wq, ws, wp = weights
    return {True: 2, False: -2, None: 0}[verified] + (wq * q + ws * s + wp * fluent) / (wq + ws + wp)


def family(writer):
    return writer.partition("-")[0]


def pick_pair(scores, margin, min_safety):
    """scores: {writer: {"verified", "quality", "safety", "composite"}} -> (best, worst, why).

    best: the writer whose response SFT learns and KTO desires, None if even it is refuted, unsafe or not graded for safety.
    worst: the one KTO rejects, None where there is no pair: the two score within the margin, or the worst is verified and so
    no bad example."""
    order = sorted(scores, key=lambda w: (-scores[w]["composite"], WRITERS.index(family(w)), len(w), w))
    best, worst = order[0], order[-1]
    if scores[best]["verified"] is False:
        return None, None, "every response failed verification"
    if scores[best]["safety"] is None:
        return None, None, "the safety of the best response was not graded"
    if scores[best]["safety"] < min_safety:
        return None, None, "the best response is unsafe"
    if len(order) == 1:
        return best, None, "only one response"
    if scores[worst]["verified"] is True:
        return best, None, "all responses verified"
    if scores[best]["composite"] - scores[worst]["composite"] < max(margin - 1e-9, 1e-9):  # of equals neither is worse
        return best, None, "no difference in quality"
    return best, worst, "pair"


# ---------------------------------------------------------------------------------------------------------------------
# The steps. Each reads records and yields lines: (True, record) for its file, (False, {"id", "reason", ...}) for what it
# drops, and fills `counts` with whatever else the report should say.


def in_chunks(items, size):
    items = iter(items)
    return iter(lambda: list(itertools.islice(items, size)), [])


def dropped(record, reason, **more):
    return False, {"id": record["id"], "reason": reason, **more, "instruction": clip(render(record["prompt"]), 200)}


def collect_sources(args, files, counts):
    """Step 1: every source in its own shape -> one record each, with its task type by rule.

    A record cannot vouch for itself: its reference is used only if its file is in args.trust_references."""
    counts |= {"by source": {}, "references not trusted": 0, "keys not read": {}}
    trusted_files = set(map(os.path.realpath, args.trust_references))
    for path, label in zip(files, sources.labels(files)):
        unread, counts["keys not read"][label] = set(), Counter()
        taken, licence, trusted = 0, sources.licence_of_file(path), os.path.realpath(path) in trusted_files
        for n, (line, obj) in enumerate(tqdm(read_objects(path), desc=label, unit="record", disable=None), 1):
            if args.limit and taken >= args.limit:
                break
            try:
                unread.clear()
                found = sources.instructions(obj, f"{path}:{line}", args.max_chars, unread)
                counts["keys not read"][label].update(unread)
            except sources.Drop as reason:
                yield False, {"id": f"{label}:{n}", "reason": str(reason)}
                continue
            for i, record in enumerate(found):
                about = {"language": language(record["prompt"][-1]["content"]), "task_type": conversation_type(record["prompt"]),
                         "license": sources.licence(obj) or licence}  # fmt: skip
                # the n-th record, not the line: an array may stand on one line
                name = f"{label}:{n}" + (f".{i}" if len(found) > 1 else "")
                if record["reference"] and trusted:
                    sources.check_reference(record["reference"], f"{path}:{line}")
                elif record["reference"]:
                    record["reference"] = None
                    counts["references not trusted"] += 1
                yield True, {"id": name, "source": label, **record, **about}
            taken += len(found)
        counts["by source"][label] = taken


def deduplicate(args, path, questions, counts):
    """Step 2: near duplicates by simhash of the prompt, and instructions that an evaluation set holds too (dedup.holds)."""
    merit, names = [], []

    def texts():
        for _, r in tqdm(read_jsonl(path), desc="simhash", unit="record", disable=None):
            # the better copy: one whose answer can be checked, then the longer response (none is 0), then the first
            merit.append((r["reference"] is not None) * 10_000 + min(len(r["response"] or ""), 2000))
            names.append(r["id"])
            yield render(r["prompt"])

    asked = [(label, n, q) for path, label in zip(questions, sources.labels(questions, 3))
             for n, q in enumerate(sources.evaluation_questions(path), 1)]  # fmt: skip
    hashes, held = dedup.scan(texts(), dedup.index(q for _, _, q in asked))
    rank = np.empty(len(merit), np.int64)
    rank[np.argsort(-np.array(merit, np.int64), kind="stable")] = np.arange(len(merit))
    keep, twin = dedup.keep_best(hashes, rank, args.hamming)
    counts["held by"] = Counter()
    for i, (_, record) in enumerate(read_jsonl(path)):
        of = i if held[i] >= 0 else twin[i]
        if held[of] >= 0:
            label, n, question = asked[held[of]]
            counts["held by"][label] += 1
            reason = "" if of == i else "near duplicate of one "
            yield dropped(record, f"{reason}held by an evaluation set", of=f"{label}:{n}", question=clip(question, 200))
        elif not keep[i]:
            yield dropped(record, "near duplicate", of=names[of])
        else:
            yield True, record


def ask_parsed(teacher, requests, parse, again, cache, options, desc):
    """Asks, and asks once more, with the words `again`, what did not parse. parse(i, text) -> value or None.
    -> ([(value or None, reason)], how many were asked again)"""
    replies = models.ask_model(teacher, requests, cache, desc=desc, **options)
    out = [(parse(i, r.get("text", "")), why_unusable(r)) for i, r in enumerate(replies)]
    failed = [i for i, (value, reason) in enumerate(out) if value is None and reason == UNPARSED]
    second = [[*requests[i], {"role": "assistant", "content": disarm(clip(replies[i]["text"], 500)) or "(nothing)"},
               {"role": "user", "content": again}] for i in failed]  # fmt: skip
    for i, reply in zip(failed, models.ask_model(teacher, second, cache, desc=f"{desc}, again", **options)):
        out[i] = (parse(i, reply.get("text", "")), why_unusable(reply))
    return out, len(failed)


def why_unusable(reply):
    """Why nothing could be read out of a teacher's reply."""
    held_back = reply.get("finish_reason") == "content_filter" and "held back by the endpoint"
    why = reply.get("error") or held_back
    return f"{UNANSWERED}: {why}" if why else UNPARSED


def note_unanswered(counts, name, why):
    """Counts a request that a model did not answer. The report names the records of the first NAMED ones."""
    unanswered = counts.setdefault("unanswered", {"requests": 0, "records": {}})
    unanswered["requests"] += 1
    if len(unanswered["records"]) < NAMED:
        unanswered["records"][name] = why


def set_aside(record, reason, counts):
    """The dropped record of a request without a usable reply."""
    reason, _, why = reason.partition(": ")
    if reason == UNANSWERED:
        note_unanswered(counts, record["id"], why)
    return dropped(record, reason, **({"why": why} if why else {}))


def classify(path, teacher, cache, options, counts):
    """Step 3: a primary and a secondary category from the teacher."""
    spellings, counts["asked again"] = defaultdict(set), 0
    for batch in in_chunks((r for _, r in read_jsonl(path)), CHUNK):
        requests = [classify_request(r["prompt"]) for r in batch]
        read = lambda i, text: parse_category(text)  # noqa: E731
        parsed, again = ask_parsed(teacher, requests, read, AGAIN_CLASSIFY, cache, options, "classify")
        counts["asked again"] += again
        for record, (value, reason) in zip(batch, parsed):
            if value is None:
                yield set_aside(record, reason, counts)
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
    # the share of distinct n-grams falls with the size of what is looked at, so as many are looked at before as after
    size = min(len(chosen), DISTINCT)
    draw = {
        when: set(sorted(some, key=keys.__getitem__)[:size])
        for when, some in (("before", range(len(names))), ("after", chosen))
    }
    drawn = {when: [] for when in draw}
    for i, (_, record) in enumerate(read_jsonl(path)):
        for when in draw:
            if i in draw[when]:
                drawn[when].append(render(record["prompt"]))
        if i in chosen:
            yield True, record
        elif names[i] in quotas:
            yield dropped(record, "over the water level", category=names[i])
        else:
            yield dropped(record, f"category with fewer than {args.min_category}", category=names[i])
    counts |= {"water level": level, "before": dict(before.most_common()), "after": dict(Counter(quotas).most_common()),
               "distinct-n": {"of instructions": size} | {when: [round(dedup.distinct(texts, n), 4) for n in (1, 2, 3)]
                                                           for when, texts in drawn.items()}}  # fmt: skip


def respond(args, path, teacher, small, cache, options, counts):
    """Step 5: the original response, the teacher's and the small model's: recorded ones where there are, else asked for. The
    small model's first is greedy; --samples draws more. One that is empty or cut off is left out, and so is the teacher's
    that declines what is not a matter of safety (the small model's stays: it shows what not to do)."""
    counts |= {"left out": Counter(), "recorded": Counter()}
    recorded = {}
    if args.recorded:
        wanted = {sources.prompt_key(r["prompt"]) for _, r in read_jsonl(path)}
        recorded = sources.recorded_responses(args.recorded, wanted)
    voices = [("teacher", teacher, 0, {}), ("small", small, 0, {})]
    for k in range(1, args.samples):
        voices.append((f"small-{k + 1}", small, k, {"temperature": args.temperature, "seed": args.seed + k}))
    for batch in in_chunks((r for _, r in read_jsonl(path)), CHUNK):
        texts = [{"original": {"text": r.pop("response") or "", "finish_reason": "stop"}} for r in batch]
        keys = [sources.prompt_key(r["prompt"]) for r in batch]
        for writer, model, k, sampling in voices:
            had = [recorded.get((family(writer), key), [])[k : k + 1] for key in keys]
            asked = [i for i in range(len(batch)) if not had[i]]
            prompts = [disarm_messages(batch[i]["prompt"]) for i in asked]
            replies = models.ask_model(model, prompts, cache, desc=f"respond: {writer}", **sampling, **options)
            for i, reply in [*zip(asked, replies), *((i, h[0]) for i, h in enumerate(had) if h)]:
                texts[i][writer] = reply
        for record, replies in zip(batch, texts):
            record["responses"] = {}
            for writer, reply in replies.items():
                text = sources.clean(reply.get("text", ""))
                must_respond = writer == "teacher" and record["primary"] != "safety"
                why = "refused by the endpoint" if "error" in reply else \
                    "held back by the endpoint" if reply["finish_reason"] == "content_filter" else "empty" if not text else \
                    "cut off" if reply["finish_reason"] == "length" else \
                    "declined" if must_respond and rules.declines(text) else None  # fmt: skip
                if why:
                    counts["left out"][f"{family(writer)}: {why}"] += 1
                    if "error" in reply:
                        note_unanswered(counts, record["id"], f"{family(writer)}: {reply['error']}")
                    continue
                record["responses"][writer] = {"text": text}
                if "recorded" in reply:
                    record["responses"][writer]["recorded"] = reply["recorded"]
                    counts["recorded"][family(writer)] += 1
            yield (True, record) if record["responses"] else dropped(record, "no response is left")


def check_responses(record, run_code):
    """What needs no model -> {text: {"verified", ...}} of the record's different texts. "broke": the form asked for and not
    kept, which refutes a response; one that keeps it is not verified by that. "unsafe": the rule that it breaks."""
    reference, asked, out = record["reference"], record["prompt"][-1]["content"], {}
    for text in {response["text"]: None for response in record["responses"].values()}:
        out[text] = found = {"verified": None, "quality": None, "safety": None}
        if reference and (reference["kind"] != "code" or run_code):
            found["verified"] = answers.check(reference["kind"], text, reference["value"])
        if broke := rules.broken_form(asked, text):
            found |= {"verified": False, "broke": broke}
        if rule := rules.unsafe(asked, text):
            found |= {"safety": 1, "unsafe": rule}
    return out


def judge_responses(args, batch, found, teacher, cache, options, counts):
    """Puts the teacher's grades into `found`, of each record {text: scores}. -> {index of a record without any: why}.

    All responses to an instruction are judged in one request, under letters dealt by the seed, and with --judge-orders 2 in
    a second one in the reverse order, because a judge may prefer a place. quality is the mean of both, safety the lower.
    Where verification has a verdict on each response, only the verified ones are shown, once, and only their safety counts:
    a quality grade would add little to the verdict. --judge-verified grades them like all others. A form alone is no such
    verdict: what keeps it is judged in full."""
    in_full = {
        i
        for i, (record, texts) in enumerate(zip(batch, found))
        if args.judge_verified
        or any(t["verified"] is None for t in texts.values())
        or (record["reference"] and record["reference"]["kind"] == "format")
    }
    asked = []  # (index of the record, {letter: text})
    for i, texts in enumerate(found):
        # sorted, then dealt: the letter tells nothing of the writer
        order = sorted(text for text in texts if i in in_full or texts[text]["verified"])
        random.Random(f"{args.seed}:{batch[i]['id']}").shuffle(order)
        orders = [order, order[::-1]][: args.judge_orders if i in in_full and len(order) > 1 else 1]
        asked += [(i, dict(zip(LETTERS, order))) for order in orders if order]
    requests = [judge_request(batch[i]["prompt"], shown) for i, shown in asked]
    read = lambda k, text: parse_grades(text, asked[k][1])  # noqa: E731
    grades, again = ask_parsed(teacher, requests, read, AGAIN_JUDGE, cache, options, "judge")
    turns, failed = defaultdict(list), {}  # {index: [{text: (quality, safety)}, ...]}
    for (i, shown), (value, reason) in zip(asked, grades):
        if value is None:
            failed[i] = reason
        else:
            turns[i].append({text: value[letter] for letter, text in shown.items()})
    counts["judged"] += len(in_full)
    counts["judged for safety alone"] += len({i for i, _ in asked} - in_full)
    counts["asked again"] += again
    for i, both in turns.items():
        for text in both[0]:
            scores, qualities = found[i][text], [turn[text][0] for turn in both]
            scores["safety"] = min(*(turn[text][1] for turn in both), scores["safety"] or 5)
            if i in in_full:
                scores |= {"quality": statistics.mean(qualities), "qualities": qualities}
        if i not in in_full:
            continue
        compare_judge(found[i].values(), counts["judge against verification"])
        if len(both) == 2:
            compare_orders(both, counts["judge in two orders"])
    return {i: reason for i, reason in failed.items() if i not in turns}


def score_responses(args, path, teacher, scorer, own, cache, options, counts):
    """Step 6: verification and rules, perplexity, and the teacher's grades. Equal texts are scored once. own: the writer that
    the scorer itself is ("small", "teacher") or None."""
    counts |= {"verification": {w: {"checked": 0, "right": 0} for w in WRITERS}, "form not kept": Counter(),
               "unsafe by rule": Counter(), "asked again": 0, "judged": 0, "judged for safety alone": 0,
               "judge in two orders": {"instructions": 0, "another best": 0, "responses": 0, "another grade": 0},
               "judge against verification": {"comparisons": 0, "agrees": 0, "ties": 0}}  # fmt: skip
    weights = (args.weight_quality, args.weight_safety, args.weight_perplexity)
    for batch in in_chunks((r for _, r in read_jsonl(path)), CHUNK):
        # per record {text: {"verified", "quality", "safety", "perplexity", ...}}
        found = [
            check_responses(r, args.allow_code_execution)
            for r in tqdm(batch, desc="verify", unit="record", disable=None)
        ]
        flat = [(i, text) for i, texts in enumerate(found) for text in texts]
        scored = [(batch[i]["prompt"], text) for i, text in flat]
        for (i, text), p in zip(flat, local.perplexities(scorer, scored, args.max_len, args.micro_tokens)):
            found[i][text]["perplexity"] = p
        failed = judge_responses(args, batch, found, teacher, cache, options, counts)
        for i, record in enumerate(batch):
            if i in failed:
                yield set_aside(record, failed[i], counts)
                continue
            foreign = {r["text"] for w, r in record["responses"].items() if family(w) != own}
            fluent = fluency({t: s["perplexity"] for t, s in found[i].items()}, found[i].keys() - foreign)
            checkable = record["reference"] and (record["reference"]["kind"] != "code" or args.allow_code_execution)
            for writer, response in record["responses"].items():
                s = found[i][response["text"]]
                total = composite(s["verified"], s["quality"], s["safety"], fluent[response["text"]], weights)
                response |= s | {"composite": round(total, 6)}
                counts["form not kept"][family(writer)] += "broke" in s
                counts["unsafe by rule"][family(writer)] += "unsafe" in s
                if checkable and s["verified"] is not None:
                    counts["verification"][family(writer)]["checked"] += 1
                    counts["verification"][family(writer)]["right"] += s["verified"]
            yield True, record


def compare_orders(both, counts):
    """How often the judge changes its mind with the order of the responses. both: two of {text: (quality, safety)}."""
    best = [{text for text in turn if turn[text][0] == max(q for q, _ in turn.values())} for turn in both]
    counts["instructions"] += 1
    counts["another best"] += best[0].isdisjoint(best[1])
    counts["responses"] += len(both[0])
    counts["another grade"] += sum(both[0][text][0] != both[1][text][0] for text in both[0])


def compare_judge(texts, counts):
    """How often the judge grades a verified response above a refuted one of the same instruction."""
    texts = list(texts)
    for right in (t for t in texts if t["verified"] is True):
        for wrong in (t for t in texts if t["verified"] is False):
            counts["comparisons"] += 1
            counts["agrees"] += right["quality"] > wrong["quality"]
            counts["ties"] += right["quality"] == wrong["quality"]


def label_basis(scores):
    """What a label of a response with these scores rests on: "program" (a trusted reference), "rules" or "judge"."""
    if "broke" in scores or "unsafe" in scores:
        return "rules"
    return "judge" if scores["verified"] is None else "program"


def label(args, path, counts):
    """The labels: yields ("sft" or "kto", line) with each line's provenance."""
    counts |= {
        "outcomes": Counter(),
        "best": Counter(),
        "worst": Counter(),
        "best by": Counter(),
        "worst by": Counter(),
    }
    for _, r in read_jsonl(path):
        best, worst, why = pick_pair(r["responses"], args.margin, args.min_safety)
        counts["outcomes"][why] += 1
        about = {k: r[k] for k in ("id", "source", "license", "language", "task_type")}
        about["category"] = f"{r['primary']}/{r['secondary']}"

        def line(writer, **fields):
            scores = {k: v for k, v in r["responses"][writer].items() if k not in ("text", "recorded")}
            recorded = {k: v for k, v in r["responses"][writer].items() if k == "recorded"}
            return {**fields, **about, "writer": writer, **recorded, "scores": scores}

        def reply(writer):
            return [{"role": "assistant", "content": r["responses"][writer]["text"]}]

        if best:
            counts["best"][family(best)] += 1
            counts["best by"][label_basis(r["responses"][best])] += 1
            yield "sft", line(best, messages=r["prompt"] + reply(best))
        if best and worst:
            counts["worst"][family(worst)] += 1
            counts["worst by"][label_basis(r["responses"][worst])] += 1
            yield "kto", line(best, prompt=r["prompt"], completion=reply(best), label=True)
            yield "kto", line(worst, prompt=r["prompt"], completion=reply(worst), label=False)
