"""What was found: an `Analysis` holds one `LayerAnalysis` per track, ready to be shown or saved.

Everything a picture or a page shows is already here; nothing is computed while drawing. All arrays
are float64 numpy. Gains are natural logarithms unless a name says log10. ``source``, ``target`` and
``step`` count from 0; text and axes add one.

Variables of `LayerAnalysis.data` (dims in brackets; NaN where undefined, -inf for an exact zero):

==================  =============================  =====================================================
log_gain            (norm, sequence, source,       ln ‖P(t'←t)‖; norm is "spectral", "rms" or "loss":
                    target)                        ln (‖P(t'←t)ᵀ a_t'‖/‖a_t'‖) along the state-partial
                                                   gradient a_t' of the loss; sequence is the index in
                                                   the user's batch; processing order
log_block_gain      (block, sequence, source,      ln (‖P_block‖_F/√columns) of the blocks of the joint
                    target)                        product, rows first: "hc" is ∂h_t'/∂c_t; none for a
                                                   single state
log_cell_path       (sequence, source, target)     ln (‖diag(f_t' ⊙ … ⊙ f_{t+1})‖_F/√H) of an LSTM: the
                                                   share of the cell path is its exp over that of block
                                                   "cc"
rank_stable         (rank_lag)                     ‖P‖_F²/‖P‖₂², median over sources and mapped sequences
rank_effective      (rank_lag)                     exp of the entropy of the normalised singular values,
                                                   median over a few starts and the mapped sequences
rank_surviving      (rank_lag)                     how many singular values are at least 10⁻³, median
                                                   likewise
log_singular        (sequence, index)              ln of the singular values of P over the span
lag_median          (lag)                          L(k): median over mapped sequences and sources of
                                                   the spectral ln gain
lag_low, lag_high   (lag)                          its 10 % and 90 % quantiles
lag_count           (lag)                          how many (sequence, source) pairs it rests on
lag_zero_share      (lag)                          share of pairs whose gain is exactly 0
lag_slope           (lag)                          local slope L(k) − L(k−1), nats per step
lag_fit             (lag)                          straight line with the layer's rate as its slope
sequence_rate       (batch)                        largest Lyapunov exponent of each sequence
length              (batch)                        real steps of each sequence
lyapunov            (index_k)                      every exponent measured, mean over sequences, nats
                                                   per step: the rate first, then largest first
lyapunov_low/_high  (index_k)                      their 95 % t-intervals over sequences
lyapunov_trace      (index_k, step)                running mean of each over the counted steps, in
                                                   processing order; the first eight, NaN beyond
sum_rule            (side)                         sum of all exponents as "measured" and "exact", by
                                                   determinants; NaN where not all were measured or
                                                   no closed form is known
log10_grad          (state, unit, back)            |∂L/∂s_t| of the last loss step, rms over sequences
                                                   aligned at that step (back = 0), divided by the
                                                   layer's own rms value there; log10
unit_order          (state, unit)                  units sorted, longest memory first
grad_norm           (kind, state, step)            median over sequences of ‖∂L/∂s_t‖₂; kind is
                                                   "total", "direct" (h only) or "last"; input-time order
log10_triangle      (state, sequence, loss_step,   log10 ‖∂L_t'/∂s_t‖₂ of each loss step t' alone, the loss
                    step)                          that reaches what the module returned at t'; both in
                                                   input time, loss_step perhaps strided; NaN where t'
                                                   cannot reach t
lag_contribution    (parameter, lag)               ‖C_k‖_F: what all loss steps bring to ∂L/∂W through the
                                                   step k before them; parameter is "weight_hh" or
                                                   "weight_ih"; NaN below a bidirectional layer, where
                                                   a loss step has no distance, and where too dear
truncation_error    (parameter, lag)               ‖Σ_{j≤k} C_j − ∂L/∂W‖_F / ‖∂L/∂W‖_F: what is lost if
                                                   every loss step may look back k steps at most
cancellation        (parameter)                    ‖Σ C_k‖_F / Σ ‖C_k‖_F, from 0 (lags cancel) to 1
gradient_depth      (parameter)                    Σ k ‖C_k‖_F / Σ ‖C_k‖_F, in steps
truncation_window   (parameter, tolerance)         fewest steps K from which on the truncated gradient
                                                   stays within 1, 5, 10 % of the full one, K = k + 1
gate_mean           (gate, step)                   mean activation of each gate
gate_closed/_open   (gate, step)                   share of units and sequences < 0.05 / > 0.95
state_norm          (state, step)                  median over sequences of ‖s_t‖₂/√width
memory_steps        (state, unit)                  steps back until |∂L/∂s| < 10⁻³ of the layer's level
path_gain           (path, step)                   LSTM: ‖·‖₂ of the four terms of ∂c_t/∂c_{t−1} and of
                                                   their sum, median over the mapped sequences; no path
                                                   for other cells; every n-th step where it is dear
gate_value          (gate, unit, step)             mean over sequences of a gate's activation
gate_unit_closed    (gate, unit)                   share of steps and sequences < 0.05; NaN for tanh
gate_unit_open      (gate, unit)                   share of steps and sequences > 0.95; NaN for tanh
time_scale          (unit)                         −1/mean ln f (GRU: z) in steps; inf if always open
unit_saturated      (state, unit)                  share of steps and sequences with |tanh| > 0.95: h of
                                                   a tanh RNN, tanh c of an LSTM, n of a GRU
unit_idle           (unit)                         ReLU: share of steps and sequences at exactly 0
step_growth         (step)                         median over sequences of the leading direction's ln
                                                   growth, on the steps that count towards the rate
rate_factor         (factor)                       RNN: the rate's two summands, mean ln ‖W q‖ ("weight")
                                                   and mean ln (‖D W q‖/‖W q‖) ("activation")
segment_length      (segment)                      steps of the stretches between cuts, all sequences
grad_input_norm     (step)                         median over sequences of ‖∂L/∂x_t‖₂ = ‖W_ihᵀ δ_t‖₂
==================  =============================  =====================================================
"""

