"""Prompt files for previews.

`.txt` holds one prompt a line, with options behind it (`--w 384 --h 384 --f 45 --d 7 --s 20`); `#` in the first column
makes a comment. Options begin only at ` --` and a letter, so a prompt may begin with any words and hold dashes. `.toml`
holds `[prompt]` with what all share and a `[[prompt.subset]]` each; `.json` a list of lines or tables. A size or length
that the model does not have is lowered to the next one, and said; what cannot be read is an error with file and line.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from wanlora.config.fields import Checked, settings_of
from wanlora.config.kinds import Count, CountOrZero, Limits, NotNegative, Positive
from wanlora.config.toml import TableFile, read_json, read_table, read_text
from wanlora.foundation.errors import ConfigError, Problems, did_you_mean, nearest
from wanlora.foundation.log import say_once
from wanlora.foundation.shapes import floor_to_latent_frames, floor_to_size_step

Side = Annotated[int, Limits(low=16)]
StepCount = Annotated[int, Limits(low=1, high=1000)]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplePrompt(Checked):
    """One preview."""

    where: str
    """The place in the file, for messages: `sampling.txt line 2`."""
    prompt: str
    """The text."""
    width: Side = 256
    """Pixels, a multiple of 16."""
    height: Side = 256
    """Pixels, a multiple of 16."""
    frame_count: Count = 1
    """4k + 1; 1 makes a picture."""
    seed: CountOrZero | None = None
    """Default: drawn once per run and named in the file."""
    sample_steps: StepCount = 20
    """Steps of the solver."""
    discrete_flow_shift: Positive | None = None
    """Default: the task's."""
    cfg_scale: NotNegative | None = None
    """Strength of classifier-free guidance; 1 turns it off. Default: the task's."""
    negative_prompt: str | None = None
    """Default: Wan's own negative prompt."""


OPTIONS = {
    "w": "width",
    "h": "height",
    "f": "frame_count",
    "d": "seed",
    "s": "sample_steps",
    "fs": "discrete_flow_shift",
    "l": "cfg_scale",
    "n": "negative_prompt",
}
"""Options of a line, and the keys of the other formats that mean the same."""
_IMAGE = "concerns image-to-video models; the preview is made from the text alone"
_CONTROL = "concerns control models; the preview is made from the text alone"
_ANSWERED = {
    "g": "does nothing for Wan, which has no embedded guidance; CFG is --l (cfg_scale)",
    "guidance_scale": "does nothing for Wan, which has no embedded guidance; CFG is cfg_scale",
    "i": _IMAGE,
    "ei": _IMAGE,
    "image_path": _IMAGE,
    "end_image_path": _IMAGE,
    "cn": _CONTROL,
    "ci": _CONTROL,
    "of": _IMAGE,
    "control_video_path": _CONTROL,
    "control_image_path": _CONTROL,
    "one_frame": _IMAGE,
}
_WRITTEN_OUT = {"steps": "s", "cfg": "l", "shift": "fs", "negative": "n", "frames": "f", "neg": "n"}
_FLOORS: dict[str, Callable[[int], int]] = {
    "width": floor_to_size_step,
    "height": floor_to_size_step,
    "frame_count": floor_to_latent_frames,
}
_KEYS = {setting.name: setting.kind for setting in settings_of(SamplePrompt) if setting.name != "where"}


@dataclass(frozen=True, slots=True)
class _Entry:
    """One prompt as it stands in the file: a line or a table."""

    where: str
    raw: Any
    key_place: Callable[[str], str] | None = None

    def place(self, key: str) -> str:
        """Where a key of the table stands."""
        return self.key_place(key) if self.key_place else self.where


def read_prompts(path: Path) -> tuple[SamplePrompt, ...]:
    """Every prompt of a `.txt`, `.toml` or `.json` file. Raises `ConfigError` listing everything that is wrong."""
    readers = {".txt": _text_entries, ".toml": _toml_entries, ".json": _json_entries}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ConfigError(f"{path}: a prompt file must be .txt, .toml or .json")
    problems = Problems()
    entries = readers[suffix](path, problems)
    prompts = [prompt for entry in entries if (prompt := _prompt(entry, problems)) is not None]
    if not entries and not problems:
        problems.add(f"{path}: holds no prompt")
    problems.raise_all()
    return tuple(prompts)


def parse_prompt_line(text: str, where: str = "prompt") -> dict[str, Any]:
    """A line as a dict of `prompt` and the options that it gives. Raises `ConfigError`; messages begin with `where`."""
    problems = Problems()
    values = _line(text, where, problems)
    problems.raise_all()
    return values


def _line(text: str, where: str, problems: Problems) -> dict[str, Any]:
    prompt, *options = re.split(r"(?:^|\s)--(?=[A-Za-z])", text.strip())
    values: dict[str, Any] = {"prompt": prompt.strip()}
    for option in options:
        name, argument = re.fullmatch(r"(\S+)\s*(.*)", option.strip(), re.DOTALL).groups()  # type: ignore[union-attr]
        with problems.collect():
            values |= _option(name.lower(), argument, where)
    return values


