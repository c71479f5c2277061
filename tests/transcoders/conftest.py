"""A tiny random model, its tokens, settings that train in under a second; the demo model with its transcoders."""

from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import model_cases, random_tokens
from tl_neuron_circuits import load_demo_dictionaries, load_demo_model
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


@pytest.fixture(scope="package")
def demo() -> tuple[Any, Any]:
    """Return the demo model and its transcoders."""
    if version("transformer-lens").startswith("2."):
        pytest.skip("the demo transcoders read the norm before its weight, where TransformerLens 2 has no hook point")
    return load_demo_model(), load_demo_dictionaries("transcoder")


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
