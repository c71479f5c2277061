"""The demo models: two small transformers inside the package, trained by `train_models` on synthetic English.

`demo-gelu` is GPT-2-like (LayerNorm, GELU), `demo-swiglu` Llama-like (RMSNorm, rotary positions, grouped-query
attention, SwiGLU). Both are ordinary Hugging Face directories; nothing is downloaded.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from .._errors import SettingsError
from .._typing import checked

DemoBackend = Literal["auto", "HookedTransformer", "TransformerBridge"]

DEMO_MODELS: tuple[str, ...] = ("demo-gelu", "demo-swiglu")
"""The names that `load_demo_model` takes."""

_FOLDER = Path(__file__).parent / "models"


def demo_model_path(name: str = "demo-gelu") -> Path:
    """The Hugging Face directory of a demo model.

    Raises:
        SettingsError: there is no demo model of that name.
    """
    if name not in DEMO_MODELS:
        raise SettingsError(f"expected a demo model, one of {', '.join(DEMO_MODELS)}; got {name!r}")
    return _FOLDER / name


@checked
def load_demo_model(
    name: str = "demo-gelu",
    backend: str = "auto",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A demo model as a TransformerLens model: the same weights and logits on either class, nothing folded or centered.

    Args:
        name: one of `DEMO_MODELS`.
        backend: "HookedTransformer" (TransformerLens below 4), "TransformerBridge" (3.9 and later), or "auto", which is
            the first of them that the installed TransformerLens has.
        device: where the weights go.
        dtype: their type; they are stored in float16 and exact in float32.

    Raises:
        SettingsError: the name is unknown, or the installed TransformerLens lacks the backend.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> logits = model("The capital of the state containing Dallas is")
        >>> model.to_string(logits[0, -1].argmax())
        'Austin'
    """
    folder = demo_model_path(name)
    if backend not in get_args(DemoBackend):
        raise SettingsError(f"expected backend to be one of {', '.join(get_args(DemoBackend))}; got {backend!r}")
    major = int(version("transformer-lens").split(".")[0])
    hooked = backend == "HookedTransformer" or (backend == "auto" and major < 4)
    with _quiet(), torch.random.fork_rng(devices=[]):  # building a model draws weights that are then replaced
        model = (_hooked_transformer if hooked else _bridge)(folder, device, dtype)
    model.cfg.model_name = name
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of a load that takes milliseconds, and the deprecation notice of HookedTransformer."""
    from transformers.utils import logging as transformers_logging  # seconds, which `import tl_neuron_circuits` saves

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def _bridge(folder: Path, device: str | torch.device, dtype: torch.dtype) -> Any:
    if find_spec("transformer_lens.model_bridge") is None:
        raise SettingsError(
            f"TransformerLens {version('transformer-lens')} has no TransformerBridge: ask for "
            "backend='HookedTransformer', or install transformer-lens>=3.9"
        )
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(folder), device=device, dtype=dtype)


def _hooked_transformer(folder: Path, device: str | torch.device, dtype: torch.dtype) -> Any:
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_llama_weights
    except ImportError as error:
        raise SettingsError(
            f"TransformerLens {version('transformer-lens')} has no HookedTransformer: ask for "
            "backend='TransformerBridge', or install transformer-lens<4"
        ) from error

    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: Any = AutoModelForCausalLM.from_pretrained(folder)
    source = source.to(dtype)
    is_gpt2 = source.config.model_type == "gpt2"
    fields = _gpt2_fields(source) if is_gpt2 else _llama_fields(source)
    cfg = HookedTransformerConfig(**fields, device=str(device), dtype=dtype, default_prepend_bos=True)
    weights = (convert_gpt2_weights if is_gpt2 else convert_llama_weights)(source, cfg)
    model = HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(folder), default_padding_side="right")
    model.load_and_process_state_dict(
        {key: value.detach().clone() for key, value in weights.items()},
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model


def _gpt2_fields(source: Any) -> dict[str, Any]:
    config = source.config
    return {
        "n_layers": config.n_layer,
        "d_model": config.n_embd,
        "n_ctx": config.n_positions,
        "n_heads": config.n_head,
        "d_head": config.n_embd // config.n_head,
        "d_mlp": config.n_inner,
        "d_vocab": config.vocab_size,
        "act_fn": config.activation_function,
        "eps": config.layer_norm_epsilon,
        "normalization_type": "LN",
        "original_architecture": "GPT2LMHeadModel",
    }


def _llama_fields(source: Any) -> dict[str, Any]:
    config = source.config
    head_width = config.hidden_size // config.num_attention_heads
    return {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_ctx": config.max_position_embeddings,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads,
        "d_head": head_width,
        "d_mlp": config.intermediate_size,
        "d_vocab": config.vocab_size,
        "act_fn": config.hidden_act,
        "gated_mlp": True,
        "eps": config.rms_norm_eps,
        "normalization_type": "RMS",
        "final_rms": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": head_width,
        "rotary_base": 10000,
        "rotary_adjacent_pairs": False,
        "original_architecture": "LlamaForCausalLM",
    }
