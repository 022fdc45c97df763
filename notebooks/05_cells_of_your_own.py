# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # 5. Cells of your own
#
# Peepholes, coupled gates, a cell written from scratch: gradflow finds a recurrent cell by what makes it one, that
# its outputs come back as its inputs. Nothing has to be registered, and the Jacobians are read from the graph that
# autograd built anyway.
#
# *The notes* are five lecture notes, written in Chinese, on vanishing and exploding gradients in RNN and LSTM.
# What they claim stands here in quotation marks or after "the notes", and is measured.
#
# | letter or word | in gradflow |
# |---|---|
# | LSTM cell from scratch | a track named after the module, `cell` its class |
# | peephole connections | gates that see $c_{t-1}$: part of the Jacobian |
# | coupled forget and input gates | $i = 1 - f$ |
# | hidden state, cell state | `track.states`, by the names your code gives them |
# | gradient vanishes | the same verdicts, for every cell alike |
#
# <details><summary>Words of the notes in Chinese (中文)</summary>
#
# | 中文 | letter or word |
# |---|---|
# | 从零实现的 LSTM 单元 | LSTM cell from scratch |
# | 窥视孔连接 | peephole connections |
# | 耦合的遗忘门与输入门 | coupled forget and input gates |
# | 隐藏状态, 细胞状态 | hidden state, cell state |
# | 梯度消失 | gradient vanishes |
#
# </details>

# %%
import warnings

import torch
from torch import nn

import gradflow

torch.set_num_threads(1)  # small layers: more threads only wait for each other
_ = torch.manual_seed(0)


# %% [markdown]
# ## The picture first
#
# The cell of the notes, written from scratch, in a loop of forty steps. Nobody told gradflow what it is.


# %%
class LSTMCell(nn.Module):
    """Gates in the order of the notes: forget, input, candidate, output."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.W_x = nn.Linear(input_size, 4 * hidden_size)
        self.W_h = nn.Linear(hidden_size, 4 * hidden_size)

    def forward(self, x, state):
        h, c = state
        f, i, candidate, o = (self.W_x(x) + self.W_h(h)).chunk(4, dim=-1)
        c_t = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(candidate)
        h_t = torch.sigmoid(o) * torch.tanh(c_t)
        return h_t, (h_t, c_t)


def loop(cell, x, hidden):
    """Run a cell over x and read the last step; the recording."""
    with gradflow.record(cell) as recording:
        state = (torch.zeros(x.shape[1], hidden), torch.zeros(x.shape[1], hidden))
        for step in x:
            output, state = cell(step, state)
        output.square().sum().backward()
    return recording


x = torch.randn(40, 16, 3)
recording = loop(LSTMCell(3, 5), x, 5)
run = gradflow.analyze(recording)
gradflow.plot(run)

# %%
track = recording["cell"]
print(track)
print("its states:", list(track.states))

# %% [markdown]
# ## Called once
#
# The notes call their cell a single time. Then no output comes back, and there is no recurrence to speak of:

# %%
cell, zero = LSTMCell(3, 5), torch.zeros(16, 5)
with warnings.catch_warnings(record=True) as said, gradflow.record(cell):
    output, _ = cell(x[0], (zero, zero))
    output.sum().backward()
print(said[0].message)

# %% [markdown]
# ## Exact, not approximate
#
# Seven steps of the cell, float64: the step Jacobian of the joint state against a dense one by `torch.func`, and the
# total gradient against autograd with `retain_grad` on every state:

# %%
cell = LSTMCell(3, 5).double()
data = torch.randn(7, 1, 3, dtype=torch.float64)
kept = []
with gradflow.record(cell) as recording:
    state = (torch.zeros(1, 5, dtype=torch.float64), torch.zeros(1, 5, dtype=torch.float64))
    for step in data:
        output, state = cell(step, state)
        for tensor in state:
            tensor.retain_grad()
        kept.append(state)
    output.sum().backward()
track = recording["cell"]


def joint(state, step):
    """One step on the joint state (h, c) as one vector."""
    _, (h, c) = cell(step, (state[None, :5], state[None, 5:]))
    return torch.cat([h, c], dim=1)[0]


jacobians = gradflow.analyzer.step_jacobians(track)
worst = 0.0
for t in range(1, 7):
    before = torch.cat([part.detach()[0] for part in kept[t - 1]])
    exact = torch.func.jacrev(joint)(before, data[t])
    worst = max(worst, float((jacobians[t, 0] - exact.detach()).abs().max()))
print(f"largest difference of a Jacobian's entry: {worst:.1e}")
h, c = list(track.grads)
for name, place in ((h, 0), (c, 1)):
    difference = max(
        float((track.grads[name][t] - kept[t][place].grad).abs().max()) for t in range(7)
    )
    print(f"largest difference of ∂L/∂{name}: {difference:.1e}")


# %% [markdown]
# ## Peepholes, and coupled gates
#
# A peephole lets a gate see the cell state: then $\partial c_t/\partial c_{t-1}$ is no longer the forget gate alone,
# even without recurrent weights. Coupled gates write exactly as much as they forget, $i = 1 - f$. Do they reach
# further? Two cells with peepholes p drawn from N(0, 1), one with coupled gates, and for comparison the peephole
# cell with p = 0, which is a plain LSTM.


# %%
class Peephole(nn.Module):
    """Peepholes on the forget gate alone, or on all gates (Gers & Schmidhuber 2000)."""

    def __init__(self, input_size, hidden_size, everywhere):
        super().__init__()
        self.everywhere = everywhere
        self.W_x = nn.Linear(input_size, 4 * hidden_size)
        self.W_h = nn.Linear(hidden_size, 4 * hidden_size)
        self.p = nn.Parameter(torch.randn(3, hidden_size))

    def forward(self, x, h, c):
        f, i, candidate, o = (self.W_x(x) + self.W_h(h)).chunk(4, dim=-1)
        f = torch.sigmoid(f + self.p[0] * c)
        i = torch.sigmoid(i + (self.p[1] * c if self.everywhere else 0))
        c = f * c + i * torch.tanh(candidate)
        o = torch.sigmoid(o + (self.p[2] * c if self.everywhere else 0))
        return o * torch.tanh(c), c


class Coupled(nn.Module):
    """One gate decides: what is written is what was forgotten."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.W_x = nn.Linear(input_size, 3 * hidden_size)
        self.W_h = nn.Linear(hidden_size, 3 * hidden_size)

    def forward(self, x, h, c):
        f, candidate, o = (self.W_x(x) + self.W_h(h)).chunk(3, dim=-1)
        f = torch.sigmoid(f)
        c = f * c + (1 - f) * torch.tanh(candidate)
        return torch.sigmoid(o) * torch.tanh(c), c


