"""Read a Hugging Face model, one layout at a time."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tests.replicas._architecture import Architecture, Replica


@dataclass
class _Reader:
    """Copies tensors out of a state dict into HookedTransformer's names and shapes."""

    state: dict[str, Tensor]
    weights: dict[str, Tensor]
    n_heads: int
    norm_offset: float = 0.0

    def copy(self, target: str, source: str, transpose: bool = False) -> None:
        if source in self.state:
            value = self.state[source]
            self.weights[target] = (value.T if transpose else value).contiguous()

    def norm(self, target: str, source: str) -> None:
        self.weights[f"{target}.w"] = self.state[f"{source}.weight"] + self.norm_offset
        self.copy(f"{target}.b", f"{source}.bias")

    def linear(self, weight: str, bias: str, source: str) -> None:
        """Read an nn.Linear, whose weight is [out, in]."""
        self.copy(weight, f"{source}.weight", transpose=True)
        self.copy(bias, f"{source}.bias")

    def heads(self, target: str, letter: str, weight: Tensor, bias: Tensor | None, n_heads: int) -> None:
        """Store rows [head * d_head, d_model] of an nn.Linear as one matrix a head."""
        self.weights[f"{target}.W_{letter}"] = weight.unflatten(0, (n_heads, -1)).transpose(1, 2).contiguous()
        if bias is not None:
            self.weights[f"{target}.b_{letter}"] = bias.unflatten(0, (n_heads, -1)).contiguous()

    def separate_qkv(self, target: str, source: str, n_kv_heads: int) -> None:
        for letter in "QKV":
            name = f"{source}.{letter.lower()}_proj"
            count = self.n_heads if letter == "Q" else n_kv_heads
            self.heads(target, letter, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), count)

    def fused_qkv(self, target: str, source: str) -> None:
        """Read rows ordered [head, (q, k, v), d_head] (GPT-NeoX, Bloom)."""
        weight, bias = self.state[f"{source}.weight"], self.state[f"{source}.bias"]
        for i, letter in enumerate("QKV"):
            rows = weight.unflatten(0, (self.n_heads, 3, -1))[:, i].flatten(0, 1)
            self.heads(target, letter, rows, bias.unflatten(0, (self.n_heads, 3, -1))[:, i].flatten(), self.n_heads)

    def output(self, target: str, source: str) -> None:
        """Read the attention's output projection."""
        weight = self.state[f"{source}.weight"].T
        self.weights[f"{target}.W_O"] = weight.unflatten(0, (self.n_heads, -1)).contiguous()
        self.copy(f"{target}.b_O", f"{source}.bias")

    def mlp(self, target: str, source_in: str, source_out: str) -> None:
        self.linear(f"{target}.W_in", f"{target}.b_in", source_in)
        self.linear(f"{target}.W_out", f"{target}.b_out", source_out)

    def shared_norm(self, first: str, second: str) -> None:
        """Let attention and MLP read the same norm: the same tensors under two names, counted once."""
        for part in ("w", "b"):
            self.weights[f"{second}.{part}"] = self.weights[f"{first}.{part}"]


def from_hugging_face(model: Any) -> Replica:
    """Copy the weights of a Hugging Face model in float64, and its settings."""
    config = model.config
    state = {name: value.detach().double().clone() for name, value in model.state_dict().items()}
    reader = _Reader(state, {}, config.num_attention_heads)
    architecture = _LAYOUTS[type(model).__name__](reader, config)
    reader.copy("W_U", "lm_head.weight", transpose=True)
    reader.copy("b_U", "lm_head.bias")
    return Replica(architecture, reader.weights)


def _settings(config: Any, **more: Any) -> Architecture:
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    defaults = {
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": heads,
        "norm": "layer",
        "eps": getattr(config, "layer_norm_epsilon", 1e-5),
        "score_scale": (d_head**-0.5,) * layers,
    }
    return Architecture(**(defaults | more))


def _rotary(config: Any, fraction: float = 1.0) -> dict[str, Any]:
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    base = config.rope_parameters["rope_theta"]
    return {"rotary_dim": int(d_head * fraction), "rotary_base": (float(base),) * config.num_hidden_layers}


def _gpt2(r: _Reader, config: Any) -> Architecture:
    """GPT-2 stores every matrix as [in, out], and q, k, v one after the other."""
    r.copy("W_E", "transformer.wte.weight")
    r.copy("W_pos", "transformer.wpe.weight")
    r.norm("ln_final", "transformer.ln_f")
    for layer in range(config.n_layer):
        block, h = f"blocks.{layer}", f"transformer.h.{layer}"
        r.norm(f"{block}.ln1", f"{h}.ln_1")
        r.norm(f"{block}.ln2", f"{h}.ln_2")
        weights = r.state[f"{h}.attn.c_attn.weight"].T.chunk(3)
        biases = r.state[f"{h}.attn.c_attn.bias"].chunk(3)
        for letter, weight, bias in zip("QKV", weights, biases, strict=True):
            r.heads(f"{block}.attn", letter, weight, bias, r.n_heads)
        out = r.state[f"{h}.attn.c_proj.weight"]
        r.weights[f"{block}.attn.W_O"] = out.unflatten(0, (r.n_heads, -1))
        r.copy(f"{block}.attn.b_O", f"{h}.attn.c_proj.bias")
        for target, source in (("in", "c_fc"), ("out", "c_proj")):
            r.copy(f"{block}.mlp.W_{target}", f"{h}.mlp.{source}.weight")
            r.copy(f"{block}.mlp.b_{target}", f"{h}.mlp.{source}.bias")
    return _settings(config, activation="gelu_new")