from __future__ import annotations

import difflib
import json
import math
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from gradflow.errors import FileError, InputError, must_be
from gradflow.recording import Parity

VERDICTS = ("vanishing", "exploding", "stable", "dead", "inconclusive")
FRAMES = ("layers", "steps", "lags", "units", "findings")
HEADLINE = ["layer", "verdict", "rate", "rate_low", "rate_high", "half_life", "horizon", "channels"]
SCHEMA = 1  # of a saved run and of summary.json; raised when a reader would be misled
# without these no picture of a layer can be drawn; older runs may lack others
ESSENTIAL = ("log_gain", "lag_median", "sequence_rate", "log10_grad", "unit_order", "grad_norm")
PACKED = {"zlib": True, "complevel": 1, "shuffle": True}  # of large arrays in a file; loses nothing
LARGE = 1000  # entries


@dataclass(frozen=True)
class Rate:
    """Growth of ln gain per step in nats, with its 95 % interval over sequences."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, the evidence for it, and what to try.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.5)
    >>> finding = gradflow.diagnose(rnn, torch.zeros(50, 2, 1)).findings[0]
    >>> finding.name, round(finding.value, 4), round(finding.severity, 1)     # ln 0.5; 50 log10 0.5
    ('vanishing', -0.6931, -15.1)
    """

    name: str  # stable, e.g. "vanishing", "forget-gates-closed"
    layer: str  # its name
    message: str  # one sentence with numbers
    where: str = ""  # steps, units or sequences
    value: float | None = None  # what was measured, in the units that the message names
    low: float | None = None  # its 95 % interval over sequences, if there is one
    high: float | None = None  # the same interval's other end
    threshold: float | None = None  # what the value was held against
    source: str = ""  # author and year of the remedy, or of what the finding rests on
    severity: float | None = None  # decades over the span; negative = lost
    advice: str = ""  # one sentence
    code: str = ""  # a line to paste
    basis: str = ""  # where the threshold comes from: author and year, or a definition in words


