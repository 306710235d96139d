"""What all commands share: streams that are closed or full, arguments that are wrong, and answers without PyTorch."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import bench
import console
from formats import convert_options

ROOT = Path(__file__).resolve().parent.parent


def shell(line: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    command = ["bash", "-c", line]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=60)


PROGRAM = """\
import sys, console
def main():
    sys.argv = ["program.py"]
    text = sys.stdin.read() if "read" in {arguments!r} else ""
    for i in range(20000 if "much" in {arguments!r} else 1):
        print("result", i, text)
    console.notice("a notice")
    open({file!r}, "w").write("the file's own")
console.run(main)
"""


@pytest.mark.parametrize(
    ("arguments", "redirection", "status", "out", "err"),
    [
        ("read", "<&-", 0, "result 0 \n", "a notice\n"),
        ("", ">&-", 0, "", "a notice\n"),
        ("", "2>&-", 0, "result 0 \n", ""),
        ("read", "<&- >&- 2>&-", 0, "", ""),
        ("much", "| head -1", 0, "result 0 \n", ""),
        ("much", ">/dev/full", 2, "", "program.py: error: no space left on device\n"),
        ("", ">/dev/full", 2, "", "program.py: error: no space left on device\n"),
        ("", "2>/dev/full", 0, "result 0 \n", ""),
        ("", "2> >(true)", 0, "result 0 \n", ""),
    ],
)
def test_closed_and_full_streams_are_no_traceback(tmp_path, arguments, redirection, status, out, err):
    program, file = tmp_path / "program.py", tmp_path / "file"
    program.write_text(PROGRAM.format(arguments=arguments, file=str(file)))
    ends = "exit ${PIPESTATUS[0]}"
    result = shell(f'"$PYTHON" {program} {redirection}; {ends}', PYTHONPATH=str(ROOT))
    assert (result.returncode, result.stdout) == (status, out)
    said = result.stderr if status == 0 else result.stderr.removeprefix("a notice\n")  # where stdout has a buffer
    assert said == err or (redirection == "| head -1" and not said)
    if status == 0 and redirection != "| head -1":
        assert file.read_text() == "the file's own", "a closed stream's number is not given to a file"


COMMANDS = ("generate.py", "serve.py", "train.py", "convert.py", "evaluate.py", "audit.py", "xray.py", "lens.py")
BLOCKED = "import sys; sys.modules['torch'] = None; import runpy; sys.argv = sys.argv[1:]; "
BLOCKED += "sys.path.insert(0, ''); runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_version_and_wrong_flags_need_no_pytorch(command):
    """In a process in which an import of torch fails."""

    def run(*arguments: str) -> subprocess.CompletedProcess:
        whole = [sys.executable, "-c", BLOCKED, command, *arguments]
        return subprocess.run(whole, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)

    shown = run("--help")
    assert shown.returncode == 0 and "usage: " in shown.stdout and not shown.stderr
    assert f"examples:\n  python {command}" in shown.stdout
    assert all(len(line) <= 120 for line in shown.stdout.splitlines())
    version = run("--version")
    assert (version.returncode, version.stdout) == (0, f"nanoqwen {console.project()['version']}\n")
    first = {"evaluate.py": ["tasks"], "audit.py": ["SRC"], "xray.py": ["SRC"]}.get(command, [])
    wrong = run(*first, "--hlep")
    assert wrong.returncode == 2 and "did you mean --help?" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_help_of_the_benchmarks_lists_their_subjects(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--help"])
    with pytest.raises(SystemExit) as end:
        bench.main()
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"    python bench.py {subject} " in shown.replace("[speed]", "speed") for subject in bench.SUBJECTS)
    assert "\n  --deep [N] " in shown, "options without a subject are those of speed"


@pytest.mark.parametrize("subject", bench.SUBJECTS)
def test_help_of_a_benchmark_needs_no_pytorch(subject):
    whole = [sys.executable, "-c", BLOCKED, "bench.py", subject, "--help"]
    result = subprocess.run(whole, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)
    assert result.returncode == 0 and "usage: bench.py" in result.stdout, result.stderr


def test_keys_of_training_need_no_pytorch():
    whole = [sys.executable, "-c", BLOCKED, "train.py", "--keys"]
    result = subprocess.run(whole, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)
    assert result.returncode == 0 and "\ntrain\n  train.out* (a string; required)" in result.stdout
    assert "train.device* (auto, cpu, cuda or mps; default auto)" in result.stdout
    assert "train.seed (a whole number from 0 to 9223372036854775807; default 0)" in result.stdout


def test_the_lists_of_convert_are_those_of_its_rooms():
    import convert
    from formats.compressed_tensors import BITS
    from formats.gguf import writer

    assert list(convert_options.TYPES) == list(writer.TYPES)
    assert ("gguf", "safetensors", *convert.DTYPES, *BITS) == convert_options.TARGETS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temprature", "1"], "there is no option --temprature; did you mean --temperature?"),
        (["--temprature=1"], "there is no option --temprature; did you mean --temperature?"),
        (["--device", "cdua"], "'cdua' is not one of cpu, cuda; did you mean cuda?"),
        (["--device", "xyz"], "'xyz' is not one of cpu, cuda ("),
        (["--temperature", "hot"], "argument --temperature: 'hot' is not a number ("),
        (["one", "two"], "'two' is one argument too many; put a text of several words in quotes"),
        (["--temp", "1"], "there is no option --temp"),
        (["inner", "--cuont", "3"], "there is no option --cuont; did you mean --count?"),
        (["inner", "--cuont=3", "--size", "2"], "there is no option --cuont; did you mean --count?"),
        (["inner", "--count", "3"], "the following arguments are required: --size"),
        (["inner", "--count", "3", "--", "--cuont"], "the following arguments are required: --size"),
    ],
)
def test_a_mistyped_flag_is_answered_with_the_nearest(arguments, said):
    parser = console.ArgumentParser(prog="program.py")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    if "inner" in arguments:
        inner = parser.add_subparsers().add_parser("inner")
        inner.add_argument("--count")
        inner.add_argument("--size", required=True)
    else:
        parser.add_argument("word", nargs="?")
    with pytest.raises(ValueError) as error:
        parser.parse_args(arguments)
    assert said in str(error.value)


@pytest.mark.parametrize("columns", [60, 40])
def test_help_fits_a_narrow_terminal(columns, monkeypatch):
    import generate

    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit), redirect_stdout(io.StringIO()) as shown:
        generate.parse_arguments(["--help"])
    lines = shown.getvalue().splitlines()
    wide = [line for line in lines if len(line) > columns]
    assert all(line.startswith(("usage: ", "  python ", "  --")) for line in wide), "one word can't be broken"
    assert "      a base model continues a text" in lines


@pytest.mark.parametrize("columns", [80, 40, 0])
def test_a_terminal_gets_long_notices_broken_between_words(columns):
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    path = "/a/folder/whose/name/is/longer/than/forty/columns/model.safetensors"
    text = (
        f"program.py: error: {path}: not a whole file; get it again, 模型的权重不完整 请再次下载这个文件 or\n  indented"
    )
    with os.fdopen(terminal, "w") as stream:
        shown = console.folded(text, stream)
    os.close(ours)
    assert console.folded(text, io.StringIO()) == text, "anywhere else a line stays one line"
    assert shown.replace("\n", " ") == text.replace("\n", " ") and path in shown and shown.endswith("\n  indented")
    if columns == 0:
        assert shown == text
        return
    lines = shown.split("\n")
    wide = [sum(1 + (c > "\u2e80") for c in line) for line in lines if path not in line]
    assert max(wide) <= columns and len(lines) > 3


def test_an_error_of_the_system_is_the_file_and_what_is_wrong_with_it(tmp_path):
    def said(act) -> str:
        with pytest.raises(OSError) as error:
            act()
        return console.reason(error.value)

    assert said((tmp_path / "gone.yaml").read_text) == f"{tmp_path}/gone.yaml: no such file or directory"
    assert said(tmp_path.read_text) == f"{tmp_path}: is a directory"
    assert said(lambda: os.read(999, 1)) == "bad file descriptor"
    assert console.reason(OSError("the hub can't be reached")) == "the hub can't be reached"


def test_a_missing_package_is_one_line_with_the_command(monkeypatch, capsys):
    def main() -> None:
        raise ModuleNotFoundError("No module named 'wandb'", name="wandb.sdk")

    with pytest.raises(SystemExit) as end:
        console.run(main)
    assert end.value.code == 2
    assert "wandb.sdk is not installed; pip install -e '.[train]'" in capsys.readouterr().err

    def defect() -> None:
        raise ModuleNotFoundError("No module named 'inference.gone'", name="inference.gone")

    with pytest.raises(ModuleNotFoundError):
        console.run(defect)


@pytest.mark.parametrize(
    "given, expected", [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(given, expected):
    code = "import sys, console, os; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command, here = [sys.executable, "-c", code], Path(__file__).parent.parent
    result = subprocess.run(command, cwd=here, env=clean | given, check=True, capture_output=True, text=True)
    assert result.stdout.split() == [expected, "False"]


@pytest.mark.parametrize(
    ("ends", "status", "said"),
    [
        ("KeyboardInterrupt", 130, "imports.py: interrupted\n"),
        ("MemoryError", 2, "imports.py: error: out of memory (in Python)\n"),
        ("ImportError('x.so: failed to map segment')", 2, "imports.py: error: out of memory (x.so: failed to"),
        ("ValueError('ours')", 1, "Traceback"),
    ],
)
def test_what_ends_the_imports_is_one_line(tmp_path, ends, status, said):
    """They come before `run`, and take seconds."""
    code = f"import sys; sys.argv = ['imports.py']\nimport console; console.answer_early(lambda: None)\nraise {ends}"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr[: len(said)]) == (status, said)


def test_the_laps_of_a_phase_add_up(monkeypatch):
    clock = iter((1.0, 3.0, 4.0, 8.0))
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    watch = console.Stopwatch("Python")
    for phase in ("PyTorch", "tokenizer", "PyTorch"):
        watch.lap(phase)
    assert watch.seconds["PyTorch"] == 6.0 and watch.seconds["tokenizer"] == 1.0
