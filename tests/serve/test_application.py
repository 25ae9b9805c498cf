"""A reader of the service, without Ray, and the file for browsers that a user gives."""

import argparse
import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ast_core.batch import Norm
from ast_core.checkpoints.onnx import save_onnx
from ast_core.errors import DataError, UserError
from jobs import serve
from pipeline.serve import web_runtime
from pipeline.serve.application import Reader
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
    def tag(upload: Upload, on_read: Any) -> dict[str, Any]:
        on_read(1.23456)
        on_read(2.0)
        return {"answer": len(upload.body)}

    async def steps() -> list[Any]:
        return [step async for step in reader(tag).tag_in_steps(Upload(b"xyz"))]

    assert asyncio.run(steps()) == [{"read_s": 1.235}, {"read_s": 2.0}, {"answer": 3}]


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
