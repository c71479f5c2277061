"""Tiny random models of every architecture family, built offline, as HookedTransformer and as TransformerBridge.

Every parameter is random (norm weights about one, biases about zero, none exactly so), so that a rule that drops a
bias, a norm weight or a soft cap gives another number. The seed fixes the model; the global seed is never touched.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import pytest
import torch
import transformers
from jaxtyping import Int
from torch import Tensor

from tests.loops import for_each_of

try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
except ImportError:  # TransformerLens 4 has no HookedTransformer
    HookedTransformer = HookedTransformerConfig = None
try:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
except ImportError:  # TransformerLens 2 has no TransformerBridge
    build_bridge_from_module = None

MAJOR = int(version("transformer-lens").split(".")[0])
N_LAYERS, D_MODEL, N_HEADS, D_HEAD, D_MLP, D_VOCAB, N_CTX = 2, 16, 4, 4, 24, 50, 32


@dataclass(frozen=True)
class Family:
    """One architecture: the settings of its tiny models and what the tests must know about it."""

    name: str
    hooked: dict[str, Any] | None = None
    """Fields of HookedTransformerConfig beyond the shared ones; None where TransformerLens has no such form."""
    architecture: str | None = None
    """Hugging Face class, such as "LlamaForCausalLM"; None where Hugging Face has no such form."""
    hugging_face: dict[str, Any] = field(default_factory=dict)
    """Fields of the Hugging Face config."""
    gated: bool = False
    """The MLP multiplies two branches, so the half rule applies."""
    computes_in_float32: bool = False
    """Hugging Face's code casts to float32 inside (RMSNorm, rotary, softmax): float64 runs agree to 1e-5 only."""
    embedding_scale: float = 0.5
    supported: bool = True
    """False: relevance propagation must refuse it."""

    def __repr__(self) -> str:
        """Return the name alone, as it appears in test ids."""
        return self.name


_LLAMA_LIKE = {
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": D_MLP,
    "head_dim": D_HEAD,
    "max_position_embeddings": N_CTX,
}
_ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": D_HEAD, "rotary_base": 10000}
_LLAMA_HOOKED = _ROTARY | {
    "act_fn": "silu",
    "gated_mlp": True,
    "normalization_type": "RMS",
    "final_rms": True,
    "n_key_value_heads": 2,
}
_GEMMA2_CAPS = {"attention": 3.0, "logits": 4.0}  # low enough that both bend the numbers

