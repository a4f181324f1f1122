"""A filter on system calls, for the sandbox's processes: what a solution may ask of the Linux kernel.

It needs no privilege and holds in containers, on x86_64 and aarch64. Read seccomp(2), and the kernel's
Documentation/userspace-api/seccomp_filter.rst for the little machine that the rules are written for.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

from router_cli.teams import confine

PR_SET_SECCOMP = 22
CLONE_THREAD = 0x10000
EPERM, ENOSYS = 1, 38

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the tables below, and what the kernel calls it (linux/audit.h)."""

# Refused always. New processes and programs, leaving the group; sockets (socketpair, which asyncio needs, stays) and
# io_uring, which opens them too; other processes; namespaces and mounts; what would outlive the process or escape its
# limits (System V and POSIX IPC, files in memory, kernel keys); what else a solution has no use for.
_REFUSED = """
    fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, setpgid 109 154, setsid 112 157,
    socket 41 198, io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427,
    kill 62 129, tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240,
    ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272, pidfd_send_signal 424 424,
    pidfd_open 434 434, pidfd_getfd 438 438, process_madvise 440 440, process_mrelease 448 448,
    setpriority 141 140, sched_setparam 142 118, sched_setscheduler 144 119, sched_setaffinity 203 122,
    sched_setattr 314 274, ioprio_set 251 30, migrate_pages 256 238, move_pages 279 239,
    unshare 272 97, setns 308 268, chroot 161 51, mount 165 40, umount2 166 39, pivot_root 155 41, open_tree 428 428,
    move_mount 429 429, fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433, mount_setattr 442 442,
    shmget 29 194, shmat 30 196, semget 64 190, msgget 68 186, mq_open 240 180, memfd_create 319 279,
    memfd_secret 447 447, add_key 248 217, request_key 249 218, keyctl 250 219,
    perf_event_open 298 241, bpf 321 280, userfaultfd 323 282, fanotify_init 300 262, open_by_handle_at 304 265
"""

# Refused where no namespace keeps the user's files out of reach: whatever changes a file or its name.
_WRITES = """
    creat 85 -, truncate 76 45, rename 82 -, renameat 264 38, renameat2 316 276, mkdir 83 -, mkdirat 258 34,
    rmdir 84 -, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, unlink 87 -, unlinkat 263 35,
    mknod 133 -, mknodat 259 33, chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -,
    fchown 93 55, lchown 94 -, fchownat 260 54, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88,
    setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16,
    setxattrat 463 463, removexattrat 466 466, file_setattr 469 469
"""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_REFUSE = struct.pack("=HBBI", _RETURN, 0, 0, _ERRNO | EPERM)


def filter_calls(*, files: bool) -> None:
    """Give this process, for good, the filter of system calls; with `files` it may write files. OSError without one."""
    if platform.machine() not in _ARCHITECTURES or sys.byteorder != "little":
        raise OSError(ENOSYS, f"no filter of system calls for {platform.machine()}")
    code = _program(platform.machine(), files)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer)))
    confine.prctl(confine.PR_SET_NO_NEW_PRIVS, 1)
    confine.prctl(PR_SET_SECCOMP, 2, ctypes.addressof(header))


def _program(machine: str, files: bool) -> bytes:
    """The filter in the kernel's classic BPF: a chain of rules, each of which answers or hands on the call's number."""
    column, architecture = _ARCHITECTURES[machine]
    load_number = _op(_LOAD, 0)
    # Another architecture's calls (int 0x80) and x32's have numbers of their own, under which all would pass.
    code = _op(_LOAD, 4) + _op(_EQUAL, architecture, 1, 0) + _REFUSE + load_number
    code += _op(_AT_LEAST, 0x40000000, 0, 1) + _REFUSE
    for number in _numbers(_REFUSED if files else _REFUSED + "," + _WRITES, column):
        code += _op(_EQUAL, number, 0, 1) + _REFUSE
    # glibc falls back from these two, whose arguments a filter cannot see, to calls whose arguments it can.
    for number in (435, 437):  # clone3, openat2
        code += _op(_EQUAL, number, 0, 1) + _op(_RETURN, _ERRNO | ENOSYS)
    # The number of the call on each architecture, its argument, the test, and for which values it is refused.
    arguments: list[tuple[tuple[int | None, int | None], int, int, tuple[int, ...]]] = [
        ((72, 25), 1, _EQUAL, (8, 10, 15)),  # fcntl F_SETOWN, F_SETSIG, F_SETOWN_EX: signals to others by way of files
        ((16, 29), 1, _EQUAL, (0x8901, 0x8902, 0x5412, 0x541C)),  # ioctl FIOSETOWN, SIOCSPGRP, TIOCSTI, TIOCLINUX
        ((157, 167), 0, _EQUAL, (confine.PR_SET_PDEATHSIG,)),  # prctl: it dies with the judge
    ]
    if not files:
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        arguments += [((2, None), 1, _ANY_BIT, (writing,)), ((257, 56), 2, _ANY_BIT, (writing,))]  # open, openat
    for numbers, argument, test, values in arguments:
        if (wanted := numbers[column]) is not None:
            refusals = b"".join(_op(test, value, 0, 1) + _REFUSE for value in values)
            code += _only(wanted, argument, refusals + _op(_RETURN, _ALLOW))
    # Threads, and limits of this process itself.
    code += _only((56, 220)[column], 0, _op(_ANY_BIT, CLONE_THREAD, 1, 0) + _REFUSE + _op(_RETURN, _ALLOW))
    code += _only((302, 261)[column], 0, _op(_EQUAL, 0, 1, 0) + _REFUSE + _op(_RETURN, _ALLOW))
    return code + _op(_RETURN, _ALLOW)


def _only(number: int, argument: int, then: bytes) -> bytes:
    """Where the call is `number`: load the lower half of its argument and run `then`, which has to answer."""
    return _op(_EQUAL, number, 0, 1 + len(then) // 8) + _op(_LOAD, 16 + 8 * argument) + then


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _numbers(table: str, column: int) -> list[int]:
    cells = (entry.split()[1 + column] for entry in table.split(","))
    return [int(cell) for cell in cells if cell != "-"]
