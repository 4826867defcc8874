"""Convert a model between formats: `python -m convert`."""

import argparse
import json
import sys
from collections.abc import Sequence

import convert
from convert.store import DTYPE_NAMES, FORMATS, MODEL_HELP, parse_formats, refuse_format, refuse_own_folder
from gluprune_jax import devices, terminal
from gluprune_jax.atomic import check_target
from gluprune_jax.distributed import failing_together, is_main
from gluprune_jax.memory import Pruning
from gluprune_jax.object_store import folder_at

DESCRIPTION = """\
Converts a Llama-family checkpoint between formats without changing a bit of its weights (unless --dtype asks).

examples:
  python -m convert model.gguf model-hf                        GGUF to safetensors
  python -m convert meta-llama/Llama-3.2-1B llama-1b --format orbax
  python -m convert llama-1b/orbax llama-1b-hf                 Orbax back to safetensors
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = terminal.ArgumentParser("python -m convert", DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("output", type=folder_at, metavar="DIR", help="folder to write; of Orbax also gs://...")
    parser.add_argument(
        "--format", default="hf", metavar="LIST", help=f"{' and/or '.join(FORMATS)}, comma-separated; orbax: DIR/orbax"
    )
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="cast all weights (otherwise each stays as it is stored)")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    devices.add_arguments(parser, "from file to file where that is possible, else one model over all devices")
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder at DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = parser().parse_args(argv)
    return terminal.run("convert", lambda: _convert(args), debug=args.debug, processes=args)


def _convert(args: argparse.Namespace) -> None:
    formats = parse_formats(args.format)
    with failing_together():
        if is_main():
            refuse_format(args.output, formats)
            check_target(args.output, args.overwrite)
            refuse_own_folder(args.model, args.output)
    with terminal.byte_progress() as progress:
        checkpoint = convert.load(
            args.model,
            dtype=args.dtype,
            revision=args.revision,
            stream="orbax" not in formats and args.mesh == "auto" and not args.distributed,
            mesh=devices.chooses(args, [Pruning()]),
            progress=progress,
        )
        convert.save(checkpoint, args.output, formats=formats, overwrite=args.overwrite, progress=progress)
    if args.json:
        report = {
            "model": args.model,
            "output": str(args.output),
            "formats": formats,
            "parameters": checkpoint.config.num_parameters,
            "notes": list(checkpoint.notes),
        }
        print(json.dumps(report, indent=1))
        return
    for note in checkpoint.notes:
        terminal.stderr().print(f"note: {note}", style="dim", markup=False)
    print(f"wrote {' and '.join(formats)} to {args.output}: {checkpoint.config.num_parameters:,} parameters")


if __name__ == "__main__":
    sys.exit(main())
