"""Hostile lists in the real job: it writes nothing outside the output and executes nothing."""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ast_core.errors import DataError
from jobs.demo.media_server import serve
from jobs.prepare_audioset import main
from pipeline.dataset import PreparedDataset
from tests import fakes
from tests.conftest import ROOT, OwnFolders

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


class Workspace:
    """The inputs and the output of a job, and the folders where its processes run."""

    def __init__(self, root: Path, own_folders: OwnFolders) -> None:
        self.root, self.output = root, root / "inner" / "output"
        self.inputs, self.cwd = root / "inner" / "inputs", root / "inner" / "cwd"
        self.inputs.mkdir(parents=True)
        self.cwd.mkdir()
        self.own_folders = own_folders

    def snapshot(self) -> dict[str, bytes | None]:
        """All files below the root except the output's, and in the folder where Ray's workers run."""
        below = {path for path in self.root.rglob("*") if self.output not in (path, *path.parents)}
        below |= set(self.own_folders.ray_cwd.rglob("*"))
        return {str(path): path.read_bytes() if path.is_file() else None for path in below}

    def traces(self) -> list[str]:
        """Files that commands in a list created, in all folders where a job's process may write without a path."""
        below = [Path(at, name) for at, folders, files in os.walk(self.own_folders.root) for name in folders + files]
        near = [path for folder in (ROOT, ROOT.parent) for path in folder.iterdir()]
        return [str(path) for path in below + near if SENTINEL in path.name]

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
def workspace(
    local_ray: None, own_folders: OwnFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Workspace]:
    made = Workspace(tmp_path, own_folders)
    monkeypatch.chdir(made.cwd)
    yield made
    assert made.traces() == []


def reasons(failures: list[tuple[str, str]]) -> Counter[str]:
    return Counter(reason for _, reason in failures)


def test_segment_list_and_files_with_hostile_names(workspace: Workspace):
    audio = workspace.inputs / "audio"
    sound = fakes.write_media(workspace.inputs / "sound.flac", fakes.noise(2)).read_bytes()
    named = [*COMMANDS, *OPTIONS[:2], "two words", "new\nline", BIDI, "*", "%s", "-", "good_______", '"', "a\\b"]
    audio.mkdir()
    for name in [*(name.replace("/", "_") for name in named), "..", "...", "x" * 240]:
        (audio / f"{name}.flac").write_bytes(sound)
    (Path(os.fsdecode(os.fsencode(audio) + b"/\xff\xfe.flac"))).write_bytes(sound)  # a name that is not UTF-8
    (audio / "link.flac").symlink_to(workspace.inputs / "sound.flac")

    good = ["-rf", "--help", "-", "good_______", "link"]
    bad_id = [*COMMANDS, *UP, "-o/tmp/x", *UNSHOWABLE[1:], BIDI, "*", "%s", "a b"]
    bad_id = [name for name in bad_id if "," not in name and "\0" not in name]  # with a NUL, the file is not text
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
        'good_______, 0.000, 1.000, ""',  # this row is refused, but its clip is good
        'good_______, 0.000, 1.000, "/m/none"',
    ]
    (workspace.inputs / "list.csv").write_bytes("\n".join(lines).encode())
    data = workspace.prepare(
        "--segments", str(workspace.inputs / "list.csv"), "--audio-dir", str(audio), "--split", "s"
    )
    assert sorted(data.clips(["s"]).clip_id.to_pylist()) == sorted(f"{name}_0.000" for name in good)
    expected = {"bad_id": len(bad_id), "bad_time": len(bad_time), "unknown_label": len(unknown) + 1, "no_label": 2}
    failures = workspace.failures("s")
    assert reasons(failures) == expected | {"missing_file": 1, "truncated": 1, "duplicate": 1}
    assert len(failures) + len(good) == len(lines)
    assert all(clip_id and len(clip_id) <= 200 and "\0" not in clip_id for clip_id, _ in failures)


