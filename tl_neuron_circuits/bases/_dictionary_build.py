"""Dictionaries from named tensors: the one way from a file or a live object to a `Dictionary`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._errors import DictionaryError
from ._dictionary import Dictionary
from ._dictionary_checks import check_finite, check_tensors
from ._dictionary_kinds import kind_of


def build_dictionary(
    kind: str, tensors: Mapping[str, Tensor], *, rescale_acts_by_decoder_norm: bool = False, **settings: Any
) -> Dictionary:
    """A checked dictionary from named tensors, the decoder's row norms folded where the kind rescales by them.

    Folding happens in at least float32, in which the dictionary then stays: encoding is unchanged, `W_dec` effective.

    Raises:
        DictionaryError: a tensor is missing, unknown to the kind, of the wrong shape, or not finite.
    """
    names = kind_of(kind).tensors
    missing = [name for name in names if name not in tensors]
    unknown = [name for name in tensors if name not in names]
    if missing or unknown:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has {', '.join(unknown)}, which a {kind} does not use"] if unknown else []
        raise DictionaryError(f"A {kind} needs the tensors {', '.join(names)}; this one {' and '.join(parts)}.")
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    check_tensors(kind, settings.get("name") or kind, detached)
    if rescale_acts_by_decoder_norm:
        detached = _folded(detached)
    dictionary = Dictionary(kind, **detached, **settings)
    check_finite(dictionary)
    return dictionary


def _folded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    dtype = torch.promote_types(tensors["W_dec"].dtype, torch.float32)
    wide = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    norms = wide["W_dec"].norm(dim=-1)
    rows = wide["W_dec"] / norms.clamp(min=torch.finfo(dtype).tiny)[:, None]
    return wide | {"W_enc": wide["W_enc"] * norms, "b_enc": wide["b_enc"] * norms, "W_dec": rows}
