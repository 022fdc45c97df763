"""Watch a training that Lightning runs: a callback for ``lightning`` and for ``pytorch_lightning``.

Lightning calls ``training_step``, not the module, runs forward and backward inside the optimizer's step,
divides the loss by the accumulated batches and scales it under mixed precision; the callback says where an
update begins and ends, so that what is measured is the gradient of the whole update, unscaled. Numbers stand
at ``trainer.global_step``, never at the batch's index.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from gradflow.errors import InputError
from gradflow.integrations.writers import finite, writer_for
from gradflow.watching import Watch, watch

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _bases() -> tuple[type, ...]:
    """The Callback of each of the two packages that is in use; of the first one installed if none is."""
    found = [sys.modules[name] for name in PACKAGES if name in sys.modules]
    for name in PACKAGES if not found else ():
        try:
            found = [importlib.import_module(name)]
            break
        except ModuleNotFoundError as error:
            if error.name != name.split(".")[0]:
                raise
    if not found:
        raise ImportError(
            "gradflow.integrations.lightning needs lightning or pytorch_lightning, got neither; type "
            "pip install 'gradflow-rnn[lightning]'"
        )
    return tuple(dict.fromkeys(module.Callback for module in found))


class GradientFlowMonitor(*_bases()):  # type: ignore[misc]
    """A callback that watches the module's recurrent layers, as `gradflow.watch` does.

    Args:
        folder: of the history; by default ``gradflow`` in the trainer's log folder.
        log_every_n_steps: the fewest updates between two probes; by default the trainer's own.
        loggers: whether the trainer's loggers get the numbers, too.
        **options: as of `gradflow.watch`: budget, preset, layers, lengths, on, to, force.

    >>> from gradflow.integrations.lightning import GradientFlowMonitor
    >>> monitor = GradientFlowMonitor("runs/a", budget=0.05)   # Trainer(callbacks=[monitor])
    >>> monitor.watch is None
    True
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        log_every_n_steps: int | None = None,
        loggers: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.watch: Watch | None = None  # from the start of the training on
        self._folder, self._every, self._loggers = folder, log_every_n_steps, loggers
        self._options = options
        self._block: AbstractContextManager[Watch] | None = None  # of the update under way
        self._before = 0  # the trainer's global step when it began

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to watch."""
        folder = self._folder or Path(trainer.log_dir or trainer.default_root_dir) / "gradflow"
        options: dict[str, Any] = {"resume": trainer.ckpt_path is not None} | self._options
        if options.get("force"):
            options["resume"] = False
        to = options.pop("to", None)
        targets = list(to) if isinstance(to, list) else [] if to is None else [to]
        if self._loggers:
            targets += [_logger_target(logger) for logger in trainer.loggers]
        self.watch = watch(
            pl_module,
            folder,
            every=self._every or trainer.log_every_n_steps,
            to=targets or None,
            **options,
        )

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """An update begins, or goes on with another batch."""
        if self.watch is None:
            return
        if self._block is None:
            self._before = trainer.global_step
            self.watch.begin_at(trainer.global_step)
            self._block = self.watch.step()
            self._block.__enter__()
        self.watch.before_forward(pl_module)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """An update is over where the optimizer stepped."""
        if trainer.global_step != self._before:
            self._end_update()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End the watching."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End it, whatever ends the training."""
        self._end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """End it, where nothing has so far."""
        self._end()

    def _end_update(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.__exit__(None, None, None)

    def _end(self) -> None:
        if self.watch is not None:
            self.watch.close()  # an update that is under way is none
        self._end_update()


def _logger_target(logger: Any) -> Callable[..., object]:
    """A trainer's logger as a target: with figures where its tool has them."""
    run = getattr(logger, "experiment", None)
    try:
        return writer_for((run, logger.run_id) if hasattr(logger, "run_id") else run)
    except InputError:
        return _Metrics(logger)


class _Metrics:
    """The numbers of a probe into a logger that takes numbers only."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def __call__(self, step: int, scalars: Mapping[str, float], figures: object) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Experiment logs directory")
            self.logger.log_metrics(finite(scalars), step)
