"""The command line: parse, call the library, echo. Nothing here imports torch before it must."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradflow import completion
from gradflow._version import __version__
from gradflow.conditions import parse_conditions
from gradflow.errors import GradflowError, InputError, must_be, one_sentence
from gradflow.limits import SENTENCE_LETTERS, TRUSTED_LETTERS
from gradflow.progress import Progress

if TYPE_CHECKING:
    from gradflow.analysis import Analysis
    from gradflow.history import History

DONE, CONDITION_HOLDS, BAD_INPUT, OWN_FAULT, INTERRUPTED = 0, 1, 2, 3, 130


def _known_loss(_: click.Context, __: click.Parameter, name: str | None) -> str | None:
    """Refuse a loss that is none before anything is read; one of the user's own has a colon."""
    if name is None or ":" in name or name.strip().lower().replace("_", "-") in completion.LOSSES:
        return name
    known = f"one of {', '.join(completion.LOSSES)}, or a function of your own"
    advice = "write your own as 'pkg.mod:my_loss' or 'torch.nn:HuberLoss(delta=2.0)'"
    raise InputError(must_be("--loss", known, repr(name), advice))


MODEL = click.argument("model", type=click.Path(path_type=Path))
TRUST = click.option(
    "--trust", is_flag=True, help="Open a full pickle; this may run code from the file."
)
SPEC = click.option(
    "--model", "spec", metavar="SPEC", help="Your class and its arguments, 'pkg.mod:Net(10, 20)'."
)
MEMBER = click.option(
    "--member", metavar="NAME",
    help="One of several models in the file: decoder, 0, models.encoder.",
)  # fmt: skip
FOLDER = click.option(
    "-o", "folder", metavar="DIR", type=click.Path(path_type=Path),
    help="Folder for the files; by default a new one in reports/.",
)  # fmt: skip
FORCE = click.option("--force", is_flag=True, help="Replace the folder if it is there.")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON, only.")
QUIET = click.option("-q", "--quiet", is_flag=True, help="Print a sentence per layer, only.")
NO_REPORT = click.option("--no-report", is_flag=True, help="Print only; write and draw nothing.")
FIGURES = click.option(
    "--figures/--no-figures", default=None,
    help="Draw page and pictures; by default, but not with --json or -q.",
)  # fmt: skip
VERBOSE = click.option(
    "-v", "--verbose", is_flag=True,
    help="Print every finding, not three, and what the numbers rest on.",
)  # fmt: skip
FAIL_ON = click.option(
    "--fail-on", metavar="CONDITIONS", shell_complete=completion.verdicts,
    help="Exit with 1 if one holds: 'vanishing,horizon<50'.",
)  # fmt: skip


BY = click.option(
    "--by", metavar="LABEL", default="seed", show_default=True,
    help="Of a sweep: what runs of one group differ in, as their folders name it.",
)  # fmt: skip
INPUT = click.option(
    "--input", "input", metavar="FILE", type=click.Path(path_type=Path),
    help="A batch: .npy, .npz, .pt or .safetensors; or a folder or quoted pattern of several, over which "
         "intervals are then.",
)  # fmt: skip
TOKENS = click.option(
    "--tokens", metavar="FILE", type=click.Path(path_type=Path),
    help="Tokens (B, T) for a folder of transformers; random ones by default.",
)  # fmt: skip
TARGET = click.option(
    "--target", metavar="FILE", type=click.Path(path_type=Path), help="The batch's targets."
)
LOSS = click.option(
    "--loss", metavar="NAME", callback=_known_loss, shell_complete=completion.losses,
    help=f"{', '.join(completion.LOSSES)}, or your own as 'pkg.mod:my_loss'.",
)  # fmt: skip
OUTPUT = click.option(
    "--output", metavar="KEY", help="Which part of a tuple or dict output to use."
)
LABELS = click.option(
    "--labels", metavar="FILE", type=click.Path(path_type=Path),
    help="A word per step for the figures: lines of text, or a .json list.",
)  # fmt: skip
SPAN = click.option(
    "--span", metavar="N", type=int,
    help="Distance of interest in steps; by default the median sequence length.",
)  # fmt: skip
MODE = click.option(
    "--train/--eval", default=None,
    help="Mode the model runs in, with --input; evaluation by default, where dropout is off.",
)  # fmt: skip
SEQ_LEN = click.option(
    "--seq-len", metavar="N", type=int, help="Steps of a probe, without --input; 100 by default.",
)  # fmt: skip
BATCH = click.option(
    "--batch", metavar="N", type=int,
    help="Sequences of a probe, without --input; 16 by default.",
)  # fmt: skip
SEED = click.option(
    "--seed", metavar="N", type=int, default=0, show_default=True, help="Random seed."
)


