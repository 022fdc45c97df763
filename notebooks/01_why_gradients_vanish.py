# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # 1. Why gradients vanish and explode, and where the border really is
#
# A recurrent network is one small network used again and again. What the loss at step t′ wants from the
# state at step t comes back through every step in between, and each step multiplies it by a Jacobian:
#
# $$\frac{\partial h_{t'}}{\partial h_t} = \prod_{k=t+1}^{t'} \frac{\partial h_k}{\partial h_{k-1}}$$
#
# Many factors below one make nothing (梯度消失), many above one make everything (梯度爆炸). That much is in
# every lecture. This notebook asks the next questions: *which* number has to be compared with one, and
# for which networks?
#
# | in the lecture notes | 中文 | in gradflow |
# |---|---|---|
# | $h_t$, $s_t$ | 隐藏状态 | `track.h`, `track.states` |
# | $\partial L/\partial h_t$ | 损失对隐藏状态的梯度 | `track.grad_h`, the total; `track.grad_h_direct`, without the way through later steps |
# | $\partial h_{t'}/\partial h_t$ | 雅可比矩阵连乘 | `log_gain`: the natural logarithm of its size, the *gain* |
# | gradient vanishes | 梯度消失 | verdict `vanishing` |
# | gradient explodes | 梯度爆炸 | verdict `exploding` |
# | $t' - t$ | 时间间隔 | lag; the distance of interest is the span |
# | saturated neuron | 神经元饱和 | activation at its flat end, a factor near 0 |
# | BPTT | 随时间反向传播 | what `track.grad_h` is the result of |
# | $\delta_t$ | 误差项 | `track.delta`, the gradient at the pre-activation |

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import gradflow

_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture first
#
# Two untrained layers read the same noise, and the loss looks at the last step only. One row is one layer:
# on the left its units over the steps back from the loss, coloured by how large the gradient still is.

# %%
x = torch.randn(60, 16, 8)  # 60 steps, 16 sequences, 8 features
runs = [
    gradflow.diagnose(nn.RNN(8, 32), x).titled("RNN as PyTorch makes it"),
    gradflow.diagnose(nn.LSTM(8, 32), x).titled("LSTM as PyTorch makes it"),
]
gradflow.plot(runs)

# %% [markdown]
# Both vanish: an LSTM is no cure by itself. Its gates start half open (σ(0) = ½), so the cell halves its
# memory at every step. Notebook 2 and notebook 6 come back to that.
#
# ## One unit, no input
#
# The notes begin with $h_t = \sigma(w\,h_{t-1})$. Its gain over k steps has two parts that should not be
# mixed up:
#
# $$\frac{\partial h_{t+k}}{\partial h_t} = w^k \cdot \prod \sigma'(w h)$$
#
# The notes say that |w| < 1 vanishes and |w| > 1 explodes, judging by the first part alone; another page
# moves the border to |w| = 4, since σ′ is at most ¼. Let us measure. A loop written by hand marks its
# state with `gradflow.tap`; every row of the batch gets a w of its own, so one recording holds them all.


# %%
def rates(step, start, w, steps=400):
    """The rate (growth of ln gain per step) for every w of a scalar map h -> step(w, h)."""
    w = torch.as_tensor(w, dtype=torch.float64).unsqueeze(1)
    with gradflow.record(nn.Identity()) as recording:
        h = torch.full_like(w, start, requires_grad=True)
        for _ in range(steps):
            h = gradflow.tap(h=step(w, h))
        h.sum().backward()
    return gradflow.analyze(recording)["loop"].data["sequence_rate"].values


w = np.linspace(-20, 20, 161)
measured = rates(lambda w, h: torch.sigmoid(w * h), 0.5, w)

figure, axes = plt.subplots(figsize=(7, 3.4))
axes.plot(w, measured, color="#0b2858", lw=2, label="measured rate")
axes.plot(
    w,
    np.log(np.abs(w) + 1e-9),
    color="#c3263a",
    lw=1,
    ls="--",
    label="ln |w|, the first part alone",
)
axes.plot(
    w,
    np.log(np.abs(w) / 4 + 1e-9),
    color="#d97000",
    lw=1,
    ls=":",
    label="ln(|w|/4), the border at 4",
)
axes.axhline(0, color="black", lw=0.8)
axes.set(ylim=(-8, 7), xlabel="w", ylabel="rate, nats per step", title="σ(w h): no w explodes")
_ = axes.legend(loc="upper right", fontsize=8, framealpha=1)
for value in (4, 8, -8):
    print(f"w = {value:>2}: rate {rates(lambda w, h: torch.sigmoid(w * h), 0.5, [value])[0]:+.3f}")

