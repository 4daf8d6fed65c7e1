"""The state of a training run."""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from core.distributed import Ranks
from model import Qwen2


@dataclass
class Run:
    """The state of a training run, shared by the functions that end a step, log and save. start_run creates it."""

    args: argparse.Namespace
    ranks: Ranks
    model: Qwen2
    optimizer: torch.optim.Optimizer
    start_sync: Callable[[int], None]  # the two functions of overlapped_reduction
    wait_sync: Callable[[], None]
    files: dict[str, str]  # side files of its checkpoints: tokenizer, template, generation settings
    identity: dict  # what a resumed run must share with this one
    total: int  # steps
    done: int = 0  # steps finished before this process started
    saved: int = 0  # the step of the last save to resume from
    skips: list = field(default_factory=list)  # (step, [places of its offending examples])
    best: tuple = (math.inf, 0)  # (lowest eval_loss, its step)
    pending: dict | None = None  # the log record of the last step, if its evaluation was interrupted
    events: object = None  # TensorBoard's writer
    started: float = field(default_factory=time.time)
    printed: float = field(default_factory=time.time)  # when print_progress last printed a step
