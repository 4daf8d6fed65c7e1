"""KTO's data: encoding, the plan of all steps and pairs, label weights, and metrics for the log."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from core.files import InputError, print0
from core.tokenizer import Tokenizer
from training.examples import Cuts
from training.pairing import count_prompt_clashes, epoch_order
from training.setup import Setup, plan_steps


class FeedbackRow(NamedTuple):
    """One example of KTO, as token ids."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    label: bool  # True: desirable


def encode_feedback(records: list, tokenizer: Tokenizer, max_len: int) -> tuple[list[FeedbackRow], list[str], Cuts]:
    """Encodes records [("file:line", (prompt messages, completion, label))] -> (rows, their "file:line", Cuts).

    A row whose prompt has max_len tokens or more is dropped, because no completion token would be left. Rows are not
    cut here; Cuts counts what pair_sequence will cut.
    """
    rows, places, cuts = [], [], Cuts()
    for where, (messages, completion, label) in records:
        row = FeedbackRow(tuple(tokenizer.prompt_ids(messages)), tuple(tokenizer.completion_ids(completion)), label)
        if len(row.prompt) < max_len:
            rows.append(row)
            places.append(where)
            length = len(row.prompt) + len(row.completion)
            cuts.add(length, length - 2, max_len)  # <|im_end|> comes before the last token, a newline
    if len(rows) < 2:
        files = ", ".join(dict.fromkeys(where.rsplit(":", 1)[0] for where, _ in records))
        raise InputError(
            f"{files}: {len(rows)} examples have a prompt shorter than --max-len {max_len}; KTO needs at least 2, "
            "because a KL pair takes two"
        )
    return rows, places, cuts


def pair_sequence(rows: list[FeedbackRow], max_len: int, i: int, j: int) -> tuple[list[int], list[bool]]:
    """The prompt of row i with the completion of row j, cut to max_len tokens -> (ids, supervised)."""
    ids, start = [*rows[i].prompt, *rows[j].completion][:max_len], len(rows[i].prompt)
    return ids, [False] * start + [True] * (len(ids) - start)


@dataclass
class Feedback:
    """Encoded data, and the steps of the whole run. Held-out data are one large step."""

    rows: list[FeedbackRow]
    places: list[str]  # "file:line" of each row
    cuts: Cuts
    steps: list[list[int]]  # the rows of each step
    max_len: int
    ref: dict = field(default_factory=dict)  # {(i, j): reference log-probability in nats}, known before the first step

    def sequence(self, i: int, j: int) -> tuple[list[int], list[bool]]:
        """Prompt i with completion j -> (ids, supervised)."""
        return pair_sequence(self.rows, self.max_len, i, j)

    def pair_name(self, i: int, j: int) -> str:
        """Where prompt i is, and completion j if it belongs to another row."""
        return self.places[i] if i == j else f"{self.places[i]} with the completion of {self.places[j]}"


def plan_feedback(
    records: list, files: list[str], setup: Setup, kl_pairs: Callable, held_out: bool = False
) -> Feedback:
    """Encodes records and draws all steps, which determine all KL pairs. kl_pairs(indices): the KL pairs of a step."""
    args = setup.args
    rows, places, cuts = encode_feedback(records, setup.tokenizer, args.max_len)
    prompts = [row.prompt for row in rows]
    sizes = (len(rows), 1, None) if held_out else (args.batch_size, args.epochs, args.max_steps)
    order = None if args.no_shuffle else epoch_order(prompts, args.seed)
    steps = plan_steps(len(rows), *sizes, smallest=2, order=order)
    clashes = count_prompt_clashes((pair for step in steps for pair in kl_pairs(step)), prompts)
    if clashes:
        advice = "; leave --no-shuffle out" * args.no_shuffle
        print0(f"warning: {', '.join(files)}: {clashes} KL pairs share their prompt, so they match{advice}")
    return Feedback(rows, places, cuts, steps, args.max_len)


# ---------------------------------------------------------------------------------------------------------------------
# The weights of the two labels, Eq. 8


def label_weights(args: argparse.Namespace, n_desirable: int, n_undesirable: int) -> tuple[float, float]:
    """The label weights (w_D, w_U) of --desirable-weight and --undesirable-weight."""
    w_u = args.undesirable_weight
    auto = args.desirable_weight == "auto"
    return balanced_weight(n_desirable, n_undesirable, w_u) if auto else args.desirable_weight, w_u


def balanced_weight(n_desirable: int, n_undesirable: int, undesirable_weight: float) -> float:
    """The w_D for which w_D n_D / (w_U n_U) = 1, the lower end of the range [1, 4/3] that Eq. 8 recommends."""
    return undesirable_weight * n_undesirable / n_desirable if n_desirable and n_undesirable else 1.0


def weight_advice(n_desirable: int, n_undesirable: int, w_d: float, w_u: float) -> list[str]:
    """Warnings if the weights are outside the range that Eq. 8 recommends."""
    if not n_desirable or not n_undesirable:
        return [f"all {n_desirable + n_undesirable} labels are {str(n_desirable > 0).lower()}; KTO needs both"]
    if not w_d or not w_u:  # a weight of 0 leaves a label out on purpose
        return []
    if 1 - 1e-9 <= w_d * n_desirable / (w_u * n_undesirable) <= 4 / 3 + 1e-9:
        return []
    low, high = balanced_weight(n_desirable, n_undesirable, w_u), w_d * n_desirable / n_undesirable
    return [
        f"{n_desirable} desirable and {n_undesirable} undesirable examples: recommended "
        f"--desirable-weight {low:.3g} to {low * 4 / 3:.3g} (auto takes {low:.3g}), "
        f"or else --undesirable-weight {high * 3 / 4:.3g} to {high:.3g}"
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The log


def kto_metrics(losses: Tensor, rewards: Tensor, logps: Tensor, desirable: Tensor, kl: Tensor) -> dict:
    """The log's metrics for a batch: means over the examples of each label; None for a label without examples.

    losses, rewards, logps, desirable: (n,). kl: scalar. All on the CPU.
    """

    def mean(x, which):
        return x[which].mean().item() if which.any() else None

    chosen, rejected = mean(rewards, desirable), mean(rewards, ~desirable)
    return {
        "loss": losses.mean().item(),
        "kl": kl.item(),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": None if chosen is None or rejected is None else chosen - rejected,
        "logps/chosen": mean(logps, desirable),
        "logps/rejected": mean(logps, ~desirable),
    }
