"""SAELens' `cfg.json`: what it says in each version, and how this package writes it.

Since 6.0 the settings of an architecture are at the top and everything about model and hooks under `metadata`. Before
(no `sae_lens_version`, or a lower one) all of it is at the top, under older names, with defaults, and top-k is an
activation function. Read with SAELens 6.54's defaults, except where those would change the numbers silently: an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .._errors import DictionaryError
from ._dictionary_kinds import kind_of

FORMAT_VERSION = "6.54.12"
"""The sae-lens release whose layout `save_dictionary` follows; readers choose their parser by it."""

METADATA_KEYS = (
    "model_name",
    "hook_name",
    "hook_name_out",
    "hook_head_index",
    "hook_head_index_out",
    "hf_hook_name",
    "hf_hook_name_out",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "prepend_bos",
    "exclude_special_tokens",
    "neuronpedia_id",
    "context_size",
    "seqpos_slice",
    "dataset_path",
)
"""What an old config has at the top and a new one under `metadata`."""

OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}


@dataclass(frozen=True)
class DictionaryConfig:
    """What a `cfg.json` says that the numbers depend on, and its metadata."""

    kind: str
    d_in: int
    d_dict: int
    d_out: int
    dtype: str | None
    settings: Mapping[str, Any]
    """Keyword arguments of `build_dictionary`."""
    metadata: Mapping[str, Any]


def parse_config(config: Mapping[str, Any]) -> DictionaryConfig:
    """Read a `cfg.json` of any SAELens version, or the settings of a live object in the same form.

    Raises:
        DictionaryError: an unknown architecture, or a setting that is missing or would change the numbers silently.
    """
    if _is_old(config):
        config = _modernized(config)
    kind_name = str(config.get("architecture", "standard"))
    kind = kind_of(kind_name)
    for name in ("d_in", "d_sae", *(("d_out",) if kind.is_transcoder else ()), *(("k",) if kind.needs_k else ())):
        if not isinstance(config.get(name), int):
            raise DictionaryError(
                f"cfg.json of a {kind_name} needs the whole number {name!r}, has {config.get(name)!r}."
            )
    metadata = dict(config.get("metadata") or {})
    return DictionaryConfig(
        kind=kind_name,
        d_in=config["d_in"],
        d_dict=config["d_sae"],
        d_out=config["d_out"] if kind.is_transcoder else config["d_in"],
        dtype=config.get("dtype"),
        settings={
            "k": config["k"] if kind.needs_k else None,
            "rescale_acts_by_decoder_norm": bool(config.get("rescale_acts_by_decoder_norm")) and kind.needs_k,
            "apply_b_dec_to_input": bool(config.get("apply_b_dec_to_input", not kind.is_transcoder)),
            "normalize_activations": config.get("normalize_activations") or "none",
            "reshape_activations": config.get("reshape_activations") or "none",
            "hook_in": metadata.get("hook_name"),
            "hook_out": metadata.get("hook_name_out") or (None if kind.is_transcoder else metadata.get("hook_name")),
        },
        metadata=metadata,
    )


def _is_old(config: Mapping[str, Any]) -> bool:
    version = config.get("sae_lens_version") or (config.get("metadata") or {}).get("sae_lens_version")
    if not version:
        return True
    major = str(version).split(".")[0]
    if not major.isdigit():
        raise DictionaryError(f"cfg.json has sae_lens_version {version!r}, which is no version number.")
    return int(major) < 6


def _modernized(config: Mapping[str, Any]) -> dict[str, Any]:
    """An old config in the new form."""
    new = {OLD_NAMES.get(key, key): value for key, value in config.items()}
    activation = new.get("activation_fn") or "relu"
    if activation == "topk":
        new |= {"architecture": "topk", "k": (new.get("activation_fn_kwargs") or {}).get("k", new.get("k"))}
    elif activation != "relu":
        raise DictionaryError(
            f"cfg.json has activation_fn {activation!r}; expected 'relu' or 'topk'. SAELens 6 would load it as relu, "
            "with other features than it was trained with."
        )
    if isinstance(new.get("normalize_activations"), bool):
        new["normalize_activations"] = "expected_average_only_in" if new["normalize_activations"] else "none"
    new.setdefault("reshape_activations", "hook_z" if "hook_z" in (new.get("hook_name") or "") else "none")
    new.setdefault("prepend_bos", True)
    top = {key: new[key] for key in METADATA_KEYS if key in new}
    return new | {"metadata": top | dict(new.get("metadata") or {})}
