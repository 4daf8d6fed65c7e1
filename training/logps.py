"""Log-probabilities and hidden states of packed examples."""

from collections.abc import Iterator

import torch
from torch import Tensor

from core.casts import cast_once
from core.devices import to_device
from core.distributed import (
    ONE_RANK,
    STOP,
    Ranks,
    is_sharded,
    rank_micro_batches,
    split_by_tokens,
    stop_asked,
    sum_over_ranks,
)
from core.head import token_logps
from model import Qwen2
from training.examples import pack

Example = tuple[list[int], list[bool]]  # (ids, supervised)
NO_WORK: list[Example] = [([0, 0], [False, True])]  # a dummy example for a sharded rank without work


def pack_to_device(
    examples: list[Example], device: torch.device, inputs: list[list[int]] | None = None
) -> tuple[Tensor, list[int], Tensor, Tensor, Tensor]:
    """training.examples.pack, with its tensors on the device.

    inputs: token ids that the model reads instead of the examples' own, with the same lengths. Targets do not change.
    """
    ids, lengths, at, targets, owner = pack(examples)
    if inputs is not None:
        ids = torch.tensor([[token for sequence in inputs for token in sequence]])
    ids, at, targets, owner = (to_device(x, device) for x in (ids, at, targets, owner))
    return ids, lengths, at, targets, owner


def supervised_logps(
    model: Qwen2, examples: list[Example], inputs: list[list[int]] | None = None
) -> tuple[Tensor, Tensor]:
    """The log-probability of each supervised token given the tokens before it. -> (logps (N,) fp32, nats; owner (N,)).

    Order: all supervised tokens of examples[0] from left to right, then those of examples[1], and so on. owner[k] is
    the index of token k's example. The first token of an example is left out, because it has no context.

    The examples run as one packed row. The head runs only at the supervised positions. inputs: see pack_to_device.
    Without examples, N is 0, but the model still runs: all ranks of a sharded model must make the same calls.
    """
    ids, lengths, at, targets, owner = pack_to_device(examples or NO_WORK, model.device, inputs or None)
    logps = model(ids, lengths, at, targets)
    return (logps, owner) if examples else (logps[:0], owner[:0])


