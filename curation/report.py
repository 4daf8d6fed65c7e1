"""What make_data.py tells: report.md and report.json at its end, and with --dry-run what a run would ask and cost."""

import json
import math

from core.files import atomic_write
from core.records import read_jsonl
from curation.costs import price, request_tokens, tokens_of
from curation.prompts import AGAIN_CLASSIFY, AGAIN_JUDGE, GREETING, JUDGE_CHARS, classify_request, clip, judge_request
from curation.steps import LETTERS, WRITERS, evenness

CATEGORY_TOKENS, GRADE_TOKENS = 20, 16  # of a likely reply: a category; the grades of one response
FENCE_TOKENS = 20  # around each response in a request of the judge


def histogram(counts, most=40):
    """{name: n} -> Markdown rows with bars, the largest first."""
    rows, top = sorted(counts.items(), key=lambda kv: (-kv[1], kv[0])), max(counts.values(), default=1)
    text = [f"| {name} | {n:,} | {'#' * math.ceil(30 * n / top)} |" for name, n in rows[:most]]
    return text + [f"| ... {len(rows) - most} more | {sum(n for _, n in rows[most:]):,} | |"] * (len(rows) > most)


def unanswered_lines(counts):
    """Markdown lines on the requests that no model answered: how many, in which step, the first of them by record and reason."""
    text = []
    for step, c in counts.items():
        if "unanswered" in c:
            n, records = c["unanswered"]["requests"], c["unanswered"]["records"]
            more = f" (the first {len(records)})" if n > len(records) else ""
            text += ["", f"{step}: {n:,} request{'s' * (n > 1)} without an answer{more}:", ""]
            text += [f"- {name}: {why}" for name, why in records.items()]
    return text


def write_report(out, counts):
    """report.json: every step's counts. report.md: the same to read."""
    before, after = counts["4_balance"]["before"], counts["4_balance"]["after"]
    shape = {name: dict(zip(("entropy", "effective categories"), (round(x, 3) for x in evenness(c))), categories=len(c))
             for name, c in (("before", before), ("after", after))}  # fmt: skip
    with atomic_write(f"{out}/report.json") as f:
        json.dump({"steps": counts, "diversity": shape}, f, indent=1, ensure_ascii=False)
        f.write("\n")
    text = ["# Alignment data", "", "| step | in | out | dropped |", "|---|---|---|---|"]
    for name, c in counts.items():
        if "in" not in c:
            continue
        why = "; ".join(f"{n:,} {reason}" for reason, n in c["dropped"].items())
        text.append(f"| {name} | {c['in']:,} | {c['out']:,} | {why or 'none'} |")
    for label, keys in counts["1_collect"]["keys not read"].items():
        if keys:
            text += [
                "",
                f"Keys of {label} that were not read: " + ", ".join(f"{k} ({n:,})" for k, n in keys.items()) + ".",
            ]
    held = counts["2_dedup"]["held by"]
    text += ["", "Held by evaluation sets: " + ("; ".join(f"{n:,} {k}" for k, n in held.items()) or "none") + "."]
    labels = counts["7_label"]
    text += [
        "",
        f"sft.jsonl: {labels['sft']:,} examples. kto.jsonl: {labels['kto']:,} examples, {labels['kto'] // 2:,} pairs.",
    ]
    text += ["", "| what became of an instruction | n |", "|---|---|"]
    text += [f"| {k} | {v:,} |" for k, v in labels["outcomes"].items()]
    text += ["", "| writer | best | worst | checked | right | share |", "|---|---|---|---|---|---|"]
    for w in WRITERS:
        checked, right = counts["6_score"]["verification"][w].values()
        row = [
            w,
            labels["best"].get(w, 0),
            labels["worst"].get(w, 0),
            checked,
            right,
            f"{right / checked:.3f}" if checked else "",
        ]
        text.append("| " + " | ".join(map(str, row)) + " |")
    text += ["", "| a label rests on | best | worst |", "|---|---|---|"]
    bases = (
        ("program", "a trusted reference, checked by a program"),
        ("rules", "rules"),
        ("judge", "the teacher's grades"),
    )
    text += [f"| {words} | {labels['best by'].get(k, 0):,} | {labels['worst by'].get(k, 0):,} |" for k, words in bases]
    text += [
        "",
        "Where a trusted file gives the reference inside the original response (GSM8K, AQuA), that response is right by "
        f"construction. {counts['1_collect']['references not trusted']:,} references were ignored, because their files are not "
        "in --trust-references.",
    ]
    j = counts["6_score"]["judge against verification"]
    text += [f"The teacher judged {counts['6_score']['judged']:,} instructions, "
             f"{counts['6_score']['judged for safety alone']:,} more for safety alone; {counts['6_score']['asked again']:,} "
             f"requests were sent again. Of {j['comparisons']:,} verified responses beside a refuted one it graded {j['agrees']:,} higher, "
             f"{j['ties']:,} alike."]  # fmt: skip
    o = counts["6_score"]["judge in two orders"]
    if o["instructions"]:
        text += [f"Of {o['instructions']:,} instructions judged in both orders {o['another best']:,} had another best response in "
                 f"the second; {o['another grade']:,} of {o['responses']:,} responses had another quality grade."]  # fmt: skip
    for name in ("form not kept", "unsafe by rule"):
        text += [
            "",
            f"{name.capitalize()}: " + "; ".join(f"{n:,} {w}" for w, n in counts["6_score"][name].items()) + ".",
        ]
    left_out = counts["5_respond"]["left out"]
    text += ["", "Responses left out: " + ("; ".join(f"{n:,} {k}" for k, n in left_out.items()) or "none") + "."]
    text += unanswered_lines(counts)
    for title, c, s in (("before", before, shape["before"]), ("after", after, shape["after"])):
        text += ["", f"## Categories {title} balancing", "", f"{s['categories']} categories, entropy {s['entropy']} nats, as even as "
                 f"{s['effective categories']} equal ones. Water level: {counts['4_balance']['water level']:,}.", "",
                 "| category | n | |", "|---|---|---|", *histogram(c)]  # fmt: skip
    distinct = counts["4_balance"]["distinct-n"]
    text += ["", f"Distinct 1-, 2- and 3-grams of {distinct['of instructions']:,} instructions, as shares of all: "
             f"{distinct['before']} before, {distinct['after']} after."]  # fmt: skip
    merged = counts["3_classify"]["merged spellings"]
    text += ["", "Spellings merged: " + ("; ".join(f"{k} ({', '.join(v)})" for k, v in merged.items()) or "none") + "."]
    with atomic_write(f"{out}/report.md") as f:
        f.write("\n".join(text) + "\n")


