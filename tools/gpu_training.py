"""Parts of tools.gpu: correctness, and training through the scripts' own loops."""

import copy
import functools
import json
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

import train_kto
import train_sft
from core.devices import DTYPES
from core.distributed import Ranks
from generate import generate_steps
from model import Qwen2
from tools.gpu_parts import (
    SMALL,
    Bench,
    compute_rate,
    endless_tokenizer,
    peak_gib,
    prompts_of,
    random_model,
    random_rows,
    reset_peak,
)
from tools.memory import raw_config
from training.examples import Cuts, count_supervised
from training.feedback import Feedback, FeedbackRow, pair_sequence
from training.logps import example_logps
from training.memory import forward_flops
from training.reference import Reference, reference_logps
from training.setup import Setup, plan_steps, prepare_blocks, recompute
from training.state import Run
from training.step import make_optimizer

# ---------------------------------------------------------------------------------------------------------------------
# Correctness, on a model of four blocks

CHECKED = (512, 1408, 4, 8, 2, 8192, True)  # a row as in tools.memory.SHAPES, with heads of 64 numbers


def check(bench: Bench, what: str, error: float, bound: float) -> None:
    """Reports an error and whether it is within its bound."""
    verdict = "ok" if error <= bound else "WRONG"
    bench.report(what, f"{verdict}, {error:.1e}", note=f"relative error; at most {bound:g}")


def relative(x: Tensor, wanted: Tensor) -> float:
    """||x - wanted|| / ||wanted||."""
    return ((x.detach().cpu().double() - wanted.double()).norm() / wanted.double().norm()).item()


def correctness(bench: Bench) -> None:
    shape = bench.sizes.shape if bench.sizes == SMALL else CHECKED
    base = random_model(bench, raw_config(*shape), torch.float32)
    check_against_cpu(bench, base)
    check_cache(bench, base)
    check_generation(bench, base)
    check_steps(bench, base)


def check_against_cpu(bench: Bench, base: Qwen2) -> None:
    """Logits, log-probabilities and gradients of packed documents, against a CPU in fp32."""
    rows = random_rows(bench.sizes, 6)
    examples = [
        ([token % base.config.vocab_size for token in ids], supervised)
        for ids, supervised in (pair_sequence(rows, bench.sizes.max_len, i, i) for i in range(len(rows)))
    ]
    ids = torch.tensor([examples[0][0]])

    def outputs(model: Qwen2) -> tuple[Tensor, Tensor, list[Tensor]]:
        with torch.no_grad():
            logits = model.head(model.hidden(ids.to(model.device)))
        logps = example_logps(model, examples)
        return logits, logps, torch.autograd.grad(logps.sum() / 100, list(model.parameters()))

    wanted = [x.detach() for x in flat(outputs(copy.deepcopy(base).cpu()))]
    for name, dtype in DTYPES.items():
        model = copy.deepcopy(base)
        model.compute_dtype = dtype
        errors = [relative(x, y) for x, y in zip(flat(outputs(model)), wanted, strict=True)]
        logits, logps, gradients = errors[0], errors[1], max(errors[2:])
        wide = name == "bf16"
        check(bench, f"logits against the CPU, {name}", logits, 0.03 if wide else 1e-4)
        check(bench, f"log-probabilities against the CPU, {name}", logps, 0.01 if wide else 1e-5)
        check(bench, f"gradients against the CPU, {name}", gradients, 0.1 if wide else 1e-4)


def flat(outputs: tuple[Tensor, Tensor, list[Tensor]]) -> list[Tensor]:
    logits, logps, gradients = outputs
    return [logits, logps, *gradients]


