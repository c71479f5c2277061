"""Every architecture that TransformerLens' Bridge lists, built small and offline: `python -m tests.architectures`.

Writes docs/architectures.md. A row is "exact" where relevance is conserved, RelP's gradient is that of Hugging Face's
own model with factors detached by hand, and `attribute` agrees with exact patching to first order; "refused"
where `relp` raises, with the reason; "not built" where there is nothing to measure offline. Anything
else is "runs and is wrong", and the script ends with an error.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tl_neuron_circuits import NeuronCircuitsError, TokenizedPairs, attribute, check_model, relp

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
SAMPLE = (
    "GPT2LMHeadModel", "LlamaForCausalLM", "Gemma4ForCausalLM", "Qwen3_5ForCausalLM", "GraniteForCausalLM",
    "YoutuForCausalLM", "BertLMHeadModel", "FalconH1ForCausalLM", "MixtralForCausalLM", "T5ForConditionalGeneration",
)  # fmt: skip
_LARGEST = 40_000_000
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "model_dim", "embed_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "num_decoder_layers", "depth"), 2),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("ffn_hidden_size", "expert_ffn_hidden_size", "moe_intermediate_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size",), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "mamba_d_state"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "vocab_size": 50, "vocab_size_per_layer_input": 50, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "mamba_d_ssm": 32,
    "out_hidden_size": 32, "projection_dim": 32, "image_size": 28, "patch_size": 14, "num_kv_shared_layers": 0,
}  # fmt: skip
_LATENT = ("Youtu", "DeepseekV2", "DeepseekV3", "Glm4MoeLite", "GlmMoeDsa")
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_OWN: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "FalconForCausalLM": {"head_dim": None},
    "FalconH1ForCausalLM": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_expand": 1},
    "GPTJForCausalLM": {"rotary_dim": 4},
    "CodeGenForCausalLM": {"rotary_dim": 4},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Gemma4ForCausalLM": {"layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0},
    "GraniteForCausalLM": {"embedding_multiplier": 3.0},
    "GraniteMoeHybridForCausalLM": {
        "mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 48,
    },
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8},
    "MptForCausalLM": {"attn_pdrop": 0},
    "OlmoHybridForCausalLM": _HYBRID,
    "Qwen3NextForCausalLM": _HYBRID,
    "Qwen3_5ForCausalLM": _HYBRID,
    "Qwen3_5MoeForCausalLM": _HYBRID,
    "RecurrentGemmaForCausalLM": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    **{f"{name}ForCausalLM": {"num_key_value_heads": 4} for name in _LATENT},
    "Zamba2ForCausalLM": {"layer_types": ["mamba", "hybrid"]},
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3_5ForCausalLM, full attention": ("Qwen3_5ForCausalLM", {"layer_types": ["full_attention"] * 2}),
    "Gemma4ForCausalLM, per-layer embeddings": ("Gemma4ForCausalLM", {"hidden_size_per_layer_input": 8}),
    "Qwen3MoeForCausalLM, dense layers": ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0, 1]}),
    "DeepseekV3ForCausalLM, dense layers": ("DeepseekV3ForCausalLM", {"first_k_dense_replace": 2}),
    "Llama4ForCausalLM, dense layers": ("Llama4ForCausalLM", {"moe_layers": [], "intermediate_size_mlp": 48}),
    "AfmoeForCausalLM, dense layers": ("AfmoeForCausalLM", {"num_dense_layers": 2}),
    "LagunaForCausalLM, dense layers": ("LagunaForCausalLM", {"mlp_layer_types": ["dense", "dense"]}),
    "GraniteForCausalLM, no multiplier": ("GraniteForCausalLM", {"embedding_multiplier": 1.0}),
}
"""More than one configuration of a class: what decides is the layer, not the name."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    verdict: str
    why: str = ""
    conservation: float = float("nan")
    gradient: float = float("nan")
    """Largest difference from Hugging Face with detach tricks, of the largest gradient."""
    patching: float = float("nan")
    """Error of gradient times change against exact patching, for a small change, of the largest effect."""


