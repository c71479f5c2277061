"""Read a HookedTransformer."""

from typing import Any

from tests.replicas._architecture import Architecture, Replica


def from_hooked_transformer(model: Any) -> Replica:
    """Copy the weights of a HookedTransformer in float64, and its settings."""
    cfg = model.cfg
    kind = cfg.normalization_type
    # Grouped-query attention stores its unrepeated weights under names with an underscore.
    weights = {
        name.replace("._W_", ".W_").replace("._b_", ".b_"): value.detach().double().clone()
        for name, value in model.named_parameters()
    }
    if cfg.positional_embedding_type != "standard":
        weights.pop("pos_embed.W_pos", None)  # with ALiBi it exists and is not used
    rotary = cfg.positional_embedding_type == "rotary"
    scale = tuple(
        (1 / cfg.attn_scale if cfg.use_attn_scale else 1.0) / (layer + 1 if cfg.scale_attn_by_inverse_layer_idx else 1)
        for layer in range(cfg.n_layers)
    )
    windows = tuple(
        cfg.window_size if cfg.use_local_attn and cfg.attn_types[layer] == "local" else None
        for layer in range(cfg.n_layers)
    )
    architecture = Architecture(
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
        activation=cfg.act_fn,
        norm=None if kind is None else "rms" if kind.startswith("RMS") else "layer",
        eps=cfg.eps,
        score_scale=scale,
        parallel=cfg.parallel_attn_mlp,
        gated=cfg.gated_mlp,
        post_norms=cfg.use_normalization_before_and_after,
        activation_norm=cfg.act_fn.endswith("_ln"),
        qk_norm=cfg.use_qk_norm,
        rotary_dim=cfg.rotary_dim if rotary else 0,
        rotary_base=(float(cfg.rotary_base),) * cfg.n_layers,
        rotary_adjacent=cfg.rotary_adjacent_pairs,
        alibi=cfg.positional_embedding_type == "alibi",
        windows=windows,
        causal=cfg.attention_dir == "causal",
        score_cap=cfg.attn_scores_soft_cap if cfg.attn_scores_soft_cap > 0 else None,
        logit_cap=cfg.output_logits_soft_cap if cfg.output_logits_soft_cap > 0 else None,
        embedding_norm=cfg.post_embedding_ln,
    )
    weights = {_plain(name): value for name, value in weights.items()}
    return Replica(architecture, weights)


def _plain(name: str) -> str:
    tables = ("embed.W_E", "pos_embed.W_pos", "unembed.W_U", "unembed.b_U")
    return name.rsplit(".", 1)[-1] if name in tables else name
