"""Finds the audio of a section: on YouTube, at a URL of your own, or in a folder of files.

A `Locate` gets `(video_id, start_s, end_s)` and returns a `Place`, whose `media_start_s` is the start of the section in
the media. It returns None if there is no such file, and raises a `ClipError` if there can never be one.

| file below an AudioFolder                   | contains                         | media_start_s |
|---------------------------------------------|----------------------------------|---------------|
| `ID_START.ext`, `ID_START_END.ext`,         | only the section; preferred      | 0             |
| `ID_START-END.ext`, `ID-START-END.ext`      |                                  |               |
| `ID.ext`, `TITLE [ID].ext` (yt-dlp's own)   | the whole recording, or only     | None          |
|                                             | the section, as in copies of     |               |
|                                             | AudioSet                         |               |
| `ID.ext` with `files_are_clips=True`        | only the section                 | 0             |

A name may have a `Y` before the ID, and the file may be in any subfolder. START and END are written as `20.000`, `20`
or `000020`, and END must be the section's own. Whole numbers further apart than the longest clip are milliseconds, as
in `ID_20000_30000.wav`. If no file fits otherwise, a START of 1000 or more is in milliseconds (`ID_20000.wav`), unless
a name in the folder has one below 1000; the end of a whole YouTube id (`abcdefgh_12`) is none. For `ID.ext` the length
decides, when the file is decoded: if it is no longer than the section, it is the section. If several files fit, an ID
without the `Y` is preferred, then a file to an archive's member, then the first in the order of paths.

Files may be in tars, and in the `audio` column of Parquet files, as in Hugging Face data sets. The names of such a row
are its `video_id`, the file name in `audio.path` and its `clip_id`. If it has a `start_s`, it contains only the
section.
"""

import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from posixpath import basename, dirname, splitext
from typing import NamedTuple
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from ast_core.errors import ConfigError, DataError
from pipeline import storage
from pipeline.prepare.clip import MAX_CLIP_S, ClipError, Reason
from pipeline.prepare.sources import archives
from pipeline.prepare.sources.own_outputs import without_outputs
from pipeline.redaction import without_secrets


class Place(NamedTuple):
    """The audio of a section, as three columns of CLIPS."""

    media: str
    member: str | None
    media_start_s: float | None


Locate = Callable[[str, float, float], Place | None]

_MEDIA_NAME = re.compile(
    r".+\.(3g[p2]|3gpp2?|aac|adts|e?ac3|aif[cf]?|aiff|amr|ape|asf|au|avi|bwf|caf|dsf|dts|f4v|flac|flv|m4[abrv]|mka|mkv"
    r"|mov|mp[234ac]|mpe?g|m2?ts|og[agv]|opus|ra|rf64|rm|snd|sph|spx|tak|ts|tta|voc|w64|wave?|web[am]|wm[av]|wv)",
    re.IGNORECASE | re.DOTALL,
)
PACKED = re.compile(r".+\.(tgz|txz|tbz2?|gz|bz2|xz|zst|lz4|lzma|zip|7z|rar)", re.IGNORECASE | re.DOTALL)
_OTHER_SUFFIX = re.compile(
    r"\.(bib|bmp|cfg|cff|cls|csv|docx?|gif|h5|hdf5|html?|ini|ipynb|jpe?g|jsonl?|lab|log|mat|md|md5|np[yz]|parquet|pdf"
    r"|pickle|pkl|png|pth?|py|rst|rttm|safetensors|sh|sha256|srt|svg|tex|textgrid|toml|tsv|txt|vtt|webp|xlsx?|xml|ya?ml)"
)
"""Files with these are not missed: metadata, pictures, features, annotations."""
_SUFFIX = re.compile(r"\.(?=.*[a-z])[a-z0-9_-]{1,12}")  # not the end of "Mr. Smith" or "ID_30.000"
MOST_SUFFIXES = 5
"""A line names this many suffixes."""
_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_TITLE = re.compile(r".+ \[([A-Za-z0-9_-]{11})\]", re.DOTALL)
_YOUTUBE_ID = re.compile(r"Y?[A-Za-z0-9_-]{11}")
_FROM = re.compile(rf"(.+)_({_NUMBER})", re.DOTALL)
_FROM_MS = re.compile(r"(.+)_([1-9][0-9]{3,})", re.DOTALL)
_FROM_TO = re.compile(rf"(.+)[_-]({_NUMBER})[_-]({_NUMBER})", re.DOTALL)