# %% [markdown]
# **No w explodes in the long run.** The state runs to where σ is flat, and there $\sigma'$ shrinks faster
# than w grows: the larger w, the *smaller* the gain (−2.575 at w = 4, −5.919 at 8). Near w = −6, where the state
# begins to alternate between two values, the rate just touches 0 and falls again. Both borders of the notes are
# borders of other systems:
#
# * |w| = 4 is the border of the *centred* map $\sigma(w h - w/2)$ **at h = ½**, where σ′ = ¼ exactly;
# * |w| = 1 is the border of a *linear* map, and of tanh from below.

# %%
centred = [rates(lambda w, h: torch.sigmoid(w * h - w / 2), 0.5, [value])[0] for value in (2, 4, 8)]
print("σ(wh − w/2) at h = ½, w = 2, 4, 8:", np.round(centred, 4), " ln 2 =", round(math.log(2), 4))
linear = rates(lambda w, h: w * h, 1.0, [0.9, 1.0, 1.1])
print("w h, w = 0.9, 1, 1.1:            ", np.round(linear, 4))

w = np.linspace(0.2, 4, 96)
tanh = rates(lambda w, h: torch.tanh(w * h), 1.0, w)
figure, axes = plt.subplots(figsize=(7, 3))
axes.plot(w, tanh, color="#0b2858", lw=2, label="tanh(w h)")
axes.plot(w, np.log(w), color="#c3263a", lw=1, ls="--", label="ln w")
axes.axhline(0, color="black", lw=0.8)
axes.axvline(1, color="#9a9a9a", lw=0.8)
axes.set(xlabel="w", ylabel="rate, nats per step", ylim=(-4, 1.5))
axes.set_title("tanh: ln w below 1, zero at 1, vanishing again beyond")
_ = axes.legend()

# %% [markdown]
# At w = 1 the tanh map is *critical*: the gradient does not fade exponentially but as a power law,
# $k^{-3/2}$. It is gone all the same, only later:

# %%
with gradflow.record(nn.Identity()) as recording:
    h = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    for _ in range(1001):
        h = gradflow.tap(h=torch.tanh(h))
    h.sum().backward()
gain = gradflow.analyze(recording, stride=64)["loop"].data["log_gain"].sel(norm="spectral")[0, 0]
for lag in (100, 1000):
    print(
        f"lag {lag:>4}: ln gain {float(gain[lag]):.4f}  (exponent {float(gain[lag]) / math.log(lag):.2f})"
    )

# %% [markdown]
# ## Where explosion really happens
#
# 1. in **linear** maps with an eigenvalue beyond 1;
# 2. at **unstable fixed points**, as long as the state sits on one;
# 3. in **chaotic networks**: many units, strong weights, nothing settles.

# %%
torch.manual_seed(1)
units = 200
chaotic = nn.RNN(1, units, bias=False).double()
with torch.no_grad():
    chaotic.weight_hh_l0.normal_(0, 2.0 / math.sqrt(units))  # gain g = 2
    chaotic.weight_ih_l0.zero_()
start = torch.randn(1, 4, units, dtype=torch.float64)
silence = torch.zeros(150, 4, 1, dtype=torch.float64)
with gradflow.record(chaotic) as recording:
    chaotic(silence, start)[0][-1].sum().backward()
layer = gradflow.analyze(recording)["l0"]
print(layer.sentence)
print(f"rate {layer.rate.value:.3f} [{layer.rate.low:.3f}, {layer.rate.high:.3f}]")
gradflow.plot(gradflow.analyze(recording), "gain-map")

# %% [markdown]
# A positive rate is the mark of chaos: two states that differ a little drift apart, and so does everything
# the gradient says about the past. Clipping keeps such a network from crashing; it does not cure it.
#
# ## One step's norm proves nothing
#
# The notes bound the product by the 2-norm of one step and claim that norm is at most 1. Count for yourself:

# %%
torch.manual_seed(0)
plain = nn.RNN(8, 64)
with gradflow.record(plain) as recording:
    plain(torch.zeros(100, 2, 8))[0][-1].sum().backward()
