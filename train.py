"""Part 2, continued. Training: show the network noisy digits and ask which noise was added.

    python train.py                        15 epochs on MNIST, into runs/mnist/
    python train.py --data DIR             with MNIST that is already in DIR/MNIST/raw
    python train.py --resume               go on with a run that was stopped

One step of training is Algorithm 1 of [DDPM]:

    1. take a batch of digits x₀
    2. draw a noise level t for each, uniformly from 1..T, and standard normal noise ε
    3. make the noisy images x_t = √ᾱ_t x₀ + √(1-ᾱ_t) ε                      (schedule.q_sample)
    4. let the network look at x_t and t and guess the noise: ε_θ(x_t, t)
    5. move the weights a little along the negative gradient of the mean of (ε - ε_θ)²

The loss starts at 1, the variance of the noise, because an untrained network answers 0. It falls
below 0.1 within the first hundred steps and then ever more slowly. It never reaches 0: from a
noisy image nobody can tell exactly which part of it is noise. Most of the loss is this unavoidable
part, so what is still learned late in training changes only its third and fourth decimal.

Each epoch prints the training loss (the mean over its steps), the held-out loss (averaged weights,
digits not trained on, the same noise every time) and the blog's. Two files are written:

    model.pt    the averaged weights, for sample.py and plots.py
    last.pt     everything that is needed to go on as if training had never stopped

Sources: [DDPM] Ho et al. 2020, arXiv 2006.11239. [VDM] Kingma et al. 2021, arXiv 2107.00630.
"""

import argparse
import copy
import ctypes
import dataclasses
import math
import os
import pickle
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.datasets import MNIST
from tqdm import tqdm

from schedule import NoiseSchedule
from unet import UNet

HERE = Path(__file__).resolve().parent

# Mean training loss of epochs 1..15, from Part 3 of the blog series that the README names.
BLOG_LOSS = (0.2203, 0.1124, 0.0987, 0.0889, 0.0839, 0.0779, 0.0756, 0.0727, 0.0716, 0.0693,
             0.0686, 0.0670, 0.0644, 0.0632, 0.0619)


def option(default, text: str, low=None, high=None):
    """A field of Config; its explanation is also its help, its range is checked."""
    return dataclasses.field(default=default, metadata={"help": text, "range": (low, high)})


@dataclass
class Config:
    """One training run; the command line is made from it. Raises ValueError for absurd values."""

    # What to compute. Saved with the model, and the same when a run is resumed.
    epochs: int = option(15, "passes over the training images", 1, 10**6)
    batch_size: int = option(128, "images per step", 1, 10**6)
    lr: float = option(2e-3, "peak learning rate of Adam", 1e-9, 1)
    warmup: float = option(0.04, "share of the steps in which the rate rises to its peak", 0, 1)
    ema: float = option(0.999, "decay of the weight average, per step", 0, 0.999999)
    clip: float = option(1.0, "greatest length of the gradient", 1e-9, math.inf)
    T: int = option(1000, "noisy steps", 2, 10**6)
    schedule: str = option("linear", "noise schedule, linear or cosine")
    seed: int = option(0, "seed of weights, order of the images, and all noise", 0, 2**63 - 1)
    val_images: int = option(0, "hold out the last N training images, not the test set", 0, 10**6)

    # Where to compute it. Not saved: another machine has other folders.
    data: str = option(str(HERE / "data"), "folder that holds MNIST/raw, or where to download it")
    out: str = option(str(HERE / "runs" / "mnist"), "folder for model.pt and last.pt")
    device: str = option("auto", "cuda, mps or cpu; auto takes the first that is there")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, (low, high) = getattr(self, field.name), field.metadata["range"]
            if low is not None and not low <= value <= high:  # NaN fails too
                raise ValueError(f"{field.name} must be between {low} and {high}, not {value}")
        NoiseSchedule(self.T, self.schedule)  # raises with advice of its own


