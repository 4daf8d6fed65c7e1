"""An order of the examples in which no KL pair joins a prompt with a completion of that same prompt."""

import collections
import random
from collections.abc import Callable, Hashable, Iterable


def count_prompt_clashes(pairs: Iterable[tuple[int, int]], prompts: list[Hashable]) -> int:
    """How many of the pairs (i, j) have equal prompts, so that they match after all."""
    return sum(prompts[i] == prompts[j] for i, j in pairs)


def order_without_prompt_clashes(prompts: list[Hashable], sizes: list[int], rng: random.Random) -> list[int]:
    """A random permutation which, cut into batches of `sizes`, has no two equal prompts next to each other.

    The last example of a batch counts as next to its first one, as in train_kto.kl_pairs. Shuffles, then repairs
    clashes by random swaps. If that fails, deals the examples out by prompt, which works whenever a clash-free order
    exists.
    """
    starts = [sum(sizes[:b]) for b in range(len(sizes))]
    before = [k - 1 if k > s else s + n - 1 for s, n in zip(starts, sizes) for k in range(s, s + n)]
    after = {b: k for k, b in enumerate(before)}

    def clashes_at(order, positions):
        return sum(prompts[order[k]] == prompts[order[before[k]]] for k in positions)

    def repair(order):
        for k in [k for k in range(len(order)) if clashes_at(order, [k])]:
            for other in (rng.randrange(len(order)) for _ in range(100)):
                near = {k, after[k], other, after[other]}
                clashes = clashes_at(order, near)
                order[k], order[other] = order[other], order[k]
                if clashes_at(order, near) < clashes:
                    break
                order[k], order[other] = order[other], order[k]
        return order

    order = list(range(len(prompts)))
    rng.shuffle(order)
    for _ in range(3):
        order = repair(order)
    if not clashes_at(order, range(len(order))):
        return order
    return repair(deal_by_prompt(order, prompts, list(zip(starts, sizes)), rng))


def deal_by_prompt(
    order: list[int], prompts: list[Hashable], batches: list[tuple[int, int]], rng: random.Random
) -> list[int]:
    """Deals the examples to places that are not neighbours, the most frequent prompt first. batches: (start, size).

    Every other place of each batch is filled first, then the places between them, and the last place of each batch of
    odd size at the end.
    """
    rng.shuffle(batches)
    places = [s + k for s, n in batches for k in range(0, n - 1, 2)]
    places += [s + k for s, n in batches for k in range(1, n, 2)]
    places += [s + n - 1 for s, n in batches if n % 2]
    counts, tie = collections.Counter(prompts), {p: rng.random() for p in prompts}
    by_prompt = sorted(order, key=lambda i: (-counts[prompts[i]], tie[prompts[i]]))
    return [i for _, i in sorted(zip(places, by_prompt))]


def epoch_order(prompts: list[Hashable], seed: int) -> Callable[[int, list[int]], list[int]]:
    """An `order` for training.setup.plan_steps: every epoch another permutation, the same for the same seed."""

    def order(epoch, sizes):
        return order_without_prompt_clashes(prompts, sizes, random.Random(f"{seed} {epoch}"))

    return order
