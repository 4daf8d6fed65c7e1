"""Reports of make_data.py: report.md and report.json after a run, and the estimates of --dry-run."""

import argparse
import json
import math
from typing import NamedTuple

from core.card import table_row
from core.files import atomic_write, printable
from core.records import read_jsonl
from curation.costs import estimate_tokens, price, request_tokens
from curation.labels import LETTERS
from curation.prompts import AGAIN_CLASSIFY, AGAIN_JUDGE, GREETING, JUDGE_CHARS, classify_request, clip, judge_request
from curation.step_files import WRITERS
from curation.steps import evenness
from verification.answers import checkable

CATEGORY_TOKENS, GRADE_TOKENS = 20, 16  # likely length of a reply with a category; of the grades of one response
FENCE_TOKENS = 20  # length of the fence around each response in a request to the judge
BASES = {"program": "a trusted reference, checked by a program", "rules": "rules", "judge": "the teacher's grades"}

# ---------------------------------------------------------------------------------------------------------------------
# report.md


def histogram(counts: dict[str, int], most: int = 40) -> list[str]:
    """{name: n} -> the rows of a Markdown table with bars, the largest first. At most `most` rows, then a sum."""
    rows, top = sorted(counts.items(), key=lambda kv: (-kv[1], kv[0])), max(counts.values(), default=1)
    text = [table_row([name, f"{n:,}", "#" * math.ceil(30 * n / top)]) for name, n in rows[:most]]
    if len(rows) > most:
        text.append(f"| ... {len(rows) - most} more | {sum(n for _, n in rows[most:]):,} | |")
    return text


def listed(counts: dict[str, int]) -> str:
    """{name: n} -> "3 name; 2 name", or "none"."""
    return "; ".join(f"{n:,} {name}" for name, n in counts.items()) or "none"


def steps_text(counts: dict) -> list[str]:
    """The table of what each step read, kept and dropped, and notes on the first steps."""
    text = ["# Alignment data", "", "| step | in | out | dropped |", "|---|---|---|---|"]
    for name, c in counts.items():
        if "in" in c:
            text.append(f"| {name} | {c['in']:,} | {c['out']:,} | {listed(c['dropped'])} |")
    collected, dedup = counts["1_collect"], counts["2_dedup"]
    for label, keys in collected["keys not read"].items():
        if keys:
            names = ", ".join(f"{key} ({n:,})" for key, n in keys.items())
            text += ["", f"Keys of {label} that were not read, and in how many records: {names}."]
    if ignored := collected["references not trusted"]:
        text += ["", f"{ignored:,} references were ignored: --trust-references does not name their files."]
    return [
        *text,
        "",
        f"Prompts that contain a question of an evaluation set: {listed(dedup['contaminated by'])}. Original responses removed "
        f"because they contain one: {dedup['responses removed']:,}.",
        "",
        f"Responses left out: {listed(counts['5_respond']['left out'])}.",
    ]


def unanswered_text(counts: dict) -> list[str]:
    """The number of unanswered requests in each step, and the records and reasons of the first ones."""
    text = []
    for step, c in counts.items():
        if "unanswered" in c:
            n, records = c["unanswered"]["requests"], c["unanswered"]["records"]
            more = f" (the first {len(records)})" if n > len(records) else ""
            text += ["", f"{step}: {n:,} request{'s' * (n > 1)} without an answer{more}:", ""]
            text += [f"- {name}: {why}" for name, why in records.items()]
    return text


def print_unanswered(out: str, counts: dict) -> None:
    """Prints how many requests have no answer, and which of them the same command asks again."""
    unanswered = [c["unanswered"] for c in counts.values() if "unanswered" in c]
    if n := sum(some["requests"] for some in unanswered):
        again = sum(some["to ask again"] for some in unanswered)
        what = f"; the same command asks {again:,} of them again" if again else ""
        print(f"{n:,} request{'s' * (n > 1)} got no answer, see {out}/report.md{what}")


