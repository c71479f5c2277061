"""Is what `attribute` was given enough for what it was asked?"""

import pandas as pd
import torch

from .._errors import PairsError, SettingsError
from ..tasks._tokenized import TokenizedPairs
from ._patching import Chosen
from ._setting import Setting


def check_setting(setting: Setting, batch_size: int | str, nodes: pd.DataFrame | None) -> None:
    """Raise for settings that contradict each other.

    Raises:
        SettingsError: with the way out.
    """
    method, steps = setting.method, setting.steps
    if steps < 1 or (batch_size != "auto" and int(batch_size) < 1):
        raise SettingsError(f"expected steps and batch_size of at least 1; got {steps} and {batch_size}.")
    if method == "relp" and not setting.rules:
        raise SettingsError("expected at least one rule for method='relp'; got none. That is method='gradient'.")
    if method == "gradient" and setting.rules:
        raise SettingsError(f"method='gradient' uses no rules; got {list(setting.rules)}. That is method='relp'.")
    if setting.direction == "denoising" and (setting.baseline != "corrupt" or method.startswith("integrated")):
        raise SettingsError(
            "direction='denoising' compares the corrupt run with the clean one: it needs baseline='corrupt' and one of "
            f"the methods relp, gradient, patching; got baseline={setting.baseline!r}, method={method!r}."
        )
    if method == "integrated_gradients_inputs" and setting.baseline == "mean":
        raise SettingsError(
            "integrated gradients over inputs go to the corrupt prompt or to zero, not to a mean: "
            "give baseline='corrupt' or 'zero'."
        )
    if nodes is not None and method != "patching":
        raise SettingsError(f"nodes= restricts method='patching'; method={method!r} scores all nodes at once.")


def check_pairs(tokens: TokenizedPairs, setting: Setting) -> None:
    """Raise for pairs that do not serve the setting.

    Raises:
        PairsError: no corrupt prompts where they are needed, or of another length; several lengths with positions kept.
    """
    if setting.baseline == "corrupt" and tokens.corrupt is None:
        raise PairsError(
            f"method={setting.method!r} compares with corrupt prompts, and these pairs have none. Give corrupt=, or "
            "baseline='zero' or 'mean'."
        )
    if setting.baseline == "corrupt" and tokens.corrupt is not None:
        for index, (clean, corrupt) in enumerate(zip(tokens.clean, tokens.corrupt, strict=True)):
            if len(clean) != len(corrupt):
                raise PairsError(
                    f"pair {index}: clean has {len(clean)} tokens and corrupt {len(corrupt)}; nodes are compared "
                    f"position "
                    "by position. Choose prompts of equal token length, or baseline='zero' or 'mean'."
                )
    lengths = sorted(set(tokens.lengths))
    if setting.positions == "keep" and len(lengths) > 1:
        counts = {length: tokens.lengths.count(length) for length in lengths}
        raise PairsError(
            f"positions='keep' needs prompts of one token length; got {counts} (length: prompts). Use "
            f"positions='sum', or "
            "keep the prompts of one length."
        )


def chosen_nodes(nodes: pd.DataFrame, setting: Setting, length: int) -> Chosen:
    """Flat indices of the rows of `nodes`, by (hook, kind).

    Raises:
        SettingsError: a column is missing, or a row names no node of this basis.
    """
    missing = {"hook", "unit", "position", "kind"} - set(nodes.columns)
    if missing:
        raise SettingsError(
            f"expected nodes with columns hook, unit, position and kind; {sorted(missing)} missing. Give rows of "
            "NodeScores.top."
        )
    sites = {site.hook: site for site in setting.sites}
    unknown = set(nodes["hook"]) - set(sites)
    if unknown:
        raise SettingsError(f"expected nodes of the hook points {list(sites)}; got {sorted(unknown)}.")
    kept = setting.positions == "keep"
    if kept and not nodes["position"].between(0, length - 1).all():
        raise SettingsError(
            f"expected positions from 0 to {length - 1} (positions='keep'); got {sorted(set(nodes['position']))[:8]}."
        )
    if setting.units == "sum":
        raise SettingsError(
            "nodes= chooses single nodes; units='sum' measures whole activations. Leave one of them out."
        )
    out: Chosen = {}
    for key, group in nodes.groupby(["hook", "kind"], sort=False):
        hook, kind = map(str, key)  # pyright: ignore[reportArgumentType]
        out[hook, kind] = torch.tensor(group[["position", "unit"]].to_numpy(copy=True))
    return out
