"""Confines a process that runs an untrusted program: namespaces, limits, Landlock, seccomp.

The layers, in order. If the kernel or the container refuses a layer, it is left out and the others still apply.

1. Linux namespaces (make_private_root). The program gets a network without interfaces, its own process ids, and its own
   root folder. The root folder holds the interpreter and the system's libraries, read-only, and one writable tmpfs of
   BOX_BYTES. This needs root, or user namespaces for ordinary users. Many containers refuse both.
2. Limits (setrlimit): processor time, address space, file size, open files.
3. Landlock (Linux 5.13): the program reads only the interpreter and the system's libraries and writes only the working
   folder.
4. seccomp (x86_64, aarch64): refuses system calls that reach other processes, sockets or inode flags. Without it
   an audit hook in the interpreter refuses the common ones. The hook stops a careless program, not a determined one.

Without layer 1 the program can read metadata of files outside its folder, because `stat`, `access`, `readlink` and
`statfs` take any path. It cannot list or read those files (3) or watch them with inotify (4). The supervisor then
limits disk use (sandbox_child.py): it looks every 20 ms and ends a program that has exceeded BOX_BYTES. Between two
looks a program can write 14 MiB too much with one thread, and 120 MiB with 50 threads on two cores (measured). All
files are removed at the end. Only the size of one file and the number of open files have exact limits (2).
"""

import contextlib
import ctypes
import errno
import math
import os
import platform
import signal
import struct
import sys

FILE_BYTES = 16 << 20  # largest file
BOX_BYTES = 64 << 20  # most bytes in all files together
BOX_FILES = 1024  # most files and folders
THREADS = 64  # most threads of the program
BOX = "/box"  # the writable folder in a private root
LAYERS = ("namespaces", "landlock", "seccomp")  # layers that can be switched off, for tests


# ---------------------------------------------------------------------------------------------------------------------
# Ending with the parent


def die_with_parent() -> None:
    """Asks the kernel to kill this process when the thread that started it ends.

    The caller must check whether that thread has already ended.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


# ---------------------------------------------------------------------------------------------------------------------
# Namespaces

NEW_NS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NOSUID, NODEV, BIND, RECURSIVE, PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000  # flags of mount(2)


def readable_paths() -> list[str]:
    """The paths that a program may read: the interpreter, its packages, the system's libraries. None contains another."""
    system = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives"]
    paths = {os.path.abspath(p) for p in (sys.prefix, sys.base_prefix, *sys.path, *system) if p}
    paths |= {os.path.realpath(p) for p in paths}
    kept = []
    for path in sorted(path for path in paths if path != "/" and os.path.exists(path)):
        if not any(path.startswith(above + "/") for above in kept):
            kept.append(path)
    return kept


def make_private_root(box: str) -> bool:
    """Moves this process into new namespaces and makes the folder `box` a root folder for its children. -> success

    Children that are forked afterwards enter it with enter_private_root(). If the system allows only a private network,
    the process takes that and returns False.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.geteuid(), os.getegid()
    every = NEW_NS | NEW_IPC | NEW_PID | NEW_NET
    as_root = uid == 0 and libc.unshare(every) == 0
    if not as_root:
        if libc.unshare(every | NEW_USER):
            if libc.unshare(NEW_NET):
                libc.unshare(NEW_NET | NEW_USER)
            return False
        with contextlib.suppress(OSError):  # keeps the user's id; the mounts below fail without it
            for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with open(f"/proc/self/{name}", "w") as f:
                    f.write(text)
    try:
        mount_root(libc, box)
    except OSError:
        libc.umount2(os.fsencode(box), 2)  # MNT_DETACH
        return False
    return True


def mount_root(libc: ctypes.CDLL, box: str) -> None:
    """Mounts a tmpfs on `box`, and in it readable_paths() and two devices, read-only. OSError if a mount fails."""

    def mount(source, target, kind, flags, options=None):
        encoded = [text if text is None else os.fsencode(text) for text in (source, target, kind, options)]
        if libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]):
            raise OSError(ctypes.get_errno(), f"mount {target}")

    mount(None, "/", None, RECURSIVE | PRIVATE)
    options = f"size={BOX_BYTES},nr_inodes={BOX_FILES + 1000},mode=755"  # the mount points are inodes too
    mount("tmpfs", box, "tmpfs", NOSUID | NODEV, options)
    os.mkdir(box + BOX, 0o700)
    for path in [*readable_paths(), "/dev/null", "/dev/urandom"]:
        target = box + path
        os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
        if not os.path.isdir(path):
            open(target, "x").close()
        mount(path, target, None, BIND | RECURSIVE)
        # mount_setattr(AT_FDCWD, target, AT_RECURSIVE, {MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID})
        attributes = struct.pack("4Q", 0x3, 0, 0, 0)
        if libc.syscall(442, -100, os.fsencode(target), 0x8000, attributes, len(attributes)):
            raise OSError(ctypes.get_errno(), f"mount_setattr {target}")


def enter_private_root(box: str) -> None:
    """Makes the folder of make_private_root() this process's root. confine() then drops the right to leave it."""
    os.chroot(box)
    os.chdir(BOX)


