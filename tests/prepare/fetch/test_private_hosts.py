"""C24 of the review: rows of a list lead to public addresses only."""

import socket
from pathlib import Path

import pytest

from pipeline.prepare.clip import ClipError, Reason
from pipeline.prepare.fetch.private_hosts import (
    PrivateAddressError,
    check_name,
    endpoint_of,
    is_public,
    public_hosts_only,
)
from pipeline.prepare.fetch.ytdlp import fetch_with_ytdlp
from pipeline.prepare.fetch.ytdlp_settings import YtDlp
from tests import fakes
from tests.bad_host import BadHost


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "127.8.8.8",
            "0.0.0.0",
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "100.64.0.1",
            "169.254.169.254",
        ),
        *("224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fd00:ec2::254", "ff02::1"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::", "64:ff9b::a9fe:a9fe"),
    ],
)
def test_private_addresses(address: str):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address: str):
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    ["http://10.0.0.1/x", "http://[::1]:80/x", "http://localhost/x", "http://LOCALHOST./x", "http://a.internal/x"],
)
def test_urls_with_private_addresses_are_refused_behind_a_proxy_too(url: str):
    with pytest.raises(PrivateAddressError):
        check_name(url, ())
    check_name(url, (endpoint_of(url),))
    check_name("https://example.org/x", ())


@pytest.fixture
def host(tmp_path: Path):
    fakes.write_media(tmp_path / "sound.webm", fakes.noise(5))
    with BadHost(tmp_path) as elsewhere, BadHost(tmp_path, elsewhere=f"{elsewhere.url}/good") as host:
        host.other = elsewhere
        yield host


def refused(url: str, **settings: object) -> bool:
    try:
        fetch_with_ytdlp(url, 1.0, 2.0, settings=YtDlp(timeout_s=20, **settings))
    except ClipError as err:
        return err.reason is Reason.PRIVATE_HOST and not err.reason.retry and "--allow-private-hosts" in err.message
    return False


def test_a_row_that_names_a_private_host_sends_no_request(host: BadHost, monkeypatch: pytest.MonkeyPatch):
    port = endpoint_of(host.url)[1]
    for name in ("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "[::ffff:127.0.0.1]"):
        assert refused(f"http://{name}:{port}/good/sound"), name
    asked = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, *rest, **more: asked("127.0.0.1", *rest, **more))
    assert refused(f"http://media.example.org:{port}/good/sound")  # its name resolves to this machine
    assert host.requests == []


def test_hosts_that_the_user_names_or_allows_are_used(host: BadHost):
    assert not refused(f"{host.url}/good/sound", own_hosts=(endpoint_of(host.url),))
    assert not refused(f"{host.url}/good/sound", allow_private_hosts=True)


def test_a_redirect_to_another_private_host_is_refused(host: BadHost):
    own = (endpoint_of(host.url),)
    assert refused(f"{host.url}/redirect/sound", own_hosts=own)
    assert host.other.requests == []
    assert not refused(f"{host.url}/redirect/sound", own_hosts=(*own, endpoint_of(host.other.url)))


def test_the_users_proxy_may_be_private(host: BadHost):
    ytdlp = YtDlp.from_args(["--proxy", host.url], timeout_s=20)
    assert len(fetch_with_ytdlp("http://example.org/sound", 1.0, 2.0, settings=ytdlp)) == 2 * 16_000
    assert {request.path for request in host.requests} == {"http://example.org/sound"}
    with pytest.raises(ClipError) as caught:
        fetch_with_ytdlp("http://10.0.0.1/sound", 1.0, 2.0, settings=ytdlp)
    assert caught.value.reason is Reason.PRIVATE_HOST


@pytest.mark.parametrize("prefix", ["http://", "//", ""])
def test_a_proxy_of_the_environment_needs_no_scheme(host: BadHost, prefix: str, monkeypatch: pytest.MonkeyPatch):
    """curl takes `HTTP_PROXY=10.0.0.1:3128`, and so does yt-dlp."""
    monkeypatch.setenv("http_proxy", prefix + host.url.removeprefix("http://"))
    monkeypatch.setenv("no_proxy", "intranet.example.org,10.0.0.1")
    settings = YtDlp(timeout_s=20)
    assert len(fetch_with_ytdlp("http://example.org/sound", 1.0, 2.0, settings=settings)) == 2 * 16_000
    assert {request.path for request in host.requests} == {"http://example.org/sound"}
    without_proxy = YtDlp.from_args(["--proxy", ""], timeout_s=20)
    with pytest.raises(ClipError) as caught:
        fetch_with_ytdlp(f"{host.url}/good/sound", 1.0, 2.0, settings=without_proxy)
    assert caught.value.reason is Reason.PRIVATE_HOST


def test_the_check_ends_with_its_context(host: BadHost):
    address = ("127.0.0.1", endpoint_of(host.url)[1])
    with public_hosts_only(()), pytest.raises(PrivateAddressError):
        socket.create_connection(address)
    socket.create_connection(address).close()
