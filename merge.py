"""Weight fusion: merges checkpoints of one architecture into one, tensor by tensor, from disk to disk.

    python merge.py --method linear --models sft.pt:0.05 sft-kto.pt:0.95 --out fused
    python merge.py --method ties --base base --models sft.pt kto.pt --density 0.2 --out fused.pt
    python merge.py search --help                                # find the weights that do best on held-out data

Linear and TIES are below; the other methods are in merging/methods.py. The defaults give the results of mergekit 0.1.5.
`--trim global` gives TIES as in its authors' code, `--rescale density` gives DARE and DELLA as in their papers.
Arithmetic is in float32 or float64, and the result is rounded once. Config and tokenizer come from --base if it is
given, else from the first model.
"""

import core.interrupt  # noqa: F401  isort: skip (first: Ctrl-C while torch loads ends silently)
from core.files import check_arguments, cli, print_next
from merging.flags import NEEDS_BASE, OPTIONS, SPARSE, parse_args

if __name__ == "__main__":
    check_arguments(parse_args)  # before torch is loaded, so that --help and wrong flags are answered at once

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from core.card import model_card
from core.checkpoint import Checkpoint, write_checkpoint
from core.devices import choose_device
from merging import engine, methods
from merging.inputs import open_inputs, output_files

# ---------------------------------------------------------------------------------------------------------------------
# The maths. n models, m elements of a tensor. A delta is a model's tensor minus the base's.
# TIES (arXiv 2306.01708): 1. trim each delta to its largest elements, 2. elect a sign for each element, 3. average the
# deltas that agree with it. The result is base + lambda * that average.


def linear(tensors: Sequence[Tensor], weights: Tensor, normalize: bool = True) -> Tensor:
    """Weighted mean: sum_i w_i x_i / sum_i w_i; the plain sum without normalize (arXiv 2203.05482).

    tensors: n of one shape. weights: (n,). Returns that shape.
    """
    total = torch.zeros_like(tensors[0])
    for x, w in zip(tensors, weights):
        total.add_(x, alpha=float(w))  # one rounding; total += w * x has two
    return total.div_(weights.sum()) if normalize else total


def trim_tensor(magnitudes: Tensor, density: float) -> Tensor:
    """TIES step 1 as in mergekit: keep exactly max(1, int(density m)) elements of each tensor, the largest.

    magnitudes: |delta|, m elements. Returns a mask of that shape. Of equal elements, the first are kept.
    """
    k = max(1, int(density * magnitudes.numel()))
    return methods.largest(magnitudes.view(-1), k).view(magnitudes.shape)


def trim_rank(size: int, density: float) -> int | None:
    """TIES step 1 as in the authors' code: the rank of the threshold among all |delta| of the model, from the largest.

    size: d, the number of elements of the model. density: K. The threshold is the (d - int(d K))-th smallest value, so
    its rank is int(d K) + 1. Elements equal to the threshold are kept too. None: everything is kept.
    """
    kept = int(size * density)
    return kept + 1 if kept < size else None


def elect_sign(deltas: Tensor, sign: str = "sum", zero_sign: int = 1) -> Tensor:
    """TIES step 2, gamma = sgn(sum_i delta_i): one sign for each element, (n, m) -> (m,).

    sign: "sum" adds up the deltas, "count" adds up their signs. zero_sign: the result where the votes cancel.
    """
    votes = (deltas if sign == "sum" else deltas.sign()).sum(0).sign_()
    return votes.add_(0.5 * zero_sign).sign_()


def disjoint_merge(deltas: Tensor, weights: Tensor, elected: Tensor, normalize: bool = True) -> Tensor:
    """TIES step 3: the weighted mean of the deltas that have the elected sign; their sum without normalize.

    deltas: w_i delta_i, (n, m). weights: w, (n,). elected: +1 or -1, (m,). Returns (m,).
    """
    agree = (deltas * elected).clamp_(min=0)  # |delta| where the signs agree, else 0; faster than masks
    total = agree.sum(0).mul_(elected)
    if normalize:
        share = agree.sign_().mul_(weights[:, None]).sum(0)
        # with positive weights, share = 0 implies total = 0, so any tiny divisor works; with mixed signs it may not
        total /= share.add_(1e-37) if (weights > 0).all() else torch.where(share == 0, 1.0, share)
    return total


