import pytest
import torch

from based_megatron.monitor.memory import memory_gib


def test_memory_of_a_cpu_process_is_its_resident_set():
    with open("/proc/self/status") as status:
        (kib,) = [int(line.split()[1]) for line in status if line.startswith("VmRSS")]
    memory = memory_gib(torch.device("cpu"))
    assert memory == {"rss_gib": pytest.approx(kib / 2**20, rel=0.05)}


def test_memory_of_a_gpu_is_what_torch_has_allocated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    assert memory_gib(torch.device("cuda", 0)) == {"allocated_gib": 1.0, "peak_gib": 3.0}
