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
# Many factors below one make nothing, many above one make everything. That much is in
# every lecture. This notebook asks the next questions: *which* number has to be compared with one, and
# for which networks?
#
# *The notes* are five lecture notes, written in Chinese, on vanishing and exploding gradients in RNN and LSTM.
# What they claim stands here in quotation marks or after "the notes", and is measured.
#
# | letter or word | in gradflow |
# |---|---|
# | $h_t$, $s_t$ | `track.h`, `track.states` |
# | $\partial L/\partial h_t$ | `track.grad_h`, the total; `track.grad_h_direct`, without the way through later steps |
# | $\partial h_{t'}/\partial h_t$ | `log_gain`: the natural logarithm of its size, the *gain* |
# | gradient vanishes | verdict `vanishing` |
# | gradient explodes | verdict `exploding` |
# | $t' - t$ | lag; the distance of interest is the span |
# | saturated neuron | activation at its flat end, a factor near 0 |
# | BPTT | what `track.grad_h` is the result of |
# | $\partial L/\partial W$, a sum over pairs (t′, t) | `plot(run, "lag-gradient")`: its parts by t′ − t |
#
# <details><summary>Words of the notes in Chinese (中文)</summary>
#
# | 中文 | letter or word |
# |---|---|
# | 隐藏状态 | $h_t$, $s_t$ |
# | 损失对隐藏状态的梯度 | $\partial L/\partial h_t$ |
# | 雅可比矩阵连乘 | $\partial h_{t'}/\partial h_t$ |
# | 梯度消失 | gradient vanishes |
# | 梯度爆炸 | gradient explodes |
# | 时间间隔 | $t' - t$ |
# | 神经元饱和 | saturated neuron |
# | 随时间反向传播 | BPTT |
# | 参数梯度 | $\partial L/\partial W$, a sum over pairs (t′, t) |
#
# </details>

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import gradflow

torch.set_num_threads(1)  # small layers: more threads only wait for each other
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
# Both vanish: an LSTM is no cure by itself. Its gates start half open (σ(0) = ½). That alone would halve the
# memory at every step and leave 10⁻³ of it after ten; the other paths of the cell carry it a little further,
# and no more. [Notebook 2](02_rnn_gru_lstm.ipynb) takes these paths apart,
# [notebook 6](06_remedies_and_chaos.ipynb) opens the gates.
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
    """Of a scalar map h -> step(w, h), for every w: growth of ln gain per step, and the states."""
    w = torch.as_tensor(w, dtype=torch.float64).unsqueeze(1)
    with gradflow.record(nn.Identity()) as recording:
        h = torch.full_like(w, start, requires_grad=True)
        for _ in range(steps):
            h = gradflow.tap(h=step(w, h))
        h.sum().backward()
    layer = gradflow.analyze(recording, stride=steps)["loop"]
    return layer.data["sequence_rate"].values, recording["loop"].h[..., 0].numpy()


def logistic(w, h):
    return torch.sigmoid(w * h)


w = np.linspace(-20, 20, 160)  # 0 itself is left out
measured, h = rates(logistic, 0.5, w)
flatness = np.log(h * (1 - h))[200:].mean(0)  # the mean of ln σ′(w h), once h has settled

figure, axes = plt.subplots(figsize=(7, 3.6))
axes.plot(w, np.log(np.abs(w)), color="#c3263a", ls="--", label="ln |w|, the first part")
axes.plot(w, flatness, color="#d97000", ls=":", label="mean ln σ′, the second part")
axes.plot(w, measured, color="#0b2858", lw=2, label="measured rate, their sum")
axes.axhline(0, color="black", lw=0.8)
axes.set(xlabel="w", ylabel="nats per step", title="σ(w h): σ′ shrinks faster than w grows")
_ = axes.legend(loc="lower left", fontsize=8)
print("  w    ln |w|  mean ln σ′   rate")
for value in (4, 8, -8):
    (rate,), h = rates(logistic, 0.5, [value])
    second = np.log(h * (1 - h))[200:].mean()
    print(f"{value:3d}   {math.log(abs(value)):+.3f}      {second:+.3f}  {rate:+.3f}")
print(f"largest rate of all: {measured.max():+.4f}, at w = {w[measured.argmax()]:.1f}")

# %% [markdown]
# **No w explodes in the long run.** The state runs to where σ is flat: beyond w ≈ 2 the larger w is, the *smaller*
# is the gain. On the left the rate just touches 0, where the state begins to alternate between two values
# (w σ′ = −1 there, at w = −5.87), and falls again. Both borders of the notes are borders of other systems:
#
# * |w| = 4 is the border of the *centred* map $\sigma(w h - w/2)$ **at h = ½**, where σ′ = ¼ exactly;
# * |w| = 1 is the border of a *linear* map, and of tanh from below.

