"""The kinds of lists that a preparation reads. The job makes its options from these entries, one per source."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ast_core.errors import ConfigError, DataError
from ast_core.labels import LabelVocabulary, audioset_labels
from pipeline import dataset, storage
from pipeline.prepare.clip import Reason
from pipeline.prepare.sources.datafile import read_datafile
from pipeline.prepare.sources.folders import read_esc, read_speechcommands
from pipeline.prepare.sources.fsd50k import read_fsd50k
from pipeline.prepare.sources.locate import Locate
from pipeline.prepare.sources.manifest import read_manifest
from pipeline.prepare.sources.own_outputs import has_clips
from pipeline.prepare.sources.rows import ClipList
from pipeline.prepare.sources.segments import read_segments


@dataclass(frozen=True)
class Request:
    """The command line's description of the clips to prepare."""

    value: Any
    """The value of the source's option; a list if the source takes several."""
    output: str
    """URI of the data set."""
    locate: Locate
    """Finds the audio of a section, for lists that do not name files."""
    vocabulary: LabelVocabulary | None = None
    """From --labels."""
    split: str | None = None
    """From --split."""


@dataclass(frozen=True)
class Source:
    """A kind of list, and the option of the preparation that reads it."""

    option: str
    """The option's name with `--`."""
    metavar: str
    help: str
    read: Callable[[Request], ClipList]
    """Reads the list. Raises DataError for a list that is refused as a whole."""
    takes_several: bool = False
    brings_own_labels: bool = False
    """Whether the source defines labels and splits, so that --labels and --split do not apply."""
    needs_locate: bool = False
    """Whether its list names sections of recordings, so that --audio-dir and --media-url apply."""


def _segments(request: Request) -> ClipList:
    vocabulary = request.vocabulary or audioset_labels()
    lists = [
        read_segments(uri, locate=request.locate, vocabulary=vocabulary, split=request.split) for uri in request.value
    ]
    splits = [split for listed in lists for split in listed.splits]
    if len(set(splits)) < len(splits):
        raise ConfigError("two of the lists have one name, and so one split; prepare them one by one with --split")
    notes = dict.fromkeys(note for listed in lists for note in listed.notes)
    clips, refused = (pa.concat_tables([getattr(listed, name) for listed in lists]) for name in ("clips", "refused"))
    return ClipList(clips, refused, lists[0].vocabulary, tuple(notes))


def _manifest(request: Request) -> ClipList:
    """Read a manifest. The vocabulary of an existing data set is used, with a note if the list has other labels."""
    uri, output, split = request.value, request.output, request.split
    is_prepared = storage.exists(dataset.labels_csv(output)) and has_clips(output)
    if request.vocabulary is not None or not is_prepared:
        return read_manifest(uri, vocabulary=request.vocabulary, split=split)
    vocabulary = dataset.read_labels(output, dataset.read_info(output))
    remedy = (
        f"the labels are compared with {dataset.labels_csv(output)}, with which an earlier run prepared clips; to use "
        "the labels of the list itself, give another --output, or delete that folder"
    )
    try:
        listed = read_manifest(uri, vocabulary=vocabulary, split=split, indices=False)
    except DataError as err:
        read_manifest(uri, split=split)  # if the list cannot be read at all, this error is the better one
        raise DataError(f"{err} ({remedy})") from err
    unknown = pc.sum(pc.equal(listed.refused["reason"], str(Reason.UNKNOWN_LABEL))).as_py() or 0
    return replace(listed, notes=(*listed.notes, f"{unknown:,} unknown labels: {remedy}")) if unknown else listed


SOURCES: tuple[Source, ...] = (
    Source(
        option="--segments",
        metavar="LIST",
        help="balanced_train, unbalanced_train, eval, or files or URLs in their format",
        read=_segments,
        takes_several=True,
        needs_locate=True,
    ),
    Source(
        option="--datafile",
        metavar="FILE",
        help="a JSON data file of the reference implementation",
        read=lambda request: read_datafile(request.value, vocabulary=request.vocabulary, split=request.split),
    ),
    Source(
        option="--manifest",
        metavar="FILE",
        help="CSV or Parquet with path or url, labels, and optionally clip_id, start_s, end_s, split; or archives with "
        "audio: Hugging Face Parquet, WebDataset tars, a store of --keep-audio, folders or globs of them",
        read=_manifest,
    ),
    Source(
        option="--esc50",
        metavar="DIR",
        help="ESC-50 as shipped, or ESC-10's class folders; one split per fold",
        read=lambda request: read_esc(request.value),
        brings_own_labels=True,
    ),
    Source(
        option="--speechcommands",
        metavar="DIR",
        help="Speech Commands V2 as shipped",
        read=lambda request: read_speechcommands(request.value),
        brings_own_labels=True,
    ),
    Source(
        option="--fsd50k",
        metavar="DIR",
        help="FSD50K as unpacked; splits train, val and eval",
        read=lambda request: read_fsd50k(request.value),
        brings_own_labels=True,
    ),
)
"""The sources in the order of `--help`. `docs/extending.md` shows how to add one."""