def _all(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, shown in this order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


RUNNING = _all(SPEC, MEMBER, INPUT, TARGET, LOSS, OUTPUT, SPAN, MODE, SEQ_LEN, BATCH, SEED)
SHOWING = _all(FOLDER, FORCE, AS_JSON, QUIET, VERBOSE, FAIL_ON)


ENDING = """\b
Exit codes: 0 done, 1 a condition of --fail-on holds, 2 bad input,
3 a fault of gradflow's own, 130 interrupted.

\b
Completion, in the shell's own start file:
  bash  eval "$(_GRADFLOW_COMPLETE=bash_source gradflow)"
  zsh   eval "$(_GRADFLOW_COMPLETE=zsh_source gradflow)"
  fish  _GRADFLOW_COMPLETE=fish_source gradflow | source
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=ENDING)
@click.version_option(__version__, prog_name="gradflow")
def gradflow() -> None:
    """How far back in time does the gradient of a recurrent PyTorch model really flow?

    \b
    gradflow demo                  see an RNN and an LSTM compared, in under a minute
    gradflow analyze model.pt      analyze a model of your own
    """


@gradflow.command(short_help="Say where a model's gradient vanishes or explodes, and why.")
@MODEL
@RUNNING
@TOKENS
@LABELS
@NO_REPORT
@FIGURES
@SHOWING
@TRUST
def analyze(
    model: Path,
    folder: Path | None,
    force: bool,
    no_report: bool,
    figures: bool | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    fail_on: str | None,
    **options: Any,
) -> None:
    """Say where the gradient of MODEL vanishes or explodes, why, and what to change.

    MODEL is a state_dict, a checkpoint, a Lightning .ckpt, .safetensors, or a pickle of stock
    torch modules, or a list or dict of several, of which --member picks one. Without --input its
    weights are tried under several probes. It may be a folder of transformers, with config.json and
    model.safetensors: its language model runs on --tokens, and no code of the folder's is run.

    \b
    gradflow analyze model.pt
    gradflow analyze model.pt --model 'my_code:Net(10, 20)' --input batch.pt --loss mse
    gradflow analyze mamba-130m --tokens ids.npy
    """
    conditions = parse_conditions(fail_on)
    _one_manner(as_json, quiet, verbose)
    if no_report and (folder is not None or force or figures):
        given = "-o" if folder is not None else "--force" if force else "--figures"
        raise InputError(
            f"--no-report writes nothing, but {given} was given; leave one of them out"
        )
    from gradflow.reporter import FORMATS, check_folder, free_folder, report

    draws = _draws(figures, as_json, quiet)
    place = None if no_report else folder or free_folder(Path("reports") / model.stem)
    if place is not None:
        check_folder(place, force=force)
    with Progress() as progress:
        analysis = _analyzed(model, progress, options)
        if place is not None:
            words = "drawing the report" if draws else "writing the numbers"
            progress(words, 0.99, at_once=draws)
            report(
                analysis, place, force=force, formats=FORMATS if draws else ("json", "csv", "nc")
            )
    _show(analysis, place, as_json, quiet, verbose, drawn=draws)
    if _fail_on(list(analysis.values()), conditions):
        raise SystemExit(CONDITION_HOLDS)


@gradflow.command(short_help="Train an RNN and an LSTM and compare their gradients.")
def demo() -> None:
    """Train an RNN and an LSTM on the adding task and show where their gradients go.

    It takes under a minute and writes the folder gradflow-demo.

    \b
    gradflow demo
    """
    from gradflow.demo import run_demo

    with Progress() as progress:
        text = run_demo(progress)
    click.echo(text)


@gradflow.command(short_help="Say what a model file is and what to type next.")
@MODEL
@SPEC
@MEMBER
@TRUST
def inspect(model: Path, spec: str | None, member: str | None, trust: bool) -> None:
    """Say what the file MODEL is, which recurrent layers it holds, and what it does not say.

    \b
    gradflow inspect model.pt
    """
    from gradflow.loading import describe

    click.echo("\n".join(describe(model, spec, trust, member).lines()))


@gradflow.command(short_help="Draw the report of a saved run again.")
@click.argument("run", type=click.Path(path_type=Path))
@SHOWING
def report(
    run: Path,
    folder: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    fail_on: str | None,
) -> None:
    """Draw the report of a saved RUN again: a folder written by gradflow, or its run.nc.

    Of a training that gradflow.watch follows, or followed, give its folder.

    \b
    gradflow report reports/model -o reports/again
    gradflow report runs/a
    """
    conditions = parse_conditions(fail_on)
    _one_manner(as_json, quiet, verbose)
    from gradflow import reporter
    from gradflow.analysis import Analysis
    from gradflow.comparison import run_name

    found = _loaded(run)
    folder = folder or reporter.free_folder(Path("reports") / run_name(run.absolute()))
    reporter.check_folder(folder, force=force)
    if not isinstance(found, Analysis):
        if fail_on is not None:
            advice = "of a training give them to gradflow.watch, as on="
            expected, got = "given for an analysis", "the history of a training"
            raise InputError(must_be("--fail-on", expected, got, advice))
        with Progress() as progress:
            progress("drawing the report", 0.5, at_once=True)
            reporter.report_history(found, folder, force=force)
        _show_history(found, as_json, quiet, verbose, f"page: {folder / 'report.html'}")
        return
    analysis = found
    with Progress() as progress:
        progress("drawing the report", 0.5, at_once=True)
        reporter.report(analysis, folder, force=force)
    _show(analysis, folder, as_json, quiet, verbose)
    if _fail_on(list(analysis.values()), conditions):
        raise SystemExit(CONDITION_HOLDS)


@gradflow.command(short_help="Say what changed between runs, and whether it is chance.")
@click.argument("runs", metavar="RUN RUN...", nargs=-1, type=click.Path(path_type=Path))
@RUNNING
@FOLDER
@FORCE
@BY
@FIGURES
@AS_JSON
@TRUST
@click.pass_context
def compare(
    context: click.Context,
    runs: Sequence[Path],
    folder: Path | None,
    force: bool,
    by: str,
    figures: bool | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Show RUNs on one scale, and say what changed and whether it is more than chance.

    A RUN is a folder written by gradflow, its run.nc, or a model file, which is analyzed first;
    the options are for model files. Every run is compared with the first. Folders of trainings that
    gradflow.watch followed are compared with each other. Of sweeps, one is enough, the groups of runs are
    compared, with the seed, or what --by names, as the unit of the intervals.

    \b
    gradflow compare reports/rnn reports/lstm
    gradflow compare before.pt after.pt --model 'my_code:Net(10, 20)' --input batch.pt
    """
    from gradflow.history import is_swept

    if len(runs) < 2 and not (runs and is_swept(runs[0])):
        first = shlex.quote(str(runs[0])) if runs else "reports/before"
        raise InputError(
            f"compare needs at least two runs, got {len(runs)}; type for example: "
            f"gradflow compare {first} reports/after"
        )
    from gradflow import comparison, reporter
    from gradflow.comparison import is_run, names_of

    typed = _typed(context)
    if typed and all(map(is_run, runs)):
        raise InputError(
            f"the options of compare are for model files, got{typed} with saved runs only; leave them "
            "out, or give the model files"
        )
    folder = folder or reporter.free_folder(Path("reports") / "comparison")
    reporter.check_folder(folder, force=force)
    if _is_typed(context, "by") and not any(map(is_swept, runs)):
        raise InputError(
            "--by names what runs of a sweep differ in, got no sweep; leave it out, or give the folder of "
            "gradflow sweep"
        )
    found: dict[str, Any] = {}
    with Progress() as progress:
        for name, path in zip(names_of(runs), runs, strict=True):
            found[name] = _loaded(path) if is_run(path) else _analyzed(path, progress, options)
    made = comparison.compare(found, by=by)
    draws = _draws(figures, as_json, quiet=False)
    made.save(folder, force=force, draw=draws)
    if as_json:
        click.echo(json.dumps(made.summary(), allow_nan=False, indent=2))
        return
    reporter.render_comparison(made.numbers, made.sentences, made.notes)
    click.echo(f"\npage: {folder / 'comparison.html'}" if draws else f"\nnumbers: {folder}")
    last = shlex.quote(str(runs[-1]))
    again = f"report {last}" if is_run(runs[-1]) else f"analyze {last}{typed}"
    click.echo(f"next: gradflow {again}")


@gradflow.command(short_help="Follow runs that train, in the terminal.")
@click.argument("runs", metavar="RUN [RUN...]", nargs=-1, type=click.Path(path_type=Path))
def watch(runs: Sequence[Path]) -> None:
    """Follow RUNs that train, in the terminal: folders that gradflow.watch writes.

    A line per layer with its verdict, rate and horizon, and below it its last 60 probes: training
    steps across, steps back from the loss down, navy where the gradient has vanished. It ends when
    all runs have ended, or with Ctrl-C; in a pipe it prints one line a probe.

    \b
    gradflow watch runs/a
    gradflow watch runs/a runs/b
    """
    if not runs:
        raise InputError("watch needs a run, got none; type for example: gradflow watch runs/a")
    from gradflow.comparison import names_of
    from gradflow.history import History
    from gradflow.reporter import Followed, follow

    followed = [
        Followed(name, History.read(path)) for name, path in zip(names_of(runs), runs, strict=True)
    ]
    try:
        follow(followed)
    except KeyboardInterrupt:  # how it is ended, so nothing needs to be said
        raise SystemExit(INTERRUPTED) from None


def _shard(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, int]:
    """Read "2/8", which of how many."""
    if text is None:
        return 1, 1
    number, slash, count = text.partition("/")
    whole = slash and number.isdigit() and count.isdigit()
    if whole and 1 <= int(number) <= int(count):
        return int(number), int(count)
    expected = "i/n with 1 <= i <= n"
    advice = "in a job array of 8 write for example --shard $SLURM_ARRAY_TASK_ID/8"
    raise InputError(must_be("--shard", expected, repr(text), advice))


SWEPT = _all(
    SPEC, MEMBER, INPUT, TARGET, LOSS, OUTPUT, SPAN, MODE, SEQ_LEN, BATCH, SEED,
    click.option("--preset", type=click.Choice(["pulse", "rate", "full"]), default="rate", show_default=True,
                 help="What is measured: gradients only, verdict and rate, or all that analyze measures."),
    click.option("--jobs", metavar="N", type=click.IntRange(min=1), help="Processes; one a core by default."),
    click.option("--dask", metavar="ADDRESS", help="A dask scheduler, tcp://host:8786, or local."),
    click.option("--shard", metavar="I/N", callback=_shard,
                 help="Measure the I-th of N parts; join with --gather."),
    click.option("--gather", metavar="DIR", type=click.Path(path_type=Path),
                 help="Join what shards wrote into DIR; takes no paths."),
    FOLDER,
    click.option("--resume", is_flag=True, help="Go on with what is in the folder."),
    FORCE,
    BY,
    FIGURES, AS_JSON, QUIET, VERBOSE, FAIL_ON, TRUST,
)  # fmt: skip


@gradflow.command(short_help="Measure many checkpoints: which seeds suffer, and since when.")
@click.argument("paths", metavar="PATHS...", nargs=-1)
@SWEPT
@click.pass_context
def sweep(
    context: click.Context,
    paths: Sequence[str],
    gather: Path | None,
    figures: bool | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    fail_on: str | None,
    by: str,
    folder: Path | None,
    **options: Any,
) -> None:
    """Measure all checkpoints of PATHS: when did it start, which seeds suffer, does width help?

    PATHS are files, folders, or patterns in quotes, ** for any folder. The folder of a checkpoint is its
    run (checkpoint-500 is of the run around it), and a row is one checkpoint. Results are kept one by one:
    a sweep that was ended, by Ctrl-C or by kill (the one for a script's background, where shells ignore
    Ctrl-C), goes on with --resume, and one that is repeated computes nothing. Shards are jobs of an array,
    wherever they run. Without --input the weights alone are tried.

    \b
    gradflow sweep 'runs/**/*.pt' --model 'my_code:Net(10, 20)' --input batch.pt -o reports/sweep
    gradflow sweep 'runs/**/*.pt' -o reports/sweep --resume --jobs 8
    gradflow sweep 'runs/**/*.pt' -o sweeps/a --shard 1/2
    gradflow sweep 'runs/**/*.pt' -o sweeps/a --shard 2/2
    gradflow sweep --gather sweeps/a
    """
    conditions = parse_conditions(fail_on)
    _one_manner(as_json, quiet, verbose)
    from gradflow import reporter
    from gradflow.sweeping import gather as gathered
    from gradflow.sweeping import run_sweep, sweep_request

    if gather is not None:
        other = next((name for name in ("folder", *options) if _is_typed(context, name)), "")
        if paths or other:
            given = repr(paths[0]) if paths else f"--{other}".replace("--folder", "-o")
            raise InputError(
                f"--gather DIR joins what is in DIR, got {given} as well; leave it out"
            )
        history, place, whole = gathered(gather), gather, True
    else:
        if folder is None and options["shard"] != (1, 1):
            raise InputError("--shard needs one folder that all shards share; give it as -o DIR")
        again = options["resume"] or options["force"]
        usual = Path("reports") / "sweep"
        folder = folder or (usual if again else reporter.free_folder(usual))
        request = sweep_request(paths, folder, **options)
        try:
            with Progress(lines=True) as progress:
                history = run_sweep(request, progress)
        except (KeyboardInterrupt, SystemExit) as stop:  # Ctrl-C, or told to end
            click.echo(
                f"interrupted; what was measured is in {folder}: go on with --resume", err=True
            )
            raise SystemExit(getattr(stop, "code", INTERRUPTED)) from None
        place, whole = folder, request.shard == (1, 1)
    if history.layers:  # else all failed, which is said below
        last = f"next, when all shards have ended: gradflow sweep --gather {place}"
        if whole:
            last = f"numbers: {place}"
        if whole and _draws(figures, as_json, quiet):
            reporter.report_history(history, place / "report", force=True, by=by)
            last = f"page: {place / 'report' / 'report.html'}"
        _show_history(history, as_json, quiet, verbose, last, by)
    _end_sweep(history, fail_on, conditions)


# ------------------------------------------------------------------------------------- helpers


def _analyzed(path: Path, progress: Progress, options: dict[str, Any]) -> Analysis:
    """Analyze a model file with the options of the command line."""
    from gradflow.process import printed_to_stderr
    from gradflow.workflow import FileRequest, analyze_file

    with printed_to_stderr():  # whatever the user's own code prints
        return analyze_file(FileRequest(path=path, **options), progress)


def _is_typed(context: click.Context, name: str) -> bool:
    """Whether an option was given, be it with its default."""
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _typed(context: click.Context) -> str:
    """The options of `RUNNING` and --trust as they were typed, to be typed again."""
    words = []
    for parameter in context.command.params:
        value = context.params[parameter.name or ""]
        usual = ("runs", "folder", "force", "by", "figures", "as_json")
        if parameter.name in usual or value in (None, parameter.default):
            continue
        if value is False:
            words += parameter.secondary_opts
            continue
        words += ["--" + parameter.opts[0].lstrip("-")]
        words += [] if value is True else [shlex.quote(str(value))]
    return "".join(f" {word}" for word in words)


def _loaded(path: Path) -> Analysis | History:
    from gradflow.runs import load

    return load(path)


def _one_manner(as_json: bool, quiet: bool, verbose: bool) -> None:
    """Refuse options of which one would have no effect."""
    given = [n for n, on in (("--json", as_json), ("-q", quiet), ("-v", verbose)) if on]
    if len(given) > 1:
        said = f"--json, -q and -v each say what is printed, got {' and '.join(given)}"
        raise InputError(f"{said}; give one of them")


def _draws(figures: bool | None, as_json: bool, quiet: bool) -> bool:
    """Whether page and pictures are drawn: not where only words are wanted, unless asked for."""
    return not (as_json or quiet) if figures is None else figures


def _show(
    analysis: Analysis,
    folder: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    *,
    drawn: bool = True,
) -> None:
    """Print the summary, the path of the page if there is one, and the next command."""
    from gradflow import reporter

    if as_json:
        click.echo(json.dumps(reporter.summary(analysis), allow_nan=False, indent=2))
        return
    if quiet:
        reporter.render_sentences(analysis)
        return
    reporter.render(analysis, verbose=verbose)
    if folder is not None:
        click.echo(f"\npage: {folder / 'report.html'}" if drawn else f"\nnumbers: {folder}")
    # from weights alone: the lines that save a batch end in the command that uses it
    snippet = str(analysis.provenance.get("snippet", ""))
    if snippet:
        click.echo(f"next: {snippet.splitlines()[-1]}")
    elif folder is not None:
        click.echo(f"next: gradflow compare {shlex.quote(str(folder))} OTHER_RUN")


def _show_history(
    history: History, as_json: bool, quiet: bool, verbose: bool, last: str, by: str = "seed"
) -> None:
    """Print where a training or a sweep stands, and last where its page is, or what to do next."""
    from gradflow import reporter

    if as_json:
        click.echo(json.dumps(reporter.history_summary(history, by), allow_nan=False, indent=2))
        return
    reporter.render_history(history, verbose=verbose, quiet=quiet, by=by)
    if not quiet:
        click.echo(f"\n{last}")


def _end_sweep(history: History, fail_on: str | None, conditions: Sequence[Any]) -> None:
    """The count of failures last; exit code 1 with --fail-on where there are some, or a condition holds."""
    from gradflow.limits import SHOWN_FAILURES
    from gradflow.sweeping import standings

    failed = [one for one in history.sources if one is not None and one.failed]
    held = _fail_on(standings(history) if conditions else [], conditions)
    for row in failed[:SHOWN_FAILURES]:
        named = row.failed.startswith(row.checkpoint)
        said = f"failed: {'' if named else f'{row.checkpoint}: '}{row.failed}"
        click.echo(one_sentence(said, row.checkpoint), err=True)
    if failed:
        click.echo(f"{len(failed)} of {len(history)} checkpoints failed", err=True)
    if fail_on is not None and (failed or held):
        raise SystemExit(CONDITION_HOLDS)


def _fail_on(layers: Sequence[Any], conditions: Sequence[Any]) -> bool:
    """Say which conditions hold and which cannot be tested; whether one holds."""
    held = [text for condition in conditions for text in condition.held_by(layers)]
    still_open = [text for condition in conditions for text in condition.open_in(layers)]
    for text in [*held, *still_open]:
        click.echo(f"--fail-on: {text}", err=True)
    return bool(held)


_interrupts: list[int] = []


def _interrupt(number: int, _: object) -> None:
    """Ctrl-C, noted: libraries turn the KeyboardInterrupt raised inside them into other errors."""
    _interrupts.append(number)
    raise KeyboardInterrupt


def _terminate(number: int, _: object) -> None:
    """A job that is told to end leaves no unfinished folder behind either."""
    raise SystemExit(128 + number)


@contextmanager
def _signals() -> Iterator[None]:
    """Handlers of our own, where nobody else has set one, while a command runs."""
    ours: dict[signal.Signals, tuple[Any, Any]] = {
        signal.SIGINT: (signal.default_int_handler, _interrupt),
        signal.SIGTERM: (signal.SIG_DFL, _terminate),
    }
    _interrupts.clear()
    if threading.current_thread() is not threading.main_thread():
        ours.clear()  # only there handlers may be set
    taken = [number for number, (usual, _) in ours.items() if signal.getsignal(number) == usual]
    for number in taken:
        signal.signal(number, ours[number][1])
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, ours[number][0])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 --fail-on, 2 bad input, 3 our fault, 130 Ctrl-C."""
    for name in ("stdout", "stderr"):  # closed, as a daemon may start its jobs
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    with _signals():
        typed = sys.argv[1:] if arguments is None else list(arguments)
        code = _code(
            lambda: gradflow.main(typed, standalone_mode=False, prog_name="gradflow"), typed
        )
    sys.exit(code)


def _code(run: Callable[[], Any], typed: Sequence[str] = ()) -> int:
    try:
        list(map(str.encode, typed))  # a name that is not UTF-8 is told of before anything is done
        run()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _interrupted()
    except click.ClickException as error:
        error.show()
        return BAD_INPUT
    except GradflowError as error:
        own = any(word.startswith(("--trust", "--model")) for word in typed)
        most = TRUSTED_LETTERS if own else SENTENCE_LETTERS
        # of an error of the user's own code, several lines are one
        said = one_sentence(" ".join(str(error).split("\n")), *typed, most=most)
        click.echo(f"Error: {said}", err=True)
        return BAD_INPUT
    except UnicodeEncodeError as error:
        if error.encoding != "utf-8":  # what a terminal cannot print
            return _own_fault()
        name = repr(error.object[max(0, error.start - 40) : error.end + 40])
        click.echo(f"Error: a name that is not UTF-8, {name}; rename the file", err=True)
        return BAD_INPUT
    except BrokenPipeError:
        _hush()  # the reader of a pipe has gone
        return DONE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO):
            return _own_fault()
        _hush()
        click.echo(f"Error: cannot print: {error.strerror}; send the output elsewhere", err=True)
        return BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if "allocate memory" not in str(error) and not isinstance(error, MemoryError):
            return _own_fault()
        text = "this needs more memory than there is; lower --seq-len or --batch, or give fewer sequences"
        click.echo(f"Error: {text}", err=True)
        return BAD_INPUT
    except Exception:  # noqa: BLE001  the last line of defence: the traceback is shown in full
        return _own_fault()
    return _flushed()


def _flushed() -> int:
    """0 once everything is really printed; a full disk or a closed pipe shows only now."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _hush()
    return DONE


def _own_fault() -> int:
    if _interrupts:
        return _interrupted()
    traceback.print_exc()
    click.echo(
        "Error: this is a fault of gradflow; please report it with the lines above", err=True
    )
    return OWN_FAULT


def _hush() -> None:
    """Keep Python's exit from complaining about a standard output that takes nothing more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupted() -> int:
    click.echo("interrupted; nothing was written", err=True)
    return INTERRUPTED