# %%
centred, _ = rates(lambda w, h: torch.sigmoid(w * h - w / 2), 0.5, [2, 4, 8])
print("σ(wh − w/2) at h = ½, w = 2, 4, 8: rates", np.round(centred, 4))
linear, _ = rates(lambda w, h: w * h, 1.0, [0.9, 1.0, 1.1])
print("w h,                w = 0.9, 1, 1.1: rates", np.round(linear, 4))

w = np.linspace(0.2, 4, 96)
tanh, _ = rates(lambda w, h: torch.tanh(w * h), 1.0, w)
figure, axes = plt.subplots(figsize=(7, 3))
axes.plot(w, tanh, color="#0b2858", lw=2, label="tanh(w h)")
axes.plot(w, np.log(w), color="#c3263a", lw=1, ls="--", label="ln w")
axes.axhline(0, color="black", lw=0.8)
axes.axvline(1, color="#9a9a9a", lw=0.8)
axes.set(xlabel="w", ylabel="rate, nats per step", ylim=(-4, 1.5))
axes.set_title("tanh: ln w below 1, zero at 1, vanishing again beyond")
_ = axes.legend()

# %% [markdown]
# At w = 1 the tanh map is *critical*: h itself fades like $\sqrt{3/(2k)}$, so the product of the $1 - h^2$ fades as
# a power law, $k^{-3/2}$. Slower than any exponential, and gone all the same:

# %%
with gradflow.record(nn.Identity()) as recording:
    h = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    for _ in range(1001):
        h = gradflow.tap(h=torch.tanh(h))
    h.sum().backward()
layer = gradflow.analyze(recording, stride=1001)["loop"]
gain = layer.data["log_gain"].sel(norm="spectral")[0, 0].values
for lag in (10, 100, 1000):
    print(f"lag {lag:>4}: gain {math.exp(gain[lag]):.2e}")
print(f"power from lag 100 to 1000: {(gain[1000] - gain[100]) / math.log(10):.3f}")

# %% [markdown]
# ## Where explosion really happens
#
# 1. in **linear** maps with an eigenvalue beyond 1: w = 1.1 above;
# 2. at **unstable fixed points**, as long as the state sits on one: the centred map at h = ½ and w = 8 above.
#    The slightest push, and the state leaves for where σ is flat;
# 3. in **chaotic networks**: many units, strong weights, nothing settles. Here are 120 tanh units without any
#    input, their weights drawn with g = 2, twice what it takes in theory (g > 1, for infinitely many units).

# %%
torch.manual_seed(1)
units = 120
chaotic = nn.RNN(1, units, bias=False).double()
with torch.no_grad():
    chaotic.weight_hh_l0.normal_(0, 2.0 / math.sqrt(units))  # g = 2
    chaotic.weight_ih_l0.zero_()
start = torch.randn(1, 4, units, dtype=torch.float64)
silence = torch.zeros(120, 4, 1, dtype=torch.float64)
with gradflow.record(chaotic) as recording:
    chaotic(silence, start)[0][-1].sum().backward()
run = gradflow.analyze(recording)
rate = run["l0"].rate
print(run["l0"].sentence)
print(f"rate {rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}] nats per step")
gradflow.plot(run, "gain-map")

# %% [markdown]
# tanh keeps every state within ±1, and still two states that differ a little drift apart at this rate: a positive
# rate in a bounded network is chaos. Clipping keeps the update of such a network finite; it does not change the
# rate.
#
# ## One step's norm proves nothing
#
# The notes bound the product by the 2-norm of one step and claim that this norm is at most 1. A counterexample,
# made with PyTorch's own initial weights:

# %%
torch.manual_seed(0)
plain = nn.RNN(8, 64)
with gradflow.record(plain) as recording:
    plain(torch.zeros(100, 2, 8))[0][-1].sum().backward()
jacobian = gradflow.analyzer.step_jacobians(recording["l0"])[50, 0]
layer = gradflow.analyze(recording, stride=25)["l0"]
print(f"‖A‖₂ of one step: {torch.linalg.matrix_norm(jacobian, 2):.3f}, above 1")
print(
    f"the product over {layer.gain.steps} steps keeps 10^{layer.decades:.1f} of any gradient: {layer.verdict}"
)
bound = torch.linalg.matrix_norm(plain.weight_hh_l0.detach(), 2)
print(f"the bound that does hold: ‖A‖₂ ≤ ‖W‖₂ · max φ′ = {bound:.3f}")

# %% [markdown]
# A norm of one step can be above 1 while every product dies, and for a nonlinear network the spectral radius of W
# does not decide either. The product does: gradflow computes it for pairs of steps, without overflow.
#
# ## The gradient of a weight is a sum over pairs
#
# Three steps, as in the notes: $h_t = f(w_i x_t + w_h h_{t-1})$, $y_t = f(w_o h_t)$, a loss at every step. Then
#
# $$\frac{\partial L}{\partial w_h} = \sum_{t'} \sum_{t \le t'} \frac{\partial L_{t'}}{\partial y_{t'}}
# \frac{\partial y_{t'}}{\partial h_{t'}} \Big(\prod_{k=t+1}^{t'} \frac{\partial h_k}{\partial h_{k-1}}\Big)
# \frac{\partial^+ h_t}{\partial w_h}, \qquad \frac{\partial^+ h_t}{\partial w_h} = f'(a_t)\, h_{t-1}$$
#
# and the same for $w_i$ with $f'(a_t)\, x_t$; $w_o$ needs no product. All but the last factor is
# $\partial L_{t'}/\partial h_t$: one recording per loss step gives it.


