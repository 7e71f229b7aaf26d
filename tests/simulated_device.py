"""CUDA devices that lie in the CPU's memory, so that everything but the kernels' machine code runs where there is no GPU.

Inside ``simulate()`` torch has CUDA devices.  A tensor of one of them holds a tensor of the CPU, calls itself ``cuda:N``, and each
operator runs on what is held.  So numbers are real, and what CUDA refuses raises ``DeviceError``, a RuntimeError as CUDA's own:

* operators on tensors of different devices.  Allowed are numbers (tensors without dimensions) of the CPU in arithmetic, indices of
  the CPU into a tensor of a device, and copies;
* ``.numpy()`` and addresses that the CPU would follow; products of integers, which CUDA has not;
* Triton kernels with tensors of the CPU, of several devices, or of a device that is not the thread's current one;
* more memory than the device has.

``Simulation.waits`` lists what makes the CPU wait until the device has finished everything before it, on a real GPU.

Kernels run in ``simulated_kernels``.  Not seen are what runs at the same time on a real GPU (streams, copies that do not wait), how
kernels are compiled, and operators for which CUDA lacks a type of number; ``Simulation.operators`` lists those that ran.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE_ADDRESSES = 1 << 60  # added to addresses, so that a CPU that follows one fails; a multiple of every alignment
FIRST_MAJOR = 9  # compute capability
MULTIPROCESSORS = 6  # few, since each program of a grid takes milliseconds
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # of a grid, by dimension
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot")
NUMBERS_OF_THE_CPU = ("fill_", "masked_fill", "masked_fill_", "index_fill", "index_fill_")  # beside arithmetic
COPIES = ("copy_", "_to_copy")
WAITING = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "equal", "repeat_interleave", "bincount")


class DeviceError(RuntimeError):
    """What CUDA would refuse."""


@dataclass
class Simulation:
    """The state of the devices.  memory: bytes of each.  used, most: bytes taken now, and at most so far, of each device."""

    count: int
    memory: int
    used: list[int] = field(default_factory=list)
    most: list[int] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    operators: set[tuple[str, tuple[torch.dtype, ...]]] = field(default_factory=set)
    launches: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.used, self.most = [0] * self.count, [0] * self.count
        self._holders: dict[int, int] = {}
        self._lock = threading.RLock()
        self._thread = threading.local()

    @property
    def current(self) -> int:
        """The thread's current device."""
        return getattr(self._thread, "current", 0)

    @current.setter
    def current(self, index: int) -> None:
        self._check(index)
        self._thread.current = index

    def index(self, device: object) -> int:
        """The number of a device, given in any of the ways that torch takes."""
        if device is None:
            return self.current
        index = device if isinstance(device, int) else torch.device(str(device)).index
        index = self.current if index is None or index < 0 else index
        self._check(index)
        return index

    def take(self, tensor: SimulatedTensor, index: int) -> None:
        """Count the memory of a new tensor; several may share theirs."""
        storage = tensor.held.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if not size:
            return
        with self._lock:
            if key not in self._holders:
                if self.used[index] + size > self.memory:
                    raise torch.OutOfMemoryError(
                        f"CUDA out of memory. Tried to allocate {size} bytes; GPU {index} has {self.memory} and {self.used[index]} "
                        "are in use"
                    )
                self.used[index] += size
                self.most[index] = max(self.most[index], self.used[index])
            self._holders[key] = self._holders.get(key, 0) + 1
        weakref.finalize(tensor, self._release, key, index, size)

    def _release(self, key: int, index: int, size: int) -> None:
        with self._lock:
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
                self.used[index] -= size

    def _check(self, index: int) -> None:
        if index >= self.count:
            raise DeviceError("CUDA error: invalid device ordinal")


