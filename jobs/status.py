"""Status: the runs under a URI, their last committed step, loss and checkpoints.

python jobs/status.py --runs s3://bucket/runs [--address http://127.0.0.1:8265]
"""

from dataclasses import dataclass

import tyro
from ray.job_submission import JobDetails, JobSubmissionClient
from rich.console import Console
from rich.table import Table

from mqwen import cli
from mqwen.storage import locate
from mqwen.train.settings import SettingsError
from mqwen.train.status import run_statuses


@dataclass(frozen=True)
class Status:
    """`address` is the cluster's dashboard: with it a run that goes on and one that was lost can be told apart."""

    runs: str = "out/runs"
    address: str | None = None


def jobs_of(address: str) -> list[JobDetails]:
    try:
        return JobSubmissionClient(address).list_jobs()
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"--address {address} does not answer as a Ray dashboard: {reason}") from error


def main() -> None:
    command = tyro.cli(Status, description=__doc__)
    found = run_statuses(locate(command.runs), jobs_of(command.address) if command.address else [])
    if not found:
        raise SettingsError(f"no run lies under --runs {command.runs}")
    table = Table("run", "state", "step", "loss", "checkpoints", "started", "commit")
    for run in found:
        loss = "" if run.loss is None else f"{run.loss:.4f}"
        time, commit = (run.started.time, (run.started.commit or "")[:12]) if run.started else ("", "")
        saved = ", ".join(map(str, run.checkpoints))
        table.add_row(
            run.name, run.state, f"{run.step}/{run.steps}" if run.steps else f"{run.step}", loss, saved, time, commit
        )
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
