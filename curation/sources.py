"""Step 1's reading: JSON Lines and JSON arrays, plain or gzip, local or from the hub, in the shapes that open data comes in.

    for line, obj in read_objects("alpaca.json.gz"):
        for found in instructions(obj, where, max_chars):     # {"prompt", "response", "reference"}

A line that is broken, or of no known shape, raises InputError with its file and line. A record that is well-formed but of no
use (empty, cut off, garbled) raises Drop with the reason, which the caller counts.
"""

import codecs
import contextlib
import csv
import fnmatch
import glob
import hashlib
import io
import json
import os
import re
import unicodedata

from core.files import InputError
from core.records import json_lines, open_bytes
from curation import rules
from verification.ifeval import follows

ROLES = {"system": "system", "user": "user", "human": "user", "prompter": "user",
         "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant"}  # fmt: skip
TOOL_ROLES = {"tool", "function", "function_call", "observation", "ipython"}
CHUNK, LONGEST = 1 << 20, 1 << 26  # characters read at a time; the most that one object of an array may take
# What could not be decoded, half a surrogate pair, GBK's filler, and UTF-8 read as Latin-1 or as Windows' code page: marks that
# stand in no good text, or two Chinese characters (one alone may be French: "é »")
FOLLOWS = "\u0080-\u00bf" + bytes(range(0x80, 0xA0)).decode("cp1252", "ignore")
MOJIBAKE = re.compile("[\ufffd\ud800-\udfff]|锟斤拷|烫烫烫|\u00ef\u00bf\u00bd|\u00e2[\u0080-\u00bf\u02c6\u2020\u201a\u20ac]|"
                      "[\u00c2\u00c3][\u0080-\u00bf]|"
                      f"[\u00c4-\u00f4][\u00a0-\u00bf]?[\u0080-\u009f]|(?:[\u00e3-\u00e9][{FOLLOWS}]{{2}}){{2}}")  # fmt: skip


class Drop(Exception):
    """A well-formed record that is not used. The message is the reason, the same words for the same reason."""


# an option of AQuA's; after the last one follows, on the same line, what sets the model thinking
AQUA_OPTION = re.compile(
    r"^\(([A-E])\)\s*(.*?)(?: (?:Let's|Think|Some|Stream|Thoughts|Chain|Reasoning|Now|Hmmm|Random|OK)\b.*)?$", re.M
)

# ---------------------------------------------------------------------------------------------------------------------
# Files


def expand(patterns):
    """File names, globs and hf://datasets/OWNER/NAME[@REVISION]/FILE -> the files, in order; those of the hub are fetched into
    its cache. InputError for what names none."""
    files = []
    for pattern in patterns:
        if pattern.startswith("hf://"):
            found = fetch(pattern)
        else:
            found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise InputError(f"{pattern}: no such file")
        for path in found:
            if os.path.isdir(path):
                raise InputError(f"{path}: a folder; name its files, e.g. '{os.path.join(path, '*.json*')}'")
        files += [path for path in found if path not in files]
    return files


def fetch(url):
    """hf://datasets/OWNER/NAME[@REVISION]/FILE, FILE perhaps a glob -> local paths of those files of a data set on the hub."""
    from huggingface_hub import HfApi, hf_hub_download

    found = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", url)
    if not found:
        raise InputError(f"{url}: not hf://datasets/OWNER/NAME/FILE or hf://datasets/OWNER/NAME@REVISION/FILE")
    where = {"repo_id": found[1], "revision": found[2], "repo_type": "dataset"}
    try:
        names = [found[3]]
        if glob.has_magic(found[3]):
            names = sorted(fnmatch.filter(HfApi().list_repo_files(**where), found[3]))
        paths = [hf_hub_download(filename=name, **where) for name in names]
        with contextlib.suppress(Exception):  # for its licence
            hf_hub_download(filename="README.md", **where)
    except Exception as e:  # a network's failures are of many kinds
        why = " ".join(str(e).split())[:150]
        raise InputError(
            f"{url}: cannot be fetched: {type(e).__name__}: {why}; a gated data set wants HF_TOKEN"
        ) from None
    return paths


