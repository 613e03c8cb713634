"""Draw both sides, the plan and the frontier as HTML, small enough to be sent at every step.

Pictures are part of the text (data addresses), so none lies on disk, and none has an address that another visitor could
ask for.
"""

import base64
import io
import re
from collections.abc import Sequence
from html import escape

from torch import Tensor

from dyndit.demo.planner import Point
from dyndit.demo.studio import Side
from dyndit.pictures import grid
from dyndit.pictures.clips import FRAMES_PER_SECOND
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import Unconditional

BLUE, MARK = "#3b7dd8", "#e8590c"
MOST_WIDTH, SMALL = 1024, 64
"""Pixels: the widest picture that is sent; pictures up to `SMALL` are sent without loss."""
MOST_NAMED = 12
"""Plans of up to so many steps have each step's text below its column."""

STYLE = """
.dd { display: grid; grid-template-columns: 1fr 1fr; gap: 12px }
.dd figure { margin: 0; min-width: 0 }
.dd figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 8px; margin-bottom: 6px }
.dd img, .dd .dd-empty { display: block; width: 100%; border-radius: 6px; background: rgba(128, 128, 128, .12) }
.dd img { image-rendering: auto }
.dd .dd-small { image-rendering: pixelated }
.dd .dd-empty { aspect-ratio: 1; display: flex; align-items: center; justify-content: center; text-align: center;
  padding: 8px; opacity: .7 }
.dd-map svg { display: block; width: 100%; max-width: 640px; height: auto; font: 11px sans-serif }
.dd-map h3 { margin: 4px 0 2px; font-size: 1em }
.dd-map p { margin: 2px 0 6px; font-size: .9em; line-height: 1.4 }
.dd-key { display: inline-block; width: .9em; height: .9em; border-radius: 2px; margin: 0 .3em 0 .8em;
  vertical-align: -.1em }
.dd-key:first-child { margin-left: 0 }
@media (max-width: 700px) {
  #left { display: contents }
  #ask { order: 1 } #shown { order: 2 } #more { order: 3 }
}
footer { display: none !important }
"""


def sides(full: Side | None, dynamic: Side | None, waits: str = "Press Draw") -> str:
    """Show both sides. A side that has not begun says what it waits for."""
    shown = (_side("full", "Full depth", full, waits), _side("dynamic", "Dynamic depth", dynamic, waits))
    return f'<div class="dd">{"".join(shown)}</div>'


def _side(name: str, title: str, side: Side | None, waits: str) -> str:
    if side is None:
        inside, news = f'<div class="dd-empty">{escape(waits)}</div>', ""
    else:
        steps = f"step {side.step} of {side.plan.num_steps}"
        news = f"{steps} · {milliseconds(side.seconds)}"
        inside = f'<div class="dd-empty">{steps}<br>shown at the end</div>'
        if side.pictures is not None:
            small = ' class="dd-small"' if max(side.pictures.shape[-2:]) <= SMALL else ""
            inside = f'<img{small} src="{source(side.pictures)}" alt="{escape(title)}, {steps}">'
    return f'<figure id="{name}"><figcaption><b>{title}</b><span>{news}</span></figcaption>{inside}</figure>'


