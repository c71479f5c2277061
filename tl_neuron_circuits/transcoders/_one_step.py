"""Everything that a vector reads of the residual stream, source by source: the one-step decomposition.

A read vector v at position t, before attention or the MLP of a layer, or at the end, reads

    embedding_t . v + positional_t . v
    + sum over earlier MLPs     z_f,t * (W_dec[f] . v) of features, error_t . v, skip_t . v, b_dec . v
    + sum over earlier heads    A[h, t, s] * (norm(x_s) . W_V W_O v) by source position s, b_V and b_O

with v pulled back through the norm after attention or the MLP where there is one. These add up to x_t . v exactly.
Source: Dunefsky, Chlenski and Nanda 2024, arXiv 2406.11944; METHODS.md 4.3.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor

from ._norm_maps import NormMap
from ._residual_run import ResidualRun


@dataclass(frozen=True, eq=False)
class Read:
    """A vector that reads the residual stream at one position, and constants by name.

    `attentions` and `mlps` count the layers that have written before: those below it.
    """

    position: int
    attentions: int
    mlps: int
    vector: Float[Tensor, " d_model"]
    constants: dict[str, float] = field(default_factory=dict)

    def plus(self, other: "Read") -> "Read":
        """Both together; they must stand at one place."""
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
        """The sum of all of it."""
        scalars = [self.embedding, self.positional or 0.0]
        scalars += [*self.errors.values(), *self.skips.values(), *self.constants.values()]
        return sum(scalars) + sum(float(part.sum()) for part in self._parts())

    @property
    def size(self) -> float:
        """The sum of all sizes: what rounding is to be compared with."""
        scalars = [self.embedding, self.positional or 0.0]
        scalars += [*self.errors.values(), *self.skips.values(), *self.constants.values()]
        return sum(map(abs, scalars)) + sum(float(part.abs().sum()) for part in self._parts())

    def _parts(self) -> Iterator[Tensor]:
        yield from (found.contributions for found in self.features)
        yield from self.heads.values()


def one_step(run: ResidualRun, read: Read) -> OneStep:
    """Take apart what a vector reads."""
    t, v = read.position, read.vector
    features, errors, skips, heads = [], {}, {}, {}
    constants = dict(read.constants)
    for layer in range(read.mlps):
        writes = run.mlps[layer]
        u = run.write_vector(layer, t, v)
        if writes.features is not None and writes.dictionary is not None:
            units, activations = writes.features.units[t], writes.features.values[t]
            decoder = writes.dictionary.W_dec
            weights = decoder[units.to(decoder.device)].to(u) @ u
            features.append(FeatureReads(layer, units, activations.to(u), weights))
            constants[f"L{layer}/b_dec"] = float(writes.dictionary.b_dec.to(u) @ u)
        if writes.post.bias is not None:
            constants[f"L{layer}/ln2_post"] = float(writes.post.constant(v))
        errors[layer] = float(writes.error[t].to(u) @ u)
        if writes.skip is not None:
            skips[layer] = float(writes.skip[t].to(u) @ u)
    for layer in range(read.attentions):
        u, biases = _before_heads(run, layer, t, v)
        constants |= biases
        reads, of_b_V = run.attentions[layer].read_of(u)
        pattern = run.pattern(layer)[:, t].to(u)
        heads[layer] = pattern * (reads @ run.attention_inputs[layer].to(u).mT)
        if run.attentions[layer].b_V is not None:
            constants[f"L{layer}/b_V"] = float(pattern.sum(-1) @ of_b_V)
    positional = None if run.positional is None else float(run.positional[t].to(v) @ v)
    embedding = float(run.embedding[t].to(v) @ v)
    return OneStep(read, embedding, positional, tuple(features), errors, skips, heads, constants)


def _before_heads(run: ResidualRun, layer: int, position: int, v: Tensor) -> tuple[Tensor, dict[str, float]]:
    """A vector that reads the residual stream, as it reads the heads' sum; and what it reads of biases on the way."""
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


def feature_read(run: ResidualRun, layer: int, unit: int, position: int) -> Read:
    """The encoder of a feature as a vector on the residual stream: it reads the feature's pre-activation."""
    reading = run.readings[layer]
    vectors, constants = reading.vectors([unit])
    v = reading.rescaled(vectors, run.values[reading.hook_in][position].to(vectors))[0]
    read = read_through_norm(run, reading.stream, reading.norm, position, reading.layer, v, f"L{layer}/norm")
    return Read(
        position, read.attentions, read.mlps, read.vector, {f"L{layer}/b_enc": float(constants[0])} | read.constants
    )


def skip_read(run: ResidualRun, layer: int, position: int, v: Float[Tensor, " d_model"]) -> Read:
    """What reads a skip path's output, as it reads the residual stream before that MLP."""
    reading = run.readings[layer]
    assert reading.dictionary.W_skip is not None
    v = reading.dictionary.W_skip.to(v).mT @ run.write_vector(layer, position, v)
    return read_through_norm(run, reading.stream, reading.norm, position, reading.layer, v, f"L{layer}/norm")


def head_read(run: ResidualRun, layer: int, head: int, source: int, position: int, v: Tensor) -> Read:
    """What reads a head's output at `position`, as it reads the residual stream at the source; b_V is left out."""
    weights = run.attentions[layer]
    u, _ = _before_heads(run, layer, position, v)
    reads = weights.read_of(u)[0][head] * run.pattern(layer)[head, position, source].to(u)
    back = weights.norm.back(reads) / run.attention_scales[layer][source].to(u)
    constants = {} if weights.norm.bias is None else {f"L{layer}/ln1": float(weights.norm.constant(reads))}
    return Read(source, layer, layer, back, constants)


def read_through_norm(
    run: ResidualRun, stream: str, norm: NormMap, position: int, layer: int, v: Tensor, name: str
) -> Read:
    """A vector that reads a norm's output before the MLP of `layer`, as it reads the stream before that norm."""
    scale = norm.scale(run.values[stream][position]).to(v)
    constants = {} if norm.bias is None else {name: float(norm.constant(v))}
    before_attention = stream.endswith("hook_resid_pre")
    return Read(position, layer if before_attention else layer + 1, layer, norm.back(v) / scale, constants)