HUB = re.compile(
    r"(.*/datasets--([^/]+)--([^/]+)/snapshots/[^/]+)/(.+)"
)  # how the hub's cache lays out a data set's files


def licence(obj):
    """The licence that a record names itself, or None."""
    value = first(obj, "license", "licence")
    return value if isinstance(value, str) and value.strip() else None


def licence_of_file(path):
    """The licence in the front matter of the README.md of a data set of the hub, or None."""
    found = HUB.fullmatch(os.path.abspath(path))
    if not found:
        return None
    try:
        with open(f"{found[1]}/README.md", encoding="utf-8") as f:
            front = re.match(r"---\n(.*?)\n---", f.read(), re.S)
    except (OSError, UnicodeDecodeError):
        return None
    named = re.search(r"^license: *[\"']?([^\s\"']+)", front[1], re.M) if front else None
    return named[1] if named else None


def labels(files, parts_shown=2):
    """A short name for each file: OWNER/NAME/FILE of the hub's, of others the last two parts of the path, or more of them where
    that is not enough to tell two apart."""
    hub = [HUB.fullmatch(os.path.abspath(f)) for f in files]
    parts = [os.path.abspath(f).split(os.sep) for f in files]
    for n in range(parts_shown, max([parts_shown, *map(len, parts)]) + 1):
        names = ["/".join(h.groups()[1:] if h else p[-n:]) for h, p in zip(hub, parts)]
        if len(set(names)) == len(names):
            break
    return names


