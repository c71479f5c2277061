"""Random transcoders on tiny random models of every family, whatever their MLPs' inputs are called."""

from typing import Any

import torch

from tests.bases.site_dictionaries import dictionary
from tests.families import N_LAYERS, random_tokens, typical_models
from tl_neuron_circuits.bases import Dictionary

EVERY_MODEL = typical_models()
LENGTH = 6


def mlp_input(model: Any) -> str:
    """A hook point at, or just before the weight of the norm at, the MLP's input."""
    names = ("ln2.hook_normalized", "mlp.hook_in", "hook_resid_mid")
    return next(name for name in names if f"blocks.0.{name}" in model.hook_dict)


def transcoders(model: Any, kind: str = "skip_transcoder", **changes: Any) -> list[Dictionary]:
    """One a layer, in float32."""
    found = []
    for layer in range(N_LAYERS):
        hooks = {"hook_in": f"blocks.{layer}.{mlp_input(model)}", "hook_out": f"blocks.{layer}.hook_mlp_out"}
        found.append(dictionary(kind, layer, torch.float32, **(hooks | changes)))
    return found


def prompt(model: Any, seed: int = 0) -> torch.Tensor:
    """Random tokens."""
    return random_tokens(model, 1, LENGTH, seed)[0]
