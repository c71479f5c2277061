"""The front of sparsity against fidelity: transcoders and SAEs of equal width, trained on equal tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from jaxtyping import Int
from torch import Tensor

from .. import _html
from .._errors import SettingsError
from .._typing import checked
from ..bases._dictionary import Dictionary
from ..models._protocol import TransformerLensModel, model_name
from ..models._threads import holding
from ._config import TrainingConfig
from ._fidelity import OWN, References, batches_of, measure_fidelity
from ._train import train

_RANK = 16


@dataclass(frozen=True, eq=False, repr=False)
class ParetoFront:
    """What `pareto` returns.

    Columns of the table: those of `Fidelity`, the setting that was varied (`k` or `penalty`), and `on_front`: no other
    dictionary of the same target and layer has both a lower L0 and a higher `recovered_zero`. Rows of the linear maps
    and ablations, which have no L0, come once.

    Example:
        >>> import torch
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("rc", n=64)
        >>> tokens = torch.stack(list(tnc.tasks.tokenize(model, pairs).clean))
        >>> config = tnc.transcoders.TrainingConfig(layers=(0,), d_dict=64, steps=10, batch_size=64, buffer_size=256)
        >>> given = {"evaluation_tokens": tokens, "targets": ("sae",), "verbose": False}
        >>> front = tnc.transcoders.pareto(model, tokens, config, [4, 8], **given)
        >>> figure = front.plot(measure="fvu")
    """

    table: pd.DataFrame
    dictionaries: dict[tuple[str, float], tuple[Dictionary, ...]]
    """By target ("transcoder", "sae") and value of the setting."""
    setting: str
    model: str

    def to_dataframe(self) -> pd.DataFrame:
        """The table."""
        return self.table.copy()

    def plot(self, *, measure: str = "recovered_zero") -> Any:
        """A plotly figure of "recovered_zero", "recovered_mean", "divergence", "fvu" or "loss" against L0, by layer."""
        from ..plots._pareto import plot_pareto

        return plot_pareto(self.table, measure, self.model)

    def __repr__(self) -> str:
        targets = sorted({target for target, _ in self.dictionaries})
        values = sorted({value for _, value in self.dictionaries})
        return f"ParetoFront({self.model}, {' and '.join(targets)}, {self.setting} of {values})"

    def _repr_html_(self) -> str:
        return _html.block(repr(self), _html.table(self.table, bars=("recovered_zero",), rows=60))


@holding
@checked
def pareto(
    model: TransformerLensModel,
    tokens: Int[Tensor, "prompt pos"] | Sequence[Any],
    config: TrainingConfig,
    values: Sequence[float | int],
    *,
    evaluation_tokens: Int[Tensor, "held_out_prompt held_out_pos"] | Sequence[Any],
    targets: Sequence[str] = ("transcoder", "sae"),
    verbose: bool | None = None,
) -> ParetoFront:
    """Train a dictionary per value, target and layer, and measure each as `fidelity` does.

    Args:
        model: a TransformerLens model.
        tokens: prompts to train on; every dictionary sees the same ones in the same order, and linear maps are
            fitted on them.
        config: settings; `target` is set here, and `skip` does not apply to SAEs.
        values: of `k` (topk, batchtopk) or of the penalty (relu, jumprelu).
        evaluation_tokens: held-out prompts.
        targets: "transcoder", "sae" or both.
        verbose: as in `train`.

    Raises:
        SettingsError: no values, or settings that `TrainingConfig` refuses.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> tokens = model.to_tokens(tnc.tasks.subject_verb_agreement("simple", n=64).clean)
        >>> config = tnc.transcoders.TrainingConfig(layers=(3,), d_dict=32, steps=5, batch_size=64, buffer_size=128)
        >>> tnc.transcoders.pareto(model, tokens[:48], config, [2, 4], evaluation_tokens=tokens[48:], verbose=False)
        ParetoFront(demo-gelu, sae and transcoder, k of [2.0, 4.0])
    """
    if not values:
        raise SettingsError(f"expected at least one value of {config.sparsity_setting}; got none.")
    setting = config.sparsity_setting
    frames, dictionaries = [], {}
    batches, fit = (list(batches_of(each, config.forward_rows)) for each in (evaluation_tokens, tokens))
    known: References | None = None
    for target in sorted(targets, key=lambda target: target != "transcoder"):  # linear maps are those of transcoders
        for value in values:
            number = int(value) if setting == "k" else float(value)
            changed = config.replace(target=target, skip=config.skip and target != "sae", **{setting: number})
            trained = train(model, tokens, changed, verbose=verbose).dictionaries
            measured, known = measure_fidelity(
                model, trained, batches, fit, True, _RANK, config.ignore_tokens, known, verbose=verbose
            )
            dictionaries[target, float(value)] = trained
            frames.append(measured.to_dataframe().assign(target=target, **{setting: number}))
    table = pd.concat(frames, ignore_index=True)
    # Each baseline once. Ablations are the same for all; SAEs' principal components are not the transcoders' map.
    table.loc[~table["replacement"].isin(OWN), setting] = float("nan")
    table.loc[table["replacement"].isin(("mean", "zero")), "target"] = ""
    table = table.drop_duplicates(["layer", "replacement", "target", setting], ignore_index=True)
    table = table.assign(on_front=[_on_front(table, row) for row in table.itertuples()])
    return ParetoFront(table, dictionaries, setting, model_name(model))


def _on_front(table: pd.DataFrame, row: Any) -> bool:
    if row.replacement not in OWN:
        return False
    rivals = table[(table["replacement"] == row.replacement) & (table["layer"] == row.layer)]
    better = (rivals["l0"] <= row.l0) & (rivals["recovered_zero"] >= row.recovered_zero)
    strictly = (rivals["l0"] < row.l0) | (rivals["recovered_zero"] > row.recovered_zero)
    return not bool((better & strictly).any())
