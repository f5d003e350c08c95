"""Each row of the ablation table changes what its name says, and nothing else."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import train
from schedule import NoiseSchedule
from tests.experiments import ablations
from tests.experiments.ablations import CHANGES, judge, step_times, table, train_row
from tests.experiments.benchmark import multiply_adds
from tests.experiments.test_measure import Sure
from tests.experiments.yardstick import load_classifier, look
from tests.strategies import normal, pictures
from unet import Attention, UNet, timestep_embedding

pytestmark = pytest.mark.slow

IMAGES = pictures(24, 8), pictures(8, 8)
SMALL = {"batch_size": 8, "device": "cpu"}  # three steps an epoch


def built(name: str) -> nn.Module:
    """The network of a row, with all weights drawn anew, so that none is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CHANGES[name].network()
        for p in model.parameters():
            nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> tuple[dict, dict]:
    """The numbers of the first row, trained for one epoch, and its history."""
    out = tmp_path_factory.mktemp("recipe")
    row = train_row("the recipe", "", 1, out, images=IMAGES, **SMALL)
    return row, train.load_checkpoint(out / "model.pt").history


def layers(model: nn.Module) -> dict[type, int]:
    """How many layers there are of each kind, those inside an attention not counted."""
    inside = {part for attention in model.modules() if isinstance(attention, Attention)
              for part in attention.modules() if part is not attention}
    return {kind: sum(type(module) is kind and module not in inside for module in model.modules())
            for kind in (nn.Conv2d, nn.Linear, nn.GroupNorm, Attention)}


@pytest.mark.parametrize("name, kind", [("no GroupNorm", nn.GroupNorm),
                                        ("no attention", Attention)])
def test_layers_of_a_kind_are_gone(name, kind):
    """None of that kind is left, and all layers of every other kind are. (Without GroupNorm, the
    one inside an attention is gone, too.)
    """
    whole = layers(built("the recipe"))
    model = built(name)
    assert not any(isinstance(module, kind) for module in model.modules())
    assert whole[kind] > 0 and layers(model) == whole | {kind: 0}


def test_t_reaches_the_output_through_the_bottleneck_alone():
    """The output of that row's network depends on t, but not if the bottleneck ignores t."""
    model = built("t told only at the bottleneck")
    x = normal(0, 2, 1, 8, 8, dtype=torch.float32)
    early, late = (model(x, torch.tensor([t, t])) for t in (1, 900))
    assert not torch.allclose(early, late, atol=1e-3)
    for stage in (model.encoder[-1], model.decoder[-1]):
        for block in stage:
            nn.init.zeros_(block.film.weight)
    early, late = (model(x, torch.tensor([t, t])) for t in (1, 900))
    assert torch.equal(early, late)


def test_learned_images_are_gone():
    """That row's network is ours with learned images of zero, for which it has no weights."""
    cut = built("no learned images")
    whole = built("the recipe")
    for halve in whole.down:
        nn.init.zeros_(halve.place)
    weights = {name.replace(".weight", ".conv.weight") if "down" in name else name: weight
               for name, weight in cut.state_dict().items()}
    missing = whole.load_state_dict(weights, strict=False)
    assert missing.missing_keys == ["down.0.place", "down.1.place"]
    assert not missing.unexpected_keys
    x = normal(0, 2, 1, 28, 28, dtype=torch.float32)
    t = torch.tensor([1, 900])
    with torch.no_grad():
        assert torch.equal(cut(x, t), whole(x, t))


def test_slim_network_has_as_many_parameters_elsewhere():
    """One attention instead of two, 24 channels at 28x28 instead of 32, and yet 324,705 parameters.
    """
    model = built("fewer channels at 28x28")
    assert sum(p.numel() for p in model.parameters()) == 324_705
    assert sum(isinstance(module, Attention) for module in model.modules()) == 1
    assert model.stem.weight.shape[0] == 24 and model.head[-1].weight.shape[1] == 24
    with torch.random.fork_rng(devices=[]):
        again = CHANGES["fewer channels at 28x28"].network(**model.config)
    again.load_state_dict(model.state_dict())


