"""Every task fits the demo models' tokenizer: single-token answers, aligned pairs, one length a phrasing."""

import functools
from typing import Any

import pytest
import torch

from tests.loops import for_each
from tests.real_models import BACKENDS
from tests.tasks.test_task_files import TASKS, make
from tests.tasks.tiny_tokenizers import model_with
from tl_neuron_circuits.demo import _states as states
from tl_neuron_circuits.demo import capitals, load_demo_model
from tl_neuron_circuits.demo._models import demo_model_path
from tl_neuron_circuits.demo._text import build_tokenizer
from tl_neuron_circuits.tasks import ProbabilityDifference, greater_than, logit_difference, tokenize
from tl_neuron_circuits.tasks._metrics import measure

FITTING = [name for name in TASKS if not name.startswith("real")]  # those with words that the demo models know


@pytest.fixture(scope="module")
def demo_tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a tiny random model with the demo models' tokenizer."""
    folder = tmp_path_factory.mktemp("demo_tokenizer")
    build_tokenizer().save_pretrained(folder)
    return model_with(type(build_tokenizer()).from_pretrained(folder), BACKENDS[-1], n_ctx=64)


@for_each("name", FITTING)
def test_every_pair_fits(demo_tokenizer_model: Any, name: str) -> None:
    tokens = tokenize(demo_tokenizer_model, make(name, n=min(TASKS[name][2], 200)))
    if "phrasing" not in TASKS[name][1]:
        assert len(set(tokens.lengths)) == 1, "kept positions need one token length"


@for_each("attribute", states.ATTRIBUTES)
def test_every_attribute_can_be_asked(demo_tokenizer_model: Any, attribute: str) -> None:
    assert len(tokenize(demo_tokenizer_model, capitals(100, attribute=attribute))) == 100


def test_years_are_one_token_each(demo_tokenizer_model: Any) -> None:
    metric = ProbabilityDifference.for_years(demo_tokenizer_model, greater_than(2))
    assert len(set(metric.tokens.tolist())) == 100


loaded = functools.cache(load_demo_model)  # once for all tasks


@for_each("demo", ["demo-gelu", "demo-swiglu"])
@for_each("name", FITTING)
def test_the_demo_models_prefer_the_answer(demo: str, name: str) -> None:
    if not demo_model_path(demo).is_dir():
        pytest.skip(f"the weights of {demo} are not in this checkout: run tl_neuron_circuits.demo.train_models")
    model = loaded(demo)
    pairs = make(name, n=min(TASKS[name][2], 200))
    metric = ProbabilityDifference.for_years(model, pairs) if name == "greater_than" else logit_difference
    with torch.no_grad():
        values = torch.cat([measure(metric, model(b.clean), b) for b in tokenize(model, pairs).batches(100)])
    assert (values > 0).float().mean() >= 0.95
