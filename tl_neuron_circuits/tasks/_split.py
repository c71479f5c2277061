"""Divide items into two parts without separating items that share a key."""

from collections.abc import Hashable, Sequence

import torch


def split_groups(keys: Sequence[Sequence[Hashable]], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of two parts; items that share a key, directly or through others, go to the same part.

    Groups are shuffled by a generator of their own, then the cut is put where the first part's share is nearest to
    `fraction`, with at least one group on each side. The second part is empty only if there is a single group.
    """
    groups = _groups(keys)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    sizes = torch.tensor([len(groups[index]) for index in order]).cumsum(0)
    if len(groups) == 1:
        return groups[0], []
    cut = int((sizes[:-1] - fraction * len(keys)).abs().argmin()) + 1
    parts = order[:cut], order[cut:]
    first, second = (sorted(index for group in part for index in groups[group]) for part in parts)
    return first, second


def _groups(keys: Sequence[Sequence[Hashable]]) -> list[list[int]]:
    """Return the connected components of items linked by shared keys, in the order of their first items."""
    parent = list(range(len(keys)))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = item = parent[parent[item]]
        return item

    owner: dict[Hashable, int] = {}
    for item, item_keys in enumerate(keys):
        for key in item_keys:
            parent[root(item)] = root(owner.setdefault(key, item))
    groups: dict[int, list[int]] = {}
    for item in range(len(keys)):
        groups.setdefault(root(item), []).append(item)
    return list(groups.values())
