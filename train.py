"""Part 2, continued. Training: show the network noisy digits and ask which noise was added.

    python train.py                        15 epochs on MNIST, into runs/mnist/
    python train.py --data DIR             the same, with MNIST from DIR/MNIST/raw
    python train.py --dataset folder --data DIR   your own images, from DIR/CLASS/*
    python train.py --resume               go on with a run that was stopped
    python train.py --resume --epochs 30   train a run longer, whether it was stopped or is finished
    python train.py --labels               tell the network which digit each image shows, so that
                                           sample.py can draw the one that you ask for
    python train.py --quick                a first look, in two to three minutes
    torchrun --nproc-per-node=2 train.py   on two GPUs

WHAT TO EXPECT. The loss is the mean squared error of the predicted noise. It starts at 1, because
an untrained network answers 0 and the noise has variance 1. It falls below 0.1 within a hundred
steps and then ever more slowly. It never reaches 0, because no one can tell exactly which part of
a noisy image is noise. In epoch 15 (after 69 minutes on two CPU cores) the training loss is 0.0215.
What is learned late changes only the third and fourth decimal place, but it turns strokes into
numerals.

WHAT IS WRITTEN, into runs/mnist/ or the folder given by --out:

    model.pt     what sample.py needs: the averaged weights (a moving average over the steps), the
                 sizes of the network, the names of the classes if it knows labels, the noise
                 schedule, the options, the losses so far
    last.pt      what --resume needs: all of model.pt, and the weights in training, the state of
                 Adam (the optimiser) and of the random generator, the order of the images
    epoch-N.pt   model.pt as it was after epoch N, to look back at; half the size, because its
                 weights have 16 bits each instead of 32
    early.pt     the same after two fifteenths of all steps, that is, after epoch 2 of 15; the worse
                 network that guides the finished one in sample.py --guidance
    history.csv  the losses and the seconds of each epoch as a table, with the columns epoch, loss,
                 held_out and seconds; with --labels also held_out_untold, see train()

All but early.pt are written at the end of each epoch, the first two also after the first step (of
the run, or after a change of plan, see below) and together with early.pt. After Ctrl-C, or if the
terminal is closed, the step under way is finished and the first two are written. An epoch (one pass
over the images) prints one line: its training loss, the loss on images that are held out (the test
images, unless --val-images is given), and beside them the training loss that the blog
"Deconstructing Diffusion Models", whose figures these five scripts redraw, published for this
epoch. With --labels, which goes into runs/mnist-labels/, the loss on held-out images is measured
twice: with every label told to the network, and with none.

TRAINING LONGER. --resume goes on with the options that the run began with. Two of them, --epochs
and --lr, may be changed. From the step at which the run is resumed, the learning rate is then that
of a run which was planned so from the beginning, so there is no second warm-up (unless the run was
stopped within the first 4 % of the new plan). In a finished run
it has fallen to 0. With twice as many epochs it jumps back to about half of its highest value, and
the loss may rise for some steps before it falls below where it was. If early.pt has been written,
it stays; otherwise it follows the new plan. model.pt is overwritten, but epoch-15.pt keeps the
model of the old plan.

CONTENTS. 1. What to ask of the network. 2. One training step. 3. Around the step: learning rate,
averaged weights, evaluation. 4. The training loop. Below the line: a run as an object, the images
(and what to change for 32x32 colour images), the model files, several processes, signals, options
and the command line.

The notation is that of schedule.py. Sources: [DDPM] Ho et al. 2020, arXiv 2006.11239. [VDM] Kingma
et al. 2021, arXiv 2107.00630. [CFG] Ho and Salimans 2022, arXiv 2207.12598.
"""

import argparse
import copy
import csv
import io
import math
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

if sys.flags.safe_path:  # python -P does not look into the folder of the script
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from schedule import KINDS, NoiseSchedule, Parser, advice_for_command_line, forgiving_output
from unet import UNet, pick_device, prepare_device

HERE = Path(__file__).resolve().parent

# The blog's training loss in epochs 1 to 15, each the mean over the steps of the epoch. Ours ends
# at a third of it, with the same images, noise levels and number of parameters. The network of
# unet.py and a higher learning rate, which falls to 0 at the end, make the difference.
BLOG_LOSS = (0.2203, 0.1124, 0.0987, 0.0889, 0.0839, 0.0779, 0.0756, 0.0727, 0.0716, 0.0693,
             0.0686, 0.0670, 0.0644, 0.0632, 0.0619)

# What can be learned: the name for --dataset, and the name for people (and for torchvision).
DATASETS = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST",
            "builtin": "built-in digits", "folder": "images of a folder"}

# What --quick changes. In small batches, an image of 16x16 pixels costs half as much as one of
# 28x28, and with fewer pixels the network learns the shapes of numerals from fewer images.
QUICK = {"epochs": 1, "batch_size": 32, "lr": 2e-3, "size": 16, "val_images": 2_000}

# What --resume may change: how long a run goes on, and how fast.
PLAN = ("epochs", "lr")

# The share of the steps after which early.pt is written.
EARLY = 2 / 15

# A run of up to so many steps is called short: about five epochs of MNIST.
SHORT_RUN = 2_500

# With --labels: the probability with which the label of an image is kept from the network.
DROPPED = 0.1


def option(default: Any, meaning: str) -> Any:
    """A field of Config with its default and its line in --help."""
    return field(default=default, metadata={"help": meaning})


@dataclass
class Config:
    """The options of a training run; the command line is made from it.

    Raises ValueError if an option has a value that it cannot have, see check_options.
    """

    # What to compute. These are saved with the model, and a resumed run keeps them. Only epochs and
    # lr may be changed then.
    dataset: str = option("mnist", f"what to learn: {', '.join(DATASETS)}")
    epochs: int = option(15, "passes over the training images")
    batch_size: int = option(128, "images per step")
    lr: float = option(3e-3, "highest learning rate of Adam")
    warmup: float = option(0.04, "share of the steps in which the learning rate rises")
    ema: float = option(0.999, "highest decay of the exponential moving average of the weights")
    clip: float = option(1.0, "greatest length of the gradient")
    T: int = option(1000, "noisy steps")
    schedule: str = option("linear", f"noise schedule: {', '.join(KINDS)}")
    seed: int = option(0, "seed of the weights, the image order and all noise")
    images: int = option(0, "train on the first N images only; 0 takes all")
    val_images: int = option(0, "hold out the last N training images, not the test set")
    size: int = option(0, "resize the images to N x N pixels, N a multiple of 4; 0 is 28, or the "
                          "size of the images that train() is given")
    labels: bool = option(False, "tell the network the class of each image, so that sample.py can "
                                 "draw the class that is asked for")

    # Where to compute it. These are not saved, because another machine has other folders.
    data: str = option(str(HERE / "data"),
                       "folder that holds MNIST/raw, or your images as CLASS/* (--dataset folder)")
    out: str = option("", "folder for the model files; if empty, "
                          "runs/DATASET[-labels][-SIZE][-IMAGES]")
    device: str = option("auto", "cuda, mps or cpu; auto takes the first that is there")

    def __post_init__(self):
        check_options(self)
        if not self.out:
            self.out = default_folder(self)

    @property
    def like_blog(self) -> bool:
        """Whether the losses can be compared with the blog's: same images, same noise levels,
        and nothing else told.
        """
        return all(getattr(self, name) == getattr(Config, name)  # Config.name is the default
                   for name in ("dataset", "images", "size", "T", "schedule", "labels"))


