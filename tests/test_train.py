"""The laws of training: what a step sees, what is measured, and that stopping loses nothing."""

import math
import pickle
import shutil
import time
from collections import Counter
from urllib.error import URLError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train as script
from sample import SHIPPED, to_uint8
from schedule import NoiseSchedule
from strategies import SEED, pictures, same_state, write_mnist
from train import (
    BLOG_LOSS, Config, draw_t, evaluate, from_uint8, learning_rate, load_checkpoint, load_images,
    save, update_average)


def small(out, **changes) -> Config:
    """A run of a few seconds on 8x8 pictures; the network takes any size in fours."""
    return Config(**{**dict(epochs=3, batch_size=8, lr=1e-3, out=str(out), device="cpu"),
                     **changes})


IMAGES = pictures(32, size=8), pictures(24, size=8, seed=1)


# ------------------------------------------------------------------------------------- the digits

def test_bytes_and_floats_convert_into_each_other():
    """to_uint8(from_uint8(k)) = k for all 256 bytes; 0 is exactly -1 and 255 exactly +1."""
    k = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1)
    x = from_uint8(k)
    assert torch.equal(to_uint8(x), k)
    assert x[0] == -1 and x[255] == 1 and x.dtype == torch.float32


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=2))
def test_to_uint8_rises_and_saturates(pair):
    """a <= b implies to_uint8(a) <= to_uint8(b); beyond [-1, 1] it stays at 0 and 255."""
    low, high = to_uint8(torch.tensor(sorted(pair))).tolist()
    assert low <= high
    for x, byte in zip(sorted(pair), (low, high)):
        if abs(x) <= 1:  # the nearest of the 256 levels, which are 2/255 apart
            assert abs(from_uint8(torch.tensor(byte)).item() - x) < 1 / 255 + 1e-6
    assert low == 0 or min(pair) > -1
    assert high == 255 or max(pair) < 1


def test_images_are_read_as_they_are(tmp_path):
    """What was written in MNIST's format is what load_images returns, byte by byte."""
    images, labels = pictures(5), torch.tensor([3, 1, 4, 1, 5])
    write_mnist(tmp_path, images, labels)
    for train in (True, False):
        got, got_labels = load_images(tmp_path, train)
        assert torch.equal(got, images) and torch.equal(got_labels, labels)
        assert got.dtype == torch.uint8


def test_builtin_digits_shown_in_training_are_not_those_held_out(monkeypatch):
    """As many as in MNIST, and the two parts are drawn with different seeds."""
    monkeypatch.setattr(script.runpy, "run_path", lambda path: {
        "builtin_digits": lambda count, seed: (count, seed)})
    (count, seed), (held_count, held_seed) = (load_images("", part, "builtin")
                                              for part in (True, False))
    assert (count, held_count) == (60_000, 10_000) and seed != held_seed


def test_limits_of_the_options_leave_room():
    """MNIST whole, with its usual 5,000 held out, long runs, and no clipping are allowed."""
    config = Config(images=60_000, val_images=5_000, epochs=1_000, batch_size=60_000, T=4_000,
                    lr=1, warmup=1, ema=0.9999, clip=math.inf, seed=2**63 - 1)
    assert config.images == 60_000


@pytest.mark.parametrize("name, last, beyond", [
    ("epochs", 10**6, 10**6 + 1), ("batch_size", 10**6, 10**6 + 1), ("T", 10**6, 10**6 + 1),
    ("lr", 1, 1.001), ("lr", 1e-9, 0.999e-9), ("clip", 1e-9, 0.999e-9), ("warmup", 1, 1.001),
    ("ema", 0.999999, 0.9999999), ("images", 10**9, 10**9 + 1), ("val_images", 10**6, 10**6 + 1),
    ("seed", 2**63 - 1, 2**63)])
def test_last_value_of_an_option_is_allowed_and_the_next_is_not(name, last, beyond):
    """The limits of --help belong to the range, and a slip of the finger beyond is refused."""
    assert getattr(Config(**{name: last}), name) == last
    with pytest.raises(ValueError, match=f"{name} must be between"):
        Config(**{name: beyond})


def no_network(monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise URLError("no route to host")
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse)


