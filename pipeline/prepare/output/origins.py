"""Where the clips of a shard came from, so that a later run notices if a list names other files for them.

It is in the metadata of the shard, as JSON with a list for each column of ORIGIN. It is not in the rows, because the
same clips give the same rows wherever their files are. Shards of earlier versions have no origins.
"""

import hashlib
import json
import os
import re

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.dataset import ORIGINS_KEY
from pipeline.redaction import WebAddress, without_secrets

ORIGIN = pa.schema(
    [
        pa.field("source_hash", pa.int64()),  # of the recording's name
        pa.field("is_to_end", pa.bool_()),  # whether the list gave no end, so that the clip ends where its media does
        pa.field("listed_end_s", pa.float64()),  # the end that the list gave
        pa.field("section_hash", pa.int64()),  # of the file, the section and its place in the file
    ]
)


def record_origin(rows: pa.Table) -> pa.Table:
    """Stage that adds ORIGIN. It precedes decoding, which sets ends that the list does not give."""
    made = {
        "source_hash": source_hashes(rows),
        "is_to_end": pc.is_null(rows["end_s"]),
        "listed_end_s": rows["end_s"],
        "section_hash": section_hashes(rows),
    }
    for field in ORIGIN:
        rows = rows.append_column(field, made[field.name])
    return rows


def section_hashes(clips: pa.Table, *, with_place: bool = True) -> pa.Array:
    """int64 `[clips]`: a hash of the file or URL, the section, and the section's place in the file.

    The place is `media_start_s`, which `--files-are-clips` changes. Earlier versions had no place in these hashes.
    """
    columns = (clips[name].to_pylist() for name in ("media", "member", "start_s", "end_s", "media_start_s"))
    texts = (
        f"{_name(None, *file)}\n{start}\n{end}" + (f"\n{place}" if with_place else "")
        for *file, start, end, place in zip(*columns, strict=True)
    )
    return pa.array(map(_hash, texts), pa.int64())


def read_otherwise(clips: pa.Table) -> pa.Table:
    """Rows of CLIPS, as if `--files-are-clips` were given where it was not, and the other way round."""
    is_clip = pc.fill_null(pc.equal(clips["media_start_s"], 0.0), False)
    place = pc.if_else(is_clip, pa.scalar(None, pa.float64()), 0.0)
    return clips.set_column(clips.column_names.index("media_start_s"), "media_start_s", place)


def source_hashes(clips: pa.Table) -> pa.Array:
    """int64 `[clips]`: the first 8 bytes of the BLAKE2b of each recording's name.

    That is its `video_id`, because copies of a video are one recording, or else the file and the member of an archive.
    A path or URL may be private, so only its hash is stored.
    """
    columns = (clips[name].to_pylist() for name in ("video_id", "media", "member"))
    return pa.array([_hash(_name(*row)) for row in zip(*columns, strict=True)], pa.int64())


def _name(video_id: str | None, media: str, member: str | None) -> str:
    if video_id is not None:
        return f"video {video_id}"
    media = storage.local_path(media)
    path = _without_keys(media) if "://" in media else os.path.normpath(media)
    return f"file {path}\n{member or ''}"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode()).digest()[:8], "little", signed=True)


_NAMES_A_FILE = re.compile(r"(?i)(?:(?:file|object|s3)[-_]?)?key=|(?:code|session|ticket)=")


def _without_keys(uri: str) -> str:
    """A URI without keys, which another run may have new ones of. An option called `key` or `code` names a file."""
    if not uri.lower().startswith(("http://", "https://")):
        return without_secrets(uri)
    shown, others = WebAddress.of(uri)
    return "&".join([shown, *filter(_NAMES_A_FILE.match, others.split("&"))])


def to_metadata(rows: pa.Table) -> dict[bytes, bytes]:
    """The entry of a shard's metadata for its rows; none if they have no columns ORIGIN."""
    if not {*ORIGIN.names} <= {*rows.column_names}:
        return {}
    return {ORIGINS_KEY: json.dumps(rows.select(ORIGIN.names).to_pydict(), separators=(",", ":")).encode()}


def with_origins(rows: pa.Table, metadata: dict[bytes, bytes] | None) -> pa.Table:
    """All rows of a shard with the columns ORIGIN from its metadata: null if it has none, or other rows than it had.

    Raises:
        ValueError: the metadata is damaged.
    """
    try:
        made = json.loads((metadata or {}).get(ORIGINS_KEY, "{}"))
        for field in ORIGIN:
            values = made.get(field.name, [])
            is_known = len(values) == len(rows)
            rows = rows.append_column(field, pa.array(values if is_known else [None] * len(rows), field.type))
    except (ValueError, TypeError, AttributeError, OverflowError, pa.ArrowException) as err:
        raise ValueError(f"the origins in its metadata cannot be read: {err}") from err
    return rows
