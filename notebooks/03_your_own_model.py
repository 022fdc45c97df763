# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # 3. Your own model: hooks in a training loop
#
# gradflow reads the gradient of a model as it is. Nothing has to be rewritten, and nothing that the model
# computes changes by a bit. Four stories: a stacked classifier, a training loop that never trains its
# recurrence, truncation and what it costs, and a loss that becomes NaN.
#
# | in the lecture notes | 中文 | in gradflow |
# |---|---|---|
# | layers of a deep RNN | 多层循环网络 | one track each: `rnn.l0`, `rnn.l1` |
# | gradient vanishes, explodes | 梯度消失, 梯度爆炸 | verdicts `vanishing`, `exploding` |
# | truncated BPTT | 截断的随时间反向传播 | `track.cuts`: steps at which no previous state arrives |
# | gradient clipping | 梯度裁剪 | norms before and after; what it cannot do |
# | hidden state $h_t$, cell state $c_t$ | 隐藏状态, 细胞状态 | `track.h`, `track.c` |
# | the program crashes, NaN | 程序崩溃 | finding `not-finite`: layer, step, sequence, unit |

# %%
import math
import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import gradflow

_ = torch.manual_seed(0)


# %% [markdown]
# ## The picture first: a stacked classifier
#
# Two LSTM layers and a linear head on the last step, the model of the notes, on sequences of 40 steps.


# %%
class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(10, 20, 2, batch_first=True)
        self.fc = nn.Linear(20, 1)

    def forward(self, x):
        h0, c0 = torch.zeros(2, len(x), 20), torch.zeros(2, len(x), 20)
        out, _ = self.lstm(x, (h0, c0))
        return self.fc(out[:, -1, :])


model = Classifier()
x, y = torch.randn(8, 40, 10), torch.randn(8, 1)
run = gradflow.diagnose(model, x, target=y, loss=nn.functional.mse_loss)
gradflow.plot(run)

# %%
run

# %% [markdown]
# Each layer has a row of its own. The lower one learns only through what the upper one passes down.
#
# ## In a training loop
#
# `gradflow.record` goes around one training step. What the model computes is bit for bit what it computes
# without; here is the proof, over twenty steps of two identical twins.


# %%
def train(recorded):
    torch.manual_seed(1)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        if recorded:
            with gradflow.record(model) as recording:
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
            norms = recording["lstm.l1"].grad_c.norm(dim=-1).median(dim=1).values
        else:
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            norms = None
        optimizer.step()
    return model, norms


plain, _ = train(recorded=False)
watched, norms = train(recorded=True)
equal = all(
    torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True)
)
print("weights after 20 steps bit for bit equal:", equal)
print(
    "‖∂L/∂c_t‖ of the last step, t = 1, 10, 20, 30, 40:",
    *(f"{norms[t]:.1e}" for t in (0, 9, 19, 29, 39)),
)

# %% [markdown]
# ## A program that never trains its recurrence
#
# The notes' example learns a sine wave, one point at a time: every training sequence has a single step, and
# its target is the input itself.


# %%
class SimpleLSTM(nn.Module):
    def __init__(self, input_size=1, hidden_size=100, output_size=1):
        super().__init__()
        self.hidden_size = hidden_size
        self.lstm = nn.LSTM(input_size, hidden_size)
        self.linear = nn.Linear(hidden_size, output_size)
        self.hidden_cell = (torch.zeros(1, 1, hidden_size), torch.zeros(1, 1, hidden_size))

    def forward(self, input_seq):
        lstm_out, self.hidden_cell = self.lstm(
            input_seq.view(len(input_seq), 1, 1), self.hidden_cell
        )
        predictions = self.linear(lstm_out.view(len(input_seq), -1))
        return predictions[-1]


torch.manual_seed(0)
series = torch.sin(0.2 * torch.arange(100.0)) + 0.5 * torch.rand(100)
model = SimpleLSTM()
with warnings.catch_warnings(record=True) as said, gradflow.record(model) as recording:
    model.hidden_cell = (torch.zeros(1, 1, 100), torch.zeros(1, 1, 100))
    loss = nn.functional.mse_loss(model(series[:1]), series[:1])
    loss.backward()
print("gradflow warns:", said[0].message, "\n")
layer = gradflow.analyze(recording)["lstm.l0"]
print(layer.sentence)
for finding in layer.findings:
    print(f"{finding.name}: {finding.message}. {finding.advice}.")

# %% [markdown]
# With T = 1 the recurrent weights get no gradient at all: whatever this program learns, it is not a memory. In
# the evaluation the notes set `model.hidden`, which nobody reads, so there the state *is* carried on: a hundred
# calls of one step, which gradflow joins into one track.

# %%
with (
    warnings.catch_warnings(record=True) as said,
    gradflow.record(model) as recording,
    torch.no_grad(),
):
    for value in series:
        model.hidden = (torch.zeros(1, 1, 100), torch.zeros(1, 1, 100))  # not what forward reads
        model(value.view(1))
print("gradflow warns:", said[0].message, "\n")
recording

