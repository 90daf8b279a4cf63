"""Commands of tests run in forks of a process that has imported torch, Composer and this package: 20 s of CPU less each.

`python`, `composer` and `prx` stand in a folder as small programs with the names of the real ones. Each passes what it was given
(arguments, folder, environment, open files) to a server, which forks; the fork becomes the command. The small program stays as
the fork's deputy: it passes signals on, its death kills the fork and its children, and it ends as the fork ended. In a fork
`sys.executable` is the small `python`, so that what starts processes itself, as the benchmarks do, starts forks too.

With WARM_COMMANDS=0 all of them are real processes: the same tests, three times as long.

What differs from a process of its own: modules are imported already (what is read of the environment at an import is the
server's), hashes of strings are the same in all forks, and the parent of a fork is none of the test's processes. Tests of these
things start real processes: `commands.start(…, real=True)`.
"""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
from typing import Any

_open: list[tuple[str, int]] = []  # the folder of the small programs, and what ends the server when it is closed
PROGRAMS = ("python", "composer", "prx", "llmfoundry")
IMPORTED = (
    "composer.cli.launcher",
    "diffusers.pipelines.prx",
    "transformers.models.auto.modeling_auto",
    "transformers.models.t5.modeling_t5",
    "prx_composer.cli",
    "prx_composer.training.run",
)
WARM_MODULES = ("prx_composer.", "composer.cli", "torch.distributed.run")  # of `python -m`
REAL_RANKS = "REAL_RANKS"  # in the environment: those that a warm launcher starts as processes of their own, such as "1"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

# ------------------------------------------------------------------------------------- the small programs (import little)


