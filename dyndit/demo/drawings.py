"""Draw a plan and a frontier as SVG, small enough to be sent at every step."""

from collections.abc import Sequence
from html import escape

from dyndit.demo.studio import Point
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import Unconditional

BLUE, PALE, INK, MARK = "#2f6db3", "#e6ebf2", "#3a3f47", "#d9480f"


def _svg(width: float, height: float, label: str, *parts: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}" '
        f'style="width:100%;height:auto;font:11px sans-serif;background:#fff">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{INK}" {more}>{escape(text)}</text>'


def plan_map(plan: DepthPlan, done: int = 0) -> str:
    """Draw layers over steps: a filled cell is a block that runs, dark with both branches, pale with neither.

    done: steps drawn so far; the last of them is framed.
    """
    blocks, steps = plan.num_blocks, plan.num_steps
    left, top, width, height = 34.0, 8.0, 480.0, 12.0 * min(blocks, 16)
    w, h = width / steps, height / blocks
    parts = []
    for k, step in enumerate(plan.steps):
        uncond = step.guide.depth if isinstance(step.guide, Unconditional) else 0
        for layer in range(blocks):
            share = ((layer < step.depth) + (layer < uncond)) / 2
            colour, opacity = (BLUE, 0.45 + 0.55 * (share == 1)) if share else (PALE, 1)
            x, y = left + k * w, top + height - (layer + 1) * h
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{w - 1:.1f}" height="{h - 1:.1f}" fill="{colour}" '
                f'fill-opacity="{opacity:g}"/>'
            )
        if steps <= 20:
            parts.append(_text(left + (k + 0.5) * w, top + height + 13, str(step), more='font-size="9"'))
    if done:
        x = left + (done - 1) * w
        parts.append(
            f'<rect x="{x - 1:.1f}" y="{top - 3:g}" width="{w + 1:.1f}" height="{height + 5:g}" fill="none" '
            f'stroke="{MARK}" stroke-width="2"/>'
        )
    parts += [_text(left - 5, top + 9, str(blocks), "end"), _text(left - 5, top + height, "1", "end")]
    parts.append(_text(left, top + height + 28, f"noisy: t = {plan.timesteps[0]:.0f}", "start"))
    parts.append(_text(left + width, top + height + 28, f"t = {plan.timesteps[-1]:.0f}: fine", "end"))
    return _svg(left + width + 8, top + height + 34, f"The plan: layers over {steps} steps", *parts)


def frontier(points: Sequence[Point], chosen: Point | None) -> str:
    """Draw predicted Fréchet distance over predicted time, and the chosen point on it."""
    if not points:
        return "<p>No shift table: nothing is predicted. <code>dyndit calibrate</code> measures one.</p>"
    shown = [*points, *([chosen] if chosen else ())]
    low, high = min(p.fd for p in shown), max(p.fd for p in shown)
    span = (high - low) or 1.0

    def at(point: Point) -> tuple[float, float]:
        return 44 + 460 * min(max(point.share, 0), 1.05), 150 - 125 * (point.fd - low) / span

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, points))
    parts = [f'<polyline points="{line}" fill="none" stroke="{BLUE}" stroke-width="2"/>']
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{BLUE}"/>' for x, y in map(at, points)]
    parts += [_text(40, 154, f"{low:.1f}", "end"), _text(40, 30, f"{high:.1f}", "end")]
    parts += [_text(44 + 460 * share, 168, f"{share:.0%}") for share in (0.25, 0.5, 0.75, 1.0)]
    parts.append(_text(274, 183, "predicted share of full depth's time; upwards: predicted Fréchet distance"))
    if chosen:
        x, y = at(chosen)
        parts.append(f'<circle id="chosen" cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{MARK}"/>')
    return _svg(540, 190, "Predicted distance over predicted time", *parts)