def test_manifest_with_hostile_values_in_every_column(workspace: Workspace):
    fakes.write_media(workspace.inputs / "ok.flac", fakes.noise(2))
    fakes.write_media(workspace.root / "above.flac", fakes.noise(2))
    columns = ("path", "url", "labels", "clip_id", "start_s", "end_s", "split")
    rows: list[dict[str, object]] = []

    def add(reason: str | None, **row: object) -> None:
        usual = {"path": None if "url" in row else "ok.flac", "labels": "Speech", "clip_id": f"row {len(rows)}"}
        rows.append(usual | row | {"reason": reason})

    names = [*COMMANDS, *UP, *OPTIONS, BIDI, " ", "two words", "\ufeff", "x" * 200, "<script>alert(1)</script>"]
    for name in names:
        add(None, clip_id=name)  # a clip_id is data and names no file
    for name in [SENTINEL, "a\0b", "a\nb", "a\x1b[2Jb", "\u2028", "x" * 10_000]:
        add("bad_id" if name != SENTINEL else None, clip_id=name)
    for split in [*COMMANDS, *UP, *OPTIONS, BIDI, "_work", "_report", "a\0b", "x" * 10_000]:
        add("bad_id", split=split)
    for split in ["dataset.json", "labels.csv", "Report.html"]:
        add("bad_id", split=split)
    for path in [*COMMANDS, *UP, *OPTIONS, BIDI, "x" * 10_000, "ok.flac/x"]:
        add("missing_file" if path not in ("..", ".", "/", "/etc/passwd") else "not_audio", path=path)
    for path in ["a\0b", "a\nb", "://", "jupyter://x", "nothing://x", "zip://a::simplecache::file:///x"]:
        add("bad_id", path=path)
    for path in ["s3://bucket/x?allow_bucket_creation=true", "s3://bucket?allow%5Fbucket_creation=1/x"]:
        add("bad_id", path=path)
    add(None, path="../../above.flac")  # a list may name any file that the user can read
    for times in [(0, 0), (5, 4), (-1, 1), (float("nan"), 1), (0, float("nan")), (0, float("inf")), (0, 36_000)]:
        add("bad_time", start_s=float(times[0]), end_s=float(times[1]))
    add("truncated", start_s=1e6, end_s=1e6 + 1)
    for labels in ["/m/none", f"Speech;$(touch {SENTINEL})", "../../x", "527", "-1", "x" * 10_000, "Spe\0ech"]:
        add("unknown_label", labels=labels)
    for labels in ["", " ", None]:
        add("no_label", labels=labels)
    with serve(workspace.inputs) as base_url:
        add("unavailable", url=f"{base_url}/{''.join(COMMANDS[:5]).replace(' ', '${IFS}')}.wav")
        for url in ["file:///etc/passwd", f"-o{SENTINEL} {base_url}/x", f"{base_url}/a b", "javascript:x", "data:x"]:
            add("bad_id", url=url)
        table = pa.table({column: pa.array([row.get(column) for row in rows]) for column in columns})
        pq.write_table(table, workspace.inputs / "list.parquet")
        argv = ["--manifest", str(workspace.inputs / "list.parquet"), "--timeout-s", "5", "--download-workers", "1"]
        argv.append("--allow-private-hosts")
        (workspace.inputs / "labels.csv").write_text("index,mid,display_name\n0,/m/09x0r,Speech\n1,/m/x,Dog\n")
        data = workspace.prepare(*argv, "--labels", str(workspace.inputs / "labels.csv"))
    assert data.splits == ["train"]
    prepared = data.clips(["train"]).clip_id.to_pylist()
    assert Counter(prepared) == Counter(row["clip_id"] for row in rows if row["reason"] is None)
    failures = workspace.failures("train")
    assert len(failures) + len(prepared) == len(rows)
    assert all(0 < len(clip_id) <= 200 for clip_id, _ in failures)
    reason_of = dict(failures)
    wrong = {
        str(row): reason_of.get(str(row["clip_id"]))
        for row in rows
        if row["reason"]
        and str(row["clip_id"]).startswith("row ")
        and reason_of.get(str(row["clip_id"])) != row["reason"]
    }
    assert wrong == {}


