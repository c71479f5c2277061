"""Random dictionaries attached to a tiny model, and pairs of random tokens for it."""

from collections.abc import Sequence
from typing import Any

import torch

from tests.families import D_HEAD, D_MLP, D_MODEL, N_HEADS, N_LAYERS, random_tokens
from tl_neuron_circuits.bases import Dictionaries, Dictionary, HeadOutputs, MLPOutputs, Neurons, ResidualStream
from tl_neuron_circuits.bases._site import Basis
from tl_neuron_circuits.tasks import TokenizedPairs

D_DICT, LENGTH = 12, 5
PLACES: dict[str, tuple[str, str, str | None, int, Basis]] = {
    "sae_mlp_out": ("standard", "hook_mlp_out", None, D_MODEL, MLPOutputs()),
    "sae_residual": ("topk", "hook_resid_post", None, D_MODEL, ResidualStream()),
    "sae_attention": ("gated", "attn.hook_z", None, N_HEADS * D_HEAD, HeadOutputs()),
    "sae_hidden": ("jumprelu", "mlp.hook_post", None, D_MLP, Neurons()),
    "transcoder": ("transcoder", "ln2.hook_normalized", "hook_mlp_out", D_MODEL, MLPOutputs()),
    "skip_transcoder": ("skip_transcoder", "ln2.hook_normalized", "hook_mlp_out", D_MODEL, MLPOutputs()),
}
"""Kind, hook read, hook written (None: the same), width, and the basis that it divides further."""


def dictionary(place: str, layer: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Dictionary:
    """A random dictionary at a place of a tiny model; about half of its features fire."""
    kind, hook_in, hook_out, width, _ = PLACES[place]
    generator = torch.Generator().manual_seed(layer)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    tensors = {"W_enc": make(width, D_DICT) / 3, "W_dec": make(D_DICT, width) / 3, "b_dec": make(width)}
    names = ("r_mag", "b_gate", "b_mag") if kind == "gated" else ("b_enc",)
    tensors |= {name: 0.3 * make(D_DICT) for name in names}
    if kind == "jumprelu":
        tensors["threshold"] = make(D_DICT).abs() / 2
    if kind == "skip_transcoder":
        tensors["W_skip"] = make(width, width) / 3
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    block = f"blocks.{layer}."
    hooks = {"hook_in": block + hook_in, "hook_out": None if hook_out is None else block + hook_out}
    return Dictionary(kind, **(tensors | hooks | ({"k": 4} if kind == "topk" else {}) | changes))


def dictionaries(place: str, layers: Sequence[int] = range(N_LAYERS), **settings: Any) -> Dictionaries:
    """One a layer."""
    return Dictionaries([dictionary(place, layer, **settings) for layer in layers], name=place)


def identity(width: int, hook: str, *, linear: bool = True) -> Dictionary:
    """A dictionary whose features are the components: kind "custom", so that nothing is cut off at zero."""
    eye, zeros = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    return Dictionary("custom", eye, eye, zeros, hook_in=hook, own_encode=lambda x: x)


def pairs(model: Any, n: int = 6, length: int = LENGTH, seed: int = 0) -> TokenizedPairs:
    """Random prompts, corrupted at one position, with random answers; two pairs share a label."""
    clean = random_tokens(model, n, length, seed)
    corrupt = clean.clone()
    corrupt[:, 1] = random_tokens(model, n, 1, seed + 50)[:, 0]
    corrupt[:, 1] += (corrupt[:, 1] == clean[:, 1]).long()
    corrupt %= model.cfg.d_vocab
    answers = random_tokens(model, n, 2, seed + 99)
    wrong = (answers[:, 1] + (answers[:, 0] == answers[:, 1]).long()) % model.cfg.d_vocab
    labels = [f"word{row // 2}" for row in range(n)]
    return TokenizedPairs.from_tokens(clean, answers[:, 0], corrupt, wrong, labels=labels)
