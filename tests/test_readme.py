"""The four READMEs are true: their commands and Python run, their pictures, links and names exist.

Each command is tried with a small budget: train.py on 24 pictures written in MNIST's own format,
the others with a model of two training steps, the experiments by printing what they have measured.
"""

import hashlib
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from sample import SHIPPED_LABELS
from strategies import pictures, write_mnist
from tests.test_bugs import BUGS
from tests.test_tags import HEAD, table

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / folder / "README.md" for folder in ("", "tests", "tests/experiments", "pretrained")]
TEXTS = {file: file.read_text(encoding="utf-8") for file in FILES}
README, _, RESULTS, MODEL_CARD = TEXTS.values()
# In an inline command a line may break anywhere.
EVERYTHING = " ".join("\n".join(TEXTS.values()).split())
SCRIPTS = ("schedule", "unet", "train", "sample", "plots")


def blocks(language: str) -> list[str]:
    """The code blocks of a language in all READMEs, without the indentation of a list."""
    found = []
    for text in TEXTS.values():
        for indent, block in re.findall(rf"^( *)```{language}\n(.*?)^ *```", text,
                                        re.DOTALL | re.MULTILINE):
            found.append(re.sub(f"^{indent}", "", block, flags=re.MULTILINE))
    return found


def commands() -> list[str]:
    """What follows "python" in the bash blocks and in the text of all READMEs, without comments.

    In the text, the name of a script with an option is a command, too.
    """
    lines = "\n".join(blocks("bash")).splitlines()
    found = [match[1] for line in lines
             for match in re.finditer(r"\.venv/bin/python ([^#]+)", line)]
    found += re.findall(r"`(?:\.venv/bin/)?python (-m [^`]+|[\w/]+\.py[^`]*)`", EVERYTHING)
    found += re.findall(r"`((?:train|sample|plots)\.py --[^`]+)`", EVERYTHING)
    return sorted({" ".join(command.split()) for command in found})


def experiments() -> list[str]:
    return [command for command in commands() if command.startswith("-m tests.experiments.")]


def calls_of_scripts() -> list[str]:
    return [command for command in commands() if command.startswith(SCRIPTS)]