def test_data_file_with_hostile_values_in_every_entry(workspace: Workspace):
    fakes.write_media(workspace.inputs / "ok.flac", fakes.noise(2))
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
    (workspace.inputs / "list.json").write_text(json.dumps({"data": entries}))
    data = workspace.prepare("--datafile", str(workspace.inputs / "list.json"), "--split", "s")
    assert data.clips(["s"]).clip_id.to_pylist() == ["ok"]
    found = reasons(workspace.failures("s"))
    assert found.total() + 1 == len(entries)
    assert found["unknown_label"] == len(labels) + 2  # a number and an object name no class
    assert found["no_label"] == 2
    assert found["bad_id"] >= len(no_paths) + 4 + 4
    assert set(found) <= {"unknown_label", "no_label", "bad_id", "missing_file", "duplicate", "not_audio"}


@pytest.fixture
def untouched_server() -> Iterator[str]:
    """HOST:PORT of a server that must get no request, in any protocol."""
    asked: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def parse_request(self) -> bool:
            asked.append(self.raw_requestline)
            return False

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
    assert asked == []


def test_path_never_leads_to_a_host_or_blocks_on_a_pipe(workspace: Workspace, untouched_server: str):
    fakes.write_media(workspace.inputs / "ok.flac", fakes.noise(1))
    os.mkfifo(workspace.inputs / "pipe.wav")
    ways_out = [
        f"{scheme}://{untouched_server}/a" for scheme in ("ftp", "sftp", "github", "smb", "gopher", "tcp", "data")
    ]
    ways_out += [
        f"{chain}http://{untouched_server}/a" for chain in ("simplecache::", "dask::", "fsspec+", "reference://x::")
    ]
    buckets = ("s3://b/a", "gs://b/a")  # options of a URI may be secrets and are not shown
    specials = ["pipe.wav", "/dev/zero", "/dev/stdin", "file:///dev/zero", f"file://{workspace.inputs}/pipe.wav"]
    expected = dict.fromkeys(ways_out, "bad_id") | dict.fromkeys(specials, "not_audio")
    expected |= dict.fromkeys(
        [f"http:{untouched_server}", "pipe:0", f"concat:/etc/passwd|http:{untouched_server}"], "missing_file"
    )
    rows = [{"path": path, "clip_id": path, "labels": "dog"} for path in expected]
    with_options = [f"{bucket}?endpoint_override={untouched_server}&scheme=http" for bucket in buckets]
    rows += [{"path": path, "clip_id": path, "labels": "dog"} for path in with_options]
    expected |= dict.fromkeys(buckets, "bad_id")
    good = [f"good {i}" for i in range(len(rows))]  # a list with mostly bad rows is refused as a whole
    rows += [{"path": "ok.flac", "clip_id": clip_id, "labels": "dog"} for clip_id in good]
    pq.write_table(pa.Table.from_pylist(rows), workspace.inputs / "list.parquet")
    data = workspace.prepare("--manifest", str(workspace.inputs / "list.parquet"))
    assert sorted(data.clips(["train"]).clip_id.to_pylist()) == sorted(good)
    assert dict(workspace.failures("train")) == expected


def test_file_can_have_any_name_that_the_file_system_allows(workspace: Workspace):
    sound = fakes.write_media(workspace.root / "sound.flac", fakes.noise(1)).read_bytes()
    names = [
        *(name.replace("/", "_") for name in (*COMMANDS, *UP[2:])),
        *OPTIONS[:2],
        BIDI,
        " ",
        "*",
        "?",
        "[a]",
        "%00",
    ]
    names += ["concat:a|b", "file:a", "pipe:0", "subfile,,start,0,end,0,,:a", "http:a", "data:audio,a", "{0}", "%s%n"]
    for name in names:
        (workspace.inputs / f"{name}.flac").write_bytes(sound)
    rows = [{"path": f"{name}.flac", "labels": "<script>alert(1)</script>"} for name in names]
    pq.write_table(pa.Table.from_pylist(rows), workspace.inputs / "list.parquet")
    data = workspace.prepare("--manifest", str(workspace.inputs / "list.parquet"))
    assert sorted(data.clips(["train"]).clip_id.to_pylist()) == sorted(names)
    page = (workspace.output / "report.html").read_text()
    assert ("<script>alert" in page, "&lt;script&gt;alert" in page) == (False, True)


