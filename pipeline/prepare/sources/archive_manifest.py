"""Manifests that contain their audio: Parquet with a column `audio`, and tars with `KEY.json` next to `KEY.flac`.

| content         | in Parquet: the column       | in a tar: the key of KEY.json      |
|-----------------|------------------------------|------------------------------------|
| labels          | `labels`, else `label`       | the same                           |
| id              | `clip_id`, else `video_id`, else the stem of `audio.path`, else FILE_ROW | else KEY |
| origin          | `video_id`, `start_s`, `end_s`: the audio is that section, already cut out  | the same |
| split           | `split`, else that of the archive's name or folder: see `_splits_of`         | the same |

In place of KEY.json there may be a KEY.cls with the name or index of the only class. KEY.txt contains a caption, not a
label. KEY is a member's name without its suffix. If there is no KEY.json of that name, one whose name ends at the first
dot is used, as in WebDataset. Labels that are numbers are indices into the names of Hugging Face's ClassLabel, or into
the `labels.csv` of an audio store. If neither a tar nor its folder is called as a split, folders within it may be: see
`split_names`. If a key has both sound and video, the video is left out.

The module is long because Parquet and tars have the same rules, which the table describes.
"""

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from posixpath import basename, dirname, normpath, splitext
from typing import Any, NamedTuple

import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ast_core.errors import DataError
from ast_core.labels import CSV_HEADER, LabelVocabulary
from pipeline import storage
from pipeline.prepare.sources import archives
from pipeline.prepare.sources.checks import show, without_query
from pipeline.prepare.sources.label_text import are_zeros_and_ones, may_be_one_hot_of_two
from pipeline.prepare.sources.locate import PACKED, is_media, packed_lines, stem
from pipeline.prepare.sources.own_outputs import without_outputs
from pipeline.prepare.sources.split_names import splits_of
from pipeline.prepare.sources.unread_columns import unread_column_lines

_COLUMNS = ("labels", "label", "clip_id", "video_id", "start_s", "end_s", "split")
_OF_KEPT_AUDIO = ("label_names", "num_clipped")
"""Columns of an audio store that the preparation does not read back."""
_OF_HUGGING_FACE = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?\.parquet")
_NO_SPLIT = {"data", "part", "shard"}
"""What others write in place of a split in `SPLIT-00000-of-00001.parquet`."""
_VIDEO = re.compile(r".+\.(3g[p2]|avi|flv|m4v|mkv|mov|mp4|mpe?g|m2?ts|ogv|ts|webm|wmv)", re.IGNORECASE | re.DOTALL)


class Entry(NamedTuple):
    """A row of a manifest as written; None for what it does not give."""

    labels: Any = None
    clip_id: Any = None
    start_s: Any = None
    end_s: Any = None
    split: Any = None
    path: Any = None
    url: Any = None
    place: str = ""
    """Position of the row, for messages."""
    # The rest is for audio in an archive.
    media: str | None = None
    member: str | None = None
    video_id: Any = None
    stem: str = ""
    inner_path: str = ""
    """The archive's path and that of the audio in it, which is unique to the row."""
    file_split: str | None = None
    may_be_zeros_and_ones: bool = False
    """Its labels were 0 and 1 of two classes."""
    num_zeros_and_ones: int = 0
    """How many zeros and ones its labels were, if they were nothing else and not as many as there are classes."""
    lacking: str = ""
    """What a row without audio lacks."""
    possible_splits: tuple[str, ...] = ()
    """What its folders may give as split, if it is not clear that they do: see `split_names`."""
    of_one_key: str = ""
    """The audio files of its key in a tar, if there are several and this is the first that is read."""


