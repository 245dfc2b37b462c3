"""MLflow: `monitor.trackers mlflow`. Where it writes is its own setting, MLFLOW_TRACKING_URI: a server, or a database file."""

from collections.abc import Mapping
from typing import Any

from based_megatron.config import to_dict
from based_megatron.monitor.sinks.base import RunFacts, Sink

MAX_PARAM_CHARACTERS = 500
ID_TAG = "based.run_id"


class MlflowSink(Sink):
    """One run of the experiment `monitor.project`, which a resumed run goes on with: a tag has the id of ours.

    Its parameters are those of the first start, because MLflow changes none.
    """

    def start(self, run: RunFacts) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        project = run.config.monitor.project
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(project)
        earlier = self._client.search_runs([experiment], f"tags.`{ID_TAG}` = '{run.run_id}'", max_results=1)
        if earlier:
            self._run_id = earlier[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return
        created = self._client.create_run(experiment, run_name=run.run_name, tags={ID_TAG: run.run_id})
        self._run_id = created.info.run_id
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
