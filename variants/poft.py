"""PoFT, preference-oriented SFT (arXiv 2412.12865): trains a policy to find an answer likelier than aligned models do.

    python -m variants.poft --others aligned-1 aligned-2 --ckpt base --data chats.jsonl --out poft

All flags of train_sft.py work. The other models must share the tokenizer of --ckpt. Their log-likelihoods are computed
once, before the first step, and kept in a file. The authors' code averages the policy over the prompt too. This follows
the paper, which averages over the answer only.
"""

import argparse
from dataclasses import replace
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

import train_sft
from core.devices import to_device
from core.distributed import run_distributed
from core.files import cli
from model import Qwen2
from training.examples import count_supervised
from training.flags import check_cache_path
from training.logps import example_logps
from training.reference import open_reference, reference_logps
from training.setup import Setup


def poft_loss(policy_means: Tensor, other_means: Tensor) -> Tensor:
    """PoFT's loss of each example (Sec. 3) -> (n,).

        loss = -log sigmoid(r_theta - r)      r_theta = (1/T) log pi(y | x)      r = (1/M) sum_j (1/T) log p_j(y | x)

    policy_means: (n,) r_theta, the mean log-probability of the T answer tokens, in nats. other_means: (n,) r, the same
    averaged over the M other models; constant.
    """
    return -F.logsigmoid(policy_means - other_means.detach())


def micro_loss(model: Qwen2, batch: train_sft.StepBatch, micro: list[int]) -> Tensor:
    """This micro-batch's share of the step's mean loss over examples. batch.prepared: mean_logps of all examples."""
    examples = [batch.examples[i] for i in micro]
    tokens = torch.tensor([float(count_supervised([example])) for example in examples])
    others = torch.tensor([batch.prepared[batch.indices[i]] for i in micro])
    policy_means = example_logps(model, examples) / to_device(tokens, model.device)  # (len(micro),)
    return poft_loss(policy_means, to_device(others, model.device)).sum() / len(batch.examples)


def mean_logps(setup: Setup) -> list[float]:
    """For each example the mean log-probability of its supervised tokens, averaged over the other models, in nats."""
    args, fingerprint = vars(setup.args), setup.ckpt.fingerprint()
    as_ref = lambda other: replace(setup, args=argparse.Namespace(**args | {"ref": other}))
    references = [open_reference(as_ref(other), fingerprint) for other in setup.args.others]  # checks all of them first
    setup.args.other_fingerprints = [reference.fingerprint for reference in references]  # for --resume
    keys = [(i, 0) for i in range(len(setup.examples))]
    found = [reference_logps(reference, keys, lambda i, _: setup.examples[i])[0] for reference in references]
    return [fmean(logps[key] for logps in found) / count_supervised([setup.examples[key[0]]]) for key in keys]


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.set_defaults(out="poft.pt", method="PoFT (arXiv 2412.12865)", epochs=1)
    parser.add_argument("--others", nargs="+", required=True, help="checkpoints of the aligned models")
    parser.add_argument("--ref-cache", help="file of their log-probabilities (default: beside OUT)")


def main() -> None:
    args = train_sft.parse_args(add_flags=add_flags)
    check_cache_path(args)
    train_sft.main(args, prepare=mean_logps, loss=micro_loss)


if __name__ == "__main__":
    cli(run_distributed(main))
