"""Each row of the ablation table changes what its name says, and nothing else."""

import pytest
import torch
from torch import nn

import ablations
import train as script
from ablations import CHANGES, run, table
from strategies import normal, pictures
from unet import Attention


def built(name: str) -> nn.Module:
    """The network of a row, with all weights drawn anew, so that none is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CHANGES[name].get("UNet", script.UNet)()
        for p in model.parameters():
            nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.mark.parametrize("name, kind", [("no GroupNorm", nn.GroupNorm), ("no attention", Attention)])
def test_layers_of_a_kind_are_gone(name, kind):
    """Of that kind none is left, and of every other kind of layer all are."""
    def count(model):
        kinds = [type(m) for m in model.modules() if not isinstance(m, nn.Identity)]
        inside = {nn.Conv2d: 8, nn.GroupNorm: 2} if kind is Attention else {}  # of two attentions
        return {k: kinds.count(k) - inside.get(k, 0) * any(isinstance(m, kind) for m in model.modules())
                for k in (nn.Conv2d, nn.Linear, nn.GroupNorm, Attention)}

    whole, cut = count(built("the recipe")), count(built(name))
    assert cut.pop(kind) == 0 < whole.pop(kind) and cut == whole


def test_t_reaches_the_output_through_the_bottleneck_alone():
    """With that row's network the output depends on t; no longer when the bottleneck ignores t."""
    model, x = built("t told only at the bottleneck"), normal(0, 2, 1, 8, 8, dtype=torch.float32)
    outputs = [model(x, torch.tensor([t, t])) for t in (1, 900)]
    assert not torch.allclose(*outputs, atol=1e-3)
    for blocks in (model.encoder[-1], model.decoder[-1]):
        for block in blocks:
            nn.init.zeros_(block.film.weight)
    outputs = [model(x, torch.tensor([t, t])) for t in (1, 900)]
    assert torch.equal(*outputs)


def test_learned_images_are_gone():
    """That row's network is ours with learned images of zero, which it has no weights for."""
    cut, x = built("no learned images"), normal(0, 2, 1, 28, 28, dtype=torch.float32)
    whole = built("the recipe")
    nn.init.zeros_(whole.down[0].place), nn.init.zeros_(whole.down[1].place)
    missing = whole.load_state_dict({name.replace(".weight", ".conv.weight") if "down" in name
                                     else name: p for name, p in cut.state_dict().items()}, False)
    assert missing.missing_keys == ["down.0.place", "down.1.place"] and not missing.unexpected_keys
    with torch.no_grad():
        assert torch.equal(cut(x, torch.tensor([1, 900])), whole(x, torch.tensor([1, 900])))


def test_independent_t_is_uniform():
    """All of 1..T, equally often, and not one in each stratum."""
    t = ablations.independent(40_000, 10, torch.Generator().manual_seed(0))
    seen = t.bincount(minlength=11)
    assert seen[0] == 0 and (seen[1:] - 4000).abs().max() < 5 * 4000**0.5
    counts = [t.sort().values.tolist() for t in ablations.independent(
        500, 1000, torch.Generator().manual_seed(1)).split(100)]
    assert any(len(set((k - 1) // 10 for k in part)) < 100 for part in counts)


@pytest.mark.parametrize("name", CHANGES)
def test_each_row_trains_and_leaves_the_scripts_as_they_were(name, tmp_path):
    """Two steps of each; afterwards train.py has its own functions again."""
    before = dict(vars(script))
    row = run(name, "", 1, tmp_path, images=(pictures(16, 8), pictures(8, 8)), batch_size=8,
              device="cpu")
    assert before == dict(vars(script))
    assert row["name"] == name and len(row["held_out"]) == len(row["seconds"]) == 1
    if name not in ("no GroupNorm", "no attention"):
        assert row["parameters"] == 324_705 - (name == "no learned images") * (32 * 14**2 + 48 * 7**2)
    again = run(name, "", 1, tmp_path, images=(pictures(16, 8), pictures(8, 8)), batch_size=8,
                device="cpu")  # finished already: read, not trained
    assert again == row


def test_model_of_the_blogs_network_can_be_loaded(tmp_path):
    """It measures what its training measured; load_checkpoint alone refuses it."""
    name, images = "the blog's network and recipe", (pictures(16, 8), pictures(8, 8))
    row = run(name, "", 1, tmp_path, images=images, batch_size=8, device="cpu")
    checkpoint = ablations.load(name, tmp_path / "model.pt")
    assert script.evaluate(checkpoint.model, checkpoint.schedule, images[1]) == row["held_out"][0]
    with pytest.raises(ValueError):
        script.load_checkpoint(tmp_path / "model.pt")


def test_changes_of_the_recipe_are_in_effect(tmp_path, monkeypatch):
    """The rate is 2e-4 in every step; without an average, it is the weights themselves."""
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *args: (
        rates.append(self.param_groups[0]["lr"]), step(self, *args))[1])
    data = (pictures(24, 8), pictures(8, 8))
    run("learning rate 2e-4 throughout", "", 1, tmp_path / "a", images=data, batch_size=8, device="cpu")
    assert rates == [2e-4] * 3
    run("no average of the weights", "", 1, tmp_path / "b", images=data, batch_size=8, device="cpu")
    state = torch.load(tmp_path / "b" / "last.pt", weights_only=True)
    assert all(torch.equal(state["weights"][k], v) for k, v in state["average"].items())


def test_table_has_a_line_for_each_row():
    """Losses to four digits, after epoch 3 and after the last; a run that diverged says so."""
    lines = table([
        {"name": "a", "held_out": [0.5, 0.02344], "seconds": [10, 20], "parameters": 1234,
         "macs": 2_500_000, "epochs": 2},
        {"name": "b", "held_out": [], "seconds": [], "parameters": 5, "macs": 0, "epochs": 2},
        {"name": "c", "held_out": [0.5, 0.4, 0.3, 0.2], "seconds": [9], "parameters": 5, "macs": 0,
         "epochs": 4},
    ]).splitlines()
    assert lines[2:] == ["| a | 0.0234 | 15 | 1,234 | 2.5 M |", "| b | diverged |  | 5 | 0.0 M |",
                         "| c | 0.3000 (0.2000 after epoch 4) | 9 | 5 | 0.0 M |"]


@pytest.mark.skipif(not ablations.RESULTS.exists(), reason="not measured yet")
def test_readme_shows_what_was_measured():
    """The table in the README is the one made from pretrained/ablations.json."""
    text = (ablations.ROOT / "README.md").read_text(encoding="utf-8")
    assert table(ablations.measured()) in text
