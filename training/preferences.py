"""Preference data (groups of replies to one prompt, with rewards) and its training loop, for DPO and ADPO."""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.conversations import dialogues, kto_examples, one_reply
from core.devices import to_device
from core.files import InputError, print0, shown
from core.records import Fields, is_number, read_records
from training.examples import Cuts
from training.flags import complete_reference_args
from training.logps import Example, example_logps
from training.reference import open_reference, reference_logps
from training.run import (
    Run,
    end_step,
    eval_due,
    eval_logps,
    finish_run,
    progress,
    run_identity,
    start_run,
    stop_run,
)
from training.setup import (
    Setup,
    open_checkpoint,
    plan_steps,
    plan_warmup,
    prepare_blocks,
    setup_ranks,
    shuffled_order,
)
from training.step import lr_at, micro_batches, optimizer_step, record_skip, seed_step


@dataclass
class Groups:
    """Encoded groups, the steps of the whole run, and the reference log-probabilities."""

    max_len: int
    rows: list = field(default_factory=list)  # (prompt ids, [reply ids, ...], [reward, ...])
    places: list[str] = field(default_factory=list)  # "file:line" of each row
    steps: list[list[int]] = field(default_factory=list)  # the rows of each step
    ref: dict = field(default_factory=dict)  # {(row, reply): reference log-probability in nats}
    read: int = 0  # groups in the files; those not in rows were dropped
    cuts: Cuts = field(default_factory=Cuts)  # of the sequences of prompt and reply

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

    def lines(self, what: str = "") -> list[str]:
        """Lines for the summary of a run. what: a word before "prompts" and "replies"."""
        dropped = f"{self.read - len(self.rows)} dropped (the prompt fills {self.max_len} tokens)"
        replies = sum(len(replies) for _, replies, _ in self.rows)
        own = self.cuts.lines(replies, self.max_len, f"{what}replies")
        return [f"{len(self.rows)} {what}prompts with their replies, {dropped}", *own]


def scored_replies(completions: object, rewards: object, where: str) -> tuple[list[str], list[float]]:
    """The "completions" and "rewards" of a record, checked."""
    if not isinstance(completions, list) or len(completions) < 2:
        raise InputError(f"{where}: completions is {shown(completions)}; it must be a list of at least two replies")
    if not isinstance(rewards, list) or not all(map(is_number, rewards)):
        raise InputError(f"{where}: rewards is {shown(rewards)}; it must be a list of numbers")
    if len(rewards) != len(completions):
        raise InputError(f"{where}: {len(completions)} completions and {len(rewards)} rewards; give one for each")
    return [one_reply(reply, where)["content"] for reply in completions], [float(r) for r in rewards]


def preference_groups(record: Fields, where: str) -> list[tuple[list[dict], list[str], list[float]]]:
    """A record -> [(prompt messages, replies, rewards)]. chosen has reward 1, rejected 0.

    A completion with a label is a group of one reply with the reward 1 or 0, see pair_labelled().
    """
    completions, rewards, found = record.first("completions"), record.first("rewards"), []
    if completions is None and ("label" in record or "kto_tag" in record):
        return [(prompt, [reply], [float(label)]) for prompt, reply, label in kto_examples(record, where)]
    for prompt, reply, rejected, _ in dialogues(record, where):
        if not prompt or completions is None and (reply is None or not rejected):
            needs = "chosen and rejected, or a completion and a label, or for variants.adpo completions and rewards"
            raise InputError(f"{where}: needs a prompt with {needs}")
        if completions is not None:
            found.append((prompt, *scored_replies(completions, rewards, where)))
        elif len(rejected) != 1 or rejected[0]["role"] != "assistant":
            raise InputError(f"{where}: chosen and rejected differ before their last message; give them one prompt")
        else:
            found.append((prompt, [reply["content"], rejected[0]["content"]], [1.0, 0.0]))
    return found


def preference_pairs(record: Fields, where: str) -> list[tuple[list[dict], list[str], list[float]]]:
    """preference_groups, but only of chosen and rejected, or of labelled completions."""
    if "completions" in record:
        raise InputError(f"{where}: is a group of completions, not a pair; python -m variants.adpo trains on groups")
    return preference_groups(record, where)


def pair_labelled(examples: list[tuple], files: list[str]) -> list[tuple]:
    """Joins groups of one reply, from labels, to pairs: the k-th desirable and the k-th undesirable reply to a prompt.

    examples: [("file:line", group)], from read_records(). A reply without a partner is left out, with a note.
    """
    pairs, labelled = [], {}  # labelled: {prompt: (undesirable examples, desirable examples)}
    for example in examples:
        prompt, replies, rewards = example[1]
        if len(replies) > 1:
            pairs.append(example)
        else:
            labelled.setdefault(json.dumps(prompt), ([], []))[int(rewards[0])].append(example)
    alone = 0
    for undesirable, desirable in labelled.values():
        alone += abs(len(desirable) - len(undesirable))
        for (where, (prompt, good, _)), (_, (_, bad, _)) in zip(desirable, undesirable):
            pairs.append((where, (prompt, good + bad, [1.0, 0.0])))
    if not pairs:
        needs = "no prompt has a desirable and an undesirable completion, so there is no pair"
        raise InputError(f"{', '.join(files)}: {needs}; train_kto.py trains on unpaired labels")
    if alone:
        print0(f"note: {alone:,} labelled completions are left out: their prompt has none of the other label")
    return pairs


