"""What CircuitLasso's statistics take, before they are made.

    a regression of T targets on S sources:  S x S + S x T products in float64, S x S where targets are the sources
    observing    one such per block that is kept, one that grows, one of the newest batch
    solving      the blocks kept, their total, its correlations, and three S x T arrays of weights

Blocks are kept apart only where something asks for them: a held-out error, a bootstrap, a directory to resume from.
"""

from dataclasses import dataclass, replace

from .._errors import SettingsError

_FLOAT = 8  # bytes of a float64


@dataclass(frozen=True)
class Size:
    """How many columns there are, and what is kept of them."""

    units: int
    """Of all sites, at one position."""
    slots: int
    """Columns of a unit among the sources: 1 "same", 2 "pooled", every position "earlier"."""
    target_slots: int
    readout: int
    """Columns of the readout; 0 where it is a site like any other, or there is none."""
    kept: int
    """Blocks kept apart."""

    @property
    def sources(self) -> int:
        """Columns of the large regression."""
        return self.units * self.slots

    @property
    def targets(self) -> int:
        """Columns that are explained there."""
        return self.units * self.target_slots

    @property
    def bytes(self) -> int:
        """The most that observing and solving hold at once."""
        cross = self.sources * self.targets
        statistics = self.sources**2 + (0 if self.slots == self.target_slots else cross)
        if self.readout:
            sources = self.sources if self.slots == self.target_slots else self.units
            statistics += sources**2 + sources * self.readout
        copies = max(self.kept + (1 if self.kept > 1 else 0) + 1, self.kept + 2)
        return _FLOAT * (copies * statistics + 3 * cross)


def require_memory(size: Size, available: int | None, *, joins: str | None, heads: bool) -> None:
    """Raise where the statistics cannot fit.

    Args:
        size: as it will be.
        available: bytes; None where it cannot be told.
        joins: what has to be left out for blocks to be joined; None where they are.
        heads: whether single heads are components.

    Raises:
        SettingsError: with the sizes, and the arguments that help.
    """
    if available is None or size.bytes <= available:
        return
    smaller = {}
    if size.slots > 1:
        smaller["regressors='same'"] = replace(size, slots=1, target_slots=1)
    if joins is not None:
        smaller[f"no {joins}, so that blocks need not be kept apart"] = replace(size, kept=1)
    said = [f"{what} ({_gb(other.bytes)})" for what, other in smaller.items()]
    said += ["Components(attention='layers')"] if heads else []
    said += ["nodes of fewer layers (bases.Neurons(layers=[...]), bases.MLPOutputs(layers=[...]))"]
    blocks = f" in each of {size.kept} blocks" if size.kept > 1 else ""
    raise SettingsError(
        f"expected statistics that fit into memory: the products of {size.sources:,} sources with each other and with "
        f"{size.targets:,} targets, in float64{blocks}, and the solver's copies need {_gb(size.bytes)}; "
        f"{_gb(available)} are free. What helps: {'; '.join(said)}."
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
