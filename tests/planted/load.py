"""Planted circuits as models, with their truth, prompts and a metric; made by `tests.planted.train`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.families import HookedTransformer, HookedTransformerConfig
from tests.planted.circuits import N_CASES, N_TOKENS, PlantedCase, planted_case, prompts
from tl_neuron_circuits.components import GroundTruth
from tl_neuron_circuits.tasks import TokenizedPairs
from tl_neuron_circuits.tasks._tokenized import Batch

FOLDER = Path(__file__).parent / "models"


@dataclass(frozen=True)
class Planted:
    """A model whose circuit is known."""

    case: PlantedCase
    model: Any
    truth: GroundTruth
    accuracy: float

    def pairs(self, n: int, seed: int) -> TokenizedPairs:
        """Random prompts, corrupted into other random prompts. Answers go through all output tokens in turn."""
        tokens = prompts(2 * n, 20_000 + seed)
        answer = torch.arange(n) % (len(self.case.chains) * N_TOKENS)
        return TokenizedPairs.from_tokens(tokens[:n], answer, tokens[n:])

    def metric(self, pairs: TokenizedPairs) -> "RightAnswers":
        """Log-probability of the right answers to all questions, of these pairs."""
        return RightAnswers(self.case.answers(torch.stack(list(pairs.clean))))


@dataclass(frozen=True, eq=False)
class RightAnswers:
    """Sum over questions of the log-probability of the right answer among that question's outputs."""

    answers: Tensor

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        final = logits[torch.arange(len(batch)), batch.position].unflatten(1, (-1, N_TOKENS)).log_softmax(-1)
        return final.gather(2, self.answers[batch.index][:, :, None]).sum((1, 2))


def planted_seeds() -> list[int]:
    """The cases that were trained."""
    return [seed for seed in range(N_CASES) if (FOLDER / f"{planted_case(seed).name}.safetensors").exists()]


def load_planted(seed: int) -> Planted:
    """Load a case; skips where TransformerLens has no HookedTransformer."""
    if HookedTransformer is None or HookedTransformerConfig is None:
        pytest.skip("planted circuits are stored as HookedTransformer, which this TransformerLens lacks")
    case = planted_case(seed)
    notes = json.loads((FOLDER / f"{case.name}.json").read_text(encoding="utf-8"))
    model = HookedTransformer(HookedTransformerConfig(**notes["config"], device="cpu"))
    model.load_state_dict(safetensors.torch.load_file(FOLDER / f"{case.name}.safetensors"), strict=False)
    truth = GroundTruth(case.name, frozenset(case.edges), frozenset(case.possible))
    return Planted(case, model.eval(), truth, notes["accuracy"])
