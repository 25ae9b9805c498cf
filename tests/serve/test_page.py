"""The page in a real browser: a dropped file and the microphone get the right class, also without a network."""

import base64
import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ast_core.checkpoints.onnx import save_onnx
from ast_core.checkpoints.onnx_waveform import save_onnx_waveform
from pipeline.serve import web_runtime
from pipeline.serve.browser_model import page_model
from pipeline.serve.limits import Limits
from pipeline.serve.page import page_files
from pipeline.serve.recording_tagger import RecordingTagger
from pipeline.tag.events import EventSettings
from pipeline.tag.predictor import Predictor
from pipeline.tag.work import TagSettings, settings_for
from tests import fakes
from tests.browser import Browser, browser, needs_browser
from tests.pages import Page
from tests.serve.server import door, in_thread, serving
from tests.tag import stub

RUNTIME = web_runtime.read()
FAKE_MICROPHONE = ("use-fake-device-for-media-stream", "use-fake-ui-for-media-stream")
needs_runtime = pytest.mark.skipif(RUNTIME is None, reason="no onnxruntime-web; jobs/serve.py --fetch-web-runtime")


def settings() -> TagSettings:
    return settings_for([stub.member()], np.full(3, 0.5), window_s=1.0, hop_s=1.0, events=EventSettings())


def files(onnx: bytes | None) -> dict[str, object]:
    return page_files(page_model("stub", [stub.member()], settings()), onnx, RUNTIME)


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The stub for browsers."""
    folder, member = tmp_path_factory.mktemp("onnx"), stub.member()
    save_onnx(folder / "network.onnx", member.model, member.config)
    save_onnx_waveform(folder / "tagger.onnx", folder / "network.onnx", member.config, thresholds=[0.5] * 3)
    return (folder / "tagger.onnx").read_bytes()


@pytest.fixture(scope="module")
def tone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds of the class `middle` from second 2 on, in quiet noise."""
    waveform = fakes.noise(8.0) / 150
    waveform[32_000:96_000] += fakes.tone(stub.FREQS_HZ[1], 4.0) / 4
    return fakes.write_media(tmp_path_factory.mktemp("tone") / "tone.wav", waveform)


@contextlib.contextmanager
def page(onnx: bytes | None, profile: Path, *options: str) -> Iterator[tuple[Browser, contextlib.ExitStack]]:
    """The page in Chromium, when it is ready. The second value's `close` stops the server."""
    predictor = Predictor([stub.member()], torch.device("cpu"), embeddings=False, frames=False)
    tagger = RecordingTagger(settings(), stub.LABELS, predictor, Limits(), num_readers=1)
    with contextlib.ExitStack() as server, browser(profile, *options) as opened:
        server.callback(tagger.stop)
        url = server.enter_context(serving(door(in_thread(tagger), files=files(onnx), per_second=0)))
        opened.open(url)
        wait_for(opened, "document.body.dataset.ready")
        yield opened, server


def wait_for(opened: Browser, condition: str) -> None:
    opened.run(
        "const ends = performance.now() + 20000;"
        f"while (!({condition})) {{"
        f"  if (performance.now() > ends) throw new Error({condition!r} + ': ' + document.body.innerText);"
        "  await new Promise(next => setTimeout(next, 20)); }"
    )


def drop(opened: Browser, file: Path) -> None:
    content = base64.b64encode(file.read_bytes()).decode()
    opened.run(
        f"const bytes = Uint8Array.from(atob('{content}'), one => one.charCodeAt(0));"
        f"const data = new DataTransfer(); data.items.add(new File([bytes], '{file.name}'));"
        "delete document.body.dataset.done;"
        "document.dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true }));"
    )
    wait_for(opened, "document.body.dataset.done")


def top(opened: Browser) -> list[str]:
    return opened.run("return [...document.querySelectorAll('#top li span:first-child')].map(one => one.textContent)")


def events(opened: Browser) -> list[list[str]]:
    return opened.run(
        "return [...document.getElementById('events').rows].map(row => [...row.cells].map(cell => cell.textContent))"
    )


def test_the_page_loads_nothing_from_other_hosts_and_names_no_path():
    html = files(None)["/"].content.decode()
    assert all(address.startswith("#") for address in Page(html).loads)
    assert str(Path.home()) not in html
    assert set(files(None)) == {"/"}


