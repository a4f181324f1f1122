"""The figures that a running training shows."""

from __future__ import annotations

import time

import pytest

from router_cli.training.figures import Figures


def test_loss_topology_rate_tokens_memory_and_money(monkeypatch: pytest.MonkeyPatch) -> None:
    at = Figures(tokens=1000, price=3.6)
    at.begin(epoch=1.0)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 100)
    said = at.words({"loss": 1.23456, "topology_accuracy": 0.75, "learning_rate": 2e-4}, epoch=2.5)
    loss, topology, rate, tokens, memory, money = said.split(", ")
    assert (loss, topology, rate, money) == ("loss 1.235", "topology 75% right", "lr 2.0e-04", "$0.10")
    # One and a half epochs since it began, not all of them.
    assert tokens == "15 tokens/s" and memory.endswith(" GB") and float(memory.split()[0]) > 0


def test_without_a_price_there_is_no_money_and_what_a_log_lacks_stays() -> None:
    at = Figures(tokens=10, price=None)
    at.begin(0.0)
    assert at.words({"loss": 1.0, "learning_rate": 1e-4}, 0.5).count(",") == 3
    said = at.words({"loss": 2.0}, 1.0)
    assert said.startswith("loss 2.000, lr 1.0e-04, ") and "$" not in said and "right" not in said


def test_several_processes_cost_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    at = Figures(tokens=10, price=3600.0)
    at.begin(0.0)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 10)
    assert at.words({}, 1.0).endswith("$80.00")


def test_what_was_trained_before_an_interruption_is_paid_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    at = Figures(tokens=10, price=3600.0, earlier=50.0)
    at.begin(0.0)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 10)
    assert at.words({}, 1.0).endswith("$60.00") and at.seconds == pytest.approx(60, abs=0.1)
