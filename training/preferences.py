"""Preference data: groups of replies to one prompt with rewards, and the setup of a run that learns from them."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.conversations import dialogues, one_reply
from core.files import InputError, print0
from core.records import Fields, is_number, read_records, shown
from training.logps import Example
from training.reference import open_reference, reference_logps
from training.run import Run, run_identity, start_run
from training.setup import (
    Setup,
    open_checkpoint,
    plan_steps,
    prepare_blocks,
    schedule_advice,
    setup_ranks,
    shuffled_order,
)


@dataclass
class Groups:
    """Encoded groups, the steps of the whole run, and the reference log-probabilities."""

    max_len: int
    rows: list = field(default_factory=list)  # (prompt ids, [reply ids, ...], [reward, ...])
    places: list[str] = field(default_factory=list)  # "file:line" of each row
    steps: list[list[int]] = field(default_factory=list)  # the rows of each step
    ref: dict = field(default_factory=dict)  # {(row, reply): reference log-probability in nats}

    def sequence(self, i: int, k: int) -> Example:
        """The prompt of row i with its reply k, cut to max_len tokens."""
        prompt, replies, _ = self.rows[i]
        ids = [*prompt, *replies[k]][: self.max_len]
        return ids, [False] * len(prompt) + [True] * (len(ids) - len(prompt))

    def keys(self, indices: list[int]) -> list[tuple[int, int]]:
        """(row, reply) for every reply of these rows, in order."""
        return [(i, k) for i in indices for k in range(len(self.rows[i][1]))]

    def sequences(self, indices: list[int]) -> list[Example]:
        return [self.sequence(*key) for key in self.keys(indices)]

    def length(self, i: int) -> int:
        """Tokens of all sequences of row i."""
        return sum(len(ids) for ids, _ in self.sequences([i]))


def scored_replies(completions: object, rewards: object, where: str) -> tuple[list[str], list[float]]:
    """The "completions" and "rewards" of a record, checked."""
    if not isinstance(completions, list) or len(completions) < 2:
        raise InputError(f"{where}: completions is {shown(completions)}; it is a list of at least two replies")
    if not isinstance(rewards, list) or not all(map(is_number, rewards)):
        raise InputError(f"{where}: rewards is {shown(rewards)}; it is a list of numbers")
    if len(rewards) != len(completions):
        raise InputError(f"{where}: {len(completions)} completions and {len(rewards)} rewards; give one for each")
    return [one_reply(reply, where)["content"] for reply in completions], [float(r) for r in rewards]


def preference_groups(record: Fields, where: str) -> list[tuple[list[dict], list[str], list[float]]]:
    """A record -> [(prompt messages, replies, rewards)]. chosen has reward 1, rejected 0."""
    completions, rewards, found = record.first("completions"), record.first("rewards"), []
    for prompt, reply, rejected, _ in dialogues(record, where):
        if not prompt or completions is None and (reply is None or not rejected):
            raise InputError(f"{where}: needs a prompt with chosen and rejected, or with completions and rewards")
        if completions is not None:
            found.append((prompt, *scored_replies(completions, rewards, where)))
        elif len(rejected) != 1 or rejected[0]["role"] != "assistant":
            raise InputError(f"{where}: chosen and rejected differ before their last message; give them one prompt")
        else:
            found.append((prompt, [reply["content"], rejected[0]["content"]], [1.0, 0.0]))
    return found


def preference_pairs(record: Fields, where: str) -> list[tuple[list[dict], list[str], list[float]]]:
    """preference_groups, but only of chosen and rejected."""
    if "completions" in record:
        raise InputError(f"{where}: is a group of completions, not a pair; python -m variants.adpo trains on groups")
    return preference_groups(record, where)


def read_groups(files: list[str], parse: Callable, setup: Setup) -> Groups:
    """Reads and encodes groups. parse: preference_groups or preference_pairs.

    A group whose prompt leaves no room for a reply within --max-len is dropped.
    """
    tokenizer, data = setup.tokenizer, Groups(setup.args.max_len)
    for where, (messages, replies, rewards) in read_records(files, parse):
        prompt = tokenizer.prompt_ids(messages)
        if len(prompt) < data.max_len:
            data.rows.append((prompt, [tokenizer.completion_ids(reply) for reply in replies], rewards))
            data.places.append(where)
    if not data.rows:
        raise InputError(f"{', '.join(files)}: every prompt fills --max-len {data.max_len}; raise it")
    return data


def start_preference_run(args: argparse.Namespace, parse: Callable) -> tuple[Run | None, Groups, Groups | None]:
    """Loads model and data, computes the reference log-probabilities. -> (run, or None if finished; data; held-out)."""
    ranks = setup_ranks(args)
    model, tokenizer, ckpt = open_checkpoint(args, ranks)
    setup = Setup(args, ranks, model, tokenizer, ckpt)
    data = read_groups(args.data, parse, setup)
    held_out = read_groups(args.eval_data, parse, setup) if args.eval_data else None
    n = len(data.rows)
    order = None if args.no_shuffle else shuffled_order(n, args.seed)
    data.steps = plan_steps(n, args.batch_size, args.epochs, args.max_steps, order=order)
    setup.examples, setup.places, setup.steps = data.rows, data.places, data.steps
    for text in schedule_advice(args, data.steps):
        print0(f"warning: {text}")
    reference = open_reference(setup, ckpt.fingerprint())
    for groups in (data, held_out) if held_out else (data,):
        keys = groups.keys(list(range(len(groups.rows))))
        groups.ref, _ = reference_logps(reference, keys, groups.sequence)
    identity = run_identity(args, data.rows, ckpt.fingerprint()) | {"the reference": reference.fingerprint}
    prepare_blocks(model, args, ([data.length(i) for i in step] for step in data.steps), ranks)
    return start_run(setup, identity), data, held_out


def preference_metrics(stats: Tensor) -> dict:
    """The log's numbers from (5, n): losses, then implicit rewards and log-probabilities of the best and worst reply.

    Rows: loss, rewards/chosen, rewards/rejected, logps/chosen, logps/rejected of each group.
    """
    loss, chosen, rejected, logps_chosen, logps_rejected = stats.mean(1).tolist()
    out = {"loss": loss, "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
    out["rewards/accuracies"] = (stats[1] > stats[2]).float().mean().item()
    return out | {"logps/chosen": logps_chosen, "logps/rejected": logps_rejected}


def best_and_worst(rewards: list[list[float]]) -> tuple[Tensor, Tensor]:
    """The positions of each group's best and worst reply among the replies of all groups in a row. (n,), (n,)."""
    starts = [sum(map(len, rewards[:i])) for i in range(len(rewards))]
    places = lambda pick: torch.tensor([s + r.index(pick(r)) for s, r in zip(starts, rewards)], dtype=torch.long)
    return places(max), places(min)