def runs_of_pytest() -> list[str]:
    return [command for command in commands() if command.startswith("-m pytest")]


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings: lower case, no punctuation, hyphens for spaces."""
    without_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    """A folder with 24 pictures in the files of MNIST, FashionMNIST and KMNIST."""
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder, pictures(24), torch.zeros(24))
    for name in ("FashionMNIST", "KMNIST"):
        shutil.copytree(folder / "MNIST", folder / name)
    return folder


# ------------------------------------------------------------------------------- the commands

def test_commands_that_matter_are_shown():
    """Training, sampling, drawing and the tests are in the README, every experiment in its own."""
    for command in ("train.py", "sample.py", "plots.py", 'pytest tests -m "not slow"'):
        assert f".venv/bin/python {command}" in README.replace("-m pytest", "pytest")
    shown = {command.split()[1].rpartition(".")[2] for command in experiments()}
    files = (ROOT / "tests" / "experiments").glob("[a-z]*.py")
    assert shown == {file.stem for file in files if not file.name.startswith("test_")}


def test_every_command_is_of_a_kind_that_is_tried():
    """A script, an experiment, a run of pytest, or the table of formulas (see test_tags.py)."""
    tried = {*experiments(), *calls_of_scripts(), *runs_of_pytest(), "tests/test_tags.py"}
    assert set(commands()) == tried
    assert min(len(experiments()), len(calls_of_scripts()), len(runs_of_pytest())) > 3


@pytest.mark.slow
@pytest.mark.parametrize("command", calls_of_scripts())
def test_script_runs_as_shown(command, tiny_run, tiny_data, tmp_path, monkeypatch, capsys):
    """Each option that is shown is given; those that say how much and from where come after it."""
    name, *options = shlex.split(command)
    model_file = SHIPPED_LABELS if "--digits" in options else tiny_run / "model.pt"
    model = ["--checkpoint", str(model_file), "--device", "cpu"]
    budget = {
        "train.py": ["--data", str(tiny_data), "--images", "16", "--val-images", "8", "--epochs",
                     "1", "--batch-size", "8", "--device", "cpu", "--out", str(tmp_path / "run")],
        "sample.py": [*model, "--out", str(tmp_path / "digits.png")],
        "plots.py": [*model, "--out", str(tmp_path)]}[name]
    if "builtin" in options:
        budget += ["--dataset", "mnist"]  # drawing 70,000 built-in digits takes too long
    if "--steps" in options:
        budget += ["--steps", "10"]  # the model of the test has no more than 20
    if "--interval" in options and "--digits" not in options:
        budget += ["--interval", "3-14"]
    if "--guide" in options:
        budget += ["--guide", str(model_file.with_name("early.pt"))]
    script = importlib.import_module(Path(name).stem)
    monkeypatch.chdir(tmp_path)  # a file that is named without a folder goes there
    if "--resume" in options:
        script.main(budget)
    script.main([*options, *budget])
    assert capsys.readouterr().out
    assert any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("command", experiments())
def test_experiment_runs_as_shown(command, tmp_path, capsys):
    """It prints the table that stands in its README, or measures little, or knows its options.

    The table is printed by those that have measured one. The benchmark measures once, and the
    glyphs are drawn elsewhere. The others take long, or write to pretrained/: only their help is
    asked for, and must list the options that are shown.
    """
    _, module, *options = shlex.split(command)
    name = module.rpartition(".")[2]
    main = importlib.import_module(module).main
    if name in ("seeds", "measure", "bound", "ablations"):
        main([*options, "--table"])
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert len(rows) > 3 and "\n".join(rows) in RESULTS
    elif name == "benchmark":
        main([*options, "--rounds", "1", "--device", "cpu"])
        out = capsys.readouterr().out
        assert "ours takes" in out and "channels last takes" in out
    elif name == "glyphs":
        main([*options, "--sample", str(tmp_path / "digits.png")])
        assert (tmp_path / "digits.png").exists()
    else:
        with pytest.raises(SystemExit) as exit_:
            main(["--help"])
        usage = capsys.readouterr().out
        assert exit_.value.code == 0
        assert all(option in usage for option in options if option.startswith("-"))


@pytest.mark.slow
@pytest.mark.parametrize("command", runs_of_pytest())
def test_run_of_pytest_finds_tests(command):
    """That they pass is for the whole suite to say, of which this is a part."""
    run = subprocess.run([sys.executable, *shlex.split(command), "--collect-only", "-q"], cwd=ROOT,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert "::test_" in run.stdout


def test_table_of_formulas_is_printed_as_shown(capsys):
    """`python tests/test_tags.py` prints it; that it is in tests/README.md is tested there."""
    runpy.run_path(str(ROOT / "tests" / "test_tags.py"), run_name="__main__")
    assert capsys.readouterr().out == HEAD + table() + "\n"


def test_python_of_the_readmes_runs(capsys):
    """The six lines print a line for each step; the exercise ends with digits.

    At t = 400 much of the digit is left: each result is likest to the digit that it was made of.
    """
    six_lines, exercise, *_ = blocks("python")
    names = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile(six_lines, "README.md", "exec"), {})
        lines = capsys.readouterr().out.splitlines()
        exec(compile(exercise, "tests/README.md", "exec"), names)
    assert len(lines) == 21 and lines[-1].startswith("0 ")
    assert names["t"] == 0 and names["x0"].shape == (4, 1, 28, 28)
    apart = torch.cdist(names["x0"].flatten(1), names["digits"].flatten(1))
    assert apart.argmin(dim=1).tolist() == [0, 1, 2, 3]


def bytes_of(picture: Path) -> torch.Tensor:
    with Image.open(picture) as image:
        return pil_to_tensor(image)[0].float()


@pytest.fixture(scope="module")
def exercises(tmp_path_factory) -> tuple[list[dict], Path]:
    """What the names mean after exercises 6, 7 and 8, each run as it says, after the program of
    exercise 5; and the folder with their pictures."""
    _, before, *programs = blocks("python")
    folder = tmp_path_factory.mktemp("exercises")
    results = []
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.chdir(folder)
        for program in programs:
            names = {}
            exec(compile(before, "tests/README.md", "exec"), names)
            exec(compile(program, "tests/README.md", "exec"), names)
            results.append(names)
    return results, folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fill", "blend", "clean"])
def test_exercises_draw_the_pictures_that_are_shown(name, exercises):
    """The programs write the committed pictures, which are below 60 kB each. On another machine
    pixels may differ by rounding; any two rows of a picture differ by 15 grey levels or more, on
    average over all pixels."""
    drawn = bytes_of(exercises[1] / f"{name}.png")
    shown = bytes_of(ROOT / "figures" / f"{name}.png")
    assert drawn.shape == shown.shape
    assert (drawn - shown).abs().mean() < 1
    assert (ROOT / "figures" / f"{name}.png").stat().st_size < 60_000


@pytest.mark.slow
def test_filled_digits_keep_the_half_that_is_known(exercises):
    """Exercise 6: the upper half is that of the digit, to the bit; the four lower halves of a digit
    differ, and are digits of the network, not noise: nearly all of their pixels are black or white.
    """
    names = exercises[0][0]
    digits = names["digits"]
    filled = names["xt"].unflatten(0, (4, 4))  # (way, digit, 1, 28, 28)
    assert torch.equal(filled[..., :14, :], digits[None, ..., :14, :].expand(4, -1, -1, -1, -1))
    lower = filled[..., 14:, :]
    assert (lower[0] - lower[1]).abs().amax(dim=(1, 2, 3)).min() > 0.5
    assert (lower.abs() > 0.8).float().mean() > 0.85


@pytest.mark.slow
def test_blends_end_at_their_digits(exercises):
    """Exercise 7: of the four test digits, the first image of a row is most like that from which
    the row begins, and the last most like that at which it ends."""
    names = exercises[0][1]
    rows = names["x0"].unflatten(0, (2, 8))
    ends = rows[:, [0, 7]].flatten(0, 1)  # two ends for each row
    apart = torch.cdist(ends.flatten(1), names["digits"].flatten(1))
    assert apart.argmin(dim=1).tolist() == [0, 1, 2, 3]


@pytest.mark.slow
def test_dirt_goes_at_a_suitable_level(exercises):
    """Exercise 8: at t = 250 the corner with the blot and the side that was lit are black again; at
    t = 100 dirt is left there; and at t = 500 the digits are less like the clean ones."""
    names = exercises[0][2]
    dirty, low, middle, high = names["rows"]

    def ink(images: torch.Tensor) -> float:
        """The mean brightness, 0 to 1, where the clean digits are black."""
        black = (names["digits"] == -1).float()
        return ((images + 1) / 2 * black).sum().item() / black.sum().item()

    def error(images: torch.Tensor) -> float:
        return (images - names["digits"]).square().mean().item()

    assert ink(middle) < 0.7 * ink(low) < 0.7 * ink(dirty)
    assert error(high) > 1.5 * error(middle)


# ------------------------------------------------------------------- pictures, links and names

def test_every_picture_is_shown_and_exists():
    """Every file in figures/ is shown in some README, and every picture that is shown exists."""
    shown = {(file.parent / link).resolve() for file, text in TEXTS.items()
             for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)}
    assert shown == set((ROOT / "figures").iterdir())


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    """Each relative link leads to a file or folder, and its anchor to a heading of that file."""
    links = re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", TEXTS[file])
    inside = [(path, anchor) for path, anchor in links if not path.startswith("https://")]
    assert inside
    for path, anchor in inside:
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), path
        if anchor:
            page = target / "README.md" if target.is_dir() else target
            assert anchor in anchors(TEXTS[page]), f"{path}#{anchor}"


def test_each_claim_of_the_blog_has_its_section():
    """Eight rows, each with a link to the section of tests/experiments/README.md of its number."""
    table = README.split("## What the blog says, measured")[1].split("\n## ")[0]
    links = re.findall(r"^\| \[(\d)\]\(tests/experiments/README\.md#(\d)-[^)]+\)", table,
                       re.MULTILINE)
    assert links == [(str(k), str(k)) for k in range(1, 9)]
    assert table.count("](") == 8


def test_names_in_the_text_exist():
    """Each script that is named is a file, and `train.evaluate` and the like are names in it."""
    folders = [ROOT, ROOT / "tests", ROOT / "tests" / "experiments"]
    for name in set(re.findall(r"`(?:python )?([\w/]+\.py)\b", EVERYTHING)):
        assert any((folder / name).exists() for folder in folders), name
    for module, name in set(re.findall(rf"`({'|'.join(SCRIPTS)})\.(\w+)`", EVERYTHING)):
        assert name == "py" or hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_readme_is_short():
    """A front door of about 180 lines; the rest stands in the three others."""
    assert len(README.splitlines()) <= 200


def test_number_of_bugs_is_right():
    """The README says how many bugs the catalogue has."""
    assert f" {len(BUGS)} bugs" in EVERYTHING


def test_animation_is_small_enough_to_load():
    """Below two megabytes."""
    assert (ROOT / "figures" / "animation.gif").stat().st_size < 2_000_000


def test_model_card_is_of_the_shipped_model():
    """Its size in thousands of bytes and its SHA-256; and every file beside it is described."""
    folder = ROOT / "pretrained"
    model = (folder / "model.pt").read_bytes()
    assert f"{len(model) / 1000:,.0f} kB" in MODEL_CARD
    assert hashlib.sha256(model).hexdigest() in MODEL_CARD
    for file in folder.iterdir():
        named = "epoch-" if file.name.startswith("epoch-") else file.name
        assert file == FILES[3] or f"`{named}" in MODEL_CARD, file.name
