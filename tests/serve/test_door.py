"""The HTTP side of the service: every request gets an answer or a reason as JSON, within the limits."""

import asyncio
import email
import email.policy
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from starlette.requests import Request

from ast_core.errors import UserError
from pipeline.serve.door import StaticFile, _address, file_of_form
from pipeline.serve.limits import RateLimit
from pipeline.serve.refusals import Refusal
from pipeline.serve.upload import Upload
from tests.serve.server import door, serving

WAIT_S = 60.0


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server with small limits."""
    with serving(
        door(max_bytes=1000, upload_s=0.5, per_second=0, files={"/": StaticFile(b"page", "text/html")})
    ) as url:
        yield url


def refused(answer: requests.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["reason"]


def test_a_body_is_answered_with_its_parameters(server: str):
    answer = requests.post(f"{server}/tag?top=3&pcm=s16le&rate=44100", data=b"12")
    assert answer.json() == {"bytes": 2, "top": 3, "rate_hz": 44_100}
    assert answer.headers["cache-control"] == "no-store"
    assert requests.get(f"{server}/").text == "page"


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("top=0", "top is '0'; use 1 to 1000"),
        ("top=x", "top is 'x'; use 1 to 1000"),
        ("threshold=nan", "threshold is 'nan'; use 0 to 1"),
        ("pcm=s24le&rate=8000", "pcm is 's24le'; use s16le or f32le"),
        ("pcm=s16le", "rate is ''; use 1000 to 384000"),
        ("rate=8000", "rate is for raw samples; give pcm too"),
        ("windows=yes", "windows is 'yes'; use 0 or 1"),
        ("path=/etc", "no parameter 'path'; use top, windows, threshold, pcm, rate"),
    ],
)
def test_a_parameter_that_is_not_allowed_is_refused(server: str, query: str, said: str):
    answer = requests.post(f"{server}/tag?{query}", data=b"12")
    assert refused(answer) == (400, "bad_request")
    assert answer.json()["error"]["message"] == said


def test_too_large_a_body_is_refused_whether_its_length_is_declared_or_not(server: str):
    assert refused(requests.post(f"{server}/tag", data=b"x" * 1001)) == (413, "too_large")
    assert refused(requests.post(f"{server}/tag", data=iter([b"x" * 600] * 2))) == (413, "too_large")
    assert requests.post(f"{server}/tag", data=iter([b"x" * 500] * 2)).json()["bytes"] == 1000


def test_other_types_paths_and_methods_are_refused_as_json(server: str):
    assert refused(requests.post(f"{server}/tag", json={"url": "http://x/"})) == (415, "bad_request")
    assert refused(requests.post(f"{server}/tag", data=b"")) == (400, "bad_request")
    assert refused(requests.get(f"{server}/tag")) == (405, "method")
    assert refused(requests.get(f"{server}/..%2f..%2fetc/passwd")) == (404, "not_found")


def test_a_file_can_be_sent_as_curl_sends_it_or_in_a_form(server: str):
    """curl declares that any file of --data-binary is a form, though it is none."""
    by_curl = {"Content-Type": "application/x-www-form-urlencoded"}
    assert requests.post(f"{server}/tag", data=b"a=b", headers=by_curl).json()["bytes"] == 3
    form = {"note": "barking", "top": "3"}
    assert requests.post(f"{server}/tag", data=form, files={"file": b"1\r\n-2"}).json()["bytes"] == 5
    answer = requests.post(f"{server}/tag", files={"note": (None, "no file")})
    assert refused(answer) == (400, "bad_request")
    assert "curl -F file=@FILE" in answer.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"\r\n", b"a--edge", b"\r\n\r\n\r\n", bytes(range(256)) * 9])
def test_a_file_in_a_form_is_the_one_that_pythons_parser_finds(content: bytes):
    head, kind = b'--edge\r\nContent-Disposition: form-data; name="f"', 'multipart/form-data; boundary="edge"'
    form = head + b"\r\n\r\nfirst\r\n" + head + b'; filename="a \xc3\xa9"\r\n\r\n' + content + b"\r\n--edge--\r\n"
    parsed = email.message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + form, policy=email.policy.HTTP)
    *_, part = parsed.iter_parts()
    assert file_of_form(form, kind) == part.get_payload(decode=True) == content
    with pytest.raises(Refusal, match="no complete file"):
        file_of_form(form.removesuffix(b"\r\n--edge--\r\n"), kind)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl is installed here")
@pytest.mark.parametrize("option", [["--data-binary", "@"], ["-F", "file=@"]])
def test_the_documented_command_of_curl_sends_a_file(server: str, option: list[str], tmp_path: Path):
    (tmp_path / "sound.ogg").write_bytes(b"sound")
    command = ["curl", "--silent", option[0], f"{option[1]}{tmp_path / 'sound.ogg'}", f"{server}/tag"]
    assert json.loads(subprocess.check_output(command))["bytes"] == 5


def slow_post(server: str, sent: bytes, declared: int) -> socket.socket:
    """A client that declares a body and sends only a part of it."""
    host, port = urlsplit(server).hostname, urlsplit(server).port
    client = socket.create_connection((host, port), timeout=20)
    client.sendall(f"POST /tag HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {declared}\r\n\r\n".encode() + sent)
    return client


def received(client: socket.socket) -> dict[str, Any]:
    text = b""
    while b"}}" not in text:
        text += (part := client.recv(4096))
        assert part, text
    return json.loads(text.partition(b"\r\n\r\n")[2])


def test_a_slow_client_gets_a_reason_and_blocks_nobody(server: str):
    slow = [slow_post(server, b"1", 100) for _ in range(20)]
    assert requests.post(f"{server}/tag", data=b"12", timeout=5).json()["bytes"] == 2
    assert {received(client)["error"]["reason"] for client in slow} == {"upload_timeout"}
    assert requests.get(f"{server}/health").json() == {"status": "ok", "receiving": 0, "tagging": 0}


def test_a_client_that_goes_away_leaves_no_place_taken(server: str):
    slow_post(server, b"1", 100).close()
    for _ in range(100):
        if requests.get(f"{server}/health").json()["receiving"] == 0:
            return
    raise AssertionError("its place is still taken")


def test_more_requests_at_once_than_allowed_are_told_to_come_again():
    async def slow(upload: Upload) -> dict[str, Any]:
        await asyncio.sleep(0.5)
        return {}

    with serving(door(slow, max_concurrent=2, per_second=0)) as server, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: requests.post(f"{server}/tag", data=b"1"), range(6)))
    assert sorted(answer.status_code for answer in answers) == [200] * 2 + [503] * 4
    busy = next(answer for answer in answers if answer.status_code == 503)
    assert (busy.json()["error"]["reason"], busy.headers["retry-after"]) == ("busy", "2")


def test_bodies_that_are_received_have_a_limit_in_memory():
    with serving(door(max_bytes=100, upload_s=2, per_second=0)) as server:
        slow = [slow_post(server, b"1" * 99, 100) for _ in range(8)]
        while requests.get(f"{server}/health").json()["receiving"] < 8:
            pass
        assert refused(requests.post(f"{server}/tag", data=b"1" * 50)) == (503, "busy")
        for client in slow:
            client.sendall(b"1")
        assert b"200 OK" in slow[0].recv(100)


def test_an_answer_that_takes_too_long_is_given_up():
    async def slow(upload: Upload) -> dict[str, Any]:
        await asyncio.sleep(30)
        return {}

    with serving(door(slow, timeout_s=0.1)) as server:
        assert refused(requests.post(f"{server}/tag", data=b"1", timeout=3)) == (504, "timeout")


LINES = {"Accept": "application/x-ndjson"}


def lines(answer: requests.Response) -> list[Any]:
    return [json.loads(line) for line in answer.text.splitlines()]


def test_steps_of_the_tagging_are_lines_and_the_last_one_is_the_answer(server: str):
    answer = requests.post(f"{server}/tag?top=3", data=b"12", headers=LINES)
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert lines(answer) == [{"read_s": 1.0}, {"bytes": 2, "top": 3, "rate_hz": None}]
    assert refused(requests.post(f"{server}/tag", data=b"", headers=LINES)) == (400, "bad_request")
    assert requests.get(f"{server}/health").json()["tagging"] == 0


def test_a_line_comes_before_the_answer_is_there():
    is_seen = asyncio.Event()

    async def wait(upload: Upload) -> dict[str, Any]:
        await asyncio.wait_for(is_seen.wait(), 10)
        return {"is_seen": True}

    with serving(door(wait)) as server:
        answer = requests.post(f"{server}/tag", data=b"1", headers=LINES, stream=True, timeout=10)
        found = answer.iter_lines()
        assert json.loads(next(found)) == {"read_s": 1.0}
        assert requests.get(f"{server}/health").json()["tagging"] == 1
        is_seen.set()
        assert json.loads(next(found)) == {"is_seen": True}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Refusal(422, "truncated", "damaged"), "truncated"),
        (RuntimeError("/root/secret.py"), "internal"),
        (UserError("no space in /root"), "setup"),
        (None, "timeout"),
    ],
)
def test_a_fault_after_the_first_step_is_the_last_line(fault: Exception | None, reason: str):
    async def fail(upload: Upload) -> dict[str, Any]:
        if fault is None:
            await asyncio.sleep(30)
            raise AssertionError
        raise fault

    with serving(door(fail, timeout_s=0.2)) as server:
        found = lines(requests.post(f"{server}/tag", data=b"1", headers=LINES, timeout=5))
        assert found[0] == {"read_s": 1.0}
        assert found[1]["error"]["reason"] == reason
        assert "root" not in str(found)
        assert requests.get(f"{server}/health").json()["tagging"] == 0


def test_a_client_that_leaves_the_lines_frees_its_place():
    async def wait(upload: Upload) -> dict[str, Any]:
        await asyncio.sleep(30)
        return {}

    with serving(door(wait, max_concurrent=1, per_second=0)) as server:
        answer = requests.post(f"{server}/tag", data=b"1", headers=LINES, stream=True, timeout=10)
        found = answer.iter_lines()
        next(found)
        assert refused(requests.post(f"{server}/tag", data=b"1", headers=LINES)) == (503, "busy")
        found.close()
        answer.close()
        for _ in range(200):
            if requests.get(f"{server}/health").json()["tagging"] == 0:
                return
    raise AssertionError("its place is still taken")


def test_an_address_that_asks_too_often_waits():
    with serving(door(per_second=1)) as server:
        answers = [requests.post(f"{server}/tag", data=b"1") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].json()["error"] == {
        "reason": "rate",
        "message": "1 requests per second are allowed from one address",
    }
    assert answers[2].headers["retry-after"] == "1"


def test_a_rate_limit_counts_each_address_and_forgets():
    now_s = 0.0
    limit = RateLimit(2.0, clock_s=lambda: now_s)
    assert [limit.wait_s("a") for _ in range(5)] == [0, 0, 0, 0, 0.5]
    assert limit.wait_s("b") == 0
    now_s = 0.5
    assert [limit.wait_s("a") for _ in range(2)] == [0, 0.5]
    for i in range(20_000):
        limit.wait_s(str(i))
    assert len(limit._tokens) == 10_000


@pytest.mark.parametrize("fault", [RuntimeError("/root/secret.py"), UserError("no space in /root")])
def test_an_error_of_the_server_is_told_without_its_text(fault: Exception):
    async def fail(upload: Upload) -> dict[str, Any]:
        raise fault

    with serving(door(fail)) as server:
        answer = requests.post(f"{server}/tag", data=b"1")
    assert refused(answer) in [(500, "internal"), (503, "setup")]
    assert "root" not in answer.text


def test_a_reason_of_the_tagger_is_passed_on():
    async def refuse(upload: Upload) -> dict[str, Any]:
        raise Refusal(422, "not_audio", "FFmpeg: Invalid data found")

    with serving(door(refuse)) as server:
        assert refused(requests.post(f"{server}/tag", data=b"1")) == (422, "not_audio")


def test_pages_of_other_sites_and_other_names_of_this_machine_are_refused():
    with serving(door(hosts=("127.0.0.1", "localhost"))) as server:
        other, evil = {"Origin": "https://evil.example"}, {"Host": "evil.example"}
        assert refused(requests.post(f"{server}/tag", data=b"1", headers=other)) == (403, "origin")
        assert refused(requests.post(f"{server}/tag", data=b"1", headers=evil)) == (403, "host")
        assert refused(requests.get(f"{server}/health", headers=evil)) == (403, "host")
        own = requests.post(f"{server}/tag", data=b"1", headers={"Origin": server})
        assert own.status_code == 200
        assert "access-control-allow-origin" not in own.headers


def test_an_allowed_site_may_use_the_service():
    friend = {"Origin": "https://friend.example"}
    with serving(door(origins=("https://friend.example",))) as server:
        answer = requests.post(f"{server}/tag", data=b"1", headers=friend)
        other = requests.post(f"{server}/tag", data=b"1", headers={"Origin": "https://evil.example"})
    assert answer.headers["access-control-allow-origin"] == "https://friend.example"
    assert refused(other) == (403, "origin")


@pytest.mark.parametrize(
    ("host", "counted"),
    [
        ("1.2.3.4", "1.2.3.4"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("testclient", "testclient"),
    ],
)
def test_the_rate_of_an_address_is_counted_by_client(host: str, counted: str):
    assert _address(Request({"type": "http", "client": (host, 1), "headers": []})) == counted


def test_many_questions_for_health_take_one_check():
    checks = []

    async def check() -> None:
        checks.append(1)

    with serving(door(check=check)) as server:
        answers = [requests.get(f"{server}/health") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200] * 5
    assert len(checks) < 5


def test_a_host_that_is_no_address_is_refused():
    with serving(door(hosts=("localhost",))) as server:
        answer = requests.get(f"{server}/health", headers={"Host": "[abc"})
    assert answer.status_code in (400, 403)


def test_health_fails_if_the_tagger_does_not_answer():
    async def check() -> None:
        raise RuntimeError("/root/worker died")

    with serving(door(check=check)) as server:
        answer = requests.get(f"{server}/health")
    assert refused(answer) == (503, "unhealthy")
    assert "root" not in answer.text


def wait_until(server: str, what: str, number: int) -> None:
    """Wait until /health counts so many bodies that are `receiving` or `tagging`."""
    ends_s = time.monotonic() + WAIT_S
    while requests.get(f"{server}/health").json()[what] < number:
        assert time.monotonic() < ends_s
        time.sleep(0.01)


def test_bodies_that_are_tagged_count_for_the_limit_in_memory():
    is_over = threading.Event()

    async def wait(upload: Upload) -> dict[str, Any]:
        await asyncio.to_thread(is_over.wait, WAIT_S)
        return {}

    with serving(door(wait, max_bytes=100, per_second=0)) as server, ThreadPoolExecutor(8) as pool:
        kinds = [{}, LINES] * 4
        tagged = [pool.submit(requests.post, f"{server}/tag", data=b"1" * 100, headers=kind) for kind in kinds]
        wait_until(server, "tagging", 8)
        busy = requests.post(f"{server}/tag", data=b"1" * 50)
        is_over.set()
        assert {post.result().status_code for post in tagged} == {200}
        assert requests.post(f"{server}/tag", data=b"1" * 50).status_code == 200
    assert (refused(busy), busy.headers["retry-after"]) == ((503, "busy"), "2")


def test_an_address_cannot_take_all_places_for_uploads():
    with serving(door(max_uploads_of_address=2, upload_s=WAIT_S, per_second=0)) as server:
        slow = [slow_post(server, b"1", 2) for _ in range(2)]
        wait_until(server, "receiving", 2)
        assert refused(requests.post(f"{server}/tag", data=b"1")) == (503, "busy")
        for client in slow:
            client.sendall(b"2")
            assert b"200 OK" in client.recv(100)
        assert requests.post(f"{server}/tag", data=b"1").status_code == 200


def test_a_file_that_the_browser_knows_is_not_sent_again():
    files = {"/model.onnx": StaticFile(b"model", "application/octet-stream", {"Cache-Control": "no-cache"})}
    with serving(door(files=files)) as server:
        first = requests.get(f"{server}/model.onnx")
        etag = first.headers["etag"]
        assert (first.content, first.headers["cache-control"]) == (b"model", "no-cache")
        for known in (etag, f'"other", W/{etag}'):
            again = requests.get(f"{server}/model.onnx", headers={"If-None-Match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
        other = requests.get(f"{server}/model.onnx", headers={"If-None-Match": '"other"'})
        assert (other.status_code, other.content) == (200, b"model")


def test_large_files_have_a_rate_at_which_a_page_can_load_all_of_them():
    large = StaticFile(bytes((1 << 20) + 1), "application/wasm")
    files = {"/": StaticFile(b"page", "text/html")} | {f"/{i}": large for i in range(3)}
    with serving(door(files=files, per_second=0.1)) as server:
        loaded = [requests.get(f"{server}{path}") for path in files]
        assert [file.status_code for file in loaded] == [200] * 4
        assert refused(requests.get(f"{server}/0")) == (429, "rate")
        assert requests.get(f"{server}/").status_code == 200
        assert requests.get(f"{server}/0", headers={"If-None-Match": loaded[1].headers["etag"]}).status_code == 304
        assert requests.post(f"{server}/tag", data=b"1").status_code == 200


def test_a_reverse_proxy_may_keep_its_name_or_not():
    site = "https://tags.example.org"
    with serving(door(hosts=("127.0.0.1", "localhost"), origins=(site,))) as server:
        for host in ({"Host": "tags.example.org"}, {}):
            assert requests.get(f"{server}/health", headers=host).status_code == 200
            assert requests.post(f"{server}/tag", data=b"1", headers=host | {"Origin": site}).status_code == 200
        evil = {"Host": "evil.example", "Origin": site}
        assert refused(requests.post(f"{server}/tag", data=b"1", headers=evil)) == (403, "host")
