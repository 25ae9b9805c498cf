"""Sources: each reads a list of clips into one table, and the rows that cannot be prepared into another.

| source             | split                         | clip_id                          | labels                      |
|--------------------|-------------------------------|----------------------------------|-----------------------------|
| segment list       | its name, without `_segments` | `VIDEO_START`, three decimals    | MIDs or names               |
| AST's data file    | its name                      | stem of `wav`                    | MIDs or names               |
| ESC-50, ESC-10     | `fold1` … `fold5`             | file stem                        | the category                |
| Speech Commands V2 | `train`, `validation`, `test` | `WORD/STEM`                      | the word                    |
| manifest           | column `split`, else `train`  | column, else stem (and `_START`) | MIDs, names or indices      |
| archives' manifest | see `sources.archive_manifest`                                   | the same                    |

Where several clips of a split have the same stem, each takes as many of its folders as tell them apart:
`sources.clip_names`. How a text is read as labels: `sources.label_text`.

A *list* is refused whole, by a `DataError`, if it cannot be read, is not of its format, has no row, none of its rows
has a known label, or more than half of its rows (and five at least) would be refused for one of the reasons below but
`missing_file`. A *row* is refused alone and never quietly altered; only a label said twice in it is taken once:

| reason          | what is refused                                                                                 |
|-----------------|-------------------------------------------------------------------------------------------------|
| `bad_id`        | a video id that is not 1 to 64 of `A-Za-z0-9_-` (on YouTube: 11)                                |
| `bad_id`        | a clip_id that is empty, longer than 200 or holds control characters                            |
| `bad_id`        | a path or URL that is missing, doubled or unusable, or is a URI that a row may not name         |
| `bad_id`        | a row's split of other than `A-Za-z0-9_.-`, or that is called as a file of a data set is        |
| `bad_id`        | an id or split that a spreadsheet wrote over (`#NAME?`, `1.2E+05`, `3-Feb`), or with U+FFFD     |
| `bad_time`      | no finite number, a start below 0 or above 1e6 s, an end not after it or more than 300 s later  |
| `no_label`      | a row without a label                                                                           |
| `unknown_label` | a row with any label that the vocabulary lacks, or whose labels are a list that cannot be read  |
| `duplicate`     | the same section of the same file, or a clip_id, for the second time in its split               |
| `missing_file`  | a clip whose file is not in the folder; data files and manifests are not checked for this here  |

Relative paths in a list are relative to the list. A row may name files, objects, URLs and what the list's own file
system has; neither options of a store nor other file systems of fsspec, which reach for any host.
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
