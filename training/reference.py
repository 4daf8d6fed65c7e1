"""The reference model's log-probabilities, computed once and kept on disk."""

import collections
import hashlib
import itertools
import math
import os
import time
from array import array

import safetensors
import safetensors.torch
import torch
from tqdm import tqdm

from core.attention import to_device
from core.distributed import from_rank_0
from core.files import InputError, atomic_write
from training.logps import sequence_logps

# ---------------------------------------------------------------------------------------------------------------------
# The reference's log-probabilities, kept on disk

SAVE_CACHE_EVERY = 60  # seconds that a killed run may lose of them


def read_ref_cache(path):
    """{digest (32 bytes): log-probability in nats} of a cache file; {} if there is none."""
    if not os.path.isfile(path):
        return {}
    try:
        content = safetensors.torch.load_file(path)
        keys, values = content["keys"].numpy().tobytes(), content["logps"].tolist()
    except (safetensors.SafetensorError, KeyError, OSError) as e:
        raise InputError(f"{path}: not a cache of reference log-probabilities ({e}); remove it") from None
    return {keys[32 * i : 32 * i + 32]: v for i, v in enumerate(values)}


def write_ref_cache(path, cache):
    keys = torch.frombuffer(bytearray(b"".join(cache)), dtype=torch.uint8).view(-1, 32)
    with atomic_write(path, "wb") as f:
        f.write(safetensors.torch.save({"keys": keys, "logps": torch.tensor(list(cache.values()))}))


def example_digest(reference, example):
    """What a reference log-probability depends on: the reference (weights, compute dtype, code), the ids, where they are
    supervised."""
    ids, supervised = example
    h = hashlib.sha256(reference.encode())
    h.update(array("i", ids).tobytes() + bytes(supervised))
    return h.digest()


def reference_logps(pairs, sequence, path, reference, load, device, micro_tokens, rank, world):
    """The reference's log-probabilities of all pairs, from the cache at `path` or computed and added to it.

    pairs: (i, j) keys. sequence(i, j): the example (ids, supervised) of a pair. reference: a text that identifies
    weights and compute dtype. load() gives the reference model; it is called only if something is missing, and the model
    is dropped on return. -> ({pair: nats}, the number computed).
    """
    digests = {pair: example_digest(reference, sequence(*pair)) for pair in pairs}
    pair_of = {d: pair for pair, d in digests.items()}  # equal sequences are computed once
    length = {d: len(sequence(*pair)[0]) for d, pair in pair_of.items()}
    longest = collections.defaultdict(int)  # {i: the longest of the sequences with prompt i}
    for d, (i, _) in pair_of.items():
        longest[i] = max(longest[i], length[d])
    # like lengths pack well, and the completions of one prompt share its computation
    order = sorted(pair_of, key=lambda d: (-longest[pair_of[d][0]], pair_of[d]))
    cache = read_ref_cache(path) if rank == 0 else {}
    logps = from_rank_0(torch.tensor([cache.get(d, math.nan) for d in order], device=device))
    missing = logps.isnan().tolist()
    if any(missing):
        model, saved = load(), time.time()
        bar = tqdm(total=sum(missing), desc="reference", unit="seq", disable=True if rank else None)

        def save():
            known = {d: v for d, v in zip(order, logps.tolist()) if not math.isnan(v)}
            if rank == 0 and known:
                write_ref_cache(path, read_ref_cache(path) | known)  # another run may have added to the file

        # The edges of the chunks depend on all pairs, and what a chunk lacks is computed and saved together: a run that
        # was killed in this pass and is resumed finds the same values to the bit.
        chunk_of = [end // (8 * micro_tokens * world) for end in itertools.accumulate(length[d] for d in order)]
        try:
            for _, chunk in itertools.groupby(range(len(order)), key=chunk_of.__getitem__):
                part = [k for k in chunk if missing[k]]
                if part:
                    examples = [sequence(*pair_of[order[k]]) for k in part]
                    logps[to_device(torch.tensor(part), device)] = sequence_logps(
                        model, examples, micro_tokens, rank, world
                    )
                    bar.update(len(part))
                if time.time() - saved > SAVE_CACHE_EVERY:
                    save()
                    saved = time.time()
        finally:  # also when SIGTERM ends the pass
            save()
            bar.close()
    values = dict(zip(order, logps.tolist()))
    return {pair: values[d] for pair, d in digests.items()}, sum(missing)
