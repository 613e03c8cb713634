"""The verb that serves a page to play with: demo."""

from importlib.util import find_spec
from pathlib import Path

from dyndit.cli import flags
from dyndit.errors import InputError


def demo(
    model: flags.Positional[str] = "digits",
    /,
    out: Path = Path("runs/quickstart"),
    exits: Path | None = None,
    table: Path | None = None,
    vae: flags.Vae = None,
    process: str = "",
    shape: tuple[int, ...] = (),
    host: str = "127.0.0.1",
    port: int = 7860,
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
) -> None:
    """Serve a page: full depth and a plan side by side, from the same seed, as they form. Needs `dyndit[demo]`.

    Args:
        model: A model (a folder, a file, a hub id), the folder of a pipeline of diffusers, or "digits".
        out: Folder of the quickstart's run. "digits" takes its exits and table from there, or makes them there first.
        exits: Exits of a pipeline: the file or folder that `distill_exits` wrote. Without it, exits are untrained.
        table: Shift table, or its folder (default: the one beside the exits or in the model's folder).
        process: Process of a model that does not say its own, one of {processes}.
        shape: Height and width of the pictures, or frames, height and width of the clips (default: the model's own).
        host: Address to listen on. 0.0.0.0 lets other machines in.
        port: Port to listen on.
    """
    if not 0 <= port < 65536:
        raise InputError(f"--port {port}: expected 0 to 65535")
    if find_spec("gradio") is None:
        raise InputError("dyndit demo: Gradio is missing; expected `pip install 'dyndit[demo]'`")
    from dyndit.demo.opening import open_digits, open_studio
    from dyndit.demo.page import build, launch
    from dyndit.runtime import chosen_device

    device = chosen_device(device)
    if model == "digits":
        studio = open_digits(out, device)
    else:
        studio = open_studio(
            model, exits=exits, table=table, vae=vae, process=process or None, shape=shape, device=device, dtype=dtype
        )
    flags.say(studio.notes)
    page = build(studio)
    launch(page, host, port)
    print(f"{page.local_url}  (Ctrl-C stops it)", flush=True)
    page.block_thread()
