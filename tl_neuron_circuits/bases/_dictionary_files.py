"""Dictionaries on disk in SAELens' format, a folder with `cfg.json` and `sae_weights.safetensors`; without sae-lens."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .._errors import DictionaryError, FileFormatError
from .._typing import checked
from ._dictionary import Dictionary
from ._dictionary_build import build_dictionary
from ._dictionary_config import FORMAT_VERSION, DictionaryConfig, parse_config
from ._dictionary_kinds import kind_of

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
OWN_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, "sparsity.safetensors"})
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@checked
def load_dictionary(path: str | Path) -> Dictionary:
    """The SAE or transcoder of a SAELens folder.

    Reads standard, gated, topk, abstopk and jumprelu SAEs (batch-topk and matryoshka SAEs are saved as jumprelu) and
    the four transcoders, of SAELens 6 and of the older layout, in the dtype that `cfg.json` names. It may come without
    hooks; `as_dictionary(load_dictionary(path), hook_in=..., hook_out=...)` names them.

    Raises:
        FileFormatError: the folder or a file is missing, truncated, or no JSON or safetensors.
        DictionaryError: the architecture is not known, or tensors are missing, of the wrong shape, or not finite.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> folder = tnc.bases.demo_dictionaries_path("sae") / "layer-03"
        >>> tnc.load_dictionary(folder)
        Dictionary(jumprelu, 768 features, 128 -> 128, blocks.3.hook_mlp_out, torch.float32)
    """
    folder = Path(path)
    config = _read_config(folder)
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    try:
        parsed = parse_config(config)
        tensors = _prepared(tensors, parsed)
        name = str(parsed.metadata.get("neuronpedia_id") or folder.name)
        return build_dictionary(parsed.kind, tensors, metadata=parsed.metadata, name=name, **parsed.settings)
    except DictionaryError as error:
        raise DictionaryError(f"{folder}: {error}") from error


def _read_config(folder: Path) -> Mapping[str, Any]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise FileFormatError(
            f"{file} is missing (found: {found or 'an empty folder'}). Expected a SAELens folder with {CONFIG_FILE} "
            f"and {WEIGHTS_FILE}, as SAE.save_model writes it."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{file} is not JSON: {error}. Download or save the dictionary again.") from error
    if not isinstance(config, dict):
        raise FileFormatError(f"{file} holds a {type(config).__name__}, expected the settings of a dictionary.")
    return config


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        hint = " sae.safetensors is EleutherAI's sparsify layout." if file.with_name("sae.safetensors").exists() else ""
        raise FileFormatError(
            f"{file} is missing.{hint} Load the dictionary with sae-lens and save it with save_model."
        )
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(
            f"{file} is truncated or no safetensors file: {error}. Fetch or save it again."
        ) from error


def _prepared(tensors: dict[str, Tensor], config: DictionaryConfig) -> dict[str, Tensor]:
    """The tensors in the config's dtype and today's names, their widths checked against the config."""
    scaling = tensors.pop("scaling_factor", None)
    if scaling is not None and not torch.allclose(scaling, torch.ones_like(scaling)):
        raise DictionaryError("scaling_factor is not all ones: fold it into W_dec's rows, SAELens 6 does not apply it.")
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    widths = {"W_enc": (config.d_in, config.d_dict), "W_dec": (config.d_dict, config.d_out), "b_dec": (config.d_out,)}
    for name, shape in widths.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise DictionaryError(f"{name} has shape {list(tensors[name].shape)}, but cfg.json says {list(shape)}.")
    if config.dtype is None:
        return tensors
    dtype = DTYPES.get(str(config.dtype).removeprefix("torch."))
    if dtype is None:
        raise DictionaryError(f"cfg.json has dtype {config.dtype!r}, expected one of {', '.join(DTYPES)}.")
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@checked
def save_dictionary(dictionary: Dictionary, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a dictionary as a SAELens folder and return its path; it appears whole or not at all.

    sae-lens 6 loads it with `SAE.load_from_disk(path)`. The kinds "topk_transcoder" and "topk_skip_transcoder", which
    sae-lens does not have, are read by `load_dictionary` only.

    Raises:
        FileFormatError: the path exists and `overwrite` is not given, or it holds other things than a dictionary.
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
    _check_target(target, overwrite)
    text = _config_text(dictionary)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fresh = temporary / "new"
        fresh.mkdir()
        weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in dictionary.tensors().items()}
        save_file(weights, fresh / WEIGHTS_FILE)
        (fresh / CONFIG_FILE).write_text(text, encoding="utf-8")
        _swap(fresh, target, temporary / "old")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _swap(fresh: Path, target: Path, old: Path) -> None:
    """Put `fresh` where `target` is, and `target` back if that fails."""
    if target.exists():
        target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise


def _check_savable(dictionary: Dictionary) -> None:
    kind, name = kind_of(dictionary.kind), dictionary.name
    if dictionary.own_encode is not None:
        raise DictionaryError(f"{name} has an encoder of its own, which no file holds; save it where it came from.")
    if not kind.is_transcoder and dictionary.d_in != dictionary.d_out:
        raise DictionaryError(
            f"{name} is a {dictionary.kind} from width {dictionary.d_in} to {dictionary.d_out}, but SAELens' "
            f"{dictionary.kind} has one width. Make it a transcoder kind, for example 'jumprelu_transcoder'."
        )
    if dictionary.has_skip and not kind.has_skip:
        raise DictionaryError(f"{name} has a W_skip, which a {dictionary.kind} cannot keep: make it a skip transcoder.")


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir() or {entry.name for entry in target.iterdir()} - OWN_FILES:
        raise FileFormatError(f"{target} exists and is not a dictionary's folder: choose another path.")
    if any(target.iterdir()) and not overwrite:
        raise FileFormatError(f"{target} holds a dictionary already: choose another path or pass overwrite=True.")


def _config_text(dictionary: Dictionary) -> str:
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
        return json.dumps(config, indent=2)
    except (TypeError, ValueError) as error:
        raise DictionaryError(f"{dictionary.name}: its metadata cannot be written as JSON: {error}.") from error
