"""Checkpoints in and out, their configuration, and what all scripts do with files and bad input.

    ckpt = Checkpoint("Qwen/Qwen2-0.5B-Instruct")     # a hub id, a Hugging Face directory or a .pt file
    ckpt.names, ckpt.shape(name), ckpt.tensor(name)   # one tensor at a time
    write_checkpoint(out, config, files, specs, tensors)
"""

import contextlib
import ctypes
import hashlib
import itertools
import json
import mmap
import os
import pickle
import re
import shutil
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


class InputError(Exception):
    """Bad input from outside. The message is one line: file, line, what is wrong, what to do. See cli()."""


@dataclass(frozen=True)
class Config:
    """The numbers of a config.json that shape the forward pass, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int


def parse_config(raw, where="config.json"):
    """config.json as a dict -> Config. What this file does not implement raises InputError instead of being ignored."""

    def refuse(what):
        raise InputError(f"{where}: {what}: this code implements plain Qwen2 only")

    if raw.get("model_type") != "qwen2":
        refuse(f"model_type is {raw.get('model_type')!r}, not 'qwen2'")
    rope = raw.get("rope_parameters") or {}  # transformers >= 5 keeps rope_theta in here
    for scaling in raw.get("rope_scaling") or {}, rope:
        if not isinstance(scaling, dict) or scaling.get("rope_type", scaling.get("type", "default")) != "default":
            refuse(f"rope scaling {scaling} is asked for")
    layer_types = set(raw.get("layer_types") or ["full_attention"])
    if raw.get("use_sliding_window") or layer_types != {"full_attention"}:
        refuse("sliding-window attention is asked for")
    if raw.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act is {raw['hidden_act']!r}, not 'silu'")
    if raw.get("quantization_config"):
        refuse("the weights are quantised")

    def field(name, default=None, kind=int):
        value = default if raw.get(name) is None else raw[name]
        try:
            if (number := kind(value)) == value and number != float("inf"):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
        what = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise InputError(f"{where}: {name} is {'missing; it is' if value is None else f'{value!r}, not'} {what}")

    heads, size = field("num_attention_heads"), field("hidden_size")
    config = Config(
        vocab_size=field("vocab_size"),
        hidden_size=size,
        intermediate_size=field("intermediate_size"),
        num_hidden_layers=field("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=field("num_key_value_heads", heads),
        head_dim=field("head_dim", size // max(heads, 1)),
        rms_norm_eps=field("rms_norm_eps", 1e-6, float),
        rope_theta=field("rope_theta", rope.get("rope_theta", 10000.0), float),
        tie_word_embeddings=field("tie_word_embeddings", False, bool),
        max_position_embeddings=field("max_position_embeddings", 32768),
    )
    for name, value in vars(config).items():
        if value <= 0 and not isinstance(value, bool):
            raise InputError(f"{where}: {name} is {value}; it is above 0")
    if config.num_attention_heads % config.num_key_value_heads:
        refuse(f"{config.num_attention_heads} query heads do not divide into {config.num_key_value_heads} key-value heads")
    return config


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


def cli(main):
    """Runs a script's main(). Bad input ends with one line on stderr and exit code 2, Ctrl-C with 130, SIGTERM with 143."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by the way out, on which half-written files are removed
    try:
        main()
    except InputError as e:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun the ranks of a machine meet the same error
            print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Opens a temporary file beside `path`; on success it takes the name, on failure nothing is left."""
    path = os.path.abspath(path)
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written: {e.strerror or e}") from None
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.remove(temporary)


def append(f, data):
    """Writes data to the end of a file that keeps what was done so far, at once."""
    try:
        f.write(data)
        f.flush()
    except OSError as e:
        raise InputError(f"{f.name}: cannot be written: {e.strerror}; make room and run the same command to go on") from None


def read_text(path):
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read as text ({getattr(e, 'strerror', None) or e}); mend it, or fetch it again") from None


def code_hash(*modules):
    """Of the source of these modules, which are there to be edited: what was computed with other code is not used again."""
    here = os.path.dirname(os.path.abspath(__file__))
    return hashlib.sha256("".join(read_text(f"{here}/{module}.py") for module in modules).encode()).hexdigest()


def json_object(text, where):
    """The dict of a JSON text. where: the file, for the error."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: cannot be read as JSON ({e}); mend it, or fetch it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: holds a JSON {type(value).__name__}, not an object")
    return value


def read_json(path):
    return json_object(read_text(path), path)


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
            raise InputError(f"{path}: holds more than tensors and plain data (or is no .pt file); not loaded") from None
        except (RuntimeError, EOFError):
            raise InputError(f"{path}: a corrupt .pt checkpoint, or none; a hub id, a directory or a .pt of this project is one") from None
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
        for s in chunks(len(flat), mapped([flat]), 2**20):
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


