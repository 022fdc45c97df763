"""Where an update begins and ends, and that the numbers are those of its unscaled, full loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow
from gradflow.history import History

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """A GRU whose last state is read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rnn = nn.GRU(2, 6)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][-1])


def batch(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(12, count, 2, generator=torch.Generator().manual_seed(seed))


def watched(
    tmp_path: Path, train: Callable[[nn.Module, torch.optim.Optimizer], None], **asked: object
) -> History:
    """The history of a small training of which every step is probed."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    given = {"preset": "pulse", "every": 1, "budget": None} | asked
    watch = gradflow.watch(net, tmp_path, **given)  # type: ignore[arg-type]
    train(net, optimizer)
    watch.close()
    return watch.history


def test_a_plain_loop_is_counted_in_updates_and_the_loss_is_known(tmp_path: Path) -> None:
    losses = []

    def train(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for number in range(3):
            loss = net(batch(seed=number)).square().mean()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()

    history = watched(tmp_path, train)
    assert history.steps.tolist() == [1, 2, 3]
    assert history.data["loss"].values.tolist() == losses
    assert (history.data["forwards"] == 1).all() and (history.data["updated"] == 1).all()
    assert history.data["learning_rate"].values.tolist() == [[0.1]] * 3


def test_micro_batches_of_one_update_are_one_probe_of_all_their_sequences(tmp_path: Path) -> None:
    whole = batch(8)

    def accumulated(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            for part in whole.split(2, dim=1):
                (net(part).square().mean() / 4).backward()
            optimizer.step()
            optimizer.zero_grad()

    def at_once(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            net(whole).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    parts, one = watched(tmp_path / "a", accumulated), watched(tmp_path / "b", at_once)
    assert parts.steps.tolist() == [1, 2] and (parts.data["forwards"] == 4).all()
    assert parts["rnn.l0"]["sequences"].values.tolist() == [8, 8]
    for name in ("loss", "grad_norm_all", "grad_norm_all_clipped"):
        np.testing.assert_allclose(parts.data[name], one.data[name], rtol=1e-5)
    for name in ("level", "level_h", "profile", "grad_norm"):
        np.testing.assert_allclose(parts["rnn.l0"][name], one["rnn.l0"][name], rtol=1e-4)


def test_validation_between_updates_is_no_part_of_them(tmp_path: Path) -> None:
    def train(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for number in range(2):
            net.eval()
            with torch.no_grad():
                net(batch(3))
            net.train()
            with torch.no_grad():  # acting, in reinforcement learning
                net(batch(5))
            net(batch(4, number)).square().mean().backward()
            with torch.no_grad():
                net(batch(7))  # between backward and step, too
            optimizer.step()
            optimizer.zero_grad()

    history = watched(tmp_path, train)
    assert history.steps.tolist() == [1, 2]
    assert history["rnn.l0"]["sequences"].values.tolist() == [4, 4]
    assert (history.data["forwards"] == 1).all()


def test_several_forwards_before_one_backward_are_one_probe(tmp_path: Path) -> None:
    def train(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            (net(batch(2)) - net(batch(3, 1)).mean()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    history = watched(tmp_path, train)
    assert history["rnn.l0"]["sequences"].values.tolist() == [5, 5]


@pytest.mark.parametrize("late", [False, True], ids=["before the forward", "before the backward"])
def test_a_pass_of_another_loss_is_thrown_away_with_its_gradients(
    late: bool, tmp_path: Path
) -> None:
    """A discriminator: the generator's loss goes through it, and its step is not the watched one's."""
    torch.manual_seed(0)
    generator, critic = nn.Linear(2, 2), Net()
    critics = torch.optim.SGD(critic.parameters(), 0.1)
    generators = torch.optim.SGD(generator.parameters(), 0.1)
    watch = gradflow.watch(critic, tmp_path, every=1, budget=None, preset="pulse")
    losses, norms = [], []
    for number in range(3):
        if not late:
            critics.zero_grad()
        real, fake = batch(4, number), generator(batch(4, number + 9))
        loss = critic(fake.detach()).mean() - critic(real).mean()
        if late:
            critics.zero_grad()
        loss.backward()
        grads = [p.grad.norm() for p in critic.parameters() if p.grad is not None]
        norms.append(float(torch.stack(grads).norm()))
        losses.append(loss.item())
        critics.step()
        generators.zero_grad()
        (-critic(fake).mean()).backward()
        generators.step()
    watch.close()
    data = watch.history.data
    assert data["step"].values.tolist() == [1, 2, 3]
    np.testing.assert_allclose(data["loss"].values, losses, rtol=1e-6)
    np.testing.assert_allclose(data["grad_norm_all"].values, norms, rtol=1e-5)
    assert watch.history["rnn.l0"]["sequences"].values.tolist() == [8, 8, 8]


@pytest.mark.parametrize("where", ["in the forward", "before the backward", "in the backward"])
def test_a_step_that_is_given_up_and_made_again_is_one_probe_of_the_layer(
    tmp_path: Path, where: str
) -> None:
    """As after Ctrl-C in a notebook, or where memory was not enough; it once had l0 and l0@2."""

    class Loop(Net):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.fails = nn.GRUCell(2, 6), False

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(x.shape[1], 6)
            for number, x_t in enumerate(x):
                h = self.cell(x_t, h)
                if self.fails and number == 3 and where == "in the forward":
                    raise KeyboardInterrupt
            h = h + self.rnn(x)[0][-1]
            if self.fails and where == "in the backward":
                h.register_hook(self.stop)
            return self.head(h)

        def stop(self, _: Tensor) -> None:
            raise KeyboardInterrupt

    def train(folder: Path, again: tuple[int, ...]) -> History:
        net = Loop()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        watch = gradflow.watch(net, folder, preset="pulse", every=1, budget=None)
        for number in range(3):
            for net.fails in [number in again, False][number not in again :]:
                optimizer.zero_grad()
                try:
                    loss = net(batch(seed=number)).sum()
                    if net.fails and where == "before the backward":
                        raise KeyboardInterrupt
                    loss.backward()
                except KeyboardInterrupt:
                    continue
                optimizer.step()
        watch.close()
        return watch.history

    plain, found = train(tmp_path / "plain", ()), train(tmp_path / "again", (0, 2))
    assert found.layers == plain.layers == ("cell", "rnn.l0")
    assert found.steps.tolist() == [1, 2, 3]
    assert found.notes == plain.notes == ()
    for name in ("loss", "level", "grad_norm_all", "grad_norm"):
        assert np.array_equal(found.data[name], plain.data[name], equal_nan=True), name


def test_clipping_is_seen_and_the_norms_are_those_before_and_after(tmp_path: Path) -> None:
    before = []

    def train(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for limit in (1e9, 1e-3):
            net(batch()).square().mean().backward()
            before.append(float(nn.utils.clip_grad_norm_(net.parameters(), limit)))
            optimizer.step()
            optimizer.zero_grad()

    history = watched(tmp_path, train)
    assert history.data["clipped"].values.tolist() == [0, 1]
    np.testing.assert_allclose(history.data["grad_norm_all"], before, rtol=1e-5)
    np.testing.assert_allclose(history.data["grad_norm_all_clipped"], [before[0], 1e-3], rtol=1e-3)
    layer = history["rnn.l0"]
    assert layer["grad_norm"][1] > 10 * layer["grad_norm_clipped"][1]


def test_a_cell_that_is_called_cell_has_its_norms_and_a_cut_loop_the_span_of_its_stretches(
    tmp_path: Path,
) -> None:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRUCell(2, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            h, found = x.new_zeros(x.shape[1], 4), []
            for t, one in enumerate(x):
                h = self.cell(one, h * (t % 6 > 0))  # an episode ends every six steps
                found.append(h)
            return self.head(torch.stack(found))

    net = Policy()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with gradflow.record(net) as recording:
        net(torch.randn(30, 4, 2, generator=torch.Generator().manual_seed(0))).mean().backward()
    norm = torch.stack([p.grad.norm() for p in net.cell.parameters()]).norm()
    whole = gradflow.analyze(recording)["cell"]
    optimizer.zero_grad()
    watch = gradflow.watch(net, tmp_path, every=1)
    net(torch.randn(30, 4, 2, generator=torch.Generator().manual_seed(0))).mean().backward()
    optimizer.step()
    watch.close()
    layer = watch.history["cell"].isel(step=0)
    assert layer["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-5)
    assert layer["span"].item() == whole.span == 6 and layer["verdict"].item() == whole.verdict
    # of the five stretches of each sequence a probe takes four
    assert layer["gain"].item() == pytest.approx(whole.gain.value, rel=0.02)
    assert watch.history.notes == ()


def test_a_scaler_is_found_and_its_scale_divided_out(tmp_path: Path) -> None:
    def plain(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            net(batch()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def scaled(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for _ in range(2):
            scaler.scale(net(batch()).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    one, other = watched(tmp_path / "a", plain), watched(tmp_path / "b", scaled)
    assert other.data["scale"].values.tolist() == [1024, 1024]
    assert other.data["clipped"].values.tolist() == [0, 0]
    for name in ("loss", "grad_norm_all", "grad_norm_all_clipped"):
        np.testing.assert_allclose(other.data[name], one.data[name], rtol=1e-5)
    np.testing.assert_allclose(other["rnn.l0"]["level"], one["rnn.l0"]["level"], rtol=1e-5)


def test_a_scaler_that_is_looked_up_in_time_is_found_as_well(tmp_path: Path) -> None:
    def scaled(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for _ in range(2):
            loss = net(batch()).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    history = watched(tmp_path, scaled)
    assert history.data["scale"].values.tolist() == [1024, 1024]
    assert history.data["clipped"].values.tolist() == [1, 1]
    np.testing.assert_allclose(history.data["grad_norm_all_clipped"], 1e-3, rtol=1e-3)


def test_an_update_that_a_scaler_skips_is_told_with_its_nan(tmp_path: Path) -> None:
    def train(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        scaler = torch.amp.GradScaler("cpu")
        for number in range(4):
            x = batch() * (math.inf if number == 1 else 1.0)
            scaler.scale(net(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    with pytest.warns(
        gradflow.GradflowWarning, match=r"step 2: rnn.l0: the state is NaN at step 1"
    ):
        history = watched(tmp_path, train)
    assert history.data["updated"].values.tolist() == [1, 0, 1]
    assert history["rnn.l0"]["nonfinite"].values.tolist() == [0, 1, 0]


def test_a_loop_without_an_optimizer_of_torch_is_counted_by_its_forwards(tmp_path: Path) -> None:
    def train(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(4):
            net(batch()).square().mean().backward()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None

    history = watched(tmp_path, train, every=2)
    assert history.steps.tolist() == [1, 3]


def test_a_closure_that_is_evaluated_several_times_is_followed(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)
    watch = gradflow.watch(net, tmp_path, every=1, budget=None, preset="pulse")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(batch()).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    watch.close()
    data = watch.history.data
    assert data["step"].values.tolist() == [1, 2, 3]
    assert (data["forwards"] == 1).all()


def test_a_block_says_where_a_step_begins_and_ends(tmp_path: Path) -> None:
    net = Net()
    watch = gradflow.watch(net, tmp_path, every=2, budget=None, preset="pulse")
    for number in range(4):
        loss = torch.tensor(float(number))
        with watch.step(loss=lambda loss=loss: loss):
            net(batch(2)).sum().backward()
            net(batch(3)).sum().backward()
    watch.close()
    assert watch.history.steps.tolist() == [1, 3]
    assert watch.history.data["loss"].values.tolist() == [0, 2]
    assert watch.history["rnn.l0"]["sequences"].values.tolist() == [5, 5]


@pytest.fixture
def _nothing_stays_compiled() -> Iterator[None]:
    """That something is compiled changes how cells are found, in the whole process."""
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_nothing_stays_compiled")
def test_a_compiled_model_is_watched(tmp_path: Path) -> None:
    net = Net()
    compiled = torch.compile(net, backend="eager")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    watch = gradflow.watch(compiled, tmp_path, every=2, budget=None, preset="pulse")  # type: ignore[arg-type]
    for _ in range(4):
        compiled(batch()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    assert watch.history.steps.tolist() == [1, 3]
    assert np.isfinite(watch.history["rnn.l0"]["level"]).all()


def test_the_numbers_are_those_of_a_recording_of_the_same_step(tmp_path: Path) -> None:
    net, long = Net(), torch.randn(60, 8, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with gradflow.record(net) as recording:
        net(long).square().mean().backward()
    optimizer.zero_grad()
    whole = gradflow.analyze(recording)["rnn.l0"]
    watch = gradflow.watch(net, tmp_path, every=1)
    net(long).square().mean().backward()
    optimizer.step()
    watch.close()
    layer = watch.history["rnn.l0"].isel(step=0)
    assert layer["verdict"].item() == whole.verdict
    assert layer["gain"].item() == pytest.approx(whole.gain.value, rel=1e-3)
    assert layer["rate"].item() == pytest.approx(whole.rate.value, rel=0.05)
    assert layer["horizon"].item() == pytest.approx(whole.horizon, abs=1)
    norms = whole.data["grad_norm"].sel(kind="last", state="h").values
    assert norms[-1] > 0
    profile = layer["profile"].sel(lag=[0, 1, 5]).values
    units = whole.data["log10_grad"].sel(state="h").values[:, [0, 1, 5]]
    np.testing.assert_allclose(profile, np.log10((10 ** (2 * units)).mean(0)) / 2, atol=1e-5)


def test_padding_is_left_out(tmp_path: Path) -> None:
    class Rnn(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    net = Rnn()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    lengths = torch.tensor([12, 7, 4])
    watch = gradflow.watch(net, tmp_path, every=1, lengths=lengths, preset="pulse")
    F.mse_loss(net(batch(3))[[11, 6, 3], [0, 1, 2]], torch.zeros(3, 6)).backward()
    optimizer.step()
    watch.close()
    profile = watch.history["rnn.l0"]["profile"].isel(step=0)
    assert np.isfinite(profile).all() and profile[0] == 0
