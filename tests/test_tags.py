"""Each tag such as [DDPM Eq. 7] in a script is pinned by a test, and each tag in a test is used.

    python tests/test_tags.py        prints the table of formulas of tests/README.md

A tag names a paper and a place in it. In a script it stands where the formula is derived or
computed, in a test in the docstring that states the law. The table is made from both.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["schedule.py", "unet.py", "train.py", "sample.py", "plots.py"]
READMES = [ROOT / folder / "README.md"
           for folder in ("", "tests", "tests/experiments", "pretrained")]
HEAD = "| formula | says | stands in | pinned by |\n|---|---|---|---|\n"
TAG = re.compile(r"\[([A-Z][\w+-]+) (Eq\. \d+|section \d[\d.]*|Algorithm \d+)\]")
# A line such as "# ------- 2. One noisy step"; the group is the title without its number.
SECTION = re.compile(r"^ *# -{5,} (?:\d+\. )?(.+)$", re.MULTILINE)

# What each formula says.
FORMULAS = {
    "DDPM Algorithm 1": r"descend $\nabla_\theta\ \lVert\epsilon-\epsilon_\theta(x_t,t)\rVert^2$",
    "DDPM Algorithm 2": r"$x_{t-1}=\mu_\theta(x_t,t)+\sigma_t z$, from $t=T$ to 1",
    "DDPM Eq. 2": r"$q(x_t\mid x_{t-1})=\mathcal N(\sqrt{1-\beta_t}\ x_{t-1},\ \beta_t)$",
    "DDPM Eq. 3": r"$-\log p_\theta(x_0)\le\mathbb E_q[\log q(x_{1:T}\mid x_0)-\log p_\theta(x_{0:T})]$",
    "DDPM Eq. 4": r"$q(x_t\mid x_0)=\mathcal N(\sqrt{\bar\alpha_t}\ x_0,\ 1-\bar\alpha_t)$",
    "DDPM Eq. 5": r"the bound is a sum of divergences, one for each $t$",
    "DDPM Eq. 6": r"$q(x_{t-1}\mid x_t,x_0)=\mathcal N(\tilde\mu_t,\ \tilde\beta_t)$",
    "DDPM Eq. 7": r"$\tilde\mu_t=\frac{\sqrt{\bar\alpha_{t-1}}\beta_t}{1-\bar\alpha_t}x_0+\frac{\sqrt{\alpha_t}"
                  r"(1-\bar\alpha_{t-1})}{1-\bar\alpha_t}x_t$, $\tilde\beta_t=\frac{1-\bar\alpha_{t-1}}"
                  r"{1-\bar\alpha_t}\beta_t$",
    "DDPM Eq. 8": r"$\lVert\tilde\mu_t-\mu_\theta\rVert^2/2\sigma_t^2$ plus a constant",
    "DDPM Eq. 11": r"$\mu_\theta=\frac{1}{\sqrt{\alpha_t}}\left(x_t-\frac{\beta_t}{\sqrt{1-\bar\alpha_t}}"
                   r"\epsilon_\theta\right)$",
    "DDPM Eq. 12": r"$\frac{\beta_t^2}{2\sigma_t^2\alpha_t(1-\bar\alpha_t)}\lVert\epsilon-\epsilon_\theta"
                   r"\rVert^2$",
    "DDPM Eq. 14": r"$\mathbb E\ \lVert\epsilon-\epsilon_\theta(x_t,t)\rVert^2$",
    "DDPM section 3.2": r"$\sigma_t^2=\beta_t$ or $\tilde\beta_t$: exact at the two extremes",
    "DDPM section 4": r"$T=1000$, $\beta_t$ linear from $10^{-4}$ to 0.02",
    "Attention section 3.2": r"$\mathrm{softmax}(QK^\top/\sqrt d)\ V$",
    "Attention section 3.5": r"$\sin\omega_i t$ and $\cos\omega_i t$, $\omega_i$ from 1 to $10^{-4}$",
    "CFG Algorithm 1": r"tell no class for one image in ten, each drawn by itself",
    "CFG Eq. 6": r"$\hat\epsilon=(1+v)\ \epsilon(x_t,t,c)-v\ \epsilon(x_t,t)$, $v=w-1$",
    "DDIM Eq. 12": r"$x_s=\sqrt{\bar\alpha_s}\ \hat x_0+\sqrt{1-\bar\alpha_s-\sigma^2}\ \hat\epsilon+\sigma z$",
    "DDIM Eq. 16": r"$\sigma^2=\eta^2\tilde\beta_t$",
    "DPM-Solver++ Algorithm 2": r"$\hat x_0+\frac{u_s-u_t}{2(u_t-u_b)}(\hat x_0-\hat x_0^{b})$, "
                                r"$b$ the step before",
    "IDDPM Eq. 17": r"$\bar\alpha_t=f(t)/f(0)$, $f(t)=\cos^2\left(\frac{t/T+s}{1+s}\frac{\pi}{2}\right)$",
    "IDDPM section 4": r"a longer step has $\alpha=\bar\alpha_t/\bar\alpha_s$",
    "VDM Eq. 2": r"$\mathrm{SNR}(t)=\bar\alpha_t/(1-\bar\alpha_t)$",
}


def files_with_tests() -> list[Path]:
    """Those of the experiments included."""
    return sorted((ROOT / "tests").rglob("test_*.py"))


def definitions(tree: ast.Module) -> list[ast.FunctionDef | ast.ClassDef]:
    """All functions and classes, outer ones before those inside them."""
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def place(script: str, tree: ast.Module, text: str, number: int) -> str:
    """Where in a script a line is: `train.py draw_t` or `train.py` (What to ask of the network).

    It is the innermost function or class around it. A comment between two functions leads up to the
    second, unless a new section begins in between; then the section of the comment is given.
    """
    around = None
    following = []
    for node in definitions(tree):
        if node.lineno <= number <= node.end_lineno:
            around = node  # the last one is the innermost
        elif node.lineno > number:
            following.append(node)

    lines = text.splitlines()
    if lines[number - 1].strip().startswith("#") and not isinstance(around, ast.FunctionDef):
        around = min(following, key=lambda node: node.lineno)
        if SECTION.search("\n".join(lines[number:around.lineno])):
            title = SECTION.findall("\n".join(lines[:number]))[-1]
            return f"`{script}` ({title})"
    return f"`{script} {around.name}`" if around else f"`{script}`"


def tags_in_scripts() -> dict[str, list[str]]:
    """Tag -> places in the scripts, each once."""
    places = {}
    for script in SCRIPTS:
        text = (ROOT / script).read_text(encoding="utf-8")
        tree = ast.parse(text)
        for number, line in enumerate(text.splitlines(), 1):
            for tag in TAG.finditer(line):
                where = place(script, tree, text, number)
                if where not in places.setdefault(tag[0], []):
                    places[tag[0]].append(where)
    return places


def tags_in_tests() -> dict[str, list[str]]:
    """Tag -> names of the test functions that have it in their docstring."""
    tests = {}
    for path in files_with_tests():
        for node in definitions(ast.parse(path.read_text(encoding="utf-8"))):
            if node.name.startswith("test_"):
                docstring = ast.get_docstring(node) or ""
                for tag in dict.fromkeys(tag[0] for tag in TAG.finditer(docstring)):
                    tests.setdefault(tag, []).append(node.name)
    return tests


def order(tag: str) -> tuple:
    """DDPM first, then the other papers by name; within a paper by kind of place and number."""
    paper, place = TAG.fullmatch(tag).groups()
    numbers = [int(number) for number in re.findall(r"\d+", place)]
    return paper != "DDPM", paper, place.split()[0], numbers


def table() -> str:
    """The rows of the table of formulas: tag, formula, places in the scripts, tests."""
    places, tests = tags_in_scripts(), tags_in_tests()
    rows = []
    for tag in sorted(places, key=order):
        # Some laws are tested for random schedules and again for those that are shipped.
        once = [test for test in tests.get(tag, []) if not test.endswith("_on_shipped_schedules")]
        cells = [tag[1:-1], FORMULAS[tag[1:-1]],
                 "<br>".join(places[tag]),
                 "<br>".join(f"`{test}`" for test in once)]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def test_every_formula_of_a_script_is_pinned_by_a_test():
    """The tags of the scripts are the tags of the tests, both ways. Helpers have no others."""
    known = set(tags_in_scripts())
    assert known == set(tags_in_tests())
    for path in (ROOT / "tests").rglob("*.py"):
        if path.name != Path(__file__).name:
            tags = {tag[0] for tag in TAG.finditer(path.read_text(encoding="utf-8"))}
            assert tags <= known, path.name


def test_every_formula_is_written_out():
    """FORMULAS says what each tag of the scripts stands for, and no more."""
    assert {f"[{name}]" for name in FORMULAS} == set(tags_in_scripts())


def test_tags_have_one_form():
    """A bracket with a paper and an equation, section or algorithm is a tag of the form above.

    So no tag escapes these tests by a slip such as an "and" or a line break in it.
    """
    bracket = re.compile(r"\[[A-Z][\w+-]+\s+(?:Eq|Sec|sec|Alg|alg)[^\]]*\]")
    for path in [*(ROOT / script for script in SCRIPTS), *(ROOT / "tests").rglob("*.py")]:
        if path.name != Path(__file__).name:
            for match in bracket.finditer(path.read_text(encoding="utf-8")):
                assert TAG.fullmatch(match[0]), f"{path.name}: {match[0]!r}"


def test_places_are_those_of_the_functions():
    """A tag belongs to the function around it, or to the one that a comment leads up to."""
    text = """'opening'