@contextmanager
def _blind(name: str) -> Iterator[None]:
    """Gemma 3n asks for timm, which needs torchvision, for a vision tower that text never enters: it gets none."""
    if not name.startswith("Gemma3n"):
        yield
        return
    stand_ins = {library: ModuleType(library) for library in ("timm", "PIL") if find_spec(library) is None}
    for library, module in stand_ins.items():
        module.__spec__ = ModuleSpec(library, None)
    build = transformers.AutoModel.from_config

    def from_config(config: Any, **options: Any) -> Any:
        if type(config).__name__ != "Gemma3nVisionConfig":
            return build(config, **options)
        tower: Any = nn.Module()
        tower.config = config
        return tower

    with patch.dict(sys.modules, stand_ins), patch.object(transformers.AutoModel, "from_config", from_config):
        yield


class _NotBuilt(Exception):
    """There is nothing to measure."""


def architectures() -> list[str]:
    """Every class that the installed Bridge lists, and the variants."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    return [*SUPPORTED_ARCHITECTURES, *VARIANTS]


def hugging_face(name: str, dtype: torch.dtype) -> Any:
    """A tiny random model of the class, with every norm weight and bias away from one and zero."""
    architecture, changes = VARIANTS.get(name, (name, {}))
    model_class: Any = getattr(transformers, architecture, None)
    if model_class is None:
        raise _NotBuilt("its code is not in transformers")
    try:
        config = model_class.config_class(**_fields(model_class.config_class, _OWN.get(architecture, {}) | changes))
        config._attn_implementation = "eager"
        for part in getattr(config, "sub_configs", None) or {}:
            if getattr(config, part, None) is not None:
                getattr(config, part)._attn_implementation = "eager"
        with torch.device("meta"):
            count = sum(p.numel() for p in model_class(config).parameters())
        if count > _LARGEST:
            raise _NotBuilt(f"its smallest configuration here has {count / 1e6:.0f} million parameters")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class(config)
    except _NotBuilt:
        raise
    except Exception as error:
        raise _NotBuilt(f"its configuration cannot be made small: {_line(error)}") from error
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 1:
                p.add_(0.2 * noise)
            elif p.dim() == 2:
                p.copy_((0.5 if "embed" in key else 0.25) * noise)
    return model.to(dtype).eval()


def _fields(config_class: Any, changes: dict[str, Any]) -> dict[str, Any]:
    try:
        base = config_class()
    except Exception:  # noqa: BLE001 - whatever their validators raise
        base = None
    own = set(getattr(config_class, "__dataclass_fields__", ())) | set(vars(base) if base is not None else ())
    fields = {key: value for key, value in _SMALL.items() if key in own}
    aliases = getattr(config_class, "attribute_map", {})
    fields = {key: value for key, value in fields.items() if aliases.get(key) not in fields}
    for part, kind in (getattr(config_class, "sub_configs", None) or {}).items():
        kind = type(getattr(base, part, None)) if kind is transformers.AutoConfig else kind
        if kind is not type(None):
            fields[part] = _fields(kind, changes.get(part, {})) | {"model_type": kind.model_type}
            changes = {key: value for key, value in changes.items() if key != part}
    return {key: value for key, value in (fields | changes).items() if value is not None}


def bridge(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """The TransformerBridge, and an equal Hugging Face model that it does not touch."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    with _blind(name):
        source, twin = hugging_face(name, dtype), hugging_face(name, dtype)
        try:
            model = build_bridge_from_module(source, VARIANTS.get(name, (name,))[0], hf_config=source.config).eval()
        except Exception as error:
            raise _NotBuilt(f"the Bridge cannot be built: {_line(error)}") from error
    return model, twin


def measure(name: str) -> Row:
    """One row, in float64 where the model runs in it."""
    try:
        model, twin = bridge(name)
        tokens = torch.tensor([[5, 17, 29, 41, 8, 33]])
        try:
            with torch.no_grad():
                model(tokens)
        except Exception:  # noqa: BLE001 - whatever the model raises
            model, twin = bridge(name, torch.float32)
            try:
                with torch.no_grad():
                    model(tokens)
            except Exception as error:  # noqa: BLE001 - as above
                return Row(name, "refused", f"its forward pass fails in TransformerLens: {_line(error)}")
    except _NotBuilt as error:
        return Row(name, "not built", str(error))
    report = check_model(model)
    try:
        with relp(model):
            pass
    except NeuronCircuitsError:
        assert not report.ok, name
        return Row(name, "refused", report.problems[0], report.conservation)
    assert report.ok, (name, report.problems)
    try:
        with torch.no_grad():
            twin(input_ids=tokens)
    except Exception as error:  # noqa: BLE001 - as above
        return Row(name, "not built", f"Hugging Face's own forward pass fails on token ids: {_line(error)}")
    gradient, patching = _against_hugging_face(model, twin, tokens), _against_patching(model, tokens)
    off = [
        text for text, value, most in (("gradient", gradient, 1e-4), ("patching", patching, 2e-2)) if not value < most
    ]
    verdict = f"runs and is wrong ({', '.join(off)})" if off else "exact"
    return Row(name, verdict, "", report.conservation, gradient, patching)


