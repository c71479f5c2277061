"""What the methods of `attribute` have in common: a name, options, a label, and the forms in which they are written."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._errors import SettingsError
from ..bases._runs import Values
from ..bases._site import Parts
from ..tasks._tokenized import Batch
from ._scope import Blocks, Scope


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to score nodes: its options, and a label and a JSON form made from them."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        rules = getattr(self, "rules", None)
        if isinstance(rules, list):  # as JSON has it
            object.__setattr__(self, "rules", tuple(rules))

    def score(
        self, scope: Scope, batch: Batch, baselines: Mapping[str, Parts | None], *, rows: int, verbose: bool
    ) -> tuple[Values, Blocks]:
        """The values of the first run at every site, and the scores of every node, summed over the batch.

        Args:
            scope: sites, metric and conventions.
            batch: prompts of one length.
            baselines: what each node is compared with, by hook; None is zero.
            rows: forward rows at once, for methods that need many.
            verbose: show progress inside the batch.
        """
        raise NotImplementedError

    def check(self, scope: Scope) -> None:
        """Raise for a question that the method does not answer.

        Raises:
            SettingsError: with the way out.
        """

    def finish(self, sums: Blocks, n_pairs: int) -> Blocks:
        """From sums over all pairs to scores."""
        return {key: block / n_pairs for key, block in sums.items()}

    @property
    def measures_all(self) -> bool:
        """Whether every node gets a score."""
        return True

    @property
    def options(self) -> dict[str, Any]:
        """Every option by name, as JSON has it."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @property
    def label(self) -> str:
        """The name, and in brackets the options that are not the default: "integrated_gradients(steps=20)"."""
        changed = [
            f"{field.name}={_written(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is not field.default and getattr(self, field.name) != field.default
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    def to_json(self) -> dict[str, Any]:
        """The name and every option."""
        return {"name": self.name, **self.options}

    def at_least_one(self, option: str) -> None:
        """Raise unless the option is a positive number.

        Raises:
            SettingsError: it is not.
        """
        value = getattr(self, option)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SettingsError(f"expected {option} of {self.name} to be an integer of at least 1; got {value!r}.")

    def no_denoising(self, scope: Scope) -> None:
        """Raise for a direction that paths between two runs do not have.

        Raises:
            SettingsError: the direction is "denoising".
        """
        if scope.direction == "denoising":
            raise SettingsError(
                f"direction='denoising' needs one of the methods relp, gradient, patching; got {self.label!r}."
            )


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1) in float32, drawn on the CPU so that every device gets the same."""
    return torch.randn(like.shape, generator=generator).to(like.device)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _written(value: Any) -> str:
    return "+".join(value) if isinstance(value, tuple) else str(value)
