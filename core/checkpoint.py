"""Checkpoints in and out, their configuration, and what all scripts do with files and bad input.

ckpt = Checkpoint("Qwen/Qwen2-0.5B-Instruct")     # a hub id, a Hugging Face directory or a .pt file
ckpt.names, ckpt.shape(name), ckpt.tensor(name)   # one tensor at a time
write_checkpoint(out, config, files, specs, tensors)
"""

import hashlib
import itertools
import json
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors import SafetensorError, safe_open

from core.config import parse_config
from core.files import InputError, atomic_directory, atomic_write, read_json, read_text
from core.pages import mapped, page_chunks, start_writing

# ---------------------------------------------------------------------------------------------------------------------
# Files

# What a checkpoint carries beside its weights and config.json and hands on to those made from it; all of it text.
SIDE_FILES = (
    "generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "merges.txt chat_template.jinja"
).split()
SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Checkpoint:
    """A checkpoint opened for reading, one tensor at a time.

    source: a hub id, a Hugging Face directory (one or many safetensors), or a .pt file written by this project.
    config: config.json as a dict. files: {name: text} of SIDE_FILES. names: the tensors, sorted; a tied lm_head.weight
    is not among them. Nothing is unpickled but tensors and plain containers. InputError says what is missing or broken.
    """

    def __init__(self, source):
        self.source = str(source)
        if os.path.isdir(self.source):
            self._open_directory(self.source)
        elif os.path.isfile(self.source):
            self._open_pt(self.source)
        else:
            self._open_directory(download(self.source))
        self.names = sorted(self._where)
        if self.config.get("tie_word_embeddings") and "lm_head.weight" in self.names:
            embed = "model.embed_tokens.weight"
            if embed in self._where and not torch.equal(self.tensor("lm_head.weight"), self.tensor(embed)):
                raise InputError(f"{self.source}: tie_word_embeddings is true, but lm_head.weight differs from {embed}")
            self.names.remove("lm_head.weight")

    def _open_directory(self, path):
        self.config = read_json(os.path.join(path, "config.json"))
        self.files = {}
        for name in SIDE_FILES:
            if os.path.isfile(os.path.join(path, name)):
                self.files[name] = read_text(os.path.join(path, name))
        index = os.path.join(path, "model.safetensors.index.json")
        if os.path.isfile(index):
            try:
                shards = sorted(map(os.fspath, set(read_json(index)["weight_map"].values())))
            except (KeyError, TypeError, AttributeError):
                raise InputError(f"{index}: has no weight_map of tensors to files; fetch it again") from None
        else:
            shards = sorted(n for n in os.listdir(path) if n.endswith(".safetensors"))
        if not shards:
            raise InputError(f"{path}: no *.safetensors file in this directory; weights in other formats are not read")
        self._where = {}
        for shard in (os.path.join(path, s) for s in shards):
            try:
                f = safe_open(shard, framework="pt")
            except (SafetensorError, OSError) as e:
                raise InputError(f"{shard}: missing or corrupt ({e}); fetch it again") from None
            self._where |= {name: f for name in f.keys()}

    def _open_pt(self, path):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            self.config, self._where = content["config"], content["weights"]
            self.files = {name: text for name, text in content["files"].items() if name in SIDE_FILES}
            kinds = {type(self.config) is dict, *(isinstance(t, torch.Tensor) for t in self._where.values())}
            if kinds | {isinstance(text, str) for text in self.files.values()} != {True}:
                raise TypeError
        except pickle.UnpicklingError:
            raise InputError(
                f"{path}: holds more than tensors and plain data (or is no .pt file); not loaded"
            ) from None
        except (RuntimeError, EOFError):
            raise InputError(
                f"{path}: a corrupt .pt checkpoint, or none; a hub id, a directory or a .pt of this project is one"
            ) from None
        except OSError as e:
            raise InputError(f"{path}: cannot be read: {e.strerror}") from None
        except (KeyError, TypeError, IndexError, AttributeError):
            raise InputError(f"{path}: a .pt checkpoint of this project has the keys config, files, weights") from None

    def tensor(self, name):
        """The tensor in its stored dtype, on the CPU, read now."""
        f = self._where[name]
        return f if isinstance(f, torch.Tensor) else f.get_tensor(name)

    def shape(self, name):
        f = self._where[name]
        return tuple(f.shape if isinstance(f, torch.Tensor) else f.get_slice(name).get_shape())

    def dtype(self, name):
        f = self._where[name]
        if isinstance(f, torch.Tensor):
            return f.dtype
        code = f.get_slice(name).get_dtype()
        return next((d for d, c in SAFETENSORS_DTYPES.items() if c == code), None) or self.tensor(name).dtype

    def digest(self, name):
        """SHA-256 of a tensor's bytes."""
        flat, h = self.tensor(name).contiguous().view(-1), hashlib.sha256()
        for s in page_chunks(len(flat), mapped([flat]), 2**20):
            h.update(flat[s].view(torch.uint8).numpy())
        return h.hexdigest()

    def fingerprint(self, digests=None):
        """SHA-256 of architecture, weights and tokenizer: equal for a directory and a .pt of the same model.
        digests: {name: digest(name)} of all tensors, where they are known; else the tensors are read for it."""
        if digests is None:
            with ThreadPoolExecutor(4) as pool:
                digests = dict(zip(self.names, pool.map(self.digest, self.names)))
        h = hashlib.sha256(repr(parse_config(self.config, self.source)).encode())
        for name in self.names:
            h.update(f"{name} {self.dtype(name)} {self.shape(name)} {digests[name]}".encode())
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            h.update(f"{name} {self.files.get(name)}".encode())
        return h.hexdigest()


