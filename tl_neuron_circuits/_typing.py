"""`checked`: public functions verify types and tensor shapes at the call (jaxtyping with beartype)."""

import inspect
from collections.abc import Callable, Mapping
from functools import cache, wraps
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable)
_EVERY_ARGUMENT_IN_FULL = "\n----------------------\n"


def check_arguments(function: Callable, arguments: Mapping[str, Any]) -> None:
    """Check these arguments, by name, against the annotations of a `checked` function that shares them."""
    from beartype.door import is_bearable
    from jaxtyping import TypeCheckError

    annotations = inspect.signature(function, eval_str=True).parameters
    for name, value in arguments.items():
        expected = annotations[name].annotation
        if not is_bearable(value, expected):
            raise TypeCheckError(f"expected {name} to be {expected}; got {value!r}, a {type(value).__name__}.")


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
