"""Collects a study's results in one small JSON file. experiments.report writes docs/REPORT.md from it.

    python -m experiments.collect --out runs/study --student SmolLM2-135M-Instruct --teacher Qwen2.5-Coder-1.5B-Instruct

    {"student", "teacher": names   "commands": {step: command}   "seconds": {step: float}
     "trained_tokens": {arm: tokens of all steps}
     "chosen": {"sft" or "kto": {"lr", "dev": {lr: score}}}
     "data", "own_data", "general_data", "general_own_data": {"instructions", "sft", "kto", "kto_desirable": counts,   "steps": {step: [in, out]},
              "sft_writers": {writer: SFT examples},   "sft_unchecked": SFT examples without a verdict,   "followed": {writer: [followed, responses that ended]}}   own_data: study 2, the last two: experiments.general
     "arms": {arm: {split: {task: {"right": "0110...", "reply_tokens": [int], "cut_off": int, "looping": int}}}}
     "values": {arm: {task: {"score", "stderr", "n", "right": as above, "ece"}}}   by likelihood; perplexity has the first three only
     "curves": {arm: {key: [float for each step]}}   "not_run": {arm: reason}, from --not-run}

Position i of "right" is the same question in all arms: 1 if the reply follows all its constraints.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from core.files import InputError, atomic_write, cli, read_json
from core.flags import Parser
from core.records import read_jsonl
from experiments.tables import NAMES

CURVES = ("loss", "grad_norm", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins")


def is_looping(text: str, times: int = 4) -> bool:
    """True if the text ends in a piece of 4 to 200 characters written `times` times in a row."""
    for size in range(4, min(200, len(text) // times) + 1):
        if text.endswith(text[-size:] * times):
            return True
    return False


def reply_counts(samples: Path) -> dict:
    """{task: verdicts, lengths and defects of the replies} from samples.jsonl of eval.py."""
    tasks = {}
    for _, row in read_jsonl(str(samples)):
        tasks.setdefault(row["task"], []).append(row)
    counts = {}
    for task, rows in tasks.items():
        rows.sort(key=lambda row: row["id"].zfill(12))
        counts[task] = {
            "right": "".join(str(int(row["correct"])) for row in rows),
            "reply_tokens": [row["reply_tokens"] for row in rows],
            "cut_off": sum(row["finish_reason"] == "length" for row in rows),
            "looping": sum(is_looping(row["reply"]) for row in rows),
        }
    return counts


def data_counts(folder: Path) -> dict:
    """Counts records, and the responses of each writer that follow all constraints. folder: --out of make_data.py."""
    followed = {}
    for _, record in read_jsonl(str(folder / "6_score.jsonl")):
        for writer, response in record["responses"].items():
            tally = followed.setdefault(writer, [0, 0])
            tally[0] += bool(response.get("verified"))
            tally[1] += 1
    kto = [row for _, row in read_jsonl(str(folder / "kto.jsonl"))]
    sft = [row for _, row in read_jsonl(str(folder / "sft.jsonl"))]
    unchecked = sum(row.get("scores", {}).get("verified") is None for row in sft)
    counts = {step: value["counts"] for step, value in read_json(folder / "state.json").items() if "counts" in value}
    return {
        "instructions": sum(1 for _ in read_jsonl(str(folder / "5_respond.jsonl"))),
        "sft": len(sft),
        "sft_writers": dict(sorted(Counter(row.get("writer", "unknown") for row in sft).items())),
        "sft_unchecked": unchecked,
        "kto": len(kto),
        "kto_desirable": sum(row["label"] for row in kto),
        "steps": {step: [some["in"], some["out"]] for step, some in counts.items() if {"in", "out"} <= some.keys()},
        "followed": followed,
    }


def likelihood_score(folder: Path, task: str) -> dict:
    """A task's score by likelihood and its verdicts. For the task perplexity: the perplexity per token."""
    (cells,) = read_json(folder / "results.json").values()
    cell = cells[task]
    if perplexity := cell.get("metrics", {}).get("perplexity"):
        return {**perplexity, "n": cell["n"]}
    rows = sorted((row for _, row in read_jsonl(str(folder / "samples.jsonl"))), key=lambda row: row["id"].zfill(12))
    right = "".join(str(int(row["correct"])) for row in rows)
    known = {key: cell[key] for key in ("score", "stderr", "n")}
    return known | {"right": right, "ece": cell["calibration"]["ece"]}


