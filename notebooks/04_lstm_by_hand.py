# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # 4. An LSTM by hand, and a slip in the order of its gates
#
# The notes work through one LSTM cell with pencil and paper: four inputs, one memory, gates that are
# 0 or 1. We do it in numpy, then follow the gradient of the memory through it, then give the same weights to
# `nn.LSTMCell` and to `nn.LSTM`, and see which gate got which weights. At the end the backward equations of the
# LSTM, each checked against autograd.
#
# *The notes* are five lecture notes, written in Chinese, on vanishing and exploding gradients in RNN and LSTM.
# What they claim stands here in quotation marks or after "the notes", and is measured.
#
# | letter or word | in gradflow |
# |---|---|
# | memory, cell state $c_t$ | `track.c`; its total gradient is `track.grad_c` |
# | forget gate $f_t$ | `track.gates["f"]` |
# | input gate $i_t$ | `track.gates["i"]` |
# | output gate $o_t$ | `track.gates["o"]` |
# | candidate $\tilde c_t$ | `track.gates["g"]` |
# | constant error carrousel | the forget-gate path: $\partial c_{t'}/\partial c_t = \prod f$ |
# | gradient vanishes | verdict `vanishing`; −inf (black) where it is exactly 0 |
#
# <details><summary>Words of the notes in Chinese (中文)</summary>
#
# | 中文 | letter or word |
# |---|---|
# | 细胞状态 | memory, cell state $c_t$ |
# | 遗忘门 | forget gate $f_t$ |
# | 输入门 | input gate $i_t$ |
# | 输出门 | output gate $o_t$ |
# | 候选记忆 | candidate $\tilde c_t$ |
# | 常数误差传送带 | constant error carrousel |
# | 梯度消失 | gradient vanishes |
#
# </details>

# %%
import numpy as np
import torch
from torch import nn

import gradflow

# nine steps: a number, what to do with it (1 write, −1 reset), whether to read, and a constant 1
inputs = np.array(
    [
        (1, 0, 0, 1),
        (3, 1, 0, 1),
        (2, 0, 0, 1),
        (4, 1, 0, 1),
        (2, 0, 0, 1),
        (1, 0, 1, 1),
        (3, -1, 0, 1),
        (6, 1, 0, 1),
        (1, 0, 1, 1),
    ],
    dtype=float,
)
candidate = np.array([1, 0, 0, 0.0])
input_gate = np.array([0, 100, 0, -10.0])
forget_gate = np.array([0, 100, 0, 10.0])
output_gate = np.array([0, 0, 100, -10.0])

# %% [markdown]
# ## The picture first
#
# The same cell as a loop in torch, its memory marked with `gradflow.tap`, the loss read at the last step. The
# gradient reaches back to step 7, two steps before the loss, unchanged, and not one step further: there the forget
# gate is shut. The right-hand panel is about all pairs of steps, not only those that end at the loss: of the pairs
# three steps apart half lie on the two sides of step 7.


# %%
def hard(gate, x):
    """A gate that is 0 or 1."""
    return (x @ torch.as_tensor(gate) > 0).double()


x = torch.as_tensor(inputs)
with gradflow.record(nn.Identity()) as recording:
    memory = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    outputs = []
    for step in x:
        memory = memory * hard(forget_gate, step) + step[0] * hard(input_gate, step)
        memory = gradflow.tap("memory", c=memory)
        outputs.append(memory * hard(output_gate, step))
    outputs[-1].sum().backward()
run = gradflow.analyze(recording)
gradflow.plot(run)

# %% [markdown]
# ## With pencil and paper

# %%
memory = 0.0
print("step  x1  x2  x3   before  forget input  after  output")
for number, step in enumerate(inputs, start=1):
    forget, write, read = (int(step @ gate > 0) for gate in (forget_gate, input_gate, output_gate))
    before = memory
    memory = forget * memory + write * (step @ candidate)
    shown = read * memory
    numbers = (
        f"{step[0]:3.0f} {step[1]:3.0f} {step[2]:3.0f}   {before:5.0f}  {forget:5d} {write:5d}"
    )
    print(f"{number:4d} {numbers} {memory:6.0f} {shown:7.0f}")

