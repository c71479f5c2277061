"""The sites of a model: hook points by their role, found the same way in both TransformerLens model classes.

Roles are found by position in `model.hook_dict`, never by the class of a module: several adapters mount RMSNorm on
queries and keys, and only norms on the residual stream or on MLP activations are ours. The two model classes differ
in the norm (whether `hook_in` and `hook_out` exist), in where the MLP's activation function is found, and in `b_in`.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch

from .._errors import UnsupportedModelError
from ._protocol import TransformerLensModel, hook_points, submodule

_OUR_NORM = re.compile(
    r"(blocks\.\d+\.)?[^.]+\.hook_scale"  # on the residual stream
    r"|blocks\.\d+\.attn\.(v_norm|kv_a_layernorm)\.hook_scale"
    r"|blocks\.\d+\.mlp\.ln\.hook_scale"
)
_NORM_OF_QUERIES = re.compile(r"blocks\.\d+\.attn\.[qk]_norm\.hook_scale")
_GATES_OF_ATTENTION = ("hook_q_gate", "hook_gate", "gate.hook_out")
_EVERY = ("ln", "identity", "half", "attention", "values", "scores")
_ACTIVATION_FIELDS = ("act_fn", "hidden_activation", "hidden_act", "activation_function")


@dataclass(frozen=True)
class NormSites:
    """One normalization: `input` and `output` fire on `TransformerBridge` only, `scale` wherever it is computed.

    Gemma 4's adapter mounts norms as bare modules, which have no scale.
    """

    path: str
    scale: str | None
    input: str | None
    output: str | None
    normalized: str | None


@dataclass(frozen=True)
class MLPSites:
    """One MLP: neurons at `post`, the activation's input at `pre`, the linear branch of a gated MLP at `up`.

    `activated` is where the activation's output appears: `post`, or `hook_mid` where a norm follows (solu_ln).
    """

    layer: int
    pre: str
    up: str | None
    activated: str
    post: str


@dataclass(frozen=True)
class AttentionSites:
    """One attention layer: queries, keys and values, masked scores before and the pattern after the softmax.

    `gate` is what the sigmoid is taken of that some models (Qwen 3.5) multiply the heads' outputs with.
    """

    layer: int
    query: str
    key: str
    value: str | None
    scores: str | None
    pattern: str | None
    gate: str | None = None


@dataclass(frozen=True)
class Problem:
    """What stands in the way of some rules, and the remedy."""

    message: str
    rules: tuple[str, ...]


@dataclass(frozen=True)
class ModelSites:
    """Every site that a rule or a basis of this package uses, and what stands in the way of it."""

    n_layers: int
    embeddings: tuple[str, ...]
    norms: tuple[NormSites, ...]
    """On the residual stream, on values, and after activations: never those of queries and keys."""
    attention_norms: tuple[NormSites, ...]
    """Of queries and keys."""
    mlps: tuple[MLPSites, ...]
    attentions: tuple[AttentionSites, ...]
    last: str
    problems: tuple[Problem, ...]

    @staticmethod
    def nothing() -> "ModelSites":
        """Of a model whose hook points cannot be listed."""
        return ModelSites(0, (), (), (), (), (), "", ())


def find_sites(model: TransformerLensModel, points: dict[str, Any] | None = None) -> ModelSites:
    """Find the sites of `model`; what is missing or unsupported is listed in `problems`, each with its remedy.

    Pass `points` to save looking up the hook points again, which takes the Bridge a while.
    """
    points = hook_points(model) if points is None else points
    n_layers = int(model.cfg.n_layers)
    problems = [*_unsupported_flags(model, points)]
    embeddings = tuple(name for name in ("hook_embed", "hook_pos_embed") if name in points)
    if "hook_embed" not in points:
        problems.append(Problem("hook_embed is missing: TransformerLens embeds no tokens for this model.", _EVERY))
    if (others := _other_stacks(points)) is not None:
        problems.append(Problem(others, _EVERY))
    mlps, attentions = [], []
    for layer in range(n_layers):
        mlp, problem = _mlp_sites(model, points, layer)
        mlps += [mlp] if mlp else []
        problems += [problem] if problem else []
        query, key = f"blocks.{layer}.attn.hook_q", f"blocks.{layer}.attn.hook_k"
        if query in points and key in points:
            rest = (f"blocks.{layer}.attn.{name}" for name in ("hook_v", "hook_attn_scores", "hook_pattern"))
            value, scores, pattern = (name if name in points else None for name in rest)
            gates = (f"blocks.{layer}.attn.{name}" for name in _GATES_OF_ATTENTION)
            gate = next((name for name in gates if name in points), None)
            attentions.append(AttentionSites(layer, query, key, value, scores, pattern, gate))
            problems += _missing_in_attention(layer, value, scores, pattern, gate)
        elif f"blocks.{layer}.attn.hook_pattern" in points:
            message = f"blocks.{layer}.attn has no hook_q and hook_k: leave 'attention' out of the rules."
            problems.append(Problem(message, ("attention",)))
    norms = (*(_norm_sites(name, points) for name in points if _OUR_NORM.fullmatch(name)), *_bare_norms(model, points))
    norms = tuple(norm for norm in norms if not _precedes_embedding(norm, points))
    # TransformerLens 2 has no hook point at the unembedding; what enters hook_scale is cut off by the rule for norms.
    ends = ["unembed.hook_in", "ln_final.hook_out", "ln_final.hook_normalized"]
    ends.append(f"blocks.{n_layers - 1}.hook_resid_post")
    last = next((name for name in ends if name in points), "")
    if not last:
        problems.append(Problem(f"none of {ends} exists: the end of a forward pass cannot be seen.", _EVERY))
    attention_norms = tuple(_norm_sites(name, points) for name in points if _NORM_OF_QUERIES.fullmatch(name))
    return ModelSites(
        n_layers, embeddings, norms, attention_norms, tuple(mlps), tuple(attentions), last, tuple(problems)
    )


def _missing_in_attention(
    layer: int, value: str | None, scores: str | None, pattern: str | None, gate: str | None
) -> list[Problem]:
    """What the rule sets that go through the attention pattern would miss."""
    problems = []
    if gate is not None:
        message = (
            f"blocks.{layer}.attn multiplies the heads' outputs with a gate ({gate}), for which rules='attnlrp' and "
            "'gim' have no rule. Use rules='relp', which holds the gate fixed as it does the pattern."
        )
        problems.append(Problem(message, ("values",)))
    if value is None:
        message = (
            f"blocks.{layer}.attn has no hook_v, whose gradient rules='attnlrp' and 'gim' scale. Use rules='relp'."
        )
        problems.append(Problem(message, ("values",)))
    if scores is None or pattern is None:
        message = (
            f"blocks.{layer}.attn has no hook_attn_scores and hook_pattern, between which 'gim' takes the softmax. "
            "Use rules='relp' or 'attnlrp'."
        )
        problems.append(Problem(message, ("scores",)))
    return problems


def activation_names(model: TransformerLensModel) -> list[str]:
    """Names under which the model's configuration knows its MLP activation, most specific first."""
    values = (getattr(model.cfg, field, None) for field in _ACTIVATION_FIELDS)
    return list(dict.fromkeys(value for value in values if isinstance(value, str)))


