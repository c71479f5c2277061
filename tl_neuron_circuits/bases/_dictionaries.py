"""Dictionaries as a basis: features, one error node and, for skip transcoders, one skip node a layer and position.

    value = nodes @ W_dec + b_dec + skip + error,   node(f) = decoder_scale(x) * encode(x)[f]

so that the value at the hook point is rebuilt exactly whatever the dictionary misses: error is all that is left. It is
linear in the nodes, hence no splice is needed for gradients: with g the model's own gradient at the hook point,
d m / d node(f) = W_dec[f] . g, and features + error + skip add up to the MLP output's own scores.
A transcoder reads the MLP's input and writes at its output. Source: Marks et al. 2025; METHODS 1.1 (caution) and 4.3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import SettingsError
from .._files import fingerprint
from ..models._protocol import TransformerLensModel
from ._dictionary import Dictionary
from ._dictionary_hooks import resolve_hooks
from ._dictionary_variance import VarianceSums
from ._site import Parts, Site


@dataclass(frozen=True, eq=False)
class DictionarySite:
    """One dictionary at the hook points it reads and writes on this model."""

    dictionary: Dictionary
    hook_in: str
    hook: str
    layer: int
    letter: str = "F"

    @property
    def reads(self) -> tuple[str, ...]:
        """The hook point read and the one written."""
        return tuple(dict.fromkeys((self.hook_in, self.hook)))

    @property
    def identity(self) -> str:
        """The hook points, the kind, and a fingerprint of the weights."""
        tensors = self.dictionary.tensors()
        weights = fingerprint(tensors[name] for name in sorted(tensors))
        return f"{self.hook_in} -> {self.hook} {self.dictionary.kind} {weights}"

    @property
    def vectors(self) -> tuple[str, ...]:
        """The error, and the skip where there is one."""
        return ("error", "skip") if self.dictionary.has_skip else ("error",)

    def take_apart(self, values: Mapping[str, Tensor]) -> Parts:
        """Features, error and skip of a run."""
        x, output = values[self.hook_in], self._flat(values[self.hook])
        nodes = self.dictionary.encode(x)
        if self.dictionary.scale_depends_on_input:
            nodes = nodes * self.dictionary.decoder_scale(x)
        skip = self.dictionary.skip(x)
        rebuilt = self._decode(nodes) if skip is None else self._decode(nodes) + skip
        vectors = {"error": output.to(rebuilt) - rebuilt}
        return Parts(nodes, vectors if skip is None else {**vectors, "skip": skip})

    def put_together(self, parts: Parts, like: Tensor) -> Tensor:
        """The value that these nodes, error and skip give."""
        value = self._decode(parts.nodes)
        for vector in parts.vectors.values():
            value = value + vector
        return value.reshape(like.shape).to(like.dtype)

    def node_gradient(self, gradient: Tensor) -> Float[Tensor, "batch pos unit"]:
        """W_dec[f] . gradient for every feature."""
        dtype = torch.promote_types(torch.promote_types(gradient.dtype, self.dictionary.dtype), torch.float32)
        gradient = self._flat(gradient).to(dtype)
        return gradient @ self.dictionary.W_dec.to(gradient).mT

    def vector_gradient(self, gradient: Tensor) -> Float[Tensor, "batch pos d"]:
        """The gradient itself, heads concatenated."""
        return self._flat(gradient)

    def variance(self, values: Mapping[str, Tensor]) -> VarianceSums:
        """Sums for the fraction of variance that the dictionary leaves unexplained on a run."""
        output = self._flat(values[self.hook])
        rebuilt = self._flat(self.dictionary(values[self.hook_in]))
        return VarianceSums.of(output, rebuilt)

    def _decode(self, nodes: Tensor) -> Tensor:
        d = self.dictionary
        return nodes @ d.W_dec.to(nodes) + d.b_dec.to(nodes)

    def _flat(self, value: Tensor) -> Tensor:
        return value.flatten(2) if value.dim() > 3 else value


@dataclass(frozen=True, eq=False)
class Dictionaries:
    """SAEs or transcoders, one a hook point, in any order.

    Attributes:
        dictionaries: `Dictionary` objects; see `load_dictionary`, `as_dictionary`, `load_demo_dictionaries`.
        name: for tables and plots; "sae" or "transcoder" by their kind unless given.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.bases.Dictionaries(tnc.load_demo_dictionaries("sae")).name
        'sae'
    """

    dictionaries: Sequence[Dictionary]
    name: str = ""

    def __post_init__(self) -> None:
        if not self.dictionaries:
            raise SettingsError("expected at least one dictionary; got an empty list.")
        if not self.name:
            kinds = {"transcoder" if d.is_transcoder else "sae" for d in self.dictionaries}
            object.__setattr__(self, "name", kinds.pop() if len(kinds) == 1 else "dictionaries")

    def sites(self, model: TransformerLensModel) -> tuple[Site, ...]:
        """One site a dictionary, by layer.

        Raises:
            DictionaryError: a dictionary's hook points do not exist on the model, or its width differs.
            SettingsError: two dictionaries write at the same hook point.
        """
        sites = []
        for dictionary in self.dictionaries:
            hook_in, hook_out = resolve_hooks(model, dictionary)
            sites.append(DictionarySite(dictionary, hook_in, hook_out, dictionary.layer))
        hooks = [site.hook for site in sites]
        twice = sorted({hook for hook in hooks if hooks.count(hook) > 1})
        if twice:
            raise SettingsError(f"expected one dictionary a hook point; got several that write at {twice}.")
        return tuple(sorted(sites, key=lambda site: site.layer))