# ------------------------------------------------------------ 1. What to ask of the network
#
# A generative model should give real digits a high probability density: its weights θ should make
# p_θ(x₀) large for the images x₀ of the training set (maximum likelihood). Our model produces a
# digit backwards, from noise to image:
#
#       p(x_T) = N(x_T; 0, 1)     p_θ(x_{t-1} | x_t) = N(x_{t-1}; μ_θ(x_t, t), σ_t²)
#
#       p_θ(x₀, ..., x_T) = p(x_T) · p_θ(x_{T-1} | x_T) ··· p_θ(x₀ | x₁)
#
# The network provides the mean μ_θ. The variance σ_t² is fixed beforehand; sample.py says how. A
# Gaussian is the right form for a step back if β_t is small. By Bayes' rule q(x_{t-1}|x_t) is
# proportional to q(x_t|x_{t-1}) q(x_{t-1}). The first factor is a Gaussian so narrow that x_{t-1}
# must lie close to x_t. In so small a region the logarithm of the second is nearly a straight line,
# and a Gaussian times the exponential of a straight line is the same Gaussian, only shifted. Three
# steps lead from here to a plain squared error.
#
# First step: a bound. p_θ(x₀) is an integral over every path x₁, ..., x_T that ends at x₀, which no
# one can compute. Multiplied and divided by q(x₁, ..., x_T | x₀), it becomes an average over the
# paths of the forward process, which we can draw:
#
#       p_θ(x₀) = ∫ p_θ(x₀, ..., x_T) dx₁ ... dx_T
#               = E_q[ p_θ(x₀, ..., x_T) / q(x₁, ..., x_T | x₀) ]
#
# By Jensen's inequality (-log is convex), -log of an average is at most the average of -log. Hence
#
#       -log p_θ(x₀) ≤ E_q[ log q(x₁, ..., x_T | x₀) - log p_θ(x₀, ..., x_T) ]       [DDPM Eq. 3]
#
# The right side can be estimated: draw a path by adding noise, and evaluate both logarithms.
#
# Second step: the bound is a sum over t. Both densities are products over the steps (for q it is
# q(x₁|x₀) ··· q(x_T|x_{T-1})), so their logarithms are sums. Since x_t depends on x₀ only through
# x_{t-1}, a factor of q may also be written q(x_t | x_{t-1}, x₀), and Bayes' rule turns it around:
#
#       q(x_t | x_{t-1}) = q(x_{t-1} | x_t, x₀) · q(x_t | x₀) / q(x_{t-1} | x₀)      for t ≥ 2
#
# In the product over t = 2..T the fractions q(x_t|x₀) / q(x_{t-1}|x₀) telescope: each denominator
# cancels the numerator before it, and q(x_T|x₀) / q(x₁|x₀) is left. The factor of t = 1 is q(x₁|x₀)
# and cancels this denominator. What remains compares q and p step by step. The measure is the
# Kullback-Leibler divergence, KL(q ‖ p) = E_q[log q - log p], 0 if q = p and positive otherwise:
#
#         KL( q(x_T | x₀) ‖ p(x_T) )                             the last noisy image, against noise
#       + Σ_{t≥2} KL( q(x_{t-1}|x_t, x₀) ‖ p_θ(x_{t-1}|x_t) )    each learned step back, against the
#                                                                exact one, q_posterior
#       - log p_θ(x₀ | x₁)                                       the last step back   [DDPM Eq. 5]
#
# The KL for t still depends on x_t, and the last line on x₁. Each line is averaged over these,
# which q draws when x₀ is given. The first line contains no weights, so training cannot change it.
#
# Third step: each KL is a squared error. The exact step back has mean μ̃_t and variance β̃_t. In
# E_q[log q - log p_θ] only -log p_θ depends on θ. For each pixel it is (x_{t-1} - μ_θ)² / (2σ_t²)
# plus a constant. Averaged over x_{t-1}, the square is the variance of x_{t-1} plus the squared
# distance of its mean from μ_θ: β̃_t + (μ̃_t - μ_θ)². Summed over the pixels (‖·‖² is such a sum of
# squares):
#
#       KL = ‖μ̃_t - μ_θ‖² / (2σ_t²) + constant                                        [DDPM Eq. 8]
#
# schedule.py writes μ̃_t with x_t and the noise ε [DDPM Eq. 11]. Let μ_θ be the same formula, with
# the network's guess ε_θ(x_t, t) in place of ε. Then x_t cancels in the difference, which is
# -β_t / (√α_t √(1-ᾱ_t)) · (ε - ε_θ), and the term for t becomes
#
#       β_t² / (2 σ_t² α_t (1-ᾱ_t)) · ‖ε - ε_θ(x_t, t)‖²                             [DDPM Eq. 12]
#
# The last step back has the same form: -log p_θ(x₀|x₁) is ‖x₀ - μ_θ‖² / (2σ_1²) plus a constant,
# and x₀ is μ̃_1. (This needs σ_1² > 0: without noise in the last step the bound is infinite. A
# sampler does leave out this noise; for the bound a positive σ_1² is put in.)
# So to make the bound small, the network must predict the noise. DDPM then drops the factor:
#
#       L_simple = E ‖ε - ε_θ(√ᾱ_t x₀ + √(1-ᾱ_t) ε, t)‖²                            [DDPM Eq. 14]
#
# where E averages over the images x₀, over t, uniform on 1..T, and over the noise ε. The code
# divides by the number of pixels, too, so that answering 0 costs 1.
#
# What changes without the factor? With σ_t² = β_t and the linear schedule it is 0.50 at t = 1,
# 0.010 at t = 100, lowest (0.0050) at t = 349, and 0.010 at t = 1000. So, relative to the other t,
# L_simple gives small t far less weight than the bound does. Yet small t are where the bound is
# decided. It can be read in bits. p_θ is a density; to get the probability P of an image, integrate
# the last step's density over the interval of each of the 256 grey levels. The bound, divided by
# ln 2, is then at least -log₂ P, the bits in which the image can be stored. For the model in
# pretrained/, which comes with the project, it is 1.56 bits per pixel with the best σ_t² for each t
# (sample.py, section 3), and 88 % of them belong to t up to 50 (figures/bits.png). L_simple spends
# 5 % of its draws on these t and the rest on the shape of the digit. Training is no longer maximum
# likelihood then, and the pictures are better for it (DDPM, section 3.4).
#
# Why not predict x₀, from which the noise follows? It is possible. But by q_sample an error in ε is
# √ᾱ_t / √(1-ᾱ_t) times that in x₀, so a plain squared error of x₀ weighs the t quite differently,
# and early experiments of DDPM gave worse pictures with it (section 3.2).


# ------------------------------------------------------------------- 2. One training step

def draw_t(count: int, T: int, generator: torch.Generator) -> torch.Tensor:
    """Draw a noise level for each image of a batch.                              [compare VDM]

    count      number of images
    T          the levels are integers in 1..T
    generator  the source of all randomness, on the CPU

    Returns (count,) int64. Each is uniform on 1..T; together they are spread evenly.
    """
    # The loss is largest at small t, where faint noise is hard to tell from the digit. A batch that
    # happens to hold many small t has a high loss, however good the weights are, and the gradient
    # varies from batch to batch just as much. So 1..T is cut into `count` equal intervals, or
    # strata, one level is drawn from each, and they are dealt to the images at random. On average
    # the gradient is the same, and it varies less. After 3 epochs the held-out loss was 0.4 % lower
    # than with independent draws (one run each; two seeds differ by 0.3 %), and the digits were no
    # clearer.
    stratum = torch.randperm(count, generator=generator)
    within = torch.rand(count, generator=generator, dtype=torch.float64)
    # (stratum + within) / count is uniform on [0, 1). Multiplied by T = 1000, increased by 1 and
    # cut to an integer, 0.0004 gives t = 1 and 0.9996 gives t = 1000. Rounding could make the
    # fraction itself 1, and then t would be 1001; hence the clamp.
    return (1 + (stratum + within) / count * T).long().clamp(max=T)


# Algorithm 1 of DDPM, in the notation of this file:
#
#       1  repeat
#       2      x₀ ~ q(x₀)                   take training images
#       3      t ~ Uniform(1, ..., T)       draw a noise level for each
#       4      ε ~ N(0, 1)                  and noise for each pixel
#       5      change θ along the negative gradient of ‖ε - ε_θ(√ᾱ_t x₀ + √(1-ᾱ_t) ε, t)‖²
#       6  until converged
#
# `run` holds what changes from step to step: run.model (the network), run.average, run.adam (the
# optimiser) and run.generator (the source of randomness). run.network is run.model, too, wrapped if
# several processes share the work; run.draw_t and run.learning_rate are the functions of this file,
# unless train() is given others.

def training_step(run: "Run", x0: torch.Tensor,
                  label: torch.Tensor | None = None) -> torch.Tensor:
    """Take one step of gradient descent on a batch of clean images.         [DDPM Algorithm 1]

    run    the network and all that changes with it, see Run
    x0     (B, 1, H, W) images in [-1, 1]; the training loop has done line 2
    label  (B,) integers, the class of each image; None to train without labels

    Returns the loss before the step: the mean over the batch and all pixels, a scalar tensor.
    """
    # Line 3: draw a noise level for each image.
    t = run.draw_t(len(x0), run.schedule.T, run.generator)

    # Line 4: draw the noise. All of it comes from the CPU, so every device sees the same noise.
    eps = torch.randn(x0.shape, generator=run.generator, dtype=x0.dtype)

    # With --labels: keep the label of some images from the network.
    if label is not None:
        label = drop_labels(label, run.generator)

    # Take the whole batch, or a share of it if several processes work together.
    x0, t, eps, label = own_share(x0, t, eps, label)

    # Line 5: add the noise to the images, ask the network what the noise was, and move the weights
    # a little along the negative gradient of the squared error.                  [DDPM Eq. 14]
    xt = run.schedule.q_sample(x0, t, eps)
    if label is None:
        eps_hat = run.network(xt.to(run.device), t.to(run.device))
    else:
        eps_hat = run.network(xt.to(run.device), t.to(run.device), label.to(run.device))
    loss = F.mse_loss(eps_hat, eps.to(run.device))
    gradient_step(run, loss)
    return loss.detach()


