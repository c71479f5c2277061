"""What every result says of the model and the pairs it was made with, and what pairs must have to be compared."""

from typing import Any

from .._errors import PairsError
from .._files import versions
from ..models._protocol import TransformerLensModel, model_name
from ._tokenized import TokenizedPairs


def provenance(model: TransformerLensModel, tokens: TokenizedPairs) -> dict[str, Any]:
    """The model's name, how many pairs, their hash and lengths, and the versions of what computed."""
    return {
        "model": model_name(model),
        "n_pairs": len(tokens),
        "pairs_hash": tokens.hash,
        "lengths": sorted(set(tokens.lengths)),
        "versions": versions(),
    }


def require_corrupt(tokens: TokenizedPairs, purpose: str, *, instead: str = "") -> None:
    """Raise unless every pair has a corrupt prompt of its clean prompt's length.

    `purpose` begins the error, such as "baseline='corrupt'"; `instead` ends it with another way out.

    Raises:
        PairsError: naming the first pair that does not fit.
    """
    if tokens.corrupt is None:
        raise PairsError(
            f"{purpose} compares with corrupt prompts, and these pairs have none. Give corrupt={instead and ', or '}"
            f"{instead}."
        )
    for index, (clean, corrupt) in enumerate(zip(tokens.clean, tokens.corrupt, strict=True)):
        if len(clean) != len(corrupt):
            raise PairsError(
                f"pair {index}: clean has {len(clean)} tokens and corrupt {len(corrupt)}; they are compared position "
                "by position. Choose prompts of equal token length (tasks.keep_fitting leaves out the others)"
                f"{instead and ', or '}{instead}."
            )
