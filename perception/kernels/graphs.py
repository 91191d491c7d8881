"""Work that is recorded once and replayed as one launch: what small steps on a GPU need, where starting a kernel costs
more than running it.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import RLock
from typing import Any

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
WARM_UPS = 2


class Graph:
    """A function of tensors of fixed shape, as a CUDA graph (Gray 2019).

    function  takes tensors, returns a tuple of them. It reads nothing back from the device, and what it writes besides
              its outputs lives as long as the graph. It runs a few times before it is recorded
    inputs    examples; the graph keeps copies, into which each call copies
    device    where it runs; that of the first input by default
    pool      memory shared with other graphs that never run at the same time

    The outputs are overwritten by the next call. On a CPU nothing is recorded: the function runs at each call, between
    the same copies, so what would go wrong with a graph goes wrong there.
    """

    def __init__(
        self,
        function: Callable[..., Outputs],
        inputs: Sequence[Tensor] = (),
        *,
        device: torch.device | None = None,
        pool: Any = None,
    ):
        self.function: Callable[..., Outputs] | None = None
        device = device or inputs[0].device
        with torch.inference_mode(False), torch.no_grad():  # what it keeps serves any later call
            self.inputs = [x.clone() for x in inputs]
            if device.type == "cuda":
                self._record(function, device, pool)
            else:
                self.function = function
                self.outputs = [function(*self.inputs) for _ in range(WARM_UPS)][-1]

    def __call__(self, *inputs: Tensor) -> Outputs:
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine.shape != given.shape or mine.dtype != given.dtype:
                raise ValueError(
                    f"recorded for {tuple(mine.shape)} {mine.dtype}, called with {tuple(given.shape)} {given.dtype}"
                )
        with torch.no_grad():
            for mine, given in zip(self.inputs, inputs, strict=True):
                mine.copy_(given, non_blocking=True)
            if self.function is None:
                self.graph.replay()
            else:
                for mine, new in zip(self.outputs, self.function(*self.inputs), strict=True):
                    mine.copy_(new)
        return self.outputs

    def _record(self, function: Callable[..., Outputs], device: torch.device, pool: Any) -> None:
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries set themselves up, kernels are compiled and measured
                for _ in range(WARM_UPS):
                    function(*self.inputs)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the device meanwhile. PyTorch's own stream for this is made once, on the
            # device that comes first.
            with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self.outputs = function(*self.inputs)


class Graphs:
    """Graphs by key, the `most` latest used; they share their memory.

    Threads may share them as far as they work on one stream, as they do unless told otherwise: each takes `lock` from
    its inputs to its copy of the outputs.
    """

    def __init__(self, most: int):
        self.most = most
        self.lock = RLock()
        self.kept: OrderedDict[Hashable, Graph] = OrderedDict()
        self.pool: Any = None

    def __call__(self, key: Hashable, function: Callable[..., Outputs], *inputs: Tensor) -> Outputs:
        """Run `function` through its graph, recorded when the key, the shapes and dtypes are first met.

        What comes back is the caller's to keep.
        """
        with self.lock, torch.no_grad():
            return tuple(x.clone() for x in self.of(key, function, *inputs)(*inputs))

    def of(
        self, key: Hashable, function: Callable[..., Outputs], *inputs: Tensor, device: torch.device | None = None
    ) -> Graph:
        """The graph itself, recorded when it is first asked for; whoever calls it sees to it that no other does."""
        full = (key, *((x.shape, x.dtype, x.device) for x in inputs))
        with self.lock:
            if full not in self.kept:
                device = device or inputs[0].device
                if self.pool is None and device.type == "cuda":
                    self.pool = torch.cuda.graph_pool_handle()
                while len(self.kept) >= self.most:
                    self.kept.popitem(last=False)
                self.kept[full] = Graph(function, inputs, device=device, pool=self.pool)
            self.kept.move_to_end(full)
            return self.kept[full]

    def clear(self) -> None:
        """Forget all of them, and the memory they shared."""
        with self.lock:
            self.kept.clear()
            self.pool = None
