"""The files in OUT.run/ from which a run resumes, and the lock that refuses a second run.

    args.json, log.jsonl
    step-N                     complete checkpoint after step N (step-N.pt if OUT is a .pt)
    optimizer-N.safetensors    optimizer moments and model buffers after step N
    state.json                 the step to resume from
    lock                       locked by the run that is writing here

state.json is written last. Until then, the previous save is valid.
"""

import argparse
import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.checkpoint import Checkpoint, write_checkpoint, write_safetensors
from core.distributed import gathered, is_main, is_sharded, load_into
from core.files import InputError, atomic_write, is_locked, lock
from core.outputs import (
    check_folder,
    claim_folder,
    discard_checkpoint,
    read_manifest,
    remove_leftovers,
    write_manifest,
    written_files,
)
from training.state import Run

# ---------------------------------------------------------------------------------------------------------------------
# Names

OWN_FILES = ("args.json", "log.jsonl", "state.json")
CHECKPOINTS, MOMENTS = r"step-(\d+)(?:\.pt)?", r"optimizer-(\d+)\.safetensors"


def run_file(args: argparse.Namespace, name: str) -> str:
    return os.path.join(f"{args.out}.run", name)


def step_path(args: argparse.Namespace, step: int) -> str:
    return run_file(args, f"step-{step}" + (".pt" if args.out.endswith(".pt") else ""))


def moments_path(args: argparse.Namespace, step: int) -> str:
    return run_file(args, f"optimizer-{step}.safetensors")


def numbered_files(out: str, pattern: str) -> dict[int, str]:
    """{step: path} of the files in OUT.run/ whose names match the pattern."""
    folder = f"{out}.run"
    found = (re.fullmatch(pattern, name) for name in (os.listdir(folder) if os.path.isdir(folder) else []))
    return {int(match[1]): os.path.join(folder, match[0]) for match in found if match}


# ---------------------------------------------------------------------------------------------------------------------
# One run at a time
#
# Rank 0 locks OUT.run/lock. The system releases the lock when the process ends, even if it is killed.

LOCKS: dict[str, int] = {}  # of this process: path of the lock file -> file descriptor


def lock_path(out: str) -> str:
    return os.path.realpath(f"{out}.run/lock")


def second_run_error(out: str) -> InputError:
    return InputError(f"--out {out}: another run is writing there; wait until it ends, or give another name")


def check_not_running(out: str) -> None:
    """InputError if another run is writing to OUT, or a file in OUT.run/ is not from a run. Changes nothing on disk."""
    check_folder(f"{out}.run", "training", OWN_FILES)
    own = written_files(f"{out}.run", "training")
    for path in (*numbered_files(out, CHECKPOINTS).values(), *numbered_files(out, MOMENTS).values()):
        if os.path.basename(path) not in own:  # pruning would remove it
            raise InputError(f"{path}: was not written by training; move it, or give another --out")
    path = lock_path(out)
    if os.path.lexists(path) and (not os.path.isfile(path) or os.path.getsize(path)):  # ours is empty
        raise InputError(f"{path}: was not written by training; move it, or give another --out")
    try:
        if path not in LOCKS and is_locked(path):
            raise second_run_error(out)
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}; give another --out") from None


def take_lock(out: str) -> None:
    """Makes and locks OUT.run/lock. InputError if another run holds it."""
    path = lock_path(out)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        while path not in LOCKS:
            fd = os.open(path, os.O_RDWR | os.O_CREAT)
            if lock(fd) is False:
                os.close(fd)
                raise second_run_error(out)
            if os.path.isfile(path) and os.path.samestat(os.fstat(fd), os.stat(path)):
                LOCKS[path] = fd
            else:  # another run removed this file between open and lock
                os.close(fd)
    except OSError as e:
        raise InputError(f"{out}.run: cannot be written: {e.strerror}; give another --out") from None


def release_lock(out: str) -> None:
    path = lock_path(out)
    if path in LOCKS:
        with contextlib.suppress(FileNotFoundError):  # the user removed it
            os.remove(path)
        os.close(LOCKS.pop(path))


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def write_gathered(run: Run, tensors: dict[str, Tensor], write: Callable[[Iterable], None]) -> None:
    """Calls write((name, whole tensor) pairs) on rank 0. The other ranks of a sharded run help to gather."""
    pairs = gathered(tensors)
    if is_main():
        write(pairs)
    elif is_sharded(run.model):
        for _ in pairs:
            pass


def tensor_specs(tensors: dict[str, Tensor]) -> dict:
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


def save_model(run: Run, out: str, card: str | None = None) -> None:
    """Writes a checkpoint, fp32. card: text of its README.md."""
    weights = dict(run.model.named_parameters())
    config, specs = run.model.raw_config, tensor_specs(weights)
    write_gathered(run, weights, lambda pairs: write_checkpoint(out, config, run.files, specs, pairs, card=card))


