"""Sweep saved checkpoints: each is measured by itself, anywhere, and all become the rows of one `History`.

Where they are measured is the affair of an engine, any `concurrent.futures.Executor`; one example each:

=================  =======================================================================================
this machine       ``gradflow sweep 'runs/**/*.pt' --jobs 8``, or ``ProcessPoolExecutor(8)``
a dask cluster     ``--dask tcp://host:8786``, ``--dask local``, or ``Client(...).get_executor(pure=False)``
a Slurm array      ``gradflow sweep 'runs/**/*.pt' -o DIR --shard $SLURM_ARRAY_TASK_ID/8`` in each job of
                   ``sbatch --array=1-8``, then ``gradflow sweep --gather DIR``
submitit           ``gradflow.sweep(..., executor=submitit.AutoExecutor("logs"))``, a job for each checkpoint
MPI                ``with mpi4py.futures.MPIPoolExecutor() as executor`` below ``if __name__ == "__main__"``,
                   under ``mpiexec -n 8 python -m mpi4py.futures script.py``
=================  =======================================================================================

The tests run all of them, MPI where there is an ``mpiexec``. Workers read the checkpoints themselves, so
that paths must be theirs too; what they find comes back and is written by the process that sweeps.
"""

from gradflow.sweeping.rows import standings
from gradflow.sweeping.swept import SweepRequest, gather, run_sweep, sweep, sweep_request

__all__ = ["SweepRequest", "gather", "run_sweep", "standings", "sweep", "sweep_request"]
