# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # 6. Remedies, measured; horizons to 1000 steps; and chaos
#
# "Use an LSTM", "raise the forget bias", "use ReLU", "clip": every lecture ends with a list of remedies. Here the
# first three are measured, at 100, 300 and 1000 steps, and chaos, which none of them cures; clipping is in
# [notebook 3](03_your_own_model.ipynb).
#
# *The notes* are five lecture notes, written in Chinese, on vanishing and exploding gradients in RNN and LSTM.
# What they claim stands here in quotation marks or after "the notes", and is measured.
#
# | letter or word | in gradflow |
# |---|---|
# | gradient vanishes | verdict `vanishing`; `horizon`: first distance with a gain below 10⁻³ |
# | gradient explodes | verdict `exploding`; in the long run a positive rate |
# | forget gate bias | `bias_ih_l0[H:2 * H]` and `bias_hh_l0[H:2 * H]`, which add up |
# | ReLU instead of tanh | `nn.RNN(..., nonlinearity="relu")` |
# | gradient clipping | bounds the length, not the rate |
# | long-term dependency | the span: the distance that matters to you |
#
# <details><summary>Words of the notes in Chinese (中文)</summary>
#
# | 中文 | letter or word |
# |---|---|
# | 梯度消失 | gradient vanishes |
# | 梯度爆炸 | gradient explodes |
# | 遗忘门偏置 | forget gate bias |
# | 用 ReLU 代替 tanh | ReLU instead of tanh |
# | 梯度裁剪 | gradient clipping |
# | 长期依赖 | long-term dependency |
#
# </details>

# %%
import math
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import nn

import gradflow
from gradflow.demo import AddingModel, adding_batch

torch.set_num_threads(1)  # small layers: more threads only wait for each other
_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture first: before and after learning
#
# The adding task: two of a hundred numbers are marked, their sum is asked for at the end. Whoever ignores the
# input has a mean squared error of 1/6. RNN and LSTM both start with a gradient that dies after a few steps. The
# RNN stays there. The LSTM learns, and what it has learned is to let the gradient through.


# %%
def train(model, updates):
    """Train on the adding task; the mean error of the last 50 updates."""
    generator, errors = torch.Generator().manual_seed(0), []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(updates):
        x, y = adding_batch(64, 100, generator=generator)
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        errors.append(loss.item())
    return np.mean(errors[-50:])


x, y = adding_batch(8, 100, generator=torch.Generator().manual_seed(9))


def look(model):
    """The analysis of a model on one batch of the task."""
    with gradflow.record(model) as recording:
        nn.functional.mse_loss(model(x), y).backward()
    return gradflow.analyze(recording, stride=5)


runs, trained = [], {}
for cell, updates in (("RNN", 200), ("LSTM", 600)):
    torch.manual_seed(0)
    trained[cell] = AddingModel(cell)
    if cell == "LSTM":
        runs.append(look(trained[cell]).titled("LSTM before training"))
    error = train(trained[cell], updates)
    print(
        f"{cell:>4}: error after {updates} updates {error:.4f}; always answering 1 has {1 / 6:.4f}"
    )
    runs.append(look(trained[cell]).titled(f"{cell} after training"))
gradflow.plot(runs)

# %% [markdown]
# ## How far does it reach?
#
# Untrained layers of sixteen units with noise as input, and the LSTM just trained, with longer adding tasks as input.
# "At three hundred steps and more an LSTM still vanishes", say the notes. The default one vanishes long before; the
# trained one never saw more than 100 steps.


# %%
def layer(kind, bias=None, chrono=None):
    """A recurrent layer of 16 units; the forget bias as a number, or drawn from 1 … chrono."""
    torch.manual_seed(3)
    if kind == "relu":
        module = nn.RNN(4, 16, nonlinearity="relu")
        with torch.no_grad():
            nn.init.eye_(module.weight_hh_l0)
            module.bias_ih_l0.zero_()
            module.bias_hh_l0.zero_()
        return module
    module = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[kind](4, 16)
    with torch.no_grad():
        if bias is not None or chrono is not None:
            module.bias_hh_l0[16:32] = 0  # the two bias vectors add up
            module.bias_ih_l0[16:32] = bias or 0
        if chrono is not None:
            module.bias_ih_l0[16:32] = torch.empty(16).uniform_(1, chrono - 1).log()
            module.bias_ih_l0[:16] = -module.bias_ih_l0[16:32]
            module.bias_hh_l0[:16] = 0
    return module


