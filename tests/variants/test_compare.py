"""variants/compare.py: the statistics, the reading of evaluations, and the published table."""

import json
import os
import re
import subprocess

import numpy as np
import pytest
from conftest import ROOT

from core.files import InputError
from variants import compare

RESULTS = ROOT / "docs" / "results" / "variants"


def bernoulli(p, seeds=3, n=400, seed=0):
    return (np.random.default_rng(seed).random((seeds, n)) < p).astype(float)


# ---- an arm's folder


def write_evaluation(folder, replies):
    """replies: {checkpoint: {part: verdicts}}."""
    (folder / "eval").mkdir(parents=True)
    with open(folder / "eval" / "samples.jsonl", "w") as f:
        for name, parts in replies.items():
            for part, bits in parts.items():
                for i, bit in enumerate(bits):
                    f.write(json.dumps({"checkpoint": name, "id": f"{part}-{i:04d}", "correct": bit == "1"}) + "\n")


@pytest.fixture
def arms(tmp_path, run):
    """A base and two arms, recorded."""
    parts = lambda validation, test, withheld: {"validation": validation, "test": test, "withheld": withheld}
    write_evaluation(tmp_path / "base", {"base": parts("0000", "1000", "1101")})
    runs = {"5e-4-0": parts("1100", "1100", "1001"), "2e-3-0": parts("1000", "0000", "0000")}
    runs |= {"5e-4-1": parts("0000", "1110", "1101"), "5e-4-2": parts("1111", "1010", "1011")}
    for name in "sft", "dft":
        write_evaluation(tmp_path / name, runs)
        for seed in range(3):
            (tmp_path / name / f"5e-4-{seed}.seconds").write_text(f"{seed + 1}.5 0.5\n")
    out = tmp_path / "results"
    commands = {
        "base": [],
        "sft": ["--baseline", "base", "--rate", "5e-4"],
        "dft": ["--baseline", "sft", "--rate", "5e-4"],
    }
    for name, more in commands.items():
        script = ["--command", ".venv/bin/python", "-m", f"variants.{name}", "--epochs", "2"] if more else []
        code, _, err = run("variants.compare", "record", tmp_path / name, "--out", out, *more, *script)
        assert code == 0, err
    return tmp_path


def test_the_better_rate_is_that_of_the_validation_questions_of_the_first_seed(arms, tmp_path):
    assert compare.best_rate(str(arms / "sft")) == "5e-4"  # 1/2 against 1/4
    equal = {"validation": "10", "test": "1", "withheld": "1"}
    write_evaluation(tmp_path / "tie", {"2e-3-0": equal, "5e-4-0": equal, "2e-3-1": {**equal, "validation": "11"}})
    assert compare.best_rate(str(tmp_path / "tie")) == "5e-4"


def test_the_record_of_an_arm(arms):
    result = json.loads((arms / "results" / "dft.json").read_text())
    assert result["test"] == ["1100", "1110", "1010"] and result["withheld"] == ["1001", "1101", "1011"]
    assert result["validation"] == {"5e-4": 0.5, "2e-3": 0.25} and result["cpu_seconds"] == [2.0, 3.0, 4.0]
    assert result["command"] == "-m variants.dft --epochs 2" and result["rate"] == "5e-4"


def test_the_table_of_known_verdicts(arms):
    results = compare.read_arms(str(arms / "results"))
    base, sft, dft = compare.arm_table(results).splitlines()[2:]
    assert base.startswith("| **base** | 25.0 ± ") and "| 100.0 |" in base
    # test: 7 of 12; kept: of questions 0, 1 and 3, which the base answers right, 2 + 3 + 2 of 9
    assert sft.startswith("| **sft** | 58.3 ± ") and "| +33.3 (" in sft and "| 77.8 | -22.2 (" in sft
    n = len((ROOT / "variants" / "dft.py").read_text().splitlines())
    assert re.search(rf"\| \+0.0 \(\+0.0 to \+0.0\) \| 77.8 \| \+0.0 .* \| 3 \| {n} \| 5e-4 \|$", dft), dft
    assert "No gain in score or forgetting: dft." in compare.findings(results)


def test_what_differs_is_said(arms):
    results = compare.read_arms(str(arms / "results"))
    for part in "test", "kept":
        results["base"][part] = bernoulli(0.4, seeds=1)
        results["sft"][part], results["dft"][part] = bernoulli(0.6), bernoulli(0.6) * bernoulli(0.5, seed=1)
    results["good"] = {**results["dft"], "test": np.ones((3, 400)), "kept": np.ones((3, 400))}
    text = compare.findings(results)
    assert "Scores higher: good." in text and "Scores lower: dft." in text
    assert "Forgets less: good." in text and "Forgets more: dft." in text and "forgetting: dft." in text


