# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # 3. Your own model: hooks in a training loop
#
# gradflow reads the gradient of a model as it is. Nothing has to be rewritten, and nothing that the model
# computes changes by a bit. Five stories: a stacked classifier, a training loop that never trains its
# recurrence, truncation and what it costs, a loss that becomes NaN, and two whole trainings, watched.
#
# *The notes* are five lecture notes, written in Chinese, on vanishing and exploding gradients in RNN and LSTM.
# What they claim stands here in quotation marks or after "the notes", and is measured.
#
# | letter or word | in gradflow |
# |---|---|
# | layers of a deep RNN | one track each: `rnn.l0`, `rnn.l1` |
# | gradient vanishes, explodes | verdicts `vanishing`, `exploding` |
# | truncated BPTT | `track.cuts`: steps at which no previous state arrives |
# | gradient clipping | norms before and after; what it cannot do |
# | hidden state $h_t$, cell state $c_t$ | `track.h`, `track.c` |
# | the program crashes, NaN | finding `not-finite`: layer, step, sequence, unit |
#
# <details><summary>Words of the notes in Chinese (中文)</summary>
#
# | 中文 | letter or word |
# |---|---|
# | 多层循环网络 | layers of a deep RNN |
# | 梯度消失, 梯度爆炸 | gradient vanishes, explodes |
# | 截断的随时间反向传播 | truncated BPTT |
# | 梯度裁剪 | gradient clipping |
# | 隐藏状态, 细胞状态 | hidden state $h_t$, cell state $c_t$ |
# | 程序崩溃 | the program crashes, NaN |
#
# </details>

# %%
import math
import subprocess
import sys
import tempfile
import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import gradflow
from gradflow import reporter
from gradflow.demo import AddingModel, adding_batch

torch.set_num_threads(1)  # small layers: more threads only wait for each other
_ = torch.manual_seed(0)


# %% [markdown]
# ## The picture first: a stacked classifier
#
# Two LSTM layers and a linear head on the last step, the model of the notes. The notes feed it 5 sequences of 7
# steps; here are 8 of 40, for in 7 steps there is not much to lose.


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
# Each layer has a row of its own. The lower one learns only through what the upper one passes down, ∂L/∂x of the
# upper layer, and that is less at every layer:

# %%
gradflow.plot(run, "layers")

# %% [markdown]
# On the notes' own shape, and from nothing but a file of weights, on the command line (`-q` leaves the sentences;
# without it there is a report to open as well):

# %%
print(
    *(layer.sentence for layer in gradflow.diagnose(model, torch.randn(5, 7, 10)).values()),
    sep="\n",
)
with tempfile.TemporaryDirectory() as folder:
    torch.save(model.state_dict(), f"{folder}/model.pt")
    command = ["gradflow", "analyze", "model.pt", "--seq-len", "40", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, check=True
    )
print("\n$", *command, f"\n{done.stdout}")

# %% [markdown]
# The numbers from the file differ from those of the picture: without data it tries noise of its own as input.
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
for name in ("weight_hh_l0", "weight_ih_l0"):
    print(f"largest entry of ∂L/∂{name}: {model.lstm.get_parameter(name).grad.abs().max():.1e}")
layer = gradflow.analyze(recording)["lstm.l0"]
print(layer.sentence)
for finding in layer.findings:
    print(f"{finding.name}: {finding.message}. {finding.advice}.")

# %% [markdown]
# With T = 1 from a zero state the recurrent weights get no gradient at all: whatever this program learns, it is
# not a memory. In the evaluation the notes set `model.hidden`, which nobody reads, so there the state *is* carried on: a hundred
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
# Grey is undefined: no gradient crosses a cut, and the verdict is about the five steps on this side of it. What
# was asked for lies 59 steps back, where this program can never look. Truncating every 30 steps costs little here
# because the gradient of the whole has nearly vanished by then; the cost of a cut is what would have come through.
#
# ## Explosion, NaN, and clipping
#
# "Explosion is easy to see: NaN, the program crashes." Here is one that does: a ReLU RNN that is to tell the mean
# of what it saw, its recurrent weights a little above 1.


# %%
def fit(clip=math.inf, updates=60):
    """Train; the gradient's norm before clipping and the loss at every update, the last recording."""
    torch.manual_seed(0)
    rnn, head = nn.RNN(2, 24, nonlinearity="relu"), nn.Linear(24, 1)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(1.05 * torch.eye(24))
        rnn.bias_ih_l0.zero_()
        rnn.bias_hh_l0.zero_()
    parameters = [*rnn.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.02)
    norms, losses = [], []
    for _ in range(updates):
        x = torch.rand(40, 16, 2)
        optimizer.zero_grad()
        with gradflow.record(rnn) as recording:
            output, _ = rnn(x)
            loss = nn.functional.mse_loss(head(output[-1])[:, 0], x[:, :, 0].mean(0))
            loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(parameters, clip)))
        losses.append(loss.item())
        optimizer.step()
        if not math.isfinite(loss.item()):
            break
    return np.array(norms), np.array(losses), recording


