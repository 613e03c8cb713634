"""The command line. Every verb is a thin function over the package; what it does, a notebook can call too.

Verbs import what they need when they run, so that `--help` is quick.
"""

import sys
from collections.abc import Callable, Sequence

import tyro

from dyndit.cli.models import convert, distill, train
from dyndit.cli.pictures import sample
from dyndit.cli.plans import calibrate
from dyndit.cli.results import bench, compare, evaluate, quickstart, report
from dyndit.errors import InputError
from dyndit.runtime import keep_freed_memory

VERBS: dict[str, Callable[..., None]] = {
    verb.__name__: verb
    for verb in (train, distill, calibrate, sample, evaluate, bench, report, compare, convert, quickstart)
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb; bad input is one line and exit status 2, with a traceback only under `--debug`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    keep_freed_memory()
    try:
        tyro.extras.subcommand_cli_from_dict(
            VERBS,
            prog="dyndit",
            description="Diffusion Transformers that stop early. --debug before or after a verb shows tracebacks.",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
    except InputError as error:
        if debug:
            raise
        print(f"dyndit: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if debug or error.filename is None:
            raise
        print(f"dyndit: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("dyndit: stopped", file=sys.stderr)
        sys.exit(130)
