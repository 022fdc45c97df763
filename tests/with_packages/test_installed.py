"""The environment of this folder: what its tests observe is really there, and .ci/run skips none of them."""

from __future__ import annotations

import importlib

import pytest

PACKAGES = (
    "transformers",
    "minGRU_pytorch",
    "mambapy",
    "xlstm",
    "tensorboard",
    "wandb",
    "mlflow",
    "lightning",
    "pytorch_lightning",
)


@pytest.mark.parametrize("name", PACKAGES)
def test_the_package_is_there(name: str) -> None:
    pytest.importorskip(name)
    assert importlib.import_module(name).__file__ is not None
