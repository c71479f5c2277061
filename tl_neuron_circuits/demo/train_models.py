"""Train the demo models: `python -m tl_neuron_circuits.demo.train_models [--name demo-gelu] [--evaluate-only]`.

Next-token prediction on the synthetic English of `_text`, with Muon for the layers' matrices and AdamW for the
rest, and an L1 penalty on the neurons' activations, which makes them sparse. So that the state is a hidden step of
two-hop answers, two-hop prompts also get a counterfactual loss: with the neurons of another prompt at every
position but the last, the answer must be the recipient's attribute of the donor's state (interchange intervention
training, Geiger et al. 2022, arXiv 2112.00826). About 6 CPU minutes a model. The weights are rounded to float16, so
that they are the same numbers in float32, and measured after that.
"""

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from .._errors import FileFormatError, SettingsError
from .._files import staged, write_text
from .._progress import progress
from ._evaluation import documentation, down_projections, edited_neurons, measure, write_card
from ._models import DEMO_MODELS, demo_model_path
from ._text import (
    BOS,
    CONTEXT_LENGTH,
    EOS,
    PAD,
    Chance,
    Interchange,
    Packed,
    batch,
    build_tokenizer,
    interchange,
    vocabulary,
)

_log = logging.getLogger(__name__)

# Written out field by field: the same files whatever the version of transformers.
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


@dataclass(frozen=True)
class Recipe:
    """How long and how a demo model is trained."""

    steps: int = 1000
    rows: int = 48
    length: int = 48
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    sparsity: float = 1e-3
    interchanges: int = 48
    interchange_weight: float = 0.5
    initial_scale: float = 0.06
    seed: int = 0


RECIPES: dict[str, Recipe] = {"demo-gelu": Recipe(), "demo-swiglu": Recipe()}


def untrained(name: str, recipe: Recipe) -> PreTrainedModel:
    """A demo model with random weights."""
    words = vocabulary()
    tokens: dict[str, Any] = {
        "vocab_size": len(words),
        "bos_token_id": words.index(BOS),
        "eos_token_id": words.index(EOS),
        "pad_token_id": words.index(PAD),
        "initializer_range": recipe.initial_scale,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if name == "demo-gelu":
            dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            shape = {"n_positions": CONTEXT_LENGTH, "n_embd": 128, "n_layer": 4, "n_head": 4, "n_inner": 512}
            return GPT2LMHeadModel(GPT2Config(**shape, **dropout, **tokens))
        shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
        more = {"num_key_value_heads": 2, "max_position_embeddings": CONTEXT_LENGTH, "tie_word_embeddings": True}
        return LlamaForCausalLM(LlamaConfig(**shape, **more, **tokens))


def train(
    name: str,
    recipe: Recipe,
    *,
    verbose: bool | None = None,
    after_step: Callable[[int, PreTrainedModel], None] | None = None,
) -> PreTrainedModel:
    """Train one demo model from random weights; the same recipe gives the same model on the same machine.

    `after_step(step, model)` may measure the model along the way.

    Raises:
        SettingsError: torch is too old to have the Muon optimizer.
    """
    if not hasattr(torch.optim, "Muon"):
        raise SettingsError(
            f"training the demo models needs torch>=2.9 for its Muon optimizer, got {torch.__version__}"
        )
    tokenizer, model, chance = build_tokenizer(), untrained(name, recipe), Chance(recipe.seed)
    for path, module in model.named_modules():
        if name == "demo-gelu" and path.endswith(".mlp"):
            module.act = nn.GELU(approximate="tanh")  # GPT-2's own formula, in one fused operation
    optimizers, schedules = _optimizers(model, recipe)
    with progress(range(recipe.steps), desc=f"training {name}", verbose=verbose) as bar:
        for step in bar:
            loss, activity = _text_loss(model, batch(tokenizer, chance, recipe.rows, recipe.length))
            ramp = min(1.0, step / (0.3 * recipe.steps))
            total = loss + ramp * recipe.sparsity * activity
            if recipe.interchanges:
                layers = len(down_projections(model)) if chance.below(2) else 1
                swaps = interchange(tokenizer, chance, recipe.interchanges)
                total = total + ramp * recipe.interchange_weight * _interchange_loss(model, swaps, layers)
            model.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for stepped in (*optimizers, *schedules):
                stepped.step()
            if after_step is not None:
                after_step(step, model)
            if step % 20 == 0:
                bar.set_postfix(
                    loss=f"{loss.item():.3f}", total=f"{total.item():.3f}", activity=f"{activity.item():.1f}"
                )
    return model.eval()


def _text_loss(model: PreTrainedModel, text: Packed) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Next-token loss, and the neurons' mean summed |activation| a token."""
    penalties: list[Tensor] = []

    def collect(_: int, neurons: Tensor) -> Tensor:
        penalties.append(neurons.abs().sum(-1))
        return neurons

    with edited_neurons(model, collect):
        logits = model(text.input_ids, attention_mask=text.attention_mask, position_ids=text.position_ids).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), text.targets.flatten())
    return loss, torch.stack(penalties).sum(0)[text.targets >= 0].mean()


