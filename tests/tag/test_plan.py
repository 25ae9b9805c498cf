"""Tagging to a folder: evaluation's scores, each recording once whatever is stopped, and what fails."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ast_core.batch import Batch
from ast_core.calibration import CalibrationMap, ClassCalibration, ModelCalibration, Threshold
from ast_core.checkpoints import ModelConfig, save_model
from ast_core.errors import ConfigError, DataError
from ast_core.labels import LabelVocabulary
from ast_core.step import predict
from pipeline import storage
from pipeline.dataset import PreparedDataset
from pipeline.prepare.audio.decode import decode_media
from pipeline.prepare.audio.features import clip_fbank
from pipeline.prepare.clip import Reason
from pipeline.tag import output as tags
from pipeline.tag import work
from pipeline.tag.inputs import find_inputs
from pipeline.tag.output import Summary, WriteParts
from pipeline.tag.plan import tag
from pipeline.tag.predictor import Member, read_members, thresholds_of
from pipeline.tag.work import TagSettings, Workers, settings_for, tag_here
from pipeline.train.evaluation.scoring import evaluate
from tests import fakes
from tests.ast_core import small
from tests.tag import stub

HERE = Workers(number=0)


def settings(members: Sequence[Member], **others: Any) -> TagSettings:
    lengths = {"window_s": others.pop("window_s", None), "hop_s": others.pop("hop_s", None)}
    return settings_for(members, np.full(len(members[0].config.labels), 0.5), **lengths, **others)


def run(
    inputs: Sequence[Path | str], output: Path | str, members: Sequence[Member] | None = None, **others: Any
) -> Summary:
    members = members or [stub.member()]
    retry, say = others.pop("retry_failed", False), others.pop("say", lambda _: None)
    found = find_inputs([str(one) for one in inputs])
    return tag(found, members, settings(members, **others), str(output), HERE, retry_failed=retry, say=say)


def rows(output: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of all parts, in an order that does not depend on the parts."""
    if not (output / kind).exists():
        return []
    return sorted(pq.read_table(output / kind).to_pylist(), key=lambda row: (row["recording"], row["start_s"]))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    names = LabelVocabulary.from_names([f"tone {i}" for i in range(4)])
    save_model(
        folder, small.model(seed=5, label_dim=4).state_dict(), ModelConfig(small.recipe(label_dim=4), small.NORM, names)
    )
    return str(folder)


def evaluated(data: str, member: Member) -> np.ndarray:
    clips = PreparedDataset.open(data).clips(["eval"])
    config = member.config
    scores = evaluate(
        member.model, clips, recipe=config.recipe, norm=config.norm, num_classes=4, device=torch.device("cpu")
    )
    assert scores is not None
    return scores


def test_a_prepared_split_gets_the_scores_of_evaluation_to_the_bit(tone_data: str, checkpoint: str, tmp_path: Path):
    members = read_members([checkpoint])
    expected = evaluated(tone_data, members[0])
    inputs = find_inputs([tone_data], ["eval"])
    found = dict(tag_here(inputs, members, settings(members), "cpu"))
    ids = PreparedDataset.open(tone_data).clips(["eval"]).clip_id.to_pylist()
    scores = np.concatenate([found[f"{tone_data}/eval/{clip_id}"].scores_WC for clip_id in ids])
    np.testing.assert_array_equal(scores, expected)
    tag(inputs, members, settings(members), str(tmp_path / "t"), HERE, say=lambda _: None)
    stored = {row["recording"]: row["scores"] for row in rows(tmp_path / "t", "scores")}
    np.testing.assert_array_equal(
        np.array([stored[f"{tone_data}/eval/{clip_id}"] for clip_id in ids], np.float16), expected.astype(np.float16)
    )


def test_audio_gets_the_scores_of_its_prepared_clips_to_the_bit(checkpoint: str, tmp_path: Path):
    """The clips are shorter and longer than the model's input, and decoded by the preparation's function."""
    members = read_members([checkpoint])
    (member,) = members
    paths = [
        fakes.write_media(
            tmp_path / f"{i}.flac", fakes.tone(300.0 * (i + 1), 0.2 + i / 10) + fakes.noise(0.2 + i / 10, i)
        )
        for i in range(5)
    ]
    fbanks = [clip_fbank(np.clip(decode_media(str(path), None, 0.0, None)[0], -1, 1)) for path in paths]
    batch = np.zeros((5, small.NUM_FRAMES, 128), np.float16)
    for row, fbank in zip(batch, fbanks, strict=True):
        row[: len(fbank)] = fbank[: small.NUM_FRAMES]
    made = Batch(torch.from_numpy(batch), torch.tensor([1] * 5), torch.zeros(5, 4), torch.ones(5))
    expected = predict(member.model, made, recipe=member.config.recipe, norm=member.config.norm).numpy()
    found = dict(tag_here(find_inputs([str(tmp_path)]), members, settings(members), "cpu"))
    np.testing.assert_array_equal(np.concatenate([found[str(path)].scores_WC for path in paths]), expected)


