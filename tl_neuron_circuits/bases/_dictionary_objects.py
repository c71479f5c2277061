"""Live objects as dictionaries, recognized by their structure: no library is imported for it.

1. A SAELens object (`cfg.architecture()` and the tensors of that architecture) is read like its file.
2. A layer of circuit-tracer's (`activation_function` beside `W_enc [d_dict, d_in]` and `b_enc`) whose activation is a
   ReLU, a JumpReLU or its TopK is read like its file. Its TopK keeps negative values, as kind "signed_topk_..." does.
3. Anything with `encode`, `decode`, `W_enc` and `W_dec` keeps its own `encode`. Its `decode` is replaced by
   `features @ W_dec + decode(0)`, because scores are read off the rows of `W_dec`. Random numbers check that the two
   agree, and that a call adds nothing but `W_skip`.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import DictionaryError
from .._typing import checked
from ._dictionary import Dictionary, build_dictionary, check_finite, kind_of
from ._dictionary_files import FORMAT_VERSION, TRAINED_AS_JUMPRELU, parse_config

_PROBES = 4
"""How many random inputs and feature vectors an object is checked on."""
_ACTIVE = 8
"""How many features are active in each."""
_NEEDED = ("encode", "decode", "W_enc", "W_dec")


@checked
def as_dictionary(source: Any, *, hook_in: str | None = None, hook_out: str | None = None) -> Dictionary:
    """A live SAE or transcoder as a `Dictionary`; its weights are shared, not copied, and carry no gradient.

    Args:
        source: a `Dictionary`, a SAELens object, or anything with `encode`, `decode`, `W_enc` and `W_dec`.
        hook_in: the hook point it reads, where its metadata does not name it or names the wrong one.
        hook_out: the hook point it writes; by default an SAE's `hook_in`.

    Raises:
        DictionaryError: the object lacks what a dictionary needs, does not decode by its `W_dec`, or names no hooks.

    Example:
        >>> import torch
        >>> import tl_neuron_circuits as tnc
        >>> class Mine:
        ...     W_enc, W_dec = torch.eye(128, 256), torch.eye(256, 128)
        ...     def encode(self, x): return (x @ self.W_enc).relu()
        ...     def decode(self, features): return features @ self.W_dec
        >>> hooks = {"hook_in": "blocks.3.ln2.hook_normalized", "hook_out": "blocks.3.hook_mlp_out"}
        >>> tnc.as_dictionary(Mine(), **hooks).d_dict
        256
    """
    if isinstance(source, Dictionary):
        dictionary = source
    elif (kind := _saelens_kind(source)) is not None and kind != "matching_pursuit":
        dictionary = _from_saelens(source, kind)
    elif (kind := _circuit_tracer_kind(source)) is not None:
        dictionary = _from_circuit_tracer(source, kind)
    else:
        dictionary = _from_protocol(source)
    return _with_hooks(dictionary, hook_in, hook_out)


def _with_hooks(dictionary: Dictionary, hook_in: str | None, hook_out: str | None) -> Dictionary:
    is_sae = not dictionary.is_transcoder and dictionary.own_encode is None
    new_in = hook_in or dictionary.hook_in
    new_out = hook_out or (hook_in if is_sae and hook_in else dictionary.hook_out)
    if new_in is None or new_out is None:
        raise DictionaryError(
            f"{dictionary.name} does not say where it belongs (hook_in {new_in!r}, hook_out {new_out!r}). Name the "
            'hooks: as_dictionary(object, hook_in="blocks.3.ln2.hook_normalized", hook_out="blocks.3.hook_mlp_out"); '
            "an SAE reads and writes the same one."
        )
    if (new_in, new_out) == (dictionary.hook_in, dictionary.hook_out):
        return dictionary
    # The author's Hugging Face names describe the hooks just overridden.
    stale = ("hf_hook_name", "hf_hook_name_out", "hook_name", "hook_name_out")
    metadata = {key: value for key, value in dictionary.metadata.items() if key not in stale}
    name = dictionary.name.replace("no hook", new_in)
    return replace(dictionary, hook_in=new_in, hook_out=new_out, metadata=metadata, name=name)


def _saelens_kind(source: Any) -> str | None:
    architecture = getattr(getattr(source, "cfg", None), "architecture", None)
    if callable(architecture):
        architecture = architecture()
    return architecture if isinstance(architecture, str) else None


def _metadata(source: Any) -> dict[str, Any]:
    return _as_dict(getattr(getattr(source, "cfg", None), "metadata", None))


def _as_dict(settings: Any) -> dict[str, Any]:
    """Settings that are a mapping, or an object with `to_dict` or with attributes."""
    if settings is None or isinstance(settings, Mapping):
        return dict(settings or {})
    return dict(settings.to_dict() if hasattr(settings, "to_dict") else vars(settings))


def _circuit_tracer_kind(source: Any) -> str | None:
    """The kind of a layer of circuit-tracer's; None for anything else, and for an activation that is not known."""
    activation = getattr(source, "activation_function", None)
    tensors: list[Any] = [getattr(source, name, None) for name in ("W_enc", "W_dec", "b_enc", "b_dec")]
    if activation is None or not all(isinstance(tensor, Tensor) for tensor in tensors) or tensors[0].dim() != 2:
        return None
    if isinstance(getattr(activation, "threshold", None), Tensor):
        start = "jumprelu_" if bool((activation.threshold >= 0).all()) else None
    elif isinstance(getattr(activation, "k", None), int):
        start = "signed_topk_"
    else:
        start = "" if activation is torch.relu or getattr(activation, "__name__", "") == "relu" else None
    skip = "skip_" if isinstance(getattr(source, "W_skip", None), Tensor) else ""
    return None if start is None else f"{start}{skip}transcoder"


