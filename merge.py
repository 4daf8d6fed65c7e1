"""Weight fusion: one checkpoint out of several, tensor by tensor from disk to disk, in fp32 or fp64, rounded once.

    python merge.py --method linear --models sft.pt:0.05 kto.pt:0.95 --out fused
    python merge.py --method ties --base base --models sft kto --density 0.2 --out fused.pt
    python merge.py search --help                                # weights that do best on held-out data

Without --base, config and tokenizer are the first model's, else the base's. The numbers are those of mergekit 0.1.5;
`--method ties --trim global` is TIES as its authors' own code defines it, `--rescale density` DARE and DELLA as their
papers do.
"""

import json
import math
import sys
import time

import torch

from core.checkpoint import write_checkpoint
from core.files import InputError, cli
from core.flags import Parser, checkpoint_out
from merging import search
from merging.engine import merged
from merging.inputs import NEEDS_BASE, OPTIONS, SPARSE, add_method_flags, open_inputs, parse_size


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["search"]:
        return search.main(argv[1:])
    parser = Parser(description="Fuse checkpoints of one architecture into one. `merge.py search` finds "
                                     "the weights.")  # fmt: skip
    add_method_flags(parser)
    # output
    parser.add_argument(
        "--out",
        type=checkpoint_out,
        required=True,
        metavar="O",
        help="directory to write, or a .pt file (held in memory)",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="of the weights written")  # fmt: skip
    parser.add_argument("--shard-size", type=parse_size, metavar="SIZE", help="largest safetensors file, such as 5GB; "
        "several and an index are written where one does not do (default: one file)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.shard_size and args.out.endswith(".pt"):
        raise InputError(f"--shard-size: {args.out} is one file; give a directory as --out")

    start = time.time()
    base, models = open_inputs(args)
    donor, dtype = base or models[0], getattr(torch, args.dtype)
    found = {"differs": 0, "lost": 0, "digests": {}}
    told = lambda: json.dumps(write_manifest(args, base, models, found["digests"]), indent=2, ensure_ascii=False) + "\n"
    kept = {name: donor.dtype(name) for name in donor.names}
    specs = {name: (donor.shape(name), dtype if t.is_floating_point else t) for name, t in kept.items()}
    tensors = merged(args, base, models, dtype, found)
    size = sum(math.prod(shape) * t.itemsize for shape, t in specs.values())
    write_checkpoint(args.out, donor.config, donor.files | {"merge.json": told}, specs, tensors, args.shard_size)

    if found["lost"] > 0.01 * found["differs"]:
        share = found["lost"] / found["differs"]
        print(f"warning: {share:.1%} of the elements that differ from {donor.source} in float32 equal it in {args.dtype}: "
              "that part of the merge is lost; use --dtype float32", file=sys.stderr)  # fmt: skip
    n = sum(math.prod(shape) for shape, _ in specs.values())
    print(f"{args.method} of " + ", ".join(f"{m.source}:{w:g}" for m, w in zip(models, args.weights))
          + (f" on {args.base}" if args.method in NEEDS_BASE else ""))  # fmt: skip
    print(f"wrote {args.out}: {len(specs)} tensors, {n / 1e6:.1f} M parameters, {args.dtype}, {size / 1e6:.1f} MB in "
          f"{time.time() - start:.1f} s")  # fmt: skip
    name = args.out.removesuffix(".pt")
    print(f"next:  python eval.py --ckpt {args.out} --tasks gsm8k mmlu --out {name}.eval")


def write_manifest(args, base, models, digests):
    """What merge.json says: the options that the method has, the models with what is their own, and fingerprints.
    digests: merged()'s."""
    options = {k: getattr(args, k) for k, (methods, _) in OPTIONS.items() if args.method in methods and k != "density"}
    inputs = [*models, base] if base else models
    sums = [c.fingerprint({name: d[i] for name, d in digests.items()}) for i, c in enumerate(inputs)]
    own = [{"source": m.source, "sha256": s, "weight": w} for m, s, w in zip(models, sums, args.weights)]
    if args.method in SPARSE:
        own = [x | {"density": d} for x, d in zip(own, args.densities)]
    return {
        "method": args.method, **options, "weights_for": args.weights_for, "seed": args.seed, "arithmetic": args.arithmetic,
        "dtype": args.dtype, "resize": args.resize, "models": own,
        "base": {"source": base.source, "sha256": sums[-1]} if base else None,
    }  # fmt: skip


if __name__ == "__main__":
    cli(main)
