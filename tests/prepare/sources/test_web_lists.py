"""Lists from the web: copied once, checked again, limited in size, and never fetched by a report."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ast_core.errors import DataError
from pipeline.prepare.sources import OFFICIAL_LISTS, read_manifest, read_segments, web_lists
from pipeline.prepare.sources.locate import youtube
from tests import conftest

HEADER = "# Segments csv\n# num_ytids=1\n# YTID, start_seconds, end_seconds, positive_labels\n"
GOOD = '--BfvyPmVMo, 20.000, 30.000, "/m/09x0r"'
SHARED = conftest.SHARED / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the real lists are not next to this clone")


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A server on loopback: `pages` maps paths to bodies, `headers` go with every answer, `asked` lists requests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    pages, headers, asked = {}, {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = pages.get(self.path)
            tag = f'"{hash(body)}"'
            is_same = "ETag" in headers and self.headers["If-None-Match"] == tag
            status = 404 if body is None else 304 if is_same else 200
            asked.append((self.path, status))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, tag if name == "ETag" else value)
            self.end_headers()
            if status == 200:
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}).start()
    server.url, server.pages, server.asked, server.headers = (
        f"http://127.0.0.1:{server.server_port}",
        pages,
        asked,
        headers,
    )
    yield server
    server.shutdown()
    server.server_close()


def a_list(*ids: str) -> bytes:
    return (HEADER + "".join(f'{video_id}, 0, 10, "/m/09x0r"\n' for video_id in ids)).encode()


def ids_of(url: str) -> list[str]:
    return read_segments(url, locate=youtube).clips["video_id"].to_pylist()


def test_c5_a_list_that_changed_on_its_server_is_fetched_again(web):
    web.headers["ETag"] = "by the body"
    web.pages["/my_segments.csv"] = a_list("aaaaaaaaaaa")
    assert ids_of(f"{web.url}/my_segments.csv") == ids_of(f"{web.url}/my_segments.csv") == ["aaaaaaaaaaa"]
    web.pages["/my_segments.csv"] = a_list("aaaaaaaaaaa", "bbbbbbbbbbb")
    grown = read_segments(f"{web.url}/my_segments.csv", locate=youtube)
    assert grown.clips["video_id"].to_pylist() == ["aaaaaaaaaaa", "bbbbbbbbbbb"]
    assert "has changed since it was fetched" in grown.notes[0]
    assert [status for _, status in web.asked] == [200, 304, 200]


def test_c5_a_server_without_etags_sends_the_whole_list(web):
    web.pages["/x.csv"] = a_list("aaaaaaaaaaa")
    assert ids_of(f"{web.url}/x.csv") == ["aaaaaaaaaaa"]
    web.pages["/x.csv"] = a_list("bbbbbbbbbbb")
    assert ids_of(f"{web.url}/x.csv") == ["bbbbbbbbbbb"]


def test_c5_a_damaged_copy_is_fetched_again_even_if_unchanged(web, tmp_path):
    web.headers["ETag"] = "by the body"
    web.pages["/x.csv"] = a_list("aaaaaaaaaaa")
    ids_of(f"{web.url}/x.csv")
    (copy,) = (tmp_path / "cache" / "ast-ray").glob("*.csv")
    copy.write_bytes(a_list("ccccccccccc"))
    assert ids_of(f"{web.url}/x.csv") == ["aaaaaaaaaaa"]


@pytest.mark.parametrize("page", [None, b"", b" <!doctype html><p>Please sign in"])
def test_c5_if_the_server_has_no_list_the_copy_is_used_with_a_line(web, tmp_path, page):
    web.pages["/a/my_segments.csv?v=1"] = a_list("aaaaaaaaaaa")
    url = f"{web.url}/a/my_segments.csv?v=1"
    first = read_segments(url, locate=youtube)
    assert (first.clips["split"].to_pylist(), first.notes) == (["my"], ())
    web.pages["/a/my_segments.csv?v=1"] = page
    again = read_segments(url, locate=youtube)
    assert again.clips.equals(first.clips)
    assert "cannot be checked for changes" in again.notes[0]
    (copy,) = (tmp_path / "cache" / "ast-ray").glob("*-my_segments.csv")
    assert str(copy) in again.notes[0]


def test_c5_offline_the_copy_is_used_with_a_line(web):
    web.pages["/x.csv"] = a_list("aaaaaaaaaaa")
    url = f"{web.url}/x.csv"
    ids_of(url)
    web.shutdown()
    web.server_close()
    again = read_segments(url, locate=youtube)
    assert again.clips["video_id"].to_pylist() == ["aaaaaaaaaaa"]
    assert "its copy of 20" in again.notes[0]


def test_a_manifest_from_the_web_is_requested_once_per_run(web):
    web.pages["/m.csv"] = b"path,labels\n/x.wav,dog\n"
    assert read_manifest(f"{web.url}/m.csv").clips["clip_id"].to_pylist() == ["x"]
    assert len(web.asked) == 1


def test_a_manifest_from_the_web_may_have_a_query(web):
    web.pages["/in/m.csv?download=1&of=a/b.zip"] = b"path,labels\nx.wav,dog\n"
    out = read_manifest(f"{web.url}/in/m.csv?download=1&of=a/b.zip")
    assert out.clips["media"].to_pylist() == [f"{web.url}/in/x.wav"]


def test_an_official_name_is_fetched_and_names_the_split(web, monkeypatch):
    monkeypatch.setitem(OFFICIAL_LISTS, "eval", f"{web.url}/eval_segments.csv")
    web.pages["/eval_segments.csv"] = (HEADER + GOOD + "\n").encode()
    assert read_segments("eval", locate=youtube).clips["split"].to_pylist() == ["eval"]


def test_c5_official_lists_use_https():
    assert all(url.startswith("https://") for url in OFFICIAL_LISTS.values())
    assert {OFFICIAL_LISTS[name] for name in ("balanced_train", "eval")} == web_lists.SHA256.keys()


@needs_shared
def test_c5_the_known_hashes_are_those_of_the_official_files():
    for name in ("balanced_train", "eval"):
        data = (SHARED / "audioset" / f"{name}_segments.csv").read_bytes()
        assert web_lists._sha256(data) == web_lists.SHA256[OFFICIAL_LISTS[name]]


def test_c5_an_official_list_is_checked_by_its_hash(web, monkeypatch, tmp_path):
    url = f"{web.url}/eval_segments.csv"
    monkeypatch.setitem(OFFICIAL_LISTS, "eval", url)
    monkeypatch.setitem(web_lists.SHA256, url, web_lists._sha256(a_list("aaaaaaaaaaa")))
    web.pages["/eval_segments.csv"] = a_list("bbbbbbbbbbb")
    with pytest.raises(DataError, match="is not the official list: its SHA-256 is"):
        ids_of("eval")
    assert not [*tmp_path.glob("cache/ast-ray/*")]
    assert web_lists.cached("eval") is None
    web.pages["/eval_segments.csv"] = a_list("aaaaaaaaaaa")
    assert ids_of("eval") == ids_of("eval") == ["aaaaaaaaaaa"]
    assert len(web.asked) == 2
    assert web_lists.cached("eval") is not None


def test_c5_a_too_long_list_is_refused(web, monkeypatch, tmp_path):
    monkeypatch.setattr(web_lists, "MAX_LIST_BYTES", 1 << 20)
    web.pages["/x.csv"] = a_list(*("aaaaaaaaaaa",) * 60_000)
    with pytest.raises(DataError, match="it is longer than 1 MB"):
        ids_of(f"{web.url}/x.csv")
    assert not [*tmp_path.glob("cache/ast-ray/*")]


def test_an_unwritable_cache_is_reported(web, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    web.pages["/x.csv"] = a_list("aaaaaaaaaaa")
    with pytest.raises(DataError, match="set XDG_CACHE_HOME to another folder"):
        ids_of(f"{web.url}/x.csv")


def test_c5_a_list_that_ends_early_is_refused(web, tmp_path):
    web.headers["Content-Length"] = "100000"
    web.pages["/x.csv"] = a_list("aaaaaaaaaaa")
    with pytest.raises(DataError, match="cannot fetch"):
        ids_of(f"{web.url}/x.csv")
    assert not [*tmp_path.glob("cache/ast-ray/*")]


@pytest.mark.parametrize("page", [None, b"", b" <!doctype html><p>Please sign in"])
def test_a_failed_fetch_advises_a_manual_download_and_leaves_no_copy(web, tmp_path, page):
    web.pages["/x.csv"] = page
    with pytest.raises(DataError, match=r"cannot fetch http.*download it by hand and give its path") as caught:
        read_segments(f"{web.url}/x.csv", locate=youtube)
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.glob("cache/ast-ray/*")]
