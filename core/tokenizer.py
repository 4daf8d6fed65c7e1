"""Messages to tokens: the tokenizer, ChatML, and which tokens are supervised.

    tok = Tokenizer("Qwen/Qwen2-0.5B-Instruct")
    ids, supervised = tok.chat_ids([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}])

An example is a pair (ids, supervised): token ids and, for each, whether the model is trained to produce it.
"""

import json
import os
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from core.chat_template import default_system
from core.checkpoint import Checkpoint
from core.files import InputError, check_unicode, json_object, shown

# Qwen2's pre-tokenizer: contraction | letters with one sign before them | digit | signs | line ends | spaces
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_NAMES = "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()


class Tokenizer:
    """The tokenizer and chat template of a checkpoint. source: a Checkpoint, or anything that Checkpoint opens.

    backend: the tokenizers.Tokenizer.
    stop_ids: the tokens that end a reply.
    default_system: the system prompt added to a conversation without one, or None.
    header: the ids before a reply, "<|im_start|>assistant\\n".
    prefix: the token before a plain text, needed to predict the text's first token.
    """

    def __init__(self, source: Checkpoint | str):
        ckpt = source if isinstance(source, Checkpoint) else Checkpoint(source)
        self.where = where = f"{ckpt.source}/tokenizer.json"
        settings = tokenizer_settings(ckpt)
        special_tokens = special_token_texts(settings, f"{ckpt.source}/tokenizer_config.json")
        self.backend = load_backend(ckpt, settings, special_tokens.values())
        self.default_system = default_system(*chat_template(ckpt, settings), special_tokens)
        self.im_start, self.im_end = (self.backend.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>"))
        if self.im_start is None or self.im_end is None:
            raise InputError(f"{where}: has no <|im_start|> and <|im_end|>, which the chat template uses")
        size, largest = ckpt.config.get("vocab_size", 0), max(self.backend.get_vocab(with_added_tokens=True).values())
        if not isinstance(size, int) or largest >= size:
            raise InputError(f"{where}: token id {largest} does not fit the model's vocabulary of {size} rows")
        named = [self.backend.token_to_id(special_tokens.get(name, "")) for name in ("bos_token", "eos_token")]
        self.prefix = next((t for t in named if t is not None), self.im_end)
        self.newline = self.encode("\n")
        self.header = [self.im_start, *self.encode("assistant\n")]
        self.stop_ids = {self.im_end, *(t for t in end_ids(ckpt) if 0 <= t < size)}  # the model has no other ids

    def encode(self, text: str) -> list[int]:
        """Text -> ids. A control token typed in the text is encoded as ordinary characters."""
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except Exception as e:  # the library raises plain Exception: a character that is neither known nor unknown
            why = " ".join(str(e).split())[:150]
            raise InputError(f"{self.where}: fails at {shown(text)}: {why}; fetch it again") from None

    def decode(self, ids: list[int]) -> str:
        """Ids -> text without special tokens."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def _turns(self, messages: list[dict]) -> Iterator[tuple[list[int], list[int]]]:
        """Yields (context ids, supervised ids) of each message."""
        if self.default_system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        for message in messages:
            text = f"{message['role']}\n{message['content']}"
            ids = [self.im_start, *self.encode(text), self.im_end, *self.newline]
            if message["role"] == "assistant" and message.get("weight", 1):
                # a reply's leading newline may merge with the header's into one token; it is supervised, as in TRL
                start = len(os.path.commonprefix([ids, self.header]))
                yield ids[:start], ids[start:]
            else:
                yield ids, []

    def completion_ids(self, content: str) -> list[int]:
        """The supervised part of an assistant's turn: the content, its <|im_end|> and the newline after it."""
        return [*self.encode(content), self.im_end, *self.newline]

    def chat_ids(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        """A conversation -> (ids, supervised): every assistant turn without "weight": 0 is supervised, nothing else."""
        ids, supervised = [], []
        for context, completion in self._turns(messages):
            ids += context + completion
            supervised += [False] * len(context) + [True] * len(completion)
        return ids, supervised

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """A conversation and the header of the assistant's next turn, ready to generate."""
        return self.chat_ids(messages)[0] + self.header


# ---------------------------------------------------------------------------------------------------------------------
# The files of a tokenizer, read as in transformers


def tokenizer_settings(ckpt: Checkpoint) -> dict:
    """tokenizer_config.json. Older checkpoints keep parts of it in special_tokens_map.json and added_tokens.json."""
    where = f"{ckpt.source}/tokenizer_config.json"
    settings = json_object(ckpt.files.get("tokenizer_config.json", "{}"), where)
    if settings.get("added_tokens_decoder") is None:
        older = [f"{ckpt.source}/{name}" for name in ("special_tokens_map.json", "added_tokens.json")]
        special_map, added = (json_object(ckpt.files.get(os.path.basename(path), "{}"), path) for path in older)
        if not all(type(i) is int for i in added.values()):
            raise InputError(f"{older[1]}: is not an object of tokens and their ids; fetch it again")
        settings |= special_map
        special = set(special_token_texts(settings, where).values()) | set(more_special_texts(settings))
        settings["added_tokens_decoder"] = {
            i: {"content": text, "special": text in special, "normalized": text not in special}
            for text, i in added.items()
        }
    return settings


def special_token_texts(settings: dict, where: str) -> dict[str, str]:
    """{"bos_token": text, "eos_token": text, ...} for the special tokens that the checkpoint names."""
    texts = {}
    for name in SPECIAL_NAMES:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(text, str):
            raise InputError(
                f"{where}: {name} is {shown(value)}; it must be a text, or an object with the text as content"
            )
        if text:
            texts[name] = text
            check_unicode(text, f"{where}: {name}")
    return texts


def more_special_texts(settings: dict) -> list[str]:
    """The special tokens that have no name such as bos_token."""
    tokens = []
    for listed in (settings.get("additional_special_tokens"), settings.get("extra_special_tokens")):
        tokens += listed if isinstance(listed, list) else listed.values() if isinstance(listed, dict) else []
    texts = [token.get("content") if isinstance(token, dict) else token for token in tokens]
    return [text for text in texts if isinstance(text, str)]


def end_ids(ckpt: Checkpoint) -> list[int]:
    """eos_token_id of generation_config.json, else of config.json: the tokens at which transformers ends a reply."""
    where = f"{ckpt.source}/generation_config.json"
    generation = json_object(ckpt.files.get("generation_config.json", "{}"), where)
    eos = generation.get("eos_token_id", ckpt.config.get("eos_token_id"))
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(t) is int for t in ids):
        raise InputError(f"{where}: eos_token_id is {shown(eos)}; it must be a token id or a list of them")
    return ids


def with_end_token(files: dict[str, str], im_end: int, others: Iterable[int]) -> dict[str, str]:
    """A checkpoint's side files with <|im_end|>, which ends every trained reply, as the first of the end tokens.

    A base model's files name only <|endoftext|>, so transformers and vLLM would not stop at <|im_end|>.
    im_end: its id. others: the other end tokens.
    """
    generation = json_object(files.get("generation_config.json", "{}"), "generation_config.json")
    known = generation.get("eos_token_id")
    known = known if isinstance(known, list) else [known]
    if im_end in known:
        return files
    generation["eos_token_id"] = [im_end, *sorted({*others} - {im_end})]
    changed = {"generation_config.json": json.dumps(generation, indent=2) + "\n"}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = json_object(files.get(name, "{}"), name)
        if "eos_token" in settings or name == "tokenizer_config.json":
            settings["eos_token"] = "<|im_end|>"
            changed[name] = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    return files | changed


def load_backend(ckpt: Checkpoint, settings: dict, special: Iterable[str]) -> tokenizers.Tokenizer:
    """The tokenizer of tokenizer.json, with the added tokens that only tokenizer_config.json lists.

    A special token typed in a text is encoded as ordinary characters. Other added tokens are used. Truncation, padding
    and BPE dropout saved in the file are ignored.
    """
    where = f"{ckpt.source}/tokenizer.json"
    if "tokenizer.json" not in ckpt.files:
        raise InputError(f"{where}: missing; a checkpoint needs it beside its weights")
    try:
        backend = tokenizers.Tokenizer.from_str(ckpt.files["tokenizer.json"])
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # the library raises plain Exception, and PanicException, which is none
        raise InputError(f"{where}: corrupt: {' '.join(str(e).split())[:150]}") from None
    if not isinstance(backend.model, tokenizers.models.BPE):
        raise InputError(f"{where}: its model is {type(backend.model).__name__}; only BPE, as in Qwen2, is supported")
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None) is not None:  # BPE dropout would make the tokens random
        backend.model.dropout = None
    backend.encode_special_tokens = True
    where, known = f"{ckpt.source}/tokenizer_config.json", backend.get_added_tokens_decoder()
    try:
        listed = sorted((int(i), token) for i, token in (settings.get("added_tokens_decoder") or {}).items())
        listed = [(i, tokenizers.AddedToken(**token)) for i, token in listed]
    except (TypeError, ValueError, AttributeError):
        raise InputError(
            f"{where}: added_tokens_decoder is not a list of tokens by their ids; fetch it again"
        ) from None
    check_all_listed(ckpt, known.values())
    for i, token in listed:
        if repr(known.get(i)) != repr(token):
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != i:
            found = backend.token_to_id(token.content)
            raise InputError(
                f"{where}: added_tokens_decoder gives {token.content!r} the id {i}, tokenizer.json {found}"
            )
    control = {"<|im_start|>", "<|im_end|>", *special, *more_special_texts(settings)}
    control |= {token.content for token in [*known.values(), *(token for _, token in listed)] if token.special}
    ordinary = [token.content for token in backend.get_added_tokens_decoder().values() if not token.special]
    backend.add_special_tokens([text for text in ordinary if text in control])
    check_plain(backend, settings, ckpt.source)
    return backend


