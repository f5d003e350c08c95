"""Settings for all tests: where the scripts are, and how Hypothesis behaves.

On a developer's machine Hypothesis looks at new random examples in every run. Where the variable
CI is set it looks at fewer, and the same ones each time, so that a red build is red again tomorrow.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("local", deadline=None, max_examples=100, suppress_health_check=quiet)
settings.register_profile("ci", deadline=None, max_examples=50, suppress_health_check=quiet,
                          derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def no_global_randomness():
    """Fail a test whose code touches the global generator: randomness must be passed in."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "the global generator was used"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a finished run of two steps on sixteen built-in digits, T = 20."""
    import train
    from digits import builtin_digits
    out = tmp_path_factory.mktemp("run")
    train.train(train.Config(epochs=1, batch_size=8, T=20, schedule="cosine", out=str(out),
                             device="cpu"),
                images=(builtin_digits(16, seed=0)[0], builtin_digits(8, seed=1)[0]))
    return out
