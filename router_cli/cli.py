"""The commands: each calls one verb. `main` is the only place where failures become lines and exit codes."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from router_cli import __version__, options
from router_cli.console import Console
from router_cli.errors import RouterError
from router_cli.options import Call, with_settings
from router_cli.settings import Settings

INTERRUPTED = 130

SPACE = ("decision.roles", "decision.topologies", "decision.step_bound")
ENDPOINT = ("endpoint.base_url", "endpoint.timeout", "endpoint.retries")
# Without the token: what stands on a command line, every user of the machine can read.
SERVER = ("host", "port", "name", "queue", "batch_wait_ms", "max_body", "time_limit", "drain")
DECIDER = ("adapter", "base", "backend", "model", "batch_size", "alternatives", "value_of_solving", "price")
UNSURE = ("min_confidence", "target_agreement", "target_cost", "fallback")
SERVING = (*(f"serve.{name}" for name in SERVER), *(f"infer.{name}" for name in (*DECIDER, *UNSURE)))
EXECUTING = ("run.worker_model", "run.concurrency", "run.max_cost", "endpoint.base_url", "endpoint.timeout")
BASES = ("models.model_dir", "models.hf_token", "models.dtype")

app = typer.Typer(
    name="router",
    help="Learn which formation of LLM agents a coding task needs: label, train, infer, eval.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Look at the settings.", no_args_is_help=True)
app.add_typer(config_app, name="config", rich_help_panel="Around it")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"router {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, metavar="", help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel="The loop")
@with_settings("label", *SPACE, *ENDPOINT)
def label(call: Call) -> int:
    """Ask a teacher for a routing decision for every task, and write training rows."""
    from router_cli import audit
    from router_cli.from_outcomes import label_from_outcomes, wanted
    from router_cli.label import estimate, label
    from router_cli.summaries.label import audited, estimated, labelled, outcome_labelled

    if wanted(call.settings) and not call.settings.label.audit:
        call.console.result(*outcome_labelled(label_from_outcomes(call.settings, call.console)))
        return 0
    if call.settings.label.dry_run:
        foresee = audit.estimate if call.settings.label.audit else estimate
        call.console.result(*estimated(foresee(call.settings, call.console)))
        return 0
    if call.settings.label.audit:
        found = audit.audit(call.settings, call.console, call.console.confirm)
        call.console.result(*audited(found))
        return 0 if found.complete else 3
    result = label(call.settings, call.console, call.console.confirm)
    call.console.result(*labelled(result))
    return 0 if result.complete else 3


@app.command(rich_help_panel="The loop")
@with_settings("train", *SPACE, *BASES)
def train(call: Call) -> None:
    """Fine-tune a small model on labels: QLoRA on a GPU, LoRA on a CPU."""
    from router_cli import ranks
    from router_cli.summaries.footprint import foreseen
    from router_cli.summaries.train import trained
    from router_cli.train import estimate, train

    if call.settings.train.estimate:
        call.console.result(*foreseen(estimate(call.settings, call.console)))
        return
    result = train(call.settings, call.console)
    if ranks.first():
        call.console.result(*trained(result))


@app.command(rich_help_panel="The loop")
@with_settings("infer", *SPACE, "endpoint.base_url", "endpoint.timeout", "label.max_cost", "label.yes", *BASES)
def infer(
    call: Call, task: Annotated[str | None, typer.Argument(help="One task as text, or -; or pass --data.")] = None
) -> int:
    """Decide for one task, for a file of them, or for a folder of files."""
    from router_cli import bulk
    from router_cli.infer import infer
    from router_cli.summaries.infer import decided, sharded, unsure

    settings, task = _piped(call.settings, task)
    if bulk.wanted(settings):
        shards = bulk.infer_shards(settings, task, call.console)
        call.console.result(*sharded(shards))
        return 3 if shards.skipped else 0
    rows = task is None and settings.infer.output is None and not call.console.as_json
    result = infer(settings, task, call.console, call.console.confirm, call.console.row if rows else None)
    if rows:
        for line in unsure(result):
            call.console.notice(line)
    else:
        call.console.result(*decided(result, task is not None))
    return 3 if result.skipped else 0


def _piped(settings: Settings, task: str | None) -> tuple[Settings, str | None]:
    """A lone `-` is standard input, as `--data -` is, and no task."""
    piped = task == "-" and not settings.infer.data
    return (settings.with_values(infer__data=["-"]), None) if piped else (settings, task)


@app.command(rich_help_panel="The loop")
@with_settings(None, *SERVING, *SPACE, "endpoint.base_url", "endpoint.timeout", "label.max_cost", "label.yes", *BASES)
def serve(call: Call) -> int:
    """Decide over HTTP: POST /v1/route, and OpenAI's chat completions."""
    from router_cli.serve import serve
    from router_cli.summaries.serve import served

    result = serve(call.settings, call.console, call.console.confirm)
    call.console.result(*served(result))
    return 3 if result.cut else 0


