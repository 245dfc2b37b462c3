"""MLflow: `monitor.trackers mlflow`. Where it writes is its own setting, MLFLOW_TRACKING_URI: a server, or a database file."""

from collections.abc import Mapping
from typing import Any

from based_megatron.config import to_dict
from based_megatron.monitor.sinks.base import RunFacts, Sink

MAX_PARAM_CHARACTERS = 500


class MlflowSink(Sink):
    """One run of the experiment `monitor.project`; every start of a run folder is a run of its own."""

    def start(self, run: RunFacts) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        project = run.config.monitor.project
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(project)
        name = run.run_dir.resolve().name
        self._run_id = self._client.create_run(experiment, run_name=name).info.run_id
        for section, values in to_dict(run.config).items():
            fields = values.items() if isinstance(values, dict) else [("", values)]
            for key, value in fields:
                name = f"{section}.{key}" if key else section
                self._client.log_param(self._run_id, name, str(value)[:MAX_PARAM_CHARACTERS])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run_id, name, float(value), step=step)

    def event(self, step: int, name: str, fields: Mapping[str, Any]) -> None:
        if name == "validation":
            self.log(step, {f"validation/{key}": value for key, value in fields.items()})

    def close(self) -> None:
        self._client.set_terminated(self._run_id)
