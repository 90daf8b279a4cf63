"""Warm commands behave as commands in a new interpreter do."""

import fcntl
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from commands import path_of, run, start
from warm import REAL_RANKS

pytestmark = pytest.mark.skipif(os.environ.get("WARM_COMMANDS") == "0", reason="WARM_COMMANDS=0 starts real processes")

SCRIPT = """
import atexit, json, os, signal, sys, threading, logging
atexit.register(lambda: print("at exit"))
print(json.dumps(dict(
    argv=sys.argv[1:], cwd=os.getcwd(), path0=sys.path[0], name=__name__, mark=os.environ.get("MARK"), stdin=sys.stdin.read(),
    threads=threading.active_count(), handlers=len(logging.root.handlers), main=sys.modules["__main__"].__file__,
    children=sys.executable, tests=[name for name in sys.modules if name in ("conftest", "warm", "hostile")],
    opened=[n for n in range(64) if os.path.exists(f"/proc/self/fd/{n}") and os.readlink(f"/proc/self/fd/{n}") != os.devnull],
)))
print("said", file=sys.stderr)
if "raise" in sys.argv: raise ValueError("odd")
if "wait" in sys.argv: print("waiting", flush=True); signal.pause()
sys.exit(int(sys.argv[-1]) if sys.argv[-1].isdigit() else sys.argv[-1])
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def test_what_a_script_sees_and_leaves_is_that_of_a_new_interpreter(script: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(cwd=tmp_path, env=os.environ | {"MARK": "1"}, stdin=subprocess.DEVNULL)
    for arguments, code in ((("3",), 3), (("raise",), 1), (("a message",), 1), (("0",), 0)):
        warm, real = (run("python", "script.py", *arguments, real=real, **options) for real in (False, True))
        assert warm.returncode == real.returncode == code
        assert warm.stdout.replace(path_of("python"), path_of("python", real=True)) == real.stdout and "at exit" in real.stdout
        assert warm.stderr.splitlines()[-1] == real.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, -signal.SIGUSR1), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_a_signal_ends_a_command_as_it_ends_what_has_imported_composer(number: signal.Signals, code: int, script: Path) -> None:
    process = start("python", script, "wait", stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    while "waiting" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=30) == code
    assert process.stdout.read() == ("at exit\n" if code > 0 else ""), "what is read ends when the fork is gone"


@pytest.mark.parametrize("real", ["", "1", "0,1"])
def test_ranks_of_a_warm_launcher_can_be_new_interpreters_which_order_sets_each_in_its_own_way(real: str, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text("import os, sys; open(os.environ['LOCAL_RANK'], 'w').write(f'{hash(chr(97))}')")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"} | {REAL_RANKS: real}
    environment["LOCAL_RANK"] = "0"  # as a Trainer leaves it in this process
    assert run("composer", "-n", 2, "rank.py", cwd=tmp_path, env=environment).returncode == 0
    hashes = {(tmp_path / rank).read_text() for rank in "01"}
    assert len(hashes) == (2 if real else 1)


def test_nothing_that_the_tests_had_open_writes_into_what_a_command_opens(tmp_path: Path) -> None:
    """A library's handler was bound to the stream of when it was imported; its number must not become a pipe of the command's."""
    (tmp_path / "pipes.py").write_text(
        "import gc, logging, os\n"
        "pipes = [os.pipe() for _ in range(8)]\n"
        "gc.unfreeze(); gc.collect()\n"
        "for logger in [*logging.root.manager.loggerDict.values()]:\n"
        "    for handler in getattr(logger, 'handlers', []):\n"
        "        handler.handle(logging.LogRecord('any', logging.CRITICAL, 'file', 1, 'said', (), None))\n"
        "for reading, writing in pipes:\n"
        "    os.write(writing, b'mine'); os.close(writing)\n"
        "    assert os.read(reading, 9) == b'mine'\n"
    )
    finished = run("python", tmp_path / "pipes.py")
    assert finished.returncode == 0, finished.stderr


def test_composer_s_launcher_starts_ranks_and_ends_both_when_one_fails(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(
        "import os, time, torch.distributed as dist, torch\n"
        "dist.init_process_group('gloo')\nmine = torch.tensor([float(os.environ['RANK']) + 1])\ndist.all_reduce(mine)\n"
        "print(os.environ['RANK'], mine.item(), flush=True)\nif os.environ['RANK'] == '1': raise ValueError('of rank one')\n"
        "time.sleep(300)"
    )
    finished = run("composer", "-n", 2, tmp_path / "ranks.py", timeout=100)
    assert finished.returncode != 0 and "0 3.0" in finished.stdout and "ValueError: of rank one" in finished.stdout


def test_an_inherited_pipe_keeps_its_number(tmp_path: Path) -> None:
    (tmp_path / "write.py").write_text("import os, sys\nos.write(int(sys.argv[1]), b'here')")
    mine, theirs = os.pipe()
    high = fcntl.fcntl(theirs, fcntl.F_DUPFD, 60)
    process = start("python", tmp_path / "write.py", high, pass_fds=[high])
    os.close(theirs)
    os.close(high)
    assert process.wait(timeout=30) == 0 and os.read(mine, 10) == b"here" and os.read(mine, 10) == b""
    os.close(mine)
