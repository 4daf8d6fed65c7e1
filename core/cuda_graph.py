"""One launch for all kernels of a step."""

from collections.abc import Callable

import torch
from torch import Tensor


def capture_graph(step: Callable[[], None], state: list[Tensor]) -> Callable[[], None]:
    """Captures step() as a CUDA graph -> a function that replays it.

    A capture needs some calls of step before it. state: the tensors whose values are restored after them.
    """
    before = [x.clone() for x in state]
    with torch.cuda.device(state[0].device):  # streams and graphs belong to the current device
        side = torch.cuda.Stream()  # the calls before a capture must be on another stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    for x, value in zip(state, before):
        x.copy_(value)
    return graph.replay
