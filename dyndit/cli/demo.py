"""The verb that serves a page to play with: demo."""

from functools import partial
from pathlib import Path

from dyndit.cli import flags


def demo(
    model: flags.Positional[str] = "digits",
    /,
    out: Path = Path("runs/quickstart"),
    vae: flags.Vae = None,
    process: str = "",
    host: str = "127.0.0.1",
    port: int = 7860,
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
) -> None:
    """Serve a page: full depth and a plan side by side, from the same seed, as they form. Needs `dyndit[demo]`.

    Args:
        model: A model with exits: a native folder, a hub id, or "digits".
        out: Folder of the quickstart's run. "digits" takes its exits and table from there, or makes them there first.
        process: Process of a model that does not say its own, one of {processes}.
        host: Address to listen on. 0.0.0.0 lets other machines in.
        port: Port to listen on.
    """
    from dyndit.demo.page import build, require_gradio
    from dyndit.demo.studio import Studio
    from dyndit.errors import InputError
    from dyndit.plans.table import FILE, ShiftTable
    from dyndit.runtime import chosen_device
    from dyndit.storage import load as checkpoints
    from dyndit.training.autoencoders import decode_latents

    require_gradio()
    if not 0 <= port < 65536:
        raise InputError(f"--port {port}: expected 0 to 65535")
    device = chosen_device(device)
    if model == "digits":
        from dyndit.analysis.compare.experiment import Inputs
        from dyndit.analysis.compare.run import prepared
        from dyndit.recipes.digits import quickstart

        with prepared(quickstart, out, Inputs(device=device)) as context:
            studio = Studio(context.model, context.table, name=model)
    else:
        loaded = checkpoints.inspect(model, process=process or None, device=device, dtype=dtype)
        for note in loaded.notes:
            print(note)
        decoder = flags.decoder_of(loaded.model, model, vae, device)
        table = None if loaded.folder is None else loaded.folder / FILE
        options = {} if decoder is None else {"to_pictures": partial(decode_latents, decoder)}
        known = ShiftTable.load(table) if table is not None and table.is_file() else None
        studio = Studio(loaded.model, known, name=Path(model).name, **options)
    page = build(studio)
    try:
        page.launch(server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise InputError(f"--port {port}: {error}; expected a free port") from error
    print(f"{page.local_url}  (Ctrl-C stops it)", flush=True)
    page.block_thread()
