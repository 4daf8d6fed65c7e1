"""The studies' comparisons: which arm is compared with which, paired statistics, and the tables of docs/REPORT.md."""

from typing import NamedTuple

from evaluation.stats import POWER, holm, mean_stderr, paired_comparison

LOSS_NAMES = {"dft": "DFT", "asft": "ASFT", "otr": "OTR", "poft": "PoFT", "sft-dpo": "DPO"}
RATE_NAMES = {"half": "half", "2x": "twice"}  # of an arm ARM-half or ARM-2x: its learning rate, in units of that of ARM
OTHER_RATES = [(arm, rate) for arm in ("dft", "asft", "otr") for rate in RATE_NAMES]
OTHER_RATES += [("poft", "half"), ("sft-dpo", "half")]
NAMES = {
    "base": "student before training",
    "sft-original": "SFT on original responses",
    "sft": "SFT on the best verified reply",
    "kto": "KTO",
    "sft-kto": "SFT, then KTO",
    "mean": "fusion 0.5 SFT + 0.5 SFT-KTO",
    "mean-05-95": "fusion 0.05 SFT + 0.95 SFT-KTO",
    "ties": "TIES of SFT and KTO",
    "searched": "fusion, searched weight",
    "sft-paper-lr": "SFT at 1e-6",
    "sft-kto-paper-lr": "SFT at 1e-6, then KTO at 5e-8",
    "sft-kto-own": "SFT, then KTO on own responses",
    "sft-teacher": "SFT on the teacher's replies",
    "sft-random": "SFT on replies of any writer",
    "sft-deduplicated": "SFT on deduplicated instructions",
    "sft-balanced": "SFT on balanced instructions",
    "kto-noise-10": "KTO, 10 % of the labels wrong",
    "kto-noise-30": "KTO, 30 % of the labels wrong",
    "kto-no-z0": "KTO without z0",
    "kto-desirable": "KTO on desirable examples alone",
    "sft-desirable": "SFT on the same desirable examples",
    "sft-sft": "SFT, then SFT on KTO's desirable examples",
    "dft": "DFT in place of SFT",
    "asft": "ASFT in place of SFT",
    "otr": "OTR in place of SFT",
    "poft": "PoFT in place of SFT, weighted by the KTO model",
    "sft-dpo": "SFT, then DPO on KTO's pairs",
    **{f"{arm}-{rate}": f"{LOSS_NAMES[arm]} at {RATE_NAMES[rate]} the rate" for arm, rate in OTHER_RATES},
    "general-sft": "SFT on general instructions",
    "general-kto": "KTO on general instructions",
    "general-sft-kto": "SFT, then KTO, on general instructions",
    "general-mean": "fusion 0.5 SFT + 0.5 SFT-KTO, on general instructions",
    "general-own-sft": "SFT on general instructions, models' replies alone",
    "general-own-kto": "KTO on general instructions, models' replies alone",
    "general-own-sft-kto": "SFT, then KTO, on general instructions, models' replies alone",
}
OWN_NAMES = {"sft": "SFT", "kto": "KTO", "sft-kto": "SFT, then KTO,"}
NOT_RUN = {
    "sft-original": "not run: the instructions are made by a program, so nobody wrote an original response",
    "sft-deduplicated": "not run: no two instructions are equal, so there is nothing to drop",
    "sft-balanced": "not run: the instructions are drawn evenly over their forms, so there is nothing to balance",
}
FEWEST = 6  # McNemar's exact p is above 0.05 if fewer questions differ: 2 / 2^5 = 0.0625


class TableRow(NamedTuple):
    """A row of a table: an arm, the arm it is compared with, and the claim that the comparison tests."""

    arm: str
    baseline: str = ""
    claim: str = ""
    better: bool = True  # True: the claim is that the arm is better than its baseline; False: worse