def test_missing_mnist_is_one_line_of_advice(tmp_path, monkeypatch):
    """Without files and network the error names the four files, where to get and to put them."""
    no_network(monkeypatch)
    with pytest.raises(FileNotFoundError) as error:
        load_images(tmp_path)
    text = str(error.value)
    assert "\n" not in text and "download" in text and str(tmp_path) in text
    for part in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "https://", "--data"):
        assert part in text


def test_truncated_mnist_is_one_line(tmp_path, monkeypatch):
    """A file that was cut off is an error, not a shorter data set."""
    no_network(monkeypatch)
    write_mnist(tmp_path, pictures(5), torch.arange(5))
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged") as error:
        load_images(tmp_path)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------- the parts of a step

@given(st.integers(1, 300), st.integers(2, 2000), SEED)
def test_draws_of_t_have_one_in_each_stratum(count, T, seed):
    """Sorted, the k-th draw lies in the k-th of `count` equal parts of 1..T."""
    t = draw_t(count, T, torch.Generator().manual_seed(seed)).sort().values
    assert t.dtype == torch.int64 and t.min() >= 1 and t.max() <= T
    for k in range(count):
        # u T with u in [k/count, (k+1)/count) has integer part floor(k T/count) .. ceil(...) - 1.
        assert k * T // count + 1 <= t[k] <= -(-(k + 1) * T // count)


def test_greatest_draw_of_t_is_T(monkeypatch):
    """The greatest number below 1 that a generator can give is rounded up to 1 by the sum with the
    stratum. The draw is T, not T + 1, which no schedule has."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **kinds: torch.full(
        shape[0] if isinstance(shape[0], tuple) else shape, 1 - 2**-53, dtype=torch.float64))
    t = draw_t(128, 1000, torch.Generator().manual_seed(0))
    assert t.max() == 1000 and t.min() >= 1


def test_draws_of_t_are_uniform_for_every_image():
    """The t of one place in the batch is uniform on 1..T: chi-square over 50 bins, 20,000 batches.

    With 49 degrees of freedom a value above 120 has probability 7e-8; two places make 1.4e-7. It
    notices, with 99.9 %, one bin that is 62 % too full, or a ripple of 8.8 % (its root mean square)
    over all. The first and the last t must occur at all.
    """
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([draw_t(8, 100, generator) for _ in range(20_000)])
    for place in (0, 7):
        counts = torch.bincount((draws[:, place] - 1) // 2, minlength=50).double()
        assert ((counts - 400) ** 2 / 400).sum() < 120
    assert set(draws.flatten().tolist()) == set(range(1, 101))


def test_draws_of_t_are_independent_of_the_place_in_the_batch():
    """Each of 8 strata is dealt to each of 8 places equally often: chi-square, 16,000 batches.

    A batch deals a permutation, so the cells of a table of N batches are not independent: they vary
    by N/7 instead of N/8 on the 49 directions that fixed sums of rows and columns leave. Scaled by
    7/8 the statistic is chi-square, above 120 with probability 7e-8. Sorted draws would tie small t
    to the first images and make it 784,000.
    """
    generator = torch.Generator().manual_seed(1)
    table = torch.zeros(8, 8, dtype=torch.float64)
    for _ in range(16_000):
        stratum = (draw_t(8, 800, generator) - 1) // 100
        table[torch.arange(8), stratum] += 1
    assert (table.sum(0) == 16_000).all()
    assert 7 / 8 * ((table - 2000) ** 2 / 2000).sum() < 120


def test_draws_of_t_within_their_strata_are_independent():
    """The places of two draws within their strata are uncorrelated: 16,000 pairs.

    The correlation has a standard error of 1/sqrt(16,000); 5.5 of them have probability 4e-8. One
    common offset for all strata would make it 1.
    """
    generator = torch.Generator().manual_seed(2)
    draws = torch.stack([draw_t(2, 2000, generator).sort().values for _ in range(16_000)])
    assert abs(torch.corrcoef(draws.T.double())[0, 1].item()) < 5.5 / math.sqrt(16_000)


@given(st.integers(1, 500), st.floats(0, 1))
def test_learning_rate_rises_then_falls(steps, warmup):
    """A straight rise to lr over the given share of the steps, then a straight fall to 0.

    Step i of n rising ones has lr (i+1)/n; a share f of the way down it is lr (1 - f).
    """
    config = Config(lr=0.5, warmup=warmup)
    rates = [learning_rate(i, steps, config) for i in range(steps)]
    rising = max(1, round(warmup * steps))
    for i, rate in enumerate(rates):
        way = max(0, i - rising) / max(1, steps - rising)
        expected = 0.5 * (i + 1) / rising if i < rising else 0.5 * (1 - way)
        assert abs(rate - expected) < 1e-12 and rate > 0
    top = rising - 1
    assert all(a < b for a, b in zip(rates[:top], rates[1:top + 1]))
    # After the step of the peak, which may come twice, the rate only falls.
    assert all(a > b for a, b in zip(rates[top + 1:], rates[top + 2:]))
    if warmup < 0.5 and steps >= 100:
        assert rates[-1] < 0.0101  # one step of the 50 or more that fall is left


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40), st.floats(0, 0.9999))
def test_average_equals_its_closed_form(weights, decay):
    """mean_n = sum_i w_i (1 - d_i) d_{i+1} ... d_n + start d_0 ... d_n, d_i = min(d, (1+i)/(10+i)).

    So the shares of all weights and the start sum to 1, and a constant is a fixed point.
    """
    with torch.random.fork_rng(devices=[]):
        model, average = (torch.nn.Linear(1, 1, bias=False).double() for _ in range(2))
    start = 0.25
    torch.nn.init.constant_(average.weight, start)
    expected, shares = start, [1.0]
    for step, weight in enumerate(weights):
        torch.nn.init.constant_(model.weight, weight)
        update_average(average, model, step, decay)
        d = min(decay, (1 + step) / (10 + step))
        shares = [share * d for share in shares] + [1 - d]
        expected = sum(share * w for share, w in zip(shares, [start, *weights]))
        assert abs(average.weight.item() - expected) < 1e-12
    assert abs(sum(shares) - 1) < 1e-12
    torch.nn.init.constant_(model.weight, expected)
    update_average(average, model, len(weights), decay)
    assert abs(average.weight.item() - expected) < 1e-12


# ------------------------------------------------------------------------------------ evaluation

class Guess(torch.nn.Module):
    """A stand-in for the network: half of x_t, plus t/1000; remembers the t it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))
        self.seen = []

    def forward(self, xt, t):
        assert not self.training
        self.seen += t.tolist()
        return self.weight * xt + t.reshape(-1, 1, 1, 1) / 1000


