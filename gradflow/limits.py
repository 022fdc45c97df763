"""Every threshold, tolerance, budget and speed of gradflow: value, unit and why.

One line each; to have another limit, change it here. The words that speak of the limits, and the
`GLOSSARY` of the page and of the README, are made from them at the end: no sentence writes a limit out.
Sizes of drawings stand with the drawings. `TABLE` has all limits by name.

    >>> TABLE["BAND"].value, TABLE["BAND"].unit, BAND_WORDS, GONE_WORDS
    (1.0, 'decades', 'one decade', '10⁻³')

"Predicted" seconds are those of the predictions of cost, of which the speeds at the end are a part.
They were measured on two cores of a server; they choose how much is done, never what it means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

Number = TypeVar("Number", int, float, tuple[int, ...], tuple[float, ...])


@dataclass(frozen=True)
class Limit:
    """One limit, as data."""

    value: int | float | tuple[int, ...] | tuple[float, ...]
    unit: str
    why: str  # what it decides, and where it is from


_rows: list[Limit] = []


def _limit(value: Number, unit: str, why: str) -> Number:
    """Put a limit on the table."""
    _rows.append(Limit(value, unit, why))
    return value


def power(decades: float) -> str:
    """A power of ten in words a reader knows.

    >>> power(-3), power(0)
    ('10⁻³', '1')
    """
    whole = math.floor(decades + 0.5)
    raised = str(whole).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return "1" if whole == 0 else f"10{raised}"


# fmt: off

# verdicts, and the lag curve
BAND = _limit(1.0, "decades", "a gain over the span that changes by less is stable: theory, section 3")
GONE = _limit(1e-3, "gain", "below it a direction, a unit, the gradient counts as gone: theory, section 3")
CARRIED = _limit(0.1, "gain", "a unit that never falls below it carries the gradient")
DEAD_SHARE = _limit(0.5, "of sequences", "where as many are cut by exact zeros, the layer is dead")
GAINS_APART = _limit(0.2, "decades", "a difference of two gains that is worth a word")
STEPS_ALIKE = _limit(0.9, "of the steps of a gain", "a stretch so long shortens it for all")
SHORT = _limit(10, "steps", "with fewer all are counted, the first ones too: theory, section 3")
SHAPE_STEPS = _limit(10, "steps", "a curve of fewer has no shape to tell")
POWER_BETTER = _limit(0.8, "of the line's error", "a power law must predict other sequences so well")
POWER_BETTER_ONE = _limit(0.02, "of the line's error", "the same of the later half of one sequence: weak")

# intervals
CONFIDENCE = _limit(0.95, "probability", "of every interval")
BATCH_MEANS = _limit(20, "means", "into which one long sequence is parted")
CORRELATION_TIMES = _limit(60, "integrated times", "one sequence must hold them: theory, section 3")
PIECES = _limit(4, "means", "of one sequence that does not hold them")
COUNTED_SHARE = _limit(0.8, "of steps", "of a long sequence, past the burn-in")
MOST_NEEDED = _limit(10**6, "sequences or steps", "saying that more are needed helps nobody")
RATE_ROUNDING = _limit(1e-10, "nats per step", "what float64 rounding alone makes of a rate")

# settling of the rate
UNSETTLED = _limit(1.25, "of the difference", "between scales and between halves, by simulation")
BOUNDARY = _limit(0.25, "of the boundary", "that was taken out, by simulation")
PROBES = _limit(4, "vectors", "through every step, by which it is seen whether the steps still move")
MOVES = _limit(0.12, "nats per step", "of growth, at most, for a mean step that is another, by simulation")
MOVES_CHANCE = _limit(0.5, "of its expected square", "up to which such a move is by chance, by simulation")
MOVES_LONG = _limit(5.0, "times the difference of halves", "that may be to come, by simulation")
MOVES_MOST = _limit(1.0, "nats", "over all steps, that coming to rest makes of a growth, by simulation")
SETTLED_DECADES = _limit(0.5, "decades", "over the span: a rate that may be off by more is not told,")
SETTLED_SHARE = _limit(0.2, "of the rate", "unless it is less than this of the rate")
TRACED = _limit(8, "exponents", "whose settling is kept")

# findings
GATE_CLOSED = _limit(0.05, "gate", "below it a gate counts as closed: theory, section 3")
GATE_OPEN = _limit(0.95, "gate", "above it a gate counts as open: theory, section 3")
SATURATED = _limit(0.95, "|tanh|", "above it less than a tenth of the gradient passes")
UNITS_AT_FAULT = _limit(0.5, "of units", "from which on saturation or idleness is called a cause")
GATE_MOSTLY = _limit(0.5, "of values", "a gate that is closed more often is called so")
OVERWRITTEN = _limit(0.75, "update gate", "below it a state is mostly new after two steps")
FEW_CHANNELS = _limit(20, "units a direction", "that still passes GONE: with fewer, a layer has few channels")
FEW_CHANNELS_UNITS = _limit(8, "units", "in a layer of fewer, few directions say nothing")
WALL_LOSS = _limit(0.5, "of decades lost", "where few steps lose so much, they are named")
WALL_STEPS = _limit(0.1, "of steps", "that is few, and one in any case")
WALL_LEAST = _limit(5, "steps", "without which few of them means nothing")
BLANKS = _limit(0.05, "of steps", "before a padded tail that may hold the padding's row")
CHANCE = _limit(1e-3, "probability", "that some sequence of a batch ends as padding does, by chance")
CHANCE_STEPS = _limit(2, "steps", "in a row at the end that may be alike by chance")
PADDING_JUMP = _limit(1000, "times INPUT_ROUNDING", "of float32 or coarser: padding begins with a jump")
INPUT_ROUNDING = _limit(32, "units of rounding", "within which a layer made two rows of one")
SHARES_ALIKE = _limit(1e-3, "relative", "within which shares of a mixture of states add up to one")
STATES_ALIKE = _limit(1e-3, "relative", "within which sequences that read the same have the same states")
LARGE_INPUT = _limit(1.5, "standard deviations", "from which on normalising makes an input smaller")
LINEAR_ROUNDING = _limit(256, "units of rounding", "within which two steps make the same of a vector")
LAG_TOLERANCES = _limit((0.01, 0.05, 0.1), "of ‖∂L/∂W‖", "errors for which a window is given")
LAG_TOLERANCE = _limit(0.05, "of ‖∂L/∂W‖", "the one of them whose window a reader is told")
STUCK = _limit(0.9, "of steps", "a unit that is closed, open or at its limit as often is stuck")
SMALLEST_SHARE = _limit(-6.0, "decades", "contributions below it are not drawn")

# remedies and predictions
TRIED_VECTORS = _limit(4, "vectors", "random ones, by which a remedy is tried")
TRIED_SEQUENCES = _limit(8, "sequences", "on which it is tried")
TRIED_LEAST = _limit(0.05, "decades", "over the span by which the gain is to come nearer to 1")
LESS_SHUT = _limit(0.1, "of values", "by which a gate is to be shut less often")
TRIED_SECONDS = _limit(1.0, "seconds", "predicted, of one try, of all layers together")
PREDICTION_LEAST = _limit(0.05, "decades", "that are worth saying")
PREDICTION_SECONDS = _limit(5.0, "seconds", "predicted, of all predictions for a report together")
SHOWN_LETTERS = _limit(64, "letters", "of a name in a file that are shown")
SHOWN_PREDICTIONS = _limit(3, "predictions", "tried and shown for a layer")
REPORT_SHARE = _limit(16, "one part in", "of the budgets of `analyze`, for a prediction for a report")
QUICK = _limit(4, "one part in", "of the budgets of `analyze`, for one measurement of `what_if`")
STEEPEST = _limit(10.0, "nats per step", "that a factor is asked to make up for")
FACTORS_ALIKE = _limit(0.02, "of a factor", "two that differ by less are one")

# how well a number has to agree before it is believed
PARITY_FLOAT64 = _limit(1e-8, "relative", "parity: design, section 6")
PARITY_FLOAT32 = _limit(1e-3, "relative", "parity: design, section 6")
PARITY_HALF = _limit(5e-2, "relative", "parity in float16 and bfloat16: design, section 6")
REPLAY_FLOAT64 = _limit(1e-10, "relative", "of a replayed output")
REPLAY_FLOAT32 = _limit(1e-4, "relative", "of a replayed output")
REPLAY_HALF = _limit(5e-2, "relative", "of a replayed output in fewer bits")
CERTIFIED = _limit(1e-4, "relative", "sum rules; rounding makes 1e-6 of it where gates are saturated")
PATHS_AGREED = _limit(1e-4, "relative", "paths must add up to what a step does; float32 states")
CONSTANT_ALIKE = _limit(1e-12, "relative", "of what two steps that never change make of one vector")
CELL_ROUNDING = _limit(4, "units of rounding", "of what was subtracted, below which it counts as 0")
DIFFERENCE_ROUNDING = _limit(64, "units of rounding", "of what was subtracted, likewise")
ROW_ROUNDING = _limit(256, "units of rounding", "of the largest entry of a row, between two calls")
WIDE_ROUNDING = _limit(64, "units of rounding", "within which pushing and pulling must agree")
TAPE_ROUNDING = _limit(1024, "units of rounding", "within which a step written down must give the same")

# gains, norms, ranks: how exactly they are measured
NORM_TOLERANCE = _limit(1e-4, "relative", "of a spectral norm found by iteration: design, section 6")
NORM_SAFETY = _limit(10.0, "times", "so far below it the estimated error has to be")
NORM_KEPT = _limit(12, "directions", "that go on to the next lag")
NORM_NEW = _limit(4, "directions", "that a step of the iteration adds")
NORM_LEADS = _limit(0.6, "of ‖V‖_F²", "in one direction: no other can be larger")
NORM_STEPS = _limit(12, "steps", "then the eigenvectors of G, about as dear as that many")
EXACT_ROWS = _limit(64, "rows", "up to which the Gram matrix gives the spectral norm: design, section 6")
SMALL_ROWS = _limit(24, "rows", "below which eigenvalues are cheaper than trying without")
GRAM_POWERS = _limit(4, "products", "with the Gram matrix between two looks at what they found")
GRAM_LOOKS = _limit(4, "looks", "then the eigenvalues")
EXACT_WIDTH = _limit(32, "states", "up to which all of P is pushed; above, a block goes to and fro")
WINDOW_ROWS = _limit(4, "rows", "of such a block")
WINDOW_ROUNDS = _limit(24, "rounds", "of pulling and pushing, at most")
WINDOW_TOLERANCE = _limit(2e-5, "nats", "that one more round may still add to ln ‖P‖₂")
USUAL_ROUNDS = _limit(4, "rounds", "that the block iteration takes as a rule")
LEAST_ROUNDS = _limit(2, "rounds", "without which nothing is found")
ROUND_TELLS = _limit(1e-3, "nats", "that one more round could add and that an interval has to hold")
THIN_ROUNDS = _limit(6, "rounds", "of a state so wide that only few directions go through it")
THIN_TOLERANCE = _limit(1e-3, "nats", "that one more round may add there: ‖P‖₂ is found to 1 %")
THIN_SOURCES = _limit(6, "windows", "of one lag and stretch, evenly spread")
RANK_STARTS = _limit(4, "starts", "of each mapped sequence, evenly spread, for its ranks")
RANK_TRUNCATION = _limit(1e-4, "of the largest", "where singular values are cut off: theory, section 3")
TRUNCATE_ROWS = _limit(192, "rows", "above which that pays")
GROWTH_FLOAT64 = _limit(1e4, "times", "of the norm, between two factorisations")
GROWTH_FLOAT32 = _limit(10.0, "times", "the same")
ROUGH_WIDE = _limit(192, "states", "maps of wider ones are in float32, where float64 is too dear")
RESCALE_FLOAT64 = _limit(32, "powers of two", "that a row may leave 1 before it is rescaled")
RESCALE_FLOAT32 = _limit(8, "powers of two", "the same")
IMAGE_DRIFT = _limit(40, "powers of two", "by which images may have drifted before they are made anew")
ROW_DEPTH = _limit(2000, "powers of two", "below the largest row, where a row counts for nothing")
EIGEN_WIDEST = _limit(512, "states", "eigenvalues of wider ones cost more than they are worth")
LAG_FEW_ROWS = _limit(16, "times fewer", "rows than columns: their sum of products is never formed")
LOSS_STEPS = _limit(256, "loss steps", "of a triangle, at most")

# seeds: every random start is the same at each run
SEED = _limit(0, "seed", "of starts of blocks and exponents")
CONSTANT_SEED = _limit(1, "seed", "of the vector that tells whether steps never change")
THIN_SEED = _limit(24_301, "seed", "of probes of wide states: none with which somebody draws weights")

# what is looked at, and followed, while a recording is open
DEVICE_WIDEST = _limit(256, "states", "from which on the steps of a layer are computed on its accelerator")
JACOBIAN_WIDEST = _limit(64, "states", "up to which step Jacobians are written out unasked")
LINK_WIDEST = _limit(64, "states", "up to which a link that is not elementwise is written out")
ENTRIES_WIDEST = _limit(64, "states", "up to which single entries that nobody reads are told apart")
DENSE_UNITS = _limit(128, "units", "whose products are taken at once")
LINK_DEPTH = _limit(16, "operations", "from the new state to the one before, in a link")
LINK_NODES = _limit(400, "nodes", "looked at for it")
STEP_NODES = _limit(100_000, "nodes", "of one step of a hand-written loop")
BETWEEN_NODES = _limit(20_000, "nodes", "between two calls")
BACKWARD_NODES = _limit(400_000, "nodes", "looked at in one backward")
OPEN_LOOPS = _limit(8, "loops", "over one module that may be under way at the same moment")
OPEN_CANDIDATES = _limit(4, "loops", "over one module of the user's, the last ones in any case,")
CANDIDATE_CALLS = _limit(64, "calls", "and all that were called within them")
DOUBTFUL = _limit(16, "steps", "of a loop through a module's input, until it is no longer doubted")
BY_VALUE = _limit(16, "calls", "earlier ones whose outputs are looked for by their values")
TERM_OPERATIONS = _limit(32, "operations", "of another term that are looked at")
PART_CALLS = _limit(12, "calls", "after which it is known whether a module is only part of a step")
LEAF_DEPTH = _limit(6, "containers", "in containers, that are looked at for states")
LEAF_COUNT = _limit(64, "leaves", "of them")
STATE_ENTRIES = _limit(2**20, "entries", "of a tensor that may be a state")
RECURRENCE_USES = _limit(3, "uses", "of one weight in a row that make a recurrence")
CUT_USES = _limit(8, "cuts", "of one tensor that follow one another, for a loop without weights")
LOOP_STEPS = _limit(4, "steps", "from which on one is neither among the first nor the last two")
PERIODS = _limit((1, 2, 3, 4), "uses", "of one weight in one step")
CUT_PLACES = _limit(16, "places", "equally good ones to cut a loop into steps that are tried")
PIECE_NODES = _limit(64, "operations", "of a first step, in which the last state of a piece is sought")
OPEN_PIECES = _limit(8, "loops", "over the same weights of which one may go on behind a cut")
VALUE_DEPTH = _limit(8, "operations", "computed again to get one value")
CALLER_FRAMES = _limit(24, "frames", "how far up the code that called backward is looked for")
HELD_ENTRIES = _limit(2**24, "entries", "that are kept alive of a loop's own variables")
HELD_LOCALS = _limit(32, "variables", "of one frame that are looked at")
SAMPLED = _limit(16, "entries", "compared of a weight whose values are not kept")
SHOWN_CALLS = _limit(8, "calls", "of the model, whose arguments are looked at for padding")
INPUT_NODES = _limit(64, "nodes", "between a layer's input and the tokens that it is made from")
FIRST_NODES = _limit(4096, "nodes", "before the first step of a loop")
MANY_TRACKS = _limit(64, "tracks", "of one layer in one block, above which a sentence says so")

# a history of a training
HISTORY_LAGS = _limit(64, "lags", "of one probe, at most: design, section 4")
HISTORY_DENSE = _limit(16, "steps", "back from the loss, up to which every one is kept")
HISTORY_RATIO = _limit(1.125, "times", "the lag before it, beyond: six to a doubling")

# a probe of a training step, preset rate
PROBE_SEQUENCES = _limit(16, "sequences", "of an update, evenly spread, on which a verdict rests")
PROBE_FEWER = _limit(8, "sequences", "of a layer of more than PROBE_WIDE states")
PROBE_WIDE = _limit(128, "states", "above which one direction of a sequence at a time is searched for")
PROBE_ROUNDS = _limit(2, "rounds", "of pulling and pushing above EXACT_WIDTH")
PROBE_REACH = _limit((0.67, 1.0, 1.5), "of the horizon guessed", "lags at which the gain is measured for it")
PROBE_GUESSES = _limit(3, "guesses", "of it, at most")
PROBE_SHARE = _limit(16, "one part in", "of the budgets of `analyze`, for a linear recurrence")
CLIPPED = _limit(1e-3, "relative", "by which the optimizer's gradient is smaller where clipping acted")
WATCH_REMEMBERED = _limit(3, "probes", "whose cost foretells the next one's")
WATCH_TOLD = _limit(2.0, "times", "by which an interval differs from the one told before it is told again")
WATCH_FAILURES = _limit(3, "probes", "in a row that fail, before the watching stops")
WATCH_UNSEEN = _limit(20, "updates", "without a forward of the module, after which a sentence says so")
WATCH_FRAMES = _limit(12, "frames", "above an optimizer's step, in which the GradScaler that calls it is")
RANKS_SECONDS = _limit(600, "seconds", "that processes wait for each other to pool what they saw")
RANKS_BEGIN = _limit(60, "seconds", "that they wait for each other at the line that asks for it")
RANKS_PAUSE = _limit((0.0005, 0.05), "seconds", "between two looks whether the others came: first, at most")
WATCH_FIGURES = _limit(10, "probes", "between two figures that are handed on")
PROBE_SOURCES = _limit(4, "windows", "of one lag and sequence for it, evenly spread")
PROBE_STEPS = _limit(32, "steps", "by which a probe sees whether the steps still move")

# what is said of a training
LASTING = _limit(3, "probes", "that a change of verdict has to last, to be told: issue of the history")
LEARNED = _limit(1.5, "times", "as far as at first, from where on a layer has learned to reach")
LOST = _limit(0.5, "of the farthest", "below which what was reached is lost again")
CLIPPING_NEAR = _limit(5, "probes", "before a layer vanishes, in which clipping that began is told")

# what a file may hold, and what is listed of it
MOST_CONTAINERS = _limit(2_000, "containers", "of a file, which may claim any number of them")
CONTAINER_DEPTH = _limit(5, "containers", "in containers, in which a state_dict is looked for")
SHELL_MODULES = _limit(20_000, "modules", "of a pickled model")
SHELL_DEPTH = _limit(100, "modules", "within each other in it")
WINDOW = _limit(4_096, "entries", "of a pickled layer's kernel, stride or padding, in one direction")
MOST_CLASSES = _limit(1_000, "classes", "that a pickle may name")
PICKLE_STEPS = _limit(10**7, "steps", "of a pickle; 100,000 tensors take five million")
NAME_LETTERS = _limit(200, "letters", "of a name in a file; a longer one loses its middle")
LINE_BYTES = _limit(2**26, "bytes", "of a line of a history; a probe of 1,000 layers has 4 MB")
GROUPS = _limit(1_000, "groups", "of parameters that a history has learning rates of")
TEXT_BYTES = _limit(2**25, "bytes", "of labels, settings of a model, or the index of its weights")
SETTING = _limit(2**31, "", "a larger whole number among such settings is no size of a model")
CHUNK = _limit(1_024, "steps", "of a chunk among such settings, to which short sequences are filled up")
TEXT_LETTERS = _limit(10_000, "letters", "of a text in a saved run or history")
SENTENCE_LETTERS = _limit(300, "letters", "of a sentence that refuses, its paths as 30 each")
ANNOUNCED = _limit(2**28, "bytes", "that a compressed batch, or views of few numbers, may stand for")
UNPACKED_TIMES = _limit(8, "times", "its own bytes that an archive of weights may unpack to, and a MiB")
TRUSTED_LETTERS = _limit(1_000, "letters", "of one on what a class of --model or a file of --trust lacks")
MOST_LAYERS = _limit(128, "layers", "of a file of weights, each direction counted")
RUN_LAYERS = _limit(512, "layers", "of a saved run; more are not saved")
MOST_SENTENCES = _limit(10_000, "warnings", "of a saved run")
MOST_STEPS = _limit(10_000, "steps", "of a batch in a file, for a layer that runs step by step")
HIGHEST = _limit(40.0, "nats", "of an exponent, that leaves room for a sum of many steps in float32")
OVERVIEW_ROWS = _limit(12, "layers", "in an overview; of more those with the worst verdicts are drawn")
LISTED_MODULES = _limit(20, "modules", "listed of a file")

# budgets of time
GAIN_SECONDS = _limit(1.0, "seconds", "predicted, for gains and rates of all layers together")
RATE_SECONDS = _limit(1.0, "seconds", "predicted, for the exponents of all layers together")
MAP_SECONDS = _limit(5.0, "seconds", "predicted, for the maps of all layers together")
TRIANGLE_SECONDS = _limit(1.5, "seconds", "predicted, for the triangles of all layers together")
LAG_SECONDS = _limit(5.5, "seconds", "predicted, for the gradients by lag of all layers together")
PATH_SECONDS = _limit(1.0, "seconds", "predicted, for the paths of all layers together")
CHANNEL_WORK = _limit(2e11, "operations", "for the singular values of all layers together")
THIN_BUDGETS = _limit(5, "times GAIN_SECONDS", "for a state through which only few directions go")
THIN_SECONDS = _limit(30.0, "seconds", "predicted, beyond which nothing of such a state is measured")
WIDE_WRITING = _limit(2.0, "seconds", "predicted, up to which matrices are written out after all")
PROGRESS_SECONDS = _limit(2.0, "seconds", "before progress is shown")
SHOWN_FAILURES = _limit(5, "checkpoints", "of a sweep that failed, told one by one at its end")
SWEEP_WAITING = _limit(32, "tasks", "that an engine of unknown size has at a time")
SWEEP_CHANGES = _limit(3, "times", "that a checkpoint may change while it is read, before it is given up")
DASK_SECONDS = _limit(10, "seconds", "for the scheduler of a cluster to answer")
PROGRESS_LINES = _limit(60.0, "seconds", "between two lines of progress in a pipe: issue of the sweep")
ONE_THREAD = _limit(600, "states", "up to which one thread is faster, and far faster on a busy machine")

# budgets of memory
PROBE_BYTES = _limit(2**30, "bytes", "of probes whose batch nobody gave; it is smaller then")
WINDOW_BYTES = _limit(2**28, "bytes", "of the blocks of all windows; beyond, a few windows stand for many")
BLOCK_BYTES = _limit(768 * 2**20, "bytes", "of blocks of starts at a time")
MAP_BYTES = _limit(256 * 2**20, "bytes", "of the maps of one layer")
TRIANGLE_BYTES = _limit(256 * 2**20, "bytes", "of gradients of a triangle at a time")
LAG_BYTES = _limit(2**30, "bytes", "of gradients by lag at a time")
JACOBIAN_BYTES = _limit(4 * 2**30, "bytes", "of one dense stack of step Jacobians")
JACOBIAN_CHUNK = _limit(64 * 2**20, "bytes", "of pushed rows at a time")
MOST_KEPT = _limit(2**30, "bytes", "of constants of wide steps that one recording copies")
TAPE_BYTES = _limit(2**27, "bytes", "that vectors that go side by side may hold at a time")
WIDE_BYTES = _limit(2**28, "bytes", "of graphs for pushing that are kept, and of matrices written out")
PERHAPS = _limit(2**26, "bytes", "kept of a call of which it is not known whether another follows")
PAGE_BYTES = _limit(1_000_000, "bytes", "of a page: design, section 7")
PAIR_BLOCK = _limit(8, "steps", "of a linear recurrence, within which every source is taken by itself")
PAIR_COLUMNS = _limit(4, "entries", "that the others of a block of pairs are held against")
PAIR_TILE = _limit(256, "pairs", "each way, whose largest entries are looked for at once")
PAIR_WIDTH = _limit(4096, "entries", "that a sum over pairs takes at once")
PAIR_SECONDS = _limit(1e-9, "seconds", "of one entry of one pair, where the largest is looked for")
HEAD_LAGS = _limit(64, "distances", "at which the heads of a layer are told apart")
LOSS_BYTES = _limit(2**27, "bytes", "of gradients of a wide linear state that are pulled back at once")
EXPONENTS_MOST = _limit(256, "exponents", "of a linear recurrence that are told one by one")
EXPONENT_BYTES = _limit(2**26, "bytes", "of the growth of single entries of a linear state, step by step")
UNITS_EACH = _limit(512, "entries", "of a state (channels, N), up to which each is a unit of its own")
UNITS_MOST = _limit(4096, "units", "that a linear state is shown by, where it can be parted so finely")
NEVER_FORGETS = _limit(0.9999, "|a|", "a decay never below it: its entry keeps its state for good")
DECAY_FLOOR_SHARE = _limit(0.1, "of decays", "at the smallest that was seen: it looks like a bound")
DECAY_SHARE = _limit(0.05, "of entries", "of a linear state that forget at once, or never: worth a word")
ERASED_SHARE = _limit(0.5, "of steps", "at which a head erases a direction: worth a word")
DECAY_AT_FLOOR = _limit(0.01, "nats", "above the smallest decay that was seen, which count as at it")

# speeds, measured: by them cost is predicted
PRODUCT_FLOAT64 = _limit(30e9, "operations a second", "matrix products on two cores")
PRODUCT_FLOAT32 = _limit(100e9, "operations a second", "the same")
VECTOR_SPEED = _limit(8e9, "operations a second", "products with few vectors")
THIN_SPEED = _limit(10e9, "operations a second", "thin products of the triangle")
LAG_SPEED = _limit(25e9, "operations a second", "products of the gradients by lag")
WIDE_SPEED = _limit(1.2e10, "operations a second", "of a wide step that is run again")
WIDE_PASS_SECONDS = _limit(1e-9, "seconds", "of each number on the way through such a step")
WIDE_CALL_SECONDS = _limit(1e-4, "seconds", "of one vector through it, however small")
STEP_CALL_SECONDS = _limit(2e-4, "seconds", "that the calls of one step take, however little they do")
LAG_CALL_SECONDS = _limit(5e-4, "seconds", "of one lag, however little there is to do")
LAG_WEIGHT_SECONDS = _limit(2e-9, "seconds", "for each entry of the weights at one lag")
ELEMENT_SECONDS = _limit(4e-9, "seconds", "for each number that a row holds at one step or lag")
SNAPSHOT = _limit(20.0, "operations", "of one set of singular values of n rows, in n³")

# fmt: on

TABLE: dict[str, Limit] = dict(
    zip([name for name in globals() if name.isupper()], _rows, strict=True)
)

# the same in other units
LN_BAND = BAND * math.log(10)
LN_GONE = math.log(GONE)
LN_HALF = -math.log(2)
LN_TELLING = GAINS_APART * math.log(10)
LN_SETTLED = SETTLED_DECADES * math.log(10)
GONE_DECADES = math.log10(GONE)
GREW_DECADES = -GONE_DECADES
CARRIED_DECADES = math.log10(CARRIED)

# and in words
VERDICTS = ("vanishing", "exploding", "stable", "dead", "inconclusive")
BAND_WORDS = "one decade" if BAND == 1 else f"{BAND:g} decades"
GONE_WORDS = power(GONE_DECADES)
GREW_WORDS = f"{1 / GONE:g}"
TOLERANCE_WORDS = f"{LAG_TOLERANCE * 100:g} %"
CARRIED_WORDS = "a tenth" if CARRIED == 0.1 else f"{CARRIED:g}"
CLOSED_WORDS = f"closed (< {GATE_CLOSED:g})"
OPEN_WORDS = f"open (> {GATE_OPEN:g})"
SATURATED_WORDS = f"beyond ± {SATURATED:g}"
INTERVAL_WORDS = f"{CONFIDENCE * 100:g} %"

# what the words of table and page mean, as the page explains them; the README has some of them
GLOSSARY: dict[str, str] = {
    "layer, cell": "one recurrent layer in one direction (l0 is the lowest, l0_reverse reads from the end, "
    "l0@2 is another run of it); its kind of cell and how many hidden units it has",
    "decade": "a factor of ten: a gain of −3 decades is a thousandth",
    "direction": "a change of the state, as a mixture of its entries: what is gone in every direction is "
    "gone whatever the loss reads",
    "gain": "how much a change of the state at step t is still felt at step t′: the norm of ∂s(t′)/∂s(t); "
    "the largest gain is that of the direction that survives best: if it vanishes, everything does",
    "vanishing, exploding": "the gain over the span: the largest of any direction from the first step to "
    f"the last shrinks, or grows, by more than {BAND_WORDS}, beyond doubt",
    "stable": f"the gain changes by less than {BAND_WORDS} over the span",
    "dead": "every path is cut by exact zeros, or every step is cut off from the one before",
    "inconclusive": "the data do not decide, and the sentence says how many sequences or steps would; or "
    "the gains are not known (no gains), and it says why",
    "rate": "growth of ln gain per step in nats in the long run, the largest Lyapunov exponent, with its "
    f"{INTERVAL_WORDS} interval: −0.69 halves the gain at every step; not settled where so few steps do not "
    "show it: then read the gain",
    "window, half-life, horizon": "how many steps back from every loss step keep ∂L/∂W_hh within "
    f"{TOLERANCE_WORDS}, all that training has to look back for this loss; steps until the largest gain of "
    f"any direction halves; first distance at which it is below {GONE_WORDS}: gone in every direction",
    "> 99, never": "not within the 99 steps that could be measured; never: nor would it go on to fall",
    "this loss's gradient is gone": "the same limit for the gradient of the last loss step alone, the "
    "picture on the left: it starts in the directions that the loss happens to read, so it may be gone "
    "sooner than the layer's own best direction (the horizon, a median over all steps); and layers above "
    "hand it down at every step, so it may be gone later",
    "one loss step's gradient": "the same for each loss step of one sequence, the triangle: the median of "
    "those with half of the sequence before them",
    "cut": "a step at which nothing of the previous state arrives: detached (its values go on, no gradient "
    "does), masked with zeros, or reset; nothing is measured across it",
    "probe": "inputs and a loss that stand in where there is no batch; of a training, a measured step",
    "run, group": "one analysis or training; runs whose folders differ in the seed alone are a group",
    "steps reached": "how far back the last loss step's gradient is felt: a geometric mean over a group",
    "parity": "whether gradients of weights, rebuilt from the recorded ones, are the model's own",
    "channels": f"how many directions still pass {GONE_WORDS} over the whole span; a stable layer with 1 of "
    "64 is fragile",
    "span": "the distance of interest: the median sequence length, the typical stretch between cuts where a "
    "state is cut, or what was given as span=",
    "prediction": "what a remedy would do at once: the batch was run again with the weights changed, in all "
    "layers that need it, and measured again; nothing was trained, and training may end elsewhere",
    "total and direct": "the total gradient at a state counts every path to the loss; the direct part "
    "leaves out the layer's own recurrence: it is all that a hook on the output of a fused layer shows",
}
