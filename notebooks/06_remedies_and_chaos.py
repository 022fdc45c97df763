# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # 6. Remedies, measured; horizons to 1000 steps; and chaos
#
# "Use an LSTM", "raise the forget bias", "use ReLU", "clip": every lecture ends with a list of remedies. Here
# each of them is measured, at 100, 300 and 1000 steps.
#
# | in the lecture notes | 中文 | in gradflow |
# |---|---|---|
# | gradient vanishes | 梯度消失 | verdict `vanishing`; `horizon`: first distance with a gain below 10⁻³ |
# | gradient explodes | 梯度爆炸 | verdict `exploding`; a positive rate |
# | forget gate bias | 遗忘门偏置 | `bias_ih_l0[H:2 * H]` and `bias_hh_l0[H:2 * H]`, which add up |
# | ReLU instead of tanh | 用 ReLU 代替 tanh | `nn.RNN(..., nonlinearity="relu")` |
# | gradient clipping | 梯度裁剪 | bounds the length, not the rate |
# | long-term dependency | 长期依赖 | the span: the distance that matters to you |

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import nn

import gradflow
from gradflow.demo.task import AddingModel, adding_batch

_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture first: before and after learning
#
# The adding task: two of a hundred numbers are marked, their sum is asked for at the end. Whoever ignores the
# input has a mean squared error of 1/6. The LSTM starts with a gradient that dies after a few steps; it learns
# all the same, and what it has learned is to let the gradient through.


# %%
def train(model, updates):
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(updates):
        x, y = adding_batch(64, 100, generator=generator)
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item()


x, y = adding_batch(16, 100, generator=torch.Generator().manual_seed(9))
torch.manual_seed(0)
lstm = AddingModel("LSTM")
before = gradflow.diagnose(lstm, x, target=y, loss=nn.functional.mse_loss)
error = train(lstm, 600)
after = gradflow.diagnose(lstm, x, target=y, loss=nn.functional.mse_loss)
print(f"error after 600 updates: {error:.4f}; of whoever ignores the input: {1 / 6:.4f}")
runs = [before.titled("LSTM before training"), after.titled("LSTM after training")]
gradflow.plot(runs)

# %% [markdown]
# ## How far does it reach?
#
# Untrained layers of sixteen units, noise as input, the horizon of the largest gain. "At three hundred steps
# and more an LSTM still vanishes", say the notes: the default one vanishes long before.


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


