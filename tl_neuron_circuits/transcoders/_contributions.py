"""`contributions`: what a feature's pre-activation, a neuron's or a logit is made of, one step back.

A target is a vector v that reads the residual stream x at position t: the feature's encoder through the frozen norm. It
reads, source by source,

    embedding_t . v + positional_t . v
    + sum over earlier MLPs     z_f,t * (W_dec[f] . v) of features, error_t . v, skip_t . v, b_dec . v
    + sum over earlier heads    A[h, t, s] * (norm(x_s) . W_V W_O v) by source position s, b_V and b_O

with v pulled back through the norm after attention or the MLP where there is one. These add up to x_t . v exactly, and
with the encoder's constant to the pre-activation that the model computes: that is checked on every call.
Source: Dunefsky, Chlenski and Nanda 2024, arXiv 2406.11944; METHODS.md 4.3.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _html
from .._errors import NumericalError, PairsError, SettingsError, UnsupportedModelError
from .._typing import checked
from ..bases._dictionary import Dictionary
from ..interventions._steering_prompts import token_names
from ..models._protocol import TransformerLensModel, submodule
from ..models._threads import holding
from ..nodes._scores import label
from ..tasks._tokenize import tokens_after
from ._residual_run import NormMap, Prompt, ResidualRun, norm_map, one_prompt, residual_run

_COLUMNS = {
    "node": "object", "kind": "object", "layer": "int64", "unit": "int64", "position": "int64", "token": "object",
    "activation": "float64", "weight": "float64", "contribution": "float64",
}  # fmt: skip
_LABEL = re.compile(r"L(\d+)/([A-Z])(\d+)(?:@(-?\d+))?")
_FORM = '"L3/F17@5" (feature 17 of layer 3 at position 5; -1 is the last), "L3/N17@5" (a neuron), or a next token'
_ALLOWED = {torch.float64: 1e-4, torch.float32: 1e-4}
_ALLOWED_HALF = 0.05
"""How far the sum may be from the model's value, relative to the sizes added up, by the model's dtype."""


@dataclass(frozen=True, eq=False, repr=False)
class Contributions:
    """What `contributions` returns.

    `table` has one row per source, largest |contribution| first: node, kind ("feature", "error", "skip", "head",
    "embedding", "bias"), layer, unit (feature, head, or token), position (where it is; a head's source), token,
    activation and weight of features (contribution = activation * weight), contribution.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, transcoders = tnc.load_demo_model(), tnc.load_demo_dictionaries("transcoder")
        >>> found = tnc.transcoders.contributions(model, transcoders, "The dog near the cats", "L3/F7@-1")
        >>> bool(abs(found.by("kind").sum() - found.value) < 1e-3)
        True
    """

    table: pd.DataFrame
    target: str
    value: float
    """The target's pre-activation (or logit) as the model computes it."""

    @property
    def residual(self) -> float:
        """`value` minus the sum of all contributions: rounding."""
        return self.value - float(self.table["contribution"].sum())

    def to_dataframe(self) -> pd.DataFrame:
        """The table."""
        return self.table.copy()

    @checked
    def top(self, k: int = 10, kind: str | None = None) -> pd.DataFrame:
        """The `k` largest contributions in size, of one kind or of all."""
        rows = self.table if kind is None else self.table[self.table["kind"] == kind]
        return rows.head(k).reset_index(drop=True)

    def by(self, *columns: str) -> pd.Series:
        """Contributions added up, for example `by("kind")` or `by("kind", "layer")`.

        Raises:
            SettingsError: no column, or one that the table lacks.
        """
        if not columns or not set(columns) <= set(self.table.columns):
            raise SettingsError(f"expected columns among {list(self.table.columns)}; got {list(columns)}.")
        return self.table.groupby(list(columns), sort=False)["contribution"].sum()

    def __repr__(self) -> str:
        return f"Contributions({self.target} = {self.value:.4g} from {len(self.table)} sources)"

    def _repr_html_(self) -> str:
        return _html.block(repr(self), _html.table(self.table, bars=("contribution",)))


@holding
@checked
def contributions(
    model: TransformerLensModel,
    dictionaries: Sequence[Dictionary],
    prompt: Prompt,
    target: str | int,
    *,
    prepend_bos: bool | None = None,
) -> Contributions:
    """Take a feature's pre-activation apart into everything that it reads from the residual stream.

    Sources are the features that fire in earlier MLPs (activation times decoder . encoder), each MLP's error (all it
    writes, where it has no dictionary) and skip path, each attention head by source position (pattern frozen), the
    embedding, and biases by name. Norms are linear, their scales frozen. Positive raises the target; the sum is the
    pre-activation, which for a feature that fires is its activation.

    Args:
        model: a HookedTransformer or TransformerBridge.
        dictionaries: transcoders, at most one per layer; SAEs on MLP outputs can be sources only.
        prompt: one prompt, text or tokens.
        target: "L3/F17@5" (a feature; -1 is the last position), "L3/N17@5" (what enters a neuron's nonlinearity, the
            gate's of a gated MLP), or a next token as text or number (its logit at the last position, before any soft
            cap and minus the mean over the vocabulary).
        prepend_bos: None means the model's default.

    Raises:
        DictionaryError: a dictionary does not write an MLP's output or read the residual stream, or has an encoder of
            its own.
        SettingsError: the target does not exist.
        NumericalError: the sources do not add up to the value that the model computes, to 1e-4 of their size.
        UnsupportedModelError: the model lacks hook points or weights.

    Source: Dunefsky, Chlenski and Nanda 2024, arXiv 2406.11944; METHODS.md 4.3.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, transcoders = tnc.load_demo_model(), tnc.load_demo_dictionaries("transcoder")
        >>> found = tnc.transcoders.contributions(model, transcoders, "The dog near the cats", "L3/F7@-1")
        >>> abs(found.residual) < 1e-4
        True
    """
    run = residual_run(model, dictionaries, one_prompt(model, prompt, prepend_bos))
    found = find_target(run, target, prompt if isinstance(prompt, str) else None)
    return Contributions(_table(run, decompose(run, found)), found.label, found.value)


@dataclass(frozen=True, eq=False)
class Read:
    """A vector that reads the residual stream at one position, and constants by name.

    `attentions` and `mlps` count the layers that have written before it reads: those below it.
    """

    position: int
    attentions: int
    mlps: int
    vector: Float[Tensor, " d_model"]
    constants: dict[str, float] = field(default_factory=dict)

    def plus(self, other: "Read") -> "Read":
        """Both together; they must read at one place."""
        names = dict.fromkeys((*self.constants, *other.constants))
        constants = {name: self.constants.get(name, 0.0) + other.constants.get(name, 0.0) for name in names}
        return Read(self.position, self.attentions, self.mlps, self.vector + other.vector, constants)

    def times(self, factor: float) -> "Read":
        """The same, scaled."""
        constants = {name: factor * value for name, value in self.constants.items()}
        return Read(self.position, self.attentions, self.mlps, factor * self.vector, constants)


@dataclass(frozen=True, eq=False)
class FeatureReads:
    """The features of one layer that fire: per feature its weight (decoder . read vector) and its contribution."""

    layer: int
    units: Int[Tensor, " active"]
    activations: Float[Tensor, " active"]
    weights: Float[Tensor, " active"]

    @property
    def contributions(self) -> Float[Tensor, " active"]:
        """Activation times weight."""
        return self.activations * self.weights


@dataclass(frozen=True, eq=False)
class OneStep:
    """What a `Read` reads, by source; everything adds up to `total`."""

    read: Read
    embedding: float
    positional: float | None
    features: tuple[FeatureReads, ...]
    errors: dict[int, float]
    skips: dict[int, float]
    heads: dict[int, Float[Tensor, "head source"]]
    constants: dict[str, float]

    @property
    def total(self) -> float:
        """The sum of everything."""
        return sum(self._scalars()) + sum(float(part.sum()) for part in self._tensors())

    @property
    def size(self) -> float:
        """The sum of all magnitudes: what rounding is to be compared with."""
        return sum(map(abs, self._scalars())) + sum(float(part.abs().sum()) for part in self._tensors())

    def _scalars(self) -> list[float]:
        parts = (self.errors, self.skips, self.constants)
        return [self.embedding, self.positional or 0.0, *(value for part in parts for value in part.values())]

    def _tensors(self) -> Iterator[Tensor]:
        yield from (features.contributions for features in self.features)
        yield from self.heads.values()


def one_step(run: ResidualRun, read: Read) -> OneStep:
    """Take apart what a vector reads."""
    t, v = read.position, read.vector
    features, errors, skips, heads = [], {}, {}, {}
    constants = dict(read.constants)
    for layer in range(read.mlps):
        writes = run.mlps[layer]
        u = run.before_post_norm(layer, t, v)
        if writes.dictionary is not None:
            units, W_dec = writes.units[t], writes.dictionary.W_dec
            weights = W_dec[units.to(W_dec.device)].to(u) @ u
            features.append(FeatureReads(layer, units, writes.activations[t].to(u), weights))
            constants[f"L{layer}/b_dec"] = float(writes.dictionary.b_dec.to(u) @ u)
        if writes.post.bias is not None:
            constants[f"L{layer}/ln2_post"] = float(writes.post.constant(v))
        errors[layer] = float(writes.error[t].to(u) @ u)
        if writes.skip is not None:
            skips[layer] = float(writes.skip[t].to(u) @ u)
    for layer in range(read.attentions):
        u, biases = before_heads(run, layer, t, v)
        constants |= biases
        reads, reads_of_b_V = run.attentions[layer].back(u)
        pattern = run.values[f"blocks.{layer}.attn.hook_pattern"][:, t].to(u)
        heads[layer] = pattern * (reads @ run.attention_inputs[layer].to(u).mT)
        if run.attentions[layer].b_V is not None:
            constants[f"L{layer}/b_V"] = float(pattern.sum(-1) @ reads_of_b_V)
    positional = None if run.positional is None else float(run.positional[t].to(v) @ v)
    embedding = float(run.embedding[t].to(v) @ v)
    return OneStep(read, embedding, positional, tuple(features), errors, skips, heads, constants)


def before_heads(run: ResidualRun, layer: int, position: int, v: Tensor) -> tuple[Tensor, dict[str, float]]:
    """A vector that reads the residual stream, as one that reads the heads' sum; and what it reads from biases."""
    weights, scale = run.attentions[layer], run.attention_post_scales[layer]
    biases: dict[str, float] = {}
    u = v
    if scale is not None:
        u = weights.post.back(v) / scale[position].to(v)
        if weights.post.bias is not None:
            biases[f"L{layer}/ln1_post"] = float(weights.post.constant(v))
    if weights.b_O is not None:
        biases[f"L{layer}/b_O"] = float(weights.b_O.to(u) @ u)
    return u, biases


def read_through_norm(
    run: ResidualRun, stream: str, norm: NormMap, position: int, layer: int, v: Tensor, constants: dict[str, float]
) -> Read:
    """A vector that reads a norm's output before the MLP of `layer`, as one that reads the stream before that norm.

    `constants` are the reader's own; the norm's bias is added to them.
    """
    scale = norm.scale(run.values[stream][position]).to(v)
    if norm.bias is not None:
        constants = constants | {f"L{layer}/norm": float(norm.constant(v))}
    before_attention = stream.endswith("hook_resid_pre")
    return Read(position, layer if before_attention else layer + 1, layer, norm.back(v) / scale, constants)


def feature_read(run: ResidualRun, layer: int, unit: int, position: int) -> Read:
    """A feature's encoder as a vector on the residual stream: it reads the feature's pre-activation."""
    reading = run.readings[layer]
    vectors, constants = reading.vectors([unit])
    v = reading.rescaled(vectors, run.values[reading.site.hook_in][position].to(vectors))[0]
    bias = {f"L{layer}/b_enc": float(constants[0])}
    return read_through_norm(run, reading.stream, reading.norm, position, reading.layer, v, bias)


@dataclass(frozen=True, eq=False)
class Target:
    """One target on one run: where it is, the vector that reads it, and the value that the model gives it."""

    label: str
    layer: int
    unit: int
    position: int
    read: Read
    value: float
    text: str = ""
    """The token, of a logit."""


def find_target(run: ResidualRun, target: str | int, prompt: str | None) -> Target:
    """The target on a run: `"L3/F17@5"` (a feature), `"L3/N17@5"` (a neuron), or the next token as text or number.

    Raises:
        SettingsError: it names no feature, neuron or token of this model, or no position.
    """
    parts = _LABEL.fullmatch(target) if isinstance(target, str) else None
    if parts is None:
        return _logit(run, _token(run.model, target, prompt))
    if parts[2] not in "FN" or parts[4] is None:
        raise SettingsError(f"expected a target such as {_FORM}; got {target!r}.")
    layer, unit, length = int(parts[1]), int(parts[3]), len(run.tokens)
    position = int(parts[4]) + (length if int(parts[4]) < 0 else 0)
    if not 0 <= position < length:
        raise SettingsError(f"expected a position from {-length} to {length - 1} in {target!r}: the prompt's tokens.")
    return (_feature if parts[2] == "F" else _neuron)(run, layer, unit, position)


def feature_of(name: str) -> tuple[int, int]:
    """Layer and unit of a feature's label, "L3/F17" or "L3/F17@5".

    Raises:
        SettingsError: it is not a feature's label.
    """
    parts = _LABEL.fullmatch(name)
    if parts is None or parts[2] != "F":
        raise SettingsError(f'expected a feature such as "L3/F17" (feature 17 of layer 3\'s dictionary); got {name!r}.')
    return int(parts[1]), int(parts[3])


def _feature(run: ResidualRun, layer: int, unit: int, position: int) -> Target:
    reading = run.readings.get(layer)
    if reading is None:
        known = ", ".join(map(str, sorted(run.readings))) or "none"
        raise SettingsError(
            f"expected a feature of a layer with a transcoder ({known}); got layer {layer}. An SAE's features can be "
            "sources but not targets: the MLP stands between what it reads and earlier layers."
        )
    if not unit < reading.dictionary.d_dict:
        raise SettingsError(f"expected a feature below {reading.dictionary.d_dict} in layer {layer}; got {unit}.")
    x = run.values[reading.site.hook_in][position]
    vectors, constants = reading.vectors([unit])
    value = float(reading.rescaled(vectors, x.to(vectors))[0] @ x.to(vectors) + constants[0])
    read = feature_read(run, layer, unit, position)
    return Target(f"L{layer}/F{unit}@{position}", layer, unit, position, read, value)


def _neuron(run: ResidualRun, layer: int, unit: int, position: int) -> Target:
    """What enters a neuron's nonlinearity: the gate's input in a gated MLP."""
    mlp: Any = submodule(run.model, f"blocks.{layer}.mlp") if layer < run.n_layers else None
    gated = isinstance(getattr(mlp, "W_gate", None), Tensor)
    weights, bias = (getattr(mlp, name + ("gate" if gated else "in"), None) for name in ("W_", "b_"))
    if not isinstance(weights, Tensor) or weights.dim() != 2 or not unit < weights.shape[1]:
        raise SettingsError(f"expected a neuron of this model; got L{layer}/N{unit}.")
    vector = weights.detach()[:, unit]
    vector = vector.to(torch.promote_types(vector.dtype, torch.float32))
    norms = [norm_map(run.model, f"blocks.{layer}.{name}") for name in ("ln2", "ln1")]
    norm = next((norm for norm in norms if norm.normalizes), norms[0])
    constant = float(bias.detach()[unit]) if isinstance(bias, Tensor) else 0.0
    stream = run.streams[layer][1]
    read = read_through_norm(run, stream, norm, position, layer, vector, {f"L{layer}/b_in": constant})
    value = float(run.values[f"blocks.{layer}.mlp.hook_pre"][position, unit])
    return Target(f"L{layer}/N{unit}@{position}", layer, unit, position, read, value)


def _logit(run: ResidualRun, token: int) -> Target:
    """A logit before any soft cap, minus the mean over the vocabulary, at the last position."""
    unembed: Any = submodule(run.model, "unembed")
    weights, bias = getattr(unembed, "W_U", None), getattr(unembed, "b_U", None)
    if not isinstance(weights, Tensor):
        raise UnsupportedModelError(
            f"expected unembed.W_U on this {type(run.model).__name__}; it has none. "
            "Use trace(...), which needs gradients only."
        )
    weights = weights.detach()
    vector = weights[:, token].float() - weights.mean(1, dtype=torch.float32)
    vector = vector.to(torch.promote_types(weights.dtype, torch.float32))
    constant = float((bias[token] - bias.mean()).detach()) if isinstance(bias, Tensor) else 0.0
    norm, position = norm_map(run.model, "ln_final"), len(run.tokens) - 1
    stream = run.values[f"blocks.{run.n_layers - 1}.hook_resid_post"][position]
    scale = norm.scale(stream).to(vector)
    constants = {"b_U": constant} | ({} if norm.bias is None else {"ln_final": float(norm.constant(vector))})
    read = Read(position, run.n_layers, run.n_layers, norm.back(vector) / scale, constants)
    value = float(norm.apply(stream).to(vector) @ vector) + constant
    return Target(f"logit/{token}", run.n_layers, token, position, read, value, token_names(run.model, [token])[0])


def _token(model: TransformerLensModel, target: str | int, prompt: str | None) -> int:
    d_vocab = int(model.cfg.d_vocab)
    if isinstance(target, int):
        if not 0 <= target < d_vocab:
            raise SettingsError(f"expected a token between 0 and {d_vocab - 1} as target; got {target}.")
        return target
    if prompt is None:
        raise SettingsError(
            f"expected a target such as {_FORM}; got {target!r}. A token as text is read in the context of a prompt "
            "given as text: pass the token's number, or the prompt as text."
        )
    try:
        return tokens_after(model, [prompt], [target])[0]
    except PairsError as error:
        raise SettingsError(f"expected a target such as {_FORM}; got {target!r}: {error}") from error


def decompose(run: ResidualRun, target: Target) -> OneStep:
    """The target's one-step decomposition, once it is known to add up.

    Raises:
        NumericalError: it does not: something unknown here writes to the residual stream.
    """
    step = one_step(run, target.read)
    allowed = _ALLOWED.get(run.model.cfg.dtype, _ALLOWED_HALF)
    gap = abs(step.total - target.value)
    if not gap <= allowed * max(1.0, step.size):
        raise NumericalError(
            f"the contributions to {target.label} sum to {step.total:.6g}, but the model gives it {target.value:.6g}: "
            "a part of this architecture writes to the residual stream (or normalizes it) in a way that circuits from "
            "weights do not know. Use attribute(...) or trace(...), which need gradients only."
        )
    return step


def head_label(layer: int, head: int, source: int, position: int) -> str:
    """A head between two positions: it reads at `source` and writes at `position`."""
    return f"L{layer}/H{head}@{source}→{position}"


def _table(run: ResidualRun, step: OneStep) -> pd.DataFrame:
    texts, t = token_names(run.model, run.tokens.tolist()), step.read.position
    rows: list[dict[str, Any]] = []
    for features in step.features:
        columns = (features.units, features.activations, features.weights, features.contributions)
        for unit, activation, weight, value in zip(*(column.tolist() for column in columns), strict=True):
            place = {"layer": features.layer, "unit": unit, "position": t, "token": texts[t]}
            numbers = {"activation": activation, "weight": weight, "contribution": value}
            rows.append({"node": label(features.layer, "F", unit, t, "node"), "kind": "feature", **place, **numbers})
    for layer, heads in step.heads.items():
        for head, by_source in enumerate(heads[:, : t + 1].tolist()):
            for source, value in enumerate(by_source):
                place = {"layer": layer, "unit": head, "position": source, "token": texts[source]}
                rows.append(
                    {"node": head_label(layer, head, source, t), "kind": "head", **place, "contribution": value}
                )
    reader = {"position": t, "token": texts[t]}
    embedding = {"node": f"embed@{t}", "kind": "embedding", "unit": int(run.tokens[t]), **reader}
    rows.append({**embedding, "contribution": step.embedding})
    if step.positional is not None:
        rows.append({"node": "positions", "kind": "bias", **reader, "contribution": step.positional})
    for kind, values in (("error", step.errors), ("skip", step.skips)):
        for layer, value in values.items():
            name = label(layer, "", -1, t, kind)
            rows.append({"node": name, "kind": kind, "layer": layer, **reader, "contribution": value})
    for name, value in step.constants.items():
        layer = re.match(r"L(\d+)/", name)
        place = {} if layer is None else {"layer": int(layer[1])}
        rows.append({"node": name, "kind": "bias", **reader, "contribution": value, **place})
    table = pd.DataFrame(rows, columns=list(_COLUMNS)).fillna({"layer": -1, "unit": -1}).astype(_COLUMNS)
    order = table["contribution"].abs().sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)
