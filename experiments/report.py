"""Writes docs/REPORT.md and its pictures from the studies' result files.

    python -m experiments.report

Every figure, interval and verdict in the report is computed from the result files (experiments.collect).
"""

import argparse
import os
import re
from pathlib import Path

from core.files import InputError, atomic_write, cli, read_json
from core.flags import Parser
from core.records import expand
from experiments import tables
from experiments.general_section import general_section
from experiments.pictures import general_picture, pictures, scores_picture
from experiments.repeat import CORES, flag, repeat_section
from experiments.seeds_section import loss_rates_table, seeds_table, seeds_text
from experiments.tables import NAMES, STUDIES, kept_tables, kept_verdicts, markdown_table, split_verdicts

GROUPS = ("commands", "seconds", "trained_tokens", "chosen", "arms", "values", "curves", "not_run")
NOTHING = "- Nothing.\n"
NOT_YET = "No benchmark has been run yet.\n\n"
HEADINGS = {
    "opposite": "Contradicted: the opposite was measured",
    "held": "Confirmed",
    "undecided": "Undecided: no significant difference",
}
CAPTIONS = {
    "report-scores.svg": "Score by arm. Dashed: the first arm. The intervals are of single scores. The tables compare arms in pairs, "
    "which is more precise.",
    "report-kto.svg": "Rewards and KL estimate of the KTO arms, running means over 5 steps.",
    "report-fusion.svg": "Score over the fusion weight: 0 is SFT, 1 is SFT, then KTO.",
    "report-followed.svg": "Responses to the training instructions that follow all constraints, by writer, with 95 % "
    "interval. Incomplete responses are not counted. Dashed: the student's greedy responses.",
}

# ---------------------------------------------------------------------------------------------------------------------
# Result files


def check_result(result: dict, path: str) -> None:
    """InputError unless experiments.collect wrote the file and its arms answer the same questions."""
    for key in ("student", "teacher"):
        if not isinstance(result.get(key), str):
            raise InputError(f"{path}: has no {key!r}; write it with python -m experiments.collect")
    for key in (*GROUPS, "data", "own_data", "general_data", "general_own_data"):
        if not isinstance(result.setdefault(key, {}), dict):
            raise InputError(f"{path}: {key!r} is not an object; write the file with python -m experiments.collect")
    sizes = {}
    for group in ("arms", "values"):
        for where, arm, cell in verdict_cells(result, group, path):
            right = cell.get("right")
            if not isinstance(right, str) or not right or set(right) - {"0", "1"}:
                raise InputError(f"{path}: {group} {arm}, {where}: 'right' is not a text of 0 and 1")
            first, n = sizes.setdefault(where, (arm, len(right)))
            if n != len(right):
                raise InputError(
                    f"{path}: {where}: {arm} has {len(right)} verdicts, {first} {n}; evaluate both on the same questions"
                )


def verdict_cells(result: dict, group: str, path: str) -> list[tuple[str, str, dict]]:
    """-> [(split and task, or task), arm, the cell that holds "right"] of all arms."""
    cells = []
    try:
        for arm, some in result[group].items():
            if group == "values":
                cells += [(task, arm, cell) for task, cell in some.items() if "right" in cell]
            else:
                cells += [(f"{split} {task}", arm, cell) for split, by in some.items() for task, cell in by.items()]
    except (AttributeError, TypeError):
        raise InputError(f"{path}: {group!r} is malformed; write the file with python -m experiments.collect") from None
    return cells


def read_results(paths: list[str]) -> list[dict]:
    """-> one result for each pair of student and teacher, the one with most arms first.

    Files of the same pair are joined: a later file adds arms and replaces those of the same name."""
    joined = {}
    for path in paths:
        result = read_json(path)
        check_result(result, path)
        pair = joined.setdefault((result["student"], result["teacher"]), {})
        for key, value in result.items():
            if isinstance(value, dict):
                pair.setdefault(key, {}).update(value)
            else:
                pair.setdefault(key, value)
        check_result(pair, path)
    return sorted(joined.values(), key=lambda result: -len(result["arms"]))


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def tested_claims(result: dict) -> list[tuple[str, str, str]]:
    """-> (heading of HEADINGS, claim, what was measured) of every claim that the result can test."""
    test = split_verdicts(result, "test")
    tested = [("", rows, test) for _, rows, _, _ in STUDIES]
    tested += [("", tables.kept_rows(task), verdicts) for task, verdicts in kept_verdicts(result).items()]
    for task, by in tables.general_verdicts(result).items():
        tested += [(f"on {task} ", rows, by) for rows in (tables.GENERAL, tables.GENERAL_OWN)]
    claims, seen = [], set()  # table 2 repeats a comparison of table 1
    for where, rows, verdicts in tested:
        for row, comparison in tables.compare(rows, verdicts).items():
            if (where, row.arm, row.baseline, verdicts[row.arm]) not in seen:
                measured = f"{where}{tables.measured_text(row, comparison)}{seeds_text(row, verdicts)}"
                claims.append((tables.verdict(row, comparison), row.claim, measured))
                seen.add((where, row.arm, row.baseline, verdicts[row.arm]))
    return claims


