"""Running programs that nobody trusts, and tests of them: run_program.

This very file, started as a child, divides into two processes without any rights. One runs the program and then answers:
it calls the program's functions as it is asked and sends back what they return. The other runs the tests, with stand-ins
(Remote) for the program's functions and objects; what reaches it is data, and its exit code is the verdict. So a program
works on the verdict by nothing but the values that its functions return. It cannot print a sign of success, leave early,
replace what the tests use, or return what claims to equal anything, and it has no place to look for the tests or a token:
neither was ever in its process, whose only descriptors are what it prints to and the pipes of question and answer.

What this cannot give: a test that calls a second function of the program trusts that one as well (HumanEval/32, 38 and
50 do). Without tests, that the program ran to its end is its own word. The tests see copies: objects of the program's
own classes come back as stand-ins, equal to nothing but themselves, and functions of the tests cannot be handed over.
"""

import builtins
import contextlib
import ctypes
import importlib
import json
import math
import os
import platform
import re
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import types

# ---------------------------------------------------------------- the caller's side

OUTPUT_CAP = 1 << 20  # bytes a program may print
FILE_CAP = 16 << 20  # bytes of one file
BOX_CAP = 64 << 20  # bytes of all files in the box; besides those, 64 that are deleted and still open (NOFILE)


def run_program(source, tests="", entry_point=None, timeout=10.0, memory_mb=1024):
    """Run an untrusted Python program, then tests of it that are trusted; (passed, detail).

    passed: both ran to their end within `timeout` seconds of wall time, each in `memory_mb` MiB of address space. tests:
    they have the program's names, but none in the place of a built-in function except entry_point, the function that
    they call. detail: the last line printed (an exception's, usually), or what ended the run. Works on POSIX; what
    isolates the two is listed at confine().
    """
    # in an unnamed file: no argument, variable or path under which the program could come upon the tests
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as box, tempfile.TemporaryFile() as handover:
        whole = [part.encode("utf-8", "replace").decode() for part in (source, tests)]
        handover.write(json.dumps([*whole, entry_point]).encode())
        handover.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-I", os.path.abspath(__file__), str(timeout), str(memory_mb)],
            stdin=handover,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=box,
            env={},
            start_new_session=True,
        )
        try:
            output, ended_by = read_until(child, box, time.monotonic() + timeout, timeout)
        finally:
            try:
                os.killpg(child.pid, signal.SIGKILL)  # the group: both processes and whatever they started
            except (ProcessLookupError, PermissionError):
                pass
            child.stdout.close()
            child.wait()
    if ended_by is None and child.returncode == 0:
        return True, "passed"
    lines = [line for line in output.decode("utf-8", "replace").splitlines() if line.strip()]
    if ended_by is None and child.returncode < 0:
        ended_by = f"killed by signal {-child.returncode}"
    return False, ended_by or (lines[-1][:500] if lines else f"exit code {child.returncode} before its end")


def read_until(child, box, deadline, timeout):
    """Read what a child prints until it exits; (bytes, None), or (bytes, why) when it has to be ended."""
    output, full = b"", f"wrote more than {BOX_CAP >> 20} MiB of files"
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            ready = selector.select(min(0.05, max(0.0, deadline - time.monotonic())))  # no call limits a folder's size
            if box_size(box) > BOX_CAP:
                return output, full
            if not ready and time.monotonic() >= deadline:
                return output, f"timed out after {timeout:g} s"
            if not ready:
                continue
            chunk = os.read(child.stdout.fileno(), 1 << 16)
            if not chunk:
                break
            output += chunk
            if len(output) > OUTPUT_CAP:
                return output, f"printed more than {OUTPUT_CAP >> 20} MiB"
    try:
        child.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return output, f"timed out after {timeout:g} s"
    return output, full if box_size(box) > BOX_CAP else None


def box_size(box):
    """Bytes of the files in a folder, each at least 64 KiB, so that a thousand empty ones are too much as well."""
    size = 0
    for folder, _, names in os.walk(box):
        for name in names:
            with contextlib.suppress(OSError):  # gone meanwhile
                size += max(1 << 16, os.lstat(os.path.join(folder, name)).st_size)
    return size


# ---------------------------------------------------------------- taking rights away