def test_results_without_the_base(tmp_path):
    with pytest.raises(InputError, match=r"holds no base\.json"):
        compare.read_arms(str(tmp_path))


# ---- what is published


def test_the_published_lines_are_those_of_the_files():
    rows = (ROOT / "variants" / "README.md").read_text().splitlines()
    told = {cells[1].strip(): cells[7].strip() for cells in (row.split("|") for row in rows) if len(cells) == 10}
    for name in ("dft", "dpo", "s3ft", "got", "lt_sft"):
        assert told[name] == str(len((ROOT / "variants" / f"{name}.py").read_text().splitlines()))
    assert told["first_3_blocks"] == told["sorted_finetuning"] and told["**sft**"] == told["random_half"] == ""


def test_the_published_table_and_findings_follow_from_the_results():
    results = compare.read_arms(str(RESULTS))
    assert compare.arm_table(results) in (ROOT / "variants" / "README.md").read_text()
    assert compare.findings(results) in (ROOT / "docs" / "results" / "variants.md").read_text()


# ---- variants/run.sh, with a Python that only writes down what it is asked to do

STUB = """#!/usr/bin/env bash
echo "$*" >>"$RUN/calls"
for ((i = 1; i < $#; i++)); do [[ ${!i} == --out ]] && { next=$((i + 1)); out=${!next}; break; }; done
case "$*" in
  *" best "*) echo 2e-3 ;;
  *" record "*) mkdir -p "$out"; echo {} >"$out/$(basename "$4").json" ;;
  *sorted_finetuning*) mkdir -p "$out" "$out-3" ;;
  *" --lr "*) [[ $* == *"$FAIL"* ]] && { echo broken >&2; exit 2; }; mkdir -p "$out" ;;
esac
"""


@pytest.fixture
def run_sh(tmp_path):
    """run_sh(arm, ..., fail=words) -> (exit status, the new calls). Calls with these words fail."""
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(STUB)
    stub.chmod(0o755)
    (tmp_path / "questions" / "demo").mkdir(parents=True)
    (tmp_path / "questions" / "demo" / "heldout.jsonl").touch()
    (tmp_path / "sft.jsonl").touch()

    def call(*arms, fail="nothing"):
        calls.write_text("")
        env = {**os.environ, "PYTHON": str(stub), "RUN": str(tmp_path), "FAIL": fail}
        done = subprocess.run(["bash", "variants/run.sh", *arms], cwd=ROOT, env=env, capture_output=True, text=True)
        return done.returncode, [line.replace(f"{tmp_path}/", "") for line in calls.read_text().splitlines()]

    return call


def trainings(calls):
    return [re.search(r"--lr (\S+) --seed (\d)", call).groups() for call in calls if "--lr" in call]


def test_two_rates_with_one_seed_then_three_seeds_of_the_better_one(run_sh):
    code, calls = run_sh("dft")
    assert code == 0 and trainings(calls) == [("5e-4", "0"), ("2e-3", "0"), ("2e-3", "1"), ("2e-3", "2")]
    first, second = [call for call in calls if call.startswith("eval.py")]
    assert "dft/2e-3-0 dft/5e-4-0 --tasks" in first and "dft/2e-3-0 dft/2e-3-1 dft/2e-3-2 dft/5e-4-0 --tasks" in second
    assert run_sh("dft") == (0, calls[-1:])  # only the table


def test_a_failure_stops_and_the_next_run_goes_on(run_sh):
    code, calls = run_sh("dft", fail="--seed 1")
    assert code != 0 and trainings(calls) == [("5e-4", "0"), ("2e-3", "0"), ("2e-3", "1")]
    code, calls = run_sh("dft")
    assert code == 0 and trainings(calls) == [("2e-3", "1"), ("2e-3", "2")]


def test_all_arms(run_sh):
    code, calls = run_sh()
    assert code == 0
    arms = [call.split()[3].split("/")[-1] for call in calls if " record " in call]
    lr = {(folder, rate) for call in calls for folder, rate in re.findall(r"--lr (\S+) .*--out (\w+)/", call)}
    assert {"base", "sft", "kto", "first_3_blocks"} < set(arms) and len(lr) >= 2 * (len(arms) - 2)
    baselines = {call.split()[3]: call.split("--baseline ")[1].split()[0] for call in calls if "--baseline" in call}
    assert (
        set(baselines.values()) == {"base", "sft", "kto", "random_half", "sorted_finetuning"}
        and baselines["dpo"] == "kto"
    )


def test_an_unknown_arm(run_sh):
    assert run_sh("dtf") == (2, [])
