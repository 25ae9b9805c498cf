"""The names of recordings in tags and embeddings. They have no secrets.

| what                        | name                                                |
|-----------------------------|-----------------------------------------------------|
| a recording                 | its absolute path or URI                            |
| one in an archive           | `ARCHIVE/MEMBER`                                    |
| a section of a list         | `RECORDING#t=START,END`: a media fragment, seconds  |
| a clip of a prepared split  | `DATA/SPLIT/CLIP_ID`                                |
"""

import os
import posixpath

from pipeline import storage
from pipeline.redaction import without_secrets


def recording_name(media: str, start_s: float = 0.0, end_s: float | None = None, *, member: str | None = None) -> str:
    """The name of a recording, or of a section of it.

    Args:
        media: the absolute path or URI of the recording, or of the archive that it is in.
        member: the name of the recording in the archive.
    """
    media = storage.local_path(media)
    name = without_secrets(media) if "://" in media else _without_dots(media)
    if member is not None:
        name = f"{name}/{member}"
    if not start_s and end_s is None:
        return name
    return f"{name}#t={start_s:.10g}" + ("" if end_s is None else f",{end_s:.10g}")


def _without_dots(path: str) -> str:
    """`path` without `.` and `..`, unless a link makes that another file, so that a file has one name in all lists."""
    plain = posixpath.normpath(path)
    plain = plain[1:] if plain.startswith("//") else plain  # POSIX leaves two slashes at the beginning
    return plain if plain == path or os.path.realpath(plain) == os.path.realpath(path) else path


def clip_name_prefix(data_uri: str, split: str) -> str:
    """What a clip's `clip_id` is appended to. `data_uri` is the absolute path or URI of the data set."""
    return f"{recording_name(data_uri)}/{split}/"
