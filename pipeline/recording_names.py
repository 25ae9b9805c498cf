"""The names of recordings in tags and embeddings. They have no secrets.

| what                        | name                                                |
|-----------------------------|-----------------------------------------------------|
| a recording                 | its absolute path or URI                            |
| one in an archive           | `ARCHIVE/MEMBER`                                    |
| a section of a list         | `RECORDING#t=START,END`: a media fragment, seconds  |
| a clip of a prepared split  | `DATA/SPLIT/CLIP_ID`                                |
"""

from pipeline.redaction import without_secrets


def recording_name(media: str, start_s: float = 0.0, end_s: float | None = None) -> str:
    """The name of a recording, or of a section of it. `media` is its absolute path or URI, or `ARCHIVE/MEMBER`."""
    name = without_secrets(media)
    if not start_s and end_s is None:
        return name
    return f"{name}#t={start_s:g}" + ("" if end_s is None else f",{end_s:g}")


def clip_name_prefix(data_uri: str, split: str) -> str:
    """What a clip's `clip_id` is appended to. `data_uri` is the absolute path or URI of the data set."""
    return f"{without_secrets(data_uri)}/{split}/"
