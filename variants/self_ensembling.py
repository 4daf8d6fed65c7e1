"""Self-ensembling (arXiv 2312.13772): asks a question under several prompts and combines the answers, for calibration.

    python -m variants.self_ensembling --ckpt tuned --tasks mmlu --limit 500 --data-dir data  # -> self_ensembling.jsonl

Nothing is trained. The first prompt is the benchmark's own, so its row equals that of `eval.py --protocol loglik`. For
tasks with worked examples (mmlu, cmmlu, ceval) the other prompts reorder them; the paper draws new ones.
For other tasks they are templates of our own. A probability is the exponential of a choice's log-likelihood, relative
to all choices, as in eval.py. The paper takes the mean logit of a label of several tokens. The authors later
recommended max as the robust method.
"""

import argparse
import functools
import random
from collections.abc import Callable
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

from core.distributed import single_process
from core.files import InputError, cli, print_next
from core.flags import Parser, add_device_flags, at_least
from core.outputs import check_file
from core.records import write_jsonl
from core.tokenizer import Tokenizer
from evaluation.benchmarks import BENCHMARKS, load_questions
from evaluation.downloads import find_data_file
from evaluation.likelihoods import ask_likelihoods
from evaluation.stats import calibration
from generate import load_for_inference
from model import Qwen2

METHODS = ("mean", "max", "vote")
MARK = '"probabilities"'  # in each line of OUT
# tasks with one right choice, except those that continue a text
TASKS = ("mmlu", "cmmlu", "ceval", "arc_easy", "arc_challenge", "truthfulqa_mc1")
TEMPLATES = (  # the text before a choice, for tasks without worked examples
    "Q: {}\nA:",
    "{}\nThe answer is:",
    "Answer the following question.\n\n{}\nAnswer:",
    "Here is a question: {}\nMy answer:",
)


def combine(p: Tensor, method: str) -> Tensor:
    """The ensemble's probabilities of the labels, (L,), which sum to 1.

        mean: avg_v p_v        max: max_v p_v, label by label        both divided by their sum
        vote: each variant v votes for its likeliest label with weight max(p_v); the mean of the p_v that voted for the
              label with the most weight

    p: (V, L), the probabilities of L labels under V prompts. The answer is the likeliest label, and its confidence is
    its probability.
    """
    if method == "vote":
        weight, label = p.max(1)  # (V,)
        winner = p.new_zeros(p.shape[1]).index_add(0, label, weight).argmax()
        p = p[label == winner]
    found = p.amax(0) if method == "max" else p.mean(0)
    return found / found.sum()


def score(probabilities: list[Tensor], answers: list[int]) -> dict[str, float]:
    """-> {"accuracy", "confidence", "ece"}. probabilities: (L,) of a question's labels. answers: the right labels."""
    confidences = [p.max().item() for p in probabilities]
    verdicts = [float(p.argmax().item() == answer) for p, answer in zip(probabilities, answers, strict=True)]
    ece = calibration(confidences, verdicts)["ece"]
    return {"accuracy": fmean(verdicts), "confidence": fmean(confidences), "ece": ece}


def vary_prompts(task: str, questions: list[dict], n: int, find: Callable, seed: int) -> list[list[str]]:
    """The text before the choices of every question, under n prompts: n lists. The first is the benchmark's own."""
    bench, rows = BENCHMARKS[task], [q["row"] for q in questions]
    found = [[q["messages"][0]["content"] for q in questions]]
    if bench.get("few_shot"):
        for k in range(1, n):
            draw = random.Random(seed + k)
            found.append(bench["contexts"](rows, find, lambda shots, draw=draw: draw.sample(shots, len(shots))))
        return found
    if n > len(TEMPLATES) + 1:
        there = f"{len(TEMPLATES) + 1}, its own and those of variants/self_ensembling.py"
        raise InputError(f"--prompts {n}: {task} has {there}")
    return found + [[template.format(row["question"]) for row in rows] for template in TEMPLATES[: n - 1]]


