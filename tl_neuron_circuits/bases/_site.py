"""A site of a basis: one hook point whose activation is written as a sum of nodes.

    value = decode(nodes) + sum of vector nodes

`nodes` are scalars (neurons, components, dictionary features); vector nodes are what is left (a dictionary's error, a
transcoder's skip connection), each one node per position. Attribution, evaluation and interventions use only this
protocol and never ask which basis they work in.

A cross-layer transcoder's features write to the outputs of their own and all later layers, so there
`features + error = this layer's output` does not hold layer by layer; what holds is, per output m,

    value_m = sum over sites l <= m of decode_{l -> m}(nodes_l) + b_m + error_m

`writes` lists the hook points a site writes to, `hook` the first of them and the key of its scores. A node's gradient
is summed over `writes`; `take_apart` of site m reads the inputs of the sites before it and gives their nodes as
`Parts.earlier`, which `put_together` needs: who changes nodes of an earlier site in the same run puts them there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from .._errors import SettingsError
from ..models._protocol import TransformerLensModel
from ._dictionary_variance import VarianceSums


@dataclass(frozen=True)
class Parts:
    """An activation taken apart: scalar nodes, and vector nodes ("error", "skip") where the basis has them."""

    nodes: Float[Tensor, "batch pos unit"]
    vectors: Mapping[str, Float[Tensor, "batch pos d"]] = field(default_factory=dict)
    earlier: Mapping[str, Float[Tensor, "batch pos _"]] = field(default_factory=dict)
    """Nodes of earlier sites that write here too, by their hooks; of this run only, so neither mapped nor added."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Parts":
        """The same parts with `function` applied to each tensor."""
        return Parts(function(self.nodes), {name: function(vector) for name, vector in self.vectors.items()})

    def plus(self, other: "Parts") -> "Parts":
        """The sum, part by part."""
        return Parts(self.nodes + other.nodes, {name: v + other.vectors[name] for name, v in self.vectors.items()})


@runtime_checkable
class Site(Protocol):
    """One hook point in a basis."""

    @property
    def hook(self) -> str:
        """Where its nodes write and gradients are taken; also the key of its scores."""
        ...

    @property
    def reads(self) -> tuple[str, ...]:
        """Hook points whose values `take_apart` needs, `hook` among them."""
        ...

    @property
    def identity(self) -> str:
        """What tells this site from another at the same hook point, so that saved results are not mixed up."""
        ...

    @property
    def layer(self) -> int: ...

    @property
    def letter(self) -> str:
        """The letter of its nodes' labels: N for neurons, F for features."""
        ...

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names of its vector nodes."""
        ...

    def take_apart(self, values: Mapping[str, Tensor]) -> Parts:
        """The nodes of a run, from its values at `reads`."""
        ...

    @property
    def writes(self) -> tuple[str, ...]:
        """Hook points that its nodes write to, `hook` first."""
        ...

    @property
    def earlier(self) -> tuple[str, ...]:
        """Hooks of other sites whose nodes write to `hook` too."""
        ...

    def put_together(self, parts: Parts, like: Tensor) -> Tensor:
        """The value at `hook` given by these parts, in the shape and dtype of `like`.

        Raises:
            SettingsError: earlier sites write here too, and the parts lack their nodes.
        """
        ...

    def node_gradient(self, gradients: Mapping[str, Tensor]) -> Float[Tensor, "batch pos unit"]:
        """The gradient at each node from those at `writes`; exact, because `put_together` is linear."""
        ...

    def vector_gradient(self, gradient: Tensor) -> Float[Tensor, "batch pos d"]:
        """The gradient at each vector node: that at `hook`, flattened."""
        ...

    def variance(self, values: Mapping[str, Tensor]) -> VarianceSums | None:
        """Sums for the fraction of variance that the nodes leave unexplained; None where nothing is left."""
        ...


@runtime_checkable
class Basis(Protocol):
    """Where nodes live."""

    @property
    def name(self) -> str: ...

    def sites(self, model: TransformerLensModel) -> tuple[Site, ...]:
        """The sites of this basis on `model`, in the order of the layers."""
        ...


def basis_sites(model: TransformerLensModel, basis: Basis | Sequence[Basis]) -> tuple[Site, ...]:
    """The sites of one basis or of several together.

    Raises:
        SettingsError: two bases claim the same hook point, whose nodes would count twice.
    """
    bases = [basis] if isinstance(basis, Basis) else list(basis)
    sites = tuple(site for each in bases for site in each.sites(model))
    hooks = [site.hook for site in sites]
    twice = sorted({hook for hook in hooks if hooks.count(hook) > 1})
    if twice or not sites:
        problem = f"{twice} more than once" if twice else "no site at all"
        raise SettingsError(f"expected every hook point once over the bases {[b.name for b in bases]}; got {problem}.")
    return sites


def refuse_cross_layer(sites: Sequence[Site], what: str) -> None:
    """Raise if nodes of some site write to several hook points, for what changes one hook point at a time.

    Raises:
        SettingsError: they do.
    """
    names = [site.hook for site in sites if len(site.writes) > 1 or site.earlier]
    if names:
        raise SettingsError(
            f"expected nodes that write to one place for {what}; the features of the cross-layer transcoder at "
            f"{names[0]} write to later layers too. Use attribute with relp, gradient or integrated_gradients_inputs, "
            "trace, or evaluate."
        )


def basis_name(basis: Basis | Sequence[Basis]) -> str:
    """One name for one basis or several."""
    return basis.name if isinstance(basis, Basis) else "+".join(each.name for each in basis)