def labels_text(counts: dict) -> list[str]:
    """Counts labels by outcome, by writer and by basis (program, rules, judge)."""
    labels, verification = counts["7_label"], counts["6_score"]["verification"]
    text = [
        "",
        f"sft.jsonl: {labels['sft']:,} examples. kto.jsonl: {labels['kto']:,} examples, {labels['kto'] // 2:,} pairs.",
    ]
    text += ["", "| outcome of an instruction | n |", "|---|---|"]
    text += [f"| {why} | {n:,} |" for why, n in labels["outcomes"].items()]
    text += ["", "| writer | best | worst | checked | right | share | unchecked |", "|---|---|---|---|---|---|---|"]
    for w in WRITERS:
        checked, right = verification[w]["checked"], verification[w]["right"]
        share = f"{right / checked:.3f}" if checked else ""
        best, worst = labels["best"].get(w, 0), labels["worst"].get(w, 0)
        text.append(f"| {w} | {best} | {worst} | {checked} | {right} | {share} | {verification[w]['unchecked']} |")
    text += ["", "| a label is decided by | best | worst |", "|---|---|---|"]
    text += [
        f"| {words} | {labels['best by'].get(k, 0):,} | {labels['worst by'].get(k, 0):,} |"
        for k, words in BASES.items()
    ]
    return [
        *text,
        "",
        "Unchecked: the response has a trusted reference, but no program can decide whether it is right. For example, "
        "it states no clear choice, or its tests cannot be run from outside the program.",
        "",
        "Where a trusted file gives the reference inside the original response (GSM8K, AQuA), that response is right "
        "by construction.",
    ]


def judge_text(scores: dict) -> list[str]:
    """The judge's agreement with programs and with itself. scores: the counts of step 6."""
    verdicts, orders = scores["judge against verification"], scores["judge in two orders"]
    text = [
        "",
        f"The teacher judged {scores['judged']:,} instructions, and {scores['judged for safety alone']:,} more for "
        f"safety alone. {scores['asked again']:,} requests were sent again. It compared a verified with a refuted "
        f"response {verdicts['comparisons']:,} times. It graded the verified one higher {verdicts['agrees']:,} times, and both "
        f"alike {verdicts['ties']:,} times.",
    ]
    if orders["instructions"]:
        text.append(
            f"{orders['instructions']:,} instructions were judged in both orders. {orders['another best']:,} of them "
            f"had another best response in the second order. {orders['another grade']:,} of {orders['responses']:,} "
            "responses had another quality grade."
        )
    for name in ("form not kept", "unsafe by rule"):
        text += ["", f"{name.capitalize()}: {listed(scores[name])}."]
    return text


def categories_text(counts: dict, shape: dict) -> list[str]:
    """The categories before and after balancing. shape: their diversity, as in report.json."""
    balance, text = counts["4_balance"], []
    for when in ("before", "after"):
        s = shape[when]
        text += ["", f"## Categories {when} balancing", ""]
        text.append(
            f"{s['categories']} categories, entropy {s['entropy']} nats, as even as {s['effective categories']} equal "
            f"ones. Water level: {balance['water level']:,}."
        )
        text += ["", "| category | n | |", "|---|---|---|", *histogram(balance[when])]
    distinct, merged = balance["distinct-n"], counts["3_classify"]["merged spellings"]
    return [
        *text,
        "",
        f"Shares of distinct 1-, 2- and 3-grams in {distinct['of instructions']:,} instructions: {distinct['before']} "
        f"before, {distinct['after']} after.",
        "",
        "Spellings merged: " + ("; ".join(f"{k} ({', '.join(v)})" for k, v in merged.items()) or "none") + ".",
    ]