def check_all_listed(ckpt: Checkpoint, tokens: Iterable[tokenizers.AddedToken]) -> None:
    """InputError if tokenizer_config.json lists added tokens, but not all those of tokenizer.json.

    transformers' Qwen2Tokenizer adds only the listed ones. A token that is not listed becomes text, and later ids move.
    """
    where = f"{ckpt.source}/tokenizer_config.json"
    listed = json_object(ckpt.files.get("tokenizer_config.json", "{}"), where).get("added_tokens_decoder")
    texts = [token.get("content") for token in listed.values()] if isinstance(listed, dict) else None
    for token in tokens if texts is not None else ():
        if token.content not in texts:
            raise InputError(
                f"{where}: added_tokens_decoder lacks the token {shown(token.content)} of tokenizer.json, so transformers "
                "would not use it; add it there, or remove added_tokens_decoder"
            )


def check_plain(backend: tokenizers.Tokenizer, settings: dict, source: str) -> None:
    """InputError for settings on which transformers' Qwen2Tokenizer and PreTrainedTokenizerFast disagree.

    The first brings its own normalizer (NFC) and pre-tokenizer (byte-level). The second reads tokenizer.json, as we do.
    """

    def refuse(name, fault):
        raise InputError(f"{source}/{name}: {fault}")

    config = "tokenizer_config.json"
    brings_own = "transformers' Qwen2Tokenizer brings its own; correct it or tokenizer_class in tokenizer_config.json"
    if settings.get("split_special_tokens"):
        refuse(config, "split_special_tokens is true, which encodes <|im_start|> as text; set it to false")
    if settings.get("add_prefix_space"):
        refuse(config, "add_prefix_space is true, which puts a space after <|im_start|>; set it to false")
    for part in flat_parts(backend.normalizer):
        if part["type"] != "NFC":
            refuse("tokenizer.json", f"its normalizer is {part['type']}; only NFC, as in Qwen2, or none is supported")
    for part in flat_parts(backend.pre_tokenizer):
        if part.get("add_prefix_space") or part["type"] == "Metaspace":
            refuse(
                "tokenizer.json", f"its {part['type']} pre-tokenizer puts a space before each text; Qwen2's does not"
            )
    if str(settings.get("tokenizer_class")).removesuffix("Fast") == "Qwen2Tokenizer":
        if [part["type"] for part in flat_parts(backend.normalizer)] != ["NFC"]:
            refuse("tokenizer.json", f"has no NFC normalizer, but {brings_own}")
        parts = flat_parts(backend.pre_tokenizer)
        found = [part.get("type") for part in parts], *(part.get("pattern", part.get("use_regex")) for part in parts)
        if found != (["Split", "ByteLevel"], {"Regex": QWEN2_SPLIT}, False):
            refuse("tokenizer.json", f"its pre-tokenizer is not that of Qwen2, but {brings_own}")
    if backend.model.continuing_subword_prefix or backend.model.end_of_word_suffix:
        refuse("tokenizer.json", "its model has a subword prefix or a word suffix; Qwen2's has neither")
    for token in backend.get_added_tokens_decoder().values():
        for name in ("lstrip", "rstrip", "single_word"):
            if token.content in ("<|im_start|>", "<|im_end|>") and getattr(token, name):
                refuse("tokenizer.json", f"the token {token.content} has {name}: true; only false is supported")