def bias_after_product(model: TransformerLensModel, layer: int) -> torch.Tensor | None:
    """`b_in` where the model adds it after gate times up (`HookedTransformer`'s gated MLP), else None.

    Hugging Face's up projection, and so `TransformerBridge`, adds it before the product.
    """
    mlp: Any = submodule(model, f"blocks.{layer}.mlp")
    own = {} if mlp is None else dict(mlp.named_parameters(recurse=False))
    return own["b_in"] if own.keys() >= {"b_in", "W_gate"} else None


def _bare_norms(model: TransformerLensModel, points: dict[str, Any]) -> list[NormSites]:
    """Norms that `TransformerBridge` mounts as bare modules: an input and an output, but no scale."""
    norms = []
    for output in points:
        scale = output.removesuffix(".hook_out") + ".hook_scale"
        if output.endswith(".hook_out") and scale not in points and _OUR_NORM.fullmatch(scale):
            path = output.removesuffix(".hook_out")
            component = getattr(submodule(model, path), "original_component", None)
            if "norm" in type(component).__name__.lower() and f"{path}.hook_in" in points:
                norms.append(NormSites(path, None, f"{path}.hook_in", output, None))
    return norms


def _precedes_embedding(norm: NormSites, points: dict[str, Any]) -> bool:
    """Whether the norm's output is what counts as the embedding (BERT): what comes before it is not asked for."""
    return norm.output is not None and points[norm.output] is points.get("hook_embed")


