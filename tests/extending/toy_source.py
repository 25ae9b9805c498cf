"""A toy source, as docs/extending.md describes: a text file with a path and a label in each line."""

import unicodedata

from ast_core.labels import LabelVocabulary
from pipeline import storage
from pipeline.prepare.clip import ClipError
from pipeline.prepare.sources.checks import checked_split, folder_of, media_in, name_of
from pipeline.prepare.sources.locate import stem
from pipeline.prepare.sources.registry import Request, Source
from pipeline.prepare.sources.rows import ClipList, Rows


def read_lines(request: Request) -> ClipList:
    split = checked_split(request.split or name_of(request.value))
    lines = [line.rpartition(" ") for line in storage.read_text(request.value).splitlines()]
    rows = Rows(request.vocabulary or LabelVocabulary.from_names(sorted({label for _, _, label in lines})))
    for number, (path, _, label) in enumerate(lines, start=1):
        try:
            media = media_in(folder_of(request.value), path, "the path")
            name = unicodedata.normalize("NFC", stem(media))
            rows.keep_named(name, split, None, media, None, 0.0, 0.0, None, rows.indices([label]))
        except ClipError as err:
            rows.refuse(path or f"line {number}", split, err, [label], f"line {number}")
    return rows.done(request.value)


LINES = Source(option="--lines", metavar="FILE", help="a path and a label in each line", read=read_lines)
