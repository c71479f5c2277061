"""What a dictionary must satisfy: settings that are known, tensors that fit together, numbers that are finite."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from .._errors import DictionaryError
from ._dictionary_kinds import ENCODER_TENSORS, NORMALIZATIONS, kind_of

if TYPE_CHECKING:
    from ._dictionary import Dictionary


def check_settings(dictionary: "Dictionary") -> None:
    """Refuse settings that are unknown or contradict the kind."""
    kind, name = kind_of(dictionary.kind), dictionary.name
    if kind.needs_k and not (dictionary.k and 0 < dictionary.k <= dictionary.d_dict):
        raise DictionaryError(
            f"{name}: a {dictionary.kind} needs 0 < k <= {dictionary.d_dict}, got k = {dictionary.k}."
        )
    for setting, known in (
        ("normalize_activations", NORMALIZATIONS),
        ("reshape_activations", ("none", "hook_z")),
    ):
        if (value := getattr(dictionary, setting)) not in known:
            raise DictionaryError(f"{name}: {setting} is {value!r}, expected one of {', '.join(known)}.")
    if kind.is_transcoder and dictionary.apply_b_dec_to_input:
        raise DictionaryError(
            f"{name}: apply_b_dec_to_input has no meaning for a {dictionary.kind}: b_dec belongs to the output. "
            "Fold it into b_enc (b_enc - b_dec @ W_enc) and pass apply_b_dec_to_input=False."
        )
    if (kind.activation == "custom") != (dictionary.own_encode is not None):
        raise DictionaryError(f"{name}: kind 'custom' and own_encode go together; use as_dictionary(object).")
    tied = dictionary.apply_b_dec_to_input or dictionary.scale_depends_on_input
    if tied and dictionary.d_in != dictionary.d_out:
        raise DictionaryError(
            f"{name}: input width {dictionary.d_in} and output width {dictionary.d_out} differ, so b_dec cannot be "
            "taken from the input nor the input's scale given back to the output."
        )


def check_tensors(kind_name: str, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are missing, of the wrong shape, or on different dtypes or devices."""
    first = tensors["W_enc"]
    for tensor_name, shape in _expected_shapes(kind_name, name, tensors).items():
        tensor = tensors.get(tensor_name)
        if tensor is None:
            raise DictionaryError(f"{name}: a {kind_name} needs the tensor {tensor_name} {list(shape)}.")
        if tuple(tensor.shape) != shape:
            raise DictionaryError(
                f"{name}: {tensor_name} should have shape {list(shape)}, has {list(tensor.shape)}; expected "
                f"W_enc [d_in, d_dict] and W_dec [d_dict, d_out], got W_enc {list(first.shape)} and "
                f"W_dec {list(tensors['W_dec'].shape)}."
            )
        if not tensor.is_floating_point() or (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise DictionaryError(
                f"{name}: {tensor_name} is {tensor.dtype} on {tensor.device}, W_enc {first.dtype} on {first.device}: "
                "the tensors of a dictionary share one floating dtype and device."
            )


def check_finite(dictionary: "Dictionary") -> None:
    """Refuse NaN and infinite numbers; a threshold may be infinite (a feature that never fires)."""
    for name, tensor in dictionary.tensors().items():
        bad = tensor.isnan() if name == "threshold" else ~tensor.isfinite()
        if bad.any():
            raise DictionaryError(
                f"{dictionary.name}: {int(bad.sum())} of {tensor.numel()} numbers of {name} are NaN or infinite: "
                "the dictionary is damaged or its training diverged."
            )


def _expected_shapes(kind_name: str, name: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    kind = kind_of(kind_name)
    for matrix in ("W_enc", "W_dec"):
        if tensors[matrix].ndim != 2:
            raise DictionaryError(f"{name}: {matrix} should have two axes, has shape {list(tensors[matrix].shape)}.")
    d_in, (d_dict, d_out) = tensors["W_enc"].shape[0], tensors["W_dec"].shape
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_dict), "W_dec": (d_dict, d_out), "b_dec": (d_out,)}
    shapes |= {vector: (d_dict,) for vector in ENCODER_TENSORS.get(kind.activation, ())}
    if "W_skip" in tensors or kind.has_skip:
        shapes["W_skip"] = (d_out, d_in)
    return shapes
