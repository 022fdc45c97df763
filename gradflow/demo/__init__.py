"""The demo: an RNN and an LSTM learn to add two numbers 100 steps apart; one of them can."""

from gradflow.demo.task import AddingModel, adding_batch, train

__all__ = ["AddingModel", "adding_batch", "train"]
