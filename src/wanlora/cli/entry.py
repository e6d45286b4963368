"""What every command has in common: how it ends.

0 done; 2 something the user can mend, in one message without a traceback (unless --debug); 130 Ctrl-C. Anything else
is a fault of the program and shows its traceback.
"""

import errno
import gc
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from wanlora.foundation.driver import finding_cards
from wanlora.foundation.errors import UserError
from wanlora.foundation.log import log, setup_logging

_REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC}
"""What the system answers where the user lacks rights or room."""

Command = Callable[[Sequence[str]], int]


def run_script(module: str, argv: Sequence[str] | None = None, *, uses_card: bool = False) -> int:
    """Run the `command` of a module. Its imports take seconds, and Ctrl-C among them ends as it does later.

    With `uses_card` the driver looks for cards meanwhile.
    """
    return run_command(lambda arguments: _import(module, uses_card).command(arguments), argv)


def _import(name: str, uses_card: bool) -> ModuleType:
    """Import the module without looking for garbage: imports make a million objects and hardly any that are done with.

    Looking through all of them again and again takes a fifth of the time of the imports. What was imported stays, so
    it is not looked through later either.
    """
    gc.disable()
    try:
        with finding_cards(wanted=uses_card):
            return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


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
