"""The GPU, through the driver's own library: memory, copies, a stream.

The driver is the one CUDA library that is on every device that can run an engine, so nothing else
need be installed. A device without NVML, such as a Jetson, has it too.
"""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from typing import Any, Final

from equipoise.errors import BackendError, IncompatibleError
from equipoise.runtimes.base import Closing
from equipoise.spec import Array

_LIBRARY: Final = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
_MAJOR: Final = 75
_MINOR: Final = 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""
_NON_BLOCKING: Final = 1
"""CU_STREAM_NON_BLOCKING."""
_NAME_BYTES: Final = 256


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The first GPU that the driver shows.

    Attributes:
        name: Product name.
        compute_capability: ``8.6``.
    """

    name: str
    compute_capability: str


def require_gpu(title: str) -> Gpu:
    """The GPU here.

    Args:
        title: The runtime that needs one, for the message.

    Raises:
        IncompatibleError: There is no driver, or it shows no GPU.
    """
    try:
        library = _driver()
        device = _first_device(library)
        return Gpu(name=_name(library, device), compute_capability=_capability(library, device))
    except (OSError, BackendError) as error:
        raise IncompatibleError(
            f"a session of {title} needs an NVIDIA driver and GPU, and there is none here: {error}",
            hint="Copy the directory with the engine, whole, to the device and open it there.",
        ) from error


def find_gpu() -> Gpu | None:
    """The GPU here, or None."""
    try:
        return require_gpu("CUDA")
    except IncompatibleError:
        return None


def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL(_LIBRARY)
    _call(library, "cuInit", 0)
    return library


def _call(library: Any, name: str, *arguments: Any) -> None:
    """Call a function of the driver. Raises BackendError with its own word for what failed."""
    code = getattr(library, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        known = library.cuGetErrorName(code, ctypes.byref(text)) == 0 and text.value
        said = text.value.decode() if known and text.value else f"error {code}"
        raise BackendError(f"{name} of the NVIDIA driver failed: {said}")


def _first_device(library: Any) -> ctypes.c_int:
    device = ctypes.c_int()
    _call(library, "cuDeviceGet", ctypes.byref(device), 0)
    return device


def _name(library: Any, device: ctypes.c_int) -> str:
    name = ctypes.create_string_buffer(_NAME_BYTES)
    _call(library, "cuDeviceGetName", name, _NAME_BYTES, device)
    return name.value.decode()


def _capability(library: Any, device: ctypes.c_int) -> str:
    found = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        _call(library, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        found.append(str(value.value))
    return ".".join(found)


class Device(Closing):
    """Memory and a stream on the first GPU, in the context that the runtime uses too.

    Args:
        library: The driver, loaded and initialised; the one of this machine when None.

    Raises:
        BackendError: The driver refuses.
    """

    def __init__(self, library: Any = None) -> None:
        self._library = library or _driver()
        self._device = _first_device(self._library)
        self._blocks: dict[str, tuple[ctypes.c_uint64, int]] = {}
        self._stream = ctypes.c_void_p()
        context = ctypes.c_void_p()
        self._do("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._context: ctypes.c_void_p | None = context
        self.enter()
        self._do("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING)

    def _do(self, name: str, *arguments: Any) -> None:
        _call(self._library, name, *arguments)

    @property
    def stream(self) -> int:
        """The handle of the stream."""
        return int(self._stream.value or 0)

    def enter(self) -> None:
        """Make the GPU's context that of this thread: a session may be run by another one."""
        self._do("cuCtxSetCurrent", self._context)

    def memory(self, name: str, size_bytes: int) -> int:
        """Address of memory that is kept under ``name``; it grows and never shrinks."""
        block, held = self._blocks.get(name, (ctypes.c_uint64(), 0))
        if held < size_bytes:
            self._free(name)
            block = ctypes.c_uint64()
            self._do("cuMemAlloc_v2", ctypes.byref(block), ctypes.c_size_t(size_bytes))
            self._blocks[name] = (block, size_bytes)
        return block.value

    def upload(self, name: str, array: Array) -> int:
        """Copy a contiguous array to the memory ``name``; the address there.

        The array has to live until :meth:`synchronize`.
        """
        address = self.memory(name, max(array.nbytes, 1))
        self._do(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(address),
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_size_t(array.nbytes),
            self._stream,
        )
        return address

    def download(self, name: str, array: Array) -> None:
        """Copy the memory ``name`` into a contiguous array; it is there after synchronize."""
        self._do(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(array.ctypes.data),
            self._blocks[name][0],
            ctypes.c_size_t(array.nbytes),
            self._stream,
        )

    def synchronize(self) -> None:
        """Wait for everything on the stream."""
        self._do("cuStreamSynchronize", self._stream)

    def _free(self, name: str) -> None:
        block, _ = self._blocks.pop(name, (None, 0))
        if block is not None:
            # Work that still reads it comes first.
            self.synchronize()
            self._do("cuMemFree_v2", block)

    def close(self) -> None:
        """Free everything. Closing twice is no error."""
        if self._context is None:
            return
        self.enter()
        for name in list(self._blocks):
            self._free(name)
        self._do("cuStreamDestroy_v2", self._stream)
        self._do("cuDevicePrimaryCtxRelease_v2", self._device)
        self._context = None
