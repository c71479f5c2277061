"""What cannot be trained on is said, with the remedy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.loops import for_each
from tests.transcoders.conftest import SMALL
from tl_neuron_circuits._errors import DictionaryError, NumericalError, SettingsError, UnsupportedModelError
from tl_neuron_circuits.transcoders import TrainingConfig, train
from tl_neuron_circuits.transcoders._train import checkpoints


@pytest.mark.parametrize("source", [[], iter([])])
def test_an_empty_iterator(one_tiny: Any, source: Any) -> None:
    with pytest.raises(SettingsError, match="the iterator gave none at all"):
        train(one_tiny, source, SMALL, verbose=False)


def test_an_empty_tensor(one_tiny: Any, tokens: Tensor) -> None:
    with pytest.raises(SettingsError, match="none at all"):
        train(one_tiny, tokens[:0], SMALL, verbose=False)


def test_strings_are_not_tokens(one_tiny: Any) -> None:
    with pytest.raises(SettingsError, match=r"got 'a text'\. model\.to_tokens"):
        train(one_tiny, ["a text"], SMALL, verbose=False)


def test_only_ignored_tokens(one_tiny: Any, tokens: Tensor) -> None:
    with pytest.raises(SettingsError, match="had only ignored tokens"):
        train(one_tiny, torch.full_like(tokens, 3), SMALL.replace(ignore_tokens=(3,)), verbose=False)


@for_each(
    ("changes", "error", "message"),
    [
        ({"hook_out": "blocks.{layer}.hook_absent"}, DictionaryError, "does not have"),
        ({"hook_in": "blocks.{layer}.attn.hook_z"}, SettingsError, "expected .prompt, position, width."),
        ({"layers": (0, 7)}, SettingsError, r"layers between 0 and 1; got \[7\]"),
    ],
)
def test_wrong_sites(tiny: Any, tokens: Tensor, changes: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        train(tiny, tokens, SMALL.replace(**changes), verbose=False)


def test_a_site_that_does_not_fire(tiny: Any, tokens: Tensor) -> None:
    """HookedTransformer lists `hook_result` and does not run it unless asked to."""
    if type(tiny).__name__ == "TransformerBridge":
        pytest.skip("the Bridge has no hook point that is listed and silent under this name")
    with pytest.raises(
        UnsupportedModelError, match=r"attn\.hook_result.* did not fire.*hook_in and hook_out of TrainingConfig"
    ):
        config = SMALL.replace(hook_in="blocks.{layer}.attn.hook_result")
        train(tiny, tokens, config, verbose=False)


@for_each(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps > 0"),
        ({"penalty": -1.0}, "penalty >= 0"),
        ({"buffer_size": 1000}, "at least two batches"),
        ({"target": "sae", "skip": True}, "SAE with a skip"),
        ({"k": 4000}, "k <= d_dict"),
        ({"hook_out": "blocks.0.hook_mlp_out"}, "'{layer}' in hook_in"),
        ({"layers": (1, 1)}, "distinct"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        TrainingConfig(**changes)


def test_settings_survive_json() -> None:
    config = SMALL.replace(layers=(0, 1), ignore_tokens=(2,))
    assert TrainingConfig.from_json(config.to_json()) == config
    with pytest.raises(SettingsError, match=r"training settings out of .*color"):
        TrainingConfig.from_json({"color": 1})


def test_a_diverged_loss_names_the_layer_and_the_checkpoint(one_tiny: Any, tokens: Tensor, tmp_path: Path) -> None:
    config = SMALL.replace(activation="relu", learning_rate=1e30, learning_rate_warmup=0.0, checkpoint_every=1)
    with pytest.raises(
        NumericalError, match=r"loss of layer 0 is (nan|inf).*lower learning_rate.*checkpoint-0000000\d is unchanged"
    ):
        train(one_tiny, tokens, config, directory=tmp_path, verbose=False)
    assert checkpoints(tmp_path)


def test_a_dead_layer(one_tiny: Any, tokens: Tensor) -> None:
    """A layer whose MLP writes a constant cannot be learnt."""
    with torch.no_grad():
        for name, parameter in one_tiny.named_parameters():
            if ".1." in name and "mlp" in name:
                parameter.zero_()
    with pytest.raises(NumericalError, match="constant over 128 positions, so layer 1 is dead"):
        train(one_tiny, tokens, SMALL, verbose=False)


def test_dead_features_all_of_them(one_tiny: Any, tokens: Tensor) -> None:
    config = SMALL.replace(activation="relu", penalty=1e4, dead_features="none", steps=400, dead_after=100)
    with pytest.raises(NumericalError, match=r"every feature of layer . is dead.*Lower penalty"):
        train(one_tiny, tokens, config.replace(learning_rate=0.1), verbose=False)


def test_a_model_that_gives_nan(one_tiny: Any, tokens: Tensor) -> None:
    with torch.no_grad():
        next(iter(one_tiny.parameters())).fill_(float("nan"))
    with pytest.raises(NumericalError, match=r"activations at blocks.*are NaN"):
        train(one_tiny, tokens, SMALL, verbose=False)