def check_cache(bench: Bench, base: Qwen2) -> None:
    """Hidden states of completions whose prompts are in a KV cache, against whole sequences in one forward."""
    rows = random_rows(bench.sizes, 6)
    ids = lambda parts: torch.tensor([[token % base.config.vocab_size for part in parts for token in part]])
    prompts, completions, wholes = (
        [part(row) for row in rows] for part in (lambda r: r[0], lambda r: r[1], lambda r: r[0] + r[1])
    )
    learnt = torch.cat([torch.arange(len(p) + len(c)) >= len(p) for p, c, _ in rows]).to(bench.device)
    for name, dtype in DTYPES.items():
        model = copy.deepcopy(base)
        model.compute_dtype = dtype
        with torch.no_grad():
            cache = model.new_cache(len(rows), max(map(len, wholes)))
            model.hidden(ids(prompts).to(bench.device), list(map(len, prompts)), cache)
            got = model.hidden(ids(completions).to(bench.device), list(map(len, completions)), cache)[0]
            want = model.hidden(ids(wholes).to(bench.device), list(map(len, wholes)))[0][learnt]
        bound = 0.03 if name == "bf16" else 1e-4
        check(bench, f"hidden states after a cached prompt, {name}", relative(got, want.cpu()), bound)


def check_generation(bench: Bench, base: Qwen2) -> None:
    """Greedy replies, decoded in CUDA graphs and without, in fp32."""
    tokenizer, prompts = endless_tokenizer(), prompts_of(bench.sizes, 7)
    for name, settings in (("", {}), (" with a repetition penalty", {"repetition_penalty": 1.2})):
        settings |= {"max_new_tokens": bench.sizes.reply, "batch_size": 3}  # rows are replaced, lengths change
        replies = []
        for steps_per_sync in (1, 8):  # 1: no graph; 8 is a graph on a GPU and the same function on a CPU
            steps = generate_steps(base, tokenizer, prompts, steps_per_sync=steps_per_sync, **settings)
            replies.append({i: list(tokens) for i, tokens, _ in steps})
        same = sum(replies[0][i] == replies[1][i] for i in replies[0])
        verdict = "ok" if same == len(prompts) else "WRONG"
        bench.report(f"greedy replies in CUDA graphs{name}", f"{verdict}, {same} of {len(prompts)} equal")


def check_steps(bench: Bench, base: Qwen2) -> None:
    """Losses and gradient norms of two SFT and two KTO steps, with each option against the steps without it."""
    s = bench.sizes
    rows = [
        FeedbackRow(*(tuple(t % base.config.vocab_size for t in part) for part in row[:2]), row.label)
        for row in random_rows(s, 16)
    ]
    longest = max(len(prompt) + len(completion) for prompt, completion, _ in rows)

    def losses(mode: str, dtype: str, prepare: Callable[[Qwen2], object], **flags) -> Tensor:
        model, steps = copy.deepcopy(base), plan_steps(len(rows), 8, 1, None)
        prepare(model)
        train = train_sft_steps if mode == "sft" else lambda *a, **k: train_kto_steps(*a, **k)[1]
        log = train(bench, model, rows, steps, dtype=dtype, activation_checkpointing="off", **flags)
        return torch.tensor([[r["loss"], r["grad_norm"]] for r in log])

    nothing, again = lambda model: None, lambda model: [recompute(block) for block in model.model["layers"]]
    ways = [("smaller micro-batches", nothing, {"micro_tokens": longest}), ("activation checkpointing", again, {})]
    if bench.compile:
        ways.append(("compiled", Qwen2.compile, {}))
    wanted = {}
    for name, prepare, flags in ways:  # the slowest comes last
        for mode in ("sft", "kto"):
            for dtype, bound in (("fp32", 1e-4), ("bf16", 0.02)):
                if name == "compiled" and dtype != bench.dtype:  # compiling is slow
                    continue
                key = mode, dtype
                if key not in wanted:
                    wanted[key] = losses(mode, dtype, nothing)
                error = (losses(mode, dtype, prepare, **flags) / wanted[key] - 1).abs().max().item()
                check(bench, f"{mode.upper()} steps, {name}, {dtype}", error, bound)


# ---------------------------------------------------------------------------------------------------------------------
# Training, through the scripts' own loops