# ------- 1. One
# leads up to C
class C:
    'of C'
    # leads up to f
    def f(self):
        # in f
        pass
# ------- 2. Two
# leads up to nothing
# ------- 3. Three
def g(): pass
"""
    tree = ast.parse(text)
    places = [place("a.py", tree, text, number) for number in (1, 3, 5, 6, 8, 11, 13)]
    assert places == ["`a.py`", "`a.py C`", "`a.py C`", "`a.py f`", "`a.py f`", "`a.py` (Two)",
                      "`a.py g`"]


def test_readme_shows_formula_place_and_test():
    """The table of tests/README.md is the one made from the sources, no row more or less."""
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    assert text.split(HEAD)[1].split("\n\n")[0] == table(), (
        "the table in tests/README.md is out of date; python tests/test_tags.py prints it")


def test_readmes_name_tests_that_exist():
    """What a README says is guarded by a test is guarded by one of that name."""
    named = {name for path in READMES
             for name in re.findall(r"`(test_\w+)`", path.read_text(encoding="utf-8"))}
    existing = {node.name for path in files_with_tests()
                for node in definitions(ast.parse(path.read_text(encoding="utf-8")))}
    assert len(named) > 50
    assert named <= existing, named - existing


def test_readme_lists_every_paper():
    """Each arXiv number that a script gives as a source stands among the README's references."""
    references = READMES[0].read_text(encoding="utf-8").split("## References")[1]
    for script in SCRIPTS:
        for number in re.findall(r"\d{4}\.\d{5}", (ROOT / script).read_text(encoding="utf-8")):
            assert f"https://arxiv.org/abs/{number}" in references, f"{script}: {number}"


if __name__ == "__main__":
    print(HEAD + table())
