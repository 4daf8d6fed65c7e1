"""The inputs of a merge: its checkpoints, and the checks that they fit together."""

import argparse
import math
import os
import sys
from fnmatch import fnmatchcase

import torch

from core.checkpoint import EMBEDDING, HEAD, Checkpoint
from core.config import parse_config
from core.files import InputError, is_locked, same_path
from core.outputs import check_inputs
from core.tokenizer import end_ids, vocabulary, with_end_token
from merging.flags import NEEDS_BASE, fill_options, parse_finite, parse_model
from model import Qwen2
from training.saves import lock_path

# ---------------------------------------------------------------------------------------------------------------------
# Checks that two checkpoints can be merged


def check_alike(first: Checkpoint, other: Checkpoint, resize: bool, allow_tokenizer_mismatch: bool) -> list[str]:
    """InputError unless both have the same tensors and shapes, architecture, and tokens. Returns notes.

    resize: embeddings may have different numbers of rows.
    """
    resized = check_same_tensors(first, other, resize)
    expected, found = (vars(parse_config(c.config, f"{c.source}/config.json")) for c in (first, other))
    ignored = {"max_position_embeddings", "vocab_size" if resized else ""}  # do not change the forward pass
    for key, value in expected.items():
        if value != found[key] and key not in ignored:
            raise InputError(f"{other.source}: {key} is {found[key]} in its config, but {value} in {first.source}")
    return resized + check_tokenizers(first, other, allow_tokenizer_mismatch)


def check_complete(ckpt: Checkpoint) -> None:
    """InputError if a model's tensors are not those of its config.json, as when a shard was not downloaded.

    A file without any layer's matrix is no model, and is merged as it is.
    """
    if any(name.endswith("_proj.weight") for name in ckpt.names):
        Qwen2.on_meta(ckpt)


def check_same_tensors(first: Checkpoint, other: Checkpoint, resize: bool) -> list[str]:
    """InputError unless both have the same tensors, in the same shapes. Returns a note for each resized tensor."""
    notes = []
    for name in sorted({*first.names, *other.names}):
        for has, lacks in ((first, other), (other, first)):
            if name not in lacks.names:
                hint = "tie or untie both heads" if name == HEAD else "merge models of one architecture"
                raise InputError(f"{lacks.source}: has no tensor {name}, but {has.source} has; {hint}")
        expected, found = first.shape(name), other.shape(name)
        if expected != found:
            rows_only = name in (EMBEDDING, HEAD) and expected[1:] == found[1:]
            if not (rows_only and resize):
                hint = f"--resize gives all of them {expected[0]} rows" if rows_only else "they cannot be merged"
                raise InputError(f"{other.source}: {name} is {found}, but {expected} in {first.source}; {hint}")
            notes.append(
                f"{name} of {other.source} has {found[0]} rows; the result has {expected[0]}, as {first.source}"
            )
        if first.dtype(name).is_floating_point != other.dtype(name).is_floating_point:
            integers, floats = (first, other) if other.dtype(name).is_floating_point else (other, first)
            kinds = f"{name} is {integers.dtype(name)}, but {floats.dtype(name)} in {floats.source}"
            raise InputError(f"{integers.source}: {kinds}; only floats are merged")
    return notes


def check_tokenizers(first: Checkpoint, other: Checkpoint, allow_mismatch: bool) -> list[str]:
    """InputError if the tokenizers have different tokens, unless that is allowed. Returns notes."""
    texts = [c.files.get("tokenizer.json") for c in (first, other)]
    if texts[0] == texts[1]:
        return []
    if None in texts:
        without = (first, other)[texts.index(None)]
        return [f"{without.source} has no tokenizer.json; the output gets that of {first.source}"]
    if vocabulary(first) == vocabulary(other):
        return []
    mismatch = f"{other.source}: its tokens differ from those of {first.source}"
    if not allow_mismatch:
        raise InputError(f"{mismatch}: a row would have two meanings; --allow-tokenizer-mismatch merges anyway")
    return [f"{mismatch}; the output gets that of {first.source}"]


# ---------------------------------------------------------------------------------------------------------------------
# Opening


