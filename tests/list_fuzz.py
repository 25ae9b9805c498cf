"""Seeded mutations of valid lists, and an independent reader for each kind of list.

`trial(kind, seed, folder)` writes one mutated list, reads it with the sources and with a reader that shares no code
with them (pandas, duckdb, json), and compares. An accepted list has exactly the rows that the other reader finds good,
and all other rows are refused. A list is not refused if its mutations do not change its meaning.
"""

import ast
import codecs
import contextlib
import csv
import gzip
import io
import json
import os
import random
import re
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary, audioset_labels
from pipeline import storage
from pipeline.prepare.sources import (
    ClipList,
    read_datafile,
    read_esc,
    read_manifest,
    read_segments,
    read_speechcommands,
)
from pipeline.prepare.sources.locate import youtube

NAMES = ("Dog", "Cat", "Male speech, man speaking", "Bébé", "It's raining", "Ålesund", "Bird")
MIDS = audioset_labels().mids[:40]
Row = tuple[Any, ...]


class Trial(NamedTuple):
    kind: str
    seed: int
    mutations: list[str]
    accepted: bool
    num_clips: int
    num_refused: int
    fault: str
    """The disagreement of the two readers; empty if they agree."""


class Expected(NamedTuple):
    good: list[Row]
    """Rows that must become clips: name, split, labels and start of each."""
    num_rows: int
    may: frozenset[Row] = frozenset()
    """Rows that may become clips: they are readable with a quote more or less."""


class _NoListError(Exception):
    """The independent reader cannot read the list, or a rule refuses it as a whole."""


# Mutations of a text whose first `head` lines are its header. Each returns the new text.


def _rows(change: Callable[[random.Random, list[str]], None]) -> Callable[[random.Random, str, int], str]:
    def mutate(rng: random.Random, text: str, head: int) -> str:
        lines = text.split("\n")
        rows = lines[head:]
        change(rng, rows)
        return "\n".join([*lines[:head], *rows])

    return mutate


def _shuffle(rng: random.Random, rows: list[str]) -> None:
    last = rows.pop() if rows and not rows[-1] else None
    rng.shuffle(rows)
    rows += [] if last is None else [last]


def _repeat(rng: random.Random, rows: list[str]) -> None:
    for _ in range(rng.randint(1, 3)):
        rows.insert(rng.randrange(len(rows)), rng.choice([row for row in rows if row]))


def _delete(rng: random.Random, rows: list[str]) -> None:
    for _ in range(rng.randint(1, 3)):
        del rows[rng.randrange(len(rows) - 1)]


def _blank(rng: random.Random, rows: list[str]) -> None:
    for _ in range(rng.randint(1, 3)):
        rows.insert(rng.randrange(len(rows)), rng.choice(["", "", "   "]))


def _insert(*texts: str) -> Callable[[random.Random, str, int], str]:
    def mutate(rng: random.Random, text: str, head: int) -> str:
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(text))
            text = text[:place] + rng.choice(texts) + text[place:]
        return text

    return mutate


def _replace(old: str, *new: str, everywhere: bool = False) -> Callable[[random.Random, str, int], str]:
    def mutate(rng: random.Random, text: str, head: int) -> str:
        places = [match.start() for match in re.finditer(re.escape(old), text)]
        if not places:
            return text
        text_of = rng.choice(new)
        if everywhere:
            return text.replace(old, text_of)
        place = rng.choice(places)
        return text[:place] + text_of + text[place + len(old) :]

    return mutate


