"""`checked`: public functions verify types and tensor shapes at the call (jaxtyping with beartype)."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable)
_EVERY_ARGUMENT_IN_FULL = "\n----------------------\n"


def checked(function: F) -> F:
    """Check the annotations of a public function, tensor shapes included, whenever it is called.

    The error names the argument and both types; jaxtyping's list of all arguments, a whole model among them, is left
    out.
    """

    # Building one takes beartype milliseconds, so none is built before its function is called: there are a hundred.
    @cache
    def typed() -> Callable:
        from beartype import beartype
        from jaxtyping import jaxtyped

        return jaxtyped(typechecker=beartype)(function)  # pyright: ignore[reportCallIssue]

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        from jaxtyping import TypeCheckError

        try:
            return typed()(*args, **kwargs)
        except TypeCheckError as error:
            raise TypeCheckError(str(error).split(_EVERY_ARGUMENT_IN_FULL)[0]) from None

    return call  # pyright: ignore[reportReturnType]
