"""The search of merge.py: which weights (density, lambda, LiNeS alpha) do best on held-out data.

    python merge.py search --method linear --models sft kto --data heldout.jsonl --out search.json
    python merge.py search --method ties --base base --models sft kto --over weights density --tasks gsm8k --out search.json
    python merge.py search --method linear --models run/step-* --greedy --data heldout.jsonl --out soup.json

Each point is merged straight into one model in memory; no checkpoint is written. A part of the data is set aside: the
search never sees it, and the final scores are from it alone.
"""

import argparse
import json
import random
import time

import numpy as np
import torch
from tqdm import tqdm

from core.conversations import sft_conversations
from core.files import InputError, atomic_write
from core.flags import DEVICE, DTYPE, DTYPES, Parser, at_least, number, torch_device
from core.records import read_records
from core.tokenizer import Tokenizer
from evaluation import benchmarks
from evaluation.replies import ask_checkpoint
from evaluation.stats import ratio_stderr
from merging.engine import merged
from merging.inputs import DELLA, OPTIONS, RANDOM, add_method_flags, fill_options, open_inputs
from model import Qwen2
from training.examples import encode_chats
from training.logps import sequence_logps

# ---------------------------------------------------------------------------------------------------------------------
# The search: few evaluations of a function of one number at a time

# What may be searched: the range, and what is tried first. "weight": that of a single model; "lines": LiNeS' alpha
RANGES = {
    "weights": (0.0, 1.0),
    "weight": (0.0, 2.0),
    "density": (0.02, 1.0),
    "lambda": (0.0, 3.0),
    "lines": (0.0, 1.0),
}
FIRST = {"weights": (0.5, 0.95, 0.0, 1.0), "weight": (0.5, 1.0, 1.3), "density": (0.2, 0.5, 1.0),
         "lambda": (0.5, 1.0, 1.5), "lines": (0.3, 0.7, 1.0)}  # fmt: skip


