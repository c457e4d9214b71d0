"""Every kernel module has the operations of the protocol, with the protocol's parameters."""

import inspect
from types import ModuleType

import pytest

from quire.kernels import Kernels, cpu, reference, sdpa

OPERATIONS = sorted(name for name, member in inspect.getmembers(Kernels, inspect.isfunction) if name[0] != "_")


@pytest.mark.parametrize("module", [reference, cpu, sdpa], ids=lambda module: module.__name__.rpartition(".")[2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_module_satisfies_the_protocol(name: str, module: ModuleType) -> None:
    wanted = list(inspect.signature(getattr(Kernels, name)).parameters.values())[1:]
    found = list(inspect.signature(getattr(module, name)).parameters.values())
    own = found[len(wanted) :]  # a module may have more parameters, which the protocol leaves out
    assert all(each.default is not each.empty for each in own)
    found = found[: len(wanted)]
    assert [(each.name, each.kind) for each in found] == [(each.name, each.kind) for each in wanted]
    assert [each.default is each.empty for each in found] == [each.default is each.empty for each in wanted]


def test_builds_have_names() -> None:
    assert [kernels.describe() for kernels in (reference, cpu, sdpa)] == ["reference", cpu.isa(), "sdpa"]