class _Detached(TorchFunctionMode):
    """The tricks of papers, by function: what a factor is computed with is replaced by its value."""

    FACTORS = ("rsqrt", "softmax", "sigmoid", "tanh", "erf", "softplus")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in ("silu", "gelu", "relu", "leaky_relu"):
            x = args[0]
            value = func(*args, **kwargs)
            safe = torch.where(x == 0, torch.ones_like(x), x)
            return x * (value / safe).detach()
        if name == "layer_norm":
            x, _, weight, bias, eps = (*args, *(None,) * (5 - len(args)))
            weight, bias, eps = kwargs.get("weight", weight), kwargs.get("bias", bias), kwargs.get("eps", eps)
            centered = x - x.mean(-1, keepdim=True)
            out = centered * (centered.pow(2).mean(-1, keepdim=True) + eps).rsqrt().detach()
            out = out if weight is None else out * weight
            return out if bias is None else out + bias
        if name == "rms_norm":
            x, weight = args[0], args[2] if len(args) > 2 else kwargs.get("weight")
            eps = kwargs.get("eps", args[3] if len(args) > 3 else None) or torch.finfo(x.dtype).eps
            out = x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt().detach()
            return out if weight is None else out * weight
        out = func(*args, **kwargs)
        if name == "pow" and isinstance(args[1], float) and args[1] < 0:
            return out.detach()
        return out.detach() if name in self.FACTORS and isinstance(out, Tensor) else out