def read_objects(path):
    """Yields (line number, object) of a JSON Lines file or a JSON array, streaming either."""
    with open_bytes(path) as file:
        array = file.peek(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
        yield from read_array(file, path) if array else json_lines(file, path)


def read_array(file, path):
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
    buffer, at, line, ended = "", 0, 1, False

    def fill():
        nonlocal buffer, at, ended
        data = file.read(max(CHUNK, len(buffer)))  # doubling: a long object is not scanned more than twice its length
        ended = not data
        try:
            buffer, at = buffer[at:] + utf8.decode(data, final=ended), 0
        except UnicodeDecodeError as e:
            raise InputError(f"{path}:{line}: not UTF-8: {e}") from None

    def fail(what):
        raise InputError(f"{path}:{line}: {what}; an array of objects is expected")

    def sign():  # the next character that is no white space
        nonlocal at, line
        while True:
            while at < len(buffer) and buffer[at].isspace():
                line += buffer[at] == "\n"
                at += 1
            if at < len(buffer):
                return buffer[at]
            if ended:
                fail("the file ends inside the array")
            fill()

    expected = "["
    while True:
        found = sign()
        if found == "]" and expected == ",":
            return
        if found != expected:
            fail(f"not JSON: {found!r} where {expected!r} should stand")
        at += 1
        if expected == "[" and sign() == "]":
            return
        if sign() != "{":
            fail(f"not JSON: {buffer[at]!r} where an object should begin")
        while True:
            try:
                obj, end = decoder.raw_decode(buffer, at)
                break
            except ValueError as e:
                if ended or len(buffer) > LONGEST:
                    line += buffer.count("\n", at, getattr(e, "pos", at))
                    fail(f"not JSON: {getattr(e, 'msg', e)}")
                fill()
            except RecursionError as e:
                fail(f"not JSON: {e}")
        yield line, obj
        line += buffer.count("\n", at, end)
        at, expected = end, ","


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def clean(text):
    """One form for what looks the same: Unicode NFC, \\n line ends, no byte-order marks or zero-width spaces, ends stripped."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    return text.replace("\ufeff", "").replace("\u200b", "").replace("\u00a0", " ").strip()


def content_text(value, where):
    """A message's content: a text, or a list of parts {"type": "text", "text" or "value"} -> text."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(str(part.get("text", part.get("value", ""))) for part in value)
    if not isinstance(value, str):
        raise InputError(f"{where} has no content; content is a text")
    if MOJIBAKE.search(value):  # before cleaning, which takes some of it away
        raise Drop("garbled text")
    return clean(value)


def messages_of(value, where, role="user"):
    """A text (one message of `role`), a message, or a list of them, OpenAI's or ShareGPT's keys -> message list."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    elif isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: expected a text or a list of messages, found {json.dumps(value)[:60]}")
    out = []
    for i, m in enumerate(value):
        said = m.get("role", m.get("from")) if isinstance(m, dict) else None
        if said in TOOL_ROLES:
            raise Drop("tool use")
        if said not in ROLES:
            raise InputError(f"{where}: message {i} has the role {said!r}; known are {', '.join(ROLES)}")
        content = content_text(m.get("content", m.get("value")), f"{where}: message {i}")
        if content or ROLES[said] != "system":
            out.append({"role": ROLES[said], "content": content})
    return out


def first(obj, *names):
    """The value of the first of these keys that the object has, else None."""
    return next((obj[name] for name in names if obj.get(name) is not None), None)


def transcript(text, where):
    """Anthropic's "\\n\\nHuman: ...\\n\\nAssistant: ..." -> message list."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant): ?", text)
    if len(parts) < 3 or parts[0].strip():
        raise InputError(f"{where}: there is no prompt, and chosen is neither messages nor 'Human: ... Assistant: ...'")
    return messages_of([{"role": r.replace("Human", "human").replace("Assistant", "assistant"), "content": c}
                        for r, c in zip(parts[1::2], parts[2::2])], where)  # fmt: skip


def conversations(obj, where):
    """An object of any known shape -> its conversations (several for self-instruct's `instances`). Of a preference the
    better answer is taken. The last message is the response when it is an assistant's."""
    turns = first(obj, "messages", "conversations", "conversation", "chosen_messages")
    if turns is not None:
        reply = messages_of(obj["chosen"], where, "assistant") if obj.get("chosen") else []
        return [messages_of(turns, where) + reply]
    if "chosen" in obj and "rejected" in obj and "prompt" not in obj and "instruction" not in obj:
        chosen = obj["chosen"]
        return [transcript(chosen, where) if isinstance(chosen, str) else messages_of(chosen, where)]
    if isinstance(obj.get("instances"), list) and "instruction" in obj:
        whole = [
            {"instruction": obj["instruction"], **instance}
            for instance in obj["instances"]
            if isinstance(instance, dict)
        ]
        return [c for one in whole for c in conversations(one, where)]
    reply = first(obj, "output", "response", "completion", "chosen", "std_answer", "answer")
    if "output_1" in obj and "output_2" in obj:  # AlpacaEval's pairs: the preference is 1 or 2
        reply = obj["output_2"] if obj.get("preference") == 2 else obj["output_1"]
    instruction = first(obj, "instruction", "Instruction")
    if instruction is not None:
        extra = obj.get("input") or ""
        if not isinstance(instruction, str) or not isinstance(extra, str):
            raise InputError(f"{where}: instruction and input are texts")
        text = f"{instruction}\n{extra}" if extra else instruction
        prompt = [{"role": "user", "content": text}]
        for pair in reversed(obj.get("history") or []):  # [[user, assistant], ...]
            if not isinstance(pair, list) or len(pair) != 2:
                raise InputError(f"{where}: history is a list of [question, answer] pairs")
            prompt = [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}, *prompt]
        if obj.get("system"):
            prompt = [{"role": "system", "content": obj["system"]}, *prompt]
        if isinstance(reply, list) and reply and isinstance(reply[0], str):
            reply = reply[0]  # [better, worse]
    else:
        prompt = first(obj, "prompt", "question", "query")
    if prompt is None or (reply is None and not obj.keys() & {"prompt", "instruction", "Instruction", "question"}):
        raise InputError(f"{where}: no known shape, the keys are {', '.join(sorted(obj)) or 'none'}; known are messages, "
                         "conversations, instruction/output, prompt/completion, prompt/chosen/rejected, question/answer")  # fmt: skip
    return [messages_of(prompt, where) + (messages_of(reply, where, "assistant") if reply not in (None, "") else [])]


