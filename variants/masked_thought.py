"""MFT, masked thought (arXiv 2403.02178): SFT whose input is a corrupted answer and whose target is the original.

    python -m variants.masked_thought --p-max 0.4 --ckpt base --data chats.jsonl --out masked

All flags of train_sft.py work. As in the authors' GSM8K runs, a corrupted token becomes a random one, so no mask token
is needed. The authors draw from all ids. This never draws a control token.
"""

import argparse
import random

from torch import Tensor

import train_sft
from core.distributed import run_distributed
from core.files import cli
from core.flags import number
from core.tokenizer import Tokenizer
from model import Qwen2
from train_sft import StepBatch, sft_loss
from training.logps import Example, supervised_logps


def mask_rate(step: int, total: int, p_max: float, f: float = 0.66) -> float:
    """The probability that a token is corrupted in step 0 .. total - 1.

    p = min(p_max, p_max step / (f total + 1))        f: the share of the run in which p rises from 0
    """
    return min(p_max, p_max * step / (f * total + 1))


def corrupt(example: Example, p: float, ordinary: list[int], seed: str) -> list[int]:
    """The ids of an example, each supervised one replaced with probability p by one of the ordinary ids."""
    g, (ids, supervised) = random.Random(seed), example
    return [g.choice(ordinary) if s and g.random() < p else token for token, s in zip(ids, supervised)]


def ordinary_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of the vocabulary without control tokens, in order."""
    backend = tokenizer.backend
    return sorted(set(backend.get_vocab().values()) - set(backend.get_added_tokens_decoder()))


def micro_loss(model: Qwen2, batch: StepBatch, micro: list[int], args: argparse.Namespace) -> Tensor:
    """The loss of a micro-batch. An example's corruption depends only on --seed, the step and the example."""
    ordinary = batch.prepared
    p = mask_rate(batch.step, batch.n_steps, args.p_max, args.rise)
    examples = [batch.examples[i] for i in micro]
    inputs = [corrupt(batch.examples[i], p, ordinary, f"{args.seed} {batch.step} {batch.indices[i]}") for i in micro]
    logps, _ = supervised_logps(model, examples, inputs)  # the targets are the originals
    return sft_loss(logps, batch.n_supervised)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.set_defaults(out="masked.pt", method="masked thought (arXiv 2403.02178)")
    parser.add_argument(
        "--p-max", type=number(0, below=1), default=0.4, help="highest probability that a token is corrupted"
    )
    parser.add_argument(
        "--rise", type=number(0), default=0.66, help="share of the steps in which this probability rises from 0"
    )


def main() -> None:
    args = train_sft.parse_args(add_flags=add_flags)
    find_ordinary = lambda setup: ordinary_ids(setup.tokenizer)
    train_sft.main(args, prepare=find_ordinary, loss=lambda *step: micro_loss(*step, args))


if __name__ == "__main__":
    cli(run_distributed(main))