def test_twice_through_the_bottleneck_is_the_plain_loop():
    """It computes what a loop over the layers of the default network computes that goes through
    those at 7x7 twice. A copy of it uses the weights of the copy.
    """
    model = built("7x7 layers twice")
    plain = built("the recipe")
    with torch.no_grad():
        for mine, other in zip(plain.parameters(), model.parameters(), strict=True):
            mine.copy_(other)
    xt = normal(0, 2, 1, 28, 28, dtype=torch.float32)
    t = torch.tensor([5, 700])

    @torch.no_grad()
    def by_hand(net: UNet) -> torch.Tensor:
        fine, middle, _ = net.encoder
        time = net.time_mlp(timestep_embedding(t, 80))
        a = fine[0](net.stem(xt), time)
        b = middle[0](net.down[0](a), time)
        x = net.down[1](b)
        for _ in range(2):
            x = net.encoder[2][1](net.encoder[2][0](x, time), time)
            x = net.merge[2](torch.cat([net.attention[0](x), x], dim=1))
            x = net.attention[1](net.decoder[2][1](net.decoder[2][0](x, time), time))
        for level, kept in ((1, b), (0, a)):
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = net.decoder[level][0](net.merge[level](torch.cat([x, kept], dim=1)), time)
        echo, scale = net.gain(time).T.reshape(2, 2, 1, 1, 1)
        return echo * xt + (1 + scale) * net.head(x)

    with torch.no_grad():
        assert torch.allclose(model(xt, t), by_hand(plain), atol=1e-5)
        other = copy.deepcopy(model)
        other.merge[2].weight.mul_(2)
        plain.merge[2].weight.mul_(2)
        assert torch.allclose(other(xt, t), by_hand(plain), atol=1e-5)
        assert not torch.allclose(model(xt, t), by_hand(plain), atol=1e-3)


def test_early_merge_is_the_same_function():
    """With the weights of the default network it computes the same, with fewer multiply-adds."""
    model = built("1x1 convolutions before enlarging")
    plain = built("the recipe")
    plain.load_state_dict(model.state_dict())
    # At 28x28 and at 14x14, the image from below has only a quarter of the pixels.
    saved = 3 / 4 * (28**2 * 32 * 32 + 14**2 * 48 * 32)
    assert multiply_adds(plain) - multiply_adds(model) == saved
    xt = normal(0, 2, 1, 28, 28)
    t = torch.tensor([5, 700])
    with torch.no_grad():
        assert torch.allclose(model.double()(xt, t), plain.double()(xt, t), rtol=1e-12, atol=1e-12)


def test_step_times_are_in_units_of_the_recipe():
    """Every row has a time; it is 1 for the recipe, and for other rows that train its network."""
    times = step_times(normal(0, 2, 1, 8, 8, dtype=torch.float32), rounds=1)
    assert list(times) == list(CHANGES)
    same = {name for name, change in CHANGES.items() if change.network is UNet}
    assert {name for name, time in times.items() if time == 1} >= same
    assert min(times.values()) > 0


def test_judge_sees_what_a_network_draws():
    """A network that is sure of one digit draws nothing else. If all test images are another one,
    the distance is that of the two digits' features, the share of clear digits is 0 or 1 as the
    classifier says, and the loss is the squared error of x0, weighted at each t.
    """
    schedule = NoiseSchedule()
    digits, _ = train.builtin_digits(4, seed=3)
    features, probabilities = look(load_classifier(), digits)
    for mine, other in ((0, 1), (2, 3)):
        model = Sure(schedule, train.from_uint8(digits[mine:mine + 1]))
        real = digits[other:other + 1].repeat(1000, 1, 1, 1)
        checkpoint = train.Checkpoint(model, schedule, train.Config(dataset="builtin"), {}, [], {})
        row = judge(checkpoint, real, count=6)
        assert row["count"] == 6 and row["clear"] == float(probabilities[mine].max() > 0.9)
        square = (features[mine] - features[other]).square().sum().item()
        assert math.isclose(row["distance"], square, rel_tol=1e-3)
        difference = train.from_uint8(digits[mine]) - train.from_uint8(digits[other])
        signal = schedule.alpha_bar[131:601]
        weight = (signal / (1 - signal)).mean().item()
        expected = weight * difference.double().square().mean().item()
        assert math.isclose(row["decisive_loss"], expected, rel_tol=1e-4)