@app.command("eval", rich_help_panel="The loop")
@with_settings("eval", *EXECUTING, *SPACE, *BASES)
def evaluate(
    call: Call, runs: Annotated[list[str] | None, typer.Argument(help="More runs for --compare.")] = None
) -> None:
    """Judge predictions against labels, or by recorded executions, and against what a router must beat."""
    from router_cli.judging import judge, weigh, with_runs
    from router_cli.summaries.evaluate import judged, weighed

    settings = with_runs(call.settings, runs or [])
    if settings.eval.execute:
        from router_cli.executing import judge_executed
        from router_cli.summaries.run import executed

        done, report = judge_executed(settings, call.console)
        call.console.panel(executed(done))
        call.console.result(*weighed(report, settings))
        return
    if settings.eval.outcomes is not None:
        call.console.result(*weighed(weigh(settings, call.console), settings))
    else:
        call.console.result(*judged(judge(settings, call.console), settings))


@app.command(rich_help_panel="The loop")
@with_settings("run", "infer.adapter", "infer.backend", "infer.base", "infer.model", *SPACE, *ENDPOINT, *BASES)
def run(call: Call, task: Annotated[str, typer.Argument(help="The task as text, or - for standard input.")]) -> None:
    """Decide for one task, let the team of agents work on it, and print its result."""
    from router_cli.jsonl import read_text
    from router_cli.run import run
    from router_cli.summaries.run import ran, told

    result = run(call.settings, read_text(task) if task == "-" else task, call.console)
    call.console.panel(told(result))
    call.console.result(*ran(result))


@app.command(rich_help_panel="Around it")
@with_settings(None)
def trace(
    call: Call,
    file: Annotated[Path, typer.Argument(help="A trace of router run.")],
    draw: Annotated[bool, typer.Option("--draw", metavar="", help="Print it as a Mermaid diagram.")] = False,
) -> None:
    """Show a recorded run of a team, turn by turn; say it again without a model, to see that it still goes so."""
    from router_cli.run import retrace
    from router_cli.summaries.run import traced

    call.console.result(*traced(retrace(file, call.console), draw))


@app.command(rich_help_panel="Around it")
@with_settings("quickstart", *BASES)
def quickstart(call: Call) -> None:
    """Run the whole loop on this machine: no key, no GPU, no model hub."""
    from router_cli.quickstart import quickstart
    from router_cli.summaries.around import started

    call.console.result(*started(quickstart(call.settings, call.console)))


@app.command(rich_help_panel="Around it")
@with_settings(None, "endpoint.base_url", "train.model", *BASES)
def doctor(
    call: Call,
    ask: Annotated[
        bool, typer.Option("--ask", metavar="", help="Also ask the teacher model one question; that costs money.")
    ] = False,
) -> int:
    """Check Python, packages, GPU, disk, key, endpoint and model; say how to mend what is wrong."""
    from router_cli.doctor import examine
    from router_cli.summaries.around import examined

    findings = examine(call.settings, ask, call.console)
    call.console.result(*examined(findings))
    return 1 if any(finding.state == "wrong" for finding in findings) else 0


@config_app.command("show")
@with_settings(None)
def config_show(call: Call) -> None:
    """Print every setting with its value and where it comes from; secrets are masked."""
    from router_cli.summaries.around import configured

    call.console.result(*configured(call.settings))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. Every failure becomes one line on stderr (a traceback with -vv)."""
    options.State.verbosity = 0
    try:
        words = options.dashed(list(sys.argv[1:] if argv is None else argv))
        code = int(app(args=words, prog_name="router", standalone_mode=False) or 0)
    except RouterError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away, as `head` does.
        sys.stderr.close()
        return 1
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # Typer's own usage errors
            # An empty message is the help that `no_args_is_help` has printed.
            message = str(error.format_message()).strip().replace("\n", " ")
            return _fail(message.rstrip(".") + "; see --help", 2) if message else 2
        return _fail(f"unexpected {type(error).__name__}: {error}; run again with -vv and report what it shows", 1)
    # Typer itself turns Ctrl-C into this code, without a word.
    return _fail("interrupted; the same command again goes on from here", code) if code == INTERRUPTED else code


def _fail(message: str, code: int) -> int:
    if options.State.verbosity >= 2 and sys.exc_info()[0] is not None:
        traceback.print_exc()
    Console().error(" ".join(message.split()))
    return code


def entry() -> None:
    """The `router` program."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A Windows code page lacks most characters: better `\u2026` than no result.
        sys.stdout.reconfigure(errors="backslashreplace")
    # Torch and transformers bring a million objects that stay: looking through them again and again while they come
    # takes a second, and taking them apart at the end another.
    gc.set_threshold(50_000, 20, 100)
    code = 1
    atexit.register(lambda: _leave(code))  # before anything else is: what others registered later runs first
    try:
        code = main()
    except SystemExit as ended:  # from completion, which is Typer's own
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    sys.exit(code)


def _leave(code: int) -> None:
    """End the process when all that had to be done at its end is done; the interpreter's own end is skipped."""
    logging.shutdown()  # was registered when logging was imported, and would come after this
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or its reader has gone away
            stream.flush()
    os._exit(code)
