"""Audio store: decoded audio, from which features are computed again without fetching or decoding the media.

STORE/labels.csv              index,mid,display_name
STORE/SPLIT/audio/*.parquet   one row per clip (`STORED`); a file has the clips and the name of a shard of the data set

A clip is stored as FLAC, mono, 16 bit, at the sample rate of the run's features. From it, features of this rate and of
lower ones can be computed. A run that keeps audio computes its features from the stored audio, so features that are
computed from the store are equal to the byte. A file is written before its shard. So after a crash every prepared clip
is in the store, possibly twice; the next run removes the duplicates after it has published.

The metadata of a file have hashes of where its clips came from, as those of a shard. Several outputs may share a store,
one at a time, unless they have other sounds under the same ids.
"""

import io
import json
import os
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ast_core.errors import DataError
from ast_core.features import KALDI128
from ast_core.labels import LabelVocabulary
from pipeline import dataset, parquet, storage
from pipeline.prepare.clip import WAVEFORM
from pipeline.prepare.output.origins import ORIGIN, source_hashes, to_metadata, with_origins
from pipeline.prepare.output.same_clips import ROWS_AT_ONCE, is_other_section
from pipeline.prepare.sources import archives
from pipeline.prepare.sources.own_outputs import has_clips

FLAC_OPTIONS = {"compression_level": "0", "frame_size": "4096"}
"""A higher level saves 5 % of the bytes, but decoding takes a third longer. FFmpeg's default frame size at this rate
would double the time of encoding and of decoding."""

FULL_SCALE = 1 << 15