def _from_circuit_tracer(source: Any, kind: str) -> Dictionary:
    values = {name: getattr(source, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    if "skip" in kind:
        values["W_skip"] = source.W_skip
    if kind.startswith("jumprelu"):
        values["threshold"] = source.activation_function.threshold.reshape(-1)
    values = {name: value.detach().to(values["W_dec"]) for name, value in values.items()}
    values["W_enc"] = values["W_enc"].mT
    k = source.activation_function.k if "topk" in kind else None
    name = f"{type(source).__name__} at no hook"
    dictionary = build_dictionary(kind, values, k=k, name=name)
    _check_agreement(source, dictionary, type(source).__name__)
    x = _random(_PROBES, dictionary.d_in, like=dictionary.W_dec)
    with torch.no_grad():
        if not _close(source.encode(x), dictionary.encode(x)):
            raise DictionaryError(
                f"The {type(source).__name__}'s encode is not the {kind} that its activation_function says. Wrap it in "
                "an object with encode, decode, W_enc and W_dec alone."
            )
    return dictionary


def _from_saelens(source: Any, kind: str) -> Dictionary:
    if kind in TRAINED_AS_JUMPRELU:
        raise DictionaryError(
            f"The {type(source).__name__} is in training: it keeps features by the batch they are in. Save it with "
            "save_model, or with save_inference_model, and load that: load_dictionary(path) reads it as jumprelu."
        )
    names = kind_of(kind).tensors
    missing = [name for name in names if not isinstance(getattr(source, name, None), Tensor)]
    if missing:
        raise DictionaryError(
            f"The {type(source).__name__} says it is a {kind} but lacks {', '.join(missing)}. "
            "Pass an object of that kind, or a Dictionary made from its tensors."
        )
    form = {"architecture": kind, "sae_lens_version": FORMAT_VERSION, "metadata": _metadata(source)}
    config = parse_config(_as_dict(source.cfg) | form)
    tensors = {name: getattr(source, name) for name in names}
    dtype = tensors["W_enc"].dtype
    for tensor in tensors.values():  # a training SAE keeps its threshold in float32
        dtype = torch.promote_types(dtype, tensor.dtype)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    name = str(config.metadata.get("neuronpedia_id") or "")
    return build_dictionary(kind, tensors, metadata=config.metadata, name=name, **config.settings)


def _from_protocol(source: Any) -> Dictionary:
    label = type(source).__name__
    missing = [name for name in _NEEDED if not hasattr(source, name)]
    if missing:
        raise DictionaryError(
            f"{label} is not a dictionary: it lacks {', '.join(missing)}. Expected a SAELens object, or one with "
            "encode, decode, W_enc and W_dec."
        )
    raw: dict[str, Any] = {name: getattr(source, name, None) for name in ("W_enc", "W_dec", "b_enc", "W_skip")}
    tensors: dict[str, Any] = {name: value.detach() for name, value in raw.items() if isinstance(value, Tensor)}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if any(len(shapes.get(name, ())) != 2 for name in ("W_enc", "W_dec")):
        raise DictionaryError(
            f"The {label} has tensors {shapes}; expected matrices W_enc and W_dec. A cross-layer "
            "transcoder is read from its files: transcoder.to_safetensors(folder), then load_dictionaries(folder)."
        )
    dtype = tensors["W_dec"].dtype
    tensors = {name: tensor.to(tensors["W_dec"].device, dtype) for name, tensor in tensors.items()}
    encode = _own_encode(source)
    tensors["W_enc"] = _oriented(tensors, encode, label)
    d_dict = len(tensors["W_dec"])
    if shapes.get("b_enc") != [d_dict]:
        tensors.pop("b_enc", None)
    metadata = _metadata(source)
    dictionary = Dictionary(
        "custom",
        **tensors,
        b_dec=_decode(source, tensors["W_dec"].new_zeros(1, d_dict), len(tensors["W_enc"]))[0],
        hook_in=metadata.get("hook_name"),
        hook_out=metadata.get("hook_name_out") or metadata.get("hook_name"),
        metadata=metadata,
        name=str(metadata.get("neuronpedia_id") or f"{label} at no hook"),
        own_encode=encode,
    )
    check_finite(dictionary)
    _check_agreement(source, dictionary, label)
    return dictionary


def _own_encode(source: Any) -> Callable[[Tensor], Tensor]:
    """The object's own encoder, called on its device and in its dtype; no graph where the input has none."""

    def encode(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        features = source.encode(x.to(source.W_enc.device, source.W_enc.dtype))
        features = (features.to_dense() if features.is_sparse else features).to(x)
        return features if x.requires_grad else features.detach()

    return encode


def _decode(source: Any, features: Float[Tensor, "probe d_dict"], d_in: int) -> Float[Tensor, "probe d_out"]:
    """The object's own decoder; circuit-tracer's also takes the input, for the skip: zeros leave it out."""
    with torch.no_grad():
        if "input_acts" in inspect.signature(source.decode).parameters:
            return source.decode(features, features.new_zeros(len(features), d_in)).detach()
        return source.decode(features).detach()


def _oriented(
    tensors: Mapping[str, Tensor], encode: Callable[[Tensor], Tensor], label: str
) -> Float[Tensor, "d_in d_dict"]:
    """`W_enc` as `[d_in, d_dict]`: by its shape, or where it is square by the orientation that predicts features."""
    weight, d_dict = tensors["W_enc"], len(tensors["W_dec"])
    if d_dict not in weight.shape:
        raise DictionaryError(
            f"The {label} has W_enc {list(weight.shape)} and W_dec {list(tensors['W_dec'].shape)}: expected W_enc "
            "[d_in, d_dict] (or [d_dict, d_in]) and W_dec [d_dict, d_out]."
        )
    if weight.shape[0] != weight.shape[1]:
        return weight if weight.shape[1] == d_dict else weight.mT
    if torch.equal(weight, weight.mT):
        return weight
    x = _random(64, d_dict, like=weight)
    # A feature's slope along x is x @ W_enc: compare the features at x and at 1.01 x.
    features, moved = encode(x), encode(1.01 * x)
    active = (features != 0) & (moved != 0)
    slope = ((moved - features) / 0.01)[active]
    errors = [float((slope - (x @ candidate)[active]).abs().sum()) for candidate in (weight, weight.mT)]
    if not active.any() or errors[0] == errors[1]:
        raise DictionaryError(
            f"The {label} has a square W_enc and no active feature by which to tell rows from columns. "
            "Make a Dictionary from its tensors, W_enc [d_in, d_dict] and W_dec [d_dict, d_out]."
        )
    return weight if errors[0] < errors[1] else weight.mT


def _check_agreement(source: Any, dictionary: Dictionary, label: str) -> None:
    features = _random(_PROBES, dictionary.d_dict, like=dictionary.W_dec).abs()
    rank = _random(_PROBES, dictionary.d_dict, like=dictionary.W_dec).argsort(dim=-1)
    features = torch.where(rank < _ACTIVE, features, 0)
    own = _decode(source, features, dictionary.d_in)
    if not _close(own, features @ dictionary.W_dec + dictionary.b_dec):
        raise DictionaryError(
            f"The {label}'s decode is not features @ W_dec + a constant, but scores of features are read off W_dec. "
            "Fold whatever else decode does (row norms, run-time scales) into W_dec, or save it with SAELens."
        )
    if callable(source):
        x = _random(_PROBES, dictionary.d_in, like=dictionary.W_dec)
        with torch.no_grad():
            whole = source(x)
            ours = dictionary(x)
        if isinstance(whole, Tensor) and not _close(whole, ours):
            raise DictionaryError(
                f"Calling the {label} does not give encode(x) @ W_dec + a constant + x @ W_skip.T: it writes something "
                "that belongs to no feature. Pass an object that has that part as its W_skip."
            )


def _close(left: Tensor, right: Tensor) -> bool:
    tolerance = 1e-3 if torch.finfo(left.dtype).eps < 1e-5 else 5e-2
    left, right = left.float(), right.float()
    return left.shape == right.shape and bool((left - right).norm() <= tolerance * (right.norm() + 1e-6))


def _random(rows: int, columns: int, *, like: Tensor) -> Float[Tensor, "rows columns"]:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(like)
