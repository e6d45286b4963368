"""The tiny Wan that is shipped with the package: it has learned to draw the plain scenes of the small world."""

import filecmp
import shutil
from pathlib import Path

from wanlora.foundation.errors import CheckpointError
from wanlora.foundation.files import atomic_path
from wanlora.quickstart.tiny_model import TinyWan

PRETRAINED = TinyWan.within(Path(__file__).parent / "pretrained")


def copy_pretrained(folder: Path) -> TinyWan:
    """Copy the files into `folder`; those that are there already and equal stay.

    Raises `CheckpointError` if the installation lacks a file.
    """
    files = TinyWan.within(folder)
    for source, target in zip(PRETRAINED.paths, files.paths, strict=True):
        if not source.is_file():
            raise CheckpointError(f"{source} belongs to wanlora and is missing; install wanlora again")
        if not (target.is_file() and filecmp.cmp(source, target, shallow=False)):
            with atomic_path(target) as temporary:
                shutil.copyfile(source, temporary)
    return files
