"""Part 2, continued. Training: show the network noisy digits and ask which noise was added.

    python train.py                        15 epochs on MNIST, into runs/mnist/
    python train.py --data DIR             with MNIST that is already in DIR/MNIST/raw
    python train.py --resume               go on with a run that was stopped
    python train.py --quick                a first look, in less than three minutes
    torchrun --nproc-per-node=2 train.py   on two GPUs

One step of training is Algorithm 1 of [DDPM]:

    1. take a batch of digits x₀
    2. draw a noise level t for each, uniformly from 1..T (draw_t), and standard normal noise ε
    3. make the noisy images x_t = √ᾱ_t x₀ + √(1-ᾱ_t) ε                      (schedule.q_sample)
    4. let the network look at x_t and t and guess the noise: ε_θ(x_t, t)
    5. move the weights a little along the negative gradient of the mean of (ε - ε_θ)²

The loss starts at 1, the variance of the noise, because an untrained network answers 0. It falls
below 0.1 within a hundred steps, then ever more slowly, and never to 0: nobody can tell from a
noisy image exactly what of it is noise. What is learned late changes the third and fourth decimal.

Each epoch prints the training loss (the mean over its steps), the held-out loss (digits not trained
on, same noise each time, weights of update_average) and the blog's loss (README.md). It writes
model.pt, last.pt for --resume, and epoch-N.pt, a copy to keep. Ctrl-C writes the first two.

Sources: [DDPM] Ho et al. 2020, arXiv 2006.11239. [VDM] Kingma et al. 2021, arXiv 2107.00630.
"""

import argparse
import copy
import math
import os
import runpy
import signal
import sys
import time
import warnings
from collections import namedtuple
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from schedule import KINDS, NoiseSchedule
from unet import UNet, pick_device

HERE = Path(__file__).resolve().parent
# The blog's mean training loss of epochs 1..15 (Part 3 of the blog; README.md names the series).
BLOG_LOSS = (0.2203, 0.1124, 0.0987, 0.0889, 0.0839, 0.0779, 0.0756, 0.0727, 0.0716, 0.0693,
             0.0686, 0.0670, 0.0644, 0.0632, 0.0619)
DATASETS = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST",
            "builtin": "built-in digits", "folder": "images of a folder"}
Checkpoint = namedtuple("Checkpoint", "model schedule config history state")  # of a model file
QUICK = {"epochs": 1, "batch_size": 32, "lr": 4e-3, "images": 22_400, "val_images": 2_000}


def option(default, text: str, *known):
    """A field of Config: its help, and the names known, or the lowest and highest number."""
    return field(default=default, metadata={"help": text, "known": known})


@dataclass
class Config:
    """One training run; the command line is made from it. Raises ValueError for absurd values."""

    # What to compute. Saved with the model, and the same when a run is resumed.
    dataset: str = option("mnist", f"what to learn: {', '.join(DATASETS)}", *DATASETS)
    epochs: int = option(15, "passes over the training images", 1, 10**6)
    batch_size: int = option(128, "images per step", 1, 10**6)
    lr: float = option(3e-3, "peak learning rate of Adam", 1e-9, 1)
    warmup: float = option(0.04, "share of the steps in which the rate rises to its peak", 0, 1)
    ema: float = option(0.999, "highest decay of the weight average, per step", 0, 0.999999)
    clip: float = option(1.0, "greatest length of the gradient", 1e-9, math.inf)
    T: int = option(1000, "noisy steps", 2, 10**6)
    schedule: str = option("linear", f"noise schedule: {', '.join(KINDS)}", *KINDS)
    seed: int = option(0, "seed of weights, order of the images, and all noise", 0, 2**63 - 1)
    images: int = option(0, "train on the first N images only; 0 takes all", 0, 10**9)
    val_images: int = option(0, "hold out the last N training images, not the test set", 0, 10**6)

    # Where to compute it. Not saved: another machine has other folders.
    data: str = option(str(HERE / "data"), "folder with MNIST/raw, or one of images for each class")
    out: str = option("", "folder for the model files; if empty, runs/DATASET[-IMAGES]")
    device: str = option("auto", "cuda, mps or cpu; auto takes the first that is there")

    def __post_init__(self):
        for f in fields(self):
            name, value, known = f.name, getattr(self, f.name), f.metadata["known"]
            if f.type is str and known and value not in known:
                raise ValueError(f"unknown {name} {value!r}; known are {', '.join(known)}")
            if f.type is not str and not known[0] <= value <= known[1]:  # NaN fails too
                raise ValueError(f"{name} must be between {known[0]} and {known[1]}, not {value}")
        self.out = self.out or str(HERE / f"runs/{self.dataset}-{self.images}".removesuffix("-0"))

    @property
    def like_blog(self) -> bool:  # Else its losses cannot be compared with the blog's.
        return all(vars(self)[k] == vars(Config)[k] for k in ("dataset", "images", "T", "schedule"))