@pytest.mark.parametrize(
    "stopped_after", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_stopped_run_goes_on_and_has_each_recording_once(
    stopped_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "in"
    stub.write_recordings(folder, 5)
    run([folder], tmp_path / "whole", embeddings="window")
    monkeypatch.setattr(work, "PART_WINDOWS", 1)
    write, number = WriteParts._write, 0

    def stop(self: WriteParts, kind: str, part: str, table: Any) -> None:
        nonlocal number
        number += kind == "scores"
        if kind == "scores" and number > stopped_after:
            raise KeyboardInterrupt  # the other files of the part are written already
        write(self, kind, part, table)

    output = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(WriteParts, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            run([folder], output, embeddings="window")
    assert not (output / "tags.json").exists()
    assert len({row["recording"] for row in rows(output, "scores")}) == stopped_after
    summary = run([folder], output, embeddings="window")
    for kind in ("scores", "events", "embeddings"):
        assert rows(output, kind) == rows(tmp_path / "whole", kind)
        assert len(rows(output, kind))
    assert summary.counts()["recordings"] == 5
    assert (output / "tags.json").exists()
    assert not (output / "_work").exists()


def test_new_recordings_are_added_and_other_settings_refused(tmp_path: Path):
    folder, output = tmp_path / "in", tmp_path / "out"
    stub.write_recordings(folder, 2)
    run([folder], output)
    before = {path: path.stat().st_mtime_ns for path in (output / "scores").iterdir()}
    stub.write_recordings(folder, 3)
    assert run([folder], output).counts()["recordings"] == 3
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    with pytest.raises(DataError, match=r"was tagged with another setting of hop_s; give another --output, or"):
        run([folder], output, hop_s=0.5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(DataError, match=r"is not empty and contains no tags; give a new folder as --output$"):
        run([folder], tmp_path / "full")


def test_failures_keep_their_rows_and_are_tried_again_when_asked(tmp_path: Path):
    folder, output = tmp_path / "in", tmp_path / "out"
    (good,) = stub.write_recordings(folder, 1)
    (folder / "bad.wav").write_text("not audio")
    fakes.write_media(folder / "short.wav", fakes.noise(0.01))
    listed = tmp_path / "list.csv"
    listed.write_text(f"path,start_s\n{good},\n{folder}/bad.wav,\n{folder}/short.wav,\n{folder}/none.wav,\nx.wav,-1\n")
    summary = run([listed], output)
    failures = {Path(row["recording"]).name: row for row in summary.failures.to_pylist()}
    assert {name: row["reason"] for name, row in failures.items()} == {
        "bad.wav": Reason.NOT_AUDIO,
        "short.wav": Reason.TOO_SHORT,
        "none.wav": Reason.MISSING_FILE,
        "list.csv: line 6": Reason.BAD_TIME,
    }
    assert failures["none.wav"]["retry"]
    assert not failures["bad.wav"]["retry"]
    fakes.write_media(folder / "none.wav", fakes.noise(2.0))
    lines: list[str] = []
    assert run([listed], output, say=lines.append).counts()["recordings"] == 2
    assert "4 recordings are done by an earlier run and are not read again, 1 to do" in lines
    run([listed], output, retry_failed=True, say=lines.append)
    assert "2 recordings are done by an earlier run and are not read again, 2 to do" in lines
    fakes.write_media(folder / "bad.wav", fakes.noise(2.0))  # it has changed since it failed
    assert run([listed], output, say=lines.append).counts()["recordings"] == 3
    assert lines[-2] == "4 recordings are done by an earlier run and are not read again, 1 to do"


def test_recordings_of_other_inputs_are_counted(tmp_path: Path):
    paths, output = stub.write_recordings(tmp_path / "in", 3), tmp_path / "out"
    bad = tmp_path / "bad.wav"
    bad.write_text("not audio")
    lines: list[str] = []
    run([*paths, bad], output, say=lines.append)
    run([*paths, bad], output, say=lines.append)
    assert not [line for line in lines if "not in this input" in line]
    summary = run(paths[:1], output, say=lines.append)
    others = "2 recordings of the output are not in this input; their results stay, and count in the summary"
    assert (others in lines, summary.counts()["recordings"]) == (True, 3)


def test_a_recording_that_changed_since_is_pointed_out_and_its_part_can_be_deleted(tmp_path: Path):
    folder, output = tmp_path / "in", tmp_path / "out"
    paths = stub.write_recordings(folder, 3)
    other = fakes.write_media(tmp_path / "other.wav", fakes.noise(2.0))
    lines: list[str] = []
    run([folder], output, say=lines.append)
    run([folder], output, say=lines.append)
    assert not [line for line in lines if "copied" in line]
    shutil.copy2(other, paths[1])  # older than the tags
    run([folder], output, say=lines.append)
    parts = (output / "scores").iterdir()
    (part,) = (part for part in parts if str(paths[1]) in pq.read_table(part)["recording"].to_pylist())
    (line,) = [line for line in lines if "copied" in line]
    assert line == (
        f"1 recordings have files that were written or copied after they were tagged ({paths[1]} for one); if they are "
        f"other sounds now, delete the parts that they are in ({part} for one), and all of their recordings are tagged "
        "again, or give another --output"
    )
    part.unlink()
    run([folder], output)
    run([folder], tmp_path / "whole")
    assert rows(output, "scores") == rows(tmp_path / "whole", "scores")


def test_a_recording_that_failed_is_read_again_once_its_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also if the run was stopped behind it, or other inputs were tagged in between: it has its own time."""
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "0.wav").write_text("not audio")
    others = stub.write_recordings(tmp_path / "others", 2)
    write = WriteParts._write

    def stop(self: WriteParts, kind: str, part: str, table: Any) -> None:
        if kind == "scores" and len(table):
            raise KeyboardInterrupt
        write(self, kind, part, table)

    with monkeypatch.context() as patch:
        patch.setattr(WriteParts, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            run([folder, *others], output)
    fakes.write_media(folder / "0.wav", fakes.noise(2.0))
    run(others, output)
    summary = run([folder, *others], output)
    assert (summary.counts()["recordings"], summary.num_failed) == (3, 0)


@pytest.mark.parametrize("lost", [["embeddings"], ["events"], ["embeddings", "events"]])
def test_results_without_their_embeddings_are_made_again(tmp_path: Path, lost: list[str]):
    paths, output = stub.write_recordings(tmp_path / "in", 3), tmp_path / "out"
    run(paths, output, embeddings="window")
    before = {kind: rows(output, kind) for kind in ("scores", "events", "embeddings")}
    for kind in lost:
        next((output / kind).iterdir()).unlink()
    run(paths, output, embeddings="window")
    assert {kind: rows(output, kind) for kind in before} == before


def test_what_was_mended_is_no_longer_a_failure(tmp_path: Path):
    """A damaged part of a recording, and a row of a list."""
    path, output = fakes.write_media(tmp_path / "long.flac", fakes.noise(120.0)), tmp_path / "out"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    listed = tmp_path / "list.csv"
    listed.write_text("path,start_s,end_s\nlong.flac,,\nlong.flac,5,4\n")
    assert {row["reason"] for row in run([listed], output).failures.to_pylist()} == {"truncated", "bad_time"}
    path.write_bytes(whole)
    listed.write_text("path,start_s,end_s\nlong.flac,,\nlong.flac,4,5\n")
    for part in (output / "scores").iterdir():
        part.unlink()
    summary = run([listed], output)
    assert (summary.failures.to_pylist(), summary.counts()["recordings"]) == ([], 2)


def test_prepared_clips_whose_shards_are_newer_are_pointed_out(tmp_path: Path):
    data, output = str(tmp_path / "data"), tmp_path / "out"
    lines: list[str] = []
    fakes.write_data(data, splits=[("train", 4)])
    members = [stub.member()]
    run([data], output, members, say=lines.append)
    run([data], output, members, say=lines.append)
    assert not [line for line in lines if "copied" in line]
    shutil.rmtree(data)
    fakes.write_data(data, splits=[("train", 4)])
    run([data], output, members, say=lines.append)
    assert [
        line
        for line in lines
        if f"4 recordings have files that were written or copied after they were tagged ({data}/train/" in line
    ]


def test_parts_in_the_gaps_of_deleted_ones_overwrite_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The chunk of a prepared split has the same name in each run."""
    data, output = str(tmp_path / "data"), tmp_path / "out"
    fakes.write_data(data, splits=[("train", 6)])
    monkeypatch.setattr(work, "PART_WINDOWS", 1)
    run([data], output)
    whole, parts = rows(output, "scores"), sorted((output / "scores").iterdir())
    assert len(parts) == 6
    for number in (0, 2, 5):
        parts[number].unlink()
    run([data], output)
    assert rows(output, "scores") == whole


def test_a_damaged_middle_is_a_row_and_the_rest_is_tagged(tmp_path: Path):
    path = fakes.write_media(tmp_path / "long.flac", fakes.noise(120.0))
    data = bytearray(path.read_bytes())
    data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
    path.write_bytes(data)
    summary = run([path], tmp_path / "out")
    (row,) = summary.failures.to_pylist()
    assert (row["reason"], row["retry"]) == ("truncated", False)
    assert (row["start_s"], row["end_s"]) == pytest.approx((30, 60), abs=2)
    times = [(window["start_s"], window["end_s"]) for window in rows(tmp_path / "out", "scores")]
    assert times[-1][1] == pytest.approx(120, abs=0.1)
    assert not any(start < 58 and end > 32 for start, end in times)
    assert summary.counts()["recordings"] == 1


def test_an_ensemble_averages_and_a_calibration_changes_scores_and_thresholds(tmp_path: Path):
    (path,) = stub.write_recordings(tmp_path / "in", 1)
    inputs = find_inputs([str(path)])
    plain = stub.member()
    half = ClassCalibration(CalibrationMap("isotonic", (0.0, 1.0, 0.0, 0.5)), Threshold(0.3, 1, 1), 20, True)
    calibrated = replace(plain, calibration=ModelCalibration((half,) * 3))
    ((_, raw),) = tag_here(inputs, [plain], settings([plain]), "cpu")
    ((_, halved),) = tag_here(inputs, [calibrated], settings([calibrated]), "cpu")
    np.testing.assert_allclose(halved.scores_WC, raw.scores_WC / 2, rtol=1e-6)
    np.testing.assert_allclose(thresholds_of([calibrated], None, 0.5), [0.3] * 3)
    np.testing.assert_allclose(thresholds_of([calibrated], 0.7, 0.5), [0.7] * 3)
    np.testing.assert_allclose(thresholds_of([plain], None, 0.5), [0.5] * 3)
    reordered = replace(calibrated, columns=[2, 0, 1])
    ((_, mean),) = tag_here(inputs, [plain, reordered], settings([plain]), "cpu")
    np.testing.assert_allclose(mean.scores_WC, (raw.scores_WC + raw.scores_WC[:, [2, 0, 1]] / 2) / 2, rtol=1e-6)
    with pytest.raises(ConfigError, match=r"^--embeddings takes one checkpoint"):
        list(tag_here(inputs, [plain, reordered], settings([plain], embeddings="window"), "cpu"))


def test_the_highest_scores_and_label_files(tmp_path: Path):
    (path,) = stub.write_recordings(tmp_path / "in", 1)
    run([path], tmp_path / "all")
    run([path], tmp_path / "top", top=2, label_format="csv")
    for whole, top in zip(rows(tmp_path / "all", "scores"), rows(tmp_path / "top", "scores"), strict=True):
        order = np.argsort(-np.array(whole["scores"]), kind="stable")[:2]
        assert top["labels"] == [stub.LABELS.names[i] for i in order]
        assert top["scores"] == [whole["scores"][i] for i in order]
    (file,) = (tmp_path / "top" / "labels").iterdir()
    assert file.name == f"{tags.file_name(str(path))}.csv"
    lines = file.read_text().splitlines()
    assert lines[0] == "start_s,end_s,label,score"
    assert len(lines) == 1 + len(rows(tmp_path / "top", "events")) > 1
    page = (tmp_path / "top" / "report.html").read_text()
    assert "data:audio/flac;base64," in page
    assert path.name in page
    info = storage.read_checked_json(tags.tags_json(str(tmp_path / "top")))
    assert info["counts"]["events"] == len(lines) - 1
    assert info["settings"]["thresholds"] == [0.5] * 3


def test_a_model_with_scores_that_are_no_numbers_is_refused(tmp_path: Path):
    class Diverged(stub.BandTagger):
        def forward(self, fbank_BTM: torch.Tensor, patchout: Any = None) -> torch.Tensor:
            return super().forward(fbank_BTM) * torch.nan

    broken = replace(stub.member(), model=Diverged().eval())
    with pytest.raises(DataError, match=r"^stub gives scores that are not numbers: its weights are damaged$"):
        run([fakes.write_media(tmp_path / "a.wav", fakes.noise(2.0))], tmp_path / "out", [broken])


@pytest.mark.parametrize("top", [None, 2])
def test_a_part_that_failed_has_the_schema_of_the_others(tmp_path: Path, top: int | None):
    members = [stub.member()]
    write = WriteParts(str(tmp_path), members[0].config.labels, top)
    write.fail("chunk", 0, ["a.wav"], "the worker died", 5)
    write.fail("chunk", 1, ["a.wav"], "the worker died again", 7)
    run([fakes.write_media(tmp_path / "in.wav", fakes.noise(2.0))], tmp_path / "out", members, top=top)
    (of_failed, _), (of_others,) = ((tmp_path / "scores").iterdir(), (tmp_path / "out" / "scores").iterdir())
    assert pq.read_schema(of_failed).remove_metadata().equals(pq.read_schema(of_others).remove_metadata())
    (failure,) = tags.read_done(str(tmp_path)).failed.to_pylist()
    assert failure["message"] == "the worker died again"