def write_report(out: str, counts: dict) -> None:
    """Writes the counts of all steps to report.json, and as text to report.md."""
    shape = {}
    for when in ("before", "after"):
        categories = counts["4_balance"][when]
        entropy, effective = evenness(categories)
        shape[when] = {
            "entropy": round(entropy, 3),
            "effective categories": round(effective, 3),
            "categories": len(categories),
        }
    with atomic_write(f"{out}/report.json") as f:
        json.dump({"steps": counts, "diversity": shape}, f, indent=1, ensure_ascii=False)
        f.write("\n")
    text = (
        steps_text(counts)
        + unanswered_text(counts)
        + labels_text(counts)
        + judge_text(counts["6_score"])
        + categories_text(counts, shape)
    )
    with atomic_write(f"{out}/report.md") as f:
        f.write("\n".join(text) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# --dry-run


class Estimate(NamedTuple):
    """The requests of one kind and their tokens.

    most: no record is dropped, every reply has the maximum length, all responses differ, and every category and grade
    is asked for twice. likely: a reply is as long as the record's own response, or half of --max-new-tokens without
    one. A thought takes half of --thought-tokens.
    """

    kind: str
    most_requests: int
    most_in: int
    most_out: int
    likely_in: float
    likely_out: float


def estimate_requests(args: argparse.Namespace, path: str, short: int) -> list[Estimate]:
    """path: the records of step 2. short: maximum length of a reply with a category or grades, in tokens."""
    responses, classify, respond, judge = 2 + args.samples, [], [], []  # three lists: tokens of each record's request
    n = verifiable = likely_replies = likely_judge = 0
    for n, (_, record) in enumerate(read_jsonl(path), 1):
        response, reference = record["response"] or "", record["reference"]
        reply = min(estimate_tokens(response), args.max_new_tokens) if response else args.max_new_tokens // 2
        request = request_tokens(judge_request(record["prompt"], {}))
        request += estimate_tokens(clip(response, JUDGE_CHARS)) + FENCE_TOKENS * responses
        classify.append(request_tokens(classify_request(record["prompt"])))
        respond.append(request_tokens(record["prompt"]))
        judge.append(request + (1 + args.samples) * args.max_new_tokens)
        likely_replies += reply
        likely_judge += request + (1 + args.samples) * reply
        verifiable += checkable(reference, args.allow_code_execution) and reference["kind"] != "format"
    left, asked = min(n, args.target), sum(respond)
    respond, judge = (sorted(tokens)[-left:] for tokens in (respond, judge))  # balancing may keep the longest ones
    # tokens that a second request adds: the first reply, the words `again`, and 4 for each message's delimiters
    again = [short + estimate_tokens(text) + 8 for text in (AGAIN_CLASSIFY, AGAIN_JUDGE)]
    alone = 0 if args.judge_verified else verifiable / n  # share of the records that are judged once, for safety alone
    thought, half_thought = args.thought_tokens, args.thought_tokens // 2
    orders, likely_orders = args.judge_orders, args.judge_orders * (1 - alone) + alone
    return [
        Estimate("greeting", 1, request_tokens(GREETING), short, request_tokens(GREETING), 10 + half_thought),
        Estimate(
            "classify",
            2 * n,
            2 * sum(classify) + n * again[0],
            2 * n * short,
            sum(classify),
            n * (CATEGORY_TOKENS + half_thought),
        ),
        Estimate(
            "respond",
            left,
            sum(respond),
            left * (args.max_new_tokens + thought),
            left / n * asked,
            left / n * likely_replies + left * half_thought,
        ),
        Estimate(
            "judge",
            2 * left * orders,
            orders * (2 * sum(judge) + left * again[1]),
            2 * left * orders * short,
            left / n * likely_orders * likely_judge,
            left * likely_orders * (responses * GRADE_TOKENS + half_thought),
        ),
    ]


def dry_run(args: argparse.Namespace, path: str, short: int, spent: list[int], answered: int) -> None:
    """Prints the number and cost of the requests that the records of step 2 need, and a sample of each kind.

    path: the records of step 2. short: see estimate_requests(). spent: tokens of the `answered` replies in the log.
    """
    rows = estimate_requests(args, path, short)
    rows.append(Estimate("together", *(sum(column) for column in list(zip(*rows))[1:])))
    unit, digits = ("price", 2) if args.prices else ("tokens", 0)
    head = ("requests", 12), ("tokens in", 16), ("tokens out", 16), (f"{unit} at most", 18), ("likely", 16)
    print(f"\n{'requests to teacher':<22}" + "".join(f"{name:>{width}}" for name, width in head))
    for row in rows:
        most = price((row.most_in, row.most_out), args.prices)
        likely = price((row.likely_in, row.likely_out), args.prices)
        print(f"{row.kind:<22}{row.most_requests:>12,}{row.most_in:>16,}{row.most_out:>16,}", end="")
        print(f"{most:>18,.{digits}f}{likely:>16,.{digits}f}")
    spent = price(spent, args.prices)
    print(
        "All columns except the last are upper bounds. A token is estimated as three bytes. "
        f"{answered:,} replies are already in the log, for {spent:,.6g}."
    )
    if args.budget:
        stops = "may not suffice: the run stops before it exceeds the budget, and a larger --budget continues it"
        print(f"The budget of {args.budget:,g} {'suffices' if spent + most <= args.budget else stops}.")
    _, record = next(read_jsonl(path))
    shown = record["response"] or "(none)", "(the teacher's response)", "(the small model's response)"
    requests = {"classify": classify_request(record["prompt"]), "respond": record["prompt"]}
    for name, messages in {**requests, "judge": judge_request(record["prompt"], dict(zip(LETTERS, shown)))}.items():
        print(f"\n---- a request to {name}")
        for m in messages:
            print(f"[{m['role']}]", *map(printable, m["content"].split("\n")), sep="\n")
    print("\nNothing was sent. Leave out --dry-run to start the run.")
