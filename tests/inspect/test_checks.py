"""The doctor has no findings for data like the paper's, and each fault is found by its own check."""

import json
import math
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ast_core.errors import DataError
from ast_core.features import KALDI128
from ast_core.labels import LabelVocabulary, audioset_labels
from ast_core.published_inputs import AUDIOSET, ESC50, PublishedInput
from pipeline import dataset, storage
from pipeline.dataset import PreparedDataset
from pipeline.inspect import checks, dataset_summary, findings
from pipeline.inspect.checks import norm
from pipeline.inspect.explanations import published_for
from pipeline.inspect.findings import Finding
from pipeline.prepare import sources
from pipeline.prepare.clip import Reason
from pipeline.prepare.sources import read_segments
from pipeline.prepare.sources.locate import Place
from tests import fakes
from tests.damage import record_again
from tests.reference import SHARED

CLASSES = 20
"""Number of AudioSet's classes in each list. Every fourth clip has a second label."""
CLIPS = 800


def write_list(path: Path, split: str) -> str:
    """Write a list of CLIPS sections of ten seconds, CLIPS / CLASSES for each class."""
    mids = audioset_labels().mids
    lines = []
    for i in range(CLIPS):
        labels = [mids[i % CLASSES]] + ([mids[CLASSES + i % 2]] if i % 4 == 0 else [])
        lines.append(f'{split[:4]}{i:07d}, {i % 50}.000, {i % 50 + 10}.000, "{",".join(labels)}"')
    path.write_text("\n".join(lines))
    return str(path)


@dataclass
class Patient:
    """A data set before it is written: rows of SCANNED by split, which a test changes."""

    folder: Path
    labels: LabelVocabulary
    official: dict[str, str]
    splits: dict[str, pa.Table]
    failures: dict[str, Sequence[Reason]] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        return str(self.folder / "data")

    def keep(self, split: str, keep: Callable[[int], bool]) -> None:
        rows = self.splits[split]
        self.splits[split] = rows.filter(pa.array([keep(i) for i in range(len(rows))]))

    def change(self, split: str, column: str, change: Callable[[int, Any], Any]) -> None:
        rows = self.splits[split]
        values = [change(i, value) for i, value in enumerate(rows[column].to_pylist())]
        at = rows.schema.get_field_index(column)
        self.splits[split] = rows.set_column(at, rows.schema.field(at), pa.array(values, rows.schema.field(at).type))

    def norm(self, split: str, mean: float, std: float) -> None:
        frames = self.splits[split]["num_frames"].to_pylist()
        self.change(split, "fbank_sum", lambda i, _: 128 * frames[i] * mean)
        self.change(split, "fbank_sum_sq", lambda i, _: 128 * frames[i] * (mean**2 + std**2))

    def write(self) -> PreparedDataset:
        fakes.write_stored(self.uri, self.labels, self.splits, self.failures)
        return PreparedDataset.open(self.uri)

    def examined(self) -> list[Finding]:
        data = PreparedDataset.open(self.uri) if storage.exists(dataset.dataset_json(self.uri)) else self.write()
        return checks.examine(data, self.official)