PAPER = [
    TableRow("base"),
    TableRow("sft-original", "base"),
    TableRow("sft", "base", "SFT on the best verified reply improves the student"),
    TableRow("kto", "base", "KTO alone improves the student"),
    TableRow("sft-kto", "sft", "KTO after SFT improves on SFT"),
    TableRow("sft-kto", "kto", "SFT before KTO improves on KTO alone"),
    TableRow("mean", "sft", "The fusion 0.5 SFT + 0.5 SFT-KTO improves on SFT"),
    TableRow("mean-05-95", "sft", "The fusion 0.05 SFT + 0.95 SFT-KTO improves on SFT"),
    TableRow("ties", "sft", "TIES of SFT and KTO improves on SFT"),
    TableRow("searched", "sft-kto", "A fusion at the weight that is best on the dev split improves on KTO after SFT"),
    TableRow("sft-paper-lr", "base", "SFT at the paper's rate of 1e-6 improves the student"),
    TableRow("sft-paper-lr", "sft", "SFT at the paper's rate is worse than SFT at the larger rate", better=False),
    TableRow("sft-kto-paper-lr", "base", "SFT at 1e-6, then KTO at 5e-8, improves the student"),
]
OWN = [
    TableRow("sft"),
    TableRow("sft-kto", "sft", "KTO after SFT, on responses from before SFT, improves on SFT"),
    TableRow("sft-kto-own", "sft", "KTO after SFT, on the SFT model's own responses, improves on SFT"),
    TableRow(
        "sft-kto-own", "sft-kto", "The SFT model's own responses are better for KTO than the responses from before SFT"
    ),
]
DATA = [
    TableRow("base"),
    TableRow("sft"),
    TableRow("sft-teacher", "sft", "Without verification, the teacher's replies are worse SFT data", better=False),
    TableRow("sft-random", "sft", "Without verification, replies of any writer are worse SFT data", better=False),
    TableRow("sft-deduplicated", "sft"),
    TableRow("sft-balanced", "sft"),
]
PARTS = [
    TableRow("base"),
    TableRow("kto"),
    TableRow("kto-noise-10", "kto", "10 % wrong labels make KTO worse", better=False),
    TableRow("kto-noise-30", "kto", "30 % wrong labels make KTO worse", better=False),
    TableRow("kto-no-z0", "kto", "Leaving out z0 makes KTO worse", better=False),
    TableRow("kto-desirable", "kto", "Leaving out undesirable examples makes KTO worse", better=False),
    TableRow("sft-desirable", "kto", "SFT on KTO's desirable examples is worse than KTO", better=False),
    TableRow("sft-sft", "sft-kto", "After SFT, SFT on KTO's desirable examples is worse than KTO", better=False),
]
LOSSES = [
    TableRow("sft"),
    *(TableRow(arm, "sft", f"{LOSS_NAMES[arm]} is a better loss than SFT's") for arm in ("dft", "asft", "otr", "poft")),
    *(
        TableRow(
            f"{arm}-{rate}",
            "sft",
            f"{LOSS_NAMES[arm]} at {RATE_NAMES[rate]} SFT's learning rate is a better loss than SFT's",
        )
        for arm, rate in OTHER_RATES
        if arm != "sft-dpo"
    ),
    TableRow("sft-kto"),
    TableRow("sft-dpo", "sft-kto", "After SFT, DPO on KTO's pairs is better than KTO"),
    TableRow(
        "sft-dpo-half", "sft-kto", "After SFT, DPO on KTO's pairs, at half KTO's learning rate, is better than KTO"
    ),
]
GENERAL = [  # for each benchmark
    TableRow("base"),
    TableRow("general-sft", "base", "SFT on general instructions improves the student"),
    TableRow("general-kto", "base", "KTO on general instructions improves the student"),
    TableRow("general-sft-kto", "base", "SFT, then KTO, on general instructions improves the student"),
    TableRow("general-sft-kto", "general-sft", "KTO after SFT on general instructions improves on SFT"),
    TableRow("general-mean", "general-sft", "The fusion of SFT and SFT-KTO on general instructions improves on SFT"),
]
GENERAL_OWN = [  # the same with the models' replies alone
    TableRow("base"),
    *(
        TableRow(f"general-own-{arm}", "base", f"{name} on the models' right replies improves the student")
        for arm, name in OWN_NAMES.items()
    ),
    *(
        TableRow(
            f"general-own-{arm}",
            f"general-{arm}",
            f"The models' right replies are better for {name} than the original responses",
        )
        for arm, name in OWN_NAMES.items()
    ),
]
STUDIES = [  # (title, rows of its table, module, introduction)
    ("The paper's table", PAPER, "paper_table", "How much does each part of the paper's recipe improve the student?"),
    ("KTO on the model's own responses", OWN, "own_responses",
     "In the paper, KTO after SFT learns from responses that the student wrote before SFT. Here the SFT model answers them again."),
    ("The effect of verification", DATA, "data_steps",
     "Each arm trains on as many examples as SFT, but its replies are not selected by verification."),
    ("The effect of KTO's parts", PARTS, "kto_parts", "The KTO arms start from the student. The last arm continues from the SFT model, as KTO after SFT does."),
    ("Losses of related papers", LOSSES, "related_losses",
     "Each arm has the data and steps of SFT, or of KTO after SFT, and its learning rate, half or twice that. Only the loss differs (variants/)."),
]  # fmt: skip
KEPT = ["sft", "kto", "sft-kto", "mean"]
BENCHMARKS = {"mmlu": "MMLU", "ceval": "C-Eval", "gsm8k": "GSM8K", "humaneval": "HumanEval", "ifeval": "IFEval"}
CLAIM_NAMES = {"sft": "SFT", "kto": "KTO", "sft-kto": "SFT, then KTO,", "mean": "The fusion 0.5 SFT + 0.5 SFT-KTO"}


