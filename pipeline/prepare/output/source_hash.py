"""What a shard stores about the origin of its clips, so that a later run notices if a list names another one."""

import hashlib
import os

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset import ORIGIN
from pipeline.redaction import without_secrets


def record_origin(rows: pa.Table) -> pa.Table:
    """Stage that adds ORIGIN. It precedes decoding, which sets the ends that the list does not give."""
    made = origins(rows)
    for name in made.column_names:
        rows = rows.append_column(made.field(name), made[name])
    return rows


def origins(clips: pa.Table) -> pa.Table:
    """ORIGIN for rows of CLIPS.

    `source_hash` is the first 8 bytes of the BLAKE2b of the recording's name: its `video_id`, because copies of a video
    are one recording, or else the file and the member of an archive. A path or URL may be private, so only its hash is
    stored.
    """
    columns = (clips[name].to_pylist() for name in ("video_id", "media", "member"))
    hashes = [_source_hash(*row) for row in zip(*columns, strict=True)]
    return pa.table([pa.array(hashes, pa.int64()), pc.is_null(clips["end_s"])], schema=ORIGIN)


def _source_hash(video_id: str | None, media: str, member: str | None) -> int:
    if video_id is not None:
        name = f"video {video_id}"
    else:
        path = without_secrets(media) if "://" in media else os.path.normpath(media)  # the keys of a URL may change
        name = f"file {path}\n{member or ''}"
    return int.from_bytes(hashlib.blake2b(name.encode()).digest()[:8], "little", signed=True)
