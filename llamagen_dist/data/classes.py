"""Class labels: from folder names, or one value per sample; with or without a file that fixes their order."""

import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.data.index import printable
from llamagen_dist.data.source import Notes
from llamagen_dist.errors import UserError
from llamagen_dist.files import sha256_file

MOST_CLASSES = 1_000_000  # a label beyond this is a mistake, not a class
_SPLITS = {
    "train", "training", "trainset", "val", "valid", "validation", "dev", "test", "testing", "testset", "eval",
}  # fmt: skip


@dataclass(frozen=True)
class Classes:
    label_of: dict[str, int]
    """By the class's name in the source."""
    names: list[str]
    """Of each label, for people."""
    order: str | None = None
    """The rule, where it gives other labels than the text order of the names."""


@dataclass(frozen=True)
class ClassMap:
    """``keys[k]`` is how the source calls class k (a folder, a WordNet id), ``names[k]`` how people do."""

    path: Path
    lines: tuple[str, ...]
    sha256: str

    @classmethod
    def read(cls, path: Path) -> "ClassMap":
        """One class a line, label 0 first: the key, then (after a tab or a space) its name if that differs.

        Where a key may end is known only beside the source's own names: folders have names such as ``great dane``.
        Raises UserError: not readable as UTF-8, empty.
        """
        try:
            text = path.read_text(encoding="utf-8-sig")
            lines = tuple(line.strip() for line in text.splitlines() if line.strip())
            sha256 = sha256_file(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
        if not lines:
            raise UserError(f"{path}: names no class; write one a line: the folder, a space, the name")
        return cls(path, lines, sha256)

    def for_keys(self, folders: Sequence[str], where: str) -> Classes:
        """For classes that the source calls by these names. Raises UserError unless exactly these are listed, once."""
        pairs = [self._pair(line, {*folders}) for line in self.lines]
        keys = [key for key, _ in pairs]
        if twice := first_double(keys):
            raise UserError(f"{self.path}: lists {twice!r} twice; every class may have one line")
        if unknown := sorted({*folders} - {*keys}):
            raise UserError(f"{where}: {len(unknown)} classes are not in {self.path}, the first is {unknown[0]!r}")
        if absent := sorted({*keys} - {*folders}):
            raise UserError(f"{where}: {len(absent)} classes of {self.path} have no images, the first is {absent[0]!r}")
        return Classes({key: label for label, key in enumerate(keys)}, [name for _, name in pairs])

    @staticmethod
    def _pair(line: str, known: set[str]) -> tuple[str, str]:
        """(key, name). Without a tab the key is the longest name of the source with which the line begins."""
        if "\t" in line:
            key, _, name = (part.strip() for part in line.partition("\t"))
            return key, name or key
        for end in (len(line), *sorted((space.start() for space in re.finditer(r"\s+", line)), reverse=True)):
            if line[:end] in known:
                return line[:end], line[end:].strip() or line
        key, *rest = line.split(None, 1)
        return key, rest[0] if rest else key

    def for_numbers(self, labels: NDArray[np.int64], notes: Notes) -> list[str]:
        """The names where the labels are numbers already: line k is for label k.

        A line contains the number and the name, or the name alone; of another first word a note says what was taken
        for the name. Raises UserError for a label without a line, and where the numbers are not 0, 1, 2 …
        """
        pairs = [self._pair(line, set()) for line in self.lines]
        if all(key.isascii() and key.isdigit() for key, _ in pairs):
            wrong = next((n for n, (key, _) in enumerate(pairs) if int(key) != n), None)
            if wrong is not None:
                raise UserError(
                    f"{self.path}: the labels of {notes.where} are numbers, so class {wrong} must stand in line "
                    f"{wrong + 1}, but {pairs[wrong][0]!r} does"
                )
        if (largest := int(labels.max(initial=0))) >= len(pairs):
            raise UserError(f"{notes.where}: has the label {largest}, but {self.path} names {len(pairs)} classes")
        # "great dane" alone would lose its first word: what was taken for a key is said
        if cut := next(((key, name) for key, name in pairs if key != name and not key.isdigit()), None):
            notes.decided(f"{self.path}: {cut[0]!r} is taken for the source's name of class {cut[1]!r}")
        return [name for _, name in pairs]


def first_double(names: Sequence[str]) -> str | None:
    """The first name that comes more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def refuse_splits(names: Sequence[str], where: str, pack_what: str, least: int = 2) -> None:
    """Raises UserError where ``least`` of the names are those of parts of a data set, and hardly classes."""
    parts = [name for name in names if name.lower() in _SPLITS]
    if len(parts) >= least:
        raise UserError(
            f"{where}: holds {', '.join(parts)}, which look like parts of a data set and not like classes; pack "
            f"{pack_what}, or list them with --class-map if they are classes"
        )


def folder_classes(folders: Sequence[str], class_map: ClassMap | None, notes: Notes) -> Classes:
    """The classes that folders of these names are: as the class map says; without one by number where all names are
    numbers, else in the order of their text (Unicode). Raises UserError.
    """
    where = notes.where
    for name in folders:
        if printable(name) != name:
            raise UserError(f"{where}: the class name {printable(name)!r} is not UTF-8; rename it")
    if class_map is not None:
        return class_map.for_keys(folders, where)
    names, order = sorted(folders), None
    numbers = [name for name in names if name.isascii() and name.isdigit()]
    if names and len(numbers) == len(names):
        by_number = sorted(names, key=lambda name: (int(name), name))
        if double := first_double([str(int(name)) for name in names]):
            raise UserError(f"{where}: two class folders are called {double}, with and without zeros; rename one")
        odd = next((label for label, name in enumerate(by_number) if int(name) != label), None)
        if by_number != names:
            order = "numeric"
        if order or odd is not None:
            shown = odd if odd is not None else len(names) - 1
            notes.decided(f"{where}: class names are numbers and sorted as such: label {shown} is {by_number[shown]!r}")
        names = by_number
    elif numbers or names != sorted(names, key=_natural):
        why = "some class names are numbers and some are not" if numbers else "class names hold numbers"
        notes.decided(
            f"{where}: {why}; they are sorted as text: label 0 is {names[0]!r}, label {len(names) - 1} is "
            f"{names[-1]!r} (--class-map fixes another order)"
        )
    return Classes({name: label for label, name in enumerate(names)}, names, order)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``class10`` behind ``class2``."""
    return [(int(part) if part.isascii() and part.isdigit() else -1, part) for part in re.split(r"([0-9]+)", name)]


class SampleClasses:
    """Collects one class per sample; all must be numbers, or all names."""

    def __init__(self, notes: Notes, class_map: ClassMap | None) -> None:
        self._notes, self._where, self._map = notes, notes.where, class_map
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
        text = str(value).strip() if right else ""
        is_number = text.isascii() and text.isdigit()
        # int() refuses numbers of thousands of digits with a sentence of its own
        if not right or not (text or self._missing) or (is_number and (len(text) > 18 or int(text) >= MOST_CLASSES)):
            raise UserError(
                f"{self._where}: {at}: the class must be a number from 0 or a name, not {str(value)[:80]!r}"
            )
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
            first = self._first_missing
            raise UserError(f"{self._where}: {self._missing} of {count} samples have no class, the first is {first}")
        labels = np.frombuffer(self._values, np.int64).copy()
        if self._numbers == count:
            if self._map is not None:
                return labels, self._map.for_numbers(labels, self._notes)
            return labels, [str(label) for label in range(int(labels.max()) + 1)]
        if self._numbers:
            raise UserError(f"{self._where}: some classes are numbers and others names; use one or the other")
        classes = folder_classes(list(self._names), self._map, self._notes)
        order = np.array([classes.label_of[name] for name in self._names], np.int64)
        return order[labels], classes.names
