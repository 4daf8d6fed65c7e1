"""Conjugate prompting (arXiv 2309.10105): did fine-tuning lose a skill, or only hide it?

    python -m variants.conjugate_prompting --base base --ckpt tuned                          # the paper's test, no data
    python -m variants.conjugate_prompting --base base --ckpt tuned --data demo/heldout.jsonl

A map s rewrites the prompt so that it is far from the fine-tuning data but asks for the same skill. If the tuned model
loses less on the rewritten prompts, the skill was only hidden. Here s is leetspeak; the paper's translation needs a
teacher. In the paper's test, two examples (here ours) repeat or capitalise their input. A model without the skill
answers the third input instead. These inputs are the paper's sums, without its sentences with a blank.
"""

import itertools
import random
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from statistics import fmean

from tqdm import tqdm

from core.distributed import single_process
from core.files import InputError, cli, print_next
from core.flags import Parser, add_generation_flags, at_least, file_out
from core.records import write_jsonl
from evaluation.benchmarks import demo_verdict
from evaluation.rows import demo_rows
from evaluation.stats import figure_table, paired_comparison
from generate import check_loadable, generate_iter, load_for_inference

TO_DIGITS, TO_LETTERS = str.maketrans("aeiost", "431057"), str.maketrans("431057", "aeiost")
WORD = re.compile(r"[A-Za-z0-9]+")  # ASCII only: in Chinese text, digits follow letters without a space
TASKS = {"repeat": ("Repeat the input.", str), "capitals": ("Write the input in capital letters.", str.upper)}
SHOTS = ("The boat came home before dark.", "My sister grows apples and pears.")


def leet(text: str) -> str:
    """s: "Repeat the input." -> "R3p347 7h3 1npu7.". Words with digits, or of these letters only, stay."""
    changes = lambda word: word.isalpha() and not word.translate(TO_DIGITS).isdigit()
    return WORD.sub(lambda found: found[0].translate(TO_DIGITS) if changes(found[0]) else found[0], text)


def unleet(text: str) -> str:
    """The inverse of leet, exact if no word of the text mixes letters and digits. Numbers stay unchanged."""
    return WORD.sub(lambda found: found[0] if found[0].isdigit() else found[0].translate(TO_LETTERS), text)


VIEWS = {"plain": (str, str), "leet": (leet, unleet)}  # {view: (s, its inverse)}; plain leaves the text as it is


def drop_difference(base: dict[str, list[bool]], tuned: dict[str, list[bool]]) -> dict:
    """drop(s) - drop(id) with its interval, see paired_comparison. The skill was hidden, not lost, if it is below 0.

        drop(s) = acc_base(s) - acc_tuned(s)        s: view "leet", id: view "plain"

    base, tuned: {view: the verdicts of the same questions}.
    """
    drop = {view: [b - t for b, t in zip(base[view], tuned[view], strict=True)] for view in VIEWS}  # 1, 0 or -1
    return paired_comparison(drop["plain"], drop["leet"])


def drop_table(base: dict[str, list[bool]], tuned: dict[str, list[bool]]) -> str:
    """The table of accuracies, drop_difference, and one sentence of conclusion."""
    before, after = ({view: fmean(verdicts[view]) for view in VIEWS} for verdicts in (base, tuned))
    drop, test = {view: before[view] - after[view] for view in VIEWS}, drop_difference(base, tuned)
    change = "drop(leet) - drop(plain): {difference:+.3f}, 95% interval {interval[0]:+.3f} to {interval[1]:+.3f}"
    if drop["plain"] <= 0:
        conclusion = "Nothing was lost on the plain prompts."
    elif before["leet"] < before["plain"] / 2:
        conclusion = "The base itself fails on the rewritten prompts, so a smaller drop there proves nothing."
    elif test["interval"][1] < 0:
        conclusion = "The drop is smaller on the rewritten prompts: part of the skill was hidden, not lost."
    else:
        conclusion = "No sign that a skill was hidden."
    table = figure_table("", {"base": before, "tuned": after, "drop": drop})
    return f"{table}\n{change.format(**test)}\n{conclusion}"


