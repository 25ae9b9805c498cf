"""Data sets as published by their authors, with one file per clip: ESC-50, ESC-10, Speech Commands."""

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from posixpath import normpath, splitext

from ast_core.errors import DataError, one_line
from ast_core.labels import LabelVocabulary
from ast_core.text_files import LINE_END, is_spreadsheet_damage, read_table
from pipeline import storage
from pipeline.prepare.clip import ClipError, Reason
from pipeline.prepare.sources.checks import check_split, is_split, show
from pipeline.prepare.sources.locate import is_media, stem
from pipeline.prepare.sources.rows import ClipList, Rows
from pipeline.prepare.sources.web_lists import read_list

Listed = tuple[str | None, str | None, str, str]
"""clip_id (None: the file's stem), split, file, label"""


class Tree:
    """The files of a folder, by names with composed accents (NFC)."""

    def __init__(self, folder: str) -> None:
        self.root = storage.absolute(folder).rstrip("/")
        try:
            files = [file.removeprefix(f"{self.root}/") for file in storage.list_files(self.root, recursive=True)]
        except (OSError, ValueError) as err:
            raise DataError(f"cannot list the folder {folder}: {one_line(err)}") from err
        self.on_disk: dict[str, str] = {}
        for file in files:
            if self.on_disk.setdefault(_nfc(file), file) != file:
                raise DataError(
                    f"{folder} contains {show(file)} twice, with accents composed and apart; remove one of them"
                )

    def __contains__(self, file: str) -> bool:
        return _nfc(file) in self.on_disk

    def uri(self, file: str) -> str:
        return f"{self.root}/{self.on_disk[_nfc(file)]}"


def read_esc(folder: str) -> ClipList:
    """ESC-50 as shipped (`audio/`, `meta/esc50.csv`), or category folders `NNN - Name` as in ESC-10."""
    tree = Tree(folder)
    if "meta/esc50.csv" in tree:
        return _read_esc50(tree)
    named = re.compile(r"(?P<category>\d{3} - (?P<label>[^/]+))/(?P<name>[^/]+)")
    files = sorted(filter(is_media, tree.on_disk))
    found = [match for match in map(named.fullmatch, files) if match]
    if not found:
        raise DataError(f"{folder} has neither meta/esc50.csv (ESC-50) nor audio in folders `NNN - Name` (ESC-10)")
    name_of = {match["category"]: match["label"] for match in found}  # in the order of NNN, because `found` is sorted
    vocabulary = _vocabulary(folder, name_of.values())
    notes = _unread_lines(folder, {*files} - {match[0] for match in found}, "`NNN - Name/FILE`")
    return _clip_list(folder, tree, [(None, _esc_fold(m["name"]), m[0], m["label"]) for m in found], vocabulary, notes)


def _esc_fold(name: str) -> str | None:
    match = re.fullmatch(r"([1-9])-\d+-[A-Z]+\.\w+", name)
    return f"fold{match[1]}" if match else None


def _unread_lines(folder: str, files: Collection[str], form: str) -> list[str]:
    """A line on audio files that are not where the data set has its own."""
    if not files:
        return []
    return [f"{len(files):,} audio files of {folder} are not read, {show(min(files))} for one: they are not {form}"]


_ESC50_COLUMNS = ("filename", "fold", "target", "category")


def _read_esc50(tree: Tree) -> ClipList:
    uri = tree.uri("meta/esc50.csv")
    listed: list[Listed] = []
    category_of: dict[int, str] = {}
    for line, row in read_table(
        read_list(uri, []),
        origin=uri,
        columns=_ESC50_COLUMNS,
        is_header=lambda names: names.issuperset(_ESC50_COLUMNS),
        needs=f"the columns {', '.join(_ESC50_COLUMNS)}",
    ):
        name, fold, target, category = (_nfc(row[column]) for column in _ESC50_COLUMNS)
        if not (re.fullmatch("[0-9]{1,4}", fold) and re.fullmatch("[0-9]{1,4}", target) and name and category):
            raise DataError(
                f"{uri}, line {line}: a row needs filename, category, and whole numbers for fold and target; "
                f"it has {show(', '.join(row.values()))}"
            )
        if category_of.setdefault(int(target), category) != category:
            raise DataError(
                f"{uri}, line {line}: target {target} is {category} here, and {category_of[int(target)]} above"
            )
        listed.append((None, f"fold{int(fold)}", f"audio/{name}", category))
    if not listed or len(set(category_of.values())) < len(category_of):
        raise DataError(f"{uri} has no row, or two targets of one category")
    return _clip_list(uri, tree, listed, _vocabulary(uri, (category_of[target] for target in sorted(category_of))))


_OF_A_SPEAKER = re.compile(r"[^/]+/[^/\s]+_nohash_[0-9]+\.wav", re.IGNORECASE)
_COPY = re.compile(r"(.+?)(?: [0-9]+| ?\([^()]+\)| [-–] .+| copy.*)", re.IGNORECASE)
"""What file managers call a copy of a folder."""


