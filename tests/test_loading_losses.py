"""Outputs, losses and probes, held against torch's own functions and closed forms."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from seam import from_model, from_tensors, physical_memory
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from gradflow.errors import InputError
from gradflow.loading import (
    choose_output,
    make_loss,
    output_lengths,
    probe_loss,
    probes,
    time_axis,
)

ONE, TWO, WHOLE = torch.ones(2, 3), torch.ones(4), torch.ones(2).long()
Pair = namedtuple("Pair", "first second")


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...]


class Plain:
    def __init__(self) -> None:
        self.scores = TWO


OUTPUTS = {
    "tensor": (ONE, None, "output", ONE),
    "tuple": ((ONE, TWO), None, "output[0]", ONE),
    "whole first": ((WHOLE, TWO), None, "output[1]", TWO),
    "chosen": ((ONE, TWO), "1", "output[1]", TWO),
    "nested": ((ONE, (WHOLE, TWO)), "1.1", "output[1][1]", TWO),
    "nested first": ((ONE, (WHOLE, TWO)), "1", "output[1][1]", TWO),
    "dict": ({"ids": WHOLE, "logits": ONE}, None, "output['logits']", ONE),
    "dict chosen": ({"loss": TWO, "logits": ONE}, "logits", "output['logits']", ONE),
    "ordered": (OrderedDict(a=ONE), "a", "output['a']", ONE),
    "whole keys": ({0: WHOLE, 1: ONE}, "1", "output[1]", ONE),
    "dataclass": (Output(ONE, (TWO,)), None, "output.logits", ONE),
    "dataclass chosen": (Output(ONE, (TWO,)), "hidden.0", "output.hidden[0]", TWO),
    "namedtuple": (Pair(ONE, TWO), "second", "output.second", TWO),
    "object": (Plain(), None, "output.scores", TWO),
    "nothing beside": ([None, 5, "x", TWO], None, "output[3]", TWO),
}


@pytest.mark.parametrize(("output", "key", "name", "wanted"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_an_output_is_chosen_and_named(output: object, key, name: str, wanted: Tensor) -> None:
    chosen, words = choose_output(output, key)
    assert words == name
    assert chosen is wanted
    assert output_lengths(output, key) is None


BAD_OUTPUTS = {
    "nothing": (None, None, "must be a floating-point tensor, got none among a NoneType"),
    "whole": ((WHOLE,), None, r"none among output\[0\].*choose one of output\[0\] with --output"),
    "number": ((ONE, TWO), "2", r"place of a tensor.*output\[0\], output\[1\].*got '2'"),
    "name": ({"logits": ONE}, "logit", r"output\['logits'\].*got 'logit'"),
    "too deep": (ONE, "0", "a single tensor.*got '0'"),
    "empty": ((), None, "got none among a tuple"),
    "empty key": ((ONE,), "", "got ''"),
}


@pytest.mark.parametrize(("output", "key", "match"), BAD_OUTPUTS.values(), ids=BAD_OUTPUTS.keys())
def test_an_output_without_one_is_refused(output: object, key, match: str) -> None:
    with pytest.raises(InputError, match=match):
        choose_output(output, key)


def test_a_packed_output_is_padded_in_the_users_order() -> None:
    lengths = torch.tensor([2, 5])
    packed = pack_padded_sequence(torch.randn(5, 2, 3), lengths, enforce_sorted=False)
    output = nn.LSTM(3, 4)(packed)
    chosen, name = choose_output(output)
    assert chosen.shape == (5, 2, 4)
    assert "padded" in name
    assert output_lengths(output).tolist() == [2, 5]
    loss = make_loss("last", False)(chosen, None, lengths)
    expected = (chosen[1, 0].pow(2).sum() + chosen[4, 1].pow(2).sum()) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


# --- losses --------------------------------------------------------------------------------------

STEPS = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0))  # (T, B, F)
LENGTHS = torch.tensor([7, 4])


def both_layouts(value: Tensor) -> list[tuple[int, Tensor]]:
    return [(0, value), (1, value.transpose(0, 1))]


@pytest.mark.parametrize("axis", [0, 1])
def test_last_reads_the_last_real_step(axis: int) -> None:
    output = dict(both_layouts(STEPS))[axis]
    loss = make_loss(None, target_present=False, time_axis=axis)
    assert "no target was given" in loss.note
    torch.testing.assert_close(loss(output), STEPS[-1].pow(2).sum() / 2)
    real = (STEPS[6, 0].pow(2).sum() + STEPS[3, 1].pow(2).sum()) / 2
    torch.testing.assert_close(loss(output, None, LENGTHS), real)


def test_last_of_an_output_without_time_is_all_of_it() -> None:
    loss = make_loss("last", False)
    torch.testing.assert_close(loss(STEPS[0]), STEPS[0].pow(2).sum() / 2)
    assert loss(torch.tensor(3.0)) == 4.5


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_losses_over_steps_equal_torch_on_the_real_steps(axis: int, lengths) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(7)[:, None] < (LENGTHS if lengths is not None else torch.tensor([7, 7]))
    flat = STEPS[mask]
    values = torch.randn(7, 2, 3, generator=generator)
    classes = torch.randint(3, (7, 2), generator=generator)
    classes[0, 0] = -100
    chances = torch.rand(7, 2, 3, generator=generator)
    cases = [
        ("mse", STEPS, values, F.mse_loss(flat, values[mask])),
        ("cross-entropy", STEPS, classes, F.cross_entropy(flat, classes[mask])),
        ("cross_entropy", STEPS, classes.float(), F.cross_entropy(flat, classes[mask])),
        ("nll", STEPS.log_softmax(-1), classes, F.cross_entropy(flat, classes[mask])),
        (
            "bce",
            STEPS,
            chances,
            F.binary_cross_entropy_with_logits(flat, chances[mask]),
        ),
        (
            "bce",
            STEPS.sigmoid(),
            chances,
            F.binary_cross_entropy_with_logits(flat, chances[mask]),
        ),
        (None, STEPS, classes, F.cross_entropy(flat, classes[mask])),
        (None, STEPS, values, F.mse_loss(flat, values[mask])),
    ]
    for name, output, target, expected in cases:
        if axis == 1:
            output, target = output.transpose(0, 1), target.transpose(0, 1)
        actual = make_loss(name, True, time_axis=axis)(output, target, lengths)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0, msg=str(name))


def test_one_target_per_sequence() -> None:
    output, target = STEPS[0], torch.tensor([1, -100])
    actual = make_loss("cross-entropy", True)(output, target, LENGTHS)
    torch.testing.assert_close(actual, F.cross_entropy(output, target))
    squeezed = make_loss("mse", True)(torch.ones(2, 1), torch.tensor([1.0, 3.0]))
    assert squeezed == 2.0


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (torch.ones(7, 2).long(), "cross-entropy, class axis last"),
        (torch.ones(7, 2, 3), "mean squared error"),
        (torch.ones(7, 2, 3).long(), "mean squared error"),
        (torch.ones(7, 2, 3).bool(), "mean squared error"),
    ],
)
def test_a_loss_that_the_target_chose_says_which(target: Tensor, name: str) -> None:
    loss = make_loss(None, target_present=True)
    assert loss.note == ""
    loss(STEPS, target)
    assert loss.name == name
    assert loss.note == f"no loss was given: the target chose {name}; loss= or --loss sets another"
    assert make_loss(None, target_present=True).name == "the loss that the target chooses"
    with pytest.raises(InputError, match="the target must be a tensor, got none"):
        loss(STEPS)


def test_probabilities_as_targets() -> None:
    target = torch.softmax(STEPS, -1)
    actual = make_loss("cross-entropy", True)(STEPS, target)
    flat = STEPS.reshape(-1, 3)
    torch.testing.assert_close(actual, F.cross_entropy(flat, target.reshape(-1, 3)))


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


BAD_LOSSES = {
    "mse shape": ("mse", ones(7, 2, 3), ones(7, 2), r"of the output's shape \(7, 2, 3\)"),
    "no broadcasting": ("mse", ones(2, 1), ones(2, 2), "must be of the output's shape"),
    "transposed": ("mse", ones(2, 3), ones(3, 2), "must be of the output's shape"),
    "class shape": ("cross-entropy", ones(7, 2, 3), ones(2).long(), "the class axis is last"),
    "one class": ("cross-entropy", ones(2, 1), ones(2, 1), r"two classes or more.*use bce for one"),
    "one class, whole": ("nll", ones(2, 1), ones(2).long(), "two classes or more"),
    "scalar": ("cross-entropy", torch.tensor(1.0), ones(2).long(), "class axis is last"),
    "high": ("cross-entropy", ones(2, 3), torch.tensor([0, 3]), r"in 0 … 2.*got 0 to 3"),
    "low": ("nll", ones(2, 3), torch.tensor([-1, 2]), "got -1 to 2"),
    "ignored": ("cross-entropy", ones(2, 3), torch.tensor([-100, -100]), "-100 everywhere"),
    "fractions": ("cross-entropy", ones(2, 3), torch.tensor([0.5, 1]), "got fractions"),
    "nll rows": ("nll", ones(2, 3), ones(2, 3), "one row per class"),
    "bce range": ("bce", ones(2, 3), 2 * ones(2, 3), r"in \[0, 1\].*got 2 to 2"),
}


@pytest.mark.parametrize(("name", "output", "target", "match"), BAD_LOSSES.values(), ids=BAD_LOSSES)
def test_a_target_that_does_not_fit_gets_a_sentence(name, output, target, match: str) -> None:
    with pytest.raises(InputError, match=match):
        make_loss(name, True)(output, target)


@pytest.mark.parametrize("lengths", [[7], [7, 8], [0, 3]])
def test_lengths_that_do_not_fit_get_a_sentence(lengths: list[int]) -> None:
    with pytest.raises(InputError, match=r"lengths must be .*batch_first"):
        make_loss("last", False)(STEPS, None, torch.tensor(lengths))


def test_unknown_losses_and_missing_targets() -> None:
    with pytest.raises(InputError, match=r"one of mse, cross-entropy, bce, nll, last, got 'l1'"):
        make_loss("l1", True)
    with pytest.raises(InputError, match="--loss must be one of"):
        make_loss("target", True)
    with pytest.raises(InputError, match=r"--loss mse must have a target, got none; give --target"):
        make_loss("mse", False)
    with pytest.raises(InputError, match="time_axis must be 0 or 1, got 2"):
        make_loss("mse", True, time_axis=2)
    assert "not used" in make_loss("last", True).note


def test_the_time_axis_follows_the_first_layer() -> None:
    assert time_axis(nn.Sequential(nn.Linear(2, 2), nn.GRU(2, 2))) == 0
    assert time_axis(nn.Linear(2, 2)) == 1


# --- probes --------------------------------------------------------------------------------------


def recurrent(module: nn.Module, **more: Tensor):
    (found,) = from_tensors({**more, **{f"rnn.{k}": v for k, v in module.state_dict().items()}})
    return found


def test_three_noises_without_an_embedding() -> None:
    zero, small, unit = probes(recurrent(nn.LSTM(3, 5)), seq_len=9, batch=4)
    assert [p.inputs.shape for p in (zero, small, unit)] == [(9, 4, 3)] * 3
    assert not zero.inputs.any()
    torch.testing.assert_close(small.inputs, 0.1 * unit.inputs)
    assert torch.equal(zero.r, unit.r)
    assert unit.r.shape == (4, 5)


def test_the_default_size_and_spread() -> None:
    unit = probes(recurrent(nn.GRU(8, 5)))[-1].inputs
    assert unit.shape == (100, 16, 8)
    assert abs(float(unit.std()) - 1) < 0.05


def test_tokens_through_an_embedding() -> None:
    table = torch.arange(12.0).reshape(4, 3)
    (probe,) = probes(recurrent(nn.LSTM(3, 5), **{"emb.weight": table}), seq_len=50, batch=2)
    assert probe.name == "uniform random tokens through emb.weight"
    rows = {tuple(row) for row in probe.inputs.reshape(-1, 3).tolist()}
    assert rows == {tuple(row) for row in table.tolist()}


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    module = recurrent(nn.LSTM(3, 5, bidirectional=True).double())
    before = torch.get_rng_state()
    first, again, other = (probes(module, 5, 2, seed)[-1] for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.r, again.r)
    assert not torch.equal(first.inputs, other.inputs)
    assert first.inputs.dtype == first.r.dtype == torch.float64
    assert first.r.shape == (2, 10)


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_probe_loss_reads_where_each_direction_ends(batch_first: bool) -> None:
    module = nn.LSTM(3, 5, num_layers=2, bidirectional=True, batch_first=batch_first)
    (found,) = from_model(module)
    probe = probes(found, seq_len=6, batch=4)[-1]
    output, (h_n, _) = found.module(probe.inputs)
    loss = probe_loss(output, probe.r, batch_first, bidirectional=True)
    expected = (probe.r * torch.cat([h_n[-2], h_n[-1]], dim=-1)).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


BAD_PROBES = {
    "no steps": ({"seq_len": 0}, "--seq-len must be a whole number of at least 1, got 0"),
    "half": ({"seq_len": 1.5}, "--seq-len must be a whole number"),
    "no batch": ({"batch": 0}, "--batch must be a whole number of at least 1, got 0"),
    "seed": ({"seed": -1}, "--seed must be a whole number of at least 0, got -1"),
}


@pytest.mark.parametrize(("options", "match"), BAD_PROBES.values(), ids=BAD_PROBES.keys())
def test_bad_probe_sizes_get_a_sentence(options, match: str) -> None:
    with pytest.raises(InputError, match=match):
        probes(recurrent(nn.LSTM(3, 5)), **options)


def _never(*_: object, **__: object) -> Tensor:
    raise AssertionError("memory was asked for")


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize(
    "options", [{"seq_len": 100_000_000}, {"seq_len": 2**62}, {"batch": 10**12, "seq_len": 1}]
)
def test_a_probe_larger_than_the_memory_is_refused_before_it_is_made(
    options, embedded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradflow.loading.probe.physical_memory", lambda: 2**33)
    more = {"emb.weight": torch.ones(4, 3)} if embedded else {}
    module = recurrent(nn.LSTM(3, 5, num_layers=2), **more)
    for name in ("randn", "randint", "zeros"):
        monkeypatch.setattr(torch, name, _never)
    with pytest.raises(InputError, match=r"needs about [\d,.]+ GiB .*; lower --seq-len or --batch"):
        probes(module, **options)


def test_the_memory_a_probe_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    module = recurrent(nn.LSTM(3, 5, num_layers=2, bidirectional=True))
    # 10 steps of 4 sequences: noise, three inputs and what is made of them (two more, one in float64),
    # the output of each layer; and r as drawn
    needed = 10 * 4 * (3 * 8 + 5 * 3 * 4 + 3 * 8 + 2 * 10 * 4) + 4 * 10 * 8
    monkeypatch.setattr("gradflow.loading.probe.physical_memory", lambda: 2 * needed)
    assert len(probes(module, 10, 4)) == 3
    monkeypatch.setattr("gradflow.loading.probe.physical_memory", lambda: 2 * needed - 1)
    with pytest.raises(InputError, match="lower --seq-len or --batch"):
        probes(module, 10, 4)
    monkeypatch.setattr("gradflow.loading.probe.physical_memory", lambda: None)
    assert len(probes(module, 10, 4)) == 3


def test_the_batch_of_a_very_wide_module_is_smaller() -> None:
    def sequences(width: int, batch: int | None) -> int:
        return len(probes(recurrent(nn.RNN(width, 1)), seq_len=2, batch=batch)[0].r)

    assert [sequences(width, None) for width in (9, 2_000_000, 10_000_000)] == [16, 7, 1]
    with pytest.raises(InputError, match=r"1.3 GiB .* at most 1.0 GiB unless --batch is given"):
        sequences(20_000_000, None)


def test_a_system_that_does_not_say_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert physical_memory() is None or physical_memory() > 2**20
    monkeypatch.delattr("os.sysconf", raising=False)
    assert physical_memory() is None


def test_a_direction_that_does_not_fit_gets_a_sentence() -> None:
    with pytest.raises(InputError, match=r"r must be .*\(2, 5\).*got \(3, 5\)"):
        probe_loss(torch.ones(7, 2, 5), torch.ones(3, 5))


def test_one_step_and_one_sequence() -> None:
    found = recurrent(nn.RNN(1, 1))
    for probe in probes(found, seq_len=1, batch=1):
        probe_loss(found.module(probe.inputs)[0], probe.r).backward()
