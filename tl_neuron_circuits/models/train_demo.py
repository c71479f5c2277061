"""Train the demo models: `python -m tl_neuron_circuits.models.train_demo [--name demo-gelu] [--evaluate-only]`.

Ordinary next-token prediction on the synthetic English of `_text`, with Muon for the layers' matrices and AdamW for the
rest, and an L1 penalty on the neurons' activations, which makes them sparse. Under 20 CPU minutes a model on one core.
The weights are rounded to float16, so that they are the same numbers in float32, and measured after that.
"""

import argparse
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from .._errors import SettingsError
from ._demo import DEMO_MODELS, demo_model_path
from ._demo_evaluation import edited_neurons
from ._demo_files import load, round_to_half, save
from ._demo_report import documentation, measure, write_card
from ._text import Chance, batch
from ._tokenizer import BOS, CONTEXT_LENGTH, EOS, PAD, build_tokenizer, vocabulary

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How long and how a demo model is trained."""

    steps: int = 1500
    rows: int = 64
    length: int = 40
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    sparsity: float = 3e-4
    seed: int = 0


RECIPES: dict[str, Recipe] = {"demo-gelu": Recipe(), "demo-swiglu": Recipe()}


def untrained(name: str, seed: int = 0) -> PreTrainedModel:
    """A demo model with random weights."""
    words = vocabulary()
    tokens: dict[str, Any] = {
        "vocab_size": len(words),
        "bos_token_id": words.index(BOS),
        "eos_token_id": words.index(EOS),
        "pad_token_id": words.index(PAD),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "demo-gelu":
            dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            shape = {"n_positions": CONTEXT_LENGTH, "n_embd": 128, "n_layer": 4, "n_head": 4, "n_inner": 512}
            return GPT2LMHeadModel(GPT2Config(**shape, **dropout, **tokens))
        shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
        more = {"num_key_value_heads": 2, "max_position_embeddings": CONTEXT_LENGTH, "tie_word_embeddings": True}
        return LlamaForCausalLM(LlamaConfig(**shape, **more, **tokens))


def train(name: str, recipe: Recipe, *, progress: bool = True) -> PreTrainedModel:
    """Train one demo model from random weights; the same recipe gives the same model on the same machine.

    Raises:
        SettingsError: torch is too old to have the Muon optimizer.
    """
    if not hasattr(torch.optim, "Muon"):
        raise SettingsError(
            f"training the demo models needs torch>=2.9 for its Muon optimizer, got {torch.__version__}"
        )
    tokenizer, model, chance = build_tokenizer(), untrained(name, recipe.seed), Chance(recipe.seed)
    for block in model.transformer.h if name == "demo-gelu" else ():
        block.mlp.act = nn.GELU(approximate="tanh")  # GPT-2's own formula, in one fused operation
    optimizers, schedules = _optimizers(model, recipe)
    penalties: dict[int, Tensor] = {}

    def collect(layer: int, neurons: Tensor) -> Tensor:
        penalties[layer] = neurons.abs().sum(-1)
        return neurons

    with tqdm(range(recipe.steps), desc=f"training {name}", disable=not progress) as bar:
        for step in bar:
            text = batch(tokenizer, chance, recipe.rows, recipe.length)
            with edited_neurons(model, collect):
                logits = model(
                    text.input_ids, attention_mask=text.attention_mask, position_ids=text.position_ids
                ).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), text.targets.flatten())
            weight = recipe.sparsity * min(1.0, step / (0.3 * recipe.steps))
            activity = torch.stack([*penalties.values()]).sum(0)[text.input_ids != tokenizer.pad_token_id].mean()
            model.zero_grad()
            (loss + weight * activity).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for stepped in (*optimizers, *schedules):
                stepped.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{float(loss):.3f}", activity=f"{float(activity):.1f}")
    return model.eval()


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
        options.documentation.write_text(documentation(results))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main()
