"""`checked`: public functions verify types and tensor shapes at the call (jaxtyping with beartype)."""

from collections.abc import Callable
from typing import TypeVar

from beartype import beartype
from jaxtyping import jaxtyped

F = TypeVar("F", bound=Callable)


def checked(function: F) -> F:
    """Check the annotations of a public function, tensor shapes included, whenever it is called."""
    return jaxtyped(typechecker=beartype)(function)  # pyright: ignore[reportCallIssue, reportReturnType]