def supervised_logps_and_kl(
    model: Qwen2, ref: Qwen2, examples: list[Example], forward_kl: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """supervised_logps, and the KL to the reference over the whole vocabulary. -> (logps (N,), kl (N,), owner (N,)).

    kl[k]: the divergence of the two models' distributions for token k, in nats: KL(model || ref), or KL(ref || model)
    with forward_kl. ref: a separate frozen model, from training.setup.load_frozen. It gets no gradient.
    """
    ids, lengths, at, targets, owner = pack_to_device(examples or NO_WORK, model.device)
    logps, kl = model(ids, lengths, at, targets, ref, forward_kl)
    return (logps, kl, owner) if examples else (logps[:0], kl[:0], owner[:0])


def example_logps(model: Qwen2, examples: list[Example]) -> Tensor:
    """supervised_logps summed over the tokens of each example: (len(examples),) fp32."""
    return sum_by_owner(*supervised_logps(model, examples), len(examples))


def sum_by_owner(logps: Tensor, owner: Tensor, n: int) -> Tensor:
    """The sum of each example's log-probabilities: (N,), owner (N,) in ascending order -> (n,).

    On a GPU index_add would add in any order, so two runs would differ in their last bits.
    """
    ends = torch.searchsorted(owner, torch.arange(n, device=owner.device), right=True)  # (n,)
    lengths = ends.diff(prepend=ends.new_zeros(1))
    # unsafe: no check that would wait for the GPU
    return torch.segment_reduce(logps, "sum", lengths=lengths, unsafe=True)


@torch.no_grad()
def hidden_states(
    model: Qwen2, sequences: list[list[int]], micro_tokens: int, ranks: Ranks = ONE_RANK
) -> Iterator[tuple[int, Tensor]]:
    """Yields (index, its last hidden states (T_i, C) in fp32) for each of this rank's share of the sequences.

    sequences: token ids. micro_tokens: maximum tokens of one forward. Not for sharded models.
    """
    lengths = [len(ids) for ids in sequences]
    for micro in rank_micro_batches(lengths, micro_tokens, ranks):
        ids, some = [token for i in micro for token in sequences[i]], [lengths[i] for i in micro]
        yield from zip(micro, model.hidden(to_device([ids], model.device), some)[0].float().split(some))


@torch.no_grad()
def shared_prefix_logps(model: Qwen2, examples: list[Example], micro_tokens: int) -> Tensor:
    """example_logps without gradients, for examples with common prompts. Computes each distinct context once.

    A context is the part before the first supervised token, without its last token. That token runs with the rest of
    the example, because it predicts the first supervised token. The rests run in forwards of at most micro_tokens
    tokens.
    """
    starts = [max(0, supervised.index(True) - 1) for _, supervised in examples]
    contexts = [tuple(ids[:n]) for (ids, _), n in zip(examples, starts)]
    unique = {context: i for i, context in enumerate(dict.fromkeys(filter(None, contexts)))}
    if len(unique) == sum(map(bool, contexts)):
        return example_logps(model, examples)
    shared = model.new_cache(len(unique), max(map(len, unique)))
    model.prefill(list(unique), shared)
    rest = [(ids[n:], supervised[n:]) for (ids, supervised), n in zip(examples, starts)]
    out = torch.zeros(len(examples), device=model.device)
    for chosen in split_by_tokens([len(ids) for ids, _ in rest], micro_tokens, 1):
        cache = model.new_cache(len(chosen), max(len(examples[i][0]) for i in chosen))
        for row, i in enumerate(chosen):
            if contexts[i]:
                cache.copy_start(row, shared, unique[contexts[i]], starts[i])
        ids, lengths, at, targets, owner = pack_to_device([rest[i] for i in chosen], model.device)
        logps = token_logps(model.hidden(ids, lengths, cache, at)[0], model.head_weight, targets)  # (N,)
        out.index_add_(0, to_device(chosen, model.device)[owner], logps)
    return out


def group_by_context(examples: list[Example], max_tokens: int, share: bool) -> tuple[list[list[int]], list[int]]:
    """Groups examples with the same prompt (the tokens before the first supervised one).

    -> (groups as lists of indices, tokens to compute in each group). One rank computes a group, so a group has at
    most max_tokens tokens or a single example. share=False: each example is a group.
    """
    groups, costs, group_of = [], [], {}
    for i, (ids, supervised) in enumerate(examples):
        n = supervised.index(True) if share else 0
        group = group_of.get(tuple(ids[:n])) if n else None
        if group is None or costs[group] + len(ids) - n > max_tokens:
            group = group_of[tuple(ids[:n])] = len(groups)
            groups.append([])
            costs.append(n)
        groups[group].append(i)
        costs[group] += len(ids) - n
    return groups, costs


@torch.no_grad()
def sequence_logps(
    model: Qwen2, examples: list[Example], micro_tokens: int, ranks: Ranks = ONE_RANK, heed_stop: bool = False
) -> Tensor:
    """example_logps without gradients or dropout, at most micro_tokens tokens per forward: (len(examples),) fp32.

    The ranks split the work, and each rank gets the whole result.

    On a CPU in fp32, completions of one prompt are computed together, so the prompt runs once. In bf16 the values would
    differ more from the policy's in training (docs/LOG.md, 2026-11-29). GPUs do not do this: the many small calls cost
    more than they save. Sharded models cannot: their weights are gathered only inside forward().

    heed_stop: stop early after SIGTERM or Ctrl-C and leave the remaining values at 0. The caller must check
    stop_asked() before it uses the result.
    """
    was_training = model.training
    model.eval()
    out = torch.zeros(len(examples), device=model.device)
    sharded = is_sharded(model)
    fp32 = (model.compute_dtype or model.head_weight.dtype) == torch.float32
    share = model.device.type == "cpu" and fp32 and not sharded
    groups, costs = group_by_context(examples, 4 * micro_tokens, share)
    with cast_once(model.casts):
        for micro in rank_micro_batches(costs, micro_tokens, ranks, sharded):
            if heed_stop and (stop_asked(model.device) if sharded else STOP["asked"]):  # sharded ranks leave together
                break
            indices = [i for group in micro for i in groups[group]]
            some = [examples[i] for i in indices]
            logps = shared_prefix_logps(model, some, micro_tokens) if share else example_logps(model, some)
            out[to_device(torch.tensor(indices, dtype=torch.long), model.device)] = logps
    model.train(was_training)
    return sum_over_ranks(out) if ranks.world > 1 else out