def is_media(path: str) -> bool:
    return _MEDIA_NAME.fullmatch(basename(path)) is not None


def passed_over_lines(files: Iterable[str]) -> list[str]:
    """A line on the files of a folder that are not read, but whose suffixes do not say that they are no audio."""
    suffixes = (splitext(file)[1].lower() for file in files if not is_media(file) and not archives.is_archive(file))
    counts = Counter(suffix for suffix in suffixes if not _OTHER_SUFFIX.fullmatch(suffix) and _SUFFIX.fullmatch(suffix))
    if not counts:
        return []
    most = ", ".join(f"{suffix} ({num:,})" for suffix, num in counts.most_common(MOST_SUFFIXES))
    more = f" and {len(counts) - MOST_SUFFIXES:,} other suffixes" if len(counts) > MOST_SUFFIXES else ""
    return [f"not read, because they have no usual suffix of audio or video: {most}{more}"]


def packed_lines(files: Iterable[str]) -> list[str]:
    packed = list(filter(PACKED.fullmatch, files))
    return [f"not read: {len(packed):,} packed files, {packed[0]} for one; unpack them"] if packed else []


def stem(path: str) -> str:
    return splitext(basename(without_secrets(path)))[0]  # it becomes the name of a clip


def youtube(video_id: str, start_s: float, end_s: float) -> Place | None:
    if len(video_id) != 11:
        raise ClipError(Reason.BAD_ID, f"a YouTube id has 11 characters, {video_id!r} has {len(video_id)}")
    return Place(f"https://www.youtube.com/watch?v={video_id}", None, start_s)


YOUTUBE_URL = r"(?i)^https?://([a-z0-9-]+\.)*(youtube\.com|youtu\.be|youtube-nocookie\.com)[:/]"


_YOUTUBE_VIDEO = re.compile(
    r"(?i:https?://(?:[a-z0-9-]+\.)*(?:youtu\.be/|youtube(?:-nocookie)?\.com/(?:(?:shorts|embed|live|v)/"
    r"|watch/?\?(?:[^#]*&)?v=)))([A-Za-z0-9_-]{11})(?![A-Za-z0-9_-])"
)

_STARTS_LATER = r"(?i)[?&#](t|start)=[0-9]*[1-9]"


def youtube_id(url: str) -> str | None:
    """The id of the video that a URL of YouTube names, however it is written."""
    match = _YOUTUBE_VIDEO.match(url)
    return match[1] if match else None


def unread_start_lines(clips: pa.Table) -> list[str]:
    """A line on rows of CLIPS from the beginning of videos whose URLs name another start, which is not read."""
    names_start = pc.match_substring_regex(clips["media"], _STARTS_LATER)
    is_unread = pc.and_(pc.equal(clips["media_start_s"], 0.0), names_start)
    urls = clips["media"].filter(pc.and_(pc.fill_null(is_unread, False), _are_of_youtube(clips["media"])))
    if not len(urls):
        return []
    return [
        f"the start in {len(urls):,} URLs (t=, {without_secrets(urls[0].as_py())} for one) is not read: these clips "
        "begin at 0 s; a start belongs in the column start_s"
    ]


