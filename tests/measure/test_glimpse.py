"""What the kernel tells of the machine, from trees of files as kernels have them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from equipoise.measure.glimpse import Glimpse, Places, look

PER_SECOND = os.sysconf("SC_CLK_TCK")
FACTS = (
    "clock_mhz", "throttled", "waited_s", "quota_s", "hottest_c", "load", "cores", "busy_s",
    "stolen_s",
)  # fmt: skip


class Machine:
    """A tree of ``/proc`` and ``/sys``."""

    def __init__(self, root: Path) -> None:
        self.places = Places(proc=root / "proc", sys=root / "sys")

    def write(self, name: str, text: str) -> None:
        path = self.places.proc.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def look(self) -> Glimpse:
        return look(self.places)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_proc_and_sys_everything_is_unknown(machine: Machine) -> None:
    """As on macOS and Windows: only the clocks of Python itself are there."""
    seen = machine.look()
    assert [getattr(seen, fact) for fact in FACTS] == [None] * len(FACTS)
    assert seen.own_s > 0
    assert machine.look().wall_s >= seen.wall_s


def test_this_machine_can_be_looked_at() -> None:
    """Whatever it is; CPU time only grows."""
    before, after = look(), look()
    assert after.own_s >= before.own_s
    if before.busy_s is not None:
        assert after.busy_s >= before.busy_s > 0
        assert before.cores >= 1


def test_clock_is_that_of_the_fastest_core(machine: Machine) -> None:
    """In MHz; folders beside those of the cores are no cores."""
    for name, khz in (("cpu0", 800000), ("cpu1", 3401250), ("cpufreq", 9900000)):
        machine.write(f"sys/devices/system/cpu/{name}/cpufreq/scaling_cur_freq", f"{khz}\n")
    machine.write("proc/cpuinfo", "cpu MHz\t\t: 1200.000\n")
    assert machine.look().clock_mhz == 3401.25


@pytest.mark.parametrize("text", ["<unknown>\n", "", "-\n"])
def test_clock_that_the_kernel_does_not_know_is_looked_for_in_cpuinfo(
    machine: Machine, text: str
) -> None:
    """The text is what some drivers give."""
    machine.write("sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", text)
    assert machine.look().clock_mhz is None
    machine.write("proc/cpuinfo", "cpu MHz\t\t: 1200.500\nflags\t: fpu vme\ncpu MHz\t: 2400.000\n")
    assert machine.look().clock_mhz == 2400.0


def test_a_virtual_machine_has_no_clock(machine: Machine) -> None:
    """What stands in /proc/cpuinfo there is a constant, and no measurement."""
    machine.write("proc/cpuinfo", "flags\t\t: fpu hypervisor lahf_lm\ncpu MHz\t\t: 2596.122\n")
    assert machine.look().clock_mhz is None


def test_arm_names_no_clock_in_cpuinfo(machine: Machine) -> None:
    """There is no such line."""
    machine.write("proc/cpuinfo", "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd\n")
    assert machine.look().clock_mhz is None


def test_throttling_of_any_core_and_package_counts(machine: Machine) -> None:
    """A rise of any of them is a rise."""
    place = "sys/devices/system/cpu/cpu{}/thermal_throttle/{}"
    machine.write(place.format(0, "core_throttle_count"), "100\n")
    machine.write(place.format(0, "core_throttle_max_time_ms"), "7000\n")
    machine.write(place.format(1, "package_throttle_count"), "3\n")
    assert machine.look().throttled == 103
    machine.write(place.format(1, "package_throttle_count"), "4\n")
    assert machine.look().throttled == 104


def test_the_hottest_zone_counts(machine: Machine) -> None:
    """In degrees; a zone that cannot be read is left out."""
    for zone, text in ((0, "41500\n"), (1, "67000\n"), (2, "")):
        machine.write(f"sys/class/thermal/thermal_zone{zone}/temp", text)
    assert machine.look().hottest_c == 67.0


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("cpu.stat", "usage_usec 5\nnr_throttled 2\nthrottled_usec 2500000\n"),
        ("cpu/cpu.stat", "nr_periods 9\nnr_throttled 2\nthrottled_time 2500000000\n"),
    ],
)
def test_quota_of_both_versions_of_control_groups(machine: Machine, file: str, text: str) -> None:
    """Microseconds in one, nanoseconds in the other."""
    machine.write(f"sys/fs/cgroup/{file}", text)
    assert machine.look().quota_s == pytest.approx(2.5)


def test_load_and_times_of_all_processes(machine: Machine) -> None:
    """Idle and waiting for disks is not busy; steal is a column of its own; guests are in user."""
    machine.write("proc/loadavg", "1.25 0.80 0.60 2/300 4242\n")
    machine.write(
        "proc/stat",
        "cpu  100 20 30 9000 800 4 6 50 70 0\ncpu0 50 10 15 4500 400 2 3 25 35 0\n"
        "cpu1 50 10 15 4500 400 2 3 25 35 0\nintr 1 2\nctxt 3\n",
    )
    seen = machine.look()
    assert (seen.load, seen.cores) == (1.25, 2)
    assert seen.busy_s == pytest.approx(160 / PER_SECOND)
    assert seen.stolen_s == pytest.approx(50 / PER_SECOND)


def test_waiting_for_a_core_is_read_for_this_process(machine: Machine) -> None:
    """The second of three numbers, in nanoseconds."""
    machine.write("proc/self/schedstat", "9000000000 1500000000 77\n")
    assert machine.look().waited_s == pytest.approx(1.5)
    machine.write("proc/self/schedstat", "0 0\n")
    assert machine.look().waited_s is None


@pytest.mark.parametrize("text", ["", "cpu  1 2 3 4\n", "cpu  a b c d e f g h\n", "\x00\xff"])
def test_times_in_another_form_are_unknown(machine: Machine, text: str) -> None:
    """Kernels before 2.6 had fewer columns; a sandbox may have anything."""
    machine.write("proc/stat", text)
    machine.write("proc/loadavg", text)
    seen = machine.look()
    assert (seen.busy_s, seen.stolen_s, seen.load) == (None, None, None)


def test_a_folder_in_place_of_a_file_is_unknown(machine: Machine) -> None:
    """No error of the system ends a measurement."""
    for name in ("proc/stat", "proc/cpuinfo", "sys/class/thermal/thermal_zone0/temp"):
        (machine.places.proc.parent / name).mkdir(parents=True)
    seen = machine.look()
    assert [getattr(seen, fact) for fact in FACTS] == [None] * len(FACTS)