def find(uri: str, notes: list[str]) -> list[str]:
    """The archives that a manifest's URI names: one, or those of a folder or glob. Empty if it is a list of files.

    Lines for the user are added to `notes`.
    """
    if PACKED.fullmatch(without_query(uri)):
        raise DataError(f"{uri} is compressed as a whole, so its clips cannot be read one by one; unpack it")
    if re.match("https?://", uri, re.IGNORECASE):
        return []
    found = _archives_of(uri, notes)
    if tars := [file for file in found if file.lower().endswith(".tar")]:
        notes += _unread_key_lines(tars[0])
    for file in (file for file in found if file.lower().endswith(".parquet")):
        with archives.open_parquet(file) as parquet:
            if archives.has_audio(parquet, file):
                names = [name.strip().lower() for name in parquet.schema_arrow.names]
                # Times are not suggested, because audio in an archive is the section itself.
                times = [name for name in names if name in ("start_s", "end_s")]
                read = [name for name in ("audio", *_COLUMNS, *_OF_KEPT_AUDIO) if name not in ("start_s", "end_s")]
                notes += unread_column_lines(file, [name for name in names if name not in times], read)
                if len(of_labels := [name for name in names if name in ("label", "labels")]) > 1:
                    notes.append(
                        f"{file} has columns {' and '.join(of_labels)}: labels are those of {sorted(of_labels)[-1]}"
                    )
                break
    return found


def _unread_key_lines(tar: str) -> list[str]:
    """Lines on keys that are not read, as in the first KEY.json of a tar."""
    for member in islice(archives.tar_members(tar, sidecars=True), 100):
        if isinstance(member.sidecar, dict):
            names = [name.strip().lower() for name in member.sidecar]
            return unread_column_lines(f"{member.name} of {tar}", names, [*_COLUMNS, *_OF_KEPT_AUDIO], what="key")
    return []


def _missing_lines(found: list[str]) -> list[str]:
    """A line on files of Hugging Face's names, `SPLIT-00000-of-00003.parquet`, of which others are missing."""
    there: defaultdict[tuple[str, int], set[int]] = defaultdict(set)
    for file in found:
        if match := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?\.parquet", file):
            there[match[1], int(match[3])].add(int(match[2]))
    return [
        f"{total - len(numbers):,} of the {total:,} files {prefix}-…-of-{total:05d}.parquet are missing"
        for (prefix, total), numbers in there.items()
        if len(numbers) < total
    ]


def _archives_of(uri: str, notes: list[str]) -> list[str]:
    if is_glob(uri):
        return _matching(uri, notes)
    if is_folder(uri):
        files = storage.list_files(storage.absolute(uri), recursive=True)
        found, outputs = without_outputs(files, list(filter(archives.is_archive, files)))
        notes += [*packed_lines(files), *_missing_lines(files)]
        if not found:
            why = f" ({outputs[0]})" if outputs else ""
            raise DataError(
                f"the folder {uri} contains neither .parquet nor .tar{why}; give a list, or the archives' folder"
            )
        return _without_other_audio(found, notes, outputs)
    if uri.lower().endswith(".tar"):
        return [storage.absolute(uri)]
    if uri.lower().endswith(".parquet"):
        with archives.open_parquet(uri) as parquet:
            return [storage.absolute(uri)] if archives.has_audio(parquet, uri) else []
    return []


def _without_other_audio(found: list[str], notes: list[str], outputs: list[str]) -> list[str]:
    """Leave out archives with audio of another kind. If all are of another kind, raise the error of the first."""
    others = list(archives.ahead(_other_audio, found))
    usable = [uri for uri, other in zip(found, others, strict=True) if other is None]
    if not usable and (first := next((other for other in others if isinstance(other, archives.OtherAudioError)), None)):
        raise first
    notes += [*outputs, *(f"not read: {other}" for other in others if isinstance(other, archives.OtherAudioError))]
    if without := [uri for uri, other in zip(found, others, strict=True) if other == _NO_AUDIO]:
        notes.append(f"not read: {len(without):,} Parquet files without a column `audio`, {without[0]} for one")
    return usable or found