def label_probabilities(
    model: Qwen2, tokenizer: Tokenizer, questions: list[dict], prompts: list[list[str]], batch_size: int
) -> list[Tensor]:
    """-> for each question the probabilities of its labels under each prompt, (V, L) in fp64."""
    found = [[] for _ in questions]
    with tqdm(total=len(questions) * len(prompts), unit="question", disable=None) as bar:
        for texts in prompts:
            asked = [{**q, "messages": [{"role": "user", "content": text}]} for q, text in zip(questions, texts)]
            for i, record in ask_likelihoods(model, tokenizer, asked, batch_size):
                found[i].append(torch.tensor(record["logps"], dtype=torch.float64).softmax(0))
                bar.update()
    return [torch.stack(rows) for rows in found]


def parse_args() -> argparse.Namespace:
    p = Parser(description=__doc__.split("\n\n")[0])
    # questions
    p.add_argument("--tasks", nargs="+", required=True, choices=TASKS, help="benchmarks of docs/benchmarks.md")
    p.add_argument("--data-dir", default="data", help="folder of the benchmark files; missing ones are downloaded")
    p.add_argument("--limit", type=at_least(1), help="questions per task, in turn from its subjects (default: all)")
    # method
    p.add_argument("--prompts", type=at_least(2), default=4, help="number of prompts; the time grows with it")
    p.add_argument("--seed", type=int, default=0, help="seed of the orders of worked examples")
    # model
    p.add_argument("--ckpt", required=True, help="hub id, folder or .pt file")
    p.add_argument("--batch-size", type=at_least(1), default=32, help="questions in flight; changes no answer")
    add_device_flags(p, "dtype of weights and computation")
    # output
    p.add_argument("--out", default="self_ensembling.jsonl", help="JSON Lines file of all probabilities")
    args = p.parse_args()
    check_file(args.out, MARK)
    args.protocol, args.allow_code_execution = "loglik", False  # for load_questions
    return args


def calibration_table(task: str, found: list[Tensor], answers: list[int]) -> list[str]:
    """The rows of a task's table: each prompt alone, their mean, the ensembles."""
    alone = [score([p[v] for p in found], answers) for v in range(len(found[0]))]
    rows = [(f"prompt {v + 1}{', its own' if v == 0 else ''}", figures) for v, figures in enumerate(alone)]
    rows.append(("one prompt, mean", {key: fmean(f[key] for f in alone) for key in alone[0]}))
    rows += [(f"ensemble, {method}", score([combine(p, method) for p in found], answers)) for method in METHODS]
    head = f"{f'{task}, {len(answers)} questions':28}{'accuracy':>10}{'confidence':>12}{'ECE':>8}"
    return [head, *(f"{name:28}{f['accuracy']:10.3f}{f['confidence']:12.3f}{f['ece']:8.3f}" for name, f in rows)]


def main() -> None:
    args = parse_args()
    find, lines = functools.partial(find_data_file, args.data_dir), []
    questions = {task: load_questions(task, args) for task in args.tasks}
    prompts = {task: vary_prompts(task, asked, args.prompts, find, args.seed) for task, asked in questions.items()}
    model, tokenizer = load_for_inference(args.ckpt, args)
    for task, asked in questions.items():
        found = label_probabilities(model, tokenizer, asked, prompts[task], args.batch_size)
        labels, right = [list(q["row"]["choices"]) for q in asked], [q["row"]["answer"] for q in asked]
        answers = [some.index(label) if label in some else -1 for some, label in zip(labels, right)]
        print("\n".join(calibration_table(task, found, answers)), end="\n\n")
        lines += [
            {"task": task, "id": q["row"]["id"], "labels": some, "answer": label, "probabilities": p.tolist()}
            for q, some, label, p in zip(asked, labels, right, found)
        ]
    write_jsonl(args.out, lines)
    print(f"wrote {args.out}: {len(lines)} questions under {args.prompts} prompts. All figures of the first prompt:")
    same = ["--tasks", *args.tasks, "--data-dir", args.data_dir, *(["--limit", str(args.limit)] if args.limit else [])]
    print_next("python", "eval.py", "--ckpt", args.ckpt, *same, "--protocol", "loglik")


if __name__ == "__main__":
    cli(single_process(main))