_ALL = [
    Family(
        "gpt2",
        hooked={"act_fn": "gelu_new", "normalization_type": "LN"},
        architecture="GPT2LMHeadModel",
        hugging_face={
            "n_embd": D_MODEL,
            "n_layer": N_LAYERS,
            "n_head": N_HEADS,
            "n_inner": D_MLP,
            "n_positions": N_CTX,
        },
    ),
    Family("gpt2_folded", hooked={"act_fn": "gelu_new", "normalization_type": "LNPre"}),
    Family(
        "pythia",
        hooked=_ROTARY | {"act_fn": "gelu", "normalization_type": "LN", "parallel_attn_mlp": True, "rotary_dim": 2},
        architecture="GPTNeoXForCausalLM",
        hugging_face={
            "hidden_size": D_MODEL,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": N_HEADS,
            "intermediate_size": D_MLP,
            "max_position_embeddings": N_CTX,
            "rotary_pct": 0.5,
            "use_parallel_residual": True,
        },
        computes_in_float32=True,
    ),
    Family(
        "llama",
        hooked=_LLAMA_HOOKED,
        architecture="LlamaForCausalLM",
        hugging_face=_LLAMA_LIKE,
        gated=True,
        computes_in_float32=True,
    ),
    Family(
        "llama_biased",
        architecture="LlamaForCausalLM",
        hugging_face=_LLAMA_LIKE | {"attention_bias": True, "mlp_bias": True},
        gated=True,
        computes_in_float32=True,
    ),
    Family("llama_folded", hooked=_LLAMA_HOOKED | {"normalization_type": "RMSPre"}, gated=True),
    Family(
        "mistral",
        architecture="MistralForCausalLM",
        hugging_face=_LLAMA_LIKE | {"sliding_window": 4},
        gated=True,
        computes_in_float32=True,
    ),
    Family(
        "gemma2",
        hooked=_LLAMA_HOOKED
        | {
            "act_fn": "gelu_pytorch_tanh",
            "use_normalization_before_and_after": True,
            "attn_scores_soft_cap": _GEMMA2_CAPS["attention"],
            "output_logits_soft_cap": _GEMMA2_CAPS["logits"],
            "use_local_attn": True,
            "window_size": 4,
            "attn_types": ["global", "local"] * (N_LAYERS // 2),
        },
        architecture="Gemma2ForCausalLM",
        hugging_face=_LLAMA_LIKE
        | {
            "query_pre_attn_scalar": D_HEAD,
            "attn_logit_softcapping": _GEMMA2_CAPS["attention"],
            "final_logit_softcapping": _GEMMA2_CAPS["logits"],
            "sliding_window": 4,
        },
        gated=True,
        computes_in_float32=True,
    ),
    Family(
        "gemma3",
        architecture="Gemma3ForCausalLM",
        hugging_face=_LLAMA_LIKE
        | {
            "query_pre_attn_scalar": D_HEAD,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        gated=True,
        computes_in_float32=True,
    ),
    Family(
        "qwen2",
        # Biases of q, k and v are random in every HookedTransformer here, so one key-value head is the difference.
        hooked=_LLAMA_HOOKED | {"n_key_value_heads": 1, "rotary_base": 1000000},
        architecture="Qwen2ForCausalLM",
        hugging_face={key: value for key, value in _LLAMA_LIKE.items() if key != "head_dim"},
        gated=True,
        computes_in_float32=True,
    ),
    Family(
        "qwen3",
        hooked=_LLAMA_HOOKED | {"use_qk_norm": True},
        architecture="Qwen3ForCausalLM",
        hugging_face=_LLAMA_LIKE,
        gated=True,
        computes_in_float32=True,
    ),
    Family(
        "opt",
        hooked={"act_fn": "relu", "normalization_type": "LN"},
        architecture="OPTForCausalLM",
        hugging_face={
            "hidden_size": D_MODEL,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": N_HEADS,
            "ffn_dim": D_MLP,
            "word_embed_proj_dim": D_MODEL,
            "max_position_embeddings": N_CTX,
            "dropout": 0.0,
        },
        computes_in_float32=True,
    ),
    Family("solu", hooked={"act_fn": "solu", "normalization_type": "LN"}),
    Family("solu_ln", hooked={"act_fn": "solu_ln", "normalization_type": "LN"}),
    Family("solu_ln_folded", hooked={"act_fn": "solu_ln", "normalization_type": "LNPre"}),
    Family("no_norm", hooked={"act_fn": "relu", "normalization_type": None}),
    Family(
        "gptj",
        hooked=_ROTARY
        | {"act_fn": "gelu_new", "normalization_type": "LN", "parallel_attn_mlp": True, "rotary_adjacent_pairs": True},
        architecture="GPTJForCausalLM",
        hugging_face={
            "n_embd": D_MODEL,
            "n_layer": N_LAYERS,
            "n_head": N_HEADS,
            "n_inner": D_MLP,
            "n_positions": N_CTX,
            "rotary_dim": 2,
        },
        computes_in_float32=True,
    ),
    Family(
        "phi",
        architecture="PhiForCausalLM",
        hugging_face={
            key: value for key, value in _LLAMA_LIKE.items() if key not in ("head_dim", "num_key_value_heads")
        },
        computes_in_float32=True,
    ),
    Family(
        "falcon",
        architecture="FalconForCausalLM",
        hugging_face={
            "hidden_size": D_MODEL,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": N_HEADS,
            "ffn_hidden_size": D_MLP,
            "bias": True,
        },
        computes_in_float32=True,
    ),
    Family(
        "bloom",
        hooked={
            "act_fn": "gelu_fast",
            "normalization_type": "LN",
            "positional_embedding_type": "alibi",
            "post_embedding_ln": True,
        },
        architecture="BloomForCausalLM",
        hugging_face={"hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS},
        computes_in_float32=True,
    ),
    Family(
        "mixtral",
        hooked=_LLAMA_HOOKED | {"num_experts": 4, "experts_per_token": 2},
        architecture="MixtralForCausalLM",
        hugging_face=_LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2},
        gated=True,
        computes_in_float32=True,
        supported=False,
    ),
    Family(
        "qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        hugging_face=_LLAMA_LIKE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": D_MLP},
        gated=True,
        computes_in_float32=True,
        supported=False,
    ),
]

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}