STORED = pa.schema(
    [
        pa.field("clip_id", pa.string()),
        pa.field("split", pa.string()),
        pa.field("video_id", pa.string()),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("labels", dataset.LABELS),  # indices into labels.csv
        pa.field("label_names", pa.list_(pa.string())),
        pa.field("num_clipped", pa.int32()),  # samples beyond full scale
        pa.field("audio", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    ]
)
"""All columns are nullable, though only video_id is ever null: Hugging Face `datasets` requires nullable columns."""

_ORIGINS = pa.schema([*map(STORED.field, ("clip_id", "start_s", "end_s")), *ORIGIN])
"""What a run compares with the clips that it would add. ORIGIN is in a file's metadata, as in a shard's."""

_VALUES = {"start_s": "float64", "end_s": "float64", "num_clipped": "int32"}
_LISTS = {"labels": "int16", "label_names": "string"}
_FEATURES = {
    **{name: {"dtype": _VALUES.get(name, "string"), "_type": "Value"} for name in STORED.names},
    **{name: {"feature": {"dtype": kind, "_type": "Value"}, "_type": "Sequence"} for name, kind in _LISTS.items()},
}


def _metadata(sample_rate_hz: int) -> dict[str | bytes, str | bytes]:
    """Metadata by which Hugging Face `datasets` recognises the audio column, with the sample rate of the store."""
    columns = _FEATURES | {"audio": {"sampling_rate": sample_rate_hz, "_type": "Audio"}}
    return {"huggingface": json.dumps({"info": {"features": columns}})}


def _rate_hz(uri: str) -> int | None:
    """The sample rate of a store, from the metadata of one of its files; None for a file that is not of a store."""
    with archives.open_parquet(uri) as parquet:
        schema = parquet.schema_arrow
    if not set(STORED.names) <= set(schema.names) or not schema.metadata or b"huggingface" not in schema.metadata:
        return None
    rate_hz: int = json.loads(schema.metadata[b"huggingface"])["info"]["features"]["audio"]["sampling_rate"]
    return rate_hz


def check_kept_rates(media: pa.ChunkedArray, sample_rate_hz: int) -> None:
    """Refuse kept audio of a lower rate than the features need, because its upper bands would be empty.

    Args:
        media: Where the audio of each listed clip is.

    Raises:
        DataError: the files of an audio store are among them, and its rate is lower.
    """
    files = pc.unique(media.filter(pc.match_substring_regex(media, r"/audio/[^/]+\.parquet$"))).to_pylist()
    one_of_each = {uri.rsplit("/", 3)[0]: uri for uri in files}
    for store, uri in one_of_each.items():
        kept_hz = _rate_hz(uri)
        if kept_hz is not None and kept_hz < sample_rate_hz:
            raise DataError(
                f"{store} keeps audio at {kept_hz} Hz, and these features need {sample_rate_hz} Hz; prepare from the "
                f"recordings, or choose features with a sample_rate_hz of {kept_hz} or less"
            )


def keep_audio(rows: pa.Table, sample_rate_hz: int = KALDI128.sample_rate_hz) -> pa.Table:
    """Stage that adds `flac` (FLAC, null for failed rows) and replaces `waveform` by the rounded one."""
    waveforms = rows["waveform"].combine_chunks()
    samples = to_16_bit(waveforms.values.to_numpy())
    ends = waveforms.offsets.to_numpy()
    encoded = [_flac(samples[begin:end], sample_rate_hz) if end > begin else None for begin, end in pairwise(ends)]
    rounded = pa.ListArray.from_arrays(waveforms.offsets, pa.array(samples / np.float32(FULL_SCALE)), type=WAVEFORM)
    rows = rows.set_column(rows.column_names.index("waveform"), "waveform", rounded)
    return rows.append_column("flac", pa.array(encoded, pa.binary()))


def to_16_bit(waveform: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(waveform * np.float32(FULL_SCALE)), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


def flac_bytes(waveform: np.ndarray, sample_rate_hz: int = KALDI128.sample_rate_hz) -> bytes:
    """FLAC (16 bit, mono) of a waveform in [-1, 1]."""
    return _flac(to_16_bit(waveform), sample_rate_hz)


def _flac(samples: np.ndarray, sample_rate_hz: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="flac", options={"metadata_header_padding": "0"}) as container:
        stream = container.add_stream("flac", rate=sample_rate_hz, layout="mono", options=FLAC_OPTIONS)
        stream.format = "s16"
        frame = av.AudioFrame.from_ndarray(samples[np.newaxis], format="s16", layout="mono")
        frame.rate = sample_rate_hz
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@dataclass(frozen=True)
class AudioStore:
    """An audio store that a run writes to. `labels` are those of the data set."""

    uri: str
    labels: LabelVocabulary
    sample_rate_hz: int = KALDI128.sample_rate_hz

    def reserve(self) -> None:
        """Reserve an empty folder by writing the labels, or refuse a folder that contains something else."""
        file = dataset.labels_csv(self.uri)
        if storage.exists(file):
            if LabelVocabulary.from_csv(storage.read_text(file), origin=file) == self.labels:
                self._check_rate()
                return
            if has_clips(self.uri):
                raise DataError(f"{self.uri} keeps audio with other labels; give another --keep-audio")
        elif not storage.is_empty(self.uri):
            raise DataError(f"{self.uri} is not empty and keeps no audio; give a new folder as --keep-audio")
        storage.write_bytes(file, self.labels.to_csv().encode())

    def _check_rate(self) -> None:
        files = storage.list_files(self.uri, suffix=".parquet", recursive=True)
        kept_hz = _rate_hz(files[0]) if files else None
        if kept_hz not in (None, self.sample_rate_hz):
            raise DataError(
                f"{self.uri} keeps audio at {kept_hz} Hz, this run has {self.sample_rate_hz} Hz; give another "
                "--keep-audio, or leave it out"
            )

    def is_at(self, uri: str) -> bool:
        """Whether `uri` is this folder, however it is spelled."""
        return _spelled_out(self.uri) == _spelled_out(uri)

    def check_clips(self, split: str, prepared: pa.ChunkedArray, new: pa.Table) -> list[str]:
        """Refuse a store that does not fit the clips of a split.

        Args:
            prepared: ids of prepared clips. If their audio is missing in the store, it would never be added.
            new: rows of CLIPS to prepare. If the store has audio under their ids, theirs replaces it: that of other
                sections is refused. Other files may be the same ones in another folder.

        Returns:
            Lines for the user on audio of other files.
        """
        if not len(prepared) + len(new):
            return []
        files = list(self._clip_ids(split))
        stored = pa.chunked_array([clip_ids for _, clip_ids in files], pa.string())
        lost = pc.sum(pc.invert(pc.is_in(prepared, value_set=stored.combine_chunks()))).as_py()
        if lost:
            raise DataError(
                f"{lost} clips of split {split!r} are prepared and their audio is not in {self.uri}; "
                "give another --output, or leave out --keep-audio"
            )
        if not len(new) or not files:
            return []
        new_ids = new["clip_id"].combine_chunks()
        file_of = np.repeat(np.arange(len(files)), [len(clip_ids) for _, clip_ids in files])
        again = np.unique(file_of[pc.is_in(stored, value_set=new_ids).to_numpy()])
        uris = [storage.join(self._folder(split), files[i][0]) for i in again]
        known = pa.concat_tables([_ORIGINS.empty_table(), *archives.ahead(_origins_of, uris)])
        known = known.filter(pc.is_in(known["clip_id"], value_set=new_ids))
        asked = new.take(pc.index_in(known["clip_id"], value_set=new_ids))
        is_other = is_other_section(known, asked)
        if is_other.any():
            raise DataError(
                f"{self.uri} keeps audio of other sections under the ids of {is_other.sum()} clips of split {split!r}, "
                f"{known['clip_id'][int(np.argmax(is_other))]} for one; give another --keep-audio"
            )
        pieces = [asked.slice(begin, ROWS_AT_ONCE) for begin in range(0, len(asked), ROWS_AT_ONCE)]
        now = pa.chunked_array(map(source_hashes, pieces), pa.int64())
        is_other = pc.fill_null(pc.not_equal(known["source_hash"], now), False).to_numpy()
        if not is_other.any():
            return []
        return [
            f"warning: {self.uri} keeps audio of other files or URLs under the ids of {is_other.sum():,} clips of "
            f"split {split!r}, {known['clip_id'][int(np.argmax(is_other))]} for one, which is replaced; if it is that "
            "of another data set, give another --keep-audio"
        ]

    def write(self, split: str, name: str, rows: pa.Table) -> None:
        """Write prepared clips of one split to the file `name`."""
        clip_ids, labels = rows["clip_id"], rows["labels"].to_pylist()
        made = {
            "label_names": pa.array([[self.labels.names[i] for i in clip] for clip in labels], pa.list_(pa.string())),
            "audio": pa.StructArray.from_arrays(
                [rows["flac"].combine_chunks(), pc.binary_join_element_wise(clip_ids, "flac", ".").combine_chunks()],
                fields=list(STORED.field("audio").type),
            ),
        }
        table = pa.table(
            [made.get(column, rows[column] if column in rows.column_names else None) for column in STORED.names],
            STORED.names,
        )
        self._write(split, name, table.cast(STORED), to_metadata(rows))

    def remove_duplicates(self, split: str, prepared: pa.Table) -> None:
        """Keep one copy of each clip: the one in the file of the clip's shard, or else the first.

        Args:
            prepared: `clip_id` and `shard` of the split's clips.
        """
        listed = list(self._clip_ids(split))
        counts = pa.chunked_array([clip_ids for _, clip_ids in listed], pa.string()).value_counts()
        doubled = pc.filter(counts.field("values"), pc.greater(counts.field("counts"), 1))
        if not len(doubled):
            return
        of_doubled = prepared.filter(pc.is_in(prepared["clip_id"], value_set=doubled))
        file_of = dict(zip(of_doubled["clip_id"].to_pylist(), of_doubled["shard"].to_pylist(), strict=True))
        there = {(clip_id, file) for file, clip_ids in listed for clip_id in _ids_among(clip_ids, doubled)}
        file_of = {clip_id: file for clip_id, file in file_of.items() if (clip_id, file) in there}
        for file, clip_ids in listed:
            for clip_id in _ids_among(clip_ids, doubled):
                file_of.setdefault(clip_id, file)
        written: set[str] = set()  # the rest of a file may be another file, which then stays
        for file, clip_ids in listed:
            is_kept = [file_of.get(clip_id, file) == file for clip_id in clip_ids.to_pylist()]
            if not all(is_kept) and file not in written:
                self._remove_rows(split, file, is_kept)
                written.add(f"{dataset.name_of(clip_ids.filter(pa.array(is_kept)))}.parquet")

    def _remove_rows(self, split: str, file: str, is_kept: list[bool]) -> None:
        """Remove rows from a file. The rest is written first, so that a crash leaves duplicates and loses nothing."""
        uri = storage.join(self._folder(split), file)
        if any(is_kept):
            with archives.open_parquet(uri) as parquet:
                left = with_origins(parquet.read(), parquet.schema_arrow.metadata).filter(pa.array(is_kept))
            self._write(split, dataset.name_of(left["clip_id"]), left.select(STORED.names), to_metadata(left))
        storage.discard(uri)

    def _write(self, split: str, name: str, table: pa.Table, origins: dict[bytes, bytes]) -> None:
        small = [column for column in STORED.names if column != "audio"]
        storage.write_file(
            storage.join(self._folder(split), f"{name}.parquet"),
            lambda file: pq.write_table(
                table.replace_schema_metadata(_metadata(self.sample_rate_hz) | origins),
                file,
                row_group_size=dataset.ROW_GROUP_CLIPS,
                compression="none",  # FLAC cannot be compressed further
                use_dictionary=["split", "video_id", "label_names.list.element"],
                write_statistics=small,
                **parquet.CHECKSUMS,
            ),
        )

    def _clip_ids(self, split: str) -> Iterable[tuple[str, pa.Array]]:
        """Yield the name and the clip_ids of each file."""
        files = storage.list_files(self._folder(split), suffix=".parquet")
        for uri, clip_ids in zip(files, archives.ahead(_clip_ids_of, files), strict=True):
            yield uri.rsplit("/", 1)[1], clip_ids

    def _folder(self, split: str) -> str:
        return storage.join(self.uri, split, "audio")


def _spelled_out(uri: str) -> tuple[str, str]:
    fs, path = storage.resolve(uri)
    return fs.type_name, os.path.realpath(path) if storage.is_local(uri) else posixpath.normpath(path)


def _origins_of(uri: str) -> pa.Table:
    """_ORIGINS of a file of a store."""
    with archives.open_parquet(uri) as parquet:
        rows = parquet.read(columns=["clip_id", "start_s", "end_s"], use_threads=False)
        return with_origins(rows, parquet.schema_arrow.metadata).cast(_ORIGINS)


def _clip_ids_of(uri: str) -> pa.Array:
    with archives.open_parquet(uri) as parquet:
        return parquet.read(columns=["clip_id"], use_threads=False)["clip_id"].combine_chunks()


def _ids_among(clip_ids: pa.Array, wanted: pa.Array) -> list[str]:
    return clip_ids.filter(pc.is_in(clip_ids, value_set=wanted)).to_pylist()