def _field(*values: str) -> Callable[[random.Random, str, int], str]:
    """Overwrite a field between two separators of a row, as a spreadsheet does."""

    def mutate(rng: random.Random, text: str, head: int) -> str:
        lines = text.split("\n")
        for _ in range(rng.randint(1, 3)):
            i = rng.randrange(head, max(head + 1, len(lines) - 1))
            parts = re.split(r"([,\t])", lines[i])
            parts[2 * rng.randrange((len(parts) + 1) // 2)] = rng.choice(values)
            lines[i] = "".join(parts)
        return "\n".join(lines)

    return mutate


HARMLESS = {
    "rows in another order": _rows(_shuffle),
    "rows missing": _rows(_delete),
    "blank lines": _rows(_blank),
    "CRLF": _replace("\n", "\r\n", everywhere=True),
    "no newline at the end": lambda rng, text, head: text.rstrip("\n"),
}
"""Mutations that leave all rows valid: the list must not be refused."""

HARMFUL = {
    "rows repeated": _rows(_repeat),
    "CR as newline": _replace("\n", "\r", everywhere=True),
    "stray quote": _insert('"'),
    "stray apostrophe": _insert("'"),
    "quote lost": _replace('"', ""),
    "separator": _replace(",", ";", "\t", "|", " ", ",,", "", ", "),
    "another separator": _replace(",", ";", "\t", "|", everywhere=True),
    "separator at the end": _replace("\n", ",\n", ";\n", "\t\n"),
    "spreadsheet": _field(
        *("#NAME?", "#REF!", "#N/A", "#I/T", "1.23E+05", "3-Feb", "=B2", "=IF(A2;B2;C2)", "", "0", "nan", "TRUE")
    ),
    "letters": _insert("é", "e\u0301", "ß", "日", "\u00a0", "🐕", "\u200b"),
    "odd characters": _insert("\0", "\ufffd", "\ufeff", "\x07", "\u2028", "\x1b[2J", "\\", "#", "# "),
    "truncated": lambda rng, text, head: text[: rng.randrange(len(text))],
    "two lines in one": _replace("\n", ""),
    "a line broken": _insert("\n", "\r", "\r\n"),
    "list in text": _replace(";", "', '", '", "', "']"),
    "another sign": _replace(";", "/", " & ", "+", " ", "｜", "،"),
    "HTML": _replace("'", "&#39;", "&apos;"),
}
ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "UTF-8": lambda text: text.encode("utf-8", "replace"),
    "UTF-8 with mark": lambda text: codecs.BOM_UTF8 + text.encode("utf-8", "replace"),
    "UTF-16 LE": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le", "replace"),
    "UTF-16 BE": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be", "replace"),
}
WRONG_ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "UTF-16 without mark": lambda text: text.encode("utf-16-le", "replace"),
    "UTF-32": lambda text: text.encode("utf-32", "replace"),
    "cp1252": lambda text: text.encode("cp1252", "replace"),
    "Latin-1": lambda text: text.encode("latin-1", "replace"),
    "Shift-JIS": lambda text: text.encode("shift-jis", "replace"),
    "gzip": lambda text: gzip.compress(text.encode("utf-8", "replace")),
    "a byte flipped": lambda text: _flipped(text.encode("utf-8", "replace")),
}


def _flipped(data: bytes) -> bytes:
    place = random.Random(data).randrange(len(data))
    return data[:place] + bytes([data[place] ^ 0x80]) + data[place + 1 :]


def _mutated(rng: random.Random, text: str, head: int, *, encodings: bool = True) -> tuple[list[str], bytes]:
    """The names of the mutations, and the file. Names of harmless mutations begin with `~`."""
    done = []
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        harmless = rng.random() < 0.4
        name = rng.choice(list(HARMLESS if harmless else HARMFUL))
        try:
            text = (HARMLESS if harmless else HARMFUL)[name](rng, text, head)
        except (IndexError, ValueError):  # an earlier mutation left too little text
            continue
        done.append(f"~{name}" if harmless else name)
    wrong = encodings and rng.random() < 0.15
    name = rng.choice(list(WRONG_ENCODINGS if wrong else ENCODINGS))
    done.append(name if wrong else f"~{name}")
    return done, (WRONG_ENCODINGS if wrong else ENCODINGS)[name](text)


# The independent reader


