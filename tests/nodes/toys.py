"""Models whose answer is a formula of a few nodes: node i is 1 on token 1 and 0 on token 0."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import transformer_lens
from torch import Tensor
from transformer_lens import hook_points
from transformer_lens.hook_points import HookPoint

from tl_neuron_circuits.bases._activations import ActivationSite
from tl_neuron_circuits.tasks import TokenizedPairs

# TransformerLens 2 has the class in hook_points alone, 4 in the package alone.
if TYPE_CHECKING:
    from transformer_lens import HookedRootModule
else:
    HookedRootModule = getattr(transformer_lens, "HookedRootModule", None) or hook_points.HookedRootModule


class Toy(HookedRootModule):
    """Logit 0 is the formula of the nodes at the last position, logit 1 is zero."""

    def __init__(self, formula: Callable[[Tensor], Tensor], n: int) -> None:
        super().__init__()
        self.formula, self.n = formula, n
        self.cfg = SimpleNamespace(n_layers=1, model_name="toy", d_model=n, d_mlp=n, n_heads=1, d_vocab=2, n_ctx=8)
        self.scale = torch.nn.Parameter(torch.ones(n))
        self.hook_nodes = HookPoint()
        self.setup()

    def forward(self, tokens: Tensor) -> Tensor:
        nodes = self.hook_nodes(tokens[..., None] * self.scale)
        first = self.formula(nodes)
        return torch.stack([first, torch.zeros_like(first)], -1)

    def to_tokens(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class ToyNodes:
    """The nodes of a `Toy`."""

    name: str = "toy_nodes"

    def sites(self, model: Any) -> tuple[Any, ...]:
        return (ActivationSite("hook_nodes", 0, "N"),)


def toy_pairs(n: int = 8) -> TokenizedPairs:
    """Token 1 against token 0."""
    ones = torch.ones(n, 1, dtype=torch.long)
    zeros = torch.zeros(n, dtype=torch.long)
    return TokenizedPairs.from_tokens(ones, zeros, torch.zeros_like(ones), torch.ones_like(zeros))