_NO_AUDIO = "no audio"


def _other_audio(uri: str) -> archives.OtherAudioError | str | None:
    """Why the audio of an archive cannot be read; None if it can, as far as one sees without opening a tar."""
    if uri.lower().endswith(".parquet"):
        try:
            with archives.open_parquet(uri) as parquet:
                return None if archives.has_audio(parquet, uri) else _NO_AUDIO
        except archives.OtherAudioError as err:
            return err
    return None


def is_glob(uri: str) -> bool:
    return re.search(r"[*?[]", uri) is not None and not storage.exists(uri)


def matching_files(pattern: str) -> tuple[list[str], list[str]]:
    """All files below the folder of a glob, and those that it matches. `*` stays within a folder, `**` does not."""
    pattern = storage.absolute(pattern)
    root = dirname(re.split(r"[*?[]", pattern, maxsplit=1)[0])
    deep = "**" in pattern
    files = storage.list_files(root, recursive=True)
    matching = [
        file
        for file in files
        if fnmatchcase(file, pattern.replace("**/", "*")) and (deep or file.count("/") == pattern.count("/"))
    ]
    return files, matching


def _matching(pattern: str, notes: list[str]) -> list[str]:
    """The archives that a glob matches."""
    files, matching = matching_files(pattern)
    found, outputs = without_outputs(files, list(filter(archives.is_archive, matching)))
    notes += packed_lines(matching)
    if not found:
        why = f" ({outputs[0]})" if outputs else ""
        raise DataError(f"no .parquet or .tar file matches {pattern}{why}")
    return _without_other_audio(found, notes, outputs)


def is_folder(uri: str) -> bool:
    fs, path = storage.resolve(uri)
    try:
        return bool(fs.get_file_info(path).type == pafs.FileType.Directory)
    except OSError as err:
        raise DataError(f"cannot open {uri}: {err}") from err


def own_labels(uri: str, found: list[str]) -> LabelVocabulary | None:
    """The archives' own vocabulary: `labels.csv` in their folder, else Hugging Face's ClassLabel in the first file."""
    labels_file = storage.join(uri, "labels.csv")
    if is_folder(uri) and storage.exists(labels_file):
        text = storage.read_text(labels_file)
        if all(column in text[:200].lower() for column in CSV_HEADER):
            return LabelVocabulary.from_csv(text, origin=labels_file)
    for file in found:
        if file.lower().endswith(".parquet"):
            with archives.open_parquet(file) as parquet:
                names = _class_names(parquet)
            return LabelVocabulary.from_names(names) if names else None
    return None


def entries(uri: str, found: list[str], own: LabelVocabulary | None) -> Iterator[Entry]:
    """The rows of all archives, in order.

    Raises:
        DataError: an archive is damaged, or there is no audio with labels.
    """
    any_audio = any_labels = False
    split_of = _splits_of(found, storage.absolute(uri))
    for rows in archives.ahead(partial(_entries_of, split_of=split_of, own=own), found):
        for entry in rows:
            any_audio = any_audio or not entry.lacking
            any_labels = any_labels or entry.labels is not None
            yield entry
    if not any_audio:
        raise DataError(f"{uri} contains no audio: neither a tar's audio files nor Parquet with a column `audio`")
    if not any_labels:
        raise DataError(
            f"{uri} has no labels: Parquet needs a column `labels`, a tar a KEY.json "
            'with {"labels": [...]}, or a KEY.cls, next to each KEY.flac (a KEY.txt is read as a caption, never as '
            "labels); or give --segments LIST with --audio-dir"
        )


