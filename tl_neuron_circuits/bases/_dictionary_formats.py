"""Dictionaries in other programs' files: circuit-tracer, Gemma Scope, EleutherAI's sparsify.

    circuit-tracer   config.yaml (hooks, kind), and layer_{i}.safetensors with W_enc [d_dict, d_in], W_dec, b_enc,
                     b_dec, and W_skip or activation_function.threshold where there are; without a threshold relu
      cross-layer    W_enc_{i}.safetensors (W_enc_{i} [d_dict, d_in], b_enc_{i}, b_dec_{i}, threshold_{i}) and
                     W_dec_{i}.safetensors (W_dec_{i} [d_dict, n_layers - i, d_out], into layers i, i + 1, ...)
    Gemma Scope      params.npz: W_enc [d_in, d_dict], W_dec, b_enc, b_dec, threshold
    Gemma Scope 2    params.safetensors: the same in small letters, and affine_skip_connection [d_in, d_out]
    sparsify         cfg.json and sae.safetensors: encoder.weight [d_dict, d_in], encoder.bias, W_dec, b_dec, W_skip

sparsify keeps relu of the k largest and subtracts b_dec from an SAE's input. Only config.yaml names hooks; elsewhere
they are read off the path: Gemma Scope's `layer_12` in a folder whose name ends in -res, -mlp, -att or -transcoders,
sparsify's `layers.12.mlp`. A path that says neither gives a dictionary without hooks, for `as_dictionary` to name.
Source: circuit-tracer 0.5.0; eai-sparsify 1.3.3; Lieberum et al. 2024, arXiv 2408.05147; ECOSYSTEM.
"""

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .._errors import DictionaryError, FileFormatError, SettingsError
from .._files import short
from ._dictionary import Dictionary, build_dictionary

_TRACER_CONFIG, _SPARSIFY_WEIGHTS = "config.yaml", "sae.safetensors"
_NPZ = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_GEMMA_SITES = {
    "res": ("hook_resid_post", "hook_resid_post"),
    "mlp": ("hook_mlp_out", "hook_mlp_out"),
    "att": ("attn.hook_z", "attn.hook_z"),
    "transcoders": ("ln2.hook_normalized", "hook_mlp_out"),
}
"""What the end of a Gemma Scope repository's name says about the hooks that its dictionaries read and write."""


def read_other_format(path: Path, *, lazy: bool = False) -> list[Dictionary] | None:
    """The dictionaries of a file or folder of another program; None where it is none of theirs.

    `lazy` leaves circuit-tracer's weights in their files, as `load_dictionaries` says.

    Raises:
        FileFormatError: a file is missing, truncated, or not of its format.
        DictionaryError: tensors are missing, do not fit together, or mean what this package cannot compute.
        SettingsError: `lazy` for a file that must be read whole.
    """
    if path.is_file() and path.suffix == ".safetensors":
        return [_read_transcoder(path, lazy=lazy)]
    if (path / "W_enc_0.safetensors").is_file():
        return _read_cross_layer(path, _read_yaml(path), lazy=lazy)
    if (path / _TRACER_CONFIG).is_file():
        return _read_transcoder_set(path, _read_yaml(path), lazy=lazy)
    if (path / "params.safetensors").is_file():
        return read_other_format(path / "params.safetensors", lazy=lazy)
    if lazy:
        raise SettingsError(
            f"lazy=True leaves weights in the .safetensors files of circuit-tracer and Gemma Scope 2; {path} is of "
            "another format, which is read whole. Leave lazy out."
        )
    if path.is_file():
        return [_read_npz(path)] if path.suffix == ".npz" else None
    if (path / "layer_0.safetensors").is_file():
        raise FileFormatError(
            f"{path} holds circuit-tracer's layer_0.safetensors but no {_TRACER_CONFIG}, which names the hooks. "
            "Download it too, or write one: feature_input_hook: hook_resid_mid, feature_output_hook: hook_mlp_out."
        )
    if (path / _SPARSIFY_WEIGHTS).is_file():
        return [_read_sparsify(path)]
    return [_read_npz(path / "params.npz")] if (path / "params.npz").is_file() else None


def _read_transcoder_set(folder: Path, config: Mapping[str, Any], *, lazy: bool) -> list[Dictionary]:
    """circuit-tracer's per-layer transcoders."""
    kind = config.get("model_kind", "transcoder_set")
    if kind != "transcoder_set":
        raise FileFormatError(
            f"expected model_kind transcoder_set in {folder / _TRACER_CONFIG}, or files W_enc_0.safetensors, ... of a "
            f"cross-layer transcoder beside it; got {kind!r} and none of them."
        )
    named = config.get("transcoders")
    files = [folder / f"layer_{layer}.safetensors" for layer in range(len(list(folder.glob("layer_*.safetensors"))))]
    if named is not None:
        files = [_hub_file(str(name)) if str(name).startswith("hf://") else folder / str(name) for name in named]
    if not files:
        raise FileFormatError(
            f"expected layer_0.safetensors, layer_1.safetensors, ... beside {folder / _TRACER_CONFIG}."
        )
    hook_in, hook_out = _tracer_hooks(folder, config)
    read: Callable[..., Dictionary]
    dictionaries = []
    for layer, file in enumerate(files):
        if lazy and file.suffix == ".npz":
            raise SettingsError(f"lazy=True: {file} is an .npz file, which is read whole. Leave lazy out.")
        read = _read_npz if file.suffix == ".npz" else partial(_read_transcoder, lazy=lazy)
        hooks = (f"blocks.{layer}.{hook_in}", f"blocks.{layer}.{hook_out}")
        dictionaries.append(read(file, hooks, f"{config.get('scan') or folder.name} {layer}", _metadata(config)))
    return dictionaries