def ties(deltas: Tensor, weights: Tensor, normalize: bool = True, sign: str = "sum", zero_sign: int = 1) -> Tensor:
    """TIES steps 2 and 3 on trimmed deltas (arXiv 2306.01708, Algorithm 1). (n, m), (n,) -> (m,)."""
    deltas = deltas * weights[:, None]
    return disjoint_merge(deltas, weights, elect_sign(deltas, sign, zero_sign), normalize)


def trim_global(plan: engine.Plan) -> None:
    """Computes what --trim global needs from the whole model: each model's threshold and the sign where votes cancel.

    That sign is the majority of all elected signs. On a tie it is negative, as in the authors' code.
    """
    size = sum(math.prod(plan.reference.shape(name)) for name in plan.reference.names)
    ks = [trim_rank(size, density) for density in plan.args.densities]
    values = methods.kth_largest(engine.scan_magnitudes(plan), [k or 1 for k in ks], size)
    plan.thresholds = [0.0 if k is None else value for k, value in zip(ks, values)]  # None: keep everything
    thresholds = torch.tensor(plan.thresholds, dtype=plan.arithmetic)[:, None]  # (n, 1)

    def sum_of_signs(name: str) -> int:
        tensor, weights, total = engine.read_tensor(plan, name), plan.weights(name)[:, None], 0
        for part in tensor.chunks():
            deltas = tensor.deltas(part, plan.arithmetic)  # (n, size of part)
            deltas *= (deltas.abs() >= thresholds) * weights  # trims and weights
            total += int(elect_sign(deltas, plan.args.sign, zero_sign=0).sum(dtype=torch.float64))
        return total

    majority = sum(total for _, total in engine.each_tensor(plan, sum_of_signs, "majority sign"))
    plan.zero_sign = 1 if majority > 0 else -1


# --method: (sparsify: which elements of a delta to keep, combine: merges the models' tensors or deltas). The names are
# repeated in merging/flags.py, so that they are known before torch is loaded.
METHODS = {
    "linear": (None, linear),
    "slerp": (None, methods.slerp_weights),
    "task_arithmetic": (None, methods.task_arithmetic),
    "expo": (None, methods.task_arithmetic),
    "ties": (trim_tensor, ties),
    "dare_linear": (methods.dare, methods.task_arithmetic),
    "dare_ties": (methods.dare, ties),
    "breadcrumbs": (methods.breadcrumbs, methods.task_arithmetic),
    "breadcrumbs_ties": (methods.breadcrumbs, ties),
    "della_linear": (methods.magprune, methods.task_arithmetic),
    "della": (methods.magprune, ties),
}

# ---------------------------------------------------------------------------------------------------------------------
# The command


