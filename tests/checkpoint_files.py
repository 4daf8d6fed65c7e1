"""Files of checkpoints as other programs write them: conversations, templates, tokenizer files, weights."""

import importlib.util
import json
import os

import safetensors.torch
import tokenizers
import torch
from conftest import tiny_config, tiny_files, tiny_model

CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
    ],
    [{"role": "system", "content": ""}, {"role": "user", "content": " spaces \n\n and\ttabs "}],
    [
        {"role": "user", "content": "法国的首都是?"},
        {"role": "assistant", "content": "巴黎。"},
        {"role": "user", "content": "def f():\n    return 1\n"},
        {"role": "assistant", "content": " 1"},
    ],
]


CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def trl_template(name):
    """A chat template that TRL brings."""
    path = os.path.join(os.path.dirname(importlib.util.find_spec("trl").origin), "chat_templates", f"{name}.jinja")
    with open(path, encoding="utf-8") as f:
        return f.read()


def changed(text, **values):
    """The JSON object with other values; those that are None are removed."""
    return json.dumps({k: v for k, v in (json.loads(text) | values).items() if v is not None})


def checkpoint(path, config=None, **files):
    """A tiny checkpoint with other side files; those that are None are left out."""
    kept = {name: text for name, text in (tiny_files() | files).items() if text is not None}
    tiny_model(**config or {}).save(str(path), kept)
    return str(path)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def rewritten(normalizer=None, pre_tokenizer=BYTE_LEVEL, **token):
    """The tiny tokenizer.json with another normalizer or pre-tokenizer, and other settings of its control tokens."""
    spec = json.loads(tiny_files()["tokenizer.json"])
    added = [added | token for added in spec["added_tokens"]]
    return json.dumps(spec | {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "added_tokens": added})


def rewritten_settings(**changes):
    return changed(tiny_files()["tokenizer_config.json"], **changes)


def with_added_tokens(*tokens):
    spec = tokenizers.Tokenizer.from_str(tiny_files()["tokenizer.json"])
    spec.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in tokens])
    return spec


def as_decoder(spec, *left_out):
    """added_tokens_decoder of tokenizer_config.json."""
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    tokens = spec.get_added_tokens_decoder().items()
    return {str(i): {n: getattr(t, n) for n in names} for i, t in tokens if t.content not in left_out}


def save_weights(path, tensors, config=None, file="model.safetensors"):
    """A folder with config.json and these tensors in `file`."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or tiny_config()))
    safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, path / file, metadata={"format": "pt"})


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


IDS = torch.randint(0, 512, (1, 9), generator=torch.Generator().manual_seed(5))
