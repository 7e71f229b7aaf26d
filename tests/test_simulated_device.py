"""The simulated devices themselves: wrong programs raise, right ones give the CPU's numbers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from simulated_device import MULTIPROCESSORS, DeviceError, SimulatedTensor, simulate

Program = Callable[[torch.Tensor, torch.Tensor], object]  # of a tensor of the CPU and the same on a device, [3, 4]

WRONG: dict[str, Program] = {
    "sum": lambda here, there: there + here,
    "sum, the CPU's first": lambda here, there: here + there,
    "sum of two devices": lambda here, there: there + there.to("cuda:1"),
    "into the CPU's": lambda here, there: here.add_(there),
    "into a number of the CPU": lambda here, there: torch.tensor(1.0).add_(there[0, 0]),
    "product": lambda here, there: torch.mm(there, here.t()),
    "product with @": lambda here, there: here @ there.t(),
    "linear": lambda here, there: torch.nn.functional.linear(there, here),
    "product of integers": lambda here, there: there.to(torch.int32) @ there.to(torch.int32).t(),
    "out of the CPU": lambda here, there: torch.mm(there, there.t(), out=torch.empty(3, 3)),
    "out of the device": lambda here, there: torch.mm(here, here.t(), out=torch.empty(3, 3, device="cuda")),
    "choice": lambda here, there: torch.where(there > 0, there, here),
    "condition": lambda here, there: torch.where(here > 0, there, there),
    "joined": lambda here, there: torch.cat([there, here]),
    "stacked": lambda here, there: torch.stack([here, there]),
    "index of the device": lambda here, there: here[there.argmax(1)],
    "index of another device": lambda here, there: there[there.to("cuda:1").argmax(1)],
    "mask of the device": lambda here, there: here[there > 5],
    "rows of the CPU to an index": lambda here, there: there.__setitem__(torch.tensor([0]), here[0]),
    "index_select": lambda here, there: there.index_select(0, torch.tensor([0])),
    "gather": lambda here, there: there.gather(1, torch.zeros(3, 1, dtype=torch.int64)),
    "searchsorted": lambda here, there: torch.searchsorted(there[0], here[0]),
    "isin": lambda here, there: torch.isin(there, here),
    "positions": lambda here, there: there * torch.arange(4),
    "forgotten device": lambda here, there: there + torch.zeros(3, 4),
    "equal": lambda here, there: torch.equal(there, here),
    "attention": lambda here, there: torch.nn.functional.scaled_dot_product_attention(there[None], here[None], there[None]),
    "numpy": lambda here, there: there.numpy(),
    "asarray": lambda here, there: np.asarray(there),
    "storage": lambda here, there: there.untyped_storage(),
    "no such device": lambda here, there: here.to("cuda:2"),
    "zeros of no such device": lambda here, there: torch.zeros(3, device="cuda:2"),
    "current device that is not": lambda here, there: torch.cuda.set_device(5),
}
RIGHT: dict[str, Program] = {
    "sum": lambda here, there: there + there,
    "number of the CPU": lambda here, there: torch.tensor(2.0) * there,
    "number of Python": lambda here, there: 2.0 * there + 1,
    "index": lambda here, there: there[there.argmax(1) - 2],
    "index of the CPU": lambda here, there: there[torch.tensor([2, 0])],
    "mask": lambda here, there: there[there > 5],
    "into an index of the CPU": lambda here, there: there.clone().__setitem__(torch.tensor([2, 0]), 3.0),
    "copied into a slice": lambda here, there: _filled(there, here),
    "product": lambda here, there: there @ there.t(),
    "product into out": lambda here, there: torch.mm(there, there.t(), out=there.new_empty(3, 3)),
    "joined": lambda here, there: torch.cat([there, there.flip(0)]),
    "made there": lambda here, there: there + torch.arange(4, device=there.device),
    "from a list": lambda here, there: there + torch.tensor([1.0, 2.0, 3.0, 4.0], device=there.device),
    "of the same kind": lambda here, there: there.new_full((2,), 3.0) + there.new_tensor([1, 2]),
    "bits": lambda here, there: there.view(torch.int32),
    "in place": lambda here, there: there.clone().mul_(2).add_(there),
    "through a view": lambda here, there: _doubled(there.clone()),
    "turned": lambda here, there: there.t().contiguous(),
    "types": lambda here, there: there.to(torch.bfloat16).to(torch.float32),
    "choice": lambda here, there: torch.where(~(there > 5), there, 1.0),
    "sorted": lambda here, there: torch.sort(there.flatten(), descending=True, stable=True)[0],
    "found": lambda here, there: torch.searchsorted(there.flatten(), there[1].contiguous()),
    "largest": lambda here, there: torch.topk(there, 2)[1],
    "unique": lambda here, there: torch.unique(there // 3),
    "complex": lambda here, there: torch.view_as_real(torch.polar(there, there)),
    "attention": lambda here, there: torch.nn.functional.scaled_dot_product_attention(there[None], there[None], there[None]),
    "numbers": lambda here, there: torch.tensor([float(there.sum()), int(there[0, 1]), there[2, 3].item(), *there[0].tolist()]),
    "copied back": lambda here, there: torch.empty(3, 4).copy_(there),
    "sums of BF16": lambda here, there: there.sum(0, dtype=torch.float64),
    "padded": lambda here, there: torch.nn.functional.pad(there, (0, 2)),
    "factored": lambda here, there: torch.linalg.cholesky_ex(there @ there.t() + 9 * torch.eye(3, device=there.device))[0],
}


def _filled(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    result = torch.zeros(5, 4, device=tensor.device)
    result[1:4] = rows  # copies cross devices
    return result


def _doubled(tensor: torch.Tensor) -> torch.Tensor:
    tensor[1:][:, 2].mul_(2)
    return tensor


@pytest.mark.parametrize("name", WRONG)
def test_what_cuda_refuses_raises(name: str) -> None:
    with simulate(2):
        here = torch.arange(12.0).view(3, 4)
        with pytest.raises(DeviceError):
            WRONG[name](here, here.to("cuda"))


@pytest.mark.parametrize("name", RIGHT)
def test_what_cuda_takes_gives_the_numbers_of_the_cpu(name: str) -> None:
    here = torch.arange(12.0).view(3, 4)
    expected = RIGHT[name](here, here)
    with simulate(2):
        result = RIGHT[name](here, here.to("cuda"))
        if expected is None:
            assert result is None
            return
        assert isinstance(result, torch.Tensor) and isinstance(expected, torch.Tensor)
        assert result.dtype == expected.dtype and result.stride() == expected.stride()
        assert torch.equal(result.cpu(), expected)


def test_devices_have_numbers() -> None:
    with simulate(2) as simulation:
        assert torch.cuda.is_available() and torch.cuda.device_count() == 2
        assert torch.zeros(1, device="cuda").device == torch.device("cuda:0") != torch.device("cuda")
        with torch.cuda.device(1):
            assert torch.cuda.current_device() == 1
            assert torch.ones(1).cuda().device == torch.arange(1, device="cuda").device == torch.device("cuda:1")
        assert simulation.current == 0
        assert torch.cuda.get_device_properties("cuda:1").multi_processor_count == MULTIPROCESSORS
        there = torch.ones(1, device="cuda:1")
        assert there.to("cuda:1") is there and there.to("cuda:0") is not there
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")  # there is none without the simulation


def test_threads_begin_with_the_first_device() -> None:
    found: list[torch.device] = []

    def work(value: torch.Tensor) -> None:
        found.append((value * torch.ones(2, device=value.device)).device)
        found.append(torch.zeros(1, device="cuda").device)

    with simulate(2):
        value = torch.ones(2, device="cuda:1")
        with torch.cuda.device(1), ThreadPoolExecutor(1) as pool:
            pool.submit(work, value).result()
        with torch.cuda.device(1):
            thread = threading.Thread(target=work, args=(value,))
            thread.start()
            thread.join()
    assert found == [torch.device("cuda:1"), torch.device("cuda:0")] * 2


def test_memory_is_counted_and_ends() -> None:
    with simulate(1, memory=10_000) as simulation:
        kept = torch.zeros(1000, dtype=torch.float32, device="cuda")
        view = kept[10:]
        assert torch.cuda.mem_get_info() == (6000, 10_000)
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(2000, device="cuda")
        kept = kept + 1
        assert simulation.used == [8000] and view.device == kept.device
        del view
        assert simulation.used == [4000] and simulation.most == [8000]
        del kept
        assert simulation.used == [0]


def test_what_waits_for_a_device_is_listed() -> None:
    with simulate(1) as simulation:
        there = torch.arange(4.0, device="cuda")
        (there * 2 + there[there.argsort()])[1:].sum()
        assert simulation.waits == []
        for waiting in (
            lambda: float(there.sum()),
            lambda: there.cpu(),
            lambda: there[torch.tensor([1])],
            lambda: there[there > 1],
            lambda: torch.tensor([1], device="cuda"),
            lambda: there.nonzero(),
        ):
            waiting()
            assert simulation.waits, waiting
            simulation.waits.clear()


def test_an_address_is_none_of_the_cpu() -> None:
    with simulate(1):
        there = torch.zeros(64, device="cuda")
        assert isinstance(there, SimulatedTensor)
        assert there.data_ptr() % 64 == there.held.data_ptr() % 64 and there.data_ptr() > 1 << 48