@dataclass(frozen=True)
class Prediction:
    """What a remedy would make of a layer, tried on the recorded batch without training.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.5)
    >>> prediction = gradflow.diagnose(rnn, torch.zeros(50, 2, 1))["l0"].predictions[0]
    >>> prediction.words, prediction.verdict
    ('W_hh × 2', 'stable')
    """

    remedy: str  # an argument of `gradflow.what_if`: "forget_bias" or "scale_hh"
    value: float  # of that argument
    words: str  # the remedy as people write it: "forget bias + 1"
    verdict: str  # one of VERDICTS
    rate: Rate  # nats per step
    half_life: float  # steps; inf if the gain never halves
    horizon: int | None  # first lag with gain < 1e-3; None if not reached
    searched: int  # how many lags the horizon was searched over
    channels: int | None  # directions that survive the span
    helps: float  # powers of ten over the span by which the gain comes nearer to 1
    batch: str  # what it was tried on
    message: str  # one line, before and after

    @property
    def never_gone(self) -> bool:
        """Whether the gain stays above 1e-3 for good; see `LayerAnalysis.never_gone`."""
        return _never_gone(self)


@dataclass(frozen=True)
class LayerAnalysis:
    """The verdict on one layer in one direction, and the numbers behind it.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.9)
    >>> layer = gradflow.diagnose(rnn, torch.zeros(100, 2, 1))["l0"]
    >>> layer.verdict, round(layer.rate.value, 4), layer.horizon              # ln 0.9
    ('vanishing', -0.1054, 66)
    >>> round(layer.data["lag_median"].sel(lag=10).item(), 4)                 # 10 ln 0.9
    -1.0536
    """

    name: str  # of its track: "rnn.l0", "encoder.lstm.l1_reverse"
    cell: str  # "LSTM", "GRU", "RNN_TANH", "RNN_RELU"; a user's class name; "tap"
    reverse: bool  # true: the past of a step is the larger t
    hidden: int  # H
    size: int  # S
    steps: int  # T of the longest sequence
    sequences: int  # B
    span: int  # the distance of interest, in steps
    verdict: str  # one of VERDICTS
    labels: tuple[str, ...]  # what else it is: "transient growth", "not exponential"
    rate: Rate  # the largest Lyapunov exponent, nats per step
    half_life: float  # steps; inf if the gain never halves
    horizon: int | None  # first lag with gain < 1e-3; None if not reached
    searched: int  # how many lags the horizon was searched over
    channels: int | None  # directions that survive the span; None where undefined
    lyapunov: np.ndarray | None  # (k,) nats per step: the rate, then the others, largest first
    findings: tuple[Finding, ...]  # what is wrong and what to try; none in a healthy layer
    parity: Parity  # parameter gradients rebuilt from what was recorded, against the model's own
    sentence: str  # the verdict in words with numbers
    title: str  # the overview's headline for this row
    gradient_note: str  # "" or why there is no gradient of the loss here
    method: str  # "exact" or "sketch", and how it was chosen
    data: xr.Dataset = field(repr=False)  # every array; see `gradflow.analysis`
    predictions: tuple[Prediction, ...] = ()  # remedies that help, the best first
    step_labels: tuple[str, ...] = ()  # T words for the steps in input time, or none

    @property
    def never_gone(self) -> bool:
        """Whether the gain stays above 1e-3 for good, as far as a verdict can say.

        A layer that vanishes, or that is open with a falling gain, is only longer-lived than what
        was measured: its horizon lies beyond ``searched``.
        """
        return _never_gone(self)

    @property
    def main_state(self) -> str:
        """The state the overview shows: c where there is one, else h, else the first."""
        names = [str(name) for name in self.data["state"].values]
        return next((name for name in ("c", "h") if name in names), names[0])


def _never_gone(found: LayerAnalysis | Prediction) -> bool:
    open_and_falling = found.verdict == "inconclusive" and not found.rate.value >= 0
    return found.horizon is None and found.verdict != "vanishing" and not open_and_falling


