"""Merges and their functions against mergekit 0.1.5."""

import pytest
import torch
from merge_families import assert_same, load, run

import merge
from merging import methods
from merging.engine import mask_generator


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def run_mergekit(out, method, models, weights, base=None, per_model=None, **parameters):
    """models: absolute paths. per_model: further parameters of each. -> {name: tensor}"""
    mergekit_merge, mergekit_config = pytest.importorskip("mergekit.merge"), pytest.importorskip("mergekit.config")
    config = {"merge_method": method, "dtype": "float32", "parameters": parameters, "models": []}
    for model, weight in zip(models, weights):
        own = {} if weight is None else {"weight": weight}
        config["models"].append(
            {"model": str(model), "parameters": own | (per_model or [{}] * 9)[len(config["models"])]}
        )
    if base:
        config["base_model"] = str(base)
    options = mergekit_merge.MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    mergekit_merge.run_merge(mergekit_config.MergeConfiguration.model_validate(config), str(out), options)
    return load(out)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.05, 0.95), (1.0, 2.0, 0.3)])
@pytest.mark.parametrize("normalize", [True, False])
def test_linear_equals_mergekit(family, tmp_path, weights, normalize):
    names = ["a", "b", "c"][: len(weights)]
    theirs = run_mergekit(tmp_path / "theirs", "linear", [family / n for n in names], weights, normalize=normalize)
    flag = [] if normalize else ["--no-normalize"]
    assert_same(run(tmp_path / "ours", "linear", [f"{family / n}:{w}" for n, w in zip(names, weights)], *flag), theirs)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_equals_mergekit(family, tmp_path, t):
    models = [str(family / "a"), str(family / "b")]
    for start in models:
        theirs = run_mergekit(tmp_path / "theirs", "slerp", models, (None, None), start, t=t)
        ours = run(tmp_path / "ours", "slerp", models, "--t", t, "--base", start)
        assert_same(ours, theirs, rtol=1e-6, atol=1e-8)
    by_weight = run(tmp_path / "weights", "slerp", [f"{models[0]}:{1 - t}", f"{models[1]}:{t}"])
    assert_same(run(tmp_path / "ours", "slerp", models, "--t", t), by_weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weights", [(0.7, 0.4), (0.5, -0.2, 1.5)])
@pytest.mark.parametrize(
    ("method", "options", "parameters"),
    [
        ("task_arithmetic", [], {}),
        ("task_arithmetic", ["--normalize", "--lambda", "0.8"], {"normalize": True, "lambda": 0.8}),
        ("ties", [], {}),
        ("ties", ["--density", "0.2", "--lambda", "1.5"], {"density": 0.2, "lambda": 1.5}),
        ("ties", ["--density", "0.53", "--no-normalize", "--trim", "tensor"], {"density": 0.53, "normalize": False}),
        ("ties", ["--density", "0.0001"], {"density": 0.0001}),
    ],
)
def test_delta_methods_equal_mergekit(family, tmp_path, method, options, parameters, weights):
    paths = [family / n for n in ("a", "b", "c")[: len(weights)]]
    theirs = run_mergekit(tmp_path / "theirs", method, paths, weights, family / "base", **parameters)
    models = [f"{p}:{w}" for p, w in zip(paths, weights)]
    assert_same(run(tmp_path / "ours", method, models, "--base", family / "base", *options), theirs)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -0.2, 1.5)])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dare_linear", {}),
        ("dare_ties", {"normalize": True}),
        ("dare_linear", {"rescale": False}),
        ("della", {"epsilon": 0.2}),
        ("della_linear", {"lambda": 0.7}),
        ("breadcrumbs", {"gamma": 0.1}),
        ("breadcrumbs", {"rescale": True}),
        ("breadcrumbs_ties", {"normalize": True}),
        ("ties", {"rescale": True}),
    ],
)
def test_sparse_methods_equal_mergekit_given_the_same_masks(family, tmp_path, monkeypatch, method, options, weights):
    """Each model has its own density; the random numbers are those of mask_generator."""
    pytest.importorskip("mergekit.sparsify")
    paths, densities = [family / n for n in ("a", "b", "c")[: len(weights)]], [0.4, 0.6, 0.25][: len(weights)]
    base, names = load(family / "base"), {}
    for i, p in enumerate(paths):
        names |= {(x - base[name]).numpy().tobytes(): (name, i) for name, x in load(p).items()}
    draws = []
    sparsify = mergekit_sparsify(monkeypatch, lambda delta: draws.append(names[delta.numpy().tobytes()]))
    monkeypatch.setattr(
        torch, "bernoulli", lambda p: (torch.rand(p.shape, generator=mask_generator(7, *draws[-1])) < p).float()
    )
    own = [{"weight": w, "density": d} for w, d in zip(weights, densities)]
    per_model = [o | {k: v for k, v in options.items() if k in ("epsilon", "gamma")} for o in own]
    shared = {k: v for k, v in options.items() if k not in ("epsilon", "gamma")}
    theirs = run_mergekit(tmp_path / "theirs", method, paths, weights, family / "base", per_model, **shared)
    assert draws and sparsify
    models = [f"{p}:{w}" for p, w in zip(paths, weights)]
    flags = ["--density", *densities, "--seed", 7]
    for key, value in options.items():
        if key == "rescale":
            flags += ["--rescale", "l1" if value else "none"]
        else:
            flags += ["--normalize"] if key == "normalize" else [f"--{key}", value]
    ours = run(tmp_path / "ours", method, models, "--base", family / "base", *flags)
    # theirs sums the L1 norms in fp32: one spacing of fp32 at the size of the rescaled deltas (up to 0.5) may differ
    assert_same(ours, theirs, rtol=0, atol=6e-8)
    assert any((ours[n] != base[n]).any() for n in ours)


