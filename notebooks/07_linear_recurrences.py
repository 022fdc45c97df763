# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # 7. Linear recurrences: minGRU, Mamba, the gated delta rule
#
# The recurrent layers of today's language models are linear in their state: what a step keeps is decided by its
# input alone. All steps can then be computed at once, and the gradient between two steps is a product that can be
# written down. Does it reach further than an LSTM's? Four layers, one task, before and after training.
#
# | letter | meaning |
# |---|---|
# | $h_t$, $S_t$ | the state: a vector, or a matrix of keys × values in each head |
# | $a_t$ | the decay: how much of $h_{t-1}$ is kept, made of the input $x_t$ |
# | $z_t$ | the gate of a minGRU, $a_t = 1 - z_t$ |
# | $\Delta_t$ | the step of Mamba, $a_t = e^{-\Delta_t n}$ for $n = 1 \dots N$ |
# | $k_t, v_t, \beta_t$ | key, value and strength of what a delta rule writes |
#
# $$h_t = a_t \odot h_{t-1} + b_t \qquad\Rightarrow\qquad \frac{\partial h_{t'}}{\partial h_t} = a_{t'} \odot \dots \odot a_{t+1}$$
#
# <details><summary>Words of the notes in Chinese (中文)</summary>
#
# | 中文 | letter or word |
# |---|---|
# | 梯度消失 | the gradient vanishes |
# | 线性循环, 状态空间模型 | linear recurrence, state space model |
# | 衰减 | decay $a_t$ |
# | 门控 delta 规则 | gated delta rule |
# | 隐藏状态 | hidden state $h_t$ |
#
# </details>

# %%
import math

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

import gradflow

torch.set_num_threads(1)  # small layers: more threads only wait for each other
_ = torch.manual_seed(0)

# %% [markdown]
# ## The task: say at the end what you saw near the beginning
#
# 64 symbols. One of the first sixteen is a 0, 1, 2 or 3, all the others are noise (4 to 7). The answer at the end is
# that one symbol. Whoever guesses is right once in four.

# %%
SYMBOLS, T, WIDTH = 4, 64, 16


