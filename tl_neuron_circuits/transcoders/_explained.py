"""What a circuit from weights explains: a feature's pre-activation, a neuron's, or a logit."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._errors import NumericalError, PairsError, SettingsError, UnsupportedModelError
from ..interventions._steering_prompts import token_names
from ..models._protocol import TransformerLensModel, submodule
from ..tasks._pairs import PromptPairs
from ..tasks._tokenize import tokenize
from ._norm_maps import norm_map
from ._one_step import OneStep, Read, feature_read, one_step, read_through_norm
from ._residual_run import ResidualRun

Target = str | int
"""`"L3/F17@5"` (a dictionary's feature), `"L3/N17@5"` (a neuron), or the next token as text or number."""
_LABEL = re.compile(r"L(\d+)/([A-Z])(\d+)(?:@(-?\d+))?")
_FORM = '"L3/F17@5" (feature 17 of layer 3 at position 5; -1 is the last), "L3/N17@5" (a neuron), or a next token'
_ALLOWED = {torch.float64: 1e-4, torch.float32: 1e-4}
_ALLOWED_HALF = 0.05


@dataclass(frozen=True, eq=False)
class Explained:
    """One target on one run: where it stands, the vector that reads it, and the value that the model gives it."""

    label: str
    layer: int
    unit: int
    position: int
    read: Read
    value: float
    text: str = ""
    """The token, of a logit."""


def feature_of(label: str) -> tuple[int, int]:
    """Layer and unit of a feature's label, "L3/F17" or "L3/F17@5".

    Raises:
        SettingsError: it is none.
    """
    found = _LABEL.fullmatch(label)
    if found is None or found[2] != "F":
        raise SettingsError(
            f'expected a feature such as "L3/F17" (feature 17 of layer 3\'s dictionary); got {label!r}.'
        )
    return int(found[1]), int(found[3])


def explained(run: ResidualRun, target: Target, prompt: str | None) -> Explained:
    """The target on a run.

    Raises:
        SettingsError: it names no feature, neuron or token of this model, or no position.
    """
    found = _LABEL.fullmatch(target) if isinstance(target, str) else None
    if found is None:
        return _logit(run, _token(run.model, target, prompt))
    if found[2] not in "FN" or found[4] is None:
        raise SettingsError(f"expected a target such as {_FORM}; got {target!r}.")
    layer, unit, length = int(found[1]), int(found[3]), len(run.tokens)
    position = int(found[4]) + (length if int(found[4]) < 0 else 0)
    if not 0 <= position < length:
        raise SettingsError(f"expected a position from {-length} to {length - 1} in {target!r}: the prompt's tokens.")
    return (_feature if found[2] == "F" else _neuron)(run, layer, unit, position)


def taken_apart(run: ResidualRun, target: Explained) -> OneStep:
    """The target's one-step decomposition, once it adds up.

    Raises:
        NumericalError: it does not: something writes to the residual stream that is not known here.
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


def _feature(run: ResidualRun, layer: int, unit: int, position: int) -> Explained:
    reading = run.readings.get(layer)
    if reading is None:
        known = ", ".join(map(str, sorted(run.readings))) or "none"
        raise SettingsError(
            f"expected a feature of a layer with a transcoder ({known}); got layer {layer}. An SAE's features can be "
            "sources but not targets: between what it reads and earlier layers stands the MLP."
        )
    if not unit < reading.dictionary.d_dict:
        raise SettingsError(f"expected a feature below {reading.dictionary.d_dict} in layer {layer}; got {unit}.")
    x = run.values[reading.hook_in][position]
    vectors, constants = reading.vectors([unit])
    value = float(reading.rescaled(vectors, x.to(vectors))[0] @ x.to(vectors) + constants[0])
    return Explained(
        f"L{layer}/F{unit}@{position}", layer, unit, position, feature_read(run, layer, unit, position), value
    )


def _neuron(run: ResidualRun, layer: int, unit: int, position: int) -> Explained:
    mlp: Any = submodule(run.model, f"blocks.{layer}.mlp") if layer < run.n_layers else None
    gated = isinstance(getattr(mlp, "W_gate", None), Tensor)
    weights, bias = (getattr(mlp, name + ("gate" if gated else "in"), None) for name in ("W_", "b_"))
    if not isinstance(weights, Tensor) or weights.dim() != 2 or not unit < weights.shape[1]:
        raise SettingsError(f"expected a neuron of this model; got L{layer}/N{unit}.")
    vector = weights.detach()[:, unit]
    vector = vector.to(torch.promote_types(vector.dtype, torch.float32))
    stream = run.streams[layer][1]
    paths = (f"blocks.{layer}.{name}" for name in ("ln2", "ln1"))
    norm = next((norm for norm in (norm_map(run.model, path) for path in paths) if norm.normalizes), None)
    if norm is None:
        norm = norm_map(run.model, f"blocks.{layer}.ln2")
    read = read_through_norm(run, stream, norm, position, layer, vector, f"L{layer}/norm")
    constant = float(bias.detach()[unit]) if isinstance(bias, Tensor) else 0.0
    read = Read(position, read.attentions, read.mlps, read.vector, {f"L{layer}/b_in": constant} | read.constants)
    return Explained(f"L{layer}/N{unit}@{position}", layer, unit, position, read, run.neuron(layer, unit, position))


def _logit(run: ResidualRun, token: int) -> Explained:
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
    return Explained(f"logit/{token}", run.n_layers, token, position, read, value, token_names(run.model, [token])[0])


def _token(model: TransformerLensModel, target: Target, prompt: str | None) -> int:
    d_vocab = int(model.cfg.d_vocab)
    if isinstance(target, int):
        if not 0 <= target < d_vocab:
            raise SettingsError(f"expected a token between 0 and {d_vocab - 1} as target; got {target}.")
        return target
    if prompt is None:
        raise SettingsError(
            f"expected a target such as {_FORM}; got {target!r}. A token as text is read in the context of a prompt "
            "given as text: give the token's number, or the prompt as text."
        )
    try:
        return int(tokenize(model, PromptPairs(clean=[prompt], answer=[target])).answer[0])
    except PairsError as error:
        raise SettingsError(f"expected a target such as {_FORM}; got {target!r}: {error}") from error


def token_texts(model: TransformerLensModel, tokens: Tensor) -> list[str]:
    """Every token of a prompt as text."""
    return token_names(model, tokens.tolist())
