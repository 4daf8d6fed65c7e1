"""The records and output files of make_data.py's steps.

A step is not run again while its input files and arguments are unchanged.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from types import NoneType
from typing import Any

from core.conversations import as_messages
from core.files import InputError, atomic_write, check_regular, shown, warn_once
from core.records import read_jsonl
from curation.prompts import NO_ANSWER, UNANSWERED, clip, prompt_text
from verification.answers import check_reference

STEPS = ("1_collect", "2_dedup", "3_classify", "4_balance", "5_respond", "6_score", "7_label")
# All files that make_data.py writes
FILES = [f"{step}{kind}.jsonl" for step in STEPS for kind in ("", ".dropped")]
FILES += ["sft.jsonl", "kto.jsonl", "report.json", "report.md", "state.json", "replies.jsonl"]
FORMAT = 5  # raise it when a step's output changes: steps of older runs then run again, on the kept replies
WRITERS = ("original", "teacher", "small")  # of responses; further samples of the small model: small-2, small-3, ...
CHUNK = 10_000  # records in memory at a time
NAMED = 20  # maximum number of unanswered records named in the report
HINTS = {  # advice if a step leaves no record
    "1_collect": "see its .dropped.jsonl and check that the --sources contain records",
    "4_balance": "lower --min-category",
}


# ---------------------------------------------------------------------------------------------------------------------
# The records and lines of a step


def read_chunks(path: str) -> Iterator[list[dict]]:
    """The records of a step's file, CHUNK at a time."""
    records = (record for _, record in read_jsonl(path))
    return iter(lambda: list(itertools.islice(records, CHUNK)), [])


def writer_family(writer: str) -> str:
    """ "small-2" -> "small"."""
    return writer.partition("-")[0]


def dropped(record: dict, reason: str, **more: Any) -> tuple[bool, dict]:
    """The line of a dropped record. more: further keys of the line."""
    return False, {
        "id": record["id"],
        "reason": reason,
        **more,
        "instruction": clip(prompt_text(record["prompt"]), 200),
    }


def note_unanswered(counts: dict, name: str, why: str) -> None:
    """Counts a request that a model did not answer. Keeps the names and reasons of the first NAMED records.

    "to ask again": requests that failed every time. The endpoint refused the others.
    """
    unanswered = counts.setdefault("unanswered", {"requests": 0, "to ask again": 0, "records": {}})
    unanswered["requests"] += 1
    unanswered["to ask again"] += NO_ANSWER in why
    if len(unanswered["records"]) < NAMED:
        unanswered["records"][name] = why


def set_aside(record: dict, reason: str, counts: dict) -> tuple[bool, dict]:
    """The line of a record that is dropped without a usable reply. reason: from ask_parsed()."""
    reason, _, why = reason.partition(": ")
    if reason == UNANSWERED:
        note_unanswered(counts, record["id"], why)
    return dropped(record, reason, **({"why": why} if why else {}))


# ---------------------------------------------------------------------------------------------------------------------
# The files of a step


def file_hash(path: str) -> str:
    h = hashlib.sha256()
    check_regular(path)
    try:
        with open(path, "rb") as f:
            while block := f.read(1 << 20):
                h.update(block)
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror or e}") from None
    return h.hexdigest()


def load_state(out: str) -> dict:
    """{step: {"key", "counts", "files"}} of the finished steps in `out`."""
    path = f"{out}/state.json"
    check_regular(path)
    try:
        with open(path, encoding="utf-8") as f:
            state = json.load(f)
        for step in state.values():
            step["key"], step["counts"].items(), step["files"].items()
        return state
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"{path}: corrupt; delete it to run the steps again (kept replies are not requested again)"
        ) from None


def save_state(out: str, state: dict) -> None:
    with atomic_write(f"{out}/state.json") as f:
        json.dump(state, f, indent=1, ensure_ascii=False)


def step_files(out: str, name: str) -> dict:
    """{kind: path} of a step's files. Kinds: True (kept) and False (dropped); for the last step "sft" and "kto"."""
    if name == STEPS[-1]:
        return {kind: f"{out}/{kind}.jsonl" for kind in ("sft", "kto")}
    return {True: f"{out}/{name}.jsonl", False: f"{out}/{name}.dropped.jsonl"}


def write_lines(files: dict, lines: Iterable[tuple]) -> dict:
    """Writes each (kind, line) to the file of its kind. -> the numbers of lines, and of dropped lines by reason."""
    n, reasons = Counter(), Counter()
    with contextlib.ExitStack() as stack:
        opened = {kind: stack.enter_context(atomic_write(path)) for kind, path in files.items()}
        for kind, line in lines:
            opened[kind].write(json.dumps(line, ensure_ascii=False) + "\n")
            n[kind] += 1
            if kind is False:
                reasons[line["reason"]] += 1
    if True in files:
        return {"in": n[True] + n[False], "out": n[True], "dropped": dict(reasons.most_common())}
    return {kind: n[kind] for kind in files}