def batch(size, seed):
    """Symbols (size, T), and the one that is to be remembered, (size,)."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(SYMBOLS, 2 * SYMBOLS, (size, T), generator=draw)
    answer = torch.randint(SYMBOLS, (size,), generator=draw)
    x[torch.arange(size), torch.randint(T // 4, (size,), generator=draw)] = answer
    return x, answer


# %% [markdown]
# ## Four layers
#
# Since $a_t$ and $b_t$ are known for all steps beforehand, no loop is needed. Two steps of $h = a h + b$ are one
# step of the same kind, so every pass below reaches twice as far as the one before: six passes for 64 steps. The price
# is that no $h_t$ is computed from $h_{t-1}$ any more, and autograd cannot tell what flows from state to state. One
# line says it: `gradflow.scan(h, decay=a)` marks the states of all steps at once, returns them unchanged and costs
# nothing outside a recording.


# %%
def all_states(a, b):
    """h_t = a_t h_{t-1} + b_t for all t at once; a and b (B, T, ...)."""
    reach = 1
    while reach < b.shape[1]:
        b = b + a * torch.cat([torch.zeros_like(b[:, :reach]), b[:, :-reach]], 1)
        a = a * torch.cat([torch.ones_like(a[:, :reach]), a[:, :-reach]], 1)
        reach *= 2
    return b


class LSTM(nn.Module):
    """The layer to compare with: its gates read the state."""

    def __init__(self, width):
        super().__init__()
        self.rnn = nn.LSTM(width, width, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


class MinGRU(nn.Module):
    """h_t = (1 - z_t) h_{t-1} + z_t n_t, gate and candidate of the input alone (Feng et al. 2024)."""

    def __init__(self, width):
        super().__init__()
        self.gate, self.new = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        z = self.gate(x).sigmoid()
        return gradflow.scan(all_states(1 - z, z * self.new(x)), decay=1 - z, name="minGRU")


class Mamba(nn.Module):
    """N numbers a channel, each with a decay of its own (the scan of Gu & Dao 2023)."""

    def __init__(self, width, size=4):
        super().__init__()
        self.delta, self.write, self.read = (nn.Linear(width, n) for n in (width, size, size))
        self.n = nn.Parameter(torch.arange(1.0, size + 1))
        with torch.no_grad():  # steps from 0.001 to 0.1, evenly spread in their logarithm
            self.delta.bias.copy_((0.001 * 100 ** torch.rand(width)).expm1().log())

    def forward(self, x):
        delta = F.softplus(self.delta(x))[..., None]
        a = torch.exp(-delta * self.n)
        h = all_states(a, delta * x[..., None] * self.write(x)[:, :, None])
        h = gradflow.scan(h, decay=a, name="Mamba")
        return (h * self.read(x)[:, :, None]).sum(-1) + x


class GatedDelta(nn.Module):
    """A memory that first erases what it has under a key, then writes (Yang et al. 2024)."""

    def __init__(self, width, heads=2):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.beta, self.keep = nn.Linear(width, heads), nn.Linear(width, heads)

    def forward(self, x):
        q, k, v = (one(x).unflatten(-1, (self.heads, -1)) for one in (self.q, self.k, self.v))
        k, beta, a = F.normalize(k, dim=-1), self.beta(x).sigmoid(), self.keep(x).sigmoid()
        S, states = torch.zeros(1), []  # (B, heads, keys, values)
        for t in range(x.shape[1]):
            S = a[:, t, :, None, None] * S
            found = (k[:, t, :, :, None] * S).sum(2)
            S = S + (beta[:, t, :, None] * k[:, t])[..., None] * (v[:, t] - found)[:, :, None]
            states.append(S)
        S = gradflow.scan(torch.stack(states, 1), decay=a, keys=k, beta=beta, name="delta rule")
        return self.out((q[..., None] * S).sum(3).flatten(2))


class Model(nn.Module):
    """Symbols in, one of the layers, and what it holds at the last step decides."""

    def __init__(self, layer):
        super().__init__()
        self.embed, self.layer = nn.Embedding(2 * SYMBOLS, WIDTH), layer(WIDTH)
        self.answer = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, x):
        return self.answer(self.layer(self.embed(x))[:, -1])


LAYERS = (LSTM, MinGRU, Mamba, GatedDelta)


def made(layer):
    """A new model, the same one every time."""
    torch.manual_seed(0)
    return Model(layer)


# %% [markdown]
# ## How far the gradient reaches before training
#
# A row is a layer. Left its units against the steps back from the loss: pale is as much gradient as at the loss, dark
# blue a millionth of it. Right how much of *any* direction survives so many steps.

# %%
x, y = batch(8, seed=1000)


def look(model, title):
    """The analysis of a model on one batch."""
    with gradflow.record(model) as recording:
        F.cross_entropy(model(x), y).backward()
    return gradflow.analyze(recording).titled(title)


new = {layer.__name__: look(made(layer), f"{layer.__name__}, new") for layer in LAYERS}
runs = list(new.values())
gradflow.plot(runs)

# %% [markdown]
# Three of the four forget the symbol long before the end: a gate that starts half open keeps one half a step, and
# $2^{-10}$ is a thousandth. Mamba alone starts with time scales from ten to a thousand steps.

# %% [markdown]
# ## Do they learn it?


# %%
def trained(model, updates=150):
    """The model after training."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for update in range(updates):
        x, y = batch(32, seed=update)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


@torch.no_grad()
def right(model):
    """The share of right answers on symbols it has not seen."""
    x, y = batch(500, seed=2000)
    return f"{(model(x).argmax(1) == y).double().mean():.0%}"


def row(run):
    """Of the one layer of a run."""
    (layer,) = run.values()
    gone = "never" if layer.horizon is None else f"after {layer.horizon} steps"
    return {"verdict": layer.verdict, "gone": gone, "directions left": layer.channels}


old = {layer.__name__: trained(made(layer)) for layer in LAYERS}
table = {name: row(new[name]) | {"right after training": right(old[name])} for name in old}
pd.DataFrame(table).T

# %% [markdown]
# The one whose gradient reached the symbol learns it. The others guess, after 400 updates of 64 sequences too: what
# the loss never tells them they cannot learn.
#
# ## The remedy is one number
#
# Start with what keeps wide open. For the minGRU and the delta rule that is the bias of what makes $a_t$; for the
# LSTM the forget bias, and its opposite on the input gate so that noise does not pile up in the cell (chrono
# initialisation, Tallec & Ollivier 2018). A bias of 4 keeps $\sigma(4) = 0.982$ a step: 64 steps leave a third.


