"""The doctor on this machine, against loopback endpoints: findings with fixes, no key shown, nothing sent unasked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from router_cli import doctor, machine
from router_cli.doctor import Finding, examine
from router_cli.settings import load
from tests.fake_teacher import FakeTeacher, Reply

KEY = "sk-secret-0123456789abcdef"


@contextmanager
def models_endpoint(status: int = 200, body: Any = None, delay: float = 0.0) -> Iterator[tuple[str, list[str]]]:
    """A server that answers every GET with `body`; the base URL, and the paths that were asked for."""
    asked: list[str] = []
    done = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            done.wait(delay)
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        done.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may reach a hub or an index: both are told that there is none."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def settings(**chosen: Any) -> Any:
    return load({key.replace("__", "."): ("test", value) for key, value in chosen.items()}, environ={})


def endpoint(**chosen: Any) -> dict[str, Finding]:
    return {one.name: one for one in doctor._endpoint(settings(**chosen))}


def listing(*names: str) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}


def test_a_machine_without_key_gpu_and_network_gets_notes_and_fixes_and_nothing_wrong(tmp_path: Path) -> None:
    began = time.monotonic()
    found = examine(settings(train__model="org/model", models__model_dir=str(tmp_path)), ask=False)
    assert time.monotonic() - began < 15
    assert [one for one in found if one.state == "wrong"] == []
    names = [one.name for one in found]
    assert {"python", "packages", "memory", "4-bit", "number type", "disk", "key", "model", "completion"} <= set(names)
    assert names.count("model") == 2
    assert all(one.fix for one in found if one.state != "fine")
    key = next(one for one in found if one.name == "key")
    assert key.state == "note" and "is not set" in key.words
    assert "export LLM_API_KEY" in key.fix and "$env:LLM_API_KEY" in key.fix


def test_without_a_key_nobody_is_asked() -> None:
    found = endpoint(endpoint__base_url="https://api.example.invalid/v1")
    assert list(found) == ["key"]


def test_a_key_and_an_endpoint_that_has_the_model_are_fine_for_one_free_request() -> None:
    with models_endpoint(body=listing("gpt-4o", "other")) as (url, asked):
        found = endpoint(endpoint__base_url=url, endpoint__api_key=KEY)
    assert found["key"] == Finding("key", "fine", "set by test")
    assert found["endpoint"].state == "fine" and "has gpt-4o" in found["endpoint"].words
    assert asked == ["/v1/models"]


def test_a_server_on_this_machine_needs_no_key() -> None:
    with models_endpoint(body=listing("gpt-4o")) as (url, _):
        found = endpoint(endpoint__base_url=url)
    assert found["key"].state == "fine" and "none needed" in found["key"].words


def test_a_model_that_the_endpoint_does_not_list_is_told_with_its_nearest() -> None:
    with models_endpoint(body=listing("gpt-4o-mini", "llama")) as (url, _):
        found = endpoint(endpoint__base_url=url)["endpoint"]
    assert found.state == "note" and "no model gpt-4o" in found.words and "gpt-4o-mini" in found.fix


@pytest.mark.parametrize(
    ("status", "body", "words", "fix"),
    [
        (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, "refuses the key (401)", "LLM_API_KEY"),
        (403, {"error": {"message": f"no access for {KEY}"}}, "403", "what the key may do"),
        (404, {"detail": "Not Found"}, "404", "--ask"),
        (429, {"error": {"message": "slow down"}}, "429", "later"),
        (503, b"<html>down</html>", "503", "later"),
        (200, b"<html>a portal</html>", "not as a model endpoint", "/v1"),
        (200, {"data": [1]}, "not as a model endpoint", "/v1"),
    ],
)
def test_an_endpoint_that_refuses_is_a_note_with_a_fix_that_never_shows_the_key(
    status: int, body: Any, words: str, fix: str
) -> None:
    with models_endpoint(status, body) as (url, _):
        found = endpoint(endpoint__base_url=url, endpoint__api_key=KEY)
    assert found["endpoint"].state == "note"
    assert words in found["endpoint"].words and fix in found["endpoint"].fix
    assert KEY not in repr(found)


def test_an_endpoint_that_is_not_there_and_a_url_that_is_none_are_told() -> None:
    gone = endpoint(endpoint__base_url="http://127.0.0.1:9/v1")["endpoint"]
    assert gone.state == "note" and "cannot be reached" in gone.words and "LLM_API_BASE" in gone.fix
    broken = endpoint(endpoint__base_url="foo", endpoint__api_key=KEY)["endpoint"]
    assert broken.state == "note" and "must look like https://host/v1" in broken.words


def test_a_check_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NETWORK_SECONDS", 0.2)
    free = threading.Event()
    began = time.monotonic()
    collect = doctor._begin("endpoint", lambda: [Finding("late", "fine", "")] if free.wait(5) else [])
    found = collect()
    free.set()
    assert time.monotonic() - began < 2
    assert [(one.name, one.state) for one in found] == [("endpoint", "note")] and "no answer" in found[0].words


def test_a_check_that_fails_is_a_note() -> None:
    def fails() -> list[Finding]:
        raise RuntimeError(f"odd {KEY}\nthing")

    def lacks() -> list[Finding]:
        raise ModuleNotFoundError("No module named 'psutil'", name="psutil")

    (odd,) = doctor._safely("memory", fails)
    assert odd.state == "note" and "RuntimeError: odd *** thing" in odd.words
    (lacking,) = doctor._safely("memory", lacks)
    assert lacking.words == "cannot be checked without the package psutil"


def test_a_question_is_put_once_and_priced() -> None:
    with FakeTeacher(Reply(model="gpt-4o-2024-08-06")) as server:
        (found,) = doctor._question(settings(endpoint__base_url=server.url))
    assert len(server.calls) == 1
    assert found.state == "fine" and "gpt-4o-2024-08-06 decided: " in found.words and "$0.00" in found.words


def test_a_question_with_a_useless_answer_or_a_refusal_is_a_note() -> None:
    with FakeTeacher(Reply("hello")) as server:
        (useless,) = doctor._question(settings(endpoint__base_url=server.url))
    assert len(server.calls) == 1
    assert useless.state == "note" and "no usable decision" in useless.words
    with FakeTeacher(Reply(status=401)) as server:
        (refused,) = doctor._question(settings(endpoint__base_url=server.url, endpoint__api_key=KEY))
    assert refused.state == "note" and "401" in refused.words and "LLM_API_KEY" in refused.fix


def test_models_are_told_to_be_here_or_not(tmp_path: Path) -> None:
    folder, no_folder = tmp_path / "model", tmp_path / "nothing"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    chosen = settings(models__model_dir=str(tmp_path / "cache"))
    (here,) = doctor._model(str(folder), chosen)
    assert here.state == "fine" and str(folder) in here.words
    (gone,) = doctor._model(str(no_folder), chosen)
    assert gone.state == "note" and "no such model folder" in gone.words and gone.fix
    (offline,) = doctor._model("org/model", chosen)
    assert offline.state == "note" and "HF_HUB_OFFLINE" in offline.words and "smollm2-135m" in offline.fix
    kept = tmp_path / "cache" / "router" / "smollm2-135m"
    assert doctor._model("smollm2-135m", chosen)[0].state == "note"
    kept.mkdir(parents=True)
    (kept / "config.json").write_text("{}")
    assert doctor._model("smollm2-135m", chosen)[0].state == "fine"


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution of this program's name on the path, with its METADATA to be written."""
    folder = tmp_path / "site" / "router_cli-9.dist-info"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder / "METADATA"