def _are_of_youtube(media: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.match_substring_regex(media, YOUTUBE_URL)


def any_of_youtube(media: pa.ChunkedArray) -> bool:
    return bool(pc.any(_are_of_youtube(media)).as_py())


def host_of(url: str) -> str:
    """The host that counts the requests for a URL."""
    if re.match(YOUTUBE_URL, url):
        return "youtube.com"
    host = re.match(r"https?://(?:[^/?#]*@)?([^/?#]*)", url)
    return host[1].lower() if host else ""


def url_template(template: str) -> Locate:
    """Media at a URL such as `http://host/{video_id}.webm`. With {start_s} in it, the server cuts the section."""
    fields = set(re.findall(r"\{([^{}]*)\}", template))
    if not re.match(r"https?://[^\s/]+", template) or "video_id" not in fields:
        raise ConfigError(f"the media URL {template!r} must begin with http(s):// and contain {{video_id}}")
    if unknown := sorted(fields - {"video_id", "start_s", "end_s"}):
        raise ConfigError(
            f"the media URL {template!r} may contain {{video_id}}, {{start_s}} and {{end_s}}, not {{{unknown[0]}}}"
        )

    def locate(video_id: str, start_s: float, end_s: float) -> Place | None:
        url = template.replace("{video_id}", quote(video_id, safe=""))
        url = url.replace("{start_s}", f"{start_s:.3f}").replace("{end_s}", f"{end_s:.3f}")
        return Place(url, None, 0.0 if "start_s" in fields else start_s)

    return locate


def _stands_alone(name: str, begin: int, end: int) -> bool:
    """Whether `name[begin:end]` is not part of a longer word. A Y before it is allowed."""
    before = name[:begin].removesuffix("Y") if begin == 1 else name[:begin]
    return not before[-1:].isalnum() and not name[end : end + 1].isalnum()


class AudioFolder:
    """The media files of a folder and its archives, listed once by the constructor.

    To save memory, it keeps only a name and a number per clip, and builds a place when it is asked for.
    """

    def __init__(self, uri: str, *, files_are_clips: bool = False) -> None:
        self.files_are_clips = files_are_clips
        self._archives: list[archives.Archive] = []
        self._names: list[pa.Array] = []
        self._begins = array("q")  # number of each archive's first member; the numbers of files come before
        # "ID_20.000" and "ID_20.000_30.000", however the file's name writes numbers
        self._cut: dict[str, int] = {}
        self._cut_in_ms: dict[str, int] = {}
        self._has_starts_in_s = False
        self._whole: dict[str, int] = {}
        try:
            files = storage.list_files(storage.absolute(uri), recursive=True)
        except (OSError, ValueError) as err:
            raise DataError(f"cannot list the audio folder {uri}: {err}") from err
        sources, notes = without_outputs(files, [file for file in files if is_media(file) or archives.is_archive(file)])
        others = [file for file in files if not PACKED.fullmatch(file)]
        self.notes = notes + packed_lines(files) + passed_over_lines(others)
        """Lines for the user about the folder."""
        self._files = list(filter(is_media, sources))
        for number, file in enumerate(self._files):
            self._add(stem(file), number)
        self._end = len(self._files)
        for listed in archives.ahead(_listed, filter(archives.is_archive, sources)):
            if isinstance(listed, archives.OtherAudioError):
                self.notes.append(f"not read: {listed}")
            elif listed is not None:
                self._add_archive(*listed)
        if not self._end:
            why = f" ({self.notes[0]})" if self.notes else ""
            raise DataError(
                f"there is no audio file below {uri}, nor a .tar of them, nor Parquet with a column `audio`{why}; "
                "is it the right folder?"
            )

    def _add_archive(self, archive: archives.Archive, names: archives.Names) -> None:
        self._archives.append(archive)
        self._names.append(names.names)
        self._begins.append(self._end)
        for name, member in zip(names.names.to_pylist(), names.of.tolist(), strict=True):
            self._add(name, self._end + member)
        self._end += archive.num_members

    def _add(self, name: str, number: int) -> None:
        # An id may end in "_20" itself, so every reading of a name is stored, and the requested id decides.
        if match := _TITLE.fullmatch(name):
            self._whole.setdefault(match[1], number)
        elif "." not in name:  # no id contains a dot
            self._whole.setdefault(name, number)
        for section in _sections(name):
            self._cut.setdefault(section, number)
        if match := _FROM_MS.fullmatch(name):
            self._cut_in_ms.setdefault(f"{match[1]}_{int(match[2]) / 1000:.3f}", number)
        elif (match := _FROM.fullmatch(name)) and not _FROM_TO.fullmatch(name) and not _YOUTUBE_ID.fullmatch(name):
            self._has_starts_in_s |= 0 < float(match[2]) < 1000

    def __call__(self, video_id: str, start_s: float, end_s: float) -> Place | None:
        for name in (video_id, f"Y{video_id}"):
            cut = f"{name}_{start_s:.3f}"
            if (number := self._cut.get(cut, self._cut.get(f"{cut}_{end_s:.3f}"))) is not None:
                return self._place(number, 0.0)
        if (number := self._whole.get(video_id, self._whole.get(f"Y{video_id}"))) is not None:
            return self._place(number, 0.0 if self.files_are_clips or not start_s else None)
        cut = f"{video_id}_{start_s:.3f}"
        if self._has_starts_in_s:
            return None
        if (number := self._cut_in_ms.get(cut, self._cut_in_ms.get(f"Y{cut}"))) is not None:
            return self._place(number, 0.0)
        return None

    def under_other_names(self, video_ids: Collection[str]) -> str:
        """A line on files whose names contain one of these ids, but in an unsupported form; empty if there are none.

        `video_ids` are some of those for which no file was found.
        """
        lengths = sorted({len(video_id) for video_id in video_ids})
        found: dict[str, str] = {}
        # Some downloaders use ids as folder names.
        folders = dict.fromkeys(f"{basename(dirname(file))}/" for file in self._files)
        stems = chain(map(stem, self._files), folders, *(names.to_pylist() for names in self._names))
        for name in stems:
            for length in lengths:
                for begin in range(len(name) - length + 1):
                    video_id = name[begin : begin + length]
                    if video_id in video_ids and _stands_alone(name, begin, begin + length):
                        found.setdefault(video_id, name)
        if not found:
            return ""
        video_id, name = next(iter(found.items()))
        return (
            f"files of {len(found)} of the {len(video_ids)} ids without a file are there, but of another section, or "
            f"under a name that is not read: {name!r} for {video_id}; the names that are read are ID, ID_START and "
            "ID_START_END, in seconds or milliseconds, with or without a Y in front"
        )

    def _place(self, number: int, media_start_s: float | None) -> Place:
        if number < len(self._files):
            return Place(self._files[number], None, media_start_s)
        i = bisect_right(self._begins, number) - 1
        archive = self._archives[i]
        return Place(archive.uri, archive.member(number - self._begins[i]), media_start_s)


def _sections(name: str) -> Iterator[str]:
    """The sections that a file's name may mean, for example "ID_20.000" and "ID_20.000_30.000"."""
    if match := _FROM.fullmatch(name):
        yield f"{match[1]}_{float(match[2]):.3f}"
    if match := _FROM_TO.fullmatch(name):
        video_id, start, end = match.groups()
        yield f"{video_id}_{float(start):.3f}_{float(end):.3f}"
        if "." not in start + end and int(end) - int(start) > MAX_CLIP_S:
            yield f"{video_id}_{int(start) / 1000:.3f}_{int(end) / 1000:.3f}"


def _listed(uri: str) -> tuple[archives.Archive, archives.Names] | archives.OtherAudioError | None:
    try:
        return archives.list_archive(uri, is_media)
    except archives.OtherAudioError as err:
        return err
