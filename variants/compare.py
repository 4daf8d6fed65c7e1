"""Compares the variants: reads the evaluations of variants/run.sh and writes one table.

    python -m variants.compare best FOLDER                          # prints the better learning rate
    python -m variants.compare record FOLDER --rate 5e-4 ...        # writes OUT/ARM.json
    python -m variants.compare table docs/results/variants          # prints the table and the findings

Each arm is a folder of checkpoints RATE-SEED. An arm is compared with its baseline on the same questions and seeds.
"""

import glob
import json
import os
import re
from argparse import Namespace

import numpy as np

from core.files import ROOT, InputError, atomic_write, cli
from core.flags import Parser
from core.records import read_jsonl
from evaluation.stats import holm, resampled_means, seeds_difference

PARTS = ("test", "withheld")  # the parts of the questions that the table is about
PLAIN = ("sft", "kto", "random_half")  # baselines; the findings cover the arms that are compared with one of them

# ---------------------------------------------------------------------------------------------------------------------
# From evaluations to results


def verdicts(folder: str) -> dict[str, dict[str, str]]:
    """The evaluation of an arm -> {checkpoint: {part: a 0 or 1 for each question}}."""
    found = {}
    for _, sample in read_jsonl(os.path.join(folder, "eval", "samples.jsonl")):
        parts = found.setdefault(sample["checkpoint"], {"validation": "", "test": "", "withheld": ""})
        parts[sample["id"].split("-")[0]] += str(int(sample["correct"]))
    return found


def share_right(bits: str) -> float:
    return bits.count("1") / len(bits)


def validation_scores(found: dict[str, dict[str, str]]) -> dict[str, float]:
    """{learning rate: share of the validation questions that its checkpoint with seed 0 answers right}."""
    return {name[:-2]: share_right(parts["validation"]) for name, parts in found.items() if name.endswith("-0")}


def best_rate(folder: str) -> str:
    """The learning rate with the best validation score, the lower one on a tie."""
    scores = validation_scores(verdicts(folder))
    return max(sorted(scores, key=float), key=scores.__getitem__)


def cpu_seconds(path: str) -> float:
    """The CPU seconds of a command, from a file with its user and system time."""
    with open(path) as f:
        return sum(map(float, f.read().split()))


def lines_of_code(arm: str, command: str) -> int | None:
    """The lines of the variant's file as it is now. None for the plain scripts."""
    found = re.search(r"variants\.(\w+)", command)
    path = os.path.join(ROOT, "variants", f"{found[1] if found else arm}.py")
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as f:
        return len(f.readlines())


def record_arm(args: Namespace) -> None:
    """Writes the results of an arm: OUT/ARM.json."""
    found, name = verdicts(args.folder), os.path.basename(os.path.normpath(args.folder))
    runs = [found[f"{args.rate}-{seed}"] for seed in range(3)] if args.rate else list(found.values())
    command = re.sub("^.*python ", "", " ".join(args.command))
    result = {"arm": name, "baseline": args.baseline, "command": command, "rate": args.rate}
    if args.rate:
        result["validation"] = {rate: round(score, 4) for rate, score in validation_scores(found).items()}
        files = [os.path.join(args.folder, f"{args.rate}-{seed}.seconds") for seed in range(3)]
        result["cpu_seconds"] = [round(cpu_seconds(path), 1) for path in files]
    result |= {part: [run[part] for run in runs] for part in PARTS}
    with atomic_write(os.path.join(args.out, f"{name}.json")) as f:
        json.dump(result, f, indent=1)
        f.write("\n")


# ---------------------------------------------------------------------------------------------------------------------
# From results to the table


def read_arms(folder: str) -> dict[str, dict]:
    """The results of all arms -> {arm: result}, with "test" and "kept" as (S, n) verdicts.

    kept: the questions of the withheld tasks that the base answers right.
    """
    results = {}
    for path in glob.glob(os.path.join(folder, "*.json")):
        with open(path, encoding="utf-8") as f:
            result = json.load(f)
        results[result["arm"]] = result
    if "base" not in results:
        raise InputError(f"{folder}: holds no base.json; run variants/run.sh")
    matrix = lambda rows: np.array([[int(bit) for bit in row] for row in rows], dtype=float)
    known = matrix(results["base"]["withheld"])[0] == 1
    for result in results.values():
        result["test"], result["kept"] = matrix(result["test"]), matrix(result["withheld"])[:, known]
    return results


