"""Reads the data sources: instructions, references and licences of records, and the questions of evaluation files.

    for line, record in read_objects("alpaca.json.gz"):
        for found in instructions(record, where, max_chars):     # {"prompt", "response", "reference"}

core.conversations reads the shapes of records. A broken line or an unknown shape raises InputError with file and line.
A well-formed record that cannot be used (empty, cut off, garbled, tool calls) raises Drop with a reason. The reasons
are counted.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from core.card import readme_license
from core.conversations import Dialogue, Unusable, as_messages, dialogues
from core.files import InputError, shown, warn_once
from core.records import Fields, open_bytes, read_objects
from curation import rules
from verification.answers import tested_function
from verification.thoughts import without_thought

MBPP_KEYS = {"task_id", "text", "code", "test_list", "test_setup_code", "test_imports"}  # read by code_with_tests()
OWN_KEYS = {"reference", "instruction_id_list", "kwargs", "license", "licence", "writer"}  # read here, not in core/
# Signs of garbled text: the replacement character, half a surrogate pair, GBK's filler, and UTF-8 that was read as
# Latin-1 or Windows-1252. The last pattern needs two Chinese characters in a row: one alone may be French ("é »")
FOLLOWS = "\u0080-\u00bf" + bytes(range(0x80, 0xA0)).decode("cp1252", "ignore")
MOJIBAKE = re.compile(
    "[\ufffd\ud800-\udfff]|锟斤拷|烫烫烫|\u00ef\u00bf\u00bd|\u00e2[\u0080-\u00bf\u02c6\u2020\u201a\u20ac]|"
    "[\u00c2\u00c3][\u0080-\u00bf]|"
    f"[\u00c4-\u00f4][\u00a0-\u00bf]?[\u0080-\u009f]|(?:[\u00e3-\u00e9][{FOLLOWS}]{{2}}){{2}}"
)


class Drop(Exception):
    """Raised for a well-formed record that is not used. The message is the reason, always in the same words."""


# An answer option of AQuA. A phrase such as "Let's think" follows the last option on the same line
AQUA_OPTION = re.compile(
    r"^\(([A-E])\)\s*(.*?)(?: (?:Let's|Think|Some|Stream|Thoughts|Chain|Reasoning|Now|Hmmm|Random|OK)\b.*)?$", re.M
)

# ---------------------------------------------------------------------------------------------------------------------
# Files: names and licences

# The path of a data set's file in the hub's cache
HUB = re.compile(r"(.*/datasets--([^/]+)--([^/]+)/snapshots/[^/]+)/(.+)")


def licence(record: dict) -> str | None:
    """The licence that a record states."""
    value = Fields(record).first("license", "licence")
    return value if isinstance(value, str) and value.strip() else None


def licence_of_file(path: str) -> str | None:
    """The licence that a hub data set states in its README.md."""
    found = HUB.fullmatch(os.path.abspath(path))
    return readme_license(found[1]) if found else None


def short_names(files: list[str], parts_shown: int = 2) -> list[str]:
    """A short name of each file: OWNER/NAME/FILE for files of the hub, else the last `parts_shown` parts of the path.

    If two names are equal, more parts are shown.
    """
    hub = [HUB.fullmatch(os.path.abspath(f)) for f in files]
    parts = [os.path.abspath(f).split(os.sep) for f in files]
    for n in range(parts_shown, max([parts_shown, *map(len, parts)]) + 1):
        names = ["/".join(h.groups()[1:] if h else p[-n:]) for h, p in zip(hub, parts)]
        if len(set(names)) == len(names):
            break
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Records to instructions


def clean(text: str) -> str:
    """Normalises a text: Unicode NFC, \\n line ends, no byte-order marks or zero-width spaces, stripped."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    return text.replace("\ufeff", "").replace("\u200b", "").replace("\u00a0", " ").strip()


def clean_messages(messages: list[dict]) -> list[dict]:
    """Cleans the contents, and leaves out thoughts and empty system messages. Raises Drop for garbled text."""
    if any(MOJIBAKE.search(m["content"]) for m in messages):  # before clean(), which removes some of the signs
        raise Drop("garbled text")
    messages = [{"role": m["role"], "content": clean(m["content"])} for m in messages]
    for message in messages:
        if message["role"] == "assistant":
            message["content"] = without_thought(message["content"])
    return [m for m in messages if m["content"] or m["role"] != "system"]


