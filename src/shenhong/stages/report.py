"""report: report.html and report.md, from the files of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shenhong.stages.base import Context, Stage, Step


class Report(Stage):
    follows = ()

    def __init__(self, last: Step) -> None:
        super().__init__("report", Path("report.html"), ("evaluate",))
        self.last = last

    def run(self, context: Context) -> dict[str, Any]:
        from shenhong.evaluate.report import write_report

        write_report(context.path, self.last.measured_on.domain)
        return {}
