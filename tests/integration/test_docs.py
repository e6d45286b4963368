"""What the documentation says can be typed, read and followed: a renamed flag or file breaks a test here."""

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser

import wanlora.cli.main as console
from wanlora.cli.train_network import choices
from wanlora.config.dataset import read_datasets
from wanlora.config.flags import parse_latent_cache, parse_plan, parse_text_cache, parse_train
from wanlora.config.musubi import ANSWERED_FLAGS
from wanlora.config.options_doc import options_markdown
from wanlora.config.prompts import read_prompts
from wanlora.diffusion.corrections import CORRECTIONS
from wanlora.foundation import log
from wanlora.models.wan.spec import FUTURE_TASKS, TASKS

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
CONFIGS = ROOT / "configs"
SHELLS = ("bash", "bat", "powershell")
PARSERS = {
    "wan_cache_latents.py": parse_latent_cache,
    "wan_cache_text_encoder_outputs.py": parse_text_cache,
    "wan_train_network.py": lambda argv: parse_train(argv, choices()),
}


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each fenced block."""
    yield from re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.M)


def commands_in(text: str, language: str) -> Iterator[list[str]]:
    """Each command of a shell block as words; continued lines are one."""
    joined = re.sub(r"[\\^]\n\s*", "", text)
    for part in re.split(r"\n|&&|;", joined):
        if words := shlex.split(part, posix=language == "bash"):
            yield words


def documented() -> list[Any]:
    """Every command of the pages and of the first comments of the config files, with its place."""
    found = []
    for page in DOCS:
        for language, text in blocks(page):
            if language in SHELLS:
                found += [(page.name, words) for words in commands_in(text, language)]
    for config in sorted(CONFIGS.rglob("*.*")):
        for line in config.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"# ((python|accelerate|bash) .*)", line):
                found.append((config.name, shlex.split(match[1])))
    return [pytest.param(words, id=f"{place}: {' '.join(words)[:60]}") for place, words in found]


def parse(words: list[str]) -> Any:
    """What the program that is called makes of its arguments; anything unknown is an error."""
    program, arguments = words[0].replace("\\", "/").rpartition("/")[2], words[1:]
    if program in ("python", "python3"):
        return parse_python(arguments)
    if program == "accelerate":
        assert arguments[0] == "launch"
        launch = launch_command_parser().parse_args(arguments[1:])
        return parse_python([launch.training_script, *launch.training_script_args])
    if program == "wanlora" and arguments[0] == "plan":
        return parse_plan(arguments[1:], choices())
    if program == "wanlora":
        return console.command(arguments)
    if program == "pip":
        extras = set(re.findall(r"\.\[(\w+)\]", " ".join(arguments)))
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert extras <= project["optional-dependencies"].keys()
    elif program == "bash":
        assert (ROOT / arguments[0]).is_file()
    else:
        assert (program, arguments[0]) in (("tensorboard", "--logdir"), (".", ".venv/bin/activate")), words
    return None


def parse_python(arguments: list[str]) -> Any:
    if arguments[0] == "-m":
        return parse(arguments[1:]) if arguments[1] != "venv" else None
    assert (ROOT / arguments[0]).is_file(), arguments[0]
    return PARSERS[arguments[0]](arguments[1:]) if arguments[0] in PARSERS else None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, as a user's is: the configurations are there. Nothing has been said yet."""
    shutil.copytree(CONFIGS, tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(log, "_said", set())
    monkeypatch.setattr(console, "quickstart", lambda out, seed: 0)
    return tmp_path


@pytest.mark.parametrize("words", documented())
def test_every_command_is_understood(words: list[str], folder: Path) -> None:
    parsed = parse(words)
    paths = list(paths_in(parsed)) if is_dataclass(parsed) else []
    assert [path for path in paths if path.parts[0] == "configs" and not path.exists()] == []
    assert [notice for notice in log._said if "nothing" in notice] == []


def paths_in(config: Any) -> Iterator[Path]:
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from paths_in(value)
        else:
            yield from (path for path in (value if isinstance(value, tuple) else (value,)) if isinstance(path, Path))


def test_both_systems_get_the_same_reference_run() -> None:
    linux, windows = (
        [
            words
            for language, text in blocks(ROOT / "README.md")
            if language == shell
            for words in commands_in(text, shell)
        ]
        for shell in ("bash", "bat")
    )
    runs = [[words for words in found if any("wan_" in word for word in words)] for found in (linux, windows)]
    assert len(runs[0]) == 3 and runs[0] == runs[1]


def test_every_toml_prompt_and_list_in_the_pages_is_read(tmp_path: Path) -> None:
    read = {"toml": 0, "prompts": 0, "jsonl": 0}
    for number, (language, text) in enumerate(block for page in DOCS for block in blocks(page)):
        path = tmp_path / f"{number}.{'txt' if language == 'prompts' else language}"
        path.write_text(text, encoding="utf-8")
        if language == "toml" and "[prompt]" not in text:
            assert read_datasets(path).datasets
        elif language in ("toml", "prompts"):
            assert read_prompts(path)
        elif language == "jsonl":
            assert all(json.loads(line)["caption"] for line in text.splitlines())
        read[language] = read.get(language, 0) + 1
    assert min(read.values()) > 0


@pytest.mark.parametrize("path", sorted((CONFIGS / "dataset").glob("*")), ids=lambda path: path.name)
def test_dataset_files_are_read_without_a_remark(path: Path, folder: Path) -> None:
    assert read_datasets(path).datasets
    assert log._said == set()


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*")), ids=lambda path: path.name)
def test_training_files_are_complete_and_hold_nothing_without_effect(path: Path, folder: Path) -> None:
    config = parse_train(["--config_file", str(path)], choices())
    assert config.previews.sample_prompts is not None and read_prompts(ROOT / config.previews.sample_prompts)
    assert log._said == set()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.toml")), ids=lambda path: path.name)
def test_each_configuration_begins_with_the_command_that_runs_it(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(("# python ", "# accelerate ")) and path.relative_to(ROOT).as_posix() in first


def test_caching_overnight_runs_both_scripts_and_ends_with_the_first_failure(tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text('#!/usr/bin/env bash\necho "$@" >> calls.txt\ncase "$1" in *latents*) exit 2;; esac\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "VAE": "v a e.pth"}
    script = [shutil.which("bash") or "bash", str(CONFIGS / "cache_overnight.sh"), "a.toml", "b c.toml"]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert [Path(call.split()[0]).name for call in calls] == list(PARSERS)[:2]
    assert all(" --dataset_config a.toml b c.toml --" in call for call in calls)


def test_caching_overnight_without_a_dataset_says_how_it_is_called(tmp_path: Path) -> None:
    script = [shutil.which("bash") or "bash", str(CONFIGS / "cache_overnight.sh")]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "name the dataset files" in done.stderr


def test_caching_overnight_runs_the_same_on_windows() -> None:
    bash, batch = ((CONFIGS / f"cache_overnight.{end}").read_text(encoding="utf-8") for end in ("sh", "bat"))
    calls = [re.findall(r"^python .*?(wan_\w+\.py).*?(--\w+).*?(--\w+)(.*)", text, re.M) for text in (bash, batch)]
    shapes = [[(script, first, second, "--batch_size 16" in rest) for script, first, second, rest in c] for c in calls]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 2


def test_the_page_of_options_is_up_to_date() -> None:
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == options_markdown(choices()), (
        "wanlora options prints the page anew"
    )


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_files_that_the_pages_name_exist() -> None:
    for page in DOCS:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:[a-z0-9_]+/)+[a-z0-9_.]+\.(?:py|sh|bat|txt|md))`", text):
            assert any((folder / name).exists() for folder in (ROOT, ROOT / "src" / "wanlora")), (page.name, name)


def test_the_read_me_names_every_page_and_every_task() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS[1:] if f"(docs/{page.name})" not in text] == []
    assert [task for task in (*TASKS, *FUTURE_TASKS) if f"`{task}`" not in text] == []


def test_every_difference_from_musubi_is_named() -> None:
    text = (ROOT / "docs" / "from-musubi.md").read_text(encoding="utf-8")
    assert [name for name in CORRECTIONS if f"| `{name}` |" not in text] == []
    refused, accepted = text.split("| refused | because |")[1].split("| accepted, without effect | because |")
    for name, answer in ANSWERED_FLAGS.items():
        assert f"`--{name}`" in (refused if answer.refused else accepted), name