@pytest.mark.parametrize("batch_size", [7, 500])
def test_evaluate_equals_a_plain_loop(batch_size):
    """Image i at t = 1 + i mod T, eps one randn from a generator seeded 0. [DDPM Eq. 14]"""
    schedule, images = NoiseSchedule(50, "cosine"), pictures(60, size=8)
    model = Guess().train()
    loss = evaluate(model, schedule, images, batch_size)

    eps = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    total = 0.0
    for i in range(60):
        t = 1 + i % 50
        alpha_bar = math.prod(1 - b for b in schedule.beta[1:t + 1].tolist())
        x0 = images[i].double() / 127.5 - 1
        xt = math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps[i]
        total += (eps[i] - (xt / 2 + t / 1000)).square().mean().item() / 60
    assert abs(loss - total) < 1e-6
    assert model.seen == [1 + i % 50 for i in range(60)]
    assert model.training  # left as it was found


def test_evaluation_shows_every_t_equally_often():
    """t = 1 + i mod T: with N = 3 T images each of 1..T is seen three times."""
    model = Guess()
    evaluate(model, NoiseSchedule(20, "cosine"), pictures(60, size=8), batch_size=7)
    assert Counter(model.seen) == {t: 3 for t in range(1, 21)}


# ------------------------------------------------------------------------------------- whole runs