plain = Peephole(3, 16, everywhere=False)
nn.init.zeros_(plain.p)
cells = {
    "no peepholes": plain,
    "peephole on the forget gate": Peephole(3, 16, everywhere=False),
    "peepholes on all gates": Peephole(3, 16, everywhere=True),
    "coupled gates": Coupled(3, 16),
}
runs = []
for name, cell in cells.items():
    with gradflow.record(cell) as recording:
        h = c = torch.zeros(16, 16)
        for step in x:
            h, c = cell(step, h, c)
        h.square().sum().backward()
    runs.append(gradflow.analyze(recording).titled(name))
    print(f"{name}: {runs[-1]['cell'].sentence}")
gradflow.plot(runs[1:])

# %% [markdown]
# The peepholes lengthen the memory: where p c is positive an open gate holds itself open. They do so by their size,
# and not by being there. Drawn three times smaller they change little:

# %%
for size in (0.0, 0.3, 1.0):
    torch.manual_seed(3)  # the same cell but for the size
    cell = Peephole(3, 16, everywhere=False)
    with torch.no_grad():
        cell.p *= size
    with gradflow.record(cell) as recording:
        h = c = torch.zeros(16, 16)
        for step in x:
            h, c = cell(step, h, c)
        h.square().sum().backward()
    rate = gradflow.analyze(recording, stride=10)["cell"].rate
    print(f"peepholes × {size}: rate {rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}] per step")

# %% [markdown]
# Coupling the gates lengthens nothing by itself: what decides is where f stands, and here it stands at a half.
#
# Without recurrent weights the peephole cell has a closed form: its own derivative is $f + c f (1-f) p$, not $f$. At
# $c = 0.7$, with a peephole $p = 1.3$ and a bias of 0.2:

# %%
single = Peephole(1, 1, everywhere=False).double()
with torch.no_grad():
    for parameter in single.parameters():
        parameter.zero_()
    single.W_x.bias[0] = 0.2
    single.p[0] = 1.3
with gradflow.record(single) as recording:
    h, c = torch.zeros(1, 1).double(), torch.full((1, 1), 0.7).double().requires_grad_()
    h, c = single(torch.zeros(1, 1).double(), h, c)
    h, c = single(torch.zeros(1, 1).double(), h, c)
    c.sum().backward()
f = torch.sigmoid(torch.tensor(0.2 + 1.3 * 0.7, dtype=torch.float64))
print(
    f"measured ∂c₁/∂c₀ = {float(gradflow.analyzer.step_jacobians(recording['cell'])[0, 0, 1, 1]):.7f}"
)
print(f"closed form        {float(f + 0.7 * f * (1 - f) * 1.3):.7f}, and f alone {float(f):.7f}")

# %% [markdown]
# ## A loop without a cell
#
# Where the loop is written out and there is no module to find, mark the states once per step:

# %%
W = nn.Linear(8, 8, bias=False)
with gradflow.record(W) as recording:
    h = torch.zeros(16, 8)
    for step in torch.randn(40, 16, 8):
        h = torch.tanh(W(h) + step)
        h = gradflow.tap(h=h)
    h.sum().backward()
print(gradflow.analyze(recording))

# %% [markdown]
# ## What to take home
#
# * A cell is what feeds itself; gradflow looks for that, not for names.
# * Its Jacobians are those of the joint state, exact, whatever the cell does inside.
# * A change to the cell (a peephole, coupled gates) is worth what the rate says, at the weights you have.
#
# Next: [remedies, measured](06_remedies_and_chaos.ipynb).