def drop_labels(label: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Replace about one label in ten by -1, "not told".               [CFG Algorithm 1]

    label      (B,) integers, the class of each image
    generator  the source of all randomness, on the CPU

    Returns (B,) integers.
    """
    # A network that is always told the class would not know what to answer when it is not. Guidance
    # (sample.py, section 8) needs both answers, so the network has to practise both. Whether to
    # drop a label is drawn for each image, not once for the whole batch, so the gradient of every
    # step is an average over images of both kinds.
    dropped = torch.rand(label.shape, generator=generator, dtype=torch.float32) < DROPPED
    return torch.where(dropped, -1, label)


def gradient_step(run: "Run", loss: torch.Tensor) -> None:
    """Move the weights along the negative gradient of the loss, and the average after them."""
    run.adam.zero_grad()
    loss.backward()

    # A rare batch with a huge gradient must not throw the weights far off.
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.config.clip)

    # Adam keeps two running averages for each weight, of its gradient and of the gradient's square.
    # It moves the weight along the first, divided by the root of the second, so all weights move at
    # about the speed that the learning rate sets.
    run.adam.param_groups[0]["lr"] = run.learning_rate(run.step, run.steps, run.config)
    run.adam.step()
    update_average(run.average, run.model, run.step, run.config.ema)
    run.step += 1


# ----------------------------- 3. Around the step: learning rate, averaged weights, evaluation

def learning_rate(step: int, steps: int, config: Config) -> float:
    """The learning rate of a step, counted from 0, in a run of so many steps.

    It rises linearly to config.lr while Adam's running averages are still unreliable, then falls
    linearly to 0 so that the weights settle. If --resume changes the plan of a run, steps and
    config are the new ones from then on.
    """
    # With the blog's constant learning rate of 2e-4 instead, the held-out loss of our network was
    # 16 % higher after 3 epochs.
    rising_steps = max(1, round(config.warmup * steps))
    rise = (step + 1) / rising_steps
    fall = (steps - step) / max(1, steps - rising_steps)
    return config.lr * min(1, rise, fall)


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, step: int,
                   decay: float) -> None:
    """Move the averaged weights a little towards the current ones, after a step counted from 0.

    decay  the upper limit of the decay, the weight that the old average keeps in a step
    """
    # While the learning rate is high, the weights jump around a good place, and their moving
    # average lies nearer to it. After the first of three epochs the average has a 5 % lower loss
    # than the weights; at the end, when the learning rate is 0, it has no advantage left. We keep
    # it because it makes the model files of every earlier epoch better, and of a run cut short.
    #
    # The constant decay of DDPM, 0.9999, would remember the random initial weights for 10,000
    # steps, longer than our run. So the decay starts at 0.1 and rises as (1 + step) / (10 + step).
    # The average then reaches back over about a tenth of the run: after 7,020 steps, the mean age
    # of the weights in it is 700 steps. The decay would reach its limit of 0.999 only in step
    # 8,990, so in a run of 15 epochs the limit has no effect, and 0.9999 would give the same
    # average. It matters in longer runs.
    decay = min(decay, (1 + step) / (10 + step))
    for mean, weight in zip(average.parameters(), model.parameters()):
        mean.lerp_(weight, 1 - decay)  # mean = decay * mean + (1 - decay) * weight
    # Buffers, such as the statistics of a BatchNorm, are copied. (Our network has none.)
    for kept, current in zip(average.buffers(), model.buffers()):
        kept.copy_(current)


# Which number tells how good a network is? Not the training loss. It is an average over weights
# that change during the epoch, it was measured on images that the network has been trained on, it
# depends on which t and which noise were drawn, and it does not belong to the averaged weights,
# with which we sample. The held-out loss has none of these faults: it is the loss of the averaged
# weights on images that were not used for training, with the same t and the same noise every time.
# So a difference of 0.0001 between two networks is visible.

@torch.no_grad()
def evaluate(model: torch.nn.Module, schedule: NoiseSchedule, images: torch.Tensor,
             batch_size: int = 128, labels: torch.Tensor | None = None) -> float:
    """Mean squared error of the predicted noise, measured in the same way every time.

    model   called as model(xt, t), or with labels as model(xt, t, label); evaluated in eval mode
            and left in its own mode
    images  uint8 (N, 1, H, W); image i is seen at t = 1 + (i mod T), with noise from seed 0
    labels  (N,) integers, the classes to tell the model; None tells none

    Returns the mean over images and pixels [DDPM Eq. 14]. All t count alike if N is a multiple of
    T; otherwise small t count a little more.
    """
    # Prepare the same noise and the same t every time.
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float32)
    levels = 1 + torch.arange(len(images)) % schedule.T
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()

    # Add up the squared errors, batch by batch.
    total = 0.0
    for batch in torch.arange(len(images)).split(batch_size):
        t = levels[batch]
        xt = schedule.q_sample(from_uint8(images[batch]), t, noise[batch])
        if labels is None:
            eps_hat = model(xt.to(device), t.to(device))
        else:
            eps_hat = model(xt.to(device), t.to(device), labels[batch].to(device))
        total += (noise[batch] - eps_hat.cpu()).square().sum(dtype=torch.float64).item()

    model.train(was_training)
    return total / images.numel()


# -------------------------------------------------------------------- 4. The training loop

def train(config: Config, resume: bool = False,
          images: tuple[torch.Tensor, torch.Tensor] | None = None,
          network: Callable[..., torch.nn.Module] = UNet,
          draw_t: Callable[[int, int, torch.Generator], torch.Tensor] = draw_t,
          learning_rate: Callable[[int, int, Config], float] = learning_rate,
          after_step: Callable[["Run"], bool] | None = None) -> dict[str, list]:
    """Train a network, and write its files into config.out (see the top of this file).

    resume         go on from last.pt in config.out, bit for bit as if the run had never stopped.
                   If config.epochs or config.lr is not that of the run, it follows this new plan
                   from here on
    images         training and held-out images, uint8 (N, 1, H, H) each, or pairs of images and
                   labels, (N,) integers from 0; None reads config.dataset
    network        builds the network: network(size=28), with labels also classes=10, or
                   network(**model.config) on resuming
    draw_t         draws the noise levels of a batch, in place of draw_t above
    learning_rate  gives the learning rate of a step, in place of learning_rate above
    after_step     called as after_step(run) after each step. If its answer is true, the run is
                   saved and stops there; --resume goes on with it. (run.read_losses() brings
                   run.history up to date, which otherwise happens every 20 steps)

    Returns the history: lists "loss", "held_out" and "seconds" with a number for each epoch, and
    "step_loss" with a number for each step; and the list "plans", a dict for each plan that the run
    has followed: step (steps that were finished when it began), steps and epochs (planned in all)
    and lr (the highest learning rate). With labels, "held_out" is the loss
    when every label is told, and the list "held_out_untold" has the loss when none is. Raises
    ValueError if the options, the images and the files do not fit together, OSError if a file
    cannot be read or written, FloatingPointError if the loss is no longer finite, RuntimeError if
    the device fails.
    """
    run, training, held_out = set_up(config, resume, images, network, draw_t, learning_rate)

    for _ in progress(run):  # once for each step still to be taken, with a progress bar
        # Train on the next batch.
        batch = next_batch(run, training)
        loss = training_step(run, from_uint8(batch.images), batch.labels)
        run.record(loss)

        # Let the caller look in, and perhaps stop the run.
        halt = told_to_stop(run, after_step)

        # Check that the losses are finite, but not after every step: reading a number from a GPU
        # makes the program wait until the GPU has finished.
        save_now = run.step in (run.first_step, run.early_step) or run.epoch_is_complete or halt
        if save_now or run.steps_into_epoch % 20 == 0:
            run.read_losses()

        # At the end of an epoch, measure how good the averaged weights are.
        if run.epoch_is_complete:
            run.finish_epoch(held_out)
            report(run)

        # Save, also after the first step of a plan: a full disk should be noticed early.
        if save_now:
            save_run(run)
        if halt:
            break

    return run.history


# =========================================================================================
# Below this line is plumbing: nothing that is peculiar to diffusion, but what a run needs to
# survive a full disk, Ctrl-C, a second GPU and a data set that is not there.
# =========================================================================================


# ---------------------------------------------------------------------- a run as an object

class Run:
    """A training run: the network, and everything that changes together with it.

    config     the options                     schedule   the NoiseSchedule
    model      the network in training         average    the same, with averaged weights
    adam       the optimiser                   generator  the source of all randomness
    order      the images of this epoch, in the order in which they are shown
    step       number of finished steps        history    the losses, see train
    device     where the network is            network    the model, as a training step calls it

    state_dict holds all that --resume needs to go on bit for bit; load_state_dict takes it back.
    """

    def __init__(self, config: Config, schedule: NoiseSchedule, image_count: int, sizes: dict,
                 network=UNet, draw_t=draw_t, learning_rate=learning_rate, classes=()):
        """sizes are the arguments for network(); image_count is the number of training images;
        classes are the names of the classes, if these are told.
        """
        self.config = config
        self.classes = list(classes)
        self.schedule = schedule
        self.draw_t = draw_t
        self.learning_rate = learning_rate
        self.device = pick_device(config.device)
        prepare_device(self.device)

        # The initial weights come from torch's global generator, which is put back as it was.
        with torch.random.fork_rng(devices=[]), float32_by_default():
            torch.default_generator.manual_seed(config.seed)
            self.model = network(**sizes).to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.network = share_gradients(self.model)

        # The second of Adam's decays, by which it remembers the size of gradients, is usually
        # 0.999. Here it is 0.99: in a short run the gradients change quickly, and 0.99 forgets old
        # ones within about 100 steps. PyTorch calls the decays betas; they have nothing to do with
        # β_t. fused=True computes the same numbers, faster.
        self.adam = torch.optim.Adam(self.model.parameters(), lr=config.lr, betas=(0.9, 0.99),
                                     fused=True)
        self.generator = torch.Generator().manual_seed(config.seed)

        self.image_count = image_count
        self.steps_per_epoch = image_count // config.batch_size  # an incomplete batch is dropped
        self.steps = config.epochs * self.steps_per_epoch
        self.step = 0
        self.order = None
        self.epoch_begun = time.perf_counter()
        self.history = {"loss": [], "held_out": [], "seconds": [], "step_loss": []}
        if self.classes:
            self.history["held_out_untold"] = []
        self.history["plans"] = [self.plan(0, config.epochs, config.lr)]
        self.unread = []  # losses that are still on the device

    @property
    def steps_into_epoch(self) -> int:
        """Finished steps of the current epoch, 1..steps_per_epoch after a step."""
        return (self.step - 1) % self.steps_per_epoch + 1

    @property
    def epoch_is_complete(self) -> bool:
        return self.step > 0 and self.steps_into_epoch == self.steps_per_epoch

    @property
    def epoch(self) -> int:
        """The epoch of the last finished step, from 1; 0 before the first step."""
        return (self.step - 1) // self.steps_per_epoch + 1

    @property
    def first_step(self) -> int:
        """The first step of the plan that the run follows now, counted from 1."""
        return self.history["plans"][-1]["step"] + 1

    @property
    def early_step(self) -> int:
        """The step after which early.pt is written."""
        return early_step(self.history["plans"])

    def plan(self, step: int, epochs: int, lr: float) -> dict[str, int | float]:
        """An entry for history["plans"], see train."""
        return {"step": step, "steps": epochs * self.steps_per_epoch, "epochs": epochs, "lr": lr}

    def record(self, loss: torch.Tensor) -> None:
        """Note the loss of a step; read_losses() puts it into the history."""
        self.unread.append(loss)

    def read_losses(self) -> None:
        """Read the losses off the device. Raises FloatingPointError if one is not finite."""
        if not self.unread:
            return
        losses = mean_over_processes(torch.stack(self.unread).cpu())
        self.history["step_loss"] += losses.tolist()
        self.unread.clear()
        self.check_finite(losses.sum().item())

    def finish_epoch(self, held_out: "Examples") -> None:
        """Put the numbers of an epoch into the history."""
        held_out_loss = 0.0
        untold_loss = 0.0
        if is_first_process():  # which is also the one that saves
            held_out_loss = evaluate(self.average, self.schedule, held_out.images,
                                     labels=held_out.labels)
            self.check_finite(held_out_loss)
            if self.classes:
                untold_loss = evaluate(self.average, self.schedule, held_out.images)

        losses = self.history["step_loss"][-self.steps_per_epoch:]
        self.history["loss"].append(sum(losses) / len(losses))
        self.history["held_out"].append(held_out_loss)
        if self.classes:
            self.history["held_out_untold"].append(untold_loss)
        self.history["seconds"].append(time.perf_counter() - self.epoch_begun)

    def check_finite(self, value: float) -> None:
        # Called before anything is saved, so that a good file is never overwritten by a bad one.
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is no longer finite in epoch {self.epoch}, step "
                f"{self.steps_into_epoch}; start anew with a lower --lr and another --out")

    def state_dict(self) -> dict:
        """Everything that last.pt holds, as plain tensors and numbers.

        They are those of the run itself, not copies: copy.deepcopy keeps them for later.
        """
        self.read_losses()
        saved_options = {name: value for name, value in vars(self.config).items()
                         if name not in ("data", "out", "device")}
        return {"config": saved_options,
                "network": self.model.config,
                "classes": self.classes,
                "history": self.history,
                "betas": self.schedule.beta[1:],
                "average": {k: v.cpu() for k, v in self.average.state_dict().items()},
                "weights": self.model.state_dict(),
                "adam": self.adam.state_dict(),
                "order": self.order,
                "generator": self.generator.get_state(),
                "seconds": time.perf_counter() - self.epoch_begun}

    def load_state_dict(self, state: dict) -> None:
        """Take over what state_dict() returned; options, schedule and sizes are those of __init__.

        If the options have another number of epochs or learning rate, a new plan begins here.
        Raises ValueError if the run had another number of images, or has come further than the
        epochs that are planned now.
        """
        if len(state["order"]) != self.image_count:
            raise ValueError(f"the run in {self.config.out} had {len(state['order'])} images, "
                             f"not {self.image_count}")
        self.model.load_state_dict(state["weights"])
        self.average.load_state_dict(state["average"])
        self.adam.load_state_dict(state["adam"])
        self.generator.set_state(state["generator"])
        self.order = state["order"]
        self.history = state["history"]
        self.history.setdefault(  # older model files have no plans
            "plans", [self.plan(0, state["config"]["epochs"], state["config"]["lr"])])
        self.step = len(self.history["step_loss"])
        self.epoch_begun = time.perf_counter() - state["seconds"]
        self.change_plan(state["config"])

    def change_plan(self, saved_options: dict) -> None:
        """Note in the history if the plan is no longer that of the saved options."""
        if self.step > self.steps:
            raise ValueError(f"the run in {self.config.out} has already come to epoch "
                             f"{self.epoch}; --epochs must be at least {self.epoch}")
        changed = any(getattr(self.config, name) != saved_options[name] for name in PLAN)
        if changed and self.step < self.steps:  # without a step to take, nothing changes
            self.history["plans"].append(self.plan(self.step, self.config.epochs, self.config.lr))


def early_step(plans: list[dict]) -> int:
    """The step after which a run writes early.pt: two fifteenths of all steps, at least one.

    plans  those of the run's history, see train. A new plan moves the step, but never to one that
           is finished. If early.pt has been written, it stays
    """
    step = math.inf
    for plan in plans:
        if plan["step"] < step:  # when the plan began, early.pt had not been written
            step = max(plan["step"] + 1, round(EARLY * plan["steps"]))
    return step


def set_up(config: Config, resume: bool, images, network, draw_t,
           learning_rate) -> tuple[Run, "Examples", "Examples"]:
    """Begin a run or take one up again: the Run, its training images and its held-out images."""
    # Refuse what cannot work before anything takes time.
    device = pick_device(config.device)
    if resume:
        # A run goes on with the schedule and the sizes that it began with, even if the defaults in
        # schedule.py and unet.py have been changed since.
        checkpoint = checkpoint_to_resume(config, network)
        schedule = checkpoint.schedule
    else:
        refuse_to_overwrite(config)
        schedule = NoiseSchedule(config.T, config.schedule)
    print(f"{DATASETS[config.dataset]}, on {device}, into {config.out}", flush=True)

    # Read the images.
    training, held_out = split_images(config, images)
    sizes = {"size": training.images.shape[-1]}
    classes = []
    if config.labels:
        classes = class_names(config, images)
        sizes["classes"] = len(classes)
    if resume:
        sizes = checkpoint.state["network"]
        if classes != checkpoint.classes:
            raise ValueError(f"the run in {config.out} had the classes "
                             f"{', '.join(checkpoint.classes)}, not {', '.join(classes)}")

    # Build the network and all that changes with it.
    run = Run(config, schedule, len(training), sizes, network, draw_t, learning_rate, classes)
    if resume:
        run.load_state_dict(checkpoint.state)
        report_plan(run)
    return run, training, held_out


def refuse_to_overwrite(config: Config) -> None:
    """Raise ValueError if the folder for a new run holds one already."""
    if not is_first_process():  # the others would see the files of the first
        return
    for name in ("last.pt", "model.pt"):
        if Path(config.out, name).exists():
            raise ValueError(f"{config.out} holds a run; go on by --resume --out {config.out}, "
                             "or name another")


def checkpoint_to_resume(config: Config, network=UNet) -> "Checkpoint":
    """Read last.pt in config.out. Raises ValueError if it is not a run with these options, apart
    from those named in PLAN.
    """
    path = Path(config.out, "last.pt")
    checkpoint = load_checkpoint(path, network)
    if "adam" not in checkpoint.state:
        raise ValueError(f"{path} holds no run that could go on, only a model")
    # An older run, from before there were these options, goes on without them.
    options = {"labels": False, "size": 0, **checkpoint.state["config"]}
    for name, value in options.items():
        if name not in PLAN and getattr(config, name) != value:
            raise ValueError(f"the run in {config.out} has {name} = {value}, "
                             f"not {getattr(config, name)}")
    return checkpoint


def next_batch(run: Run, training: "Examples") -> "Examples":
    """The images of the next step, batch_size of them, in an order drawn every epoch."""
    position = run.step % run.steps_per_epoch
    if position == 0:
        run.order = torch.randperm(len(training), generator=run.generator)
        run.epoch_begun = time.perf_counter()
    first = position * run.config.batch_size
    return training[run.order[first:first + run.config.batch_size]]


def progress(run: Run) -> tqdm:
    """A bar that counts the steps still to be taken; shown only in a terminal."""
    hidden = None if is_first_process() else True  # None lets tqdm look for a terminal
    return tqdm(range(run.step, run.steps), initial=run.step, total=run.steps, disable=hidden)


def report_plan(run: Run) -> None:
    """Say if a run that is resumed has a new plan, or nothing left to do."""
    if run.step == run.steps:
        print(f"{run.config.epochs} epochs are finished; to train longer, give more --epochs",
              flush=True)
    elif run.step + 1 == run.first_step:
        rate = run.learning_rate(run.step, run.steps, run.config)
        print(f"a new plan after step {run.step}: {run.config.epochs} epochs; the learning rate "
              f"goes on at {rate:.3g}", flush=True)


def report(run: Run) -> None:
    """Print one line about the epoch that is complete."""
    losses = {name: run.history[name][-1] for name in ("loss", "held_out", "seconds")}
    line = (f"epoch {run.epoch:2d}/{run.config.epochs}   loss {losses['loss']:.4f}   "
            f"held-out {losses['held_out']:.4f}   {losses['seconds']:4.0f} s")
    if run.classes:
        line += f"   held-out without labels {run.history['held_out_untold'][-1]:.4f}"
    if run.config.like_blog and run.epoch <= len(BLOG_LOSS):
        line += f"   blog's loss {BLOG_LOSS[run.epoch - 1]:.4f}"
    with tqdm.external_write_mode():  # so that the progress bar stays below the line
        print(line, flush=True)


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Let torch create float32 tensors, whatever default dtype the caller has set.

    Also a decorator. Random numbers drawn in float64 would have other values, not only more digits.
    """
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


# ------------------------------------------------------------------------------ the images
#
# To train on 32x32 colour images, such as CIFAR-10, change
#
#   * here: DATASETS (one more name), load_images (the images as (N, 3, 32, 32));
#   * in unet.py: the stem (3 channels in), the head (3 channels out), the check at the top of
#     UNet.forward, and the image that describe() sends through;
#   * in sample.py: the shape in draw_digit and in begin_chain, and draw_grid and write_digit, which
#     write grey images; in plots.py: the shape in gather and in draw_to_order, and show_image.
#
# 32 halves twice, to 8x8, so the network keeps its form. Photographs need a larger one: raise
# `channels` in unet.py.

def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """Bytes 0..255 to float32 in [-1, 1], the range that the noise schedule is made for."""
    return images.float() / 127.5 - 1


@dataclass
class Examples:
    """Images, uint8 (N, 1, H, H), and the class of each, (N,) integers; None: not told."""
    images: torch.Tensor
    labels: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows) -> "Examples":
        if self.labels is None:
            return Examples(self.images[rows])
        return Examples(self.images[rows], self.labels[rows])


