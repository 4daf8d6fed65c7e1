"""Orders the examples so that no KL pair joins a prompt with another completion of the same prompt."""

import collections
import itertools
import random
from collections.abc import Callable, Hashable, Iterable


def count_prompt_clashes(pairs: Iterable[tuple[int, int]], prompts: list[Hashable]) -> int:
    """The number of pairs (i, j) with equal prompts. Such a pair is not mismatched."""
    return sum(prompts[i] == prompts[j] for i, j in pairs)


def order_without_prompt_clashes(prompts: list[Hashable], sizes: list[int], rng: random.Random) -> list[int]:
    """A random permutation without two equal prompts next to each other inside a batch. sizes: the batch sizes.

    The first and the last example of a batch count as neighbours, as in train_kto.kl_pairs. Shuffles, then removes
    clashes by random swaps. If clashes remain, deal_by_prompt makes the order; it has none if that is possible.
    """
    starts = list(itertools.accumulate(sizes[:-1], initial=0))
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
    """Puts examples of one prompt at positions that are not neighbours. batches: (start, size).

    Prompts are placed from the most to the least frequent. Even positions of all batches are filled first, then odd
    ones, and at the end the last position of each batch of odd size.
    """
    rng.shuffle(batches)
    positions = [s + k for s, n in batches for k in range(0, n - 1, 2)]
    positions += [s + k for s, n in batches for k in range(1, n, 2)]
    positions += [s + n - 1 for s, n in batches if n % 2]
    counts, tie = collections.Counter(prompts), {p: rng.random() for p in prompts}
    by_prompt = sorted(order, key=lambda i: (-counts[prompts[i]], tie[prompts[i]]))
    return [i for _, i in sorted(zip(positions, by_prompt))]


def epoch_order(prompts: list[Hashable], seed: int) -> Callable[[int, list[int]], list[int]]:
    """An `order` for training.setup.plan_steps: a new permutation in every epoch, determined by the seed."""

    def order(epoch, sizes):
        return order_without_prompt_clashes(prompts, sizes, random.Random(f"{seed} {epoch}"))

    return order