# %%
def opened(layer):
    """A new model whose layer starts by keeping."""
    model = made(layer)
    with torch.no_grad():
        if layer is LSTM:
            model.layer.rnn.bias_ih_l0[:WIDTH] -= 4
            model.layer.rnn.bias_ih_l0[WIDTH : 2 * WIDTH] += 4
        if layer is MinGRU:
            model.layer.gate.bias -= 4
        if layer is GatedDelta:
            model.layer.keep.bias += 4
    return model


remedied = {layer.__name__: opened(layer) for layer in LAYERS}
before = {name: look(model, name) for name, model in remedied.items()}
models = {name: old[name] if name == "Mamba" else trained(m) for name, m in remedied.items()}
runs = {name: look(model, f"{name}, trained") for name, model in models.items()}
table = {
    (name, when): row(run) | {"right after training": right(models[name]) if done else ""}
    for name in runs
    for when, run, done in (("new", before[name], False), ("trained", runs[name], True))
}
pd.DataFrame(table).T

# %%
gradflow.plot(list(runs.values()))

# %% [markdown]
# ## The gain by hand
#
# Nothing was estimated for the linear layers: between two steps every channel of the minGRU keeps exactly the product
# of its $1 - z$. The largest of them is the spectral gain.

# %%
model, run = models["MinGRU"], runs["MinGRU"]
keep = 1 - model.layer.gate(model.embed(x)).sigmoid().detach()
gain = run["minGRU"].data["log_gain"].sel(norm="spectral").isel(sequence=0)
b = int(gain["sequence"])
for source, target in ((0, 1), (0, 20), (0, 63), (40, 63)):
    by_hand = keep[b, source + 1 : target + 1].double().prod(0).max()
    measured = math.exp(gain.sel(source=source, target=target))
    print(f"from step {source + 1} to {target + 1}: by hand {by_hand:.6f}, measured {measured:.6f}")

# %% [markdown]
# An LSTM has no such product: its gates read $h_{t-1}$, and the gradient flows through the gates, too.
#
# ## What is kept, and by which head
#
# The decay is the input's affair. In the trained minGRU a symbol opens the gate, noise leaves it shut:

# %%
with torch.no_grad():
    each = 1 - model.layer.gate(model.embed(torch.arange(2 * SYMBOLS))).sigmoid()
    used = keep[:, -1].mean(0).argsort(descending=True)[:4]
pd.DataFrame(
    each[:, used].numpy().round(3),
    index=[f"symbol {s}" if s < SYMBOLS else f"noise {s}" for s in range(2 * SYMBOLS)],
    columns=[f"unit {int(u) + 1} keeps" for u in used],
)

# %% [markdown]
# A delta rule has heads, each a memory of its own. A row is a head, a column a distance:

# %%
gradflow.plot(runs["GatedDelta"], kind="heads")

# %% [markdown]
# ## What a hook would have shown
#
# The states come out of one scan, so a hook on them sees what the loss reads of each state by itself, the
# *direct* part: nothing at all but at the last step. The total is what flows through the recurrence.

# %%
gradflow.plot(runs["MinGRU"], kind="total-vs-direct")

# %% [markdown]
# ## Chunks
#
# Long sequences are trained in chunks, each from the last state of the one before, mostly detached. Given that state as
# `initial=`, the chunks are one track, and the cut is seen.

# %%
a = torch.full((1, 32, 4), 0.95)
first = torch.zeros(1, 4)
with gradflow.record(nn.Identity()) as recording:
    loss = 0.0
    for _ in range(2):
        b = torch.randn(1, 32, 4, requires_grad=True)
        h = a.cumprod(1) * first[:, None] + all_states(a, b)
        h = gradflow.scan(h, decay=a, initial=first, name="chunks")
        first = h[:, -1].detach()  # without detach() there is no cut
        loss = loss + h[:, -1].square().sum()
    loss.backward()
track = recording["chunks"]
print(f"{track.steps} steps, a cut at step {int(track.cuts[:, 0].nonzero()) + 1}")
print(gradflow.analyze(recording)["chunks"].sentence)

# %% [markdown]
# ## Models of others
#
# Mamba, Mamba-2, RG-LRU, the gated delta rule of Qwen3-Next, RWKV and xLSTM of transformers, minGRU-pytorch and
# mambapy need no mark: `with gradflow.record(model):` around a step of training is all. And
# `gradflow analyze FOLDER --tokens ids.npy` reads a model that lies in a folder.
#
# **In short.** A linear recurrence cannot explode while $|a| \le 1$, and how far its gradient reaches can be read off its
# decays. It forgets as fast as an LSTM if its decays start at one half. Where they start decides whether it learns.
