"""Steps 1 to 5 of make_data.py: collect, deduplicate, classify, balance, respond. Steps 6 and 7 are in curation.labels.

The steps are those of arXiv 2411.02939. Each step is a generator of lines. It yields (True, record) for a record that
it keeps and (False, {"id", "reason", ...}) for one that it drops. It adds further numbers for the report to `counts`.
"""

import argparse
import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from core.records import Fields, read_jsonl, read_objects
from curation import contamination, dedup, rules, sources
from curation.prompts import (
    AGAIN_CLASSIFY,
    category_name,
    classify_request,
    clip,
    escape_messages,
    parse_category,
    prompt_text,
)
from curation.step_files import dropped, note_unanswered, read_chunks, set_aside, writer_family
from curation.task_types import conversation_type, language
from curation.teacher import Asker, ask_parsed
from verification.answers import check_reference

DISTINCT = 20_000  # maximum number of instructions for distinct-n


# ---------------------------------------------------------------------------------------------------------------------
# Step 1


def collect_sources(args: argparse.Namespace, files: list[str], counts: dict) -> Iterator[tuple[bool, dict]]:
    """Step 1: reads records of every shape and yields one record per instruction, with its task type by rule.

    A reference is kept only if args.trust_references names its file, because anybody can write one into a record.
    """
    counts |= {"by source": {}, "references not trusted": 0, "keys not read": {}}
    trusted_files = set(map(os.path.realpath, args.trust_references))
    for path, source in zip(files, sources.short_names(files)):
        taken, unread, licence_of_set = 0, Counter(), sources.licence_of_file(path)
        for n, (line, record) in enumerate(tqdm(read_objects(path), desc=source, unit="record", disable=None), 1):
            if args.limit and taken >= args.limit:
                break
            record_keys = set()
            try:
                found = sources.instructions(record, f"{path}:{line}", args.max_chars, record_keys)
            except sources.Drop as reason:
                yield False, {"id": f"{source}:{n}", "reason": str(reason)}
                continue
            taken += len(found)
            unread.update(record_keys)
            licence = sources.licence(record) or licence_of_set
            for i, one in enumerate(found):
                # n counts records, because an array may be on one line
                name = f"{source}:{n}" + (f".{i}" if len(found) > 1 else "")
                if os.path.realpath(path) in trusted_files:
                    if stated := one["reference"] or Fields(record).get("reference"):
                        check_reference(stated, f"{path}:{line}")
                elif one["reference"]:
                    one["reference"] = None
                    counts["references not trusted"] += 1
                about = {
                    "language": language(one["prompt"][-1]["content"]),
                    "task_type": conversation_type(one["prompt"]),
                }
                yield True, {"id": name, "source": source, **one, **about, "license": licence}
        counts["by source"][source] = taken
        counts["keys not read"][source] = dict(unread.most_common())


# ---------------------------------------------------------------------------------------------------------------------
# Step 2


def index_questions(files: list[str]) -> tuple[list[tuple[str, int, str]], dict]:
    """Evaluation files -> ([(file's short name, number, question)], contamination.build_index() of the questions)."""
    asked = [
        (name, n, question)
        for path, name in zip(files, sources.short_names(files, 3))
        for n, question in enumerate(sources.evaluation_questions(path), 1)
    ]
    return asked, contamination.build_index(question for _, _, question in asked)


def match_user_turns(path: str, questions: dict, n: int) -> np.ndarray:
    """Finds short questions in conversations -> (n,) int64: index of the question in a user's turn, -1 for none.

    In the text of a whole conversation, the other turns and the system prompt would hide a short question.
    """
    owner, found = [], np.full(n, -1)

    def turns() -> Iterator[str]:
        for i, (_, r) in enumerate(read_jsonl(path)):
            for message in r["prompt"] if len(r["prompt"]) > 1 else ():
                if message["role"] == "user":
                    owner.append(i)
                    yield message["content"]

    matches = contamination.find_contamination(turns(), questions)
    np.maximum.at(found, np.array(owner, np.int64), matches)
    return found


