"""Bases that make "the neuron basis" mean something: the same space in other coordinates.

Each is a dictionary with an orthonormal decoder, so what is ablated is the same in all of them: a layer's `hook_post`.

    rotated           each layer's neurons times a random orthogonal matrix of its own
    pca               principal components of each layer's neurons on the learning prompts, all positions together
    mean_difference   per layer one direction per position: mean over plural prompts minus mean over singular ones

The rest of a layer is an error node, which is rounding in the first two and everything else in the third.
"""

from typing import Any

import torch
from torch import Tensor

import tl_neuron_circuits as tnc

HOOK = "blocks.{layer}.mlp.hook_post"


class Orthonormal:
    """`encode` and `decode` by the rows of one matrix, for `as_dictionary`."""

    def __init__(self, rows: Tensor) -> None:
        self.W_dec, self.W_enc = rows, rows.mT

    def encode(self, x: Tensor) -> Tensor:
        """Coordinates along the rows."""
        return x @ self.W_enc.to(x)

    def decode(self, features: Tensor) -> Tensor:
        """The vector with these coordinates."""
        return features @ self.W_dec.to(features)


def _basis(rows: list[Tensor], name: str) -> tnc.bases.Dictionaries:
    made = [
        tnc.as_dictionary(Orthonormal(matrix), hook_in=HOOK.format(layer=layer), hook_out=HOOK.format(layer=layer))
        for layer, matrix in enumerate(rows)
    ]
    return tnc.bases.Dictionaries(made, name=name)


def rotated_basis(model: Any, seed: int = 0) -> tnc.bases.Dictionaries:
    """Every layer's neurons, rotated at random."""
    generator = torch.Generator().manual_seed(seed)
    width, n = model.cfg.d_mlp, model.cfg.n_layers
    noise = (torch.randn(width, width, generator=generator) for _ in range(n))
    return _basis([torch.linalg.qr(matrix).Q for matrix in noise], "rotated_neurons")


def pca_basis(model: Any, pairs: tnc.PromptPairs) -> tnc.bases.Dictionaries:
    """Principal components of the neurons on all prompts of these pairs, completed to the whole space."""
    rows = []
    for values in _neuron_values(model, pairs):
        flat = values.flatten(0, 1).double()
        flat = flat - flat.mean(0)
        rows.append(torch.linalg.eigh(flat.mT @ flat).eigenvectors.mT.float().contiguous())
    return _basis(rows, "pca")


def mean_difference_basis(model: Any, pairs: tnc.PromptPairs) -> tnc.bases.Dictionaries:
    """Per layer and position the direction from singular to plural, made orthonormal position by position."""
    plural = torch.tensor([answer in _PLURAL for answer in pairs.answer])
    rows = []
    for values in _neuron_values(model, pairs):
        clean = values[: len(pairs)]
        change = clean[plural].mean(0) - clean[~plural].mean(0)
        moved = change[change.norm(dim=-1) > 1e-6 * change.norm()]
        rows.append(torch.linalg.qr(moved.mT).Q.mT.contiguous())
    return _basis(rows, "mean_difference")


def _neuron_values(model: Any, pairs: tnc.PromptPairs) -> list[Tensor]:
    """Per layer `[prompt, pos, neuron]`: clean prompts, then corrupt ones."""
    tokens = tnc.tasks.tokenize(model, pairs)
    names = [HOOK.format(layer=layer) for layer in range(model.cfg.n_layers)]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    with torch.no_grad():
        for row in (*tokens.clean, *(tokens.corrupt or ())):
            _, cache = model.run_with_cache(row[None], names_filter=lambda name: name in found)
            for name in names:
                found[name].append(cache[name][0])
    return [torch.stack(found[name]) for name in names]


_PLURAL = {
    f" {verb}"
    for verb in "are have were do go like know love see help follow fear meet trust thank admire hate".split()
}
