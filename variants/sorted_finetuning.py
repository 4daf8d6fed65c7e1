"""SoFT, sorted fine-tuning (arXiv 2309.08968): trains the first k blocks as models too, for several k at once.

    python -m variants.sorted_finetuning --exits 12 18 --export 12 --ckpt base --data chats.jsonl --out sorted

All flags of train_sft.py work except --shard. The whole model is always an exit. --export K writes the first K blocks
as a checkpoint of their own, here sorted-12. The paper's exits for 40 blocks are 12, 16, ... 40. It gives no others.
The default here is every fourth block from the last down to 30 % of the depth, so it agrees for 40.
"""

import argparse
import os

from torch import Tensor

import train_sft
from core.checkpoint import Checkpoint
from core.distributed import is_main, run_distributed
from core.files import InputError, cli
from core.flags import at_least, checkpoint_out
from core.head import token_logps
from model import Qwen2
from train_sft import StepBatch, sft_loss
from training.logps import pack_to_device
from training.setup import Setup


def sorted_loss(exit_logps: list[Tensor], n_supervised: int) -> Tensor:
    """SoFT's loss of a micro-batch, a scalar in nats; the micro-batches' losses add up to the step's.

        L = (1/|B|) sum_{k in B} L_k        L_k = -(1/n) sum_t log p_k(x_t | s_t)        (Eq. 1)

    exit_logps: for each depth k of B the (N,) log-probabilities after k blocks, the last norm and the head.
    n_supervised: n, supervised tokens of the step.
    """
    return sum(sft_loss(logps, n_supervised) for logps in exit_logps) / len(exit_logps)


def logps_at_exits(model: Qwen2, examples: list, exits: list[int]) -> list[Tensor]:
    """The log-probabilities (N,) of the supervised tokens after each of these numbers of blocks, and after all."""
    ids, lengths, at, targets, _ = pack_to_device(examples, model.device)
    states, blocks = [], model.model["layers"]
    keep = lambda block, inputs, x: states.append(x.index_select(1, at))  # (1, N, C); a hook that returns None
    hooks = [blocks[k - 1].register_forward_hook(keep) for k in exits]
    whole = model(ids, lengths, at, targets)
    for hook in hooks:
        hook.remove()
    return [token_logps(model.model["norm"](x)[0], model.head_weight, targets) for x in states] + [whole]


def default_exits(n_blocks: int) -> list[int]:
    """Every fourth block from the last down to 30 % of the depth, without the last: 8, 12, 16, 20 of 24."""
    return [k for k in range(n_blocks, 3 * n_blocks // 10 - 1, -4) if 0 < k < n_blocks][::-1]


def exit_out(out: str, depth: int) -> str:
    """sorted -> sorted-12, sorted.pt -> sorted-12.pt."""
    stem, suffix = os.path.splitext(out) if out.endswith(".pt") else (out, "")
    return f"{stem}-{depth}{suffix}"


def export_exit(source: str, depth: int, out: str) -> None:
    """Writes the first `depth` blocks of a checkpoint with its embedding, last norm and head as another checkpoint."""
    ckpt, model = Checkpoint(source), Qwen2.from_pretrained(source)
    model.model["layers"] = model.model["layers"][:depth]
    model.raw_config = {**ckpt.config, "num_hidden_layers": depth}
    if "layer_types" in ckpt.config:
        model.raw_config["layer_types"] = ckpt.config["layer_types"][:depth]
    model.save(out, ckpt.files)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.set_defaults(out="sorted.pt", method="SoFT (arXiv 2309.08968)")
    exits = "numbers of blocks to train as models too (default: every fourth, down to 30 % of the depth)"
    parser.add_argument("--exits", type=at_least(1), nargs="+", help=exits)
    parser.add_argument("--export", type=at_least(1), nargs="+", default=[], help="exits to write as OUT-K too")


def main() -> None:
    args = train_sft.parse_args(add_flags=add_flags, no_shard="the states of a sharded model exist only inside forward")
    finished = []  # not empty after the last step
    exported = {k: checkpoint_out(exit_out(args.out, k)) for k in args.export}

    def prepare(setup: Setup) -> None:
        n = setup.model.config.num_hidden_layers
        args.exits = default_exits(n) if args.exits is None else sorted(set(args.exits) - {n})
        if max(args.exits, default=0) > n:
            raise InputError(f"--exits {max(args.exits)}: the model has only {n} blocks")
        for k in args.export:
            if k not in (exits := [*args.exits, n]):
                raise InputError(f"--export {k}: not an exit; the exits are {', '.join(map(str, exits))}")

    def loss(model: Qwen2, batch: StepBatch, micro: list[int]) -> Tensor:
        examples = [batch.examples[i] for i in micro]
        return sorted_loss(logps_at_exits(model, examples, args.exits), batch.n_supervised)

    train_sft.main(args, prepare=prepare, loss=loss, before_save=finished.append)
    for k, out in exported.items() if is_main() and finished else ():
        export_exit(args.out, k, out)
        print(f"wrote {out}, the first {k} blocks")


if __name__ == "__main__":
    cli(run_distributed(main))
