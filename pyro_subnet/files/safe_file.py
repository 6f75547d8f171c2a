"""Files of tensors and numbers that are written whole or not at all, and run no code.

Each is a safetensors file whose header also holds JSON and a SHA-256 of every other
byte of the file: of its data, of the header, and of the padding in between.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import pyro
import safetensors
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyro_subnet._version import __version__
from pyro_subnet.exceptions import CheckpointError, shown

# What files are written now, and the newest that can be read.
FORMAT_VERSION = 1
_CONTENT = "pyro_subnet"
# Within a JSON string quotation marks are escaped, so this finds the entry alone.
_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_NO_DIGEST = b"0" * 64
_CHUNK = 1 << 20

# What else may stand at a path.
_KINDS = {
    stat.S_ISDIR: "directory",
    stat.S_ISFIFO: "pipe",
    stat.S_ISCHR: "device",
    stat.S_ISBLK: "device",
    stat.S_ISSOCK: "socket",
}

Content = dict[str, Any]


def write_file(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor],
    content: Content,
) -> None:
    """Writes tensors and JSON to a file whole, or leaves the one that is there."""
    check_path(path)
    # A link is followed: the file that it points to is replaced.
    target = Path(os.path.realpath(path))
    header = {
        "kind": kind,
        "version": FORMAT_VERSION,
        "pyro_subnet": __version__,
        "torch": str(torch.__version__),
        "pyro": pyro.__version__,
        "safetensors": safetensors.__version__,
        **content,
        # What the file holds, so that one without a tensor is told from a smaller one.
        "tensors": _listed(tensors),
    }
    metadata = {_CONTENT: json.dumps(header), "sha256": _NO_DIGEST.decode()}
    # Written beside the target and synced, then put in its place: a process that is
    # killed meanwhile leaves the target as it was, and perhaps the partial file.
    partial = target.with_name(f".{target.name}.{uuid4().hex}.partial")
    try:
        try:
            partial.touch(exist_ok=False)
            mode = (target if target.exists() else partial).stat().st_mode
            save_file(_on_cpu(tensors), partial, metadata)
            _seal(partial)
            partial.chmod(stat.S_IMODE(mode))  # safetensors has one of its own
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        _sync_directory(target.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"`path` must be one that can be written to; got {str(target)!r}: {error}. "
            "Check that its directory is there, may be written to, and has room."
        ) from error


def read_file(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Tensor], Content]:
    """Tensors, on the CPU and not mapped, and content, after a check of every byte."""
    check_path(path)
    try:
        with open(path, "rb") as file:
            recorded, found, _ = _digests(file)
    except (PermissionError, NotADirectoryError) as error:
        raise CheckpointError(
            f"`path` must be that of a file that can be read; got {error}. Check it."
        ) from error
    if recorded != found:
        raise CheckpointError(
            f"{os.fspath(path)!r} must be as it was written; got a file that is "
            f"truncated or altered: its SHA-256 begins {found[:8].decode()}, the one "
            f"that it holds {recorded[:8].decode()}. Take another copy of it."
        )
    try:
        with safe_open(path, framework="pt") as opened:
            content = json.loads(opened.metadata()[_CONTENT])
            _check_kind(path, kind, content)
            names = opened.keys()
            # Clones: what is mapped into memory changes with the file.
            tensors = {name: opened.get_tensor(name).clone() for name in names}
    except CheckpointError:
        raise
    # JSON that is none, is nested too deep or is no mapping; a type torch has not.
    except (
        SafetensorError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
        RuntimeError,
    ) as error:
        raise CheckpointError(
            f"{os.fspath(path)!r} must be a file that pyro_subnet wrote; got one that "
            f"cannot be read: {error}. Take another copy of it."
        ) from error
    # Files of earlier versions have no list.
    if "tensors" in content and content["tensors"] != _listed(tensors):
        raise CheckpointError(
            f"{os.fspath(path)!r} must hold the tensors that it lists; got others. "
            "Take another copy of it."
        )
    return tensors, content


def check_path(path: str | os.PathLike[str]) -> None:
    """Refuses what is neither a regular file, nor a link to one, nor a new name."""
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(
            f"`path` must be a str or a `pathlib.Path`; got {shown(path)}. Name a file."
        )
    # A device or a pipe would be replaced by a file, or read for ever.
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # links in a circle, no permission, NUL
        raise CheckpointError(
            f"`path` must be one that can be looked up; got {os.fspath(path)!r}: "
            f"{error}. Check its links and directories."
        ) from error
    if not stat.S_ISREG(mode):
        known = (kind for test, kind in _KINDS.items() if test(mode))
        raise CheckpointError(
            "`path` must be that of a regular file, or a new name; got the "
            f"{next(known, 'special file')} {os.fspath(path)!r}. Pass the path of a "
            "file."
        )


def _listed(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Type and shape of each tensor, as JSON holds them."""
    return {name: [str(t.dtype), *t.shape] for name, t in tensors.items()}


def _check_kind(path: str | os.PathLike[str], kind: str, content: Content) -> None:
    if content["version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{os.fspath(path)!r} must have a file format of version {FORMAT_VERSION} "
            f"at most; got version {content['version']}, written by pyro_subnet "
            f"{content['pyro_subnet']}. Upgrade pyro_subnet (now {__version__})."
        )
    if content["kind"] != kind:
        raise CheckpointError(
            f"{os.fspath(path)!r} must hold a {kind}; got a {content['kind']}. Pass "
            "another path."
        )


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What safetensors takes: contiguous tensors, of which no two share memory."""
    held = set[int]()
    ready = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        ready[name] = plain.clone() if address in held else plain
        held.add(address)
    return ready


def _seal(path: Path) -> None:
    """Writes the digest into a file, and the file to the disk."""
    with open(path, "r+b") as file:
        _, digest, position = _digests(file)
        file.seek(position)
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def _digests(file: BinaryIO) -> tuple[bytes, bytes, int]:
    """The digest that a file holds, that of its bytes, and where the first stands."""
    length = int.from_bytes(file.read(8), "little")
    size = os.fstat(file.fileno()).st_size
    header = file.read(length) if length <= size - 8 else b""
    seals = list(_SEAL.finditer(header))
    if len(seals) != 1:
        raise CheckpointError(
            "`path` must be that of a file that pyro_subnet wrote; got "
            f"{str(file.name)!r}, {size} bytes, which is none, or is truncated or "
            "altered at its head. Check the path, or take another copy."
        )
    start, stop = seals[0].span(1)
    total = hashlib.sha256(length.to_bytes(8, "little"))
    total.update(header[:start] + _NO_DIGEST + header[stop:])
    while chunk := file.read(_CHUNK):
        total.update(chunk)
    return seals[0].group(1), total.hexdigest().encode(), 8 + start


def _sync_directory(path: Path) -> None:
    """Makes a file's new name last; Windows has no such call, and needs none."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
