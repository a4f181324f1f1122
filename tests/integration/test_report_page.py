"""The reports in a real browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router_cli.evaluate import evaluate
from router_cli.jsonl import write_rows
from router_cli.replay import replay
from router_cli.settings import load
from tests import browser
from tests.unit.test_evaluate import labels, right
from tests.unit.test_replay import predictions, runs

needs_chromium = pytest.mark.skipif(browser.CHROMIUM is None, reason=browser.MISSING)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_rows(folder / "p.jsonl", right(60, wrong=9))
    write_rows(folder / "q.jsonl", right(60, wrong=25))
    write_rows(folder / "labels.jsonl", [*labels(), *labels(12, "train", start=500)])
    log = [{"step": step, "loss": 2.0 / step, "eval_loss": 2.2 / step} for step in range(1, 9)]
    (folder / "loss.json").write_text(json.dumps(log))
    given = {"predictions": "p.jsonl", "labels": "labels.jsonl", "compare": f"other={folder / 'q.jsonl'}"}
    options = {
        f"eval.{name}": ("", value if name == "compare" else str(folder / value)) for name, value in given.items()
    }
    evaluate(
        load({**options, "eval.output_dir": ("", str(folder)), "eval.resamples": ("", 200)}),
        loss_log=folder / "loss.json",
    )
    return folder / "report.html"


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_every_picture_is_to_be_seen_and_the_console_is_silent(report: Path, dark: bool) -> None:
    seen = browser.look(report, dark)
    assert seen.console == []
    assert seen.overflow <= 0, "the page is wider than the window"
    assert (seen.brightness < 60) == dark, "the page follows light and dark"
    kinds = [picture.label.split()[0] for picture in seen.pictures]
    assert {"Confusion", "Reliability", "Risk-coverage", "Cost", "Loss"} == set(kinds)
    for picture in seen.pictures:
        assert picture.whole, f"{picture.label} is cut off"
        assert picture.drawn > 0.01 and picture.colours > 10, f"{picture.label} is blank"


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_of_a_replay_shows_its_picture_and_its_metrics(tmp_path: Path, dark: bool) -> None:
    write_rows(tmp_path / "p.jsonl", predictions())
    write_rows(tmp_path / "o.jsonl", runs())
    given = {"outcomes": tmp_path / "o.jsonl", "predictions": tmp_path / "p.jsonl", "output_dir": tmp_path}
    options = {f"eval.{name}": ("", str(value)) for name, value in given.items()}
    replay(load({**options, "eval.resamples": ("", 200), "eval.unsolved_penalty": ("", 3)}))
    seen = browser.look(tmp_path / "report.html", dark)
    assert (seen.console, seen.brightness < 60) == ([], dark) and seen.overflow <= 0
    (picture,) = seen.pictures
    assert picture.label.startswith("Solved share by US dollars") and picture.whole
    assert picture.drawn > 0.01 and picture.colours > 10