def write_files(state: dict, out: str, name: str, key: str, lines: Iterable[tuple], counts: dict) -> None:
    """Writes a step's files and its entry in the state. If no record is left, the entry is not saved."""
    files = step_files(out, name)
    if state.pop(name, None):  # forget the old key before the first file is replaced
        save_state(out, state)
    written = write_lines(files, lines)
    hashes = {os.path.basename(path): file_hash(path) for path in files.values()}  # the folder may be moved
    state[name] = {"key": key, "counts": written | counts, "files": hashes}
    if written.get("out") != 0:
        save_state(out, state)


def ask_again(state: dict, out: str, name: str, lines: Iterable[tuple], counts: dict) -> bool:
    """Runs a finished step again for its requests without an answer. False if it stays as it is.

    The other replies are in the log. Warns if the teacher cannot be asked now. A file that was edited is not replaced.
    """
    entry = state[name]
    requests = entry["counts"].get("unanswered", {}).get("to ask again", 0)
    if not requests or edited_files(state, out, name):
        return False
    try:
        write_files(state, out, name, entry["key"], lines, counts)
    except InputError as e:
        state[name] = entry
        save_state(out, state)
        warn_once(f"{name}: requests without an answer are not asked again: {e}")
        return False
    return True


def edited_files(state: dict, out: str, name: str) -> dict:
    """{kind: path} of a step's files that have changed since the step ran."""
    hashes, files = state[name]["files"], step_files(out, name)
    return {kind: path for kind, path in files.items() if file_hash(path) != hashes.get(os.path.basename(path))}


def write_step(
    out: str, state: dict, name: str, inputs: list[str], arguments: dict, lines: Iterable[tuple], counts: dict
) -> dict:
    """Writes a step's files, unless they were made from the same input files and arguments. -> the step's counts

    lines: the step's generator of (kind, line), which fills `counts`. It is not started if the files are kept. A file
    that was edited by hand is kept too, and the steps after it run again. Requests that failed every time are asked
    again. InputError if no record is left; the step then counts as not run, because the teacher may answer next time.
    """
    files = step_files(out, name)
    made_from = json.dumps([FORMAT, arguments, [file_hash(path) for path in inputs]], sort_keys=True)
    key = hashlib.sha256(made_from.encode()).hexdigest()
    reused = state.get(name, {}).get("key") == key and all(map(os.path.exists, files.values()))
    if not reused:
        write_files(state, out, name, key, lines, counts)
    elif ask_again(state, out, name, lines, counts):
        reused = False
    counts = state[name]["counts"]
    print_step(name, counts, reused)
    for kind, path in edited_files(state, out, name).items() if reused else ():
        print(f"{'':<11}   {path} was edited since its step ran and is kept; delete it to run the step again")
        if kind is True:
            check_edited(path, name)
    if counts.get("out") == 0:
        raise InputError(f"{files[True]}: no record is left; {HINTS.get(name, 'see its .dropped.jsonl')}")
    return counts


def check_edited(path: str, name: str) -> None:
    """InputError if a step's file, which was edited by hand, has a record that the next steps cannot read."""
    kinds = dict.fromkeys(("id", "source", "language", "task_type"), str)
    kinds |= {"prompt": list, "reference": (dict, NoneType), "license": (str, NoneType)}
    kinds |= dict.fromkeys(("primary", "secondary"), str) if name >= "3_classify" else {}
    kinds |= {"responses": dict} if name >= "5_respond" else {"response": (str, NoneType)}
    scores = ("verified", "quality", "safety", "perplexity", "composite") if name == "6_score" else ()
    for line, record in read_jsonl(path):
        where = f"{path}:{line}"
        for key, kind in kinds.items():
            if key not in record or not isinstance(record[key], kind):
                fault = f"{key} is missing or of a wrong type"
                raise InputError(f"{where}: {fault}; correct the record, or delete the file to run the step again")
        as_messages(record["prompt"], where)
        if record["reference"]:
            check_reference(record["reference"], where)
        for writer, reply in record.get("responses", {}).items():
            if not isinstance(reply, dict) or not isinstance(reply.get("text"), str) or not reply.keys() >= set(scores):
                needs = ", ".join(["text", *scores])
                raise InputError(f"{where}: the response of {writer} is {shown(reply)}; it is an object with {needs}")


def print_step(name: str, counts: dict, reused: bool) -> None:
    numbers = {k: v for k, v in counts.items() if isinstance(v, int) and (v or k in ("in", "out", "sft", "kto"))}
    text = ", ".join(f"{k} {v:,}" for k, v in numbers.items())
    print(f"{name:<11} {text}{' (unchanged)' if reused else ''}", flush=True)
    for reason, n in counts.get("dropped", {}).items():
        print(f"{'':<11}   dropped {n:,}: {reason}")
    if counts.get("references not trusted"):
        print(f"{'':<11}   references are used where --trust-references names their file")