@dataclass(frozen=True)
class Analysis:
    """The result of `gradflow.analyze`: prints as a table, saves to one netCDF file.

    ``analysis[name]`` is a `LayerAnalysis`; the start of a name does if it fits one only.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.9)
    >>> run = gradflow.diagnose(rnn, torch.zeros(100, 2, 1))
    >>> [(layer.name, layer.verdict, round(layer.half_life, 2)) for layer in run.worst_first]
    [('l0', 'vanishing', 6.58)]
    """

    title: str  # the model's name
    layers: Mapping[str, LayerAnalysis]  # by name, in the order in which they ran
    warnings: tuple[str, ...]  # settings that shape or limit the numbers
    provenance: Mapping[str, Any]  # versions, settings, input and loss in words

    def __getitem__(self, name: str) -> LayerAnalysis:
        if name in self.layers:
            return self.layers[name]
        matches = [known for known in self.layers if known.startswith(name)]
        if len(matches) == 1:
            return self.layers[matches[0]]
        raise InputError(f"there is no layer {name!r}; this analysis has {', '.join(self.layers)}")

    def __iter__(self) -> Iterator[LayerAnalysis]:
        return iter(self.layers.values())

    def __len__(self) -> int:
        return len(self.layers)

    def titled(self, title: str) -> Analysis:
        """The same analysis under another name.

        Args:
            title: what pictures and tables shall call it.

        Returns:
            A new analysis with the same layers.

        >>> import gradflow
        >>> gradflow.Analysis("RNN", {}, (), {}).titled("before training").title
        'before training'
        """
        return replace(self, title=title)

    def labelled(self, labels: Sequence[str]) -> Analysis:
        """The same analysis with a word for every step: tokens, or times.

        Pictures write them along their axes of steps, tables in a column; they are saved with the
        run. A layer with fewer steps than the longest keeps its numbers.

        Args:
            labels: (T,) strings, the steps of the longest layer in input time.

        Returns:
            A copy whose layers carry the words in ``step_labels``.

        Raises:
            InputError: they are not strings, or not as many as there are steps.

        >>> import torch, gradflow
        >>> words = "the clouds are in the".split()
        >>> run = gradflow.diagnose(torch.nn.RNN(3, 4), torch.randn(5, 1, 3)).labelled(words)
        >>> run["l0"].step_labels[1]
        'clouds'
        """
        steps = max((layer.steps for layer in self), default=0)
        words = checked_labels(labels, steps)
        layers = {
            name: replace(layer, step_labels=words if layer.steps == steps else ())
            for name, layer in self.layers.items()
        }
        return replace(self, layers=layers)

    @property
    def worst_first(self) -> list[LayerAnalysis]:
        """Layers by how much of the gradient they lose or blow up, then in order of running."""
        rank = {"dead": 0, "exploding": 1, "vanishing": 1, "inconclusive": 2, "stable": 3}

        def key(layer: LayerAnalysis) -> tuple[int, float]:
            size = abs(layer.rate.value) if math.isfinite(layer.rate.value) else 0.0
            return rank[layer.verdict], -size

        return sorted(self.layers.values(), key=key)

    @property
    def findings(self) -> list[Finding]:
        """All findings, those of the worst layers first."""
        return [finding for layer in self.worst_first for finding in layer.findings]

    def frame(self, kind: str = "layers") -> pd.DataFrame:
        """A tidy table, one row for each of the things that it is about, of all layers.

        Args:
            kind: "layers" (verdict, rate in nats per step, half-life, horizon and span in steps),
                "steps" (norms of states and gradients, gates), "lags" (ln gain against distance),
                "units" (memory and time scales, saturation) or "findings".

        Returns:
            A frame with the column ``layer``; steps and units count from 1.

        Raises:
            InputError: another kind.

        >>> import torch, gradflow
        >>> run = gradflow.diagnose(torch.nn.GRU(3, 8), torch.randn(20, 4, 3))
        >>> len(run.frame("steps")), len(run.frame("units"))
        (20, 8)
        """
        if kind not in FRAMES:
            raise InputError(f"kind must be one of {', '.join(FRAMES)}, got {kind!r}")
        return _FRAME_BUILDERS[kind](self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything to one netCDF file, which `gradflow.load` reads back exactly.

        Args:
            path: of the file.

        Returns:
            The path.

        Raises:
            FileError: it cannot be written.

        >>> import tempfile, torch, gradflow
        >>> run = gradflow.diagnose(torch.nn.GRU(3, 8), torch.randn(20, 4, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run.save(f"{folder}/run.nc").name
        'run.nc'
        """
        return _save(self, Path(path))

    def __repr__(self) -> str:
        lines = [f"gradflow analysis of {self.title}"]
        lines += [f"  {layer.sentence}" for layer in self.worst_first]
        lines += [f"  note: {warning}" for warning in self.warnings]
        table = self.frame("layers")[HEADLINE]
        return "\n".join(lines) + "\n" + table.to_string(index=False, float_format="%.4g")

    def _repr_html_(self) -> str:
        sentences = "".join(f"<li>{escape(layer.sentence)}</li>" for layer in self.worst_first)
        return f"<b>{escape(self.title)}</b><ul>{sentences}</ul>" + self.frame("layers").to_html(
            index=False, border=0
        )


def checked_labels(labels: Sequence[str], steps: int) -> tuple[str, ...]:
    """Labels as a tuple, if there is a string for each of so many steps."""
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        advice = "split a text into words, e.g. text.split()"
        raise InputError(must_be("labels", "a list of strings", type(labels).__name__, advice))
    words = tuple(labels)
    wrong = next((word for word in words if not isinstance(word, str)), None)
    if wrong is not None:
        advice = "turn numbers into text first: [str(time) for time in times]"
        raise InputError(must_be("labels", "strings", type(wrong).__name__, advice))
    if len(words) != steps:
        advice = "give one for every step that the layer reads"
        raise InputError(must_be("labels", f"{steps}, one per step", len(words), advice))
    return words


# ---------------------------------------------------------------------------------------- frames


def _layers_frame(analysis: Analysis) -> pd.DataFrame:
    rows = [
        {
            "layer": layer.name,
            "cell": layer.cell,
            "hidden": layer.hidden,
            "state_size": layer.size,
            "steps": layer.steps,
            "sequences": layer.sequences,
            "span": layer.span,
            "verdict": layer.verdict,
            "labels": "; ".join(layer.labels),
            "rate": layer.rate.value,
            "rate_low": layer.rate.low,
            "rate_high": layer.rate.high,
            "decades_over_span": layer.rate.value * layer.span / math.log(10),
            "half_life": layer.half_life,
            "horizon": layer.horizon,
            "searched": layer.searched,
            "channels": layer.channels,
            "parity": layer.parity.status,
            "parity_error": layer.parity.error,
            "sentence": layer.sentence,
        }
        for layer in analysis
    ]
    frame = pd.DataFrame(rows)
    return frame.astype({"horizon": "Int64", "channels": "Int64"}) if rows else frame


def _steps_frame(analysis: Analysis) -> pd.DataFrame:
    tables = []
    for layer in analysis:
        data = layer.data
        columns: dict[str, Any] = {
            "layer": layer.name,
            "step": np.arange(1, data.sizes["step"] + 1),
        }
        if layer.step_labels:
            columns["label"] = layer.step_labels
        for state in data["state"].values:
            columns[f"norm_{state}"] = data["state_norm"].sel(state=state).values
            for kind in data["kind"].values:
                if kind == "direct" and state != "h":
                    continue
                columns[f"grad_{state}_{kind}"] = (
                    data["grad_norm"].sel(kind=kind, state=state).values
                )
        for gate in data["gate"].values:
            for what in ("mean", "closed", "open"):
                columns[f"gate_{gate}_{what}"] = data[f"gate_{what}"].sel(gate=gate).values
        for name in ("step_growth", "grad_input_norm"):
            if name in data:  # older runs do not have it
                columns[name] = data[name].values
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _lags_frame(analysis: Analysis) -> pd.DataFrame:
    names = ("median", "low", "high", "count", "zero_share", "slope", "fit")
    tables = [
        pd.DataFrame(
            {"layer": layer.name, "lag": layer.data["lag"].values}
            | {name: layer.data[f"lag_{name}"].values for name in names}
            | _by_parameter(layer)
        )
        for layer in analysis
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _by_parameter(layer: LayerAnalysis) -> dict[str, np.ndarray]:
    """What every lag brings to a weight's gradient, and what is lost without the lags beyond it."""
    if "lag_contribution" not in layer.data:  # older runs do not have it
        return {}
    each = [str(name) for name in layer.data["parameter"].values]
    return {
        f"{column}_{name}": layer.data[variable].sel(parameter=name).values
        for column, variable in (
            ("contribution", "lag_contribution"),
            ("truncation_error", "truncation_error"),
        )
        for name in each
    }


def _units_frame(analysis: Analysis) -> pd.DataFrame:
    tables = []
    for layer in analysis:
        for state in layer.data["state"].values:
            order = layer.data["unit_order"].sel(state=state).values
            rank = {int(unit): place for place, unit in enumerate(order[order >= 0], start=1)}
            units = sorted(rank)
            table = pd.DataFrame({"layer": layer.name, "state": state, "unit": np.add(units, 1)})
            table["memory_rank"] = [rank[unit] for unit in units]
            table["memory_steps"] = layer.data["memory_steps"].sel(state=state).values[units]
            for name in ("time_scale", "unit_saturated", "unit_idle"):
                if name in layer.data:  # older runs do not have it
                    table[name] = _of_state(layer, name, str(state))[units]
            tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _of_state(layer: LayerAnalysis, name: str, state: str) -> np.ndarray:
    """A quantity of every unit; one that no state is named for belongs to the main state."""
    values = layer.data[name]
    if "state" in values.dims:
        return np.asarray(values.sel(state=state).values)
    own = np.asarray(values.values)
    return own if state == layer.main_state else np.full_like(own, np.nan)


def _findings_frame(analysis: Analysis) -> pd.DataFrame:
    columns = list(Finding.__dataclass_fields__)
    return pd.DataFrame([asdict(finding) for finding in analysis.findings], columns=columns)


_FRAME_BUILDERS = {
    "layers": _layers_frame,
    "steps": _steps_frame,
    "lags": _lags_frame,
    "units": _units_frame,
    "findings": _findings_frame,
}


# ----------------------------------------------------------------------------------- save, load


def _save(analysis: Analysis, path: Path) -> Path:
    header = {
        "schema": SCHEMA,
        "title": analysis.title,
        "warnings": list(analysis.warnings),
        "provenance": dict(analysis.provenance),
        "layers": list(analysis.layers),
    }
    tree = {"/": xr.Dataset(attrs={"gradflow": json.dumps(header)})}
    packed: dict[str, dict[str, Any]] = {}
    for number, layer in enumerate(analysis):
        packed[f"/layer{number}"] = {
            str(name): PACKED for name, values in layer.data.items() if values.size >= LARGE
        }
        tree[f"/layer{number}"] = layer.data.assign_attrs(gradflow=json.dumps(_layer_header(layer)))
    try:
        xr.DataTree.from_dict(tree).to_netcdf(path, engine="h5netcdf", encoding=packed)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _layer_header(layer: LayerAnalysis) -> dict[str, Any]:
    header = {
        name: getattr(layer, name)
        for name in LayerAnalysis.__dataclass_fields__
        if name not in ("data", "lyapunov", "rate", "parity", "findings", "predictions")
    }
    header["lyapunov"] = None if layer.lyapunov is None else layer.lyapunov.tolist()
    header["rate"] = asdict(layer.rate)
    header["parity"] = asdict(layer.parity)
    header["findings"] = [asdict(finding) for finding in layer.findings]
    header["predictions"] = [asdict(prediction) for prediction in layer.predictions]
    return header


def load(path: str | os.PathLike[str]) -> Analysis:
    """Read a run back: a ``run.nc`` file, or a report folder that holds one.

    Args:
        path: of the file or of the folder.

    Returns:
        The analysis as it was saved, number by number.

    Raises:
        InputError: what was given is no path.
        FileError: there is no run, it is none of gradflow's, or another version's.

    >>> import tempfile, torch, gradflow
    >>> run = gradflow.diagnose(torch.nn.GRU(3, 8), torch.randn(20, 4, 3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = gradflow.load(run.save(f"{folder}/run.nc"))
    >>> again["l0"].rate == run["l0"].rate
    True
    """
    if not isinstance(path, str | os.PathLike):
        kind = type(path).__name__
        raise InputError(f"path must be a path, got {kind}; give a report folder or its run.nc")
    path = Path(path)
    file = path / "run.nc" if path.is_dir() else path
    if not file.exists():
        near = _near_runs(path)
        such = f", such as {near[0]}" if near else ""
        raise FileError(
            f"there is no run at {file}; give a folder written by gradflow, or its run.nc{such}"
        )
    try:
        with xr.open_datatree(file, engine="h5netcdf") as tree:
            tree.load()
            header = json.loads(tree.attrs["gradflow"])
            if header["schema"] != SCHEMA:
                raise FileError(_other_schema(file, header["schema"]))
            groups = [tree[f"/layer{number}"] for number in range(len(header["layers"]))]
            layers = [_layer_from(group.to_dataset()) for group in groups]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise FileError(_unreadable(file)) from error
    return Analysis(
        title=header["title"],
        layers={layer.name: layer for layer in layers},
        warnings=tuple(header["warnings"]),
        provenance=header["provenance"],
    )


def _near_runs(path: Path) -> list[Path]:
    """Runs inside a folder that is none itself, or beside a path that does not exist."""
    if path.is_dir():
        found = [file.parent for depth in ("*", "*/*") for file in path.glob(f"{depth}/run.nc")]
        return sorted(found)
    beside = {file.parent.name: file.parent for file in path.parent.glob("*/run.nc")}
    return [beside[name] for name in difflib.get_close_matches(path.name, sorted(beside), n=1)]


def _other_schema(file: Path, schema: object) -> str:
    """What to do with a run of another version, newer or older."""
    newer = isinstance(schema, int) and schema > SCHEMA
    todo = "update gradflow, or analyze" if newer else "analyze"
    whose = "by a newer gradflow, " if newer else ""
    return (
        f"{file} was saved {whose}with schema {schema}, this gradflow reads {SCHEMA}; {todo} the "
        "model again"
    )


def _unreadable(file: Path) -> str:
    """Why a file is no run, by its first bytes, and what to do."""
    try:
        with file.open("rb") as opened:
            head = opened.read(8)
    except OSError as error:
        return f"cannot read {file}: {error.strerror or error}; check its permissions"
    if not head:
        return f"{file} is empty (0 bytes): its copy failed; copy it or analyze the model again"
    if head.startswith(b"\x89HDF"):
        return f"{file} is damaged, or is not a run saved by gradflow; copy it or analyze the model again"
    return (
        f"{file} is not a run saved by gradflow; give a report folder or its run.nc, or, if it is a "
        f"model: gradflow analyze {shlex.quote(str(file))}"
    )


def _layer_from(data: xr.Dataset) -> LayerAnalysis:
    header = json.loads(data.attrs.pop("gradflow"))
    data[list(ESSENTIAL)]  # KeyError where one is missing
    lyapunov = header.pop("lyapunov")
    return LayerAnalysis(
        **header
        | {
            "labels": tuple(header["labels"]),
            "step_labels": tuple(header.get("step_labels", ())),
            "rate": Rate(**header["rate"]),
            "parity": Parity(**header["parity"]),
            "findings": tuple(Finding(**finding) for finding in header["findings"]),
            "predictions": tuple(_prediction_from(p) for p in header.get("predictions", ())),
            "lyapunov": None if lyapunov is None else np.asarray(lyapunov, dtype=float),
            "data": data,
        }
    )


def _prediction_from(header: dict[str, Any]) -> Prediction:
    return Prediction(**header | {"rate": Rate(**header["rate"])})
