"""The page itself, in Gradio: inputs on the left; full depth and the plan side by side on the right."""

# pyright: reportMissingImports=false
# gradio is an extra.

import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dyndit.demo import drawings
from dyndit.demo.studio import MOST_SCALE, MOST_STEPS, MOST_TEXT, Request, Side, Studio
from dyndit.errors import InputError
from dyndit.models.conditions import Value

if TYPE_CHECKING:
    import gradio

MOST_WAITING = 20
"""Visitors in the queue."""
MOST_BYTES = 1
"""Largest file that a visitor may leave: the page takes none, but Gradio's address for them cannot be switched off."""
ABOUT = (
    "Both sides start from the same noise. The left side runs every block at every step, the right side the plan below "
    "it. Times are measured here and now, decoding left out."
)


def build(studio: Studio) -> "gradio.Blocks":
    """Build the page over a studio. Nothing that one visitor does is seen by another."""
    import gradio as gr

    form = studio.form
    most = form.most_pictures
    with gr.Blocks(title=f"dyndit: {studio.name}", analytics_enabled=False) as page:
        gr.Markdown(f"# {_plain(studio.name)}: full depth and dynamic depth\n\n{ABOUT} {studio.about}")
        with gr.Row():
            with gr.Column(scale=1, min_width=280, elem_id="left"):
                with gr.Column(elem_id="ask", min_width=280):
                    if form.labels:
                        values = gr.Dropdown(
                            list(form.labels),
                            value=list(form.first),
                            multiselect=True,
                            max_choices=most,
                            label=f"Classes, a picture each (at most {most})",
                            elem_id="values",
                        )
                    else:
                        values = gr.Textbox(
                            "\n".join(map(str, form.first)),
                            lines=3,
                            max_length=(MOST_TEXT + 1) * most,
                            label=f"Prompts, one a line (at most {most})",
                            info=form.hint or None,
                            elem_id="values",
                        )
                    budget = gr.Slider(
                        studio.planner.least_budget, 1, studio.planner.usual_budget, step=0.01,
                        label="Budget: share of full depth's time", elem_id="budget",
                    )  # fmt: skip
                    draw = gr.Button("Draw", variant="primary", elem_id="draw")
                    said = gr.Markdown(elem_id="said")
                with gr.Column(elem_id="more", min_width=280):
                    steps = gr.Slider(1, MOST_STEPS, 10, step=1, label="Steps", elem_id="steps")
                    scale = gr.Slider(
                        1, MOST_SCALE, form.scale, step=0.1, label="Guidance scale", interactive=form.guided,
                        elem_id="scale",
                    )  # fmt: skip
                    with gr.Row():
                        seed = gr.Number(0, precision=0, label="Seed", min_width=100, elem_id="seed")
                        solver = gr.Dropdown(
                            [(name.removesuffix("Scheduler"), name) for name in form.solvers],
                            value=form.solvers[0], label="Solver", min_width=150, elem_id="solver",
                        )  # fmt: skip
            with gr.Column(scale=2, min_width=300, elem_id="shown"):
                pictures = gr.HTML(drawings.sides(None, None), elem_id="pictures")
                with gr.Row():
                    with gr.Column(min_width=280):
                        plan = gr.HTML(elem_id="plan")
                    with gr.Column(min_width=280):
                        frontier = gr.HTML(elem_id="frontier")
        inputs = [values, seed, solver, steps, scale, budget]

        def chosen(*given: object) -> Iterator[tuple[object, ...]]:
            """Show the plan, then its place on the frontier, without drawing."""
            try:
                asked = _request(studio, *given)
                found = drawings.plan_map(studio.plan(asked))
                yield found, gr.skip(), ""
                yield found, _frontier(studio, asked), ""
            except Exception as error:
                yield "", "", _told(error)

        def drawn(*given: object) -> Iterator[tuple[object, ...]]:
            """Draw both sides, a step at a time."""
            try:
                asked = _request(studio, *given)
                yield gr.skip(), gr.skip(), _frontier(studio, asked), f"Seed {asked.seed}."
                for full, dynamic in studio.draw(asked):
                    both = drawings.sides(full, dynamic, "Begins when full depth is drawn")
                    maps = gr.skip() if dynamic is None else drawings.plan_map(dynamic.plan, dynamic.step)
                    yield both, maps, gr.skip(), f"Seed {asked.seed}. {_times(studio, full, dynamic)}"
            except Exception as error:
                yield drawings.sides(None, None), "", "", _told(error)

        for event in (page.load, solver.change, steps.change, scale.change, budget.change):
            event(
                chosen, inputs, [plan, frontier, said],
                show_progress="hidden", api_visibility="private", trigger_mode="always_last",
            )  # fmt: skip
        draw.click(None, None, said, js="() => 'Waiting for the drawings before this one.'")
        draw.click(
            drawn, inputs, [pictures, plan, frontier, said],
            show_progress="minimal", show_progress_on=said, api_visibility="private",
        )  # fmt: skip
    # One at a time: the machine is shared, and two drawings at once would falsify each other's times.
    return page.queue(max_size=MOST_WAITING, default_concurrency_limit=1, api_open=False)