def _text_of(data: bytes) -> str:
    marks = {codecs.BOM_UTF32_LE: "", codecs.BOM_UTF8: "utf-8-sig"}
    marks |= dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "utf-16")
    encoding = next((encoding for mark, encoding in marks.items() if data.startswith(mark)), "utf-8")
    if not encoding:
        raise _NoListError("UTF-32")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as err:
        raise _NoListError(str(err)) from err
    if "\0" in text or "\ufffd" in text:
        raise _NoListError("NUL or U+FFFD")
    return re.sub("(^|[\r\n])\ufeff+", r"\1", text)  # of joined files too


def _frame(text: str, wanted: set[str]) -> pd.DataFrame:
    """Read a text table with all cells as text: by pandas, or by csv if a row has more cells than the header."""
    lines = text.split("\n")
    for separator in ",;\t|":
        frame = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # else pandas drops extra cells of a long row
                frame = pd.read_csv(
                    io.StringIO(text, newline=""), sep=separator, dtype=str, keep_default_na=False, index_col=False,
                    skipinitialspace=separator != "\t", on_bad_lines="error",
                )  # fmt: skip
        except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError, ValueError):
            try:
                rows = list(
                    csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
                )
            except csv.Error:
                continue
            rows = [row for row in rows if any(cell.strip() for cell in row)]
            if rows and all(not any(map(str.strip, row[len(rows[0]) :])) for row in rows):
                width = len(rows[0])
                if separator != "\t" and _labels_may_have_moved(rows):
                    continue
                frame = pd.DataFrame([(row + [""] * width)[:width] for row in rows[1:]], columns=rows[0])
        if frame is not None:
            frame.columns = pd.Index([_column(re.sub(r"\.\d+$", "", str(name))) for name in frame.columns])
            if wanted <= set(frame.columns) and not frame.columns[frame.columns.isin(wanted)].has_duplicates:
                frame = frame.loc[:, ~frame.columns.duplicated()].fillna("").map(str.strip)
                return frame[(frame != "").any(axis=1)]
    raise _NoListError(f"no header in {lines[0]!r}")


def _column(name: str) -> str:
    for character in "\ufeff\u200b\u2060":
        name = name.replace(character, "")
    return name.strip().lower()


def _labels_may_have_moved(rows: list[list[str]]) -> bool:
    """Whether some rows are longer than others beyond the header, and labels are not in the last column with a name."""
    names = list(map(_column, rows[0]))
    last = max((i for i, name in enumerate(names) if name and not name.startswith("unnamed: ")), default=0)
    lengths = {max(len(row), len(names)) for row in rows[1:]}
    return "labels" in names[:last] and len(lengths) > 1


def _normalised(label: str) -> str:
    return unicodedata.normalize("NFC", label.strip().strip("\ufeff\u200b\u2060").strip())


def _cells(text: str, separator: str, known: frozenset[str]) -> list[str] | None:
    """The labels in a text; None if it looks like a list but is not one."""
    text = _normalised(text)
    if text in known:
        return [text]
    if text in ("", "nan", "NaN"):
        return []
    if (listed := _list_in(text)) is not None:
        return _without_ends([_normalised(cell) for cell in listed])
    if re.match(r"""[\[{]\s*["'\[{]""", text) or re.search(r"""["']\s*[\]}]$""", text):
        return None
    if re.fullmatch(r"\[[^\[\]]*,[^\[\]]*\]|\{[^{}]*,[^{}]*\}", text):
        return None
    return _without_ends([_normalised(cell) for cell in text.split(separator)])


def _without_ends(cells: list[str]) -> list[str]:
    while cells and not cells[0]:
        cells.pop(0)
    while cells and not cells[-1]:
        cells.pop()
    return cells