with warnings.catch_warnings(record=True):  # gradflow warns that the loss was not finite
    norms, losses, broken = fit()
for update, (norm, loss) in enumerate(zip(norms, losses, strict=True), start=1):
    print(f"update {update}: loss {loss:.3g}, norm of the gradient {norm:.3g}")
for finding in gradflow.analyze(broken).findings:
    print(f"{finding.name}: {finding.message}. {finding.advice}.")

# %% [markdown]
# One update with a large gradient was enough: it threw the weights to where the states themselves overflow. With
# the norm of the whole gradient clipped at 3 the same program learns:

# %%
clipped, losses, healthy = fit(clip=3.0)
update, hit = np.arange(1, len(clipped) + 1), clipped > 3
figure, axes = plt.subplots(figsize=(7, 3.2))
axes.semilogy(update, clipped, color="#9a9a9a", lw=1, zorder=0)
axes.semilogy(update[hit], clipped[hit], "o", color="#c3263a", ms=4, label="before clipping: hit")
axes.semilogy(update[~hit], clipped[~hit], "o", color="#0b2858", ms=4, label="left as it is")
axes.semilogy(
    update, np.minimum(clipped, 3), color="#d97000", lw=1, ls="--", label="after clipping"
)
axes.axvline(len(norms), color="black", lw=0.8, ls=":", label="without clipping: no longer finite")
axes.set(
    xlabel="update",
    ylabel="norm of the gradient",
    title="clipping at 3: hit at first, then ever less",
)
axes.legend(fontsize=8)
print(f"hit: {hit.sum()} of {len(hit)} updates, the last of them update {update[hit][-1]}")
print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.4f} at last")

# %% [markdown]
# Clipping by norm changes the *length* of the gradient, never its direction: one factor for all parameters
# together. Which network it leaves behind is told by the rate:

# %%
print(gradflow.analyze(healthy)["l0"].sentence)

# %% [markdown]
# ## A whole training, watched
#
# A recording is one step. `gradflow.watch`, one line before the loop, measures some of the steps by itself and
# writes them into a folder, which can be read while the model trains (`gradflow watch runs/a` in a terminal).
# Two models learn the adding task, 30 steps long: two of the numbers they see are marked, and their sum is asked
# for. One is an LSTM that learns it. The other is an RNN that starts where its gradient neither vanishes nor
# explodes, and is driven by a learning rate of 1 that nothing but clipping holds back.


# %%
def adding(cell, folder, updates, rate):
    """Train on the adding task under a watch; its history, and the mean loss of the last 20 updates."""
    torch.manual_seed(0)
    model = AddingModel(cell, hidden=16)
    if cell == "RNN":
        nn.init.orthogonal_(model.rnn.weight_hh_l0)
    method = torch.optim.Adam if cell == "LSTM" else torch.optim.SGD
    optimizer = method(model.parameters(), rate)
    numbers, losses = torch.Generator().manual_seed(0), []
    watch = gradflow.watch(model, folder, every=10, budget=None, on=lambda event: None)
    for _ in range(updates):
        x, y = adding_batch(64, 30, generator=numbers)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    watch.close()
    return watch.history, np.mean(losses[-20:])


runs = tempfile.TemporaryDirectory()
learns, loss = adding("LSTM", f"{runs.name}/lstm", updates=400, rate=0.02)
dies, lost = adding("RNN", f"{runs.name}/rnn", updates=380, rate=1.0)
print(f"loss at the end: LSTM {loss:.4f}, RNN {lost:.2f}; always guessing 1 has {1 / 6:.2f}")

# %%
gradflow.plot(learns)

# %% [markdown]
# Across is the training, down are the steps back from the loss; a pale column is a gradient that comes as far as
# the sequence reaches. The LSTM learns to hold it over all steps, and only then does its loss fall.

# %%
gradflow.plot(dies)

# %% [markdown]
# The RNN's picture runs the other way: the gradient reaches every step at first, comes and goes, and stays away.
# In words, as a report of a training begins with them (`gradflow report runs/a`), and what clipping did:

# %%
for history in (learns, dies):
    print(history.cells["rnn.l0"], reporter.sentence(reporter.course(history, "rnn.l0")))
probes = dies.data
share = 100 * probes["clipped"].mean().item()
print(f"clipping acted at {share:.0f} % of the RNN's probes")
print(
    "saturated share of its units:", *probes["saturated"].sel(layer="rnn.l0").values[::6].round(2)
)

# %% [markdown]
# Nearly every update has the full length of the learning rate, whatever the loss. That walks the weights out to
# where most units saturate, and through those no gradient comes back. Clipping kept the program from crashing; it
# did not keep it learning.
#
# ## What to take home
#
# * One `with gradflow.record(model)` around a training step; the model does not notice.
# * T = 1 and `detach()` raise no error in torch; gradflow says that no gradient can flow there.
# * Clip the norm of the whole gradient, and watch how often it hits: at every update it is a smaller learning
#   rate, and the rate tells why.
# * `gradflow.watch` before a loop, and the waterfall shows when the gradient went, not only that it is gone.
#
# Next: [an LSTM by hand](04_lstm_by_hand.ipynb).