def deduplicate(args: argparse.Namespace, path: str, files: list[str], counts: dict) -> Iterator[tuple[bool, dict]]:
    """Step 2: drops near duplicates by simhash of the prompt, and prompts that contain an evaluation question.

    An original response that contains one is removed from its record. files: the evaluation files.
    """
    asked, questions = index_questions(files)
    responses = (r["response"] or "" for _, r in (read_jsonl(path) if questions else ()))
    bad_response = contamination.find_contamination(responses, contamination.without_near_questions(questions))
    merit, ids, conversations = [], [], False

    def prompts():
        nonlocal conversations
        for i, (_, r) in enumerate(tqdm(read_jsonl(path), desc="simhash", unit="record", disable=None)):
            # the duplicate to keep: one with a reference, then the one with the longer response, then the first
            length = 0 if questions and bad_response[i] >= 0 else len(r["response"] or "")
            merit.append((r["reference"] is not None) * 10_000 + min(length, 2000))
            ids.append(r["id"])
            conversations |= len(r["prompt"]) > 1
            yield prompt_text(r["prompt"])

    hashes, found = contamination.simhash_and_match(prompts(), questions)
    if questions and conversations:
        found = np.maximum(found, match_user_turns(path, questions, len(found)))
    rank = np.empty(len(merit), np.int64)
    rank[np.argsort(-np.array(merit, np.int64), kind="stable")] = np.arange(len(merit))
    keep, twin = dedup.keep_best(hashes, rank, args.hamming)
    counts |= {"contaminated by": Counter(), "responses removed": 0}
    for i, (_, record) in enumerate(read_jsonl(path)):
        cause = i if found[i] >= 0 else twin[i]  # the record that decides: itself, or its near duplicate
        if found[cause] >= 0:
            name, n, question = asked[found[cause]]
            counts["contaminated by"][name] += 1
            reason = "" if cause == i else "near duplicate of a record that "
            yield dropped(
                record, f"{reason}contains an evaluation question", of=f"{name}:{n}", question=clip(question, 200)
            )
        elif not keep[i]:
            yield dropped(record, "near duplicate", of=ids[cause])
        else:
            if questions and bad_response[i] >= 0:
                record["response"] = None
                counts["responses removed"] += 1
            yield True, record


# ---------------------------------------------------------------------------------------------------------------------
# Steps 3 and 4


def classify(path: str, teacher: Asker, counts: dict) -> Iterator[tuple[bool, dict]]:
    """Step 3: asks the teacher for the primary and secondary category of each instruction."""
    spellings, counts["asked again"] = defaultdict(set), 0
    for batch in read_chunks(path):
        requests = [classify_request(r["prompt"]) for r in batch]
        parsed, again = ask_parsed(teacher, requests, lambda i, text: parse_category(text), AGAIN_CLASSIFY, "classify")
        counts["asked again"] += again
        for record, (value, reason) in zip(batch, parsed):
            if value is None:
                yield set_aside(record, reason, counts)
                continue
            name = category_name(value[1])
            spellings[name].add(value[1])
            yield True, record | {"primary": value[0], "secondary": name}
    counts["merged spellings"] = {name: sorted(s) for name, s in sorted(spellings.items()) if len(s) > 1}


def water_level(counts: dict[str, int], target: int) -> tuple[dict[str, int], int]:
    """The most even quotas with `target` records in total. {category: n} -> ({category: quota}, level).

    Categories of at most `level` records are kept whole. Larger ones are cut to `level`. The remainder goes to the
    largest categories, one record each.
    """
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


def evenness(counts: dict[str, int]) -> tuple[float, float]:
    """{category: n} -> (entropy in nats, its exponential: the number of equal categories with that entropy)."""
    n = np.array([c for c in counts.values() if c], float)
    share = n / n.sum() if len(n) else n
    entropy = 0.0 - float((share * np.log(share)).sum())  # 0.0 - x, so that it is never -0.0
    return entropy, math.exp(entropy)


def draw_by_quota(
    args: argparse.Namespace, names: list[str], keys: list[bytes]
) -> tuple[set[int], dict[str, int], int]:
    """Draws records up to their category's quota, in the order of their keys. names: the category of each record.

    -> (indices of the drawn records, quotas, water level)
    """
    counts = {c: n for c, n in Counter(names).items() if n >= args.min_category}
    quotas, level = water_level(counts, args.target)
    left, chosen = dict(quotas), set()
    for i in sorted(range(len(names)), key=keys.__getitem__):
        if left.get(names[i], 0):
            left[names[i]] -= 1
            chosen.add(i)
    return chosen, quotas, level