def load_images(data: str | Path = HERE / "data", train: bool = True,
                download: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """All MNIST images of one split, from DATA/MNIST/raw, downloaded if they are not there.

    Returns images, uint8 (N, 1, 28, 28), and labels, int64 (N,). As bytes all of MNIST is 55 MB
    and stays in memory. Raises RuntimeError if MNIST is neither there nor to be downloaded.
    """
    try:
        dataset = MNIST(data, train=train, download=download)  # downloads only what is missing
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        reason = (str(error).splitlines() or ["?"])[0]
        raise RuntimeError(
            f"no MNIST in {Path(data) / 'MNIST' / 'raw'}, and no download ({reason}); put there, "
            "unpacked, train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, "
            "t10k-labels-idx1-ubyte from https://ossci-datasets.s3.amazonaws.com/mnist/, or name "
            "the folder that has them with --data DIR") from error
    return dataset.data[:, None], dataset.targets


def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """Bytes 0..255 to float32 in [-1, 1], the range in which the noise schedule is meant.

    The background of MNIST is then exactly -1. Digits are not flipped or turned to get more of
    them: a mirrored 2 is not a digit.
    """
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """The inverse of from_uint8. Values beyond [-1, 1] saturate; a bare cast would wrap around."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def draw_t(count: int, T: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels for a batch: each uniform on 1..T, together evenly spread.    [compare VDM]

    Independent draws leave gaps, and as the loss is largest at small t, a batch with more of them
    looks worse than it is. So 1..T is cut into `count` equal strata, one draw is made in each, and
    they are dealt to the images at random. The expected gradient is the same, its noise smaller.
    """
    stratum = torch.randperm(count, generator=generator)
    within = torch.rand(count, generator=generator, dtype=torch.float64)
    # (stratum + within) / count is uniform on [0, 1). The clamp guards against rounding up to 1.
    return (1 + (stratum + within) / count * T).long().clamp(max=T)


def learning_rate(step: int, steps: int, config: Config) -> float:
    """The learning rate of step 0..steps-1: a straight rise, then half a cosine down to 0.

    Adam moves a weight by this rate times the running mean of its gradient over the root of that of
    its squares; means of few steps say little, hence the rise. The fall lets the weights settle.
    """
    rise = max(1, round(config.warmup * steps))
    fall = 0.5 * (1 + math.cos(math.pi * max(0, step - rise) / max(1, steps - rise)))
    return config.lr * min(1.0, (step + 1) / rise) * fall


@torch.no_grad()
def update_average(average: UNet, model: UNet, step: int, decay: float) -> None:
    """Move the averaged weights a little towards the current ones, after step 0, 1, 2, ...

    The weights jitter around a good place, and their average is nearer to it than any one of them.
    At the beginning an average over 1,000 steps would be mostly the random initial weights, so the
    decay starts at 0.1 and rises, to 0.9987 after 7,020 steps. Longer runs reach the 0.999.
    """
    decay = min(decay, (1 + step) / (10 + step))
    for mean, weight in zip(average.parameters(), model.parameters()):
        mean.lerp_(weight, 1 - decay)  # mean = decay * mean + (1 - decay) * weight


@torch.no_grad()
def evaluate(model: torch.nn.Module, schedule: NoiseSchedule, images: torch.Tensor,
             batch_size: int = 500) -> float:
    """Mean squared error of the predicted noise, the same measurement every time. [DDPM Eq. 14]

    Image i of images, uint8 (N, 1, 28, 28), is seen at t = 1 + i mod T with fixed noise. The loss
    of a random batch depends more on which t it drew than on the network. Here all t count alike,
    and two numbers can be compared.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    t = 1 + torch.arange(len(images)) % schedule.T
    total = 0.0
    for i in range(0, len(images), batch_size):
        part = slice(i, i + batch_size)
        xt = schedule.q_sample(from_uint8(images[part]), t[part], eps[part])
        eps_hat = model(xt.to(device), t[part].to(device)).cpu()
        total += (eps[part] - eps_hat).square().sum(dtype=torch.float64).item()
    model.train(was_training)
    return total / images.numel()


@dataclass
class Checkpoint:
    """What a model file holds. The model has the averaged weights and is in eval mode."""
    model: UNet
    schedule: NoiseSchedule
    config: Config
    history: dict[str, list[float]]


def save(path: Path, state: dict) -> None:
    """Write a file beside the old one, which it replaces only when it is complete."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read(path: str | Path) -> dict:
    """Read a model file: plain tensors and numbers, never code (weights_only)."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no model file {path}; python train.py makes one") from None
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, pickle.UnpicklingError):
        state = None
    if not isinstance(state, dict) or state.get("format") != 1:
        raise ValueError(f"{path} is damaged or not a model file of this project; train a new one")
    return state


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Rebuild network and schedule from a model.pt or last.pt; ValueError if it is none."""
    state = read(path)
    try:
        with torch.device("meta"):  # shapes only: random weights would be overwritten at once
            model = UNet(**state["network"])
        model.load_state_dict(state["average"], assign=True)
        config = Config(**state["config"])
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"{path} does not fit unet.py and train.py; they were changed after it "
                         "was trained, so train again") from None
    return Checkpoint(model.eval(), NoiseSchedule(config.T, config.schedule), config,
                      state["history"])


