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
HEAD = "| formula | says | stands in | pinned by |\n|---|---|---|---|\n"
TAG = re.compile(r"\[([A-Z][\w+-]+) (Eq\. \d+|section \d[\d.]*|Algorithm \d+)\]")


# What each formula says, for the README.
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
    "DDIM Eq. 12": r"$x_s=\sqrt{\bar\alpha_s}\ \hat x_0+\sqrt{1-\bar\alpha_s-\sigma^2}\ \hat\epsilon+\sigma z$",
    "DDIM Eq. 16": r"$\sigma^2=\eta^2\tilde\beta_t$",
    "DPM-Solver++ Algorithm 2": r"$\hat x_0+\frac{u_s-u_t}{2(u_t-u_b)}(\hat x_0-\hat x_0^{b})$, "
                                r"$b$ the step before",
    "IDDPM Eq. 17": r"$\bar\alpha_t=f(t)/f(0)$, $f(t)=\cos^2\left(\frac{t/T+s}{1+s}\frac{\pi}{2}\right)$",
    "IDDPM section 4": r"a longer step has $\alpha=\bar\alpha_t/\bar\alpha_s$",
    "VDM Eq. 2": r"$\mathrm{SNR}(t)=\bar\alpha_t/(1-\bar\alpha_t)$",
}


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
    """The rows of the README's table: tag, formula, lines of the scripts, tests."""
    places, tests = tags_in_scripts(), tags_in_tests()
    return "\n".join(
        f"| {tag[1:-1]} | {FORMULAS[tag[1:-1]]} | {'<br>'.join(f'`{p}`' for p in places[tag])} | "
        # Some laws are tested for random schedules and again for those that are shipped.
        + "<br>".join(f"`{t}`" for t in tests.get(tag, []) if not t.endswith("_on_shipped_schedules"))
        + " |" for tag in sorted(places, key=order))


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
    assert text.split(HEAD)[1].split("\n\n")[0] == table(), (
        "the README's table is out of date; python tests/test_tags.py prints the present one")


def test_readme_names_tests_that_exist():
    """What the README and tests/README.md say is guarded by a test is guarded by one of that name."""
    named = [name for path in (ROOT / "README.md", ROOT / "tests" / "README.md")
             for name in re.findall(r"`(test_\w+)`", path.read_text(encoding="utf-8"))]
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
    print(HEAD + table())
