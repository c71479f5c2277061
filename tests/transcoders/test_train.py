"""Training: what comes out, in which units, and that it learns."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import model_cases
from tests.loops import for_each
from tests.stories_tasks import BOYS, GIRLS, PRONOUN_TEMPLATES
from tests.transcoders.conftest import SMALL
from tl_neuron_circuits._errors import DictionaryError
from tl_neuron_circuits.bases import Dictionaries
from tl_neuron_circuits.bases._dictionary_variance import VarianceSums
from tl_neuron_circuits.transcoders import fidelity, train
from tl_neuron_circuits.transcoders._buffer import ActivationBuffer, TokenStream, TrainingSite, flat_values
from tl_neuron_circuits.transcoders._config import KINDS
from tl_neuron_circuits.transcoders._train import TrainingReport
from tl_neuron_circuits.transcoders._trainee import MEASURES, Scaling, Trainee

Untouched = Callable[[Any], AbstractContextManager[None]]


@for_each(("target", "activation", "skip"), KINDS)
def test_every_kind_trains_with_unit_decoder_rows(
    one_tiny: Any, tokens: Tensor, target: str, activation: str, skip: bool
) -> None:
    config = SMALL.replace(target=target, activation=activation, skip=skip, penalty=1e-2)
    report = train(one_tiny, tokens, config, verbose=False)
    assert [d.layer for d in report.dictionaries] == [0, 1]
    assert {d.kind for d in report.dictionaries} == {KINDS[target, activation, skip]}
    for dictionary in report.dictionaries:
        torch.testing.assert_close(dictionary.W_dec.norm(dim=-1), torch.ones(SMALL.d_dict))
        assert not dictionary.apply_b_dec_to_input and dictionary.has_skip is skip
    assert report.positions == SMALL.steps * SMALL.batch_size
    assert list(report.to_dataframe()["step"].unique()) == [5, 10, 15, 20, 24]
    Dictionaries(report.dictionaries).sites(one_tiny)


def test_training_leaves_no_trace_on_either_model_class(tiny: Any, tokens: Tensor, untouched: Untouched) -> None:
    tiny(tokens)  # the Bridge puts hooks of its own in place on its first forward
    with untouched(tiny):
        train(tiny, tokens, SMALL.replace(steps=2), verbose=False)


def test_both_model_classes_give_one_default_site(tiny: Any, tokens: Tensor) -> None:
    report = train(tiny, tokens, SMALL.replace(steps=1, layers=(1,)), verbose=False)
    assert (report[1].hook_in, report[1].hook_out) == ("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out")


def test_a_seed_fixes_the_result_and_the_global_seed_does_not_matter(one_tiny: Any, tokens: Tensor) -> None:
    state = torch.get_rng_state()
    first = train(one_tiny, tokens, SMALL, verbose=False)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng():
        torch.rand(3)
        assert_equal(first, train(one_tiny, tokens, SMALL, verbose=False))
    other = train(one_tiny, tokens, SMALL.replace(seed=1), verbose=False)
    assert not torch.equal(first[0].W_enc, other[0].W_enc)


def assert_equal(one: TrainingReport, other: TrainingReport) -> None:
    assert one.history == other.history
    for left, right in zip(one.dictionaries, other.dictionaries, strict=True):
        assert left.tensors().keys() == right.tensors().keys()
        for name, tensor in left.tensors().items():
            assert torch.equal(tensor, right.tensors()[name]), name


@for_each("activation", ["relu", "topk", "jumprelu"])
@for_each("skip", [False, True])
def test_folding_the_units_changes_no_number(activation: str, skip: bool) -> None:
    """The saved dictionary, on raw activations, computes what the trainee computes on centered and scaled ones."""
    generator = torch.Generator().manual_seed(0)
    x, y = 3 * torch.randn(64, 6, generator=generator) + 2, 0.2 * torch.randn(64, 5, generator=generator) - 1
    site = TrainingSite(0, "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out", "", "", 6, 5)
    config = SMALL.replace(activation=activation, skip=skip)
    trainee = Trainee(site, config, Scaling.measure(x, y, site), generator)
    for step in range(5):
        trainee.step(x, y, step)
    measured = trainee.step(x, y, 5)
    x_n, y_n = trainee.scaling.apply(x, y)
    assert abs(float(x_n.square().mean()) - 1) < 1e-4 and float(y_n.mean(0).abs().max()) < 1e-5
    dictionary = trainee.dictionary({})
    fvu = VarianceSums.measure(y, dictionary(x)).unexplained
    last = trainee.step(x, y, 6)  # measured before its update, so on the weights of `dictionary`
    assert fvu == pytest.approx(1 - last["variance_explained"], abs=1e-4)
    assert float((dictionary.encode(x) > 0).sum(-1).float().mean()) == pytest.approx(last["l0"], abs=0.05)
    assert measured["variance_explained"] != last["variance_explained"]


@for_each("activation", ["relu", "batchtopk", "jumprelu"])
def test_learns_on_stories260K(stories260K: Any, activation: str) -> None:
    """Far better than the mean after 60 steps, several layers at once, from the first row of the report to the last."""
    names = [name for part in (*GIRLS.values(), *BOYS.values()) for name in part]
    batches = [stories260K.to_tokens([t.format(name=name) for name in names]) for t in PRONOUN_TEMPLATES]
    settings = {"d_dict": 64, "steps": 60, "batch_size": 128, "buffer_size": 1024, "layers": (1, 3), "log_every": 10}
    config = SMALL.replace(activation=activation, k=8, penalty=3e-3, learning_rate=5e-3, **settings)
    table = train(stories260K, batches, config, verbose=False).to_dataframe().set_index(["layer", "step"])
    for layer in (1, 3):
        explained = table["variance_explained"].loc[layer]
        assert explained.iloc[-1] > 0.5
        assert explained.iloc[-1] > explained.iloc[0] + 0.2


@pytest.mark.parametrize("dead_features", ["auxiliary", "resample", "none"])
def test_dead_features_come_back(dead_features: str) -> None:
    """Features whose encoder is too weak to be among the top k stay out unless something is done about it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 12, generator=generator)
    y = (x @ torch.randn(12, 40, generator=generator)).relu() @ torch.randn(40, 12, generator=generator)
    site = TrainingSite(0, "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out", "", "", 12, 12)
    config = SMALL.replace(activation="topk", d_dict=64, k=8, steps=200, dead_after=1000, auxiliary_k=32)
    config = config.replace(dead_features=dead_features, resample_every=20, learning_rate=5e-3)
    trainee = Trainee(site, config, Scaling.measure(x, y, site), generator)
    with torch.no_grad():
        trainee.weights["W_enc"][:, 32:] *= 1e-3
    shares = [trainee.step(x, y, step)["dead_share"] for step in range(200)]
    assert shares[6] > 0.4
    assert (shares[-1] < 0.2) is (dead_features != "none")