def read_reference(obj, prompt, response):
    """What a record says its responses can be checked against: given as "reference", or written as its data set does
    (GSM8K's last line `#### 72`; AQuA's options and "the answer is (C)"; IFEval's instruction_id_list and kwargs).

    Anybody can write these into a record: they may be used for a trusted file only, after check_reference.
    -> (reference or None, prompt text, response text)"""
    if escaped := re.search(r"Options:\s*\\n\s*\(A\)", prompt):  # AQuA writes its line ends as \n
        prompt = prompt.replace("\\n", "\n")
    number = re.search(r"\n?#### *(-?[\d,.]+)\s*$", response or "")
    letter = re.search(r"\banswer(?: is)?:? \(([A-E])\)\.?\s*$", response or "")
    reference = None
    if number:  # the calculator's notes <<48/2=24>> and the mark are GSM8K's bookkeeping, not language
        body = re.sub(r"<<[^<>]*>>", "", response[: number.start()]).strip()
        value = number[1].rstrip(".").replace(",", "")
        reference, response = {"kind": "number", "value": value}, f"{body}\nThe answer is {value}.".strip()
    elif letter and "Options:" in prompt:
        response = response.replace("\\n", "\n") if escaped else response
        choices = {name: text.strip() for name, text in AQUA_OPTION.findall(prompt)}
        if letter[1] in choices and len(choices) > 1:
            reference = {"kind": "choice", "value": {"letter": letter[1], "choices": choices}}
    if "instruction_id_list" in obj:
        reference = {"kind": "format", "value": {name: obj.get(name) for name in ("instruction_id_list", "kwargs")}}
    if isinstance(obj.get("reference"), dict):
        reference = obj["reference"]
    return reference, prompt, response


def check_reference(reference, where):
    """InputError unless a response can be compared with this reference."""
    if reference.get("kind") not in ("number", "choice", "exact", "format", "code") or "value" not in reference:
        raise InputError(f"{where}: reference needs a kind (number, choice, exact, format or code) and a value")
    if reference["kind"] == "format":
        value = reference["value"] if isinstance(reference["value"], dict) else {}
        names, kwargs = value.get("instruction_id_list"), value.get("kwargs")
        if not isinstance(names, list) or not isinstance(kwargs, list) or len(names) != len(kwargs) or not names:
            raise InputError(
                f"{where}: a format reference holds an instruction_id_list and as many kwargs, as IFEval's rows do"
            )
        for name, arguments in zip(names, kwargs):
            follows(name, "any", arguments, where)  # raises for what no reply could be checked against


def instructions(obj, where, max_chars):
    """-> list of {"prompt": message list ending with the user's, "response": text or None, "reference": what the record
    claims as one, unchecked, or None: see read_reference}."""
    out = []
    for messages in conversations(obj, where):
        response = None
        if messages and messages[-1]["role"] == "assistant":
            response = messages.pop()["content"] or None
        if not messages or messages[-1]["role"] != "user":
            raise Drop("no user turn before the response")
        if any(m["role"] == "system" for m in messages[1:]):
            raise Drop("a system turn inside the conversation")
        reference, prompt, response = read_reference(obj, messages[-1]["content"], response)
        messages[-1] = {"role": "user", "content": prompt}
        texts = [m["content"] for m in messages] + [response or ""]
        if not prompt or not all(m["content"] for m in messages):
            raise Drop("an empty turn")
        if sum(map(len, texts)) > max_chars:
            raise Drop("over-long")
        if any(re.search(r"\{\{ ?\w+ ?\}\}", t) and "```" not in t for t in texts):
            raise Drop("unfilled template")
        if rules.cut_off(response or ""):
            raise Drop("a response that is cut off")
        out.append({"prompt": messages, "response": response, "reference": reference})
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Responses that were written before


