"""What every command has in common: how it ends.

0 done; 2 something the user can mend, in one message without a traceback (unless --debug); 130 Ctrl-C. Anything else
is a fault of the program and shows its traceback.
"""

import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from wanlora.foundation.errors import UserError
from wanlora.foundation.log import log, setup_logging

_REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC}
"""What the system answers where the user lacks rights or room."""

Command = Callable[[Sequence[str]], int]


def run_script(module: str, argv: Sequence[str] | None = None) -> int:
    """Run the `command` of a module. Its imports take seconds, and Ctrl-C among them ends as it does later."""
    return run_command(lambda arguments: importlib.import_module(module).command(arguments), argv)


def console() -> int:
    """The console command `wanlora`."""
    return run_script("wanlora.cli.main")


def run_command(command: Command, argv: Sequence[str] | None = None) -> int:
    """Run `command` on the arguments and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    setup_logging(debug=debug, main=os.environ.get("RANK", "0") == "0")  # a launcher numbers its processes
    try:
        return command(arguments)
    except UserError as error:
        if debug:
            raise
        log.error(str(error))
        return error.exit_code
    except OSError as error:
        if debug or error.errno not in _REFUSALS:
            raise
        log.error(f"{error.filename or 'a file'}: {error.strerror}; check the rights to it and the room on its disk")
        return UserError.exit_code
    except KeyboardInterrupt:
        log.error("stopped by Ctrl-C; every file written so far is whole")
        return 130