def open_inputs(args: argparse.Namespace) -> tuple[Checkpoint | None, list[Checkpoint]]:
    """Opens and checks the base (or None) and the models, and completes args.

    Sets args.weights, args.densities and args.weights_for (one number per model, without models that are the base),
    args.n_layers and, if it was not given, args.threads.
    """
    n, parsed = len(args.models), [parse_model(text) for text in args.models]
    if args.out:
        check_inputs(args.out, [source for source in (args.base, *(s for s, _ in parsed)) if source])
        if os.access(lock_path(args.out), os.R_OK) and is_locked(lock_path(args.out)):
            raise InputError(f"--out {args.out}: a training run is writing there; wait until it ends")
    notes = fill_options(args, n)
    groups = []  # (pattern, one weight per model)
    for pattern, *numbers in args.weights_for or []:
        if len(numbers) != n:
            raise InputError(f"--weights-for {pattern}: {len(numbers)} weights for {n} models; give one per model")
        groups.append((pattern, [parse_finite(w, f"--weights-for {pattern}") for w in numbers]))
    kept = choose_models(args, parsed, notes)
    parsed, args.densities = ([x[i] for i in kept] for x in (parsed, args.densities))
    args.weights_for = [(pattern, [w[i] for i in kept]) for pattern, w in groups]
    args.weights = [1.0 if w is None else w for _, w in parsed]
    if args.t is not None and args.method == "slerp":
        args.weights = [1 - args.t, args.t]
    check_weights(args)
    if args.lines and args.lines[0] is None and len(args.weights) == 1:
        raise InputError("--lines auto: needs several models, one is given; give ALPHA as a number")

    base, models = args.base and Checkpoint(args.base), [Checkpoint(source) for source, _ in parsed]
    reference = base or models[0]
    check_complete(reference)  # the others have the same tensors
    for checkpoint in [reference, *models]:
        notes += check_alike(reference, checkpoint, args.resize, args.allow_tokenizer_mismatch)
    for pattern, _ in args.weights_for:
        if not any(fnmatchcase(f".{name}", f"*.{pattern}") for name in reference.names):
            examples = "'layers.[0-7].*', '*mlp*', embed_tokens.weight"
            raise InputError(
                f"--weights-for {pattern}: matches no tensor of {reference.source}; patterns are {examples}"
            )
    args.n_layers = parse_config(reference.config).num_hidden_layers
    args.threads = args.threads or torch.get_num_threads()
    for text in notes:  # after all checks: an error is printed alone
        print(f"note: {text}", file=sys.stderr)
    return base, models


def output_files(reference: Checkpoint, models: list[Checkpoint]) -> dict[str, str]:
    """The side files of the result: those of the reference.

    If replies of a model end with <|im_end|>, they name it as an end token, even if the reference is a base model.
    """
    if "tokenizer.json" not in reference.files:
        return reference.files
    im_end = {text: i for i, text in vocabulary(reference)[2]}.get("<|im_end|>")
    if im_end is None or not any(im_end in end_ids(model) for model in models):
        return reference.files
    return with_end_token(reference.files, im_end, end_ids(reference))


def choose_models(args: argparse.Namespace, parsed: list[tuple[str, float | None]], notes: list[str]) -> list[int]:
    """The indices of the models to merge, in order. A model that is the base is left out. Adds to notes.

    parsed: (source, weight or None) of --models.
    """
    method, kept = args.method, list(range(len(parsed)))
    if method in NEEDS_BASE:
        if not args.base:
            raise InputError(f"--method {method}: needs --base C, the checkpoint that the models were trained from")
        kept = [i for i in kept if not same_path(parsed[i][0], args.base)]
        if not kept:
            raise InputError("--models: only the base is given; name the checkpoints that were trained from it")
        if len(kept) < len(parsed):
            notes.append(f"{args.base} is the base: it has no delta and is left out of --models")
    elif args.base:
        notes.append(f"--method {method} does not use the weights of --base; config and tokenizer are taken from it")
    if method == "slerp":
        if len(parsed) != 2:
            raise InputError(f"--method slerp: needs two models; {len(parsed)} given in --models")
        if args.t is not None and any(weight is not None for _, weight in parsed):
            raise InputError("--method slerp: give --t or weights, not both; with weights t is w2 / (w1 + w2)")
        if args.base and same_path(args.base, parsed[1][0]):  # as in mergekit, t = 0 is the base
            kept = [1, 0]
    return kept


def check_weights(args: argparse.Namespace) -> None:
    for _, weights in [("", args.weights), *args.weights_for]:
        if (args.normalize or args.method == "slerp") and math.isclose(sum(weights), 0, abs_tol=1e-8):
            raise InputError(f"--models: the weights {weights} sum to zero and cannot be normalised; change one")
    if args.method == "expo" and (len(args.weights) != 1 or args.weights[0] <= 1):
        raise InputError("--method expo: extrapolates one model from --base; give one C:WEIGHT with a weight above 1")