def test_bfloat16_learns_nearly_the_same(one_tiny: Any, tokens: Tensor) -> None:
    config = SMALL.replace(steps=100, learning_rate=1e-2)
    exact = train(one_tiny, tokens, config, verbose=False).to_dataframe().iloc[-1]["variance_explained"]
    rounded = train(one_tiny, tokens, config.replace(precision="bfloat16"), verbose=False)
    assert rounded.dictionaries[0].dtype == torch.float32
    assert abs(rounded.to_dataframe().iloc[-1]["variance_explained"] - exact) < 0.05


def test_a_model_in_bfloat16_trains_float32_dictionaries(tokens: Tensor) -> None:
    model = model_cases("gpt2")[-1].build(torch.bfloat16)
    report = train(model, tokens, SMALL.replace(steps=3), verbose=False)
    assert report[0].dtype == torch.float32 and report[0].W_enc.isfinite().all()


def test_all_layers_learn_from_the_same_forward_passes(one_tiny: Any, tokens: Tensor) -> None:
    passes = []
    for layers in ((0,), (0, 1)):
        seen: list[int] = []
        with one_tiny.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook, seen=seen: seen.append(1))]):
            train(one_tiny, tokens, SMALL.replace(layers=layers), verbose=False)
        passes.append(len(seen))
    assert passes[0] == passes[1] > 0


