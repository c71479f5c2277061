"""RelP and attribution patching: one gradient for all layers.

    score(n) = (a_clean - a_baseline) * d metric / d a

`relp` takes the gradient under the rules of relevance propagation, `gradient` (AtP) under none. It is taken on the
clean run, or with `direction="denoising"` on the corrupt run, as in RelP's own protocol.
Sign: positive supports the answer. Cost: two forwards and one backward a batch.
Source: Rezaei Jafari et al. 2025, arXiv 2508.21258; Syed et al. 2023 (AtP); METHODS 1.2 and 2.
"""

from ..bases._runs import Values
from ..propagation._relp import relp
from ..tasks._tokenized import Batch
from ._gradients import run_gradients
from ._setting import Gradients, Setting


def propagate(setting: Setting, batch: Batch) -> tuple[Values, Gradients]:
    """Values and gradients on `batch`'s clean prompts, under `setting.rules`."""
    with relp(setting.model, setting.rules, stabilizer=setting.stabilizer):
        return run_gradients(setting.model, batch, setting.sites, setting.metric)
