"""Machines as /proc/cpuinfo describes them, and the schemes that follow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from equipoise.errors import UsageError
from equipoise.targets.machine import (
    Machine,
    detect_machine,
    parse_cpu_name,
    parse_flags,
    parse_quota,
)
from equipoise.targets.profiles import cpu_scheme, get_target, target_names

ZEN3 = """processor\t: 0
model name\t: AMD EPYC 7763 64-Core Processor
flags\t\t: fpu sse2 avx f16c fma avx2 bmi2 sha_ni vaes
"""
ICE_LAKE = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz
flags\t\t: fpu sse2 avx fma avx2 avx512f avx512_vnni
"""
PI_4 = """processor\t: 0
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU part\t: 0xd08
"""
PI_5 = """processor\t: 0
Features\t: fp asimd evtstrm aes atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd0b
"""
MACHINE = Machine(cpu="x", architecture="x86_64", cores=2, flags=(), memory_bytes=1, system="Linux")


@pytest.mark.parametrize(
    ("text", "name", "flag", "without"),
    [
        (ZEN3, "AMD EPYC 7763 64-Core Processor", "avx2", "avx512_vnni"),
        (ICE_LAKE, "Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", "avx512_vnni", "amx_int8"),
        (PI_4, "Arm Cortex-A72", "asimd", "asimddp"),
        (PI_5, "Arm Cortex-A76", "asimddp", "i8mm"),
    ],
)
def test_cpuinfo_is_read(text: str, name: str, flag: str, without: str) -> None:
    """Name and features, on x86 and on Arm where there is no model name."""
    assert parse_cpu_name(text) == name
    assert flag in parse_flags(text)
    assert without not in parse_flags(text)


def test_scheme_follows_the_flags() -> None:
    """Seven bits without VNNI, eight with it, signed activations on Arm."""
    zen3 = cpu_scheme(replace(MACHINE, flags=parse_flags(ZEN3)))
    assert (zen3.activation, zen3.saturates) == ("uint8", True)
    assert "saturate" in zen3.reason
    ice_lake = cpu_scheme(replace(MACHINE, flags=parse_flags(ICE_LAKE)))
    assert (ice_lake.activation, ice_lake.saturates) == ("uint8", False)
    pi = cpu_scheme(replace(MACHINE, architecture="aarch64", flags=parse_flags(PI_5)))
    assert (pi.activation, pi.saturates) == ("int8", False)


def test_quotas_of_control_groups() -> None:
    """Version 2, version 1, none."""
    assert parse_quota("max 100000", "", "") is None
    assert parse_quota("150000 100000", "", "") == 2
    assert parse_quota("", "-1", "100000") is None
    assert parse_quota("", "50000", "100000") == 1
    assert parse_quota("", "", "") is None


def test_this_machine_is_detected() -> None:
    """At least a core, some memory, and a name."""
    found = detect_machine()
    assert found.cores >= 1
    assert found.memory_bytes > 1 << 28
    assert found.cpu


def test_unknown_target_names_the_known_ones() -> None:
    """cpu is the only one so far."""
    assert target_names() == ("cpu",)
    assert get_target("cpu", machine=MACHINE).runtime == "onnxruntime"
    with pytest.raises(UsageError, match=r"'cup'; known: cpu\nDid you mean 'cpu'"):
        get_target("cup", machine=MACHINE)
