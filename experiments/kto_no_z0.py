"""train_kto.py with z0 = 0: KTO's loss without its reference point. Takes the flags of train_kto.py."""

from typing import Any

from torch import Tensor

import train_kto
from core.distributed import run_distributed
from core.files import cli


def loss_without_z0(
    policy_logps: Tensor, ref_logps: Tensor, kl: Tensor, desirable: Tensor, **weights: Any
) -> tuple[Tensor, Tensor]:
    """kto_loss with z0 = 0 (arXiv 2402.01306, Eq. 7)."""
    return train_kto.kto_loss(policy_logps, ref_logps, 0 * kl, desirable, **weights)


def main() -> None:
    train_kto.main(train_kto.parse_args(), loss=loss_without_z0)


if __name__ == "__main__":
    cli(run_distributed(main))
