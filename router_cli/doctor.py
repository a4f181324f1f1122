"""`router doctor`: what this machine has, what it lacks, and what to do about it. Works offline, and costs nothing.

Whatever waits for a network runs in threads while the rest is looked at, and is given up after `NETWORK_SECONDS`: a
resolver without a network can hang far longer than any time-out of an HTTP client.
"""

from __future__ import annotations

import asyncio
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

from router_cli import costs, machine, models
from router_cli.backends import space_from
from router_cli.errors import ModelError, RouterError, SettingsError
from router_cli.machine import Finding
from router_cli.progress import SILENT, Progress
from router_cli.schema import Task
from router_cli.sections import SMALL_MODEL
from router_cli.settings import Settings, nearest
from router_cli.teachers.endpoint import api_key, fault, is_local, shorten, shown

__all__ = ["Finding", "examine"]

NETWORK_SECONDS = 8.0
OPENAI_URL = "https://api.openai.com/v1"

Check = Callable[[], list[Finding]]


def examine(settings: Settings, ask: bool = False, progress: Progress = SILENT) -> list[Finding]:
    """Look at Python, packages, hardware, disk, key, endpoint and models; with `ask`, put one question to the teacher.

    Nothing is downloaded, no key is shown, and without a key nothing is sent to a paid endpoint. Raises nothing.
    """
    names = list(dict.fromkeys((settings.train.model, SMALL_MODEL)))
    waiting = {
        "endpoint": _begin("endpoint", partial(_endpoint, settings)),
        **{name: _begin("model", partial(_model, name, settings)) for name in names},
    }
    checks: list[tuple[str, Check]] = [
        ("python", machine.python),
        ("packages", machine.packages),
        ("memory", machine.memory),
        ("gpu", machine.gpu),
        ("disk", partial(machine.disk, settings)),
        ("endpoint", waiting["endpoint"]),
        *(("model", waiting[name]) for name in names),
        ("completion", machine.completion),
    ]
    if ask:
        checks.insert(6, ("question", partial(_question, settings)))
    found: list[Finding] = []
    with progress.bar("doctor", len(checks)) as bar:
        for name, check in checks:
            found += _safely(name, check)
            bar.advance(status=name)
    return found


def _safely(name: str, check: Check) -> list[Finding]:
    try:
        return check()
    except ModuleNotFoundError as error:
        return [Finding(name, "note", f"cannot be checked without the package {error.name}")]
    except Exception as error:  # a doctor that falls ill is of no use
        return [Finding(name, "note", f"cannot be checked: {type(error).__name__}: {_line(error)}")]


def _begin(name: str, check: Check) -> Check:
    """Start `check` in a thread that nobody has to wait for; the result collects it within the time left."""
    answers: queue.SimpleQueue[list[Finding]] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(_safely(name, check)), daemon=True).start()
    until = time.monotonic() + NETWORK_SECONDS

    def collect() -> list[Finding]:
        try:
            return answers.get(timeout=max(0.1, until - time.monotonic()))
        except queue.Empty:
            return [Finding(name, "note", f"no answer within {NETWORK_SECONDS:.0f} seconds", "check the network")]

    return collect


def _line(error: BaseException) -> str:
    """An unexpected failure in one line, without anything shaped like a key."""
    return shorten(" ".join(str(error).split()), "")


# -- the endpoint -------------------------------------------------------------------------------------------------


def _endpoint(settings: Settings) -> list[Finding]:
    """The key, and whether the endpoint knows it and the model: one free request, GET /models."""
    url = settings.endpoint.base_url or OPENAI_URL
    try:
        key = api_key(settings, url)
    except SettingsError as error:
        return [Finding("endpoint", "note", str(error), "set LLM_API_BASE or pass --base-url")]
    except RouterError as error:
        words, _, fix = str(error).partition(": ")
        return [Finding("key", "note", words, fix)]
    if settings.endpoint.api_key is None:
        said = Finding("key", "fine", "none needed for a server on this machine")
    else:
        said = Finding("key", "fine", f"set by {settings.origin('endpoint.api_key')}")
    return [said, _reach(settings, url, key)]