def _list_in(text: str) -> list[str] | None:
    """The quoted texts and numbers of a list as text, parsed by character; None if it has anything else."""
    brackets = {"[": "]", "(": ")", "{": "}"}
    if closed := brackets.get(text[0]):
        if len(text) < 2 or text[-1] != closed:
            return None
        inner, separators = text[1:-1], ","
    elif text[0] in "'\"":
        inner, separators = text, ",;"
    else:
        return None
    entries, i, waits = [], 0, True
    while i < len(inner):
        if inner[i].isspace():
            waits, i = waits or bool(closed), i + 1
        elif inner[i] in separators:
            if not entries or (waits and inner[:i].rstrip()[-1:] in separators):
                return None
            waits, i = True, i + 1
        elif not waits:
            return None
        elif inner[i] in "'\"":
            end = i + 1
            while end < len(inner) and inner[end] != inner[i]:
                end += 1 + (inner[end] == "\\")
            if end >= len(inner):
                return None
            token = inner[i : end + 1]
            try:
                plain = token[1:-1] if "\\" not in token else None
                if plain is None and closed == "]" and token[0] == '"':
                    with contextlib.suppress(ValueError):
                        plain = json.loads(token)
                entries.append(ast.literal_eval(token) if plain is None else plain)
            except (ValueError, SyntaxError):
                return None
            waits, i = False, end + 1
        elif closed and (number := re.match(r"[+-]?\d+(\.\d*)?", inner[i:])):
            entries.append(number[0])
            waits, i = False, i + number.end()
        else:
            return None
    return entries


_NOTHING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_ERROR = re.compile(r"#[A-Z/]+[!?]|#N/A|#I/T|\d\.\d+E\+\d+|=.+", re.DOTALL)
_DATE = re.compile(r"\d+-Feb")


def _is_not_text(text: str) -> bool:
    """Whether a text cannot be an id, path or label."""
    return not 0 < len(text) <= 200 or _NOTHING.search(text) is not None or _ERROR.fullmatch(text) is not None


# Kinds of lists. Each function makes a list, mutates it and reads it in both ways.


def _segments(rng: random.Random, folder: Path) -> tuple[list[str], Callable[[], ClipList], Callable[[], Expected]]:
    ids = ["".join(rng.choices("abcXYZ019_-", k=11)) for _ in range(rng.randint(12, 30))]
    lines = [
        f'{i}, {10 * k}.000, {10 * k + 10}.000, "{",".join(rng.sample(MIDS, rng.randint(1, 3)))}"'
        for k, i in enumerate(ids)
    ]
    head = ["# Segments csv created Sun Mar 5", "# num_ytids=3", "# YTID, start_seconds, end_seconds, positive_labels"]
    done, data = _mutated(rng, "\n".join([*head, *lines, ""]), len(head))
    (folder / "list.csv").write_bytes(data)

    def expected() -> Expected:
        text = _text_of(data)
        good: dict[str, Row] = {}
        may, number, seen_any, of_four = set(), 0, False, 0
        for line in text.split("\n") if "\n" in text else text.split("\r"):
            if not line.strip():
                continue
            parts = [part.strip() for part in line.split(",", 3)]
            if line.startswith("#") and (len(parts) < 4 or (line.startswith("# ") and not seen_any)):
                continue
            if not seen_any and len(parts) == 4 and "start" in parts[1].lower() and "end" in parts[2].lower():
                continue
            seen_any, number = True, number + 1
            of_four += len(parts) == 4
            for loose in (False, True):
                fields = [field.strip().strip('"').strip() for field in parts] if loose else parts
                labels = fields[3] if len(fields) == 4 else ""
                if loose:  # separators that a spreadsheet adds to all rows are after the quote
                    labels = labels.strip('",; ')
                else:
                    labels = labels[1:-1] if len(labels) > 1 and labels[0] == labels[-1] == '"' else labels
                try:
                    start, end = (float(field) if "_" not in field else float("nan") for field in fields[1:3])
                except ValueError:
                    continue
                cells = [
                    _normalised(cell)
                    for cell in labels.strip(";" if ";" in labels else ", ").split(";" if ";" in labels else ",")
                ]
                if (
                    re.fullmatch(r"[A-Za-z0-9_-]{11}", fields[0])
                    and 0 <= start < end <= start + 300
                    and all(cell in MIDS or cell in audioset_labels().mids for cell in cells)
                ):
                    row = (f"{fields[0]}_{start:.3f}", "list", frozenset(cells), start)
                    may.add(row)
                    if not loose:
                        good.setdefault(row[0], row)
        if not of_four:
            raise _NoListError("no row of four fields")
        return Expected(list(good.values()), number, frozenset(may))

    return done, lambda: read_segments(str(folder / "list.csv"), locate=youtube), expected


