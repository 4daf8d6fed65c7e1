"""Parts of tools.gpu: the machine, single operations, generation, the suite, peers. Training: tools/gpu_training.py.

Each part runs in a process of its own and reports every result as soon as it has it.

Models have random weights. Examples are random token ids whose lengths vary as those of real replies do.
"""

import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from core import layers
from core.attention import attend_documents
from core.checkpoint import Checkpoint
from core.devices import DTYPES
from core.files import ROOT
from core.head import token_logps
from core.tokenizer import Tokenizer
from generate import generate_steps
from model import Qwen2
from tools.memory import SHAPES, raw_config
from tools.rates import device_copy_rate, matmul_rate, synchronise
from training.feedback import FeedbackRow
from training.memory import count_parameters

TOKENIZER = os.path.join(ROOT, "demo", "base")  # the one checkpoint in the repository
HEADLINE = 14_000  # examples


@dataclass(frozen=True)
class Sizes:
    """How large the measurements are. Lengths are in tokens."""

    shape: tuple  # a row of tools.memory.SHAPES
    length: int = 500  # mean of an example
    max_len: int = 2048
    batch_size: int = 64
    micro_tokens: int = 16384
    steps: int = 10
    headline: int = HEADLINE
    slice: int = 960  # examples of the headline's slice
    documents: int = 32  # in the attention measurement
    head_rows: int = 8192
    prompt: int = 64  # words of a prompt
    reply: int = 256
    rows: tuple[int, ...] = (1, 32, 256)


LARGE = Sizes(SHAPES["0.5B"])
SMALL = Sizes((64, 128, 2, 4, 2, 1024, True), 24, 64, 8, 256, 3, 24, 8, 4, 64, 8, 12, (1, 4))


def append_row(path: str, **row: object) -> None:
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")


@dataclass(frozen=True)
class Bench:
    """The settings of one part's process."""

    part: str
    device: str
    dtype: str  # a key of DTYPES
    sizes: Sizes
    out: str  # JSON Lines
    folder: str  # for temporary files
    deadline: float  # time.time() at which the process is ended
    compile: bool = True  # whether torch.compile is tried

    def report(self, what: str, value: float | str, unit: str = "", note: str = "") -> None:
        """Appends one result to the file."""
        append_row(self.out, part=self.part, what=what, value=value, unit=unit, note=note)


def random_model(bench: Bench, raw: dict, dtype: torch.dtype) -> Qwen2:
    """A model with random weights in dtype on the device."""
    with torch.device(bench.device):
        model = Qwen2(raw).to(dtype)
    return model.init_weights(torch.Generator(bench.device).manual_seed(0))


