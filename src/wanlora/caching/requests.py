"""Dataset files to cache: read and checked together, before anything is loaded.

A batch of files often runs overnight. A file that is misspelt stops everything at once, while somebody still looks; a
file whose pictures or clips are at fault is named and left out, and the others are cached.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wanlora.config.dataset import DatasetsConfig, read_datasets
from wanlora.data.checks import remarks
from wanlora.data.plan import DataPlan, plan_datasets
from wanlora.data.report import report_lines
from wanlora.foundation.errors import ConfigError, DataError, Problems
from wanlora.foundation.log import log


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One dataset file."""

    path: Path
    plan: DataPlan | None
    """None if its data are at fault."""
    problem: str = ""
    """What is at fault."""


def read_requests(paths: Sequence[Path], problems: Problems, *, write_index: bool) -> tuple[Request, ...]:
    """Read the dataset files and lay out their samples; a file that is named twice counts once.

    Raises `ConfigError` with the given problems and those of every dataset file together. Raises `DataError` if the
    data of every file are at fault.
    """
    configs = []
    for path in {path.resolve(): path for path in paths}.values():
        with problems.collect():
            configs.append(read_datasets(path))
    problems.raise_all(ConfigError)
    requests = tuple(_lay_out(config, write_index) for config in configs)
    if all(request.plan is None for request in requests):
        for request in requests:
            problems.add(request.problem)
        problems.raise_all(DataError)
    return requests


def report(requests: Sequence[Request]) -> None:
    """Say what each dataset file yields, and what is wrong with those that yield nothing."""
    for request in requests:
        if request.plan is None:
            log.error(f"{request.path} is left out: {request.problem}")
            continue
        log.info(f"{request.path}")
        for line in (*report_lines(request.plan), *remarks(request.plan)):
            log.info(f"  {line}")


def _lay_out(config: DatasetsConfig, write_index: bool) -> Request:
    try:
        return Request(path=config.path, plan=plan_datasets(config, write_index=write_index))
    except DataError as error:
        return Request(path=config.path, plan=None, problem=str(error))
