"""A data set with enhanced labels: it trains from the shards of the first one, and no job prepares or examines it."""

import json
from pathlib import Path

import numpy as np
import pytest

from ast_core.errors import ConfigError, DataError
from jobs import doctor, enhance_labels, train
from pipeline.dataset import PreparedDataset
from pipeline.prepare.output.publish import check_output
from pipeline.relabel import target_of
from pipeline.train.evaluation.score_table import write_score_table
from pipeline.weights import sample_weights
from tests import fakes

ONTOLOGY = [
    {"id": f"tone {i}", "child_ids": [f"tone {i + 1}"], "restrictions": []} for i in range(4)
]  # a chain of four classes


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    """The job's arguments. The teacher scores class 1 with 0.8 for clips of class 0, and with 0.5 for its own clips."""
    data = str(tmp_path / "data")
    fakes.write_data(data, splits=[("train", 24), ("eval", 8)])
    opened = PreparedDataset.open(data)
    index = opened.index("train")
    target = target_of(index["labels"].combine_chunks(), 4)
    scores = np.where(target, 0.5, 0.1)
    scores[target[:, 0], 1] = 0.8
    write_score_table(str(tmp_path / "scores.csv"), index["clip_id"][::-1], opened.labels, scores[::-1])
    (tmp_path / "ontology.json").write_text(json.dumps(ONTOLOGY))
    files = ["--scores", str(tmp_path / "scores.csv"), "--ontology", str(tmp_path / "ontology.json")]
    return ["--data", data, "--split", "train", *files, "--output", str(tmp_path / "enhanced")]


def test_a_related_class_that_the_teacher_hears_is_in_the_new_index(argv: list[str], tmp_path: Path):
    assert enhance_labels.main(argv) == 0
    before, after = PreparedDataset.open(argv[1]), PreparedDataset.open(str(tmp_path / "enhanced"))
    old, new = (data.clips(["train"]) for data in (before, after))
    assert [[0, 1] if labels == [0] else labels for labels in old.labels.to_pylist()] == new.labels.to_pylist()
    assert (new.shards, new.clip_id, list(new.row)) == (old.shards, old.clip_id, list(old.row))
    np.testing.assert_array_equal(after.index("train")["sample_weight"], sample_weights(new.labels, 4))
    assert after.index("eval") == before.index("eval")
    num_added = old.labels.to_pylist().count([0])
    entry = after.info["splits"]["train"]
    assert entry["labels"] == {"enhanced_above": "mean", "added": num_added}
    assert num_added > 0
    assert entry["fingerprint"] != before.info["splits"]["train"]["fingerprint"]


def test_the_new_data_set_trains_and_only_its_first_one_is_examined_or_prepared(argv: list[str], tmp_path: Path):
    assert enhance_labels.main(argv) == 0
    new = str(tmp_path / "enhanced")
    keys = fakes.SMALL_RECIPE | {"norm_stats": "data", "epochs": "1"}
    recipe = ["--recipe", "small", *(word for key, value in keys.items() for word in (f"--{key}", value))]
    of_run = ["--train-splits", "train", "--eval-splits", "eval", "--wa_start", "1", "--wa_end", "1"]
    assert train.main([*recipe, *of_run, "--data", new, "--output", str(tmp_path / "run"), "--num-workers", "0"]) == 0
    with pytest.raises(DataError, match=r"has no clips of its own, it has other labels for .*data; examine that"):
        doctor.main(["--data", new])
    opened = PreparedDataset.open(new)
    with pytest.raises(DataError, match=r"has other labels for the clips of .*data; give another --output"):
        check_output(new, opened.labels)


def test_what_does_not_fit_is_refused(argv: list[str], tmp_path: Path):
    with pytest.raises(ConfigError, match="--threshold is 101; use mean, or a percentile from 0 to 100"):
        enhance_labels.main([*argv, "--threshold", "101"])
    with pytest.raises(DataError, match=r"scores.csv has no scores of 8 clips \(eval_0.. first\); score this split"):
        enhance_labels.main([*argv, "--split", "eval"])
    (tmp_path / "enhanced").mkdir()
    (tmp_path / "enhanced" / "file").touch()
    with pytest.raises(DataError, match="is not empty; give a new folder as --output"):
        enhance_labels.main(argv)
