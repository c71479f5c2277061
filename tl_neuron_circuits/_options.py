"""Choices with options as small frozen objects, and the form in which labels and command lines write them.

integrated_gradients(steps=20)        IntegratedGradients(steps=20)
relp(rules=ln+identity+half)          RelP(rules=("ln", "identity", "half"))
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from ._errors import SettingsError
from ._typing import check_fields

O = TypeVar("O", bound="Options")  # noqa: E741


@dataclasses.dataclass(frozen=True)
class Options:
    """A choice is its options: equal options are equal choices, and label and JSON are made from them."""

    name: ClassVar[str]
    __no_type_check__: ClassVar[bool] = True  # by jaxtyping's hook in tests: fields are checked below, once converted

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if isinstance(getattr(self, field.name), list):  # as JSON has it
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        check_fields(self)

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
        """Raise unless the option is a positive integer.

        Raises:
            SettingsError: it is not.
        """
        value = getattr(self, option)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SettingsError(f"expected {option} of {self.name} to be an integer of at least 1; got {value!r}.")


def parse_options(text: str, kinds: Mapping[str, type[O]], *, what: str, unwritten: tuple[str, ...] = ()) -> O:
    """The choice that `text` names, such as `integrated_gradients(steps=20, rules=ln+half)` or `share(0.02)`.

    Values without a name go to the options in their order, as in a call.

    `kinds` are the classes by name, `what` is what the error calls them, `unwritten` are options without a text form.

    Raises:
        SettingsError: the name or an option is unknown, or the text has another form.
    """
    form = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", text)
    if form is None or form[1] not in kinds:
        raise SettingsError(
            f"expected {what} out of {list(kinds)}, with options as in 'name(option=value)'; got {text!r}."
        )
    kind = kinds[form[1]]
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name not in unwritten}
    options: dict[str, Any] = {}
    for place, part in enumerate((form[2] or "").split(",") if (form[2] or "").strip() else ()):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and place < len(fields) and len(options) == place:
            name, value = list(fields)[place], name
        if name not in fields or name in options or not value:
            raise SettingsError(
                f"expected options of {form[1]} out of {list(fields)}, as name=value, each once; got {part.strip()!r}."
            )
        options[name] = _read(fields[name], value)
    return kind(**options)


def _read(field: Any, value: str) -> Any:
    """By the option's default or type: text, an integer, or a number (also where the default is none)."""
    default = field.default
    if isinstance(default, str | tuple):
        return tuple(part for part in value.split("+") if part) if "+" in value else value
    whole = field.type is int or isinstance(default, int)
    try:
        return int(value) if whole else float(value)
    except ValueError:
        raise SettingsError(f"expected a number for {field.name}; got {value!r}.") from None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _written(value: Any) -> str:
    """Several names are joined by +; a single one in a tuple ends in +, which tells it from the name of a set."""
    if not isinstance(value, tuple):
        return str(value)
    return "+".join(value) + ("+" if len(value) < 2 else "")