def test_run_learns_the_training_images_and_is_held_to_the_test_images(tmp_path):
    """MNIST's two parts, 24 and 8 images: three steps of 8, and the loss that evaluate() finds for
    the other 8. The seconds are those that passed."""
    begun, test_images = time.perf_counter(), pictures(8, size=8, seed=1)
    write_mnist(tmp_path, pictures(24, size=8), torch.zeros(24))
    write_mnist(tmp_path, test_images, torch.zeros(8), splits=("t10k",))
    history = script.train(small(tmp_path / "run", data=str(tmp_path), epochs=2))
    assert len(history["step_loss"]) == 6
    model, schedule, *_ = load_checkpoint(tmp_path / "run" / "model.pt")
    assert math.isclose(history["held_out"][1], evaluate(model, schedule, test_images), rel_tol=1e-6)
    assert 0 < min(history["seconds"]) and sum(history["seconds"]) < time.perf_counter() - begun


def test_loss_falls(tmp_path):
    """200 steps on generated pictures bring the training loss from 1 to below 0.1.

    The best rescaling of x_t alone, without looking at neighbours, cannot get below 0.27 on MNIST,
    and these pictures are no easier for it.
    """
    history = script.train(small(tmp_path, epochs=25, batch_size=32, lr=2e-3),
                           images=(pictures(256, 8), IMAGES[1]))
    assert abs(history["step_loss"][0] - 1) < 0.1
    assert history["loss"][-1] < 0.1 and history["held_out"][-1] < 0.3
    assert len(history["step_loss"]) == 200 and len(history["seconds"]) == 25


def test_steps_are_those_of_the_algorithm(tmp_path):
    """Two epochs equal a plain loop: draw x_0, t, eps; descend on |eps - eps_hat|^2.

    [DDPM Algorithm 1] The loop writes out the order of the images, the noisy image, the mean of the
    squares [DDPM Eq. 14], the clipping of the gradient, Adam with its two bias corrections, and the
    average, in float64. Some steps are clipped and some not. The code under test is in float32.
    Where a gradient is 0 but for rounding, Adam may move a weight by the full rate either way; so
    weights are compared by their median difference, against 0.1 % of what the rates add up to.
    """
    config = small(tmp_path, epochs=2, batch_size=8, clip=3.31, seed=5, T=50, schedule="cosine",
                   ema=0.2)  # which is reached within these steps
    images = pictures(26, size=8, seed=3)  # three batches, and two images that are left over
    script.train(config, images=(images, IMAGES[1]))
    got = load_checkpoint(tmp_path / "model.pt")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = script.UNet(size=8)
    average = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    model.double()
    f = [math.cos((k / 50 + 0.008) / 1.008 * math.pi / 2)**2 for k in range(51)]
    betas = torch.tensor([min(1 - b / a, 0.999) for a, b in zip(f, f[1:])], dtype=torch.float64)
    generator = torch.Generator().manual_seed(config.seed)
    first = {name: torch.zeros_like(p) for name, p in average.items()}
    second = {name: torch.zeros_like(p) for name, p in average.items()}
    norms, rates = [], []
    for step in range(6):
        if step % 3 == 0:
            order = torch.randperm(26, generator=generator)
        x0 = images[order[8 * (step % 3):8 * (step % 3) + 8]].double() / 127.5 - 1
        t = draw_t(8, 50, generator)
        eps = torch.randn(8, 1, 8, 8, generator=generator).double()
        alpha_bar = torch.stack([torch.prod(1 - betas[:k]) for k in t]).reshape(8, 1, 1, 1)
        eps_hat = model(alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps, t)
        loss = ((eps - eps_hat) ** 2).sum() / eps.numel()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(math.sqrt(sum(g.square().sum().item() for g in gradients)))
        rates.append(1e-3 * min(1, (6 - step) / 5))  # one step of rise, five of fall
        assert abs(got.history["step_loss"][step] - loss.item()) < 1e-5
        with torch.no_grad():
            for (name, p), g in zip(model.named_parameters(), gradients):
                g = g * min(1, config.clip / norms[-1])
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.99 * second[name] + 0.01 * g**2
                m = first[name] / (1 - 0.9 ** (step + 1))
                v = second[name] / (1 - 0.99 ** (step + 1))
                p -= rates[-1] * m / (v.sqrt() + 1e-8)
                d = min(0.2, (1 + step) / (10 + step))
                average[name] = d * average[name] + (1 - d) * p
    assert min(norms) < config.clip < max(norms)
    for name, p in got.model.named_parameters():
        assert (p - average[name]).abs().median() < 1e-3 * sum(rates)
    for epoch in range(2):
        mean = sum(got.history["step_loss"][3 * epoch:3 * epoch + 3]) / 3
        assert abs(got.history["loss"][epoch] - mean) < 1e-12
    assert got.history["held_out"][-1] == evaluate(got.model, got.schedule, IMAGES[1])


