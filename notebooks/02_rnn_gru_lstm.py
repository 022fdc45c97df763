# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # 2. RNN, GRU, LSTM: covering against adding
#
# A plain RNN overwrites its state at every step; an LSTM adds to it. "C is the long-term memory, h the
# short-term one", "the additive structure helps, and learned gates decide": this notebook measures what stands
# behind such sentences, and ends with a small language model and words on the axes.
#
# | in the lecture notes | 中文 | in gradflow |
# |---|---|---|
# | cell state $c_t$, hidden state $h_t$ | 细胞状态, 隐藏状态 | `track.c`, `track.h`; totals `track.grad_c`, `track.grad_h` |
# | forget, input, output gate | 遗忘门, 输入门, 输出门 | `track.gates["f"]`, `["i"]`, `["o"]` |
# | update and reset gate (GRU) | 更新门, 重置门 | `track.gates["z"]`, `["r"]`; PyTorch's z keeps the old state |
# | gradient vanishes, explodes | 梯度消失, 梯度爆炸 | verdicts `vanishing`, `exploding` |
# | $\partial c_t/\partial c_{t-1}$ | 细胞状态的梯度 | `path_gain`: the four paths, step by step |
# | $\partial E_{t'}/\partial s_t$ | 每一步损失的梯度 | the loss triangle: `plot(run, "triangle")` |
# | $\delta_t$ | 误差项 | `track.delta` |

# %%
import random

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import gradflow

_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture first
#
# Three layers as PyTorch makes them, the same noise, the same loss at the last step. None reaches far: out of the
# box all three vanish, the LSTM a little later. The cell state is no magic, it has to *learn* to keep.

# %%
x = torch.randn(60, 16, 8)
runs = [
    gradflow.diagnose(module(8, 32), x).titled(module.__name__)
    for module in (nn.RNN, nn.GRU, nn.LSTM)
]
gradflow.plot(runs)

# %% [markdown]
# ## Covering and adding
#
# Covering: $S_t = f(S_{t-1}, x_t)$, the new state replaces the old. Adding: $S_t = S_{t-1} + \Delta S(x_t)$. For the
# second the Jacobian is the identity, so the gain is 1, exactly, at every distance. In between lies
# $S_{t-1} + \Delta S(x_t, S_{t-1})$, where what is added depends on what is there.

# %%
torch.manual_seed(0)
data = torch.randn(50, 8, 3, dtype=torch.float64)
weights = torch.randn(3, 3, dtype=torch.float64)
recurrent = 0.3 * torch.randn(3, 3, dtype=torch.float64)
steps = {
    "covering": lambda s, x: torch.tanh(x @ weights + s @ recurrent),
    "between": lambda s, x: s + 0.1 * torch.tanh(x @ weights - s),
    "adding": lambda s, x: s + torch.tanh(x @ weights),
}
figure, axes = plt.subplots(figsize=(7, 3))
for (name, step), colour in zip(steps.items(), ("#c3263a", "#d97000", "#0b2858"), strict=True):
    with gradflow.record(nn.Identity()) as recording:
        s = torch.zeros(8, 3, dtype=torch.float64, requires_grad=True)
        for value in data:
            s = gradflow.tap(s=step(s, value))
        s.sum().backward()
    layer = gradflow.analyze(recording)["loop"]
    axes.plot(layer.data["lag_median"] / np.log(10), color=colour, lw=2, label=name)
    print(f"{name:>8}: {layer.sentence}")
axes.set(xlabel="distance in steps", ylabel="log10 of the largest gain", ylim=(-12, 1))
_ = axes.legend()

# %% [markdown]
# ## The four paths of the cell state
#
# In $c_t = f_t \odot c_{t-1} + i_t \odot g_t$ the old cell state enters four times: times the forget gate, and,
# through $h_{t-1} = o_{t-1} \odot \tanh c_{t-1}$, in the forget gate, the input gate and the candidate:
#
# $$\frac{\partial c_t}{\partial c_{t-1}} = \operatorname{diag} f_t + \big[\operatorname{diag}(c_{t-1} f_t(1-f_t))U_f
# + \operatorname{diag}(g_t i_t(1-i_t))U_i + \operatorname{diag}(i_t(1-g_t^2))U_g\big]
# \operatorname{diag}\big(o_{t-1}(1-\tanh^2 c_{t-1})\big)$$
#
# The first is the constant error carrousel. The others can add to it, so the whole factor can exceed 1.

