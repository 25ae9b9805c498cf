"""The parts of the service without Ray: front, readers, networks, their scale; the file for browsers of a user."""

import argparse
import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from ray.serve.exceptions import RequestCancelledError

from ast_core.batch import Norm
from ast_core.checkpoints.onnx import save_onnx
from ast_core.errors import DataError, UserError
from jobs import serve
from pipeline.serve import web_runtime
from pipeline.serve.application import NETWORK_CALLS, SANDBOXES, Network, Reader, Scale, application
from pipeline.serve.door import StaticFile
from pipeline.serve.front import Front
from pipeline.serve.limits import Limits
from pipeline.serve.refusals import Refusal
from pipeline.serve.upload import Upload
from pipeline.tag.predictor import Member
from pipeline.tag.work import settings_for
from pipeline.train.onnx_export import OnnxForm, write_onnx
from tests.tag import stub

SETTINGS = settings_for([stub.member()], np.full(3, 0.5), window_s=1.0, hop_s=None)


def reader(tagger: Any) -> Reader:
    """A reader that tags by a function."""
    made = Reader(None, SETTINGS, stub.LABELS, 100, Limits())
    made.tagger = tagger
    return made


def test_a_fault_of_the_machine_is_logged_and_told_without_its_text(caplog: pytest.LogCaptureFixture):
    def fail(*_: object) -> None:
        raise UserError("no space in /root/tmp")

    logging.getLogger("ray.serve").addHandler(caplog.handler)
    answer = asyncio.run(reader(fail).tag(Upload(b"x")))
    assert isinstance(answer, Refusal)
    assert (answer.status, answer.reason) == (503, "setup")
    assert "root" not in answer.message
    assert "no space in /root/tmp" in caplog.text


def test_steps_come_while_a_recording_is_read_and_then_its_answer():
    def tag(upload: Upload, on_read: Any, _: Any) -> dict[str, Any]:
        on_read(1.23456)
        on_read(2.0)
        return {"answer": len(upload.body)}

    async def steps() -> list[Any]:
        return [step async for step in reader(tag).tag_in_steps(Upload(b"xyz"))]

    assert asyncio.run(steps()) == [{"read_s": 1.235}, {"read_s": 2.0}, {"answer": 3}]


def test_a_cancelled_call_of_the_network_is_no_fault():
    def tag(*_: Any) -> None:
        raise RequestCancelledError

    answer = asyncio.run(reader(tag).tag(Upload(b"x")))
    assert isinstance(answer, Refusal)
    assert answer.reason == "timeout"


def tag_while_wanted(was_given_up: threading.Event) -> Callable[..., Any]:
    """A tagger that goes on until it is told that nobody waits for the answer."""

    def tag(upload: Upload, on_read: Any, is_wanted: Callable[[], bool]) -> None:
        on_read(1.0)
        while is_wanted():
            threading.Event().wait(0.01)
        was_given_up.set()

    return tag


def test_a_recording_is_given_up_when_its_request_is_cancelled():
    async def cancel() -> None:
        request = asyncio.create_task(reader(tag_while_wanted(was_given_up)).tag(Upload(b"x")))
        await asyncio.sleep(0.05)
        request.cancel()
        assert await asyncio.to_thread(was_given_up.wait, 10)

    was_given_up = threading.Event()
    asyncio.run(cancel())


def test_a_recording_is_given_up_when_nobody_reads_its_steps():
    async def leave() -> None:
        steps = reader(tag_while_wanted(was_given_up)).tag_in_steps(Upload(b"x"))
        assert await anext(steps) == {"read_s": 1.0}
        await steps.aclose()
        assert await asyncio.to_thread(was_given_up.wait, 10)

    was_given_up = threading.Event()
    asyncio.run(leave())


def reference(value: Any) -> Any:
    """In place of a reference to an object in Ray's store."""
    there: Future[Any] = Future()
    there.set_result(value)
    return SimpleNamespace(future=lambda: there)


def test_health_is_asked_of_a_network_and_waits_for_no_batch(monkeypatch: pytest.MonkeyPatch):
    async def wait(*_: Any) -> None:
        await asyncio.sleep(60)

    async def check(what: Any) -> None:
        await asyncio.wait_for(what.check(), 10)

    monkeypatch.setattr(Network, "_score", wait)
    asyncio.run(check(Network(reference([stub.member()]), False, "cpu", 1)))
    own_front = Front.__mro__[1]  # without what Ray Serve adds
    busy, free = SimpleNamespace(check=None), SimpleNamespace(check=SimpleNamespace(remote=lambda: asyncio.sleep(0)))
    asyncio.run(check(own_front(busy, free, Limits(), reference({}), (), ()).door))


