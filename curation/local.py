"""Generates replies and computes perplexities with a local checkpoint, on one device or on all ranks of torchrun.

Rank 0 runs the steps. The other ranks wait in serve_jobs() for work from rank 0.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch.distributed as dist

from core.checkpoint import Checkpoint
from core.devices import DEVICE, DTYPES
from core.distributed import join_ranks, leave_group, own_device
from core.progress import ReplyBar
from core.reply_log import ReplyLog
from core.tokenizer import Tokenizer
from generate import check_loadable, generate_iter
from model import Qwen2
from training.logps import sequence_logps

BLOCK = 256  # prompts that each rank answers at a time


@dataclass
class LocalModel:
    """A local checkpoint. name: for people. identity: distinguishes models in the keys of the reply log."""

    name: str
    identity: str
    source: str
    dtype: str
    device: str
    checkpoint: Checkpoint
    loaded: tuple[Qwen2, Tokenizer] | None = None  # set by load()


def open_local(source: str, model_name: str | None = None, dtype: str = "fp32", device: str = DEVICE) -> LocalModel:
    """Opens, checks and fingerprints a checkpoint. Its weights are loaded when they are first needed."""
    checkpoint = check_loadable(source)
    name = model_name or os.path.basename(os.path.normpath(source))
    return LocalModel(name, f"{checkpoint.fingerprint()} {dtype}", source, dtype, device, checkpoint)


def load(local: LocalModel) -> tuple[Qwen2, Tokenizer]:
    """The model and its tokenizer. A device of "cuda" is this rank's own GPU."""
    if local.loaded is None:
        model = Qwen2.from_pretrained(local.checkpoint, DTYPES[local.dtype], own_device(local.device)).eval()
        local.loaded = (model, Tokenizer(local.checkpoint))
    return local.loaded


# ---------------------------------------------------------------------------------------------------------------------
# Replies


def ask_local(
    local: LocalModel,
    todo: dict[str, list[dict]],
    log: ReplyLog,
    errors: dict[str, str],
    parameters: dict,
    batch_size: int,
    bar: ReplyBar,
) -> None:
    """Answers the requests in todo, {key: messages}. Adds replies to the log, and {key: reason} to errors for the rest.

    A single rank answers all prompts in one call of generate_iter, which sorts them into batches and computes a shared
    prefix once. Several ranks get BLOCK prompts each at a time. A sampled reply is seeded by its key, so neither a
    restart nor the number of ranks changes it.
    """
    model, tokenizer = load(local)
    longest = model.config.max_position_embeddings - parameters["max_tokens"]
    keys, world = [], world_size()
    for key, messages in todo.items():
        n = len(tokenizer.prompt_ids(messages))
        if n <= longest:
            keys.append(key)
        else:
            errors[key] = f"a prompt of {n} tokens leaves no room for the reply"
            bar.update()
    size = BLOCK if world > 1 else max(len(keys), 1)
    blocks = [keys[i : i + size] for i in range(0, len(keys), size)]
    for first in range(0, len(blocks), world):
        round_of_blocks = blocks[first : first + world]
        shares = [
            ([todo[key] for key in block], [int(key[:14], 16) for key in block], parameters, batch_size)
            for block in round_of_blocks
        ]
        for block, replies in zip(round_of_blocks, on_ranks(generate_replies, local, shares)):
            for i, text, finish_reason in replies:
                log.append(block[i], {"model": local.name, "text": text, "finish_reason": finish_reason})
                bar.update()


def generate_replies(
    local: LocalModel, prompts: list[list[dict]], seeds: list[int], parameters: dict, batch_size: int
) -> Iterator[tuple[int, str, str]]:
    """Yields (index of the prompt, text, finish_reason) as replies finish. seeds: one for each prompt."""
    sampling = {"temperature": parameters["temperature"], "top_p": parameters.get("top_p", 1.0), "seed": seeds}
    length = {"max_new_tokens": parameters["max_tokens"], "batch_size": batch_size}
    yield from generate_iter(*load(local), prompts, **length, **sampling)


# ---------------------------------------------------------------------------------------------------------------------
# Perplexities


