"""`checked`: public functions verify types and tensor shapes at the call (jaxtyping with beartype)."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

F = TypeVar("F", bound=Callable)
_EVERY_ARGUMENT_IN_FULL = "\n----------------------\n"


def checked(function: F) -> F:
    """Check the annotations of a public function, tensor shapes included, whenever it is called.

    The error names the argument and both types; jaxtyping's list of all arguments, a whole model among them, is left
    out.
    """
    typed = jaxtyped(typechecker=beartype)(function)  # pyright: ignore[reportCallIssue]

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return typed(*args, **kwargs)
        except TypeCheckError as error:
            raise TypeCheckError(str(error).split(_EVERY_ARGUMENT_IN_FULL)[0]) from None

    return call  # pyright: ignore[reportReturnType]
