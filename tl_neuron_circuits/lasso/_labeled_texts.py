"""Texts with a label and with an attribute that a classifier should not use; their reader for Bias in Bios.

    biased      label and attribute agree in every text: nothing in it tells which of the two to learn
    balanced    the four groups (label x attribute) have one size: what the classifier is judged on

Source: De-Arteaga et al. 2019 (Bias in Bios); Marks et al. 2025, arXiv 2403.19647 (professor and nurse); METHODS 5.1.
"""

import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from .._errors import FileFormatError, SettingsError
from .._files import parse_json, parse_json_lines, read_text, short
from .._indices import Indices, as_indices, as_list
from .._typing import checked

BIOS_PROFESSIONS: tuple[str, ...] = (
    "accountant architect attorney chiropractor comedian composer dentist dietitian dj filmmaker interior_designer "
    "journalist model nurse painter paralegal pastor personal_trainer photographer physician poet professor "
    "psychologist rapper software_engineer surgeon teacher yoga_teacher"
).split()  # pyright: ignore[reportAssignmentType]
"""Bias in Bios' professions in the order of its numbers (the data set card of LabHC/bias_in_bios)."""


@dataclass(frozen=True, repr=False)
class LabeledTexts:
    """Texts, the label to learn and the spurious attribute: 0 or 1 each.

    Raises:
        SettingsError: lengths differ, there is no text, or a value is neither 0 nor 1.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.lasso.LabeledTexts(["He cares for patients.", "She lectures."], label=[0, 1], spurious=[0, 1])
        LabeledTexts(2 texts; label, spurious = 00: 1, 01: 0, 10: 0, 11: 1)
    """

    texts: Sequence[str]
    label: Sequence[int]
    spurious: Sequence[int]

    def __post_init__(self) -> None:
        """Check the columns."""
        for name in ("texts", "label", "spurious"):
            column = getattr(self, name)
            object.__setattr__(self, name, tuple(as_list(column) or column))
        lengths = {name: len(getattr(self, name)) for name in ("texts", "label", "spurious")}
        if len(set(lengths.values())) > 1 or not self.texts:
            raise SettingsError(
                f"expected at least one text, with one label and one spurious attribute per text; got {lengths}."
            )
        wrong = (set(self.label) | set(self.spurious)) - {0, 1}
        if wrong:
            raise SettingsError(f"expected labels and attributes of 0 and 1; got {sorted(map(repr, wrong))[:5]}.")

    def __len__(self) -> int:
        """How many texts."""
        return len(self.texts)

    @classmethod
    def from_bias_in_bios(
        cls, source: str | Path | Iterable[Mapping[str, Any]], professions: tuple[str, str] = ("professor", "nurse")
    ) -> "LabeledTexts":
        """Biographies of two professions: label 1 is the second of them, spurious 1 is a woman.

        Args:
            source: a JSONL, JSON, CSV or Parquet file (or a folder of them) with the columns hard_text, profession and
                gender of `LabHC/bias_in_bios`; or rows, such as a split of that data set loaded by `datasets`.
            professions: by name.

        Raises:
            FileFormatError: no such file, or other columns.
            SettingsError: an unknown profession, or none of its texts is there.

        Example:
            >>> import tl_neuron_circuits as tnc
            >>> rows = [{"hard_text": "She lectures.", "profession": 21, "gender": 1}]
            >>> rows += [{"hard_text": "He helps.", "profession": 13, "gender": 0}]
            >>> tnc.lasso.LabeledTexts.from_bias_in_bios(rows)
            LabeledTexts(2 texts; label, spurious = 00: 0, 01: 1, 10: 1, 11: 0)
        """
        unknown = [name for name in professions if name not in BIOS_PROFESSIONS]
        if unknown or professions[0] == professions[1]:
            raise SettingsError(f"expected two of {', '.join(BIOS_PROFESSIONS)}; got {professions}.")
        wanted = {BIOS_PROFESSIONS.index(name): label for label, name in enumerate(professions)}
        rows = _rows(Path(source)) if isinstance(source, str | Path) else source
        texts, labels, spurious = [], [], []
        for place, row in enumerate(rows):
            missing = {"hard_text", "profession", "gender"} - set(row if isinstance(row, Mapping) else ())
            if missing:
                raise FileFormatError(
                    f"expected the columns hard_text, profession and gender; {sorted(missing)} missing."
                )
            profession, text, gender = row["profession"], row["hard_text"], _whole(row["gender"])
            number = BIOS_PROFESSIONS.index(profession) if profession in BIOS_PROFESSIONS else _whole(profession)
            if not isinstance(text, str) or gender not in (0, 1) or number is None:
                raise FileFormatError(
                    f"row {place}: expected a text, a profession by name or number, and a gender of 0 or 1; got "
                    f"{short(repr(text))}, {short(repr(profession))}, {short(repr(row['gender']))}."
                )
            if number in wanted:
                texts.append(text)
                labels.append(wanted[number])
                spurious.append(gender)
        if len(set(labels)) < 2:
            raise SettingsError(f"expected texts of both {professions}; got {len(texts)} texts of {len(set(labels))}.")
        return cls(texts, labels, spurious)

    @property
    def groups(self) -> dict[tuple[int, int], int]:
        """How many texts of each (label, spurious)."""
        pairs = list(zip(self.label, self.spurious, strict=True))
        return {group: pairs.count(group) for group in ((0, 0), (0, 1), (1, 0), (1, 1))}

    def take(self, rows: Indices) -> "LabeledTexts":
        """These rows: indices, a slice, or a boolean mask.

        Raises:
            SettingsError: others, or a row that is not there.
        """
        chosen = as_indices(rows, "rows", len(self))
        return LabeledTexts(
            [self.texts[k] for k in chosen], [self.label[k] for k in chosen], [self.spurious[k] for k in chosen]
        )

    @checked
    def biased(self, n: int | None = None, seed: int = 0) -> "LabeledTexts":
        """Texts whose label and attribute agree, half of each label; as many as there are, or `n`.

        Raises:
            SettingsError: there are not so many.
        """
        return self._draw([(0, 0), (1, 1)], n, seed)

    @checked
    def balanced(self, n: int | None = None, seed: int = 0) -> "LabeledTexts":
        """A quarter of each group; as many as there are, or `n`.

        Raises:
            SettingsError: there are not so many.
        """
        return self._draw([(0, 0), (0, 1), (1, 0), (1, 1)], n, seed)

    def _draw(self, groups: Sequence[tuple[int, int]], n: int | None, seed: int) -> "LabeledTexts":
        each = min(self.groups[group] for group in groups) if n is None else n // len(groups)
        if each < 1 or any(self.groups[group] < each for group in groups):
            raise SettingsError(f"expected {max(each, 1)} texts each of (label, spurious) {groups}; got {self.groups}.")
        generator = torch.Generator().manual_seed(seed)
        pairs = list(zip(self.label, self.spurious, strict=True))
        chosen = []
        for group in groups:
            rows = [k for k, pair in enumerate(pairs) if pair == group]
            chosen += [rows[k] for k in torch.randperm(len(rows), generator=generator)[:each].tolist()]
        return self.take(sorted(chosen))

    def __repr__(self) -> str:
        counts = ", ".join(f"{a}{b}: {count}" for (a, b), count in self.groups.items())
        return f"LabeledTexts({len(self)} texts; label, spurious = {counts})"


def _whole(value: Any) -> int | None:
    """A whole number of up to nine digits, also as a text (as in CSV files); None for anything else."""
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else None
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not abs(float(value)) < 10**9:
        return None
    return int(float(value)) if float(value).is_integer() else None


def _rows(path: Path) -> Iterable[Mapping[str, Any]]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.suffix in (".jsonl", ".json", ".csv", ".parquet")]
    if not files or not all(file.is_file() for file in files):
        raise FileFormatError(f"expected a JSONL, JSON, CSV or Parquet file, or a folder of them, at {path}.")
    for file in files:
        try:
            yield from _table(file)
        except (ValueError, OSError, ArithmeticError, RecursionError, AttributeError, TypeError) as error:
            raise FileFormatError(f"{file} cannot be read: {short(error)}") from error


def _table(file: Path) -> Iterable[Any]:
    if file.suffix == ".jsonl":
        return [row for _, row in parse_json_lines(read_text(file))]
    if file.suffix == ".json":
        content = parse_json(read_text(file))
        return content if isinstance(content, list) else pd.DataFrame(content).to_dict("records")
    reader = pd.read_csv if file.suffix == ".csv" else pd.read_parquet
    return reader(file).to_dict("records")
