"""Messages to tokens: the tokenizer, ChatML, what is supervised, truncation, packing. Knows no model.

    tok = Tokenizer("Qwen/Qwen2-0.5B-Instruct")
    ids, supervised = tok.chat_ids([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}])

An example is a pair (ids, supervised): token ids and, for each, whether the model is trained to produce it.
"""

import hashlib
import json
import re

import tokenizers

from core.checkpoint import Checkpoint
from core.files import InputError, json_object

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
        generation = json_object(
            ckpt.files.get("generation_config.json", "{}"), f"{ckpt.source}/generation_config.json"
        )
        eos = generation.get("eos_token_id", ckpt.config.get("eos_token_id"))
        self.stop_ids = {self.im_end, *(eos if isinstance(eos, list) else [eos])} - {None}
        if not all(type(t) is int for t in self.stop_ids):
            raise InputError(
                f"{ckpt.source}/generation_config.json: eos_token_id is {eos!r}; it is a token id or a list of them"
            )

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
                header, completion = self.assistant_header(), self.completion_ids(m["content"])
                yield (header, completion) if m.get("weight", 1) else (header + completion, [])
            else:
                body = self.encode(f"{m['role']}\n{m['content']}")
                yield [self.im_start, *body, self.im_end, *self.newline], []

    def assistant_header(self):
        return [self.im_start, *self.encode("assistant\n")]

    def completion_ids(self, content):
        """What is supervised of an assistant's turn: the content, its <|im_end|> and the newline after it."""
        return [*self.encode(content), self.im_end, *self.newline]

    def chat_ids(self, messages):
        """A conversation -> (ids, supervised): every assistant turn without "weight": 0 is supervised, nothing else."""
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
        raise InputError(
            f"{ckpt.source}/tokenizer.json: corrupt: not the file of a tokenizer; fetch it again"
        ) from None