def new_run(bench: Bench, mode: str, model: Qwen2, rows: list[FeedbackRow], steps: list, **flags: object) -> Run:
    """A run of train_sft.py or train_kto.py ("sft", "kto") over these steps. Only its log is written.

    Activation checkpointing is on if a step would not fit otherwise, as in the scripts.
    """
    script, out = {"sft": train_sft, "kto": train_kto}[mode], os.path.join(bench.folder, f"{mode}-{time.time_ns()}")
    settings = {
        "ckpt": "random",
        "out": out,
        "device": bench.device,
        "dtype": bench.dtype,
        "save-every": 0,
        "max-len": bench.sizes.max_len,
        "micro-tokens": bench.sizes.micro_tokens,
        "lr": 1e-5,
        "warmup": 0,
        "schedule": "constant",
    } | {k.replace("_", "-"): v for k, v in flags.items()}
    args = script.parse_args(["--data", "random", *(str(x) for k, v in settings.items() for x in (f"--{k}", v))])
    model.compute_dtype = DTYPES[args.dtype]
    os.makedirs(f"{out}.run")
    ranks, nothing = Ranks(device=bench.device), lambda *_: None
    lengths = [len(prompt) + len(completion) for prompt, completion, _ in rows]
    prepare_blocks(model, args, [[lengths[i] for i in step] for step in steps], ranks)
    return Run(args, ranks, model, make_optimizer(model, args), nothing, nothing, {}, {}, len(steps))


