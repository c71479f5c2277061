"""Ten of the architectures of docs/architectures.md, measured: exact or refused by name, none "runs and is wrong"."""

from importlib.metadata import version

import pytest

pytest.importorskip("transformer_lens.model_bridge")  # first: the factory imports it in a circle
pytest.importorskip("transformer_lens.factories.architecture_adapter_factory")
from tests.architectures import SAMPLE, architectures, measure

if int(version("transformer-lens").split(".")[0]) < 4:
    pytest.skip("the table is of TransformerLens 4.3; older adapters fail on some of these", allow_module_level=True)

REASONS = {
    "BertLMHeadModel": "prediction head",
    "FalconH1ForCausalLM": "mamba",
    "MixtralForCausalLM": "mixture of experts",
    "T5ForConditionalGeneration": "encoder-decoder",
    "Qwen3_5ForCausalLM": "linear_attn",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLE)
def test_an_architecture_is_exact_or_refused_by_name(name: str) -> None:
    if name not in architectures():
        pytest.skip("the installed Bridge does not list it")
    row = measure(name)
    assert row.verdict == ("refused" if name in REASONS else "exact"), row
    assert REASONS.get(name, "") in row.why
