"""Writers of other tools as targets of `gradflow.watch`: TensorBoard, W&B, MLflow, trackio.

A target takes (step, scalars, figures) of a probe. None of these packages is imported here: a writer that
is given brings its own. Numbers that are not finite (a half-life that never ends) are left out, since most
tools draw them as zero, as the largest float or not at all.
"""

from __future__ import annotations

import io
import math
import re
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gradflow.errors import InputError, must_be
from gradflow.history.tags import Figures, Target

ROOT = "gradflow"
_RATE = re.compile(r"gradflow/(?P<layer>.+)/rate")


def writer_for(x: Any) -> Target:
    """The target that writes into another tool's log.

    Args:
        x: a ``SummaryWriter`` of torch.utils.tensorboard or tensorboardX; a W&B run; the module
            mlflow, a run of it, its client (whose active run is meant) or a pair (client, run id);
            a trackio run or the module trackio.

    Returns:
        A callable (step, scalars, figures).

    Raises:
        InputError: it is none of these, or has no run.

    >>> class SummaryWriter:
    ...     def add_scalar(self, tag, value, step): print(tag, value, step)
    ...     def add_image(self, *args, **options): pass
    ...     def add_custom_scalars(self, layout): print(list(layout))
    >>> writer_for(SummaryWriter())(100, {"gradflow/l0/rate": -0.5}, {})
    gradflow/l0/rate -0.5 100
    """
    client, run = x if isinstance(x, tuple) and len(x) == 2 else (x, None)
    for name, make in _WRITERS.items():
        if name in _packages(client):
            return make(client, run)
    if callable(getattr(x, "add_scalar", None)) and callable(getattr(x, "add_image", None)):
        return ToTensorBoard(x)
    expected = (
        "a callable (step, scalars, figures), a TensorBoard SummaryWriter, a W&B run, an MLflow run or "
        "client, or a trackio run"
    )
    raise InputError(must_be("to", expected, type(x).__name__, "leave it out for the file alone"))


def _packages(x: Any) -> set[str]:
    """The packages that an object's class, or a module, is part of."""
    if isinstance(x, types.ModuleType):
        return {x.__name__.split(".")[0]}
    return {kind.__module__.split(".")[0] for kind in type(x).__mro__}


def finite(scalars: Mapping[str, float]) -> dict[str, float]:
    """The numbers that a chart can show."""
    return {tag: float(value) for tag, value in scalars.items() if math.isfinite(value)}


def pixels(figure: Any) -> np.ndarray:
    """A figure as (height, width, 3) bytes, the same that a page would show."""
    from PIL import Image

    return np.array(Image.open(io.BytesIO(_png(figure))).convert("RGB"))


def _png(figure: Any) -> bytes:
    from gradflow.reporter import png

    return png(figure, dpi=110)


class ToTensorBoard:
    """Into TensorBoard: scalars, figures as images, and a layout with the rates and their intervals.

    Args:
        writer: a SummaryWriter; it stays the caller's, who closes it.

    Raises:
        InputError: it is closed; it would go on in a file that nobody closes.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer
        self._layers: list[str] = []
        self._check_open()

    def _check_open(self) -> None:
        if getattr(self.writer, "all_writers", self) is None:
            advice = "make a new one, and close it after the watch"
            raise InputError(must_be("to", "an open SummaryWriter", "one that was closed", advice))

    def __call__(self, step: int, scalars: dict[str, float], figures: Figures) -> None:
        """Write one probe."""
        self._check_open()
        for tag, value in finite(scalars).items():
            self.writer.add_scalar(tag, value, step)
        for tag, draw in figures.items():
            self.writer.add_image(tag, pixels(draw()), step, dataformats="HWC")
        self._lay_out(scalars)

    def _lay_out(self, scalars: Mapping[str, float]) -> None:
        """The tab of custom scalars, again whenever a layer is new."""
        layers = [match["layer"] for tag in scalars if (match := _RATE.fullmatch(tag))]
        layers = [layer for layer in layers if f"{ROOT}/{layer}/rate_low" in scalars]
        if set(layers) <= set(self._layers) or not hasattr(self.writer, "add_custom_scalars"):
            return
        self._layers = list(dict.fromkeys([*self._layers, *layers]))
        self.writer.add_custom_scalars(layout(self._layers))


def layout(layers: list[str]) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's layout of custom scalars: the rate of each layer as a band, the rest as lines.

    >>> layout(["l0"])["gradflow: rates"]
    {'l0': ['Margin', ['gradflow/l0/rate', 'gradflow/l0/rate_low', 'gradflow/l0/rate_high']]}
    """
    rates = {
        layer: ["Margin", [f"{ROOT}/{layer}/{name}" for name in ("rate", "rate_low", "rate_high")]]
        for layer in layers
    }
    # these are patterns, which must not match longer tags
    lines = {
        name.replace("_", " "): ["Multiline", [f"{ROOT}/{re.escape(n)}/{name}$" for n in layers]]
        for name in ("horizon", "half_life", "grad_norm", "nonfinite")
    }
    return {f"{ROOT}: rates": rates, f"{ROOT}: layers": lines}


