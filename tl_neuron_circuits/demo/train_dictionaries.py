"""Train the demo dictionaries: `python -m tl_neuron_circuits.demo.train_dictionaries [--kind sae] [--folder ...]`.

SAEs and transcoders of `demo-gelu` on documents sampled from the generator of the model's own training text, with seeds
of their own. Weights are rounded to float16, measured on held-out documents after that, and written where
`load_demo_dictionaries` finds them, with the measurements in `fidelity.json`.
"""

import argparse
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from .._files import write_text
from ..bases._dictionary import Dictionary
from ..bases._dictionary_files import ID, load_dictionary, save_dictionary
from ..transcoders._config import TrainingConfig
from ..transcoders._fidelity import Fidelity, fidelity
from ..transcoders._train import train
from ._dictionaries import DEMO_DICTIONARIES, demo_dictionaries_path
from ._models import demo_model_path, load_demo_model
from ._text import Chance, sentence

_log = logging.getLogger(__name__)

MODEL = "demo-gelu"
TRAINING_DOCUMENTS, TRAINING_SEED = 20_000, 101
HELD_OUT_DOCUMENTS, HELD_OUT_SEED = 600, 102
CONFIG = TrainingConfig(
    d_dict=768,
    k=12,
    steps=1200,
    batch_size=512,
    learning_rate=4e-3,
    buffer_size=16384,
    forward_rows=64,
    dead_after=50_000,
    log_every=100,
)
"""Of both kinds, except `target` and the padding."""


def demo_documents(model: Any, documents: int, seed: int) -> Int[Tensor, "prompt pos"]:
    """Documents of one or two sentences as the demo models see them in training, padded on the right."""
    chance = Chance(seed)
    texts = [" ".join(sentence(chance) for _ in range(1 + (chance.below(4) == 0))) for _ in range(documents)]
    return model.to_tokens(texts)


def train_demo(kind: str, config: TrainingConfig, folder: Path, *, verbose: bool | None = None) -> Fidelity:
    """Train, round, write and measure the dictionaries of one kind."""
    model = load_demo_model(MODEL)
    config = config.replace(target=kind, ignore_tokens=(int(model.tokenizer.pad_token_id),))
    tokens = demo_documents(model, TRAINING_DOCUMENTS, TRAINING_SEED)
    report = train(model, tokens, config, verbose=verbose)
    _log.info("%r", report)
    written = [_write(dictionary, folder / f"layer-{dictionary.layer:02d}") for dictionary in report.dictionaries]
    held_out = demo_documents(model, HELD_OUT_DOCUMENTS, HELD_OUT_SEED)
    measured = fidelity(
        model, written, held_out, fit_tokens=tokens[:6000], ignore_tokens=config.ignore_tokens, forward_rows=100
    )
    notes = {
        "model_sha256": model_hash(),
        "wall_seconds": {name: round(value, 1) for name, value in report.seconds.items()},
        "positions": report.positions,
        "model_loss": measured.model_loss,
        "held_out_tokens": measured.tokens,
        "table": json.loads(measured.table.to_json(orient="records", double_precision=6)),
    }
    write_text(folder / "fidelity.json", json.dumps(notes, indent=1) + "\n")
    return measured


def model_hash() -> str:
    """SHA-256 of the demo model's weights, to tell whether dictionaries belong to them."""
    return hashlib.sha256((demo_model_path(MODEL) / "model.safetensors").read_bytes()).hexdigest()


def _write(dictionary: Dictionary, path: Path) -> Dictionary:
    """Store in float16 what is loaded as float32, and load it."""
    save_dictionary(dictionary.to(dtype=torch.float16), path, overwrite=True)
    file = path / "cfg.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["metadata"].pop(ID)  # the settings are no longer those that the weights' header has
    write_text(file, json.dumps(settings | {"dtype": "float32"}, indent=1) + "\n")
    return load_dictionary(path)


def main() -> None:
    """Train what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=DEMO_DICTIONARIES, action="append", help="both unless given")
    parser.add_argument("--folder", type=Path, help="where to write; inside the package unless given")
    parser.add_argument("--steps", type=int, default=CONFIG.steps)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    for kind in arguments.kind or DEMO_DICTIONARIES:
        folder = arguments.folder / kind if arguments.folder else demo_dictionaries_path(kind)
        measured = train_demo(kind, CONFIG.replace(steps=arguments.steps), folder)
        _log.info("%r\n%s", measured, measured.table.to_string(index=False))


if __name__ == "__main__":
    main()