# System calls that answer "not permitted", per machine: (audit code, fcntl, ioctl, numbers). In this order: socket,
# io_uring_setup | fork, vfork, clone, clone3, execve, execveat, setsid, setpgid | kill, tkill, tgkill,
# rt_(tg)sigqueueinfo, pidfd_send_signal, pidfd_open, pidfd_getfd | ptrace, process_vm_readv, process_vm_writev,
# prlimit64, setrlimit | setpriority, ioprio_set, sched_setparam, sched_setscheduler, sched_setaffinity, sched_setattr,
# which act on other processes | bpf, perf_event_open, userfaultfd, add_key, request_key, keyctl, unshare, setns | chmod,
# fchmod, fchmodat, fchmodat2, chown, fchown, lchown, fchownat, utime, utimes, futimesat, utimensat, (l|f)setxattr,
# (l|f)removexattr, which Landlock leaves open | shmget, shmat, shmctl, shmdt, semget, semop, semctl, semtimedop, msgget,
# msgsnd, msgrcv, msgctl, mq_open to mq_getsetattr, whose memory stays when the program is gone | memfd_create,
# memfd_secret, files in memory that no limit counts. arm64 has no fork, vfork, chmod, chown, lchown, utime, utimes,
# futimesat.
REFUSED = {
    "x86_64": (0xC000003E, 72, 16, (
        41, 425, 57, 58, 56, 435, 59, 322, 112, 109, 62, 200, 234, 129, 297, 424, 434, 438, 101, 310, 311, 302, 160,
        141, 251, 142, 144, 203, 314, 321, 298, 323, 248, 249, 250, 272, 308,
        90, 91, 268, 452, 92, 93, 94, 260, 132, 235, 261, 280, 188, 189, 190, 197, 198, 199,
        29, 30, 31, 67, 64, 65, 66, 220, 68, 69, 70, 71, *range(240, 246),
        319, 447)),
    "aarch64": (0xC00000B7, 25, 29, (
        198, 425, 220, 435, 221, 281, 157, 154, 129, 130, 131, 138, 240, 424, 434, 438, 117, 270, 271, 261, 164,
        140, 30, 118, 119, 122, 274, 280, 241, 282, 217, 218, 219, 97, 268,
        52, 53, 452, 55, 54, 88, 5, 6, 7, 14, 15, 16, *range(180, 198),
        279, 447)),
}  # fmt: skip
# With F_SETOWN, F_SETSIG, F_SETOWN_EX or FIOSETOWN, SIOCSPGRP a descriptor would send any process a signal
FCNTL, IOCTL = (8, 10, 15), (0x8901, 0x8902)


def confine(cpu_seconds, memory_mb):
    """Take this process's rights away, one layer after the other; a layer that the system lacks is left out."""
    import resource

    # limits: endless loops, memory bombs, huge files, core dumps; processes too, though not for root
    for name, value in (
        ("CPU", math.ceil(cpu_seconds)),
        ("AS", memory_mb << 20),
        ("FSIZE", FILE_CAP),
        ("CORE", 0),
        ("NOFILE", 64),
        ("NPROC", 1),
    ):
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        except (AttributeError, ValueError, OSError):
            pass
    filtered = False
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        # an empty network namespace: no interface, not even loopback; without root it takes a user namespace
        libc.unshare(0x40000000 | (0x10000000 if os.geteuid() else 0))
        # no capabilities: root is then stopped by its own limits, and cannot mount, reboot or raise a limit
        libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6))
        libc.prctl(4, 0, 0, 0, 0)  # not dumpable: closed to the other process, /proc included
        libc.prctl(38, 1, 0, 0, 0)  # no_new_privs: nothing gives rights back; both below need it
        confine_files(libc)  # nothing is written outside of the box, and little is read
        filtered = filter_calls(libc)  # no sockets, no processes, no signals to others
    if not filtered:
        # not a barrier against a determined program, which can go round the interpreter, but against a careless one
        refused = (
            "socket.",
            "subprocess.",
            "ctypes.",
            "os.fork",
            "os.exec",
            "os.posix_spawn",
            "os.spawn",
            "os.system",
            "os.kill",
            "os.chmod",
            "os.chown",
            "signal.pthread_kill",
        )

        def hook(event, args):
            if event.startswith(refused):
                raise PermissionError(f"{event} is refused")

        sys.addaudithook(hook)


