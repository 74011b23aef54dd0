"""GGUF files with fewer bits, by llama.cpp's program `llama-quantize`."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.export.target import OnBytes, Target

SAID_LINES = 3
"""The number of the program's last lines that an error shows."""
MAX_KL = 0.5
"""The default of export.max_kl, in nats per token."""


def in_fewer_bits(whole: Target, program: str, dtype: str) -> Target:
    """The target that quantizes the file of `whole` with the program. Raises ConfigError if the program does not exist."""
    found = found_program(program)

    def write(folder: Path, on_bytes: OnBytes) -> None:
        whole.write(folder, on_bytes)
        (made,) = folder.glob("*.gguf")
        _quantize(found, made, folder / f"model-{dtype.upper()}.gguf", dtype)
        made.unlink()

    return replace(whole, write=write, dtype=dtype, max_kl=MAX_KL, passing_bytes=whole.num_bytes)


def found_program(program: str) -> str:
    """Raises ConfigError if the program does not exist."""
    found = shutil.which(str(Path(program).expanduser()))
    if found is None:
        fix = "Build llama.cpp, or unpack one of its releases, and name the llama-quantize there."
        raise ConfigError("export.llama_quantize", "must be a program that can be run", got=program, fix=fix)
    return found


def _quantize(program: str, whole: Path, place: Path, dtype: str) -> None:
    """Quantize the GGUF file `whole` to `place`. Raises ResourceError with the program's output if it fails."""
    command = [program, str(whole), str(place), dtype.upper()]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise ResourceError(f"{program} can't be run ({error})", "Set export.llama_quantize.") from error
    if done.returncode != 0 or not place.is_file():
        said = " / ".join(line.strip() for line in done.stdout.splitlines()[-SAID_LINES:])
        how = f"ended with {done.returncode}" if done.returncode else "wrote no file"
        raise ResourceError(f"{' '.join(command)} {how}: {said}", "Choose another export.dtype, or fix what it says.")