def flat_parts(component: Normalizer | PreTokenizer | None) -> list[dict]:
    """The settings of a normalizer or pre-tokenizer, or of each part of a Sequence of them."""

    def flat(part):
        inner = part.get("normalizers", part.get("pretokenizers"))
        return [part] if inner is None else [leaf for child in inner for leaf in flat(child)]

    return flat(json.loads(component.__getstate__())) if component else []


def chat_template(ckpt: Checkpoint, settings: dict) -> tuple[str, str]:
    """The chat template of a checkpoint and its file: chat_template.jinja, else that in tokenizer_config.json.

    Of several named templates, the one called "default" is used.
    """
    if "chat_template.jinja" in ckpt.files:
        return ckpt.files["chat_template.jinja"], f"{ckpt.source}/chat_template.jinja"
    template, where = settings.get("chat_template"), f"{ckpt.source}/tokenizer_config.json"
    if isinstance(template, list):
        try:
            template = {named["name"]: named["template"] for named in template}
        except (TypeError, KeyError):
            raise InputError(f"{where}: chat_template is a list without named templates") from None
    if isinstance(template, dict) and "default" not in template:
        names = ", ".join(map(str, template)) or "none"
        raise InputError(
            f"{where}: of the named chat templates ({names}) none is called default; rename the one to use"
        )
    template = template["default"] if isinstance(template, dict) else template
    if not isinstance(template, str):
        raise InputError(f"{where}: no chat_template; an instruct checkpoint has one")
    return template, where


def check_vocabulary(ckpt: Checkpoint, first: Checkpoint) -> None:
    """InputError if a checkpoint's tokenizer does not give the ids of the first one's, or has ids beyond its embedding."""
    Tokenizer(ckpt)  # raises if the embedding has too few rows for the token ids
    if vocabulary(ckpt) != vocabulary(first):
        raise InputError(
            f"{ckpt.source}: its tokenizer differs from that of {first.source}; give a checkpoint with the same tokenizer"
        )


def vocabulary(ckpt: Checkpoint) -> tuple:
    """(vocabulary, merges, added tokens) of a tokenizer.json. Equal for tokenizers that give the same ids."""
    try:
        spec = json.loads(ckpt.files["tokenizer.json"])
        model = spec.get("model") or {}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
        return model.get("vocab"), merges, sorted((t["id"], t["content"]) for t in spec.get("added_tokens") or [])
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(
            f"{ckpt.source}/tokenizer.json: corrupt: not the file of a tokenizer; fetch it again"
        ) from None
