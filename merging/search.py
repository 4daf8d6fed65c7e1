"""merge.py search: find the weights (and density, lambda, LiNeS alpha) that do best on held-out data.

    python merge.py search --method linear --models sft kto --data heldout.jsonl --out search.json
    python merge.py search --method ties --base base --models sft kto --over weights density --tasks gsm8k --out s.json
    python merge.py search --method linear --models run/step-* --greedy --data heldout.jsonl --out soup.json

Each point is merged into one model in memory; no checkpoint is written. Part of the data is set aside: the search never
uses it, and the final scores use nothing else.
"""

import argparse
import json
import random
import shlex
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from core.checkpoint import Checkpoint
from core.conversations import sft_conversations
from core.devices import DTYPES
from core.files import InputError, atomic_write
from core.records import read_records
from core.tokenizer import Tokenizer
from evaluation import benchmarks
from evaluation.replies import ask_checkpoint
from evaluation.stats import ratio_stderr
from merging.flags import DELLA, OPTIONS, RANDOM, fill_options, format_lines
from merging.inputs import open_inputs
from merging.minimise import RANGES, Point, greedy_soup, minimise
from model import Qwen2
from training.examples import encode_chats, held_out_lines
from training.logps import sequence_logps

# ---------------------------------------------------------------------------------------------------------------------
# From a point to a merge


def valid_ranges(args: argparse.Namespace, n: int) -> dict[str, tuple[float, float]]:
    """RANGES, restricted to values that merge.py accepts with these options. n: the number of models."""
    ranges = dict(RANGES)
    if args.method in DELLA:  # density ± epsilon must be between 0 and 1
        ranges["density"] = low, high = args.epsilon + 0.01, 0.99 - args.epsilon
        if "density" in args.over and low >= high:
            raise InputError(f"--epsilon {args.epsilon}: leaves no density to search; use a smaller one")
    if args.method == "expo":  # goes beyond the model
        ranges["weight"] = (1.02, 2.0)
    if n == 1 and args.normalize and "weights" in args.over:
        raise InputError("--over weights: normalizing a single weight always gives 1; add --no-normalize")
    return ranges


def args_at(args: argparse.Namespace, point: Point) -> argparse.Namespace:
    """args with the numbers of a point."""
    new = argparse.Namespace(**vars(args) | {"weights": point["weights"]})
    if "density" in point:
        new.densities = [point["density"]] * len(new.densities)
    if "lambda" in point:
        new.scale = point["lambda"]
    if "lines" in point:
        new.lines = (point["lines"], 1 - point["lines"])
    return new


def start_points(args: argparse.Namespace, n: int) -> tuple[Point, list[Point]]:
    """-> (the point given by the flags, the points that are always scored).

    The latter are the paper's two pairs of weights if two weights are searched, else the point of the flags.
    """
    total = sum(args.weights) if n > 1 and "weights" in args.over and abs(sum(args.weights)) > 1e-8 else 1.0
    start = {"weights": [w / total for w in args.weights]}
    own = {"density": args.densities[0], "lambda": args.scale, "lines": (args.lines or (1.0,))[0]}
    own["lines"] = 1.0 if own["lines"] is None else own["lines"]  # --lines auto
    own = {name: own[name] for name in args.over if name != "weights"}
    pairs = [[0.5, 0.5], [0.05, 0.95]]
    fixed = [{"weights": pair} | own for pair in pairs] if n == 2 and "weights" in args.over else [start | own]
    return start | own, fixed


