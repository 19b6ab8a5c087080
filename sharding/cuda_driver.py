"""The few calls of CUDA's driver that a mailbox needs, through ctypes: memory that other devices and processes may map.

Two ways to share it were tried on a host with two H100s; `docs/architecture.md` says what came of each. No JAX.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

IPC_HANDLE_BYTES = 64
_ALREADY_ENABLED = 704  # CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED: XLA does it for the devices that it holds


class CudaError(ValueError):
    """A call of the driver failed."""


class _IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * IPC_HANDLE_BYTES)]


def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"mailboxes: expected CUDA's driver (libcuda.so.1), got {error}") from None


def call(name: str, *arguments: Any) -> None:
    """One call of the driver.

    Raises:
      CudaError: what the driver says.
    """
    driver = _driver()
    if code := getattr(driver, name)(*arguments):
        text = ctypes.c_char_p()
        driver.cuGetErrorName(code, ctypes.byref(text))
        raise CudaError(f"{name}: expected success, got {(text.value or b'?').decode()} ({code})")


@contextlib.contextmanager
def context(ordinal: int) -> Iterator[None]:
    """The device's primary context, which is XLA's too, for the calls inside."""
    call("cuInit", 0)
    device, held, before = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    call("cuDeviceGet", ctypes.byref(device), ordinal)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(held), device)
    call("cuCtxPushCurrent_v2", held)
    try:
        yield
    finally:
        call("cuCtxPopCurrent_v2", ctypes.byref(before))
        call("cuDevicePrimaryCtxRelease_v2", device)


def allocate(ordinal: int, num_bytes: int) -> int:
    """Zeroed memory of a device, outside XLA's pool; its address."""
    address = ctypes.c_uint64()
    with context(ordinal):
        call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        call("cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(num_bytes))
        call("cuCtxSynchronize")
    return address.value


def free(ordinal: int, address: int) -> None:
    """Gives memory of `allocate` back."""
    with context(ordinal):
        call("cuMemFree_v2", ctypes.c_uint64(address))


def export(ordinal: int, address: int) -> bytes:
    """A handle with which another process of this host maps the memory."""
    handle = _IpcHandle()
    with context(ordinal):
        call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
    return bytes(handle)


def import_(ordinal: int, handle: bytes) -> int:
    """The address under which device `ordinal` of this process sees another process's memory."""
    address = ctypes.c_uint64()
    with context(ordinal):
        lazily_enable_peer_access = ctypes.c_uint(1)
        call(
            "cuIpcOpenMemHandle_v2",
            ctypes.byref(address),
            _IpcHandle.from_buffer_copy(handle),
            lazily_enable_peer_access,
        )
    return address.value


def close_import(ordinal: int, address: int) -> None:
    """Unmaps what `import_` mapped."""
    with context(ordinal):
        call("cuIpcCloseMemHandle", ctypes.c_uint64(address))


def enable_peer_access(ordinal: int, peer: int) -> None:
    """Lets device `ordinal` reach memory of device `peer`, both of this process.

    Raises:
      CudaError: the hardware has no way from one to the other.
    """
    if ordinal == peer:
        return
    possible, device, other = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), ordinal)
    call("cuDeviceGet", ctypes.byref(other), peer)
    call("cuDeviceCanAccessPeer", ctypes.byref(possible), device, other)
    if not possible.value:
        raise CudaError(
            f"mailboxes: expected device {ordinal} to reach the memory of device {peer} (peer access), got none"
        )
    peer_context = ctypes.c_void_p()
    call("cuDevicePrimaryCtxRetain", ctypes.byref(peer_context), other)
    with context(ordinal):
        code = _driver().cuCtxEnablePeerAccess(peer_context, 0)
    if code not in (0, _ALREADY_ENABLED):
        raise CudaError(f"cuCtxEnablePeerAccess: expected success from device {ordinal} to {peer}, got {code}")
