"""Writes a model again so that it streams well: tensors in the order in which the model uses them, or quantized.

Comes in: any directory that mlx-lm loads, or a GGUF file. Goes out: a directory that mlx-lm loads as well, with a file
for each block in the order of a forward pass, and checksums of everything. Each tensor equals what `mlx_lm.convert`
writes. Each weight is read once, and no more than some pieces of tensors are in memory. A killed run can be continued.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

from .. import platform
from ..errors import ConfigError, ModelError, SlowftError, SlowftWarning
from ..models.loading import resolve
from ..sizes import parse_nbytes
from . import verify as manifest
from .conversion import Conversion, versions
from .options import Options
from .output import check_free_space, refuse_unusable
from .writing import write_model


def prepare(
    path_or_hub_id: str | Path,
    output: str | Path,
    *,
    quantize: bool = False,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    quant_predicate: str | None = None,
    dtype: str | None = None,
    memory: str | int | None = None,
    trust_remote_code: bool = False,
    progress: manifest.Progress | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write a model so that it can be streamed. With `quantize`, it is quantized as by `mlx_lm.convert -q`.

    Args:
        path_or_hub_id: a directory that mlx-lm loads, or a hub id, which is downloaded.
        output: a directory that does not exist yet, is empty, or holds an unfinished run with the same arguments. Such
            a run is continued.
        bits, group_size, mode: as in `mlx_lm.convert`. None is the mode's default ("affine": 4 bits in groups of 64).
        quant_predicate: a recipe of mixed bits, such as "mixed_4_6".
        dtype: the dtype of tensors that are not quantized; None is the config's.
        memory: a ceiling for the whole process, such as "2GB" (or bytes). None is half of this machine's memory.
        trust_remote_code: let the model run code of its own (`model_file` in its config.json).
        progress: is called with (bytes done, bytes in all) of the tensors to be written. Before that, it is called for
            the files of an earlier run while they are hashed again.
        note: is called with what a user should know, such as that an earlier run is continued.
    Returns:
        The output directory.
    Raises:
        ConfigError: options contradict each other, or memory is too little; names the least that would do.
        ModelError: the model is incomplete, of an unknown architecture, or holds NaN or infinity.
        SlowftError: the output cannot be written, or its disk has too little room; names both numbers.
    """
    options = Options(quantize, bits, group_size, mode, quant_predicate, dtype)
    options.check()
    platform.fix_malloc_threshold()
    limit = platform.memory_limit() // 2 if memory is None else parse_nbytes(memory)
    output = Path(output).expanduser()
    refuse_unusable(output)
    path = resolve(str(path_or_hub_id))
    if output.resolve() == path.resolve():
        raise ConfigError(f"--output {output} is the model itself. Give another directory")
    conversion = Conversion(path, options, trust_remote_code)
    for text in conversion.notes:
        warnings.warn(text, SlowftWarning, stacklevel=2)
    write_model(conversion, output, limit, progress, note)
    return output


def prepare_gguf(file: str | Path, output: str | Path, *, progress: manifest.Progress | None = None, **options) -> Path:
    """Write the model directory of a GGUF file and its checksums. The weights are repacked exactly.

    Args:
        options: the options of `prepare`. None of them may be given.
    Raises:
        ConfigError: an option was given.
        ModelError: the file does not exist or cannot be converted.
        SlowftError: the output cannot be written.
    """
    from . import gguf

    file, output = Path(file).expanduser(), Path(output).expanduser()
    if Options(**options) != Options():
        raise ConfigError(
            "a GGUF file is repacked as it is, so --quantize and --dtype have no effect. First: slowft prepare "
            f"{file} --output {file.stem}; then the same options with {file.stem} as MODEL"
        )
    if not file.is_file():
        raise ModelError(f"{file} does not exist. Give a .gguf file, a model directory or a hub id")
    refuse_unusable(output)
    check_free_space(output, file.stat().st_size)
    try:
        made = {"source": str(file.resolve()), "versions": versions()}
        gguf.convert(file, output, progress, lambda whole: manifest.write_manifest(whole, made, progress))
    except OSError as e:
        raise SlowftError(f"{output} cannot be written: {e.strerror}") from None
    return output