# %% [markdown]
# The memory before each step is 0 0 3 3 7 7 7 0 6, the output 0 0 0 0 0 7 0 0 6, as in the notes.
#
# ## One wall
#
# For such a cell $\partial c_{t'}/\partial c_t$ is the product of the forget gates in between: 1 as long as all
# are open, exactly 0 once one of them is shut. Seen over all pairs that is a wall.

# %%
gain = run["memory"].data["log_gain"].sel(norm="spectral")[0].values
print("gain from step 2 to steps 2 … 9:", np.exp(gain[1, 1:]))
print("gain from step 7 to steps 7 … 9:", np.exp(gain[6, 6:]))
gradflow.plot(run, "gain-map")

# %% [markdown]
# Black is an *exact* zero. No clever initialisation brings it back: what was before step 7 is forgotten by
# design, since the input said so. A wall where the task wants to forget is not a fault.
#
# ## The same weights in `nn.LSTMCell`
#
# The notes go on to PyTorch: no biases, no recurrent weights, and the four rows written as they come to mind,
# with the comment "forget, input, output, cell".

# %%
as_written = torch.tensor(np.array([forget_gate, input_gate, candidate, output_gate]))
cell = nn.LSTMCell(4, 1, bias=False).double()
with torch.no_grad():
    cell.weight_ih.copy_(as_written)
    cell.weight_hh.zero_()


def run_cell(cell):
    """The nine outputs of a cell, recorded."""
    with gradflow.record(cell) as recording:
        state, outputs = None, []
        for step in x:
            state = cell(step.unsqueeze(0), state)
            outputs.append(state[0])
        torch.cat(outputs).sum().backward()
    return recording, torch.cat(outputs).detach()[:, 0]


recording, outputs = run_cell(cell)
print("rounded:", [round(float(value)) for value in outputs])
print("steps 6 and 9:", [round(float(outputs[t]), 4) for t in (5, 8)])

# %% [markdown]
# 0 0 0 0 0 1 0 0 1: it reads at the right steps, the values are squeezed by tanh, and everybody is content.
# Now look at the gates.

# %%
track = recording["cell"]
print("step ", *(f"{t:5d}" for t in range(1, 10)))
for name, gate in track.gates.items():
    print(f"{name}    ", *(f"{float(value):5.2f}" for value in gate[:, 0, 0]))

# %% [markdown]
# PyTorch's rows are **i, f, g, o**. The row meant as the forget gate is the *input* gate: it is open at every
# step but 7, so the cell writes all the time. The row meant as the input gate is the *forget* gate: it is shut
# at every step but 2, 4 and 8, so the cell forgets all the time. The outputs look right by accident, because
# the candidate is written and read in the same step.

# %%
right = nn.LSTMCell(4, 1, bias=False).double()
with torch.no_grad():
    rows = np.array([input_gate, forget_gate, candidate, output_gate])
    right.weight_ih.copy_(torch.tensor(rows))
    right.weight_hh.zero_()
recording_right, outputs_right = run_cell(right)
print("rows as written, steps 6 and 9:", [round(float(outputs[t]), 4) for t in (5, 8)])
print("rows i, f, g, o, steps 6 and 9:", [round(float(outputs_right[t]), 4) for t in (5, 8)])

# %% [markdown]
# The gain maps tell the two apart at a glance: on the left a cell without a memory, on the right the wall of above
# (σ(−90) where the hard gate has 0: not black any more, and just as gone).

# %%
runs = [
    gradflow.analyze(recording).titled("as written"),
    gradflow.analyze(recording_right).titled("i, f, g, o"),
]
for run in runs:
    gain = run["cell"].data["log_gain"].sel(norm="spectral")[0].values
    print(f"rows {run.title}: the gain from step 2 to step 6 is {np.exp(gain[1, 5]):.2g}")
gradflow.plot(runs, "gain-map")

# %% [markdown]
# ## And in `nn.LSTM`
#
# A fused layer with the same weights gives the same numbers; gradflow sees inside it just as well.

# %%
fused = nn.LSTM(4, 1, bias=False).double()
with torch.no_grad():
    fused.weight_ih_l0.copy_(as_written)
    fused.weight_hh_l0.zero_()
