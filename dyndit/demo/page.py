"""The page itself, in Gradio: inputs on the left, full depth and the plan side by side on the right."""

# pyright: reportMissingImports=false
# gradio is an extra.

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from PIL import Image

from dyndit.demo import drawings
from dyndit.demo.studio import MOST_PICTURES, MOST_SCALE, MOST_STEPS, Point, Request, Side, Studio
from dyndit.errors import InputError
from dyndit.models.conditions import ClassLabels, Value
from dyndit.pictures import grid

if TYPE_CHECKING:
    import gradio

MOST_WAITING, MOST_TEXT = 20, 200
"""Visitors in the queue, and characters of a prompt."""
ABOUT = (
    "Both sides start from the same noise. The left side runs every block at every step; the right side runs the plan "
    "below it. Times are measured here and now, decoding left out; the first drawing is slower, because it warms up."
)


def require_gradio() -> Any:
    """Import Gradio. Raises InputError: it is not installed."""
    try:
        import gradio
    except ImportError as error:
        raise InputError("dyndit demo: Gradio is missing; expected `pip install 'dyndit[demo]'`") from error
    return gradio


def build(studio: Studio) -> "gradio.Blocks":
    """Build the page over a studio. Nothing that one visitor does is seen by another."""
    gr = require_gradio()
    condition = studio.model.backbone.condition
    labels = isinstance(condition, ClassLabels)
    first = Request(tuple(condition.in_turn(min(4, MOST_PICTURES))))
    with gr.Blocks(title=f"dyndit: {studio.name}", analytics_enabled=False) as page:
        gr.Markdown(f"# {studio.name}: full depth and dynamic depth\n\n{ABOUT}")
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                if labels:
                    values = gr.Dropdown(
                        [str(n) for n in range(condition.num_classes)],
                        value=[str(v) for v in first.values],
                        multiselect=True,
                        max_choices=MOST_PICTURES,
                        label=f"Classes, one picture each (at most {MOST_PICTURES})",
                        elem_id="values",
                    )
                else:
                    values = gr.Textbox(
                        "\n".join(map(str, first.values)),
                        lines=4,
                        max_length=MOST_TEXT * MOST_PICTURES,
                        label=f"Prompts, one a line (at most {MOST_PICTURES})",
                        elem_id="values",
                    )
                seed = gr.Number(0, precision=0, label="Seed", elem_id="seed")
                usual = studio.model.process.usual_solver
                solver = gr.Dropdown(studio.solvers, value=usual, label="Solver", elem_id="solver")
                steps = gr.Slider(1, MOST_STEPS, first.steps, step=1, label="Steps", elem_id="steps")
                scale = gr.Slider(
                    1, MOST_SCALE, 1.5 if condition.guided else 1, step=0.1, label="Guidance scale",
                    interactive=condition.guided, elem_id="scale",
                )  # fmt: skip
                budget = gr.Slider(
                    studio.least_budget, 1, 0.5, step=0.01, label="Budget: share of full depth's time",
                    elem_id="budget",
                )  # fmt: skip
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                said = gr.Markdown(elem_id="said")
            with gr.Column(scale=2, min_width=300):
                with gr.Row():
                    sides = [
                        gr.Image(label=label, format="png", interactive=False, elem_id=name, buttons=[])
                        for label, name in (("Full depth", "full"), ("Dynamic depth", "dynamic"))
                    ]
                plan = gr.HTML(elem_id="plan")
                frontier = gr.HTML(elem_id="frontier")
        inputs = [values, seed, solver, steps, scale, budget]

        def request(*given: object) -> Request:
            return _request(studio, *given)

        def chosen(*given: object) -> tuple[str, str, str]:
            """Show the plan and its place on the frontier, without drawing."""
            try:
                asked = request(*given)
                return drawings.plan_map(studio.plan(asked)), _frontier(studio, asked), ""
            except InputError as error:
                return "", "", f"**{_plain(error)}**"

        def drawn(*given: object) -> Iterator[tuple[object, ...]]:
            """Draw both sides, a step at a time."""
            try:
                asked = request(*given)
                placed = _frontier(studio, asked)
                for full, dynamic in studio.draw(asked):
                    maps = drawings.plan_map(dynamic.plan, dynamic.step)
                    yield _picture(full), _picture(dynamic), maps, placed, f"Seed {asked.seed}. {_times(full, dynamic)}"
            except InputError as error:
                yield None, None, "", "", f"**{_plain(error)}**"

        shown = {"inputs": inputs, "outputs": [plan, frontier, said], "show_progress": "hidden", "api_name": False}
        page.load(chosen, **shown)
        for control in (solver, steps, scale):
            control.change(chosen, **shown, trigger_mode="always_last")
        budget.change(chosen, **shown, trigger_mode="always_last")
        draw.click(drawn, inputs, [*sides, plan, frontier, said], show_progress="hidden", api_name=False)
    # One at a time: the machine is shared, and two drawings at once would falsify each other's times.
    return page.queue(max_size=MOST_WAITING, default_concurrency_limit=1, api_open=False)


def _request(studio: Studio, values: Any, seed: Any, *others: Any) -> Request:
    """Make a request of what the page sent. A page can send anything, so everything is checked here."""
    solver, steps, scale, budget = others
    try:
        if isinstance(studio.model.backbone.condition, ClassLabels):
            chosen: tuple[Value, ...] = tuple(int(str(value)) for value in values or ())
        else:
            chosen = tuple(line.strip()[:MOST_TEXT] for line in str(values or "").splitlines() if line.strip())
        asked = Request(chosen, int(seed), str(solver), int(steps), float(scale), float(budget))
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError("a field is empty or no number; expected a value in every field") from error
    asked.check()
    if asked.solver not in studio.solvers:
        raise InputError(f"solver {asked.solver[:40]}: expected one of {', '.join(studio.solvers)}")
    return asked


def _frontier(studio: Studio, asked: Request) -> str:
    plan = studio.plan(asked)
    fd = plan.figures.get("predicted_fd")
    point = None if fd is None else Point(asked.budget, studio.share_of_time(plan), fd)
    return drawings.frontier(studio.frontier(asked), point)


def _picture(side: Side) -> Image.Image:
    return grid(side.pictures, columns=4, least=480)


def _times(full: Side, dynamic: Side) -> str:
    saved = 1 - dynamic.seconds / full.seconds
    return (
        f"Step {full.step} of {full.plan.num_steps}: full depth {1e3 * full.seconds:.0f} ms, dynamic "
        f"{1e3 * dynamic.seconds:.0f} ms: **{saved:.0%} of the time saved**, at "
        f"{dynamic.plan.share_of_blocks:.0%} of the blocks."
    )


def _plain(error: Exception) -> str:
    """Escape what Markdown would read as markup."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#!|" else c for c in str(error))
