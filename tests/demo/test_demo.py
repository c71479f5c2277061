"""The demo models: the same logits on every model class, what their cards say, and the state as a hidden step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.loops import for_each
from tests.real_models import BACKENDS
from tl_neuron_circuits import NeuronCircuitsError, load_demo_model
from tl_neuron_circuits._errors import FileFormatError, SettingsError
from tl_neuron_circuits.demo import _evaluation as evaluation
from tl_neuron_circuits.demo import _states as states
from tl_neuron_circuits.demo._models import DEMO_MODELS, demo_model_path
from tl_neuron_circuits.demo.train_models import load

PROMPTS = [
    "The capital of the state containing Dallas is",
    "When John and Mary went to the store, John gave a drink to",
    "The war lasted from the year 1732 to the year 17",
]


@pytest.fixture(scope="module", params=DEMO_MODELS)
def name(request: pytest.FixtureRequest) -> str:
    """Return each demo model's name."""
    return request.param


@pytest.fixture(scope="module")
def plain(name: str) -> tuple[Any, Any]:
    """Return the Hugging Face model and tokenizer."""
    return load(demo_model_path(name))


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest, name: str) -> Any:
    """Return each demo model on each installed model class."""
    return load_demo_model(name, request.param)


def test_logits_equal_those_of_hugging_face(model: Any, plain: tuple[Any, Any]) -> None:
    source, tokenizer = plain
    for prompt in PROMPTS:
        with torch.no_grad():
            expected = source(torch.tensor(tokenizer([prompt])["input_ids"])).logits
            difference = (model(prompt) - expected).abs().max()
        assert difference <= 2e-6 * expected.abs().max()  # float32's rounding: the largest logit is about 20


@pytest.mark.skipif(len(BACKENDS) < 2, reason="this TransformerLens has one model class")
@pytest.mark.parametrize(("demo", "tolerance"), [("demo-gelu", 1e-12), ("demo-swiglu", 1e-5)])
def test_logits_are_equal_on_both_classes_in_float64(demo: str, tolerance: float) -> None:
    """Hugging Face computes RMSNorm in float32 whatever the model's dtype, hence the second tolerance."""
    first, second = (load_demo_model(demo, backend, dtype=torch.float64) for backend in BACKENDS)
    for prompt in PROMPTS:
        with torch.no_grad():
            assert torch.allclose(first(prompt), second(prompt), rtol=0, atol=tolerance)


@pytest.mark.skipif(len(BACKENDS) < 2, reason="this TransformerLens has one model class")
def test_neurons_and_their_gradients_are_equal_on_both_classes(name: str) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for backend in BACKENDS:
        model, kept = load_demo_model(name, backend), []
        hook = ("blocks.1.mlp.hook_post", lambda value, hook, kept=kept: kept.append(value))
        logits = model.run_with_hooks(PROMPTS[0], fwd_hooks=[hook])
        metric = logits[0, -1, model.to_single_token(" Austin")] - logits[0, -1, model.to_single_token(" Boston")]
        seen.append((kept[0].detach(), torch.autograd.grad(metric, kept[0])[0]))
    (first, first_gradient), (second, second_gradient) = seen
    assert torch.allclose(first, second, atol=1e-5)
    assert torch.allclose(first_gradient, second_gradient, atol=1e-5)
    assert first_gradient.abs().max() > 1e-3


def test_bos_comes_first_unless_told_otherwise(model: Any) -> None:
    bos = model.tokenizer.bos_token_id
    tokens = model.to_tokens(PROMPTS[0])
    assert tokens[0, 0] == bos
    assert (tokens[0, 1:] != bos).all()
    assert torch.equal(model.to_tokens(PROMPTS[0], prepend_bos=False), tokens[:, 1:])
    assert model.to_str_tokens(PROMPTS[0])[-3:] == ["Dal", "##las", "is"]


def test_what_the_model_is_called_and_that_it_is_ready(model: Any, name: str) -> None:
    assert model.cfg.model_name == name
    assert model.cfg.n_layers == 4
    assert model.cfg.dtype == torch.float32
    assert not model.training


