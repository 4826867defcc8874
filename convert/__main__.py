"""Convert a model between formats: `gluprune convert`, `python -m convert`."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import convert
from gluprune_jax.cli import options, terminal
from gluprune_jax.cli.processes import ProcessesRequest
from gluprune_jax.errors import RequestError
from gluprune_jax.files.object_store import Folder, folder_at

if TYPE_CHECKING:
    from convert.gguf.widths import Widths
    from gluprune_jax.memory.mesh_choice import MeshRequest

DESCRIPTION = """\
Converts a checkpoint between formats without changing a bit of its weights (unless --dtype asks).

examples:
  gluprune convert model.gguf model-hf                        GGUF to safetensors
  gluprune convert meta-llama/Llama-3.2-1B llama-1b --format orbax
  gluprune convert llama-1b/orbax llama-1b-hf                 Orbax back to safetensors
  gluprune convert llama-1b llama-1b.gguf --gguf-type F16     a file for llama.cpp
  gluprune convert llama-1b q4.gguf --quantize Q4_K_M         quantised by llama.cpp itself
  gluprune convert llama-1b-p10 padded --pad-to 256           widths that llama.cpp quantises well
"""
START = "python -m convert"


@dataclasses.dataclass(frozen=True)
class ConvertRequest:
    """What is to be converted; the fields are options and arguments of the same names."""

    model: str
    output: Folder
    format: str | None
    gguf_type: str | None
    gguf_widths: "Widths | None"
    quantize: str | None
    pad_to: int
    push_to_hub: str | None
    private: bool
    dtype: str | None
    revision: str | None
    overwrite: bool
    json: bool
    devices: "MeshRequest"
    distributed: bool


def parser(start: str = START) -> terminal.ArgumentParser:
    """The command line; `start` is what it begins with."""
    parser = terminal.ArgumentParser(start, DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    parser.add_argument(
        "output",
        type=folder_at,
        metavar="OUTPUT",
        help="folder to write; of Orbax also gs://..., of GGUF also FILE.gguf",
    )
    for flag in ("--format", "--gguf-type", "--gguf-widths", "--quantize", "--pad-to", "--dtype", "--revision"):
        options.add(parser, flag)
    for flag in ("--push-to-hub", "--private"):
        options.add(parser, flag)
    options.add_devices(parser, "from file to file where that is possible, else one model over all devices")
    options.add(parser, "--overwrite", about="a model folder or GGUF file at OUTPUT")
    options.add(parser, "--json")
    options.add(parser, "--debug")
    return parser


def main(argv: Sequence[str] | None = None, *, start: str = START) -> int:
    """Runs the command line, which begins with `start`, and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser(start).parse_args(argv)
    request = options.request(ConvertRequest, args, devices=options.mesh_request(args))
    return terminal.run(
        "gluprune",
        lambda: _convert(request),
        debug=args.debug,
        processes=options.request(ProcessesRequest, args),
        flags=parser().flags,
        kept=lambda: f"nothing is left half written; to start again:\n  {shlex.join([*start.split(), *argv])}",
    )


def _convert(request: ConvertRequest) -> None:
    from convert.gguf.export import gguf_options  # here: help and a refused argument need no JAX
    from convert.huggingface.push import check_options, check_push, push_to_hub
    from convert.output import check_format, check_not_own_folder, check_padding, check_target, parse_formats
    from convert.sources import loaded_whole
    from convert.store import load_or_open
    from gluprune_jax.parallel.distributed import is_main, synchronize_errors

    formats = parse_formats(request.format, request.output)
    gguf = gguf_options(formats, request.output, request.gguf_type, request.gguf_widths, request.quantize)
    check_padding(request.pad_to, formats)
    check_options(request.push_to_hub, request.private, request.output)
    with synchronize_errors():
        if is_main():
            check_format(request.output, formats)
            check_target(request.output, request.overwrite)
            check_not_own_folder(request.model, request.output)
            if request.push_to_hub:
                check_push(request.push_to_hub, private=request.private, overwrite=request.overwrite)
    streams = "orbax" not in formats and request.devices.mesh == "auto" and not request.distributed
    mesh = None
    if not streams or loaded_whole(request.model) or request.devices.device_memory is not None:
        from gluprune_jax.memory.mesh_choice import mesh_chooser  # here: from file to file no device is asked for
        from gluprune_jax.memory.plan import Pruning

        mesh = mesh_chooser(request.devices, [Pruning()])
    with terminal.byte_progress() as progress:
        checkpoint = load_or_open(
            request.model,
            dtype=request.dtype,
            revision=request.revision,
            stream=streams,
            mesh=mesh,
            progress=progress,
        )
        if isinstance(checkpoint, convert.MixtureCheckpoint):
            _check_one_process(request)
            parameters = checkpoint.sizes.num_parameters
        else:
            parameters = checkpoint.config.num_parameters
        notes = convert.save(
            checkpoint,
            request.output,
            formats=formats,
            overwrite=request.overwrite,
            gguf=gguf,
            pad_to=request.pad_to,
            progress=progress,
        )
    if request.push_to_hub:
        with synchronize_errors():
            if is_main():
                push_to_hub(
                    Path(str(request.output)),
                    request.push_to_hub,
                    private=request.private,
                    overwrite=request.overwrite,
                )
    if request.json:
        report = {
            "model": request.model,
            "output": str(request.output),
            "formats": formats,
            "parameters": parameters,
            "notes": [*checkpoint.notes, *notes],
        }
        if request.push_to_hub:
            report["pushed_to"] = request.push_to_hub
        print(json.dumps(report, indent=1))
        return
    for note in (*checkpoint.notes, *notes):
        terminal.note(note)
    print(f"wrote {' and '.join(formats)} to {request.output}: {parameters:,} parameters")
    if request.push_to_hub:
        print(f"uploaded to https://huggingface.co/{request.push_to_hub}")


def _check_one_process(request: ConvertRequest) -> None:
    """Refuses options of a model that lies on devices, of a mixture of experts."""
    given = {
        "--mesh": request.devices.mesh != "auto",
        "--device-memory": request.devices.device_memory is not None,
        "--distributed": request.distributed,
    }
    if flags := [flag for flag, is_given in given.items() if is_given]:
        raise RequestError(
            f"{' and '.join(flags)} cannot be given for {request.model}: a mixture of experts is converted from file "
            f"to file by one process; leave {'them' if len(flags) > 1 else 'it'} out"
        )


if __name__ == "__main__":
    sys.exit(main())
