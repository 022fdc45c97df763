"""Watch a training that the Trainer of transformers runs.

The Trainer clips before ``on_pre_optimizer_step`` and accumulates in ``on_substep_end``; `gradflow.watch`
sees both from the model's forward and the optimizer's step, and reads norms before and after clipping.
Numbers stand at ``state.global_step``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gradflow.integrations.writers import trackio_run, writer_for
from gradflow.watching import Watch, watch

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        "gradflow.integrations.transformers needs transformers, got none; type "
        "pip install 'gradflow-rnn[transformers]'"
    ) from error


class GradflowCallback(TrainerCallback):
    """A callback that watches the model's recurrent layers, as `gradflow.watch` does.

    Args:
        folder: of the history; by default ``gradflow`` in the output folder.
        every: the fewest updates between two probes; by default those between two logs.
        report: whether the tools of ``report_to`` get the numbers, too.
        **options: as of `gradflow.watch`: budget, preset, layers, lengths, on, to, force.

    >>> from gradflow.integrations.transformers import GradflowCallback
    >>> callback = GradflowCallback("runs/a")       # Trainer(callbacks=[callback])
    >>> callback.watch is None
    True
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        every: int | None = None,
        report: bool = True,
        **options: Any,
    ) -> None:
        self.watch: Watch | None = None  # from the start of the training on
        self._folder, self._every, self._report = folder, every, report
        self._options = options

    def on_train_begin(self, args: Any, state: Any, control: Any, **told: Any) -> None:
        """Begin to watch."""
        options: dict[str, Any] = {"resume": state.global_step > 0} | self._options
        if options.get("force"):
            options["resume"] = False
        to = options.pop("to", None)
        targets = list(to) if isinstance(to, list) else [] if to is None else [to]
        if self._report and state.is_world_process_zero:
            targets += _targets(args)
        self.watch = watch(
            told["model"],
            self._folder or Path(args.output_dir) / "gradflow",
            optimizer=getattr(told.get("optimizer"), "optimizer", told.get("optimizer")),
            every=self._every or max(1, int(state.logging_steps or 0)),
            to=targets or None,
            **options,
        )
        self.watch.begin_at(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **told: Any) -> None:
        """End the watching."""
        if self.watch is not None:
            self.watch.close()


def _targets(args: Any) -> list[Any]:
    """The tools that the Trainer reports to and that are ready; for TensorBoard a run of its own."""
    names = args.report_to if isinstance(args.report_to, list) else [args.report_to]
    found: list[Any] = [_TensorBoard(args)] if "tensorboard" in names else []
    for name, is_ready in _READY.items():
        module = sys.modules.get(name)
        if name in names and module is not None and is_ready(module):
            found.append(writer_for(module))
    return found


_READY: dict[str, Callable[[Any], bool]] = {
    "wandb": lambda wandb: wandb.run is not None,
    "mlflow": lambda mlflow: mlflow.active_run() is not None,
    "trackio": lambda trackio: trackio_run(trackio) is not None,
}


class _TensorBoard:
    """A run of TensorBoard beside that of the Trainer, which has it to itself."""

    def __init__(self, args: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        base = os.getenv("TENSORBOARD_LOGGING_DIR") or os.path.join(args.output_dir, "runs")
        self._writer = SummaryWriter(os.path.join(os.path.expanduser(base), "gradflow"))
        self._target = writer_for(self._writer)

    def __call__(self, step: int, scalars: dict[str, float], figures: Mapping[str, Any]) -> None:
        self._target(step, scalars, figures)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
