"""The comparison as one web page that needs nothing but itself: clips, curves and words in a single file."""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from wanlora.foundation.files import write_text
from wanlora.generation.pipeline import Frames
from wanlora.generation.writing import write_frames
from wanlora.quickstart.comparison import Comparison
from wanlora.quickstart.sheet import columns

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #18181c; background: #fff; margin: 2rem auto; max-width: 76rem;
  padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } p, li { max-width: 46rem }
table { border-collapse: collapse; margin: 1.5rem 0 } th { font-weight: 600; text-align: left; padding: 0 12px 2px 0 }
td { padding: 2px 12px 12px 0; vertical-align: top } td.caption { color: #6e7076; padding-bottom: 0 }
video, img { width: 176px; image-rendering: pixelated; display: block; border-radius: 3px }
svg { max-width: 46rem } code { background: #f2f2f4; padding: 0 .25em }
"""
_CURVE_WIDTH, _CURVE_HEIGHT = 640, 160


def write_page(path: Path, comparison: Comparison, words: Sequence[str], steps: Path) -> None:
    """Write the page. `steps` is the step log of the run, which the curves are drawn from."""
    table = _table(comparison)
    sentences = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in words)
    rows = [json.loads(line) for line in steps.read_text(encoding="utf-8").splitlines()]
    write_text(
        path,
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>wanlora quickstart</title><style>{_STYLE}</style></head><body>
<h1>What the LoRA has learned</h1>
<p>The same prompts and the same seeds, drawn by the tiny Wan as it is shipped, with the LoRA that has just been
trained, and with the LoRA switched off again. The words “Comic style” and “flies” were unknown to the base model.</p>
<ul>{sentences}</ul>
{table}
<h2>Loss</h2>
<p>Grey: each step of training. Black: the same unseen clips, noise and noise levels, measured again and again.</p>
{_curves(rows)}
</body></html>
""",
    )


def _table(comparison: Comparison) -> str:
    shown = columns(comparison)
    head = "".join(f"<th>{html.escape(title)}</th>" for title in shown)
    body = ""
    for row, request in enumerate(comparison.requests):
        body += f'<tr><td class="caption" colspan="{len(shown)}">{html.escape(request.prompt)}</td></tr><tr>'
        body += "".join(f"<td>{_embedded(clips[row], request.fps)}</td>" for clips in shown.values()) + "</tr>\n"
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _embedded(frames: Frames, fps: int) -> str:
    """A clip or a picture as an element that holds its own file."""
    suffix = ".png" if len(frames) == 1 else ".mp4"
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"clip{suffix}"
        write_frames(file, frames, fps=fps)
        data = base64.b64encode(file.read_bytes()).decode("ascii")
    if suffix == ".png":
        return f'<img alt="" src="data:image/png;base64,{data}">'
    return f'<video autoplay loop muted playsinline src="data:video/mp4;base64,{data}"></video>'


def _curves(rows: Sequence[dict[str, Any]]) -> str:
    """Training and validation loss over the steps."""
    training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    validation = [(row["step"], row["loss/validation"]) for row in rows if row.get("loss/validation") is not None]
    last = max([step for step, _ in training], default=1)
    top = max([loss for _, loss in training + validation], default=1.0) or 1.0

    def points(curve: Sequence[tuple[int, float]]) -> str:
        return " ".join(
            f"{step / last * _CURVE_WIDTH:.1f},{(1 - loss / top) * _CURVE_HEIGHT:.1f}" for step, loss in curve
        )

    numbers = ", ".join(f"{loss:.3f} at step {step}" for step, loss in validation)
    return f"""<svg viewBox="-4 -4 {_CURVE_WIDTH + 8} {_CURVE_HEIGHT + 8}" role="img" aria-label="loss over steps">
<polyline fill="none" stroke="#c4c6cc" points="{points(training)}"/>
<polyline fill="none" stroke="#18181c" stroke-width="2" points="{points(validation)}"/>
<path d="M0 0V{_CURVE_HEIGHT}H{_CURVE_WIDTH}" fill="none" stroke="#6e7076"/></svg>
<p>Validation loss: {numbers or "not measured"}.</p>"""
