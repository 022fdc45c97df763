"""The seam: all that tests import from inside the package, so that a name that moves is mended here.

Everything else that a test uses is public: `gradflow` and the packages right below it.
"""

# ruff: noqa: F401

from gradflow.analysis.results import welch
from gradflow.analyzer.agreement import agreed, agreed_by_votes, votes
from gradflow.analyzer.blocks import Blocks
from gradflow.analyzer.causes.remedies import decades
from gradflow.analyzer.contributions import Contributed, affordable, contributions
from gradflow.analyzer.contributions import triangle as triangle_triangle
from gradflow.analyzer.curve import lag_curve as curve_lag_curve
from gradflow.analyzer.direction import log_diagonal_gains, log_loss_gains, loss_vectors
from gradflow.analyzer.evidence import number
from gradflow.analyzer.exponents import Growth, Leading, burn_in, log_growth
from gradflow.analyzer.gains import (
    Norms,
    SpanGains,
    Window,
    collected,
    common_steps,
    log_norms,
    span_windows,
)
from gradflow.analyzer.gains import crossing as gains_crossing
from gradflow.analyzer.jacobians import (
    DenseOperator,
    constant_exponents,
    operator_of,
    step_jacobians,
)
from gradflow.analyzer.linear_logs import Logs, logs_of
from gradflow.analyzer.linear_measure import measure_linear
from gradflow.analyzer.loss import masked_median
from gradflow.analyzer.norms import spectral_by_iteration
from gradflow.analyzer.paths import PATHS, cell_paths, path_gains
from gradflow.analyzer.products import log_gains
from gradflow.analyzer.ranks import log_singular_along, survivors
from gradflow.analyzer.rates import (
    Verdict,
    band,
    correlation_time,
    decays_as_power,
    enough,
    judge,
    mean_steps,
    parted,
    quantile,
    rate_of_one,
    rate_over_sequences,
    settled,
)
from gradflow.analyzer.read_states import read_part
from gradflow.analyzer.read_steps import Reading, readings
from gradflow.analyzer.settings import Settings
from gradflow.analyzer.spectrum import spectrum
from gradflow.analyzer.timeline import in_processing_order
from gradflow.cells.linear import LinearSteps, side_by_side
from gradflow.demo import AddingModel, adding_batch
from gradflow.hooks.guard import Point
from gradflow.hooks.linear.scanned import Scanned
from gradflow.hooks.loops import stitch
from gradflow.hooks.own import own_cells as cells
from gradflow.hooks.rerun import WeightChange, rerun
from gradflow.hooks.unrolled.chains import chains, recurrences, uses_of
from gradflow.hooks.unrolled.whole_graph import Unrolled, edges_between
from gradflow.hooks.wide import Wide
from gradflow.loading.ages import lacking
from gradflow.loading.probe import physical_memory
from gradflow.loading.recurrent import from_model, from_tensors, non_finite
from gradflow.loading.shells import _STOCK
from gradflow.loading.words import reason
from gradflow.reporter.charts import (
    blocks,
    gain_map,
    gates,
    heads,
    lag_gradient,
    layers,
    lyapunov,
    paths,
    rank,
    saturation,
    states,
    time_scales,
    total_vs_direct,
)
from gradflow.reporter.charts import lag_curve as charts_lag_curve
from gradflow.reporter.charts import triangle as charts_triangle
from gradflow.reporter.charts.chart import (
    MOST_INCHES,
    Line,
    borders,
    draw_log_lines,
    texts,
    width,
)
from gradflow.reporter.digest import summary, top_findings
from gradflow.reporter.files import draw
from gradflow.reporter.histories.across import edges, shared_by
from gradflow.reporter.histories.course import course
from gradflow.reporter.histories.live import FALL_LINES, grid, lines, sparkline, view
from gradflow.reporter.histories.story import clipping_began, sentence, stretches
from gradflow.reporter.histories.waterfall import DOTS_ACROSS, prepare
from gradflow.reporter.kinds import KINDS
from gradflow.reporter.notebook import SHOWN
from gradflow.reporter.numbers import gain_words, half_life_words, rate_words
from gradflow.reporter.page import LABEL_WORDS, decay_words, embed, is_linear, page
from gradflow.reporter.picture import FAINT, INK, SOFT, Drawn, Picture, _nearest, look, png
from gradflow.reporter.prepare import span_share
from gradflow.reporter.readout import drawn, error_words, quantised
from gradflow.reporter.scale import (
    BAD,
    COLOURS,
    DIRECT,
    UNDEFINED,
    VERDICT_COLOURS,
    ZERO,
    narrowed,
    paint,
    paint_gates,
    palette,
)
from gradflow.reporter.text import render
from gradflow.sweeping.batches import pooled_batches
from gradflow.sweeping.checkpoints import VERSIONS, CheckpointTask, Outcome, checkpoints
from gradflow.sweeping.engines import Engine, Running
from gradflow.sweeping.one_checkpoint import measure_checkpoint
from gradflow.sweeping.result_files import SweepFolder
from gradflow.watching.alerts import read_rules
from gradflow.watching.schedule import Schedule
