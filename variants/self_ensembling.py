"""Self-ensembling (arXiv 2312.13772): asks a question under several prompts and combines the answers, for calibration.

    python -m variants.self_ensembling --ckpt tuned --tasks mmlu --limit 500 --data-dir data  # -> self_ensembling.jsonl

The first prompt is the benchmark's own, so its row equals that of `eval.py --protocol loglik`. The others reorder the
worked examples (mmlu, cmmlu, ceval; the paper draws new ones) or are templates of our own. The probabilities of the
labels are the softmax of their log-likelihoods; the paper takes the mean logit of a label of several tokens. The
authors later recommended max as the robust method.
"""

import random
from collections.abc import Callable
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

from core.distributed import single_process
from core.files import InputError, cli, print_next
from core.flags import Parser, add_device_flags, at_least, file_out
from core.records import write_jsonl
from evaluation.benchmarks import BENCHMARKS, load_questions
from evaluation.downloads import find_data_file
from evaluation.flags import add_question_flags
from evaluation.likelihoods import ask_likelihoods
from evaluation.stats import calibration, figure_table
from generate import load_for_inference

TASKS = ("mmlu", "cmmlu", "ceval", "arc_easy", "arc_challenge", "truthfulqa_mc1")  # questions with one right choice
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
    """-> {"accuracy", "confidence", "ece"}. probabilities: (L,) for each question. answers: the right labels."""
    confidences = [p.max().item() for p in probabilities]
    right = [float(p.argmax().item() == answer) for p, answer in zip(probabilities, answers, strict=True)]
    return {"accuracy": fmean(right), "confidence": fmean(confidences), "ece": calibration(confidences, right)["ece"]}


def vary_prompts(task: str, questions: list[dict], n: int, find: Callable, seed: int) -> list[list[str]]:
    """The text before the choices of every question, under n prompts: n lists. The first is the benchmark's own."""
    bench, rows = BENCHMARKS[task], [q["row"] for q in questions]
    own = [[q["messages"][0]["content"] for q in questions]]
    if bench.get("few_shot"):
        reorder = lambda draw: lambda shots: draw.sample(shots, len(shots))
        return own + [bench["contexts"](rows, find, reorder(random.Random(seed + k))) for k in range(1, n)]
    if n > len(TEMPLATES) + 1:
        raise InputError(f"--prompts {n}: {task} has {len(TEMPLATES) + 1}, its own and those of TEMPLATES")
    return own + [[template.format(row["question"]) for row in rows] for template in TEMPLATES[: n - 1]]


def score_all(found: list[Tensor], answers: list[int]) -> dict[str, dict[str, float]]:
    """{name: figures} of each prompt alone, of their mean, and of each ensemble. found: (V, L) of each question."""
    alone = {f"prompt {v + 1}": score([p[v] for p in found], answers) for v in range(len(found[0]))}
    mean = {key: fmean(figures[key] for figures in alone.values()) for key in alone["prompt 1"]}
    ensembles = {f"ensemble, {m}": score([combine(p, m) for p in found], answers) for m in ("mean", "max", "vote")}
    return alone | {"one prompt, mean": mean} | ensembles


def main() -> None:
    p = Parser(description=__doc__)
    add_question_flags(p, TASKS)
    p.set_defaults(protocol="loglik", allow_code_execution=False)  # for load_questions
    # method
    p.add_argument("--prompts", type=at_least(2), default=4, help="number of prompts; the time grows with it")
    p.add_argument("--seed", type=int, default=0, help="seed of the orders of worked examples")
    # model
    p.add_argument("--ckpt", required=True, help="hub id, folder or .pt file")
    p.add_argument("--batch-size", type=at_least(1), default=32, help="questions in flight; changes no answer")
    add_device_flags(p, "dtype of weights and computation")
    p.add_argument("--out", type=file_out('"probabilities"'), default="self_ensembling.jsonl", help="all probabilities")
    args, lines = p.parse_args(), []
    find = lambda name: find_data_file(args.data_dir, name)
    work = {task: load_questions(task, args) for task in args.tasks}
    prompts = {task: vary_prompts(task, work[task], args.prompts, find, args.seed) for task in work}
    model, tokenizer = load_for_inference(args.ckpt, args)
    for task, questions in work.items():
        rows, n = [q["row"] for q in questions], len(questions)
        pairs = [pair for texts in prompts[task] for pair in zip(questions, texts)]  # prompt by prompt
        asked = [q | {"messages": [{"role": "user", "content": text}]} for q, text in pairs]
        asking = ask_likelihoods(model, tokenizer, asked, args.batch_size)
        logps = [record["logps"] for _, record in tqdm(asking, task, len(asked), unit="question", disable=None)]
        found = [torch.tensor(logps[i::n], dtype=torch.float64).softmax(1) for i in range(n)]  # (V, L) each
        answers = [list(row["choices"]).index(row["answer"]) for row in rows]
        print(figure_table(f"{task}, {n} questions", score_all(found, answers)), end="\n\n")
        for row, probabilities in zip(rows, found):
            line = {"task": task, "id": row["id"], "labels": list(row["choices"]), "answer": row["answer"]}
            lines.append(line | {"probabilities": probabilities.tolist()})
    write_jsonl(args.out, lines)
    print(f"wrote {args.out}: {len(lines)} questions under {args.prompts} prompts. All figures of the first prompt:")
    same = ["--tasks", *args.tasks, "--data-dir", args.data_dir, *(["--limit", str(args.limit)] if args.limit else [])]
    print_next("python", "eval.py", "--ckpt", args.ckpt, *same, "--protocol", "loglik")


if __name__ == "__main__":
    cli(single_process(main))