# %%
torch.manual_seed(0)
strong = nn.LSTM(8, 32)
with torch.no_grad():
    strong.weight_hh_l0 *= 4
    strong.bias_ih_l0[32:64] = 2
run = gradflow.diagnose(strong, x)
print(
    "largest factor of one step:",
    round(float(run["l0"].data["path_gain"].sel(path="total").max()), 2),
)
gradflow.plot(run, "paths")

# %% [markdown]
# A page of the notes multiplies this factor $t - k + 1$ times. That drops the path through $o$ and $h$ between the
# steps; only the Jacobian of the joint state (h, c) composes. By how much it matters:

# %%
torch.manual_seed(0)
lstm = nn.LSTM(8, 32).double()
with gradflow.record(lstm) as recording:
    lstm(x[:20].double())[0][-1].sum().backward()
jacobians = gradflow.analyzer.step_jacobians(recording["l0"])[:, 0]
whole, factor = torch.eye(64, dtype=torch.float64), torch.eye(32, dtype=torch.float64)
gates, c, cells = recording["l0"].gates, recording["l0"].c[:, 0], recording["l0"].c[:, 0]
print("steps   ∂c/∂c of the joint product   the factor, multiplied")
for t in range(1, 20):
    whole = jacobians[t] @ whole
    cc, ch = jacobians[t][32:, 32:], jacobians[t][32:, :32]
    o, before = gates["o"][t - 1, 0], c[t - 1]
    factor = (cc + ch * (o * (1 - before.tanh() ** 2))) @ factor
    if t in (1, 2, 5, 10, 19):
        block = whole[32:, 32:]
        print(
            f"{t:5d}   {torch.linalg.matrix_norm(block, 2):24.3e}   {torch.linalg.matrix_norm(factor, 2):22.3e}"
        )

# %% [markdown]
# ## "C is the long-term memory, h the short-term one"
#
# The four blocks of the product say how far each state reaches, and the share of the cell path says how much of it
# is the forget gates alone. Here is an LSTM with a forget bias of 3.

# %%
torch.manual_seed(0)
keeping = nn.LSTM(8, 32)
with torch.no_grad():
    keeping.bias_ih_l0[32:64] = 3
run = gradflow.diagnose(keeping, x)
gradflow.plot(run, "blocks")

# %% [markdown]
# What ends in h fades as what ends in c does: h is read off c at every step, so it has no memory of its own and
# needs none. The table "c long, h short" is right about where the memory *is*, not about how far h can see.
#
# ## A loss at every step
#
# With a loss at every step $\partial L/\partial s_t$ never fades towards the past, for every step brings a loss of
# its own. The truth is in the triangle: one row is one loss, pulled back alone.

# %%
torch.manual_seed(0)
rnn, head = nn.RNN(8, 24), nn.Linear(24, 5)
targets = torch.randint(5, (40 * 4,))
with gradflow.record(rnn) as recording:
    output, _ = rnn(x[:40, :4])
    nn.functional.cross_entropy(head(output).flatten(0, 1), targets).backward()
total = recording["l0"].grad_h.norm(dim=-1).median(1).values
print(f"‖∂L/∂s_t‖ at the first step over that at the last: {float(total[0] / total[-1]):.2f}")
gradflow.plot(gradflow.analyze(recording), "triangle")

# %% [markdown]
# ## A small language model
#
# "The clouds are in the *sky*" needs three words of memory. "I grew up in France … I speak fluent *French*" needs
# a dozen. We train two models on such sentences, and ask both for the last word.

# %%
PLACES = {"France": "French", "Spain": "Spanish", "Italy": "Italian", "Germany": "German"}
ENDS = {"man": "inside", "dog": "away", "bird": "south", "boat": "home"}
FILL = [
    "where the summers were long",
    "with my mother and two brothers",
    "in a house by the river",
    "before we moved across the sea",
    "and went to school there",
]
WORE = ["who wore a wig", "that we saw in the street", "with the long and sad face"]


