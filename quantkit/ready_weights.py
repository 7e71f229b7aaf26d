"""The weights of a stored model as its products take them: on the CPU as they are stored, on a device taken apart and stacked.

Who looks at every layer once per sweep, as an evaluation does, keeps no layer: memory is that of one.  Who generates needs every
layer at every step, so on a device those that there is room for stay there as the kernels read them (:mod:`quantkit.kernels`), from
the first time on; the others are brought there at each step, and of them only the experts that tokens go to.  On the CPU it is
:class:`~quantkit.kept_model.KeptModel` that keeps.

Reading takes longer than all else on this road, so what is brought to a device is read by all threads, some experts at a time.

Head and embedding stay on a device as BF16 where that loses nothing, else as float32, and meet the products as float32 tiles, whose
size does not depend on what is kept.  So what there is room for never shows in logits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch

from quantkit.estimate import available_memory
from quantkit.kernels.device_mixture import Mixture, prepare
from quantkit.kernels.device_weights import DeviceWeight, build, kind_of
from quantkit.kernels.weights import AnnouncedExperts, Mlp, Weight
from quantkit.language_model import TABLE_ROWS, embedding_name, gather, head_name
from quantkit.llama4 import Unit, WeightMatrix
from quantkit.stored_model import StoredModel
from quantkit.team import Team, spans

KEPT_TABLE_BYTES = 256 << 20  # of the head in float32 on the CPU; a larger one is read again for every call
DEVICE_TABLE_ROWS = 8192  # of the head in float32 on a device at a time: 168 MB of a Scout's
AHEAD_BYTES = 2 << 30  # of memory, for experts that threads read at the same time
RESERVED_BYTES = 6 << 30  # of a device: keys and values, hidden states, logits


class ReadyWeights(ABC):
    """Weights of ``model``; what is kept is kept as long as this object."""

    def __init__(self, model: StoredModel) -> None:
        self.model, self.config = model, model.config

    @abstractmethod
    def matrices(self, unit: Unit) -> Sequence[Weight | DeviceWeight]:
        """The matrices of a unit, ready for several products."""

    @abstractmethod
    def mixture(self, experts: Sequence[Unit], shared: tuple[Unit, Unit]) -> tuple[Sequence[Mlp] | Mixture, Mlp | None]:
        """Experts of a layer and its shared expert, as :func:`quantkit.kernels.dispatch.moe_forward` takes them.

        experts: gate and up of the first expert, its down, and so on.  shared: gate and up, and down.
        """

    @abstractmethod
    def vector(self, name: str) -> torch.Tensor:
        """A norm, a router or a bias in float32."""

    @abstractmethod
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows ``tokens`` (int64 ``[rows]``) of the embedding, float32 ``[rows, hidden]``."""

    @abstractmethod
    def head(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The head from first to last: number of the first row, some rows in float32, valid until the next are asked for."""

    def _stored_embeddings(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = torch.empty(len(tokens), self.config.hidden_size)
        gather(self.model.rows(embedding_name(self.config), TABLE_ROWS), tokens, hidden)
        return hidden


class StoredWeights(ReadyWeights):
    """For the CPU, whose kernels take matrices as they are stored."""

    def __init__(self, model: StoredModel) -> None:
        super().__init__(model)
        self._head: torch.Tensor | None = None  # [vocabulary, hidden], of small models

    def matrices(self, unit: Unit) -> Sequence[Weight | DeviceWeight]:
        """See :class:`ReadyWeights`."""
        return [self.model.read(matrix) for matrix in unit.matrices]

    def mixture(self, experts: Sequence[Unit], shared: tuple[Unit, Unit]) -> tuple[Sequence[Mlp] | Mixture, Mlp | None]:
        """See :class:`ReadyWeights`."""
        return StoredExperts(self.model, experts), _stored_mlp(self.model, *shared)

    def vector(self, name: str) -> torch.Tensor:
        """See :class:`ReadyWeights`."""
        return self.model.vector(name)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """See :class:`ReadyWeights`."""
        return self._stored_embeddings(tokens)

    def head(self) -> Iterator[tuple[int, torch.Tensor]]:
        """See :class:`ReadyWeights`."""
        name = head_name(self.config)
        if 4 * self.config.vocab_size * self.config.hidden_size > KEPT_TABLE_BYTES:
            yield from self.model.rows(name, TABLE_ROWS)
            return
        if self._head is None:
            self._head = torch.cat([table.clone() for _, table in self.model.rows(name, TABLE_ROWS)])
        yield 0, self._head


class DeviceWeights(ReadyWeights):
    """For a device; ``team`` reads.

    Norms, routers and biases stay there once they have been asked for, and so does the head if there is room.

    budget: bytes of layers and of the embedding that stay there, too; None for as many as there is room for.  There is room for
    something when afterwards as much again and ``RESERVED_BYTES`` are free, since layers that do not stay are brought there, too.
    """

    def __init__(self, model: StoredModel, team: Team, device: torch.device, budget: int | None) -> None:
        super().__init__(model)
        self.kept = 0  # bytes of layers and of the embedding
        self._team, self._device, self._budget = team, device, budget
        self._vectors: dict[str, torch.Tensor] = {}
        self._tables: dict[str, torch.Tensor] = {}
        self._matrices: dict[str, list[DeviceWeight]] = {}
        self._mixtures: dict[str, Mixture] = {}
        self._refused: set[str] = set()  # units that are not asked about again
        self._stored_bytes: dict[str, int] = {}
        self._packed: dict[str, bool] = {}  # by name of a scheme, whether kernels multiply what is stored

    def matrices(self, unit: Unit) -> Sequence[Weight | DeviceWeight]:
        """See :class:`ReadyWeights`."""
        found = self._matrices.get(unit.key)
        if found is None:
            keep = self._may_keep(unit.key, [unit])
            found = [build(self.model.read(matrix), self._device) for matrix in unit.matrices]
            if keep and self._take(unit.key, sum(weight.nbytes for weight in found)):
                self._matrices[unit.key] = found
        return found

    def mixture(self, experts: Sequence[Unit], shared: tuple[Unit, Unit]) -> tuple[Sequence[Mlp] | Mixture, Mlp | None]:
        """See :class:`ReadyWeights`."""
        key = shared[0].key
        if key in self._mixtures:
            return self._mixtures[key], None
        stored = StoredExperts(self.model, experts, self._team), _stored_mlp(self.model, *shared)
        if not self._may_keep(key, [*experts, *shared]):
            return stored
        mixture = prepare(*stored, self._device)
        if self._take(key, mixture.nbytes):
            self._mixtures[key] = mixture
        return mixture, None

    def vector(self, name: str) -> torch.Tensor:
        """See :class:`ReadyWeights`."""
        if name not in self._vectors:
            self._vectors[name] = self.model.vector(name).to(self._device)
        return self._vectors[name]

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """See :class:`ReadyWeights`."""
        name = embedding_name(self.config)
        size = 4 * self.config.vocab_size * self.config.hidden_size
        if name not in self._tables and self._in_budget(size) and self._has_room(size):
            self._tables[name] = self._read_table(name)
            self._take(name, self._tables[name].nbytes)
        if name not in self._tables:
            return self._stored_embeddings(tokens).to(self._device)
        return self._tables[name][tokens.to(self._device)].to(torch.float32)

    def head(self) -> Iterator[tuple[int, torch.Tensor]]:
        """See :class:`ReadyWeights`."""
        name = head_name(self.config)
        if name not in self._tables and self._has_room(4 * self.config.vocab_size * self.config.hidden_size):
            self._tables[name] = self._read_table(name)
        if name in self._tables:
            table = self._tables[name]
            yield from ((part.start, table[part].to(torch.float32)) for part in spans(len(table), DEVICE_TABLE_ROWS))
            return
        for first, rows in self.model.rows(name, DEVICE_TABLE_ROWS):
            yield first, rows.to(self._device)

    # ---------------------------------------------------------------------------------------------------------------- room

    def _read_table(self, name: str) -> torch.Tensor:
        """``[vocabulary, hidden]`` on the device; BF16 if that is what the numbers are."""
        table = torch.empty(self.config.vocab_size, self.config.hidden_size, dtype=torch.bfloat16, device=self._device)
        for first, rows in self.model.rows(name, TABLE_ROWS):
            there = rows.to(self._device)
            if table.dtype == torch.bfloat16 and not torch.equal(there.to(torch.bfloat16).to(torch.float32), there):
                table = table.to(torch.float32)
            table[first : first + len(rows)] = there
        return table

    def _may_keep(self, key: str, units: Sequence[Unit]) -> bool:
        """Whether these units, which have not been read yet, will probably fit; those that do not are not asked about again."""
        if key in self._refused or self._budget == 0:
            return False
        size = sum(self._expected_bytes(matrix) for unit in units for matrix in unit.matrices)
        if not self._in_budget(size) or not self._has_room(size):
            self._refused.add(key)
            return False
        return True

    def _take(self, key: str, size: int) -> bool:
        """Whether what takes ``size`` bytes stays."""
        if not self._in_budget(size):
            self._refused.add(key)
            return False
        self.kept += size
        return True

    def _in_budget(self, size: int) -> bool:
        return self._budget is None or self.kept + size <= self._budget

    def _has_room(self, size: int) -> bool:
        return device_memory(self._device) >= 2 * size + RESERVED_BYTES

    def _expected_bytes(self, matrix: WeightMatrix) -> int:
        """Bytes on the device, but for padding: those of the file, or of BF16 where kernels multiply nothing smaller."""
        scheme = self.model.schemes[matrix.name]
        if scheme not in self._packed:
            self._packed[scheme] = kind_of(self.model.read(matrix)) != "floating"
        if not self._packed[scheme]:
            return 2 * math.prod(matrix.shape)
        self._stored_bytes = self._stored_bytes or self.model.stored_bytes()
        return self._stored_bytes[matrix.name]


class StoredExperts(AnnouncedExperts):
    """The routed experts of a layer, read when asked for.  units: as of :meth:`ReadyWeights.mixture`.

    team: reads those that were announced, as many at a time as there are threads and ``AHEAD_BYTES`` hold.
    """

    def __init__(self, model: StoredModel, units: Sequence[Unit], team: Team | None = None) -> None:
        self._model, self._units, self._team = model, units, team
        self._announced: list[int] = []
        self._ahead: dict[int, Mlp] = {}

    def __len__(self) -> int:
        return len(self._units) // 2

    def __getitem__(self, index: int) -> Mlp:  # type: ignore[override]
        if index in self._announced:
            self._read_ahead(self._announced.index(index))
        return self._ahead.pop(index) if index in self._ahead else self._read(index)

    def announce(self, numbers: Sequence[int]) -> None:
        """See :class:`AnnouncedExperts`."""
        self._announced = list(numbers) if self._team is not None else []

    def schemes(self, number: int) -> tuple[str, ...]:
        """See :class:`AnnouncedExperts`."""
        units = self._units[2 * number : 2 * number + 2]
        return tuple(self._model.schemes[matrix.name] for unit in units for matrix in unit.matrices)

    def _read_ahead(self, place: int) -> None:
        assert self._team is not None, "nothing is announced without one"
        weights = sum(math.prod(matrix.shape) for unit in self._units[:2] for matrix in unit.matrices)
        count = max(1, min(self._team.threads, AHEAD_BYTES // (2 * weights)))  # codes take a byte at least, BF16 takes two
        numbers = self._announced[place : place + count]
        self._announced = self._announced[place + count :]

        def read(number: int) -> None:
            self._ahead[number] = self._read(number)

        self._team.run(read, numbers)

    def _read(self, index: int) -> Mlp:
        return _stored_mlp(self._model, self._units[2 * index], self._units[2 * index + 1])


def _stored_mlp(model: StoredModel, gate_up: Unit, down: Unit) -> Mlp:
    return Mlp(*(model.read(matrix) for unit in (gate_up, down) for matrix in unit.matrices))


def device_memory(device: torch.device) -> int:
    """Bytes that are free on a device now, with those that torch holds there without using them."""
    if device.type != "cuda":  # a CPU in the place of a GPU
        return available_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
