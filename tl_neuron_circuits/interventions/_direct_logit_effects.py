"""The direct effect of a neuron's output weights on the logits.

    effect(n) = W_U^T N_final N_post W_out[n],     minus its mean over the vocabulary

N_post is the norm after the MLP where there is one (Gemma), N_final the final norm, each as the linear map that it is
once its scale is frozen: subtract the mean (LayerNorm only), multiply by the weight. The scales themselves depend on
the prompt; without them the effect is in logits times (scale of the norms), per unit of activation: the order of tokens
and the sign are right, sizes compare within a neuron and within a layer. Centering over the vocabulary takes out what
no probability can see. A soft cap on the logits is left out. Source: METHODS 1.7, 4.3; ECOSYSTEM (Gemma's post norm).
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import _html
from .._errors import SettingsError, UnsupportedModelError
from .._typing import checked
from ..models._protocol import TransformerLensModel, submodule
from ..models._threads import holding
from ..propagation._norms import read_norm
from ._find_nodes import Nodes, find_nodes
from ._steering_prompts import token_names


@dataclass(frozen=True, eq=False, repr=False)
class DirectLogitEffects:
    """For every neuron the tokens that it promotes and suppresses most, by a positive activation.

    `table` has columns label, direction ("promoted" or "suppressed"), rank (from 0), token, token_id, effect.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> effects = tnc.direct_logit_effects(model, ["L3/N5", "L3/N6"], k=4)
        >>> effects, len(effects.to_dataframe()) == 2 * 2 * 4
        (DirectLogitEffects(2 neurons, 4 tokens each way), True)
    """

    table: pd.DataFrame

    def to_dataframe(self) -> pd.DataFrame:
        """One row per neuron, direction and rank."""
        return self.table.copy()

    def summary(self) -> pd.DataFrame:
        """One row per neuron: its promoted and its suppressed tokens, strongest first."""
        joined = self.table.groupby(["label", "direction"], sort=False)["token"].agg(lambda t: " ".join(map(repr, t)))
        return joined.unstack("direction").reset_index()

    def __repr__(self) -> str:
        n, k = self.table["label"].nunique(), int(self.table["rank"].max()) + 1
        return f"DirectLogitEffects({n} neurons, {k} tokens each way)"

    def _repr_html_(self) -> str:
        return _html.block(repr(self), _html.table(self.summary()))


@holding
@checked
def direct_logit_effects(
    model: TransformerLensModel, nodes: Nodes, *, k: int = 10, batch_size: int = 64
) -> DirectLogitEffects:
    """The tokens whose logits a neuron raises and lowers directly, through the residual stream alone.

    Args:
        model: a HookedTransformer or TransformerBridge.
        nodes: neurons, as in `steering_hooks`; positions do not matter.
        k: tokens each way.
        batch_size: neurons at a time; memory is this times the vocabulary.

    Raises:
        SettingsError: a node that is not a neuron, or a unit out of range; k below 1.
        UnsupportedModelError: the model has no output weights or unembedding of the expected shape.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> effects = tnc.direct_logit_effects(tnc.load_demo_model(), ["L3/N7"], k=5)
        >>> len(effects.to_dataframe())
        10
    """
    if k < 1 or batch_size < 1:
        raise SettingsError(f"expected k and batch_size of at least 1; got {k} and {batch_size}.")
    frame = find_nodes(model, nodes).drop_duplicates(["hook", "unit"])
    layers = frame["hook"].str.extract(r"^blocks\.(\d+)\.mlp\.hook_post$")[0]
    if layers.isna().any():
        raise SettingsError(f"expected neurons (mlp.hook_post); got units of {frame['hook'][layers.isna()].iloc[0]}.")
    frame = frame.assign(layer=layers.astype("int64"))
    rows = []
    for layer, part in frame.groupby("layer", sort=False):
        weights = _picked(model, int(layer), part)
        for start in range(0, len(part), batch_size):
            effects = effects_on_logits(model, int(layer), weights[start : start + batch_size])
            labels = part["label"].str.partition("@")[0].iloc[start : start + batch_size]
            rows += _rows(model, list(labels), effects, min(k, effects.shape[1]))
    table = pd.DataFrame(rows, columns=["label", "direction", "rank", "token", "token_id", "effect"])
    return DirectLogitEffects(table)


def effects_on_logits(
    model: TransformerLensModel, layer: int, written: Float[Tensor, "node d_model"]
) -> Float[Tensor, "node d_vocab"]:
    """The effect on every logit of vectors that the MLP of a layer writes."""
    direction = written.detach().float()
    for path in (f"blocks.{layer}.ln2_post", "ln_final"):
        direction = _through(model, path, direction)
    unembedding = getattr(submodule(model, "unembed"), "W_U", None)
    if not isinstance(unembedding, Tensor) or unembedding.shape[0] != direction.shape[1]:
        raise UnsupportedModelError(
            f"expected unembed.W_U of [{direction.shape[1]}, d_vocab] on this {type(model).__name__}; it has none, so "
            "direct effects cannot be read from weights. Use steer(...) or trace(...)."
        )
    effects = direction.to(unembedding.device) @ unembedding.detach().float()
    return effects - effects.mean(1, keepdim=True)


def output_weights(model: TransformerLensModel, layer: int) -> Float[Tensor, "d_mlp d_model"]:
    """W_out of one layer; never the model's stacked copy.

    Raises:
        UnsupportedModelError: the layer's MLP has none.
    """
    weights = getattr(submodule(model, f"blocks.{layer}.mlp"), "W_out", None)
    if not isinstance(weights, Tensor) or weights.dim() != 2 or weights.shape[1] != int(model.cfg.d_model):
        raise UnsupportedModelError(
            f"expected blocks.{layer}.mlp.W_out of [d_mlp, {model.cfg.d_model}]; this {type(model).__name__} has none. "
            "Use steer(...) or trace(...), which need no weights."
        )
    return weights.detach()


def _picked(model: TransformerLensModel, layer: int, part: pd.DataFrame) -> Float[Tensor, "node d_model"]:
    weights = output_weights(model, layer)
    units: Int[Tensor, " node"] = torch.as_tensor(part["unit"].to_numpy(dtype="int64", copy=True))
    if int(units.max()) >= len(weights):
        raise SettingsError(f"expected units below {len(weights)} in layer {layer}; got {int(units.max())}.")
    return weights[units.to(weights.device)]


def _through(model: TransformerLensModel, path: str, vectors: Float[Tensor, "node d"]) -> Float[Tensor, "node d"]:
    """The norm with its scale set to one: centered for LayerNorm, times its weight."""
    norm: Any = submodule(model, path)
    if norm is None or isinstance(norm, nn.Identity):
        return vectors
    if hasattr(norm, "original_component"):  # TransformerBridge
        frozen = read_norm(model, path)
        if frozen is None:
            return vectors
        weight, centered = frozen.weight, frozen.centered
    else:
        weight, centered = getattr(norm, "w", None), "LayerNorm" in type(norm).__name__
    vectors = vectors - vectors.mean(1, keepdim=True) if centered else vectors
    return vectors if weight is None else vectors.to(weight.device) * weight.detach().float()


def _rows(
    model: TransformerLensModel, labels: list[str], effects: Float[Tensor, "node d_vocab"], k: int
) -> list[tuple]:
    rows = []
    for label, effect in zip(labels, effects.cpu(), strict=True):
        for direction, largest in (("promoted", True), ("suppressed", False)):
            values, tokens = effect.topk(k, largest=largest)
            names = token_names(model, tokens.tolist())
            found = zip(names, tokens.tolist(), values.tolist(), strict=True)
            rows += [(label, direction, rank, *entry) for rank, entry in enumerate(found)]
    return rows
