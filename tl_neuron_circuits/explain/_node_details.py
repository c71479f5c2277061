"""What a circuit's page says about a node besides its numbers: strongest examples, logit effects, a description."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from .._errors import SettingsError
from .._typing import checked
from ..circuits._circuit import Circuit
from ..interventions._direct_logit_effects import direct_logit_effects
from ..models._protocol import TransformerLensModel
from ..models._threads import holding
from ._max_activating_examples import By, Describe, max_activating_examples


@holding
@checked
def node_details(
    model: TransformerLensModel,
    circuit: Circuit,
    prompts: Sequence[str] | Int[Tensor, "batch pos"] | None = None,
    *,
    k: int = 4,
    tokens: int = 5,
    by: By = "absolute",
    describe: Describe | None = None,
    batch_size: int = 32,
    verbose: bool | None = None,
) -> dict[str, dict[str, Any]]:
    """Examples and logit effects of a circuit's neurons, as `Circuit.to_html(details=...)` takes them.

    Args:
        model: the model that was traced.
        circuit: any circuit with single neurons; its other nodes get no details.
        prompts: texts (or tokens) to search for each neuron's strongest examples; without them there are none.
        k: examples per neuron.
        tokens: tokens that a neuron promotes most, and as many that it suppresses, by a positive activation.
        by: as in `max_activating_examples`.
        describe: as in `max_activating_examples`; needs prompts.
        batch_size: prompts in one pass.
        verbose: as in `max_activating_examples`.

    Returns:
        By neuron at all positions ("L3/N45"): "direct_logit_effects", "examples" and "description", as far as
        requested. Effects are direct, through the residual stream, in logits up to the scale of the final norm.

    Raises:
        SettingsError: no neurons, numbers below 1, or `describe` without prompts.
        UnsupportedModelError: as `direct_logit_effects`.

    Source: METHODS 1.7.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> circuit = tnc.trace(model, "The capital of the state containing Dallas is", " Austin", nodes=10)
        >>> details = tnc.node_details(model, circuit, tnc.demo.capitals(n=16).clean, k=2)
        >>> circuit.to_html("dallas.html", details=details)
        >>> len(next(iter(details.values()))["examples"])
        2
    """
    if describe is not None and prompts is None:
        raise SettingsError("describe= reads a neuron's examples: give prompts to search for them.")
    names = circuit.nodes.loc[circuit.nodes["kind"] == "neuron", "node"]
    neurons = list(dict.fromkeys(name.partition("@")[0] for name in names))
    if not neurons:
        raise SettingsError("expected a circuit with single neurons; it has none. Call this before collapse().")
    details: dict[str, dict[str, Any]] = {}
    effects = direct_logit_effects(model, neurons, k=tokens).to_dataframe()
    for name, rows in effects.groupby("label", sort=False):
        details[str(name)] = {
            "direct_logit_effects": list(zip(rows["token"], rows["effect"].astype(float), strict=True))
        }
    if prompts is not None:
        options: Any = {"k": k, "by": by, "describe": describe, "batch_size": batch_size, "verbose": verbose}
        found = max_activating_examples(model, prompts, neurons, **options)
        for name in neurons:
            if name in found.descriptions:
                details[name]["description"] = found.descriptions[name]
            details[name]["examples"] = list(found.examples[name])
    return details
