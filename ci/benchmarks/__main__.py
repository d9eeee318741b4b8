"""Measure, and print one table; ``ci/bench`` calls this after setting up.

Every case runs in a process of its own. One that fails is reported and does not stop the others. The exit code says
whether all of them ran: a target that is missed is a result.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from benchmarks import cases, chart, report


def main() -> int:
    """Run the benchmark; return the exit status."""
    arguments = parse_arguments()
    if arguments.list:
        for case in cases.CASES:
            print(f"{case.name:<18} {case.summary}")
        return 0
    try:
        chosen = cases.chosen(arguments.only)
    except ValueError as error:
        say(str(error))
        return 2
    # Interrupted in any way, it ends what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    rows = []
    for case in chosen:
        started = time.monotonic()
        say(f"{case.name}: {case.summary} ...")
        for row in cases.run(case, quick=arguments.quick):
            say("  " + report.line(row))
            rows.append(row)
        say(f"{case.name}: {time.monotonic() - started:.0f} s")
    made_on = report.machine()
    print(report.markdown(rows, made_on))
    if arguments.json:
        arguments.json.write_text(report.to_json(rows, made_on) + "\n")
    if arguments.chart:
        chart.draw(rows, made_on, arguments.chart)
    return 1 if any(row.state == "failed" for row in rows) else 0


def say(message: str) -> None:
    """Tell the user."""
    print(f"bench: {message}", file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="ci/bench", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer repeats")
    parser.add_argument("--only", metavar="NAME", nargs="+", default=[], help="these cases alone, such as read or fit")
    parser.add_argument("--list", action="store_true", help="list the cases and measure nothing")
    parser.add_argument("--json", metavar="PATH", type=Path, help="write the rows as JSON")
    parser.add_argument("--chart", metavar="PATH.png", type=Path, help="draw the ratios as a chart")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