def kept_rows(task: str) -> list[TableRow]:
    """Rows of study 6: is an arm worse than the student at a task that it was not trained for? Better at IFEval?"""
    better = task == "IFEval"  # it has the kind of constraints that was trained
    verb = "raises" if better else "lowers"
    claims = [TableRow(arm, "base", f"{CLAIM_NAMES[arm]} {verb} the score of {task}", better) for arm in KEPT]
    return [TableRow("base"), *claims]


def split_verdicts(result: dict, split: str, task: str = "ifeval") -> dict[str, str]:
    """{arm: verdicts} of a split: "test", "dev", or a benchmark itself."""
    return {arm: by[split][task]["right"] for arm, by in result["arms"].items() if task in by.get(split, {})}


def kept_verdicts(result: dict) -> dict[str, dict[str, str]]:
    """{benchmark: {arm: verdicts}} of the benchmarks that no arm was trained for."""
    found = {}
    for task, name in BENCHMARKS.items():
        values = {arm: by[task]["right"] for arm, by in result["values"].items() if "right" in by.get(task, {})}
        found[name] = values or split_verdicts(result, task, task)
    return found


def general_verdicts(result: dict) -> dict[str, dict[str, str]]:
    """{benchmark: {arm: verdicts}} of the benchmarks on which an arm of GENERAL was evaluated."""
    found = {"the test instructions": split_verdicts(result, "test"), **kept_verdicts(result)}
    return {task: by for task, by in found.items() if any(arm.startswith("general-") for arm in by)}


def has_general(result: dict) -> bool:
    """Whether the result has arms with general instructions."""
    return bool(result["general_data"] and general_verdicts(result))


def section_numbers(others: list[dict]) -> list[tuple[int, int]]:
    """-> (section of the paper's table, section of general instructions or 0) of each student after the first."""
    numbers, last = [], len(STUDIES) + 1
    for other in others:
        general = last + 2 if has_general(other) else 0
        numbers.append((last + 1, general))
        last = general or last + 1
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def compare(rows: list[TableRow], verdicts: dict[str, str]) -> dict[TableRow, dict]:
    """Compares each row whose two arms have verdicts: the content of paired_comparison and "p_holm", "smallest", "n".

    verdicts: one digit for each question, by arm. p_holm is corrected over the rows of this table. smallest: the true
    difference for which n questions give p < 0.05, uncorrected, with probability 0.8.
    """
    found = {}
    for row in rows:
        if row.baseline and row.arm in verdicts and row.baseline in verdicts:
            first, second = ([int(digit) for digit in verdicts[arm]] for arm in (row.baseline, row.arm))
            result = paired_comparison(first, second)
            n = len(first)
            smallest = max(POWER * (result["stderr"] or 0), FEWEST / n)
            found[row] = {**result, "smallest": smallest, "n": n}
    for row, p in zip(found, holm([result["p"] for result in found.values()])):
        found[row]["p_holm"] = p
    return found


def interval(verdicts: str) -> tuple[float, float, float]:
    """-> (low, mean, high) in percent: the mean of the verdicts and its 95 % interval, 1.96 standard errors each way."""
    mean, stderr = mean_stderr([int(digit) for digit in verdicts])
    half = 1.96 * (stderr or 0)
    return 100 * max(0.0, mean - half), 100 * mean, 100 * min(1.0, mean + half)


# ---------------------------------------------------------------------------------------------------------------------
# Text