def read_reference(record: dict, prompt: str, response: str | None) -> tuple[dict | None, str, str | None]:
    """Reads a record's reference. -> (reference or None, prompt text, response text)

    The reference is the key "reference", or is read from GSM8K's last line `#### 72`, from AQuA's options and "the
    answer is (C)", or from IFEval's instruction_id_list and kwargs. Anybody can write these into a record, so the
    caller must use them only for trusted files, after check_reference().
    """
    if escaped := re.search(r"Options:\s*\\n\s*\(A\)", prompt):  # AQuA writes its line ends as \n
        prompt = prompt.replace("\\n", "\n")
    number = re.search(r"\n?#### *(-?[\d,.]*\d[\d,.]*)\s*$", response or "")
    letter = re.search(r"\banswer(?: is)?:? \(([A-E])\)\.?\s*$", response or "")
    reference = None
    if number:  # drop GSM8K's calculator notes <<48/2=24>> and its mark ####
        body = re.sub(r"<<[^<>]*>>", "", response[: number.start()]).strip()
        value = number[1].rstrip(".").replace(",", "")
        reference, response = {"kind": "number", "value": value}, f"{body}\nThe answer is {value}.".strip()
    elif letter and "Options:" in prompt:
        response = response.replace("\\n", "\n") if escaped else response
        choices = {name: text.strip() for name, text in AQUA_OPTION.findall(prompt)}
        if letter[1] in choices and len(choices) > 1:
            reference = {"kind": "choice", "value": {"letter": letter[1], "choices": choices}}
    if "instruction_id_list" in record:
        reference = {"kind": "format", "value": {name: record.get(name) for name in ("instruction_id_list", "kwargs")}}
    if isinstance(record.get("reference"), dict):
        reference = record["reference"]
    return reference, prompt, response


def code_with_tests(record: dict) -> dict:
    """Turns a row of MBPP (arXiv 2108.07732) into prompt, completion and reference. Returns other records unchanged.

    The task is `text` in the full set and `prompt` in the sanitized one. The prompt shows the tests, because they name
    the function.
    """
    task, code, tests = record.get("text") or record.get("prompt"), record.get("code"), record.get("test_list")
    imports = record.get("test_imports") or []
    if "task_id" not in record or not (isinstance(task, str) and isinstance(code, str)):
        return record
    if not (isinstance(tests, list) and isinstance(imports, list)):
        return record
    setup = [record.get("test_setup_code") or "", *imports]
    if not tests or not all(isinstance(line, str) for line in (*setup, *tests)):
        return record
    prompt = f"{task}\nYour code should pass these tests:\n\n" + "\n".join(tests)
    value = {"tests": "\n".join([*setup, *tests]).strip(), "entry_point": tested_function(code, "\n".join(tests))}
    others = {key: record[key] for key in record if key not in MBPP_KEYS}
    return others | {"prompt": prompt, "completion": code, "reference": {"kind": "code", "value": value}}


def as_instruction(dialogue: Dialogue, record: dict, max_chars: int) -> dict:
    """Turns a dialogue of a record into {"prompt", "response", "reference"}, see instructions(). Raises Drop."""
    messages, response = clean_messages(dialogue.prompt), None
    if not messages or messages[-1]["role"] != "user":
        raise Drop("no user turn before the response")
    if any(m["role"] == "system" for m in messages[1:]):
        raise Drop("a system turn inside the conversation")
    if dialogue.reply and dialogue.reply.get("weight") != 0:  # a reply with weight 0 is not to be learned
        response = clean_messages([dialogue.reply])[0]["content"] or None
    reference, prompt, response = read_reference(record, messages[-1]["content"], response)
    messages[-1] = {"role": "user", "content": prompt}
    texts = [m["content"] for m in messages] + [response or ""]
    if not all(m["content"] for m in messages):
        raise Drop("an empty turn")
    if sum(map(len, texts)) > max_chars:
        raise Drop("over-long")
    if any(re.search(r"\{\{ ?\w+ ?\}\}", t) and "```" not in t for t in texts):
        raise Drop("unfilled template")
    if rules.cut_off(response or ""):
        raise Drop("a response that is cut off")
    return {"prompt": messages, "response": response, "reference": reference}


def instructions(record: dict, where: str, max_chars: int, unread: set | None = None) -> list[dict]:
    """A record of any known shape -> [{"prompt": messages, "response": text or None, "reference": dict or None}].

    The prompt ends with a user's message. The response of a preference is the better reply. The reference is not
    checked yet, see read_reference(). unread: a set to which the unused keys are added. Raises Drop for a record that
    cannot be used.
    """
    fields = Fields(code_with_tests(record))
    try:
        found = dialogues(fields, where)
    except Unusable as e:
        raise Drop(e.reason) from None
    if fields.get("label", fields.get("kto_tag")) is False:  # an undesirable reply; its instruction may be used
        found = [dialogue if dialogue.rejected else dialogue._replace(reply=None) for dialogue in found]
        fields.unread -= {"label", "kto_tag"}
    if unread is not None:
        unread |= fields.unread - OWN_KEYS | {"rejected" for dialogue in found if dialogue.rejected}
    return [as_instruction(dialogue, fields, max_chars) for dialogue in found]


# ---------------------------------------------------------------------------------------------------------------------
# Recorded responses


def prompt_key(messages: list[dict]) -> bytes:
    """A hash that identifies a prompt."""
    return hashlib.sha256(json.dumps([[m["role"], m["content"]] for m in messages]).encode()).digest()