def read_speechcommands(folder: str) -> ClipList:
    """Speech Commands V2 as shipped: `WORD/HASH_nohash_N.wav`, and the lists of validation and test files.

    Other files are not read, unless a list names them: copies by a file manager would be in `train`, whatever the split
    of their clip, and a copy of a folder would be a word.
    """
    tree = Tree(folder)
    split_of: dict[str, str] = {}
    notes: list[str] = []
    lists = {"validation": "validation_list.txt", "test": "testing_list.txt"}
    for split, name in lists.items():
        if name not in tree:
            raise DataError(f"{folder} has no {name}; give the folder of Speech Commands V2 as unpacked")
        files = _lines(read_list(tree.uri(name), []))
        if not files:
            notes.append(f"{folder}/{name} names no file, so there is no {split}; unpack it again if there should be")
        for line, file in ((line, _with_wav(file)) for line, file in files):
            if split_of.setdefault(file, split) != split:
                raise DataError(f"{folder}/{name}, line {line}: {show(file)} is in the other list too")
    audio = {file for file in tree.on_disk if is_media(file) and not file.startswith("_")}  # _background_noise_
    # The lists write `.wav`, whatever case the disk has.
    on_disk = {_with_wav(file): file for file in audio if re.fullmatch(r"[^/.][^/]*/[^/]+\.(?i:wav)", file)}
    on_disk = {name: file for name, file in on_disk.items() if _OF_A_SPEAKER.fullmatch(name) or name in split_of}
    notes += _unread_lines(folder, audio - {*on_disk.values()}, "`WORD/HASH_nohash_N.wav`")
    words = {name.partition("/")[0] for name in on_disk}
    copies = {match[0]: match[1] for match in map(_COPY.fullmatch, sorted(words)) if match and match[1] in words}
    notes += [f"{folder}/{copy} is not read: it is a copy of {word}, by its name" for copy, word in copies.items()]
    on_disk = {name: file for name, file in on_disk.items() if name.partition("/")[0] not in copies}
    present = on_disk.keys()
    if not present:
        raise DataError(f"{folder} has no WORD/HASH_nohash_N.wav; give the folder of Speech Commands V2 as unpacked")
    for split, name in lists.items():
        named = {file for file, of_file in split_of.items() if of_file == split}
        missing = sorted(named - present)
        if 2 * len(missing) > len(named) and len(missing) > 1:  # otherwise its clips could all end up in training
            raise DataError(
                f"{len(missing)} of the {len(named)} files that {folder}/{name} names are not there, "
                f"{show(missing[0])} for one; unpack all of Speech Commands V2, lists and words"
            )
    # Files that are there come first, so that a listed one with a misspelled suffix does not take the id of another.
    word_of = {file: file.partition("/")[0] for file in (*sorted(present), *sorted(split_of.keys() - present))}
    vocabulary = _vocabulary(folder, sorted({word_of[file] for file in present}))
    listed: list[Listed] = [
        (splitext(file)[0], split_of.get(file, "train"), on_disk.get(file, file), word)
        for file, word in word_of.items()
    ]
    return _clip_list(folder, tree, listed, vocabulary, notes)


def _with_wav(file: str) -> str:
    stem, suffix = splitext(file)
    return stem + suffix.lower()


def _lines(text: str) -> list[tuple[int, str]]:
    """The files that a list names, with their lines. Windows' backslashes become slashes, and `./` is removed."""
    lines = enumerate(LINE_END.split(text), start=1)
    return [(line, _nfc(normpath(file.strip().replace("\\", "/")))) for line, file in lines if file.strip()]


def _clip_list(
    origin: str, tree: Tree, listed: Sequence[Listed], vocabulary: LabelVocabulary, notes: Sequence[str] = ()
) -> ClipList:
    rows = Rows(vocabulary)
    for clip_id, split, file, label in listed:
        name = clip_id or stem(file)
        try:
            if split is None:
                raise ClipError(Reason.BAD_ID, f"{show(file)} is not named FOLD-ID-TAKE")
            check_split(split)
            labels = rows.indices([label])
            if clip_id is not None:
                rows.reserve(clip_id, split)
            if file not in tree:
                raise ClipError(Reason.MISSING_FILE, f"it is listed, but there is no file {show(file)}")
            keep = rows.keep if clip_id is not None else rows.keep_named
            keep(name, split, None, tree.uri(file), None, 0.0, 0.0, None, labels)
        except ClipError as err:
            rows.refuse(name or file, split if split and is_split(split) else "unassigned", err, [label])
    return rows.done(origin, notes)


def _vocabulary(origin: str, names: Iterable[str]) -> LabelVocabulary:
    names = tuple(names)
    if damaged := next((name for name in names if "\ufffd" in name or is_spreadsheet_damage(name)), None):
        raise DataError(f"{origin} has a class {show(damaged)}: a spreadsheet or a conversion replaced its name")
    return LabelVocabulary.from_names(names)


def _nfc(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)