def test_independent_t_is_uniform():
    """All of 1..T are drawn, equally often, and not one in each stratum."""
    t = ablations.independent(40_000, 10, torch.Generator().manual_seed(0))
    counts = t.bincount(minlength=11)
    assert counts[0] == 0 and (counts[1:] - 4000).abs().max() < 5 * 4000**0.5
    batches = ablations.independent(500, 1000, torch.Generator().manual_seed(1)).split(100)
    strata = [{(t - 1) // 10 for t in batch.tolist()} for batch in batches]
    assert any(len(occupied) < 100 for occupied in strata)


@pytest.mark.parametrize("name", CHANGES)
def test_each_row_trains_in_its_own_way(name, recipe, tmp_path):
    """Three steps of each row leave other losses than those of the recipe, which stay as they are.
    A finished row is read again, not trained again.
    """
    row = train_row(name, "", 1, tmp_path, images=IMAGES, **SMALL)
    assert row["name"] == name and len(row["held_out"]) == len(row["seconds"]) == 1
    history = ablations.load(name, tmp_path / "model.pt").history
    losses = history["step_loss"], row["held_out"]
    expected = recipe[1]["step_loss"], recipe[0]["held_out"]
    if name == "1x1 convolutions before enlarging":  # the same function, but for rounding
        assert losses[0] == pytest.approx(expected[0]) and losses[1] == pytest.approx(expected[1])
    else:
        assert (losses == expected) == (name == "the recipe")
    if name not in ("no GroupNorm", "no attention"):
        learned_images = 32 * 14**2 + 48 * 7**2
        absent = learned_images if name == "no learned images" else 0
        assert row["parameters"] == 324_705 - absent
    assert train_row(name, "", 1, tmp_path, images=IMAGES, **SMALL) == row


@pytest.mark.parametrize("name", CHANGES)
def test_each_row_gives_train_what_it_names(name, tmp_path):
    """The run is made of the network, the draws of t, the learning rate and the options of its row,
    and of those of the recipe for everything else.
    """
    runs = []

    def keep_and_stop(run: train.Run) -> bool:
        runs.append(run)
        return True

    train_row(name, "", 1, tmp_path, images=IMAGES, after_step=keep_and_stop, **SMALL)
    (run,) = runs
    change = CHANGES[name]
    assert run.draw_t is change.seams.get("draw_t", train.draw_t)
    assert run.learning_rate is change.seams.get("learning_rate", train.learning_rate)
    with torch.random.fork_rng(devices=[]):
        shapes = {key: p.shape for key, p in change.network(size=8).state_dict().items()}
    assert {key: p.shape for key, p in run.model.state_dict().items()} == shapes
    options = {"dataset": "mnist", "epochs": 1, "out": str(tmp_path), "data": ""}
    assert run.config == train.Config(**options | SMALL | change.options)


def test_model_of_the_blogs_network_can_be_loaded(tmp_path):
    """It measures what its training measured; load_checkpoint alone refuses it."""
    name = "the blog's network and recipe"
    row = train_row(name, "", 1, tmp_path, images=IMAGES, **SMALL)
    checkpoint = ablations.load(name, tmp_path / "model.pt")
    loss = train.evaluate(checkpoint.model, checkpoint.schedule, IMAGES[1])
    assert loss == row["held_out"][0]
    with pytest.raises(ValueError):
        train.load_checkpoint(tmp_path / "model.pt")


def test_changes_of_the_recipe_are_in_effect(tmp_path):
    """The learning rate is 2e-4 in every step; without an average, it is the weights themselves."""
    rates = []
    train_row("learning rate 2e-4 throughout", "", 1, tmp_path / "a", images=IMAGES,
              after_step=lambda run: rates.append(run.adam.param_groups[0]["lr"]), **SMALL)
    assert rates == [2e-4] * 3
    train_row("no average of the weights", "", 1, tmp_path / "b", images=IMAGES, **SMALL)
    state = torch.load(tmp_path / "b" / "last.pt", weights_only=True)
    assert all(torch.equal(state["weights"][k], v) for k, v in state["average"].items())


def test_table_has_a_line_for_each_row():
    """Losses to four digits, after epoch 3 and after the last; a run that diverged says so."""
    lines = table([
        {"name": "a", "held_out": [0.5, 0.02344], "seconds": [10, 20], "parameters": 1234,
         "macs": 2_500_000, "epochs": 2, "clear": 0.5321, "distance": 12.34,
         "decisive_loss": 0.02345, "step": 1.234},
        {"name": "b", "held_out": [], "seconds": [], "parameters": 5, "macs": 0, "epochs": 2},
        {"name": "c", "held_out": [0.5, 0.4, 0.3, 0.2], "seconds": [9], "parameters": 5, "macs": 0,
         "epochs": 4},
    ]).splitlines()
    assert lines[2:] == [
        "| a | 0.0234 | 0.0234 | 53.2 % | 12.3 | 1.23 | 1,234 | 2.5 M |",
        "| b | diverged |  |  |  |  | 5 | 0.0 M |",
        "| c | 0.3000 (0.2000 after epoch 4) |  |  |  |  | 5 | 0.0 M |"]


@pytest.mark.skipif(not ablations.RESULTS.exists(), reason="not measured yet")
def test_readme_shows_what_was_measured():
    """The table in README.md is the one made from pretrained/ablations.json."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    assert table(ablations.measured()) in text
