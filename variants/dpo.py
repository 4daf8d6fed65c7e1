"""DPO, direct preference optimisation (arXiv 2305.18290), with the label smoothing of conservative DPO.

    python -m variants.dpo --ckpt sft.pt --data pairs.jsonl      # -> sft-dpo.pt

Data: {"prompt", "chosen", "rejected"} lines. The flags are those of train_kto.py without its label weights.
"""

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.attention import to_device
from core.conversations import dialogues
from core.distributed import is_main, run_distributed
from core.files import InputError, cli
from core.flags import Parser, checkpoint_out, number
from core.records import Fields, read_records
from training.flags import add_training_flags, check_default_inputs, kto_out
from training.logps import example_logps
from training.reference import check_cache_path, open_reference, reference_logps
from training.run import end_step, eval_due, eval_logps, finish_run, progress, run_identity, start_run, stop_run
from training.saves import Run
from training.setup import (
    Setup,
    open_checkpoint,
    plan_steps,
    prepare_blocks,
    schedule_advice,
    setup_ranks,
    shuffled_order,
)
from training.step import lr_at, micro_batches, optimizer_step, record_skip, seed_step


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """DPO's loss of each pair and the implicit rewards of both replies. -> (losses (n,), rewards (n, 2)).

        r = beta (log pi(y | x) - log ref(y | x))        d = r_chosen - r_rejected
        loss = -(1 - eps) log sigmoid(d) - eps log sigmoid(-d)        eps = label_smoothing

    All inputs: (n,) log-probabilities of the replies, summed over their tokens, in nats. beta: per nat.
    eps is the probability that a pair has the wrong order; 0 is DPO (Eq. 7).
    """
    rewards = beta * torch.stack((policy_chosen - ref_chosen, policy_rejected - ref_rejected), dim=1)  # (n, 2)
    d = rewards[:, 0] - rewards[:, 1]
    return -(1 - label_smoothing) * F.logsigmoid(d) - label_smoothing * F.logsigmoid(-d), rewards.detach()


# ---------------------------------------------------------------------------------------------------------------------
# Data


@dataclass
class Pairs:
    rows: list  # (prompt ids, chosen ids, rejected ids)
    places: list[str]  # "file:line" of each row
    max_len: int
    ref: dict  # {(i, side): the reference's log-probability in nats}; side 1: chosen, side 2: rejected

    def sequence(self, i: int, side: int) -> tuple[list[int], list[bool]]:
        """The prompt of row i with one of its replies, cut to max_len tokens: (ids, supervised)."""
        prompt, reply = self.rows[i][0], self.rows[i][side]
        return [*prompt, *reply][: self.max_len], ([False] * len(prompt) + [True] * len(reply))[: self.max_len]

    def length(self, i: int) -> int:
        """Tokens of both sequences of row i."""
        return sum(len(self.sequence(i, side)[0]) for side in (1, 2))


def preference_pairs(record: Fields, where: str) -> list[tuple[list[dict], str, str]]:
    """A record -> [(prompt messages, chosen reply, rejected reply)]."""
    found = []
    for prompt, reply, rejected, _ in dialogues(record, where):
        if not prompt or reply is None or not rejected:
            raise InputError(f"{where}: is no pair; DPO needs prompt, chosen and rejected")
        if len(rejected) != 1 or rejected[0]["role"] != "assistant":
            raise InputError(f"{where}: chosen and rejected differ before their last message; give them one prompt")
        found.append((prompt, reply["content"], rejected[0]["content"]))
    return found


def read_pairs(files: list[str], setup: Setup) -> Pairs:
    """Reads and encodes pairs. Drops those whose prompt leaves no room for a reply within --max-len."""
    tokenizer, max_len = setup.tokenizer, setup.args.max_len
    data = Pairs([], [], max_len, {})
    for where, (messages, *replies) in read_records(files, preference_pairs):
        prompt = tokenizer.prompt_ids(messages)
        if len(prompt) < max_len:
            data.rows.append((prompt, *map(tokenizer.completion_ids, replies)))
            data.places.append(where)
    if not data.rows:
        raise InputError(f"{', '.join(files)}: every prompt fills --max-len {max_len}; raise it")
    return data


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(run: Run, steps: list, data: Pairs, held_out: Pairs | None, loss: Callable) -> bool:
    """Makes all remaining steps. -> True; False if SIGTERM or Ctrl-C stopped the run, which is then saved.

    A pair is never divided between micro-batches. loss: dpo_loss with its last two arguments given.
    """
    model, args, device = run.model, run.args, run.ranks.device
    if run.pending and not end_step(run, with_eval(run, run.pending, held_out, loss)):
        return False
    for step in (bar := progress(run, "dpo")):
        start = time.time()
        seed_step(run, step)
        indices = steps[step]
        lengths = [data.length(i) for i in indices]
        step_stats = torch.zeros(5, len(indices), device=device)  # losses, rewards (2), log-probabilities (2)
        for micro in micro_batches(run, lengths):
            both = [(indices[k], side) for k in micro for side in (1, 2)]
            logps = example_logps(model, [data.sequence(*pair) for pair in both]).view(len(micro), 2)
            ref = to_device(torch.tensor([data.ref[pair] for pair in both]), device).view(len(micro), 2)
            losses, rewards = loss(*logps.T, *ref.T)
            (losses.sum() / len(indices)).backward()
            index = to_device(torch.tensor(micro, dtype=torch.long), device)
            step_stats[:, index] = torch.cat((losses.detach()[None], rewards.T, logps.detach().T))
        lr = lr_at(step, run.total, args.lr, args.warmup, args.schedule)
        result = optimizer_step(run, lr, step_stats)
        if result.status == "stop":
            stop_run(run, step)
            return False

        record = {"step": step + 1, "lr": lr, "grad_norm": result.grad_norm} | dpo_metrics(result.stats)
        record |= {"tokens": sum(lengths), "tokens_per_second": sum(lengths) / (time.time() - start)}
        if result.status == "skip":
            both = [(i, side) for i in indices for side in (1, 2)]
            examples, places = [data.sequence(*pair) for pair in both], [data.places[i] for i, _ in both]
            record |= record_skip(run, step + 1, examples, places)
        if not end_step(run, with_eval(run, record, held_out, loss)):
            return False
        bar.set_postfix(loss=f"{record['loss']:.4f}")
    return True


