"""A label file and what stands beside it: made from the journal, replaced as a whole, held by one process at a time."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from router_cli.badlines import BadLines
from router_cli.errors import OutputError
from router_cli.jsonl import alone, dumps, replacing, writing
from router_cli.labelling.estimate import Estimate
from router_cli.labelling.worklist import UNPAID
from router_cli.schema import Usage
from router_cli.teachers import total


@dataclass
class Counts:
    """What stands in the files: rows by topology, those of earlier runs among them, rejected tasks, all their usage.

    `normalised` answers were made canonical, `split_votes` are labels that not all votes were for.
    """

    topologies: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    rejected: int = 0
    normalised: int = 0
    split_votes: int = 0
    usage: Usage = UNPAID


@dataclass(frozen=True)
class LabelResult:
    """What `label` made. `labelled` and `resumed` together are the rows of `output`.

    `rejected` counts the rows of `rejected_path`, from earlier runs too; `unanswered` tasks have no row yet and are
    asked about by the next run; `skipped` are unreadable input lines. `split_votes` are labels that not all votes were
    for. `usage` is what this run spent, `usage_all` what all rows together did; a cost of None is an unknown price.
    `astray_usd` may have been charged on top, for requests whose answer did not arrive or was not kept. `wasted` of the
    `requests` of this run were turned away by a rate limit. `lost` is how many questions an earlier run may have paid
    for without keeping the answer. `stopped` says why a run ended before its last task, where `label.max_cost` did.
    """

    output: Path
    rejected_path: Path
    labelled: int
    resumed: int
    rejected: int
    unanswered: int
    skipped: int
    topologies: dict[str, int]
    normalised: int
    split_votes: int
    usage: Usage
    usage_all: Usage
    astray_usd: float
    requests: int
    wasted: int
    estimate: Estimate | None
    tokenizer: str
    count_error: float | None
    lost: int
    stopped: str | None
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether every task of the input has its row in `output`."""
        return not (self.rejected or self.unanswered or self.skipped)


class LabelFile:
    """The label file `output` with its rejected file and its journal."""

    def __init__(self, output: str) -> None:
        self.output = Path(output)
        self.rejected, self.journal = (
            self.output.with_name(f"{self.output.name}.{kind}.jsonl") for kind in ("rejected", "journal")
        )

    def check(self) -> None:
        """Raises OutputError where the output cannot be a label file, or is not one of ours."""
        if self.output.is_dir():
            raise OutputError(f"{self.output}: is a folder, expected a file to write the labels to")
        if self.output.exists() and not self.output.is_file():
            raise OutputError(f"{self.output}: is a device or pipe, but labels and their journal need a file")
        if not self.journal.exists() and self.output.exists() and self.output.stat().st_size:
            raise OutputError(
                f"{self.output}: exists, but its journal {self.journal.name} does not: "
                "move it away or choose another --output, so that nothing is overwritten"
            )

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Hold the file against other processes. Raises OutputError where one has it."""
        taken = f"{self.output}: another `router label` is writing it; choose another --output"
        return alone(self.output, self.output.with_name(f".{self.output.name}.lock"), taken)

    def write(self, rows: Iterable[tuple[dict[str, Any], bool]], bad: BadLines) -> Counts:
        """Replace output and rejected file by `rows` (`Worklist.rows`), each as a whole, and count."""
        counts = Counts()
        with replacing(self.output) as good, replacing(self.rejected) as refused:
            for row, before in rows:
                origin = row["provenance"]
                counts.usage = total(counts.usage, Usage(**origin["usage"]))
                labelled = "messages" in row
                (good if labelled else refused).write(dumps(row) + "\n")
                if not labelled:
                    counts.rejected += 1
                    continue
                counts.topologies[row["decision"]["topology"]] += 1
                counts.resumed += before
                counts.normalised += bool(origin["normalised"])
                counts.split_votes += origin.get("agreement") not in (None, 1.0)
        with writing(self.rejected):
            if not counts.rejected:
                self.rejected.unlink()
        bad.record(self.output)
        return counts
