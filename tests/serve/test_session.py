"""Ray Serve for the duration of a service: it disturbs no other application, and leaves nothing on the cluster."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.serve.schema import ServeStatus

from ast_core.errors import ConfigError, UserError
from pipeline.serve.session import serve_session


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of Ray Serve that change something, in place of Ray Serve. Nothing runs on the cluster."""
    found: list[str] = []
    for name in ("start", "run", "delete", "shutdown"):
        monkeypatch.setattr(serve, name, lambda *_, called=name, **__: found.append(called))
    monkeypatch.setattr(serve, "status", ServeStatus)
    return found


def raising(err: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise err

    return fail


def begin() -> None:
    with serve_session(None, "ast-ray", host="127.0.0.1", port=8000):
        pass


def test_a_service_ends_with_its_session(calls: list[str]):
    begin()
    assert calls == ["start", "run", "shutdown"]


@pytest.mark.parametrize("running", [{"applications": {"chat": None}}, {"proxies": {"node": None}}])
def test_a_cluster_where_ray_serve_runs_already_is_refused_and_left_alone(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, running: dict[str, Any]
):
    monkeypatch.setattr(serve, "status", lambda: ServeStatus(**running))
    with pytest.raises(ConfigError, match=r"already runs on this cluster .*end it with `serve shutdown`"):
        begin()
    assert calls == []


def test_applications_that_others_have_added_stay(calls: list[str], monkeypatch: pytest.MonkeyPatch):
    with serve_session(None, "ast-ray", host="127.0.0.1", port=8000):
        both: Any = ServeStatus(applications=dict.fromkeys(("ast-ray", "chat")))  # type: ignore[arg-type]
        monkeypatch.setattr(serve, "status", lambda: both)
    assert calls == ["start", "run", "delete"]


@pytest.mark.parametrize("failing", ["start", "run"])
def test_a_service_that_does_not_start_is_one_line_and_leaves_nothing(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, failing: str
):
    failed = RuntimeError("Deploying application ast-ray failed.\nTraceback:\n  File x\nValueError: no such device\n")
    monkeypatch.setattr(serve, failing, raising(failed))
    with pytest.raises(UserError, match=r"^the service does not start: ValueError: no such device$"):
        begin()
    assert calls[-1] == "shutdown"


def test_the_line_has_the_error_of_the_replica(calls: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "run", raising(RuntimeError("Failed to update the deployments ['Network'].")))
    deployments = {
        "Network": SimpleNamespace(
            status="DEPLOY_FAILED", message="It failed.\nTraceback:\nValueError: no such device\n"
        ),
        "Reader": SimpleNamespace(status="UPDATING", message=""),
    }
    running: Any = ServeStatus()
    started: Any = ServeStatus(applications={"ast-ray": SimpleNamespace(deployments=deployments)})
    monkeypatch.setattr(serve, "status", lambda: started if calls else running)
    with pytest.raises(UserError, match=r"^the service does not start: ValueError: no such device$"):
        begin()
    assert calls == ["start", "shutdown"]


def test_a_service_that_is_stopped_while_it_starts_leaves_nothing(calls: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "run", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        begin()
    assert calls == ["start", "shutdown"]
