"""CUDA graphs: launches all kernels of a step at once."""

from collections.abc import Callable

import torch
from torch import Tensor


def capture_graph(step: Callable[[], None], state: list[Tensor], pool: tuple[int, int]) -> Callable[[], None]:
    """Captures step() as a CUDA graph. Returns a function that replays it.

    Before the capture, step() runs twice to warm up. state: tensors that step() changes; they get their values back.
    pool: a torch.cuda.graph_pool_handle(). Graphs of one pool reuse its memory. They must not run at the same time, and
    their temporary tensors do not survive the next replay.
    """
    before = [x.clone() for x in state]
    with torch.cuda.device(state[0].device):  # streams and graphs belong to the current device
        side = torch.cuda.Stream()  # the warm-up calls must run on another stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            step()
    for x, value in zip(state, before):
        x.copy_(value)
    return graph.replay
