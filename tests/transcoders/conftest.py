"""A tiny random model, tokens for it, and settings that train in under a second."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import model_cases, random_tokens
from tl_neuron_circuits.transcoders import TrainingConfig

SMALL = TrainingConfig(
    d_dict=24,
    k=4,
    steps=24,
    batch_size=32,
    buffer_size=128,
    forward_rows=4,
    dead_after=200,
    auxiliary_k=4,
    resample_every=5,
    log_every=5,
    checkpoint_every=9,
)


@pytest.fixture(params=model_cases("gpt2"), ids=lambda case: case.id)
def tiny(request: pytest.FixtureRequest) -> Any:
    """Return a random GPT-2 of two layers, once per model class."""
    return request.param.build(torch.float32)


@pytest.fixture
def one_tiny() -> Any:
    """Return a random GPT-2 of two layers in one model class, where both would test the same code."""
    return model_cases("gpt2")[-1].build(torch.float32)


@pytest.fixture
def tokens(one_tiny: Any) -> Tensor:
    """Return random prompts."""
    return random_tokens(one_tiny, batch=40, pos=12)