def load_images(data: str | Path = HERE / "data", train: bool = True, dataset: str = "mnist",
                download: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of one split, uint8 (N, 1, 28, 28), and their labels, int64 (N,). Raises
    FileNotFoundError if they are not to be had, ValueError if they are damaged.
    data     a folder with MNIST/raw (FashionMNIST/raw, KMNIST/raw), downloaded if missing
    dataset  of DATASETS; "folder": data is a torchvision ImageFolder, of which a tenth is held out
    """
    from torchvision import datasets, transforms  # here, because it takes seconds to import
    if dataset == "builtin":  # drawn with the fonts of matplotlib
        draw = runpy.run_path(str(HERE / "tests" / "digits.py"))["builtin_digits"]
        return draw(60_000, seed=0) if train else draw(10_000, seed=1)
    if dataset == "folder":
        found = datasets.ImageFolder(data, transforms.Compose(
            [transforms.Grayscale(), transforms.Resize((28, 28)), transforms.PILToTensor()]))
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
        split = [found[i] for k, i in enumerate(order) if (k % 10 > 0) == train]
        images = [image[None] for image, _ in split] or [torch.zeros(0, 1, 28, 28).byte()]
        return torch.cat(images), torch.tensor([label for _, label in split])
    kind = getattr(datasets, DATASETS[dataset])
    raw, names = Path(data, kind.__name__, "raw"), [Path(url).stem for url, _ in kind.resources]
    try:
        with redirect_stdout(None):  # failed attempts are ours to report
            found = kind(data, train=train, download=download)
        if len(found.data) != len(found.targets):
            raise ValueError("not as many labels as images")
    except Exception as error:  # torchvision raises many kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        if all((raw / name).exists() for name in names):
            raise ValueError(f"{raw} is damaged ({reason}); delete it and start again") from error
        raise FileNotFoundError(
            f"no {kind.__name__} in {raw}, and no download ({reason}); put there, unpacked, "
            f"{', '.join(names)} from {kind.mirrors[0]}, or name their folder by --data") from error
    return found.data[:, None], found.targets


def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """Bytes 0..255 to float32 in [-1, 1], the range that the noise schedule is made for."""
    return images.float() / 127.5 - 1


def draw_t(count: int, T: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels for a batch: each uniform on 1..T, together evenly spread.    [compare VDM]

    The loss is largest at small t, where the noise is too faint to be told from the digit. A batch
    with more of these has a higher loss, however good the weights. So 1..T is cut into `count`
    equal strata, one draw in each, dealt to the images at random. The mean gradient is the same,
    its noise smaller; after 3 epochs the loss was 0.4 % lower (one run; seeds differ by 0.3 %)."""
    stratum = torch.randperm(count, generator=generator)
    within = torch.rand(count, generator=generator, dtype=torch.float64)
    # (stratum + within) / count is uniform on [0, 1). The clamp guards against rounding up to 1.
    return (1 + (stratum + within) / count * T).long().clamp(max=T)


def learning_rate(step: int, steps: int, config: Config) -> float:
    """A straight rise, as Adam's running means say little at first; a straight fall, to settle.
    At the blog's constant 2e-4 the held-out loss after 3 epochs is 16 % higher."""
    rise = max(1, round(config.warmup * steps))
    return config.lr * min(1, (step + 1) / rise, (steps - step) / max(1, steps - rise))


@torch.no_grad()
def update_average(average: UNet, model: UNet, step: int, decay: float) -> None:
    """Move the averaged weights a little towards the current ones, after step 0, 1, 2, ...

    The weights jitter around a good place, and their average is nearer to it: after one epoch of
    three its loss is 5 % lower, at the end, where the rate is 0, no longer. The decay starts at
    0.1, to forget the random initial weights, and reaches 0.9987 after 7,020 steps."""
    decay = min(decay, (1 + step) / (10 + step))
    for mean, weight in zip(average.parameters(), model.parameters()):
        mean.lerp_(weight, 1 - decay)  # mean = decay * mean + (1 - decay) * weight


@torch.no_grad()
def evaluate(model: torch.nn.Module, schedule: NoiseSchedule, images: torch.Tensor,
             batch_size: int = 128) -> float:
    """Mean squared error of the predicted noise, the same measurement every time. [DDPM Eq. 14]

    Image i of images, uint8 (N, 1, 28, 28), is seen at t = 1 + i mod T with fixed noise, so that
    two numbers can be compared. All t count alike if N is a multiple of T, else small t more."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    levels = 1 + torch.arange(len(images)) % schedule.T
    total = 0.0
    for x0, t, eps in zip(*(whole.split(batch_size) for whole in (images, levels, noise))):
        xt = schedule.q_sample(from_uint8(x0), t, eps)
        eps_hat = model(xt.to(device), t.to(device)).cpu()
        total += (eps - eps_hat).square().sum(dtype=torch.float64).item()
    model.train(was_training)
    return total / images.numel()


def save(path: Path, state: dict) -> None:
    """Write a file beside the old one, which it replaces only when it is complete."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file)  # now it is on the disk, not only on its way
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch makes the second of the first
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error}); what was there is kept") from error


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a model file: plain tensors and numbers, never code (weights_only). The model is the
    average, in eval mode; state is all of the file. Raises OSError or ValueError."""
    try:
        with warnings.catch_warnings(action="ignore"):  # one line will do if the file is foreign
            state = dict(torch.load(path, map_location="cpu", weights_only=True))
        with torch.device("meta"):  # shapes only: random weights would be overwritten at once
            model = UNet(**state["network"])
        model.load_state_dict(state["average"], assign=True)  # float16 in the files of an epoch
        config, betas = Config(**state["config"]), state["betas"]
        return Checkpoint(model.eval().float(), NoiseSchedule.from_betas(betas, allow_signal=True),
                          config, state["history"], state)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise OSError(f"no model file {path} ({error.strerror}); python train.py makes one")
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"{path} is damaged, or no model file of ours; train anew") from error


def train(config: Config, resume: bool = False, images: tuple | None = None,
          stop: list[int] | None = None) -> dict[str, list[float]]:
    """Train a UNet, write model.pt, last.pt and epoch-N.pt into config.out each epoch, return the
    history: lists "loss", "held_out" and "seconds" by epoch, and "step_loss" by step. Raises
    ValueError, RuntimeError, FloatingPointError or OSError.

    resume  go on from last.pt in config.out, bit for bit as if never stopped
    images  training and held-out images, uint8 (N, 1, H, W) each; those of config.dataset if None
    stop    a list; when something is put into it, training finishes the step, saves and returns"""
    out, last, device = Path(config.out), Path(config.out, "last.pt"), pick_device(config.device)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if rank == 0 and not resume and (last.exists() or Path(out, "model.pt").exists()):
        raise ValueError(f"{out} holds a run; go on by --resume --out {out}, or name another")
    # A run goes on with the schedule that it began with, even if schedule.py has changed.
    _, schedule, *_, state = load_checkpoint(last) if resume else (
        None, NoiseSchedule(config.T, config.schedule), {"config": {}})
    if resume and "adam" not in state:
        raise ValueError(f"{last} holds no run that could go on, only a model")
    for name, value in state["config"].items():
        if getattr(config, name) != value:
            raise ValueError(f"the run in {out} has {name} = {value}, not {getattr(config, name)}")
    print(f"{DATASETS[config.dataset]}, on {device}, into {out}", flush=True)
    digits, held_out = images or [load_images(config.data, part, config.dataset, world == 1)[0]
                                  for part in (True, False)]  # only a lone process downloads
    if config.val_images:
        digits, held_out = digits[:-config.val_images], digits[-config.val_images:]
    digits, size = digits[:config.images or None], config.batch_size
    steps = len(digits) // size  # in an epoch; an incomplete last batch is dropped
    if len(state.get("order", digits)) != len(digits):
        raise ValueError(f"the run in {out} had {len(state['order'])} images, not {len(digits)}")
    if steps == 0 or len(held_out) == 0 or size % world:
        raise ValueError(f"{len(digits)} images are too few for batches of {size}, or none is held "
                         f"out, or a batch cannot be shared equally by {world} processes")

    # The weights come from the global generator, which is put back as it was found. All else comes
    # from one generator of our own. It lives on the CPU, so every device sees the same noise.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        model = UNet(**state.get("network", {"size": digits.shape[-1]})).to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    # Adam's second decay rate (a "beta" too, but not β_t) is 0.99, not the usual 0.999: in a short
    # run the gradients change quickly, and it forgets old ones within about 100 steps.
    adam = torch.optim.Adam(model.parameters(), lr=config.lr, betas=(0.9, 0.99), fused=True)
    generator = torch.Generator().manual_seed(config.seed)
    history = {"loss": [], "held_out": [], "seconds": [], "step_loss": []}
    order, begun = None, time.perf_counter()  # of the epoch under way
    if resume:
        for part, name in ((model, "weights"), (average, "average"), (adam, "adam")):
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        history, order, begun = state["history"], state["order"], begun - state["seconds"]
    network = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    total, done, recent = config.epochs * steps, len(history["step_loss"]), []
    bar = tqdm(range(done, total), initial=done, total=total, disable=rank > 0 or None)
    for step in bar:
        epoch, i = divmod(step, steps)
        if i == 0:
            order, begun = torch.randperm(len(digits), generator=generator), time.perf_counter()
        # The lesson is in the lines numbered as at the top of this file.    [DDPM Algorithm 1]
        x0 = from_uint8(digits[order[i * size:(i + 1) * size]])                                # 1
        t = draw_t(size, schedule.T, generator)                                                # 2
        eps = torch.randn(x0.shape, generator=generator)
        # If there are several processes, all have drawn the same batch, and each takes its share.
        x0, t, eps = x0[rank::world], t[rank::world], eps[rank::world]
        xt = schedule.q_sample(x0, t, eps)                                                     # 3
        eps_hat = network(xt.to(device), t.to(device))                                         # 4
        loss = F.mse_loss(eps_hat, eps.to(device))                               # [DDPM Eq. 14]
        adam.zero_grad()                                                                       # 5
        loss.backward()  # with several processes, this also averages the gradient over them
        # A rare batch with a huge gradient must not throw the weights far off.
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        adam.param_groups[0]["lr"] = learning_rate(step, total, config)
        adam.step()
        update_average(average, model, step, config.ema)
        recent.append(loss.detach())
        complete, halt = i + 1 == steps, torch.tensor(int(bool(stop)))
        if world > 1:
            dist.all_reduce(halt)  # if one must stop, all do, after the same step
        due = complete or halt or step == 0  # to be saved; after step 0 to see if it can be
        if due or i % 20 == 19:  # not always, as reading off a GPU waits for it
            losses = torch.stack(recent).cpu()
            if world > 1:
                dist.all_reduce(losses)
            history["step_loss"] += (losses / world).tolist()
            recent.clear()
            error = evaluate(average, schedule, held_out) if complete and rank == 0 else 0.0
            if not math.isfinite(losses.sum() + error):  # before it is saved over a good one
                raise FloatingPointError(f"the loss is no longer finite in epoch {epoch + 1}, step "
                                         f"{i + 1}; start anew with a lower --lr and another --out")
        if complete:
            history["loss"].append(sum(history["step_loss"][-steps:]) / steps)
            history["held_out"].append(error)
            history["seconds"].append(time.perf_counter() - begun)
            beside = config.like_blog and epoch < len(BLOG_LOSS)
            with bar.external_write_mode():
                print(f"epoch {epoch + 1:2d}/{config.epochs}   loss {history['loss'][-1]:.4f}   "
                      f"held-out {error:.4f}   {history['seconds'][-1]:4.0f} s"
                      + (f"   blog's loss {BLOG_LOSS[epoch]:.4f}" if beside else ""), flush=True)
        if due and rank == 0:  # of several processes, the first one saves
            out.mkdir(parents=True, exist_ok=True)
            what = {k: v for k, v in vars(config).items() if k not in ("data", "out", "device")}
            full = dict(config=what, network=model.config, history=history, betas=schedule.beta[1:],
                        average={k: v.cpu() for k, v in average.state_dict().items()})
            save(out / "model.pt", full)
            if complete:  # in half the space, to see later how it learned
                half = {k: v.half() for k, v in full["average"].items()}
                save(out / f"epoch-{epoch + 1}.pt", dict(full, average=half))
            save(last, dict(full, weights=model.state_dict(), adam=adam.state_dict(), order=order,
                            generator=generator.get_state(), seconds=time.perf_counter() - begun))
        if halt:
            break
    return history


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.splitlines()[0])
    for f in fields(Config):
        # SUPPRESS tells options that were given from defaults; --resume needs to know.
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, metavar=f.type.__name__,
                            default=argparse.SUPPRESS, help=f"{f.metadata['help']} ({f.default})")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--quick", action="store_const", const=QUICK, default={},
                        help=f"a first look: {QUICK}")
    given = vars(parser.parse_args(argv))
    resume, given = given.pop("resume"), {**given.pop("quick"), **given}  # what is given wins
    try:
        config = Config(**given)
        device = pick_device(config.device)
        resume or NoiseSchedule(config.T, config.schedule)  # raises with advice of its own
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    noted, notice = [], ""

    def note(number, frame):  # A signal is only noted, so that no step is cut in two.
        if noted and not dist.is_initialized():
            sys.exit(128 + number)  # But a second one acts at once. (Torchrun sends two.)
        noted.append(number)

    try:
        with ExitStack() as stack:  # which puts all back as it was
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, note))
            if "LOCAL_RANK" in os.environ:  # torchrun has started several of these processes
                if device.type == "cuda":
                    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
                dist.init_process_group()  # gloo among CPUs, NCCL among GPUs
                stack.callback(dist.destroy_process_group)
                if dist.get_rank() > 0:  # the first one speaks for all
                    stack.enter_context(redirect_stdout(None))
                    stack.enter_context(redirect_stderr(None))
            if resume:  # what is not given is as it was
                saved = load_checkpoint(Path(config.out, "last.pt")).state["config"]
                config = Config(**{**saved, "out": config.out, **given})
            elif "dataset" not in given:
                print(f"looking for MNIST in {config.data}", flush=True)
                try:
                    load_images(config.data, False, download=not dist.is_initialized())
                except FileNotFoundError:
                    print(notice := f"no MNIST in {config.data}, nor a download: these are "
                          "built-in digits (--dataset mnist tells why)\n", end="", flush=True)
                    config = Config(**given, dataset="builtin")
            history = train(config, resume, stop=noted)
            stopped = len(history["loss"]) < config.epochs  # by a signal to any of the processes
            print(notice + (f"stopped at step {len(history['step_loss'])}; to go on, add --resume "
                            f"--out {config.out}" if stopped else "done; now type: python "
                            f"sample.py --checkpoint {Path(config.out, 'model.pt')}"),
                  file=sys.stderr if stopped else sys.stdout)
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        sys.exit("train.py: " + str(error).partition("\n")[0])
    if stopped:
        sys.exit(128 + (noted or [signal.SIGTERM])[0])


if __name__ == "__main__":
    main()