def deputy(address: str, program: str, arguments: list[str], real: str) -> None:
    """Have the server run a command, and end as it ends. What only a new interpreter can do is left to one.

    Args:
        program: `python` or the name of a console script.
        real: the Python that the environment has.
    """
    rest = [a for a in arguments if a != "-u"]
    script = bool(rest) and not rest[0].startswith("-")
    cold = program == "python" and not script and not (rest[:1] == ["-m"] and rest[1].startswith(WARM_MODULES))
    # A Trainer leaves LOCAL_RANK in the environment of whoever starts the launcher, which is none of its ranks.
    own_rank = os.environ.get("LOCAL_RANK", "-") if program == "python" else "-"
    if cold or own_rank in os.environ.get(REAL_RANKS, "").split(","):
        os.execv(real, [real, *arguments])
    connection = socket.socket(socket.AF_UNIX)
    opened = [int(name) for name in os.listdir("/proc/self/fd")]
    opened = sorted(number for number in opened if number != connection.fileno() and os.path.exists(f"/proc/self/fd/{number}"))
    connection.connect(address)
    asked = dict(
        program=program, arguments=rest, folder=os.getcwd(), environment=dict(os.environ), numbers=opened, name=sys.argv[0]
    )
    content = json.dumps(asked).encode()
    socket.send_fds(connection, [struct.pack("q", len(content))], opened)
    connection.sendall(content)
    (pid,) = struct.unpack("q", _receive(connection, 8))
    for number in FORWARDED:
        signal.signal(number, lambda number, _: _kill(pid, number))
    (status,) = struct.unpack("q", _receive(connection, 8))
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL) if os.WTERMSIG(status) != signal.SIGKILL else None
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _receive(connection: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        more = connection.recv(size - len(content))
        if not more:
            raise EOFError("the server of warm processes is gone")
        content += more
    return content


DEPUTY = """#!{real} -IS
import sys
sys.path.insert(0, {here!r})
from warm import deputy
deputy({address!r}, {program!r}, sys.argv[1:], {real!r})
"""


# --------------------------------------------------------------------------------------------------------- the server


def open_folder() -> None:
    """Fork a server of this process as it is now, which should have one thread and have computed nothing."""
    if sys.platform != "linux" or os.environ.get("WARM_COMMANDS") == "0":
        return
    import tempfile

    home = tempfile.mkdtemp(prefix="warm")
    address = os.path.join(home, "socket")
    for program in PROGRAMS:
        path = os.path.join(home, program)
        with open(path, "w") as file:
            file.write(DEPUTY.format(real=sys.executable, here=os.path.dirname(__file__), address=address, program=program))
        os.chmod(path, 0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    lifeline, held = os.pipe()  # this process holds it open as long as it lives
    if os.fork():
        _open.append((home, held))
        listener.close()
        os.close(lifeline)
        return
    try:
        _forget_the_tests({listener.fileno(), lifeline})
        ready = False
        while listener in select.select([listener, lifeline], [], [])[0]:
            connection, _ = listener.accept()
            if not ready:
                _warm_up()
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks' keepers
                ready = True
            if not os.fork():
                listener.close()
                os.close(lifeline)
                _keep(connection, home)
            connection.close()
    finally:
        os._exit(0)


def close_folder() -> None:
    """End the server."""
    import shutil

    while _open:
        path, held = _open.pop()
        os.close(held)
        shutil.rmtree(path)


def folder() -> str:
    """Return the folder of the small programs, or nothing where there is no server."""
    return _open[0][0] if _open else ""


def _forget_the_tests(kept: set[int]) -> None:
    """What pytest has opened, caught or imported is none of the commands' business."""
    import faulthandler
    import logging

    faulthandler.disable()
    _empty_all_but(kept)
    _open_standard_streams()
    signal.signal(signal.SIGINT, signal.getsignal(signal.SIGTERM))  # Composer's import sets both; workers of xdist ignore SIGINT
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("prx_composer").setLevel(logging.NOTSET)
    tests = os.path.dirname(__file__)
    sys.path[:] = [path for path in sys.path if not path.startswith(tests) and path != ""]
    sys.meta_path[:] = [finder for finder in sys.meta_path if "pytest" not in type(finder).__module__]
    for name, module in list(sys.modules.items()):
        if name != __name__ and (getattr(module, "__file__", None) or "").startswith(tests + os.sep):
            del sys.modules[name]


def _warm_up() -> None:
    import gc
    import importlib
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in IMPORTED:
            with contextlib.suppress(ImportError):  # the commands will say it
                importlib.import_module(name)
        with contextlib.suppress(ImportError):  # every Trainer asks for it, which starts a process of 1.2 s of CPU
            importlib.import_module("composer.utils.collect_env").get_cpu_model()
    gc.collect()
    gc.freeze()


def _keep(connection: socket.socket, folder: str) -> None:
    """Fork the command, kill it when its deputy is gone, and tell the deputy how it ended."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        header, received, _, _ = socket.recv_fds(connection, 8, 250)
        asked = json.loads(_receive(connection, *struct.unpack("q", header)))
        pid = os.fork()
        if not pid:
            try:
                connection.close()
                _become(asked, received, folder)
            finally:  # it did not come to its own end
                os._exit(70)
        with contextlib.suppress(OSError):  # as the command does; whoever comes first
            os.setpgid(pid, pid)
        for number in received:
            os.close(number)
        connection.sendall(struct.pack("q", pid))
        ended = os.pidfd_open(pid)
        if ended not in select.select([connection, ended], [], [])[0]:
            os.killpg(pid, signal.SIGKILL)
        connection.sendall(struct.pack("q", os.waitpid(pid, 0)[1]))
    finally:
        os._exit(0)


def _become(asked: dict[str, Any], received: list[int], folder: str) -> None:
    """Run a command in this process, and end it."""
    import atexit
    import random
    import threading

    import numpy as np

    os.setpgid(0, 0)
    high = 1 + max([*received, *asked["numbers"]])
    moved = [os.dup2(number, high + index) for index, number in enumerate(received)]
    for number, to in zip(moved, asked["numbers"], strict=True):
        os.dup2(number, to)
    _empty_all_but(set(asked["numbers"]))
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    _open_standard_streams()
    sys.executable = os.path.join(folder, "python")
    random.seed()
    np.random.seed()
    del sys.modules[__name__]
    code = _exit_code_of(lambda: _run(asked["program"], asked["arguments"], asked["name"]))
    try:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] -- waits for threads that are no daemons
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _run(program: str, arguments: list[str], name: str) -> None:
    import runpy
    from importlib.metadata import entry_points

    first = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in first if path]
    if program != "python":
        sys.argv = [name, *arguments]
        (found,) = entry_points(group="console_scripts", name=program)
        sys.exit(found.load()())
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(os.path.abspath(arguments[0]), run_name="__main__")


def _exit_code_of(run: Any) -> int:
    """As an interpreter tells it."""
    try:
        run()
    except SystemExit as ending:
        if isinstance(ending.code, str):
            sys.stderr.write(f"{ending.code}\n")
            return 1
        return int(ending.code or 0) & 255
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType]
        return 1
    return 0


def _open_standard_streams() -> None:
    """Make them anew, for handlers of logs too, which libraries have bound to the streams of when they were imported."""
    import logging

    before = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        # Not one that has no stream yet: torch's handler for traces would take ours for its file, and close it.
        if isinstance(handler, logging.StreamHandler) and handler.stream in before:
            handler.setStream(sys.stderr)


def _empty_all_but(kept: set[int]) -> None:
    """Put the null device behind every open number but these.

    Were they closed, objects that still have such a number would write to what opens next, or close it: a loader's pipe, say.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number not in kept and number != null:
            with contextlib.suppress(OSError):  # the one that listed them
                os.fstat(number)
                os.dup2(null, number)
    os.close(null)
