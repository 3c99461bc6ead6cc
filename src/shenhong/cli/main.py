"""The command line as a process: its environment, signals, exit codes, and what a person sees of an error."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from types import FrameType

# Before torch loads: with another busy process on the machine, barriers that spin make two-thread
# operations 10-50 times slower, so waiting threads sleep after a short spin. Telemetry stays off.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("DO_NOT_TRACK", "true")

from shenhong.cli import verbs
from shenhong.cli.parser import parser
from shenhong.errors import ShenhongError


def main(arguments: list[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0, 2 for an error a person can mend, 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what it cannot show is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    remedy = ""

    def stop(_: int, frame: FrameType | None) -> None:
        if _loads(frame):  # libraries half loaded swallow the exception or fail on it
            print(f"\nshenhong: stopped{remedy}", file=sys.stderr, flush=True)
            os._exit(130)
        raise KeyboardInterrupt

    try:
        for asked in (signal.SIGINT, signal.SIGTERM):  # both ask for an orderly stop
            signal.signal(asked, stop)
        started = time.monotonic()  # before torch is loaded, which takes seconds
        made = parser()
        options = made.parse_args(arguments)
        options.started, options.parse = started, made.parse_args
        if options.verb in (verbs.quickstart, verbs.train):
            remedy = "; the same command goes on from here"
        options.verb(options)
        sys.stdout.flush()  # a reader who left shows here, and not at exit
        return 0
    except ShenhongError as error:
        print(f"shenhong: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        where = f" {stopped}" if str(stopped) else ""
        print(f"\nshenhong: stopped{where}{remedy}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a file that no stage speaks for
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"shenhong: {where}{error.strerror or error}; check its permissions and the disk",
            file=sys.stderr,
        )
        return 2
    except Exception as error:  # of a person's own file, or a fault of ours
        from shenhong.domains.registry import fault_of

        if (fault := fault_of(error)) is None:
            raise
        print(f"shenhong: {' '.join(fault.splitlines())}", file=sys.stderr)
        return 2


def _loads(frame: FrameType | None) -> bool:
    """Whether a module is being loaded there."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
