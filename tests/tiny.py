"""A tiny Wan and the quickstart's clips, for tests: real files in the official formats, random weights.

Fixtures of the same content are in `conftest.py`: `tiny_models`, `tiny_dataset`.
"""

import shutil
from pathlib import Path

from wanlora.quickstart.dataset import TinyDataset, make_tiny_dataset
from wanlora.quickstart.tiny_model import TinyWan, make_tiny_wan
from wanlora.quickstart.world import base_scenes

__all__ = ["SCENES", "TinyDataset", "TinyWan", "copy_dataset", "make_tiny_dataset", "make_tiny_wan"]

SCENES = base_scenes(6, seed=0)
"""Something to film."""


def copy_dataset(source: TinyDataset, folder: Path) -> TinyDataset:
    """The same clips, captions and caches in `folder`, with a TOML that names them there. File times are kept."""
    shutil.copytree(source.toml.parent, folder, dirs_exist_ok=True)
    return make_tiny_dataset(folder)
