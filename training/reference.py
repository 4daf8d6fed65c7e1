"""The reference model's log-probabilities: computed once, before the first step, and cached on disk."""

import collections
import hashlib
import itertools
import math
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from core.casts import cast_copies, cast_once
from core.checkpoint import Checkpoint
from core.devices import to_device
from core.distributed import Ranks, from_rank_0, is_main
from core.files import InputError, atomic_write, code_hash
from core.outputs import check_writable
from core.pages import available_memory
from core.tokenizer import check_vocabulary
from model import Qwen2
from training.flags import cache_path
from training.logps import Example, sequence_logps
from training.setup import Setup, load_frozen

# ---------------------------------------------------------------------------------------------------------------------
# The reference model


@dataclass(frozen=True)
class Reference:
    """A reference model. It is loaded only if a log-probability is missing from the cache."""

    fingerprint: str  # of its weights and tokenizer
    identity: str  # what its log-probabilities depend on besides the sequence: weights, compute dtype, code
    cache: str  # path of the cache file
    load: Callable[[], Qwen2]  # returns the model. Call it only before the first step: it may be the policy
    micro_tokens: int  # maximum tokens of one forward
    ranks: Ranks


def open_reference(setup: Setup, fingerprint: str) -> Reference:
    """The reference model: --ref, or else --ckpt. fingerprint: of --ckpt.

    If the reference equals --ckpt, no second model is loaded: the untrained policy computes the log-probabilities. A
    loss that needs the reference model during training must load a copy with training.setup.load_frozen.
    """
    args, source, same = setup.args, setup.ckpt, True
    if args.ref:
        source = Checkpoint(args.ref)
        check_vocabulary(source, setup.ckpt)
        ref_fingerprint = source.fingerprint()
        same, fingerprint = ref_fingerprint == fingerprint, ref_fingerprint
    load = lambda: setup.model if same else load_frozen(source, args, setup.ranks)
    identity = f"{fingerprint} {args.dtype} {code_hash('model.py', 'core', 'training')}"
    return Reference(fingerprint, identity, cache_path(args), load, args.micro_tokens, setup.ranks)


# ---------------------------------------------------------------------------------------------------------------------
# The cache on disk

SAVE_CACHE_EVERY = 60  # seconds of work that a killed run may lose


def read_ref_cache(path: str) -> dict[bytes, float]:
    """{digest (32 bytes): log-probability in nats}; empty if there is no such file."""
    if not os.path.isfile(path):
        return {}
    try:
        content = safetensors.torch.load_file(path)
        keys, values = content["keys"].numpy().tobytes(), content["logps"].tolist()
        if content["keys"].dtype != torch.uint8 or content["keys"].shape != (len(values), 32):
            raise KeyError("keys of 32 bytes")
    except (safetensors.SafetensorError, KeyError, TypeError, OSError) as e:
        raise InputError(
            f"{path}: not a cache of reference log-probabilities ({e}); give another --ref-cache, or remove it"
        ) from None
    return {keys[32 * i : 32 * i + 32]: v for i, v in enumerate(values)}


def write_ref_cache(path: str, cache: dict[bytes, float]) -> None:
    keys = torch.frombuffer(bytearray(b"".join(cache)), dtype=torch.uint8).view(-1, 32)
    with atomic_write(path, "wb") as f:
        f.write(safetensors.torch.save({"keys": keys, "logps": torch.tensor(list(cache.values()))}))


def example_digest(identity: str, example: Example) -> bytes:
    """SHA-256 of everything that a reference log-probability depends on."""
    ids, supervised = example
    h = hashlib.sha256(identity.encode())
    h.update(array("i", ids).tobytes() + bytes(supervised))
    return h.digest()


# ---------------------------------------------------------------------------------------------------------------------
# The pass over all pairs


def reference_logps(reference: Reference, pairs: list, example_of: Callable) -> tuple[dict, int]:
    """The reference log-probability of every pair, in nats. Computes missing ones and adds them to the cache.

    pairs: keys (i, j); i identifies the prompt. example_of(i, j) -> (ids, supervised).
    -> ({pair: log-probability}, how many were computed).
    """
    digests = {pair: example_digest(reference.identity, example_of(*pair)) for pair in pairs}
    pair_of = {d: pair for pair, d in digests.items()}  # equal sequences are computed once
    length = {d: len(example_of(*pair)[0]) for d, pair in pair_of.items()}
    longest = collections.defaultdict(int)  # {i: length of the longest sequence with prompt i}
    for d, (i, _) in pair_of.items():
        longest[i] = max(longest[i], length[d])
    # in this order the sequences of a chunk have similar lengths, and completions of one prompt are neighbours
    order = sorted(pair_of, key=lambda d: (-longest[pair_of[d][0]], pair_of[d]))
    cache = read_ref_cache(reference.cache) if is_main() else {}
    logps = from_rank_0(torch.tensor([cache.get(d, math.nan) for d in order], device=reference.ranks.device))
    missing = logps.isnan().tolist()
    if any(missing):
        if is_main():  # a complete cache may be read-only
            check_writable(reference.cache, "--ref-cache")
        chunk_tokens = 8 * reference.micro_tokens * reference.ranks.world
        chunks = chunks_to_compute([length[d] for d in order], missing, chunk_tokens)
        compute_chunks(reference, chunks, order, logps, lambda d: example_of(*pair_of[d]))
    values = dict(zip(order, logps.tolist()))
    return {pair: values[d] for pair, d in digests.items()}, sum(missing)


def chunks_to_compute(lengths: list[int], missing: list[bool], tokens: int) -> Iterator[list[int]]:
    """Yields the missing indices of each chunk. A chunk has about `tokens` tokens of sequences, cached ones included.

    A chunk is computed and saved as a whole, and chunks do not depend on what is missing. So a run that was killed in
    this pass and resumed gets the same values, bit by bit.
    """
    chunk_of = [end // tokens for end in itertools.accumulate(lengths)]
    for _, chunk in itertools.groupby(range(len(lengths)), key=chunk_of.__getitem__):
        if part := [k for k in chunk if missing[k]]:
            yield part


def compute_chunks(
    reference: Reference,
    chunks: Iterator[list[int]],
    order: list[bytes],
    logps: Tensor,
    example_of: Callable[[bytes], Example],
) -> None:
    """Fills logps (one value per digest in `order`). Saves the cache every minute and at the end."""
    model, saved = reference.load(), time.time()
    total = int(logps.isnan().sum())
    bar = tqdm(total=total, desc="reference", unit="seq", disable=None if is_main() else True)

    def save():
        known = {d: v for d, v in zip(order, logps.tolist()) if not math.isnan(v)}
        if is_main() and known:
            known = read_ref_cache(reference.cache) | known  # another run may have added to it
            write_ref_cache(reference.cache, known)

    copies = cast_copies(model, available_memory() // 4)
    try:
        with cast_once(copies):
            for part in chunks:
                examples = [example_of(order[k]) for k in part]
                values = sequence_logps(model, examples, reference.micro_tokens, reference.ranks)
                logps[to_device(torch.tensor(part), logps.device)] = values
                bar.update(len(part))
                if time.time() - saved > SAVE_CACHE_EVERY:
                    save()
                    saved = time.time()
    finally:  # also when Ctrl-C or SIGTERM ends the pass
        save()
        bar.close()
        if not isinstance(sys.exc_info()[1], Exception | None) and is_main():
            known = len(order) - int(logps.isnan().sum())
            kept = f"stopped: {known} of {len(order)} reference log-probabilities are kept in {reference.cache}"
            print(f"{kept}; the same command continues", file=sys.stderr)
