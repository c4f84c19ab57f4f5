"""Loggers of a run folder: metrics.csv always, Weights & Biases if configured."""

import csv
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_info

from bd_lightning.checks import UserError, one_of, plain_name, positive

Mode = Literal["auto", "online", "offline", "disabled"]


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]] | None:
    """Columns and rows of a metrics.csv, without one that a killed process left half written; None if it is damaged."""
    try:
        text = path.read_bytes().decode()
        lines = list(csv.reader(text.splitlines(keepends=True)))
    except (ValueError, csv.Error):
        return None
    keys = lines[0] if lines else ["step"]
    if "step" not in keys or len(set(keys)) < len(keys):
        return None
    written = lines[1:] if text.endswith("\n") else lines[1:-1]  # the last line may be cut in its last number
    whole = [
        dict(zip(keys, line)) for line in written if len(line) == len(keys) and line[keys.index("step")].isdecimal()
    ]
    return None if len(written) > len(whole) + 1 else (keys, whole)


def moved_aside(path: Path) -> Path:
    """Give a damaged file another name, under which nothing lies yet."""
    names = (path.with_name(f"{path.name}.damaged{f'-{k}' if k > 1 else ''}") for k in itertools.count(1))
    free = next(name for name in names if not os.path.lexists(name))
    return path.replace(free)