def read_groups(files: list[str], parse: Callable, setup: Setup) -> Groups:
    """Reads and encodes groups. parse: preference_groups or preference_pairs.

    A group whose prompt leaves no room for a reply within --max-len is dropped.
    """
    tokenizer, data = setup.tokenizer, Groups(setup.args.max_len)
    for where, (messages, replies, rewards) in pair_labelled(read_records(files, parse), files):
        prompt, data.read = tokenizer.prompt_ids(messages), data.read + 1
        if len(prompt) < data.max_len:
            completions = [tokenizer.completion_ids(reply) for reply in replies]
            data.rows.append((prompt, completions, rewards))
            data.places.append(where)
            for length in (len(prompt) + len(ids) for ids in completions):
                data.cuts.add(length, length - 2, data.max_len)  # <|im_end|> comes before the last token, a newline
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
    plan_warmup(args, data.steps)
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
    """The index of each group's best and worst reply in the concatenated replies of all groups. (n,), (n,)."""
    starts = itertools.accumulate(map(len, rewards), initial=0)
    best, worst = [], []
    for start, group in zip(starts, rewards):
        best.append(start + group.index(max(group)))
        worst.append(start + group.index(min(group)))
    return torch.tensor(best, dtype=torch.long), torch.tensor(worst, dtype=torch.long)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def group_losses(loss: Callable, logps: Tensor, data: Groups, indices: list[int]) -> tuple[Tensor, Tensor]:
    """-> the losses (n,) of these groups, and the (5, n) numbers of preference_metrics.

    logps: (m,) of all replies of the groups, in order. loss(logps, ref_logps, rewards) -> (losses (n,), implicit
    rewards (m,)). rewards: those of the data, one list per group.
    """
    ref = to_device(torch.tensor([data.ref[key] for key in data.keys(indices)]), logps.device)
    rewards = [data.rows[i][2] for i in indices]
    losses, implicit = loss(logps, ref, rewards)  # (n,), (m,)
    best, worst = (to_device(index, logps.device) for index in best_and_worst(rewards))
    return losses, torch.stack((losses, implicit[best], implicit[worst], logps[best], logps[worst])).detach()


def train_preferences(run: Run, data: Groups, held_out: Groups | None, loss: Callable) -> bool:
    """Runs all remaining steps. -> True, or False if SIGTERM or Ctrl-C stopped the run (it is then already saved).

    A group is never divided between micro-batches.
    """
    model, args, device = run.model, run.args, run.ranks.device
    if run.pending and not end_step(run, eval_preferences(run, run.pending, held_out, loss)):
        return False
    for step in (bar := progress(run, "preferences")):
        start = time.time()
        seed_step(run, step)
        indices = data.steps[step]
        lengths = [data.length(i) for i in indices]
        step_stats = torch.zeros(5, len(indices), device=device)
        for micro in micro_batches(run, lengths):
            some = [indices[k] for k in micro]
            losses, stats = group_losses(loss, example_logps(model, data.sequences(some)), data, some)
            (losses.sum() / len(indices)).backward()
            step_stats[:, to_device(torch.tensor(micro, dtype=torch.long), device)] = stats
        lr = lr_at(step, run.total, args.lr, args.warmup, args.schedule)
        result = optimizer_step(run, lr, step_stats)
        if result.status == "stop":
            stop_run(run, step)
            return False

        metrics = preference_metrics(result.stats)
        record = {"step": step + 1, "loss": metrics["loss"], "lr": lr, "grad_norm": result.grad_norm}
        record |= {"tokens": sum(lengths), "tokens_per_second": sum(lengths) / (time.time() - start)} | metrics
        if result.status == "skip":
            places = [data.places[i] for i, _ in data.keys(indices)]
            record |= record_skip(run, step + 1, data.sequences(indices), places)
        if not end_step(run, eval_preferences(run, record, held_out, loss)):
            return False
        bar.set_postfix(loss=f"{record['loss']:.4f}")
    return True


def eval_preferences(run: Run, record: dict, held_out: Groups | None, loss: Callable) -> dict | None:
    """Adds the held-out metrics to the step's log record if an evaluation is due. None if the run was stopped in it."""
    if not held_out or not eval_due(run, record):
        return record
    every = list(range(len(held_out.rows)))
    logps = eval_logps(run, record, held_out.sequences(every))
    if logps is None:
        return None
    _, stats = group_losses(loss, logps.cpu(), held_out, every)
    return record | {f"eval_{name}": value for name, value in preference_metrics(stats).items()}


def train_on_groups(args: argparse.Namespace, suffix: str, parse: Callable, loss: Callable) -> None:
    """A whole run. suffix: see default_out. parse: see read_groups. loss: see group_losses."""
    complete_reference_args(args, suffix)
    run, data, held_out = start_preference_run(args, parse)
    if run and train_preferences(run, data, held_out, loss):
        evaluation = ["python", "eval.py", "--ckpt", args.ckpt, args.out, "--tasks", "gsm8k"]
        finish_run(run, data.lines() + (held_out.lines("held-out ") if held_out else []), [evaluation])