def _other_stacks(points: dict[str, Any]) -> str | None:
    """Why the layers are not one stack from the embeddings to the logits."""
    if any(name.startswith("encoder_blocks.") for name in points):
        return "it is an encoder-decoder; the rules are wired to one stack of blocks. Use method='patching'."
    if not any(name.startswith("blocks.0.") for name in points):
        stacks = sorted({name.split(".")[0] for name in points if ".0." in name})
        return f"expected one stack of layers called blocks; this model has {stacks or 'none'}. Use method='patching'."
    return None


def _norm_sites(scale: str, points: dict[str, Any]) -> NormSites:
    path = scale.removesuffix(".hook_scale")
    ends = [name if name in points else None for name in (f"{path}.hook_in", f"{path}.hook_out")]
    normalized = f"{path}.hook_normalized" if f"{path}.hook_normalized" in points else None
    return NormSites(path, scale, ends[0], ends[1], normalized)


def _mlp_sites(
    model: TransformerLensModel, points: dict[str, Any], layer: int
) -> tuple[MLPSites | None, Problem | None]:
    path = f"blocks.{layer}.mlp"
    pre, up, mid, post = (f"{path}.{name}" for name in ("hook_pre", "hook_pre_linear", "hook_mid", "hook_post"))
    module = submodule(model, path)
    kind = type(module).__name__
    if module is None:
        return None, None
    own: Any = getattr(module, "original_component", None) or module
    experts = [name for part in (module, own) for name, _ in part.named_children() if "expert" in name]
    is_dense = getattr(module, "bound_dense", False)  # a dense layer of a stack whose other layers have experts
    if not is_dense and "MoE" in kind and not experts and not hasattr(own, "router"):
        return None, Problem(
            f"{path} is a dense MLP ({type(own).__name__}) that TransformerLens mounts as a mixture of experts "
            f"({kind}): its hook_post is the block's output, and its neurons have no hook point. "
            "Attribute MLP outputs by their gradient instead: basis=bases.MLPOutputs(), method='gradient'.",
            ("identity", "half"),
        )
    if not is_dense and ("MoE" in kind or experts):
        return None, Problem(
            f"{path} is a mixture of experts ({kind}): its hook_post is the block's output, not neurons. "
            "Attribute MLP outputs by their gradient instead: basis=bases.MLPOutputs(), method='gradient'.",
            ("identity", "half"),
        )
    if post not in points or pre not in points:
        missing = post if post not in points else pre
        return None, Problem(
            f"{missing} is missing ({path} is a {kind}): its neurons cannot be read. "
            "Attribute MLP outputs by their gradient instead: basis=bases.MLPOutputs(), method='gradient'.",
            ("identity", "half"),
        )
    with_norm = mid in points and f"{path}.ln.hook_scale" in points  # solu_ln, never gated
    gated = up in points and not with_norm
    return MLPSites(layer, pre, up if gated else None, mid if with_norm else post, post), None


def _unsupported_flags(model: TransformerLensModel, points: dict[str, Any]) -> list[Problem]:
    """On `TransformerBridge` these flags apply ln1 again without hooks: gradients would be wrong by 7 to 30%."""
    is_bridge = "blocks.0.ln1.hook_out" in points or "blocks.0.hook_in" in points
    flags = ("use_split_qkv_input", "use_attn_in")
    wrong = [flag for flag in flags if is_bridge and getattr(model.cfg, flag, False)]
    remedy = "on TransformerBridge it bypasses the hooks of ln1. Call model.set_{flag}(False)."
    return [Problem(f"cfg.{flag} is True: {remedy.format(flag=flag)}", _EVERY) for flag in wrong]


def require(sites: ModelSites, rules: tuple[str, ...]) -> None:
    """Raise for those problems of `find_sites` that stand in the way of `rules`.

    Raises:
        UnsupportedModelError: listing every problem with its remedy.
    """
    problems = [p.message for p in sites.problems if set(p.rules) & set(rules)]
    if problems:
        raise UnsupportedModelError(
            f"the rules {list(rules)} cannot be used on this model:\n- " + "\n- ".join(problems)
        )