def perplexities(
    scorer: LocalModel, pairs: list[tuple[list[dict], str]], max_len: int, micro_tokens: int
) -> list[float | None]:
    """The perplexity of each response under the scorer. pairs: [(prompt, response text)].

    Perplexity is exp(-mean log p) over the response's tokens, with its <|im_end|> and newline. None if the prompt alone
    fills max_len tokens. All ranks share the work. Responses to one prompt go to one rank, which computes the prompt
    once.
    """
    same_prompt = defaultdict(list)  # {prompt: indices}
    for i, (prompt, _) in enumerate(pairs):
        same_prompt[json.dumps(prompt)].append(i)
    longest_first = sorted(same_prompt.values(), key=lambda indices: -sum(len(pairs[i][1]) for i in indices))
    dealt = [[i for indices in longest_first[rank :: world_size()] for i in indices] for rank in range(world_size())]
    dealt = [indices for indices in dealt if indices]
    shares = [([pairs[i] for i in indices], max_len, micro_tokens) for indices in dealt]
    out = [None] * len(pairs)
    for indices, values in zip(dealt, on_ranks(score_share, scorer, shares)):
        for i, value in zip(indices, values):
            out[i] = value
    return out


def score_share(
    scorer: LocalModel, pairs: list[tuple[list[dict], str]], max_len: int, micro_tokens: int
) -> list[float | None]:
    """Computes one rank's share of perplexities()."""
    model, tokenizer = load(scorer)
    examples = []
    for prompt, text in pairs:
        context, reply = tokenizer.prompt_ids(prompt), tokenizer.completion_ids(text)
        examples.append(((context + reply)[:max_len], ([False] * len(context) + [True] * len(reply))[:max_len]))
    n = [sum(supervised) for _, supervised in examples]
    scored = [i for i in range(len(pairs)) if n[i]]
    out = [None] * len(pairs)
    if scored:
        for i, logp in zip(scored, sequence_logps(model, [examples[i] for i in scored], micro_tokens).tolist()):
            out[i] = round(math.exp(min(-logp / n[i], 50.0)), 4)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Ranks: rank 0 scatters jobs to all ranks, each rank does its job, rank 0 gathers the results


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def join_other_ranks() -> int:
    """Joins the other ranks under torchrun. -> this process's rank"""
    return join_ranks(hours=30 * 24).rank  # the others may wait for days while rank 0 asks an endpoint


def scatter_jobs(jobs: list | None) -> tuple | None:
    """Sends each rank its job. Rank 0 passes all jobs, the others pass None.

    -> this rank's job. () means no job in this round, None means no more jobs.
    """
    mine = [None]
    dist.scatter_object_list(mine, jobs, src=0)
    return mine[0]


def gather_results(results: list) -> list | None:
    """-> on rank 0 the results of all ranks in the order of ranks, on other ranks None."""
    out = [None] * world_size() if dist.get_rank() == 0 else None
    dist.gather_object(results, out, dst=0)
    return out


def on_ranks(work: Callable[..., Iterable], local: LocalModel, shares: list[tuple]) -> Iterator[Iterable]:
    """Yields work(local, *share) for each share. There may be at most as many shares as ranks.

    Rank 0 computes the first share as the caller consumes it. The other ranks compute theirs at the same time. work: a
    function of this module, because it is sent to the ranks by name.
    """
    first, *others = shares
    if others:
        jobs = [(work, local.source, local.dtype, local.device, share) for share in others]
        scatter_jobs([None, *jobs] + [()] * (world_size() - 1 - len(jobs)))
    yield work(local, *first)
    if others:
        yield from gather_results([])[1:]


def with_other_ranks(work: Callable[[], None]) -> None:
    """Runs work() on rank 0. Under torchrun the other ranks do its jobs until it ends."""
    if join_other_ranks() > 0:
        return serve_jobs()
    try:
        work()
    except BaseException:
        end_other_ranks(failed=True)
        raise
    end_other_ranks()


def serve_jobs() -> None:
    """Does jobs from rank 0 until there are no more. This is all that ranks above 0 do."""
    opened = {}

    def or_exit(collective: Callable, *arguments):
        try:
            return collective(*arguments)
        except RuntimeError:  # rank 0 has ended and printed the reason; an orderly exit would wait for it
            os._exit(1)

    while (job := or_exit(scatter_jobs, None)) is not None:
        results = []
        if job:
            work, source, dtype, device, share = job
            if (source, dtype) not in opened:
                opened[source, dtype] = open_local(source, dtype=dtype, device=device)
            results = list(work(opened[source, dtype], *share))
        or_exit(gather_results, results)
    or_exit(leave_group)


def end_other_ranks(failed: bool = False) -> None:
    """Ends the other ranks. Rank 0 calls it last. failed: exits without sending anything, which the others notice."""
    if world_size() > 1 and not failed:
        scatter_jobs([None] * world_size())
    leave_group(failed)
