"""What is refused before anything is deployed."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from ray.serve.schema import ServeDeploySchema

from mqwen.data.sample import Sample
from mqwen.release.bar import Bar
from mqwen.release.canary import Answers, Canary, Comparison
from mqwen.release.client import Chat, Reply, Server, ask, check
from mqwen.release.errors import ReleaseError
from mqwen.release.service import Service, ServiceSettings

SCORES = {"exact_match": 0.5, "cider_d": 2.0, "loss": 0.25}


def test_every_missed_score_is_named() -> None:
    Bar(exact_match=0.5, cider_d=2.0, loss=0.25).check(SCORES)
    with pytest.raises(ReleaseError) as refused:
        Bar(exact_match=0.51, cider_d=3.0, loss=0.2).check(SCORES)
    assert str(refused.value) == (
        "below the bar, so nothing was deployed: exact_match is 0.5000, at least 0.51 is asked; cider_d is 2.0000, at "
        "least 3.0 is asked; loss is 0.2500, at most 0.2 is allowed"
    )
    with pytest.raises(ReleaseError, match="loss is nan, at most 9 is allowed"):
        Bar(loss=9).check(SCORES | {"loss": float("nan")})


def test_a_bar_that_everything_passes() -> None:
    Bar(loss=9).check_given()
    with pytest.raises(ReleaseError, match="no bar is given"):
        Bar().check_given()


@pytest.mark.parametrize(
    "wrong", [{"exact_match": 1.01}, {"exact_match": -0.1}, {"cider_d": 11}, {"loss": -1.0}, {"loss": float("nan")}]
)
def test_a_bar_that_nothing_can_reach(wrong: dict[str, float]) -> None:
    Bar(exact_match=1, cider_d=10, loss=0).check_given()
    with pytest.raises(ReleaseError, match=f"--bar.{next(iter(wrong)).replace('_', '-')} is .*; 0 to .* is allowed"):
        Bar(**wrong).check_given()


@pytest.mark.parametrize("wrong", [{"questions": 0}, {"allowed_drop": 1.1}, {"allowed_drop": -0.1}, {"max_tokens": 0}])
def test_a_canary_out_of_range(wrong: dict) -> None:
    Canary().check()
    with pytest.raises(ReleaseError, match=f"--canary.{next(iter(wrong)).replace('_', '-')} is "):
        Canary(**wrong).check()


def answers(replies: list[Reply], right: int) -> Answers:
    return Answers(replies, [number < right for number in range(len(replies))])


@pytest.mark.parametrize(
    ("candidate", "live", "drop", "message"),
    [
        (8, 8, 0.0, None),
        (9, 8, 0.0, None),
        (7, 8, 0.0, "of 10 canary questions the candidate answers 7 right, the live model 8"),
        (7, 8, 0.1, None),
        (6, 8, 0.1, "--canary.allowed-drop 0.1 allows no such drop"),
        (0, None, 0.0, None),
    ],
)
def test_a_candidate_must_not_be_worse(candidate: int, live: int | None, drop: float, message: str | None) -> None:
    replies = [Reply("x", 1.0)] * 10
    asked = [Sample(str(number), []) for number in range(10)]
    found = Comparison(asked, answers(replies, candidate), None if live is None else answers(replies, live))
    if message is None:
        found.check(Canary(allowed_drop=drop))
    else:
        with pytest.raises(ReleaseError, match=message):
            found.check(Canary(allowed_drop=drop))


def test_a_question_without_an_answer() -> None:
    nobody = Server("http://127.0.0.1:9", "", "mine")
    replies = ask(nobody, [Chat([{"role": "user", "content": "?"}], [])] * 2, max_tokens=1)
    assert [reply.text for reply in replies] == ["", ""]
    found = Comparison([Sample("a", []), Sample("b", [])], answers(replies, 0), None)
    with pytest.raises(ReleaseError, match="2 of 2 canary questions got no answer, the first: ConnectError: "):
        found.check(Canary(allowed_drop=1))


def test_what_the_live_model_left_open_is_compared_with_nothing() -> None:
    asked = [Sample(str(number), []) for number in range(40)]
    good, failed = Reply("x", 1.0), Reply(error="429")
    # The candidate is right where the live one failed, and wrong once where that was right.
    candidate = Answers([good] * 40, [True] * 39 + [False])
    live = Answers([failed] + [good] * 39, [False] + [True] * 39)
    with pytest.raises(ReleaseError, match="of 39 canary questions the candidate answers 38 right, the live model 39"):
        Comparison(asked, candidate, live).check(Canary())
    many = Answers([failed] * 4 + [good] * 36, [False] * 40)
    with pytest.raises(ReleaseError, match="the live model left 4 of 40 canary questions without an answer"):
        Comparison(asked, candidate, many).check(Canary())


@contextmanager
def serving(said: list[tuple[int, bytes]]) -> Iterator[str]:
    """A server that says this, one after the other, whatever it is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def do_GET(self) -> None:
            status, body = said.pop(0)
            self.send_response(status)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_busy_server_is_asked_again_and_json_of_another_form_is_an_error() -> None:
    said = [(429, b"{}"), (200, b'{"choices": [{"message": {"content": "five"}}]}'), (200, b'{"choices": []}')]
    said += [(200, b"[]"), (200, b'{"choices": [{"message": {"content": null}}]}')]
    with serving(said) as url:
        chat = Chat([{"role": "user", "content": "?"}], [])
        replies = [ask(Server(url, "", "mine"), [chat], max_tokens=1)[0] for _ in range(4)]
    assert replies[0].text == "five"
    assert all(reply.error and not reply.text for reply in replies[1:])


