"""Controls for chosen nodes: others of the same layer and position that change by nearly as much."""

import pandas as pd

import tl_neuron_circuits as tnc


def matched_nodes(chosen: pd.DataFrame, sizes: tnc.NodeScores) -> pd.DataFrame:
    """For every chosen node one that is not chosen, of its layer and position, with the nearest size of change.

    Args:
        chosen: rows of `NodeScores.top`.
        sizes: scores by "activation_difference", positions as in `chosen`.
    """
    taken = set(chosen["label"])
    found = []
    for (hook, position), group in chosen.groupby(["hook", "position"], sort=False):
        values = sizes.values[str(hook)]
        changes = values[int(position)] if sizes.positions == "keep" else values
        others = changes.clone()
        others[group["unit"].tolist()] = float("inf")
        for _, row in group.iterrows():
            near = int((others - changes[int(row["unit"])]).abs().argmin())
            others[near] = float("inf")
            found.append({**row, "unit": near, "label": f"{row['label'].split('/')[0]}/N{near}"
                          + (f"@{position}" if position >= 0 else "")})  # fmt: skip
    controls = pd.DataFrame(found)
    assert not taken & set(controls["label"]) and len(controls) == len(chosen)
    return controls