def claim_save(run: Run, step: int) -> None:
    """Records that the files of a save are ours, before they are written: only such files are ever removed."""
    if is_main():
        names = map(os.path.basename, (step_path(run.args, step), moments_path(run.args, step)))
        claim_folder(f"{run.args.out}.run", "training", [*OWN_FILES, *names])


def save_run(run: Run, step: int, pending: dict | None = None) -> None:
    """Writes step-N and the files for --resume, then removes saves beyond --keep. pending: see Run."""
    names = {p: name for name, p in run.model.named_parameters()}
    tensors = {f"{kind}/{names[p]}": t for p, state in run.optimizer.state.items() for kind, t in state.items()}
    tensors |= {f"buffer/{name}": t for name, t in run.model.named_buffers()}

    def write_moments(pairs):
        with atomic_write(moments_path(run.args, step), "wb") as f:
            write_safetensors(f, tensor_specs(tensors), pairs)

    try:
        claim_save(run, step)
        save_model(run, step_path(run.args, step))
        write_gathered(run, tensors, write_moments)
        write_state(run, step, pending=pending)
    except InputError as e:
        intact = f"the save of step {run.saved} is whole" if run.saved else "no save was made before"
        raise InputError(f"{e}; {intact}: make room and --resume") from None
    run.saved = step
    if is_main():
        prune(run, step)


def write_state(run: Run, step: int, finished: bool = False, pending: dict | None = None) -> None:
    if is_main():
        with open(run_file(run.args, "log.jsonl"), "rb") as f:
            os.fsync(f.fileno())  # sync the log first, so that the saved state never refers to a missing line
        with atomic_write(run_file(run.args, "state.json")) as f:
            json.dump({"step": step, "finished": finished, "identity": run.identity, "pending": pending}, f)


def restore(run: Run) -> None:
    """Loads weights, moments and buffers of the save after step run.done."""
    if not os.path.exists(step_path(run.args, run.done)):  # not to be looked up on the hub
        raise InputError(f"{step_path(run.args, run.done)}: missing; drop --resume to start again")
    weights = Checkpoint(step_path(run.args, run.done))
    path = moments_path(run.args, run.done)
    try:
        moments = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: missing or corrupt ({e}); drop --resume to start again") from None
    parameters, buffers = dict(run.model.named_parameters()), dict(run.model.named_buffers())
    if other := {*parameters} ^ {*weights.names}:
        name = min(other)
        fault = "has no" if name in parameters else "has"
        raise InputError(
            f"{weights.source}: {fault} {name}, unlike the model that is to resume; undo that or drop --resume"
        )
    for name, p in parameters.items():
        load_into(p, weights.tensor(name))
    for key in moments.keys():
        kind, _, name = key.partition("/")
        whole, target = moments.get_tensor(key), (buffers if kind == "buffer" else parameters).get(name)
        if target is None or whole.ndim and whole.shape != target.shape:
            raise InputError(f"{path}: {key} does not fit the model; drop --resume to start again")
        if kind == "buffer":
            load_into(buffers[name], whole)
            continue
        p = parameters[name]
        moment = torch.zeros_like(p) if whole.shape == p.shape else torch.zeros_like(whole, device=p.device)
        load_into(moment, whole)
        run.optimizer.state[p][kind] = moment


# ---------------------------------------------------------------------------------------------------------------------
# Removing


def clean_run_folder(run: Run) -> None:
    """Removes half-written files of killed runs in OUT.run/ and beside OUT, and saves of steps after run.done."""
    folder, name = os.path.split(os.path.realpath(run.args.out))
    remove_leftovers(folder, name)
    claim_folder(f"{run.args.out}.run", "training", OWN_FILES)
    if not run.done:
        discard_checkpoint(run_file(run.args, "state.json"))
    prune(run, run.done)


def prune(run: Run, step: int) -> None:
    """Removes saves in OUT.run/, except the last --keep up to `step`, the best one, and the one to resume from."""
    # the checkpoint of the last step is OUT itself
    earlier = sorted(s for s in numbered_files(run.args.out, CHECKPOINTS) if s <= step and s < run.total)
    newest = earlier[-run.args.keep :]
    for pattern, wanted in (CHECKPOINTS, {*newest, run.best[1], run.saved}), (MOMENTS, {run.saved}):
        for number, path in numbered_files(run.args.out, pattern).items():
            if number not in wanted:
                discard_checkpoint(path)
    folder = f"{run.args.out}.run"
    manifest = read_manifest(folder)
    left = {name: by for name, by in manifest["files"].items() if name in (*OWN_FILES, *os.listdir(folder))}
    if left != manifest["files"]:
        write_manifest(folder, manifest | {"files": left})