def test_a_live_model_that_will_not_answer_the_canary_is_found_before_anything_is_computed() -> None:
    with serving([(200, b"{}"), (429, b"{}"), (401, b"{}"), (404, b"{}")]) as url:
        server = Server(url, "sk-mine", "mine")
        for _ in range(2):
            check(server)
        with pytest.raises(ReleaseError, match="MQWEN_API_KEY is no key of the live model"):
            check(server)
        with pytest.raises(ReleaseError, match=f"--service.url: {url} answers 404 to GET /v1/models"):
            check(server)
    for nobody in (url, "nonsense", "http://[", "ftp://x"):
        with pytest.raises(ReleaseError, match=r"--service.url: the live model does not answer at"):
            check(Server(nobody, "", "mine"))


GOOD = {"name": "mine", "import_path": "serve.app:build", "args": {"name": "mine"}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "serve.yaml cannot be read"),
        ("applications: [", "serve.yaml cannot be read"),
        ("[]", "must hold one application with args.name"),
        ({"applications": []}, "must hold one application"),
        ({"applications": [GOOD, GOOD]}, "must hold one application"),
        (
            {"applications": [{"args": {"name": "mine"}}]},
            "is not what Serve takes: applications.0.import_path: Field req",
        ),
        ({"applications": [GOOD], "http_options": {"port": "x"}}, "is not what Serve takes: http_options.port: "),
        ({"applications": [GOOD | {"args": {}}]}, "must hold one application with args.name"),
        ({"applications": [GOOD]}, "MQWEN_API_KEY is not set"),
        ({"applications": [GOOD | {"args": {"name": "mine", "auth": "off"}}]}, "--service.address http://127.0.0.1:9"),
        ({"applications": [GOOD], "http_options": None}, "MQWEN_API_KEY is not set"),
    ],
)
def test_a_service_that_cannot_be_used(config: object, message: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    if config is not None:
        file.write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(ReleaseError, match=message):
        Service(ServiceSettings(file, address="http://127.0.0.1:9"), "", ServeDeploySchema.model_validate)


def free_config(tmp_path: Path) -> Path:
    """A config file that needs no key."""
    file = tmp_path / "serve.yaml"
    file.write_text(json.dumps({"applications": [GOOD | {"args": {"name": "mine", "auth": "off"}}]}))
    return file


@pytest.mark.parametrize("limit", [-1.0, float("nan")])
def test_a_start_limit_out_of_range(limit: float, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match=r"--service.start-limit is .*; 0 or more seconds are allowed"):
        Service(ServiceSettings(free_config(tmp_path), start_limit=limit), "", ServeDeploySchema.model_validate)


@pytest.mark.parametrize(
    ("status", "body"), [(200, b"<html>"), (200, b"[]"), (200, b"{}"), (404, b""), (500, b"{}"), (401, b"Unauthorized")]
)
def test_what_answers_is_no_ray_dashboard_or_wants_a_token(status: int, body: bytes, tmp_path: Path) -> None:
    with serving([(status, body)]) as url, pytest.raises(ReleaseError, match=f"--service.address {url}: the Ray dash"):
        Service(ServiceSettings(free_config(tmp_path), address=url), "", ServeDeploySchema.model_validate)


def test_a_dashboard_that_is_mute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mqwen.release.service.TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(
            ReleaseError, match=f"--service.address {url}: the Ray dashboard there says no: .*timed out"
        ):
            Service(ServiceSettings(free_config(tmp_path), address=url), "", ServeDeploySchema.model_validate)


class Sick:
    """Serve's answers while the live application is ill and another one comes up."""

    def __init__(self) -> None:
        self.states: dict[str, dict] = {}

    def get_serve_details(self) -> dict:
        return {"applications": self.states}

    def deploy_applications(self, config: dict) -> None:
        for one in config["applications"]:
            status = "UNHEALTHY" if one["name"] == "old" else "RUNNING"
            self.states[one["name"]] = {
                "status": status,
                "route_prefix": one["route_prefix"],
                "deployed_app_config": one,
                "deployments": {},
            }


@pytest.fixture
def sick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Sick, Service]:
    """An ill live application `old`, another one `new` beside it."""
    found = Sick()
    monkeypatch.setattr("mqwen.release.service._Client", lambda address: found)
    service = Service(ServiceSettings(free_config(tmp_path), start_limit=0.0), "", ServeDeploySchema.model_validate)
    old, new = (GOOD | {"args": {"name": "mine"}, "name": name, "route_prefix": f"/{name}"} for name in ("old", "new"))
    found.deploy_applications({"applications": [old | {"route_prefix": "/"}, new]})
    return found, service


def test_a_sick_live_model_does_not_keep_its_replacement_away(sick: tuple[Sick, Service]) -> None:
    _, service = sick
    assert service.roll_back() == "live: new; standing by: old"
    assert service.live and service.live["name"] == "new"


def test_a_name_that_is_taken(sick: tuple[Sick, Service]) -> None:
    _, service = sick
    service.check_free("third", "/somewhere")
    with pytest.raises(ReleaseError, match=r"another application 'old' is deployed already.*another name"):
        service.check_free("old", "/somewhere")


def test_a_candidate_that_cannot_be_ended_is_named_beside_what_ended_the_release(
    sick: tuple[Sick, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    dashboard, service = sick
    monkeypatch.setattr("mqwen.release.service._with_upload", lambda runtime_env: runtime_env)

    def gone(config: dict) -> None:
        raise ConnectionError("nobody there")

    with (
        pytest.raises(ReleaseError, match=r"worse; then application 'third' could not be ended, .*: nobody there"),
        service.candidate("third", "/somewhere"),
    ):
        monkeypatch.setattr(dashboard, "deploy_applications", gone)
        raise ReleaseError("worse")