def mergekit_sparsify(monkeypatch, seen):
    """Has mergekit call seen(delta) before it sparsifies a delta."""
    import mergekit.merge_methods.generalized_task_arithmetic as theirs

    original = theirs.sparsify
    monkeypatch.setattr(theirs, "sparsify", lambda delta, **more: (seen(delta), original(delta, **more))[1])
    return original


def test_sign_by_count_equals_mergekit():
    method = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")
    deltas, weights = torch.randn(3, 500, generator=generator()), torch.tensor([0.5, 1.0, 2.0])
    weighted = deltas * weights[:, None]
    agree = method.get_mask(weighted, "count")
    theirs = (weighted * agree).sum(0) / (weights[:, None] * agree).sum(0).clamp(min=1e-9)
    assert torch.equal(merge.ties(deltas, weights, sign="count"), theirs)
    assert not torch.equal(merge.ties(deltas, weights, sign="sum"), theirs)


@pytest.mark.parametrize(("density", "gamma"), [(0.3, 0.01), (0.9, 0.3), (0.5, 0.0), (0.001, 0.1)])
def test_breadcrumbs_equals_mergekit(density, gamma):
    sparsify = pytest.importorskip("mergekit.sparsify")
    delta = torch.randn(37, 41, generator=generator())
    keep = methods.breadcrumbs(delta.abs(), density, gamma)
    assert torch.equal(delta * keep, sparsify.magnitude_outliers(delta, density, None, gamma))


@pytest.mark.parametrize("shape", [(30, 41), (97,), (5, 1)])
def test_magprune_equals_mergekit_given_the_same_numbers(monkeypatch, shape):
    sparsify = pytest.importorskip("mergekit.sparsify")
    monkeypatch.setattr(methods, "CHUNK", 100)  # several pieces of rows
    delta = torch.randn(shape, generator=generator())
    keep = methods.magprune(delta.abs().view(-1, shape[-1]), 0.4, 0.3, generator(7)).view(shape)
    monkeypatch.setattr(torch, "bernoulli", lambda p: (torch.rand(p.shape, generator=generator(7)) < p).float())
    if shape[-1] == 1:  # one element in a row has no rank: theirs divides 0 by 0
        assert torch.equal(keep.view(-1), torch.rand(5, generator=generator(7)) < 0.1)
    else:
        assert torch.equal(delta * keep, sparsify.della_magprune(delta, 0.4, 0.3, None))
