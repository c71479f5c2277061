"""Models of Llama's true shapes, scaled down: 32 layers, four queries a key-value head, 3.5 times as many neurons."""

import inspect
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import AVAILABLE_BRIDGES, bridge, hooked_transformer
from tests.loops import for_each
from tests.methods import with_steps
from tests.nodes.plain import random_pairs
from tl_neuron_circuits import Patching, attribute, check_model, estimate_memory
from tl_neuron_circuits._errors import PropagationError, SettingsError
from tl_neuron_circuits._memory import Halving
from tl_neuron_circuits._meter import Meter
from tl_neuron_circuits.nodes import RelP
from tl_neuron_circuits.tasks import logit_difference

ROOT = Path(__file__).parents[1]
LAYERS, WIDTH, HEADS = 32, 32, 8
PAIRS = random_pairs(*[6] * 8)
needs_bridge = pytest.mark.skipif("llama" not in AVAILABLE_BRIDGES, reason="TransformerLens 2 has no TransformerBridge")


def scaled_llama(backend: str, dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> Any:
    sizes = {"d_head": WIDTH // HEADS, "n_layers": layers, "d_model": WIDTH, "n_heads": HEADS, "d_mlp": 7 * WIDTH // 2}
    if backend == "HookedTransformer":
        more = {"n_key_value_heads": HEADS // 4, "rotary_dim": WIDTH // HEADS}
        model = hooked_transformer("llama", dtype=dtype, **sizes, **more)
    else:
        model = bridge(
            "llama", dtype=dtype, num_hidden_layers=layers, hidden_size=WIDTH, num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 4, intermediate_size=7 * WIDTH // 2, head_dim=WIDTH // HEADS,
        )  # fmt: skip
    with torch.no_grad():  # 32 layers of large random weights blow up
        for parameter in torch.nn.Module.parameters(model):
            if parameter.dim() > 1:
                parameter.mul_(0.6)
    return model


backends = pytest.mark.parametrize(
    "backend", ["HookedTransformer", pytest.param("TransformerBridge", marks=needs_bridge)]
)


@backends
def test_relevance_is_conserved_through_32_layers(backend: str) -> None:
    assert check_model(scaled_llama(backend)).conservation == pytest.approx(1, abs=1e-3)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_give_the_scores_of_float32_roughly(backend: str, dtype: torch.dtype) -> None:
    exact = attribute(scaled_llama(backend, layers=8), PAIRS).flat()
    found = attribute(scaled_llama(backend, dtype, layers=8), PAIRS)
    assert all(block.dtype == torch.float32 for _, _, block in found.blocks())
    assert torch.corrcoef(torch.stack([exact, found.flat()]))[0, 1] > 0.97


def test_memory_does_not_grow_with_the_number_of_prompts() -> None:
    model, peaks = scaled_llama("HookedTransformer", layers=2), []
    for n in (8, 32):
        with Meter() as meter:
            attribute(model, random_pairs(*[6] * n), batch_size=8)
        peaks.append(meter.peak)
    assert peaks[1] <= 1.05 * peaks[0]


def test_half_a_million_neurons_a_position_stream() -> None:
    sizes = {"n_layers": 4, "d_model": 16, "n_heads": 4, "d_head": 4, "d_mlp": 131_072}
    model = hooked_transformer("llama", dtype=torch.float32, n_key_value_heads=1, rotary_dim=4, **sizes)
    with torch.no_grad():
        for parameter in torch.nn.Module.parameters(model):
            if parameter.dim() > 1:
                parameter.mul_(0.05)
    peaks = []
    for n in (4, 8):
        with Meter() as meter:
            scores = attribute(model, random_pairs(*[6] * n), batch_size=2)
        peaks.append(meter.peak)
    assert len(scores) == 6 * 4 * 131_072
    assert peaks[1] <= 1.001 * peaks[0]  # not a byte a prompt, but for the prompts themselves
    one_copy = 4 * 2 * len(scores)  # float32 neurons of a batch of two
    assert peaks[1] <= 10 * one_copy


def test_scores_are_one_number_a_neuron_and_position_whatever_the_batch() -> None:
    model = scaled_llama("HookedTransformer", layers=2)
    assert len(attribute(model, PAIRS)) == 2 * 6 * 7 * WIDTH // 2


def enable_checkpointing(model: Any, *, use_reentrant: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.13 renames it
        options = {"use_reentrant": use_reentrant}
        model.original_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


@needs_bridge
@for_each("rules", ["relp", "gim"])  # GIM takes the activation's slope amid the forward pass
def test_gradient_checkpointing_changes_no_bit(rules: str) -> None:
    model = scaled_llama("TransformerBridge", layers=6)
    model.train()
    method = RelP(rules=rules)
    plain = attribute(model, PAIRS, method=method).flat()
    enable_checkpointing(model, use_reentrant=False)
    again: list[int] = []
    handle = model.hook_dict["blocks.2.mlp.hook_pre"].register_forward_hook(lambda *_: again.append(1))
    found = attribute(model, PAIRS, method=method).flat()
    handle.remove()
    assert len(again) == 3  # clean, once more in its backward, and corrupt
    assert torch.equal(found, plain)


@needs_bridge
def test_reentrant_checkpointing_is_refused() -> None:
    model = scaled_llama("TransformerBridge", layers=2)
    model.train()
    enable_checkpointing(model, use_reentrant=True)
    with pytest.raises(PropagationError, match="use_reentrant"):
        attribute(model, PAIRS)


@for_each("method", ["relp", "gradient", "integrated_gradients_inputs", "learned_mask", "patching", "random"])
def test_the_estimate_is_what_a_batch_needs(method: Any) -> None:
    model = scaled_llama("HookedTransformer", layers=2)
    estimate = estimate_memory(model, PAIRS, method=method, batch_size=8)
    some = attribute(model, PAIRS, method="random").top(64) if method == "patching" else None
    with Meter() as meter:
        attribute(model, PAIRS, method=with_steps(method, 2) if some is None else Patching(some), batch_size=8)
    assert meter.peak / 1.5 <= estimate.needed <= 1.5 * meter.peak


def test_an_estimate_says_what_fits() -> None:
    model = scaled_llama("HookedTransformer", layers=2)
    estimate = estimate_memory(model, PAIRS, batch_size=64, available=10**6)
    assert not estimate.fits and estimate.at(estimate.largest_batch or 0) <= 10**6
    assert "at most" in repr(estimate) and not estimate.to_dataframe()["fits"].all()


def test_a_batch_that_cannot_fit_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_neuron_circuits.nodes._memory.available_memory", lambda model: 150_000)
    model = scaled_llama("HookedTransformer", layers=2)
    with pytest.raises(SettingsError, match=r"available 0\.00015 GB.*batch_size="):
        attribute(model, PAIRS, batch_size=8)
    used = attribute(model, PAIRS, batch_size="auto").settings["batch_size"]
    assert 1 <= used < 8


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory."), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])  # fmt: skip
def test_auto_halves_where_memory_runs_out(error: Exception, caplog: Any) -> None:
    model = scaled_llama("HookedTransformer", layers=2)
    expected = attribute(model, PAIRS, batch_size=2)

    def metric(logits: Any, batch: Any) -> Any:
        if len(batch) > 2:
            raise error
        return logit_difference(logits, batch)

    found = attribute(model, PAIRS, metric=metric, batch_size="auto")
    torch.testing.assert_close(found.flat(), expected.flat(), rtol=0, atol=1e-6 * float(expected.flat().abs().max()))
    assert found.settings["batch_size"] == 2 and "not enough memory for 8 prompts" in caplog.text
    with pytest.raises(type(error)):
        attribute(model, PAIRS, metric=metric, batch_size=8)


def test_other_errors_do_not_halve() -> None:
    halving = Halving(8, allowed=True)
    (batch,) = PAIRS.batches(100)
    with pytest.raises(RuntimeError, match="of mine"):
        for attempt in halving.pieces(batch):
            with attempt:
                _raise()
    assert halving.size == 8


def _raise() -> None:
    raise RuntimeError("an error of mine")


def test_an_estimate_checks_the_types_of_attributes_arguments() -> None:
    """In a user's process: pytest's hook also checks types inside the package, which hides what a call lets through."""
    script = """
import tl_neuron_circuits as tnc
model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=4)
for arguments in ({"positions": "bogus"}, {"baseline": "noise"}, {"metric": 3}, {"batch_size": "auto"}):
    try:
        tnc.estimate_memory(model, pairs, **arguments)
    except TypeError as error:
        assert next(iter(arguments)) in str(error), error
    else:
        raise AssertionError(f"{arguments} were accepted")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr


def test_help_on_an_estimate_lists_attributes_arguments() -> None:
    shown, known = (inspect.signature(function).parameters for function in (estimate_memory, attribute))
    assert list(shown) == [*known, "available"]
    assert all(shown[name].annotation == known[name].annotation for name in known if name != "batch_size")


def test_what_nodes_are_compared_with_is_not_held_beside_the_graph() -> None:
    """Corrupt values are computed when the graph is gone, so they do not add to its peak."""
    model, peaks = scaled_llama("HookedTransformer", layers=6), []
    for baseline in ("zero", "corrupt"):
        with Meter() as meter:
            attribute(model, PAIRS, baseline=baseline)
        peaks.append(meter.peak)
    assert peaks[1] <= 1.1 * peaks[0]