def shots_prompt(task: str, request: str, s: Callable[[str], str]) -> tuple[str, str]:
    """The paper's test: two examples of a task, then a request as third input. -> (prompt, how a right reply begins)."""
    instruction, do = TASKS[task]
    shots = "".join(f"{s('Input')}: {s(shot)}\n{s('Output')}: {do(s(shot))}\n" for shot in SHOTS)
    return f"{s(instruction)}\n{shots}{s('Input')}: {s(request)}\n{s('Output')}:", do(s(request)).split()[0]


def shots_questions(n: int, seed: int = 10) -> Iterator[dict]:
    """Yields n questions of each task, in both views. Operands are 4 to 20, as in the paper."""
    draw, words = random.Random(seed), ("plus", "minus", "times")
    for task, i in itertools.product(TASKS, range(n)):
        request = f"What is {draw.randint(4, 20)} {draw.choice(words)} {draw.randint(4, 20)}?"
        for view, (s, _) in VIEWS.items():
            prompt, answer = shots_prompt(task, request, s)
            check = lambda reply, answer=answer: reply.lstrip().startswith(answer)
            yield {"id": f"{task}-{i}", "view": view, "prompt": prompt, "check": check}


def data_questions(path: str, limit: int | None) -> Iterator[dict]:
    """Yields the questions of a file of `prompt` and `reference`, such as demo/heldout.jsonl, in both views."""
    for row in demo_rows(lambda name: path)[:limit]:
        if row["reference"]["kind"] == "code":
            raise InputError(f"{row['where']}: code cannot be written in leetspeak; leave the record out")
        for view, (s, inverse) in VIEWS.items():
            check = lambda reply, row=row, inverse=inverse: demo_verdict(inverse(reply), row)[1]
            yield {"id": row["id"], "view": view, "prompt": s(row["prompt"]), "check": check}


def ask(source: str, questions: list[dict], args: Namespace) -> Iterator[dict]:
    """Yields {"id", "view", "prompt", "checkpoint", "reply", "correct"} for each question."""
    settings = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}
    replies = generate_iter(*load_for_inference(source, args), [q["prompt"] for q in questions], **settings)
    for i, reply, _ in sorted(tqdm(replies, source, len(questions), unit="reply", disable=None)):
        question = {key: questions[i][key] for key in ("id", "view", "prompt")}
        yield question | {"checkpoint": source, "reply": reply, "correct": bool(questions[i]["check"](reply))}


def main() -> None:
    p = Parser(description=__doc__)
    # models
    p.add_argument("--ckpt", required=True, help="hub id, folder or .pt file of the fine-tuned model")
    p.add_argument("--base", required=True, help="the model before fine-tuning")
    # questions
    p.add_argument("--data", metavar="F", help="JSON Lines of `prompt` and `reference`; without it, the paper's test")
    p.add_argument("--limit", type=at_least(2), help="number of questions (default: all, or 100 per task of the test)")
    p.add_argument("--out", type=file_out('"view"'), default="conjugate.jsonl", help="file of replies and verdicts")
    add_generation_flags(p, max_new_tokens=32)
    args = p.parse_args()
    questions = list(data_questions(args.data, args.limit) if args.data else shots_questions(args.limit or 100))
    check_loadable(args.ckpt)
    base, tuned = (list(ask(source, questions, args)) for source in (args.base, args.ckpt))
    write_jsonl(args.out, base + tuned)
    print(drop_table(*({v: [x["correct"] for x in some if x["view"] == v] for v in VIEWS} for some in (base, tuned))))
    print(f"wrote {args.out}: {len(base + tuned)} replies. To see what the fine-tuning added:")
    print_next("python", "-m", "variants.novelty", "--ckpt", args.ckpt, "--base", args.base)


if __name__ == "__main__":
    cli(single_process(main))