def points(x: float) -> str:
    """A difference of shares in percentage points, with its sign. Never -0.0."""
    return f"{round(100 * x, 1) + 0.0:+.1f}"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{min(p, 1):.3f}" if p < 0.1 else f"{p:.2f}"


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def score_text(verdicts: str) -> str:
    low, mean, high = interval(verdicts)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def comparison_table(rows: list[TableRow], verdicts: dict[str, str], reasons: dict[str, str], scored: str) -> str:
    """A table in markdown. reasons: why an arm has no verdicts. scored: the head of the score's column."""
    found, lines = compare(rows, verdicts), []
    for row in rows:
        name = NAMES[row.arm]
        if row.arm not in verdicts:
            lines.append([name, "", "", "", "", reasons.get(row.arm, "not run")])
        elif row not in found:
            why = f"no result of: {NAMES[row.baseline]}" if row.baseline else ""
            lines.append([name, score_text(verdicts[row.arm]), "", "", "", why])
        else:
            result = found[row]
            low, high = result["interval"]
            difference = f"{points(result['difference'])} [{points(low)}, {points(high)}]"
            smallest = f"{100 * result['smallest']:.1f}"
            score = score_text(verdicts[row.arm])
            lines.append([name, score, NAMES[row.baseline], difference, p_text(result["p_holm"]), smallest])
    head = ["arm", scored, "compared with", "difference, points", "p (Holm)", "detectable difference, points"]
    return markdown_table(head, lines)


def verdict(row: TableRow, result: dict) -> str:
    """ "held", "opposite" or "undecided": what a comparison says about its row's claim, at p < 0.05 after Holm."""
    if result["p_holm"] >= 0.05:
        return "undecided"
    return "held" if (result["difference"] > 0) == row.better else "opposite"


def measured_text(row: TableRow, result: dict) -> str:
    """A row's difference, interval and p. If its claim is undecided, also the detectable difference."""
    low, high = result["interval"]
    p = p_text(result["p_holm"])
    text = f"{points(result['difference'])} points [{points(low)}, {points(high)}], p "
    text += p if p.startswith("<") else f"= {p}"
    if verdict(row, result) == "undecided":
        text += f"; {result['n']} questions can detect {100 * result['smallest']:.1f} points"
    return text


def data_text(data: dict) -> str:
    """How many instructions and examples there are."""
    if not data:
        return "No data have been made yet"
    first = next((some[0] for some in data.get("steps", {}).values()), data["instructions"])
    return (
        f"{first} training instructions, {data['instructions']} of them with a complete response; {data['sft']} SFT "
        f"examples (the best response, if it is verified); {data['kto']} KTO examples, {data['kto_desirable']} of them "
        "desirable (the best and the worst response to an instruction)"
    )


def kept_tables(result: dict) -> str:
    """Benchmarks that no arm was trained for, and perplexity. Empty without results of either."""
    if not result["values"] and not any(kept_verdicts(result).values()):
        return ""
    arms = ["base", *KEPT]
    lines = []
    for task, verdicts in kept_verdicts(result).items():
        if verdicts:
            found = {row.arm: some for row, some in compare(kept_rows(task), verdicts).items()}
            cells = [kept_cell(verdicts.get(arm, ""), found.get(arm)) for arm in arms]
            lines.append([task, str(len(next(iter(verdicts.values())))), *cells])
    benchmarks = markdown_table(["benchmark", "questions", *(NAMES[arm] for arm in arms)], lines)
    lines = []
    for arm in [*arms, *(arm for arm in NAMES if arm in result["values"] and arm not in arms)]:
        values = result["values"].get(arm, {})
        perplexity, mmlu = values.get("perplexity", {}).get("score"), values.get("mmlu", {})
        figures = [(perplexity, 2), (mmlu.get("score") and 100 * mmlu["score"], 1), (mmlu.get("ece"), 3)]
        cells = ["not run" if x is None else f"{x:.{digits}f}" for x, digits in figures]
        lines.append([NAMES[arm], *cells])
    head = ["arm", "perplexity of a token of plain text", "MMLU, %", "calibration error of MMLU (ECE)"]
    return f"""Benchmarks whose questions no arm was trained on: right answers in percent, with the difference to the student before
training in points, its 95 % interval, and p, corrected over the row (Holm). IFEval has the kind of constraints that was trained, in
other instructions. MMLU and C-Eval are scored by likelihood, the others by greedy replies. "Not run" means that there was no time.

{benchmarks}
{markdown_table(head, lines)}
"""


def kept_cell(verdicts: str, comparison: dict | None) -> str:
    """An arm's score, and its difference to the student before training."""
    if not verdicts or not comparison:
        return score_text(verdicts) if verdicts else "not run"
    low, high = (points(x) for x in comparison["interval"])
    score = 100 * verdicts.count("1") / len(verdicts)
    p = p_text(comparison["p_holm"])
    return f"{score:.1f} ({points(comparison['difference'])} [{low}, {high}], p {p if p[0] == '<' else f'= {p}'})"
