"""Every command and every piece of Python that the README shows works, with a small budget."""

import hashlib
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """What follows "python" in each line of the README's bash blocks, without comments, and the
    calls of the five scripts in its text."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).splitlines()
    return [found[1].strip() for line in lines
            if (found := re.search(r"\.venv/bin/python ([^#]+)", line))] + re.findall(
        r"`(?:python )?((?:train|sample|plots)\.py [^`]+)`", TEXT.replace("\n", " "))


def tools() -> list[str]:
    """The calls of scripts under tests/ in the text."""
    return re.findall(r"`python (tests/\w+\.py[^`]*)`", TEXT.replace("\n", " "))


def test_readme_shows_the_commands_that_matter():
    """Training, sampling, drawing and the tests are among them."""
    shown = " ".join(commands())
    for name in ("train.py", "sample.py", "plots.py", "-m pytest tests", "--variance zero"):
        assert name in shown
    assert {call.split()[0] for call in tools()} == {
        f"tests/{name}.py" for name in ("seeds", "measure", "bound", "ablations", "benchmark")}


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_command_of_the_readme_works(command, tiny_run, tmp_path, monkeypatch, capsys):
    """train.py with 16 built-in digits, the others with a model of two steps, all into a folder of
    the test. What the README gives is kept, but for the model file and the sizes of the run."""
    name, *given = shlex.split(command)
    if name == "-m":  # finds tests; that they pass is for the suite to say, which this is part of
        monkeypatch.chdir(ROOT)
        run = subprocess.run([sys.executable, *shlex.split(command), "--collect-only", "-q"],
                             capture_output=True, text=True)
        assert run.returncode == 0 and "::test_" in run.stdout
        return
    model = ["--checkpoint", str(tiny_run / "model.pt"), "--device", "cpu"]
    budget = {"train.py": ["--dataset", "builtin", "--images", "16", "--batch-size", "8", "--epochs",
                           "1", "--val-images", "8", "--device", "cpu", "--out",
                           str(tmp_path / "run")],
              "sample.py": [*model, "--out", str(tmp_path / "digits.png")],
              "plots.py": [*model, "--out", str(tmp_path)]}[name]
    script = importlib.import_module(name.removesuffix(".py"))
    if name == "train.py":  # so that it need not draw 70,000 digits
        from digits import builtin_digits
        monkeypatch.setattr(script, "load_images", lambda *args: builtin_digits(16, seed=0))
    if "--steps" in given:
        given[given.index("--steps") + 1] = "10"  # the small model has 20
    monkeypatch.chdir(tmp_path)  # for files that are named without a folder
    if "--resume" in given:
        script.main(budget)
    script.main([*given, *budget])
    assert capsys.readouterr().out and any(tmp_path.iterdir())


@pytest.mark.parametrize("command", sorted(set(tools())))
def test_tool_of_the_readme_works(command, monkeypatch, capsys):
    """It takes the options that are given and, asked for no more than its table, prints the one in
    the README; the benchmark measures once."""
    name, *given = shlex.split(command)
    script = importlib.import_module(Path(name).stem)
    budget = ["--rounds", "1", "--device", "cpu"] if name == "tests/benchmark.py" else ["--table"]
    monkeypatch.setattr(sys, "argv", [name, *given, *budget])
    script.main()
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert "\n".join(rows) in TEXT and (rows or "ours takes" in shown)


def test_python_of_the_readme_works(capsys):
    """The example of the contract prints a line for each step; the exercise ends with digits."""
    contract, exercise = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile(contract, "README.md", "exec"), {})
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) > 10 and lines[-1].startswith("0 ")
        exec(compile(exercise, "README.md", "exec"), names := {})
    assert names["t"] == 0 and names["x0"].shape == (4, 1, 28, 28)
    # At t = 400 much of the digit is left: each result is likest to the digit that it was made of.
    apart = torch.cdist(names["x0"].flatten(1), names["digits"].flatten(1))
    assert apart.argmin(dim=1).tolist() == [0, 1, 2, 3]


def test_pictures_of_the_readme_are_there():
    """Each picture that the README shows is in the repository, and each figure is shown."""
    shown = set(re.findall(r"\]\((figures/[^)]+)\)", TEXT))
    assert shown == {f"figures/{path.name}" for path in (ROOT / "figures").iterdir()}


def test_animation_is_small_enough_to_load():
    """Below two megabytes."""
    assert (ROOT / "figures" / "animation.gif").stat().st_size < 2_000_000


def test_model_card_is_of_the_shipped_model():
    """Its size in thousands of bytes and its SHA-256."""
    model = (ROOT / "pretrained" / "model.pt").read_bytes()
    assert f"{len(model) / 1000:,.0f} kB" in TEXT and hashlib.sha256(model).hexdigest() in TEXT


def test_scripts_of_the_readme_are_there():
    """Each script that is named in the text exists."""
    for name in set(re.findall(r"`(?:python )?((?:tests/)?\w+\.py)", TEXT)):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
