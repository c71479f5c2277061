"""Bases of the model's own activations: every component of a hook point is a node, and nothing is left over."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from .._errors import UnsupportedModelError
from .._indices import Indices, as_layers, as_list
from ..models._protocol import TransformerLensModel, hook_points
from ..models._sites import find_sites
from ._site import Parts, Site


@dataclass(frozen=True)
class ActivationSite:
    """A hook point whose components are the nodes; heads are concatenated."""

    hook: str
    layer: int
    letter: str
    vectors: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """Only the hook point itself."""
        return (self.hook,)

    @property
    def identity(self) -> str:
        """The hook point alone."""
        return self.hook

    def take_apart(self, values: Mapping[str, Tensor]) -> Parts:
        """The components of the value."""
        return Parts(_flat(values[self.hook]))

    def put_together(self, parts: Parts, like: Tensor) -> Tensor:
        """The value with these components."""
        return parts.nodes.reshape(*parts.nodes.shape[:2], *like.shape[2:]).to(like.dtype)

    @property
    def writes(self) -> tuple[str, ...]:
        """The hook point itself."""
        return (self.hook,)

    @property
    def earlier(self) -> tuple[str, ...]:
        """None."""
        return ()

    def node_gradient(self, gradients: Mapping[str, Tensor]) -> Float[Tensor, "batch pos unit"]:
        """The gradient itself."""
        return _flat(gradients[self.hook])

    def vector_gradient(self, gradient: Tensor) -> Float[Tensor, "batch pos d"]:
        """The gradient itself."""
        return _flat(gradient)

    def variance(self, values: Mapping[str, Tensor]) -> None:
        """None: components leave nothing unexplained."""


def _flat(value: Tensor) -> Tensor:
    return value.flatten(2) if value.dim() > 3 else value


@dataclass(frozen=True)
class _Activations:
    """One hook point per layer. `layers` restricts the basis; None means all of them."""

    layers: Indices | None = None
    hook: ClassVar[str]
    letter: ClassVar[str]
    title: ClassVar[str]

    def __post_init__(self) -> None:
        if not isinstance(self.layers, list | tuple | None):  # arrays cannot be compared, nor ranges written as JSON
            entries = as_list(self.layers)
            object.__setattr__(self, "layers", self.layers if entries is None else tuple(entries))

    @property
    def name(self) -> str:
        """Its name in tables, plots and files."""
        return self.title

    def sites(self, model: TransformerLensModel) -> tuple[Site, ...]:
        """One site per layer.

        Raises:
            UnsupportedModelError: a hook point is missing, or is not what its name says.
            SettingsError: the model does not have one of the layers.
        """
        n_layers = int(model.cfg.n_layers)
        layers = list(range(n_layers)) if self.layers is None else as_layers(self.layers, n_layers)
        points = hook_points(model)
        hooks = [self.hook.format(layer=layer) for layer in layers]
        missing = [hook for hook in hooks if hook not in points]
        if missing:
            raise UnsupportedModelError(
                f"the basis {self.name} expects {missing[0]}, which this {type(model).__name__} lacks "
                f"({len(missing)} of {len(hooks)} layers). Restrict it with layers=, or choose another basis."
            )
        return tuple(ActivationSite(h, layer, self.letter) for h, layer in zip(hooks, layers, strict=True))


@dataclass(frozen=True)
class Neurons(_Activations):
    """MLP neurons: `mlp.hook_post`, the input of the down projection, where the nonlinearity makes a privileged basis.

    Example:
        >>> from tl_neuron_circuits import bases
        >>> bases.Neurons(layers=[0, 1]).name
        'neurons'
    """

    hook: ClassVar[str] = "blocks.{layer}.mlp.hook_post"
    letter: ClassVar[str] = "N"
    title: ClassVar[str] = "neurons"

    def sites(self, model: TransformerLensModel) -> tuple[Site, ...]:
        """One site per layer.

        Raises:
            UnsupportedModelError: a layer's MLP has no neurons to read (a mixture of experts).
        """
        model_sites = find_sites(model)
        known = {mlp.layer for mlp in model_sites.mlps}
        n_layers = model_sites.n_layers
        wanted = range(n_layers) if self.layers is None else as_layers(self.layers, n_layers)
        problems = [problem.message for problem in model_sites.problems if ".mlp" in problem.message]
        if problems and any(layer not in known for layer in wanted):
            raise UnsupportedModelError("\n".join(problems))
        return super().sites(model)


@dataclass(frozen=True)
class MLPOutputs(_Activations):
    """What each MLP writes to the residual stream (after a post norm, where the model has one).

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> [site.hook for site in tnc.bases.MLPOutputs(layers=[0, 3]).sites(model)]
        ['blocks.0.hook_mlp_out', 'blocks.3.hook_mlp_out']
    """

    hook: ClassVar[str] = "blocks.{layer}.hook_mlp_out"
    letter: ClassVar[str] = "M"
    title: ClassVar[str] = "mlp_outputs"


@dataclass(frozen=True)
class HeadOutputs(_Activations):
    """The heads' outputs before the output projection (`attn.hook_z`), heads concatenated.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> tnc.bases.HeadOutputs(layers=[2]).sites(model)[0].hook
        'blocks.2.attn.hook_z'
    """

    hook: ClassVar[str] = "blocks.{layer}.attn.hook_z"
    letter: ClassVar[str] = "A"
    title: ClassVar[str] = "head_outputs"


@dataclass(frozen=True)
class ResidualStream(_Activations):
    """The residual stream after each layer (`hook_resid_post`).

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> tnc.bases.ResidualStream(layers=[2]).sites(model)[0].hook
        'blocks.2.hook_resid_post'
    """

    hook: ClassVar[str] = "blocks.{layer}.hook_resid_post"
    letter: ClassVar[str] = "R"
    title: ClassVar[str] = "residual_stream"


@dataclass(frozen=True)
class AttentionBlockOutputs(_Activations):
    """What each attention layer writes to the residual stream (`hook_attn_out`), as in RelP's layer-by-position maps.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> tnc.bases.AttentionBlockOutputs(layers=[2]).sites(model)[0].hook
        'blocks.2.hook_attn_out'
    """

    hook: ClassVar[str] = "blocks.{layer}.hook_attn_out"
    letter: ClassVar[str] = "W"
    title: ClassVar[str] = "attention_block_outputs"


ACTIVATION_BASES = {
    basis.title: basis for basis in (Neurons, MLPOutputs, HeadOutputs, ResidualStream, AttentionBlockOutputs)
}