# %% [markdown]
# Windows of the same series, twenty steps each, make it a recurrent task and a normal report.


# %%
def windows(model, length=20):
    """Windows of the series as one batch, the next point as the target."""
    chosen = torch.stack([series[i : i + length] for i in range(0, 80, 5)], dim=1)
    target = torch.stack([series[i + length] for i in range(0, 80, 5)])
    output, _ = model.lstm(chosen.unsqueeze(-1))
    return nn.functional.mse_loss(model.linear(output[-1])[:, 0], target)


with gradflow.record(model) as recording:
    windows(model).backward()
print(gradflow.analyze(recording)["lstm.l0"].sentence)

# %% [markdown]
# ## Truncation, and what it costs
#
# A long sequence is often cut into chunks; the state is carried on, detached. gradflow sees one track and
# where it is cut.

# %%
torch.manual_seed(0)
rnn = nn.RNN(4, 16)
with torch.no_grad():
    nn.init.orthogonal_(rnn.weight_hh_l0)
    rnn.weight_ih_l0 *= 0.2
head = nn.Linear(16, 1)
data = torch.randn(60, 8, 4)
target = data[0, :, :1]  # what was seen first is asked for last


def gradient(chunk):
    """∂L/∂W_hh with the state detached every `chunk` steps, and the recording."""
    rnn.zero_grad()
    with gradflow.record(rnn) as recording:
        state, outputs = torch.zeros(1, 8, 16), []
        for part in data.split(chunk):
            output, state = rnn(part, state.detach())
            outputs.append(output)
        nn.functional.mse_loss(head(torch.cat(outputs)[-1]), target).backward()
    return rnn.weight_hh_l0.grad.clone(), recording


whole, recording = gradient(60)
print(gradflow.analyze(recording)["l0"].sentence, "\n")
for chunk in (30, 15, 5):
    cut, recording = gradient(chunk)
    steps = (recording["l0"].cuts.all(1).nonzero()[:, 0] + 1).tolist()
    error = float((cut - whole).norm() / whole.norm())
    print(f"chunks of {chunk:>2}: cut at steps {steps}; ∂L/∂W_hh is off by {100 * error:.0f} %")

# %%
gradflow.plot(gradflow.analyze(recording).titled("detached every 5 steps"))

# %% [markdown]
# Grey is undefined: no gradient crosses a cut, so there is nothing to measure. A vanishing gradient can be argued
# with; a cut one cannot.
#
# ## Explosion, NaN, and clipping
#
# "Explosion is easy to see: NaN, the program crashes." Here is one that does: a ReLU RNN with weights a little
# too large.


# %%
def fit(clip=None, updates=40):
    """Train; return the gradient's norm before clipping at every update, and the last recording."""
    torch.manual_seed(0)
    rnn, head = nn.RNN(2, 24, nonlinearity="relu"), nn.Linear(24, 1)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(1.03 * torch.eye(24))
    parameters = [*rnn.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    norms = []
    for _ in range(updates):
        x = torch.rand(40, 16, 2)
        optimizer.zero_grad()
        with gradflow.record(rnn) as recording:
            output, _ = rnn(x)
            loss = nn.functional.mse_loss(head(output[-1])[:, 0], x[:, :, 0].sum(0))
            loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(parameters, clip or math.inf)))
        optimizer.step()
        if not math.isfinite(loss.item()):
            break
    return norms, recording


with warnings.catch_warnings(record=True):  # gradflow warns that the loss was not finite
    norms, broken = fit()
print(f"update {len(norms)}: the loss is no longer finite")
for finding in gradflow.analyze(broken).findings:
    print(f"{finding.name}: {finding.message}. {finding.advice}.")

# %%
clipped, healthy = fit(clip=1.0)
figure, axes = plt.subplots(figsize=(7, 3))
axes.semilogy(
    np.arange(1, len(clipped) + 1),
    clipped,
    "o-",
    color="#0b2858",
    ms=3,
    label="norm before clipping",
)
axes.axvline(len(norms), color="#c3263a", lw=1.5, label="without clipping: no longer finite")
axes.axhline(1.0, color="#9a9a9a", ls="--", lw=1)
axes.set(
    xlabel="update",
    ylabel="norm of the gradient",
    title="clipped at 1 (dashed): every update is hit, and nothing breaks",
)
_ = axes.legend()
print(f"clipping was needed at {sum(norm > 1 for norm in clipped)} of {len(clipped)} updates")

# %% [markdown]
# Clipping changes the *length* of the whole gradient, never its direction: the norm is taken over all parts
# together. Whether the network itself still makes the gradient grow is told by the rate, not by the clipping:

# %%
print(gradflow.analyze(healthy)["l0"].sentence)

# %% [markdown]
# ## What to take home
#
# * One `with gradflow.record(model)` around a training step; the model does not notice.
# * T = 1, a `detach()` and a dead layer all show as what they are: nothing, or exactly zero.
# * Clip the norm of the whole gradient, and look at the rate to see whether you must.
#
# Next: [an LSTM by hand](04_lstm_by_hand.ipynb).
