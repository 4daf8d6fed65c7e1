"""Splits the demo's data into training, validation, test and withheld parts, to compare training methods.

    python -m demo.split --data runs/demo/data --out runs/variants

OUT/sft.jsonl           training examples: the curated ones without the withheld tasks and the validation instructions.
                        An example whose reply is right has a `reference`
OUT/pairs.jsonl         preference pairs for the same instructions
OUT/groups.jsonl        all different replies to each of those instructions, with the teacher's grades as rewards
OUT/validation.jsonl    the validation instructions with their replies
OUT/questions/          a --data-dir for eval.py --tasks demo. The id of a question begins with its part:
                        validation   instructions of the curated data that are not trained on
                        test         the demo's held-out instructions of the tasks that are trained on
                        withheld     instructions of the withheld tasks, which the base model answers best
"""

import os
import random
from collections.abc import Iterable, Iterator

from core.files import InputError, cli
from core.flags import Parser
from core.outputs import claim_folder
from core.records import read_jsonl, write_jsonl
from demo import world
from demo.tasks import TASKS
from demo.teacher import parse_loosely
from verification.answers import check_reply

# Tasks of which the base model answers 8 to 12 of the 12 held-out instructions
WITHHELD = ("copy", "female", "capital", "continent", "colour", "animal_sound", "number_to_word", "zh_capital")


def user_text(row: dict) -> str:
    """The instruction of a single-turn row of make_data.py."""
    return row.get("prompt", row.get("messages"))[0]["content"]


def question(part: str, i: int, item: world.Item) -> dict:
    reference = world.reference(item)
    return {"id": f"{part}-{i:04d}", "task": item.task.name, "prompt": item.prompt, "reference": reference}


def validation_items(rows: list[dict], n: int, seed: int) -> list[world.Item]:
    """n instructions of the rows whose reply can be checked without running code, drawn from the seed."""
    items = [parse_loosely(user_text(row)) for row in rows]
    items = [item for item in items if item and item.task.kind != "code" and item.task.name not in WITHHELD]
    if len(items) < n:
        raise InputError(f"--validation {n}: the data hold {len(items)} instructions that can be checked")
    return random.Random(seed).sample(items, n)


def withheld_items(per_task: int, seed: int) -> list[world.Item]:
    """per_task distinct instructions of each withheld task."""
    rng, items = random.Random(seed), []
    for task in (task for task in TASKS if task.name in WITHHELD):
        mine = {}
        while len(mine) < per_task:
            item = world.make_item(task, rng)
            mine[item.prompt] = item
        items += mine.values()
    return items


def with_reference(row: dict) -> dict:
    """The row with a reference, by which a program can check replies. Unchanged if the row's own reply is wrong."""
    item = parse_loosely(user_text(row))
    reference = world.reference(item) if item and item.task.kind != "code" else None
    if reference and check_reply(reference["kind"], row["messages"][-1]["content"], reference["value"]):
        return row | {"reference": reference}
    return row


def paired_rows(rows: Iterable[dict]) -> Iterator[dict]:
    """The pairs of kto.jsonl: two rows of one id, one desirable and one not."""
    replies = {}
    for row in rows:
        replies.setdefault(row["id"], {})[row["label"]] = row
    for both in replies.values():
        if len(both) == 2:
            yield {
                "prompt": both[True]["prompt"],
                "chosen": both[True]["completion"],
                "rejected": both[False]["completion"],
            }


def reply_groups(scored: list[dict], ids: set[str]) -> Iterator[dict]:
    """Rows of 6_score.jsonl with these ids, as groups of replies with rewards from 1 to 5. Equal replies count once."""
    for row in scored:
        rewards = {response["text"]: float(response["quality"]) for response in row["responses"].values()}
        if row["id"] in ids and len(rewards) > 1:
            yield {"prompt": row["prompt"], "completions": [*rewards], "rewards": [*rewards.values()]}


def divide(
    sft: list[dict], kto: list[dict], scored: list[dict], n_validation: int, n_withheld: int, seed: int
) -> tuple[dict, dict]:
    """The rows of sft.jsonl, kto.jsonl and 6_score.jsonl -> ({file: rows}, {part: items of its questions})."""
    validation = validation_items(sft, n_validation, seed)
    kept_back = {item.prompt for item in validation}

    def part_of(row: dict) -> str:
        item = parse_loosely(user_text(row))
        if item and item.prompt in kept_back:
            return "validation"
        return "withheld" if item and item.task.name in WITHHELD else "train"

    trained_kto = [row for row in kto if part_of(row) == "train"]
    files = {
        "sft.jsonl": [with_reference(row) for row in sft if part_of(row) == "train"],
        "pairs.jsonl": list(paired_rows(trained_kto)),
        "groups.jsonl": list(reply_groups(scored, {row["id"] for row in trained_kto})),
        "validation.jsonl": [row for row in sft if part_of(row) == "validation"],
    }
    test = [item for item in world.make_heldout().values() if item.task.name not in WITHHELD]
    return files, {"validation": validation, "test": test, "withheld": withheld_items(n_withheld, seed)}


def main() -> None:
    p = Parser(description=__doc__)
    p.add_argument("--data", default="runs/demo/data", help="folder that make_data.py wrote")
    p.add_argument("--out", default="runs/variants", help="folder to write")
    p.add_argument("--validation", type=int, default=300, help="number of validation questions")
    p.add_argument("--withheld", type=int, default=60, help="number of questions of each withheld task")
    p.add_argument("--seed", type=int, default=0, help="random seed of the validation and withheld questions")
    args = p.parse_args()
    names = ("sft.jsonl", "kto.jsonl", "6_score.jsonl")
    rows = ([row for _, row in read_jsonl(os.path.join(args.data, name))] for name in names)
    files, parts = divide(*rows, args.validation, args.withheld, args.seed)
    questions = [question(part, i, item) for part, items in parts.items() for i, item in enumerate(items)]
    folder = os.path.join(args.out, "questions", "demo")
    claim_folder(args.out, "demo.split", files)
    claim_folder(folder, "demo.split", ["heldout.jsonl"])
    for name, lines in files.items():
        write_jsonl(os.path.join(args.out, name), lines)
    write_jsonl(os.path.join(folder, "heldout.jsonl"), questions)
    counts = [f"{len(files['sft.jsonl'])} examples, {len(files['pairs.jsonl'])} pairs; questions:"]
    print(f"{args.out}:", *counts, ", ".join(f"{len(items)} {part}" for part, items in parts.items()))


if __name__ == "__main__":
    cli(main)