def confine_files(libc):
    """Landlock (Linux 5.13): read beneath the interpreter and the system's libraries; write in the box alone."""
    abi = libc.syscall(444, None, 0, 1)
    if abi < 1:
        return
    read, write = 1 << 2 | 1 << 3, 1 << 1
    handled = (1 << (13 if abi == 1 else 14 if abi == 2 else 15)) - 1  # every file right that this kernel knows
    box = read | write | 1 << 5 | 1 << 8 | handled & 1 << 14  # also remove, make, truncate: files alone
    size = 8 if abi < 4 else 16 if abi < 6 else 24  # files; also TCP; also signals leaving it
    rules = libc.syscall(444, struct.pack("QQQ", handled, 3, 3), size, 0)
    system = {sys.prefix, sys.base_prefix, *sys.path, "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"}
    rest = [("/dev/urandom", read), ("/dev/null", read | write), (".", box)]
    for path, rights in [(p, read) for p in system if p] + rest:
        try:
            fd = os.open(path, os.O_PATH)
        except OSError:
            continue
        rights = rights if os.path.isdir(path) else rights & ~(1 << 3)
        libc.syscall(445, rules, 1, struct.pack("=Qi", rights, fd), 0)
        os.close(fd)
    libc.syscall(446, rules, 0)
    os.close(rules)


def filter_calls(libc):
    """Seccomp: refuse the system calls of REFUSED, and any of another calling convention. Whether it is in force."""
    audit, fcntl, ioctl, numbers = REFUSED.get(platform.machine(), (0, 0, 0, ()))
    if not numbers:
        return False
    # classic BPF: (code, lines to skip if true, if false, k); None: to the last line. The call's number lies at 0, the
    # machine at 4, the low half of the second argument at 24
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    code = [(load, 0, 0, 4), (equal, 1, 0, audit), (give, 0, 0, 0x80000000)]  # another machine's: killed
    code += [(load, 0, 0, 0), (at_least, None, 0, 1 << 30)]
    code += [(equal, None, 0, number) for number in numbers]
    for call, commands in ((fcntl, FCNTL), (ioctl, IOCTL)):
        code += [(load, 0, 0, 0), (equal, 0, len(commands) + 1, call), (load, 0, 0, 24)]
        code += [(equal, None, 0, command) for command in commands]
    code += [(give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x00050000 | 1)]  # allow; error EPERM
    code = [(op, len(code) - 2 - i if true is None else true, false, k) for i, (op, true, false, k) in enumerate(code)]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(packed))
    return libc.prctl(22, 2, program, 0, 0) == 0


# ---------------------------------------------------------------- what the two processes send each other

CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
NUMBERS = {"Fraction": "fractions", "Decimal": "decimal"}  # exact ones, and the modules that have them
ACTIONS = {"call": lambda f, *args, **kwargs: f(*args, **kwargs), "iterate": list, "get": getattr, "set": setattr,
           "value": lambda x: x}  # fmt: skip


def encode_value(value, refer):
    """A value as JSON: data of subclasses as their base (a Counter is a dict), anything else as refer(value), a number."""
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, int):
        return {"int": hex(value)}  # in decimal Python refuses more than 4300 digits
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[encode_value(k, refer), encode_value(v, refer)] for k, v in value.items()]}
    for name, kind in CONTAINERS.items():
        if isinstance(value, kind):
            return {name: [encode_value(x, refer) for x in value]}
    kind = type(value)
    if NUMBERS.get(kind.__name__) == kind.__module__:
        return {kind.__name__: str(value)}
    if hasattr(kind, "tolist"):  # numpy's arrays and numbers
        return encode_value(value.tolist(), refer)
    return {"object": refer(value)}


def decode_value(packed, resolve):
    """pack's inverse; resolve turns a number into an object. Whatever it is given, what comes out is data."""
    if not isinstance(packed, dict):
        return packed
    ((kind, body),) = packed.items()
    if kind in CONTAINERS:
        return CONTAINERS[kind](decode_value(x, resolve) for x in body)
    if kind == "dict":
        return {decode_value(k, resolve): decode_value(v, resolve) for k, v in body}
    if kind in NUMBERS:
        return getattr(importlib.import_module(NUMBERS[kind]), kind)(body)
    readers = {"int": lambda x: int(x, 16), "complex": lambda x: complex(*x), "bytes": bytes.fromhex, "object": resolve}
    return readers[kind](body)