def compare_arms(results: dict[str, dict]) -> dict[str, dict]:
    """{arm: {"test", "kept": difference to the baseline, with Holm's "p_holm"}} for arms whose baseline is there.

    The correction is for all arms with a plain baseline together, for each column by itself.
    """
    found = {
        name: {part: seeds_difference(results[result["baseline"]][part], result[part]) for part in ("test", "kept")}
        for name, result in results.items()
        if result["baseline"] in results
    }
    arms = [name for name in found if name not in PLAIN and results[name]["baseline"] in PLAIN]
    for part in ("test", "kept"):
        for name, p in zip(arms, holm([found[name][part]["p"] for name in arms])):
            found[name][part]["p_holm"] = p
    return found


def percent(x: float) -> str:
    return f"{100 * x:.1f}"


def with_interval(change: dict) -> str:
    low, high = (100 * bound for bound in change["interval"])
    return f"{100 * change['difference']:+.1f} ({low:+.1f} to {high:+.1f})"


def arm_table(results: dict[str, dict]) -> str:
    """One row per arm, below its baseline, the best first."""
    changes = compare_arms(results)
    head = "| arm | score | vs baseline | kept | vs baseline | CPU s | lines | rate |\n" + "| --- " * 8 + "|\n"
    rows = []

    def add(name: str) -> None:
        result = results[name]
        cells = [f"**{name}**" if result["baseline"] in ("", "base") else name]
        for part in ("test", "kept"):
            error = f" ± {percent(resampled_means(result[part]).std())}" if part == "test" else ""
            change = with_interval(changes[name][part]) if name in changes else ""
            cells += [f"{percent(result[part].mean())}{error}", change]
        seconds, lines = result.get("cpu_seconds"), lines_of_code(name, result["command"])
        cells += [f"{sum(seconds) / len(seconds):.0f}" if seconds else "", str(lines or ""), result["rate"]]
        rows.append(f"| {' | '.join(cells)} |\n")
        below = [other for other, r in results.items() if r["baseline"] == name]
        for other in sorted(below, key=lambda other: -results[other]["test"].mean()):
            add(other)

    add("base")
    return head + "".join(rows)


def findings(results: dict[str, dict]) -> str:
    """Markdown bullets: the arms that differ significantly from their baseline, and those without a gain."""
    changes = {name: c for name, c in compare_arms(results).items() if "p_holm" in c["test"]}

    def significant(part: str, sign: int) -> set[str]:
        return {n for n, c in changes.items() if c[part]["p_holm"] < 0.05 and sign * c[part]["difference"] > 0}

    better, worse, keeps, forgets = (significant(part, sign) for part in ("test", "kept") for sign in (1, -1))
    groups = {
        "Scores higher": better,
        "Scores lower": worse,
        "Forgets less": keeps,
        "Forgets more": forgets,
        "No gain in score or forgetting": set(changes) - better - keeps,
    }
    return "".join(f"- {title}: {', '.join(sorted(names)) or 'none'}.\n" for title, names in groups.items())


# ---------------------------------------------------------------------------------------------------------------------
# The command


def main() -> None:
    p = Parser(description=__doc__)
    commands = p.add_subparsers(dest="command_name", required=True)
    best_parser = commands.add_parser("best", help="print the better learning rate of an arm")
    record_parser = commands.add_parser("record", help="write the results of an arm as JSON")
    table_parser = commands.add_parser("table", help="print the table of all arms and the findings")
    for parser in (best_parser, record_parser):
        parser.add_argument("folder", help="folder of the arm's checkpoints and of their evaluation, eval/")
    rate = "the chosen learning rate; without it the arm is not trained"
    record_parser.add_argument("--rate", type=str, default="", help=rate)
    record_parser.add_argument("--baseline", type=str, default="", help="the arm to compare with")
    record_parser.add_argument("--out", default="runs/variants/results", help="folder of the JSON files")
    command = "command that trained the arm; give this flag last"
    record_parser.add_argument("--command", nargs="...", default=[], help=command)
    table_parser.add_argument("folder", help="folder of the JSON files")
    table_parser.add_argument("--out", help="also write both to this Markdown file")
    args = p.parse_args()
    if args.command_name == "best":
        print(best_rate(args.folder))
    elif args.command_name == "record":
        record_arm(args)
    else:
        results = read_arms(args.folder)
        text = f"{arm_table(results)}\n{findings(results)}"
        if args.out:
            with atomic_write(args.out) as f:
                f.write(text)
        print(text, end="")


if __name__ == "__main__":
    cli(main)
