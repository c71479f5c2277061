"""Steering over several multipliers."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from .. import _html
from .._errors import SettingsError
from ._steering_result import SteeringResult, shown_tokens


@dataclass(frozen=True, eq=False, repr=False)
class SteeringSweep:
    """One `SteeringResult` for every multiplier, in the order given.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> swept = tnc.sweep(model, "The dog near the cats", ["L2/N5"], scales=(0, 1, 2))
        >>> [round(float(result.kl[0]), 6) for result in swept.results if result.settings["amount"] == 1]
        [0.0]
        >>> swept.to_dataframe()["scale"].unique().tolist()
        [0.0, 1.0, 2.0]
    """

    scales: tuple[float, ...]
    results: tuple[SteeringResult, ...]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts, as text."""
        return self.results[0].prompts

    def to_dataframe(self) -> pd.DataFrame:
        """Tokens that are among the top at some multiplier, one row a scale, prompt and token.

        Columns: scale, prompt (its number), token, token_id, probability, logit, kl (of the prompt, in nats).
        """
        first = self.results[0]
        shown = shown_tokens([first.before, *(result.after for result in self.results)], first.settings["top_k"])
        rows = []
        for scale, result in zip(self.scales, self.results, strict=True):
            kl, probabilities = result.kl, result.after.double().softmax(-1).float()
            for prompt, tokens in enumerate(shown):
                for token in tokens:
                    values = (probabilities[prompt, token], result.after[prompt, token], kl[prompt])
                    rows.append((scale, prompt, result.token_names[token], token, *(float(value) for value in values)))
        return pd.DataFrame(rows, columns=["scale", "prompt", "token", "token_id", "probability", "logit", "kl"])

    def plot(self, prompt: int = 0) -> Any:
        """A plotly figure: the probability of the top tokens of one prompt against the multiplier.

        Raises:
            SettingsError: there is no prompt of that number.
        """
        from ..plots._steering import plot_sweep

        if not 0 <= prompt < len(self.prompts):
            raise SettingsError(f"expected a prompt between 0 and {len(self.prompts) - 1}; got {prompt}.")
        return plot_sweep(self, prompt)

    def __repr__(self) -> str:
        nodes = len(self.results[0].nodes)
        return f"SteeringSweep({nodes} nodes, {len(self.prompts)} prompts, scales {[f'{s:g}' for s in self.scales]})"

    def _repr_html_(self) -> str:
        columns = {f"{scale:g}": result.top_after for scale, result in zip(self.scales, self.results, strict=True)}
        table = pd.DataFrame({"prompt": self.prompts, "unsteered": self.results[0].top_before, **columns})
        return _html.block(repr(self), _html.table(table))