def merge_checkpoints(
    args: argparse.Namespace,
    base: Checkpoint | None,
    models: list[Checkpoint],
    dtype: torch.dtype,
    stats: engine.Stats | None = None,
    quiet: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor in dtype) for every tensor of the result. args, base, models: from open_inputs().

    stats: filled in as the tensors are consumed. quiet: no progress bar.
    """
    plan = engine.Plan(args, base, models, *METHODS[args.method], lines=args.lines)
    if args.method == "ties" and args.trim == "global":
        trim_global(plan)
    if plan.lines and plan.lines[0] is None:  # --lines auto
        alpha, beta = engine.lines_alpha(plan), plan.lines[1]
        plan.lines = (alpha, 1 - alpha if beta is None else beta)
    if stats:
        stats.lines = plan.lines
    yield from engine.merge_tensors(plan, dtype, stats, quiet)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.command == "search":
            from merging import search  # loads evaluation and training code, which a merge does not need

            choose_device(args)
            search.main(args, merge_checkpoints)
        else:
            write_merge(args)
    except KeyboardInterrupt:
        print(f"stopped: {args.out} is not written", file=sys.stderr)
        raise


def write_merge(args: argparse.Namespace) -> None:
    """merge.py without a command: merges, writes --out and prints a summary."""
    start = time.time()
    base, models = open_inputs(args)
    reference, dtype, stats = base or models[0], getattr(torch, args.dtype), engine.Stats()
    specs = {}  # name -> (shape, dtype) of the output
    for name in reference.names:
        stored = reference.dtype(name)
        specs[name] = (reference.shape(name), dtype if stored.is_floating_point else stored)
    # both are called after the last tensor is written, when the digests are known
    manifest = lambda: json.dumps(make_manifest(args, base, models, stats), indent=2, ensure_ascii=False) + "\n"
    card = lambda: merge_card(args, make_manifest(args, base, models, stats))
    files, tensors = output_files(reference, models), merge_checkpoints(args, base, models, dtype, stats)
    write_checkpoint(
        args.out, reference.config, files | {"merge.json": manifest}, specs, tensors, args.shard_size, card
    )

    if stats.lost > 0.01 * stats.changed:
        print(
            f"warning: rounding to {args.dtype} undoes the merge in {stats.lost / stats.changed:.1%} of the elements "
            f"that differ from {reference.source}; use --dtype float32",
            file=sys.stderr,
        )
    count = sum(math.prod(shape) for shape, _ in specs.values())
    size = sum(math.prod(shape) * t.itemsize for shape, t in specs.values())
    inputs = ", ".join(f"{model.source}:{w:g}" for model, w in zip(models, args.weights))
    print(f"{args.method} of {inputs}" + (f" on {args.base}" if args.method in NEEDS_BASE else ""))
    print(
        f"wrote {args.out}: {len(specs)} tensors, {count / 1e6:.1f} M parameters, {args.dtype}, {size / 1e6:.1f} MB in "
        f"{time.time() - start:.1f} s"
    )
    scores = args.out.removesuffix(".pt") + ".eval"
    print_next("python", "eval.py", "--ckpt", args.out, "--tasks", "gsm8k", "--out", scores)


def make_manifest(
    args: argparse.Namespace, base: Checkpoint | None, models: list[Checkpoint], stats: engine.Stats
) -> dict:
    """The content of merge.json: the method and its options, and each input's fingerprint, weight and density."""
    options = {}
    for name, (attribute, scope, _) in OPTIONS.items():
        if args.method in scope and name != "density":
            options[name] = stats.lines if name == "lines" else getattr(args, attribute)
    inputs = [*models, base] if base else models
    sums = [c.fingerprint({name: d[i] for name, d in stats.digests.items()}) for i, c in enumerate(inputs)]
    own = [{"source": c.source, "sha256": s, "weight": w} for c, s, w in zip(models, sums, args.weights)]
    if args.method in SPARSE:
        own = [entry | {"density": d} for entry, d in zip(own, args.densities)]
    return {
        "method": args.method,
        **options,
        "weights_for": args.weights_for,
        "seed": args.seed,
        "arithmetic": args.arithmetic,
        "dtype": args.dtype,
        "resize": args.resize,
        "models": own,
        "base": {"source": base.source, "sha256": sums[-1]} if base else None,
    }


def merge_card(args: argparse.Namespace, manifest: dict) -> str:
    """The model card of OUT: the merged models, their fingerprints, and the settings."""
    settings = {k: v for k, v in manifest.items() if k not in ("models", "base") and v not in (None, [])}
    inputs = [*manifest["models"], *([manifest["base"]] if manifest["base"] else [])]
    for x in manifest["models"]:
        settings[f"weight of {x['source']}"] = x["weight"]
    figures = {f"sha256 of {x['source']}": x["sha256"] for x in inputs}
    done = f"Merged by {args.method} in {args.arithmetic}, stored in {args.dtype}."
    name = os.path.basename(os.path.abspath(args.out))
    return model_card(name, done, [x["source"] for x in inputs], "merge", settings, figures=figures)


if __name__ == "__main__":
    cli(main)
