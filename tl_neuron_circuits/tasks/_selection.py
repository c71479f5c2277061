"""What pairs remember: the tokenizer they were made for, and how they were chosen out of how many."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class MadeFor:
    """The tokenizer that pairs were fitted to; `tokenize` uses their BOS setting and refuses another tokenizer."""

    tokenizer: str
    """The tokenizer's name or folder."""
    fingerprint: str
    """SHA-256 of its vocabulary and of the tokens of a sample of text, in hexadecimal."""
    prepend_bos: bool | None
    """As it was asked for; None is the model's default."""
    begins_with_bos: bool
    """Whether the prompts begin with BOS."""


@dataclass(frozen=True)
class Selection:
    """How pairs were chosen: of how many candidates, and how many were left out for which reason.

    A task that draws stops when it has enough: its candidates are those that it looked at, and of those that qualified
    it gives as many as were asked for.
    """

    qualified: int
    candidates: int
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Numbers of pairs by reason."""
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Words that a task did without, by kind, because the tokenizer cuts them up or does not know them."""

    @property
    def share(self) -> float:
        """The share of the candidates that qualified."""
        return self.qualified / self.candidates if self.candidates else 0.0

    def __str__(self) -> str:
        """One clause; it names at most six words of a kind."""
        parts = [f"{count} {reason}" for reason, count in sorted(self.left_out.items(), key=lambda item: -item[1])]
        text = (
            f"{self.qualified} of {self.candidates} qualified ({self.share:.0%})" if self.candidates else "none to try"
        )
        if parts:
            text += f", left out {', '.join(parts)}"
        for kind, words in self.words.items():
            text += f"; left out {kind}: {', '.join(words[:6])}"
            text += f" and {len(words) - 6} more" if len(words) > 6 else ""
        return text