def test_missing_and_outdated_packages_are_told_with_the_command(distribution: Path) -> None:
    distribution.write_text(
        "Metadata-Version: 2.4\nName: router-cli\nVersion: 9\nRequires-Python: >=3.99\n"
        "Requires-Dist: pydantic>=2\nRequires-Dist: rich>=1000,<2000\nRequires-Dist: no-such-package-xyz<2,>=1\n"
        "Requires-Dist: bitsandbytes>=1000; sys_platform == 'nowhere'\nRequires-Dist: also-not-there; extra == 'dev'\n"
    )
    missing = next(one for one in machine.packages() if one.state == "wrong")
    assert missing.words == "no-such-package-xyz is not installed"
    assert missing.fix in ('pip install "no-such-package-xyz<2,>=1"', 'pip install "no-such-package-xyz>=1,<2"')
    old = next(one for one in machine.packages() if one.state == "note")
    assert old.words.startswith("rich ") and "outside" in old.words and "pip install" in old.fix
    assert len(machine.packages()) == 2
    (python,) = machine.python()
    assert python.state == "wrong" and python.fix == "install Python >=3.99"


def test_a_full_or_forbidden_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    chosen = settings(models__model_dir=str(file / "below"), train__output_dir=str(tmp_path / "out"))
    models, outputs = machine.disk(chosen)
    assert models.state == "note" and "cannot be written to" in models.words and "--model-dir" in models.fix
    assert outputs.state == "fine"
    monkeypatch.setattr(machine, "DISK_GB", 1e9)
    little, _ = machine.disk(settings(models__model_dir=str(tmp_path)))
    assert little.state == "note" and "make room" in little.fix
