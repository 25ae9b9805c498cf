"""Lists from strangers, through the real job: nothing outside the output is written, nothing is executed."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.demo.media_server import serve
from jobs.prepare_audioset import main
from pipeline.dataset import PreparedDataset
from tests import fakes

SPEECH = "/m/09x0r"
SENTINEL = "pwned-by-a-list"
COMMANDS = [
    f"$(touch {SENTINEL})",
    f"; touch {SENTINEL};",
    f"`touch {SENTINEL}`",
    f"| touch {SENTINEL}",
    f"&& touch {SENTINEL} #",
    f"'\"; touch {SENTINEL}; '",
    f"%(id)s --exec touch {SENTINEL}",
]
BIDI, SURROGATE = "abc\u202egpj.wav\u200f", "lone\ud800"
UP = ["..", ".", "../../x", "a/../../../x", "/etc/passwd", "/", "~", "a\\..\\b"]
OPTIONS = ["-rf", "--help", "-o/tmp/x"]
UNSHOWABLE = ["", " ", "two words", "a\0b", "a\rb", "a\x1b[2Jb", "\u2028", "\ufeff", "x" * 10_000]


class World:
    """A folder with all that a job is given, and all that lies around it, watched."""

    def __init__(self, root: Path, working_dirs: list[Path]) -> None:
        self.root, self.output = root, root / "inner" / "output"
        self.inputs = root / "inner" / "inputs"
        self.inputs.mkdir(parents=True)
        (root / "inner" / "cwd").mkdir()
        self.working_dirs = working_dirs

    def snapshot(self) -> dict[str, bytes | None]:
        """Everything below the root but for the output, and the names in the folders where processes work."""
        below = {path for path in self.root.rglob("*") if self.output not in (path, *path.parents)}
        near = {path for folder in self.working_dirs for path in folder.iterdir() if not path.name.startswith(".")}
        return {str(p): p.read_bytes() if p in below and p.is_file() else None for p in below | near}

    def prepare(self, *argv: str) -> PreparedDataset:
        before = self.snapshot()
        assert main([*argv, "--output", str(self.output)]) == 0
        assert self.snapshot() == before
        written = [path for path in self.output.rglob("*") if path.is_file()]
        usual = {"dataset.json", "labels.csv", "report.html", "index.parquet", "failures.parquet"}
        others = [path for path in written if path.name not in usual and path.parent.name not in ("shards", "_report")]
        assert others == []
        return PreparedDataset.open(str(self.output))

    def failures(self, split: str) -> list[tuple[str, str]]:
        table = pq.read_table(self.output / split / "failures.parquet")
        return list(zip(table["clip_id"].to_pylist(), table["reason"].to_pylist(), strict=True))


@pytest.fixture
def world(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    started_in = Path.cwd()  # where Ray's workers are
    made = World(tmp_path, [started_in, started_in.parent, Path.home()])
    monkeypatch.chdir(tmp_path / "inner" / "cwd")
    yield made
    assert not [path for folder in made.working_dirs for path in folder.glob(f"*{SENTINEL}*")]


def reasons(failures: list[tuple[str, str]]) -> Counter[str]:
    return Counter(reason for _, reason in failures)


def test_a_segment_list_and_a_folder_of_files_with_hostile_names(world: World):
    audio = world.inputs / "audio"
    sound = fakes.write_media(world.inputs / "sound.flac", fakes.noise(2)).read_bytes()
    named = [*COMMANDS, *OPTIONS[:2], "two words", "new\nline", BIDI, "*", "%s", "-", "good_______", '"', "a\\b"]
    audio.mkdir()
    for name in [*(name.replace("/", "_") for name in named), "..", "...", "x" * 240]:
        (audio / f"{name}.flac").write_bytes(sound)
    (Path(os.fsdecode(os.fsencode(audio) + b"/\xff\xfe.flac"))).write_bytes(sound)  # a name that is not UTF-8
    (audio / "link.flac").symlink_to(world.inputs / "sound.flac")

    good = ["-rf", "--help", "-", "good_______", "link"]
    bad_id = [*COMMANDS, *UP, "-o/tmp/x", *UNSHOWABLE[1:], BIDI, "*", "%s", "a b"]
    bad_id = [name for name in bad_id if "," not in name]
    bad_time = [
        "0, 0",
        "5, 4",
        "-1, 4",
        "nan, 5",
        "0, nan",
        "0, inf",
        "inf, inf",
        "-inf, 5",
        "0, 36000",
        "1e300, 1e301",
    ]
    bad_time += ["0x0, 0x5", "1e999, 2", f"$(touch {SENTINEL}), 5", "'', ''", ", "]
    unknown = ["Speach", "/m/", "../../x", f"$(touch {SENTINEL})", "/m/09x0r/../x", "\u202e/m/09x0r", "0", "x" * 10_000]
    lines = [
        *(f'{name}, 0.000, 1.000, "{SPEECH}"' for name in good),
        *(f'{name}, 0.000, 1.000, "{SPEECH}"' for name in bad_id),
        *(f'time{i:07}, {times}, "{SPEECH}"' for i, times in enumerate(bad_time)),
        *(f'label{i:06}, 0.000, 1.000, "{label}"' for i, label in enumerate(unknown)),
        'nolabel____, 0.000, 1.000, ""',
        f'nothere____, 0.000, 1.000, "{SPEECH}"',
        f'good_______, 999999.000, 999999.500, "{SPEECH}"',
        f'good_______, 0.000, 1.000, "{SPEECH}"',
    ]
    (world.inputs / "list.csv").write_bytes("\n".join(lines).encode())
    data = world.prepare("--segments", str(world.inputs / "list.csv"), "--audio-dir", str(audio), "--split", "s")
    assert sorted(data.clips(["s"]).clip_id.to_pylist()) == sorted(f"{name}_0.000" for name in good)
    expected = {"bad_id": len(bad_id), "bad_time": len(bad_time), "unknown_label": len(unknown), "no_label": 1}
    failures = world.failures("s")
    assert reasons(failures) == expected | {"missing_file": 1, "truncated": 1, "duplicate": 1}
    assert len(failures) + len(good) == len(lines)
    assert all(clip_id and len(clip_id) <= 200 and "\0" not in clip_id for clip_id, _ in failures)


def test_a_manifest_whose_every_column_is_hostile(world: World):
    fakes.write_media(world.inputs / "ok.flac", fakes.noise(2))
    fakes.write_media(world.root / "above.flac", fakes.noise(2))
    columns = ("path", "url", "labels", "clip_id", "start_s", "end_s", "split")
    rows: list[dict[str, object]] = []

    def add(reason: str | None, **row: object) -> None:
        usual = {"path": None if "url" in row else "ok.flac", "labels": "Speech", "clip_id": f"row {len(rows)}"}
        rows.append(usual | row | {"reason": reason})

    names = [*COMMANDS, *UP, *OPTIONS, BIDI, " ", "two words", "\ufeff", "x" * 200, "<script>alert(1)</script>"]
    for name in names:
        add(None, clip_id=name)  # a clip_id is data, and names no file
    for name in [SENTINEL, "a\0b", "a\nb", "a\x1b[2Jb", "\u2028", "x" * 10_000]:
        add("bad_id" if name != SENTINEL else None, clip_id=name)
    for split in [*COMMANDS, *UP, *OPTIONS, BIDI, "_work", "_report", "a\0b", "x" * 10_000]:
        add("bad_id", split=split)
    for split in ["dataset.json", "labels.csv", "Report.html"]:
        add("bad_id", split=split)
    for path in [*COMMANDS, *UP, *OPTIONS, BIDI, "x" * 10_000, "ok.flac/x", "jupyter://x", "nothing://x"]:
        add("missing_file" if path not in ("..", ".", "/", "/etc/passwd") else "not_audio", path=path)
    for path in ["a\0b", "a\nb", "simplecache::file:///etc/passwd", "zip://a::simplecache::file:///x"]:
        add("bad_id", path=path)
    for path in ["s3://bucket/x?allow_bucket_creation=true", "s3://bucket?allow%5Fbucket_creation=1/x"]:
        add("bad_id", path=path)
    add(None, path="../../above.flac")  # whoever gives a list gives it leave to read
    for times in [(0, 0), (5, 4), (-1, 1), (float("nan"), 1), (0, float("nan")), (0, float("inf")), (0, 36_000)]:
        add("bad_time", start_s=float(times[0]), end_s=float(times[1]))
    add("truncated", start_s=1e6, end_s=1e6 + 1)
    for labels in ["/m/none", f"Speech;$(touch {SENTINEL})", "../../x", "527", "-1", "x" * 10_000, "Spe\0ech"]:
        add("unknown_label", labels=labels)
    for labels in ["", " ", None]:
        add("no_label", labels=labels)
    with serve(world.inputs) as base_url:
        add("unavailable", url=f"{base_url}/{''.join(COMMANDS[:5]).replace(' ', '${IFS}')}.wav")
        for url in ["file:///etc/passwd", f"-o{SENTINEL} {base_url}/x", f"{base_url}/a b", "javascript:x", "data:x"]:
            add("bad_id", url=url)
        table = pa.table({column: pa.array([row.get(column) for row in rows]) for column in columns})
        pq.write_table(table, world.inputs / "list.parquet")
        argv = ["--manifest", str(world.inputs / "list.parquet"), "--timeout-s", "5", "--download-workers", "1"]
        (world.inputs / "labels.csv").write_text("index,mid,display_name\n0,/m/09x0r,Speech\n1,/m/x,Dog\n")
        data = world.prepare(*argv, "--labels", str(world.inputs / "labels.csv"))
    assert data.splits == ["train"]
    prepared = data.clips(["train"]).clip_id.to_pylist()
    assert Counter(prepared) == Counter(row["clip_id"] for row in rows if row["reason"] is None)
    failures = world.failures("train")
    assert len(failures) + len(prepared) == len(rows)
    assert all(0 < len(clip_id) <= 200 for clip_id, _ in failures)
    said = dict(failures)
    wrong = {
        str(row): said.get(str(row["clip_id"]))
        for row in rows
        if row["reason"] and str(row["clip_id"]).startswith("row ") and said.get(str(row["clip_id"])) != row["reason"]
    }
    assert wrong == {}


def test_a_data_file_whose_every_entry_is_hostile(world: World):
    fakes.write_media(world.inputs / "ok.flac", fakes.noise(2))
    entries: list[object] = [{"wav": "ok.flac", "labels": SPEECH}]
    paths = [*COMMANDS, *(f"{name}/y.flac" for name in UP[:4]), "-rf", BIDI + ".flac", "x" * 190]
    entries += [{"wav": path, "labels": SPEECH} for path in paths]
    no_paths = ["", "a\0b", "a\nb", SURROGATE, "x" * 10_000, None, 5, ["ok.flac"], {"a": 1}, "simplecache::file:///x"]
    entries += [{"wav": path, "labels": SPEECH} for path in no_paths]
    entries += [{"wav": "b.flac", "video_id": name, "labels": SPEECH} for name in ["../x", 5, SURROGATE, "x" * 65]]
    entries += [None, 5, "ok.flac", []]  # no path either
    labels = ["Speach", "../../x", SURROGATE, f"$(touch {SENTINEL})"]
    entries += [{"wav": f"label{i}.flac", "labels": label} for i, label in enumerate(labels)]
    entries += [{"wav": f"none{i}.flac", "labels": label} for i, label in enumerate(["", None, 5, {}])]
    (world.inputs / "list.json").write_text(json.dumps({"data": entries}))
    data = world.prepare("--datafile", str(world.inputs / "list.json"), "--split", "s")
    assert data.clips(["s"]).clip_id.to_pylist() == ["ok"]
    found = reasons(world.failures("s"))
    assert found.total() + 1 == len(entries)
    assert found["unknown_label"] == len(labels)
    assert found["no_label"] == 4
    assert found["bad_id"] >= len(no_paths) + 4 + 4
    assert set(found) <= {"unknown_label", "no_label", "bad_id", "missing_file", "duplicate", "not_audio"}