def size_names(students: list[str]) -> dict[str, str]:
    """{student: its number of parameters as its name gives it, such as "0.5B"}. The whole name if that is not unique."""
    sizes = {name: (re.findall(r"(?<![\w.])[\d.]+[BM](?!\w)", name) or [name])[0] for name in students}
    return {name: size if [*sizes.values()].count(size) == 1 else name for name, size in sizes.items()}


def findings_section(results: list[dict]) -> str:
    """All tested claims, grouped by verdict."""
    groups = {heading: {} for heading in HEADINGS}  # {heading: {claim: [what was measured, for each student]}}
    arms = ["base", *tables.KEPT]
    lines = []
    sizes = size_names([result["student"] for result in results])
    for result in results:
        student = f"{sizes[result['student']]} " if len(results) > 1 else ""
        for heading, claim, measured in tested_claims(result):
            groups[heading].setdefault(claim, []).append(f"{student}{measured}")
        test = split_verdicts(result, "test")
        lines.append([result["student"], *(tables.score_text(test[arm]) if arm in test else "" for arm in arms)])
    parts = []
    for heading, claims in groups.items():
        found = "".join(f"- {claim}: {'. '.join(measured)}.\n" for claim, measured in claims.items())
        parts.append(f"### {HEADINGS[heading]}\n\n{found or NOTHING}\n")
    return f"""## Findings

Test instructions followed, in percent with a 95 % interval:

{markdown_table(["student", *(NAMES[arm] for arm in arms)], lines)}
Differences below are paired, in percentage points, with a 95 % interval. p is corrected over the claim's table (Holm).
A claim counts as confirmed or contradicted if p is below 0.05.

{"".join(parts)}"""


def chosen_table(result: dict) -> str:
    """The learning rates, with their dev scores where there was a choice."""
    lines = []
    for method in ("sft", "kto"):
        choice = result["chosen"].get(method) or {"lr": flag(result, f"{method}-", "--lr", ""), "dev": {}}
        tried = sorted(choice["dev"], key=float) or [choice["lr"]]
        for lr in filter(None, tried):
            mark = "" if lr != choice["lr"] else "chosen" if len(tried) > 1 else "the only one tried"
            score = f"{100 * choice['dev'][lr]:.1f}" if lr in choice["dev"] else ""
            lines.append([method.upper(), lr, score, mark])
    return (
        markdown_table(["method", "learning rate", "dev score, %", ""], lines)
        if lines
        else "No rate has been chosen yet.\n"
    )


def measured_rates(result: dict) -> tuple[float, float]:
    """-> (tokens generated per second of test replies, tokens trained per second). The times are of whole commands."""
    tokens = seconds = 0.0
    for arm, by in result["arms"].items():
        if (step := f"eval-test-{arm}") in result["seconds"] and "ifeval" in by.get("test", {}):
            tokens += sum(by["test"]["ifeval"]["reply_tokens"])
            seconds += result["seconds"][step]
    trained = [(n, result["seconds"][arm]) for arm, n in result["trained_tokens"].items() if arm in result["seconds"]]
    return tokens / max(seconds, 1), sum(n for n, _ in trained) / max(sum(t for _, t in trained), 1)


def full_study_text(result: dict) -> str:
    """Estimates the time of all studies on 1,000 general instructions from this result's rates.

    Assumes 250 tokens per reply, 350 per sequence, 17 evaluated arms, and a teacher (1.5B) of three times the cost.
    """
    generated, trained = measured_rates(result)
    if not generated or not trained:
        return ""
    replies = 1000 * 250 * (4 + 4 + 3)
    evaluation = 17 * (500 * 250 + 541 * 300 + 164 * 250)  # GSM8K, IFEval, HumanEval; the likelihoods are minutes
    training = (6 * 1000 * 2 + 9 * 2000) * 350  # 6 runs of SFT, two passes; 9 runs of KTO
    hours = ((replies + evaluation) / generated + training / trained) / 3600 / CORES
    return f"""With
{result["student"]} all studies on 1,000 general instructions would take an estimated {hours:.0f} hours on {CORES} cores: {(replies + evaluation) / 1e6:.1f} million tokens to generate at {generated:.0f} per
second, {training / 1e6:.1f} million to train on at {trained:.0f} per second. These are the rates of one core in section {len(STUDIES) + 2}."""