with gradflow.record(fused) as recording_fused:
    output, _ = fused(x.unsqueeze(1))
    output.sum().backward()
inside = recording_fused["l0"]
print("outputs equal:", torch.equal(output.detach()[:, 0, 0], outputs))
print("∂L/∂c equal:  ", torch.allclose(inside.grad_c, track.grad_c, rtol=1e-12, atol=0))

# %% [markdown]
# ## The backward equations
#
# With $Z_t = H_t W_y + b_y$ and a loss at every step, the notes derive
#
# $$\frac{\partial L}{\partial H_t} = \frac{\partial L_t}{\partial Z_t} W_y^\top + \text{carried}, \qquad
# \frac{\partial L}{\partial c_t} = O_t \odot \tanh'(c_t) \odot \frac{\partial L}{\partial H_t}
# + f_{t+1} \odot \frac{\partial L}{\partial c_{t+1}},$$
#
# $$\frac{\partial L}{\partial O_t} = \frac{\partial L}{\partial H_t} \odot \tanh c_t, \qquad
# \frac{\partial L}{\partial W_y} = \sum_t H_t^\top \frac{\partial L_t}{\partial Z_t}, \qquad
# \frac{\partial L}{\partial b_y} = \sum_t \frac{\partial L_t}{\partial Z_t}.$$
#
# Everything in them is recorded: totals and direct parts, gates, and δ, the gradient before the gates'
# nonlinearities, through which the carried part comes. The slip is in the second: the notes put the *direct* part
# $\partial L_t/\partial H_t$ in the place of the total $\partial L/\partial H_t$.

# %%
torch.manual_seed(0)
lstm, head = nn.LSTM(3, 4).double(), nn.Linear(4, 2).double()
with gradflow.record(lstm) as recording:
    output, _ = lstm(torch.randn(6, 2, 3, dtype=torch.float64))
    scores = head(output)
    scores.retain_grad()
    scores.square().sum().backward()
track, dz = recording["l0"], scores.grad
o, slope = track.gates["o"], 1 - track.c.tanh() ** 2

direct = dz @ head.weight.detach()
carried = torch.zeros_like(direct)
carried[:-1] = track.delta_hh[1:] @ lstm.weight_hh_l0.detach()
kept = torch.zeros_like(direct)
kept[:-1] = track.gates["f"][1:] * track.grad_c[1:]


def off(formula, wanted):
    """Relative difference of two tensors."""
    return f"{float((formula - wanted).norm() / wanted.norm()):.0e}"


print("∂L/∂H:  ", off(direct + carried, track.grad_h))
print("∂L/∂c:  ", off(o * slope * track.grad_h + kept, track.grad_c))
# δ of the output gate is ∂L/∂O ⊙ O (1 − O); its rows come last
print("∂L/∂O:  ", off(track.grad_h * track.c.tanh(), track.delta[..., 12:] / (o * (1 - o))))
print("∂L/∂W_y:", off(torch.einsum("tbz,tbh->zh", dz, track.h), head.weight.grad))
print("∂L/∂b_y:", off(dz.sum((0, 1)), head.bias.grad))
slip = torch.zeros_like(track.grad_c)  # the recursion as the notes would have it computed
for t in range(5, -1, -1):
    slip[t] = o[t] * slope[t] * direct[t]
    if t < 5:
        slip[t] += track.gates["f"][t + 1] * slip[t + 1]
for t in (5, 4, 0):
    error = (slip[t] - track.grad_c[t]).norm() / track.grad_c[t].norm()
    print(f"the slip, ∂L/∂c_t from direct parts alone: off by {float(error):.0%} at step {t + 1}")

# %% [markdown]
# ## What to take home
#
# * Along the cell's own path the gradient is a product of forget gates. That is the idea of the LSTM, and also its
#   limit: one shut gate is a wall.
# * ∂L/∂c_t wants the *total* ∂L/∂h_t; with the direct part the error grows towards the past.
# * PyTorch's order is i, f, g, o. If a model behaves *almost* right, look at its gates.
#
# Next: [cells of your own](05_cells_of_your_own.ipynb).