def reach(module, steps):
    """Horizon and channels over `steps` steps of noise."""
    torch.manual_seed(4)
    with gradflow.record(module) as recording:
        module(torch.randn(steps, 4, 4))[0][-1].sum().backward()
    return gradflow.analyze(recording, stride=max(1, steps // 8))["l0"]


remedies = {
    "RNN, as it comes": lambda steps: layer("rnn"),
    "ReLU RNN, identity": lambda steps: layer("relu"),
    "GRU, as it comes": lambda steps: layer("gru"),
    "LSTM, as it comes": lambda steps: layer("lstm"),
    "LSTM, forget bias 1": lambda steps: layer("lstm", bias=1.0),
    "LSTM, forget bias 3": lambda steps: layer("lstm", bias=3.0),
    "LSTM, forget bias 5": lambda steps: layer("lstm", bias=5.0),
    "LSTM, chrono(T)": lambda steps: layer("lstm", chrono=steps),
}
rows = []
for name, make in remedies.items():
    row = {"": name}
    for steps in (100, 300, 1000):
        found = reach(make(steps), steps)
        row[f"horizon, T = {steps}"] = "never gone" if found.horizon is None else found.horizon
        row[f"channels, T = {steps}"] = found.channels
    rows.append(row)
pd.DataFrame(rows).set_index("")

# %% [markdown]
# * The horizon of the default layers does not depend on T: it is a property of the weights.
# * A forget bias of 1 is worth some fifty steps here, not three hundred; a bias of 3 reaches 300, with one
#   direction left, and not 1000.
# * ReLU with an identity matrix keeps *something* alive for hundreds of steps, in a few directions; nothing
#   decides what is kept.
# * Chrono initialisation is told the range and spans it, with nearly all directions (channels) left.
#
# ### The smallest bias that spans 300
#
# With the recurrent weights at zero a cell's gain over k steps is $f^k$ with $f = \sigma(b)$; for it to be 10⁻³
# just at 300 steps b has to be $\ln\frac{f}{1-f}$ with $f = 10^{-3/300}$. With recurrent weights and an input the
# gates differ from unit to unit, and the best of sixteen decides: it takes less.

# %%
f = 10 ** (-3 / 300)
print(f"without recurrent weights: b = {math.log(f / (1 - f)):.2f}")
biases = [2.0, 2.4, 2.6, 2.8, 2.9, 3.0]
horizons = [reach(layer("lstm", bias=bias), 400).horizon for bias in biases]
for bias, horizon in zip(biases, horizons, strict=True):
    gone = "not gone within 400 steps" if horizon is None else f"gone after {horizon} steps"
    print(f"bias {bias:.1f}: {gone}")
spans = [bias for bias, h in zip(biases, horizons, strict=True) if h is None or h > 300]
print(f"the smallest of these that spans 300 steps: {spans[0]}")

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
tried = gradflow.what_if(recording, forget_bias=3.0, scale_hh=1.5, truncate=20)
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
# ## ReLU does not cure it
#
# ReLU has a slope of exactly 1 or 0, so nothing is squeezed, and nothing is bounded either: with weights as
# PyTorch draws them the gain vanishes as before, a little larger and it explodes. There is no room between.

# %%
for scale in (1.0, 2.0, 3.0):
    torch.manual_seed(5)
    relu = nn.RNN(4, 64, nonlinearity="relu")
    with torch.no_grad():
        relu.weight_hh_l0 *= scale
    print(f"recurrent weights × {scale:.0f}: {reach(relu, 100).sentence}")

# %% [markdown]
# ## Chaos
#
# Above a gain of 1 a large random tanh network never settles. Its rate, the largest Lyapunov exponent, is
# positive: the gradient explodes for good, and two states that differ by nothing you could measure part ways.


# %%
def network(g, units=300):
    """A random tanh network of gain g, without input."""
    torch.manual_seed(7)
    module = nn.RNN(1, units, bias=False).double()
    with torch.no_grad():
        module.weight_hh_l0.normal_(0, g / math.sqrt(units))
    return module


silence, start = torch.zeros(200, 2, 1).double(), torch.randn(1, 2, 300).double()
found = {}
for g in (0.8, 1.5, 2.0, 3.0):
    module = network(g)
    with gradflow.record(module) as recording:
        module(silence, start)[0][-1].sum().backward()
    found[g] = gradflow.analyze(recording, stride=100)["l0"]
    print(f"g = {g}: {found[g].sentence}")

# %%
module = network(2.0)
moved = start + 1e-9 * torch.randn_like(start)
apart = (module(silence, start)[0] - module(silence, moved)[0]).norm(dim=-1)[:, 0].detach()
figure, axes = plt.subplots(figsize=(7, 3))
axes.semilogy(apart, color="#c3263a", lw=2, label="distance of two states that began 10⁻⁹ apart")
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
steps = math.log(2) / found[2.0].rate.value
print(
    f"the error doubles every {steps:.1f} steps: beyond some multiples of that no gradient means anything"
)

# %% [markdown]
# Clipping keeps the numbers finite here, but it clips noise. What helps is to cut, or to teacher-force, every
# ln 2 / λ₁ steps (Mikhaeil et al. 2022), or to take the weights back below the border.
#
# ## What to take home
#
# * Ask for a span first. "Vanishing" without a distance says nothing.
# * A remedy is worth what its horizon says, and for the price of one batch you can measure it.
# * Positive rate: chaos. No optimiser setting repairs that.
#
# Back to the beginning: [why gradients vanish](01_why_gradients_vanish.ipynb).
