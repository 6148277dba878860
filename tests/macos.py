"""A Mac as far as slowft's platform module can tell: its branches run, what they ask of the system is recorded."""

import ctypes
import fcntl
import mmap
import os
from collections.abc import Callable
from typing import Any

from slowft import platform


class Mac:
    """What the simulated system was asked for.

    Attributes:
        calls: (name, arguments) of every call of `fcntl` and of the C library, in order. Arguments are plain numbers.
        libc: functions of the C library that do more than return 0; any may be put in.
        mapped: addresses that `mmap` gave.
    """

    def __init__(self):
        self.calls: list[tuple[str, tuple]] = []
        self.libc: dict[str, Callable] = {"mmap": self._map, "munmap": self._unmap, "msync": self._sync}
        self.mapped: list[int] = []
        self._real = ctypes.CDLL(None)
        self._real.mmap.restype = ctypes.c_void_p
        self._extents: dict[int, tuple[int, int]] = {}  # (descriptor, offset) of each mapping

    def fcntl(self, fd: int, command: int, argument: Any = 0) -> int:
        self.calls.append(("fcntl", (fd, command, argument)))
        return 0

    def _map(self, address, nbytes, protection, flags, fd, offset) -> int:
        at = self._real.mmap(address, ctypes.c_size_t(nbytes), protection, flags, fd, ctypes.c_int64(offset))
        self.mapped.append(at)
        self._extents[at] = fd, offset
        return at

    def _unmap(self, address, nbytes) -> int:
        return self._real.munmap(ctypes.c_void_p(address), ctypes.c_size_t(nbytes))

    def _sync(self, address, nbytes, flags) -> int:
        fd, offset = self._extents[address]
        if flags & 0x0002 and hasattr(os, "posix_fadvise"):
            self._unmap(address, nbytes)  # Linux keeps pages that are mapped
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
            again = self._real.mmap(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), 1, 1, fd, ctypes.c_int64(offset))
            assert again == address
        return 0


class _Function:
    def __init__(self, mac: Mac, name: str):
        self._mac, self._name = mac, name

    def __call__(self, *args):
        plain = tuple(getattr(arg, "value", arg) for arg in args)
        self._mac.calls.append((self._name, plain))
        return self._mac.libc.get(self._name, lambda *_: 0)(*plain)


class _Library:
    def __init__(self, mac: Mac):
        self._mac = mac

    def __getattr__(self, name: str) -> _Function:
        function = _Function(self._mac, name)
        setattr(self, name, function)
        return function


class _Ctypes:
    """The module, but for what it loads."""

    def __init__(self, mac: Mac):
        self.CDLL = lambda *_, **__: _Library(mac)

    def __getattr__(self, name: str):
        return getattr(ctypes, name)


def simulate(monkeypatch, page_nbytes: int) -> Mac:
    """Until the test ends, this is macOS with pages of `page_nbytes`, a multiple of this processor's."""
    mac = Mac()
    monkeypatch.setattr(platform, "MACOS", True)
    monkeypatch.setattr(platform, "DIRECT_ALIGNMENT", page_nbytes)
    monkeypatch.setattr(mmap, "PAGESIZE", page_nbytes)
    monkeypatch.setattr(platform, "ctypes", _Ctypes(mac))
    monkeypatch.setattr(fcntl, "fcntl", mac.fcntl)
    return mac