@pytest.mark.parametrize("stops", [[1], [4], [6], [7, 11], list(range(1, 12))])
def test_resumed_run_equals_unbroken_run_bit_for_bit(stops, tmp_path, monkeypatch):
    """Stopped after any steps, also in the middle of an epoch of four, and resumed: all is the same.

    Weights, average, Adam's moments, generator, order of the images and history are those of a run
    that was not stopped. Bit for bit on one machine with one number of threads; elsewhere sums are
    rounded differently.
    """
    whole = script.train(small(tmp_path / "whole"), images=IMAGES)
    stop = []

    def stopping(average, model, step, decay):
        update_average(average, model, step, decay)
        if step + 1 in stops:
            stop.append(2)

    monkeypatch.setattr(script, "update_average", stopping)
    parts = script.train(small(tmp_path / "parts"), images=IMAGES, stop=stop)
    for count in stops:
        assert len(parts["step_loss"]) == count and len(parts["loss"]) == count // 4
        stop.clear()
        parts = script.train(small(tmp_path / "parts"), resume=True, images=IMAGES, stop=stop)
    for name in ("loss", "held_out", "step_loss"):
        assert whole[name] == parts[name]
    assert same_state(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt")


def test_killed_run_goes_on_from_its_last_file(tmp_path, monkeypatch):
    """Killed in epoch 2, without a chance to save: epoch 2 begins anew and ends as if unbroken."""
    whole = script.train(small(tmp_path / "whole"), images=IMAGES)

    class Killed(Exception):
        pass

    def kill(average, model, step, decay):
        if step == 6:
            raise Killed
        update_average(average, model, step, decay)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(script, "update_average", kill)
        script.train(small(tmp_path / "parts"), images=IMAGES)
    parts = script.train(small(tmp_path / "parts"), resume=True, images=IMAGES)
    assert whole["step_loss"] == parts["step_loss"]
    assert same_state(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt")


def test_divergence_is_noticed_within_twenty_steps(tmp_path, monkeypatch):
    """A loss that turns to nan in the middle of a long epoch stops the run at the next look."""
    seen = []

    def poison(average, model, step, decay):
        seen.append(step)
        if step == 30:
            torch.nn.init.constant_(model.stem.bias, math.nan)

    monkeypatch.setattr(script, "update_average", poison)
    with pytest.raises(FloatingPointError, match="finite in epoch 1, step 40"):
        script.train(small(tmp_path, epochs=1, batch_size=2), images=(pictures(128, 8), IMAGES[1]))
    assert seen == list(range(40))
    kept = load_checkpoint(tmp_path / "last.pt")  # as it was written after the first step
    assert len(kept.history["step_loss"]) == 1 and all(
        w.isfinite().all() for w in kept.state["weights"].values())


def test_same_seed_same_run_other_seed_other_run(tmp_path):
    """A run is decided by its configuration."""
    runs = [script.train(small(tmp_path / str(i), epochs=1, seed=seed), images=IMAGES)["step_loss"]
            for i, seed in enumerate((5, 5, 6))]
    assert runs[0] == runs[1] != runs[2]


def test_validation_images_are_kept_out_of_training(tmp_path, monkeypatch):
    """val_images=N evaluates on the last N training images and trains on none of them."""
    train_images = pictures(32, 8)
    train_images[-8:] = 255  # white squares, seen nowhere else
    seen = []
    monkeypatch.setattr(script, "from_uint8", lambda x: seen.append(x.clone()) or from_uint8(x))
    script.train(small(tmp_path, epochs=1, val_images=8), images=(train_images, IMAGES[1]))
    training, held_out = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert training.shape[0] == 24 and not (training.amin(dim=(1, 2, 3)) == 255).any()
    assert torch.equal(held_out, train_images[-8:])


def test_existing_run_is_not_overwritten(tmp_path, tiny_run):
    """A new run into the folder of another is refused; so is resuming with another option."""
    for folder, file in ((tmp_path / "a", "last.pt"), (tmp_path / "b", "model.pt")):
        folder.mkdir()
        (folder / file).write_bytes((tiny_run / file).read_bytes())  # one of the two is enough
        with pytest.raises(ValueError, match=f"--resume --out {folder}"):
            script.train(small(folder), images=IMAGES)
        assert [path.name for path in folder.iterdir()] == [file]
    with pytest.raises(ValueError, match="has T = 20, not 1000"):
        script.train(Config(epochs=1, batch_size=8, schedule="cosine", out=str(tiny_run),
                            device="cpu"), resume=True, images=IMAGES)
    with pytest.raises(OSError, match="no model file"):
        script.train(small(tmp_path), resume=True, images=IMAGES)


def test_resuming_with_other_images_is_refused(tmp_path):
    """A run stopped in the middle of an epoch has its order of the images; another number of them
    would not fit it. Nothing is written."""
    stop = [True]
    script.train(small(tmp_path), images=IMAGES, stop=stop)  # after one step
    before = [(tmp_path / name).read_bytes() for name in ("model.pt", "last.pt")]
    for images in (pictures(16, size=8), pictures(64, size=8)):
        with pytest.raises(ValueError, match=f"had 32 images, not {len(images)}"):
            script.train(small(tmp_path), resume=True, images=(images, IMAGES[1]))
    assert before == [(tmp_path / name).read_bytes() for name in ("model.pt", "last.pt")]


def test_diverged_run_keeps_the_last_good_files(tmp_path, monkeypatch):
    """A loss that is not finite stops the run, names epoch and step, and saves nothing."""
    script.train(small(tmp_path, epochs=1), images=IMAGES)
    before = [(tmp_path / name).read_bytes() for name in ("model.pt", "last.pt")]
    state = load_checkpoint(tmp_path / "last.pt").state
    state["config"]["epochs"] = 2
    state["weights"]["stem.bias"].fill_(math.nan)
    save(tmp_path / "last.pt", state)
    before[1] = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(FloatingPointError, match="finite in epoch 2, step 4"):
        script.train(small(tmp_path, epochs=2), resume=True, images=IMAGES)
    assert before == [(tmp_path / name).read_bytes() for name in ("model.pt", "last.pt")]


# ------------------------------------------------------------------------------------ model files

def test_model_file_holds_the_averaged_weights(tiny_run):
    """load_checkpoint gives the average in eval mode, the schedule, configuration and history."""
    checkpoint, state = load_checkpoint(tiny_run / "model.pt"), load_checkpoint(tiny_run / "last.pt").state
    assert not checkpoint.model.training
    for k, v in checkpoint.model.state_dict().items():
        assert torch.equal(v, state["average"][k])
    assert not torch.equal(state["average"]["stem.weight"], state["weights"]["stem.weight"])
    assert checkpoint.schedule.T == checkpoint.config.T == 20
    assert len(checkpoint.history["loss"]) == 1 and len(checkpoint.history["step_loss"]) == 2
    again = load_checkpoint(tiny_run / "last.pt")
    assert torch.equal(again.model.stem.weight, checkpoint.model.stem.weight)


def test_model_file_holds_its_schedule(tmp_path, monkeypatch):
    """A model trained with some betas is sampled with them, and a run that was stopped goes on with
    them, also after the defaults of schedule.py were changed, if need be to impossible ones."""
    script.train(small(tmp_path), images=IMAGES, stop=[True])
    before = load_checkpoint(tmp_path / "model.pt").schedule
    for beta_end in (0.03, 0.001):
        changed = (1000, "linear", 1e-4, beta_end, False)
        monkeypatch.setattr(script.NoiseSchedule.__init__, "__defaults__", changed)
        after = load_checkpoint(tmp_path / "model.pt").schedule
        assert torch.equal(after.beta, before.beta) and after.beta[-1] == 0.02
    with pytest.raises(ValueError, match="of the image is left"):
        script.train(small(tmp_path / "new"), images=IMAGES)
    script.train(small(tmp_path), resume=True, images=IMAGES)
    assert torch.equal(load_checkpoint(tmp_path / "model.pt").schedule.beta, before.beta)


def test_network_is_made_for_the_size_of_the_images(tmp_path):
    """Trained on 8x8 pictures, the network has learned images of 4x4 and 2x2, and its file says so."""
    script.train(small(tmp_path, epochs=1), images=IMAGES)
    model = load_checkpoint(tmp_path / "model.pt").model
    assert model.config["size"] == 8
    assert [halve.place.shape[-1] for halve in model.down] == [4, 2]


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    """When the disk fills up in the middle, the old file is whole and no half file stays."""
    path = tmp_path / "model.pt"
    save(path, {"format": 1})

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(torch, "save", full)
        save(path, {"format": 2})
    assert torch.load(path) == {"format": 1}
    assert list(tmp_path.iterdir()) == [path]


class Evil:
    def __reduce__(self):
        return print, ("code from a model file was run",)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "hello", "start", "foreign",
                                    "tensor", "code", "other size", "other options"])
