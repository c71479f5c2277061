"""RelP is refused where it does not hold: on the architecture, and in the state the model is in."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tl_neuron_circuits as tnc
from tests.families import ModelCase, all_models, bridge, build_bridge_from_module, hooked_transformer
from tests.propagation.readings import model_of, settled, tokens_of
from tests.real_models import HookedTransformer
from tl_neuron_circuits import TokenizedPairs, attribute, bases, evaluate
from tl_neuron_circuits._errors import PropagationError, UnsupportedModelError
from tl_neuron_circuits.propagation import _conservation as conservation
from tl_neuron_circuits.propagation import check_model, relp
from tl_neuron_circuits.tasks._where_right import contrasts_right

Untouched = Callable[[Any], AbstractContextManager[None]]
on_gpt2 = pytest.mark.parametrize("case", all_models("gpt2"))
needs_bridge = pytest.mark.skipif(build_bridge_from_module is None, reason="builds a TransformerBridge")
needs_hooked = pytest.mark.skipif(HookedTransformer is None, reason="builds a HookedTransformer")
PAIRS = TokenizedPairs.from_tokens(
    torch.tensor([[5, 7, 9, 11]]),
    torch.tensor([3]),
    corrupt=torch.tensor([[5, 8, 9, 11]]),
    wrong_answer=torch.tensor([4]),
)


class Squared(nn.Module):
    """A part that no rule covers."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.square()


@needs_hooked
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rules", ["relp", "attnlrp", ("ln",)])
def test_a_model_that_does_not_conserve_relevance_is_refused(
    dtype: torch.dtype, rules: Any, untouched: Untouched
) -> None:
    model = hooked_transformer("gpt2", dtype=dtype)
    model.blocks[1].hook_mlp_out = nn.Sequential(model.blocks[1].hook_mlp_out, Squared())
    with untouched(model), pytest.raises(UnsupportedModelError, match="not conserved.*check=False"), relp(model, rules):
        pass
    with relp(model, rules, check=False):
        model(tokens_of(ModelCase("gpt2", "HookedTransformer")))
    with relp(model, ()):
        pass
    assert "not conserved" in check_model(model).problems[0]


@on_gpt2
def test_the_check_is_made_once_and_again_when_weights_or_flags_change(case: ModelCase, monkeypatch: Any) -> None:
    model, count, find = case.build(), [0], conservation.find_problem

    def counted(*arguments: Any) -> Any:
        count[0] += 1
        return find(*arguments)

    monkeypatch.setattr(conservation, "find_problem", counted)
    for _ in range(3):
        with relp(model):
            pass
    assert count == [1]
    with torch.no_grad():
        next(nn.Module.parameters(model)).mul_(1.5)
    with relp(model):
        pass
    model.cfg.use_attn_result = not model.cfg.use_attn_result
    with relp(model), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError
    assert count == [3]


@needs_bridge
def test_the_check_is_made_again_when_a_bias_in_a_buffer_changes(monkeypatch: Any) -> None:
    model, count, find = bridge("gpt2"), [0], conservation.find_problem
    model.enable_compatibility_mode()

    def counted(*arguments: Any) -> Any:
        count[0] += 1
        return find(*arguments)

    monkeypatch.setattr(conservation, "find_problem", counted)
    for _ in range(2):
        with relp(model):
            pass
    assert count == [1]
    with torch.no_grad():
        model.unembed._original_component.bias.add_(1.0)
    with relp(model):
        pass
    assert count == [2]


@on_gpt2
def test_users_hooks_are_no_part_of_the_check(case: ModelCase) -> None:
    model, calls = settled(case.build()), []
    spoil = [("blocks.0.mlp.hook_post", lambda value, hook: calls.append(1) or value.square())]
    with model.hooks(fwd_hooks=spoil):
        before = list(model.hook_dict["blocks.0.mlp.hook_post"].fwd_hooks)
        with relp(model):
            assert not calls
            model(tokens_of(case))
        assert len(calls) == 1 and list(model.hook_dict["blocks.0.mlp.hook_post"].fwd_hooks) == before


@on_gpt2
def test_half_precision_is_allowed_what_rounding_explains(case: ModelCase) -> None:
    report = check_model(case.build(dtype=torch.bfloat16))
    assert report.ok and abs(report.conservation - 1) < 0.1


@on_gpt2
def test_a_forward_pass_that_raises_is_a_problem_of_the_report(case: ModelCase, untouched: Untouched) -> None:
    model = case.build()
    model.hook_dict["blocks.1.hook_resid_post"].forward = lambda x: (_ for _ in ()).throw(KeyError("lost"))
    report = check_model(model)
    assert report.problems == ("a pass over a short input raised KeyError: 'lost'.",)
    with pytest.raises(UnsupportedModelError, match="KeyError: 'lost'"), relp(model):
        pass
    model.hook_dict["blocks.1.hook_resid_post"].forward = lambda x: (_ for _ in ()).throw(MemoryError)
    with pytest.raises(MemoryError):
        check_model(model)


