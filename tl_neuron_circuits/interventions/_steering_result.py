"""What steering did: next tokens before and after, divergence, other groups of nodes, continuations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _html


@dataclass(frozen=True, eq=False, repr=False)
class SteeringResult:
    """The model's next token with and without steering, for every prompt.

    `before` and `after` are the logits at each prompt's last position, float32 on the CPU. `watched` holds, for every
    watched group and prompt, the relative change of its activations: sum_n sign(a_n) (a'_n - a_n) / sum_n |a_n| with a
    before and a' after steering, so that a group scaled by m has m - 1 (nan where the whole group was at zero).
    `continuations` holds (before, after) for every prompt where text was generated. `nodes` are the steered ones.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> result = tnc.steer(model, "The dog near the cats", ["L2/N5"], scale=-2)
        >>> result.summary().columns.tolist()
        ['prompt', 'top_before', 'top_after', 'kl']
        >>> len(result), result.before.shape == result.after.shape
        (1, True)
    """

    prompts: tuple[str, ...]
    before: Float[Tensor, "prompt d_vocab"]
    after: Float[Tensor, "prompt d_vocab"]
    nodes: pd.DataFrame
    settings: Mapping[str, Any]
    watched: Mapping[str, Float[Tensor, " prompt"]]
    continuations: tuple[tuple[str, str], ...] | None
    token_names: Mapping[int, str]

    @property
    def kl(self) -> Float[Tensor, " prompt"]:
        """KL(before || after) = sum_v p_before (log p_before - log p_after) of the next token, in nats."""
        before, after = (logits.double().log_softmax(-1) for logits in (self.before, self.after))
        return (before.exp() * (before - after)).sum(-1).clamp(min=0).float()

    @property
    def top_before(self) -> list[str]:
        """The most probable next token of every prompt, without steering."""
        return [self.token_names[token] for token in self.before.argmax(-1).tolist()]

    @property
    def top_after(self) -> list[str]:
        """The most probable next token of every prompt, with steering."""
        return [self.token_names[token] for token in self.after.argmax(-1).tolist()]

    def __len__(self) -> int:
        """How many prompts."""
        return len(self.prompts)

    def to_dataframe(self) -> pd.DataFrame:
        """The top tokens before and after, most probable after steering first.

        Columns: prompt (its number), token, token_id, probability_before, probability_after, probability_change,
        logit_before, logit_after, logit_change.
        """
        frames = []
        for index, tokens in enumerate(self._shown()):
            frame = pd.DataFrame({"prompt": index, "token": [self.token_names[t] for t in tokens], "token_id": tokens})
            for name, values in (("probability", _probabilities), ("logit", lambda logits: logits)):
                before, after = (values(logits[index])[tokens].numpy() for logits in (self.before, self.after))
                columns = {f"{name}_before": before, f"{name}_after": after, f"{name}_change": after - before}
                frame = frame.assign(**columns)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """One row a prompt: prompt, top_before, top_after, kl, one column a watched group, and any continuations."""
        table = {
            "prompt": self.prompts,
            "top_before": self.top_before,
            "top_after": self.top_after,
            "kl": self.kl.numpy(),
        }
        table |= {f"change of {name}": change.numpy() for name, change in self.watched.items()}
        if self.continuations is not None:
            table["continuation_before"], table["continuation_after"] = zip(*self.continuations, strict=True)
        return pd.DataFrame(table)

    def __repr__(self) -> str:
        first = f"{self.prompts[0]!r}: {self.top_before[0]!r} → {self.top_after[0]!r}"
        return (
            f"SteeringResult({describe(self.settings)} on {len(self.nodes)} nodes, {len(self)} prompts, first {first}, "
            f"mean KL {self.kl.mean():.4g} nats)"
        )

    def _repr_html_(self) -> str:
        first = self.to_dataframe().query("prompt == 0")
        names = {"token": "token", "probability_before": "before", "probability_after": "after"}
        names |= {"probability_change": "change", "logit_change": "change of logit"}
        shown = first[list(names)].rename(columns=names)
        tables = _html.table(self.summary(), bars=("kl",)), _html.table(shown, bars=("change",))
        return _html.block(repr(self), tables[0], _html.note(f"next token of {self.prompts[0]!r}:"), tables[1])

    def _shown(self) -> list[list[int]]:
        return shown_tokens([self.before, self.after], self.settings["top_k"])


def _probabilities(logits: Tensor) -> Tensor:
    return logits.double().softmax(-1).float()


def shown_tokens(logits: Sequence[Float[Tensor, "prompt d_vocab"]], top_k: int) -> list[list[int]]:
    """For every prompt the tokens among the `top_k` of any of these runs, by their logits in the last run."""
    tops: list[Int[Tensor, "prompt k"]] = [run.topk(min(top_k, run.shape[-1]), dim=-1).indices for run in logits]
    out = []
    for index, last in enumerate(logits[-1]):
        tokens = torch.cat([top[index] for top in tops]).unique()
        out.append(tokens[last[tokens].argsort(descending=True, stable=True)].tolist())
    return out


def describe(settings: Mapping[str, Any]) -> str:
    """`scale=0`, or `value=tensor [1, 12]`."""
    amount = settings["amount"]
    return f"{settings['how']}={amount if isinstance(amount, int | float) else 'tensor ' + str(list(amount.shape))}"