def step_records(run: Run) -> list[dict]:
    with open(f"{run.args.out}.run/log.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def train_sft_steps(bench: Bench, model: Qwen2, rows: list[FeedbackRow], steps: list, **flags: object) -> list[dict]:
    """Runs SFT on the rows -> the log's records."""
    run = new_run(bench, "sft", model, rows, steps, **flags)
    examples = [pair_sequence(rows, bench.sizes.max_len, i, i) for i in range(len(rows))]
    places = [f"row {i}" for i in range(len(rows))]
    setup = Setup(run.args, run.ranks, model, None, None, examples, places, steps)
    train_sft.train(run, setup, [], train_sft.micro_loss, None)
    return step_records(run)


def train_kto_steps(
    bench: Bench, model: Qwen2, rows: list[FeedbackRow], steps: list, **flags: object
) -> tuple[float, list[dict]]:
    """Runs the reference pass and KTO on the rows -> (seconds of the pass, the log's records)."""
    run = new_run(bench, "kto", model, rows, steps, **flags)
    data = Feedback(rows, [f"row {i}" for i in range(len(rows))], Cuts(), steps, bench.sizes.max_len)
    pairs = sorted({pair for step in steps for pair in train_kto.all_pairs(step)})
    cache = f"{run.args.out}.safetensors"
    reference = Reference("random", run.args.out, cache, lambda: model, run.args.micro_tokens, run.ranks)
    start = time.perf_counter()
    data.ref, _ = reference_logps(reference, pairs, data.sequence)
    seconds = time.perf_counter() - start
    loss = functools.partial(train_kto.kto_loss, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)
    train_kto.train(run, data, None, loss)
    return seconds, step_records(run)


def step_flops(model: Qwen2, mode: str, rows: list[FeedbackRow], step: list[int], max_len: int) -> int:
    """FLOPs of one step without recomputation: 3 forwards, in KTO also one of the mismatched pairs."""
    pairs = train_kto.all_pairs(step)
    forwards = []
    for some in (pairs[: len(step)], pairs[len(step) :]):
        examples = [pair_sequence(rows, max_len, *pair) for pair in some]
        lengths = [len(ids) for ids, _ in examples]
        forwards.append(forward_flops(model.config, lengths, count_supervised(examples)))
    return 3 * forwards[0] + (forwards[1] if mode == "kto" else 0)


def measure_training(bench: Bench, mode: str, name: str, compiled: bool = False) -> None:
    """Tokens per second, share of the matmul rate and peak memory of a few steps. mode: "sft" or "kto"."""
    s, rate = bench.sizes, compute_rate(bench)
    model = random_model(bench, raw_config(*s.shape), torch.float32)
    if compiled:
        model.compile()
    switch = "on" if compiled else "off"
    rows = random_rows(s, s.batch_size * s.steps)
    steps = plan_steps(len(rows), s.batch_size, 1, None)
    reset_peak(bench.device)
    if mode == "sft":
        log = train_sft_steps(bench, model, rows, steps, batch_size=s.batch_size, compile=switch)
    else:
        seconds, log = train_kto_steps(bench, model, rows, steps, batch_size=s.batch_size, compile=switch)
        tokens = sum(r["tokens"] for r in log)
        bench.report(f"{name}, reference pass", tokens / seconds, "tokens/s", "first calls included")
    first = 1 if len(log) < 6 else 3  # these load kernels and compile
    times = [r["tokens"] / r["tokens_per_second"] for r in log]
    flops = [step_flops(model, mode, rows, step, s.max_len) for step in steps]
    bench.report(name, sum(r["tokens"] for r in log[first:]) / sum(times[first:]), "tokens/s")
    bench.report(f"{name}, share of the matmul rate", 100 * sum(flops[first:]) / sum(times[first:]) / rate, "%")
    again = isinstance(model.model["layers"][0].forward, functools.partial)
    bench.report(f"{name}, peak memory", peak_gib(bench.device), "GiB", "activation checkpointing on" * again)
    bench.report(f"{name}, first step", times[0], "s")


def sft_training(bench: Bench) -> None:
    measure_training(bench, "sft", "SFT")


def kto_training(bench: Bench) -> None:
    measure_training(bench, "kto", "KTO")


def compiled_training(bench: Bench) -> None:
    measure_training(bench, "sft", "SFT, compiled", True)
    measure_training(bench, "kto", "KTO, compiled", True)


def epoch(bench: Bench, n: int) -> tuple[float, float]:
    """Runs one epoch of KTO on n examples -> (seconds of the reference pass, of the steps)."""
    s, rows = bench.sizes, random_rows(bench.sizes, n)
    model = random_model(bench, raw_config(*s.shape), torch.float32)
    steps = plan_steps(n, s.batch_size, 1, None, smallest=2)
    seconds, log = train_kto_steps(bench, model, rows, steps, batch_size=s.batch_size)
    return seconds, sum(r["tokens"] / r["tokens_per_second"] for r in log)


def headline(bench: Bench) -> None:
    """KTO on 14,000 examples, extrapolated from an epoch of a slice."""
    s = bench.sizes
    epoch(bench, s.batch_size)  # loads kernels
    scale = s.headline / s.slice
    reference_s, steps_s = (scale * seconds for seconds in epoch(bench, s.slice))
    note = f"extrapolated from {s.slice} examples; reference pass {reference_s / 60:.2f} min"
    bench.report(f"KTO, an epoch of {s.headline:,} examples", (reference_s + steps_s) / 60, "min", note)


def headline_in_full(bench: Bench) -> None:
    """Measures the whole epoch of headline(), if the estimate fits into the time that is left."""
    with open(bench.out, encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    needed = [60 * r["value"] for r in rows if r["part"] == "headline" and r.get("unit") == "min"]
    left = bench.deadline - time.time() - 15  # 15 s to start
    if not needed or needed[-1] * 1.1 > left:
        needs = f"{needed[-1]:.0f} s" if needed else "an unknown time"
        return bench.report("KTO, the epoch in full", "not run", note=f"it needs {needs}, and {left:.0f} s are left")
    reference_s, steps_s = epoch(bench, bench.sizes.headline)
    note = f"measured; reference pass {reference_s / 60:.2f} min"
    bench.report("KTO, the epoch in full", (reference_s + steps_s) / 60, "min", note)