AVAILABLE_HOOKED: list[str] = [n for n, f in FAMILIES.items() if HookedTransformer is not None and f.hooked is not None]
"""Families that the installed TransformerLens can build as HookedTransformer."""

AVAILABLE_BRIDGES: list[str] = [
    n for n, f in FAMILIES.items() if build_bridge_from_module is not None and f.architecture
]
"""Families that the installed TransformerLens can build as TransformerBridge."""


@dataclass(frozen=True)
class ModelCase:
    """One family in one model class; `build` makes the model."""

    family: str
    backend: str

    @property
    def id(self) -> str:
        """Return the test id, such as "llama-HookedTransformer"."""
        return f"{self.family}-{self.backend}"

    @property
    def tolerance(self) -> float:
        """Return how far float64 gradients may stand from an exact float64 computation."""
        exact = self.backend == "HookedTransformer" or not FAMILIES[self.family].computes_in_float32
        return 1e-10 if exact else 1e-5

    def build(self, dtype: torch.dtype | None = None, seed: int = 0, **overrides: Any) -> Any:
        """Build the model, in float64 unless told (float32 for mixtures of experts, whose kernels know no float64)."""
        if dtype is None:
            dtype = torch.float64 if FAMILIES[self.family].supported else torch.float32
        builder = hooked_transformer if self.backend == "HookedTransformer" else bridge
        return builder(self.family, dtype=dtype, seed=seed, **overrides)


def model_cases(*names: str, supported: bool = True) -> list[ModelCase]:
    """List every available combination of family and model class, or those of the named families."""
    cases = [ModelCase(name, "HookedTransformer") for name in AVAILABLE_HOOKED]
    cases += [ModelCase(name, "TransformerBridge") for name in AVAILABLE_BRIDGES]
    return [c for c in cases if FAMILIES[c.family].supported == supported and (not names or c.family in names)]


def all_models(*names: str) -> list[Any]:
    """Parametrize a test by `ModelCase`, with ids such as "gemma2-TransformerBridge"."""
    return [pytest.param(case, id=case.id) for case in model_cases(*names)]


KINDS: dict[str, tuple[str, ...]] = {
    "plain": ("gpt2", "gpt2_folded", "opt", "no_norm", "bloom"),
    "parallel": ("pythia", "gptj", "phi", "falcon"),
    "gated": ("llama", "llama_biased", "llama_folded", "mistral", "qwen2"),
    "more_norms": ("gemma2", "gemma3", "qwen3"),
    "solu": ("solu", "solu_ln", "solu_ln_folded"),
}
"""The supported families by how their layers are wired; those of one kind share a test."""


