"""Dictionaries on disk: SAELens folders of `cfg.json` and `sae_weights.safetensors`, read and written without sae-lens.

`cfg.json` comes in two layouts. Since SAELens 6.0 the settings of an architecture are at the top and everything about
model and hooks is under `metadata`. Before (no `sae_lens_version`, or a lower one) all of it is at the top, under older
names, with defaults, and top-k is an activation function. Both are read with SAELens 6.54's defaults, except where
those would change the numbers silently: that is an error. Training checkpoints of batch-topk and matryoshka SAEs are
read as SAELens' `save_inference_model` writes them: as jumprelu at the threshold that training kept.

Two files cannot be replaced at once. So the weights' header holds the settings too, with a checksum of both, which is
the id of the folder: `cfg.json` carries it as well. Where the ids differ, a save was stopped between the two files (or
is at work), and the header has the settings that belong to the weights.

Other programs' files are read in `_dictionary_formats.py`.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._errors import DictionaryError, FileFormatError
from .._files import parse_json, present, read_tensors, read_text, short, write_tensors, write_text
from .._typing import checked
from ._dictionary import Dictionary, build_dictionary, kind_of
from ._dictionary_formats import read_other_format

FORMAT_VERSION = "6.54.12"
"""The sae-lens release whose layout `save_dictionary` follows; readers choose their parser by it."""

ID = "tl_neuron_circuits_id"
"""Under `metadata` in `cfg.json`: the checksum of the weights that it belongs to."""
CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
TRAINED_AS_JUMPRELU = ("batchtopk", "matryoshka_batchtopk")
"""Architectures of training checkpoints that are jumprelu when they are used."""
_OWN_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, "sparsity.safetensors"})
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_METADATA_KEYS = (
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
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}


@checked
def load_dictionary(path: str | Path) -> Dictionary:
    """The SAE or transcoder of a folder or file of SAELens, Gemma Scope, EleutherAI's sparsify, or circuit-tracer.

    Of SAELens 6 and of the older layout, standard, gated, topk, abstopk and jumprelu SAEs are read, batch-topk and
    matryoshka SAEs as jumprelu, and the four transcoders, in the dtype that `cfg.json` names; of the others .npz and
    .safetensors files and sparsify's folders. It may come without hooks;
    `as_dictionary(load_dictionary(path), hook_in=..., hook_out=...)` names them.

    Raises:
        FileFormatError: the folder or a file is missing, truncated, or not JSON or safetensors.
        DictionaryError: the architecture is not known, or tensors are missing, of the wrong shape, or not finite.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> folder = tnc.save_dictionary(tnc.load_demo_dictionaries("sae")[3], "saes/layer-03")
        >>> tnc.load_dictionary(folder)
        Dictionary(jumprelu, 768 features, 128 -> 128, blocks.3.hook_mlp_out, torch.float32)
    """
    folder = Path(path)
    others = None if (folder / WEIGHTS_FILE).is_file() else read_other_format(folder)
    if others is not None:
        if len(others) > 1:
            raise FileFormatError(
                f"{folder} holds {len(others)} dictionaries; expected one. load_dictionaries reads them."
            )
        return others[0]
    config, tensors = _read_folder(folder)
    try:
        parsed = parse_config(config)
        tensors = _converted(tensors, parsed)
        name = str(parsed.metadata.get("neuronpedia_id") or folder.name)
        return build_dictionary(parsed.kind, tensors, metadata=parsed.metadata, name=name, **parsed.settings)
    except DictionaryError as error:
        raise DictionaryError(f"{folder}: {error}") from error


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
    trained = config.get("architecture") in TRAINED_AS_JUMPRELU
    if trained:
        config = {**config, "architecture": "jumprelu"}
    kind_name = str(config.get("architecture", "standard"))
    kind = kind_of(kind_name)
    for name in ("d_in", "d_sae", *(("d_out",) if kind.is_transcoder else ()), *(("k",) if kind.needs_k else ())):
        found = config.get(name)
        if not isinstance(found, int) or isinstance(found, bool) or not 0 < found < 2**40:
            raise DictionaryError(f"cfg.json of a {kind_name} needs the integer {name!r}, has {short(repr(found))}.")
    metadata = {key: value for key, value in _object(config, "metadata").items() if key != ID}
    for name in ("hook_name", "hook_name_out", "neuronpedia_id"):
        if not isinstance(metadata.get(name), str | None):
            raise DictionaryError(f"cfg.json needs a text as {name}, has {short(repr(metadata[name]))}.")
    for name in ("rescale_acts_by_decoder_norm", "apply_b_dec_to_input"):
        if not isinstance(config.get(name), bool | None):
            raise DictionaryError(f"cfg.json needs true or false as {name}, has {short(repr(config[name]))}.")
    for name in ("normalize_activations", "reshape_activations"):
        if not isinstance(config.get(name), str | None):
            raise DictionaryError(f"cfg.json needs a text as {name}, has {short(repr(config[name]))}.")
    return DictionaryConfig(
        kind=kind_name,
        d_in=config["d_in"],
        d_dict=config["d_sae"],
        d_out=config["d_out"] if kind.is_transcoder else config["d_in"],
        dtype=None if config.get("dtype") is None else str(config["dtype"]),
        settings={
            "k": config["k"] if kind.needs_k else None,
            "rescale_acts_by_decoder_norm": bool(config.get("rescale_acts_by_decoder_norm"))
            and (kind.needs_k or trained),
            "apply_b_dec_to_input": bool(config.get("apply_b_dec_to_input", not kind.is_transcoder)),
            "normalize_activations": config.get("normalize_activations") or "none",
            "reshape_activations": config.get("reshape_activations") or "none",
            "hook_in": metadata.get("hook_name"),
            "hook_out": metadata.get("hook_name_out") or (None if kind.is_transcoder else metadata.get("hook_name")),
        },
        metadata=metadata,
    )


def _object(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What is under a name that may be missing or null."""
    found = config.get(name)
    if not isinstance(found, Mapping | None):
        raise DictionaryError(f"cfg.json needs an object as {name}, has {short(repr(found))}.")
    return found or {}


