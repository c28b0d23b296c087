"""Files: atomic writes, strict reads, and every refusal of the operating system as one plain sentence.

A file is either the old one or the new one, never half of either: a write goes to a temporary neighbour, is flushed
to the disk and then renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunecli.errors import PruneError
from prunecli.values.value import Value


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write ``path`` into one plain sentence.

    Raises:
        PruneError: the write failed; names the path, the reason and the next step.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)  # safetensors' own errors have none, only the system's text
        if code is None and "No space left" in str(error):
            code = errno.ENOSPC
        reasons = {
            errno.ENOSPC: ("the disk is full", "Free some space, then run again with --resume."),
            errno.EDQUOT: ("the disk quota is used up", "Free some space, then run again with --resume."),
            errno.EROFS: ("the file system is read-only", "Choose another folder with --out."),
            errno.EACCES: ("permission is denied", "Choose another folder with --out."),
            errno.EEXIST: ("a file stands where a folder is needed", "Choose another folder with --out."),
            errno.ENOTDIR: ("a file stands where a folder is needed", "Choose another folder with --out."),
        }
        reason, hint = reasons.get(code or 0, (str(error), None))
        raise PruneError(f"Cannot write {path}: {reason}.", hint=hint) from error


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary neighbour, then rename it over ``path``.

    The file gets the mode the user's umask asks for (safetensors leaves 0600 behind).

    Args:
        path: file to create or replace; missing folders above it are made.
        write: function that writes the whole content to the path it is given.

    Raises:
        PruneError: the operating system refuses the write.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            write(temporary)
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            umask = os.umask(0)  # it can only be read by setting it
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically.

    Raises:
        PruneError: the operating system refuses the write.
    """
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write a JSON document atomically.

    Raises:
        PruneError: the operating system refuses the write.
        ValueError: a NaN or infinite number, which JSON does not have.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write safetensors atomically; tensors that share memory are written under each of their names.

    Args:
        path: file to create or replace.
        tensors: name → tensor, on any device.
        metadata: further text entries of the file's header.

    Raises:
        PruneError: the operating system refuses the write.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        save_file(plain, temporary, metadata={"format": "pt", **(metadata or {})})
        _sort_header_(temporary)

    write_atomic(path, write)


def _sort_header_(path: Path) -> None:
    """Give equal contents equal bytes: safetensors writes its metadata in another order each time."""
    with path.open("r+b") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        handle.seek(8)
        handle.write(text.ljust(length))  # spaces are allowed at its end; the data behind it must not move


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        PruneError: the file is missing or broken; names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PruneError(f"{path} is missing.") from None
    except (OSError, ValueError) as error:
        raise PruneError(f"{path} is not readable JSON ({error}).") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Name → tensor of a safetensors file, on the CPU.

    Tensors get memory of their own: the file may be replaced later, and mapped memory is not aligned for kernels.

    Raises:
        PruneError: the file is missing, truncated or no safetensors file; names it.
    """
    try:
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except FileNotFoundError:
        raise PruneError(f"{path} is missing.") from None
    except (OSError, SafetensorError) as error:
        raise PruneError(f"{path} is truncated or not a safetensors file ({error}).") from None
    return tensors


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


V = TypeVar("V", bound=Value)


def read_value(kind: type[V], path: Path) -> V:
    """A value of type ``kind`` from its JSON file.

    Raises:
        PruneError: the file is missing, broken or does not hold such a value; names it.
    """
    values = read_json(path)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise PruneError(f"{path} is damaged: {error.errors()[0]['msg']}.") from None