class ToWandb:
    """Into a W&B run, over an axis of its own, so that the run's own count of steps stays as it is.

    What is logged joins the row that the training logs next. Where the training has logged nothing since
    the probe before, that probe's row is closed first, so that none is lost.

    Args:
        run: what ``wandb.init`` gave.
    """

    def __init__(self, run: Any) -> None:
        self.run = run
        self._open_at: int | None = None  # the run's row that holds the last probe, not yet closed
        run.define_metric(f"{ROOT}/step", hidden=True)
        run.define_metric(f"{ROOT}/*", step_metric=f"{ROOT}/step")

    def __call__(self, step: int, scalars: dict[str, float], figures: Figures) -> None:
        """Write one probe."""
        rows: dict[str, Any] = {f"{ROOT}/step": step} | finite(scalars)
        if figures:
            import wandb

            rows |= {tag: wandb.Image(pixels(draw())) for tag, draw in figures.items()}
        if self._open_at is not None and self._open_at == self.run.step:
            self.run.log({}, commit=True)
        self.run.log(rows, commit=False)
        self._open_at = self.run.step

    def close(self) -> None:
        """Close the row of the last probe."""
        if self._open_at is not None and self._open_at == self.run.step:
            self.run.log({}, commit=True)
        self._open_at = None


class ToMlflow:
    """Into a run of MLflow: metrics by step, figures as images of the run.

    Args:
        client: an ``MlflowClient``.
        run: the run's id.
    """

    def __init__(self, client: Any, run: str) -> None:
        self.client, self.run = client, run

    def __call__(self, step: int, scalars: dict[str, float], figures: Figures) -> None:
        """Write one probe."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(key_of(tag), value, now, step) for tag, value in finite(scalars).items()]
        for start in range(0, len(metrics), 1000):  # as many as one call takes
            self.client.log_batch(self.run, metrics=metrics[start : start + 1000])
        for tag, draw in figures.items():
            file = f"{key_of(tag)}-{step:08d}.png"
            self.client.log_image(self.run, pixels(draw()), artifact_file=file)


def key_of(tag: str) -> str:
    """A tag in the letters that a metric's name may have in MLflow.

    >>> key_of("gradflow/rnn.l0@2/rate")
    'gradflow/rnn.l0_2/rate'
    """
    return re.sub(r"[^\w\-. /:]", "_", tag)


class ToTrackio:
    """Into a trackio run, at the training step; the run's own count of steps stays as it is.

    Args:
        run: what ``trackio.init`` gave.
    """

    def __init__(self, run: Any) -> None:
        self.run = run

    def __call__(self, step: int, scalars: dict[str, float], figures: Figures) -> None:
        """Write one probe."""
        rows: dict[str, Any] = dict(finite(scalars))
        if figures:
            import trackio

            rows |= {tag: trackio.Image(pixels(draw())) for tag, draw in figures.items()}
        counted = getattr(self.run, "_next_step", None)  # what the training logs goes on from there
        self.run.log(rows, step=step)
        if counted is not None:
            self.run._next_step = counted


def _tensorboard(x: Any, run: Any) -> Target:
    return ToTensorBoard(x)


def _wandb(x: Any, run: Any) -> Target:
    return ToWandb(_begun("wandb", x.run if isinstance(x, types.ModuleType) else x))


def _mlflow(x: Any, run: Any) -> Target:
    """Of a client its active run, unless one is given."""
    import mlflow

    if run is None and hasattr(x, "info") and hasattr(x, "data"):
        run = x.info.run_id
    if run is None:
        active = mlflow.active_run()
        if active is None:
            advice = "call mlflow.start_run() first, or give (client, run id)"
            raise InputError(must_be("to", "an MLflow client with a run", "none", advice))
        run = active.info.run_id
    is_client = not isinstance(x, types.ModuleType) and hasattr(x, "log_batch")
    client = x if is_client else mlflow.MlflowClient()
    return ToMlflow(client, str(getattr(getattr(run, "info", None), "run_id", run)))


def _trackio(x: Any, run: Any) -> Target:
    return ToTrackio(_begun("trackio", trackio_run(x) if isinstance(x, types.ModuleType) else x))


def _begun(package: str, run: Any) -> Any:
    if run is None:
        advice = f"call {package}.init() first"
        raise InputError(must_be("to", f"a run of {package}", "none", advice))
    return run


def trackio_run(trackio: Any) -> Any:
    """The present run of the module trackio; None where there is none."""
    return trackio.context_vars.current_run.get()


_WRITERS: dict[str, Callable[[Any, Any], Target]] = {
    "tensorboardX": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
