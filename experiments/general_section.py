"""The report's section on general instructions."""

from collections import Counter

from curation.step_files import writer_family
from experiments import tables
from experiments.repeat import flag
from experiments.tables import NAMES, data_text, markdown_table

LENGTHS = """Mean length of the replies in tokens, and the share that was cut off. An arm of which many replies are cut off, such as
the student on HumanEval, would have another score at another limit."""
OWN_WRITERS = {"small": "student", "teacher": "teacher"}


def general_section(result: dict, number: int, picture: str = "") -> str:
    """The section of a result with general instructions."""
    data, followed = result["general_data"], result["general_data"]["followed"]
    shares = [100 * right / n for right, n in (followed["teacher"], followed["small"])]
    total = result["data"]["instructions"] + data["instructions"]
    shown = f"![Score by arm on GSM8K and the test instructions]({picture})\n\n" if picture else ""
    original = data.get("sft_writers", {}).get("original", 0)
    return f"""## {number}. General instructions: {result["student"]}

Word problems (GSM8K), multiple choice (AQuA) and programs (MBPP) are added to the instructions above: {data_text(data)}.
Together these are {total} instructions after all steps. Answers and tests verify the responses: {shares[0]:.0f} % of the teacher's and
{shares[1]:.0f} % of the student's complete greedy ones are right. The data set's own response is a third candidate, right by
construction. At equal scores it comes first, so it is the best response of {original} instructions. Questions of the
benchmarks were removed. SFT: {flag(result, "general-sft", "--epochs")} pass. Learning rates and everything else are those of section {number - 1}.

{shown}{general_tables(result, tables.GENERAL)}{own_replies(result)}{general_lengths(result)}"""


def general_tables(result: dict, rows: list[tables.TableRow]) -> str:
    """One table for each benchmark that has verdicts of these arms."""
    parts, arms = [], {row.arm for row in rows} - {"base"}
    for task, by in tables.general_verdicts(result).items():
        if arms & by.keys():
            n = len(next(iter(by.values())))
            table = tables.comparison_table(rows, by, {}, f"right, % of {n} [95 %]")
            parts.append(f"{task[0].upper()}{task[1:]}:\n\n{table}\n")
    return "".join(parts)


def own_replies(result: dict) -> str:
    """The same arms without the original responses. Empty without their results."""
    shown = general_tables(result, tables.GENERAL_OWN)
    if not shown or not (data := result["general_own_data"]):
        return ""
    writers = Counter()  # SFT examples by writer, all samples of the student together
    for writer, n in data["sft_writers"].items():
        writers[OWN_WRITERS[writer_family(writer)]] += n
    shares = ", ".join(f"{n} of the {writer}" for writer, n in writers.items())
    unchecked = data.get("sft_unchecked", 0)
    shares += f"; {unchecked} state no answer that a program can read" if unchecked else ""
    return f"""### The models' right replies in place of the original responses

The same instructions and replies, labelled once more without the original responses (`make_data.py --writers small teacher`): the
student's right reply is the best response, else the teacher's. An instruction that neither answered is left out. This leaves
{data["sft"]} of {data["instructions"]} SFT examples ({shares}) and {data["kto"]} KTO examples. The examples with constraints are the same.

{shown}"""


def general_lengths(result: dict) -> str:
    """A table of mean reply lengths and shares cut off: arms with general instructions, benchmarks with replies."""
    splits = {
        "test instructions": ("test", "ifeval"),
        **{name: (task, task) for task, name in tables.BENCHMARKS.items()},
    }
    lengths = {}  # {arm: {benchmark: text}}
    for arm in dict.fromkeys(row.arm for row in (*tables.GENERAL, *tables.GENERAL_OWN)):
        for name, (split, task) in splits.items():
            cell = result["arms"].get(arm, {}).get(split, {}).get(task, {})
            if tokens := cell.get("reply_tokens"):
                cut = 100 * cell["cut_off"] / len(tokens)
                lengths.setdefault(arm, {})[name] = f"{sum(tokens) / len(tokens):.0f} ({cut:.0f} %)"
    heads = [name for name in splits if any(name in by for arm, by in lengths.items() if arm != "base")]
    lines = [[NAMES[arm], *(by.get(name, "") for name in heads)] for arm, by in lengths.items()]
    return f"{LENGTHS}\n\n{markdown_table(['arm', *heads], lines)}\n"