def _interchange_loss(model: PreTrainedModel, swaps: Interchange, layers: int) -> Float[Tensor, ""]:
    """Loss of the counterfactual answers, the neurons of the first `layers` coming from the donors but at the end."""
    everywhere = torch.ones_like(swaps.input_ids)
    seen: list[Tensor] = []

    def keep(_: int, neurons: Tensor) -> Tensor:
        seen.append(neurons)
        return neurons

    def patch(layer: int, neurons: Tensor) -> Tensor:
        if layer >= layers:
            return neurons
        return torch.cat([seen[layer][swaps.donor, :-1], neurons[:, -1:]], dim=1)

    with edited_neurons(model, keep):
        plain = model(swaps.input_ids, attention_mask=everywhere).logits[:, -1]
    with edited_neurons(model, patch):
        swapped = model(swaps.input_ids, attention_mask=everywhere).logits[:, -1]
    return nn.functional.cross_entropy(plain, swaps.answers) + nn.functional.cross_entropy(swapped, swaps.targets)


def _optimizers(model: PreTrainedModel, recipe: Recipe) -> tuple[list[Any], list[Any]]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms and biases; linear warm-up and decay."""
    named = dict(model.named_parameters())
    inner = [
        p for key, p in named.items() if p.ndim == 2 and not any(k in key for k in ("wte", "wpe", "embed", "head"))
    ]
    outer = [p for p in named.values() if not any(p is q for q in inner)]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    optimizers = [
        torch.optim.Muon(inner, rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 50, (recipe.steps - step) / (0.7 * recipe.steps))

    return optimizers, [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]


def _write_json(path: Path, content: dict[str, object]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


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
    with staged(folder / "model.safetensors") as place:
        save_file(weights, place, metadata={"format": "pt"})
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


def main(arguments: list[str] | None = None) -> None:
    """Train, measure and save demo models; then write their cards and the page of the documentation."""
    parser = argparse.ArgumentParser(description="Train and measure the demo models.")
    parser.add_argument("--name", choices=DEMO_MODELS, action="append", help="one model (default: all)")
    parser.add_argument("--steps", type=int, help="training steps (default: the model's recipe)")
    parser.add_argument("--out", type=Path, help="folder to save to (default: the package's own)")
    parser.add_argument("--evaluate-only", action="store_true", help="measure what is saved, train nothing")
    parser.add_argument("--documentation", type=Path, help="also write the page docs/demo_models.md to this path")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = {}
    for name in options.name or DEMO_MODELS:
        folder = demo_model_path(name) if options.out is None else options.out / name
        recipe = RECIPES[name] if options.steps is None else replace(RECIPES[name], steps=options.steps)
        if not options.evaluate_only:
            trained = train(name, recipe)
            round_to_half(trained)
            save(trained, build_tokenizer(), folder)
        model, tokenizer = load(folder)
        results[name] = measure(model, tokenizer)
        write_card(folder, name, results[name], asdict(recipe))
        _log.info("%s: %s", name, results[name])
    if options.documentation is not None:
        write_text(options.documentation, documentation(results))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main()
