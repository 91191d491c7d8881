"""Groups of pictures that are alike: near duplicates, and clusters.

n rows  C width  k clusters
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from perception.errors import ConfigError
from perception_encoder.retrieval.blocks import assign, k_means
from perception_encoder.retrieval.store import Rows, VectorStore

QUERIES = 512  # at once
SAMPLE = 256  # points of each cluster to learn from


class Cluster(NamedTuple):
    """Pictures that are alike: their ids, nearest to the middle first, and how near they are on average."""

    ids: list[str]
    cosine: float


def duplicates(store: VectorStore, threshold: float = 0.95, *, neighbours: int = 10) -> list[list[str]]:
    """Groups of two or more that hang together by cosines of at least `threshold`; larger groups first.

    neighbours  nearest pictures looked at for each: a group is found whole as long as each member is among that many
                nearest of another

    Raises ConfigError for a threshold that is no cosine.
    """
    if not -1 <= threshold <= 1:
        raise ConfigError(f"threshold={threshold}; a cosine lies between -1 and 1")
    if neighbours < 1:
        raise ConfigError(f"neighbours={neighbours}; give at least 1")
    head: dict[str, str] = {}

    def find(one: str) -> str:
        while head.setdefault(one, one) != one:
            head[one] = head[head[one]]
            one = head[one]
        return one

    order = []
    for rows in _batches(store):
        order += rows.ids
        for id, found in zip(rows.ids, store.search(rows.vectors, neighbours + 1), strict=True):
            for match in found:
                if match.id != id and match.score >= threshold:
                    head[find(match.id)] = find(id)
    groups: dict[str, list[str]] = {}
    for id in order:
        if id in head:
            groups.setdefault(find(id), []).append(id)
    return sorted((group for group in groups.values() if len(group) > 1), key=lambda group: -len(group))


def clusters(store: VectorStore, k: int, *, rounds: int = 20, seed: int = 0) -> list[Cluster]:
    """The pictures in at most k groups by direction (spherical k-means, Dhillon and Modha 2001), largest first.

    Always the same for the same store and seed. Raises ConfigError for k below 1 or above the number of pictures.
    """
    if not 1 <= k <= len(store):
        raise ConfigError(f"k={k}; choose 1 to {len(store)}, the number of pictures")
    centres = k_means(_sample(store, SAMPLE * k), k, rounds=rounds, seed=seed, unit=True)
    members: list[list[tuple[float, str]]] = [[] for _ in range(k)]
    for rows in _batches(store):
        nearest, _ = assign(rows.vectors, centres)
        cosines = (rows.vectors * centres[nearest]).sum(dim=1)
        for id, group, cosine in zip(rows.ids, nearest.tolist(), cosines.tolist(), strict=True):
            members[group].append((cosine, id))
    found = [
        Cluster(
            [id for _, id in sorted(group, key=lambda one: (-one[0], one[1]))], sum(c for c, _ in group) / len(group)
        )
        for group in members
        if group
    ]
    return sorted(found, key=lambda cluster: -len(cluster.ids))


def _batches(store: VectorStore) -> Iterator[Rows]:
    return store.scan(QUERIES)


def _sample(store: VectorStore, count: int) -> Tensor:
    """Up to `count` vectors, evenly spread over the store."""
    step = max(1, len(store) // count)
    chosen, seen = [], 0
    for rows in store.scan():
        chosen.append(rows.vectors[-seen % step :: step])
        seen += len(rows.ids)
    return torch.cat(chosen)