@contextmanager
def _halved(model: Any) -> Iterator[None]:
    """The half rule: what enters a down projection of a gated MLP sends half its gradient back."""

    def halve(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = arguments[0]
        return (x / 2 + (x / 2).detach(), *arguments[1:])

    gated = []
    for module in model.modules():
        names = {name for name, _ in module.named_children()}
        down = names & {"down_proj", "dense_4h_to_h", "w2"}
        if down and names & {"gate_proj", "gate_up_proj", "w1", "gate_and_up_proj"}:
            gated.append(getattr(module, down.pop()))
    handles = [module.register_forward_pre_hook(halve) for module in gated]
    fields = ("act_fn", "activation_fn", "act", "activation", "activation_function", "gelu_impl")
    owners = [(module, field, getattr(module, field, None)) for module in model.modules() for field in fields]
    owners = [(module, field, function) for module, field, function in owners if callable(function)]
    for module, field, function in owners:
        module._modules.pop(field, None)
        vars(module)[field] = lambda x, function=function: x * (function(x) / torch.where(x == 0, 1.0, x)).detach()
    try:
        yield
    finally:
        for module, field, _ in owners:
            del vars(module)[field]
        for handle in handles:
            handle.remove()


def _against_hugging_face(model: Any, twin: nn.Module, tokens: Tensor) -> float:
    """d (largest logit before any cap) / d embeddings, on the Bridge and on the untouched model."""
    store: dict[str, Tensor] = {}
    raw: list[Tensor] = []
    with relp(model):
        handle = model.unembed.register_forward_hook(lambda module, arguments, output: raw.append(output))
        with model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: store.update({"e": value}) or value)]):
            model(tokens)
        handle.remove()
        target = int(raw[-1][0, -1].argmax())
        (ours,) = torch.autograd.grad(raw[-1][0, -1, target], store["e"])
    other: list[Tensor] = []
    leaves: list[Tensor] = []
    module: Any = twin

    def leaf(m: Any, arguments: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1]

    handles = [
        _embedding_module(store["e"], module, tokens).register_forward_hook(leaf),
        module.get_output_embeddings().register_forward_hook(lambda m, a, output: other.append(output)),
    ]
    with _halved(module), _Detached():
        module(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    (theirs,) = torch.autograd.grad(other[-1][0, -1, target], leaves[0])
    theirs = theirs / _scale(store["e"], leaves[0])
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _embedding_module(embedded: Tensor, twin: Any, tokens: Tensor) -> nn.Module:
    """The module whose output the Bridge shows at hook_embed: the embedding, or a norm after it (BLOOM)."""
    outputs: dict[nn.Module, Tensor] = {}
    handles = [m.register_forward_hook(lambda m, a, out: outputs.update({m: out})) for m in twin.modules()]
    with torch.no_grad():
        twin(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    same = (m for m, out in outputs.items() if isinstance(out, Tensor) and out.shape == embedded.shape)
    return next((m for m in same if torch.allclose(outputs[m], embedded, rtol=1e-4)), twin.get_input_embeddings())


def _scale(embedded: Tensor, own: Tensor) -> float:
    """Some Bridges show the embedding after the model's multiplier (Granite)."""
    return float((embedded.detach() * own.detach()).sum() / own.detach().pow(2).sum())


def _against_patching(model: Any, tokens: Tensor) -> float:
    """Plain gradients times a change of one neuron against running the model with it."""
    pairs = TokenizedPairs.from_tokens(
        [tokens[0]], torch.tensor([3]), corrupt=[tokens[0].flip(-1)], wrong_answer=torch.tensor([9])
    )
    scores = attribute(model, pairs, method="relp", batch_size=1)
    assert len(scores.values) == model.cfg.n_layers
    name, small, last = "blocks.0.mlp.hook_post", 1e-4, tokens.shape[1] - 1
    store: dict[str, Tensor] = {}
    with relp(model, ()), model.hooks(fwd_hooks=[(name, lambda value, hook: store.update({"a": value}) or value)]):
        logits = model(tokens)
        (gradient,) = torch.autograd.grad(logits[0, -1, 3] - logits[0, -1, 9], store["a"])
    unit = int(gradient.reshape(-1, gradient.shape[-1])[last].abs().argmax())

    def run(sign: float) -> float:
        def move(value: Tensor, hook: Any) -> Tensor:
            moved = value.clone()
            moved.view(-1, moved.shape[-1])[last, unit] += sign * small
            return moved

        with torch.no_grad(), model.hooks(fwd_hooks=[(name, move)]):
            logits = model(tokens)
        return float(logits[0, -1, 3] - logits[0, -1, 9])

    exact, expected = (run(1) - run(-1)) / 2, small * float(gradient.reshape(-1, gradient.shape[-1])[last, unit])
    return abs(exact - expected) / abs(expected)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {shorten(text, 140, placeholder=' ...')}"


def page(rows: list[Row]) -> str:
    """The table, as Markdown."""
    counts = {kind: sum(row.verdict == kind for row in rows) for kind in ("exact", "refused", "not built")}
    import transformer_lens

    version = getattr(transformer_lens, "__version__", "4.3")
    lines = [
        "# Architectures", "",
        f"Every class that the Bridge of TransformerLens {version} lists, built small with random weights by `python "
        f"-m tests.architectures` (transformers {transformers.__version__}): {counts['exact']} exact, "
        f"{counts['refused']} "
        f"refused, {counts['not built']} not built.", "",
        "- **exact**: relevance is conserved (column 3: embeddings and biases over the logits, 1 is exact), the "
        "gradient at the embeddings is that of Hugging Face's own model with the same factors detached by "
        "hand (column 4: largest "
        "difference, of the largest), and a plain gradient at a neuron predicts what patching it by a little does "
        "(column 5: relative error).",
        "- **refused**: `relp`, `attribute(method=\"relp\")` and `trace` raise `UnsupportedModelError` with this "
        "reason. `method=\"patching\"` works wherever the forward pass does.",
        "- **not built**: nothing was measured; on first use `relp` checks your model all the same.", "",
        "What decides is the layer, not the name: some classes stand here twice.", "",
        "| architecture | | conservation | gradient | patching | why |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in sorted(rows, key=lambda row: (["exact", "refused", "not built"].index(row.verdict), row.name.lower())):
        figures = ("" if x != x else form.format(x) for x, form in zip(
            (row.conservation, row.gradient, row.patching), ("{:.6f}", "{:.0e}", "{:.0e}"), strict=True))  # fmt: skip
        why = row.why.replace("|", "/").replace("\n", " ")
        lines.append(f"| {row.name} | {row.verdict} | {' | '.join(figures)} | {why} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every row, or those named, and write the page."""
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = []
    for name in sys.argv[1:] or architectures():
        rows.append(measure(name))
        print(rows[-1], flush=True)
    wrong = [row.name for row in rows if row.verdict.startswith("runs")]
    if wrong:
        sys.exit(f"runs and is wrong: {wrong}")
    if not sys.argv[1:]:
        PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