def test_folder_can_contain_link_cycles_pipes_and_broken_links(workspace: Workspace):
    audio = workspace.inputs / "audio"
    (audio / "deeper").mkdir(parents=True)
    for folder in (audio, audio / "deeper"):
        for name in ("again", "and-again"):  # two in each folder: 40 levels would be 2^40 folders
            (folder / name).symlink_to(audio)
    fakes.write_media(audio / "deeper" / "found______.flac", fakes.noise(1))
    for name, target in {"nothing____": "nowhere", "itself_____": "itself_____.flac"}.items():
        (audio / f"{name}.flac").symlink_to(audio / target)
    os.mkfifo(audio / "pipe_______.flac")
    lines = [f'{name:_<11}, 0, 1, "{SPEECH}"' for name in ("found", "nothing", "itself", "pipe")]
    (workspace.inputs / "list.csv").write_text("\n".join(lines))
    data = workspace.prepare("--segments", str(workspace.inputs / "list.csv"), "--audio-dir", str(audio))
    assert data.clips(["list"]).clip_id.to_pylist() == ["found_______0.000"]
    assert reasons(workspace.failures("list")) == {"missing_file": 3}


def test_archive_with_hostile_member_names_is_read_and_not_unpacked(workspace: Workspace):
    sound = fakes.write_media(workspace.root / "sound.flac", fakes.noise(1)).read_bytes()
    ways_out = [f"../../{SENTINEL}", f"/{SENTINEL}-2", *(command.replace("/", "") for command in COMMANDS)]
    not_utf8, refused = "\udcff\udcfe", ["a\nb", "n" * 300]
    with tarfile.open(workspace.inputs / "a.tar", "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name in (*ways_out, not_utf8, *refused):
            for suffix, content in {"flac": sound, "json": b'{"labels": ["dog"], "start_s": null}'}.items():
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            link = tarfile.TarInfo(f"link{kind.decode()}.flac")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
    data = workspace.prepare("--manifest", str(workspace.inputs / "a.tar"))
    expected = [Path(name).name for name in ways_out]
    assert sorted(data.clips(["train"]).clip_id.to_pylist()) == sorted(expected)
    assert reasons(workspace.failures("train")) == {"bad_id": len(refused) + 1}

    # As --audio-dir, this archive and those with odd columns do not hide good files.
    for i, start_s in enumerate(("a text", [1.0], float("nan"))):
        columns = {"video_id": ["odd"], "start_s": [start_s], "audio": [{"bytes": sound, "path": "../x.flac"}]}
        pq.write_table(pa.table(columns), workspace.inputs / f"{i}.parquet")
    fakes.write_media(workspace.inputs / "good.flac", fakes.noise(1))
    (workspace.root / "more.csv").write_text(f'good, 0, 1, "{SPEECH}"\nodd, 0, 1, "{SPEECH}"')
    workspace.output = workspace.output.parent / "more"
    data = workspace.prepare("--segments", str(workspace.root / "more.csv"), "--audio-dir", str(workspace.inputs))
    assert (len(data.clips(["more"])), workspace.failures("more")) == (1, [("odd_0.000", "missing_file")])


def test_values_of_wrong_types_are_refused_and_not_printed(workspace: Workspace):
    fakes.write_media(workspace.inputs / "ok.flac", fakes.noise(1))
    paths, labels = ["ok.flac"] * 3, ["dog"] * 3
    for name, column in {"bytes": [b"\xff", b"a", None], "lists": [["a"], [], None]}.items():
        table = pa.table({"path": paths, "labels": labels, "clip_id": column, "split": [0, 1, 2]})
        pq.write_table(table, workspace.inputs / f"{name}.parquet")
        workspace.output = workspace.output.parent / name
        data = workspace.prepare("--manifest", str(workspace.inputs / f"{name}.parquet"))
        assert (data.splits, data.clips(["2"]).clip_id.to_pylist()) == (["2", "0", "1"], ["ok"])
        assert [reasons(workspace.failures(split)) for split in ("0", "1")] == [{"bad_id": 1}] * 2
    no_text = [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"a\xff")]
    table = pa.table({"path": pa.Array.from_buffers(pa.string(), 1, no_text), "labels": ["dog"]})
    pq.write_table(table, workspace.inputs / "no-text.parquet")
    with pytest.raises(DataError, match=r"cannot read .*no-text\.parquet"):
        main(["--manifest", str(workspace.inputs / "no-text.parquet"), "--output", str(workspace.output)])
