"""Machines as /proc/cpuinfo describes them, and the schemes that follow."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest

from equipoise import record
from equipoise.errors import IncompatibleError, UsageError
from equipoise.targets.machine import (
    Machine,
    detect_machine,
    parse_cpu_name,
    parse_flags,
    parse_quota,
)
from equipoise.targets.profile import Target
from equipoise.targets.profiles import (
    cpu_scheme,
    get_target,
    require_measurable,
    target_names,
)

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
HERE = ("null", "onnxruntime", "reference")
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
    """And the nearest of them."""
    assert get_target("cpu", machine=MACHINE).runtime == "onnxruntime"
    with pytest.raises(UsageError, match=r"'cup'; known: arm64, cpu, .*\nDid you mean 'cpu'"):
        get_target("cup", machine=MACHINE)


def test_cpu_is_this_machine_and_the_others_are_what_they_are() -> None:
    """The profile of a device does not depend on where it is asked for."""
    pi = replace(MACHINE, cpu="Arm Cortex-A76", architecture="aarch64")
    assert "Cortex-A76" in get_target("cpu", machine=pi).summary
    for name in target_names():
        here, there = (get_target(name, machine=machine) for machine in (MACHINE, pi))
        assert here.name == name
        assert (here == there) == (name != "cpu")


def test_profiles_agree_with_themselves() -> None:
    """A file of the target's opset has its integers, and an IR version that it reads."""
    for name in target_names():
        target = get_target(name, machine=MACHINE)
        scheme = target.int8
        assert target.opset >= scheme.least_opset
        least = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", target.opset)])
        assert target.max_ir_version >= least
        assert not (scheme.fuses_adds and scheme.quantize_outputs)
        assert not (scheme.absorbs_clips and not scheme.quantize_outputs)  # nothing to absorb into
        assert target.summary
        assert scheme.reason


def test_profiles_are_data() -> None:
    """They go to JSON and back unchanged, as configs of stages do."""
    for name in target_names():
        target = get_target(name, machine=MACHINE)
        assert record.loads(Target, record.dumps(target), where=name) == target


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("tensorrt", (), "needs the runtime 'tensorrt'"),
        ("qnn-htp", (), "needs the runtime 'qnn'"),
        ("arm64", (), "is no 'arm64'"),
        ("x86-vnni", ("avx2",), "is no 'x86-vnni'"),
        ("x86-avx2", ("avx512_vnni",), "is no 'x86-avx2'"),
    ],
)
def test_only_what_is_here_is_measured(name: str, flags: tuple[str, ...], words: str) -> None:
    """Figures of another machine would be pretence."""
    machine = replace(MACHINE, flags=flags)
    with pytest.raises(IncompatibleError, match=words) as caught:
        require_measurable(get_target(name, machine=machine), machine=machine, runtimes=HERE)
    assert f"quantize --target {name}" in caught.value.hint


@pytest.mark.parametrize("flags", [(), ("avx_vnni",)])
def test_the_profile_of_this_cpu_is_measured(flags: tuple[str, ...]) -> None:
    """By either of its names."""
    machine = replace(MACHINE, flags=flags)
    for name in ("cpu", "x86-vnni" if flags else "x86-avx2"):
        require_measurable(get_target(name, machine=machine), machine=machine, runtimes=HERE)