def random_rows(sizes: Sizes, n: int) -> list[FeedbackRow]:
    """n examples of feedback. Their lengths are log-normal with a mean of sizes.length; a third of each is prompt."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(sizes.length) - 0.125, 0.5, n).astype(int).clip(6, sizes.max_len)
    rows = []
    for i, length in enumerate(lengths):
        ids = tuple(rng.integers(0, sizes.shape[5], length).tolist())
        rows.append(FeedbackRow(ids[: length // 3], ids[length // 3 :], i % 2 == 0))
    return rows


def timed(device: str, f: Callable[[], object], seconds: float = 1.0) -> float:
    """Median time of f() in seconds. Calls it for about `seconds` seconds, after one warm-up call."""
    f()
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        synchronise(device)
        start = time.perf_counter()
        f()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def reset_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: str) -> float:
    """Peak memory in GiB since reset_peak. On a CPU, the peak of the process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def compute_rate(bench: Bench) -> float:
    """The matmul rate in the compute dtype, FLOP/s, measured now."""
    return matmul_rate(bench.device, DTYPES[bench.dtype], 0.1 if bench.sizes == SMALL else 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Limits of the machine, and single operations


def machine(bench: Bench) -> None:
    seconds = 0.1 if bench.sizes == SMALL else 2.0
    for name, dtype in DTYPES.items():
        bench.report(f"matmul, {name}", matmul_rate(bench.device, dtype, seconds) / 1e12, "TFLOP/s")
    bench.report("copy in memory", device_copy_rate(bench.device, seconds) / 1e9, "GB/s", "bytes read plus written")


def with_plain(f: Callable[[], object]) -> object:
    """f() with KERNELS=plain."""
    layers.KERNELS, before = "plain", layers.KERNELS
    try:
        return f()
    finally:
        layers.KERNELS = before


def operations(bench: Bench) -> None:
    """Forward and backward of packed attention and of the head, fused and plain."""
    s, dtype = bench.sizes, DTYPES[bench.dtype]
    C, _, _, Hq, Hkv, V, _ = s.shape
    lengths = [len(p) + len(c) for p, c, _ in random_rows(s, s.documents)]
    tensor = lambda *shape: torch.randn(shape, device=bench.device, dtype=dtype, requires_grad=True)
    q, k, v = (tensor(1, sum(lengths), heads, C // Hq) for heads in (Hq, Hkv, Hkv))
    run = lambda: attend_documents(q, k, v, lengths).sum().backward()
    seconds = 0.1 if s == SMALL else 1.0
    fused, plain = (way(lambda: timed(bench.device, run, seconds)) for way in (lambda f: f(), with_plain))
    note = f"{len(lengths)} documents, {sum(lengths)} tokens; SDPA per document takes {1e3 * plain:.3g} ms"
    bench.report("packed attention, forward and backward", 1e3 * fused, "ms", note)
    hidden, weight = tensor(s.head_rows, C), torch.randn(V, C, device=bench.device, requires_grad=True)
    targets = torch.randint(0, V, (s.head_rows,), device=bench.device)
    run = lambda: token_logps(hidden, weight, targets).sum().backward()
    reset_peak(bench.device)
    fused, memory = timed(bench.device, run, seconds), peak_gib(bench.device)
    share = 100 * 8 * s.head_rows * C * V / fused / compute_rate(bench)
    note = f"{s.head_rows} tokens, peak {memory:.2f} GiB; {share:.0f} % of the matmul rate, 4 matmuls counted"
    bench.report("head, forward and backward", 1e3 * fused, "ms", note)
    reset_peak(bench.device)
    plain, memory = with_plain(lambda: timed(bench.device, run, seconds)), peak_gib(bench.device)
    bench.report("head, plain", 1e3 * plain, "ms", f"peak {memory:.2f} GiB")


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def prompts_of(sizes: Sizes, n: int) -> list[str]:
    """n different prompts of sizes.prompt words each. The words are digits."""
    rng = np.random.default_rng(0)
    return [" ".join(map(str, rng.integers(0, 10, sizes.prompt))) for _ in range(n)]


def endless_tokenizer() -> Tokenizer:
    """The demo's tokenizer without end tokens, so that every reply has full length."""
    tokenizer = Tokenizer(TOKENIZER)
    tokenizer.stop_ids = set()
    return tokenizer


def generation(bench: Bench) -> None:
    """Tokens per second at several numbers of rows, and the share of the limit that the memory bandwidth sets."""
    s, dtype = bench.sizes, DTYPES[bench.dtype]
    model, tokenizer = random_model(bench, raw_config(*s.shape), dtype), endless_tokenizer()
    bandwidth = device_copy_rate(bench.device, 0.1 if s == SMALL else 1.0)
    weights = count_parameters(model.config)[2] * dtype.itemsize
    for rows in s.rows:
        prompts = prompts_of(s, rows)
        prompt = len(tokenizer.prompt_ids([{"role": "user", "content": prompts[0]}]))
        settings = {"max_new_tokens": s.reply, "batch_size": rows, "cache_gb": 16.0}
        made, seconds = 0, 0.0
        for _ in range(2):  # the first loads kernels
            reset_peak(bench.device)
            start = time.perf_counter()
            replies = {i: len(tokens) for i, tokens, _ in generate_steps(model, tokenizer, prompts, **settings)}
            seconds, made = time.perf_counter() - start, sum(replies.values())
        cache = model.new_cache(rows, prompt + s.reply // 2, "meta").bytes  # at the mean length
        limit = rows * bandwidth / (weights + cache)
        name = f"generation, {rows} rows" if rows > 1 else "generation, 1 row"
        bench.report(name, made / seconds, "tokens/s", "prompts and graph capture included")
        note = "the limit: each step reads the weights and the KV cache once"
        bench.report(f"{name}, share of the bandwidth's limit", 100 * made / seconds / limit, "%", note)
        bench.report(f"{name}, peak memory", peak_gib(bench.device), "GiB")


# ---------------------------------------------------------------------------------------------------------------------
# Peers and the suite, in processes of their own


def run_command(command: list[str], **env: str) -> subprocess.CompletedProcess:
    """Runs a command in the repository's root. RuntimeError with the last line of its output if it fails."""
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(([*done.stdout.splitlines(), *done.stderr.strip().splitlines()] or ["no output"])[-1])
    return done


def suite(bench: Bench) -> None:
    """The suite's GPU tests, if pytest is installed."""
    if not importlib.util.find_spec("pytest"):
        return bench.report("the suite's GPU tests", "not run", note="pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "gpu", "tests/test_model.py", "tests/test_generate.py"]
    lines = run_command(command, TEST_GPU="1").stdout.strip().splitlines()
    bench.report("the suite's GPU tests", lines[-1].strip("= "))


def written_model(bench: Bench) -> str:
    """A checkpoint of the measured shape with the demo's tokenizer, in bench.folder."""
    path = os.path.join(bench.folder, "model")
    files = Checkpoint(TOKENIZER).files
    raw = raw_config(*bench.sizes.shape) | {"architectures": ["Qwen2ForCausalLM"]}
    random_model(bench, raw, torch.bfloat16).save(path, {k: v for k, v in files.items() if k != "config.json"})
    return path


def peer(bench: Bench, mode: str, vs: str, lines: list[dict], **flags: object) -> None:
    """Runs tools.speed against a peer on these lines and reports the speeds of both sides."""
    if not importlib.util.find_spec(vs):
        return bench.report(f"{mode} against {vs}", "not run", note=f"{vs} is not installed")
    data, out = (os.path.join(bench.folder, f"{mode}{end}") for end in (".jsonl", ".json"))
    with open(data, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)
    flags |= {
        "ckpt": written_model(bench),
        "data": data,
        "vs": vs,
        "device": bench.device,
        "dtype": bench.dtype,
        "max-len": bench.sizes.max_len,
        "out": out,
    }
    command = [sys.executable, "-m", "tools.speed", mode, *(str(x) for k, v in flags.items() for x in (f"--{k}", v))]
    torch.cuda.empty_cache()
    said = run_command(command).stdout
    with open(out, encoding="utf-8") as f:
        for side, (turn, *_) in json.load(f)["runs"].items():
            note = f"peak {turn['peak_gb']:.2f} GiB, {turn['wall_s']:.1f} s with loading"
            unit, value = ("tokens/s", turn["made"] / turn["step_s"]) if mode == "generate" else ("s", turn["step_s"])
            bench.report(f"{mode} through tools.speed, {side}", value, unit, note)
    for line in said.splitlines():
        if line.startswith("against "):
            bench.report(f"{mode}, ours", line)


def transformers_peer(bench: Bench) -> None:
    n, reply = max(min(bench.sizes.rows[-1], 32), 8), min(bench.sizes.reply, 128)
    lines = [{"prompt": [{"role": "user", "content": text}]} for text in prompts_of(bench.sizes, n)]
    peer(bench, "generate", "transformers", lines, **{"limit": n, "batch-size": n, "max-new-tokens": reply})


def trl_peer(bench: Bench, mode: str) -> None:
    """SFT or KTO on texts of natural lengths, the first step of each side included. mode: "sft" or "kto"."""
    s, lines = bench.sizes, []
    for prompt, completion, label in random_rows(s, 4 * s.batch_size):
        texts = [" ".join(str(token % 10) for token in part[::2]) for part in (prompt, completion)]
        lines.append({"prompt": texts[0], "completion": texts[1], "label": label})
    peer(bench, mode, "trl", lines, **{"steps": 4, "batch-size": s.batch_size, "peer-batch": 8})
