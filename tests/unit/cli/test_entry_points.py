"""How commands end, and what the scripts offer."""

import errno
import gc
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from wanlora.cli import cache_latents, cache_text_encoder_outputs, main, train_network
from wanlora.cli.entry import console, run_command, run_script
from wanlora.foundation.errors import ConfigError
from wanlora.foundation.log import log

Captured = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[3]


def refuse(argv: Sequence[str]) -> int:
    raise ConfigError("--what is wrong; do it so")


def test_success_is_zero() -> None:
    assert run_command(lambda argv: 0, []) == 0


def test_what_the_user_can_mend_is_two_and_one_message(capsys: Captured) -> None:
    assert run_command(refuse, []) == 2
    assert capsys.readouterr().err == "error: --what is wrong; do it so\n"


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ConfigError):
        run_command(refuse, ["--debug"])


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    def fail(argv: Sequence[str]) -> int:
        raise KeyError("a fault")

    with pytest.raises(KeyError):
        run_command(fail, [])


def test_a_folder_without_rights_is_no_fault_of_the_program(capsys: Captured) -> None:
    def write(argv: Sequence[str]) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "out/models")

    assert run_command(write, []) == 2
    says = "error: out/models: Permission denied; check the rights to it and the room on its disk\n"
    assert capsys.readouterr().err == says
    with pytest.raises(PermissionError):
        run_command(write, ["--debug"])


def test_ctrl_c_is_130(capsys: Captured) -> None:
    def interrupted(argv: Sequence[str]) -> int:
        signal.raise_signal(signal.SIGINT)
        return 0

    assert run_command(interrupted, []) == 130
    assert "stopped by Ctrl-C" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "shown"), [(None, True), ("0", True), ("1", False)])
def test_of_several_processes_the_first_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, rank: str | None, shown: bool
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)

    def speak(argv: Sequence[str]) -> int:
        log.info("hello")
        return 0

    run_command(speak, [])
    assert ("hello" in capsys.readouterr().err) == shown


@pytest.mark.parametrize(
    "script",
    [cache_latents.main, cache_text_encoder_outputs.main, train_network.main],
    ids=lambda main: main.__module__,
)
def test_every_script_has_help_and_refuses_unknown_flags(
    script: Callable[[Sequence[str]], int], capsys: Captured
) -> None:
    with pytest.raises(SystemExit) as left:
        script(["--help"])
    assert left.value.code == 0
    assert "--dataset_config" in capsys.readouterr().out
    assert script(["--dataset_confg", "style.toml"]) == 2
    assert "did you mean '--dataset_config'" in capsys.readouterr().err


def test_choices_come_from_the_registries() -> None:
    offered = train_network.choices()
    assert {"t2v-1.3B", "t2v-14B"} <= set(offered["task"])
    assert {"sigma", "shift", "flux_shift", "logsnr"} <= set(offered["timestep_sampling"])
    assert {"constant", "cosine", "rex", "piecewise_constant"} <= set(offered["lr_scheduler"])
    assert {"unipc", "euler"} <= set(offered["sample_solver"])
    assert {"none", "sigma_sqrt", "cosmap"} <= set(offered["weighting_scheme"])


def test_the_console_command_lists_every_option(capsys: Captured) -> None:
    assert main.main(["options"]) == 0
    page = capsys.readouterr().out
    assert "blocks_to_swap" in page and "target_frames" in page


def test_the_console_command_says_its_version(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as left:
        main.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("wanlora ")


def test_ctrl_c_while_a_script_still_imports_is_130_too(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def interrupted(module: str) -> object:
        asked.append(module)
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert run_script("wanlora.cli.train_network", []) == 130 and console() == 130
    assert asked == ["wanlora.cli.train_network", "wanlora.cli.main"]
    assert "stopped by Ctrl-C" in capsys.readouterr().err


def test_the_driver_looks_for_cards_while_the_trainer_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []

    @contextmanager
    def finding_cards(*, wanted: bool) -> Iterator[None]:
        events.append(wanted)
        yield
        events.append("found")

    def imported(name: str) -> SimpleNamespace:
        assert not gc.isenabled()
        events.append(name)
        return SimpleNamespace(command=events.append)

    monkeypatch.setattr("wanlora.cli.entry.finding_cards", finding_cards)
    monkeypatch.setattr("importlib.import_module", imported)
    run_script("trainer", ["--flag"], uses_card=True)
    run_script("cacher", [])
    assert events == [True, "trainer", "found", ["--flag"], False, "cacher", "found", []]
    assert gc.isenabled()


@pytest.mark.parametrize("script", ["wan_train_network", "wan_cache_latents", "wan_cache_text_encoder_outputs"])
def test_scripts_begin_without_a_single_slow_import(script: str) -> None:
    """What a script imports before it can answer Ctrl-C."""
    code = f"import runpy, sys; runpy.run_path('{script}.py'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