def _option(name: str, argument: str, where: str) -> dict[str, Any]:
    if name in _ANSWERED and name not in _KEYS:
        say_once(f"{where}: --{name} {_ANSWERED[name]}")
        return {}
    if name not in OPTIONS:
        raise ConfigError(f"{where}: unknown option --{name}{_about_option(name)}")
    key = OPTIONS[name]
    if not argument:
        if key != "negative_prompt":
            raise ConfigError(f"{where}: --{name} ({key}) needs a value")
        say_once(f"{where}: --n without words means Wan's own negative prompt; --l 1 turns guidance off")
        return {}
    return {key: argument if key == "negative_prompt" else _number(name, key, argument, where)}


def _about_option(name: str) -> str:
    words = {**_WRITTEN_OUT, **{key: option for option, key in OPTIONS.items()}}
    near = nearest(name, words)
    if near is not None:
        return f" (did you mean --{words[near]}?)"
    return f"; known: {', '.join(f'--{option}' for option in OPTIONS)}"


def _number(name: str, key: str, argument: str, where: str) -> float:
    """The number behind an option; a fraction where a whole number is wanted is dropped, and said."""
    kind = _KEYS[key]
    if kind.base is int and re.fullmatch(r"\d+\.\d*", argument):
        whole = argument.partition(".")[0]
        say_once(f"{where}: --{name} {argument} is read as {whole}")
        argument = whole
    if key == "sample_steps":
        argument = _clamped_steps(argument, where)
    try:
        return kind.from_text(argument)
    except ValueError as error:
        raise ConfigError(f"{where}: --{name} ({key}) {error}") from None


def _clamped_steps(argument: str, where: str) -> str:
    if not re.fullmatch(r"\d+", argument):
        return argument
    clamped = str(min(max(int(argument), 1), 1000))
    if int(argument) != int(clamped):
        say_once(f"{where}: --s {argument} becomes {clamped}: there are 1 to 1000 steps")
    return clamped


def _text_entries(path: Path, problems: Problems) -> list[_Entry]:
    lines = [(f"{path.name} line {number}", line) for number, line in enumerate(read_text(path).splitlines(), 1)]
    kept = [(where, line) for where, line in lines if line.strip() and not line.startswith("#")]
    return [_Entry(where, line) for where, line in kept]


def _toml_entries(path: Path, problems: Problems) -> list[_Entry]:
    file = read_table(path)
    shared = file.data.get("prompt")
    for key in [key for key in file.data if key != "prompt"]:
        near = did_you_mean(key, ("prompt",))
        problems.add(f"{file.where(key)}: {key}: unknown{near}; prompts stand in [prompt] and [[prompt.subset]]")
    if not isinstance(shared, dict):
        problems.add(f"{path.name}: there is no [prompt]")
        return []
    common = {key: value for key, value in shared.items() if key != "subset"}
    if "subset" not in shared:
        return [_Entry(f"{path.name}: [prompt]", common, lambda key: file.where(key, "prompt"))]
    subsets = shared["subset"]
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        problems.add(f"{path.name}: write [[prompt.subset]] with double brackets; there may be several")
        return []
    return [_subset(file, number, common, subset) for number, subset in enumerate(subsets, 1)]


def _subset(file: TableFile, number: int, common: dict[str, Any], subset: dict[str, Any]) -> _Entry:
    def place(key: str) -> str:
        return file.where(key, "prompt.subset", number) if key in subset else file.where(key, "prompt")

    return _Entry(f"{file.path.name}: [[prompt.subset]] {number}", {**common, **subset}, place)


def _json_entries(path: Path, problems: Problems) -> list[_Entry]:
    items = read_json(path, read_text(path))
    if not isinstance(items, list):
        raise ConfigError(f"{path}: must hold a list of prompts")
    entries = []
    for number, item in enumerate(items, 1):
        where = f"{path.name}: prompt {number}"
        if isinstance(item, (str, dict)):
            entries.append(_Entry(where, item))
        else:
            problems.add(f"{where} must be a text or a table, got {item!r}")
    return entries


def _table(entry: _Entry, problems: Problems) -> dict[str, Any]:
    """A table's values, typed; what is wrong is added to `problems`."""
    values: dict[str, Any] = {}
    for key, value in entry.raw.items():
        if key in _ANSWERED and key not in OPTIONS:
            say_once(f"{entry.place(key)}: {key} {_ANSWERED[key]}")
        elif key not in _KEYS:
            problems.add(f"{entry.place(key)}: unknown key {key!r}{did_you_mean(key, _KEYS)}")
        elif value is not None:
            try:
                values[key] = _KEYS[key].from_value(value)
            except ValueError as error:
                problems.add(f"{entry.place(key)}: {key} {error}")
    return values


def _prompt(entry: _Entry, problems: Problems) -> SamplePrompt | None:
    """The prompt, at a size and length that the model has; None if it has problems, which are added."""
    before = len(problems.messages)
    is_line = isinstance(entry.raw, str)
    values = _line(entry.raw, entry.where, problems) if is_line else _table(entry, problems)
    if len(problems.messages) > before:
        return None
    if not values.get("prompt"):
        problems.add(f"{entry.where}: there is no prompt text")
        return None
    floored = {key: floor(values[key]) for key, floor in _FLOORS.items() if key in values}
    for key, value in floored.items():
        if value != values[key]:
            rule = "lengths are 4k + 1" if key == "frame_count" else "sides are multiples of 16"
            say_once(f"{entry.where}: {key} {values[key]} becomes {value}: {rule}")
    return SamplePrompt(where=entry.where, **{**values, **floored})
