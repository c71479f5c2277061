"""On the real stories260K, with names held out: RelP's neurons are better circuits than attribution patching's."""

from typing import Any

import pytest
import torch

from tests.benchmarks.stories260K import METHODS, TEMPLATES, curve_of, merit, scores_of
from tests.stories_tasks import pronoun_pairs
from tl_neuron_circuits.bases import AttentionBlockOutputs, MLPOutputs, ResidualStream
from tl_neuron_circuits.nodes import Patching, attribute
from tl_neuron_circuits.tasks import logit_difference, tokenize
from tl_neuron_circuits.tasks._metrics import measure


def test_relp_beats_attribution_patching_on_seven_of_eight_templates(stories260K: Any) -> None:
    """Faithfulness + (1 - completeness) summed over 20, 50, 100, 200, 400 neurons, in both directions."""
    assert len(TEMPLATES) == 8
    wins, merits = 0, []
    for template in TEMPLATES:
        relp, atp = (
            merit(curve_of(stories260K, template, scores_of(stories260K, template, METHODS[name], 8), 8))
            for name in ("RelP", "AtP")
        )
        wins += relp > atp
        merits.append((template, round(relp, 2), round(atp, 2)))
    assert wins >= 7, merits


def test_patching_a_real_models_neurons_is_one_forward_pass_each(stories260K: Any) -> None:
    pairs = pronoun_pairs(TEMPLATES[0], "attribution", 2)
    top = attribute(stories260K, pairs).top(6)
    found = attribute(stories260K, pairs, method=Patching(top))
    (batch,) = tokenize(stories260K, pairs).batches(100)

    def metric(hooks: Any = ()) -> float:
        with torch.no_grad():
            logits = stories260K.run_with_hooks(batch.clean, fwd_hooks=list(hooks))
        return float(measure(logit_difference, logits, batch).mean())

    _, corrupt = stories260K.run_with_cache(batch.corrupt)
    for row in top.itertuples():

        def patch(value: Any, hook: Any, row: Any = row) -> Any:
            value = value.clone()
            value[:, row.position, row.unit] = corrupt[row.hook][:, row.position, row.unit]
            return value

        score = float(found.values[row.hook][row.position, row.unit])
        assert score == pytest.approx(metric() - metric([(row.hook, patch)]), abs=2e-5)


def test_relps_own_protocol_gives_maps_over_layer_and_position(stories260K: Any) -> None:
    """Denoising, gradient at the corrupt run; the last residual stream has all of it at the last position."""
    basis = [ResidualStream(), AttentionBlockOutputs(), MLPOutputs()]
    pairs = pronoun_pairs(TEMPLATES[0], "attribution", 4)
    scores = attribute(stories260K, pairs, basis=basis, direction="denoising", units="sum")
    table = scores.map()
    assert table.shape == (15, len(tokenize(stories260K, pairs).clean[0]))
    last = table.loc["blocks.4.hook_resid_post"].to_numpy()
    assert abs(last[:-1]).max() < 1e-6 < abs(last[-1])