def split_images(config: Config, images: tuple | None = None) -> tuple[Examples, Examples]:
    """The images to train on and those that are held out; with labels if config.labels.

    images  both parts before config.images, config.val_images and config.size are applied, as
            train() takes them; None reads them

    Raises ValueError if there are too few or they are not bytes, OSError as load_images does.
    """
    training, held_out = whole_data_set(config, images)

    # Hold out training images instead of the test images, to choose hyper-parameters by.
    if config.val_images:
        if config.val_images >= len(training):
            raise ValueError(f"--val-images {config.val_images} leaves none of {len(training)} "
                             "images to train on")
        held_out = training[-config.val_images:]
        training = training[:-config.val_images]
    if config.images:
        training = training[:config.images]

    if len(training) < config.batch_size:
        raise ValueError(f"{len(training)} images are too few for batches of {config.batch_size}; "
                         "lower --batch-size")
    if len(held_out) == 0:
        raise ValueError("no image is held out to measure the loss on; give --val-images")
    if config.batch_size % process_count():
        raise ValueError(f"a batch of {config.batch_size} cannot be shared equally by "
                         f"{process_count()} processes")

    # Scale the images.
    if config.size:
        training.images = scaled(training.images, config.size)
        held_out.images = scaled(held_out.images, config.size)
    return training, held_out