# ---------------------------------------------------------------------------------------------------------------------
# Limits, Landlock


def confine(cpu_seconds: float, memory_mb: int, layers: tuple[str, ...] = LAYERS, watched: bool = False) -> None:
    """Drops this process's rights permanently.

    cpu_seconds: limit of processor time. memory_mb: limit of address space, in MiB. watched: lets other processes of
    the same user read its /proc folder. The supervisor needs that to count deleted files.
    """
    import resource

    limits = {"CPU": math.ceil(cpu_seconds), "AS": memory_mb << 20, "FSIZE": FILE_BYTES, "CORE": 0, "NOFILE": 64}
    for name, value in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    filtered = False
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        # drops all capabilities, so even root obeys the limits and cannot mount, reboot or raise a limit
        libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6))
        libc.prctl(4, int(watched), 0, 0, 0)  # PR_SET_DUMPABLE; 0 closes its /proc folder
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which Landlock and seccomp require
        if "landlock" in layers:
            restrict_files(libc)
        filtered = "seccomp" in layers and filter_calls(libc)
    if not filtered:
        sys.addaudithook(refuse_events)


def refuse_events(event: str, args: tuple) -> None:
    """An audit hook: raises PermissionError for sockets, processes, signals and foreign code."""
    processes = ("os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "signal.pthread_kill")
    refused = ("socket.", "subprocess.", "ctypes.", "os.chmod", "os.chown", *processes)
    if event.startswith(refused):
        raise PermissionError(f"{event} is refused")


def restrict_files(libc: ctypes.CDLL) -> None:
    """Landlock: allows reading below readable_paths() and writing below the working folder only.

    Newer kernels also refuse TCP (ABI 4), and signals and abstract sockets (ABI 6).
    """
    abi = libc.syscall(444, None, 0, 1)
    if abi < 1:
        return
    read, write = 1 << 2 | 1 << 3, 1 << 1
    handled = (1 << (13 if abi == 1 else 14 if abi == 2 else 15)) - 1  # all rights that this kernel knows
    # also: remove folder, remove file, make folder, make file, link between folders, truncate
    box = read | write | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | handled & (1 << 13 | 1 << 14)
    size = 8 if abi < 4 else 16 if abi < 6 else 24  # size of the structure: files; and TCP; and signals
    rules = libc.syscall(444, struct.pack("QQQ", handled, 3, 3), size, 0)
    others = [("/dev/urandom", read), ("/dev/null", read | write), (".", box)]
    for path, rights in [(path, read) for path in readable_paths()] + others:
        try:
            fd = os.open(path, os.O_PATH)
        except OSError:
            continue
        rights = rights if os.path.isdir(path) else rights & ~(1 << 3)
        libc.syscall(445, rules, 1, struct.pack("=Qi", rights, fd), 0)
        os.close(fd)
    libc.syscall(446, rules, 0)
    os.close(rules)


# ---------------------------------------------------------------------------------------------------------------------
# Seccomp

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of CALLS, audit code
# System calls that fail with EPERM, and their numbers on x86_64 and aarch64; "-" if a machine lacks the call.
CALLS = """
sockets:     socket 41 198  bind 49 200  listen 50 201  accept 43 202  accept4 288 242  connect 42 203
             sendmsg 46 211  sendmmsg 307 269  io_uring_setup 425 425
processes:   fork 57 -  vfork 58 -  execve 59 221  execveat 322 281  setsid 112 157  setpgid 109 154
signals:     kill 62 129  tkill 200 130  tgkill 234 131  rt_sigqueueinfo 129 138  rt_tgsigqueueinfo 297 240
             pidfd_send_signal 424 424  pidfd_open 434 434  pidfd_getfd 438 438
memory:      ptrace 101 117  process_vm_readv 310 270  process_vm_writev 311 271  process_madvise 440 440
             kcmp 312 272  move_pages 279 239  migrate_pages 256 238
limits:      prlimit64 302 261  setrlimit 160 164  setpriority 141 140  ioprio_set 251 30  sched_setparam 142 118
             sched_setscheduler 144 119  sched_setaffinity 203 122  sched_setattr 314 274
kernel:      bpf 321 280  perf_event_open 298 241  userfaultfd 323 282  add_key 248 217  request_key 249 218
             keyctl 250 219  unshare 272 97  setns 308 268  syslog 103 116
owners:      chown 92 -  fchown 93 55  lchown 94 -  fchownat 260 54  setxattr 188 5  lsetxattr 189 6  fsetxattr 190 7
             removexattr 197 14  lremovexattr 198 15  fremovexattr 199 16
watching:    inotify_init 253 -  inotify_init1 294 26  inotify_add_watch 254 27  fanotify_init 300 262
             fanotify_mark 301 263  name_to_handle_at 303 264  lookup_dcookie 212 18
persistent:  shmget 29 194  shmat 30 196  shmctl 31 195  shmdt 67 197  semget 64 190  semop 65 193  semctl 66 191
             semtimedop 220 192  msgget 68 186  msgsnd 69 189  msgrcv 70 188  msgctl 71 187  mq_open 240 180
             mq_unlink 241 181  mq_timedsend 242 182  mq_timedreceive 243 183  mq_notify 244 184  mq_getsetattr 245 185
unwatched:   memfd_create 319 279  memfd_secret 447 447  fallocate 285 47  io_setup 206 0
"""
# These do nothing and report success, so that shutil.copy works. They could change files outside the folder.
PRETENDED = """
permissions: chmod 90 -  fchmod 91 52  fchmodat 268 53  fchmodat2 452 452
times:       utime 132 -  utimes 235 -  futimesat 261 -  utimensat 280 88
"""
MISSING = "clone3 435 435"  # fails with ENOSYS; the C library then calls clone, whose flags a filter can read
# Calls from this number on (Linux 6.6 and newer) fail with ENOSYS. Some repeat a refused call, such as setxattrat
FIRST_UNKNOWN = 453
# (call, byte of the argument, mask, allowed values or None, refused values). Bytes: 16: first argument, 24: second
ARGUMENTS = (
    ("clone 56 220", 16, 0x10F00, (0x10F00,), ()),  # only threads, which share memory, files and signal handlers
    ("socketpair 53 199", 24, 0xF, (1,), ()),  # only streams: a datagram socket can send to any path
    ("ioctl 16 29", 24, None, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451), ()),  # isatty, size, FIONREAD, flags
    ("fcntl 72 25", 24, None, (*range(8), 1030, 1032), ()),  # not F_SETOWN, F_SETSIG, F_SETLEASE, F_NOTIFY
    ("prctl 157 167", 16, None, None, (1, 4, 0x59616D61)),  # the settings of die_with_parent() and confine()
)


