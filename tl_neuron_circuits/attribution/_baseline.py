"""What a node is compared with: its value on the corrupt prompt, zero, or its mean over the clean prompts."""

from collections.abc import Mapping

from ..bases import Parts, reads_of, run_values, take_apart
from ..tasks import Batch
from ._setting import Setting

Means = Mapping[tuple[str, int], Parts]
"""Mean parts by hook and prompt length."""


def base_parts(setting: Setting, batch: Batch, means: Means | None) -> Mapping[str, Parts | None]:
    """The other run's parts, by hook; None is zero."""
    if setting.baseline == "corrupt":
        there = batch.on_corrupt() if setting.direction == "noising" else batch
        return take_apart(setting.sites, run_values(setting.model, there, reads_of(setting.sites)))
    if means is None:
        return dict.fromkeys((site.hook for site in setting.sites), None)
    n, length = batch.clean.shape
    return {s.hook: means[s.hook, length].map(lambda t: t.expand(n, *t.shape[1:])) for s in setting.sites}
