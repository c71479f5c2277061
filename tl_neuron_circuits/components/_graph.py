"""The graph of a model's components: who writes to the residual stream, who reads it, and in which order.

    embedding < layer 0's heads < layer 0's MLP < layer 1's heads < ... < logits

Nodes are "embedding", "L3/H2" ("L3/attention" where heads are taken together), "L3/MLP" and "logits". An edge runs from
a component to any later one: the later one reads the residual stream, to which the earlier one wrote. Components of one
stage do not see each other: heads of a layer, and in parallel blocks its MLP too.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from .._errors import UnsupportedModelError
from ..models._protocol import TransformerLensModel, hook_points

AttentionUnit = Literal["heads", "layers"]
Kind = Literal["embedding", "head", "attention", "mlp", "logits"]


@dataclass(frozen=True)
class Component:
    """One node of the graph.

    `hook` is where its own output appears (the heads' `hook_z`, of which it is `head`), `reads` the residual stream it
    reads; `stage` orders the graph.
    """

    name: str
    kind: Kind
    layer: int
    head: int
    stage: int
    hook: str
    reads: str


@dataclass(frozen=True)
class ComponentGraph:
    """All components of a model, in order; `[source, target]` of `edges` says which pairs may be connected.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> graph = tnc.components.component_graph(model, "layers")
        >>> len(graph), int(graph.edges.sum())
        (10, 45)
    """

    components: tuple[Component, ...]
    n_heads: int
    bidirectional: bool

    @property
    def names(self) -> list[str]:
        """Names of the components, in order."""
        return [component.name for component in self.components]

    @property
    def edges(self) -> Bool[Tensor, "source target"]:
        """True where the source comes before the target."""
        stage = torch.tensor([component.stage for component in self.components])
        return stage[:, None] < stage[None]

    def __len__(self) -> int:
        """How many components there are."""
        return len(self.components)


def component_graph(model: TransformerLensModel, attention: AttentionUnit = "heads") -> ComponentGraph:
    """The components of `model`; attention by heads or by layers.

    Raises:
        UnsupportedModelError: a hook point is missing.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> tnc.components.component_graph(model, "layers").names
        ['embedding', 'L0/attention', 'L0/MLP', 'L1/attention', 'L1/MLP', 'L2/attention', 'L2/MLP', 'L3/attention',
        'L3/MLP', 'logits']
    """
    points = hook_points(model)
    n_layers, n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
    components = [Component("embedding", "embedding", -1, -1, 0, "blocks.0.hook_resid_pre", "")]
    stage = 0
    for layer in range(n_layers):
        path, before = f"blocks.{layer}", f"blocks.{layer}.hook_resid_pre"
        stage += 1
        if attention == "heads":
            hook = f"{path}.attn.hook_z"
            components += [Component(f"L{layer}/H{h}", "head", layer, h, stage, hook, before) for h in range(n_heads)]
        else:
            components.append(
                Component(f"L{layer}/attention", "attention", layer, -1, stage, f"{path}.hook_attn_out", before)
            )
        if not _has_mlp(model):
            continue
        parallel = f"{path}.hook_resid_mid" not in points
        stage += 0 if parallel else 1
        between = before if parallel else f"{path}.hook_resid_mid"
        components.append(Component(f"L{layer}/MLP", "mlp", layer, -1, stage, f"{path}.hook_mlp_out", between))
    end = f"blocks.{n_layers - 1}.hook_resid_post"
    components.append(Component("logits", "logits", n_layers, -1, stage + 1, "", end))
    missing = sorted({n for c in components for n in (c.hook, c.reads) if n and n not in points})
    if missing:
        raise UnsupportedModelError(
            f"the component graph expects the hook points {missing[:3]}, which this {type(model).__name__} lacks "
            f"({len(missing)} in all). check_model(model) lists the sites that exist."
        )
    bidirectional = getattr(model.cfg, "attention_dir", "causal") == "bidirectional"
    return ComponentGraph(tuple(components), n_heads, bidirectional)


def split_heads(value: Tensor, n_heads: int) -> Tensor:
    """`hook_z` as [batch, pos, head, d_head], also where heads come concatenated."""
    return value if value.dim() == 4 else value.unflatten(-1, (n_heads, -1))


def _has_mlp(model: Any) -> bool:
    return not getattr(model.cfg, "attn_only", False)