def portable_command(command: list[str], out: Path) -> list[str]:
    """A command without absolute paths: an absolute `out` becomes runs/NAME, any other path its last part."""
    if out.is_absolute():
        command = [word.replace(str(out), f"runs/{out.name}") for word in command]
    return [Path(word).name if word.startswith("/") else word for word in command]


def collect(out: Path, names: dict[str, str]) -> dict:
    """-> the content of the result file, see above. Missing results are left out."""
    stamps = {path.stem: read_json(path) for path in sorted((out / "steps").glob("*.json"))}
    result = {
        **names,
        "commands": {name: portable_command(stamp["command"], out) for name, stamp in stamps.items()},
        "seconds": {name: stamp["seconds"] for name, stamp in stamps.items()},
        "chosen": {path.stem[7:]: read_json(path) for path in sorted(out.glob("chosen-*.json"))},
        **{
            name.replace("-", "_"): data_counts(out / name)
            for name in ("data", "own-data", "general-data", "general-own-data")
            if name in stamps
        },
        "arms": {},
        "values": {},
        "curves": {},
        "trained_tokens": {},
    }
    for samples in sorted((out / "eval").glob("*/*/samples.jsonl")):
        split, arm = samples.parts[-3:-1]
        if split != "kept":
            result["arms"].setdefault(arm, {})[split] = reply_counts(samples)
    for file in sorted((out / "eval" / "kept").glob("*/results.json")):
        arm, task = file.parent.name.rsplit("-", 1)
        result["values"].setdefault(arm, {})[task] = likelihood_score(file.parent, task)
    for log in sorted(out.glob("*.run/log.jsonl")):
        if log.parent.resolve().stem not in stamps:
            continue  # not finished
        steps = [row for _, row in read_jsonl(str(log)) if "loss" in row]
        # without undesirable examples, their reward is null
        keys = [key for key in CURVES if steps and all(row.get(key) is not None for row in steps)]
        result["trained_tokens"][log.parent.stem] = sum(row["tokens"] for row in steps)
        result["curves"][log.parent.stem] = {key: [round(row[key], 5) for row in steps] for key in keys}
    return result


def main() -> None:
    p = Parser(description=__doc__)
    p.add_argument("--out", default="runs/study", help="folder of the studies")
    p.add_argument("--student", required=True, help="the student's name in the report")
    p.add_argument("--teacher", required=True, help="the teacher's name")
    p.add_argument("--into", help="JSON file to write (default: experiments/results/STUDENT.json)")
    p.add_argument("--not-run", nargs="+", default=[], metavar="ARM=REASON", help="why an arm has no results")
    args: argparse.Namespace = p.parse_args()
    if not Path(args.out, "steps").is_dir():
        raise InputError(f"{args.out}: holds no steps of a study; run python -m experiments.data first")
    names = {"student": args.student, "teacher": args.teacher}
    reasons = dict(text.partition("=")[::2] for text in args.not_run)
    if unknown := [arm for arm, reason in reasons.items() if arm not in NAMES or not reason]:
        raise InputError(f"--not-run {unknown[0]}: is not ARM=REASON; the arms are {', '.join(NAMES)}")
    result = collect(Path(args.out), names) | {"not_run": reasons}
    into = args.into or f"experiments/results/{args.student}.json"
    with atomic_write(into) as f:
        json.dump(result, f, indent=1)
    print(f"wrote {into}: {len(result['arms'])} arms\nnext: python -m experiments.report")


if __name__ == "__main__":
    cli(main)
