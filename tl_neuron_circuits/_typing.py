"""`checked`: public calls verify names, types and tensor shapes of their arguments (jaxtyping with beartype).

What came wrong is said in one line: the argument, what is expected, what came. Integers and sequences of numbers are
taken as users have them (`_indices.py`), and become Python's before they are checked.
"""

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from typing import Any, TypeVar

from ._indices import as_list, brief, is_integer
from ._renamed import renamed_argument

F = TypeVar("F", bound=Callable)


class ArgumentError(TypeError):
    """A public call got an argument of a wrong name, type or shape."""


def checked(function: F) -> F:
    """Check the arguments of a public function, or of a dataclass, whenever it is called.

    Raises:
        ArgumentError: when called: an argument's name is unknown, or its type or shape is wrong.
    """
    if inspect.isclass(function):
        function.__init__ = _checked_init(function)  # pyright: ignore[reportAttributeAccessIssue]
        # By jaxtyping's hook in tests, which would come before numbers are Python's.
        function.__no_type_check__ = True  # pyright: ignore[reportAttributeAccessIssue]
        return typing.cast(F, function)

    # Building one takes beartype milliseconds, so none is built before its function is called: there are a hundred.
    @cache
    def typed() -> Callable:
        from beartype import beartype
        from jaxtyping import jaxtyped

        return jaxtyped(typechecker=beartype)(function)  # pyright: ignore[reportCallIssue]

    signature = cache(lambda: _signature(function))

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        from jaxtyping import TypeCheckError

        bound = bind_arguments(function, signature(), args, kwargs)
        try:
            return typed()(*bound.args, **bound.kwargs)
        except TypeCheckError as error:
            raise ArgumentError(_problem(function, bound) or _in_one_line(function, str(error))) from None

    return call  # pyright: ignore[reportReturnType]


