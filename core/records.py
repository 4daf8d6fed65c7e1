"""Records of training data: JSON Lines, conversations, feedback."""

import contextlib
import gzip
import json
import os
import zlib

from core.files import InputError, atomic_write

ROLES = ("system", "user", "assistant")


# ---------------------------------------------------------------------------------------------------------------------
# Data


@contextlib.contextmanager
def open_bytes(path):
    """A file opened for reading bytes, unzipped if its name ends in .gz."""
    try:
        with gzip.open(path) if os.fspath(path).endswith(".gz") else open(path, "rb") as f:
            yield f
    except (OSError, EOFError, zlib.error) as e:
        raise InputError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None


def read_jsonl(path):
    """Yields (line number, object) for each line of a JSON Lines file, which may be gzipped."""
    with open_bytes(path) as f:
        yield from json_lines(f, path)


def json_lines(file, path):
    """read_jsonl of an open file. Blank lines are passed over. path: for the errors."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))  # some editors put a mark of the byte order first
        except UnicodeDecodeError as e:
            raise InputError(f"{path}:{number}: not UTF-8: {e}; convert it first") from None
        except (ValueError, RecursionError) as e:
            raise InputError(f"{path}:{number}: not JSON: {e}; one object a line is expected") from None
        if not isinstance(record, dict):
            raise InputError(
                f"{path}:{number}: a {type(record).__name__}, not an object; one object a line is expected"
            )
        yield number, record


def write_jsonl(path, rows):
    with atomic_write(path) as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_messages(value, where, role="user"):
    """A string, which stands for one message of `role`, or a list of messages -> a checked list of messages."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: expected a text or a list of messages, found {json.dumps(value)[:60]}")
    for i, m in enumerate(value):
        if not isinstance(m, dict) or m.get("role") not in ROLES:
            raise InputError(f"{where}: message {i} needs a role, one of {', '.join(ROLES)}")
        if not isinstance(m.get("content"), str):
            raise InputError(f"{where}: message {i} ({m['role']}) has no content; content is a text")
        try:
            m["content"].encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{where}: message {i} ({m['role']}) holds half of a surrogate pair; remove the record"
            ) from None
        if m.get("tool_calls"):
            raise InputError(f"{where}: message {i} calls tools, which are not supported; remove the record")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def one_reply(value, where):
    """A completion, as a text or as a list of one assistant message -> its text."""
    reply = as_messages(value, where, role="assistant")
    if len(reply) != 1 or reply[0]["role"] != "assistant":
        raise InputError(f"{where}: a completion is one assistant message")
    return reply[0]["content"]


def alpaca_prompt(record, where):
    """Alpaca's instruction and optional input -> the user's message, the two joined by a newline."""
    instruction, extra = record["instruction"], record.get("input") or ""
    if not isinstance(instruction, str) or not isinstance(extra, str):
        raise InputError(f"{where}: instruction and input are texts")
    return f"{instruction}\n{extra}" if extra else instruction


def sft_messages(record, where):
    """A record of any SFT format -> a conversation. where: "file:line", for the errors.

    {"messages"}, {"prompt", "completion"} (texts or message lists), or Alpaca's {"instruction", "input", "output"}.
    """
    if "messages" in record:
        messages = as_messages(record["messages"], where)
    elif "prompt" in record and "completion" in record:
        reply = one_reply(record["completion"], where)
        messages = as_messages(record["prompt"], where) + [{"role": "assistant", "content": reply}]
    elif "instruction" in record and "output" in record:
        reply = one_reply(record["output"], where)
        messages = as_messages(alpaca_prompt(record, where), where) + [{"role": "assistant", "content": reply}]
    else:
        raise InputError(
            f"{where}: keys {sorted(record)}: expected messages, or prompt and completion, or instruction and output"
        )
    if all(m["role"] != "assistant" for m in messages):
        raise InputError(f"{where}: no assistant message, so nothing to learn from")
    return messages


def kto_example(record, where):
    """{"prompt", "completion", "label"} or {"messages", "label"} -> (prompt messages, completion text, label)."""
    label = record.get("label")
    if not isinstance(label, bool):
        raise InputError(f"{where}: label is {json.dumps(label)}; it is true (desirable) or false (undesirable)")
    if "messages" in record:
        *prompt, last = as_messages(record["messages"], where)
        if not prompt:
            raise InputError(f"{where}: messages hold a completion but no prompt")
        return prompt, one_reply([last], where), label
    if "prompt" not in record or "completion" not in record:
        raise InputError(
            f"{where}: keys {sorted(record)}: expected prompt, completion and label, or messages and label"
        )
    return as_messages(record["prompt"], where), one_reply(record["completion"], where), label


def read_records(paths, parse):
    """[(where, parse(record, where))] over all lines of all files. parse: sft_messages or kto_example."""
    records = [(f"{p}:{n}", parse(r, f"{p}:{n}")) for p in paths for n, r in read_jsonl(p)]
    if not records:
        raise InputError(f"{', '.join(map(os.fspath, paths))}: no records; nothing to train on")
    return records
