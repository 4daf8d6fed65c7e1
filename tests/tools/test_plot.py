import json

import pytest

from tools import plot


def write_run(folder, name, records):
    run_folder = folder / f"{name}.run"
    run_folder.mkdir()
    (run_folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(folder / name)


def sft_log(n):
    return [
        {"step": s + 1, "loss": 2.0 / (s + 1), "lr": 1e-5, "grad_norm": 1.0, "tokens": 10, "tokens_per_second": 5.0}
        for s in range(n)
    ]


def kto_log(n):
    more = {"kl": 0.1, "rewards/chosen": 0.2, "rewards/rejected": None, "rewards/margins": None}
    return [r | more for r in sft_log(n)]


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_runs_of_both_kinds_in_one_picture(tmp_path, run):
    sft, kto = write_run(tmp_path, "sft", sft_log(5)), write_run(tmp_path, "kto", kto_log(1))
    out = tmp_path / "curves.png"
    code, text, _ = run("tools.plot", sft, f"{kto}.run/", "--out", out, "--smooth", 2)
    assert code == 0 and str(out) in text and is_png(out)


def test_what_is_drawn(tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = [
        plot.read_steps(write_run(tmp_path, "a", kto_log(4))),
        plot.read_steps(write_run(tmp_path, "b", sft_log(3))),
    ]
    axes = plot.draw_runs(plt, runs, 1).axes
    assert [axis.get_title() for axis in axes][:2] == ["Loss; dashed: Held-out loss", "z0, the KL estimate"]
    assert [axis.get_ylabel() for axis in axes][1:3] == ["nats", "beta x log-ratio"]
    loss = {line.get_label(): list(line.get_ydata()) for line in axes[0].lines}
    assert loss == {"a": [2.0, 1.0, 2 / 3, 0.5], "b": [2.0, 1.0, 2 / 3]}
    assert len(axes[2].lines) == 1  # nothing was rejected in this run
    titles = [axis.get_title() for axis in plot.draw_runs(plt, runs, 1, ["loss", "rewards/rejected"]).axes]
    assert titles == ["Loss; dashed: Held-out loss", "Reward of desirable; dashed: Reward of undesirable"]
    with pytest.raises(plot.InputError, match="--keys kl: no run logged"):
        plot.draw_runs(plt, runs[1:], 1, ["kl"])


def test_smooth():
    assert plot.smooth([1, 2, 3, 6], 1) == [1, 2, 3, 6]
    assert plot.smooth([1, 2, 3, 6], 2) == [1, 1.5, 2.5, 4.5]


def test_categories(tmp_path, run):
    report = {
        "steps": {
            "4_balance": {"before": {"maths/sums": 30, "code/python": 4}, "after": {"maths/sums": 4, "code/python": 4}}
        },
        "diversity": {k: {"effective categories": 1.5} for k in ("before", "after")},
    }
    path, out = tmp_path / "report.json", tmp_path / "categories.png"
    path.write_text(json.dumps(report))
    code, _, _ = run("tools.plot", path, "--out", out)
    assert code == 0 and is_png(out)


def search_result(n_models=2, **more):
    """What merge.py search leaves: two of the paper's points, some along the line, one off it."""
    spare = [0.0] * (n_models - 2)
    point = lambda w, score, **other: {"weights": [1 - w, w, *spare], **more, **other, "score": score, "stderr": 0.01}
    off = [point(0.7, 2.2, **{k: v and v / 2 for k, v in more.items()})] if more else []
    points = [point(0.5, 2.0), point(0.95, 2.3), point(0.3, 1.9), *off]
    return {
        "method": "ties",
        "models": ["runs/sft", "runs/kto.pt", "c"][:n_models],
        "what": "loss per token",
        "points": points,
        "best": {"weights": [0.7, 0.3, *spare], **more},
        "final": [point(0.3, 1.95), point(0.5, 2.05)],
    }


def test_a_search(tmp_path, run):
    path, out = tmp_path / "search.json", tmp_path / "weight.png"
    path.write_text(json.dumps(search_result(density=0.4, lines=None)))
    code, text, _ = run("tools.plot", path, "--out", out)
    assert code == 0 and str(out) in text and is_png(out)


def test_a_search_has_a_panel_for_each_line():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = lambda axis: {c.get_label(): c.lines[0].get_xydata().tolist() for c in axis.containers}
    one = plot.draw_search(plt, search_result())
    (axis,) = one.axes
    assert axis.get_xlabel() == "weight of model 2, kto.pt" and "loss per token" in axis.get_ylabel()
    final = "final, on data set aside"
    assert drawn(axis) == {"tried": [[0.3, 1.9], [0.5, 2.0], [0.95, 2.3]], final: [[0.3, 1.95], [0.5, 2.05]]}
    bars = axis.containers[0].lines[2][0].get_segments()[0]
    assert bars[:, 1].tolist() == pytest.approx([1.89, 1.91])  # one standard error each way
    weight, density = plot.draw_search(plt, search_result(density=0.4)).axes
    assert drawn(weight)["other lines"] == [[0.7, 2.2]] and len(drawn(weight)["tried"]) == 3
    assert density.get_xlabel() == "density" and drawn(density)[final] == [[0.4, 1.95], [0.4, 2.05]]
    assert len(plot.draw_search(plt, search_result(3)).axes) == 1  # the third model's weight was 0 throughout
    plt.close("all")


@pytest.mark.parametrize("content", [None, "", "not json\n"])
def test_what_is_no_run_is_refused(tmp_path, run, content):
    if content is not None:
        (tmp_path / "x.run").mkdir()
        (tmp_path / "x.run" / "log.jsonl").write_text(content)
    code, _, err = run("tools.plot", tmp_path / "x", "--out", tmp_path / "x.png")
    assert code == 2 and "log.jsonl" in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "x.png").exists()
    (tmp_path / "r.json").write_text('{"steps": {}}')
    code, _, err = run("tools.plot", tmp_path / "r.json", "--out", tmp_path / "x.png")
    assert code == 2 and "r.json" in err


def test_scores_of_an_evaluation(tmp_path, run, monkeypatch):
    """A dot for each checkpoint at its score in percent, with 1.96 standard errors."""
    cell = lambda score: {"demo": {"score": score, "stderr": 0.02, "n": 50}}
    path, out = tmp_path / "results.json", tmp_path / "scores.png"
    path.write_text(json.dumps({"base": cell(0.3), "sft": cell(0.5)}))
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plot.draw_results(plt, json.loads(path.read_text()))
    dots, (ends,) = figure.axes[0].containers[0][0], figure.axes[0].containers[0][2]
    assert list(dots.get_xdata()) == [30, 50] and ends.get_segments()[1][:, 0].tolist() == pytest.approx([46.08, 53.92])
    assert run("tools.plot", path, "--out", out)[0] == 0 and out.read_bytes().startswith(b"\x89PNG")