def next_point(tried, low, high, tolerance):
    """Where in [low, high] to look next for the least of a smooth function. tried: {x: value}. None: near enough.

    The vertex of the parabola through the best point and its neighbours, which for the loss between two fine-tunes of
    one base is nearly right at once; a golden section of the wider side where there is no such vertex.
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
    x = min(max(x, low), high)  # the start may lie outside
    return x if min(abs(x - y) for y in xs) >= tolerance else None


def search_directions(point, over, n):
    """The lines through a point along which to search: (label, name, the point's own x, function from x to a point).

    point: {"weights": [...]} and what else is searched, by its name. Along a line of weights one model has weight x and
    the others share 1 - x as they do in the point; a single model has x itself.
    """
    found = []
    for name in over:
        if name != "weights":
            found.append((name, name, point[name], lambda x, name=name: point | {name: x}))
        elif n == 1:
            found.append(("weight", "weight", point["weights"][0], lambda x: point | {"weights": [x]}))
        else:
            for i in range(1, n):
                line = lambda x, i=i: point | {"weights": with_share(point["weights"], i, x)}
                found.append((f"weight of model {i + 1}", name, point["weights"][i], line))
    return found


def with_share(weights, i, x):
    """The weights with x for model i, the others scaled so that all add up to 1."""
    rest = sum(weights) - weights[i]
    others = [w / rest if rest else 1 / (len(weights) - 1) for w in weights]
    return [x if j == i else (1 - x) * w for j, w in enumerate(others)]


def search(evaluate, known, point, over, n, budget, ranges=RANGES):
    """Line after line until a round of them makes nothing better or the budget is spent. -> the best point.

    evaluate(point, label) -> the value to make small. known(point): whether it is worked out already and so is free.
    budget: how many points are worked out at most. ranges: as RANGES.
    """
    spent, value, rounds = int(not known(point)), evaluate(point, "start"), 0
    while True:
        before = value
        for i in range(len(search_directions(point, over, n))):
            label, name, x, at = search_directions(point, over, n)[
                i
            ]  # anew: the point may have moved along the line before
            low, high = ranges[name]
            near = (high - low) / 50
            first = [x - 4 * near, x + 4 * near] if rounds else FIRST[name]  # after a round the optimum is near
            first = dict.fromkeys(min(max(y, low), high) for y in first)
            tried, todo = {x: value}, [y for y in first if abs(y - x) >= near]
            while True:
                x = todo.pop(0) if todo else next_point(tried, low, high, near)
                if x is None:
                    break
                candidate = at(x)
                spent += not known(candidate)
                if spent > budget:
                    return point
                tried[x] = evaluate(candidate, f"{label} {x:.3g}")
                if tried[x] < value:
                    point, value = candidate, tried[x]
        rounds += 1
        if (
            value >= before or len(search_directions(point, over, n)) == 1
        ):  # a second round on one line finds nothing new
            return point


def greedy_soup(evaluate, n):
    """Greedy soup (arXiv 2203.05482, Recipe 1): from the best model down, each joins the plain mean if the held-out
    value does not get worse. -> the best point."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Merging into a model, and what it is worth


def allowed(args, n):
    """RANGES, less what merge.py refuses with these options. n: how many models."""
    ranges = dict(RANGES)
    if args.method in DELLA:  # density ± epsilon lies between 0 and 1
        ranges["density"] = low, high = args.epsilon + 0.01, 0.99 - args.epsilon
        if "density" in args.over and low >= high:
            raise InputError(f"--epsilon {args.epsilon}: leaves no density to search; give a smaller one")
    if args.method == "expo":  # goes beyond the model
        ranges["weight"] = (1.02, 2.0)
    if n == 1 and args.normalize and "weights" in args.over:
        raise InputError(
            "--over weights: a single model's is divided by itself and changes nothing; add --no-normalize"
        )
    return ranges


def args_at(args, point):
    """args with the numbers of a point in place of its own."""
    new = argparse.Namespace(**vars(args) | {"weights": point["weights"]})
    if "density" in point:
        new.densities = [point["density"]] * len(new.densities)
    if "lambda" in point:
        setattr(new, "lambda", point["lambda"])
    if "lines" in point:
        new.lines = [point["lines"], 1 - point["lines"]]
    return new


@torch.no_grad()
def merge_into(model, args, base, models):
    """Gives the model the weights of the merge."""
    parameters = dict(model.named_parameters())
    for name, tensor in merged(args, base, models, torch.float32, quiet=True):
        parameters[name].copy_(tensor)


def split(items, share, seed):
    """-> (what the search sees, what is set aside): a random part of each, the same for the same seed."""
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    aside = round(share * len(items))
    return [items[i] for i in sorted(order[aside:])], [items[i] for i in sorted(order[:aside])]


def losses(a, model, examples):
    """Minus the log-probability of each example, and its supervised tokens: their ratio of sums is the held-out loss."""
    logps = sequence_logps(model, examples, a.micro_tokens)
    return (-logps).tolist(), [sum(supervised[1:]) for _, supervised in examples]


def verdicts(a, model, tokenizer, questions):
    """The verdict of eval.py on each question, in their order."""
    found = [0.0] * len(questions)
    for i, record in ask_checkpoint(model, tokenizer, questions, a):
        found[i] = float(benchmarks.read(questions[i], record)[1])
    return found, [1] * len(found)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse(argv):
    description = "Find the weights of a merge that do best on held-out data."
    p = Parser(prog="merge.py search", description=description)
    add_method_flags(p)
    add = p.add_argument
    # search
    add("--over", nargs="+", choices=["weights", "density", "lambda", "lines"], default=["weights"],
        help="what is searched")  # fmt: skip
    add("--greedy", action="store_true", help="greedy soup: which of the models to average (--method linear)")
    add("--evaluations", type=at_least(3), default=15, help="most points to try; not with --greedy")
    # data
    add(
        "--data",
        nargs="+",
        metavar="F",
        help="JSON Lines of conversations, as of train_sft.py: minimise the loss on them",
    )
    add("--tasks", nargs="+", metavar="T", help="tasks of eval.py: maximise the share of questions answered right")
    add(
        "--aside",
        type=number(above=0, below=1),
        default=0.5,
        metavar="X",
        help="share of the data for the final score alone",
    )
    add("--max-len", type=at_least(2), default=1024, help="tokens; longer examples lose their end")
    add("--data-dir", default="data", help="where the tasks' questions lie")
    add("--limit", type=at_least(1), help="questions per task (default all)")
    add("--protocol", choices=["paper", "loglik"], default="paper", help="of eval.py")
    add("--allow-code-execution", action="store_true", help="run what the merges write, in a sandbox")
    add("--max-new-tokens", type=at_least(1), default=1000, help="most tokens of a reply")
    add("--batch-size", type=at_least(1), default=32, help="questions in flight")
    # machine
    add("--micro-tokens", type=at_least(1), default=16384 if DEVICE == "cuda" else 2048,
        help="tokens of one forward")  # fmt: skip
    add("--dtype", choices=DTYPES, default=DTYPE, help="to compute in")
    add("--device", type=torch_device, default=DEVICE, help="torch device")
    # output
    add("--out", required=True, metavar="F.json", help="JSON file of the points and the final scores")
    a = p.parse_args(argv)
    if bool(a.data) == bool(a.tasks):
        raise InputError("--data or --tasks: give one of them, what the merges are judged by")
    if a.greedy and a.method != "linear":
        raise InputError(f"--greedy: averages models, so --method is linear, not {a.method}")
    for name in a.over:
        scope = OPTIONS[name][0] if name != "weights" else a.method
        if a.method not in scope:
            raise InputError(f"--over {name}: changes nothing with --method {a.method}")
    if a.weights_for:
        raise InputError("--weights-for: the search sets one weight a model; give it to merge.py itself")
    return a


def main(argv):
    a = parse(argv)
    base, models = open_inputs(a)
    tokenizer = Tokenizer(base or models[0])
    model = Qwen2.from_pretrained(base or models[0], torch.float32, a.device)
    model.compute_dtype = DTYPES[a.dtype]
    if a.data:
        items, *_ = encode_chats(read_records(a.data, sft_conversations), tokenizer, a.max_len)
    else:
        items = [q for task in dict.fromkeys(a.tasks) for q in benchmarks.prepare(task, a)]
    seen, aside = split(items, a.aside, a.seed)
    if min(len(seen), len(aside)) < 2:
        found = f"{', '.join(a.data or a.tasks)}: {len(items)} usable records"
        raise InputError(f"{found}; the search needs 2 and the final score 2")
    n, ranges, started = len(models), allowed(a, len(models)), time.time()
    what = "loss per token" if a.data else "share right"

    def measure(point, part):
        """-> per record (a value to make small, what it is divided by)."""
        merge_into(model, args_at(a, point), base, models)
        values, sizes = losses(a, model, part) if a.data else verdicts(a, model, tokenizer, part)
        return (values if a.data else [-v for v in values]), sizes

    def said(values, sizes):
        value, stderr = ratio_stderr(values, sizes)
        return {"score": value if a.data else -value, "stderr": stderr}

    points = {}
    key = lambda point: str([np.round(point[k], 9).tolist() for k in sorted(point)])

    def evaluate(point, label):
        if key(point) not in points:
            cell = points[key(point)] = {**point, **said(*measure(point, seen))}
            tqdm.write(f"{label:24s} {describe(point)}  {what} {cell['score']:.5f} ± {cell['stderr']:.5f}")
        return points[key(point)]["score"] * (1 if a.data else -1)

    scale = sum(a.weights) if n > 1 and "weights" in a.over and abs(sum(a.weights)) > 1e-8 else 1.0
    start = {"weights": [w / scale for w in a.weights]}
    own = {"density": a.densities[0], "lambda": getattr(a, "lambda"), "lines": a.lines[0] if a.lines else 1.0}
    own = {name: own[name] for name in a.over if name != "weights"}
    pairs = [[0.5, 0.5], [0.05, 0.95]]  # the paper's two; where weights are not searched, those given stay
    fixed = [{"weights": pair} | own for pair in pairs] if n == 2 and "weights" in a.over else [start | own]
    print(f"{len(seen)} records for the search, {len(aside)} set aside; {what} ± one standard error")
    best = min([*fixed, start | own], key=lambda point: evaluate(point, "fixed"))
    if a.greedy:
        fixed.append(greedy_soup(evaluate, n))
        best = min(({"weights": p["weights"]} for p in points.values()), key=lambda point: evaluate(point, ""))
    else:
        best = search(evaluate, lambda p: key(p) in points, best, a.over, n, a.evaluations - len(points), ranges)

    final, reference = [], None
    for point in {key(p): p for p in [best, *fixed]}.values():
        values, sizes = measure(point, aside)
        reference = reference or values
        apart, error = ratio_stderr([v - r for v, r in zip(values, reference)], sizes)
        versus = {"versus_best": apart if a.data else -apart, "versus_best_stderr": error}
        final.append({**point, **said(values, sizes), **versus})
    record = {"method": a.method, "models": [m.source for m in models], "base": base.source if base else None,
              "by": a.data or a.tasks, "what": what, "points": list(points.values()), "best": best, "final": final}  # fmt: skip
    with atomic_write(a.out) as f:
        json.dump(record, f, indent=1)
    print(f"\n{len(points)} points in {time.time() - started:.0f} s; on what was set aside:")
    for cell in final:
        apart = f"({cell['versus_best']:+.5f} ± {cell['versus_best_stderr']:.5f} to the best)"
        print(
            f"{describe(cell)}  {what} {cell['score']:.5f} ± {cell['stderr']:.5f}  {'the best' if cell is final[0] else apart}"
        )
    print(f"wrote {a.out}: all points and final scores")
    print(f"draw:  python -m tools.plot {a.out} --out {a.out.removesuffix('.json')}.png")
    print(f"next:  {command(a, args_at(a, best), models)}")


def describe(point):
    """A point in words."""
    text = ":".join(f"{w:.3g}" for w in point["weights"])
    return " ".join(
        [text, *(f"{k} {point[k]:.3g}" for k in ("density", "lambda", "lines") if point.get(k) is not None)]
    )


def command(a, best, models):
    """The command that writes the merge of the best point."""
    words = ["python merge.py --method", a.method, "--models"]
    # a model of weight 0 is left out of a mean; elsewhere it has its place among the densities and the random masks
    words += [f"{m.source}:{w:.6g}" for m, w in zip(models, best.weights) if w or a.method != "linear"]
    words += ["--base", a.base] if a.base else []
    plain = argparse.Namespace(method=a.method, **dict.fromkeys(OPTIONS))
    fill_options(plain, len(models))  # what the method does with no option given
    for name, (methods, _) in OPTIONS.items():
        value, default = ((x.densities if name == "density" else getattr(x, name)) for x in (best, plain))
        if a.method in methods and value != default and name != "t":
            if name == "normalize":
                words.append("--normalize" if value else "--no-normalize")
            elif name == "lines":
                words += ["--lines", f"{value[0]:g}:{value[1]:g}"]
            else:
                values = value if isinstance(value, list) else [value]
                words += [f"--{name}", *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)]
    words += ["--seed", str(a.seed)] if a.method in RANDOM else []
    words += ["--arithmetic", a.arithmetic] if a.arithmetic != "float32" else []
    words += ["--resize"] * a.resize + ["--allow-tokenizer-mismatch"] * a.allow_tokenizer_mismatch
    return " ".join([*words, "--out fused"])
