"""Where the audio of a listed section lies: on YouTube, behind a URL of one's own, or in a folder of files.

A `Locate` is asked `(video_id, start_s, end_s)` and answers with a `Place`, whose `media_start_s` says where in the
media the section begins; None if it has no such file; a `ClipError` if it can never have one.

| file below an AudioFolder                   | holds                            | media_start_s |
|---------------------------------------------|----------------------------------|---------------|
| `ID_START.ext`, `ID_START_END.ext`          | the section alone; preferred     | 0             |
| `ID.ext`                                    | the whole recording              | start_s       |
| `ID.ext` with `files_are_clips=True`        | the section alone                | 0             |

Each may have a `Y` before the ID and lie in any folder below; START and END read `20.000` or `20`, and an END has to be
the section's own. Some copies of AudioSet name the ten-second section plainly `ID.wav`. Nothing in the name tells, so
`files_are_clips` must; without it such a file is later found shorter than `start_s` and fails as truncated. Of several
files that fit, an ID without the `Y`, then the first in the order of paths is taken.
"""

import re
from collections.abc import Callable
from posixpath import basename, splitext
from typing import NamedTuple
from urllib.parse import quote

from ast_core.errors import ConfigError, DataError
from pipeline import storage
from pipeline.prepare.clip import ClipError, Reason


class Place(NamedTuple):
    """Where the audio of a section is: three columns of CLIPS."""

    media: str
    member: str | None
    media_start_s: float


Locate = Callable[[str, float, float], Place | None]

_MEDIA_NAME = re.compile(
    r".+\.(3gp|aac|aiff?|au|avi|flac|flv|m4a|m4b|mka|mkv|mov|mp[34]|mpe?g|og[agv]|opus|ts|wav|web[am]|wm[av])",
    re.IGNORECASE,
)
_CUT = re.compile(r"(.+?)_(\d+(?:\.\d+)?)(?:_(\d+(?:\.\d+)?))?")


def is_media(path: str) -> bool:
    return _MEDIA_NAME.fullmatch(basename(path)) is not None


def stem(path: str) -> str:
    return splitext(basename(path))[0]


def youtube(video_id: str, start_s: float, end_s: float) -> Place | None:
    if len(video_id) != 11:
        raise ClipError(Reason.BAD_ID, f"a YouTube id has 11 characters, {video_id!r} has {len(video_id)}")
    return Place(f"https://www.youtube.com/watch?v={video_id}", None, start_s)


def is_youtube(media: str) -> bool:
    return media.startswith("https://www.youtube.com/")


def url_template(template: str) -> Locate:
    """Media at `template`, as in `http://host/{video_id}.webm`; with {start_s} in it, the server cuts the section."""
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


class AudioFolder:
    """The media files below a folder, listed once, when this is made."""

    def __init__(self, uri: str, *, files_are_clips: bool = False) -> None:
        self.files_are_clips = files_are_clips
        self._cut: dict[
            str, str
        ] = {}  # "ID_20.000" and "ID_20.000_30.000", whatever the file's own way to write numbers
        self._whole: dict[str, str] = {}
        try:
            files = storage.list_files(storage.absolute(uri), recursive=True)
        except (OSError, ValueError) as err:
            raise DataError(f"cannot list the audio folder {uri}: {err}") from err
        for file in filter(is_media, files):
            self._add(stem(file), file)
        if not self._whole:
            raise DataError(f"there is no audio file below {uri}; is it the right folder?")

    def _add(self, name: str, file: str) -> None:
        # An id may end in "_20" itself, so every reading of a name is kept and the id that is asked for decides.
        self._whole.setdefault(name, file)
        if match := _CUT.fullmatch(name):
            video_id, start, end = match.groups()
            if end is None:
                self._cut.setdefault(f"{video_id}_{float(start):.3f}", file)
            else:
                self._cut.setdefault(f"{video_id}_{float(start):.3f}_{float(end):.3f}", file)
                self._cut.setdefault(f"{video_id}_{start}_{float(end):.3f}", file)

    def __call__(self, video_id: str, start_s: float, end_s: float) -> Place | None:
        for name in (video_id, f"Y{video_id}"):
            cut = f"{name}_{start_s:.3f}"
            if file := self._cut.get(cut) or self._cut.get(f"{cut}_{end_s:.3f}"):
                return Place(file, None, 0.0)
        if file := self._whole.get(video_id) or self._whole.get(f"Y{video_id}"):
            return Place(file, None, 0.0 if self.files_are_clips else start_s)
        return None
