"""Recorded work: the same habits on a CPU as on a GPU."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from perception.kernels.graphs import Graph, Graphs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, device=DEVICE)


def test_a_graph_follows_its_inputs_and_what_it_writes() -> None:
    total = tensor(0.0)

    def add(x: torch.Tensor) -> tuple[torch.Tensor]:
        total.add_(x)
        return (total * 2,)

    example = tensor(1.0)
    graph = Graph(add, [example])
    total.zero_()  # the warm-ups ran for real
    assert graph(tensor(3.0))[0].item() == 6
    given = tensor(4.0)
    assert example.item() == 1
    (first,) = graph(given)
    assert first.item() == 14
    assert given.item() == 4
    (second,) = graph(tensor(0.5))
    assert second.item() == 15
    assert first is second  # the outputs are overwritten


def test_other_shapes_are_refused() -> None:
    graph = Graph(lambda x: (x + 1,), [tensor(1.0)])
    with pytest.raises(ValueError, match=r"recorded for \(1,\) torch.float32, called with \(2,\) torch.float32"):
        graph(tensor(1.0, 2.0))
    with pytest.raises(ValueError, match="float64"):
        graph(tensor(1.0).double())


def test_graphs_are_kept_by_key_and_shape() -> None:
    runs = []

    def double(x: torch.Tensor) -> tuple[torch.Tensor]:
        runs.append(len(x))
        return (x * 2,)

    graphs = Graphs(2)
    assert graphs("a", double, tensor(1.0))[0].tolist() == [2]
    made = len(runs)
    assert graphs("a", double, tensor(1.0, 2.0))[0].tolist() == [2, 4]
    assert graphs("a", double, tensor(5.0))[0].tolist() == [10]
    assert len(graphs.kept) == 2
    assert graphs("b", double, tensor(1.0))[0].tolist() == [2]  # the one used longest ago goes: two numbers under "a"
    assert [full[0] for full in graphs.kept] == ["a", "b"]
    before = len(runs)
    graphs("a", double, tensor(6.0))
    assert len(runs) - before < made
    graphs("a", double, tensor(1.0, 2.0))
    assert len(graphs.kept) == 2
    graphs.clear()
    assert not graphs.kept
    assert graphs("a", double, tensor(3.0))[0].tolist() == [6]


def test_threads_share_graphs() -> None:
    """Each gets what belongs to its own inputs, and keeps it."""

    def slow(x: torch.Tensor) -> tuple[torch.Tensor]:
        time.sleep(0.002)  # long enough for others to come in between
        return (x * 2,)

    graphs = Graphs(2)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: graphs(i % 3, slow, tensor(float(i)))[0], range(24)))
    assert [x.item() for x in found] == [2.0 * i for i in range(24)]