def milliseconds(seconds: float) -> str:
    """Write a time: "38 ms", "12.5 s"."""
    return f"{1e3 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def source(pictures: Tensor) -> str:
    """Tile pictures, uint8 (B, C, H, W), or clips (B, C, T, H, W), which move -> a data address of a WebP file."""
    count = len(pictures)
    columns = max(-(-count // 2), min(count, 2))
    frames = [pictures] if pictures.ndim == 4 else list(pictures.unbind(2))
    small = max(pictures.shape[-2:]) <= SMALL
    images = [grid(frame, columns, pad=1 if small else 4, least=480).convert("RGB") for frame in frames]
    for image in images:
        image.thumbnail((MOST_WIDTH, 4 * MOST_WIDTH))
    file = io.BytesIO()
    how = {"lossless": True} if small else {"quality": 90}
    moving = {"save_all": True, "append_images": images[1:], "duration": round(1000 / FRAMES_PER_SECOND), "loop": 0}
    images[0].save(file, "WEBP", **how, **(moving if len(images) > 1 else {}))
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _svg(width: float, height: float, label: str, *parts: str) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="currentColor" {more}>{escape(text)}</text>'


def plan_map(plan: DepthPlan, done: int = 0) -> str:
    """Draw layers over steps: a filled cell is a block that runs, dark with both branches, pale with neither.

    done: steps drawn so far; the last of them is framed.
    """
    blocks, steps = plan.num_blocks, plan.num_steps
    left, top, width, height = 34.0, 6.0, 280.0, min(max(12.0 * blocks, 96.0), 168.0)
    w, h = width / steps, height / blocks
    gap_x, gap_y = min(1.0, w / 5), min(1.0, h / 5)
    parts = []
    for k, step in enumerate(plan.steps):
        uncond = step.guide.depth if isinstance(step.guide, Unconditional) else 0
        for layer in range(blocks):
            branches = (layer < step.depth) + (layer < uncond)
            colour, opacity = (BLUE, 0.5 * branches) if branches else ("currentColor", 0.09)
            x, y = left + k * w, top + height - (layer + 1) * h
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{w - gap_x:.1f}" height="{h - gap_y:.1f}" fill="{colour}" '
                f'fill-opacity="{opacity:g}"/>'
            )
        if steps <= MOST_NAMED:
            x, y = left + (k + 0.5) * w + 3, top + height + 6
            parts.append(_text(x, y, str(step), "end", f'font-size="10" transform="rotate(-90 {x:.1f} {y:g})"'))
    if done:
        x = left + (done - 1) * w
        parts.append(
            f'<rect x="{x - 1:.1f}" y="{top - 3:g}" width="{w + 1:.1f}" height="{height + 5:g}" fill="none" '
            f'stroke="{MARK}" stroke-width="2"/>'
        )
    longest = max(len(str(step)) for step in plan.steps) if steps <= MOST_NAMED else 0
    middle, low = top + height / 2, top + height + 17 + 6 * longest
    parts += [_text(left - 5, top + 9, str(blocks), "end"), _text(left - 5, top + height, "1", "end")]
    parts.append(_text(12, middle, "layer", more=f'transform="rotate(-90 12 {middle:g})"'))
    parts.append(_text(left, low, f"t = {plan.timesteps[0]:.0f}: noise", "start"))
    parts.append(_text(left + width, low, f"t = {plan.timesteps[-1]:.0f}: nearly the picture", "end"))
    now = f", step {done} of {steps}" if done else ""
    key = (("both branches", BLUE, 1.0), ("one branch", BLUE, 0.5), ("left out", "gray", 0.2))
    keys = "".join(
        f'<i class="dd-key" style="background:{colour};opacity:{opacity:g}"></i>{name}'
        for name, colour, opacity in (key if plan.cfg_scale != 1 else (("runs", BLUE, 0.5), key[2]))
    )
    svg = _svg(left + width + 6, low + 6, f"The plan: {blocks} layers over {steps} steps", *parts)
    return f'<div class="dd-map"><h3>The plan{now}</h3>{svg}<p>{keys}</p></div>'


def frontier(points: Sequence[Point], rivals: Sequence[Point], chosen: Point | None, caution: str = "") -> str:
    """Draw predicted Fréchet distance over predicted time, and the chosen point on it.

    rivals: full depth, at these steps and at fewer. caution: said below, or alone if nothing is predicted.
    """
    said = re.sub("`(.*?)`", r"<code>\1</code>", escape(caution))
    if not points:
        return f'<div class="dd-map"><h3>The frontier</h3><p>{said}</p></div>'
    shown = [*points, *rivals, *([chosen] if chosen else ())]
    low, high = min(p.fd for p in shown), max(p.fd for p in shown)
    span = (high - low) or 1.0
    left, top, width, height = 46.0, 24.0, 240.0, 120.0

    def at(point: Point) -> tuple[float, float]:
        return left + width * min(max(point.share, 0), 1.05), top + height * (high - point.fd) / span

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, points))
    parts = [
        f'<path d="M{left} {top - 6}V{top + height + 6}H{left + width + 20}" fill="none" stroke="currentColor" '
        'stroke-opacity=".4"/>',
        f'<polyline points="{line}" fill="none" stroke="{BLUE}" stroke-width="2"/>',
    ]
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{BLUE}"/>' for x, y in map(at, points)]
    for point in rivals:
        x, y = at(point)
        parts.append(f'<path d="M{x - 4:.1f} {y - 4:.1f}h8v8h-8z" fill="none" stroke="currentColor"/>')
        parts.append(_text(x + 6, y - 9, point.name, "end", 'font-size="10"'))
    parts += [_text(left - 5, top + height + 4, f"{low:.2f}", "end"), _text(left - 5, top + 4, f"{high:.2f}", "end")]
    parts += [_text(left + width * s, top + height + 22, f"{s:.0%}") for s in (0.25, 0.5, 0.75, 1.0)]
    parts.append(_text(12, top + height / 2, "distance", more=f'transform="rotate(-90 12 {top + height / 2:g})"'))
    parts.append(_text(left + width / 2, top + height + 40, "share of full depth's time"))
    if chosen:
        x, y = at(chosen)
        parts.append(f'<circle id="chosen" cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{MARK}"/>')
    svg = _svg(left + width + 34, top + height + 46, "Predicted distance over predicted time", *parts)
    key = (
        f'<i class="dd-key" style="background:{BLUE}"></i>plans'
        f'<i class="dd-key" style="background:{MARK};border-radius:50%"></i>this budget'
        '<i class="dd-key" style="border:1px solid"></i>full depth'
    )
    return (
        f'<div class="dd-map"><h3>The frontier, as predicted</h3>{svg}<p>{key}</p><p>A lower Fréchet distance to real '
        f"pictures is better. {said}</p></div>"
    )