def whole_data_set(config: Config, images: tuple | None) -> tuple[Examples, Examples]:
    """All training images and all test images, read or given; with labels if config.labels."""
    # Read them. Only a process that is alone may download: several would write the same files at
    # once.
    if images is None:
        alone = process_count() == 1
        size = config.size or 28
        training, held_out = (
            Examples(*load_images(config.data, part, config.dataset, alone, size))
            for part in (True, False))
        print(note_on_files(config.data, config.dataset), end="", flush=True)
    else:
        training, held_out = map(as_examples, images)
        for part in (training, held_out):
            check_images(part.images, "the images given")
        if training.images.shape[1:] != held_out.images.shape[1:]:
            raise ValueError("training and held-out images differ in size")

    # Forget the labels, or make sure that there are some.
    if not config.labels:
        training.labels = held_out.labels = None
    elif training.labels is None or held_out.labels is None:
        raise ValueError("labels=True needs images with labels: pairs (images, labels)")
    return training, held_out


def scaled(images: torch.Tensor, size: int) -> torch.Tensor:
    """Images, uint8 (N, C, H, H), at a size: uint8 (N, C, size, size)."""
    if images.shape[-1] == size:
        return images

    def resize(part: torch.Tensor) -> torch.Tensor:
        # antialias: a pixel of a smaller image is an average of all pixels that it stands for.
        resized = F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
        return resized.round().to(torch.uint8)

    return torch.cat([resize(part) for part in images.split(1000)])  # as floats, a few at a time


def as_examples(part: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> Examples:
    """Images, or a pair of images and labels, as Examples.

    Raises ValueError for labels that do not fit the images.
    """
    if isinstance(part, torch.Tensor):
        return Examples(part)
    images, labels = part
    if labels.dtype not in (torch.int32, torch.int64) or labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be integers, one for each of {len(images)} images, not "
                         f"{labels.dtype} {tuple(labels.shape)}")
    if len(labels) > 0 and labels.min() < 0:
        raise ValueError("labels must be numbers from 0")
    return Examples(images, labels)


def class_names(config: Config, images: tuple | None = None) -> list[str]:
    """The names of the classes of a data set, in the order of the labels.

    images  as train() takes them; classes of images that are given have numbers for names
    """
    if images is not None:
        highest = torch.cat([labels for _, labels in images]).max().item()
        return [str(k) for k in range(highest + 1)]
    if config.dataset in ("mnist", "builtin"):
        return list("0123456789")
    if config.dataset == "folder":
        return folders_of_images(config.data)[0].classes
    from torchvision import datasets
    return getattr(datasets, DATASETS[config.dataset]).classes


