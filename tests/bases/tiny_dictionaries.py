"""Random dictionaries of the tiny models' width, one a layer."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from tests.bases.test_dictionary_objects import Autoencoder, Transcoder
from tests.families import D_MODEL
from tl_neuron_circuits.bases import Dictionaries, as_dictionary

D_FEATURES = 20
RANDOM = pytest.mark.filterwarnings("ignore:dictionaries leave more than 0.9 of the variance")
"""A warning that is right: random dictionaries rebuild nothing, and every identity must hold all the same."""


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "W_enc": random(D_MODEL, D_FEATURES),
        "W_dec": random(D_FEATURES, D_MODEL),
        "b_enc": random(D_FEATURES),
        "b_dec": random(D_MODEL),
        "W_skip": random(D_MODEL, D_MODEL),
    }


def tiny_dictionaries(kind: Literal["sae", "transcoder", "skip_transcoder"], model: Any) -> Dictionaries:
    """SAEs on the MLPs' outputs, or transcoders from the MLPs' inputs to their outputs."""
    made = []
    reads = "ln2.hook_out" if "blocks.0.ln2.hook_out" in model.hook_dict else "ln2.hook_normalized"
    for layer in range(2):
        weights, out = tensors(layer), f"blocks.{layer}.hook_mlp_out"
        if kind == "sae":
            made.append(as_dictionary(Autoencoder(weights), hook_in=out, hook_out=out))
            continue
        if kind == "transcoder":
            del weights["W_skip"]
        hooks = {"hook_in": f"blocks.{layer}.{reads}", "hook_out": out}
        made.append(as_dictionary(Transcoder(weights, threshold=0.1).double(), **hooks))
    return Dictionaries(made)
