"""Log-probabilities of packed examples."""

import torch
import torch.utils.checkpoint

from core.attention import to_device
from core.distributed import STOP, is_sharded, rank_micro_batches, split_by_tokens, stop_asked, sum_over_ranks
from core.layers import token_logps
from training.examples import pack

# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities of packed examples


def pack_to_device(examples, device):
    """chat.pack, on the device."""
    ids, lengths, *others = pack(examples)
    ids, at, targets, owner = (to_device(x, device) for x in (ids, *others))
    return ids, lengths, at, targets, owner


def supervised_logps(model, examples):
    """The log-probability that the model gives to each supervised token: (logps (N,) fp32, owner (N,): its example's index).

    examples: (ids, supervised) pairs, run as one packed row. The head runs on the supervised positions alone. Without
    examples N is 0, but the model runs all the same: a sharded rank without work must join the others' calls.
    """
    ids, lengths, at, targets, owner = pack_to_device(examples or [([0, 0], [False, True])], model.device)
    logps = model(ids, lengths, at, targets)
    return (logps, owner) if examples else (logps[:0], owner[:0])


def example_logps(model, examples):
    """supervised_logps summed over the tokens of each example: (len(examples),) fp32."""
    logps, owner = supervised_logps(model, examples)
    return logps.new_zeros(len(examples)).index_add(0, owner, logps)


@torch.no_grad()
def shared_prefix_logps(model, examples, micro_tokens):
    """example_logps without gradients, where several examples begin alike: each context is computed once, and what follows it
    at most micro_tokens tokens at a time.

    The context is what stands before the first supervised token, less its own last token: that one is fed with the rest,
    since its state predicts the first supervised token."""
    starts = [max(0, supervised.index(True) - 1) for _, supervised in examples]
    contexts = [tuple(ids[:n]) for (ids, _), n in zip(examples, starts)]
    unique = {context: i for i, context in enumerate(dict.fromkeys(filter(None, contexts)))}
    if len(unique) == sum(map(bool, contexts)):
        return example_logps(model, examples)
    known = model.new_cache(len(unique), max(map(len, unique)))
    model.prefill(list(unique), known)
    rest = [(ids[n:], supervised[n:]) for (ids, supervised), n in zip(examples, starts)]
    out = torch.zeros(len(examples), device=model.device)
    for chosen in split_by_tokens([len(ids) for ids, _ in rest], micro_tokens, 1):
        cache = model.new_cache(len(chosen), max(len(examples[i][0]) for i in chosen))
        for row, i in enumerate(chosen):
            if contexts[i]:
                cache.copy_start(row, known, unique[contexts[i]], starts[i])
        ids, lengths, at, targets, owner = pack_to_device([rest[i] for i in chosen], model.device)
        logps = token_logps(model.hidden(ids, lengths, cache, at)[0], model.head_weight, targets)  # (N,)
        out.index_add_(0, to_device(chosen, model.device)[owner], logps)
    return out


@torch.no_grad()
def sequence_logps(model, examples, micro_tokens, rank=0, world=1, heed_stop=False):
    """example_logps without gradients, at most micro_tokens tokens at a time: (len(examples),) fp32.

    Examples of one context, such as the completions of one prompt, stay together and share its computation, in several forwards
    if need be; but not if the model is sharded, whose weights are whole only inside its forward, nor on a GPU, where the many
    small calls that it takes would cost more than they save. With world > 1 the ranks share the work and all get the whole
    result.

    heed_stop: after SIGTERM the rest is left at 0. The caller must then ask stop_asked() before it uses the result.
    """
    out = torch.zeros(len(examples), device=model.device)
    share = model.device.type == "cpu" and not is_sharded(model)
    units, costs, unit_of = [], [], {}  # lists of indices; tokens to compute; {context: the unit that it adds to}
    for i, (ids, supervised) in enumerate(examples):
        n = supervised.index(True) if share else 0
        unit = unit_of.get(tuple(ids[:n])) if n else None
        if unit is None or costs[unit] + len(ids) - n > 4 * micro_tokens:  # a unit is one rank's
            unit = unit_of[tuple(ids[:n])] = len(units)
            units.append([])
            costs.append(n)
        units[unit].append(i)
        costs[unit] += len(ids) - n
    for micro in rank_micro_batches(costs, micro_tokens, rank, world, is_sharded(model)):
        if heed_stop and (
            stop_asked(model.device) if is_sharded(model) else STOP["asked"]
        ):  # sharded ranks leave together
            break
        indices = [i for unit in micro for i in units[unit]]
        some = [examples[i] for i in indices]
        logps = shared_prefix_logps(model, some, micro_tokens) if share else example_logps(model, some)
        out[to_device(torch.tensor(indices, dtype=torch.long), model.device)] = logps
    return sum_over_ranks(out) if world > 1 else out
