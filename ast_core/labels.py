"""Label vocabularies: which class has which index.

The 527 AudioSet classes (index order, MID, display name) are from Google's AudioSet,
https://research.google.com/audioset, and the 200 of FSD50K from https://zenodo.org/records/4060432, both licensed
CC BY 4.0.
"""

import csv
import hashlib
import io
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files

from ast_core.errors import DataError
from ast_core.text_files import is_spreadsheet_damage, read_table

CSV_HEADER = ["index", "mid", "display_name"]


@dataclass(frozen=True)
class LabelVocabulary:
    """Class `i` has the machine id `mids[i]` and the human name `names[i]`."""

    mids: tuple[str, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.mids:
            raise DataError("the label vocabulary is empty; give at least one label")
        if len(self.mids) != len(self.names):
            raise DataError(
                f"the label vocabulary has {len(self.mids)} ids and {len(self.names)} names; give each id a name"
            )
        mid, times = Counter(self.mids).most_common(1)[0]
        if times > 1:
            raise DataError(f"label {mid!r} is in the vocabulary more than once; keep one")

    def __len__(self) -> int:
        return len(self.mids)

    @cached_property
    def index_of(self) -> dict[str, int]:
        """Class index by MID, and by display name if only one class has that name.

        A name with decomposed accents (NFD) is also found by its composed form (NFC).
        """
        times = Counter(self.names)
        by_name = {name: i for i, name in enumerate(self.names) if times[name] == 1}
        known = by_name | {mid: i for i, mid in enumerate(self.mids)}
        return {unicodedata.normalize("NFC", text): i for text, i in known.items()} | known

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_csv().encode()).hexdigest()

    def to_csv(self) -> str:
        """The CSV text `index,mid,display_name`, the format of AudioSet's `class_labels_indices.csv`."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(CSV_HEADER)
        writer.writerows((i, mid, name) for i, (mid, name) in enumerate(zip(self.mids, self.names, strict=True)))
        return out.getvalue()

    @classmethod
    def from_csv(cls, text: str, *, origin: str = "labels file") -> "LabelVocabulary":
        rows = list(
            read_table(
                text,
                origin=origin,
                columns=CSV_HEADER,
                is_header=lambda names: names.issuperset(CSV_HEADER),
                needs=f"the header {','.join(CSV_HEADER)}",
            )
        )
        if not rows:
            raise DataError(f"{origin}: needs at least one row below its header {','.join(CSV_HEADER)}")
        for place, (line, row) in enumerate(rows):
            if missing := next((field for field in CSV_HEADER if not row[field]), None):
                raise DataError(f"{origin}: line {line} has no {missing}; each row needs {', '.join(CSV_HEADER)}")
            if damaged := next((cell for cell in row.values() if is_spreadsheet_damage(cell)), None):
                raise DataError(
                    f"{origin}: line {line} contains {damaged}, which a spreadsheet wrote over the text; restore it"
                )
            if not row["index"].isdecimal():
                raise DataError(f"{origin}: line {line}: the index {row['index']!r} is not a whole number")
            if int(row["index"]) != place:
                raise DataError(f"{origin}: line {line}: the index is {row['index']}, not {place}; count 0, 1, 2, …")
        return cls(tuple(row["mid"] for _, row in rows), tuple(row["display_name"] for _, row in rows))

    @classmethod
    def from_names(cls, names: Iterable[str]) -> "LabelVocabulary":
        """A vocabulary in the given order that uses the names as MIDs."""
        names = tuple(names)
        return cls(names, names)


@cache
def audioset_labels() -> LabelVocabulary:
    """The 527 classes of AudioSet in the order of `class_labels_indices.csv`."""
    return _packaged("audioset_labels.tsv")


@cache
def fsd50k_labels() -> LabelVocabulary:
    """The 200 classes of FSD50K in the order of its `vocabulary.csv`, which is that of their names."""
    return _packaged("fsd50k_labels.tsv")


def _packaged(file: str) -> LabelVocabulary:
    lines = (files("ast_core") / "data" / file).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t") for line in lines if not line.startswith("#")]
    return LabelVocabulary(tuple(mid for mid, _ in pairs), tuple(name for _, name in pairs))
