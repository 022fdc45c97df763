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
# *The notes* are five lecture notes, written in Chinese, on vanishing and exploding gradients in RNN and LSTM.
# What they claim stands here in quotation marks or after "the notes", and is measured.
#
# | letter or word | in gradflow |
# |---|---|
# | cell state $c_t$, hidden state $h_t$ | `track.c`, `track.h`; totals `track.grad_c`, `track.grad_h` |
# | forget, input, output gate | `track.gates["f"]`, `["i"]`, `["o"]` |
# | update and reset gate (GRU) | `track.gates["z"]`, `["r"]`; PyTorch's z keeps the old state |
# | gradient vanishes, explodes | verdicts `vanishing`, `exploding` |
# | $\partial c_t/\partial c_{t-1}$ | `path_gain`: the four paths, step by step |
# | $\partial E_{t'}/\partial s_t$ | the loss triangle: `plot(run, "triangle")` |
# | $\delta_t$ | `track.delta` |
#
# <details><summary>Words of the notes in Chinese (中文)</summary>
#
# | 中文 | letter or word |
# |---|---|
# | 细胞状态, 隐藏状态 | cell state $c_t$, hidden state $h_t$ |
# | 遗忘门, 输入门, 输出门 | forget, input, output gate |
# | 更新门, 重置门 | update and reset gate (GRU) |
# | 梯度消失, 梯度爆炸 | gradient vanishes, explodes |
# | 细胞状态的梯度 | $\partial c_t/\partial c_{t-1}$ |
# | 每一步损失的梯度 | $\partial E_{t'}/\partial s_t$ |
# | 误差项 | $\delta_t$ |
#
# </details>

# %%
import random

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
# The GRU has no cell state: $h_t = (1 - z_t) \odot n_t + z_t \odot h_{t-1}$ adds and forgets with one gate. Written as
# a loop over `nn.GRUCell` it is the same network and has the same gradient; stacked, each layer is a track.

# %%
torch.manual_seed(0)
fused, cell = nn.GRU(8, 32).double(), nn.GRUCell(8, 32).double()
cell.load_state_dict(
    {name.removesuffix("_l0"): value for name, value in fused.state_dict().items()}
)
with gradflow.record(fused) as in_one:
    fused(x.double())[0][-1].square().sum().backward()
with gradflow.record(cell) as in_a_loop:
    h = torch.zeros(16, 32, dtype=torch.float64)
    for step in x.double():
        h = cell(step, h)
    h.square().sum().backward()
difference = (in_one["l0"].grad_h - in_a_loop["cell"].grad_h).norm(dim=-1)
worst = float((difference / in_one["l0"].grad_h.norm(dim=-1)).max())
print(f"∂L/∂h_t of the fused layer and of the loop differ at most by {worst:.0e} of their size")
for layer in gradflow.diagnose(nn.GRU(8, 32, 2), x).values():
    print(layer.sentence)

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
    end = float(layer.data["lag_median"][-1])
    print(
        f"{name:>8}: gain after 49 steps {np.exp(end):.3g}, rate {round(layer.rate.value, 4) + 0:.4f}"
    )
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
# The first is the constant error carrousel. The others can add to it, so the whole factor can exceed 1. An LSTM
# with recurrent weights four times PyTorch's and a forget bias of 2:

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
# "The additive structure helps, and learned gates decide": here the forget gate is nearly open at every step, and
# it is the path through the candidate g that lifts the whole factor above 1.
#
# A page of the notes multiplies this factor $t - k + 1$ times. That drops a path: $c_{t-1}$ also reaches $h_t$
# through the output gate $o_t$, and from there $c_{t+1}$. Only the Jacobian of the joint state (h, c) composes. The
# size of the slip, in an LSTM as PyTorch makes it and in the one above:


# %%
def sizes(lstm, steps=(1, 2, 5, 10, 19)):
    """Norm of ∂c_t'/∂c_t after so many steps, by the joint product and by multiplying the factor."""
    lstm = lstm.double()
    with gradflow.record(lstm) as recording:
        lstm(x[:20].double())[0][-1].sum().backward()
    track = recording["l0"]
    jacobians = gradflow.analyzer.step_jacobians(track)[:, 0]
    o, c = track.gates["o"][:, 0], track.c[:, 0]
    slope = o * (1 - c.tanh() ** 2)  # how h_t follows c_t while the output gate is held
    whole, factor = torch.eye(64, dtype=torch.float64), torch.eye(32, dtype=torch.float64)
    for t in range(1, 20):
        whole = jacobians[t] @ whole
        factor = (jacobians[t][32:, 32:] + jacobians[t][32:, :32] * slope[t - 1]) @ factor
        if t in steps:
            right = whole[32:, 32:] + whole[32:, :32] * slope[0]  # h moves with c, as in the factor
            yield t, *(float(torch.linalg.matrix_norm(part, 2)) for part in (right, factor))


torch.manual_seed(0)
for name, lstm in (("as PyTorch makes it", nn.LSTM(8, 32)), ("four times the weights", strong)):
    print(f"{name}:\nsteps   joint product   factor, multiplied   off by")
    for t, right, slip in sizes(lstm):
        print(f"{t:5d}   {right:13.3e}   {slip:18.3e}   {slip / right - 1:+.1%}")

# %% [markdown]
# One step agrees exactly. Over many the slip is small where the recurrent weights are small; in a network that
# uses its gates it is not.
#
# ## "C is the long-term memory, h the short-term one"
#
# Where is the memory, and who sees it? First the gradients: how far back ∂L/∂c_t and ∂L/∂h_t stay above 10⁻³ of
# their size at the loss, and how fast each fades once it is some steps away, in a default LSTM and with forget
# biases of 1 and 3. Then, for the last one, the four blocks of the product: from which state to which, over which
# distance.


# %%
def keeping(bias):
    torch.manual_seed(0)
    lstm = nn.LSTM(8, 32)
    with torch.no_grad():
        lstm.bias_ih_l0[32:64] += bias
    return gradflow.diagnose(lstm, x)


print("forget bias   state   felt for       after 1 step   then per step")
for bias in (0, 1, 3):
    run = keeping(bias)
    for state in ("c", "h"):
        size = run["l0"].data["grad_norm"].sel(kind="total", state=state).values[::-1]
        below = np.flatnonzero(size < 1e-3 * size[0])
        felt = f"{below[0]} steps" if len(below) else "all 59 steps"
        later = (size[40] / size[20]) ** (1 / 20)
        print(f"{bias:11d}   ∂L/∂{state}   {felt:<12} {size[1] / size[0]:14.2f} {later:15.3f}")
gradflow.plot(run, "blocks")

# %% [markdown]
# h is read off c at every step. Its gradient falls once, right after the loss, by what the gates let through; from
# then on both fade at the same pace, so the horizon of h is shorter by what that first fall is worth. The notes'
# table "C long, h short" is right about where the memory *is*: what starts in c and ends in c stays, what starts
# in h and ends in h is almost lost after one step.
#
# ## A loss at every step
#
# The notes' language model is an RNN, $s_t = \tanh(U x_t + W s_{t-1})$, $\hat y_t = \mathrm{softmax}(V s_t)$, with a
# cross-entropy $E_t$ at every step. Take $E_3$ alone: $\partial E_3/\partial V = (\hat y_3 - y_3) \otimes s_3$, and one
# step earlier $\delta_2 = \partial E_3/\partial z_2 = (W^\top \delta_3) \odot (1 - s_2^2)$.

# %%
torch.manual_seed(0)
rnn, head = nn.RNN(7, 6).double(), nn.Linear(6, 7, bias=False).double()
words = nn.functional.one_hot(torch.randint(7, (5,)), 7).double().unsqueeze(1)
answers = torch.randint(7, (5,))
with gradflow.record(rnn) as recording:
    scores = head(rnn(words)[0])[:, 0]
    errors = nn.functional.cross_entropy(scores, answers, reduction="none")
    errors[2].backward()  # E_3 alone