def dry_run(args, path, short, spent, answered, prices):
    """Prints, for the records of step 2 in `path`, what the teacher would be asked and cost, at most and likely, and three samples
    of it. short: the longest reply of a category or of grades, in tokens.

    At most: no record is dropped as unclassified or rare, all replies are as long as they may be, no two responses are equal, no
    verdict spares the judge, and every category and all grades are asked for twice, as those are that do not parse. Likely:
    replies are as long as the record's own response, or half of --max-new-tokens where it has none."""
    n, verifiable, sample, responses = 0, 0, None, 2 + args.samples
    classify, respond, judge = [], [], []  # of each record: tokens of its request; of the judge's, at most
    likely_replies = likely_judge = 0
    for _, record in read_jsonl(path):
        n += 1
        sample = sample or record
        response = record["response"] or ""
        reply = min(tokens_of(response), args.max_new_tokens) if response else args.max_new_tokens // 2
        own = (
            request_tokens(judge_request(record["prompt"], {}))
            + tokens_of(clip(response, JUDGE_CHARS))
            + FENCE_TOKENS * responses
        )
        classify.append(request_tokens(classify_request(record["prompt"])))
        respond.append(request_tokens(record["prompt"]))
        judge.append(own + (1 + args.samples) * args.max_new_tokens)
        likely_replies += reply
        likely_judge += own + (1 + args.samples) * reply
        kind = record["reference"] and record["reference"]["kind"]
        verifiable += bool(kind) and kind != "format" and (kind != "code" or args.allow_code_execution)
    left, asked = min(n, args.target), sum(respond)
    respond, judge = (sorted(tokens)[-left:] for tokens in (respond, judge))  # the longest may be those that are left
    again = [
        short + tokens_of(text) + 8 for text in (AGAIN_CLASSIFY, AGAIN_JUDGE)
    ]  # what a request is longer by the second time
    # a verifiable record is judged once, for safety alone
    share = 0 if args.judge_verified else verifiable / n
    orders, likely_orders = args.judge_orders, args.judge_orders * (1 - share) + share
    rows = [  # step, and at most: requests, tokens of the prompts, tokens of the replies; likely: tokens of either
        ("greeting", 1, request_tokens(GREETING), short, request_tokens(GREETING), 10),
        ("classify", 2 * n, 2 * sum(classify) + n * again[0], 2 * n * short, sum(classify), n * CATEGORY_TOKENS),
        ("respond", left, sum(respond), left * args.max_new_tokens, left / n * asked, left / n * likely_replies),
        ("judge", 2 * left * orders, orders * (2 * sum(judge) + left * again[1]), 2 * left * orders * short,
         left / n * likely_orders * likely_judge, left * likely_orders * responses * GRADE_TOKENS),
    ]  # fmt: skip
    rows.append(("together", *map(sum, list(zip(*rows))[1:])))
    unit, digits = ("price", 2) if prices else ("tokens", 0)
    print(
        f"\n{'asked of the teacher':<22}{'requests':>12}{'tokens in':>16}{'tokens out':>16}{unit + ' at most':>18}{'likely':>16}"
    )
    for name, requests, into, out, *likely in rows:
        most, guess = price((into, out), prices), price(likely, prices)
        print(f"{name:<22}{requests:>12,}{into:>16,}{out:>16,}{most:>18,.{digits}f}{guess:>16,.{digits}f}")
    spent = price(spent, prices)
    print("At most, but for the last column; by a guess of three bytes per token. "
          f"{answered:,} replies are kept already; {spent:,.6g} is spent.")  # fmt: skip
    if args.budget:
        stops = "may not suffice: the run stops before it is exceeded, and goes on with more"
        enough = "suffices" if spent + most <= args.budget else stops
        print(f"The budget of {args.budget:,g} {enough}.")
    shown = dict(
        zip(LETTERS, [sample["response"] or "(none)", "(the teacher's response)", "(the small model's response)"])
    )
    for name, messages in (("classify", classify_request(sample["prompt"])), ("respond", sample["prompt"]),
                           ("judge", judge_request(sample["prompt"], shown))):  # fmt: skip
        print(f"\n---- a request of {name}")
        for m in messages:
            print(f"[{m['role']}]\n{m['content']}")
    print("\nNothing was asked. Without --dry-run this runs.")