def test_warm_ups_grow_from_nothing_and_the_rate_decays_to_nothing() -> None:
    """Rates and penalties of 20 steps: up over the first fifth, level, down over the last tenth."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, 6, generator=generator) for _ in range(2))
    site = TrainingSite(0, "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out", "", "", 6, 6)
    shares = {"learning_rate_warmup": 0.2, "learning_rate_decay": 0.1, "penalty_warmup": 0.2}
    config = SMALL.replace(activation="relu", steps=20, learning_rate=0.1, penalty=1e3, **shares)
    trainee = Trainee(site, config, Scaling.measure(x, y, site), generator)
    rates, penalties = [], []
    for step in range(20):
        weights = {name: value.detach().clone() for name, value in trainee.weights.items()}
        measured = trainee.step(x, y, step)
        rates.append(trainee._optimizer.param_groups[0]["lr"])
        x_n, y_n = trainee.scaling.apply(x, y)
        features = (x_n @ weights["W_enc"] + weights["b_enc"]).relu()
        unexplained = (features @ weights["W_dec"] + weights["b_dec"] - y_n).square().mean()
        penalties.append(float((measured["loss"] - unexplained) / (features.sum(-1).mean() / 6**0.5)))
    assert rates == pytest.approx([0.025, 0.05, 0.075, *[0.1] * 16, 0.05])
    # Of later steps few features are left, and the difference of two losses is mostly rounding.
    assert penalties[:9] == pytest.approx([0, 250, 500, 750, *[1000] * 5], rel=1e-2, abs=1e-3)


def test_the_buffer_bounds_what_is_held(one_tiny: Any, tokens: Tensor) -> None:
    """`capacity` positions and at most one forward pass more, ever."""
    name = "blocks.0.hook_mlp_out"
    buffer = ActivationBuffer(
        one_tiny, TokenStream(tokens, 4, 0), (name,), capacity=128, batch_size=32, ignore=(), dtype=torch.float32,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    held = []
    for _ in range(20):
        buffer.take()
        tensors, _ = buffer.state()
        held.append(sum(len(value) for key, value in tensors.items() if key != "order"))
    assert 128 <= max(held) <= 128 + 4 * tokens.shape[1]


def test_progress_shows_what_is_measured(one_tiny: Any, tokens: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    train(one_tiny, tokens, SMALL.replace(steps=10), verbose=True)
    shown = capsys.readouterr().err
    assert all(f"{measure}=" in shown for measure in MEASURES)


def test_the_input_after_the_norms_weight_can_be_read(tiny: Any, tokens: Tensor) -> None:
    """`mlp.hook_in` exists on the Bridge; elsewhere the error says so and names the setting."""
    config = SMALL.replace(hook_in="blocks.{layer}.mlp.hook_in", steps=2)
    if type(tiny).__name__ == "TransformerBridge":
        report = train(tiny, tokens, config, verbose=False)
        assert report[1].hook_in == "blocks.1.mlp.hook_in"
        assert fidelity(tiny, report.dictionaries, tokens, baselines=False).of("transcoder")["loss"].notna().all()
    else:
        with pytest.raises(DictionaryError, match=r"reads blocks\.0\.mlp\.hook_in.*set hook_in"):
            train(tiny, tokens, config, verbose=False)


def test_ignored_tokens_are_left_out(one_tiny: Any, tokens: Tensor) -> None:
    hook = "blocks.0.hook_mlp_out"
    kept = flat_values(one_tiny, tokens, [hook], (3, 5), torch.float32)[hook]
    every = flat_values(one_tiny, tokens, [hook], (), torch.float32)[hook]
    mask = ((tokens != 3) & (tokens != 5)).flatten()
    assert 0 < len(kept) < len(every)
    assert torch.equal(kept, every[mask])


@pytest.mark.parametrize("buffer_size", [0, 128])
def test_the_buffer_serves_every_position_once_an_epoch(one_tiny: Any, buffer_size: int) -> None:
    """Inputs and outputs stay aligned, and before any repeats all of the first positions are served."""
    from tests.families import random_tokens

    prompts = random_tokens(one_tiny, batch=32, pos=16)
    prompts[:, 0] = torch.arange(2, 34)  # so that no two positions are alike
    names = ("blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out")
    every = flat_values(one_tiny, prompts, names, (), torch.float32)
    buffer = ActivationBuffer(
        one_tiny, TokenStream(prompts, 4, 0), names, capacity=buffer_size, batch_size=32, ignore=(),
        dtype=torch.float32, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    seen: list[int] = []
    for _ in range(12):
        batch = buffer.take()
        distance = torch.cdist(batch[names[0]], every[names[0]])
        index = distance.argmin(1)
        assert distance.amin(1).max() < 1e-2
        torch.testing.assert_close(batch[names[1]], every[names[1]][index], atol=1e-4, rtol=1e-4)
        seen += index.tolist()
    in_order = seen == sorted(seen)
    assert len(set(seen)) == len(seen) and not in_order
