"""Recordings whose files have changed since an earlier run tagged them, or failed to read them."""

from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache

from pipeline import storage
from pipeline.tag.inputs import Inputs
from pipeline.tag.output import Done
from pipeline.tag.pieces import clip_names


def changed_since(inputs: Inputs, done: Done) -> list[str]:
    """The recordings with a local file that was written, or put in its place, after an earlier run began to read it.

    The file of a prepared clip is its shard. Files elsewhere than on this machine are not looked at, because that would
    take a request for each. Neither are recordings that an earlier version tagged.
    """
    if not done.read_us:
        return []
    written_us = lru_cache(1 << 16)(storage.written_us)  # an archive or a shard contains many recordings
    return [name for name, media in _media(inputs) if name in done.read_us and written_us(media) > done.read_us[name]]


def other_lines(inputs: Inputs, part_of: Mapping[str, str]) -> list[str]:
    """A line on recordings that have results and are not among the inputs."""
    others = len(part_of) - sum(name in part_of for name, _ in _media(inputs))
    if others <= 0:
        return []
    return [f"{others:,} recordings of the output are not in this input; their results stay, and count in the summary"]


def changed_lines(changed: Collection[str], part_of: Mapping[str, str]) -> list[str]:
    """A line on recordings that have results, and are not tagged again automatically, because copying changes times."""
    tagged = [name for name in changed if name in part_of]
    if not tagged:
        return []
    return [
        f"{len(tagged):,} recordings have files that were written or copied after they were tagged ({tagged[0]} for "
        f"one); if they are other sounds now, delete the parts that they are in ({part_of[tagged[0]]} for one), and "
        "all of their recordings are tagged again, or give another --output"
    ]


def _media(inputs: Inputs) -> Iterator[tuple[str, str]]:
    """Each recording with the file that it is in."""
    columns = (inputs.recordings[column].to_pylist() for column in ("recording", "media"))
    yield from zip(*columns, strict=True)
    for data, splits in inputs.datasets:
        clips = data.clips(splits)
        yield from zip(clip_names(data, splits, clips), (clips.shards[i] for i in clips.shard_of), strict=True)
