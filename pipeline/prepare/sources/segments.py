"""AudioSet's segment lists: lines of `YTID, start, end, "mid,mid"`."""

from collections.abc import Iterator

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary, audioset_labels
from pipeline.prepare.clip import ClipError, Reason
from pipeline.prepare.sources.checks import VIDEO_ID, check_times, checked_split, name_of, seconds, show
from pipeline.prepare.sources.label_text import cells_of
from pipeline.prepare.sources.locate import AudioFolder, Locate
from pipeline.prepare.sources.rows import ClipList, Rows
from pipeline.prepare.sources.web_lists import OFFICIAL_LISTS, read_list


def read_segments(
    uri: str, *, locate: Locate, vocabulary: LabelVocabulary | None = None, split: str | None = None
) -> ClipList:
    """Read an AudioSet segment list: an official name, a URL, or a file of lines `YTID, start, end, "mid,mid"`.

    A line that begins with `#` is a comment if it does not have four fields, or if it begins with `# ` before the first
    row. Others are rows, because spreadsheets write `#NAME?` for ids that begin with a dash.
    """
    split = checked_split(split or (uri if uri in OFFICIAL_LISTS else name_of(uri).removesuffix("_segments")))
    rows, notes = Rows(vocabulary or audioset_labels()), list[str]()
    known = rows.vocabulary.index_of
    num_of_four_fields, missing = 0, set[str]()
    for number, fields in _rows_of(read_list(uri, notes)):
        num_of_four_fields += len(fields) == 4
        video_id, start, end, labels_text = (*fields, "", "", "")[:4]
        cells: list[str] = []
        section: tuple[float | None, float | None] = (None, None)
        name = video_id or f"line {number}"
        try:
            cells = cells_of(labels_text.strip('",; '), known)
            if not VIDEO_ID.fullmatch(video_id):
                raise ClipError(Reason.BAD_ID, f"{show(video_id)} is not a video id")
            start_s, end_s = seconds(start, "start"), seconds(end, "end")
            check_times(start_s, end_s)
            name = f"{video_id}_{start_s:.3f}"
            labels = rows.indices(cells)
            rows.reserve(name, split)
            if (found := locate(video_id, start_s, end_s)) is None:
                missing.add(video_id)
                section = (start_s, end_s)  # an earlier run may have prepared it from another folder
                raise ClipError(Reason.MISSING_FILE, f"no file for {video_id} from {start_s:g} s to {end_s:g} s")
            rows.keep(name, split, video_id, *found, start_s, end_s, labels)
        except ClipError as err:
            rows.refuse(name, split, err, cells, f"line {number}", section)
    if not num_of_four_fields:
        raise DataError(f'{uri} has no line of the form `YTID, start, end, "mid,mid"`; give an AudioSet segment list')
    if isinstance(locate, AudioFolder):
        notes += locate.notes
    if missing and isinstance(locate, AudioFolder) and (other := locate.under_other_names(missing)):
        notes.append(other)
    return rows.done(uri, notes)


def _rows_of(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield line numbers and fields. Each line is a row: the csv module would join lines after an unclosed quote.

    A CR ends a line only if the text has no LF.
    """
    ends = "\n" if "\n" in text else "\r"
    any_row = False
    begin = number = 0
    while begin < len(text):
        end = text.find(ends, begin)
        end = len(text) if end < 0 else end
        line, begin, number = text[begin:end], end + 1, number + 1
        if not line or line.isspace():
            continue
        fields = [field.strip() for field in line.split(",", 3)]
        is_comment = line[0] == "#" and (len(fields) < 4 or (line[:2] == "# " and not any_row))
        if is_comment or (not any_row and _is_header(fields)):
            continue
        any_row = True
        fields[:3] = [field.strip('"') for field in fields[:3]]
        yield number, fields


def _is_header(fields: list[str]) -> bool:
    """Whether a row has column names without a `#`, as in some copies of the lists."""
    return len(fields) == 4 and "start" in fields[1].lower() and "end" in fields[2].lower()