class _AppendingWriter(ExperimentWriter):
    """Keeps the rows of an earlier part of the run instead of deleting them, up to the step it goes on from."""

    def __init__(self, log_dir: str, resumed_at: int | None) -> None:
        self.resumed_at = resumed_at
        super().__init__(log_dir=log_dir)

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        found = read_rows(path)
        if found is None:
            rank_zero_info(f"{path.name} was damaged: it is now {moved_aside(path).name}, and a new one is begun")
            return
        keys, rows = found
        self.metrics_keys = sorted(keys)
        if self.resumed_at is not None:
            rows = [row for row in rows if int(row["step"]) < self.resumed_at]
        part = path.with_name(f"{path.name}.part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        part.replace(path)


class MetricsCSV(CSVLogger):
    """Writes <run folder>/metrics.csv; a resumed run appends to it.

    Args:
        run_dir: the run folder.
        flush_every: steps between writes.
        resumed_at: the step of the checkpoint that the run goes on from; rows that were logged after it are dropped,
            since those steps are repeated.
    """

    def __init__(self, run_dir: str | Path, flush_every: int = 50, resumed_at: int | None = None) -> None:
        super().__init__(str(run_dir), name="", version="", flush_logs_every_n_steps=flush_every)
        self.resumed_at = resumed_at

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer behind this logger."""
        if self._experiment is None:
            os.makedirs(self.log_dir, exist_ok=True)
            self._experiment = _AppendingWriter(self.log_dir, self.resumed_at)
        return self._experiment

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Write what was logged, so that it is there when the run goes on from the checkpoint."""
        self.save()

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: the run folder has config.yaml."""


class WandB(WandbLogger):
    """A Weights & Biases run that never asks for a login and never waits for a server.

    Without an API key, or when the server does not answer within `timeout`, the run is kept offline in the run folder
    and one line says how to sync it. The x-axis is the trainer's global step; metrics are summarised by their best
    value. Only rank 0 starts a run. A run that is resumed online repeats the steps after its checkpoint; what
    W&B has of them is not sent again.

    Args:
        project: W&B project.
        name: display name; W&B invents one if None.
        group: group of runs, e.g. the seeds of one experiment.
        job_type: what this run is within its group.
        tags: tags.
        notes: a longer description.
        entity: user or team that owns the project.
        mode: "auto" as described; "online", "offline" or "disabled" are passed to W&B as they are. The environment
            variable WANDB_MODE has the last word.
        log_model: upload checkpoints as artifacts: True at the end of the run, "all" as they are written.
        timeout: seconds to wait for the server.
        summaries: how metrics are summed up over the run, "min" or "max" by name; None takes what the callbacks say.
        run_dir: the run folder; its name is the run's id, so that a resumed run continues the same one.
        resumed_at: the step of the checkpoint that a training goes on from; 0 for a new one, and for evaluations.
    """

    def __init__(
        self,
        run_dir: str | Path,
        project: str = "bellman-diffusion",
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        entity: str | None = None,
        mode: Mode = "auto",
        log_model: bool | Literal["all"] = False,
        timeout: float = 20.0,
        summaries: dict[str, Literal["min", "max"]] | None = None,
        resumed_at: int = 0,
    ) -> None:
        positive(timeout=timeout)
        plain_name(project=project, run_id=Path(run_dir).name)
        if entity is not None:
            plain_name(entity=entity)
        super().__init__(
            name=name,
            save_dir=str(run_dir),
            project=project,
            id=Path(run_dir).name,
            log_model=log_model,
            group=group,
            job_type=job_type,
            tags=tags,
            notes=notes,
            entity=entity,
        )
        self.mode = os.environ.get("WANDB_MODE") or mode
        one_of(get_args(Mode), **{"WANDB_MODE" if os.environ.get("WANDB_MODE") else "mode": self.mode})
        self.timeout, self.run_dir, self.summaries = timeout, Path(run_dir), dict(summaries or {})
        self.resumed_at = resumed_at
        self.known = -1  # the last step that W&B has from an earlier part of the run

    def _choose_mode(self) -> str:
        import wandb

        if os.environ.get("WANDB_MODE") in ("", "auto"):
            del os.environ["WANDB_MODE"]  # which W&B itself would refuse
        if self.mode != "auto":
            return self.mode
        return "online" if wandb.login(prompt=False, verify=False) else "offline"

    def _start(self, mode: Any) -> Any:
        import wandb

        try:
            settings = wandb.Settings(init_timeout=self.timeout, silent=True)
            return wandb.init(**self._wandb_init, mode=mode, settings=settings)
        except (wandb.errors.UsageError, ValueError, TypeError) as error:
            raise UserError(f"'logger': {' '.join(str(error).split())[:300]}") from error
        except Exception as error:  # W&B's background process, named by a parent process that has ended since
            if isinstance(error, wandb.errors.CommError) or os.environ.pop("WANDB_SERVICE", None) is None:
                raise
            wandb.teardown()
            return self._start(mode)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, started at first use."""
        if self._experiment is None:
            import wandb

            os.environ.setdefault("WANDB_SILENT", "true")
            self.run_dir.mkdir(parents=True, exist_ok=True)
            mode = self._choose_mode()
            try:
                run = self._start(mode)
            except wandb.errors.CommError as error:
                rank_zero_info(f"W&B did not answer ({str(error).splitlines()[0]}); the run goes on offline.")
                wandb.teardown()
                mode, run = "offline", self._start("offline")
            if mode == "offline":
                folder = Path(run.dir).parent
                rank_zero_info(f"W&B is offline; to upload this run later: wandb sync {folder}")
            elif mode == "online":
                rank_zero_info(f"W&B: {run.url}")
            if mode == "online" and run.resumed:
                self.known = int(run.summary.get("trainer/global_step", -1))
                rank_zero_info(f"W&B has this run up to step {self.known}; it gets what comes after that.")
            if mode != "disabled":
                run.define_metric("trainer/global_step")
                run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
                for metric, summary in self.summaries.items():
                    run.define_metric(metric, step_metric="trainer/global_step", summary=summary)
            self._experiment = run
        return self._experiment

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log; of a run that goes on, what W&B has no later step than."""
        _ = self.experiment  # known is known once the run is
        if step is None or not self.resumed_at or step >= self.known:
            super().log_metrics(metrics, step)

    def log_lines(self, key: str, lines: Mapping[str, Sequence[tuple[float, float]]], x_name: str) -> None:
        """Log a chart of lines by name, each of points (x, y)."""
        import wandb

        xs, ys = ([[point[i] for point in line] for line in lines.values()] for i in (0, 1))
        chart = wandb.plot.line_series(xs, ys, keys=list(lines), title=key, xname=x_name)
        self.experiment.log({key: chart})

    def close(self, failed: bool = False) -> None:
        """End the W&B run, so that the process can start another."""
        if self._experiment is not None and hasattr(self._experiment, "finish"):
            self._experiment.finish(exit_code=int(failed))
            self._experiment = None
