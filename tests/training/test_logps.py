"""The sum of each example's log-probabilities."""

import torch

from training.logps import sum_by_owner


def test_sum_by_owner_is_index_add():
    """Also for examples without tokens, at the beginning, in between and at the end."""
    g = torch.Generator().manual_seed(0)
    for owner, n in (([1, 1, 3, 3, 3, 4], 7), ([0, 0], 1), ([2], 3), ([0, 1, 2], 3)):
        owner = torch.tensor(owner)
        logps = torch.randn(len(owner), generator=g).requires_grad_()
        weights = torch.randn(n, generator=g)
        got, want = sum_by_owner(logps, owner, n), torch.zeros(n).index_add(0, owner, logps)
        assert torch.equal(got, want)
        grads = [torch.autograd.grad(x @ weights, logps)[0] for x in (got, want)]
        assert torch.equal(*grads)
