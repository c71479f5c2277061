"""Planted circuits: which components of a small transformer are to compute what, drawn from a seed.

A case is a few chains embedding -> component -> ... -> logits. Chain k answers its own question about the prompt: which
token stands at a position of its own, under a permutation of its own. Its answer is one of `N_TOKENS` logits that no
other chain answers by. Everything else in the model is there to distract. The circuit is the union of the chains.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

N_TOKENS, N_POSITIONS, D_MODEL, D_HEAD, D_MLP = 6, 6, 32, 8, 48
N_CASES = 12


@dataclass(frozen=True)
class Chain:
    """The components of one chain, from the embedding to the logits, and its question."""

    nodes: tuple[str, ...]
    position: int
    permutation: tuple[int, ...]

    @property
    def edges(self) -> set[tuple[str, str]]:
        return set(zip(self.nodes[:-1], self.nodes[1:], strict=True))


@dataclass(frozen=True)
class PlantedCase:
    """One model's plan."""

    seed: int
    n_layers: int
    n_heads: int
    chains: tuple[Chain, ...]

    @property
    def name(self) -> str:
        return f"planted{self.seed:02d}"

    @property
    def nodes(self) -> list[str]:
        layers = [[f"L{i}/H{h}" for h in range(self.n_heads)] + [f"L{i}/MLP"] for i in range(self.n_layers)]
        return ["embedding", *(name for layer in layers for name in layer), "logits"]

    @property
    def stages(self) -> list[int]:
        per_layer = [[2 * i + 1] * self.n_heads + [2 * i + 2] for i in range(self.n_layers)]
        return [0, *(stage for layer in per_layer for stage in layer), 2 * self.n_layers + 1]

    @property
    def possible(self) -> set[tuple[str, str]]:
        pairs = list(zip(self.nodes, self.stages, strict=True))
        return {(a, b) for a, i in pairs for b, j in pairs if i < j}

    @property
    def edges(self) -> set[tuple[str, str]]:
        return set().union(*(chain.edges for chain in self.chains))

    def answers(self, tokens: Tensor) -> Tensor:
        """Right answers [batch, chain]."""
        columns = [torch.tensor(c.permutation)[tokens[:, c.position]] for c in self.chains]
        return torch.stack(columns, 1)


def planted_case(seed: int) -> PlantedCase:
    """Two to four layers, two to four heads, two to four chains of one to three components."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    n_layers, n_heads, n_chains = 2 + seed % 3, draw(2, 4), draw(2, 4)
    empty = PlantedCase(seed, n_layers, n_heads, ())
    inner = list(zip(empty.nodes, empty.stages, strict=True))[1:-1]
    chains: list[Chain] = []
    while len(chains) < n_chains:
        chosen = [inner[k] for k in sorted(torch.randperm(len(inner), generator=generator)[: draw(1, 3)].tolist())]
        if len({stage for _, stage in chosen}) < len(chosen):
            continue
        moves = any("/H" in name for name, _ in chosen)
        position = draw(0, N_POSITIONS - 2) if moves else N_POSITIONS - 1
        nodes = ("embedding", *(name for name, _ in chosen), "logits")
        order = tuple(torch.randperm(N_TOKENS, generator=generator).tolist())
        if nodes not in [chain.nodes for chain in chains]:
            chains.append(Chain(nodes, position, order))
    return PlantedCase(seed, n_layers, n_heads, tuple(chains))


def prompts(n: int, seed: int) -> Tensor:
    """Random tokens [n, N_POSITIONS]."""
    return torch.randint(N_TOKENS, (n, N_POSITIONS), generator=torch.Generator().manual_seed(seed))
