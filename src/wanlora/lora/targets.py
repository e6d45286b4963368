"""Which modules get an adapter.

Candidates are all linear layers inside the transformer blocks: q, k, v, o of both attentions and the two of the
feed-forward part, 300 in the 1.3B model and 400 in the 14B models. Embeddings, modulation and the head stay as they
are.

Patterns are regular expressions tried from the start of the official module path (`blocks.0.self_attn.q`), not
necessarily to its end, as musubi tries them: `blocks\\.[0-9]\\.` means the first ten blocks, `.*ffn` all feed-forward
layers. `include_patterns` restrict, `exclude_patterns` remove; a module that matches both is left out. (In musubi an
include pattern only takes back what an exclude pattern removed and on its own does nothing.)
"""

import re
from collections.abc import Sequence

from torch import nn

from wanlora.foundation.errors import ConfigError, Problems, nearest
from wanlora.foundation.log import warn_once
from wanlora.lora.layers import LoRALinear, is_linear


def candidates(model: nn.Module) -> tuple[str, ...]:
    """Official paths of all linear layers inside the blocks, in the model's order, adapted or not."""
    adapted = {f"{name}.base" for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    return tuple(
        name
        for name, module in model.named_modules()
        if name.startswith("blocks.")
        and (isinstance(module, LoRALinear) or (is_linear(module) and name not in adapted))
    )


def select_targets(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> tuple[str, ...]:
    """Paths of the modules to adapt.

    Raises `ConfigError` for a broken pattern, for one that matches no module, and when nothing is left.
    """
    names = candidates(model)
    if not names:
        raise ValueError("the model has no linear layer inside `blocks`")
    problems = Problems()
    wanted = _matches(names, include, "include_patterns", problems) if include else set(names)
    unwanted = _matches(names, exclude, "exclude_patterns", problems)
    problems.raise_all()
    targets = tuple(name for name in names if name in wanted and name not in unwanted)
    if not targets:
        raise ConfigError(
            "include_patterns and exclude_patterns leave no module to train: include_patterns choose modules, "
            "exclude_patterns remove them from the choice; to train a few kinds only, give include_patterns alone"
        )
    if include and (both := len(wanted & unwanted)):
        warn_once(
            f"{both} modules match both include_patterns and exclude_patterns and are left out; musubi would train them"
        )
    return targets


def is_partial(model: nn.Module, targets: Sequence[str]) -> bool:
    """Whether `targets` are fewer than all candidates."""
    return set(targets) != set(candidates(model))


def _matches(names: Sequence[str], patterns: Sequence[str], option: str, problems: Problems) -> set[str]:
    """The names that any pattern matches."""
    found: set[str] = set()
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            problems.add(f"{option}: {pattern!r} is not a regular expression ({error})")
            continue
        hits = {name for name in names if compiled.match(name)}
        if not hits:
            problems.add(f"{option}: {pattern!r} matches no module. {_advice(compiled, names)}")
        found |= hits
    return found


def _advice(pattern: re.Pattern[str], names: Sequence[str]) -> str:
    """What the user may have meant."""
    inside = next((name for name in names if pattern.search(name)), None)
    if inside is not None:
        longer = ".*" + pattern.pattern
        return f"It occurs inside {inside!r}; patterns start at the beginning of the path: write {longer!r}"
    plain = re.sub(r"\.\*|[\\^$()\[\]?+*]", "", pattern.pattern).strip(".")
    tails = sorted({name.split(".", 2)[2] for name in names})
    near = nearest(plain, tails) or nearest(plain, names)
    meant = f"Near it: {near!r}. " if near else ""
    return f"{meant}In each of blocks.0 to {names[-1].split('.', 2)[1]} there are: {', '.join(tails)}"
