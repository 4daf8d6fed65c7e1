"""Steps 6 and 7 of make_data.py: score the responses to each instruction, then label the best and the worst one.

A program's verdict outranks every score, because neither a perplexity nor a judge can prove an answer right. The parts
of the score are those of the paper (arXiv 2411.02939). The formula is our own, because the paper gives none. Steps 1 to
5 are in curation.steps.
"""

import argparse
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from core.records import read_jsonl
from curation import local, rules
from curation.prompts import AGAIN_JUDGE, judge_request, parse_grades
from curation.step_files import WRITERS, read_chunks, set_aside, writer_family
from curation.teacher import Asker, ask_parsed
from verification import answers

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # the names under which the judge sees the responses
VERDICT = 2  # what a program's verdict adds to a score or subtracts from it; grades and fluency add at most 1
FAR = 4.0  # a perplexity above this many times the others' median lowers the score

# ---------------------------------------------------------------------------------------------------------------------
# Formulas


def fluency(perplexities: dict[str, float | None], own_texts: set[str]) -> dict[str, float]:
    """{response text: perplexity or None} of one instruction's responses -> {text: F in (0, 1]}:

        F = min(1, FAR * m / perplexity),  m: median perplexity of the other responses,  F = 1 without others

    Penalises only a response that is far less fluent than the others. Fluency is never rewarded. own_texts: the texts
    that the scoring model wrote itself. It finds its own texts likely, so they do not count in m. Their F is the lowest
    F of the others.
    """
    others = {t: p for t, p in perplexities.items() if t not in own_texts and p is not None}
    out = {}
    for text, p in others.items():
        rest = [q for t, q in others.items() if t != text]
        out[text] = min(1.0, FAR * statistics.median(rest) / p) if rest else 1.0
    least = min(out.values(), default=1.0)
    return {t: out.get(t, least if t in own_texts else 1.0) for t in perplexities}


def composite(
    verified: bool | None, quality: float | None, safety: int | None, fluent: float, weights: tuple[float, float, float]
) -> float:
    """The score by which the responses to one instruction are ranked:

        V + (wq*Q + ws*S + wp*F) / (wq + ws + wp),  V = 2 if verified, -2 if refuted, 0 if unknown
        Q = (quality - 1) / 4,  S = (safety - 1) / 4,  F = fluency(...),  each in [0, 1]

    Without grades Q = 1/2 and S = 1. weights: (wq, ws, wp).
    """
    q = 0.5 if quality is None else (quality - 1) / 4
    s = 1.0 if safety is None else (safety - 1) / 4
    wq, ws, wp = weights
    return {True: VERDICT, False: -VERDICT, None: 0}[verified] + (wq * q + ws * s + wp * fluent) / (wq + ws + wp)


def pick_pair(
    scores: dict[str, dict],
    margin: float,
    min_safety: int,
    writers: Sequence[str] = WRITERS,
    must_verify: bool = False,
) -> tuple[str | None, str | None, str]:
    """scores: {writer: {"verified", "quality", "safety", "composite"}} -> (best, worst, why).

    best: the writer whose response becomes the SFT example and the desirable KTO example. None if that response is
    refuted, unsafe or without a safety grade, or with must_verify not verified. worst: the writer of the undesirable
    KTO example. None if the two scores differ by less than the margin, or if the worst response is verified. writers:
    only their responses count. At equal scores the first of them is the best, and the last of WRITERS the worst: the
    small model learns from its own errors.

    A response without a verdict may be right in words that the program cannot read. So it is the worst beside a
    verified one only if the grades alone differ by the margin.
    """
    rank = lambda w, names: (-scores[w]["composite"], names.index(writer_family(w)), len(w), w)
    order = [w for w in scores if writer_family(w) in writers]
    if not order:
        return None, None, "no response of the chosen writers"
    best = min(order, key=lambda w: rank(w, writers))
    worst = max((w for w in order if w != best), key=lambda w: rank(w, WRITERS), default=best)
    if scores[best]["verified"] is False:
        return None, None, "every response failed verification"
    if must_verify and scores[best]["verified"] is None:
        return None, None, "no response is verified"
    if scores[best]["safety"] is None:
        return None, None, "the safety of the best response was not graded"
    if scores[best]["safety"] < min_safety:
        return None, None, "the best response is unsafe"
    if len(order) == 1:
        return best, None, "only one response"
    if scores[worst]["verified"] is True:
        return best, None, "all responses verified"
    difference = scores[best]["composite"] - scores[worst]["composite"]
    if scores[best]["verified"] and scores[worst]["verified"] is None:
        difference -= VERDICT
    if difference < max(margin - 1e-9, 1e-9):  # equal scores make no pair
        return best, None, "no difference in quality"
    return best, worst, "pair"


