"""Minimises a function in few evaluations, by coordinate descent with parabolas. Also the greedy soup."""

from collections.abc import Callable, Sequence

Point = dict  # {"weights": [w_1 .. w_n]}, and "density", "lambda", "lines" (LiNeS' alpha) if they are searched

# The range of each quantity, and the values tried first. "weight": the weight of a single model.
RANGES = {
    "weights": (0.0, 1.0),
    "weight": (0.0, 2.0),
    "density": (0.02, 1.0),
    "lambda": (0.0, 3.0),
    "lines": (0.0, 1.0),
}
FIRST = {
    "weights": (0.5, 0.95, 0.0, 1.0),
    "weight": (0.5, 1.0, 1.3),
    "density": (0.2, 0.5, 1.0),
    "lambda": (0.5, 1.0, 1.5),
    "lines": (0.3, 0.7, 1.0),
}


def next_point(tried: dict[float, float], low: float, high: float, tolerance: float) -> float | None:
    """The next x in [low, high] to try when minimising a smooth function. None: the minimum is found.

    tried: {x: value}. Takes the vertex of the parabola through the best point and its neighbours, because the loss
    between two fine-tunes of one base is almost a parabola. Without a vertex: golden section of the wider side.
    """
    xs = sorted(tried)
    best = min(xs, key=tried.get)
    i = xs.index(best)
    left, right = xs[i - 1] if i else low, xs[i + 1] if i + 1 < len(xs) else high
    x = best + 0.382 * max(right - best, left - best, key=abs)
    if len(xs) >= 3:
        j = min(max(i, 1), len(xs) - 2)
        p, q, r = xs[j - 1 : j + 2]
        slope, after = (tried[q] - tried[p]) / (q - p), (tried[r] - tried[q]) / (r - q)
        if after > slope:
            vertex = (p + q) / 2 - slope * (r - p) / (after - slope) / 2
            x = vertex if left < vertex < right else x
    x = min(max(x, low), high)  # the first points may be outside
    return x if min(abs(x - y) for y in xs) >= tolerance else None


def search_directions(point: Point, over: Sequence[str], n: int) -> list[tuple[str, str, float, Callable]]:
    """The lines through a point along which to search: (label, name in RANGES, x at the point, x -> point).

    Along a line of weights one model has weight x and the others share 1 - x in their present proportions. A single
    model has weight x.
    """
    directions = []
    for name in over:
        if name != "weights":
            directions.append((name, name, point[name], lambda x, name=name: point | {name: x}))
        elif n == 1:
            directions.append(("weight", "weight", point["weights"][0], lambda x: point | {"weights": [x]}))
        else:
            for i in range(1, n):
                line = lambda x, i=i: point | {"weights": with_share(point["weights"], i, x)}
                directions.append((f"weight of model {i + 1}", name, point["weights"][i], line))
    return directions


def with_share(weights: Sequence[float], i: int, x: float) -> list[float]:
    """The weights with x for model i and the others scaled so that all add up to 1."""
    rest = sum(weights) - weights[i]
    others = [w / rest if rest else 1 / (len(weights) - 1) for w in weights]
    return [x if j == i else (1 - x) * w for j, w in enumerate(others)]


def minimise(
    evaluate: Callable[[Point, str], float],
    known: Callable[[Point], bool],
    point: Point,
    over: Sequence[str],
    n: int,
    budget: int,
    ranges: dict = RANGES,
) -> Point:
    """Searches along each direction in turn until a round does not help or the budget is spent. -> the best point.

    evaluate(point, label): the value to minimise. budget: maximum number of points to evaluate. known(point): already
    evaluated, so it costs no budget. ranges: as RANGES.
    """
    spent, value, rounds = int(not known(point)), evaluate(point, "start"), 0
    while True:
        before, directions = value, len(search_directions(point, over, n))
        for i in range(directions):
            # computed again, because the point may have moved
            label, name, x, point_at = search_directions(point, over, n)[i]
            low, high = ranges[name]
            step = (high - low) / 50
            first = [x - 4 * step, x + 4 * step] if rounds else FIRST[name]  # after a round the optimum is near
            first = dict.fromkeys(min(max(y, low), high) for y in first)
            tried, todo = {x: value}, [y for y in first if abs(y - x) >= step]
            while (x := todo.pop(0) if todo else next_point(tried, low, high, step)) is not None:
                candidate = point_at(x)
                spent += not known(candidate)
                if spent > budget:
                    return point
                tried[x] = evaluate(candidate, f"{label} {x:.3g}")
                if tried[x] < value:
                    point, value = candidate, tried[x]
        rounds += 1
        if value >= before or directions == 1:  # a second round along one line finds nothing new
            return point


def greedy_soup(evaluate: Callable[[Point, str], float], n: int) -> Point:
    """Greedy soup (arXiv 2203.05482, Recipe 1). Returns the soup.

    Takes the models from best to worst. Each joins the plain mean if the value does not get worse.
    """
    soup = lambda members: {"weights": [float(i in members) / len(members) for i in range(n)]}
    values = [evaluate(soup([i]), f"model {i + 1} alone") for i in range(n)]
    order = sorted(range(n), key=values.__getitem__)
    members, value = order[:1], values[order[0]]
    for i in order[1:]:
        candidate = evaluate(soup([*members, i]), f"and model {i + 1}")
        if candidate <= value:
            members, value = [*members, i], candidate
    evaluate(soup(range(n)), "all, the uniform soup")
    return soup(members)