jacobian = gradflow.analyzer.step_jacobians(recording["l0"])[50, 0]
layer = gradflow.analyze(recording)["l0"]
print(f"‖A‖₂ of one step: {torch.linalg.matrix_norm(jacobian, 2):.3f}, above 1")
print(f"rate of the product: {layer.rate.value:.3f}, so it vanishes: {layer.verdict}")
bound = torch.linalg.matrix_norm(plain.weight_hh_l0.detach(), 2)
print(f"the bound that does hold: ‖A‖₂ ≤ ‖W‖₂ · max φ′ = {bound:.3f}")

# %% [markdown]
# A norm of one step can be above 1 while every product dies, and the spectral radius of W says nothing about
# a nonlinear network either. Only the product tells. That product is what gradflow computes, for every pair
# of steps.
#
# ## The gradient of a weight is a sum over pairs
#
# Three steps by hand, as in the notes: $h_t = f(w_i x_t + w_h h_{t-1})$, $y_t = f(w_o h_t)$, a loss at every
# step. Then
#
# $$\frac{\partial L}{\partial w_h} = \sum_{t'} \sum_{t \le t'} \frac{\partial L_{t'}}{\partial y_{t'}}
# \frac{\partial y_{t'}}{\partial h_{t'}} \Big(\prod_{k=t+1}^{t'} \frac{\partial h_k}{\partial h_{k-1}}\Big)
# \frac{\partial^+ h_t}{\partial w_h}$$
#
# Two slips to know about: one page writes $\partial h_k/\partial h_{k-1} = f' \cdot w_i$ (it is $w_h$), another
# writes $h_t$ for $\partial^+ h_t/\partial w_h$ (it is $f'(a_t)\,h_{t-1}$). Here is the size of each.


# %%
def pairs(f, slope, recurrent, last):
    """Contribution of every (t', t) to ∂L/∂w_h for L = Σ ½ y²; the arguments let a slip in."""
    wi, wh, wo = 0.7, 1.3, 0.9
    inputs = [1.0, -0.5, 0.8]
    h, a = [0.4], []
    for value in inputs:
        a.append(wi * value + wh * h[-1])
        h.append(f(a[-1]))
    table = np.zeros((3, 3))
    for target in range(3):
        y = f(wo * h[target + 1])
        carried = y * slope(wo * h[target + 1]) * wo
        for t in range(target, -1, -1):
            table[target, t] = carried * last(slope, a, h, t)
            carried *= slope(a[t]) * recurrent(wi, wh)
    return table


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def slope(v):
    return sigmoid(v) * (1 - sigmoid(v))


def right_recurrent(wi, wh):
    return wh


def right_last(slope, a, h, t):
    return slope(a[t]) * h[t]


table = pairs(sigmoid, slope, right_recurrent, right_last)

wh = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
h, loss = torch.tensor(0.4, dtype=torch.float64), 0.0
for value in (1.0, -0.5, 0.8):
    h = torch.sigmoid(0.7 * value + wh * h)
    loss = loss + torch.sigmoid(0.9 * h) ** 2 / 2
loss.backward()

print("contribution of every pair, t' down, t across:\n", table.round(6))
print(f"their sum    {table.sum():.12f}\nautograd     {wh.grad:.12f}")
print(f"with f'·w_i  {pairs(sigmoid, slope, lambda wi, wh: wi, right_last).sum():.12f}")
print(
    f"with h_t     {pairs(sigmoid, slope, right_recurrent, lambda s, a, h, t: h[t + 1]).sum():.12f}"
)

# %% [markdown]
# Most of the sum sits on the diagonal: pairs far apart hardly count. That is what a vanishing gradient does to
# *learning*: nothing is wrong with the gradient, it is merely made of the recent past.
#
# ## Saturated neurons
#
# tanh and σ are flat at both ends. A unit that sits there passes on almost nothing, whatever the weights.

# %%
torch.manual_seed(0)
loud = nn.RNN(8, 32)
with torch.no_grad():
    loud.weight_ih_l0 *= 30  # inputs far too large
run = gradflow.diagnose(loud, torch.randn(60, 16, 8)).titled("inputs thirty times too large")
for finding in run.findings:
    print(f"{finding.name}: {finding.message}. {finding.advice}.")
gradflow.plot(run)

# %% [markdown]
# ## What to take home
#
# * The number that decides is the **rate**: how fast ln gain grows per step along the states the network really
#   visits. It depends on the weights *and* on the input.
# * For a sigmoid or tanh unit, larger weights do not explode in the end: they saturate.
# * A bound on one step (‖A‖, a spectral radius) is not a verdict on the product.
#
# Next: [RNN, GRU, LSTM: what adding changes](02_rnn_gru_lstm.ipynb).