def load_images(data: str | Path = HERE / "data", train: bool = True, dataset: str = "mnist",
                download: bool = True, size: int = 28) -> tuple[torch.Tensor, torch.Tensor]:
    """Read all images of a data set, or the part of it that is held out.

    data      a folder with MNIST/raw (FashionMNIST/raw, KMNIST/raw) in it; for the data set
              "folder", one that has a folder of images for each class, or two such folders, train
              and test
    train     True for the training images, False for the test images
    dataset   a name in DATASETS
    download  fetch files that are missing, into the default folder, a folder that is empty, or one
              that holds MNIST, FashionMNIST or KMNIST already
    size      side that the images of a folder are scaled to; those of the other data sets have 28

    Returns the images, uint8 (N, 1, H, H) with H as said, and their labels, int64 (N,). Raises
    FileNotFoundError if they are missing and cannot be downloaded, ValueError if a file is damaged,
    if all images are alike, or if many are blank.
    """
    if dataset == "builtin":
        return builtin_digits(60_000, seed=0) if train else builtin_digits(10_000, seed=1)
    if dataset == "folder":
        images, labels = images_of_folder(data, train, size)
    else:
        images, labels = images_of_mnist(data, train, dataset, download)
    check_content(images, f"the {'training' if train else 'held-out'} images in {data}")
    return images, labels


def check_images(images: torch.Tensor, source: str) -> None:
    """Raise ValueError unless images are uint8 (N, C, H, H); source says which they are."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"{source} must be a tensor of bytes, torch.uint8 (N, 1, H, H), not "
                         f"{images.dtype} {tuple(images.shape)}")


def check_content(images: torch.Tensor, source: str) -> None:
    """Raise ValueError if images that were read, uint8 (N, C, H, H), show nothing to learn.

    They must not all be the same, and almost none of them may be blank.
    """
    if len(images) < 2:
        return

    # A copy that broke off can leave a file of the right length that ends in zeros.
    pixels = images.flatten(1)
    blank = (pixels.amin(dim=1) == pixels.amax(dim=1)).sum().item()
    if blank > max(1, len(images) // 100):
        raise ValueError(f"{blank:,} of {source} ({len(images):,}) are blank, each of a single "
                         "grey level; replace or remove them")
    if len(images) > 2 and all(torch.equal(image, images[0]) for image in images):
        raise ValueError(f"{source} are all alike; there is nothing to learn")


# torchvision knows the checksums of what it downloads, which is compressed. These are the MD5 sums
# of the files that it unpacks.
CHECKSUMS = {"train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
             "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
             "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
             "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637"}


def note_on_files(data: str | Path, dataset: str) -> str:
    """A line that says which files are not those of MNIST as published; empty if all are."""
    if dataset != "mnist":
        return ""
    from torchvision.datasets.utils import check_integrity
    raw = Path(data, "MNIST", "raw")
    others = [name for name, md5 in CHECKSUMS.items() if not check_integrity(raw / name, md5)]
    if not others:
        return ""
    return (f"note: not MNIST as it was published, but taken as it is: {', '.join(others)} in "
            f"{raw}; if you did not change it, delete it and start again\n")


def images_of_mnist(data: str | Path, train: bool, dataset: str,
                    download: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of MNIST, FashionMNIST or KMNIST in its own four files; see load_images."""
    # torchvision takes seconds to import, so this is not done at the top of the file.
    from torchvision import datasets
    kind = getattr(datasets, DATASETS[dataset])
    raw = Path(data, kind.__name__, "raw")
    names = [Path(url).stem for url, _ in kind.resources]

    # Find the files, or download them.
    if not all((raw / name).exists() for name in names):
        refuse_foreign_folder(data, kind.__name__)
        if download:
            reason = failure_of_download(kind, data)
        else:
            reason = "only a process that is alone downloads it"
        if reason:
            raise FileNotFoundError(
                f"no {kind.__name__} in {raw}: {reason}; put there, unpacked, {', '.join(names)} "
                f"from {kind.mirrors[0]}, or name their folder by --data")

    # Read them.
    try:
        part = kind(data, train=train)
        if len(part.data) != len(part.targets):
            raise ValueError("not as many labels as images")
    except Exception as error:  # torchvision raises many kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{raw} is damaged ({reason}); delete it and start again") from error
    return part.data[:, None], part.targets


def refuse_foreign_folder(data: str | Path, name: str) -> None:
    """Raise FileNotFoundError if the data set of this name should not be written into a folder."""
    from torchvision.datasets.folder import IMG_EXTENSIONS
    folder = Path(data)
    if folder.resolve() == Path(Config.data).resolve():
        return
    if not folder.is_dir():
        raise FileNotFoundError(f"no {name}: there is no folder {data}")

    # Look for images as deep as DATA/train/CLASS/*.
    for pattern in ("*", "*/*", "*/*/*"):
        for path in folder.glob(pattern):
            if path.suffix.lower() in IMG_EXTENSIONS:
                raise FileNotFoundError(f"no {name} in {data}, but image files; to learn these, "
                                        "add --dataset folder")

    # Look for anything else.
    entries = {path.name for path in folder.iterdir()}
    if entries and entries.isdisjoint({"MNIST", "FashionMNIST", "KMNIST"}):
        raise FileNotFoundError(f"no {name} in {folder / name / 'raw'}, and it is not downloaded "
                                "among other files; name an empty folder or leave out --data")


