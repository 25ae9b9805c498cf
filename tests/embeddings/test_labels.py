"""Labels of recordings have the names that tagging gives them."""

from pathlib import Path

import pytest

from ast_core.errors import DataError
from pipeline.dataset import PreparedDataset
from pipeline.embeddings.labels import Labels
from pipeline.tag.inputs import find_inputs
from pipeline.tag.pieces import clip_names
from tests import fakes


def test_clips_of_a_data_set_have_their_names_in_tags(tone_data: str):
    labels = Labels.open(tone_data)
    found = labels.of(["eval", "train"])
    data = PreparedDataset.open(tone_data)
    clips = data.clips(["eval", "train"])
    assert found.recordings.to_pylist() == clip_names(data, ["eval", "train"], clips)
    assert [row.nonzero()[0].tolist() for row in found.targets_NC] == clips.labels.to_pylist()
    assert labels.splits == ["train", "eval"]
    with pytest.raises(DataError, match=r"has no split 'test'; it has train, eval$"):
        labels.of(["test"])


def test_recordings_and_sections_of_a_manifest_have_their_names_in_tags(tmp_path: Path):
    for name in ("a", "b"):
        fakes.write_media(tmp_path / f"{name}.wav", fakes.noise(0.1))
    listed = tmp_path / "list.csv"
    listed.write_text(
        "path,labels,split,start_s,end_s\na.wav,dog;rain,train,,\nb.wav,rain,test,1.5,2\nb.wav,dog,test,3,\n"
    )
    labels = Labels.open(str(listed))
    names = find_inputs([str(listed)]).recordings["recording"].to_pylist()
    assert labels.of(["train", "test"]).recordings.to_pylist() == names
    assert labels.vocabulary.names == ("dog", "rain")
    assert labels.of(["train"]).targets_NC.tolist() == [[1, 1]]
