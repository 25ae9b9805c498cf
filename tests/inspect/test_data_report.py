"""OUT/report.html: its numbers, hostile names, and how a browser shows and plays it."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ast_core.labels import LabelVocabulary, audioset_labels
from pipeline import dataset, storage
from pipeline.dataset import PreparedDataset
from pipeline.html import charts
from pipeline.inspect.data_report import MEANING, write_report
from pipeline.prepare.audio.features import features
from pipeline.prepare.clip import FAILURES, WAVEFORM, Reason, in_progress, ragged
from pipeline.prepare.output.origins import record_origin
from pipeline.prepare.output.publish import publish, start_output
from pipeline.prepare.output.samples import KeepSamples
from pipeline.prepare.output.shards import WriteShards
from pipeline.redaction import without_secrets
from tests import fakes
from tests.browser import browser, needs_browser
from tests.damage import record_again
from tests.pages import Page
from tests.test_charts import points_of

HOSTILE = "<script>window.harmed = 1</script>"
NAMES = ["dog", HOSTILE, '"><img src=x onerror="window.harmed = 1">', "rain & wind", "never heard"]
MISSING = [
    ("unavailable", [0], "Video unavailable"),
    ("unavailable", [1, 3], "Video unavailable"),
    ("unavailable", [1], f"gone {HOSTILE}"),
    ("network", [3], "timed out"),
    ("no_label", [], "no label"),
    ("duplicate", [0], "is in line 1"),
]
BY_SPLIT, BY_REASON, BY_CLASS = (
    "Clips of each split",
    "Clips that could not be prepared",
    "Clips of each class, worst hit first",
)


def write_data(output: str, *, labels_of_failures: bool = True, seconds: float = 0.5, clips_per_shard: int = 8) -> None:
    """Write two splits. `train` has missing clips and hostile names."""
    labels = LabelVocabulary(tuple(f"/m/{i}" for i in range(len(NAMES))), tuple(NAMES))
    start_output(output, labels)
    rng = np.random.default_rng(1)
    for split, num_clips in (("train", 30), ("eval", 12)):
        made = [
            {"clip_id": f"{split}{i}'\"<b>_0.000", "split": split, "media": "made", "end_s": seconds}
            | {"labels": sorted({int(c) for c in rng.integers(0, 4, 2)})}
            for i in range(num_clips)
        ]
        rows = record_origin(in_progress(fakes.clips(*made)))
        rows = rows.append_column("num_clipped", pa.array([0, 5, 2000] * (num_clips // 3), pa.int32()))
        sounds = [fakes.tone(300.0 * (1 + i % 9), seconds) + fakes.noise(seconds, seed=i) for i in range(num_clips)]
        rows = rows.append_column("waveform", ragged(sounds, WAVEFORM))
        rows = features(KeepSamples(output, num_listed=42)(rows))
        for begin in range(0, num_clips, clips_per_shard):
            WriteShards(output)(rows.slice(begin, clips_per_shard))
    publish(output, labels, {"train": FAILURES.empty_table(), "eval": FAILURES.empty_table()})
    schema = pa.schema([field for field in FAILURES if field.name != "labels"])
    of_labels = [pa.field("labels", dataset.LABELS)] if labels_of_failures else []
    failures = [
        {
            "clip_id": f"lost{i}",
            "split": "train",
            "stage": "source" if Reason(reason) in (Reason.NO_LABEL, Reason.DUPLICATE) else "download",
        }
        | {"reason": reason, "message": message, "attempts": 1, "retry": Reason(reason).retry, "tool_versions": ""}
        | {"labels": of or None}
        for i, (reason, of, message) in enumerate(MISSING)
    ]
    table = pa.Table.from_pylist(failures, schema=pa.schema([*schema, *of_labels]))
    dataset.write_table(dataset.failures_file(output, "train"), table)
    record_again(output)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    output = str(tmp_path_factory.mktemp("report") / "data")
    write_data(output)
    return output


@pytest.fixture(scope="module")
def html(data: str) -> str:
    uri = write_report(data, listed={"train": 36, "eval": 11})
    assert uri == storage.join(data, "report.html")
    return storage.read_bytes(uri).decode()


def test_asked_equals_got_plus_missing_and_repeated_rows_are_separate(html: str, data: str):
    rows = Page(html).tables[BY_SPLIT][1:]
    got = {split: PreparedDataset.open(data).index(split).num_rows for split in ("train", "eval")}
    assert rows == [
        ["train", "35", str(got["train"]), "5", "14.3 %", "1"],
        ["eval", "12", str(got["eval"]), "0", "0.0 %", "0"],
        ["all", "47", "42", "5", "10.6 %", "1"],
    ]
    text = Page(html).text
    assert "that repeat a clip of an earlier row: 1," in text
    assert "eval: the last run’s list has 11 rows, the data set has 12; the others are from earlier lists." in text
    assert "train: the last run’s list" not in text  # both numbers are equal


def test_class_counts_match_the_labels_on_disk_worst_first(html: str, data: str):
    header, *rows = Page(html).tables[BY_CLASS]
    assert header == ["class", "asked for", "got", "missing", "share missing", "missing in train", "missing in eval"]
    got, lost = Counter(), Counter()
    for split in ("train", "eval"):
        for labels in pq.read_table(Path(data) / split / "index.parquet")["labels"].to_pylist():
            got.update(labels)
    for reason, labels, _ in MISSING:
        lost.update(labels if reason != "duplicate" else [])
    found = {row[0]: row[1:4] for row in rows}
    assert found == {name: [str(got[c] + lost[c]), str(got[c]), str(lost[c])] for c, name in enumerate(NAMES)}
    shares = [float(row[4].removesuffix(" %")) for row in rows if row[4] != "–"]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0
    in_train = {row[0]: row[5] for row in rows}
    train = Counter(c for labels in PreparedDataset.open(data).index("train")["labels"].to_pylist() for c in labels)
    assert in_train["rain & wind"] == f"2 of {train[3] + 2}"
    assert in_train["never heard"] == "–"
    assert "1 of 5 classes have no clip" in Page(html).text
    assert "without recorded labels, which are in no class here: 1." in Page(html).text


def test_reasons_have_count_meaning_next_run_and_most_frequent_message(html: str):
    rows = {row[0].split("\n")[0]: row for row in Page(html).tables[BY_REASON][1:]}
    assert rows["unavailable"][0].endswith(MEANING[Reason.UNAVAILABLE])
    assert rows["unavailable"][1:] == ["3", "60.0 %", "only with --retry unavailable", "Video unavailable"]
    assert rows["network"][1:] == ["1", "20.0 %", "tries again", "timed out"]
    assert rows["no_label"][1:4] == ["1", "20.0 %", "if the list is fixed"]
    assert rows["duplicate"][1:4] == ["1", "–", "–"]
    assert next(iter(rows)) == "unavailable"


def test_every_reason_has_a_meaning():
    assert set(MEANING) == set(Reason)


def test_levels_are_grouped_without_losing_a_clip(html: str):
    tables = Page(html).tables
    clipping = tables["Clips by their number of samples beyond full scale, which were set to ±1"]
    assert clipping[1:] == [["train", "10", "10", "0", "0", "10"], ["eval", "4", "4", "0", "0", "4"]]
    silence = tables["Clips by their share of digitally silent frames"]
    assert [sum(map(int, row[1:])) for row in silence[1:]] == [30, 12]


def test_clips_are_grouped_by_their_share_of_silent_frames(tmp_path: Path):
    clips = fakes.clips(*({"clip_id": f"c{i}", "end_s": 10.0, "video_id": "v"} for i in range(6)))
    stored = fakes.stored_clips(clips)
    at = stored.schema.get_field_index("num_silent_frames")
    silent = pa.array([0, 1, 99, 499, 500, 998], pa.int32())  # of 998
    stored = stored.set_column(at, dataset.SCANNED.field("num_silent_frames"), silent)
    fakes.write_stored(str(tmp_path / "data"), LabelVocabulary.from_names(["a"]), {"train": stored})
    parsed = Page(storage.read_bytes(write_report(str(tmp_path / "data"))).decode())
    (row,) = parsed.tables["Clips by their share of digitally silent frames"][1:]
    assert row == ["train", "1", "2", "1", "1", "1"]


def test_page_loads_nothing_and_escapes_names_and_messages(html: str):
    parsed = Page(html)
    assert parsed.loads
    assert [
        uri for uri in parsed.loads if not uri.startswith(("data:image/png;base64,", "data:audio/flac;base64,", "#"))
    ] == []
    assert len([tag for tag, _ in parsed.tags if tag == "script"]) == 1
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert not [tag for tag, _ in parsed.tags if tag in ("img", "link", "iframe", "object", "base", "form")]
    assert f"gone {HOSTILE}" not in parsed.text  # not the most frequent
    assert NAMES[2] in parsed.text
    assert HOSTILE not in html


def test_without_labels_of_missing_clips_classes_show_only_clips_got(tmp_path: Path):
    write_data(str(tmp_path / "data"), labels_of_failures=False)
    parsed = Page(storage.read_bytes(write_report(str(tmp_path / "data"))).decode())
    assert parsed.tables["Clips of each class, fewest first"][0] == ["class", "got", "got in train", "got in eval"]
    assert "by class only the clips that were got are known" in parsed.text
    assert parsed.tables[BY_SPLIT][1][:4] == ["train", "35", "30", "5"]


def test_reports_of_an_empty_and_of_a_complete_data_set(tmp_path: Path):
    labels = LabelVocabulary.from_names(["a", "b"])
    nothing = fakes.stored_clips(fakes.clips({"clip_id": "c", "media": "made", "end_s": 1.0})).slice(0, 0)
    fakes.write_stored(str(tmp_path / "none"), labels, {"train": nothing}, {"train": [Reason.UNAVAILABLE] * 3})
    parsed = Page(storage.read_bytes(write_report(str(tmp_path / "none"))).decode())
    assert parsed.tables[BY_SPLIT][1] == ["train", "3", "0", "3", "100.0 %", "0"]
    all_there = fakes.stored_clips(fakes.clips({"clip_id": "c", "end_s": 1.0, "video_id": "v"}))
    fakes.write_stored(str(tmp_path / "all"), labels, {"train": all_there})
    parsed = Page(storage.read_bytes(write_report(str(tmp_path / "all"))).decode())
    assert "No clip is missing." in parsed.text
    assert "There is no audio to listen to" in parsed.text


def test_curve_follows_the_modification_times_of_shards(data: str, tmp_path: Path):
    write_data(str(tmp_path / "data"), clips_per_shard=10)
    for split, days in (("train", (0, 1, 4)), ("eval", (2, 3))):
        shards = sorted((tmp_path / "data" / split / "shards").iterdir())
        for shard, day in zip(shards, days, strict=True):
            os.utime(shard, (1.7e9 + 86400 * day,) * 2)
    html = storage.read_bytes(write_report(str(tmp_path / "data"))).decode()
    assert "days since 2023-11-14 22:13 UTC" in html
    curve = html[html.index("Clips prepared") : html.index("Durations")]
    assert "clips, 0 to 30, over days since 2023-11-14 22:13 UTC, 0 to 4" in curve
    for points, days in zip(points_of(curve), ((0, 1, 4), (2, 3, 4)), strict=True):
        across = (points[:, 0] - charts.LEFT) / (charts.WIDTH - charts.LEFT - charts.RIGHT)
        np.testing.assert_allclose(np.unique(across * 4), sorted({0, *days}), atol=0.01)
        assert (np.diff(points[:, 0]) >= 0).all()
        assert (np.diff(points[:, 1]) <= 0).all()  # down is up: the curve never falls


def test_page_lists_all_findings_serious_ones_first(data: str, tmp_path: Path):
    clips = [
        fakes.clips({"clip_id": f"{split}_c", "split": split, "end_s": 10.0, "video_id": "v"}) for split in ("a", "b")
    ]
    stored = {table["split"][0].as_py(): fakes.stored_clips(table) for table in clips}
    at = stored["b"].schema.get_field_index("fbank_hash")
    stored["b"] = stored["b"].set_column(at, "fbank_hash", stored["a"]["fbank_hash"])
    fakes.write_stored(str(tmp_path / "data"), LabelVocabulary.from_names(["x"]), stored)
    text = Page(storage.read_bytes(write_report(str(tmp_path / "data"))).decode()).text
    assert "Serious:" in text
    assert text.index("leakage") < text.index("Checks without a finding") < text.index("vocabulary")


def test_page_of_audioset_stays_small(tmp_path: Path):
    """The class table grows with the classes and the curve with the shards, not with the clips."""
    ids = [{"clip_id": f"c{i}", "end_s": 10.0, "video_id": "v", "labels": [i % 527]} for i in range(5270)]
    fakes.write_stored(
        str(tmp_path / "data"),
        audioset_labels(),
        {"mine": fakes.stored_clips(fakes.clips(*({"split": "mine"} | one for one in ids)))},
    )
    html = storage.read_bytes(write_report(str(tmp_path / "data")))
    assert len(Page(html.decode()).tables["Clips of each class, worst hit first"]) == 528
    assert len(html) < 400_000


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://me:hush@bucket/data", "s3://bucket/data"),
        ("s3://bucket/data?secret_key=hush&region=x", "s3://bucket/data"),
        ("s3://bucket?secret_key=hush/data", "s3://bucket/data"),
        ("/data/me@home?/x", "/data/me@home?/x"),
    ],
)
def test_page_shows_no_keys_of_a_uri(uri: str, shown: str):
    assert without_secrets(uri) == shown


@needs_browser
def test_a_browser_sorts_searches_and_plays_without_errors(tmp_path: Path):
    write_data(str(tmp_path / "data"), seconds=10.0)
    uri = write_report(str(tmp_path / "data"))
    with browser(tmp_path / "profile") as chromium:
        chromium.open(f"file://{uri}")
        column = "[...document.querySelectorAll('#classes tbody tr')].map(row => row.cells[%d].textContent)"
        heads = "document.querySelectorAll('#classes thead button')[%d].click();"
        states = "[...document.querySelectorAll('#classes thead th')].map(head => head.getAttribute('aria-sort'))"

        asked = chromium.run(heads % 1 + f"return {column % 1}")
        assert asked == sorted(asked, key=int, reverse=True)
        assert chromium.run(f"return {states}")[:5] == [None, "descending", None, None, None]
        assert chromium.run(heads % 1 + f"return {column % 1}") == sorted(asked, key=int)
        names = chromium.run(heads % 0 + f"return {column % 0}")
        assert set(names) == set(NAMES)
        assert names.index("dog") < names.index("never heard") < names.index("rain & wind")
        for _ in range(2):  # an unknown value is last in both directions
            assert chromium.run(heads % 4 + f"return {column % 4}")[-1] == "–"

        durations = chromium.run(
            "return Promise.all([...document.querySelectorAll('audio')].map(audio => new Promise((loaded, failed) => {"
            "  if (audio.readyState) loaded(audio.duration);"
            "  audio.onloadedmetadata = () => loaded(audio.duration);"
            "  audio.onerror = () => failed(audio.error.message); })))"
        )
        assert durations == pytest.approx([10.0] * 10)
        heard = chromium.run(
            "const audio = document.querySelector('audio'); audio.muted = true; await audio.play();"
            "await new Promise(heard => audio.ontimeupdate = () => audio.currentTime > 0.1 && heard());"
            "audio.pause();"
            "return [audio.currentTime, audio.parentElement.querySelector('.playhead').style.transform]"
        )
        assert heard[0] > 0.1
        assert heard[1].startswith("translateX(")
        sizes = "return [...document.querySelectorAll('svg image')].map(image => image.getBBox().width)"
        assert len(chromium.run(sizes)) == 10
        assert chromium.run("return window.harmed") is None
        assert chromium.console() == []

        # The second defence: a script that got into the page would not run.
        planted = "const it = document.createElement('script'); it.textContent = 'window.harmed = 1';"
        assert chromium.run(planted + "document.body.append(it); return window.harmed") is None
        assert "Content Security Policy" in " ".join(chromium.console())


@needs_browser
def test_page_fits_the_screen_of_a_phone(data: str, html: str, tmp_path: Path):
    with browser(tmp_path / "profile") as chromium:
        chromium.devtools("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=2, mobile=True)
        chromium.open(f"file://{data}/report.html")
        assert chromium.run("return document.documentElement.scrollWidth") == 390