def bind_arguments(
    function: Callable, signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    """The arguments by name, with numbers as Python's.

    Raises:
        ArgumentError: a name that the function does not have (any longer), one that is missing, or too many.
    """
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(_unknown_name(function, signature, kwargs) or f"{_name(function)}: {error}.") from None
    for name in _with_numbers(function):
        if name in bound.arguments:
            annotation = signature.parameters[name].annotation
            bound.arguments[name] = _plain(function, name, bound.arguments[name], annotation)
    return bound


def check_arguments(function: Callable, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Check these arguments, by name, against the annotations of a `checked` function; with numbers as Python's.

    Raises:
        ArgumentError: as `checked`; defaults are filled in.
    """
    signature = _signature(inspect.unwrap(function))
    bound = bind_arguments(function, signature, (), arguments)
    problem = _problem(function, bound)
    if problem:
        raise ArgumentError(problem)
    bound.apply_defaults()
    return bound.arguments


def check_fields(instance: Any) -> None:
    """Check a frozen dataclass against its annotations, from `__post_init__`; numbers become Python's.

    Raises:
        ArgumentError: a field of a wrong type.
    """
    from beartype.door import is_bearable

    kind = type(instance)
    signature = _signature(kind)
    for field in dataclasses.fields(instance):
        annotation = signature.parameters[field.name].annotation
        value = _plain(kind, field.name, getattr(instance, field.name), annotation)
        object.__setattr__(instance, field.name, value)
        if not _is_open(annotation) and not is_bearable(value, annotation):
            raise ArgumentError(_refusal(kind, field.name, annotation, value))


def _checked_init(kind: type) -> Callable:
    """The dataclass's own `__init__`, after its arguments were checked."""
    plain, signature = kind.__init__, cache(lambda: _signature(kind))

    @wraps(plain)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = bind_arguments(kind, signature(), args, kwargs)
        problem = _problem(kind, bound)
        if problem:
            raise ArgumentError(problem)
        plain(self, *bound.args, **bound.kwargs)

    return __init__


@cache
def _signature(function: Callable) -> inspect.Signature:
    """With evaluated annotations where they can be: names for type checkers alone stay text, which nothing checks."""
    try:
        return inspect.signature(function, eval_str=True)
    except NameError:
        return inspect.signature(function)


@cache
def _with_numbers(function: Callable) -> tuple[str, ...]:
    """The parameters whose annotations have integers or floats in them, by the text of the annotation."""
    parameters = _signature(inspect.unwrap(function)).parameters.values()
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    number = re.compile(r"\b(int|float)\b")
    return tuple(p.name for p in parameters if p.kind not in several and number.search(_written(p.annotation)))


def _problem(function: Callable, bound: inspect.BoundArguments) -> str | None:
    """Which argument beartype rejects; sizes that arguments share count in the order of the arguments."""
    from beartype.door import is_bearable
    from jaxtyping import jaxtyped

    with jaxtyped("context"):  # pyright: ignore[reportCallIssue]
        for name, value in bound.arguments.items():
            parameter = bound.signature.parameters[name]
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or _is_open(parameter.annotation):
                continue
            if not is_bearable(value, parameter.annotation):
                return _refusal(function, name, parameter.annotation, value)
    return None


def _is_open(annotation: Any) -> bool:
    """Whether there is nothing to check: no annotation, or a name that only type checkers know."""
    return annotation is inspect.Parameter.empty or isinstance(annotation, str)


def _refusal(function: Callable, name: str, annotation: Any, value: Any) -> str:
    return f"{_name(function)}: expected {name} to be {_written(annotation)}; got {brief(value)}."


def _in_one_line(function: Callable, text: str) -> str:
    """What is left where no argument is at fault: the value that the function returns."""
    what = "the return value" if "return value" in text else "an argument"
    named = re.search(r"typechecking parameter '(\w+)'", text)
    what = named[1] if named else what
    return f"{_name(function)}: {what} does not fit the annotation ({' '.join(text.split())[:200]})."


def _unknown_name(function: Callable, signature: inspect.Signature, kwargs: Mapping[str, Any]) -> str | None:
    """For the first keyword that the function does not have: its new name, or the nearest."""
    name = _name(function)
    known = [key for key, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for key in kwargs:
        if key in known:
            continue
        now = renamed_argument(name, key)
        if now:
            return f"{name} has no argument {key!r} any longer: write {now}; see docs/migration.md."
        near = difflib.get_close_matches(key, known, 1)
        rest = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(k for k in known if k != 'self')}."
        return f"{name} has no argument {key!r}; {rest}"
    return None


def _name(function: Callable) -> str:
    return function.__qualname__.removesuffix(".__init__").rpartition("<locals>.")[2]


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; the annotation alone if it is none."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return tuple(inner for member in typing.get_args(annotation) for inner in _members(member))
    return (annotation,)


def _plain(function: Callable, name: str, value: Any, annotation: Any) -> Any:
    """Numbers, and sequences of numbers, as Python's, where the annotation has those; a boolean is not a number."""
    members = _members(annotation)
    if _is_wanted_as_it_is(value, members):
        return value
    kinds = set(members)
    if kinds & {int, float} and not kinds & {bool, object}:
        if isinstance(value, bool):
            raise ArgumentError(_refusal(function, name, annotation, value))
        number = _as_number(value, kinds)
        if number is not None:
            return number
    kinds = {kind for member in members for kind in _entries(member)}
    rows = next((kind for kind in kinds if _entries(kind) == (int,)), None)
    if rows is not None:  # pairs of integers, such as (layer, unit)
        return _rows(function, name, value, annotation, rows)
    entries = as_list(value) if kinds & {int, float} and bool not in kinds else None
    if entries is None:
        return value
    if any(isinstance(entry, bool) for entry in entries):
        raise ArgumentError(_refusal(function, name, annotation, value))
    numbers = [_as_number(entry, kinds) for entry in entries]
    if None in numbers:
        return value
    containers = {typing.get_origin(member) for member in members} & {tuple, list, Sequence}
    return tuple(numbers) if containers == {tuple} or isinstance(value, tuple) else numbers


def _rows(function: Callable, name: str, value: Any, annotation: Any, row: Any) -> Any:
    """Rows of integers as tuples, from a sequence of them or from an array of two dimensions."""
    if len(getattr(value, "shape", ())) == 2 and hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    return [entry if isinstance(entry, str) else _plain(function, name, entry, row) for entry in value]


def _as_number(value: Any, kinds: set[Any]) -> int | float | None:
    """As an integer where that is wanted and it is one, else as a float where that is wanted."""
    if is_integer(value):
        return int(value) if int in kinds else float(value)
    if float in kinds and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item() if isinstance(value.item(), float) else None
    return value if float in kinds and isinstance(value, float) else None


def _entries(member: Any) -> tuple[Any, ...]:
    """The kinds of entries of `Sequence[...]` or `tuple[..., ...]`."""
    arguments = typing.get_args(member)
    if typing.get_origin(member) not in (Sequence, tuple, list) or not arguments:
        return ()
    return _members(arguments[0])


def _is_wanted_as_it_is(value: Any, members: Sequence[Any]) -> bool:
    """Whether the annotation takes the tensor or array that the value is."""
    if not hasattr(value, "dtype"):
        return False
    # To Python 3.10 list[int] is a type too. NumPy's float64 is a float, but a tensor of shape () goes the same way.
    arrays = [member.array_type for member in members if hasattr(member, "array_type")]
    rest = [member for member in members if not hasattr(member, "array_type") and member is not float]
    plain = [member for member in rest if isinstance(member, type) and typing.get_origin(member) is None]
    return Any in members or isinstance(value, (*arrays, *plain))


def _written(annotation: Any) -> str:
    """The annotation without module paths."""
    names = []
    for member in _members(annotation):
        if member is type(None):
            text = "None"
        elif getattr(member, "__name__", "") == "TransformerLensModel":
            text = "a TransformerLens model (HookedTransformer, TransformerBridge)"
        elif hasattr(member, "array_type"):
            text = member.__name__
        elif isinstance(member, type) and not typing.get_args(member):
            text = member.__name__
        else:
            text = re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(member))
        names.append(text)
    return " or ".join(dict.fromkeys(names))