def dpo_metrics(stats: Tensor) -> dict:
    """The log's numbers from (5, n): losses, rewards and log-probabilities of chosen and rejected."""
    loss, chosen, rejected, logps_chosen, logps_rejected = stats.mean(1).tolist()
    out = {"loss": loss, "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
    out["rewards/accuracies"] = (stats[1] > stats[2]).float().mean().item()
    return out | {"logps/chosen": logps_chosen, "logps/rejected": logps_rejected}


def with_eval(run: Run, record: dict, held_out: Pairs | None, loss: Callable) -> dict | None:
    """The log record of a step, with the held-out metrics where they are due. None if stopped meanwhile."""
    if not held_out or not eval_due(run, record):
        return record
    logps = eval_logps(run, record, [held_out.sequence(*pair) for pair in held_out.ref])
    if logps is None:
        return None
    logps, ref = logps.cpu().view(-1, 2), torch.tensor(list(held_out.ref.values())).view(-1, 2)
    losses, rewards = loss(*logps.T, *ref.T)
    stats = torch.cat((losses[None], rewards.T, logps.T))
    return record | {f"eval_{k}": v for k, v in dpo_metrics(stats).items()}


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = Parser(description=__doc__.split("\n\n")[0])
    add_training_flags(p, "sft.pt", "data/pairs.jsonl", None, epochs=1, batch_size=64, lr=1e-6)  # lr, beta: TRL's
    # DPO
    p.add_argument("--ref", help="reference checkpoint; without it, the model before training")
    p.add_argument("--beta", type=number(above=0), default=0.1, help="strength of the pull to the reference, per nat")
    smoothing = "probability that a pair is in the wrong order"
    p.add_argument("--label-smoothing", type=number(0, below=0.5), default=0.0, help=smoothing)
    p.add_argument("--ref-cache", help="file of reference log-probabilities (default: beside OUT)")
    args = p.parse_args(argv)
    args.out = args.out or checkpoint_out(kto_out(args.ckpt, "dpo"))
    check_default_inputs(args)
    check_cache_path(args)
    return args


def main() -> None:
    args = parse_args()
    ranks = setup_ranks(args)
    model, tokenizer, ckpt = open_checkpoint(args.ckpt, args, ranks)
    setup = Setup(args, ranks, model, tokenizer, ckpt, [])
    data, held_out = read_pairs(args.data, setup), args.eval_data and read_pairs(args.eval_data, setup)
    n, places = len(data.rows), data.places
    order = None if args.no_shuffle else shuffled_order(n, args.seed)
    steps = plan_steps(n, args.batch_size, args.epochs, args.max_steps, order=order)
    setup.examples, setup.places, setup.steps = data.rows, places, steps
    for text in schedule_advice(args, steps) if is_main() else []:
        print(f"warning: {text}")

    reference = open_reference(setup, ckpt.fingerprint())
    for pairs in (data, held_out) if held_out else (data,):
        both = [(i, side) for i in range(len(pairs.rows)) for side in (1, 2)]
        pairs.ref, _ = reference_logps(reference, both, pairs.sequence, args.micro_tokens, ranks)
    identity = run_identity(args, data.rows, ckpt.fingerprint()) | {"the reference": reference.fingerprint}
    prepare_blocks(model, args, ([data.length(i) for i in step] for step in steps), ranks)
    run = start_run(setup, identity)
    loss = functools.partial(dpo_loss, beta=args.beta, label_smoothing=args.label_smoothing)
    if run is None or not train(run, steps, data, held_out, loss):
        return
    finish_run(run, [f"{n} pairs"], [["python", "eval.py", "--ckpt", args.ckpt, args.out, "--tasks", "gsm8k"]])


if __name__ == "__main__":
    cli(run_distributed(main))