def prompt_key(messages):
    return hashlib.sha256(json.dumps([[m["role"], m["content"]] for m in messages]).encode()).digest()


def said_in(obj, where):
    """Yields (writer, prompt, text) of a record of any shape that `conversations` knows, with a "writer", or of step 5's own: a
    prompt and {writer: response}."""
    if isinstance(obj.get("responses"), dict):
        prompt = messages_of(obj.get("prompt"), where)
        for writer, r in obj["responses"].items():
            if writer != "original":
                yield writer.partition("-")[0], prompt, r["text"] if isinstance(r, dict) and "text" in r else r
    else:
        for r in instructions(obj, where, 1 << 30):
            yield obj.get("writer", "teacher"), r["prompt"], r["response"]


def recorded_responses(files, wanted):
    """-> {("teacher" or "small", prompt_key): its replies, in the files' order} for the prompts in `wanted` (a set of keys). A
    reply: {"text", "finish_reason", "recorded": the file's label}."""
    found = {}
    for path, label in zip(files, labels(files)):
        for line, obj in read_objects(path):
            where = f"{path}:{line}"
            with contextlib.suppress(Drop):
                for writer, prompt, text in said_in(obj, where):
                    if writer not in ("teacher", "small"):
                        raise InputError(f"{where}: the writer is {writer!r}; it is teacher or small")
                    key = prompt_key(prompt)
                    if key in wanted and text:
                        reply = {"text": content_text(text, where), "finish_reason": "stop", "recorded": label}
                        found.setdefault((writer, key), []).append(reply)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation questions, for decontamination


QUESTION_KEYS = ("question", "Question", "prompt", "instruction", "Instruction", "text", "input", "problem", "turns")


def evaluation_questions(path):
    """All questions of an evaluation file in its original shape: CSV with or without a header, JSON, JSON Lines, gzip."""
    if path.removesuffix(".gz").endswith(".csv"):
        with open_bytes(path) as file:
            try:
                rows = list(csv.reader(io.StringIO(file.read().decode("utf-8-sig"), newline="")))
            except UnicodeDecodeError as e:
                raise InputError(f"{path}: not UTF-8: {e}; convert it first") from None
        header = [cell.strip().lower() for cell in rows[0]] if rows else []
        column = header.index("question") if "question" in header else 0  # MMLU has no header, the question first
        found = [row[column] for row in rows[1 if "question" in header else 0 :] if len(row) > column]
    else:
        with open_bytes(path) as file:
            text = file.read()
        try:
            objects = [json.loads(text)]
        except (ValueError, RecursionError):
            objects = [obj for _, obj in read_objects(path)]
        found = [q for obj in objects for q in questions_in(obj)]
    if not found:
        raise InputError(f"{path}: no evaluation question found; looked for the keys {', '.join(QUESTION_KEYS)}")
    return found


def questions_in(value):
    if isinstance(value, list):
        return [q for item in value for q in ([item] if isinstance(item, str) else questions_in(item))]
    if not isinstance(value, dict):
        return []
    for key in QUESTION_KEYS:
        if isinstance(value.get(key), str):
            extra = value.get("input") if key.lower() == "instruction" else None
            return [f"{value[key]}\n{extra}" if extra else value[key]]
        if isinstance(value.get(key), list):
            parts = [m.get("content") if isinstance(m, dict) else m for m in value[key]]  # turns, or messages
            return [part for part in parts if isinstance(part, str)]
    return [q for item in value.values() if isinstance(item, (list, dict)) for q in questions_in(item)]