@pytest.mark.parametrize(
    ("resources", "options", "readers", "networks"),
    [
        ({"CPU": 16.0}, {}, 8, 8),
        ({"CPU": 16.0}, {"cpus_per_network": 3}, 4, 4),
        ({"CPU": 1.0}, {}, 1, 1),
        ({"CPU": 16.0, "GPU": 2.0}, {"use_gpu": True}, 14, 2),
        ({"CPU": 16.0, "GPU": 2.0}, {}, 8, 8),
        ({"CPU": 4.0}, {"use_gpu": True}, 3, 1),
        ({"CPU": 16.0, "GPU": 2.0}, {"use_gpu": True, "max_replicas": 3}, 3, 3),
    ],
)
def test_there_are_as_many_replicas_as_there_is_room_for(
    resources: dict[str, float], options: dict[str, Any], readers: int, networks: int
):
    scale = Scale.of(resources, **{"use_gpu": False, "cpus_per_network": 1, "max_replicas": None} | options)
    assert (scale.max_readers, scale.max_networks) == (readers, networks)


@pytest.fixture
def deployments(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Front, reader and network, for two networks, and a page with a file of a megabyte."""
    monkeypatch.setattr(ray, "put", lambda _: "reference")
    made = application(
        [stub.member()],
        SETTINGS,
        Limits(),
        Scale(max_networks=2),
        files={"/model.onnx": StaticFile(bytes(1 << 20), "application/octet-stream")},
        hosts=(),
        origins=(),
    )
    own = made._bound_deployment
    return [own, *(bound._bound_deployment for bound in own.init_args[:2])]


def test_two_busy_readers_ask_for_a_second_network(deployments: list[Any]):
    scaling = deployments[2]._deployment_config.autoscaling_config
    assert (scaling.max_replicas, scaling.get_target_ongoing_requests()) == (2, NETWORK_CALLS)
    assert NETWORK_CALLS < 2 * SANDBOXES


def test_models_and_files_are_no_part_of_what_ray_serve_stores(deployments: list[Any]):
    for deployment in deployments:
        assert len(deployment._replica_config.serialized_init_args) < 1 << 20
    assert deployments[0].init_args[3] == deployments[2].init_args[0] == "reference"


@pytest.fixture(scope="module")
def browser_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of `stub.member()` that takes a waveform."""
    given = stub.member()
    write_onnx(
        file := tmp_path_factory.mktemp("browser") / "given.onnx", "stub", given.model, given.config, OnnxForm(True)
    )
    return file


def page_model(file: Path, monkeypatch: pytest.MonkeyPatch, member: Member | None = None) -> bytes:
    """The model that the page of `member` loads with `--browser-model`."""
    monkeypatch.setattr(web_runtime, "read", lambda: {"ort.wasm.min.js": b"runtime"})
    args = argparse.Namespace(fetch_web_runtime=False, browser_model=str(file), checkpoint=["stub"])
    return serve._page_files(args, [member or stub.member()], SETTINGS)["/model.onnx"].content


def test_the_page_has_the_model_that_the_user_gives(
    browser_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert page_model(browser_model, monkeypatch) == browser_model.read_bytes()
    assert f"the page has {browser_model} for browsers" in capsys.readouterr().out


def test_a_model_for_browsers_of_other_classes_or_another_kind_is_refused(
    browser_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = stub.member()
    save_onnx(tmp_path / "network.onnx", given.model, given.config)
    with pytest.raises(DataError, match="takes no waveform"):
        page_model(tmp_path / "network.onnx", monkeypatch)
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(DataError, match="is no ONNX file of"):
        page_model(tmp_path / "text.onnx", monkeypatch)
    other = stub.with_labels(["low", "middle", "shrill"])
    with pytest.raises(DataError, match="has other classes than the checkpoint"):
        page_model(browser_model, monkeypatch, other)
    with pytest.raises(DataError, match="takes 100 frames, not those of the checkpoint"):
        page_model(browser_model, monkeypatch, stub.member(200))
    moved = replace(given, config=replace(given.config, norm=Norm(1.0, 2.0)))
    with pytest.raises(DataError, match="has other mean and std than the checkpoint"):
        page_model(browser_model, monkeypatch, moved)