def failure_of_download(kind: type, data: str | Path) -> str:
    """Download a data set of torchvision. What went wrong, or nothing; no empty folder is left."""
    raw = Path(data, kind.__name__, "raw")
    new = [folder for folder in (raw, raw.parent, Path(data)) if not folder.exists()]
    try:
        with redirect_stdout(None):  # torchvision prints about its failed attempts
            kind(data, download=True)
        return ""
    except Exception as error:  # torchvision raises many kinds
        reason = str(error).partition("\n")[0].rstrip(":") or type(error).__name__
        return f"the download failed ({reason})"
    finally:
        for folder in new:  # the innermost first
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def images_of_folder(data: str | Path, train: bool, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The images in DATA/CLASS/*, made grey and square, in a fixed random order; see load_images.

    If DATA has a folder for training and one for testing, these are the two parts. Otherwise every
    tenth image of the order is held out.
    """
    parts = folders_of_images(data, size)
    folder = parts[0] if train else parts[-1]
    chosen = torch.randperm(len(folder), generator=torch.Generator().manual_seed(0)).tolist()
    if len(parts) == 1:
        chosen = [i for k, i in enumerate(chosen) if (k % 10 > 0) == train]
    images = torch.zeros(len(chosen), 1, size, size, dtype=torch.uint8)
    labels = torch.zeros(len(chosen), dtype=torch.int64)
    for row, i in enumerate(chosen):
        images[row], labels[row] = folder[i]
    return images, labels


# What people call the folder of training images, and the one of images that are held out.
TRAINING_NAMES = ("train", "training")
HELD_OUT_NAMES = ("test", "testing", "val", "valid", "validation")


def folders_of_images(data: str | Path, size: int = 28) -> list:
    """DATA/CLASS/* as one ImageFolder of torchvision, or DATA/train/CLASS/* and DATA/test/CLASS/*.

    Other names of the two are listed above; of several, the first that exists counts. If there is
    only one of them, all images come from it.

    Raises FileNotFoundError if a class has no image, ValueError if the classes of the two differ.
    """
    from torchvision.datasets import ImageFolder

    # See whether the images are split already: into folders that hold folders of classes.
    paths = []
    for names in (TRAINING_NAMES, HELD_OUT_NAMES):
        there = [Path(data, name) for name in names if any(Path(data, name).glob("*/"))]
        paths += there[:1]
    if not paths:
        paths = [Path(data)]

    # List the images.
    try:
        parts = [ImageFolder(path, loader=partial(read_picture, size=size)) for path in paths]
    except OSError as error:
        raise FileNotFoundError(f"no images of classes in {data} ({error}); name by --data a "
                                "folder that has a folder of images for each class") from error
    differing = set(parts[0].classes) ^ set(parts[-1].classes)
    if differing:
        raise ValueError(f"{paths[0]} and {paths[1]} must have the same classes; one of them lacks "
                         f"{', '.join(sorted(differing))}")
    return parts


def read_picture(path: str, size: int = 28) -> torch.Tensor:
    """Read an image file: grey, turned as a viewer shows it, scaled, uint8 (1, size, size).

    An image that is not square keeps its shape, and is padded with the grey level of its border.
    Raises ValueError, which names the file, if it cannot be read right.
    """
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as picture:
            ImageOps.exif_transpose(picture, in_place=True)
            grey = grey_levels(picture)  # (H, W)
        border = torch.cat([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
        square = ImageOps.pad(Image.fromarray(grey.numpy()), (size, size),
                              Image.Resampling.BILINEAR, color=border.median().item())
        return pil_to_tensor(square)
    except Exception as error:  # PIL raises many kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"cannot read {path} ({reason})") from error


def grey_levels(picture) -> torch.Tensor:
    """The grey levels of a PIL image, uint8 (H, W). Raises ValueError if their range is unknown."""
    import numpy  # PIL hands over more than 8 bits in this way only
    from torchvision.transforms.functional import pil_to_tensor

    # More than 8 bits for each pixel.
    highest = {"I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I;16N": 65535, "F": 1}
    if picture.format in ("PNG", "PPM"):
        highest["I"] = 65535  # Pillow may read 16-bit files of these formats as "I", 32 bits
    if picture.mode in highest:
        levels = torch.tensor(numpy.array(picture, "float64")) / highest[picture.mode]
        if not (levels.min() >= 0 and levels.max() <= 1):  # NaN fails, too
            raise ValueError("its floating-point numbers are not between 0 and 1")
        return (levels * 255).round().to(torch.uint8)
    if picture.mode == "I":
        raise ValueError("its integers have 32 bits and no known range; save it with 8 or 16 bits")
    if not picture.has_transparency_data:
        return pil_to_tensor(picture.convert("L"))[0]

    # Transparent pixels become black or white, whichever is further from the mean of the others.
    picture = picture.convert("RGBA")
    grey = pil_to_tensor(picture.convert("L"))[0].double()
    alpha = pil_to_tensor(picture.getchannel("A"))[0].double() / 255
    is_light = (grey * alpha).sum() > 127.5 * alpha.sum()
    ground = 0 if is_light else 255
    return (grey * alpha + ground * (1 - alpha)).round().to(torch.uint8)


def read_glyphs() -> torch.Tensor:
    """The printed digits of pretrained/glyphs.png, (fonts, 10, 1, 28, 28) in [0, 1]."""
    from PIL import Image
    from torchvision.transforms.functional import to_tensor
    with Image.open(HERE / "pretrained" / "glyphs.png") as picture:
        return rearrange(to_tensor(picture), "1 (font h) (digit w) -> font digit 1 h w", h=28, w=28)


@float32_by_default()
def builtin_digits(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits for machines without MNIST: printed numerals, bent a little, to look like MNIST.

    They are white on black. Strokes are thickened, and the whole is turned, sheared and stretched
    at random. As in MNIST, a digit is 20 pixels high or wide, whichever is more, and its centre of
    mass is in the middle.

    Returns uint8 (count, 1, 28, 28) and labels, int64 (count,), which depend on the seed alone.
    """
    glyphs = read_glyphs()
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    images = []
    for digit in labels.split(2000):
        font = torch.randint(len(glyphs), (len(digit),), generator=generator)
        images.append(bend(glyphs[font, digit], generator))
    return torch.cat(images), labels


def bend(glyph: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Distort each glyph at random, (n, 1, 28, 28) in [0, 1] -> uint8; see builtin_digits."""
    # Thicken the strokes by up to a third of a pixel on each side.
    n = len(glyph)
    thick = F.max_pool2d(glyph, 3, stride=1, padding=1)
    glyph = glyph.lerp(thick, torch.rand(n, 1, 1, 1, generator=generator) / 3)

    # e to the power of a small matrix turns, shears and stretches a little, and never mirrors.
    A = torch.matrix_exp((torch.rand(n, 2, 2, generator=generator) - 0.5) / 2)

    # Draw it, measure its size and centre of mass, and draw it again with these put right.
    axis = (torch.arange(28) - 13.5) / 14  # the centres of pixels, from -1 to 1
    scale = torch.ones(n, 1, 1)
    shift = torch.zeros(n, 2, 1)
    for _ in range(2):
        grid = F.affine_grid(torch.cat([A * scale, shift], dim=2), glyph.shape, False)
        image = F.grid_sample(glyph, grid, align_corners=False)  # (n, 1, 28, 28)
        lit = image > 0.3
        width_and_height = torch.stack([lit.any(2).sum(2), lit.any(3).sum(2)])  # (2, n, 1)
        scale = width_and_height.amax(dim=0)[:, :, None] / 20
        mass = torch.stack([image.sum(2) @ axis, image.sum(3) @ axis], dim=1)  # (n, 2, 1)
        shift = A @ mass / image.sum((2, 3))[:, :, None]
    return (image * 1.3).clamp(max=1).mul(255).to(torch.uint8)


# ------------------------------------------------------------------------- the model files

class Checkpoint(NamedTuple):
    """What a model file holds."""
    model: torch.nn.Module    # with the averaged weights, in eval mode, on the CPU
    schedule: NoiseSchedule   # that it was trained with
    config: Config
    history: dict             # as train() returns it
    classes: list[str]        # the names of the classes, in the order of the labels; [] without
    state: dict               # all of the file, for Run.load_state_dict


def load_checkpoint(path: str | Path, network: Callable[..., torch.nn.Module] = UNet) -> Checkpoint:
    """Read a model file: plain tensors and numbers, never code.

    network  builds the network, as in train()

    Raises OSError if there is no such file, ValueError if it is not a model file.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of foreign files; we raise
            state = dict(torch.load(path, map_location="cpu", weights_only=True))
        with torch.device("meta"):  # shapes only: random weights would be overwritten at once
            model = network(**state["network"])
        model.load_state_dict(state["average"], assign=True)
        model.eval().float()  # the files epoch-N.pt are in half precision
        schedule = NoiseSchedule.from_betas(state["betas"], allow_signal=True)
        return Checkpoint(model, schedule, Config(**state["config"]), state["history"],
                          state.get("classes", []), state)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise OSError(f"no model file {path} ({error.strerror}); python train.py makes one")
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"{path} is damaged, or no model file of ours; train anew") from error


@contextmanager
def replacement_of(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside the old one, which it replaces only when it is complete.

    Raises OSError if it cannot be written; then it is removed, and the old one is as it was.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file)  # now it is on the disk, not only on its way there
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch turns the first into the second
        raise OSError(f"cannot write {path} ({error}); what was there is kept") from error
    finally:
        with suppress(OSError):
            part.unlink()  # it is still there if something went wrong


def save(path: Path, state: dict) -> None:
    """Write a model file, see replacement_of."""
    with replacement_of(path) as file:
        torch.save(state, file)


def save_history(path: Path, history: dict[str, list]) -> None:
    """Write the losses and the seconds of all finished epochs as a table, see replacement_of."""
    columns = ["loss", "held_out", "seconds"]
    if "held_out_untold" in history:
        columns.append("held_out_untold")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["epoch", *columns])
    numbers = zip(*[history[name] for name in columns])  # for each epoch, one of each column
    for epoch, row in enumerate(numbers, start=1):
        table.writerow([epoch, *row])
    with replacement_of(path) as file:
        file.write(text.getvalue().encode())


def make_folder(folder: Path, option: str = "--out") -> None:
    """Make a folder for files, if there is none. Raises OSError if one cannot write into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"no folder {folder} can be made ({error.strerror}); "
                      f"name another place by {option}") from error
    if not os.access(folder, os.W_OK):
        raise OSError(f"you may not write into {folder}; name another place by {option}")


def save_run(run: Run) -> None:
    """Write model.pt and last.pt, and when it is time, epoch-N.pt, history.csv and early.pt."""
    if not is_first_process():
        return
    out = Path(run.config.out)
    make_folder(out)
    state = run.state_dict()
    run.check_finite(sum(weight.sum().item() for weight in state["average"].values()))
    parts = ("config", "network", "classes", "history", "betas", "average")
    model = {name: state[name] for name in parts}
    save(out / "model.pt", model)

    # Keep some states of the model, in half the space.
    halves = {name: weight.half() for name, weight in state["average"].items()}
    if run.epoch_is_complete:
        save(out / f"epoch-{run.epoch}.pt", model | {"average": halves})
        save_history(out / "history.csv", run.history)
    if run.step == run.early_step:
        save(out / "early.pt", model | {"average": halves})
    save(out / "last.pt", state)


# ----------------------------------------------------------------------- several processes
#
# torchrun starts this script once for each GPU. All processes draw the same batch with the same
# noise, each takes its share of it, and PyTorch's DistributedDataParallel averages the gradients.
# So all have the same weights after every step. The first process evaluates, saves and speaks.

def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def may_complain() -> bool:
    """Whether this process says what is wrong if all fail alike: the first on its machine does."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def own_share(*batch: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Of each tensor, the rows for this process: all of them if it is alone. None stays None."""
    first = dist.get_rank() if dist.is_initialized() else 0
    return [None if rows is None else rows[first::process_count()] for rows in batch]


def share_gradients(model: torch.nn.Module) -> torch.nn.Module:
    """The model, wrapped so that loss.backward() averages gradients over the processes."""
    if process_count() == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(model)


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    if process_count() > 1:
        dist.all_reduce(values)
    return values / process_count()


def told_to_stop(run: Run, after_step: Callable[[Run], bool] | None) -> bool:
    """Call after_step; whether the run should stop, in this process or in any other."""
    stop = torch.tensor(0)
    if after_step is not None and after_step(run):
        stop += 1
    if process_count() > 1:
        dist.all_reduce(stop)  # if one must stop, all do, after the same step
    return stop.item() > 0


@contextmanager
def joined_processes(device: torch.device) -> Iterator[None]:
    """If torchrun has started several processes, connect them; only the first one may print."""
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()  # gloo between CPUs, NCCL between GPUs
    try:
        if is_first_process():
            yield
        else:
            with redirect_stdout(None), redirect_stderr(None):
                yield
    finally:
        dist.destroy_process_group()


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Collect SIGINT (Ctrl-C), SIGTERM and SIGHUP in a list, so that no step is cut in two.

    A second signal ends the program at once, except under torchrun, which sends every signal twice,
    and except SIGHUP, which may come from both the system and the shell. A signal that is ignored,
    as SIGHUP is under nohup, stays ignored. Outside the main thread Python does not allow signal
    handlers, and the list stays empty.
    """
    signals = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    hangup = getattr(signal, "SIGHUP", None)  # Windows has none

    def note(number, frame):
        if signals and number != hangup and not dist.is_initialized():
            sys.exit(128 + number)
        signals.append(number)

    usual = {}
    for number in (signal.SIGINT, signal.SIGTERM, hangup):
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            usual[number] = signal.signal(number, note)
    try:
        yield signals
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder of a run, and keep other runs out of it while this one goes on.

    The system releases the lock when the process ends, even if it is killed. If a run has several
    processes, the first one holds the lock. Raises OSError if another run does.
    """
    if not is_first_process():
        yield
        return
    is_new = not folder.exists()
    make_folder(folder)
    lock = take_lock(folder)
    try:
        yield
    finally:
        if is_new:
            with suppress(OSError):  # if the run has failed before its first step, it is empty
                folder.rmdir()
        os.close(lock)


def take_lock(folder: Path) -> int:
    """Lock a folder until the returned file descriptor is closed. Raises OSError, see locked."""
    windows = sys.platform == "win32"  # it cannot lock a folder, so a file in it is locked
    lock = os.open(folder / "lock", os.O_CREAT) if windows else os.open(folder, os.O_RDONLY)
    try:
        if windows:
            import msvcrt
            msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # the second is that of Windows
        os.close(lock)
        raise OSError(f"another process is training into {folder}; wait until it has finished, or "
                      "name another folder by --out") from error
    except OSError:
        pass  # some network drives know no locks; better to train without one than not at all
    return lock


# ------------------------------------------------------------ options and the command line

# The names that an option may have, and the lowest and the highest value of the others.
NAMES = {"dataset": DATASETS, "schedule": KINDS}
LIMITS = {"epochs": (1, 10**6), "batch_size": (1, 10**6), "lr": (1e-9, 1), "warmup": (0, 1),
          "ema": (0, 0.999999), "clip": (1e-9, math.inf), "T": (2, 10**6), "seed": (0, 2**63 - 1),
          "images": (0, 10**9), "val_images": (0, 10**6), "size": (0, 256)}


def check_options(config: Config) -> None:
    """Raise ValueError if an option has a value that it cannot have."""
    for name, known in NAMES.items():
        value = getattr(config, name)
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known are {', '.join(known)}")
    for name, (low, high) in LIMITS.items():
        value = getattr(config, name)
        if not low <= value <= high:  # NaN fails, too
            raise ValueError(f"{name} must be between {low} and {high}, not {value}")


def default_folder(config: Config) -> str:
    """The folder of a run that names none: runs/DATASET, with -labels, -SIZE and -IMAGES if asked
    for.
    """
    name = config.dataset
    if config.labels:
        name += "-labels"
    if config.size:
        name += f"-{config.size}x{config.size}"
    if config.images:
        name += f"-{config.images}"
    return str(HERE / "runs" / name)


def make_parser() -> Parser:
    """An option for each field of Config, and --resume and --quick."""
    parser = Parser(description="Train a diffusion model on images of digits.")
    for option in fields(Config):
        # SUPPRESS leaves out what was not given: --resume must tell it from a default.
        name = f"--{option.name.replace('_', '-')}"
        meaning = option.metadata["help"]
        if option.type is bool:
            parser.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=meaning)
            continue
        # A shell leaves the ~ of --out=~/run as it is.
        kind = os.path.expanduser if option.name in ("data", "out") else option.type
        parser.add_argument(name, type=kind, metavar=option.type.__name__,
                            default=argparse.SUPPRESS,
                            help=f"{meaning} (default: {option.default})")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the run in --out, with the options that it began with; "
                             "--epochs and --lr may be changed: the learning rate is then, from "
                             "here on, that of a run planned so from the beginning, without a "
                             "second warm-up")
    quick = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    parser.add_argument("--quick", action="store_true", help=f"a first look; the same as {quick}")
    return parser


def options_of_saved_run(config: Config, given: dict, network=UNet) -> Config:
    """For --resume: options that were not given are those that the run began with."""
    saved = load_checkpoint(Path(config.out, "last.pt"), network).state["config"]
    return Config(**{**saved, "out": config.out, **given})


def with_builtin_digits_if_needed(config: Config, given: dict) -> tuple[Config, str]:
    """If no data set and no folder was named and MNIST is not there, take the built-in digits.

    Returns the options, and a notice about it, which is empty if MNIST is there.
    """
    if "dataset" in given or "data" in given:
        return config, ""
    print(f"looking for MNIST in {config.data}", flush=True)
    try:
        load_images(config.data, train=False, download=not dist.is_initialized())
        return config, ""
    except FileNotFoundError:
        notice = (f"no MNIST in {config.data}, nor a download: these are built-in digits "
                  "(--dataset mnist tells why)\n")
        print(notice, end="", flush=True)
        return Config(**given, dataset="builtin"), notice


def options_for_samples(config: Config, history: dict[str, list]) -> str:
    """The options of sample.py that draw clear digits with a finished run."""
    model = shlex.quote(str(Path(config.out, "model.pt")))
    options = f"--checkpoint {model} --sampler sde-dpm++"
    if config.labels and config.dataset in ("mnist", "builtin"):
        return f"{options} --digits 0-9 --guidance 1.5"

    # Guidance needs an earlier state of the network, which a run of a single step does not have.
    steps = len(history["step_loss"])
    if early_step(history["plans"]) >= steps:
        return options

    # After few steps, more guidance gives more digits that can be read.
    return f"{options} --guidance {3 if steps <= SHORT_RUN else 2}"


def read_options(argv: list[str] | None) -> tuple[Config, dict, bool, torch.device]:
    """Read the command line. What can never work ends the program, with exit status 2.

    Returns the options, those of them that were given, whether to resume, and the device.
    """
    parser = make_parser()
    if not may_complain():
        parser.error = lambda message: parser.exit(2)
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    if given.pop("quick"):
        quick = dict(QUICK)
        if resume:  # --quick names the run, but does not change its plan
            quick = {name: value for name, value in QUICK.items() if name not in PLAN}
        given = quick | given  # an option that is given wins over --quick

    try:
        config = Config(**given)
        device = pick_device(config.device)
        if config.dataset == "folder" and "data" not in given:
            raise ValueError("name the folder of your images by --data")
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    try:
        if not resume:
            NoiseSchedule(config.T, config.schedule)
    except ValueError as error:
        parser.error(advice_for_command_line(error, "--schedule"))
    return config, given, resume, device


@forgiving_output()
def main(argv: list[str] | None = None, after_step: Callable[[Run], bool] | None = None,
         **seams) -> None:
    """The command line. after_step, network, draw_t and learning_rate are passed on to train()."""
    config, given, resume, device = read_options(argv)

    # Train. A signal only asks the run to stop after the step under way.
    try:
        with noted_signals() as signals, joined_processes(device):
            def stop_after_step(run: Run) -> bool:
                asked = after_step is not None and after_step(run)
                return asked or len(signals) > 0

            notice = ""
            if resume:
                config = options_of_saved_run(config, given, seams.get("network", UNet))
            else:
                config, notice = with_builtin_digits_if_needed(config, given)
            with locked(Path(config.out)):
                history = train(config, resume, after_step=stop_after_step, **seams)

            # Say what comes next.
            stopped = len(history["loss"]) < config.epochs
            if stopped:
                print(f"{notice}stopped at step {len(history['step_loss'])}; to go on, add "
                      f"--resume --out {config.out}", file=sys.stderr)
            else:
                print(f"{notice}done; now type: python sample.py "
                      f"{options_for_samples(config, history)}")
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        # Any process may have trouble of its own with its device, which is a RuntimeError.
        if not may_complain() and not isinstance(error, RuntimeError):
            sys.exit(1)
        sys.exit("train.py: " + str(error).partition("\n")[0])
    if stopped:
        number = signals[0] if signals else signal.SIGTERM  # another process may have got it
        sys.exit(128 + number)


if __name__ == "__main__":
    main()
