"""Demo models as Hugging Face directories, written the same way whatever the version of transformers."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from .._errors import FileFormatError
from ._tokenizer import CONTEXT_LENGTH

_CONFIG_FIELDS = {
    "gpt2": (
        "vocab_size n_positions n_embd n_layer n_head n_inner activation_function layer_norm_epsilon resid_pdrop "
        "embd_pdrop attn_pdrop tie_word_embeddings bos_token_id eos_token_id pad_token_id"
    ),
    "llama": (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "rms_norm_eps max_position_embeddings tie_word_embeddings attention_bias mlp_bias bos_token_id eos_token_id "
        "pad_token_id"
    ),
}


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


@torch.no_grad()
def round_to_half(model: PreTrainedModel) -> None:
    """Round every weight to a float16 number, in place, so that saving in float16 loses nothing."""
    for weight in model.parameters():
        weight.copy_(weight.half().float())


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write `config.json`, `model.safetensors` (float16), `tokenizer.json` and `tokenizer_config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = model.config.model_type
    fields = {name: getattr(model.config, name) for name in _CONFIG_FIELDS[kind].split()}
    extra = {"rope_theta": 10000.0} if kind == "llama" else {}
    head = {"architectures": [type(model).__name__], "model_type": kind, "dtype": "float32", "torch_dtype": "float32"}
    _write_json(folder / "config.json", {**head, **fields, **extra})
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    weights.pop("lm_head.weight")  # tied to the embedding
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {f"{role}_token": getattr(tokenizer, f"{role}_token") for role in ("bos", "eos", "pad", "unk")}
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
        "add_bos_token": True,
        "padding_side": "right",
        "model_max_length": CONTEXT_LENGTH,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The plain Hugging Face model, in float32 and ready to evaluate, and its tokenizer.

    Raises:
        FileFormatError: there is no saved model in the folder.
    """
    if not (folder / "model.safetensors").is_file():
        raise FileFormatError(f"expected a saved demo model in {folder}, found none: train it first")
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    return model, AutoTokenizer.from_pretrained(folder)