def call_numbers(text: str, column: int) -> list[int]:
    """The numbers of the system calls in a table. column: 0 for x86_64, 1 for aarch64."""
    words = [word for word in text.split() if not word.endswith(":")]
    return [int(pair[column]) for pair in zip(words[1::3], words[2::3]) if pair[column] != "-"]


def filter_calls(libc: ctypes.CDLL) -> bool:
    """Seccomp: refuses the system calls above and those in another machine's calling convention. -> True if active"""
    if platform.machine() not in MACHINES:
        return False
    column, audit = MACHINES[platform.machine()]
    # A line of classic BPF: (operation, lines to skip if true, if false, value). The filter reads the call's number at
    # byte 0, the machine at byte 4, and the low halves of the arguments from byte 16 on, 8 bytes apart
    load, equal, at_least, both, give = 0x20, 0x15, 0x35, 0x54, 0x06
    allow, kill = (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x80000000)
    fail = {number: (give, 0, 0, 0x00050000 | number) for number in (0, errno.EPERM, errno.ENOSYS)}
    code = [
        (load, 0, 0, 4),
        (equal, 1, 0, audit),
        kill,
        (load, 0, 0, 0),
        (at_least, 0, 1, FIRST_UNKNOWN),
        fail[errno.ENOSYS],
    ]
    for text, number in ((CALLS, errno.EPERM), (PRETENDED, 0), (MISSING, errno.ENOSYS)):
        for call in call_numbers(text, column):
            code += [(equal, 0, 1, call), fail[number]]
    for call, byte, mask, allowed, refused in ARGUMENTS:
        block = [(load, 0, 0, byte)] + ([(both, 0, 0, mask)] if mask else [])
        for value in allowed or ():
            block += [(equal, 0, 1, value), allow]
        for value in refused:
            block += [(equal, 0, 1, value), fail[errno.EPERM]]
        block.append(allow if allowed is None else fail[errno.EPERM])
        code += [(equal, 0, len(block), call_numbers(call, column)[0]), *block]
    code.append(allow)
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(packed))
    return libc.prctl(22, 2, program, 0, 0) == 0
