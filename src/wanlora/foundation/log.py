"""What the program says on the console.

One logger for everything; only the main process speaks. A notice about a setting is said once per process, however
often the code that notices it runs. Lines go through tqdm so that they do not tear a progress bar.
"""

import logging
import sys

from tqdm import tqdm

log = logging.getLogger("wanlora")
_said: set[str] = set()


def say_once(message: str) -> None:
    """Print `message` unless this process has printed it before."""
    if message not in _said:
        _said.add(message)
        log.info(message)


def warn_once(message: str) -> None:
    """Print `message` as a warning unless this process has printed it before."""
    if message not in _said:
        _said.add(message)
        log.warning(message)


class _ConsoleHandler(logging.Handler):
    """Writes lines to stderr above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = {logging.WARNING: "warning: ", logging.ERROR: "error: "}.get(record.levelno, "")
        tqdm.write(prefix + self.format(record), file=sys.stderr)


def setup_logging(*, debug: bool = False, main: bool = True) -> None:
    """Send the log to the console: everything on the main process, nothing below an error on the others."""
    for handler in [handler for handler in log.handlers if isinstance(handler, _ConsoleHandler)]:
        log.removeHandler(handler)
    log.addHandler(_ConsoleHandler())
    log.propagate = False
    log.setLevel((logging.DEBUG if debug else logging.INFO) if main else logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console that cannot show a character must not end the run
