"""Sources: each reads a list of clips into a table of clips, and a table of refused rows.

The package has many modules because each kind of list is one file (`registry.py` names them). The others have what
several kinds share: rows, label texts, clip names, archives, and where the audio is.

| source             | split                         | clip_id                          | labels                      |
|--------------------|-------------------------------|----------------------------------|-----------------------------|
| segment list       | its name, without `_segments` | `VIDEO_START`, three decimals    | MIDs or names               |
| AST's data file    | its name                      | stem of `wav`                    | MIDs or names               |
| ESC-50, ESC-10     | `fold1` … `fold5`             | file stem                        | the category                |
| Speech Commands V2 | `train`, `validation`, `test` | `WORD/STEM`                      | the word                    |
| FSD50K             | `train`, `val`, `eval`        | `fname`                          | MIDs                        |
| manifest           | column `split`, else `train`  | column, else stem (and `_START`) | MIDs, names or indices      |
| archives' manifest | see `sources.archive_manifest`                                   | the same                    |

If several clips of a split have the same stem, folders are added to their names until they differ
(`sources.clip_names`). `sources.label_text` defines how a text is read as labels.

A *list* is refused as a whole, by a `DataError`, if it cannot be read, has another format, has no row, has no row with
a known label, or if more than half of its rows (and at least five) would be refused for one of the reasons below other
than `missing_file`. A *row* is refused separately and never changed, except that a repeated label counts once:

| reason          | what is refused                                                                                 |
|-----------------|-------------------------------------------------------------------------------------------------|
| `bad_id`        | a video id that is not 1 to 64 of `A-Za-z0-9_-` (on YouTube: 11); in an archive it is left out  |
| `bad_id`        | a clip_id that is empty, longer than 200, or has control characters                             |
| `bad_id`        | a path or URL that is missing, given twice or unusable, or a URI that a row may not name        |
| `bad_id`        | a row's split with other characters than `A-Za-z0-9_.-`, or with the name of a data set's file  |
| `bad_id`        | an id or split that a spreadsheet wrote (`#NAME?`, `=B2`, `1.2E+05`, `3-Feb`), or with U+FFFD   |
| `bad_time`      | not a finite number, a start below 0 or above 1e6 s, an end not after it or over 300 s later    |
| `no_label`      | a row without a label                                                                           |
| `unknown_label` | a row with any label outside the vocabulary, or whose labels are a list that cannot be read     |
| `duplicate`     | the same section of the same file, or the same clip_id, for the second time in its split        |
| `missing_file`  | a clip whose file is not in the folder; not checked here for data files and manifests           |

Relative paths in a list are relative to the list. A row may name files, objects, URLs, and files of the list's own file
system. Options of a store and other file systems of fsspec are refused, because they could reach any host.
"""

from pipeline.prepare.sources.datafile import read_datafile
from pipeline.prepare.sources.folders import read_esc, read_speechcommands
from pipeline.prepare.sources.locate import Locate
from pipeline.prepare.sources.manifest import read_manifest
from pipeline.prepare.sources.rows import ClipList
from pipeline.prepare.sources.segments import read_segments
from pipeline.prepare.sources.web_lists import OFFICIAL_LISTS

__all__ = [
    "OFFICIAL_LISTS",
    "ClipList",
    "Locate",
    "read_datafile",
    "read_esc",
    "read_manifest",
    "read_segments",
    "read_speechcommands",
]