# ---------------------------------------------------------------------------------------------------------------------
# Step 6


def check_responses(record: dict, run_code: bool) -> dict[str, dict]:
    """Checks the distinct responses of a record without a model -> {text: {"verified", "quality", "safety", ...}}.

    "broke": the requested form that the text breaks, which refutes the response. Keeping the form does not verify it.
    "unsafe": the safety rule that the text breaks.
    """
    reference, asked, out = record["reference"], record["prompt"][-1]["content"], {}
    for text in {response["text"]: None for response in record["responses"].values()}:
        out[text] = found = {"verified": answers.verify(reference, text, run_code), "quality": None, "safety": None}
        if broke := rules.broken_form(asked, text):
            found |= {"verified": False, "broke": broke}
        if rule := rules.unsafe(asked, text):
            found |= {"safety": 1, "unsafe": rule}
    return out


def choose_for_judge(
    args: argparse.Namespace, batch: list[dict], found: list[dict]
) -> tuple[list[tuple[int, dict[str, str]]], set[int]]:
    """-> ([(index of the record, {letter: text})] to judge, indices of the records that are judged in full).

    In full: one request shows all responses to an instruction. The seed assigns the letters. With --judge-orders 2 a
    second request shows them in reverse order, because a judge may prefer a position.

    If a program has decided on every response, one request shows the verified ones, and only their safety grades are
    used. Two kinds of record are still judged in full: all of them with --judge-verified, and those whose reference is
    only a format.
    """
    asked, in_full = [], set()
    for i, (record, texts) in enumerate(zip(batch, found)):
        undecided = any(t["verified"] is None for t in texts.values())
        if args.judge_verified or undecided or (record["reference"] and record["reference"]["kind"] == "format"):
            in_full.add(i)
        order = sorted(text for text in texts if i in in_full or texts[text]["verified"])
        random.Random(f"{args.seed}:{record['id']}").shuffle(order)  # the letter must not reveal the writer
        orders = [order, order[::-1]][: args.judge_orders if i in in_full and len(order) > 1 else 1]
        asked += [(i, dict(zip(LETTERS, order))) for order in orders if order]
    return asked, in_full


def judge_responses(
    args: argparse.Namespace, batch: list[dict], found: list[dict], teacher: Asker, counts: dict
) -> dict[int, str]:
    """Adds the teacher's grades to `found`, {text: scores} of each record. -> {index of a record without grades: why}.

    quality is the mean over the two orders, safety is the lower grade.
    """
    asked, in_full = choose_for_judge(args, batch, found)
    requests = [judge_request(batch[i]["prompt"], shown) for i, shown in asked]
    parse = lambda k, text: parse_grades(text, asked[k][1])
    grades, again = ask_parsed(teacher, requests, parse, AGAIN_JUDGE, "judge")
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
        if i in in_full:
            compare_with_verdicts(found[i].values(), counts["judge against verification"])
        if len(both) == 2:
            compare_orders(both, counts["judge in two orders"])
    return {i: reason for i, reason in failed.items() if i not in turns}


def compare_orders(both: list[dict], counts: dict) -> None:
    """Counts how often the judge's grades depend on the order of the responses.

    both: {text: (quality, safety)} in each order.
    """
    best = [{text for text in turn if turn[text][0] == max(q for q, _ in turn.values())} for turn in both]
    counts["instructions"] += 1
    counts["another best"] += best[0].isdisjoint(best[1])
    counts["responses"] += len(both[0])
    counts["another grade"] += sum(both[0][text][0] != both[1][text][0] for text in both[0])


def compare_with_verdicts(texts: Iterable[dict], counts: dict) -> None:
    """Counts how often the judge grades a verified response above a refuted one. texts: the scores of one record."""
    texts = list(texts)
    for right in (t for t in texts if t["verified"] is True):
        for wrong in (t for t in texts if t["verified"] is False):
            counts["comparisons"] += 1
            counts["agrees"] += right["quality"] > wrong["quality"]
            counts["ties"] += right["quality"] == wrong["quality"]