def all_finite(t):
    """Whether a tensor of floats holds neither NaN nor infinity."""
    return bool(t.sum().isfinite()) or bool(t.isfinite().all())  # the sum is quicker, but may overflow


def download(repo):
    """A hub id -> the directory of its files: configuration, tokenizer, safetensors, nothing else."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise InputError(
            f"{repo}: no such checkpoint: give a directory, a .pt file or a hub id such as Qwen/Qwen2-0.5B-Instruct"
        )
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            repo, allow_patterns=["config.json", "*.safetensors", "*.safetensors.index.json", *SIDE_FILES]
        )
    except Exception as e:  # the client raises many kinds, of its own and of its HTTP library
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(f"{repo}: no such directory here, and the hub did not give it: {reason}") from None


def write_checkpoint(out, config, files, specs, tensors, shard_size=None):
    """Writes a checkpoint, whole or not at all: a directory that transformers and vLLM load, or a .pt by the suffix.

    config: dict. files: {name: text}, or a function that gives the text when the tensors have been taken. specs: {name:
    (shape, dtype)}. tensors: (name, tensor) pairs in the order of specs, taken one at a time, so that a directory is
    written without ever holding the model. shard_size: most bytes of a safetensors file (a larger tensor has one of its
    own); None: one file for all.
    """
    texts = lambda: {name: text() if callable(text) else text for name, text in files.items()}
    dtypes = {str(dtype).removeprefix("torch.") for _, dtype in specs.values() if dtype.is_floating_point}
    if len(dtypes) == 1:
        config = {**config, "dtype" if "dtype" in config else "torch_dtype": dtypes.pop()}
    if out.endswith(".pt"):
        with atomic_write(out, "wb") as f:
            weights = {n: t.contiguous() for n, t in tensors}
            try:
                torch.save({"config": config, "files": texts(), "weights": weights}, f)
            except RuntimeError as e:  # what torch makes of a full disk
                raise (
                    e.__context__ if isinstance(e.__context__, OSError) else OSError(str(e).splitlines()[0])
                ) from None
        return
    shards, index, tensors = plan_shards(specs, shard_size), {}, iter(tensors)
    if len(shards) > 1:
        where = {tensor: name for name, shard in shards.items() for tensor in shard}
        index = {"metadata": {"total_size": sum(map(nbytes, specs.values()))}, "weight_map": where}
        index = {"model.safetensors.index.json": json.dumps(index, indent=2) + "\n"}
    with atomic_directory(out) as folder:
        for name, shard in shards.items():
            with atomic_write(os.path.join(folder, name), "wb") as f:
                write_safetensors(f, shard, itertools.islice(tensors, len(shard)))
        config = {"config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}
        for name, text in {**texts(), **index, **config}.items():
            with atomic_write(os.path.join(folder, name)) as f:
                f.write(text)


def nbytes(spec):
    shape, dtype = spec
    return dtype.itemsize * torch.Size(shape).numel()


def plan_shards(specs, shard_size):
    """specs in files of at most shard_size bytes, in their order: {file name: its specs}."""
    shards, room = [], 0
    for name, spec in specs.items():
        if not shards or shard_size and nbytes(spec) > room:
            shards.append({})
            room = shard_size
        shards[-1][name] = spec
        room = shard_size and room - nbytes(spec)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_safetensors(f, specs, tensors):
    """The safetensors format, streamed: 8 bytes of header length, a JSON header, then the tensors' bytes in order."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in specs.items():
        size = nbytes((shape, dtype))
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the data start on a multiple of 8 bytes
    f.write(len(head).to_bytes(8, "little") + head)
    tensors = iter(tensors)
    for name, (shape, dtype) in specs.items():
        got, t = next(tensors, (None, torch.empty(0)))
        if (got, tuple(t.shape), t.dtype) != (name, tuple(shape), dtype):
            raise ValueError(f"expected {name} {shape} {dtype}, was given {got} {tuple(t.shape)} {t.dtype}")
        f.write(t.contiguous().view(-1).view(torch.uint8).numpy())
        del t  # before the next one is made: they may be large
        start_writing(f)
