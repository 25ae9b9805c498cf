"""Recordings whose files have changed since an earlier run tagged them, or failed to read them."""

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

from pipeline import storage
from pipeline.tag.inputs import Inputs
from pipeline.tag.pieces import clip_names


def changed_since(inputs: Inputs, file_of: Mapping[str, str]) -> dict[str, str]:
    """The recordings with a local file that was written, or put in its place, later than their result was.

    The file of a prepared clip is its shard. Files elsewhere than on this machine are not looked at, because that would
    take a request for each.

    Args:
        file_of: recordings, and the file in which an earlier run wrote their results.

    Returns:
        These recordings, with the same file.
    """
    if not file_of:
        return {}
    results = sorted(set(file_of.values()))
    times = storage.size_and_time(results)
    result_us = {uri: time_us or 0 for uri, (_, time_us) in zip(results, times, strict=True)}
    written_us = lru_cache(1 << 16)(storage.written_us)  # an archive or a shard contains many recordings
    return {
        name: result
        for name, media in _media(inputs)
        if (result := file_of.get(name)) is not None and written_us(media) > result_us[result]
    }


def changed_lines(changed: Mapping[str, str]) -> list[str]:
    """A line on recordings that have results, and are not tagged again automatically, because copying changes times."""
    if not changed:
        return []
    name, result = next(iter(changed.items()))
    return [
        f"{len(changed):,} recordings have files that were written or copied after they were tagged ({name} for one); "
        f"if they are other sounds now, delete the parts that they are in ({result} for one), and all of their "
        "recordings are tagged again, or give another --output"
    ]


def _media(inputs: Inputs) -> Iterator[tuple[str, str]]:
    """Each recording with the file that it is in."""
    rows: Iterable[tuple[str, str]] = zip(
        inputs.recordings["recording"].to_pylist(), inputs.recordings["media"].to_pylist(), strict=True
    )
    yield from rows
    for data, splits in inputs.datasets:
        clips = data.clips(splits)
        yield from zip(clip_names(data, splits, clips), (clips.shards[i] for i in clips.shard_of), strict=True)
