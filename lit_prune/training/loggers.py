"""Loggers that Lightning doesn't have, and one sentence where a logger's package is missing."""

import os
from argparse import Namespace
from importlib.util import find_spec
from typing import Any

from lightning.fabric.utilities.logger import _convert_params, _flatten_dict, _sanitize_params
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from lit_prune.errors import LitPruneError, extra


class MLflow(MLFlowLogger):
    """Lightning's MLflow logger, for the full package `mlflow` or `mlflow-skinny`.

    Args:
        experiment_name: of the experiment.
        run_name: of the run.
        tracking_uri: of a server or database; by default files in `save_dir`.
        options: the others of Lightning's `MLFlowLogger`.

    Raises:
        LitPruneError: MLflow is not installed.
    """

    def __init__(
        self,
        experiment_name: str = "lit_prune",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        **options: Any,
    ) -> None:
        if find_spec("mlflow") is None:
            raise LitPruneError(f"the MLflow logger needs mlflow, which is not installed: {extra('mlflow')}")
        if not tracking_uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs more packages
        super().__init__(experiment_name, run_name, tracking_uri, **options)


class Trackio(Logger):
    """Log figures and settings to trackio, Hugging Face's local tracker; `trackio show` opens its dashboard.

    Runs lie in the folder of `TRACKIO_DIR`, by default in the Hugging Face cache; nothing leaves this machine unless
    `space_id` is given. A run of the same project and name is continued, so that a resumed training has one curve.

    Args:
        project: name of the project.
        name: of the run.
        group: of the run.
        space_id: a Space of the hub to log to.

    Raises:
        LitPruneError: trackio is not installed.
    """

    def __init__(
        self, project: str = "lit_prune", name: str | None = None, group: str | None = None, space_id: str | None = None
    ) -> None:
        super().__init__()
        if find_spec("trackio") is None:
            raise LitPruneError(f"the trackio logger needs trackio, which is not installed: {extra('trackio')}")
        self._project, self._name, self.group, self.space_id = project, name, group, space_id
        self._run: Any = None

    @property
    def name(self) -> str:
        """Name of the project."""
        return self._project

    @property
    def version(self) -> str | None:
        """Name of the run."""
        return self._name if self._run is None else self._run.name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, begun at the first use."""
        if self._run is None:
            import trackio

            options = {"group": self.group, "space_id": self.space_id, "embed": False}
            self._run = trackio.init(self._project, self._name, resume="allow" if self._name else "never", **options)
        return self._run

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log the figures of a step."""
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Add settings to the run's configuration."""
        self.experiment.config.update(_sanitize_params(_flatten_dict(_convert_params(params))))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left; a later figure of the same process begins the run again."""
        if self._run is not None:
            self._run.finish()
            self._run = None