class SimulatedTensor(torch.Tensor):
    """A tensor of a simulated device.  held: its numbers, on the CPU."""

    held: torch.Tensor
    simulation: Simulation

    @staticmethod
    def __new__(cls, held: torch.Tensor, simulation: Simulation, index: int) -> SimulatedTensor:
        assert type(held) is torch.Tensor
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("cuda", index),
        )
        made.held, made.simulation = held, simulation
        simulation.take(made, index)
        return made  # type: ignore[no-any-return]

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"{self.held!r} on {self.device}"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _called(func, args, kwargs or {}, _simulation_of(args, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return _dispatched(func, args, kwargs or {}, _simulation_of(args, kwargs))


class _Functions(TorchFunctionMode):
    """What torch is asked for, also without a tensor of a device."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self.simulation = simulation

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _called(func, args, kwargs or {}, self.simulation)


class _Operators(TorchDispatchMode):
    """What torch computes: here also what begins without a tensor, such as zeros."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self.simulation = simulation

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return _dispatched(func, args, kwargs or {}, self.simulation)


def _simulation_of(args: Any, kwargs: Any) -> Simulation:
    return next(leaf.simulation for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, SimulatedTensor))


def held(tree: Any) -> Any:
    """The same with what its tensors hold."""
    return tree_map(lambda leaf: leaf.held if isinstance(leaf, SimulatedTensor) else leaf, tree)


def _tensors(*trees: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


# ------------------------------------------------------------------------------------------------------- what torch is asked for


def _called(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], simulation: Simulation) -> Any:
    special = _SPECIAL.get(func)
    if special is not None and (func in _MOVING or any(isinstance(each, SimulatedTensor) for each in _tensors(args, kwargs))):
        return special(simulation, func, *args, **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _moved(simulation: Simulation, tensor: torch.Tensor, device: object, dtype: torch.dtype | None, copy: bool) -> torch.Tensor:
    device = tensor.device if device is None else torch.device(device)  # type: ignore[call-overload]
    there = torch.device("cuda", simulation.index(device)) if device.type == "cuda" else device
    if there == tensor.device and dtype in (None, tensor.dtype) and not copy:
        return tensor
    if "cuda" in (there.type, tensor.device.type) and there != tensor.device:
        simulation.waits.append(f"copy of {tuple(tensor.shape)} from {tensor.device} to {there}")
    result = held(tensor).to(dtype or tensor.dtype, copy=True)
    return SimulatedTensor(result, simulation, there.index) if there.type == "cuda" else result


def _to(simulation: Simulation, func: object, tensor: torch.Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
    kwargs.pop("non_blocking", None)
    other = args[0] if args else kwargs.get("other")
    if isinstance(other, torch.Tensor):
        return _moved(simulation, tensor, other.device, other.dtype, copy)
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for value in args:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, str | torch.device):
            device = value
    return _moved(simulation, tensor, device, dtype, copy)


def _cuda(simulation: Simulation, func: object, tensor: torch.Tensor, device: object = None) -> torch.Tensor:
    return _moved(simulation, tensor, torch.device("cuda", simulation.index(device)), None, False)


def _cpu(simulation: Simulation, func: object, tensor: torch.Tensor) -> torch.Tensor:
    return _moved(simulation, tensor, "cpu", None, False)


def _made(simulation: Simulation, func: Callable[..., Any], data: Any, *args: Any, device: object = None, **kwargs: Any) -> Any:
    """``torch.tensor`` and ``torch.as_tensor``."""
    if isinstance(data, SimulatedTensor):
        copy = func is torch.tensor
        return _moved(simulation, data, device, kwargs.get("dtype"), copy)
    with torch._C.DisableTorchFunctionSubclass():
        result = func(data, *args, **kwargs)
    return _moved(simulation, result, device, None, False)


def _new_tensor(simulation: Simulation, func: object, tensor: torch.Tensor, data: Any, **kwargs: Any) -> torch.Tensor:
    kwargs = {"dtype": tensor.dtype, "device": tensor.device, **kwargs}
    return _made(simulation, torch.tensor, data, **kwargs)  # type: ignore[no-any-return]


def _indices(index: Any) -> list[torch.Tensor]:
    return [each for each in _tensors(index) if each.dim() or each.dtype == torch.bool]


def _check_indices(simulation: Simulation, tensor: torch.Tensor, indices: Sequence[torch.Tensor]) -> None:
    for each in indices:
        if each.device not in (tensor.device, torch.device("cpu")):
            raise DeviceError(f"indices should be either on cpu or on the same device as the indexed tensor ({tensor.device})")
        if tensor.is_cuda and (not each.is_cuda or each.dtype in (torch.bool, torch.uint8)):
            simulation.waits.append(f"index of {each.dtype} on {each.device}")


def _get_item(simulation: Simulation, func: object, tensor: torch.Tensor, index: Any) -> torch.Tensor:
    _check_indices(simulation, tensor, _indices(index))
    result = held(tensor)[held(index)]
    return SimulatedTensor(result, simulation, tensor.device.index) if isinstance(tensor, SimulatedTensor) else result


def _set_item(simulation: Simulation, func: object, tensor: torch.Tensor, index: Any, value: Any) -> None:
    indices = _indices(index)
    _check_indices(simulation, tensor, indices)
    if isinstance(value, torch.Tensor) and value.device != tensor.device:
        if indices and value.dim():
            raise DeviceError(f"index_put_: a value on {value.device} for a tensor on {tensor.device}")
        simulation.waits.append(f"copy of {tuple(value.shape)} from {value.device} to {tensor.device}")
    held(tensor)[held(index)] = held(value)


def _whole(simulation: Simulation, func: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
    """What is one of CUDA's kernels."""
    tensors = _tensors(args, kwargs)
    index = _common(tensors, func.__name__).index
    return SimulatedTensor(func(*held(args), **held(kwargs)), simulation, index)


def _refused(simulation: Simulation, func: object, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if isinstance(tensor, SimulatedTensor):
        raise DeviceError(f"{getattr(func, '__name__', func)}: cannot take the memory of a tensor on {tensor.device}; use .cpu()")
    with torch._C.DisableTorchFunctionSubclass():
        return func(tensor, *args, **kwargs)  # type: ignore[operator]


def _number(simulation: Simulation, func: Callable[..., Any], tensor: SimulatedTensor) -> Any:
    simulation.waits.append(func.__name__)
    return func(tensor.held)


def _copy(simulation: Simulation, func: object, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
    if target.device != source.device:
        simulation.waits.append(f"copy of {tuple(source.shape)} from {source.device} to {target.device}")
    held(target).copy_(held(source))
    return target


def _nonzero(simulation: Simulation, func: object, tensor: SimulatedTensor, *, as_tuple: bool = False) -> Any:
    simulation.waits.append("nonzero")
    found = SimulatedTensor(tensor.held.nonzero(), simulation, tensor.device.index)
    return found.unbind(1) if as_tuple else found


def _contiguous(simulation: Simulation, func: object, tensor: SimulatedTensor) -> torch.Tensor:
    return tensor if tensor.is_contiguous() else SimulatedTensor(tensor.held.contiguous(), simulation, tensor.device.index)


def _address(simulation: Simulation, func: object, tensor: SimulatedTensor) -> int:
    return tensor.held.data_ptr() + DEVICE_ADDRESSES


_MOVING: dict[Any, Callable[..., Any]] = {
    torch.Tensor.to: _to,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.cpu: _cpu,
    torch.Tensor.new_tensor: _new_tensor,
    torch.tensor: _made,
    torch.as_tensor: _made,
}
_SPECIAL: dict[Any, Callable[..., Any]] = {
    **_MOVING,
    torch.Tensor.__getitem__: _get_item,
    torch.Tensor.__setitem__: _set_item,
    torch.nn.functional.scaled_dot_product_attention: _whole,
    torch.nn.functional.rms_norm: _whole,
    torch.Tensor.numpy: _refused,
    torch.Tensor.__array__: _refused,
    torch.Tensor.untyped_storage: _refused,
    torch.Tensor.storage: _refused,
    torch.Tensor.__reduce_ex__: _refused,
    torch.Tensor.pin_memory: _refused,
    torch.Tensor.tolist: _number,
    torch.Tensor.item: _number,
    torch.Tensor.__int__: _number,
    torch.Tensor.__float__: _number,
    torch.Tensor.__bool__: _number,
    torch.Tensor.__index__: _number,
    torch.Tensor.copy_: _copy,
    torch.Tensor.contiguous: _contiguous,
    torch.Tensor.nonzero: _nonzero,
    torch.nonzero: _nonzero,
    torch.Tensor.__invert__: lambda simulation, func, tensor: torch.bitwise_not(tensor),
    torch.Tensor.data_ptr: _address,
}


# ------------------------------------------------------------------------------------------------------------ what torch computes


def _common(tensors: Sequence[torch.Tensor], name: str, numbers: bool = False) -> torch.device:
    """The device of an operator.  numbers: whether the CPU's may stand among tensors of a device."""
    mattering = [tensor.device for tensor in tensors if not numbers or tensor.dim() or tensor.is_cuda]
    found = sorted({str(device) for device in mattering})
    if len(found) > 1:
        raise DeviceError(f"Expected all tensors to be on the same device, but found at least two devices, {found} ({name})")
    return mattering[0] if mattering else torch.device("cpu")


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Tensors that an operator writes."""
    arguments = func._schema.arguments
    given = [(argument, args[place]) for place, argument in enumerate(arguments) if place < len(args)]
    given += [(argument, kwargs[argument.name]) for argument in arguments if argument.name in kwargs]
    return _tensors([value for argument, value in given if argument.alias_info is not None and argument.alias_info.is_write])


def _dispatched(func: Any, args: Sequence[Any], kwargs: dict[str, Any], simulation: Simulation) -> Any:
    tensors = _tensors(args, kwargs)
    there = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    asked = kwargs.get("device")
    if not there and (asked is None or torch.device(asked).type != "cuda"):
        return func(*args, **kwargs)
    name = func._schema.name.removeprefix("aten::")
    simulation.operators.add((str(func), tuple(tensor.dtype for tensor in tensors)))
    written = _written(func, args, kwargs)
    if name == "copy_":
        target, source = args[0], args[1]
        if target.device != source.device:
            simulation.waits.append(f"copy of {tuple(source.shape)} from {source.device} to {target.device}")
        device = target.device
    elif asked is not None:
        device = torch.device(asked)
        if device.type == "cuda":
            device = torch.device("cuda", simulation.index(device))
        if name == "_to_copy" and device != there[0].device:
            simulation.waits.append(f"copy of {tuple(there[0].shape)} from {there[0].device} to {device}")
    elif name in ("index", "index_put", "index_put_", "_unsafe_index_put", "_index_put_impl_"):
        _check_indices(simulation, args[0], _tensors(args[1]))
        device = _common([args[0], *_tensors(args[2:3])], name, numbers=True)
        if device != args[0].device:
            raise DeviceError(f"{name}: a value on {device} for a tensor on {args[0].device}")
    else:
        numbers = torch.Tag.pointwise in func.tags or name in NUMBERS_OF_THE_CPU
        device = _common(tensors, str(func), numbers)
        for target in written:
            if target.device != device:
                raise DeviceError(f"{func}: the result is on {device}, but is to be written on {target.device}")
    if device.type == "cuda" and name in PRODUCTS and any(tensor.dtype in INTEGERS for tensor in tensors):
        raise DeviceError(f'"{name}_cuda" not implemented for integers')
    if name in WAITING:
        simulation.waits.append(name)
    return _wrapped(func, name, args, kwargs, device, simulation, written)


def _wrapped(
    func: Any,
    name: str,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    device: torch.device,
    simulation: Simulation,
    written: Sequence[torch.Tensor],
) -> Any:
    """Run the operator on what is held; results are of ``device``."""
    inside = {key: value if key != "device" else torch.device("cpu") for key, value in held(kwargs).items()}
    if str(func) == "aten.mm.dtype":  # sums of BF16 products in float32: CUDA alone has it
        result = torch.mm(*(each.to(inside.get("out_dtype", args[-1])) for each in held(args[:2])))
    else:
        result = func(*held(args), **inside)
    for target in written:
        if isinstance(target, SimulatedTensor) and target.shape != target.held.shape:
            raise DeviceError(f"{func}: the simulation does not know how to give a tensor another shape")
    owners = {id(tensor.held): tensor for tensor in _tensors(args, kwargs) if isinstance(tensor, SimulatedTensor)}

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or device.type != "cuda":
            return leaf
        owner = owners.get(id(leaf))  # what was written in place stays the same tensor
        return SimulatedTensor(leaf, simulation, device.index) if owner is None else owner

    return tree_map(wrap, result)


# ----------------------------------------------------------------------------------------------------------- torch.cuda and threads


@contextlib.contextmanager
def simulate(count: int = 1, memory: int = 1 << 40) -> Iterator[Simulation]:
    """``count`` CUDA devices of so many bytes, for this thread and all that are started meanwhile."""
    simulation = Simulation(count, memory)
    run = threading.Thread.run

    class Device:
        """``torch.cuda.device``."""

        def __init__(self, device: object) -> None:
            self.index, self.before = simulation.index(device), 0

        def __enter__(self) -> None:
            self.before, simulation.current = simulation.current, self.index

        def __exit__(self, *error: object) -> None:
            simulation.current = self.before

    def set_device(device: object) -> None:
        simulation.current = simulation.index(device)

    def properties(device: object = None) -> SimpleNamespace:
        simulation.index(device)
        return SimpleNamespace(
            name="Simulated GPU",
            multi_processor_count=MULTIPROCESSORS,
            major=FIRST_MAJOR,
            minor=0,
            total_memory=simulation.memory,
        )

    def memory_info(device: object = None) -> tuple[int, int]:
        return simulation.memory - simulation.used[simulation.index(device)], simulation.memory

    def threaded(thread: threading.Thread) -> None:
        with _Functions(simulation), _Operators(simulation):
            run(thread)

    replaced: dict[str, object] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: count > 0,
        "device_count": lambda: count,
        "current_device": lambda: simulation.current,
        "device": Device,
        "set_device": set_device,
        "synchronize": lambda device=None: simulation.waits.append("synchronize"),
        "get_device_name": lambda device=None: properties(device).name,
        "get_device_properties": properties,
        "get_device_capability": lambda device=None: (properties(device).major, properties(device).minor),
        "mem_get_info": memory_info,
        "memory_reserved": lambda device=None: simulation.used[simulation.index(device)],
        "memory_allocated": lambda device=None: simulation.used[simulation.index(device)],
        "max_memory_allocated": lambda device=None: simulation.most[simulation.index(device)],
        "empty_cache": lambda: None,
    }
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.multiple(torch.cuda, **replaced))
        patches.enter_context(mock.patch.object(threading.Thread, "run", threaded))
        patches.enter_context(_Functions(simulation))
        patches.enter_context(_Operators(simulation))
        yield simulation
