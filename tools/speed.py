"""How fast and how lean: our scripts, and the same work done by a peer, in one run on one machine.

    python -m tools.speed sft --ckpt C --data sft.jsonl --vs trl
    python -m tools.speed kto --ckpt C --data kto.jsonl --vs trl
    python -m tools.speed generate --ckpt C --data prompts.jsonl --vs transformers
    python -m tools.speed merge --ckpt A B --base BASE --vs mergekit
    python -m tools.speed merge --synthetic FOLDER --method ties       # 7B, bf16: 15 GB to read twice, 15 GB to write

Every side is a fresh process, from loading to its last step; the sides take turns, --repeats times, each with the matmul
rate of the machine (for merge: the rate of a plain copy) measured just before it, as shared machines vary. Printed are
the medians and their ratio. The peers come from requirements-dev.txt. --data holds real texts; --limit takes the first
of them.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

from core.checkpoint import Checkpoint, nbytes, write_checkpoint
from core.config import parse_config
from core.files import InputError, atomic_write, cli
from core.flags import DEVICE, DTYPE, DTYPES, Parser, at_least, torch_device
from core.records import kto_example, read_records, sft_messages
from core.tokenizer import Tokenizer
from model import Qwen2
from tools.memory import SHAPES, raw_config
from training.examples import count_supervised, encode_chats
from training.memory import forward_flops

PEERS = {  # mode: {the name of --vs: the settings of that peer that are tried; the fastest counts}
    "sft": {"trl": ["trl", "trl-padding-free"]},
    "kto": {"trl": ["trl"]},
    "generate": {"transformers": ["transformers-8", "transformers-16", "transformers-32", "transformers-1"]},
    "merge": {"mergekit": ["mergekit"]},
}

# ---------------------------------------------------------------------------------------------------------------------
# What the maths needs


def matmul_rate(device, dtype, seconds=2.0):
    """The rate of a large square matmul in FLOP/s: the median of repeated runs, as a training step cannot choose its moments."""
    n = 2048 if device == "cpu" else 8192
    x, w = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    rates, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronise(device)
        start = time.perf_counter()
        x @ w
        synchronise(device)
        rates.append(2 * n**3 / (time.perf_counter() - start))
    if device != "cpu":
        del x, w
        torch.cuda.empty_cache()  # the sides, which are other processes, have the whole GPU
    return statistics.median(rates)


SEVEN_B = raw_config(*SHAPES["7B"])


def merge_bytes(a):
    """-> (the files that a merge reads, the bytes of what it writes)."""
    sources = [*a.ckpt, *[a.base] * bool(a.base)]
    files = [os.path.join(c, n) for c in sources for n in sorted(os.listdir(c)) if n.endswith(".safetensors")]
    c, dtype = Checkpoint(a.ckpt[0]), DTYPES[a.dtype]
    return files, sum(nbytes((c.shape(name), dtype)) for name in c.names)


def copy_rate(a):
    """The rate of a plain copy, in bytes/s: all that a merge reads is read, all that it writes is written and synced."""
    (files, left), read, block = merge_bytes(a), 0, bytearray(2**24)
    written, start = left, time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as f:
            while got := f.readinto(block):
                read += got
    with tempfile.TemporaryFile(dir=a.scratch, buffering=0) as f:
        while left > 0:
            left -= f.write(block[: min(left, len(block))])
        os.fsync(f.fileno())
    return (read + written) / (time.perf_counter() - start)


def synthetic(folder):
    """Checkpoints of the shape SEVEN_B in bf16, made where the folder lacks them: a is noise, b the same files again, the
    base zeros, of which no disk is taken. -> their paths"""
    a, b, base = (os.path.join(folder, name) for name in ("a", "b", "base"))
    if not os.path.isdir(a):
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in Qwen2(SEVEN_B).named_parameters()}
        noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).bfloat16()
        tensors = ((n, noise.repeat(-(-s.numel() // len(noise)))[: s.numel()].view(s)) for n, s in shapes.items())
        write_checkpoint(a, SEVEN_B, {}, {n: (tuple(s), torch.bfloat16) for n, s in shapes.items()}, tensors, 5 * 10**9)
    for name in os.listdir(a) if not os.path.isdir(base) else []:
        for other in (b, base):
            os.makedirs(other, exist_ok=True)
            if name.endswith(".json"):
                shutil.copy(os.path.join(a, name), other)
        if name.endswith(".safetensors"):
            os.symlink(os.path.abspath(os.path.join(a, name)), os.path.join(b, name))
            with open(os.path.join(a, name), "rb") as f, open(os.path.join(base, name), "wb") as zeros:
                size = f.read(8)  # of the header
                zeros.write(size + f.read(int.from_bytes(size, "little")))
                zeros.truncate(os.path.getsize(f.name))
    return a, b, base


def synchronise(device):
    if device != "cpu":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------------------------------
# The sides. Each runs in a process of its own and returns what it measured.


def ours_train(a, folder):
    script = __import__(f"train_{a.mode}")
    out = os.path.join(folder, "out")
    sys.argv = [f"train_{a.mode}.py", "--ckpt", a.ckpt[0], "--data", a.data, "--out", out, "--max-steps", str(a.steps)]
    sys.argv += [
        "--batch-size",
        str(a.batch_size),
        "--max-len",
        str(a.max_len),
        "--lr",
        "1e-6",
        "--schedule",
        "constant",
    ]
    sys.argv += ["--warmup", "0", "--no-shuffle", "--dtype", a.dtype, "--device", a.device, "--save-every", "0"]
    sys.argv += ["--micro-tokens", str(a.micro_tokens)] if a.micro_tokens else []
    sys.argv += ["--compile"] * a.compile
    script.main()
    with open(f"{out}.run/log.jsonl") as f:
        log = [json.loads(line) for line in f]
    times = [r["tokens"] / r["tokens_per_second"] for r in log]
    return {"step_s": sum(times), "step_times": times, "losses": [r["loss"] for r in log]}


def trl_train(a, folder):
    """TRL's trainer on the same examples in the same order, with the reference precomputed and no recomputation."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

    tokenizer = PreTrainedTokenizerFast.from_pretrained(a.ckpt[0])
    model = AutoModelForCausalLM.from_pretrained(a.ckpt[0], dtype=torch.float32)
    settings = dict(
        output_dir=folder, max_steps=a.steps, per_device_train_batch_size=a.peer_batch,
        gradient_accumulation_steps=a.batch_size // a.peer_batch, max_length=a.max_len, learning_rate=1e-6,
        lr_scheduler_type="constant", bf16=a.dtype == "bf16", use_cpu=a.device == "cpu", gradient_checkpointing=False,
        report_to="none", logging_steps=1, save_strategy="no", max_grad_norm=1.0, weight_decay=0.0, disable_tqdm=True,
    )  # fmt: skip
    if a.mode == "kto":
        examples = [e for _, e in read_records([a.data], kto_example)]
        rows = [
            {"prompt": p, "completion": [{"role": "assistant", "content": c}], "label": label}
            for p, c, label in examples
        ]
        config = KTOConfig(precompute_ref_log_probs=True, **settings)
        trainer = KTOTrainer
    else:
        examples = [m for _, m in read_records([a.data], sft_messages)]
        rows = [{"prompt": m[:-1], "completion": m[-1:]} for m in examples]
        free = a.side == "trl-padding-free"  # it takes no length to cut to: give it data of which nothing is cut
        settings["max_length"] = None if free else a.max_len
        config = SFTConfig(padding_free=free, train_sampling_strategy="sequential", **settings)
        trainer = SFTTrainer
    t = trainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    set_up = time.time()
    t.train()
    stepped = time.time() - set_up
    t.model.save_pretrained(os.path.join(folder, "out"))  # ours writes its checkpoint too
    return {"step_s": stepped, "losses": [h["loss"] for h in t.state.log_history if "loss" in h]}