class Remote:
    """An object of the program's in the tests' process. It can be called, gone through, and its attributes are there;
    it equals nothing but itself, and has no operators whose result the program could make up."""

    def __init__(self, index, ask):
        vars(self).update(index=index, ask=ask)

    def __call__(self, *args, **kwargs):
        return self.ask("call", self.index, args, kwargs)

    def __iter__(self):
        return iter(self.ask("iterate", self.index))

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.ask("get", self.index, (name,))

    def __setattr__(self, name, value):
        self.ask("set", self.index, (name, value))


# ---------------------------------------------------------------- the two processes


def tell(outbox, message):
    outbox.write(json.dumps(message) + "\n")
    outbox.flush()


def serve(inbox, outbox):
    """The program's process: run it, tell its names, and do with its objects what the tests ask, while they ask."""
    objects = []

    def keep(value):
        objects.append(value)
        return len(objects) - 1

    module = sys.modules["program"] = types.ModuleType("program")  # not __main__: a reply's own main part stays out
    exec(compile(json.loads(inbox.readline()), "program.py", "exec"), module.__dict__)
    names = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    modules = [name for name, x in names.items() if isinstance(x, types.ModuleType) and x.__name__ == name]
    tell(outbox, [modules, {name: keep(value) for name, value in names.items() if name not in modules}])
    for line in inbox:
        action, index, args, kwargs = decode_value(json.loads(line), objects.__getitem__)
        try:
            answer = ["value", encode_value(ACTIONS[action](objects[index], *args, **kwargs), keep)]
        except Exception as e:
            answer = ["error", type(e).__name__, str(e)]
        tell(outbox, answer)


def run_tests(inbox, outbox, source, tests, entry_point):
    """The tests' process: hand the program over, and run the tests on what comes back. It ends as the tests end."""

    def number(value):
        if isinstance(value, Remote):
            return value.index
        raise TypeError(f"the tests hand over an object of {type(value)}, which is no data")

    def ask(action, index, args=(), kwargs=()):
        tell(outbox, encode_value([action, index, args, dict(kwargs)], number))
        line = inbox.readline()
        if not line:
            raise EOFError("the program ended in the midst of the tests")
        kind, *answer = json.loads(line)
        if kind == "value":
            return decode_value(answer[0], remote)
        error = getattr(builtins, answer[0], None)
        raise (error if isinstance(error, type) and issubclass(error, Exception) else RuntimeError)(answer[1])

    def remote(index):
        return Remote(index, ask)

    paper = compile(tests, "tests.py", "exec")
    tell(outbox, source)
    line = inbox.readline()
    if not line:
        sys.exit(1)  # the program did not come to its end, and has said why
    modules, names = json.loads(line)
    wanted = {word for word in re.findall(r"\w+", tests) if word == entry_point or not hasattr(builtins, word)}
    known = {name: importlib.import_module(name) for name in wanted & {*modules} & sys.stdlib_module_names}
    known |= {name: ask("value", index) for name, index in names.items() if name in wanted}
    exec(paper, {**known, "__builtins__": builtins, "__name__": "tests"})


def sandboxed_main():
    """The child: divide, give up every right, run the program in one process and the tests in the other."""
    timeout, memory_mb = float(sys.argv[1]), int(sys.argv[2])
    os.environ["OMP_NUM_THREADS"] = "1"  # threads are refused; numpy would otherwise ask for some
    questions, answers, null = os.pipe(), os.pipe(), os.open(os.devnull, os.O_RDONLY)
    program = os.fork() == 0  # the parent of the two is that of the tests: its exit code counts
    mine = (questions[0], answers[1]) if program else (answers[0], questions[1])
    for fd in {*questions, *answers} - {*mine}:
        os.close(fd)
    inbox, outbox = os.fdopen(mine[0], "r"), os.fdopen(mine[1], "w")
    handover = [] if program else json.load(sys.stdin)
    os.dup2(null, 0)
    status = 1
    try:
        confine(timeout + 1, memory_mb)  # the tests' process too, before it hands the program over
        serve(inbox, outbox) if program else run_tests(inbox, outbox, *handover)
        status = 0
    except SystemExit:  # to leave early is to fail
        pass
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    sandboxed_main()
