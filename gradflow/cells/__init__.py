"""The cells gradflow knows in closed form; the registry is the menu."""

from gradflow.cells.base import Cell, Scan, Steps, Weights
from gradflow.cells.gru import GRUCell
from gradflow.cells.lstm import LSTMCell
from gradflow.cells.rnn import RNNCell, relu_slope, tanh_slope

CELLS: dict[str, Cell] = {
    "RNN_TANH": RNNCell(tanh_slope),
    "RNN_RELU": RNNCell(relu_slope),
    "LSTM": LSTMCell(),
    "GRU": GRUCell(),
}

__all__ = ["CELLS", "Cell", "Scan", "Steps", "Weights"]
