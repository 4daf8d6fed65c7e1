"""An order of the examples in which no mismatched pair shares its prompt."""

import collections
import random

# ---------------------------------------------------------------------------------------------------------------------
# An order of the examples in which no mismatched pair shares its prompt (such a pair would match after all)


def order_without_prompt_clashes(prompts, sizes, rng):
    """A random permutation, cut into batches of `sizes`, in which neighbours in a batch's cycle differ in their prompt.

    prompts: a hashable for each example. Draws a plain shuffle and mends its clashes by random swaps; where that fails, deals
    the examples out by prompt, which succeeds whenever a clash-free order exists. rng: random.Random.
    """
    starts = [sum(sizes[:b]) for b in range(len(sizes))]
    before = [k - 1 if k > s else s + n - 1 for s, n in zip(starts, sizes) for k in range(s, s + n)]
    after = {b: k for k, b in enumerate(before)}

    def clashes_at(order, positions):
        return sum(prompts[order[k]] == prompts[order[before[k]]] for k in positions)

    def mend(order):
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
        order = mend(order)
    if not clashes_at(order, range(len(order))):
        return order
    # Every other place of each batch first (no two of these are neighbours), the places between them next, and the odd
    # batch's last place at the end; filled by prompt, the most frequent first.
    batches = list(zip(starts, sizes))
    rng.shuffle(batches)
    places = [s + k for s, n in batches for k in range(0, n - 1, 2)] + [
        s + k for s, n in batches for k in range(1, n, 2)
    ]
    places += [s + n - 1 for s, n in batches if n % 2]
    counts, rank = collections.Counter(prompts), {p: rng.random() for p in prompts}
    order.sort(key=lambda i: (-counts[prompts[i]], rank[prompts[i]]))
    dealt = dict(zip(places, order))
    return mend([dealt[k] for k in range(len(order))])


def epoch_order(prompts, seed):
    """loop.plan's order for an epoch shuffled so: another permutation each epoch, the same for the same seed."""

    def order(epoch, sizes):
        return order_without_prompt_clashes(prompts, sizes, random.Random(f"{seed} {epoch}"))

    return order