def _datafile(rng: random.Random, folder: Path) -> tuple[list[str], Callable[[], ClipList], Callable[[], Expected]]:
    entries = []
    for i in range(rng.randint(12, 30)):
        labels: Any = rng.sample(MIDS, rng.randint(1, 3))
        entry = {
            "wav": f"{rng.choice('abc')}/file{i // 2 if rng.random() < 0.3 else i}.flac",
            "labels": labels if rng.random() < 0.3 else ",".join(labels),
        }
        entries.append(json.dumps(entry))
    rng.shuffle(entries)
    done, data = _mutated(rng, '# a comment\n{"data": [\n' + ",\n".join(entries) + "\n]}\n", 2)
    (folder / "list.json").write_bytes(data)

    def expected() -> Expected:
        text = _text_of(data)
        try:
            doubled = []
            value = json.loads(
                text[max(text.find("{"), 0) :],
                object_pairs_hook=lambda pairs: doubled.append(len(pairs) - len(dict(pairs))) or dict(pairs),
            )["data"]
        except (ValueError, KeyError, TypeError) as err:
            raise _NoListError(str(err)) from err
        if not isinstance(value, list) or any(doubled):
            raise _NoListError("no list, or a key twice")
        by_path: dict[str, Row] = {}
        for entry in value:
            wav, labels = (entry.get("wav"), entry.get("labels")) if isinstance(entry, dict) else (None, None)
            cells = (
                _cells(labels, ";" if ";" in labels else ",", frozenset(MIDS)) if isinstance(labels, str) else labels
            )
            if not (isinstance(wav, str) and isinstance(cells, list) and cells):
                continue
            cells = [_normalised(cell) if isinstance(cell, str) else "" for cell in cells]
            if _is_not_text(wav) or "://" in wav or not all(cell in audioset_labels().index_of for cell in cells):
                continue
            by_path.setdefault(
                wav, ("", "list", frozenset(audioset_labels().mids[audioset_labels().index_of[c]] for c in cells), 0.0)
            )
        good = [(wav, *row[1:]) for wav, row in by_path.items() if wav.rpartition("/")[2]]
        return Expected(good, len(value))

    return done, lambda: read_datafile(str(folder / "list.json")), expected


