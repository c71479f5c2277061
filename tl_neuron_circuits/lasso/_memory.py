"""What CircuitLasso's statistics take, before they are made.

    a regression of T targets on S sources:  S x S + S x T products in float64, S x S where targets are the sources
    observing    one such per block that is kept, one that grows, one of the newest batch
    solving      the blocks kept, their total, its correlations, and three S x T arrays of weights
    streamed     n x S observations, and a few S x B arrays for the B targets of a block

Blocks are kept apart only where something asks for them: a held-out error, a bootstrap, a directory to resume from.
"""

from dataclasses import dataclass, replace

from .._errors import SettingsError

_FLOAT = 8  # bytes of a float64
_ARRAYS = 8  # source x target arrays at once as a block is solved


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
    rows: int = 0
    """Observations, if they are kept themselves (`_samples`)."""
    prompts: int = 0
    widest: int = 0
    """The most targets of a streamed block."""

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

    @property
    def streamed_bytes(self) -> int:
        """The most that keeping the observations and solving block by block holds at once."""
        before = 0 if not self.readout else self.sources if self.slots == self.target_slots else self.units
        kept = self.rows * self.sources + self.prompts * (before + self.readout)
        # while a block is observed its batches stand beside it, and where blocks are solved, arrays of its weights
        return _FLOAT * (kept + kept // 4 + _ARRAYS * self.sources * max(self.widest, self.readout))


def require_memory(
    size: Size, available: int | None, *, joins: str | None, heads: bool, no_stream: str | None = None
) -> None:
    """Raise where the statistics cannot fit.

    Args:
        size: as it will be.
        available: bytes; None where it cannot be told.
        joins: what has to be left out for blocks to be joined; None where they are.
        heads: whether single heads are components.
        no_stream: what has to be left out for targets to be streamed from the observations; None where not even that
            would fit.

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
    said = [f"{what} ({gigabytes(other.bytes)})" for what, other in smaller.items()]
    if no_stream is not None and size.streamed_bytes <= available:
        said += [f"no {no_stream}, so that targets can be streamed ({gigabytes(size.streamed_bytes)})"]
    elif no_stream is None:
        said += [f"fewer prompts, so that their observations fit ({gigabytes(size.streamed_bytes)} now)"]
    said += ["Components(attention='layers')"] if heads else []
    said += ["nodes of fewer layers (bases.Neurons(layers=[...]), bases.MLPOutputs(layers=[...]))"]
    blocks = f" in each of {size.kept} blocks" if size.kept > 1 else ""
    raise SettingsError(
        f"expected statistics that fit into memory: the products of {size.sources:,} sources with each other and with "
        f"{size.targets:,} targets, in float64{blocks}, and the solver's copies need {gigabytes(size.bytes)}; "
        f"{gigabytes(available)} are free. What helps: {'; '.join(said)}."
    )


def gigabytes(size: int) -> str:
    """A size in words."""
    return f"{size / 1e9:.3g} GB"