def _entries_of(uri: str, split_of: Mapping[str, tuple[str, ...]], own: LabelVocabulary | None) -> list[Entry]:
    splits = split_of[uri]
    split = splits[0] if len(splits) == 1 else None
    possible = splits if len(splits) > 1 else ()
    if uri.lower().endswith(".tar"):
        return [
            entry._replace(
                file_split=split or entry.file_split,
                possible_splits=() if split or entry.file_split else entry.possible_splits or possible,
            )
            for entry in _of_tar(uri, own)
        ]
    with archives.open_parquet(uri) as parquet:
        rows = _of_parquet(uri, parquet, own) if archives.has_audio(parquet, uri) else iter(())
        return [entry._replace(file_split=split, possible_splits=possible) for entry in rows]


def _of_parquet(uri: str, parquet: pq.ParquetFile, own: LabelVocabulary | None) -> Iterator[Entry]:
    names = _class_names(parquet) or (own.mids if own else ())
    rows = list(archives.small_rows(parquet, _COLUMNS))
    times = Counter(values["path"] for values in rows)
    for row, values in enumerate(rows):
        path = values.pop("path")
        name = stem(path) if path else f"{stem(uri)}_{row}"
        own_row = f"_{row}" if times[path] > 1 and path else ""  # otherwise equal paths of one file look the same
        yield _entry(values, names, uri, archives.row_member(row), name)._replace(
            inner_path=f"{splitext(uri)[0]}{own_row}/{path or name}",
            place=f"row {row + 1} of {basename(uri)}",
        )


def _of_tar(uri: str, own: LabelVocabulary | None) -> Iterator[Entry]:
    # `tar -r` appends a file again under the same name, and only the last one counts.
    members = list({member.name: member for member in archives.tar_members(uri, sidecars=True)}.values())
    sidecars: dict[str, dict[str, Any]] = {}
    for member in members:
        if isinstance(member.sidecar, dict):  # a KEY.json takes precedence over a KEY.cls
            key, is_json = splitext(member.name)[0], member.name.lower().endswith(".json")
            sidecars[key] = (
                sidecars.get(key, {}) | member.sidecar if is_json else member.sidecar | sidecars.get(key, {})
            )
    of_spelling = {_plain(key): key for key in sidecars}
    audio = [(_key(member.name, sidecars, of_spelling), member) for member in members if is_media(member.name)]
    of_keys: defaultdict[str, list[str]] = defaultdict(list)
    for key, member in audio:
        of_keys[key].append(basename(member.name))
    audio = [(key, member) for key, member in audio if not _is_beside_sound(member.name, of_keys[key])]
    splits = splits_of([dirname(member.name).split("/") for _, member in audio])
    is_ignored = any(len(of_member) != 1 for of_member in splits)  # `train` may be a class
    used = set[str]()
    for (key, member), of_member in zip(audio, splits, strict=True):
        used |= {_plain(splitext(member.name)[0]), _first_dot(_plain(splitext(member.name)[0]))}
        values = _read_keys(sidecars.get(key, {}))
        place = archives.bytes_member(member.offset, member.size)
        together = of_keys.pop(key, [])
        yield _entry(values, own.mids if own else (), uri, place, basename(splitext(member.name)[0]))._replace(
            inner_path=f"{splitext(uri)[0]}/{member.name}",
            file_split=None if is_ignored else of_member[0],
            possible_splits=of_member if is_ignored else (),
            place=f"{member.name} of {basename(uri)}",
            of_one_key=", ".join(together) if len(together) > 1 else "",
        )
    for key, content in sidecars.items():
        values, plain = _read_keys(content), _plain(key)
        if used.isdisjoint((plain, _first_dot(plain))) and not values.keys().isdisjoint(("label", "labels")):
            lacking = f"{basename(uri)} has labels of {show(key)}, but no audio of this name in a format that is read"
            yield _entry(values, (), uri, "", key)._replace(lacking=lacking, place=key)


def _first_dot(key: str) -> str:
    """The name up to its first dot, as WebDataset's keys are."""
    return f"{key[: len(key) - len(basename(key))]}{basename(key).split('.')[0]}"