@pytest.fixture
def patient(tmp_path: Path) -> Patient:
    """A data set like the paper's: one clip in 25 is missing, evenly over the classes."""
    official, splits = {}, {}
    for split in ("balanced_train", "eval"):
        official[split] = write_list(tmp_path / f"{split}_segments.csv", split)
        listed = read_segments(official[split], locate=lambda *_: Place("", None, 0.0), split=split).clips
        splits[split] = fakes.stored_clips(listed)
    made = Patient(tmp_path, audioset_labels(), official, splits)
    for split in splits:
        made.keep(split, lambda i: (i // CLASSES + i) % 25 != 0)
    return made


def of(found: Sequence[Finding], check: str, split: str = "balanced_train") -> Finding:
    (only,) = [finding for finding in found if (finding.check, finding.split) == (check, split)]
    return only


def severities(found: Sequence[Finding]) -> dict[tuple[str, str], str]:
    """Severities of the findings that are not ok, without the note on the balanced set's official labels."""
    all_found = {(finding.check, finding.split): finding.severity for finding in found if finding.severity != "ok"}
    return {key: severity for key, severity in all_found.items() if key != ("labels", "balanced_train")}


def test_data_like_the_papers_have_no_findings(patient: Patient):
    found = patient.examined()
    assert severities(found) == {}
    names = {finding.check for finding in found}
    # Vocabulary, features and leakage concern the whole data set, and near-duplicates need embeddings.
    assert len(found) == 2 * (len(checks.CHECKS) - 4) + 3
    assert names == {check.__name__.removeprefix("check_") for check in checks.CHECKS} - {"near_duplicates"}
    assert of(found, "clips").what.startswith("768 of 800 listed clips, 4 % missing; most of ")
    assert of(found, "labels").severity == "note"
    assert "0.347" in of(found, "labels").cost


# --- clips, labels and label shares


@pytest.mark.parametrize(("one_in", "severity"), [(20, "note"), (7, "warning"), (2, "serious")])
def test_severity_grows_with_the_share_of_missing_clips(patient: Patient, one_in: int, severity: str):
    rng = np.random.default_rng(0)
    lost = set(rng.permutation(768)[: 768 // one_in].tolist())
    patient.keep("eval", lambda i: i not in lost)
    finding = of(patient.examined(), "clips", "eval")
    assert finding.severity == severity
    assert finding.what.startswith(f"{768 - 768 // one_in} of 800 listed clips")
    assert ("audioset/ontology#8" in finding.cost) == (severity != "serious")


def test_table_by_class_counts_listed_and_present_clips(patient: Patient):
    rows = of(patient.examined(), "clips").figures["per_class"]
    listed = [CLIPS // CLASSES] * CLASSES + [CLIPS // 4, 0]
    assert {row["index"]: row["listed"] for row in rows} == {c: n for c, n in enumerate(listed) if n}
    labels = patient.splits["balanced_train"]["labels"].combine_chunks().flatten()
    present = np.bincount(labels.to_numpy(), minlength=22)
    assert [row["present"] for row in rows] == [n for n in present if n]
    assert rows[3]["missing_share"] == pytest.approx(1 - rows[3]["present"] / 40)
    assert rows[3]["name"] == audioset_labels().names[3]


def test_a_class_that_lost_most_clips_is_named_when_few_are_missing_overall(patient: Patient):
    patient.keep("balanced_train", lambda i: patient.splits["balanced_train"]["labels"][i].as_py() != [7] or i % 3 == 0)
    finding = of(patient.examined(), "clips")
    assert finding.figures["missing_share"] < 0.10
    assert finding.figures["classes_hit"] == [audioset_labels().names[7]]
    assert finding.severity == "warning"
    assert f"most of {audioset_labels().names[7]}" in finding.what
    assert "YuanGongND/whisper-at#13" in finding.cost


def test_a_class_without_clips_is_named_even_if_it_had_few(patient: Patient):
    mids = audioset_labels().mids
    with open(patient.official["balanced_train"], "a", encoding="utf-8") as file:
        file.write(f'\nrareclip___, 0.000, 10.000, "{mids[300]}"')
    assert of(patient.examined(), "clips").figures["classes_hit"] == [audioset_labels().names[300]]


def test_clips_not_in_the_list_are_counted(patient: Patient):
    patient.change("balanced_train", "clip_id", lambda i, clip_id: f"own_{i}" if i < 20 else clip_id)
    finding = of(patient.examined(), "clips")
    assert (finding.figures["not_in_list"], finding.severity) == (20, "warning")
    assert finding.figures["present"] == 748


@pytest.mark.parametrize("form", ["Y{video}", "{video}", "Y{video}_{start}", "{video}_{start}.000_{end}.000"])
def test_clips_are_found_under_the_names_used_in_copies(patient: Patient, form: str):
    def renamed(i: int, clip_id: str) -> str:
        video, start = clip_id[:11], int(float(clip_id[12:]))
        return form.format(video=video, start=start, end=start + 10)

    patient.change("balanced_train", "clip_id", renamed)
    patient.change("balanced_train", "video_id", lambda i, _: None)
    found = patient.examined()
    assert severities(found) == {}
    assert of(found, "clips").figures["present"] == 768


def test_a_clip_with_two_names_counts_once(patient: Patient):
    one = patient.splits["balanced_train"]["clip_id"][0].as_py()
    patient.change("balanced_train", "clip_id", lambda i, clip_id: f"Y{one}" if i == 1 else clip_id)
    assert of(patient.examined(), "clips").figures["present"] == 767


def test_another_section_of_a_listed_video_is_not_the_listed_clip(patient: Patient):
    patient.change("balanced_train", "clip_id", lambda i, clip_id: "bala0000001_31.000" if i == 0 else clip_id)
    assert of(patient.examined(), "clips").figures["not_in_list"] == 1


@pytest.mark.parametrize(("num", "severity"), [(5, "warning"), (50, "serious")])
def test_labels_that_differ_from_the_list_are_counted(patient: Patient, num: int, severity: str):
    patient.change("eval", "labels", lambda i, labels: [*labels, 400] if i < num else labels)
    finding = of(patient.examined(), "labels", "eval")
    assert (finding.figures["labelled_otherwise"], finding.severity) == (num, severity)
    assert "PSLA" in finding.cost


def test_label_shares_changed_by_chance_are_ok_and_other_changes_are_named(patient: Patient):
    rng = np.random.default_rng(5)  # a seed whose draw moves the shares by more than the mean
    kept = set(rng.permutation(768)[:640].tolist())
    patient.keep("balanced_train", lambda i: i in kept)
    patient.keep("eval", lambda i: i % 3 > 0 or patient.splits["eval"]["labels"][i].as_py()[0] > 4)
    found = patient.examined()
    by_chance = of(found, "marginals")
    assert by_chance.severity == "ok"
    assert by_chance.figures["total_variation"] > max(0.02, by_chance.figures["total_variation_by_chance"])
    biased = of(found, "marginals", "eval")
    assert biased.severity == "note"
    shares = {row["index"]: row["ratio"] for row in biased.figures["per_class"]}
    assert max(shares[c] for c in range(5)) < 0.85 < 1.0 < min(shares[c] for c in range(5, CLASSES))
    assert "k2-fsa/icefall#1727" in biased.cost


# --- failures


def test_failures_are_counted_by_reason_and_by_whether_another_run_helps(patient: Patient):
    patient.failures = {"eval": [Reason.UNAVAILABLE] * 20 + [Reason.THROTTLED] * 9 + [Reason.TRUNCATED]}
    finding = of(patient.examined(), "failures", "eval")
    assert (finding.severity, finding.figures["worth_another_run"]) == ("warning", 10)
    assert finding.what.startswith("30 of 798 clips failed (20 unavailable, 9 throttled, 1 truncated)")
    assert "lower --fetches-per-hour" in finding.cost
    assert "agkphysics/AudioSet" in finding.cost
    assert "--audio-dir" not in finding.cost


def test_failures_that_another_run_tries_are_counted_whatever_their_reason(patient: Patient):
    """A clip whose task died is tried again, unlike others that failed with `crashed`."""
    patient.failures = {"eval": [Reason.CRASHED] * 20 + [Reason.DUPLICATE]}
    data = patient.write()
    failures = data.failures("eval")
    assert failures is not None
    retried = pa.array([i < 12 or i == 20 for i in range(21)])
    table = failures.set_column(failures.schema.get_field_index("retry"), failures.schema.field("retry"), retried)
    dataset.write_table(dataset.failures_file(data.uri, "eval"), table)
    record_again(data.uri)
    finding = of(patient.examined(), "failures", "eval")
    assert (finding.severity, finding.figures["worth_another_run"]) == ("warning", 12)


def test_failures_that_a_preparation_in_progress_has_written_are_no_damage(patient: Patient):
    patient.failures = {"eval": [Reason.UNAVAILABLE] * 20}
    data = patient.write()
    failures = data.failures("eval")
    assert failures is not None
    dataset.write_table(dataset.failures_file(data.uri, "eval"), failures.slice(0, 5))
    with pytest.raises(DataError, match=r"failures\.parquet is damaged"):
        patient.examined()
    storage.write_json(dataset.unpublished_file(data.uri, "eval"), {})
    assert of(patient.examined(), "failures", "eval").what.startswith("5 of ")


def test_permanent_failures_are_a_note(patient: Patient):
    patient.failures = {"eval": [Reason.UNAVAILABLE] * 20}
    assert of(patient.examined(), "failures", "eval").severity == "note"


def test_a_split_whose_clips_all_failed_is_examined(patient: Patient):
    patient.splits["eval"] = patient.splits["eval"].slice(0, 0)
    patient.failures = {"eval": [Reason.NETWORK] * 3}
    found = patient.examined()
    assert of(found, "failures", "eval").what == "3 of 3 clips failed (3 network); 3 of them worth another run"
    assert of(found, "index", "eval").severity == "ok"


# --- norm


def test_norm_of_known_copies_is_a_warning_with_their_published_map(patient: Patient):
    patient.norm("balanced_train", -3.38, 3.89)
    patient.norm("eval", -3.54, 3.42)
    found = patient.examined()
    assert severities(found) == {("norm", "balanced_train"): "warning", ("norm", "eval"): "warning"}
    assert "mean and std -3.38, 3.89" in of(found, "norm").what
    assert "0.434 mAP" in of(found, "norm").cost
    assert "YuanGongND/ast#85" in of(found, "norm").cost
    assert "raised quiet parts" in of(found, "norm").cost


@pytest.mark.parametrize(
    ("mean", "std", "cause"),
    [
        (-4.27 + 20.8, 4.57, "16-bit integers"),
        (-18.5, 19.8, "decibels"),
        (-1.85, 1.98, "base-10 logarithms"),
        (-2.13, 2.28, None),  # half the values: possible for audio, so no fault is named
        (0.02, 0.51, "normalised already, by twice the std"),
        (-0.05, 1.1, "normalised already"),
        (-15.9, 0.2, "hardly any sound"),
        (9.0, 4.5, "the scale or the format"),
    ],
)
def test_an_impossible_norm_names_its_likely_cause(patient: Patient, mean: float, std: float, cause: str | None):
    patient.norm("eval", mean, std)
    finding = of(patient.examined(), "norm", "eval")
    assert finding.severity == ("serious" if cause else "warning")
    assert (cause or "YuanGongND/ast#85") in finding.cost
    assert ("The figures point to" in finding.cost) == (cause not in (None, "the scale or the format"))


def test_a_norm_shifted_by_level_is_reported_in_decibels(patient: Patient):
    patient.norm("eval", -4.2677 - 1.5, 4.6)
    # Padding and masks raise the mean, so they can hide a quieter set, but not a louder one.
    assert of(patient.examined(), "norm", "eval").severity == "ok"
    storage.delete(patient.uri)
    patient.norm("eval", -4.2677 + 1.5, 4.6)
    finding = of(patient.examined(), "norm", "eval")
    assert finding.severity == "warning"
    assert "the level 7 dB louder" in finding.cost


def test_digital_silence_is_named_as_the_cause_of_a_norm(patient: Patient):
    """A third of each clip is silent; the rest has the published norm."""
    floor, sound, silent = KALDI128.floor, 998 - 333, 333
    mean, std = AUDIOSET.mean, AUDIOSET.std
    patient.change("eval", "num_silent_frames", lambda i, _: silent)
    patient.change("eval", "fbank_sum", lambda i, _: 128 * (sound * mean + silent * floor))
    patient.change("eval", "fbank_sum_sq", lambda i, _: 128 * (sound * (mean**2 + std**2) + silent * floor**2))
    found = patient.examined()
    finding = of(found, "norm", "eval")
    assert finding.severity == "warning"
    assert finding.figures["without_silent_frames"] == pytest.approx({"mean": mean, "std": std})
    assert "Digital silence is part of it: without it they would be -4.27, 4.57" in finding.cost
    assert finding.cost.endswith("4.57.")  # and of nothing else
    assert of(found, "silence", "eval").severity == "warning"


def test_a_handful_of_clips_is_not_judged_by_its_norm(patient: Patient):
    patient.splits["eval"] = patient.splits["eval"].slice(0, 4)
    means = [-8.0, -2.0, -1.0, -3.0]
    patient.change("eval", "fbank_sum", lambda i, _: 128 * 998 * means[i])
    patient.change("eval", "fbank_sum_sq", lambda i, _: 128 * 998 * (means[i] ** 2 + 9))
    assert of(patient.examined(), "norm", "eval").severity == "ok"


def test_figures_as_the_original_counts_are_those_of_padded_and_masked_fbanks():
    """Masks as the original draws them, into 200 clips of noise; the same noise in each bin of a frame."""
    rng = np.random.default_rng(3)
    noise = rng.normal(-5.3, 4.5, (200, 998)).astype(np.float32)
    masked = np.zeros((200, 1024, 128), np.float32)
    masked[:, :998] = noise[:, :, None]
    for size, widest, axis in ((128, 24, 1), (1024, 192, 0)):
        width = rng.random(200) * widest
        start = (rng.random(200) * (size - width)).astype(int)
        for clip, first, last in zip(masked, start, start + width.astype(int), strict=True):
            clip[(slice(None),) * axis + (slice(first, last),)] = 0.0
    clips = fakes.stored_clips(fakes.clips(*({"clip_id": str(i), "media": "", "end_s": 10.0} for i in range(200))))
    for name, power in {"fbank_sum": 1, "fbank_sum_sq": 2}.items():
        sums = pa.array(128 * (noise.astype(np.float64) ** power).sum(axis=1))
        clips = clips.set_column(clips.schema.get_field_index(name), name, sums)
    split = dataset_summary.SplitSummary("x", KALDI128, 1, {}, clips, clips, clips, None, "")
    counted = norm.norm_figures(split, AUDIOSET)["as_the_original_counts"]
    assert counted["mean"] == pytest.approx(masked.mean(dtype=np.float64), abs=0.08)
    assert counted["std"] == pytest.approx(masked.std(dtype=np.float64), abs=0.08)


def test_a_norm_that_matches_as_the_reference_counts_is_ok(patient: Patient):
    patient.norm("eval", -5.3, 4.5)
    finding = of(patient.examined(), "norm", "eval")
    assert finding.severity == "ok"
    assert "-4.26, 4.5" in finding.what


@pytest.mark.parametrize(
    ("names", "published"),
    [
        (["chirping_birds", "crackling_fire", "vacuum_cleaner", *map(str, range(47))], ESC50),
        (["cat", "dog"], None),
    ],
)
def test_other_vocabularies_have_other_norms_or_none(
    patient: Patient, names: list[str], published: PublishedInput | None
):
    patient.labels = LabelVocabulary.from_names(names)
    assert published_for(patient.labels) == published
    patient.official = {}
    patient.change("balanced_train", "labels", lambda i, _: [i % 2])
    patient.splits["fold1"] = patient.splits.pop("balanced_train")
    del patient.splits["eval"]
    found = patient.examined()
    assert of(found, "norm", "fold1").severity == ("warning" if published else "ok")
    if published:
        assert "published -6.63, 5.36 (ESC-50)" in of(found, "norm", "fold1").what
        assert of(found, "durations", "fold1").severity == "warning"  # 998 frames, the recipe takes 512
    assert not [finding for finding in found if finding.severity == "unknown"]  # there is no list to compare with


# --- silence, copies, clipping, durations, values


def test_silent_clips_and_silent_frames_are_reported(patient: Patient):
    patient.change("eval", "num_silent_frames", lambda i, _: 998 if i < 20 else 0)
    finding = of(patient.examined(), "silence", "eval")
    assert (finding.severity, finding.figures["silent_clips_share"]) == ("warning", 20 / 768)
    assert finding.what.startswith("20 clips are silent throughout")
    storage.delete(patient.uri)
    patient.change("eval", "num_silent_frames", lambda i, _: 998 // 20)
    finding = of(patient.examined(), "silence", "eval")
    assert (finding.severity, finding.figures["silent_clips_share"]) == ("note", 0.0)


@pytest.mark.parametrize(("copies", "severity"), [(1, "note"), (9, "warning")])
def test_equal_audio_under_several_ids_is_found_with_conflicting_labels(patient: Patient, copies: int, severity: str):
    labels = patient.splits["eval"]["labels"].to_pylist()
    twins = [i for i in range(100, 768) if labels[i] == [7]][:2]
    patient.change("eval", "fbank_hash", lambda i, value: -7 if i <= copies else -8 if i in twins else value)
    finding = of(patient.examined(), "duplicates", "eval")
    assert (finding.severity, finding.figures["copies"]) == (severity, copies + 1)
    assert sorted(map(len, finding.figures["groups"])) == sorted([2, copies + 1])
    assert finding.figures["groups_with_different_labels"] == 1
    assert "hkchengrex/MMAudio#50" in finding.cost


def test_silent_clips_are_not_duplicates(patient: Patient):
    for split in patient.splits:
        patient.change(split, "fbank_hash", lambda i, value: -7 if i < 5 else value)
        patient.change(split, "num_silent_frames", lambda i, _: 998 if i < 5 else 0)
    found = patient.examined()
    assert of(found, "duplicates", "eval").severity == "ok"
    assert of(found, "leakage", "").severity == "ok"


def test_one_clip_in_training_and_evaluation_is_serious(patient: Patient):
    hashes = patient.splits["balanced_train"]["fbank_hash"].to_pylist()
    patient.change("eval", "fbank_hash", lambda i, value: hashes[100] if i == 3 else value)
    found = patient.examined()
    finding = of(found, "leakage", "balanced_train + eval")
    assert found[0] == finding
    assert (finding.severity, finding.figures["by_audio"], finding.figures["by_clip_id"]) == ("serious", 1, 0)
    assert finding.figures["clips"] == {
        "balanced_train": [patient.splits["balanced_train"]["clip_id"][100].as_py()],
        "eval": [patient.splits["eval"]["clip_id"][3].as_py()],
    }


@pytest.mark.parametrize(("column", "kind"), [("clip_id", "clip_id"), ("video_id", "video")])
def test_a_clip_or_a_video_in_two_splits_is_found_by_its_id(patient: Patient, column: str, kind: str):
    theirs = patient.splits["balanced_train"][column].to_pylist()
    patient.official.clear()
    if column == "clip_id":  # which names a video in the other split
        patient.change("eval", "video_id", lambda i, value: None if i == 3 else value)
    patient.change("eval", column, lambda i, value: theirs[8] if i == 3 else value)
    finding = of(patient.examined(), "leakage", "balanced_train + eval")
    assert (finding.severity, finding.figures[f"by_{kind}"]) == ("serious", 1)


def test_an_id_of_two_videos_with_different_sound_is_a_note(patient: Patient):
    for split in patient.splits:
        patient.change(split, "clip_id", lambda i, value: "001" if i == 3 else value)
    finding = of(patient.examined(), "leakage", "balanced_train + eval")
    assert (finding.severity, finding.figures["by_clip_id"]) == ("note", 0)


def test_an_id_in_two_splits_with_different_sound_is_a_note_unless_it_names_a_video(patient: Patient):
    patient.official.clear()  # it says which ids name videos
    for split in patient.splits:
        patient.change(split, "clip_id", lambda i, value: f"{i:03d}" if i < 3 else value)
        patient.change(split, "video_id", lambda i, value: None if i < 3 else value)
    finding = of(patient.examined(), "leakage", "balanced_train + eval")
    assert (finding.severity, finding.figures["by_clip_id"]) == ("note", 0)
    assert finding.what == "3 clip ids occur in both with different sound (000, 001, …)"
    assert "If they are one recording" in finding.cost


def test_an_id_in_two_splits_with_equal_sound_is_serious_also_beside_other_ids(patient: Patient):
    sounds = patient.splits["balanced_train"]["fbank_hash"].to_pylist()
    patient.official.clear()
    for split in patient.splits:
        patient.change(split, "clip_id", lambda i, value: f"{i:03d}" if i < 3 else value)
        patient.change(split, "video_id", lambda i, value: None if i < 3 else value)
    patient.change("eval", "fbank_hash", lambda i, value: sounds[i] if i == 1 else value)
    finding = of(patient.examined(), "leakage", "balanced_train + eval")
    assert (finding.severity, finding.figures["by_clip_id"]) == ("serious", 1)
    assert finding.figures["clips"] == {"balanced_train": ["001"], "eval": ["001"]}
    assert finding.figures["ids_with_different_sound"] == ["000", "002"]
    assert finding.what.startswith("1 clips of eval are in balanced_train too (001); 1 by audio, 1 by clip_id, 0 by ")


def test_clips_shared_by_two_training_splits_are_a_note(patient: Patient):
    patient.splits["more_train"] = patient.splits["balanced_train"].slice(0, 5)
    assert of(patient.examined(), "leakage", "balanced_train + more_train").severity == "note"


@pytest.mark.parametrize(
    ("share", "severity", "source"),
    [(0.0005, "ok", ""), (0.002, "note", "YuanGongND/ast#108"), (0.2, "serious", "RicherMans/PSL#3")],
)
def test_clipping_is_serious_only_if_the_scale_is_wrong(patient: Patient, share: float, severity: str, source: str):
    patient.change("eval", "num_clipped", lambda i, _: round(998 * 160 * share))
    finding = of(patient.examined(), "clipping", "eval")
    assert (finding.severity, source in finding.cost) == (severity, True)
    assert finding.figures["samples_share"] == pytest.approx(share, rel=0.01)
    assert finding.figures["clips_share"] == 1.0


def test_clips_shorter_than_listed_are_counted(patient: Patient):
    patient.change("eval", "num_frames", lambda i, frames: 500 if i < 100 else 960)
    finding = of(patient.examined(), "durations", "eval")
    assert (finding.severity, finding.figures["short_share"]) == ("warning", 100 / 768)
    assert finding.figures["frames_5_50_95"] == [500, 960, 960]
    assert "YuanGongND/ast#60" in finding.cost


def test_clips_that_the_recipe_cuts_are_counted(patient: Patient):
    patient.change("eval", "num_frames", lambda i, frames: 1025 if i < 10 else 1024)
    finding = of(patient.examined(), "durations", "eval")
    assert (finding.severity, finding.figures["cut_share"]) == ("note", 10 / 768)
    assert "1024 frames" in finding.what


def test_a_clip_with_nan_is_named_and_left_out_of_the_norm(patient: Patient):
    patient.change("eval", "fbank_sum", lambda i, value: math.nan if i == 4 else value)
    found = patient.examined()
    assert severities(found) == {("values", "eval"): "serious"}
    assert of(found, "norm", "eval").figures["mean"] == pytest.approx(AUDIOSET.mean)
    assert of(found, "values", "eval").figures["clips"] == [patient.splits["eval"]["clip_id"][4].as_py()]


# --- index, weights, vocabulary, features


def edit_index(patient: Patient, change: Callable[[pa.Table], pa.Table], split: str = "eval") -> None:
    patient.write()
    uri = dataset.index_file(patient.uri, split)
    dataset.write_table(uri, change(dataset.read_table(uri)))
    record_again(patient.uri)


def shifted(column: str) -> Callable[[pa.Table], pa.Table]:
    """The index with one column moved down by a row."""

    def change(index: pa.Table) -> pa.Table:
        moved = pa.concat_arrays([index[column].combine_chunks()[-1:], index[column].combine_chunks()[:-1]])
        return index.set_column(index.schema.get_field_index(column), index.schema.field(column), moved)

    return change


def test_only_the_weights_check_reports_weights_of_other_clips(patient: Patient):
    edit_index(patient, shifted("sample_weight"))
    found = patient.examined()
    assert severities(found) == {("weights", "eval"): "warning"}
    assert "YuanGongND/ast#108" in of(found, "weights", "eval").cost


def test_labels_of_other_clips_in_the_index_are_serious(patient: Patient):
    edit_index(patient, shifted("labels"))
    finding = of(patient.examined(), "index", "eval")
    assert finding.severity == "serious"
    assert finding.figures["of_another_clip"] > 700
    assert finding.figures["fingerprint_differs"]


def test_rows_that_point_to_other_clips_are_serious_despite_equal_fingerprint(patient: Patient):
    edit_index(patient, shifted("row"))
    finding = of(patient.examined(), "index", "eval")
    assert (finding.severity, finding.figures["of_another_clip"]) == ("serious", 768)
    assert not finding.figures["fingerprint_differs"]


def test_rows_that_point_to_clips_with_equal_labels_are_serious(patient: Patient):
    labels = patient.splits["eval"]["labels"].to_pylist()
    one, two = [i for i in range(768) if labels[i] == [7]][:2]
    swapped = {one: two, two: one}

    def change(index: pa.Table) -> pa.Table:
        rows = pa.array([swapped.get(row, row) for row in index["row"].to_pylist()], pa.int32())
        return index.set_column(index.schema.get_field_index("row"), index.schema.field("row"), rows)

    edit_index(patient, change)
    assert of(patient.examined(), "index", "eval").figures["of_another_clip"] == 2


def test_rows_of_a_missing_shard_are_serious(patient: Patient):
    patient.write()
    (Path(patient.uri) / "eval" / "shards" / "0.parquet").rename(patient.folder / "elsewhere")
    finding = of(patient.examined(), "index", "eval")
    assert (finding.severity, finding.figures["point_nowhere"]) == ("serious", 768)


def test_a_dataset_json_of_another_preparation_is_serious(patient: Patient):
    edit_index(patient, lambda index: index.slice(10))
    finding = of(patient.examined(), "index", "eval")
    assert (finding.severity, finding.figures["clips_without_a_row"]) == ("serious", 10)
    assert finding.figures["fingerprint_differs"]


def test_stored_clips_missing_in_the_index_are_a_warning(patient: Patient):
    patient.write()
    more = fakes.stored_clips(fakes.clips({"clip_id": "new", "split": "eval", "media": "", "end_s": 10.0}))
    shard = more.append_column(
        dataset.shard_schema(KALDI128).field("fbank"), pa.array([[]], dataset.fbank_type(128))
    ).cast(dataset.shard_schema(KALDI128))
    dataset.write_table(f"{dataset.shards_dir(patient.uri, 'eval')}/more.parquet", shard)
    finding = of(patient.examined(), "index", "eval")
    assert (finding.severity, finding.figures["clips_without_a_row"]) == ("warning", 1)


def test_a_clip_in_two_shards_after_a_crash_is_ok(patient: Patient):
    patient.write()
    uri = f"{dataset.shards_dir(patient.uri, 'eval')}/more.parquet"
    dataset.write_table(
        uri, dataset.read_table(uri.replace("more", "0")).slice(5, 2).cast(dataset.shard_schema(KALDI128))
    )
    assert severities(patient.examined()) == {}


def test_audiosets_classes_in_another_order_are_serious(patient: Patient):
    audioset = audioset_labels()
    order = [1, 0, *range(2, 527)]
    patient.labels = LabelVocabulary(tuple(audioset.mids[c] for c in order), tuple(audioset.names[c] for c in order))
    for split in patient.splits:
        patient.change(split, "labels", lambda i, labels: sorted(order[c] for c in labels))
    found = patient.examined()
    assert severities(found) == {("vocabulary", ""): "serious"}  # labels are compared by MID
    assert "2 have another index" in of(found, "vocabulary", "").what


def test_a_few_missing_audioset_classes_are_a_warning(patient: Patient):
    audioset = audioset_labels()
    patient.labels = LabelVocabulary(audioset.mids[:500], audioset.names[:500])
    finding = of(patient.examined(), "vocabulary", "")
    assert (finding.severity, finding.what) == ("warning", "500 of AudioSet's 527 classes, 500 in all")


def test_a_replaced_labels_file_is_refused(patient: Patient):
    patient.write()
    storage.write_bytes(dataset.labels_csv(patient.uri), LabelVocabulary.from_names(["a"]).to_csv().encode())
    with pytest.raises(DataError, match=r"labels\.csv is damaged, or not the one that the data were prepared with"):
        patient.examined()


def test_other_features_are_noted_and_have_no_published_norm(patient: Patient):
    info = patient.write().info
    info["features"] |= {"frame_shift_ms": 20.0}
    dataset.write_info(patient.uri, info)
    findings = patient.examined()
    assert of(findings, "features", "").severity == "note"
    assert of(findings, "features", "").what == "frame_shift_ms is 20.0, not 10.0"
    assert "none published" in of(findings, "norm", "eval").what


def test_features_that_cannot_be_read_are_refused(patient: Patient):
    info = patient.write().info
    info["features"] |= {"waveform_scale": 32768.0}
    dataset.write_info(patient.uri, info)
    with pytest.raises(DataError, match=r"dataset\.json: waveform_scale is 32768\.0; only 1\.0 is supported$"):
        patient.examined()


# --- missing lists, other data, and output


def test_without_an_official_list_only_its_checks_are_unknown(patient: Patient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(
        sources.OFFICIAL_LISTS, "eval", "http://127.0.0.1:9/eval_segments.csv"
    )  # no server listens there
    monkeypatch.setenv("XDG_CACHE_HOME", str(patient.folder / "cache"))
    del patient.official["eval"]
    hashes = patient.splits["balanced_train"]["fbank_hash"].to_pylist()
    patient.change("eval", "fbank_hash", lambda i, value: hashes[0] if i == 0 else value)
    found = patient.examined()
    assert severities(found) == {
        ("leakage", "balanced_train + eval"): "serious",
        ("clips", "eval"): "unknown",
        ("labels", "eval"): "unknown",
        ("marginals", "eval"): "unknown",
    }
    assert "is not in the cache of this machine" in of(found, "clips", "eval").what
    assert "--official SPLIT=FILE" in of(found, "clips", "eval").cost


def test_official_lists_are_found_by_the_name_of_the_split(patient: Patient, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def read(uri: str, **options: Any) -> Any:
        asked.append(uri)
        raise DataError(f"cannot fetch {uri}")

    monkeypatch.setattr(dataset_summary, "read_segments", read)
    monkeypatch.setattr(dataset_summary, "cached", lambda split: None if split == "eval" else f"copy of {split}")
    patient.official = {}
    patient.splits["mine"] = patient.splits["eval"].slice(0, 9)
    found = patient.examined()
    assert asked == ["copy of balanced_train"]
    assert "give --official eval=eval to fetch it" in of(found, "clips", "eval").what
    assert "give its list with --official mine=LIST" in of(found, "clips", "mine").what


def test_c17_a_report_fetches_no_list(patient: Patient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(patient.folder / "cache"))
    patient.official = {}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/eval_segments.csv"
        monkeypatch.setitem(sources.OFFICIAL_LISTS, "eval", url)
        found = patient.examined()
        listener.settimeout(0.05)
        with pytest.raises(TimeoutError):  # nobody connected
            listener.accept()
    assert of(found, "clips", "eval").severity == "unknown"


def test_c23_positions_of_names_of_other_copies():
    listed = pa.table(
        {"video_id": ["aaaaaaaaaaa", "bbbbbbbbbbb"], "clip_id": ["aaaaaaaaaaa_0.000", "bbbbbbbbbbb_30.000"]}
    )
    named = [
        "bbbbbbbbbbb_30.000",
        "Ybbbbbbbbbbb_30",
        "bbbbbbbbbbb_31",
        "aaaaaaaaaaa",
        "stranger",
        "Yaaaaaaaaaaa_0.0_10",
    ]
    clips = pa.table({"clip_id": named})
    assert dataset_summary._positions(clips, listed).tolist() == [1, 1, -1, 0, -1, 0]


def test_a_list_for_an_unknown_split_is_refused(patient: Patient):
    with pytest.raises(DataError, match="no split 'evil'; it has balanced_train, eval"):
        checks.examine(patient.write(), {"evil": "x.csv"})


def test_prepared_data_have_no_findings(tone_data: str):
    data = PreparedDataset.open(tone_data)
    found = checks.examine(data)
    assert {finding.severity for finding in found} == {"ok"}
    figures = of(found, "norm", "train").figures
    assert (figures["mean"], figures["std"]) == pytest.approx(data.norm(["train"]))


def test_each_finding_that_is_not_ok_has_a_cost(patient: Patient):
    rng = np.random.default_rng(0)
    for split in patient.splits:
        patient.keep(split, lambda i: bool(rng.random() < 0.3))
        patient.norm(split, 16.0, 4.5)
        ill = {"num_clipped": 90_000, "num_silent_frames": 500, "fbank_hash": 1, "num_frames": 1100}
        for column, value in ill.items():
            patient.change(split, column, lambda i, _, value=value: value)
        patient.change(split, "labels", lambda i, labels: [30 + i % 2])
    patient.failures = {"eval": [Reason.SETUP]}
    found = patient.examined()
    assert sum(finding.severity == "serious" for finding in found) >= 8
    for finding in found:
        assert bool(finding.cost) == (finding.severity != "ok"), finding
        assert "\n" not in finding.what + finding.cost
    shown = findings.table(found, width=90)
    assert max(map(len, shown.splitlines())) <= 90
    assert "NaN" not in shown


def test_silent_frames_matter_only_for_audioset(patient: Patient):
    """ESC-50 pads short sounds with zeros, and its published norm includes them."""
    patient.labels = LabelVocabulary.from_names(["cat", "dog"])
    patient.official = {}
    for split in patient.splits:
        patient.change(split, "labels", lambda i, _: [i % 2])
        patient.change(split, "num_silent_frames", lambda i, _: 200)
    assert of(patient.examined(), "silence", "eval").severity == "ok"


def test_table_lists_the_worst_first_and_each_cost_once(patient: Patient):
    found = [
        Finding("a", "x", "ok", "fine"),
        Finding("b", "x", "unknown", "not compared", "No list."),
        Finding("c", "x", "unknown", "not compared", "No list."),
        Finding("d", "y", "serious", "broken " * 30, "All is lost."),
        *(Finding("e", split, "ok", "fine") for split in ("x", "1", "2", "3")),
    ]
    lines = findings.table(sorted(found, key=lambda f: findings.WORST_FIRST.index(f.severity)), width=80).splitlines()
    assert [line.split()[0] for line in lines if line[:1].strip()] == [
        "severity", "serious", "unknown", "ok", "ok", "serious:", "unknown:", "8"
    ]  # fmt: skip
    assert lines[-1] == "8 findings: 1 serious, 2 unknown, 5 ok"
    assert "ok        e      x and 3 others  fine" in lines
    assert "unknown: b, c of x" in lines
    assert sum("No list." in line for line in lines) == 1
    assert max(map(len, lines)) <= 80


def test_json_has_all_figures_and_no_nan(patient: Patient):
    patient.change(
        "eval", "labels", lambda i, labels: [500] if i == 0 else labels
    )  # no clip of the list has this label
    found = patient.examined()
    written = json.loads(json.dumps(findings.as_json("here", found), allow_nan=False))
    assert written["data"] == "here"
    assert sum(written["counts"].values()) == len(found) == len(written["findings"])
    (clips,) = [f for f in written["findings"] if (f["check"], f["split"]) == ("clips", "balanced_train")]
    assert len(clips["figures"]["per_class"]) == CLASSES + 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the official lists beside the project")
def test_findings_for_a_copy_of_the_balanced_set(tmp_path: Path):
    """As many clips as in a public copy of March 2023, lost at random. The lists share no video."""
    rng = np.random.default_rng(0)
    splits, official = {}, {}
    for split, num in {"balanced_train": 18_685, "eval": 20_371}.items():
        official[split] = str(SHARED / "data" / "audioset" / f"{split}_segments.csv")
        listed = read_segments(official[split], locate=lambda *_: Place("", None, 0.0), split=split).clips
        splits[split] = fakes.stored_clips(listed.take(np.sort(rng.permutation(len(listed))[:num])))
    found = Patient(tmp_path, audioset_labels(), official, splits).examined()
    assert severities(found) == {("clips", "balanced_train"): "warning"}
    assert of(found, "clips").what.startswith("18,685 of 22,160 listed clips, 15.7 % missing; most of ")
    assert len(of(found, "clips").figures["per_class"]) == 527
    assert of(found, "leakage", "").what == "no audio, clip_id or video is in two splits"
