"""Conjugate prompting (arXiv 2309.10105): did fine-tuning lose a skill, or only hide it?

    python -m variants.conjugate_prompting --base base --ckpt tuned                          # the paper's test, no data
    python -m variants.conjugate_prompting --base base --ckpt tuned --data demo/heldout.jsonl

A map rewrites the prompt so that it is far from the fine-tuning data but asks for the same skill. If the tuned model
loses less on the rewritten prompts, the skill was only hidden. The map is leetspeak; the paper's translation needs a
teacher and is left out. In the paper's test, two examples (here ours) repeat or capitalise their input. A model without
the skill answers the third input instead. These inputs are the paper's sums, without its sentences with a blank.
"""

import random
import re
from argparse import Namespace

from tqdm import tqdm

from core.distributed import single_process
from core.files import InputError, cli, print_next
from core.flags import Parser, add_generation_flags, at_least, file_out
from core.records import write_jsonl
from evaluation.benchmarks import demo_verdict
from evaluation.rows import demo_rows
from evaluation.stats import bootstrap, figure_table
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


def drops(base: dict[str, list[bool]], tuned: dict[str, list[bool]]) -> tuple[dict[str, float], list[float]]:
    """-> ({view: acc_base - acc_tuned}, the difference of the drops for each question).

        hidden, not lost:    acc_base(s) - acc_tuned(s)  <  acc_base(id) - acc_tuned(id)      "leet" is s, "plain" is id

    base, tuned: verdicts of the same questions in each view. The mean of the differences is drop(s) - drop(id).
    """
    lost = {view: [int(b) - int(t) for b, t in zip(base[view], tuned[view], strict=True)] for view in VIEWS}
    difference = [s - plain for s, plain in zip(lost["leet"], lost["plain"], strict=True)]
    return {view: sum(values) / len(values) for view, values in lost.items()}, difference


def shots_question(task: str, request: str, name: str) -> dict:
    """The paper's test: two examples of a task, then a request as third input. A right reply does the task on it."""
    instruction, do = TASKS[task]
    prompts, answers = {}, {}
    for view, (s, _) in VIEWS.items():
        pairs = [(shot, f" {do(s(shot))}") for shot in SHOTS] + [(request, "")]
        lines = [f"{s('Input')}: {s(given)}\n{s('Output')}:{reply}" for given, reply in pairs]
        prompts[view], answers[view] = "\n".join([s(instruction), *lines]), do(s(request)).split()[0]
    return {"id": name, "prompts": prompts, "check": lambda view, reply: reply.lstrip().startswith(answers[view])}


def shots_questions(n: int, seed: int = 10) -> list[dict]:
    """n questions of each task. Operands are 4 to 20, as in the paper."""
    draw, words = random.Random(seed), ("plus", "minus", "times")
    request = lambda: f"What is {draw.randint(4, 20)} {draw.choice(words)} {draw.randint(4, 20)}?"
    return [shots_question(task, request(), f"{task}-{i}") for task in TASKS for i in range(n)]


def data_questions(path: str, limit: int | None) -> list[dict]:
    """Questions from a file of records with `prompt` and `reference`, such as demo/heldout.jsonl."""
    found = []
    for row in demo_rows(lambda name: path)[:limit]:
        if row["reference"]["kind"] == "code":
            raise InputError(f"{row['where']}: code cannot be written in leetspeak; leave the record out")
        prompts = {view: s(row["prompt"]) for view, (s, _) in VIEWS.items()}
        check = lambda view, reply, row=row: demo_verdict(VIEWS[view][1](reply), row)[1]
        found.append({"id": row["id"], "prompts": prompts, "check": check})
    return found


def ask_both_views(source: str, questions: list[dict], args: Namespace) -> list[dict]:
    """-> a line {"id", "checkpoint", "view", "prompt", "reply", "correct"} for each question in each view."""
    asked = [(view, q) for q in questions for view in VIEWS]
    prompts, lines = [q["prompts"][view] for view, q in asked], []
    settings = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}
    replies = generate_iter(*load_for_inference(source, args), prompts, **settings)
    for i, reply, _ in sorted(tqdm(replies, source, len(prompts), unit="reply", disable=None)):
        (view, q), prompt = asked[i], prompts[i]
        line = {"id": q["id"], "checkpoint": source, "view": view, "prompt": prompt, "reply": reply}
        lines.append(line | {"correct": bool(q["check"](view, reply))})
    return lines


def drop_table(base: dict[str, list[bool]], tuned: dict[str, list[bool]]) -> str:
    """The table of accuracies, and one sentence of conclusion."""
    lost, difference = drops(base, tuned)
    before, after = ({view: sum(x[view]) / len(x[view]) for view in VIEWS} for x in (base, tuned))
    (low, high), _ = bootstrap(difference)
    change = f"drop(leet) - drop(plain): {lost['leet'] - lost['plain']:+.3f}, 95% interval {low:+.3f} to {high:+.3f}"
    if lost["plain"] <= 0:
        conclusion = "Nothing was lost on the plain prompts."
    elif before["leet"] < before["plain"] / 2:
        conclusion = "The base itself fails on the rewritten prompts, so a smaller drop there proves nothing."
    elif high < 0:
        conclusion = "The drop is smaller on the rewritten prompts: part of the skill was hidden, not lost."
    else:
        conclusion = "No sign that a skill was hidden."
    return "\n".join([figure_table("", {"base": before, "tuned": after, "drop": lost}), change, conclusion])


def parse_args() -> Namespace:
    p = Parser(description=__doc__)
    # models
    p.add_argument("--ckpt", required=True, help="hub id, folder or .pt file of the fine-tuned model")
    p.add_argument("--base", required=True, help="the model before fine-tuning, with the same tokenizer")
    # questions
    p.add_argument("--data", metavar="F", help="JSON Lines of `prompt` and `reference`; without it, the paper's test")
    p.add_argument("--limit", type=at_least(2), help="number of questions (default: all, or 100 per task of the test)")
    p.add_argument("--out", type=file_out('"view"'), default="conjugate.jsonl", help="file of replies and verdicts")
    add_generation_flags(p, max_new_tokens=32)
    return p.parse_args()


def main() -> None:
    args = parse_args()
    questions = data_questions(args.data, args.limit) if args.data else shots_questions(args.limit or 100)
    for source in (args.base, args.ckpt):
        check_loadable(source)
    lines = [ask_both_views(source, questions, args) for source in (args.base, args.ckpt)]
    write_jsonl(args.out, lines[0] + lines[1])
    verdicts = [{v: [line["correct"] for line in some if line["view"] == v] for v in VIEWS} for some in lines]
    print(drop_table(*verdicts))
    print(f"wrote {args.out}: {len(lines[0] + lines[1])} replies. To see what the fine-tuning added:")
    print_next("python", "-m", "variants.novelty", "--ckpt", args.ckpt, "--base", args.base)


if __name__ == "__main__":
    cli(single_process(main))
