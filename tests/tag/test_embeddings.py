"""Embeddings that tagging stores: those of `forward_features` for every model, of windows or clips, as float16."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ast_core.batch import normalise
from ast_core.features import KALDI128
from ast_core.models import MODELS
from pipeline.dataset import PreparedDataset
from pipeline.embeddings.stored import StoredEmbeddings
from pipeline.tag.inputs import find_inputs
from pipeline.tag.plan import tag
from pipeline.tag.predictor import Member
from pipeline.tag.windows import fbank_windows, padded
from pipeline.tag.work import TagSettings, Workers, settings_for
from pipeline.train.data.fbank_reader import FbankReader
from tests import fakes
from tests.ast_core.models import test_every_model as small_models

NUM_CLASSES = len(small_models.LABELS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """Two clips of 2 s, each with three windows of a model of 96 frames."""
    folder = tmp_path_factory.mktemp("long") / "data"
    settings = replace(KALDI128, num_mel_bins=small_models.NUM_MEL_BINS)
    fakes.write_data(str(folder), splits=[("eval", 2)], waveform=fakes.noise(2.0), settings=settings)
    return PreparedDataset.open(str(folder))


def member_of(name: str) -> Member:
    config = small_models.config(name)
    return Member(name, small_models.model_of(name), config, list(range(NUM_CLASSES)), None, name)


def expected(data: PreparedDataset, member: Member, settings: TagSettings) -> np.ndarray:
    """The embeddings of a clip's windows, `[3, D]`."""
    with FbankReader(data.clips(["eval"])) as reader:
        windows = fbank_windows(reader[0], settings.windows)
    fbank = torch.from_numpy(padded(windows, member.config.recipe.input_tdim)).float()
    norm = member.config.norm
    with torch.inference_mode():
        return member.model.forward_features(normalise(fbank, norm.mean, norm.std, norm.divisor)).float().numpy()


@pytest.mark.parametrize("name", MODELS)
def test_every_model_stores_the_embeddings_of_its_windows_and_clips(name: str, data: PreparedDataset, tmp_path: Path):
    member = member_of(name)
    for of in ("window", "clip"):
        settings = settings_for([member], np.full(NUM_CLASSES, 0.5), window_s=None, hop_s=None, embeddings=of)
        tag(find_inputs([data.uri]), [member], settings, str(tmp_path / of), Workers(number=0), say=lambda _: None)
    vectors_WD = expected(data, member, settings)
    of_windows, of_clips = (StoredEmbeddings.open(str(tmp_path / of)) for of in ("window", "clip"))
    assert pq.read_schema(of_windows.files[0]).field("embedding").type.value_type == pa.float16()
    (part,) = of_windows.parts()
    names = [f"{data.uri}/eval/eval_00{i}" for i in range(2)]
    assert part.rows["recording"].to_pylist() == [name for name in names for _ in range(3)]
    assert part.rows["start_s"].to_pylist() == pytest.approx([0, 0.96, 1.02] * 2)
    close = {"rtol": 2e-3, "atol": 2e-3 * np.abs(vectors_WD).max()}
    np.testing.assert_allclose(part.vectors_WD, np.tile(vectors_WD, (2, 1)), **close)
    (part,) = of_clips.parts()
    assert part.rows["recording"].to_pylist() == names
    assert (part.rows["start_s"][0].as_py(), part.rows["end_s"][0].as_py()) == pytest.approx((0, 1.98))
    np.testing.assert_allclose(part.vectors_WD, np.tile(vectors_WD.mean(axis=0), (2, 1)), **close)
