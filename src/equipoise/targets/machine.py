"""The machine that this process runs on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine that measured.

    Attributes:
        cpu: Model name of the processor.
        architecture: ``x86_64`` or ``aarch64``.
        cores: Cores that this process may use.
        flags: CPU features that decide the scheme: ``avx2``, ``avx512_vnni``, ``asimddp``.
        memory_bytes: Physical memory.
        system: Operating system and release.
    """

    cpu: str
    architecture: str
    cores: int
    flags: tuple[str, ...]
    memory_bytes: int
    system: str