def _gpt_neox(r: _Reader, config: Any) -> Architecture:
    r.copy("W_E", "gpt_neox.embed_in.weight")
    r.norm("ln_final", "gpt_neox.final_layer_norm")
    for layer in range(config.num_hidden_layers):
        block, h = f"blocks.{layer}", f"gpt_neox.layers.{layer}"
        r.norm(f"{block}.ln1", f"{h}.input_layernorm")
        r.norm(f"{block}.ln2", f"{h}.post_attention_layernorm")
        r.fused_qkv(f"{block}.attn", f"{h}.attention.query_key_value")
        r.output(f"{block}.attn", f"{h}.attention.dense")
        r.mlp(f"{block}.mlp", f"{h}.mlp.dense_h_to_4h", f"{h}.mlp.dense_4h_to_h")
    rotary = _rotary(config, config.rope_parameters["partial_rotary_factor"])
    return _settings(config, activation="gelu", eps=config.layer_norm_eps, parallel=True, **rotary)


def _llama_like(r: _Reader, config: Any) -> Architecture:
    """Llama, Mistral, Qwen2, Qwen3, Gemma 2 and 3."""
    gemma = config.model_type.startswith("gemma")
    r.norm_offset = 1.0 if gemma else 0.0
    r.copy("W_E", "model.embed_tokens.weight")
    r.norm("ln_final", "model.norm")
    mlp_norm = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
    for layer in range(config.num_hidden_layers):
        block, h = f"blocks.{layer}", f"model.layers.{layer}"
        r.norm(f"{block}.ln1", f"{h}.input_layernorm")
        r.norm(f"{block}.ln2", f"{h}.{mlp_norm}")
        if gemma:
            r.norm(f"{block}.ln1_post", f"{h}.post_attention_layernorm")
            r.norm(f"{block}.ln2_post", f"{h}.post_feedforward_layernorm")
        r.separate_qkv(f"{block}.attn", f"{h}.self_attn", config.num_key_value_heads)
        r.output(f"{block}.attn", f"{h}.self_attn.o_proj")
        for norm in ("q_norm", "k_norm"):
            if f"{h}.self_attn.{norm}.weight" in r.state:
                r.norm(f"{block}.attn.{norm}", f"{h}.self_attn.{norm}")
        r.linear(f"{block}.mlp.W_gate", f"{block}.mlp.b_gate", f"{h}.mlp.gate_proj")
        r.linear(f"{block}.mlp.W_in", f"{block}.mlp.b_up", f"{h}.mlp.up_proj")
        r.linear(f"{block}.mlp.W_out", f"{block}.mlp.b_out", f"{h}.mlp.down_proj")
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # Mistral: every layer slides
        kinds = ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]
        kinds = kinds * config.num_hidden_layers
    rope = config.rope_parameters
    bases = [rope["rope_theta"] if "rope_theta" in rope else rope[kind]["rope_theta"] for kind in kinds]
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scale = getattr(config, "query_pre_attn_scalar", d_head) ** -0.5
    return Architecture(
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        activation=config.hidden_activation if gemma else config.hidden_act,
        norm="rms",
        eps=config.rms_norm_eps,
        score_scale=(scale,) * config.num_hidden_layers,
        gated=True,
        post_norms=gemma,
        qk_norm="blocks.0.attn.q_norm.w" in r.weights,
        rotary_dim=d_head,
        rotary_base=tuple(float(base) for base in bases),
        windows=tuple(config.sliding_window if kind == "sliding_attention" else None for kind in kinds),
        score_cap=getattr(config, "attn_logit_softcapping", None),
        logit_cap=getattr(config, "final_logit_softcapping", None),
        embedding_scale=config.hidden_size**0.5 if gemma else 1.0,
    )


def _opt(r: _Reader, config: Any) -> Architecture:
    """OPT keeps two unused positions in front."""
    r.copy("W_E", "model.decoder.embed_tokens.weight")
    r.weights["W_pos"] = r.state["model.decoder.embed_positions.weight"][2:]
    r.norm("ln_final", "model.decoder.final_layer_norm")
    for layer in range(config.num_hidden_layers):
        block, h = f"blocks.{layer}", f"model.decoder.layers.{layer}"
        r.norm(f"{block}.ln1", f"{h}.self_attn_layer_norm")
        r.norm(f"{block}.ln2", f"{h}.final_layer_norm")
        r.separate_qkv(f"{block}.attn", f"{h}.self_attn", r.n_heads)
        r.output(f"{block}.attn", f"{h}.self_attn.out_proj")
        r.mlp(f"{block}.mlp", f"{h}.fc1", f"{h}.fc2")
    return _settings(config, activation="relu")