# %%
inputs, wi, wh, wo = [1.0, -0.5, 0.8], 0.7, 1.3, 0.9


def three_steps(f, which):
    """The loop with the losses of the steps `which`, L_t = ½ y_t²: its track, and autograd's ∂L/∂w."""
    w = torch.tensor([wi, wh, wo], dtype=torch.float64, requires_grad=True)
    with gradflow.record(nn.Identity()) as recording:
        h, losses = torch.full((1, 1), 0.4, dtype=torch.float64), []
        for x in inputs:
            h = gradflow.tap(h=f(w[0] * x + w[1] * h))
            losses.append((f(w[2] * h) ** 2 / 2).sum())
        sum(losses[t] for t in which).backward()
    return recording["loop"], w.grad


for f, slope_at in ((torch.sigmoid, lambda h: h * (1 - h)), (torch.tanh, lambda h: 1 - h**2)):
    tracks = [three_steps(f, [t])[0] for t in range(3)]
    totals = np.array([np.nan_to_num(track.grad_h[:, 0, 0].numpy()) for track in tracks])  # t', t
    h = tracks[0].h[:, 0, 0].numpy()
    before, slope = np.array([0.4, *h[:-1]]), slope_at(h)
    pairs = totals * slope * before
    _, exact = three_steps(f, [0, 1, 2])
    print(f"{f.__name__}: contribution of every pair to ∂L/∂w_h, t′ down, t across")
    print(pairs.round(6))
    y = f(wo * torch.as_tensor(h)).numpy()
    sums = (totals * slope * np.array(inputs)).sum(), pairs.sum(), (y * slope_at(y) * h).sum()
    for name, value, wanted in zip(("w_i", "w_h", "w_o"), sums, exact, strict=True):
        print(f"  sum for {name} {value:.12f}, autograd {float(wanted):.12f}")
    # two slips: f'·w_i in every factor of the product, and h_t in the place of ∂⁺h_t/∂w_h
    factors = (wi / wh) ** np.maximum(np.subtract.outer(range(3), range(3)), 0)
    for slip, value in (("f′·w_i", (pairs * factors).sum()), ("h_t", (totals * h).sum())):
        print(f"  with {slip:6} {value:.12f}, {value / pairs.sum() - 1:+.0%}")

# %% [markdown]
# The two slips are both in the notes: one page writes $\partial h_k/\partial h_{k-1} = f' \cdot w_i$ (it is $w_h$),
# which bends the far pairs only; another writes $h_t$ for $\partial^+ h_t/\partial w_h$, which bends them all.
#
# With σ most of the sum sits on the diagonal: pairs far apart hardly count. That is what a vanishing gradient
# does to *learning*: the gradient of the weights is right, and made of the recent past. The RNN of the first
# picture, whose one loss sits at step 60:

# %%
gradflow.plot(runs[0], "lag-gradient")

# %% [markdown]
# ## Saturated neurons
#
# tanh and σ are flat at both ends. A unit that sits there passes on almost nothing, whatever the weights.

# %%
torch.manual_seed(0)
loud = nn.RNN(8, 32)
with torch.no_grad():
    loud.weight_ih_l0 *= 30  # inputs far too large
with gradflow.record(loud) as recording:
    loud(torch.randn(60, 16, 8))[0][-1].square().sum().backward()
h = recording["l0"].h
print(
    f"h above 0.95: {(h > 0.95).double().mean():.0%}; below −0.95: {(h < -0.95).double().mean():.0%}"
)
print(f"factors 1 − h² that are exactly 0 in float32: {(1 - h**2 == 0).double().mean():.0%}\n")
run = gradflow.analyze(recording)
for finding in run.findings:
    print(f"{finding.name}: {finding.message}. {finding.advice}.\n")
gradflow.plot(run)

# %% [markdown]
# Both ends are full, and the product dies within a few steps. The black on the left is the end of float32: the
# gradient there is smaller than its smallest number.
#
# %% [markdown]
# ## What to take home
#
# * The number that decides is the **gain over the span**: the largest of any direction, over the distance that
#   matters to you. In the long run it grows or shrinks at the **rate**, per step along the states the network really
#   visits. Both depend on the weights *and* on the input.
# * For a sigmoid or tanh unit, larger weights do not explode in the end: they saturate.
# * A bound on one step (‖A‖, a spectral radius) is not a verdict on the product.
#
# Next: [RNN, GRU, LSTM: what adding changes](02_rnn_gru_lstm.ipynb).