def recorded_in(record: dict, where: str) -> Iterator[tuple[str, list[dict], str | None]]:
    """Yields (writer, prompt, response) of a record.

    The record has any known shape and a "writer" (default "teacher"), or is a line of 5_respond.jsonl, with a prompt
    and {writer: response}.
    """
    fields = Fields(record)
    if "responses" not in fields:
        for found in instructions(record, where, 1 << 30):
            yield fields.get("writer", "teacher"), found["prompt"], found["response"]
        return
    if not isinstance(record["responses"], dict):
        raise InputError(
            f"{where}: responses is {shown(record['responses'])}; it is an object of writers and responses"
        )
    prompt = clean_messages(as_messages(record.get("prompt"), where))
    for writer, response in record["responses"].items():
        if writer != "original":
            text = response["text"] if isinstance(response, dict) and "text" in response else response
            reply = as_messages(text or "", f"{where}: the response of {writer}", "assistant")
            yield writer.partition("-")[0], prompt, clean_messages(reply)[0]["content"]


def read_recorded(path: str) -> Iterator[tuple[str, list[dict], str | None]]:
    """Yields ("teacher" or "small", prompt, response) of a file's usable records. InputError for a malformed one."""
    for line, record in read_objects(path):
        where = f"{path}:{line}"
        with contextlib.suppress(Drop, Unusable):
            for writer, prompt, text in recorded_in(record, where):
                if writer not in ("teacher", "small"):
                    raise InputError(f"{where}: the writer is {shown(writer)}; it must be teacher or small")
                yield writer, prompt, text


def recorded_responses(files: list[str], wanted: set[bytes]) -> dict[tuple[str, bytes], list[dict]]:
    """Reads recorded responses. wanted: the prompt_key() of each prompt whose responses are needed.

    -> {("teacher" or "small", prompt_key): replies in the order of the files}. A reply is {"text", "finish_reason",
    "recorded": the file's short name}. Unusable records are skipped. Warns of a file without any needed response.
    """
    found = {}
    for path, name in zip(files, short_names(files)):
        used = 0
        for writer, prompt, text in read_recorded(path):
            key = prompt_key(prompt)
            if key in wanted and text:
                reply = {"text": text, "finish_reason": "stop", "recorded": name}
                found.setdefault((writer, key), []).append(reply)
                used += 1
        if not used:
            warn_once(f"{path}: has no response to any of the {len(wanted):,} instructions")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Questions of evaluation files, for decontamination

QUESTION_KEYS = ("question", "Question", "prompt", "instruction", "Instruction", "text", "input", "problem", "turns")
QUESTION_KEYS += ("stem", "ctx", "messages", "conversations")  # ARC, HellaSwag, this project's own shapes


def evaluation_questions(path: str) -> list[str]:
    """All questions of an evaluation file in its original format (CSV, JSON, JSON Lines, Parquet)."""
    if path.removesuffix(".gz").endswith(".csv"):
        found = csv_questions(path)
    else:
        try:
            with open_bytes(path) as file:
                objects = [json.loads(file.read())]
        except (ValueError, RecursionError):  # not one JSON value
            objects = [record for _, record in read_objects(path)]
        found = [q for value in objects for q in questions_in(value)]
    if not found:
        raise InputError(f"{path}: no evaluation question found; looked for the keys {', '.join(QUESTION_KEYS)}")
    return found


def csv_questions(path: str) -> list[str]:
    """The column named by one of QUESTION_KEYS. Without a header (MMLU's files have none) the first of every row."""
    with open_bytes(path) as file:
        try:
            rows = list(csv.reader(io.StringIO(file.read().decode("utf-8-sig"), newline="")))
        except UnicodeDecodeError as e:
            raise InputError(f"{path}: not UTF-8: {e}; convert it first") from None
        except csv.Error as e:
            raise InputError(f"{path}: not CSV: {e}") from None
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    named = [key for key in map(str.lower, QUESTION_KEYS) if key in header]
    if "question" in named or named and header[-1] not in ("a", "b", "c", "d"):  # how MMLU's rows end
        column = header.index(named[0])
        return [row[column] for row in rows[1:] if len(row) > column]
    return [row[0] for row in rows if row]


def turn_question(message: dict) -> str | None:
    """The text of a user's message. None for another role: a system prompt is no question."""
    fields = Fields(message)
    if fields.get("role", fields.get("from", "user")) not in ("user", "human", "prompter"):
        return None
    return fields.get("content", fields.get("value"))


def questions_in(value: Any) -> list[str]:
    """All questions at any depth of a JSON value."""
    if isinstance(value, list):
        return [q for item in value for q in ([item] if isinstance(item, str) else questions_in(item))]
    if not isinstance(value, dict):
        return []
    for key in QUESTION_KEYS:
        if isinstance(value.get(key), str):
            extra = value.get("input") if key.lower() == "instruction" else None
            return [f"{value[key]}\n{extra}" if extra else value[key]]
        if isinstance(value.get(key), list):
            parts = [turn_question(turn) if isinstance(turn, dict) else turn for turn in value[key]]
            return [part for part in parts if isinstance(part, str)]
    return [q for item in value.values() if isinstance(item, (list, dict)) for q in questions_in(item)]