def mapped(tensors):
    """Those of the tensors that lie in a mapped file (known on Linux only). Their memory may be given back: the file still
    has what it held, as nobody writes into a checkpoint's tensors. Any other memory would come back as zeros. Small ones
    are left out: to look them up would take longer than to read them."""
    tensors, files = [t for t in tensors if t.is_contiguous() and t.numel() >= WINDOW // 16], []
    highest = max((t.data_ptr() for t in tensors), default=0)
    with contextlib.suppress(OSError), open("/proc/self/maps" if tensors else os.devnull) as f:
        for line in f:  # in the order of addresses
            span, _, _, _, inode = line.split(maxsplit=5)[:5]
            begin, end = (int(address, 16) for address in span.split("-"))
            if inode != "0":
                files.append((begin, end))
            if end > highest:
                break
    return [t for t in tensors if any(a <= t.data_ptr() and t.data_ptr() + t.nbytes <= b for a, b in files)]


WINDOW = 2**22  # elements of a mapped tensor that stay in memory while it is read


def chunks(n, held, size):
    """Yields the slices of n elements, `size` at a time. held: flat tensors of n elements as mapped() gives them: what
    lies behind is given back to the system, so that memory does not grow with what is read; a later use reads it again."""
    behind = 0
    for start in range(0, n, size):
        stop = min(start + size, n)
        yield slice(start, stop)
        if stop == n or stop - behind >= WINDOW:
            for t in held:
                drop_pages(t[behind:stop])
            behind = stop


def release(t):
    """Takes a tensor of a mapped file out of this process's memory; the next use reads it again. Leaves others alone."""
    for found in mapped([t]):
        drop_pages(found)


def drop_pages(t):
    """release() of one of mapped()'s tensors or a part of it, which is not checked again."""
    begin = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only: others may need the rest
    size = (t.data_ptr() + t.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def download(repo):
    """A hub id -> the directory of its files: configuration, tokenizer, safetensors, nothing else."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise InputError(f"{repo}: no such checkpoint: give a directory, a .pt file or a hub id such as Qwen/Qwen2-0.5B-Instruct")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(repo, allow_patterns=["config.json", "*.safetensors", "*.safetensors.index.json", *SIDE_FILES])
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
                raise (e.__context__ if isinstance(e.__context__, OSError) else OSError(str(e).splitlines()[0])) from None
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


def same(a, b):
    """Whether two paths are of one file or directory."""
    return os.path.realpath(a) == os.path.realpath(b)


def check_out(out):
    """InputError unless a checkpoint can be written there. Asked before the work, so that the work is not lost."""
    path = parent = os.path.realpath(out)
    if out.endswith(".pt") and os.path.isdir(path):
        raise InputError(f"{out}: is a directory; a .pt checkpoint is a file; give another --out")
    if not out.endswith(".pt") and os.path.isfile(path):
        raise InputError(f"{out}: is a file; give a directory, or a name that ends in .pt, as --out")
    if os.path.isdir(path) and os.listdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise InputError(f"{out}: exists and is no checkpoint; give another --out")
    while not os.path.exists(parent := os.path.dirname(parent)):
        pass
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        raise InputError(f"{out}: nothing can be written in {parent}; give another --out")


@contextlib.contextmanager
def atomic_directory(out):
    """Gives a directory beside `out` to write in; on success it takes the name of out, on failure nothing is left."""
    check_out(out)
    out = os.path.realpath(out)  # of a link it is what the link points to that is replaced
    temporary = f"{out}.tmp{os.getpid()}"
    try:
        yield temporary
        try:
            if os.path.isdir(out):  # rename cannot replace a directory that is not empty
                os.rename(out, f"{temporary}.old")
            os.rename(temporary, out)
        except OSError as e:
            raise InputError(f"{out}: cannot be replaced: {e.strerror}; give another --out") from None
    finally:
        for leftover in (temporary, f"{temporary}.old"):
            shutil.rmtree(leftover, ignore_errors=True)


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


def start_writing(f):
    """Has the system write to the disk what it holds of an open file, without waiting: the next tensors are made meanwhile,
    and the fsync at the end finds little left to do. Linux only."""
    if sys.platform == "linux":
        f.flush()
        whole_file, write = ctypes.c_int64(0), 2  # SYNC_FILE_RANGE_WRITE
        ctypes.CDLL(None).sync_file_range(f.fileno(), whole_file, whole_file, write)
