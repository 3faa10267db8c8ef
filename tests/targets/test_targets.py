"""Machines as /proc/cpuinfo describes them, and the schemes that follow."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest

from equipoise import record
from equipoise.errors import IncompatibleError, RecipeError, UsageError
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
MACHINE = Machine(
    cpu="x",
    architecture="x86_64",
    cores=2,
    flags=("avx2", "fma"),
    memory_bytes=1,
    system="Linux",
)
ISSUE = (
    "cpu", "x86-avx2", "x86-vnni", "x86-amx", "raspberry-pi-4", "raspberry-pi-5", "arm64-dotprod",
    "arm64-i8mm", "jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin", "jetson-thor",
    "rtx-ampere", "rtx-ada", "rtx-blackwell", "t4", "a10", "l4", "a100", "h100", "intel-npu",
    "intel-igpu", "qnn-htp-v68", "qnn-htp-v69", "qnn-htp-v73", "qnn-htp-v75", "qnn-htp-v79",
    "qnn-htp-v81", "rk3588", "web-wasm", "web-webgpu",
)  # fmt: skip


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
    with pytest.raises(UsageError, match=r"'cup'; known: a10, a100, .*\nDid you mean 'cpu'"):
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
        ("rk3588", (), "needs the runtime 'rknn'"),
        ("qnn-htp", (), "is no 'qnn-htp'"),
        ("arm64", (), "is no 'arm64'"),
        ("raspberry-pi-5", (), "is no 'raspberry-pi-5'"),
        ("x86-vnni", (), "is no 'x86-vnni'"),
        ("x86-avx2", ("avx512_vnni",), "is no 'x86-avx2'"),
        ("x86-amx", ("avx512_vnni",), "is no 'x86-amx'"),
    ],
)
def test_only_what_is_here_is_measured(name: str, flags: tuple[str, ...], words: str) -> None:
    """Figures of another machine would be pretence."""
    machine = replace(MACHINE, flags=(*MACHINE.flags, *flags))
    with pytest.raises(IncompatibleError, match=words) as caught:
        require_measurable(get_target(name, machine=machine), machine=machine, runtimes=HERE)
    assert f"quantize --target {name}" in caught.value.hint


@pytest.mark.parametrize("flags", [(), ("avx_vnni",)])
def test_the_profile_of_this_cpu_is_measured(flags: tuple[str, ...]) -> None:
    """By either of its names."""
    machine = replace(MACHINE, flags=(*MACHINE.flags, *flags))
    for name in ("cpu", "x86-vnni" if flags else "x86-avx2"):
        require_measurable(get_target(name, machine=machine), machine=machine, runtimes=HERE)


def test_the_promised_devices_are_there() -> None:
    """One name for each, with its kind of device, and a figure for each GPU of a stated model."""
    assert set(ISSUE) <= set(target_names())
    for name in ISSUE:
        hardware = get_target(name, machine=MACHINE).hardware
        if hardware.compute_capability:
            assert hardware.kind == "gpu"
            assert hardware.memory_gb is not None
            assert hardware.bandwidth_gb_s is not None
            assert {"fp32", "fp16", "int8"} <= set(hardware.dense_tops)


def test_every_figure_says_where_it_is_from() -> None:
    """And sparse peaks stand apart from dense ones."""
    for name in target_names():
        hardware = get_target(name, machine=MACHINE).hardware
        figures = [hardware.memory_gb, hardware.bandwidth_gb_s]
        figures += [*hardware.dense_tops.values(), *hardware.sparse_tops.values()]
        for figure in figures:
            assert figure is None or (figure.value > 0 and figure.source)
        for dtype, sparse in hardware.sparse_tops.items():
            assert sparse.value > hardware.dense_tops[dtype].value


def test_a_target_of_ones_own(tmp_path) -> None:
    """A few fields over those of a known target."""
    own = tmp_path / "kiosk.toml"
    own.write_text(
        'extends = "raspberry-pi-5"\nsummary = "our kiosk"\n[hardware]\ncores = 2\n'
        'memory_gb = { value = 2, source = "its label" }\n'
    )
    target = get_target(str(own), machine=MACHINE)
    pi = get_target("raspberry-pi-5", machine=MACHINE)
    assert (target.name, target.summary, target.hardware.cores) == ("kiosk", "our kiosk", 2)
    assert target.int8 == pi.int8
    assert target.hardware.dense_tops == pi.hardware.dense_tops
    assert target.hardware.memory_gb.verified


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("extends = 'raspberry-pi-6'", UsageError, "Did you mean 'raspberry-pi-"),
        ("extends = 'cpu'\nopsett = 3", RecipeError, "unknown key 'opsett'; did you mean 'opset'"),
        ("extends = 'cpu'\nopset = 'x'", RecipeError, "expected int"),
        ("extends = 'cpu'\nint8 = 'x86'", UsageError, "integer scheme 'x86'"),
        ("extends = 'cpu'\n[hardware]\nkind = 'toaster'", RecipeError, "'toaster' is not one of"),
        ("extends = 'cpu'\n[hardware]\ncoers = 1", RecipeError, "did you mean 'cores'"),
        ("summary = 'alone'", RecipeError, "missing key"),
        ("= 3", RecipeError, "is no TOML"),
        (None, RecipeError, "no such file"),
    ],
)
def test_what_is_wrong_in_a_target_file_is_named(tmp_path, text, kind, words) -> None:
    """The key, the value, what is allowed."""
    path = tmp_path / "own.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(kind) as caught:
        get_target(str(path), machine=MACHINE)
    assert words in str(caught.value)


@pytest.mark.parametrize(("name", "multiple"), [("rtx-ada", 32), ("x86-avx2", 8)])
def test_channels_that_kernels_take_at_once(name: str, multiple: int) -> None:
    """What pruned widths are multiples of."""
    assert get_target(name, machine=detect_machine()).channel_multiple == multiple