def _is_old(config: Mapping[str, Any]) -> bool:
    version = config.get("sae_lens_version") or _object(config, "metadata").get("sae_lens_version")
    if not version:
        return True
    major = str(version).split(".")[0]
    if not (major.isascii() and major.isdigit() and len(major) < 10):
        raise DictionaryError(f"cfg.json has sae_lens_version {version!r}, which is not a version number.")
    return int(major) < 6


def _modernized(config: Mapping[str, Any]) -> dict[str, Any]:
    """An old config in the new layout."""
    new = {_OLD_NAMES.get(key, key): value for key, value in config.items()}
    activation = new.get("activation_fn") or "relu"
    if activation == "topk":
        new |= {"architecture": "topk", "k": _object(new, "activation_fn_kwargs").get("k", new.get("k"))}
    elif activation != "relu":
        raise DictionaryError(
            f"cfg.json has activation_fn {activation!r}; expected 'relu' or 'topk'. SAELens 6 would load it as relu, "
            "with other features than it was trained with."
        )
    if isinstance(new.get("normalize_activations"), bool):
        new["normalize_activations"] = "expected_average_only_in" if new["normalize_activations"] else "none"
    new.setdefault("reshape_activations", "hook_z" if "hook_z" in str(new.get("hook_name") or "") else "none")
    new.setdefault("prepend_bos", True)
    top = {key: new[key] for key in _METADATA_KEYS if key in new}
    return new | {"metadata": top | dict(_object(new, "metadata"))}


def _read_config(folder: Path) -> Mapping[str, Any]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        inside = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) if folder.is_dir() else ""
        what = f"found {inside or 'an empty folder'}" if folder.is_dir() else "no such folder"
        raise FileFormatError(
            f"{file} is missing ({what}). Expected a SAELens folder with {CONFIG_FILE} and {WEIGHTS_FILE}, as "
            "SAE.save_model writes it."
        )
    try:
        config = parse_json(read_text(file))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{file} is not JSON: {short(error)}. Download or save the dictionary again.") from error
    if not isinstance(config, dict):
        raise FileFormatError(f"{file} holds a {type(config).__name__}, expected the settings of a dictionary.")
    return config


