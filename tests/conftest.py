"""Settings for all tests: the path, the two tiers, how Hypothesis behaves, and a trained model.

There are two tiers. The fast tests cover every law of the five scripts. The slow ones carry the
marker `slow`: they start processes, train for long, or test an experiment.

    python -m pytest tests -m "not slow"      the fast ones, as in the README
    python -m pytest tests -m slow            the slow ones
    python -m pytest tests                    both

Hypothesis has two profiles. On a developer's machine it looks at 100 new random examples in every
run. If the variable CI is set, it looks at 50, the same ones each time, so that a test that fails
on one day fails on the next day too.
"""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Here are the scripts, and the modules that tests share.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("local", deadline=None, max_examples=100, suppress_health_check=quiet)
settings.register_profile("ci", deadline=None, max_examples=50, suppress_health_check=quiet,
                          derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker of the second tier."""
    config.addinivalue_line(
        "markers", "slow: starts processes, trains for long, or tests an experiment")


@pytest.fixture(autouse=True)
def no_global_randomness():
    """Fail a test whose code uses the global random generator: randomness must be passed in."""
    state = torch.get_rng_state()
    yield
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Let signals reach the tests and what they start, even if they run with `&` or under nohup.

    `&` in a script has SIGINT ignored, nohup SIGHUP, and what is ignored stays ignored in all
    processes that are started.
    """
    usual = {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}
    for name, handler in usual.items():
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a finished run of two steps on sixteen built-in digits, T = 20."""
    import train  # not at the top of the file, where it is not on the path yet
    out = tmp_path_factory.mktemp("run")
    config = train.Config(epochs=1, batch_size=8, T=20, schedule="cosine", out=str(out),
                          device="cpu")
    training, _ = train.builtin_digits(16, seed=0)
    held_out, _ = train.builtin_digits(8, seed=1)
    train.train(config, images=(training, held_out))
    return out