def _reach(settings: Settings, url: str, key: str) -> Finding:
    import openai

    name, model = "endpoint", settings.label.model
    try:
        with (
            openai.DefaultHttpxClient(trust_env=not is_local(url)) as http,
            openai.OpenAI(
                api_key=key, base_url=url, max_retries=0, timeout=NETWORK_SECONDS - 2, http_client=http
            ) as client,
        ):
            text = client.models.with_raw_response.list().http_response.text
    except openai.APIStatusError as error:
        said = fault(error.status_code, {}, error.response.text)
        return _refused(error.status_code, shown(url), shorten(said.words, key))
    except openai.APIConnectionError as error:
        words = f"{shown(url)} cannot be reached ({shorten(_line(error.__cause__ or error), key)})"
        return Finding(name, "note", words, "check the base URL (LLM_API_BASE) and the network")
    try:
        listed = [str(one["id"]) for one in json.loads(text)["data"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        fix = "check the base URL (LLM_API_BASE): it mostly ends in /v1"
        return Finding(name, "note", f"{shown(url)} answers, but not as a model endpoint", fix)
    if model not in listed:
        fix = f"choose one of its models with `router label --model`{nearest(model, listed)}"
        return Finding(name, "note", f"{shown(url)} answers, but lists no model {model}", fix)
    return Finding(name, "fine", f"{shown(url)} answers and has {model}")


def _refused(status: int, url: str, words: str) -> Finding:
    if status == 401:
        # The endpoint's own words often quote the key.
        return Finding("endpoint", "note", f"{url} refuses the key (401)", "set LLM_API_KEY to a key valid there")
    if status == 404:
        fix = "`router doctor --ask` asks it a real question; if that fails, check the base URL (LLM_API_BASE)"
        return Finding("endpoint", "note", f"{url} answers, but lists no models (404)", fix)
    fix = "try again later" if status == 429 or status >= 500 else "check what the key may do, and the base URL"
    return Finding("endpoint", "note", f"{url} refuses ({status}: {words})", fix)


def _question(settings: Settings) -> list[Finding]:
    """One real question to the teacher, as `router label` puts it."""
    from router_cli.teachers.openai import OpenAITeacher

    settings = settings.with_values(label__reask=0, endpoint__retries=1)

    async def put() -> Finding:
        teacher = OpenAITeacher(settings)
        started = time.monotonic()
        try:
            task = Task(id="doctor", text="Sort a list of integers.")
            answer = await teacher.ask(task, space_from(settings), "balanced")
        finally:
            await teacher.close()
        spent = f"{time.monotonic() - started:.1f} s, {costs.dollars(answer.usage.cost_usd)}"
        if answer.decision is None:
            words = f"{teacher.model} gave no usable decision: {answer.violations[0].text} ({spent})"
            return Finding("question", "note", words, "try another model with `router label --model`")
        return Finding("question", "fine", f"{answer.model} decided: {answer.decision.topology} ({spent})")

    try:
        return [asyncio.run(put())]
    except RouterError as error:
        words, _, fix = str(error).rpartition(": ")
        return [Finding("question", "note", words or fix, fix if words else "")]


# -- models -------------------------------------------------------------------------------------------------------


def _model(name: str, settings: Settings) -> list[Finding]:
    """Whether the base model `name` is here, or where it would come from."""
    alias = models.ALIASES.get(name)
    hub_id = alias.hub_id if alias else models.RENAMED.get(name, name)
    try:
        if here := models.at_hand(name, settings):
            return [Finding("model", "fine", f"{name} is on this machine: {here.folder}")]
        try:
            models.hub_revision(hub_id, settings, NETWORK_SECONDS - 3)
        except ModelError:
            if alias and _on_index(alias.requirement):
                return [Finding("model", "fine", f"{name} can be had as the package {alias.requirement}")]
            raise
    except ModelError as error:
        words, _, fix = str(error).partition("; ")
        return [Finding("model", "note", words, fix or f"pass a model folder, a .gguf file or {SMALL_MODEL}")]
    return [Finding("model", "fine", f"the Hub has {hub_id}" + (f", meant by {name}" if hub_id != name else ""))]


def _on_index(requirement: str) -> bool:
    """Whether pip's own index, as the user has it configured, lists the package in that version; fetches nothing."""
    name, _, version = requirement.partition("==")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--timeout=4", "--retries=0", "index"]
    try:
        done = subprocess.run(
            [*command, "versions", name], capture_output=True, text=True, check=False, timeout=NETWORK_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return version in done.stdout.replace(",", " ").split()