TOKENS = torch.tensor([[5, 7, 9, 11]])
CALLS: dict[str, Callable[[Any], Any]] = {
    "steer": lambda model: tnc.steer(model, TOKENS, [(0, 1)], scale=0),
    "profiles": lambda model: tnc.explain.profiles(model, TOKENS, [(0, 1)]),
    "examples": lambda model: tnc.explain.max_activating_examples(model, TOKENS, [(0, 1)]),
    "lasso": lambda model: tnc.lasso.CircuitLasso().observe(model, PAIRS),
    "trace": lambda model: tnc.trace(model, TOKENS[0]),
    "train": lambda model: tnc.transcoders.train(model, TOKENS),
    "variance": lambda model: tnc.nodes.activation_variance(model, PAIRS),
    "right": lambda model: contrasts_right(
        model, tnc.PromptPairs.from_pairs([tnc.tasks.PromptPair("a", " b")]), None, 1
    ),
}  # what runs the model by other ways than `attribute`


@needs_bridge
def test_dropout_in_train_mode_is_refused_by_every_method() -> None:
    """Two runs of one prompt differ, so identical prompts would have effects."""
    model = bridge("gpt2", resid_pdrop=0.2, embd_pdrop=0.0, attn_pdrop=0.0)
    model.train()
    for method in ("relp", "gradient", "patching"):
        with pytest.raises(UnsupportedModelError, match=r"drops values out .*model\.eval\(\)"):
            attribute(model, PAIRS, method=method)
    assert "model.eval()" in check_model(model).problems[0]
    for name, call in CALLS.items():
        with pytest.raises(UnsupportedModelError, match=r"model\.eval\(\)"):
            call(model)
            pytest.fail(name)
    model.eval()
    assert check_model(model).ok
    attribute(model, PAIRS)
    without = bridge("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    without.train()
    attribute(without, PAIRS)


@on_gpt2
def test_autocast_is_refused(case: ModelCase) -> None:
    model = model_of(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for method in ("relp", "patching"):
            with pytest.raises(PropagationError, match="autocast"):
                attribute(model, PAIRS, method=method)
        for name, call in CALLS.items():
            with pytest.raises(PropagationError, match="autocast"):
                call(model)
                pytest.fail(name)
    with pytest.raises(PropagationError, match="autocast"), relp(model), torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens_of(case))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@on_gpt2
def test_the_default_dtype_changes_nothing(case: ModelCase, dtype: torch.dtype) -> None:
    model = case.build(dtype=torch.float32)

    def numbers() -> tuple[Tensor, list[float]]:
        scores = attribute(model, PAIRS)
        return scores.flat(), evaluate(model, PAIRS, scores, sizes=[1, 10]).to_dataframe()["faithfulness"].tolist()

    expected = numbers()
    torch.set_default_dtype(dtype)
    try:
        found = numbers()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1]


@needs_bridge
def test_weights_made_under_inference_mode_are_refused_with_the_remedy() -> None:
    with torch.inference_mode():
        model = bridge("gpt2", dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match="inference_mode"), relp(model):
        pass
    assert "inference_mode" in check_model(model).problems[0]


@needs_bridge
@pytest.mark.parametrize("method", ["relp", "gradient", "integrated_gradients_inputs"])
def test_granites_multiplied_embedding_has_a_leaf(method: Any) -> None:
    """Its adapter enters hook_embed only where a TransformerLens hook sits on it."""
    from tests.architectures import bridge as built

    model, _ = built("GraniteForCausalLM", torch.float32)
    assert float(attribute(model, PAIRS, method=method).flat().abs().max()) > 0


@on_gpt2
def test_a_basis_out_of_the_graph_is_named(case: ModelCase) -> None:
    model = case.build()
    cut = [("blocks.1.hook_attn_out", lambda value, hook: value.detach())]
    with model.hooks(fwd_hooks=cut), pytest.raises(UnsupportedModelError, match=r"no gradient reaches blocks\.\d\.\w+"):
        attribute(model, PAIRS, basis=bases.AttentionBlockOutputs(), method="gradient")


@needs_bridge
def test_a_folded_unembedding_bias_has_its_share_of_relevance() -> None:
    """TransformerLens 4.3 keeps it as a buffer."""
    model = bridge("gpt2")
    model.enable_compatibility_mode()
    report = check_model(model)
    assert report.ok and abs(report.conservation - 1) < 1e-5