def read_prompts(a):
    with open(a.data, encoding="utf-8") as f:
        return [json.loads(line)["prompt"] for line in f][: a.limit]


def ours_generate(a, folder):
    from generate import generate_steps

    dtype = DTYPES[a.dtype]
    m, tokenizer = Qwen2.from_pretrained(a.ckpt[0], dtype, a.device), Tokenizer(a.ckpt[0])
    started, made = time.time(), 0
    prompts = read_prompts(a)
    steps = generate_steps(m, tokenizer, prompts, max_new_tokens=a.max_new_tokens, batch_size=a.batch_size)
    texts = [""] * len(prompts)
    for i, tokens, finish in steps:
        if finish:
            made += len(tokens)
            texts[i] = tokenizer.decode(tokens)
    return {"step_s": time.time() - started, "made": made, "texts": texts}


def transformers_generate(a, folder):
    """model.generate on one left-padded batch of prompts of like length; where a batch is one prompt, on eight of them.

    What counts is the time per token, so a batch size need not see all prompts: they all cost the same there, as
    nothing is shared between them."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype = DTYPES[a.dtype]
    model = AutoModelForCausalLM.from_pretrained(a.ckpt[0], dtype=dtype).to(a.device)
    tokenizer = Tokenizer(a.ckpt[0])
    batch = int(a.side.rsplit("-")[-1])
    prompts = read_prompts(a)
    ids = [tokenizer.prompt_ids(p) for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))[: max(8, batch)]
    stops = sorted(tokenizer.stop_ids)
    config = GenerationConfig(
        max_new_tokens=a.max_new_tokens, do_sample=False, repetition_penalty=1.0, eos_token_id=stops, pad_token_id=0
    )
    started, made, texts = time.time(), 0, [None] * len(prompts)
    for part in (order[k : k + batch] for k in range(0, len(order), batch)):
        width = max(len(ids[i]) for i in part)
        padded = torch.tensor([[0] * (width - len(ids[i])) + ids[i] for i in part], device=a.device)
        mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in part], device=a.device)
        out = model.generate(padded, attention_mask=mask, generation_config=config)[:, width:].tolist()
        for i, tokens in zip(part, out):
            end = next((k for k, t in enumerate(tokens) if t in stops), len(tokens))
            made += end
            texts[i] = tokenizer.decode(tokens[:end])
    return {"step_s": time.time() - started, "made": made, "texts": texts}


def ours_merge(a, folder):
    import merge

    sys.argv = ["merge.py", "--method", a.method, "--models", *a.ckpt, "--out", os.path.join(folder, "out")]
    sys.argv += ["--base", a.base] if a.base else []
    sys.argv += ["--density", "0.2"] if a.method in ("ties", "dare_ties") else []
    sys.argv += ["--dtype", "bfloat16", "--shard-size", "5GB"] if a.dtype == "bf16" else []
    started = time.time()
    merge.main()
    return {"step_s": time.time() - started}


def mergekit_merge(a, folder):
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    density = {"density": 0.2} if a.method in ("ties", "dare_ties") else {}
    models = [{"model": os.path.abspath(c), "parameters": {"weight": 1.0, **density}} for c in a.ckpt]
    config = {"merge_method": a.method, "dtype": "float32", "models": models}
    config |= {"base_model": os.path.abspath(a.base)} if a.base else {}
    config |= {"out_dtype": "bfloat16"} if a.dtype == "bf16" else {}
    started = time.time()
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(yaml.dump(config))), os.path.join(folder, "out"),
              MergeOptions(lazy_unpickle=True, quiet=True, copy_tokenizer=True))  # fmt: skip
    return {"step_s": time.time() - started}


SIDES = {
    ("sft", "ours"): ours_train, ("kto", "ours"): ours_train, ("sft", "trl"): trl_train, ("kto", "trl"): trl_train,
    ("generate", "ours"): ours_generate, ("generate", "transformers"): transformers_generate,
    ("merge", "ours"): ours_merge, ("merge", "mergekit"): mergekit_merge,
}  # fmt: skip


def run_side(a):
    """In the side's own process: runs it and prints one line of JSON at the end."""
    with tempfile.TemporaryDirectory(dir=a.scratch) as folder:
        found = SIDES[a.mode, a.side.split("-")[0]](a, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    if a.device != "cpu":
        peak = torch.cuda.max_memory_allocated(a.device) / 2**30
    print("\n" + json.dumps(found | {"peak_gb": peak}))


# ---------------------------------------------------------------------------------------------------------------------


def first_lines(a, folder):
    """The first --limit lines of --data (for training: what the steps take) as a file of their own. -> its path"""
    path = os.path.join(folder, "data.jsonl")
    with open(a.data, encoding="utf-8") as f, open(path, "w", encoding="utf-8") as out:
        out.writelines(line for line, _ in zip(f, range(a.limit)))
    return path


def needed(a):
    """-> (all tokens, supervised tokens, FLOPs the maths needs, those of each step) of a training run."""
    import train_kto

    tokenizer, config = Tokenizer(a.ckpt[0]), parse_config(Checkpoint(a.ckpt[0]).config)

    def count(examples):
        """-> (tokens, supervised tokens, FLOPs of a forward), an array."""
        lengths, supervised = [len(ids) for ids, _ in examples], count_supervised(examples)
        return np.array([sum(lengths), supervised, forward_flops(config, lengths, supervised)])

    if a.mode == "sft":
        examples, _ = encode_chats(read_records([a.data], sft_messages), tokenizer, a.max_len)
        steps = [count(examples[k : k + a.batch_size]) for k in range(0, len(examples), a.batch_size)]
        tokens, supervised, forward = sum(steps)
        return tokens, supervised, 3 * forward, [3 * step[2] for step in steps]
    rows, _ = train_kto.encode_feedback(read_records([a.data], kto_example), tokenizer, a.max_len)
    sides = []  # of each step the matched and the mismatched pairs
    for k in range(0, len(rows), a.batch_size):
        pairs = train_kto.all_pairs(range(len(rows))[k : k + a.batch_size])
        examples = [train_kto.pair_sequence(rows, a.max_len, *pair) for pair in pairs]
        sides.append((count(examples[: len(pairs) // 2]), count(examples[len(pairs) // 2 :])))
    (tokens, supervised, forward), steps = sum(map(sum, sides)), [3 * m[2] + mm[2] for m, mm in sides]
    return tokens, supervised, sum(steps) + forward, steps  # and the reference's forward of all


def measure(a, side, data):
    """Runs one side -> its numbers, with "wall_s", the whole process, and "rate", the machine's rate just before it."""
    rate = copy_rate(a) if a.mode == "merge" else matmul_rate(a.device, DTYPES[a.dtype])
    command = [sys.executable, "-m", "tools.speed", a.mode, "--side", side, "--ckpt", *a.ckpt]
    for name in ("base", "method", "steps", "batch_size", "peer_batch", "max_len", "max_new_tokens", "limit", "dtype", "device",
                 "micro_tokens", "scratch"):  # fmt: skip
        if getattr(a, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(a, name))]
    command += ["--compile"] * a.compile
    started = time.time()
    done = subprocess.run(command + (["--data", data] if data else []), capture_output=True, text=True)
    wall = time.time() - started
    if done.returncode:
        raise InputError(f"{side} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"wall_s": wall, "rate": rate}


def parse_args():
    p = Parser(description=__doc__.split("\n\n")[0])
    p.add_argument("mode", choices=list(PEERS), help="what to measure")
    p.add_argument("--ckpt", nargs="+", help="checkpoint; for merge: the directories to merge")
    p.add_argument("--vs", help="peer to compare with: trl, transformers, mergekit")
    p.add_argument("--repeats", type=at_least(1), default=1, help="turns of each side")
    # training and generation
    p.add_argument("--data", help="JSON Lines: SFT or KTO examples; for generate lines with a prompt (a message list)")
    p.add_argument("--limit", type=at_least(1), help="lines of --data used; training: steps x batch size")
    p.add_argument("--steps", type=at_least(1), default=4, help="optimizer steps")
    p.add_argument("--batch-size", type=at_least(1), default=8, help="examples per step; generate: rows in flight")
    p.add_argument("--peer-batch", type=at_least(1), default=8, help="of these, how many TRL takes in one forward")
    p.add_argument("--micro-tokens", type=at_least(1), help="ours; default as in training")
    p.add_argument("--compile", action="store_true", help="ours with its --compile")
    p.add_argument("--max-len", type=at_least(2), default=1024, help="tokens of an example")
    p.add_argument("--max-new-tokens", type=at_least(1), default=128, help="most tokens of a reply")
    # merging
    p.add_argument("--base", help="base model of the merge")
    p.add_argument(
        "--synthetic",
        metavar="FOLDER",
        help="merge checkpoints of 7B that are written there first (15 GB) if it has none",
    )
    p.add_argument("--method", default="ties", help="linear, ties, ...; TIES at density 0.2")
    # machine
    p.add_argument("--dtype", choices=DTYPES, default=DTYPE, help="to compute in; merge: to write")
    p.add_argument("--device", type=torch_device, default=DEVICE, help="torch device")
    p.add_argument("--scratch", help="folder for what is written on the way; default the system's")
    p.add_argument("--out", help="JSON file for all numbers")
    p.add_argument("--side", help=argparse.SUPPRESS)
    a = p.parse_args()
    a.limit = a.limit or (a.steps * a.batch_size if a.mode in ("sft", "kto") else 32)
    if a.mode != "merge" and not a.data:
        raise InputError(f"{a.mode} needs --data")
    if a.mode == "merge":
        a.device = "cpu"
    if a.synthetic:
        (*a.ckpt, a.base), a.dtype = synthetic(a.synthetic), "bf16"
    if not a.ckpt:
        raise InputError("--ckpt C: say what to measure with")
    if a.vs and a.vs not in PEERS[a.mode]:
        raise InputError(f"--vs {a.vs}: {a.mode} is compared with {', '.join(PEERS[a.mode])}")
    return a


def main():
    a = parse_args()
    if a.side:
        return run_side(a)
    training, work = a.mode in ("sft", "kto"), None
    sides = ["ours"] + (PEERS[a.mode][a.vs] if a.vs else [])
    if a.mode == "generate":  # batches of more than there are prompts are all the same
        sides = [side for side in sides if side == "ours" or int(side.rsplit("-")[-1]) <= a.limit]
    with tempfile.TemporaryDirectory() as folder:
        data = first_lines(a, folder) if a.data else None
        if training:
            a.data = data
            work = tokens, supervised, flops, _ = needed(a)
            print(
                f"{a.limit} examples, {tokens:,} tokens, {supervised:,} supervised; the maths needs {flops / 1e12:.2f} TFLOP"
            )
        runs = {side: [] for side in sides}
        for turn in range(a.repeats):
            for side in sides:
                r = measure(a, side, data)
                runs[side].append(r)
                print(f"{side:<18} {r['wall_s']:7.1f} s in all, {r['step_s']:7.1f} s in {'steps' if training else 'work'}, "
                      f"peak {r['peak_gb']:.2f} GiB, " + (f"copy {r['rate'] / 1e9:.2f} GB/s" if a.mode == "merge" else
                      f"matmul {r['rate'] / 1e9:,.0f} GFLOP/s"), flush=True)  # fmt: skip
    summarise(a, runs, work)
    if a.out:
        with atomic_write(a.out) as f:
            settings = {k: v for k, v in vars(a).items() if k != "side"}
            json.dump({"settings": settings, "torch": torch.__version__, "runs": runs}, f, indent=1)
        print(f"wrote {a.out}")


def summarise(a, runs, work):
    """Prints the medians of the runs and their ratios. runs: {side: its runs}. work: needed(a), of a training run."""
    middle = {
        side: {k: statistics.median(r[k] for r in rs) for k in ("wall_s", "step_s", "peak_gb", "rate")}
        for side, rs in runs.items()
    }
    us, peers = middle["ours"], list(runs)[1:]
    if work:
        tokens, supervised, flops, step_flops = work
        warm = 1 if len(step_flops) > 1 else 0  # the first step loads kernels, and --compile compiles in it
        rate = statistics.median(sum(step_flops[warm:]) / sum(r["step_times"][warm:]) for r in runs["ours"])
        print(f"ours: {a.limit / us['step_s']:.2f} examples/s, {tokens / us['step_s']:,.0f} tokens/s, {supervised / us['step_s']:,.0f} "
              f"supervised/s; {rate / 1e9:,.0f} GFLOP/s in the steps{' after the first' * warm}, {rate / us['rate']:.0%} "
              f"of the matmul rate; {flops / us['wall_s'] / us['rate']:.0%} from start to end")  # fmt: skip
    if a.mode == "merge":
        files, written = merge_bytes(a)
        read = sum(map(os.path.getsize, files))
        for side, m in middle.items():
            limit = (read + written) / m["rate"]  # s
            print(f"{side}: {read / 1e9:.1f} GB read and {written / 1e9:.1f} GB written take {limit:.1f} s as a plain copy, "
                  f"{m['step_s']:.1f} s as a merge: {limit / m['step_s']:.0%} of the copy rate")  # fmt: skip
    if a.mode == "generate":
        for side, rs in runs.items():
            middle[side]["per_token"] = statistics.median(r["step_s"] / r["made"] for r in rs)
            print(f"{side}: {1 / middle[side]['per_token']:.1f} tokens/s")
            same = [x == y for x, y in zip(runs["ours"][0]["texts"], rs[0]["texts"]) if y is not None]
            print(f"  {sum(same)} of {len(same)} replies equal ours")
        key = "per_token"
    else:
        key = "wall_s"
    alone = [side for side in peers if side.endswith("-1")]  # the loop over single prompts is a peer of its own
    for group in ([side for side in peers if side not in alone], alone):
        if group:
            best = min(group, key=lambda side: middle[side][key])
            speed, memory = middle[best][key] / us[key], us["peak_gb"] / middle[best]["peak_gb"]
            print(f"against {best}: {speed:.2f} x its speed, {memory:.2f} x its peak memory")
    if work and peers:
        pairs = zip(runs["ours"][0]["losses"], runs[peers[0]][0]["losses"])
        print("losses, ours and theirs: " + ", ".join(f"{x:.6f} {y:.6f}" for x, y in pairs))


if __name__ == "__main__":
    cli(main)