def _read_keys(content: dict[str, Any]) -> dict[str, Any]:
    """The columns that are read of a KEY.json."""
    return {name.strip().lower(): value for name, value in content.items() if name.strip().lower() in _COLUMNS}


def _plain(key: str) -> str:
    """A key without `./`, and with composed accents (NFC). Audio and its labels may be spelled in different ways."""
    return unicodedata.normalize("NFC", normpath(key))


def _key(name: str, sidecars: Mapping[str, Any], of_spelling: Mapping[str, str]) -> str:
    """The key of an audio file: its name without the suffix, or the name up to its first dot if that has labels.

    `of_spelling` has the keys of `sidecars` by their plain forms, for labels that are spelled in another way.
    """
    own = splitext(name)[0]
    for key in (own, _first_dot(own)):
        if key in sidecars:
            return key
        if (other := of_spelling.get(_plain(key))) is not None:
            return other
    return own


def _is_beside_sound(name: str, of_key: list[str]) -> bool:
    """Whether a file is a video whose key also has a file of another kind, which then is its sound."""
    return _VIDEO.fullmatch(name) is not None and not all(map(_VIDEO.fullmatch, of_key))


def _splits_of(found: list[str], given: str) -> dict[str, tuple[str, ...]]:
    """The splits that the archives' names give, or those of the folders below the one that the user named:
    `SPLIT-00000-of-00001.parquet`, `test.tar`, `pets_valid-001.tar`, `train/0000.parquet`, `bal_train/0.parquet`.
    """
    folder, of_glob = f"{given.rstrip('/')}/", f"{dirname(re.split('[*?[]', given)[0])}/"
    split_of: dict[str, tuple[str, ...]] = {}
    folders_of: dict[str, list[str]] = {}
    for uri in found:
        match = _OF_HUGGING_FACE.fullmatch(basename(uri))
        if match and match[1].lower() not in _NO_SPLIT:
            split_of[uri] = (match[1],)
        else:
            folders_of[uri] = dirname(uri.removeprefix(folder).removeprefix(of_glob)).split("/")
    deepest = max(map(len, folders_of.values()), default=0)
    paths = [
        [*folders, *[""] * (deepest - len(folders)), splitext(basename(uri))[0]] for uri, folders in folders_of.items()
    ]
    return split_of | dict(zip(folders_of, splits_of(paths), strict=True))


def _entry(values: dict[str, Any], names: tuple[str, ...], media: str, member: str, name: str) -> Entry:
    label = values.pop("label", None)
    labels = values.pop("labels", label)
    cells = labels if isinstance(labels, list) else [labels]
    may_be_zeros_and_ones = len(names) == 2 and may_be_one_hot_of_two(cells)
    num_zeros_and_ones = 0
    if names and any(isinstance(cell, int | float) for cell in cells):
        has_zeros_and_ones = are_zeros_and_ones(cells)
        if not has_zeros_and_ones or len(cells) != len(names):
            labels = [names[int(cell)] if _is_index(cell, len(names)) else cell for cell in cells]
            num_zeros_and_ones = len(cells) if has_zeros_and_ones else 0
    return Entry(
        labels=labels,
        media=media,
        member=member,
        stem=name,
        may_be_zeros_and_ones=may_be_zeros_and_ones,
        num_zeros_and_ones=num_zeros_and_ones,
        **values,
    )


def _is_index(cell: Any, num_names: int) -> bool:
    """Whether a cell is a whole number and a valid index. pandas writes whole numbers as floats if a cell is empty."""
    return isinstance(cell, int | float) and not isinstance(cell, bool) and 0 <= cell < num_names and cell == int(cell)


def _class_names(parquet: pq.ParquetFile) -> tuple[str, ...]:
    """The names of Hugging Face's feature ClassLabel, single or in a list; empty if the labels have another type."""
    try:
        features = json.loads((parquet.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
        feature = features["labels"] if "labels" in features else features["label"]
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)
        return tuple(map(str, feature["names"]))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return ()