def _manifest(suffix: str) -> Callable[..., tuple[list[str], Callable[[], ClipList], Callable[[], Expected]]]:
    def make(rng: random.Random, folder: Path) -> tuple[list[str], Callable[[], ClipList], Callable[[], Expected]]:
        rows = []
        style = rng.choice(("plain", "plain", "python", "json"))
        for i in range(rng.randint(12, 30)):
            labels = rng.sample(NAMES, rng.randint(1, 3))
            text = {"plain": ";".join(labels) + ";", "python": str(labels), "json": json.dumps(labels)}[style]
            rows.append((f"{rng.choice('ab')}/clip{i}.wav", text, rng.choice(("train", "test")), f"id{i}"))
        frame = pd.DataFrame(rows, columns=["path", "labels", "split", "clip_id"])
        known = LabelVocabulary.from_names(NAMES) if rng.random() < 0.5 else None
        file = folder / f"list{suffix}"
        if suffix == ".parquet":
            done, frame = _mutated_frame(rng, frame)
            table = pa.Table.from_pandas(frame, preserve_index=False)
            pq.write_table(table, file)
            if rng.random() < 0.1:
                done.append("truncated")
                file.write_bytes(file.read_bytes()[: -rng.randrange(1, 200)])
        else:
            done, data = _mutated(rng, frame.to_csv(index=False, sep="," if suffix == ".csv" else "\t"), 1)
            file.write_bytes(data)

        def expected() -> Expected:
            if suffix == ".parquet":
                try:
                    read = duckdb.sql(f"select * from read_parquet('{file}')").fetchdf()
                except duckdb.Error as err:
                    raise _NoListError(str(err)) from err
                read = read.map(lambda cell: "" if cell is None else cell)
            else:
                read = _frame(_text_of(data), {"path", "labels"})
            texts = [label for label in read["labels"] if isinstance(label, str)]
            vocabulary = frozenset(NAMES if known else ())
            plain = [text for text in texts if _cells(text, "\x00", vocabulary) == [_normalised(text)]]
            separator = ";" if known is None and any(";" in text for text in plain) else "," if known is None else ""
            good, seen = [], set()
            for row in read.to_dict("records"):
                label = row["labels"]
                if isinstance(label, str):
                    cells = _cells(label, separator or (";" if ";" in label else ","), vocabulary)
                else:
                    cells = [_normalised(str(cell)) for cell in (label if label is not None else ())]
                if known and cells:  # a number is an index
                    cells = [NAMES[int(float(cell))] if re.fullmatch(r"[0-6](\.0*)?", cell) else cell for cell in cells]
                # What pandas and R write for a cell without a value, of those words that the mutations write.
                split, clip_id = (
                    "" if row.get(name, "") == "nan" else row.get(name, "") for name in ("split", "clip_id")
                )
                split = split or "train"
                if (
                    cells
                    and all(
                        cell in vocabulary
                        if known
                        else not _is_not_text(cell)
                        and not _DATE.fullmatch(cell)
                        and not re.fullmatch(r"[\d.]+|nan", cell)
                        for cell in cells
                    )
                    and not (
                        row["path"] == "nan"
                        or _is_not_text(str(row["path"]))
                        or "\ufffd" in str(row["path"])
                        or "://" in str(row["path"])
                    )
                ):
                    clip_id = clip_id or unicodedata.normalize(
                        "NFC", os.path.splitext(str(row["path"]).rpartition("/")[2])[0]
                    )
                    if (split, clip_id) in seen:
                        continue
                    if (
                        _is_not_text(clip_id or "x")
                        or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", split)
                        or _ERROR.fullmatch(split)
                        or _DATE.fullmatch(split)
                        or split == "dataset.json"
                    ):
                        continue
                    if "\ufffd" in clip_id or any("\ufffd" in cell for cell in cells):
                        continue
                    seen.add((split, clip_id))
                    good.append((clip_id, split, frozenset(cells), 0.0))
            return Expected(good, len(read))

        return done, lambda: read_manifest(str(file), vocabulary=known), expected

    return make


def _mutated_frame(rng: random.Random, frame: pd.DataFrame) -> tuple[list[str], pd.DataFrame]:
    def written_over(column: str, *values: Any) -> pd.DataFrame:
        changed = frame.copy()
        for i in rng.sample(range(len(frame)), 3):
            changed.loc[i, column] = rng.choice(values)
        return changed

    mutations: dict[str, Callable[[], pd.DataFrame]] = {
        "~rows in another order": lambda: frame.sample(frac=1, random_state=rng.randrange(1 << 30)),
        "~rows missing": lambda: frame.iloc[3:],
        "~labels as lists": lambda: frame.assign(
            labels=[_cells(text, ";", frozenset(NAMES)) for text in frame["labels"]]
        ),
        "rows repeated": lambda: pd.concat([frame, frame.iloc[:3]]),
        "labels written over": lambda: written_over(
            "labels", "#NAME?", "", "['Dog'", "Dog;", "m\ufffdl", "3-Feb", "nan", "Dog;;Cat"
        ),
        "ids written over": lambda: written_over("clip_id", "1.23E+05", "a\ufffdb", "#REF!", "x" * 201, "a\0b", "id1"),
        "paths written over": lambda: written_over(
            "path", "", "#VALUE!", "a\x07.wav", "s3://b/x?region=y", "a\ufffd.wav"
        ),
        "splits written over": lambda: written_over("split", "5-Feb", "../up", "dataset.json", "a b"),
    }
    done = []
    for name in rng.sample(list(mutations), rng.choice((0, 1, 1, 2))):
        frame = mutations[name]().reset_index(drop=True)
        done.append(name)
        if name == "~labels as lists":
            break
    return done, frame


