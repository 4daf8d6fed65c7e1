"""Messages to tokens: the tokenizer, ChatML, what is supervised, truncation, packing. Knows no model.

    tok = Tokenizer("Qwen/Qwen2-0.5B-Instruct")
    ids, supervised = tok.chat_ids([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}])

An example is a pair (ids, supervised): token ids and, for each, whether the model is trained to produce it.
"""

import contextlib
import gzip
import hashlib
import json
import os
import re
import zlib

import numpy as np
import tokenizers
import torch

from checkpoint import Checkpoint, InputError, atomic_write, json_object

ROLES = ("system", "user", "assistant")

# ---------------------------------------------------------------------------------------------------------------------
# Templates. Every one known here renders a message as <|im_start|>ROLE\nCONTENT<|im_end|>\n; they differ in the system
# prompt that stands in when the conversation brings none, so that is all that is read from them.

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_DEFAULT_SYSTEM = (  # Qwen1.5, Qwen2, SmolLM2
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nDEFAULT<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Of Qwen2.5's and its Coder's: the above, and tools, which are refused here
QWEN25_SHA256 = "a52f58ce6705560877b073d01e7a33dc62326e4fe0184d65fe5547a44c3102ae"


def default_system(template, where):
    """The default system prompt of a chat template, None if it has none. InputError for a template not known here."""
    text = template.strip().replace("\\n", "\n")
    found = re.search(r"'<\|im_start\|>system\n([^'{}]+)<\|im_end\|>\n'", text)
    if text == CHATML:
        return None
    if found:
        skeleton = text.replace(found[1], "DEFAULT")
        if skeleton == CHATML_DEFAULT_SYSTEM or hashlib.sha256(skeleton.encode()).hexdigest() == QWEN25_SHA256:
            return found[1]
    raise InputError(f"{where}: unknown chat template {text[:60]!r}...: known are plain ChatML, Qwen2's and Qwen2.5's")


class Tokenizer:
    """The tokenizer and the chat template of a checkpoint (a Checkpoint or anything that Checkpoint opens).

    stop_ids: the tokens that end a reply. default_system: the system prompt added where a conversation brings none. prefix: the
    token that stands before a plain text, whose first token would be predicted from nothing else.
    """

    def __init__(self, source):
        ckpt = source if isinstance(source, Checkpoint) else Checkpoint(source)
        where = f"{ckpt.source}/tokenizer.json"
        try:
            spec = json.loads(ckpt.files["tokenizer.json"])
            self.full = tokenizers.Tokenizer.from_str(ckpt.files["tokenizer.json"])
            # Text is encoded by a copy that knows no added token: "<|im_end|>" typed by a user stays seven characters
            # of text. Only the template below puts control tokens in.
            self.text = tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))
        except KeyError:
            raise InputError(f"{where}: missing; a checkpoint needs it beside its weights") from None
        except Exception as e:  # the library raises plain Exception
            raise InputError(f"{where}: corrupt: {e}") from None
        settings = json_object(ckpt.files.get("tokenizer_config.json", "{}"), f"{ckpt.source}/tokenizer_config.json")
        template = ckpt.files.get("chat_template.jinja") or settings.get("chat_template")
        if not isinstance(template, str):
            raise InputError(f"{ckpt.source}/tokenizer_config.json: no chat_template; an instruct checkpoint has one")
        self.default_system = default_system(template, f"{ckpt.source}/tokenizer_config.json")
        self.im_start, self.im_end = (self.full.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>"))
        if self.im_start is None or self.im_end is None:
            raise InputError(f"{where}: has no <|im_start|> and <|im_end|>, which the chat template uses")
        size, largest = ckpt.config.get("vocab_size", 0), max(self.full.get_vocab(with_added_tokens=True).values())
        if largest >= size:
            raise InputError(f"{where}: token id {largest} does not fit the model's vocabulary of {size} rows")
        control = [settings.get(name) for name in ("bos_token", "eos_token")]  # texts, or objects with one, or null
        control = [self.full.token_to_id(t["content"] if isinstance(t, dict) else t) for t in control if t]
        self.prefix = next((t for t in control if t is not None), self.im_end)
        self.newline = self.encode("\n")
        generation = json_object(ckpt.files.get("generation_config.json", "{}"), f"{ckpt.source}/generation_config.json")
        eos = generation.get("eos_token_id", ckpt.config.get("eos_token_id"))
        self.stop_ids = {self.im_end, *(eos if isinstance(eos, list) else [eos])} - {None}
        if not all(type(t) is int for t in self.stop_ids):
            raise InputError(f"{ckpt.source}/generation_config.json: eos_token_id is {eos!r}; it is a token id or a list of them")

    def encode(self, text):
        """Text -> ids. Control tokens typed in the text are encoded as the characters they are."""
        return self.text.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Ids -> text, control tokens left out."""
        return self.full.decode(ids, skip_special_tokens=True)

    def _turns(self, messages):
        if self.default_system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        for m in messages:
            if m["role"] == "assistant":
                # The header is encoded by itself, as it stands in the prompt of a generation: a reply that begins
                # with a newline must not merge with the header's.
                yield self.assistant_header(), self.completion_ids(m["content"])
            else:
                body = self.encode(f"{m['role']}\n{m['content']}")
                yield [self.im_start, *body, self.im_end, *self.newline], []

    def assistant_header(self):
        return [self.im_start, *self.encode("assistant\n")]

    def completion_ids(self, content):
        """What is supervised of an assistant's turn: the content, its <|im_end|> and the newline after it."""
        return [*self.encode(content), self.im_end, *self.newline]

    def chat_ids(self, messages):
        """A conversation -> (ids, supervised): every assistant turn is supervised, nothing else."""
        ids, supervised = [], []
        for context, completion in self._turns(messages):
            ids += context + completion
            supervised += [False] * len(context) + [True] * len(completion)
        return ids, supervised

    def prompt_ids(self, messages):
        """A conversation up to and with the header of the assistant's next turn, ready to generate."""
        return self.chat_ids(messages)[0] + self.assistant_header()


def vocabulary(ckpt):
    """What the tokenizer.json of a Checkpoint makes of text, however it is formatted: vocabulary, merges, added tokens."""
    try:
        spec = json.loads(ckpt.files["tokenizer.json"])
        model = spec.get("model") or {}
        merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
        return model.get("vocab"), merges, sorted((t["id"], t["content"]) for t in spec.get("added_tokens") or [])
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{ckpt.source}/tokenizer.json: corrupt: not the file of a tokenizer; fetch it again") from None


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
            raise InputError(f"{path}:{number}: a {type(record).__name__}, not an object; one object a line is expected")
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
            raise InputError(f"{where}: message {i} ({m['role']}) holds half of a surrogate pair; remove the record") from None
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
        raise InputError(f"{where}: keys {sorted(record)}: expected messages, or prompt and completion, or instruction and output")
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
        raise InputError(f"{where}: keys {sorted(record)}: expected prompt, completion and label, or messages and label")
    return as_messages(record["prompt"], where), one_reply(record["completion"], where), label


def read_records(paths, parse):
    """[(where, parse(record, where))] over all lines of all files. parse: sft_messages or kto_example."""
    records = [(f"{p}:{n}", parse(r, f"{p}:{n}")) for p in paths for n, r in read_jsonl(p)]
    if not records:
        raise InputError(f"{', '.join(map(os.fspath, paths))}: no records; nothing to train on")
    return records


# ---------------------------------------------------------------------------------------------------------------------
# Packing


def pack(examples):
    """Examples -> (input_ids, lengths, at, targets, owner), one row without padding.

    input_ids: (1, T). lengths: the documents' lengths, sum T. For the N supervised tokens: at (N,) is the position
    whose hidden state predicts the token (the one before it), targets (N,) the token, owner (N,) its example's index.
    """
    lengths = [len(ids) for ids, _ in examples]
    ids, learn = (torch.from_numpy(np.concatenate(lists)) for lists in zip(*examples))  # (T,) int64, (T,) bool
    ends = torch.tensor(lengths).cumsum(0)
    learn[ends - torch.tensor(lengths)] = False  # a document's first token: nothing before it predicts it
    at = learn.nonzero()[:, 0]  # (N,)
    return ids[None], lengths, at - 1, ids[at], torch.searchsorted(ends, at, right=True)