track = recording["l0"]
s, delta = track.h[:, 0], track.delta[:, 0]
surprise = scores[2].softmax(0).detach() - nn.functional.one_hot(answers[2], 7)
gap = (head.weight.grad - torch.outer(surprise, s[2])).norm() / head.weight.grad.norm()
print(f"∂E₃/∂V against its formula: relative difference {float(gap):.0e}")
formula = (rnn.weight_hh_l0.detach().T @ delta[2]) * (1 - s[1] ** 2)
print(
    f"δ₂ against its formula:     relative difference {float((delta[1] - formula).norm() / formula.norm()):.0e}"
)
print("|δ₃|, |δ₂|, |δ₁|:", *(f"{float(delta[t].norm()):.3f}" for t in (2, 1, 0)))

# %% [markdown]
# With all the losses at once $\partial L/\partial s_t$ does not fade towards the past, for every step brings a loss of
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
sentences = [sentence(rng).split() for _ in range(4000)]
words = ["", *sorted({word for one in sentences for word in one})]  # "" pads
index = {word: place for place, word in enumerate(words)}
corpus = nn.utils.rnn.pad_sequence(
    [torch.tensor([index[word] for word in one]) for one in sentences]
)  # (steps, sentences)


class LanguageModel(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.embed, self.head = nn.Embedding(len(words), 16), nn.Linear(48, len(words))
        self.rnn = cell(16, 48)

    def forward(self, tokens):
        return self.head(self.rnn(self.embed(tokens))[0])


def train(cell, updates=1200):
    torch.manual_seed(0)
    model = LanguageModel(cell)
    if cell is nn.LSTM:
        with torch.no_grad():
            model.rnn.bias_ih_l0[48:96] = 2  # forget gates that begin open; why is in notebook 6
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(updates):
        tokens = corpus[:, torch.randint(corpus.shape[1], (32,))]
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
kinds = {
    "the clouds are in the sky": lambda text: "clouds" in text,
    "the man … went inside": lambda text: "went" in text.split()[-2],
    "I grew up in France … French": lambda text: "fluent" in text,
}
print("share of last words that are right          RNN    LSTM")
for what, belongs in kinds.items():
    some = [text for text in tests if belongs(text)]
    shares = (last_words(models[name], some) for name in ("RNN", "LSTM"))
    print(f"{what:<40}", *(f"{share:6.0%}" for share in shares))

# %% [markdown]
# Both know about clouds; only the LSTM knows where the speaker grew up (one in four is guessing). How far back
# does the last word's loss look? One sentence, word by word:

# %%
text = "I grew up in France with my mother and two brothers so I speak fluent French"
tokens = torch.tensor([index[word] for word in text.split()]).unsqueeze(1)


def last_word(output, target):
    return nn.functional.cross_entropy(output[-1], target[-1])


runs = {
    name: gradflow.diagnose(model, tokens[:-1], target=tokens[1:], loss=last_word).titled(name)
    for name, model in models.items()
}
place = text.split().index("France")
figure, axes = plt.subplots(figsize=(8, 3))
for (name, run), colour in zip(runs.items(), ("#c3263a", "#0b2858"), strict=True):
    layer = run["rnn"]
    level = layer.data["grad_norm"].sel(kind="total", state=layer.main_state).values
    print(
        f"{name}: at “France” the gradient is {level[place] / level[-1]:.2g} of its size at the end"
    )
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
# The gain map asks it of every pair of words: along the row "fluent", how far left does the colour reach?
# A map shows the largest gain of any direction; the loss of one word uses other directions too, and so the
# line above lies lower.

# %%
read = text.split()[:-1]
for name, run in runs.items():
    gain = run["rnn"].data["log_gain"].sel(norm="spectral")[0, place, -1]
    print(f"{name}: gain from “France” to “fluent” {float(np.exp(gain)):.2g}")
gradflow.plot([run.labelled(read) for run in runs.values()], "gain-map")

# %% [markdown]
# ## What to take home
#
# * Adding keeps the gradient; covering loses it. Gates decide which of the two an LSTM does, and as PyTorch makes
#   it, half-open, it covers.
# * Only the Jacobian of the joint state (h, c) may be multiplied over steps; ∂c_t/∂c_{t−1} alone may not.
# * With a loss at every step, look at one loss at a time.
#
# Next: [your own model](03_your_own_model.ipynb).