def _esc50(rng: random.Random, folder: Path) -> tuple[list[str], Callable[[], ClipList], Callable[[], Expected]]:
    targets = dict(enumerate(("dog", "rain", "bébé", "door wood")))
    files = [f"{rng.randint(1, 5)}-{1000 + i}-A-{i % 4}.wav" for i in range(20)]
    (folder / "audio").mkdir(exist_ok=True)
    (folder / "meta").mkdir(exist_ok=True)
    for file in folder.glob("audio/*"):
        file.unlink()
    for file in files:
        (folder / "audio" / file).touch()
    rows = [f"{file},{file[0]},{file[-5]},{targets[int(file[-5])]},True,{i}" for i, file in enumerate(files)]
    done, data = _mutated(rng, "\n".join(["filename,fold,target,category,esc10,src_file", *rows, ""]), 1)
    (folder / "meta" / "esc50.csv").write_bytes(data)

    def expected() -> Expected:
        frame = _frame(_text_of(data), {"filename", "fold", "target", "category"})
        good: dict[str, Row] = {}
        for row in frame.to_dict("records"):
            if row["filename"] in files:
                good.setdefault(
                    f"{row['filename']} {row['fold']}",
                    (
                        row["filename"][:-4],
                        f"fold{int(row['fold']) if row['fold'].isdecimal() else row['fold']}",
                        frozenset([_normalised(row["category"])]),
                        0.0,
                    ),
                )
        return Expected(list(good.values()), len(frame))

    return done, lambda: read_esc(str(folder)), expected


def _speechcommands(
    rng: random.Random, folder: Path
) -> tuple[list[str], Callable[[], ClipList], Callable[[], Expected]]:
    files = sorted({f"{rng.choice(('yes', 'no', 'bed'))}/{rng.randrange(99):02x}_nohash_{i}.wav" for i in range(24)})
    for old in folder.glob("*/*.wav"):
        old.unlink()
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()
    rng.shuffle(files)
    (folder / "testing_list.txt").write_text("\n".join(files[:6]) + "\n")
    done, data = _mutated(rng, "\n".join(files[6:14]) + "\n", 0)
    (folder / "validation_list.txt").write_bytes(data)

    def expected() -> Expected:
        text = _text_of(data)
        named = {
            re.sub("/+", "/", line.strip().replace("\\", "/")).rstrip("/")
            for line in re.split(r"\r\n|\n|\r", text)
            if line.strip()
        }
        split_of = dict.fromkeys(named, "validation") | dict.fromkeys(files[:6], "test")
        good = [(file[:-4], split_of.get(file, "train"), frozenset([file.partition("/")[0]]), 0.0) for file in files]
        return Expected(good, len({*files, *named}))

    return done, lambda: read_speechcommands(str(folder)), expected


KINDS = {
    "segments": _segments,
    "data file": _datafile,
    "manifest CSV": _manifest(".csv"),
    "manifest TSV": _manifest(".tsv"),
    "manifest Parquet": _manifest(".parquet"),
    "ESC-50": _esc50,
    "Speech Commands": _speechcommands,
    "labels": None,
}


