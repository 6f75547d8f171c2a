"""The sums of a fit in a file, so that a pass over the data outlives its process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from pyro_subnet.exceptions import CheckpointError, OptionError
from pyro_subnet.files.checkpoint import check_subnet
from pyro_subnet.files.fields import FIT, SITES, SUMS, Fields, check_fields
from pyro_subnet.files.fingerprint import check_sites, digest, site_records
from pyro_subnet.files.safe_file import Content, check_path, read_file, write_file
from pyro_subnet.options import FitOptions, is_count
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.stored import check_stored
from pyro_subnet.tracing.data import Batch, Data
from pyro_subnet.tracing.trace import Latents

KIND = "fit"
_WAY_OUT = "Put it back to resume, or delete the file to start over."
# Names of the tensors that are not the sums'.
_POSITIONS, _CPU_RNG, _CUDA_RNG = "subnet_positions", "rng_cpu", "rng_cuda"


@runtime_checkable
class Sums(Protocol):
    """What a pass over the data adds up."""

    def state(self) -> tuple[dict[str, Tensor], Content]:
        """All that was added so far: tensors, and what JSON holds."""

    def restore(self, tensors: dict[str, Tensor], content: Content) -> None:
        """Undoes :meth:`state`."""

    def check_again(self, batch: Batch, *, same_prior: bool) -> None:
        """Checks the model in the batch that was added last, and reads its prior."""


@final
@dataclass
class FitCheckpoint:
    """A file that holds the sums of a fit after every so many batches.

    Made by :meth:`open`.

    Attributes:
        every: Number of batches after which it is written.
        identity: What the fit must have in common with the file.
        rng_device: Whose random state is kept, for curvatures that draw labels; else
            None.
        subnet: The chosen subnet, as soon as there is one.
        tensors: Tensors of the sums, as the file had them.
        content: What JSON holds of the sums; None in a fit that starts.
        done: Number of batches that the file had summed.
        batches: The hash of those, each with all before it.
    """

    path: str | os.PathLike[str]
    every: int
    identity: Content
    rng_device: torch.device | None
    subnet: Subnet | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    content: Content | None = None
    done: int = 0
    batches: str = field(default_factory=digest)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        every: int,
        guide: AutoContinuous,
        options: FitOptions,
        fit: tuple[Data, Any],
    ) -> FitCheckpoint:
        """Reads the file, if there is one, and compares it with the fit."""
        # Of a fit over ranks each has a file of its own.
        if not is_count(every):
            raise OptionError(
                f"`checkpoint_every` must be a positive count of batches; got {every}. "
                "Leave it out for 100."
            )
        data, selector = fit
        loc: Tensor = guide.loc.detach()
        passes = getattr(selector, "passes_over_data", False)
        identity: Content = {
            "sites": site_records(guide),
            "MAP": digest(loc),
            "options": asdict(options),
            "num_data": None if data.num_data is None else int(data.num_data),
            # Selectors without a pass are asked again, and must choose the same.
            "selector": digest(selector) if passes else None,
        }
        if data.ranks is not None:
            path = f"{os.fspath(path)}.rank{data.ranks.rank}"
            identity["rank"] = [data.ranks.rank, data.ranks.size]
        check_path(path)
        random = options.curvature == "ggn-mc"
        new = cls(path, every, identity, loc.device if random else None)
        if Path(path).exists():
            new._read(Latents.from_guide(guide, loc))
        return new

    @property
    def chosen(self) -> Subnet | None:
        """The file's subnet, where choosing it took a pass over the data."""
        return self.subnet if self.identity["selector"] is not None else None

    def keep_subnet(self, subnet: Subnet) -> None:
        """Writes the subnet of a fit that starts; compares that of one that resumes."""
        if self.subnet is None:
            self.subnet = subnet
            self._write({}, None, 0, self.batches)
        elif not torch.equal(self.subnet.flat, subnet.flat):
            raise self._differs("`subnet`")

    def batches_left(self, subnet: Subnet, data: Data, sums: Sums) -> Iterator[Batch]:
        """The batches of a fit that the file has not summed yet, after a comparison."""
        self.keep_subnet(subnet)
        return self.calls(data, "Curvature", sums)

    def calls(self, data: Data, description: str, sums: Sums) -> Iterator[Batch]:
        """Yields the batches that are not summed yet; writes the sums in between."""
        if self.content is not None:
            rng = self._rng_tensors()
            own = {name: t for name, t in self.tensors.items() if name not in rng}
            sums.restore(own, self.content)
            self.tensors = rng  # the sums hold the others
        count, hashed = 0, digest()
        if self.done == 0:
            self._restore_rng()
        for batch in data.calls(description):
            count, hashed = count + 1, digest(hashed, batch)
            if count <= self.done:
                # The file's last batch: all before it are hashed into its digest.
                if count == self.done:
                    self._check_batches(hashed)
                    # A subnet that took a pass was chosen under the file's prior.
                    chosen = self.identity["selector"] is not None
                    sums.check_again(batch, same_prior=chosen)
                    self._restore_rng()
                continue
            yield batch
            if count % self.every == 0:
                self._write(*sums.state(), count, hashed)
        if count < self.done:
            raise CheckpointError(
                f"`batches` must begin with the {self.done} that {self._name} has "
                f"summed; got {count} in all. {_WAY_OUT}"
            )

    def remove(self) -> None:
        """Deletes the file, once the fit is done."""
        Path(os.path.realpath(self.path)).unlink(missing_ok=True)

    @property
    def _name(self) -> str:
        return repr(os.fspath(self.path))

    def _differs(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{what} must be as in the fit that {self._name} was begun with; got "
            f"another. {_WAY_OUT}"
        )

    def _check_batches(self, hashed: str) -> None:
        if hashed != self.batches:
            raise CheckpointError(
                f"`batches` must begin with the {self.done} that {self._name} has "
                f"summed, in the same order; got others. Load without shuffling, and "
                "delete the file to start over."
            )

    def _read(self, latents: Latents) -> None:
        tensors, content = read_file(self.path, KIND)
        check_fields(content, FIT)
        recorded, sums, done = content["identity"], content["sums"], content["done"]
        known: Fields = dict.fromkeys(self.identity, (lambda value: True, "anything"))
        check_fields(recorded, {**known, "sites": SITES}, "identity.")
        if sums is not None:
            check_fields(sums, SUMS, "sums.")
        if (sums is None) != (done == 0):
            raise CheckpointError(
                "The file's sums must be those of the batches that it counts; got "
                f"{done} batches{'' if sums else ' without sums'}. Take another copy."
            )
        try:
            check_sites(self.identity["sites"], recorded["sites"])
        except CheckpointError as error:
            raise CheckpointError(f"{error} {_WAY_OUT}") from error
        for key in self.identity:
            if self.identity[key] == recorded[key]:
                continue
            if key in ("MAP", "selector"):
                raise self._differs({"selector": "`subnet`"}.get(key, "The MAP"))
            raise CheckpointError(
                f"`{key}` must be as in the fit that {self._name} was begun with, "
                f"{recorded[key]}; got {self.identity[key]}. {_WAY_OUT}"
            )
        share, held = content["explained_variance"], tensors.pop(_POSITIONS, None)
        own = {} if held is None else {_POSITIONS: held}
        check_stored(own, {_POSITIONS: ("S",)}, {_POSITIONS: torch.int64}, {})
        positions = own[_POSITIONS].to(latents.loc.device)
        check_subnet(latents.layout, positions)
        self.subnet = Subnet(latents.layout, positions, share)
        self.tensors, self.content = tensors, sums
        self.done, self.batches = done, content["batches"]
        self._check_rng()

    def _write(
        self, tensors: dict[str, Tensor], sums: Content | None, done: int, batches: str
    ) -> None:
        if self.subnet is None:
            raise CheckpointError(
                "A fit must have a subnet before it is written; got none. Call "
                "`keep_subnet` first."
            )
        content: Content = {
            "identity": self.identity,
            "explained_variance": self.subnet.explained_variance,
            "sums": sums,
            "done": done,
            "batches": batches,
        }
        held = {_POSITIONS: self.subnet.flat, **self._rng_state(), **tensors}
        write_file(self.path, KIND, held, content)

    def _rng_state(self) -> dict[str, Tensor]:
        if self.rng_device is None:
            return {}
        state = {_CPU_RNG: torch.get_rng_state()}
        if self.rng_device.type == "cuda":
            state[_CUDA_RNG] = torch.cuda.get_rng_state(self.rng_device)
        return state

    def _rng_tensors(self) -> dict[str, Tensor]:
        names = (_CPU_RNG, _CUDA_RNG)
        return {name: self.tensors[name] for name in names if name in self.tensors}

    def _check_rng(self) -> None:
        """Refuses random states that no generator takes, or that are missing."""
        wanted = {} if self.rng_device is None else {_CPU_RNG: torch.device("cpu")}
        if self.rng_device is not None and self.rng_device.type == "cuda":
            wanted[_CUDA_RNG] = self.rng_device
        try:
            for name, device in wanted.items():
                torch.Generator(device).set_state(self.tensors[name])
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{self._name} must hold the random state of the fit; got one that is "
                f"none: {error}. Take another copy of it."
            ) from error

    def _restore_rng(self) -> None:
        """Sets the random state that the file was written at, if it has one."""
        if _CPU_RNG in self.tensors:
            torch.set_rng_state(self.tensors[_CPU_RNG])
        if self.rng_device is not None and _CUDA_RNG in self.tensors:
            torch.cuda.set_rng_state(self.tensors[_CUDA_RNG], self.rng_device)