def pick_device(name: str) -> torch.device:
    """The device of that name, or ValueError; "auto" is the first of cuda, mps, cpu there is."""
    there = [device for device, here in (("cuda", torch.cuda.is_available()),
             ("mps", torch.backends.mps.is_available()), ("cpu", True)) if here]
    name = there[0] if name == "auto" else name
    if name.split(":")[0] not in there:
        raise ValueError(f"device {name!r} is not available; here: auto, {', '.join(there)}")
    torch.backends.cudnn.allow_tf32 = False  # float32 on every device, not 10 bits of it on GPUs
    if name == "cpu" and sys.platform == "linux":
        # The C library would give the memory of each layer back to Linux and then get it again,
        # zeroed, for the next. Keeping it makes sampling on two cores 1.5 times as fast.
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep up to 2 GiB
        ctypes.CDLL(None).mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: ask the heap, not Linux
    return torch.device(name)


def require_finite(loss: float, epoch: int, i: int) -> None:
    """Stop before a diverged network is saved over a good one."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss became {loss} in epoch {epoch + 1}, step {i + 1}; good "
                                 "files are kept; train anew with a lower --lr and another --out")


def train_epoch(epoch: int, model: UNet, average: UNet, optimizer: torch.optim.Adam,
                schedule: NoiseSchedule, digits: torch.Tensor, generator: torch.Generator,
                config: Config) -> list[float]:
    """One pass over the digits; returns the loss of each step.              [DDPM Algorithm 1]"""
    device = next(model.parameters()).device
    size = config.batch_size
    steps = len(digits) // size  # the incomplete last batch is dropped
    order = torch.randperm(len(digits), generator=generator)
    losses = []
    model.train()
    with tqdm(total=steps * size, desc=f"epoch {epoch + 1}/{config.epochs}", unit=" images",
              leave=False, disable=None) as bar:
        for i in range(steps):
            # The numbers are those of the list at the top of this file.
            x0 = from_uint8(digits[order[i * size:(i + 1) * size]])                            # 1
            t = draw_t(size, schedule.T, generator)                                            # 2
            eps = torch.randn(x0.shape, generator=generator)
            xt = schedule.q_sample(x0, t, eps)                                                 # 3
            eps_hat = model(xt.to(device), t.to(device))                                       # 4
            loss = F.mse_loss(eps_hat, eps.to(device))                           # [DDPM Eq. 14]
            optimizer.zero_grad()                                                              # 5
            loss.backward()
            # A rare batch with a huge gradient must not throw the weights far off.
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            step = epoch * steps + i
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.epochs * steps, config)
            optimizer.step()
            update_average(average, model, step, config.ema)

            losses.append(loss.detach())
            if i % 20 == 19:  # now and then: reading a number off a GPU waits for it
                recent = torch.stack(losses[-20:]).mean().item()
                require_finite(recent, epoch, i)
                bar.set_postfix(loss=f"{recent:.4f}")
            bar.update(size)
    return torch.stack(losses).tolist()


def train(config: Config, resume: bool = False,
          images: tuple[torch.Tensor, torch.Tensor] | None = None) -> dict[str, list[float]]:
    """Train a UNet and write model.pt and last.pt into config.out after every epoch.

    config  what to train, and where
    resume  go on from config.out/last.pt, bit for bit as if never stopped
    images  training and held-out images, uint8 (N, 1, 28, 28) each; MNIST if None

    Returns the history: lists "loss", "held_out" and "seconds" by epoch, "step_loss" by step.
    Raises ValueError, RuntimeError, FloatingPointError or OSError.
    """
    out, last = Path(config.out), Path(config.out) / "last.pt"
    if last.exists() and not resume:
        raise ValueError(f"{out} holds a run already; go on with it by --resume, or name another "
                         "folder by --out")
    device = pick_device(config.device)
    if images is None:
        images = load_images(config.data)[0], load_images(config.data, train=False)[0]
    digits, held_out = images
    if config.val_images:
        digits, held_out = digits[:-config.val_images], digits[-config.val_images:]
    if len(digits) < config.batch_size or len(held_out) == 0:
        raise ValueError(f"{len(digits)} training images are too few for batches of "
                         f"{config.batch_size}; lower batch_size or val_images")

    # Where to start: at random weights, or where last.pt left off.
    state = read(last) if resume else {"config": {}, "network": {}}
    for name, value in state["config"].items():
        if getattr(config, name) != value:
            raise ValueError(f"the run in {out} has {name} = {value}, not "
                             f"{getattr(config, name)}; resume it without that option")
    # The weights come from the global generator, which is put back as it was found. All else comes
    # from one generator of our own. It lives on the CPU, so every device sees the same noise.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        model = UNet(**state["network"])
    average = copy.deepcopy(model).requires_grad_(False).to(device)
    model.to(device)
    # Adam's second decay rate (a "beta" too, but not β_t) is 0.99, not the usual 0.999: in a short
    # run the gradients change quickly, and it forgets old ones within about 100 steps.
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=(0.9, 0.99), fused=True)
    generator = torch.Generator().manual_seed(config.seed)
    history = {"loss": [], "held_out": [], "seconds": [], "step_loss": []}
    if resume:
        model.load_state_dict(state["weights"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["adam"])
        generator.set_state(state["generator"])
        history = state["history"]

    schedule = NoiseSchedule(config.T, config.schedule)
    out.mkdir(parents=True, exist_ok=True)
    for epoch in range(len(history["loss"]), config.epochs):
        start = time.perf_counter()
        losses = train_epoch(epoch, model, average, optimizer, schedule, digits, generator, config)
        history["loss"].append(sum(losses) / len(losses))
        history["held_out"].append(evaluate(average, schedule, held_out))
        history["seconds"].append(time.perf_counter() - start)
        history["step_loss"].extend(losses)
        require_finite(history["loss"][-1] + history["held_out"][-1], epoch, len(losses) - 1)
        blog = f"{BLOG_LOSS[epoch]:.4f}" if epoch < len(BLOG_LOSS) else "-"
        print(f"epoch {epoch + 1:2d}/{config.epochs}   loss {history['loss'][-1]:.4f}   "
              f"held-out {history['held_out'][-1]:.4f}   {history['seconds'][-1]:4.0f} s   "
              f"blog's loss {blog}", flush=True)

        what = {k: v for k, v in vars(config).items() if k not in ("data", "out", "device")}
        result = dict(format=1, config=what, network=model.config, history=history,
                      average={k: v.cpu() for k, v in average.state_dict().items()})
        save(out / "model.pt", result)
        save(last, dict(result, weights=model.state_dict(), adam=optimizer.state_dict(),
                        generator=generator.get_state()))
    return history


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a diffusion model on MNIST.")
    for field in dataclasses.fields(Config):
        # SUPPRESS tells options that were given from defaults; --resume needs to know.
        parser.add_argument("--" + field.name.replace("_", "-"), type=field.type, metavar="",
                            default=argparse.SUPPRESS,
                            help=f"{field.metadata['help']} (default: {field.default})")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out; "
                        "options that are given must be those it was begun with")
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    try:
        config = Config(**given)
    except ValueError as error:
        parser.error(str(error))
    try:
        if resume:
            config = Config(**{**read(Path(config.out) / "last.pt")["config"], **given})
        train(config, resume)
    except KeyboardInterrupt:
        how = ("the same command with --resume goes on from the last epoch that was finished"
               if (Path(config.out) / "last.pt").exists() else "no epoch was finished")
        print(f"\nstopped; {how}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    print(f"done; now type: python sample.py --checkpoint {Path(config.out) / 'model.pt'}")


if __name__ == "__main__":
    main()
