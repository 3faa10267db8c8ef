"""What differs between TensorRT 10, TensorRT 11 and TensorRT-RTX, as data; finding the package."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from equipoise import extras
from equipoise.errors import IncompatibleError, MissingExtraError


@dataclass(frozen=True, kw_only=True)
class Flavor:
    """One member of the family.

    Attributes:
        name: Name of the runtime, and of a target whose integer scheme it takes.
        title: For people.
        module: Import name of the package.
        install: The line that installs it.
        engine_file: Name of the engine in its directory.
        generations: Major versions that this code is written for.
        capabilities: Compute capabilities that it builds for on any machine; where empty, it builds
            for the GPU of the machine alone.
        usual_capabilities: Of those, the ones to build for when none is asked for and no GPU here
            says it.
        timing_cache: Whether it measures kernels while it builds, so that timings can be kept.
        lacks: Field of BuildSettings -> why it cannot be had.
    """

    name: str
    title: str
    module: str
    install: str
    engine_file: str
    generations: tuple[int, ...]
    capabilities: tuple[str, ...] = ()
    usual_capabilities: tuple[str, ...] = ()
    timing_cache: bool = True
    lacks: dict[str, str] = field(default_factory=dict)


TENSORRT: Final = Flavor(
    name="tensorrt",
    title="TensorRT",
    module="tensorrt",
    install="pip install tensorrt-cu13 (a Jetson has it from JetPack)",
    engine_file="engine.plan",
    generations=(10, 11),
)
RTX: Final = Flavor(
    name="tensorrt-rtx",
    title="TensorRT-RTX",
    module="tensorrt_rtx",
    install=extras.install_line("tensorrt"),
    engine_file="engine.rtx",
    generations=(1,),
    capabilities=("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
    usual_capabilities=("8.0", "8.6", "8.9", "12.0"),
    timing_cache=False,
    lacks={
        "version_compatible": "its package has no lean runtime that an engine could carry along",
        "hardware_compatible": "it has no compatibility levels; name every compute capability that"
        " the engine is for, such as 8.6,8.9,12.0",
        "strip_weights": "it cannot build an engine without weights on a machine without a GPU",
    },
)


def load(flavor: Flavor) -> Any:
    """The package of ``flavor``.

    Raises:
        MissingExtraError: It is not installed.
        IncompatibleError: It cannot be imported, or is of a generation that is not known.
    """
    if not extras.installed(flavor.module):
        raise MissingExtraError(
            f"{flavor.title} is not installed: there is no package {flavor.module!r}",
            hint=f"Install it with: {flavor.install}",
        )
    try:
        package: Any = extras.require(flavor.module)
    except (ImportError, OSError, RuntimeError) as error:  # its libraries are missing or broken
        raise IncompatibleError(
            f"the package {flavor.module!r} cannot be imported: {error}",
            hint=f"Install it again, whole, with: {flavor.install}",
        ) from error
    _check_generation(flavor, str(package.__version__))
    return package


def _check_generation(flavor: Flavor, version: str) -> None:
    if parts(version)[0] not in flavor.generations:
        known = " or ".join(map(str, flavor.generations))
        raise IncompatibleError(
            f"{flavor.title} {version} is installed; equipoise knows its major version {known}",
            hint=f"Install one of those, for instance: pip install"
            f" '{flavor.module}=={flavor.generations[-1]}.*'",
        )


def parts(version: str) -> tuple[int, ...]:
    """``10.16.1.11`` as numbers, so that versions can be compared."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def network_flags(flavor: Flavor, package: Any) -> int:
    """Flags of a strongly typed network: TensorRT 10 has to be told, the others know no other."""
    if flavor == TENSORRT and parts(str(package.__version__))[0] == 10:
        return 1 << int(package.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return 0
