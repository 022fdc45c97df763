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
log_rms_error       (sequence, source, target)     standard error of the rms ln gain, of layers so wide
                                                   that random probes give it; none for others
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
lag_fit             (lag)                          straight line with the layer's rate as its slope; NaN
                                                   where the rate has not settled
sequence_gain       (batch)                        ln of the largest gain over the span of each sequence,
                                                   what the verdict judges; the median over disjoint
                                                   windows of a longer one
sequence_steps      (batch)                        over how many steps that is; fewer than those of
                                                   ``gain.steps`` have no say in the verdict
sequence_rate       (batch)                        largest Lyapunov exponent of each sequence
rate_settling       ()                             nats per step that all these may be off alike
length              (batch)                        real steps of each sequence
file_gain           (file)                         where several batches were given: the gain of each, mean
                                                   over its sequences; verdict and interval are over these
file_rate           (file)                         the same of the rate
lyapunov            (index_k)                      every exponent measured, mean over sequences, nats
                                                   per step: the rate first, then largest first
lyapunov_low/_high  (index_k)                      their 95 % intervals over sequences, widened by how
                                                   far they have settled
lyapunov_settling   (index_k)                      that: by how much the later half of the steps
                                                   differs from the earlier, beyond noise
lyapunov_trace      (index_k, step)                running mean of each over the counted steps, in
                                                   processing order; the first eight, NaN beyond
sum_rule            (side)                         sum of all exponents as "measured" and "exact", by
                                                   determinants; NaN where not all were measured or
                                                   no closed form is known
log10_grad          (state, unit, back)            |∂L/∂s_t| of the last loss step, rms over sequences
                                                   aligned at that step (back = 0), divided by the
                                                   layer's own rms value there; log10. Where grad_norm
                                                   of kind "last" is NaN, of the whole loss instead
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
loss_reach          ()                             steps before the last loss step at which its own
                                                   gradient, rms over units of the main state, is below
                                                   10⁻³ of its level there; inf if never
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
head_gain           (head)                         linear recurrences with heads: ln of the largest gain
                                                   over the span of each, mean over sequences
head_gain_low       (head)                         its 95 % interval over sequences: its lower end
head_gain_high      (head)                         its upper end
head_rate           (head)                         nats per step of each head
head_rate_low       (head)                         its interval, likewise: its lower end
head_rate_high      (head)                         its upper end
head_verdict        (head)                         place in `gradflow.limits.VERDICTS`
head_log_gain       (head, head_lag)               median over pairs of steps of ln ‖P_g(t+k←t)‖₂
head_erased         (head)                         share of steps whose rank-one part leaves less than
                                                   0.05 of a direction; NaN without one
decay               (decay_fact)                   linear recurrences: share of entries that forget within
                                                   a step, share that never forget, smallest |a|, share of
                                                   decays at it, 1 if any ever changes
segment_length      (segment)                      steps of the stretches between cuts, all sequences
grad_input_norm     (step)                         median over sequences of ‖∂L/∂x_t‖₂ = ‖W_ihᵀ δ_t‖₂
==================  =============================  =====================================================
"""

from gradflow.analysis.frames import FRAMES, HEADLINE, OPTIONAL
from gradflow.analysis.results import (
    UNMEASURED,
    WINDOW_OF,
    Alone,
    Finding,
    Gain,
    LayerAnalysis,
    Prediction,
    Rate,
    entropy_rate,
    kaplan_yorke_dimension,
)
from gradflow.analysis.run import Analysis, checked_labels, load
from gradflow.analysis.saved import SCHEMA

__all__ = [
    "FRAMES", "HEADLINE", "OPTIONAL", "SCHEMA", "UNMEASURED", "WINDOW_OF", "Alone", "Analysis",
    "Finding", "Gain", "LayerAnalysis", "Prediction", "Rate", "checked_labels", "entropy_rate",
    "kaplan_yorke_dimension", "load",
]  # fmt: skip