def each_model(*names: str, backend: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test on each model of `all_models`: one test per kind and class, which names the models that fail."""
    cases = [case for case in model_cases(*names) if backend in (None, case.backend)]
    kinds = {family: kind for kind, families in KINDS.items() for family in families}
    groups: dict[str, list[ModelCase]] = {}
    for case in cases:
        groups.setdefault(f"{kinds[case.family]}-{case.backend}", []).append(case)
    return for_each_of("case", groups, ids=lambda case: case.id)


TYPICAL = {
    "gpt2": "HookedTransformer",  # LN and GELU
    "llama": "TransformerBridge",  # gated, RMS, grouped queries
    "gemma2": "HookedTransformer",  # post norms, soft caps, windows
    "pythia": "TransformerBridge",  # parallel blocks
    "bloom": "TransformerBridge",  # ALiBi
    "qwen3": "HookedTransformer",  # norms of queries and keys
    "solu_ln": "HookedTransformer",  # a norm inside the activation
    "opt": "TransformerBridge",  # ReLU: no identity rule
    "no_norm": "HookedTransformer",  # no ln rule
    "llama_biased": "TransformerBridge",  # biases beside a product
}


def typical_models(*names: str) -> list[Any]:
    """Parametrize a test by one model of each family, or of those named: in `TYPICAL`'s class if there, else the other.

    All families in both classes are for tests of the rules themselves (`all_models`).
    """
    cases = model_cases(*(names or TYPICAL))
    chosen = {case.family: case for case in cases}
    chosen |= {case.family: case for case in cases if TYPICAL.get(case.family, "HookedTransformer") == case.backend}
    return [pytest.param(case, id=case.id) for case in chosen.values()]


def unsupported_models() -> list[Any]:
    """Parametrize a test by the models that relevance propagation must refuse."""
    return [pytest.param(case, id=case.id) for case in model_cases(supported=False)]


def hooked_transformer(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any) -> Any:
    """Build a tiny random HookedTransformer; `overrides` go to its config."""
    settings = FAMILIES[name].hooked
    if HookedTransformer is None or HookedTransformerConfig is None or settings is None:
        pytest.skip(f"{name} has no HookedTransformer form on this TransformerLens")
    shared = {
        "n_layers": N_LAYERS,
        "d_model": D_MODEL,
        "n_heads": N_HEADS,
        "d_head": D_HEAD,
        "d_mlp": D_MLP,
        "d_vocab": D_VOCAB,
        "n_ctx": N_CTX,
        "default_prepend_bos": False,
        "device": "cpu",
        "dtype": dtype,
        "init_weights": False,
    }
    config = HookedTransformerConfig(**(shared | settings | overrides))
    model = HookedTransformer(config)
    _randomize(model, seed, FAMILIES[name])
    return model.eval()


def hugging_face(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any) -> Any:
    """Build a tiny random Hugging Face model with eager attention; `overrides` go to its config."""
    family = FAMILIES[name]
    if family.architecture is None:
        pytest.skip(f"{name} has no Hugging Face form")
    model_class = getattr(transformers, family.architecture)
    tokens = {"vocab_size": D_VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = model_class.config_class(**(tokens | family.hugging_face | overrides))
    config._attn_implementation = "eager"
    model = model_class(config).to(dtype)
    _randomize(model, seed, family)
    return model.eval()


def bridge(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any) -> Any:
    """Build a TransformerBridge on `hugging_face(name, dtype, seed)`."""
    if build_bridge_from_module is None:
        pytest.skip("TransformerBridge needs TransformerLens 3 or later")
    source = hugging_face(name, dtype, seed, **overrides)
    model = build_bridge_from_module(source, FAMILIES[name].architecture, hf_config=source.config)
    return model.eval()


def random_tokens(model: Any, batch: int = 2, pos: int = 7, seed: int = 0) -> Int[Tensor, "batch pos"]:
    """Draw tokens, none of them a special token (0 and 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, model.cfg.d_vocab, (batch, pos), generator=generator)


@torch.no_grad()
def _randomize(model: torch.nn.Module, seed: int, family: Family) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        is_norm = any(part.startswith("ln") or "norm" in part.lower() for part in name.split(".")[:-1])
        is_bias = name.rsplit(".", 1)[-1].lstrip("_").startswith("b")
        if is_norm and not is_bias:
            center = 0.0 if _norm_weight_is_offset(family, model) else 1.0
            value = center + 0.3 * noise
        elif is_bias:
            value = 0.3 * noise
        elif "embed" in name.lower() or "wte" in name or "wpe" in name:
            value = family.embedding_scale * noise
        else:
            value = 0.3 * noise
        parameter.copy_(value)


def _norm_weight_is_offset(family: Family, model: torch.nn.Module) -> bool:
    """Tell whether the norm multiplies by 1 + weight, as Hugging Face's Gemma does."""
    return family.name.startswith("gemma") and isinstance(model, transformers.PreTrainedModel)