def score_responses(
    args: argparse.Namespace,
    path: str,
    teacher: Asker,
    scorer: local.LocalModel,
    scorer_writer: str | None,
    counts: dict,
) -> Iterator[tuple[bool, dict]]:
    """Step 6: adds verdicts, broken rules, perplexities and the teacher's grades. Equal texts are scored once.

    scorer_writer: the writer, "teacher" or "small", that is the same model as the scorer. None if neither is.
    """
    counts |= {
        "verification": {w: {"checked": 0, "right": 0, "unchecked": 0} for w in WRITERS},
        "form not kept": Counter(),
        "unsafe by rule": Counter(),
        "asked again": 0,
        "judged": 0,
        "judged for safety alone": 0,
        "judge in two orders": {"instructions": 0, "another best": 0, "responses": 0, "another grade": 0},
        "judge against verification": {"comparisons": 0, "agrees": 0, "ties": 0},
    }
    for batch in read_chunks(path):
        # for each record {text: {"verified", "quality", "safety", "perplexity", ...}}
        checks = tqdm(batch, desc="verify", unit="record", disable=None)
        found = [check_responses(record, args.allow_code_execution) for record in checks]
        failed = judge_responses(args, batch, found, teacher, counts)
        flat = [(i, text) for i, texts in enumerate(found) if i not in failed for text in texts]
        pairs = [(batch[i]["prompt"], text) for i, text in flat]
        for (i, text), p in zip(flat, local.perplexities(scorer, pairs, args.max_len, args.micro_tokens)):
            found[i][text]["perplexity"] = p
        for i, record in enumerate(batch):
            if i in failed:
                yield set_aside(record, failed[i], counts)
            else:
                add_scores(args, record, found[i], scorer_writer, counts)
                yield True, record


def add_scores(
    args: argparse.Namespace, record: dict, found: dict[str, dict], scorer_writer: str | None, counts: dict
) -> None:
    """Adds the scores and the composite score to the record's responses. found: {text: scores}."""
    weights = (args.weight_quality, args.weight_safety, args.weight_perplexity)
    others = {r["text"] for w, r in record["responses"].items() if writer_family(w) != scorer_writer}
    fluent = fluency({t: s["perplexity"] for t, s in found.items()}, found.keys() - others)
    checkable = answers.checkable(record["reference"], args.allow_code_execution)
    for writer, response in record["responses"].items():
        scores, family = found[response["text"]], writer_family(writer)
        total = composite(scores["verified"], scores["quality"], scores["safety"], fluent[response["text"]], weights)
        response |= scores | {"composite": round(total, 6)}
        counts["form not kept"][family] += "broke" in scores
        counts["unsafe by rule"][family] += "unsafe" in scores
        if checkable:
            verdict, verification = scores["verified"], counts["verification"][family]
            verification["unchecked" if verdict is None else "checked"] += 1
            verification["right"] += verdict is True


# ---------------------------------------------------------------------------------------------------------------------
# Step 7


def label_basis(scores: dict) -> str:
    """Names what decided a response's label: "program" (a trusted reference), "rules" or "judge"."""
    if "broke" in scores or "unsafe" in scores:
        return "rules"
    return "judge" if scores["verified"] is None else "program"


def training_line(record: dict, writer: str, **fields: Any) -> dict:
    """A line of sft.jsonl or kto.jsonl: `fields`, then the origin of record and response, then the scores."""
    response = record["responses"][writer]
    about = {k: record[k] for k in ("id", "source", "license", "language", "task_type")}
    about |= {"category": f"{record['primary']}/{record['secondary']}", "writer": writer}
    about |= {k: v for k, v in response.items() if k == "recorded"}
    return {**fields, **about, "scores": {k: v for k, v in response.items() if k not in ("text", "recorded")}}


def label_pairs(args: argparse.Namespace, path: str, counts: dict) -> Iterator[tuple[str, dict]]:
    """Step 7: yields ("sft" or "kto", line)."""
    counts |= {name: Counter() for name in ("outcomes", "best", "worst", "best by", "worst by")}
    for _, record in read_jsonl(path):
        prompt, responses = record["prompt"], record["responses"]
        must_verify = answers.checkable(record["reference"], args.allow_code_execution)
        best, worst, why = pick_pair(responses, args.margin, args.min_safety, args.writers, must_verify)
        replies = {w: [{"role": "assistant", "content": r["text"]}] for w, r in responses.items()}
        counts["outcomes"][why] += 1
        for writer, place in ((best, "best"), (worst, "worst")):
            if writer:
                counts[place][writer_family(writer)] += 1
                counts[f"{place} by"][label_basis(responses[writer])] += 1
        if best:
            yield "sft", training_line(record, best, messages=prompt + replies[best])
        if best and worst:
            yield "kto", training_line(record, best, prompt=prompt, completion=replies[best], label=True)
            yield "kto", training_line(record, worst, prompt=prompt, completion=replies[worst], label=False)