@needs_browser
def test_a_dropped_file_is_tagged_by_the_server(tone: Path, tmp_path: Path):
    with page(None, tmp_path) as (opened, _):
        drop(opened, tone)
        assert top(opened)[0] == "middle"
        assert events(opened) == [["0:02.0", "0:06.0", "middle", "0.953"]]
        assert "scored by the server" in opened.run("return document.getElementById('status').textContent")
        bad = tmp_path / "bad.wav"
        bad.write_text("no sound")
        drop(opened, bad)
        assert "FFmpeg" in opened.run("return document.getElementById('status').textContent")
        assert [line for line in opened.console() if "422" not in line] == []


@needs_browser
def test_the_page_says_which_part_of_a_recording_is_lost(tmp_path: Path):
    whole = fakes.write_media(tmp_path / "tone.flac", fakes.tone(1000.0, 30.0)).read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    with page(None, tmp_path) as (opened, _):
        drop(opened, tmp_path / "cut.flac")
        assert "; not read from 0:1" in opened.run("return document.getElementById('status').textContent")


@pytest.mark.slow
@needs_browser
@needs_runtime
def test_the_model_in_the_browser_tags_without_the_server(tone: Path, onnx: bytes, tmp_path: Path):
    with page(onnx, tmp_path) as (opened, server):
        said = opened.run("return document.getElementById('speed').textContent")
        assert "ms in this browser" in said
        assert "is faster" in said
        opened.run("document.getElementById('engine').value = 'server'; document.getElementById('engine').onchange()")
        server.close()
        drop(opened, tone)
        assert top(opened)[0] == "middle"
        assert events(opened) == [["0:02.0", "0:06.0", "middle", "0.953"]]
        assert "scored by this browser" in opened.run("return document.getElementById('status').textContent")
        assert [line for line in opened.console() if "ERR_CONNECTION_REFUSED" not in line] == []


@pytest.mark.slow
@needs_browser
@needs_runtime
def test_the_microphone_is_tagged_live(tone: Path, onnx: bytes, tmp_path: Path):
    with page(onnx, tmp_path, *FAKE_MICROPHONE, f"use-file-for-fake-audio-capture={tone}") as (opened, server):
        server.close()
        opened.run("document.getElementById('engine').value = 'browser'; document.getElementById('engine').onchange()")
        opened.run("document.getElementById('microphone').click()")
        wait_for(opened, "document.querySelector('#top li:not(.off) span')?.textContent === 'middle'")
        opened.run("document.getElementById('microphone').click()")
        wait_for(opened, "document.getElementById('status').textContent.startsWith('stopped')")
        assert events(opened)[0][2] == "middle"
        assert opened.console() == []


@needs_browser
def test_a_microphone_of_another_rate_than_the_models_is_tagged(tone: Path, tmp_path: Path):
    with page(None, tmp_path, *FAKE_MICROPHONE, f"use-file-for-fake-audio-capture={tone}") as (opened, _):
        opened.run(  # as in browsers that do not resample microphones
            "const own = AudioContext.prototype.createMediaStreamSource;"
            "AudioContext.prototype.createMediaStreamSource = function (stream) {"
            "  if (this.sampleRate === RATE) throw new Error('another rate than the microphone');"
            "  return own.call(this, stream); };"
            "document.getElementById('microphone').click()"
        )
        wait_for(opened, "document.querySelector('#top li:not(.off) span')?.textContent === 'middle'")
        assert opened.run("return live.context.sampleRate !== RATE")
        assert opened.console() == []


@needs_browser
def test_a_microphone_that_comes_too_late_or_never_is_not_used(tone: Path, tmp_path: Path):
    with page(None, tmp_path, *FAKE_MICROPHONE) as (opened, _):
        opened.run(
            "const own = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);"
            "navigator.mediaDevices.getUserMedia = async (wanted) => {"
            "  window.stream = await own(wanted);"
            "  await new Promise((resolve) => { window.allow = resolve; });"
            "  return window.stream; };"
            "document.getElementById('microphone').click()"
        )
        wait_for(opened, "window.allow")
        drop(opened, tone)
        opened.run("window.allow()")
        wait_for(opened, "window.stream.getTracks().every((track) => track.readyState === 'ended')")
        assert "scored by the server" in opened.run("return document.getElementById('status').textContent")
        opened.run(  # as in a page over plain http from another machine
            "Object.defineProperty(navigator, 'mediaDevices', { value: undefined });"
            "document.getElementById('microphone').click()"
        )
        said = opened.run("return document.getElementById('status').textContent")
        assert said == "browsers give the microphone only to pages over https or on this machine"