def method_section(results: list[dict]) -> str:
    """Models, data, training, evaluation and statistics of the first student."""
    result = results[0]
    dev = next(iter(split_verdicts(result, "dev").values()), "")
    test = next(iter(split_verdicts(result, "test").values()), "")
    return f"""## Method

- **Models.** Student: {result["student"]}. Teacher: {result["teacher"]}. Real weights; [results](results.md) says from which files.
- **Instructions.** A program writes them. Each asks for a short text about a topic, with one or two of 15 constraints of
  IFEval (arXiv 2311.07911), which a program checks. Training, dev and test share no topic.
- **Data.** {tables.data_text(result["data"])}. The student answers each instruction
  four times (one greedy, three sampled), the teacher once. The program's check decides the labels; no judge does.
- **Training.** SFT: {flag(result, "sft-", "--epochs")} passes. KTO: one pass, beta {flag(result, "kto-", "--beta")},
  label weights balanced. {flag(result, "sft-", "--batch-size")} examples per step, cosine schedule, {flag(result, "sft-", "--dtype")} over fp32 weights.
- **Evaluation.** {len(test) or "No"} test instructions, greedy, at most {flag(result, "eval-test-", "--max-new-tokens")} tokens. A reply is right if it follows all
  constraints (IFEval's strict prompt accuracy).
- **Statistics.** Intervals of scores are 1.96 standard errors. Differences are paired by question, with McNemar's exact
  test and a 95 % bootstrap interval. *Detectable difference*: if the true difference is this large, 80 % of repetitions
  give p < 0.05, uncorrected.
- **Seeds.** {seeds_note(result)}

Learning rates were chosen on {len(dev) or "the"} dev instructions:

{chosen_table(result)}
{differences_text(results)}

"""


def seeds_note(result: dict) -> str:
    """Which seeds the arms have, and what the intervals cover."""
    first = flag(result, "sft-", "--seed")
    others = sorted({arm.rpartition("-seed-")[2] for arm in result["arms"] if "-seed-" in arm})
    if not others:
        return f"Every arm has one (seed {first}). The intervals cover the choice of questions, not of seeds."
    return (
        f"Every arm has seed {first}, the main arms also {' and '.join(others)}. Intervals cover the choice of questions; those "
        'under "Other seeds" cover that of seeds too.'
    )


def differences_text(results: list[dict]) -> str:
    """What differs from the paper's experiment."""
    others = results[1:]
    students = "Most arms train" if others else "The arms train"
    general = next((number for _, number in tables.section_numbers(others) if number), None)
    kinds = (
        f"The instructions are of one kind, except in section {general}."
        if general
        else "The instructions are of one kind. No run used 1,000 or more general instructions."
    )
    return f"""**What differs from the paper.** {students} a student of 135M parameters, not 0.5B. {kinds}
A program wrote the instructions of sections 1 to {len(STUDIES) + 1 + bool(others)}, so they have no original responses. Not every arm ran on
every benchmark. {full_study_text(others[0]) if others else ""}"""


def study_sections(result: dict, drawn: dict[str, str], images: str) -> str:
    """The studies with a table of test scores, and the pictures."""
    reasons = {**tables.NOT_RUN, **result["not_run"]}
    verdicts = split_verdicts(result, "test")
    n = len(next(iter(verdicts.values()), ""))
    pictures_of = {
        "paper_table": ["report-scores.svg", "report-fusion.svg"],
        "data_steps": ["report-followed.svg"],
        "kto_parts": ["report-kto.svg"],
    }
    parts = []
    for number, (title, rows, module, question) in enumerate(STUDIES, 1):
        table = tables.comparison_table(rows, verdicts, reasons, f"followed, % of {n or 'n'} [95 %]")
        shown = [
            f"![{CAPTIONS[name].partition('. ')[0].rstrip('.')}]({images}/{name})\n\n{CAPTIONS[name]}\n\n"
            for name in pictures_of.get(module, ())
            if name in drawn
        ]
        more = searched_text(result) if module == "paper_table" else ""
        more += loss_rates_table(result) if module == "related_losses" else ""
        more += "".join(shown)
        if module in ("paper_table", "related_losses"):
            more += seeds_table(rows, verdicts)
        parts.append(f"## {number}. {title}\n\n{question}\n\n{table}\n{more}")
    return "".join(parts)


def searched_text(result: dict) -> str:
    """The weights that merge.py search chose."""
    words = result["commands"].get("searched", [])
    weights = [word.rpartition(":")[2] for word in words if re.fullmatch(r".*/sft(-kto)?:[\d.e-]+", word)]
    if len(weights) != 2:
        return ""
    return f"`merge.py search` chose {weights[0]} SFT + {weights[1]} SFT-KTO.\n\n"


def kept_section(result: dict) -> str:
    """Study 6: the side effects of training."""
    return f"""## {len(STUDIES) + 1}. Side effects

{kept_tables(result) or NOT_YET}{reply_table(result)}"""