@torch.no_grad()
def merge_into(model: Qwen2, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copies the merged tensors into the model."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors:
        parameters[name].copy_(tensor)


# ---------------------------------------------------------------------------------------------------------------------
# The value of a merge


def split_aside(items: list, share: float, seed: int) -> tuple[list, list]:
    """Splits items at random into (those for the search, those set aside), each in the order of items."""
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    n_final = round(share * len(items))
    return [items[i] for i in sorted(order[n_final:])], [items[i] for i in sorted(order[:n_final])]


def measure_loss(args: argparse.Namespace, model: Qwen2, tokenizer: Tokenizer, examples: list) -> tuple[list, list]:
    """(negative log-probability, number of supervised tokens) of each example, as two lists."""
    logps = sequence_logps(model, examples, args.micro_tokens)
    return (-logps).tolist(), [sum(supervised[1:]) for _, supervised in examples]


def measure_wrong(args: argparse.Namespace, model: Qwen2, tokenizer: Tokenizer, questions: list) -> tuple[list, list]:
    """(-1 for each question that eval.py counts as right, else 0; ones)."""
    values = [0.0] * len(questions)
    for i, record in ask_checkpoint(model, tokenizer, questions, args):
        values[i] = -float(benchmarks.score_reply(questions[i], record)[1])
    return values, [1] * len(values)


@dataclass
class Objective:
    """What a search minimises: the sum of the records' values over the sum of their sizes."""

    name: str
    measure: Callable  # (args, model, tokenizer, records) -> (value of each record, size of each record)
    sign: int  # the score is sign * value

    def scored(self, values: list[float], sizes: list[int]) -> dict[str, float]:
        value, stderr = ratio_stderr(values, sizes)
        return {"score": self.sign * value, "stderr": stderr}


LOSS = Objective("loss per token", measure_loss, 1)
RIGHT = Objective("share right", measure_wrong, -1)


@dataclass
class Trials:
    """The points that a search has tried."""

    args: argparse.Namespace
    model: Qwen2  # receives the merged weights
    tokenizer: Tokenizer
    merged: Callable[[Point], Iterable]  # the merged tensors at a point, as (name, tensor)
    objective: Objective
    records: list  # those for the search
    scores: dict[str, dict] = field(default_factory=dict)  # {point_key(point): the point, its score and stderr}

    def measure(self, point: Point, records: list) -> tuple[list, list]:
        """Merges at the point. -> (value of each record, size of each record)."""
        merge_into(self.model, self.merged(point))
        return self.objective.measure(self.args, self.model, self.tokenizer, records)

    def known(self, point: Point) -> bool:
        return point_key(point) in self.scores

    def evaluate(self, point: Point, label: str) -> float:
        """The value to minimise. Prints a line for a new point."""
        key = point_key(point)
        if key not in self.scores:
            self.scores[key] = {**point, **self.objective.scored(*self.measure(point, self.records))}
            tqdm.write(f"{label:24s} {point_line(self.scores[key], self.objective)}")
        return self.scores[key]["score"] * self.objective.sign

    def best_weights(self) -> Point:
        """The weights of the best point."""
        best = min(self.scores.values(), key=lambda tried: tried["score"] * self.objective.sign)
        return {"weights": best["weights"]}


# ---------------------------------------------------------------------------------------------------------------------
# The command


def read_items(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[list, list]:
    """The encoded examples or the questions: (used by the search, set aside)."""
    if args.data:
        records = read_records(args.data, sft_conversations)
        items, _, cuts = encode_chats(records, tokenizer, args.max_len)
        for line in held_out_lines(len(records), len(items), cuts, args.max_len):
            print(line)
    else:
        items = [question for task in dict.fromkeys(args.tasks) for question in benchmarks.load_questions(task, args)]
    for_search, for_final = split_aside(items, args.aside, args.seed)
    if min(len(for_search), len(for_final)) < 2:
        sources = ", ".join(args.data or args.tasks)
        raise InputError(f"{sources}: {len(items)} usable records; the search needs 2 and the final scores need 2")
    return for_search, for_final


def main(args: argparse.Namespace, merge_checkpoints: Callable) -> None:
    """args: from merging.flags.parse_args. merge_checkpoints: the function of merge.py."""
    args.micro_tokens = args.micro_tokens or (2048 if args.device == "cpu" else 16384)
    base, models = open_inputs(args)
    tokenizer = Tokenizer(base or models[0])
    for_search, for_final = read_items(args, tokenizer)
    model = Qwen2.from_pretrained(base or models[0], torch.float32, args.device)
    model.compute_dtype = DTYPES[args.dtype]
    n, started, objective = len(models), time.time(), LOSS if args.data else RIGHT
    ranges = valid_ranges(args, n)
    split = f"{len(for_search)} records for the search, {len(for_final)} set aside"
    print(f"{split}; {objective.name} ± one standard error")
    merged = lambda point: merge_checkpoints(args_at(args, point), base, models, torch.float32, quiet=True)
    trials = Trials(args, model, tokenizer, merged, objective, for_search)
    start, fixed = start_points(args, n)
    best = min([*fixed, start], key=lambda point: trials.evaluate(point, "fixed"))
    if args.greedy:
        fixed.append(greedy_soup(trials.evaluate, n))
        best = trials.best_weights()
    else:
        budget = args.evaluations - len(trials.scores)
        best = minimise(trials.evaluate, trials.known, best, args.over, n, budget, ranges)
    points = list({point_key(point): point for point in [best, *fixed]}.values())
    final = final_scores(points, [trials.measure(point, for_final) for point in points], objective)
    record = {
        "method": args.method,
        "models": [m.source for m in models],
        "base": base.source if base else None,
        "by": args.data or args.tasks,
        "what": objective.name,
        "points": list(trials.scores.values()),
        "best": best,
        "final": final,
    }
    with atomic_write(args.out) as f:
        json.dump(record, f, indent=1)
    print_report(args, final, objective, f"{len(trials.scores)} points in {time.time() - started:.0f} s")
    print(f"next:  {merge_command(args, args_at(args, best), models)}")


def point_key(point: Point) -> str:
    """A key that is equal for points that are equal up to rounding."""
    return str([np.round(point[name], 9).tolist() for name in sorted(point)])


def final_scores(points: list[Point], measured: list[tuple[list, list]], objective: Objective) -> list[dict]:
    """The final scores of the points, each with its paired difference from the first."""
    final, (reference, _) = [], measured[0]
    for point, (values, sizes) in zip(points, measured):
        difference, stderr = ratio_stderr([v - r for v, r in zip(values, reference)], sizes)
        versus = {"versus_best": objective.sign * difference, "versus_best_stderr": stderr}
        final.append({**point, **objective.scored(values, sizes), **versus})
    return final


def point_line(scored: dict, objective: Objective) -> str:
    """A scored point in one line."""
    words = [":".join(f"{w:.3g}" for w in scored["weights"])]
    words += [f"{name} {scored[name]:.3g}" for name in ("density", "lambda", "lines") if name in scored]
    return f"{' '.join(words)}  {objective.name} {scored['score']:.5f} ± {scored['stderr']:.5f}"


def print_report(args: argparse.Namespace, final: list[dict], objective: Objective, summary: str) -> None:
    print(f"\n{summary}; on the records set aside:")
    for scored in final:
        difference = f"({scored['versus_best']:+.5f} ± {scored['versus_best_stderr']:.5f} to the best)"
        print(f"{point_line(scored, objective)}  {'the best' if scored is final[0] else difference}")
    print(f"wrote {args.out}: all points and final scores")
    picture = args.out.removesuffix(".json") + ".png"
    print("draw:  " + shlex.join(["python", "-m", "tools.plot", args.out, "--out", picture]))


def merge_command(args: argparse.Namespace, best: argparse.Namespace, models: list[Checkpoint]) -> str:
    """The command that writes the merge of the best point. best: args_at() of that point."""
    words = ["python", "merge.py", "--method", args.method, "--models"]
    # a model of weight 0 is left out of a mean; the other methods match densities and random masks by position
    words += [f"{m.source}:{w:.6g}" for m, w in zip(models, best.weights) if w or args.method != "linear"]
    words += ["--base", args.base] if args.base else []
    default = argparse.Namespace(method=args.method, **dict.fromkeys(attribute for attribute, _, _ in OPTIONS.values()))
    fill_options(default, len(models))  # the options of the method when none are given
    for flag, (attribute, scope, _) in OPTIONS.items():
        attribute = "densities" if flag == "density" else attribute
        value = getattr(best, attribute)
        if args.method not in scope or flag == "t" or value == getattr(default, attribute):
            continue
        if flag == "normalize":
            words.append("--normalize" if value else "--no-normalize")
        elif flag == "lines":
            words += ["--lines", format_lines(value)]
        else:
            values = value if isinstance(value, list) else [value]
            words += [f"--{flag}", *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)]
    words += ["--seed", str(args.seed)] if args.method in RANDOM else []
    words += ["--arithmetic", args.arithmetic] if args.arithmetic != "float32" else []
    words += ["--resize"] * args.resize + ["--allow-tokenizer-mismatch"] * args.allow_tokenizer_mismatch
    return shlex.join([*words, "--out", "fused"])