def test_damaged_model_files_are_refused(damage, tiny_run, tmp_path, capsys):
    """One line that names the file, whatever is wrong with it; code in it is never run."""
    path = tmp_path / "model.pt"
    good = (tiny_run / "model.pt").read_bytes()
    if damage == "other size":
        state = torch.load(tiny_run / "model.pt")
        state["network"]["channels"] = [16, 16, 16]
        save(path, state)
    elif damage == "other options":
        state = torch.load(tiny_run / "model.pt")
        state["network"]["depth"] = 3
        save(path, state)
    elif damage == "foreign":
        torch.save({"weight": torch.zeros(3)}, path)
    elif damage == "tensor":
        torch.save(torch.zeros(3), path)
    elif damage == "code":
        path.write_bytes(pickle.dumps(Evil(), protocol=2))
    elif damage != "missing":
        path.write_bytes({"empty": b"", "truncated": good[:len(good) // 2]}.get(
            damage, damage.encode()))
    with pytest.raises((ValueError, OSError)) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert "code from" not in capsys.readouterr().out


def test_shipped_model_was_trained_with_the_defaults():
    """python train.py trains the shipped model again: its options and its network are the defaults.

    Its history is whole: 15 epochs of 468 steps.
    """
    checkpoint = load_checkpoint(SHIPPED)
    assert checkpoint.config == Config()
    with torch.device("meta"):
        assert checkpoint.model.config == script.UNet().config
    assert [len(checkpoint.history[k]) for k in ("loss", "held_out", "seconds", "step_loss")] == [
        15, 15, 15, 15 * 468]


# ----------------------------------------------------------------------------- the command line

def test_blog_loss_has_the_ends_that_were_published():
    """Fifteen numbers that fall from 0.2203 to 0.0619."""
    assert len(BLOG_LOSS) == 15 and (BLOG_LOSS[0], BLOG_LOSS[-1]) == (0.2203, 0.0619)
    assert list(BLOG_LOSS) == sorted(BLOG_LOSS, reverse=True)

def test_command_trains_reports_and_says_what_comes_next(tmp_path, capsys):
    """One line an epoch with our loss and the blog's; at the end the command for samples."""
    write_mnist(tmp_path, pictures(16), torch.zeros(16))
    out = tmp_path / "run"
    script.main(["--data", str(tmp_path), "--out", str(out), "--epochs", "1", "--batch-size", "8",
                 "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"looking for MNIST in {tmp_path}", f"MNIST, on cpu, into {out}"]
    assert lines[2].startswith("epoch  1/1   loss ") and f"{BLOG_LOSS[0]:.4f}" in lines[2]
    assert lines[-1].endswith(f"python sample.py --checkpoint {out / 'model.pt'}")
    # Resuming a finished run with the options it was begun with is no error and changes nothing.
    shutil.copy(out / "model.pt", tmp_path / "copy.pt")
    script.main(["--data", str(tmp_path), "--out", str(out), "--resume", "--batch-size", "8"])
    assert (tmp_path / "copy.pt").read_bytes() == (out / "model.pt").read_bytes()
