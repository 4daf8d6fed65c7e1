"""Shared by the tests of merge.py: checkpoints of any tensors, merging them, TIES in numpy."""

import numpy as np
import torch

from core.checkpoint import Checkpoint, write_checkpoint
from merge import main
from model import Qwen2

TIED = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "torch_dtype": "float32",
}
UNTIED = {**TIED, "tie_word_embeddings": False}
FILES = {"tokenizer.json": '{"of": "base"}', "generation_config.json": "{}"}


def save(path, tensors, config=TIED, files=FILES):
    """Writes a checkpoint of any tensors: without layers, merging needs no complete model."""
    tensors = {name: torch.as_tensor(x) for name, x in tensors.items()}
    specs = {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}
    write_checkpoint(str(path), config, files, specs, tensors.items())
    return str(path)


def load(path):
    c = Checkpoint(str(path))
    return {name: c.tensor(name) for name in c.names}


def run(out, method, models, *options):
    main(["--method", method, "--models", *models, "--out", str(out), *map(str, options)])
    return load(out)


def make_family(folder):
    """Directories base, a, b, c of one architecture; the models differ from the base by large continuous noise."""
    generator = torch.Generator().manual_seed(1)
    base = Qwen2(UNTIED).init_weights(generator)
    start = {name: p.detach().clone() for name, p in base.named_parameters()}
    for name in ("base", "a", "b", "c"):
        noise = 0.0 if name == "base" else 0.02
        save(
            folder / name,
            {n: x + noise * torch.randn(x.shape, generator=generator) for n, x in start.items()},
            base.raw_config,
        )
    return folder


def assert_same(ours, theirs, **tolerance):
    assert sorted(ours) == sorted(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype == torch.float32
        torch.testing.assert_close(ours[name], theirs[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def numpy_ties(base, models, weights, density, lam, trim, sign):
    """Algorithm 1 of arXiv 2306.01708 on whole models, as flat vectors. base, models: {name: array}."""
    names = sorted(base)
    d = np.stack([np.concatenate([m[n].ravel() - base[n].ravel() for n in names]) for m in models])
    ends = np.cumsum([base[n].size for n in names])
    for part in np.split(np.arange(d.shape[1]), ends[:-1] if trim == "tensor" else []):
        for row in d:
            size = np.abs(row[part])
            if trim == "global" and int(size.size * density) < size.size:
                row[part[size < np.sort(size)[size.size - int(size.size * density) - 1]]] = 0
            elif trim == "tensor":
                row[part[np.argsort(-size, kind="stable")[max(1, int(density * size.size)) :]]] = 0
    d *= np.array(weights)[:, None]
    s = np.sign((d if sign == "sum" else np.sign(d)).sum(0))
    s[s == 0] = 1 if trim == "tensor" or s.sum() > 0 else -1
    agree = np.sign(d) == s
    share = (np.array(weights)[:, None] * agree).sum(0)
    merged = lam * (d * agree).sum(0) / np.where(share == 0, 1, share)
    return {n: base[n] + x.reshape(base[n].shape) for n, x in zip(names, np.split(merged, ends[:-1]))}