def balance(args: argparse.Namespace, path: str, counts: dict) -> Iterator[tuple[bool, dict]]:
    """Step 4: drops rare secondary categories and samples the others down to one water level.

    A hash of seed and id decides which records stay, so the order of the input does not matter.
    """
    names, keys = [], []
    for _, r in read_jsonl(path):
        names.append(f"{r['primary']}/{r['secondary']}")
        keys.append(hashlib.sha256(f"{args.seed}:{r['id']}".encode()).digest()[:8])
    chosen, quotas, level = draw_by_quota(args, names, keys)
    # distinct-n falls as the number of texts grows, so it is computed on equally many before and after
    size = min(len(chosen), DISTINCT)
    before = set(sorted(range(len(names)), key=keys.__getitem__)[:size])
    after = set(sorted(chosen, key=keys.__getitem__)[:size])
    texts = {"before": [], "after": []}
    for i, (_, record) in enumerate(read_jsonl(path)):
        for when, some in (("before", before), ("after", after)):
            if i in some:
                texts[when].append(prompt_text(record["prompt"]))
        if i in chosen:
            yield True, record
        elif names[i] in quotas:
            yield dropped(record, "over the water level", category=names[i])
        else:
            yield dropped(record, f"category with fewer than {args.min_category}", category=names[i])
    shares = {when: [round(dedup.distinct(some, n), 4) for n in (1, 2, 3)] for when, some in texts.items()}
    counts |= {
        "water level": level,
        "before": dict(Counter(names).most_common()),
        "after": dict(Counter(quotas).most_common()),
        "distinct-n": {"of instructions": size} | shares,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Step 5


def why_left_out(reply: dict, text: str, must_respond: bool) -> str | None:
    """The reason to leave out a reply. None if it is used. text: the reply's cleaned text.

    must_respond: also leave out a reply that declines.
    """
    if "error" in reply:
        return "refused by the endpoint"
    if reply["finish_reason"] == "content_filter":
        return "held back by the endpoint"
    if reply["finish_reason"] == "length":
        return "cut off"
    if not text:
        return "empty"
    return "declined" if must_respond and rules.declines(text) else None


def ask_writers(
    args: argparse.Namespace, batch: list[dict], teacher: Asker, small: Asker, recorded: dict
) -> list[dict]:
    """-> for each record {writer: reply}: the original response, the teacher's, and --samples of the small model.

    The small model's first response is greedy. recorded: from sources.recorded_responses(), used instead of asking.
    """
    replies = [{"original": {"text": r["response"] or "", "finish_reason": "stop"}} for r in batch]
    writers = [("teacher", teacher, 0, {}), ("small", small, 0, {})]
    for k in range(1, args.samples):
        writers.append((f"small-{k + 1}", small, k, {"temperature": args.temperature, "seed": args.seed + k}))
    for writer, asker, k, sampling in writers:
        ask = []
        for i, record in enumerate(batch):
            kept = recorded.get((writer_family(writer), sources.prompt_key(record["prompt"])), [])
            if k < len(kept):
                replies[i][writer] = kept[k]
            else:
                ask.append(i)
        prompts = [escape_messages(batch[i]["prompt"]) for i in ask]
        for i, reply in zip(ask, asker.ask(prompts, f"respond: {writer}", **sampling)):
            replies[i][writer] = reply
    return replies


def respond(
    args: argparse.Namespace, path: str, teacher: Asker, small: Asker, files: list[str], counts: dict
) -> Iterator[tuple[bool, dict]]:
    """Step 5: adds the original response, the teacher's and the small model's to each instruction.

    Leaves out responses that are empty, cut off, or contain an evaluation question. A teacher's response that declines
    is left out too, except in the category safety. A small model's response that declines is kept as a bad example.
    files: the evaluation files.
    """
    counts |= {"left out": Counter(), "recorded": Counter()}
    questions = contamination.without_near_questions(index_questions(files)[1])
    recorded = {}
    if args.recorded:
        wanted = {sources.prompt_key(r["prompt"]) for _, r in read_jsonl(path)}
        recorded = sources.recorded_responses(args.recorded, wanted)
    for batch in read_chunks(path):
        replies = ask_writers(args, batch, teacher, small, recorded)
        flat = [
            (i, writer, sources.clean(reply.get("text", "")))
            for i, some in enumerate(replies)
            for writer, reply in some.items()
        ]
        found = contamination.find_contamination((text for _, _, text in flat), questions)
        for record in batch:
            del record["response"]
            record["responses"] = {}
        for (i, writer, text), question in zip(flat, found):
            reply = replies[i][writer]
            why = why_left_out(reply, text, writer == "teacher" and batch[i]["primary"] != "safety")
            if why or question >= 0:
                counts["left out"][f"{writer_family(writer)}: {why or 'contains an evaluation question'}"] += 1
                if "error" in reply:
                    note_unanswered(counts, batch[i]["id"], f"{writer_family(writer)}: {reply['error']}")
                continue
            batch[i]["responses"][writer] = {"text": text}
            if "recorded" in reply:
                batch[i]["responses"][writer]["recorded"] = reply["recorded"]
                counts["recorded"][writer_family(writer)] += 1
        for record in batch:
            yield (True, record) if record["responses"] else dropped(record, "no response is left")
