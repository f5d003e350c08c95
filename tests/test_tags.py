"""Each tag such as [DDPM Eq. 7] in a script is pinned by a test, and each tag in a test is used.

    python tests/test_tags.py        prints the README's table of equations, lines and tests

A tag names a paper and a place in it. In a script it stands where the formula is derived or
computed, in a test in the docstring that states the law. The table in the README is made from both.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["schedule.py", "unet.py", "train.py", "sample.py", "plots.py"]
TAG = re.compile(r"\[([A-Z][\w+-]+) (Eq\. \d+|section \d[\d.]*|Algorithm \d+)\]")


def names(tree: ast.Module) -> dict[int, str]:
    """Line number -> name of the innermost function or class around it."""
    found = {}
    for node in ast.walk(tree):  # outer ones come before those inside them
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.update(dict.fromkeys(range(node.lineno, node.end_lineno + 1), node.name))
    return found


def tags_in_scripts() -> dict[str, list[str]]:
    """Tag -> places such as "schedule.py:225 q_step"; the opening text has no function name."""
    places = {}
    for script in SCRIPTS:
        text = (ROOT / script).read_text(encoding="utf-8")
        name = names(ast.parse(text))
        for number, line in enumerate(text.splitlines(), 1):
            for tag in TAG.finditer(line):
                place = f"{script}:{number} {name.get(number, '')}".strip()
                places.setdefault(tag[0], []).append(place)
    return places


def tags_in_tests() -> dict[str, list[str]]:
    """Tag -> names of the test functions that have it in their docstring."""
    tests = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for tag in dict.fromkeys(t[0] for t in TAG.finditer(ast.get_docstring(node) or "")):
                    tests.setdefault(tag, []).append(node.name)
    return tests


def order(tag: str) -> tuple:
    paper, place = TAG.fullmatch(tag).groups()
    return paper != "DDPM", paper, place.split()[0], [int(n) for n in re.findall(r"\d+", place)]


def table() -> str:
    """The rows of the README's table: tag, lines of the scripts, tests."""
    places, tests = tags_in_scripts(), tags_in_tests()
    return "\n".join(
        f"| {tag[1:-1]} | {', '.join(f'`{p}`' for p in places[tag])} | "
        f"{', '.join(f'`{t}`' for t in tests.get(tag, []))} |"
        for tag in sorted(places, key=order))


def test_every_formula_of_a_script_is_pinned_by_a_test():
    """The tags of the scripts are the tags of the tests, both ways. Helpers have no others."""
    assert set(tags_in_scripts()) == set(tags_in_tests())
    for path in (ROOT / "tests").glob("*.py"):
        if path.name != Path(__file__).name:
            tags = {tag[0] for tag in TAG.finditer(path.read_text(encoding="utf-8"))}
            assert tags <= set(tags_in_scripts()), path.name


def test_tags_have_one_form():
    """A bracket with a paper and an equation, section or algorithm is a tag of the form above.

    So no tag escapes these tests by a slip such as an "and" or a line break in it.
    """
    bracket = re.compile(r"\[[A-Z][\w+-]+\s+(?:Eq|Sec|sec|Alg|alg)[^\]]*\]")
    for path in [*(ROOT / s for s in SCRIPTS), *(ROOT / "tests").glob("*.py")]:
        if path.name != Path(__file__).name:
            for found in bracket.finditer(path.read_text(encoding="utf-8")):
                assert TAG.fullmatch(found[0]), f"{path.name}: {found[0]!r}"


def test_readme_shows_equation_line_and_test():
    """The README's table is the one that is made from the sources, no row more or less."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = text.split("| formula | script:line, function | tests |\n|---|---|---|\n")[1]
    assert rows.split("\n\n")[0] == table(), (
        "the README's table is out of date; python tests/test_tags.py prints the present one")


def test_readme_names_tests_that_exist():
    """What the README says is guarded by a test is guarded by a test of that name."""
    named = re.findall(r"`(test_\w+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    there = {node.name for path in (ROOT / "tests").glob("test_*.py")
             for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.FunctionDef)}
    assert len(named) > 50 and set(named) <= there


def test_readme_lists_every_paper():
    """Each arXiv number that a script gives as a source stands among the README's references."""
    references = (ROOT / "README.md").read_text(encoding="utf-8").split("## References")[1]
    for script in SCRIPTS:
        for number in re.findall(r"\d{4}\.\d{5}", (ROOT / script).read_text(encoding="utf-8")):
            assert f"https://arxiv.org/abs/{number}" in references, f"{script}: {number}"


if __name__ == "__main__":
    print(table())
