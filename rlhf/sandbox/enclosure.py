"""Launcher of a generated program: enters namespaces and sets limits, then becomes the program (exec).

This file is run as a script with one argument, its settings as JSON, which `rlhf/sandbox/runner.py` writes.
It imports little, because every program starts with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

LEVELS = ("nobody, namespaces", "namespaces", "limits only")
"""Levels of isolation, the safest first."""
CLONE = {"mount": 0x20000, "uts": 0x04000000, "ipc": 0x08000000, "user": 0x10000000, "pid": 0x20000000}
CLONE_NET = 0x40000000
NOBODY = 65534
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 0x4000, 1 << 18
SYSTEM = (
    "/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/localtime", "/proc",
    "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom",
)  # fmt: skip
"""What a program sees of the machine, beside the folders of its interpreter."""
MS_CLOSED = 1 | 2 | 4 | 8
"""MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC."""
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1


def launch(settings: dict[str, Any]) -> None:
    """Isolates this process and becomes the program; in namespaces a child does, and this process waits."""
    libc = ctypes.CDLL(None, use_errno=True)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, int(settings["seconds"]) + 1)
    _limit(resource.RLIMIT_FSIZE, settings["file"])
    _limit(resource.RLIMIT_NOFILE, 256)
    if settings["level"] == LEVELS[-1]:
        _become(settings, libc)
    # read before the change of user: the folder is closed to all others
    with open(settings["program"], "rb") as file:
        program = file.read()
    if settings["level"] == LEVELS[0]:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        # after a change of user /proc/self belongs to root, unless the process is dumpable
        _check(libc, libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl")
    enter_namespaces(libc)
    make_read_only(libc)
    _enter_root(libc, settings["folder"])
    with open("program.py", "wb") as file:
        file.write(program)
    _become(settings, libc)


def enter_namespaces(libc: Any) -> None:
    """Goes on in a child with namespaces of its own: without network, without sight of other processes.

    This process waits for the child, ends as the child does, and never returns. Raises OSError where the
    system allows no namespaces.
    """
    user, group = os.getuid(), os.getgid()
    _check(libc, libc.unshare(sum(CLONE.values()) | CLONE_NET), "unshare")
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{NOBODY} {user} 1")
    _write("/proc/self/gid_map", f"{NOBODY} {group} 1")
    signals = {signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(_wait(child, signals))
        if code < 0:
            # this process ends by the same signal, so that whoever waits for it sees the signal
            os.kill(os.getpid(), -code)
        os._exit(code)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def _wait(child: int, signals: set[signal.Signals]) -> int:
    """Exit status of `child`, the first process of its PID namespace: when it has ended, so have the others.

    On SIGTERM the child is killed, and so all processes of the namespace. Waiting for the launcher therefore
    means waiting for the end of everything that the program started.
    """
    while True:
        if signal.sigwait(signals) == signal.SIGTERM:
            os.kill(child, signal.SIGKILL)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status


def make_read_only(libc: Any) -> None:
    """Makes all mounts read-only, and lets /proc show the processes of this namespace alone."""
    _check(libc, libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "mount")
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.sizeof(attributes)
    done = libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(attributes), size)
    _check(libc, done, "mount_setattr")
    # read-only, because root could change settings of the kernel in /proc
    _check(libc, libc.mount(b"proc", b"/proc", b"proc", MS_CLOSED, None), "mount")


def _enter_root(libc: Any, folder: str) -> None:
    """Changes to a root that holds the interpreter, the system's libraries, and an empty folder at `folder`.

    Nothing else of this machine has a name there: no data, no home folders, no sockets, no other programs'
    folders. Everything but the folder, of 32 MiB, is read-only.
    """
    root, target = folder.encode(), os.path.join(folder, folder.lstrip("/"))
    _check(libc, libc.mount(b"tmpfs", root, b"tmpfs", 0, b"size=1m,mode=755"), "mount")
    own = [os.path.join(sys.base_prefix, name) for name in ("bin", "lib", "lib64")]
    for path in SYSTEM + tuple(path for path in own if not path.startswith("/usr/")):
        _show(libc, path, os.path.join(folder, path.lstrip("/")))
    os.makedirs(target)
    _check(libc, libc.mount(b"tmpfs", target.encode(), b"tmpfs", 0, b"size=32m,mode=777"), "mount")
    _check(libc, libc.mount(None, root, None, MS_REMOUNT | MS_BIND | MS_RDONLY, None), "mount")
    os.chroot(folder)
    os.chdir(folder)


def _show(libc: Any, path: str, place: str) -> None:
    """Makes `path`, if it is there, visible at `place`: a link as a link, all else as the same thing."""
    if not os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), place)
        return
    if os.path.isdir(path):
        os.makedirs(place, exist_ok=True)
    else:
        _write(place, "")
    _check(libc, libc.mount(path.encode(), place.encode(), None, MS_BIND | MS_REC, None), "mount")


def _become(settings: dict[str, Any], libc: Any) -> None:
    """Sets the last limits and replaces this process by the program."""
    _limit(resource.RLIMIT_AS, settings["memory"])
    if settings["level"] != LEVELS[-1] or os.getuid():
        _limit(resource.RLIMIT_NPROC, settings["processes"])
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.execve(settings["python"], [settings["python"], "-I", "-S", "program.py"], {"LANG": "C.UTF-8"})


def _limit(what: int, most: int) -> None:
    resource.setrlimit(what, (most, most))


def _check(libc: Any, result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    launch(json.loads(sys.argv[1]))
