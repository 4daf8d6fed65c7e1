"""The report's section on how to repeat the studies: recorded commands and their times."""

import shlex
from pathlib import Path

from experiments import tables
from experiments.steps import study_flags
from experiments.tables import STUDIES, markdown_table

CORES = 2  # of the machine that the studies ran on


def flag(result: dict, steps: str, name: str, default: str = "unknown") -> str:
    """The value of a flag in the first recorded command that has it. steps: prefix of the step names to look at."""
    commands = [command for step, command in result["commands"].items() if step.startswith(steps)]
    return next((command[command.index(name) + 1] for command in commands if name in command[:-1]), default)


def step_module(step: str) -> str:
    """The module of the study that ran a step."""
    arm = step.removeprefix("eval-test-").removeprefix("eval-dev-")
    if step in ("instructions", "teacher", "data"):
        return "data"
    if step.partition("-")[0] in (*tables.BENCHMARKS, "perplexity"):
        return "side_effects"
    if "-seed-" in arm:
        return "seeds"
    if arm.startswith("general-"):
        return "general"
    in_paper = {row.arm for row in tables.PAPER}
    for _, rows, module, _ in STUDIES[1:]:
        if step == "own-data" or arm in {row.arm for row in rows} - in_paper:
            return module
    return "paper_table"


def study_folder(result: dict) -> str:
    """The --out of the studies, the parent of the data's folder."""
    return str(Path(flag(result, "data", "--out", "runs/study/data")).parent)


def study_command(result: dict, module: str) -> str:
    """The command of a study, with the flags that differ from the defaults."""
    student = flag(result, "data", "--small", flag(result, "sft-", "--ckpt", result["student"]))
    words = ["python", "-m", f"experiments.{module}", "--student", student]
    out = study_folder(result)
    words += ["--out", out] if out != "runs/study" else []
    rates = {kind: sorted(choice["dev"], key=float) for kind, choice in result["chosen"].items()}
    for kind in {"sft", "kto"} - rates.keys():
        if lr := flag(result, f"{kind}-", "--lr", ""):
            rates[kind] = [lr]
    used = {
        "sft_lrs": rates.get("sft"),
        "kto_lrs": rates.get("kto"),
        "sft_epochs": flag(result, "general-sft" if module == "general" else "sft-", "--epochs", ""),
        "batch_size": flag(result, "sft-", "--batch-size", ""),
        "beta": flag(result, "kto-", "--beta", ""),
        "seed": flag(result, "sft-", "--seed", ""),
        "reply_tokens": flag(result, "data", "--max-new-tokens", ""),
        "max_new_tokens": flag(result, "eval-test-", "--max-new-tokens", ""),
        "dtype": flag(result, "sft-", "--dtype", ""),
    }
    parser = study_flags("")
    for name, value in used.items():
        default = parser.get_default(name)
        if value and value != (default if isinstance(default, list) else str(default)):
            words += [f"--{name.replace('_', '-')}", *([value] if isinstance(value, str) else value)]
    if module in ("data", "general"):
        words += ["--teacher", flag(result, "teacher", "--ckpt", result["teacher"])]
    if module == "seeds":
        arms = dict.fromkeys(step.partition("-seed-")[0] for step in result["commands"] if "-seed-" in step)
        words += ["--arms", *(arm for arm in tables.NAMES if arm in arms)]
    if module == "side_effects":
        tasks = [task for task in (*tables.BENCHMARKS, "perplexity") if f"{task}-base" in result["commands"]]
        words += ["--tasks", *tasks] if tasks else []
        words += ["--arms", *arms] if (arms := benchmarked_arms(result)) and set(arms) - {"base", *tables.KEPT} else []
    return shlex.join(words)


def benchmarked_arms(result: dict) -> list[str]:
    """The arms that a benchmark was run on, in the order of the tables."""
    tasks = (*tables.BENCHMARKS, "perplexity")
    return [arm for arm in tables.NAMES if any(f"{task}-{arm}" in result["commands"] for task in tasks)]


def with_teacher(command: list[str]) -> list[str]:
    """A recorded command of make_data.py with an address for the stand-in, whose port differs in each run."""
    return [*command, "--teacher", "http://127.0.0.1:8000/v1"] if command[0] == "make_data.py" else command


def repeat_section(results: list[dict]) -> str:
    """A table with one command per study and its time, then the commands of all steps."""
    lines, commands, collected = [], [], []
    numbers = [(0, 0), *tables.section_numbers(results[1:])]
    for result, (number, general) in zip(results, numbers):
        by_module = {}
        for step in result["commands"]:
            by_module.setdefault(step_module(step), []).append(step)
        modules = ["data", *(module for _, _, module, _ in STUDIES), "side_effects", "seeds", "general"]
        titles = ["the data", *map(str, range(1, len(STUDIES) + 2)), "other seeds", str(general)]
        if number:  # one section for the paper's table and the side effects
            titles[1] = titles[-3] = str(number)
        for title, module in zip(titles, modules):
            steps = by_module.get(module, [])
            if steps or not number and module not in ("seeds", "general"):
                minutes = sum(result["seconds"].get(step, 0) for step in steps) / 60
                time = f"{minutes:.0f} min" if steps else "not run"
                lines.append([result["student"], title, f"`{study_command(result, module)}`", time])
            commands += [
                f"python {shlex.join(with_teacher(result['commands'][step]))}  # {step}: {result['seconds'].get(step, 0):.0f} s\n"
                for step in steps
            ]
        names = f"--student {shlex.quote(result['student'])} --teacher {shlex.quote(result['teacher'])}"
        collected.append(f"python -m experiments.collect --out {study_folder(result)} {names}\n")
    return f"""## How to repeat it

{markdown_table(["student", "section", "command", "time"], lines)}
Times are of {CORES} cores shared with other work. Of an interrupted step, only the last part counts. These commands then
collect the results and write this page:

```bash
{"".join(collected)}python -m experiments.report
```

<details><summary>The {len(commands)} commands that the studies ran</summary>

```bash
{"".join(commands)}```

</details>
"""