def _hub_file(name: str) -> Path:
    """The local copy of `hf://owner/repository/path?revision=main`, from the hub's cache or downloaded."""
    from huggingface_hub import hf_hub_download  # a second to import, and files named so are rare

    address = urlparse(name)
    repository, _, inside = address.path.lstrip("/").partition("/")
    if not address.netloc or not repository or not inside:
        raise FileFormatError(f"expected hf://owner/repository/path of a file; got {name!r}.")
    revision = (parse_qs(address.query).get("revision") or [None])[0]
    try:
        return Path(hf_hub_download(repo_id=f"{address.netloc}/{repository}", filename=inside, revision=revision))
    except (OSError, ValueError) as error:  # no network, no such file, or HF_HUB_OFFLINE
        raise FileFormatError(
            f"cannot get {name} from the Hugging Face hub ({short(str(error))}). Download it where there is a network, "
            "and name its path in config.yaml instead."
        ) from error


def _read_transcoder(
    file: Path, hooks: tuple[str, str] | None = None, name: str = "", metadata: Mapping[str, Any] | None = None,
    *, lazy: bool = False,
) -> Dictionary:  # fmt: skip
    """One of circuit-tracer's layers, or one of Gemma Scope 2."""
    tensors = read_safetensors(file)
    if "w_enc" in tensors:
        tensors = _renamed(tensors, {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip"})
        tensors |= {"W_skip": tensors["W_skip"].mT} if "W_skip" in tensors else {}
    elif "W_enc" in tensors:
        tensors = _renamed(tensors, {"activation_function.threshold": "threshold"})
        tensors["W_enc"] = tensors["W_enc"].mT
    else:
        raise FileFormatError(
            f"expected the tensor W_enc (or w_enc) of a transcoder in {file}; it has {sorted(tensors)[:6]}."
        )
    kind = ("jumprelu_" if "threshold" in tensors else "") + ("skip_" if "W_skip" in tensors else "") + "transcoder"
    _check_thresholds(file, tensors)
    hook_in, hook_out = hooks or _gemma_hooks(file)
    return build_dictionary(
        kind, tensors if lazy else _contiguous(tensors), name=name or f"{file.parent.name}/{file.stem}",
        hook_in=hook_in, hook_out=hook_out, metadata=dict(metadata or {}), lazy=lazy,
    )  # fmt: skip


def _read_cross_layer(folder: Path, config: Mapping[str, Any], *, lazy: bool) -> list[Dictionary]:
    """circuit-tracer's cross-layer transcoder: one dictionary per layer, its later decoders apart."""
    n_layers = len(list(folder.glob("W_enc_*.safetensors")))
    hook_in, hook_out = _tracer_hooks(folder, config)
    name, dictionaries = str(config.get("scan") or folder.name), []
    for layer in range(n_layers):
        file = folder / f"W_enc_{layer}.safetensors"
        tensors = {key.removesuffix(f"_{layer}"): value for key, value in read_safetensors(file).items()}
        decoder = read_safetensors(folder / f"W_dec_{layer}.safetensors").get(f"W_dec_{layer}")
        if decoder is None or "W_enc" not in tensors:
            raise FileFormatError(
                f"expected W_enc_{layer} in {file}, and W_dec_{layer} in the file beside it; one is not there."
            )
        if decoder.dim() != 3 or decoder.shape[1] != n_layers - layer:
            raise DictionaryError(
                f"{folder}: W_dec_{layer} should have shape [d_dict, {n_layers - layer}, d_out], as there are "
                f"{n_layers} layers from 0 on; it has {list(decoder.shape)}."
            )
        _check_thresholds(file, tensors)
        tensors |= {"W_enc": tensors["W_enc"].mT, "W_dec": decoder[:, 0], "W_dec_later": decoder[:, 1:].transpose(0, 1)}
        dictionaries.append(
            build_dictionary(
                ("jumprelu_" if "threshold" in tensors else "") + "cross_layer_transcoder",
                tensors if lazy else _contiguous(tensors),
                name=f"{name} {layer}",
                hook_in=f"blocks.{layer}.{hook_in}",
                hook_out=f"blocks.{layer}.{hook_out}",
                metadata=_metadata(config),
                lazy=lazy,
            )
        )
    return dictionaries


def _read_npz(
    file: Path, hooks: tuple[str, str] | None = None, name: str = "", metadata: Mapping[str, Any] | None = None
) -> Dictionary:
    """One of Gemma Scope's SAEs or transcoders."""
    try:
        with np.load(file) as arrays:  # by default nothing pickled is read
            tensors = {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise FileFormatError(
            f"{file} is missing, truncated or not an .npz file: {error}. Download it again."
        ) from error
    if set(tensors) != set(_NPZ):
        raise FileFormatError(f"expected the arrays {', '.join(_NPZ)} of Gemma Scope in {file}; got {sorted(tensors)}.")
    _check_thresholds(file, tensors)
    hook_in, hook_out = hooks or _gemma_hooks(file)
    return build_dictionary(
        "jumprelu" if hook_in == hook_out else "jumprelu_transcoder", tensors, hook_in=hook_in, hook_out=hook_out,
        name=name or "/".join(file.with_suffix("").parts[-4:]), metadata=dict(metadata or {}),
    )  # fmt: skip


def _read_sparsify(folder: Path) -> Dictionary:
    """One of EleutherAI's sparsify folders."""
    try:
        config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
        k, transcodes = int(config["k"]), bool(config.get("transcode"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"expected cfg.json with k beside {folder / _SPARSIFY_WEIGHTS}, as sparsify writes it; cannot read it: "
            f"{error!r}."
        ) from error
    if config.get("activation", "topk") != "topk":
        raise DictionaryError(
            f"{folder}: its activation is {config['activation']!r}; of sparsify's only 'topk' is known."
        )
    tensors = _renamed(
        read_safetensors(folder / _SPARSIFY_WEIGHTS), {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
    )
    if "W_enc" not in tensors or "W_dec" not in tensors:
        raise FileFormatError(
            f"expected encoder.weight and W_dec in {folder / _SPARSIFY_WEIGHTS}; got {sorted(tensors)}."
        )
    tensors["W_enc"] = tensors["W_enc"].mT
    kind = "topk"
    if transcodes:
        kind = "topk_skip_transcoder" if "W_skip" in tensors else "topk_transcoder"
    hook_in, hook_out = _sparsify_hooks(folder.name, transcodes)
    return build_dictionary(
        kind, _contiguous(tensors), k=k, apply_b_dec_to_input=not transcodes, name=folder.name, hook_in=hook_in,
        hook_out=hook_out,
    )  # fmt: skip


def _sparsify_hooks(module: str, transcodes: bool) -> tuple[str | None, str | None]:
    """The hooks of the Hugging Face module that a folder is named after."""
    found = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.(mlp|self_attn|attn|attention))?$", module)
    if found is None or (transcodes and found[2] != "mlp"):
        return None, None
    out = {None: "hook_resid_post", "mlp": "mlp.hook_out"}.get(found[2], "attn.hook_out")
    block = f"blocks.{found[1]}."
    return block + ("mlp.hook_in" if transcodes else out), block + out


def _gemma_hooks(file: Path) -> tuple[str | None, str | None]:
    """What the folders above a file say: `layer_12`, and a repository's name."""
    whole = file.resolve().as_posix()
    layer = re.search(r"/layer_(\d+)/", whole)
    site = re.search(rf"-({'|'.join(_GEMMA_SITES)})(?:-all)?(?:/|$)", whole)
    if layer is None or site is None:
        return None, None
    hook_in, hook_out = _GEMMA_SITES[site[1]]
    return f"blocks.{layer[1]}.{hook_in}", f"blocks.{layer[1]}.{hook_out}"


def _tracer_hooks(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    hooks = [config.get(f"feature_{end}_hook") for end in ("input", "output")]
    if not all(isinstance(hook, str) for hook in hooks):
        raise FileFormatError(
            f"expected feature_input_hook and feature_output_hook in {folder / _TRACER_CONFIG}, such as hook_resid_mid "
            f"and hook_mlp_out; got {hooks}."
        )
    return str(hooks[0]), str(hooks[1])


def _metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    known = {"model_name": config.get("model_name"), "scan": config.get("scan")}
    return {key: value for key, value in known.items() if value is not None}


def _check_thresholds(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse thresholds below zero, where these programs keep negative features and JumpReLU here has none."""
    if "threshold" in tensors and bool((tensors["threshold"] < 0).any()):
        count = int((tensors["threshold"] < 0).sum())
        raise DictionaryError(
            f"{file}: {count} thresholds are below zero, where its program lets negative features "
            "pass and JumpReLU here does not."
        )


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def _read_yaml(folder: Path) -> Mapping[str, Any]:
    file = folder / _TRACER_CONFIG
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FileFormatError(
            f"expected circuit-tracer's {_TRACER_CONFIG} in {folder}; cannot read it: {error}."
        ) from error
    if not isinstance(config, dict):
        raise FileFormatError(f"{file} holds a {type(config).__name__}, expected circuit-tracer's settings.")
    return config


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        FileFormatError: it is missing or damaged.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(
            f"{file} is missing, truncated or not a safetensors file: {error}. Download or save the dictionary again."
        ) from error