def reach(modules, inputs):
    """The analyses of several layers, by name. Gains are about states: no loss is needed."""
    model = nn.ModuleDict(modules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gradflow would say that no backward was recorded
        with gradflow.record(model) as recording:
            for name, module in model.items():
                module(inputs[name])
    steps = len(next(iter(inputs.values())))
    run = gradflow.analyze(recording, stride=steps // 20, method="exact")
    return {name: run[f"{name}.l0"] for name in modules}


def noise(steps):
    return torch.randn(steps, 4, 4, generator=torch.Generator().manual_seed(4))


def adding(steps):
    return adding_batch(4, steps, generator=torch.Generator().manual_seed(9))[0].transpose(0, 1)


keep = nn.LSTM(2, 32)  # the trained layer alone, time first
keep.load_state_dict(trained["LSTM"].rnn.state_dict())
columns = {}
for steps in (100, 300, 1000):
    layers = {
        "RNN, as it comes": layer("rnn"),
        "ReLU RNN, identity": layer("relu"),
        "GRU, as it comes": layer("gru"),
        "LSTM, as it comes": layer("lstm"),
        "LSTM, forget bias 1": layer("lstm", bias=1.0),
        "LSTM, forget bias 3": layer("lstm", bias=3.0),
        "LSTM, forget bias 5": layer("lstm", bias=5.0),
        "LSTM, chrono(T)": layer("lstm", chrono=steps),
        "LSTM, trained on adding": keep,
    }
    inputs = dict.fromkeys(layers, noise(steps)) | {"LSTM, trained on adding": adding(steps)}
    found = reach(layers, inputs)
    columns[f"T = {steps}", "horizon"] = [
        "never gone" if one.horizon is None else one.horizon for one in found.values()
    ]
    columns[f"T = {steps}", "channels"] = [one.channels for one in found.values()]
pd.DataFrame(columns, index=list(layers))

# %% [markdown]
# * The horizon of the default layers does not depend on T: it is a property of the weights.
# * A forget bias of 1 is worth some fifty steps here, not three hundred; a bias of 3 reaches 300, with one
#   direction left, and not 1000.
# * ReLU with an identity matrix keeps *something* alive for hundreds of steps, in a few directions; no gate
#   decides what is kept.
# * Chrono initialisation is told the range and spans it, with nearly all directions (channels) left.
# * The trained LSTM has one direction, and that one it keeps ten times longer than it ever had to.
#
# ### The smallest bias that spans 300
#
# With the recurrent weights at zero a cell's gain over k steps is $f^k$ with $f = \sigma(b)$; for it to be 10⁻³
# just at 300 steps b has to be $\ln\frac{f}{1-f}$ with $f = 10^{-3/300}$. With recurrent weights and an input the
# gates differ from unit to unit, and the best of sixteen decides: it takes less.

# %%
f = 10 ** (-3 / 300)
print(f"without recurrent weights: b = {math.log(f / (1 - f)):.2f}")
biases = (2.4, 2.8, 2.9, 3.0)
layers = {str(place): layer("lstm", bias=bias) for place, bias in enumerate(biases)}
found = reach(layers, dict.fromkeys(layers, noise(400)))
for bias, one in zip(biases, found.values(), strict=True):
    gone = "not gone within 400 steps" if one.horizon is None else f"gone after {one.horizon} steps"
    spans = one.horizon is None or one.horizon > 300
    print(f"bias {bias}: {gone}{', spans 300' if spans else ''}")

# %% [markdown]
# ### Ask before you change anything
#
# `gradflow.what_if` tries a remedy on the recorded batch, with the present weights and without training, and
# leaves the model alone.

# %%
torch.manual_seed(4)
module = layer("lstm")
with gradflow.record(module) as recording:
    module(torch.randn(100, 4, 4))[0][-1].sum().backward()
tried = gradflow.what_if(recording, forget_bias=4.0, scale_hh=1.5, truncate=20)
tried[
    [
        "remedy",
        "value",
        "rate_before",
        "rate_after",
        "horizon_before",
        "horizon_after",
        "verdict_after",
    ]
]

# %% [markdown]
# The forget bias is the one to take. Larger recurrent weights buy a few steps. Truncation changes no gain: it drops
# what would have come from further back, here nothing to speak of.
#
# ## ReLU does not cure it
#
# ReLU has a slope of exactly 1 or 0: nothing is squeezed, and nothing is bounded. A layer of 64 units, its recurrent
# weights as PyTorch draws them and larger. √6 times larger gives them the variance 2/H that keeps a ReLU layer's
# signal at its size on average (He et al. 2015). Rates of three draws each:


# %%
def rates(make, scale):
    """The rate of three layers with their recurrent weights times `scale`."""
    for seed in (5, 6, 7):
        torch.manual_seed(seed)
        module = make()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.weight_hh_l0 *= scale
            with gradflow.record(module) as recording:
                module(noise(100))
        jacobians = gradflow.analyzer.step_jacobians(recording["l0"])
        yield float(gradflow.analyzer.lyapunov_spectrum(jacobians, k=1).mean())


kinds = {
    "tanh": lambda: nn.RNN(4, 64),
    "ReLU": lambda: nn.RNN(4, 64, nonlinearity="relu"),
    "LSTM": lambda: nn.LSTM(4, 64),
}
scales = {"× 1": 1.0, "× √6": math.sqrt(6), "× 3": 3.0}
table = {
    name: {
        column: "  ".join(f"{rate:+.2f}" for rate in rates(make, scale))
        for column, scale in scales.items()
    }
    for name, make in kinds.items()
}
pd.DataFrame.from_dict(table, orient="index")

# %% [markdown]
# As PyTorch draws them the ReLU layer vanishes twice as fast as tanh, for half of its slopes are 0. Right on average
# is not right: at × √6 one draw vanishes, one explodes, one happens to sit between. tanh and the LSTM bend back what
# grows, and stay near 0 or below. ReLU moves the border, it does not widen it.
#
# ## Chaos
#
# In theory a random tanh network of infinitely many units without input is silent below g = 1 and chaotic above it
# (Sompolinsky et al. 1988). Its rate, the largest Lyapunov exponent, is then positive: the gradient explodes for
# good, and two states that differ by nothing you could measure part ways. With 200 units the border is not at 1:


# %%
def network(g, units=200):
    """A random tanh network of gain g, without input."""
    torch.manual_seed(7)
    module = nn.RNN(1, units, bias=False).double()
    with torch.no_grad():
        module.weight_hh_l0.normal_(0, g / math.sqrt(units))
    return module


silence = torch.zeros(300, 8, 1).double()
start = torch.randn(1, 8, 200, generator=torch.Generator().manual_seed(7)).double()
found = {}
for g in (0.8, 1.2, 1.5, 2.0):
    module = network(g)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with gradflow.record(module) as recording:
            module(silence, start)
    found[g] = gradflow.analyze(recording, stride=300)["l0"]
    rate = found[g].rate
    print(
        f"g = {g}: {found[g].verdict}, rate {rate.value:+.4f} [{rate.low:+.4f}, {rate.high:+.4f}]"
    )

# %%
module = network(2.0)
moved = start + 1e-9 * torch.randn_like(start)
apart = (module(silence, start)[0] - module(silence, moved)[0]).norm(dim=-1)[:, 0].detach()
figure, axes = plt.subplots(figsize=(7, 3))
axes.semilogy(apart, color="#c3263a", lw=2, label="two states, at first 10⁻⁹ apart in every unit")
t = np.arange(30, 130)
axes.semilogy(
    t,
    float(apart[30]) * np.exp(found[2.0].rate.value * (t - 30)),
    "k--",
    lw=1,
    label="the measured rate",
)
axes.set(xlabel="step", ylabel="distance", title="g = 2: what the rate foretells happens")
_ = axes.legend()
doubling = math.log(2) / found[2.0].rate.value
print(f"an error doubles every {doubling:.1f} steps")
for dtype in (torch.float32, torch.float64):
    lost = -math.log(torch.finfo(dtype).eps) / found[2.0].rate.value
    print(f"rounding in {dtype} grows to the size of the state itself within {lost:.0f} steps")

# %% [markdown]
# Beyond that many steps the state is made of rounding errors, and a gradient with respect to it says nothing. Clipping
# keeps the numbers finite, and clips noise. What helps is to cut, or to teacher-force, every ln 2 / λ₁ steps
# (Mikhaeil et al. 2022), the doubling time above, or to take the weights back below the border.
#
# ## What to take home
#
# * Ask for a span first. "Vanishing" without a distance says nothing.
# * A remedy is worth what its horizon says, and for the price of one batch you can measure it.
# * A positive rate in a bounded network is chaos. No optimiser setting repairs that.
#
# Back to the beginning: [why gradients vanish](01_why_gradients_vanish.ipynb).