def test_answers(model: Any) -> None:
    for prompt, answer in ((PROMPTS[0], " Austin"), ("The tree of California is", " Redwood")):
        with torch.no_grad():
            assert model(prompt)[0, -1].argmax() == model.to_single_token(answer)


def test_auto_is_the_older_class_where_there_is_one(name: str) -> None:
    assert type(load_demo_model(name)).__name__ == BACKENDS[0]


def test_loading_leaves_the_random_state_alone(name: str) -> None:
    before = torch.get_rng_state()
    load_demo_model(name)
    assert torch.equal(before, torch.get_rng_state())


def test_unknown_names_and_backends_are_errors() -> None:
    with pytest.raises(SettingsError, match=r"demo-gelu, demo-swiglu; got 'demo-relu'"):
        load_demo_model("demo-relu")
    with pytest.raises(SettingsError, match=r"TransformerBridge; got 'Bridge'"):
        load_demo_model("demo-gelu", "Bridge")


@pytest.mark.skipif(len(BACKENDS) == 2, reason="this TransformerLens has both model classes")
def test_a_model_class_that_is_not_installed_is_an_error(name: str) -> None:
    (missing,) = {"HookedTransformer", "TransformerBridge"} - set(BACKENDS)
    with pytest.raises(NeuronCircuitsError, match=f"has no {missing}"):
        load_demo_model(name, missing)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="train it first"):
        load(tmp_path)


def test_a_demo_model_is_under_four_megabytes(name: str) -> None:
    assert sum(path.stat().st_size for path in demo_model_path(name).iterdir()) < 4_000_000


def _sample(task: str, n: int = 150) -> list[evaluation.Question]:
    questions = list(evaluation.TASKS[task]())
    return questions[:: max(1, len(questions) // n)]


@for_each(
    ("task", "least"),
    [
        *((task, 0.98) for task in evaluation.TASKS if task.startswith("agreement")),
        ("town to state", 0.95),
        ("one-hop facts", 0.95),
        ("two-hop capitals", 0.95),
        ("two-hop, all attributes", 0.95),
        ("IOI", 0.95),
    ],
)
def test_accuracy_on_held_out_prompts(plain: tuple[Any, Any], name: str, task: str, least: float) -> None:
    assert evaluation.accuracy(*plain, _sample(task)) >= least
    card = json.loads((demo_model_path(name) / "metrics.json").read_text())
    assert card["tasks"][task]["accuracy"] >= least


def test_greater_than(plain: tuple[Any, Any]) -> None:
    assert evaluation.greater_than(*plain) > 0.6


def test_the_state_is_a_hidden_step(plain: tuple[Any, Any], name: str) -> None:
    """Patched everywhere but at the end, the donor's state comes out in the recipient's terms."""
    model, tokenizer = plain
    swaps = evaluation.state_swaps(100, seed=7)
    length = len(tokenizer(swaps[0].recipient)["input_ids"])
    width = evaluation.down_projections(model)[0].weight.numel() // model.config.hidden_size
    where = torch.ones(4, length, width, dtype=torch.bool)
    where[:, -1] = False
    assert evaluation.swap_success(model, tokenizer, swaps, where).mean() >= 0.8
    assert evaluation.swap_success(model, tokenizer, swaps, torch.zeros_like(where)).mean() <= 0.02
    card = json.loads((demo_model_path(name) / "metrics.json").read_text())
    assert card["hidden_step"][0]["by_place"]["all"]["all but the last"] >= 0.8


def test_swaps_differ_in_state_attribute_and_answer() -> None:
    held_out = states.held_out_combinations()
    for swap in evaluation.state_swaps(200, phrasing=1):
        recipient, donor = (
            next((c, a) for c, a in held_out if f" {c} " in text and f"The {a} " in text)
            for text in (swap.recipient, swap.donor)
        )
        assert recipient[1] != donor[1]
        assert recipient[0] != donor[0]
        assert swap.answer != swap.target