def sentence(rng):
    kind = rng.random()
    if kind < 0.2:
        return "the clouds are in the sky"
    if kind < 0.6:
        place, middle = rng.choice(list(PLACES)), " ".join(rng.sample(FILL, rng.randint(1, 2)))
        return f"I grew up in {place} {middle} so I speak fluent {PLACES[place]}"
    who, middle = rng.choice(list(ENDS)), " ".join(rng.sample(WORE, rng.randint(1, 2)))
    return f"the {who} {middle} went {ENDS[who]}"


rng = random.Random(0)
words = ["", *sorted({word for _ in range(500) for word in sentence(rng).split()})]
index = {word: place for place, word in enumerate(words)}


class LanguageModel(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.embed, self.head = nn.Embedding(len(words), 16), nn.Linear(48, len(words))
        self.rnn = cell(16, 48)

    def forward(self, tokens):
        return self.head(self.rnn(self.embed(tokens))[0])


def batch(size, rng):
    rows = [torch.tensor([index[word] for word in sentence(rng).split()]) for _ in range(size)]
    return nn.utils.rnn.pad_sequence(rows)


def train(cell, updates=2000):
    torch.manual_seed(0)
    rng, model = random.Random(1), LanguageModel(cell)
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
    for _ in range(updates):
        tokens = batch(48, rng)
        scores = model(tokens[:-1]).flatten(0, 1)
        loss = nn.functional.cross_entropy(scores, tokens[1:].flatten(), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def last_words(model, sentences):
    """The share of sentences whose last word the model finds most likely."""
    right = 0
    for text in sentences:
        tokens = torch.tensor([index[word] for word in text.split()])
        right += int(model(tokens[:-1].unsqueeze(1))[-1, 0].argmax() == tokens[-1])
    return right / len(sentences)


models = {"RNN": train(nn.RNN), "LSTM": train(nn.LSTM)}
tests = [sentence(rng) for _ in range(300)]
for name, model in models.items():
    for first, what in (
        ("the clouds", "sky"),
        ("the ", "the man … went inside"),
        ("I", "fluent French"),
    ):
        some = [t for t in tests if t.startswith(first) and (first != "the " or "clouds" not in t)]
        print(f"{name:>4}, {what}: {100 * last_words(model, some):.0f} % of the last words right")

# %% [markdown]
# Both know about clouds. Only the LSTM knows where the speaker grew up. How far back does the last word's loss
# look? One sentence, word by word:

# %%
text = "I grew up in France with my mother and two brothers so I speak fluent French"
tokens = torch.tensor([index[word] for word in text.split()]).unsqueeze(1)


def last_word(output, target):
    return nn.functional.cross_entropy(output[-1], target[-1])


runs = {
    name: gradflow.diagnose(model, tokens[:-1], target=tokens[1:], loss=last_word).titled(name)
    for name, model in models.items()
}
figure, axes = plt.subplots(figsize=(8, 3))
for (name, run), colour in zip(runs.items(), ("#c3263a", "#0b2858"), strict=True):
    layer = run["rnn"]
    level = layer.data["grad_norm"].sel(kind="total", state=layer.main_state).values
    axes.semilogy(
        level / level[-1], "o-", ms=3, color=colour, label=f"{name}, ∂L/∂{layer.main_state}"
    )
axes.set_xticks(range(len(tokens) - 1), text.split()[:-1], rotation=45, ha="right")
axes.set(
    ylabel="gradient ÷ its size at the end", title="what the loss of “French” feels at every word"
)
_ = axes.legend()

# %%
gradflow.plot(list(runs.values()))

# %% [markdown]
# The gain map asks it of every pair of words: along the row "fluent", how far left does the colour reach? The state
# of the LSTM at "fluent" still feels what it read at "France"; in the RNN most of it is gone.

# %%
words = text.split()[:-1]
gradflow.plot([run.labelled(words) for run in runs.values()], "gain-map")

# %% [markdown]
# ## What to take home
#
# * Adding keeps the gradient; covering loses it. Gates decide which of the two an LSTM does.
# * The factor of one step can exceed 1, and its product is not the product of the joint Jacobian.
# * With a loss at every step look at one loss at a time.
#
# Next: [your own model](03_your_own_model.ipynb).
