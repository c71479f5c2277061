"""Loaders of the real models in `../shared/models`, which are test data and not part of the package."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from transformers import AutoTokenizer

from tests.families import HookedTransformer, HookedTransformerConfig

try:
    from transformer_lens.model_bridge import TransformerBridge
except ImportError:  # TransformerLens 2 has no TransformerBridge
    TransformerBridge = None

BACKENDS: list[str] = [
    name
    for name, model_class in (("HookedTransformer", HookedTransformer), ("TransformerBridge", TransformerBridge))
    if model_class is not None
]
"""The model classes that the installed TransformerLens has."""

TRACR_PROGRAMS: tuple[str, ...] = (
    "detect_pattern", "frac_prevs", "hist", "length", "pair_balance", "reverse", "shift", "sort", "sort_unique",
)  # fmt: skip
"""All but shuffle_dyck, whose 813 possible edges take long: it is in `tests/benchmarks/ground_truth.py`."""


def load_hooked_form(folder: Path, tokenizer: Any = None) -> Any:
    """Load a folder that holds HookedTransformerConfig fields and a HookedTransformer state dict."""
    if HookedTransformer is None or HookedTransformerConfig is None:
        pytest.skip(f"{folder.name} is stored as HookedTransformer, which this TransformerLens lacks")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = HookedTransformer(HookedTransformerConfig(**fields, device="cpu"), tokenizer=tokenizer)
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"), strict=False)
    return model.eval()


def boot_folder(folder: Path) -> Any:
    """Boot a Hugging Face folder as a TransformerBridge, in eval mode on the CPU."""
    if TransformerBridge is None:
        pytest.skip("TransformerBridge needs TransformerLens 3 or later")
    return TransformerBridge.boot_transformers(str(folder), device="cpu").eval()


def load_stories260K(folder: Path, backend: str) -> Any:
    """Load the TinyLlamas 260K, tokenizer included, from the folder of shared models."""
    if backend == "TransformerBridge":
        return boot_folder(folder / "stories260K")
    return load_hooked_form(folder / "stories260K_tl", AutoTokenizer.from_pretrained(str(folder / "stories260K")))
