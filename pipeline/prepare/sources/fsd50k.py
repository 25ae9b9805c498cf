"""FSD50K as published: clips of Freesound with classes of AudioSet's ontology.

    FSD50K.ground_truth/vocabulary.csv   `index,name,mid`, without a header
    FSD50K.ground_truth/dev.csv          fname,labels,mids,split   (train or val)
    FSD50K.ground_truth/eval.csv         fname,labels,mids
    FSD50K.dev_audio/FNAME.wav   FSD50K.eval_audio/FNAME.wav

`labels` and `mids` name the same classes, separated by commas. The MIDs are read, because a name may have a comma.
"""

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from ast_core.text_files import read_table
from pipeline.prepare.clip import ClipError, Reason
from pipeline.prepare.sources.checks import show
from pipeline.prepare.sources.folders import Tree
from pipeline.prepare.sources.label_text import cells_of
from pipeline.prepare.sources.rows import ClipList, Rows
from pipeline.prepare.sources.web_lists import read_list

SPLITS = {"dev": ("train", "val"), "eval": ("eval",)}
"""The splits of the clips in each of the two lists."""


def read_fsd50k(folder: str) -> ClipList:
    """Read the folder of FSD50K as unpacked. Its splits are `train`, `val` and `eval`."""
    tree = Tree(folder)
    lists = {part: f"FSD50K.ground_truth/{part}.csv" for part in ("vocabulary", *SPLITS)}
    if missing := next((file for file in lists.values() if file not in tree), None):
        raise DataError(f"{folder} has no {missing}; give the folder of FSD50K as unpacked")
    vocabulary = tree.uri(lists["vocabulary"])
    # The file has no header, so one is put above it.
    text = f"index,display_name,mid\n{read_list(vocabulary, [])}"
    rows = Rows(LabelVocabulary.from_csv(text, origin=f"{vocabulary} (the header in line 1 is added)"))
    notes = [note for part in SPLITS if (note := _read_part(rows, tree, part, tree.uri(lists[part])))]
    return rows.done(folder, notes)


def _read_part(rows: Rows, tree: Tree, part: str, uri: str) -> str:
    """Add the rows of one list. Return a line for the user if there is no audio at all for it."""
    audio, num_found = f"FSD50K.{part}_audio", 0
    needed = ("fname", "labels", "mids", *(["split"] if part == "dev" else []))
    for line, row in read_table(
        read_list(uri, []),
        origin=uri,
        columns=("fname", "labels", "mids", "split"),
        is_header=lambda names: names.issuperset(needed),
        needs=f"the columns {', '.join(needed)}",
    ):
        name, file = row["fname"], f"{audio}/{row['fname']}.wav"
        split = row["split"] if part == "dev" else part
        cells: list[str] = []
        num_found += file in tree
        try:
            cells = cells_of(row["mids"], rows.vocabulary.index_of, ",")
            if split not in SPLITS[part]:
                raise ClipError(Reason.BAD_ID, f"the split is {show(split)}, not {' or '.join(SPLITS[part])}")
            labels = rows.indices(cells)
            _check_names(row["labels"], [rows.vocabulary.names[label] for label in labels])
            rows.reserve(name, split)
            if file not in tree:
                raise ClipError(Reason.MISSING_FILE, f"it is listed, but there is no file {show(file)}")
            rows.keep(name, split, None, tree.uri(file), None, 0.0, 0.0, None, labels)
        except ClipError as err:
            known_split = split if split in SPLITS[part] else "unassigned"
            rows.refuse(name or f"line {line}", known_split, err, cells, f"{part}.csv, line {line}")
    return "" if num_found else f"{tree.root}/{audio} has no file that {part}.csv names; unpack FSD50K.{part}_audio.zip"


def _check_names(text: str, names: list[str]) -> None:
    """Refuse a row whose labels and MIDs name different classes. The names are compared in pieces without commas."""
    if {part.strip() for part in text.split(",")} != {part.strip() for name in names for part in name.split(",")}:
        raise ClipError(
            Reason.UNKNOWN_LABEL, f"the labels are {show(text)}, but the mids are of {show(', '.join(names))}"
        )