def launch(page: "gradio.Blocks", host: str, port: int | None) -> None:
    """Serve the page in threads of their own. port: None takes a free one.

    Raises InputError: the port is taken.
    """
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            max_file_size=MOST_BYTES,
            enable_monitoring=False,
            css=drawings.STYLE,
        )
    except OSError as error:
        raise InputError(f"--port {port}: {error}; expected a free port") from error


def _request(studio: Studio, *given: Any) -> Request:
    """Make a request of what the page sent. A page can send anything, so everything is checked here."""
    values, seed, solver, steps, scale, budget = given
    try:
        if studio.form.labels:
            chosen: tuple[Value, ...] = tuple(int(str(value)) for value in values or ())
        else:
            chosen = tuple(line.strip() for line in str(values or "").splitlines() if line.strip())
        asked = Request(chosen, int(seed), str(solver), int(steps), float(scale), float(budget))
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError("a field is empty or no number; expected a value in every field") from error
    studio.check(asked)
    return asked


def _frontier(studio: Studio, asked: Request) -> str:
    planner, full = studio.planner, studio.full(asked)
    point = planner.point(planner.plan(full, asked.budget))
    return drawings.frontier(planner.frontier(full), planner.rivals(full), point, planner.caution(full))


def _times(studio: Studio, full: Side, dynamic: Side | None) -> str:
    if dynamic is None:
        return f"Step {full.step} of {full.plan.num_steps} at full depth, {drawings.milliseconds(full.seconds)}."
    saved = 1 - dynamic.seconds / full.seconds
    part = f"**{saved:.0%} of the time saved**" if saved >= 0 else f"none of the time saved ({-saved:.0%} more)"
    told = (
        f"Step {full.step} of {full.plan.num_steps}: full depth {drawings.milliseconds(full.seconds)}, dynamic depth "
        f"{drawings.milliseconds(dynamic.seconds)}: {part}, at {dynamic.plan.share_of_blocks:.0%} of the blocks"
    )
    if studio.planner.table is None:
        return f"{told}."
    return f"{told}. Predicted: {1 - studio.planner.share_of_time(dynamic.plan):.0%} saved."


def _told(error: Exception) -> str:
    """Write an error for a visitor. What is no wrong input is for whoever serves the page, so it is printed there."""
    if isinstance(error, InputError):
        return f"**{_plain(error)}**"
    traceback.print_exception(error)
    return "**This drawing failed. What serves the page has printed why; expected a smaller one.**"


def _plain(text: object) -> str:
    """Escape what Markdown would read as markup."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#!|" else c for c in str(text))