def trial(kind: str, seed: int, folder: Path) -> Trial:
    rng = random.Random(f"{kind} {seed}")
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "labels":
        return _labels_trial(rng, seed, folder)
    done, read, expect = KINDS[kind](rng, folder)
    try:
        out = read()
    except DataError as err:
        fault = "" if _is_one_line(str(err)) else f"the refusal is not one line: {err!r}"
        moved = {"~rows in another order", "~rows missing"}  # lines of JSON are not rows
        if all(name.startswith("~") for name in done) and not (kind == "data file" and moved & set(done)):
            fault = f"refused, though nothing is wrong: {err}"
        return Trial(kind, seed, done, False, 0, 0, fault)
    return Trial(kind, seed, done, True, len(out.clips), len(out.refused), _compared(kind, out, expect))


def _compared(kind: str, out: ClipList, expect: Callable[[], Expected]) -> str:
    names = out.vocabulary.mids
    texts = [
        *names,
        *out.clips["clip_id"].to_pylist(),
        *out.refused["clip_id"].to_pylist(),
        *out.clips["media"].to_pylist(),
    ]
    if any("\ufffd" in text for text in texts):
        return "U+FFFD in a class, an id or a path"
    try:
        expected = expect()
    except _NoListError as err:
        return f"accepted, and the other reader cannot read it: {err}"
    if len(out.clips) + len(out.refused) != expected.num_rows:
        return f"{len(out.clips)} clips and {len(out.refused)} refused of {expected.num_rows} rows"
    rows = out.clips.to_pylist()
    if len({(row["split"], row["clip_id"]) for row in rows}) < len(rows):
        return "a clip_id twice"
    found = {_row(kind, row, names) for row in rows}
    if missing := set(expected.good) - found:
        return f"not among the clips: {sorted(map(str, missing))[:2]}"
    if more := found - set(expected.good) - expected.may:
        return f"clips that the other reader does not find: {sorted(map(str, more))[:2]}"
    return ""


def _row(kind: str, row: dict[str, Any], names: tuple[str, ...]) -> Row:
    labels = frozenset(names[i] for i in row["labels"])
    if kind == "data file":  # ids depend on the other rows; the path does not
        return row["media"].partition("/data file/")[2], row["split"], labels, row["start_s"]
    return row["clip_id"], row["split"], labels, row["start_s"]


def _labels_trial(rng: random.Random, seed: int, folder: Path) -> Trial:
    text = LabelVocabulary(
        tuple(f"/m/{i:03}" for i in range(12)), tuple(f"{NAMES[i % 7]} {i}" for i in range(12))
    ).to_csv()
    done, data = _mutated(rng, text, 1)
    (folder / "labels.csv").write_bytes(data)
    try:
        out = LabelVocabulary.from_csv(storage.read_text(folder / "labels.csv"), origin="labels.csv")
    except DataError as err:
        fault = "" if _is_one_line(str(err)) else f"the refusal is not one line: {err!r}"
        moved = {"~rows in another order", "~rows missing"}  # indices must be consecutive
        if all(name.startswith("~") for name in done) and moved.isdisjoint(done):
            fault = f"refused, though nothing is wrong: {err}"
        return Trial("labels", seed, done, False, 0, 0, fault)
    try:
        frame = _frame(_text_of(data), {"index", "mid", "display_name"})
    except _NoListError as err:
        return Trial("labels", seed, done, True, len(out), 0, f"accepted, and the other reader cannot read it: {err}")
    same = (list(frame["mid"]), list(frame["display_name"])) == (list(out.mids), list(out.names))
    counted = list(frame["index"].map(int)) == list(range(len(frame)))
    return Trial(
        "labels", seed, done, True, len(out), 0, "" if same and counted else "other labels than the other reader's"
    )


def _is_one_line(text: str) -> bool:
    return "\n" not in text and "\r" not in text and 0 < len(text) < 1200