def reply_table(result: dict) -> str:
    """Lengths of the replies to the test split, and shares that were cut off or looped."""
    lines = []
    for arm in NAMES:
        if cell := result["arms"].get(arm, {}).get("test", {}).get("ifeval"):
            n = len(cell["reply_tokens"])
            mean, stderr = tables.mean_stderr(cell["reply_tokens"])
            half = 1.96 * (stderr or 0)
            shares = [f"{100 * cell[key] / n:.1f}" for key in ("cut_off", "looping")]
            lines.append([NAMES[arm], f"{mean:.1f} [{mean - half:.1f}, {mean + half:.1f}]", *shares])
    limit = flag(result, "eval-test-", "--max-new-tokens")
    head = ["arm", "reply length, tokens [95 %]", f"cut off at {limit} tokens, %", "looping, %"]
    note = "Looping: the reply ends in the same 4 to 200 characters four times in a row.\n"
    return f"Replies to the test instructions:\n\n{markdown_table(head, lines)}\n{note}\n" if lines else ""


def other_student_section(result: dict, number: int, picture: str) -> str:
    """The paper's table with another student, and the studies of which it has an arm."""
    verdicts = split_verdicts(result, "test")
    scored = f"followed, % of {len(next(iter(verdicts.values()), '')) or 'n'} [95 %]"
    table = tables.comparison_table(tables.PAPER, verdicts, {**tables.NOT_RUN, **result["not_run"]}, scored)
    more = ""
    for title, rows, _, question in STUDIES[1:]:
        known = [row for row in rows if row.arm in verdicts]
        if {row.arm for row in known} - {row.arm for row in tables.PAPER}:
            more += f"### {title}\n\n{question}\n\n{tables.comparison_table(known, verdicts, {}, scored)}\n"
    heading = "### Side effects\n\n" if more else ""
    shown = f"![Score by arm, {result['student']}]({picture})\n\n" if picture else ""
    return f"""## {number}. The paper's table with another student: {result["student"]}

The same instructions and the same teacher's replies. {tables.data_text(result["data"])}.
SFT: {flag(result, "sft-", "--epochs")} passes. KTO: beta {flag(result, "kto-", "--beta", flag(result, "sft-kto", "--beta"))}. Everything else is as above.

{chosen_table(result)}
{table}
{searched_text(result)}{shown}{more}{heading}{kept_tables(result)}{reply_table(result)}"""


QUESTION = """# The recipe on real models

The paper ([arXiv 2411.02939](https://arxiv.org/abs/2411.02939)) claims that data guided by a large model, then SFT, KTO, SFT
then KTO, and weight fusion, each improve a small instruct model. This report measures each of these effects, and those of
verification, of KTO's parts and of the model's own responses. Every part is one arm of an experiment on real models.

"""


def report(results: list[dict], images: str) -> tuple[str, dict[str, str]]:
    """-> (the report in markdown, {picture's file name: SVG}). images: the pictures' folder as seen from the report."""
    result, *others = results
    drawn = pictures(result, split_verdicts(result, "test"))
    sections = [
        QUESTION,
        findings_section(results),
        method_section(results),
        study_sections(result, drawn, images),
        kept_section(result),
    ]
    for i, (other, (number, general)) in enumerate(zip(others, tables.section_numbers(others)), 2):
        picture = f"report-scores-{i}.svg"
        if verdicts := split_verdicts(other, "test"):
            drawn[picture] = scores_picture(verdicts)
        sections.append(other_student_section(other, number, f"{images}/{picture}" if picture in drawn else ""))
        if general:
            picture = f"report-general-{i}.svg"
            if text := general_picture(tables.general_verdicts(other)):
                drawn[picture] = text
            sections.append(general_section(other, general, f"{images}/{picture}" if picture in drawn else ""))
    return "".join([*sections, repeat_section(results)]), drawn


def main() -> None:
    p = Parser(description=__doc__)
    p.add_argument("--results", nargs="+", default=["experiments/results/*.json"], metavar="F", help="result files")
    p.add_argument("--out", default="docs/REPORT.md", help="report to write")
    p.add_argument("--images", default="docs/images", help="folder of its pictures")
    args: argparse.Namespace = p.parse_args()
    paths = expand(args.results)
    results = read_results(paths)
    try:
        text, drawn = report(results, os.path.relpath(args.images, os.path.dirname(args.out) or "."))
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise InputError(
            f"{', '.join(paths)}: not as experiments.collect writes it ({type(e).__name__}: {e})"
        ) from None
    for name, picture in drawn.items():
        with atomic_write(Path(args.images, name)) as f:
            f.write(picture)
    with atomic_write(args.out) as f:
        f.write(text)
    print(f"wrote {args.out} and {len(drawn)} pictures in {args.images}")


if __name__ == "__main__":
    cli(main)