def _gptj(r: _Reader, config: Any) -> Architecture:
    r.copy("W_E", "transformer.wte.weight")
    r.norm("ln_final", "transformer.ln_f")
    for layer in range(config.n_layer):
        block, h = f"blocks.{layer}", f"transformer.h.{layer}"
        r.norm(f"{block}.ln1", f"{h}.ln_1")
        r.shared_norm(f"{block}.ln1", f"{block}.ln2")
        r.separate_qkv(f"{block}.attn", f"{h}.attn", r.n_heads)
        r.output(f"{block}.attn", f"{h}.attn.out_proj")
        r.mlp(f"{block}.mlp", f"{h}.mlp.fc_in", f"{h}.mlp.fc_out")
    return _settings(
        config,
        activation="gelu_new",
        parallel=True,
        rotary_dim=config.rotary_dim,
        rotary_base=(10000.0,) * config.n_layer,
        rotary_adjacent=True,
    )


def _phi(r: _Reader, config: Any) -> Architecture:
    r.copy("W_E", "model.embed_tokens.weight")
    r.norm("ln_final", "model.final_layernorm")
    for layer in range(config.num_hidden_layers):
        block, h = f"blocks.{layer}", f"model.layers.{layer}"
        r.norm(f"{block}.ln1", f"{h}.input_layernorm")
        r.shared_norm(f"{block}.ln1", f"{block}.ln2")
        r.separate_qkv(f"{block}.attn", f"{h}.self_attn", r.n_heads)
        r.output(f"{block}.attn", f"{h}.self_attn.dense")
        r.mlp(f"{block}.mlp", f"{h}.mlp.fc1", f"{h}.mlp.fc2")
    rotary = _rotary(config, config.rope_parameters["partial_rotary_factor"])
    return _settings(config, activation="gelu_new", eps=config.layer_norm_eps, parallel=True, **rotary)


def _falcon(r: _Reader, config: Any) -> Architecture:
    """Falcon 7B's form: all query heads, then one key head and one value head."""
    assert config.multi_query and config.parallel_attn and not config.new_decoder_architecture
    r.copy("W_E", "transformer.word_embeddings.weight")
    r.norm("ln_final", "transformer.ln_f")
    for layer in range(config.num_hidden_layers):
        block, h = f"blocks.{layer}", f"transformer.h.{layer}"
        r.norm(f"{block}.ln1", f"{h}.input_layernorm")
        r.shared_norm(f"{block}.ln1", f"{block}.ln2")
        weight = r.state[f"{h}.self_attention.query_key_value.weight"].unflatten(0, (r.n_heads + 2, -1))
        bias = r.state[f"{h}.self_attention.query_key_value.bias"].unflatten(0, (r.n_heads + 2, -1))
        for letter, rows in (("Q", slice(0, -2)), ("K", slice(-2, -1)), ("V", slice(-1, None))):
            count = weight[rows].shape[0]
            r.heads(f"{block}.attn", letter, weight[rows].flatten(0, 1), bias[rows].flatten(), count)
        r.output(f"{block}.attn", f"{h}.self_attention.dense")
        r.mlp(f"{block}.mlp", f"{h}.mlp.dense_h_to_4h", f"{h}.mlp.dense_4h_to_h")
    return _settings(config, activation="gelu", n_kv_heads=1, parallel=True, **_rotary(config))


def _bloom(r: _Reader, config: Any) -> Architecture:
    r.copy("W_E", "transformer.word_embeddings.weight")
    r.norm("embed.ln", "transformer.word_embeddings_layernorm")
    r.norm("ln_final", "transformer.ln_f")
    for layer in range(config.n_layer):
        block, h = f"blocks.{layer}", f"transformer.h.{layer}"
        r.norm(f"{block}.ln1", f"{h}.input_layernorm")
        r.norm(f"{block}.ln2", f"{h}.post_attention_layernorm")
        r.fused_qkv(f"{block}.attn", f"{h}.self_attention.query_key_value")
        r.output(f"{block}.attn", f"{h}.self_attention.dense")
        r.mlp(f"{block}.mlp", f"{h}.mlp.dense_h_to_4h", f"{h}.mlp.dense_4h_to_h")
    return _settings(config, activation="gelu_fast", alibi=True, embedding_norm=True)


_LAYOUTS = {
    "GPT2LMHeadModel": _gpt2,
    "GPTNeoXForCausalLM": _gpt_neox,
    "LlamaForCausalLM": _llama_like,
    "MistralForCausalLM": _llama_like,
    "Qwen2ForCausalLM": _llama_like,
    "Qwen3ForCausalLM": _llama_like,
    "Gemma2ForCausalLM": _llama_like,
    "Gemma3ForCausalLM": _llama_like,
    "OPTForCausalLM": _opt,
    "GPTJForCausalLM": _gptj,
    "PhiForCausalLM": _phi,
    "FalconForCausalLM": _falcon,
    "BloomForCausalLM": _bloom,
}
