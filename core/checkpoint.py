"""Reads and writes checkpoints.

    ckpt = Checkpoint("Qwen/Qwen2-0.5B-Instruct")     # a hub id, a Hugging Face folder or a .pt file
    ckpt.names, ckpt.shape(name), ckpt.tensor(name)   # one tensor at a time
    write_checkpoint(out, config, files, specs, tensors)

Reading takes one tensor at a time, and so does writing a folder: neither holds the whole model in memory.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.config import parse_config, rope_settings
from core.files import ESCAPE, InputError, atomic_write, check_regular, read_json, read_text, warn_once
from core.outputs import (
    CARD,
    INDEX,
    SIDE_FILES,
    atomic_folder,
    check_checkpoint_path,
    remove_leftovers,
    write_card,
)
from core.pages import mapped, page_chunks, start_writing

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
READABLE = {*SAFETENSORS_DTYPES, torch.float8_e4m3fn, torch.float8_e5m2}


class Checkpoint:
    """A checkpoint opened for reading, one tensor at a time.

    source: a hub id, a Hugging Face folder (one or many safetensors), or a .pt file written by this project.
    config: config.json as a dict. files: {name: text} of SIDE_FILES.
    names: the tensors' names in Qwen2ForCausalLM, sorted.
    Tied weights have one name, model.embed_tokens.weight. Only tensors and plain containers are unpickled.
    Raises InputError, which names what is missing or broken.
    """

    def __init__(self, source: str | os.PathLike):
        self.source = str(source)
        check_regular(self.source)
        if os.path.isdir(self.source):
            self._open_folder(self.source)
        elif os.path.isfile(self.source):
            self._open_pt(self.source)
        else:
            self._open_folder(download(self.source))
        self._tensors = {key: place for key, place in self._tensors.items() if not key.endswith("rotary_emb.inv_freq")}
        if "embed_tokens.weight" in self._tensors:  # saved as Qwen2Model, without a head
            self._tensors = {k if k == HEAD else f"model.{k}": place for k, place in self._tensors.items()}
        if self.config.get("tie_word_embeddings") is True and HEAD in self._tensors:
            self._untie()
        self.names = sorted(self._tensors)

    def _untie(self) -> None:
        """Gives tied weights the one name model.embed_tokens.weight. A file may also hold lm_head.weight, or only that.

        If the two tensors differ, they are not tied, as in transformers 5. (vLLM and transformers 4 drop the head.)
        """
        if EMBEDDING in self._tensors and not torch.equal(
            *map(comparable, (self.tensor(HEAD), self.tensor(EMBEDDING)))
        ):
            self.config["tie_word_embeddings"] = False
            warn_once(f"{self.source}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}; both are used")
            return
        head = self._tensors.pop(HEAD)
        self._tensors.setdefault(EMBEDDING, head)

    def _open_folder(self, path: str) -> None:
        config = os.path.join(path, "config.json")
        if os.path.exists(os.path.join(path, "adapter_config.json")):  # transformers would load its base model
            raise InputError(f"{path}: is an adapter (LoRA); fold it into its base model first")
        self.config = read_json(config)
        # lexists, so that a broken link is an error and not an absent file
        present = [name for name in SIDE_FILES if os.path.lexists(os.path.join(path, name))]
        self.files = {name: read_text(os.path.join(path, name)) for name in present}
        self._tensors, listed = {}, {}
        index = os.path.join(path, INDEX)
        if os.path.lexists(os.path.join(path, "model.safetensors")):  # has precedence over an index, as in transformers
            shards = ["model.safetensors"]
        elif os.path.lexists(index):
            listed = read_index(index)
            shards = sorted(set(listed.values()))
        else:
            shards = [name for name in file_names(path) if name.endswith(".safetensors")]
        if not shards:
            others = [n for n in file_names(path) if n.endswith((".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"))]
            only = f", only {others[0]}" if others else ""
            raise InputError(
                f"{path}: no *.safetensors file{only}; convert the weights with transformers' save_pretrained"
            )
        for shard in shards:
            f = open_safetensors(os.path.join(path, shard))
            for name in f.keys():
                if name in self._tensors:
                    raise InputError(
                        f"{path}: two files hold the tensor {name}, one of them {shard}; remove the wrong one"
                    )
                self._tensors[name] = (f, name)
        for name in listed:
            if name not in self._tensors:
                raise InputError(f"{path}: {INDEX} lists {name} in {listed[name]}, which lacks it; download both again")

    def _open_pt(self, path: str) -> None:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            self.config, weights = content["config"], content["weights"]
            self.files = {name: text for name, text in content["files"].items() if name in SIDE_FILES}
            kinds = {type(self.config) is dict, *(isinstance(t, Tensor) for t in weights.values())}
            kinds |= {isinstance(text, str) for text in [*self.files.values(), *weights]}
            if kinds != {True} or not all(map(is_plain, weights.values())):
                raise TypeError
            self._tensors = {name: (t, name) for name, t in weights.items()}
        except pickle.UnpicklingError:
            raise InputError(f"{path}: holds more than tensors and plain data, or is no .pt file; not loaded") from None
        except (RuntimeError, EOFError, RecursionError, UnicodeDecodeError):
            hint = "give a hub id, a folder or a .pt of this project"
            raise InputError(f"{path}: is not a .pt checkpoint or is corrupt; {hint}") from None
        except OSError as e:
            raise InputError(f"{path}: cannot be read: {e.strerror}") from None
        except (KeyError, TypeError, IndexError, AttributeError):
            keys = "a .pt checkpoint of this project has the keys config, files, weights; the weights are whole tensors"
            raise InputError(f"{path}: {keys}") from None

    def tensor(self, name: str) -> Tensor:
        """The tensor in its stored dtype, on the CPU. It is read from disk now."""
        f, key = self._tensors[name]
        return f if isinstance(f, Tensor) else f.get_tensor(key)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the file's header."""
        f, key = self._tensors[name]
        return tuple(f.shape if isinstance(f, Tensor) else f.get_slice(key).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's stored dtype, from the file's header. InputError if it cannot be computed with."""
        f, key = self._tensors[name]
        code = None if isinstance(f, Tensor) else f.get_slice(key).get_dtype()
        dtype = next((d for d, c in SAFETENSORS_DTYPES.items() if c == code), None) or self.tensor(name).dtype
        if dtype not in READABLE:
            raise InputError(
                f"{self.source}: {name} is stored as {dtype}, which is not supported; convert it to float32"
            )
        return dtype

    def digest(self, name: str) -> str:
        """SHA-256 of a tensor's bytes, in hexadecimal."""
        flat, h = self.tensor(name).contiguous().view(-1), hashlib.sha256()
        for s in page_chunks(len(flat), mapped([flat]), 2**20):
            h.update(flat[s].view(torch.uint8).numpy())
        return h.hexdigest()

    def fingerprint(self, digests: dict[str, str] | None = None) -> str:
        """SHA-256 of architecture, weights and tokenizer. A folder and a .pt of the same model have the same.

        digests: {name: digest(name)} of all tensors if they are known; otherwise all tensors are read."""
        if digests is None:
            with ThreadPoolExecutor(4) as pool:
                digests = dict(zip(self.names, pool.map(self.digest, self.names)))
        h = hashlib.sha256(repr(parse_config(self.config, self.source)).encode())
        for name in self.names:
            h.update(f"{name} {self.dtype(name)} {self.shape(name)} {digests[name]}".encode())
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            h.update(f"{name} {self.files.get(name)}".encode())
        return h.hexdigest()


def read_index(path: str) -> dict[str, str]:
    """{tensor name: file name} of a shard index. Each file must be in the folder of the index."""
    try:
        listed = read_json(path)["weight_map"]
        shards = set(map(os.fspath, listed.values()))
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: has no weight_map of tensors to files; download it again") from None
    if not listed:
        raise InputError(f"{path}: its weight_map is empty; download it again")
    for name in shards:
        if os.path.basename(name) != name or not name.endswith(".safetensors") or "\0" in name:
            raise InputError(f"{path}: names the file {name!r}; a shard is a .safetensors file beside the index")
    return listed


def file_names(folder: str) -> list[str]:
    """The names in a folder, sorted."""
    try:
        return sorted(os.listdir(folder))
    except OSError as e:
        raise InputError(f"{folder}: cannot be listed: {e.strerror}") from None


def open_safetensors(path: str) -> safe_open:
    """The open safetensors file; its tensors are read later, one at a time."""
    check_regular(path)
    try:
        open(path, "rb").close()  # safe_open gives a wrong reason for a folder and for an unreadable file
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        reason = getattr(e, "strerror", None) or e
        raise InputError(f"{path}: missing or corrupt ({reason}); download it again") from None


def is_plain(t: Tensor) -> bool:
    """True if the file holds every element of a tensor. A view may repeat one element a billion times."""
    whole = t.layout is torch.strided and t.device.type == "cpu" and t.is_contiguous()
    return whole and not (t.is_quantized or t.is_conj() or t.is_neg())


def comparable(t: Tensor) -> Tensor:
    """The tensor in a dtype that has sums and comparisons: float32 in place of float8."""
    return t.float() if t.dtype.itemsize == 1 else t


def all_finite(t: Tensor) -> bool:
    """True if a tensor of floats, of any shape, has no NaN and no infinity."""
    t = comparable(t)
    return bool(t.sum().isfinite()) or bool(t.isfinite().all())  # the sum is faster but may overflow


def download(repo: str) -> str:
    """Downloads configuration, tokenizer, safetensors and model card of a hub id. -> the local folder."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        hint = "give a folder, a .pt file or a hub id such as Qwen/Qwen2-0.5B-Instruct"
        raise InputError(f"{repo or 'an empty name'}: no such checkpoint; {hint}")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            repo, allow_patterns=["config.json", "*.safetensors", "*.safetensors.index.json", CARD, *SIDE_FILES]
        )
    except Exception as e:  # the client raises many kinds, of its own and of its HTTP library
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(f"{repo}: is not a local folder and cannot be downloaded from the hub: {reason}") from None


Text = str | Callable[[], str]


def write_checkpoint(
    out: str,
    config: dict,
    files: dict[str, Text],
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]],
    tensors: Iterable[tuple[str, Tensor]],
    shard_size: int | None = None,
    card: Text | None = None,
) -> None:
    """Writes a checkpoint, whole or not at all: a .pt file if `out` ends in .pt, else a Hugging Face folder.

    config: config.json. files: {name: text}; a function instead of a text is called after the last tensor.
    specs: {name: (shape, dtype)}. tensors: (name, tensor) pairs in the order of specs. They are taken one at a time, so
    writing a folder never holds the model in memory. shard_size: maximum bytes of a safetensors file; a larger
    tensor gets its own. None: one file. card: text of README.md in a folder. The user's own README.md is kept instead.
    """
    call = lambda text: text() if callable(text) else text
    dtypes = {str(dtype).removeprefix("torch.") for _, dtype in specs.values() if dtype.is_floating_point}
    if len(dtypes) == 1:
        config = {**config, "dtype" if "dtype" in config else "torch_dtype": dtypes.pop()}
    if "rope_theta" in config:  # for readers that do not know rope_parameters
        config = {**config, "rope_theta": rope_settings(config)["rope_theta"]}
    remove_leftovers(os.path.dirname(os.path.realpath(out)), os.path.basename(os.path.realpath(out)))
    if out.endswith(".pt"):
        with atomic_write(out, "wb") as f:
            weights = {n: t.contiguous() for n, t in tensors}
            save_pt({"config": config, "files": {n: call(text) for n, text in files.items()}, "weights": weights}, f)
        return
    check_checkpoint_path(out)
    shards, index = plan_shards(specs, shard_size), {}
    if len(shards) > 1:
        where = {tensor: name for name, shard in shards.items() for tensor in shard}
        total = sum(tensor_bytes(*spec) for spec in specs.values())
        index = {INDEX: json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n"}
    texts = {**files, **index, "config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}
    with atomic_folder(out, [*shards, *texts, *([CARD] if card else [])]) as folder:
        try:
            tensors = iter(tensors)
            for name, shard in shards.items():
                with create_file(os.path.join(folder, name)) as f:
                    write_safetensors(f, shard, itertools.islice(tensors, len(shard)))
            for name, _ in tensors:  # also ends a generator here, where Ctrl-C is handled
                raise ValueError(f"{name} is not in specs")
            for name, text in texts.items():
                with create_file(os.path.join(folder, name)) as f:
                    f.write(call(text).encode(errors=ESCAPE))
            if card:
                write_card(folder, call(card))
        except OSError as e:
            raise InputError(f"{out}: cannot be written: {e.strerror or e}") from None


@contextlib.contextmanager
def create_file(path: str) -> Iterator[BinaryIO]:
    """Opens a new binary file. Its bytes are on the disk when the context ends."""
    with open(path, "xb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())


def save_pt(content: dict, f: BinaryIO) -> None:
    """torch.save, with an OSError where torch raises RuntimeError for a full disk."""
    try:
        torch.save(content, f)
    except RuntimeError as e:
        raise (e.__context__ if isinstance(e.__context__, OSError) else OSError(str(e).splitlines()[0])) from None


def tensor_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return dtype.itemsize * torch.Size(shape).numel()


def plan_shards(specs: dict, shard_size: int | None) -> dict[str, dict]:
    """Distributes specs over files of at most shard_size bytes, in order. -> {file name: its specs}."""
    shards, room = [], 0
    for name, spec in specs.items():
        size = tensor_bytes(*spec)
        if not shards or shard_size and size > room:
            shards.append({})
            room = shard_size
        shards[-1][name] = spec
        room = shard_size and room - size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_safetensors(f: BinaryIO, specs: dict, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes the safetensors format: 8 bytes of header length, a JSON header, then the tensors' bytes in order.

    specs: {name: (shape, dtype)}. tensors: (name, tensor) pairs in the order of specs, taken one at a time.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in specs.items():
        size = tensor_bytes(shape, dtype)
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # align the data to 8 bytes
    f.write(len(head).to_bytes(8, "little") + head)
    tensors = iter(tensors)
    for name, (shape, dtype) in specs.items():
        got, t = next(tensors, (None, torch.empty(0)))
        if (got, tuple(t.shape), t.dtype) != (name, tuple(shape), dtype):
            raise ValueError(f"expected {name} {shape} {dtype}, was given {got} {tuple(t.shape)} {t.dtype}")
        f.write(t.contiguous().view(-1).view(torch.uint8).numpy())
        del t  # free it before the next tensor is made
        start_writing(f)