def _read_folder(folder: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """The settings and the weights, which belong together."""
    file = folder / WEIGHTS_FILE
    if not file.is_file() and (folder / CONFIG_FILE).is_file():
        hint = " sae.safetensors is EleutherAI's sparsify layout." if file.with_name("sae.safetensors").exists() else ""
        raise FileFormatError(
            f"{file} is missing.{hint} Load the dictionary with sae-lens and save it with save_model."
        )
    tensors, content, checksum = read_tensors(file) if file.is_file() else ({}, None, "")
    if content is None:  # written by others
        return _read_config(folder), tensors
    try:
        own = parse_json(content)
    except ValueError as error:
        raise FileFormatError(f"the settings in {file} are not JSON: {short(error)}. Save it again.") from error
    config = _read_config(folder) if (folder / CONFIG_FILE).exists() else {"metadata": {ID: None}}
    metadata = dict(_object(config, "metadata"))
    if ID not in metadata:
        return config, tensors  # edited on purpose
    if metadata.pop(ID) == checksum and {**config, "metadata": metadata} != own:
        raise FileFormatError(
            f"{folder / CONFIG_FILE} was changed or damaged since the dictionary was saved. Save it again; or, to "
            f"load it as it stands, remove {ID} from its metadata."
        )
    return own, tensors


def _converted(tensors: dict[str, Tensor], config: DictionaryConfig) -> dict[str, Tensor]:
    """The tensors in the config's dtype and under today's names, their widths checked against the config."""
    scaling = tensors.pop("scaling_factor", None)
    if scaling is not None and not torch.allclose(scaling, torch.ones_like(scaling)):
        raise DictionaryError(
            "scaling_factor is not all ones, and SAELens 6 does not apply it: fold it into W_dec's rows."
        )
    if "topk_threshold" in tensors:
        tensors["threshold"] = tensors["b_enc"].new_full(tensors["b_enc"].shape, float(tensors.pop("topk_threshold")))
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    widths = {"W_enc": (config.d_in, config.d_dict), "W_dec": (config.d_dict, config.d_out), "b_dec": (config.d_out,)}
    for name, shape in widths.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise DictionaryError(f"{name} has shape {list(tensors[name].shape)}, but cfg.json says {list(shape)}.")
    if config.dtype is None:
        return tensors
    dtype = _DTYPES.get(str(config.dtype).removeprefix("torch."))
    if dtype is None:
        raise DictionaryError(f"cfg.json has dtype {config.dtype!r}, expected one of {', '.join(_DTYPES)}.")
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@checked
def save_dictionary(dictionary: Dictionary, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a dictionary as a SAELens folder and return its path; `load_dictionary` finds it whole or not at all.

    sae-lens 6 loads it with `SAE.load_from_disk(path)`. Kinds that sae-lens does not have (transcoders with topk,
    layers of cross-layer transcoders) are read by `load_dictionary` only.

    Raises:
        FileFormatError: the path exists and `overwrite` is not given, or it holds something other than a dictionary.
        SaveError: it could not be written; a dictionary that was there is as it was.
        DictionaryError: it has an encoder of its own (kind "custom"), metadata that JSON cannot hold, or a form that no
            SAELens architecture has.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> sae = tnc.load_demo_dictionaries("sae")[3]
        >>> tnc.save_dictionary(sae, "saes/mine").name
        'mine'
        >>> tnc.load_dictionary("saes/mine").d_dict == sae.d_dict
        True
    """
    target = Path(path)
    _check_savable(dictionary)
    if target.exists():
        if not target.is_dir() or present(target) - _OWN_FILES:
            raise FileFormatError(f"{target} exists and is not a dictionary's folder: choose another path.")
        if present(target) and not overwrite:
            raise FileFormatError(f"{target} holds a dictionary already: choose another path or pass overwrite=True.")
    config = _config(dictionary)
    _stamp(target / CONFIG_FILE)
    checksum = write_tensors(target / WEIGHTS_FILE, dictionary.tensors(), json.dumps(config))
    config["metadata"] = config["metadata"] | {ID: checksum}
    write_text(target / CONFIG_FILE, json.dumps(config, indent=2))
    with suppress(OSError):
        (target / "sparsity.safetensors").unlink()  # of the dictionary that was replaced
    return target


def _stamp(file: Path) -> None:
    """Give the settings of other programs' weights an id, so that they are never taken for those of what comes now."""
    try:
        config = parse_json(read_text(file))
    except (OSError, ValueError):
        return  # absent, or damaged: no settings of anything
    if isinstance(config, dict) and isinstance(config.get("metadata"), dict | None):
        metadata = config.get("metadata") or {}
        if ID not in metadata:
            write_text(file, json.dumps(config | {"metadata": metadata | {ID: None}}, indent=2))


def _check_savable(dictionary: Dictionary) -> None:
    kind, name = kind_of(dictionary.kind), dictionary.name
    if dictionary.own_encode is not None:
        raise DictionaryError(f"{name} has an encoder of its own, which no file can hold; save it where it came from.")
    if not kind.is_transcoder and dictionary.d_in != dictionary.d_out:
        raise DictionaryError(
            f"{name} is a {dictionary.kind} from width {dictionary.d_in} to {dictionary.d_out}, but SAELens' "
            f"{dictionary.kind} has one width. Make it a transcoder kind, for example 'jumprelu_transcoder'."
        )
    if dictionary.has_skip and not kind.has_skip:
        raise DictionaryError(f"{name} has a W_skip, which a {dictionary.kind} cannot keep: make it a skip transcoder.")


def _config(dictionary: Dictionary) -> dict[str, Any]:
    kind = kind_of(dictionary.kind)
    hooks = {"hook_name": dictionary.hook_in}
    hooks |= {"hook_name_out": dictionary.hook_out} if dictionary.is_transcoder else {}
    metadata = {key: value for key, value in dictionary.metadata.items() if key not in ("hook_name", "hook_name_out")}
    metadata |= {key: value for key, value in hooks.items() if value is not None}
    metadata = {"sae_lens_training_version": None} | metadata | {"sae_lens_version": FORMAT_VERSION}
    config = {
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_dict,
        "dtype": str(dictionary.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.apply_b_dec_to_input,
        "normalize_activations": dictionary.normalize_activations,
        "reshape_activations": dictionary.reshape_activations,
        "metadata": metadata,
        "architecture": dictionary.kind,
    }
    config |= {"d_out": dictionary.d_out} if kind.is_transcoder else {}
    config |= {"k": dictionary.k, "rescale_acts_by_decoder_norm": False} if kind.needs_k else {}
    try:
        return json.loads(json.dumps(config, allow_nan=False))  # as a reader will have it
    except (TypeError, ValueError, RecursionError) as error:
        raise DictionaryError(f"{dictionary.name}: its metadata cannot be written as JSON: {error}.") from error
