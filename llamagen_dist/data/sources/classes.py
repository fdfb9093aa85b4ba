"""Class labels: from folder names, or one value per sample; with or without a file that fixes their order."""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.data.index import printable
from llamagen_dist.errors import UserError
from llamagen_dist.files import sha256_file

MOST_CLASSES = 1_000_000  # a label beyond this is a mistake, not a class


@dataclass(frozen=True)
class ClassMap:
    """``keys[k]`` is how the source calls class k (a folder, a WordNet id), ``names[k]`` how people do."""

    path: Path
    keys: tuple[str, ...]
    names: tuple[str, ...]
    sha256: str

    @classmethod
    def read(cls, path: Path) -> "ClassMap":
        """One class a line, label 0 first: the key, then (after a tab, else the first space) its name if that differs.

        Raises UserError: not readable as UTF-8, empty, a key twice.
        """
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            sha256 = sha256_file(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
        pairs = [[part.strip() for part in line.split("\t" if "\t" in line else None, 1)] for line in lines]
        keys, names = tuple(pair[0] for pair in pairs), tuple(pair[-1] for pair in pairs)
        if not keys:
            raise UserError(f"{path}: names no class; write one a line: the folder, a space, the name")
        if twice := first_double(keys):
            raise UserError(f"{path}: lists {twice!r} twice; every class may have one line")
        return cls(path, keys, names, sha256)

    def folders(self, found: Sequence[str], where: str) -> tuple[dict[str, int], list[str]]:
        """(label of each key, names). Raises UserError unless exactly the listed classes were found."""
        if unknown := sorted({*found} - {*self.keys}):
            raise UserError(f"{where}: {len(unknown)} classes are not in {self.path}, the first is {unknown[0]!r}")
        if absent := sorted({*self.keys} - {*found}):
            raise UserError(
                f"{where}: {len(absent)} classes of {self.path} have no images, the first is {absent[0]!r}; add "
                "images, or take them out of the class map"
            )
        return {key: label for label, key in enumerate(self.keys)}, list(self.names)

    def numbers(self, labels: NDArray[np.int64], where: str) -> tuple[NDArray[np.int64], list[str]]:
        """Labels that are numbers already: line k names class k. Raises UserError for a label without a line."""
        largest = int(labels.max(initial=0))
        if largest >= len(self.keys):
            raise UserError(
                f"{where}: holds the label {largest}, but {self.path} names {len(self.keys)} classes, 0 first"
            )
        return labels, list(self.names)


def first_double(names: Sequence[str]) -> str | None:
    """The first name that comes more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def folder_classes(found: Sequence[str], class_map: ClassMap | None, where: str) -> tuple[dict[str, int], list[str]]:
    """(label of each folder name, class names): sorted, or as the class map says. Raises UserError."""
    for name in found:
        if printable(name) != name:
            raise UserError(f"{where}: the class name {printable(name)!r} is not UTF-8; rename it")
    if class_map is not None:
        return class_map.folders(found, where)
    names = sorted(found)
    return {name: label for label, name in enumerate(names)}, names


class SampleClasses:
    """Collects one class per sample; all must be numbers, or all names."""

    def __init__(self, where: str, class_map: ClassMap | None) -> None:
        self._where, self._map = where, class_map
        self._values, self._names = array("q"), dict[str, int]()
        self._missing = self._numbers = 0
        self._first_missing = ""

    def add(self, value: object, at: str) -> None:
        """The next sample's class: an int, digits, a name, or None. at: what to call the sample. Raises UserError."""
        if value is None:
            self._missing += 1
            self._first_missing = self._first_missing or at
            value = ""
        right = isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)
        text = str(value).strip()
        is_number = text.isascii() and text.isdigit()
        if not right or not (text or self._missing) or (is_number and int(text) >= MOST_CLASSES):
            raise UserError(f"{self._where}: {at}: the class must be a number from 0 or a name, not {value!r}")
        self._numbers += is_number
        self._values.append(int(text) if is_number else self._names.setdefault(text, len(self._names)))

    def finish(self) -> tuple[NDArray[np.int64], list[str]] | tuple[None, None]:
        """(labels int64 [n], class names), or (None, None) where no sample has a class. Raises UserError."""
        count = len(self._values)
        if self._missing == count:
            if self._map is not None:
                raise UserError(f"{self._where}: a class map was given, but the samples have no classes")
            return None, None
        if self._missing:
            raise UserError(
                f"{self._where}: {self._missing} of {count} samples have no class, the first is {self._first_missing}; "
                "give every sample one, or none"
            )
        labels = np.frombuffer(self._values, np.int64).copy()
        if self._numbers == count:
            if self._map is not None:
                return self._map.numbers(labels, self._where)
            return labels, [str(label) for label in range(int(labels.max()) + 1)]
        if self._numbers:
            raise UserError(f"{self._where}: some classes are numbers and others names; use one or the other")
        label_of, classes = folder_classes(list(self._names), self._map, self._where)
        order = np.array([label_of[name] for name in self._names], np.int64)
        return order[labels], classes
