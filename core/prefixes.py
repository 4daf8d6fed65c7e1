"""Shared prefixes: computes the prefix that several prompts have in common once."""

from collections import Counter

import torch.nn as nn

from core.attention import KVCache


def common_prefix(sequences: list[list[int]]) -> int:
    """The length of the common prefix of all sequences, but less than the shortest sequence."""
    first, last = min(sequences), max(sequences)  # all others are between them in lexicographic order
    limit = min(map(len, sequences)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def prefix_lengths(prompts: list[list[int]], overhead: int = 64, depth: int = 50) -> list[int]:
    """The length of each prompt's prefix that is worth computing once for several prompts; 0 for none.

    In lexicographic order, prompts with a common prefix are neighbours. A group of neighbours is split where they share
    least if this saves tokens. Each prefix needs a forward of its own, which counts as `overhead` tokens.
    depth: limit of the recursion.
    """
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    shares = [common_prefix([prompts[a], prompts[b]]) for a, b in zip(order, order[1:])]

    def best(i: int, j: int, depth: int) -> tuple[int, list[int]]:
        """The cheapest prefixes for prompts order[i:j]: (tokens to compute, the prefix length of each prompt)."""
        total, shared = sum(len(prompts[k]) for k in order[i:j]), min(shares[i : j - 1], default=0)
        with_prefix = total - (j - i - 1) * shared + overhead
        whole = (with_prefix, [shared] * (j - i)) if with_prefix < total else (total, [0] * (j - i))
        if j - i == 1 or not depth:
            return whole
        ends = [i, *(k + 1 for k in range(i, j - 1) if shares[k] == shared), j]
        parts = [best(a, b, depth - 1) for a, b in zip(ends, ends[1:])]
        split = sum(tokens for tokens, _ in parts), [n for _, lengths in parts for n in lengths]
        return min(whole, split, key=lambda way: way[0])

    lengths = best(0, len(prompts), depth)[1]
    return [n for _, n in sorted(zip(order, lengths))]


class SharedPrefixes:
    """KV caches of shared prefixes. A cache is computed for the first prompt that needs it and freed after the last."""

    def __init__(self, model: nn.Module, prompts: list[list[int]]):
        self.model, self.prompts = model, prompts
        self.prefixes = [tuple(prompt[:n]) for prompt, n in zip(prompts, prefix_lengths(prompts))]
        self.uses, self.caches = Counter(self.prefixes), {}

    def rest(self, i: int) -> list[int]:
        """Prompt i without its shared prefix."""
        return self.prompts[i][len(self.prefixes[i]) :]

    def copy(self, i: int, cache: KVCache, row: int) -> None:
        """Copies the shared prefix of prompt i to the start of a cache row. Call it once per prompt."""
        prefix = self.prefixes[i]
        if not prefix:
            return
        if prefix not in self.caches:
            self.caches[prefix] = self.model.new_cache(1, len(prefix))
            self.model.prefill([list(prefix)], self.caches[prefix])
        cache.copy_start(row, self.caches[prefix], 0, len(prefix))
        self.uses[prefix] -= 1
        if not self.uses[prefix]:
            del self.caches[prefix]
