"""What a person sees while a model trains: one live line on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections import deque
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


def clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Display:
    """Progress of ``steps`` steps. Time left follows the last half minute, so that a machine that gets busy shows at once."""

    def __init__(self, steps: int, done: int, visible: bool = True) -> None:
        self.steps, self.visible = steps, visible
        self.console = Console(stderr=True)
        self.live = visible and self.console.is_terminal
        self.recent: deque[tuple[float, int]] = deque([(time.monotonic(), done)], maxlen=400)
        self.printed_at = time.monotonic()
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[text]}"),
            console=self.console,
            disable=not self.live,
        )
        self.task = self.bar.add_task("", total=steps, completed=done, text="")

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def time_left(self, step: int) -> float:
        """Seconds to the last step at the present pace."""
        now = time.monotonic()
        self.recent.append((now, step))
        while len(self.recent) > 2 and now - self.recent[0][0] > 30:
            self.recent.popleft()
        since, first = self.recent[0]
        return (self.steps - step) * (now - since) / max(1, step - first)

    def show(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show one more step; ``loss`` is the objective's first term."""
        if not self.visible:
            return
        left = self.time_left(step)
        ends = time.strftime("%H:%M:%S", time.localtime(time.time() + left))
        text = (
            f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  {clock(left)} left, ends {ends}"
        )
        if self.live:
            self.bar.update(self.task, completed=step, text=text)
        elif time.monotonic() - self.printed_at > 15 or step == self.steps:
            self.printed_at = time.monotonic()
            print(f"training {step}/{self.steps}  {text}", file=sys.stderr, flush=True)
