"""The estimator that a configuration describes: its Keras objects are made of names, configurations and addresses."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import fsspec
from hvdspark.estimators.job.config import EstimatorSection, JobConfig, estimator_error
from hvdspark.estimators.job.document import Document
from hvdspark.estimators.job.entry import call, find_function, wants
from hvdspark.estimators.keras import codec
from hvdspark.estimators.keras.estimator import KerasEstimator
from pyspark.ml import PipelineModel
from pyspark.ml.base import Estimator, Transformer

from hvdspark.errors import ConfigError, ModelFormatError, ParamError
from hvdspark.store import Store
from hvdspark.worker.checkpoint import BestOf

if TYPE_CHECKING:
    import keras

Stage = Estimator | Transformer  # type: ignore[type-arg]


class Building:
    """Makes the stages of the pipeline and the estimator.

    All functions are found, and all Keras objects made, when this is made: before any Spark job.

    Parameters
    ----------
    config
        The job.
    document
        The file it is from, for errors.

    Raises
    ------
    ConfigError
        For what cannot be found or made.
    """

    def __init__(self, config: JobConfig, document: Document) -> None:
        self._config, self._document = config, document
        section = config.estimator
        self._stages_of = None if config.pipeline is None else find_function(config.pipeline, "pipeline")
        self._network: Callable[..., Any] | None = None
        if ":" in section.model and "://" not in section.model:
            self._network = find_function(section.model, "estimator.model")
        self._custom_objects = self._called(section.custom_objects, "estimator.custom_objects") or {}
        self._compiling = self._make_compiling(section)
        self._metrics = [self._object("metrics", item, "evaluation.metrics") for item in self._extra_metrics()]

    @property
    def custom_objects(self) -> Mapping[str, Any]:
        """The user's own classes and functions, by name."""
        return dict(self._custom_objects)

    @property
    def yardstick(self) -> dict[str, Any]:
        """Loss and metrics by which models are compared, as ``keras.Model.compile`` takes them."""
        metrics = self._compiling["metrics"]
        if not self._metrics:
            pass
        elif metrics is None or isinstance(metrics, list):
            metrics = [*(metrics or []), *self._metrics]
        else:
            raise ParamError(
                f"{self._document.where(('evaluation', 'metrics'))}: evaluation.metrics: with estimator.metrics by"
                " output, add them there",
                param="metrics",
            )
        return {"loss": self._compiling["loss"], "loss_weights": self._compiling["loss_weights"], "metrics": metrics}

    def stages(self) -> list[Stage]:
        """Return the stages before the estimator; raises ``ParamError`` where the function gives something else."""
        if self._stages_of is None:
            return []
        found = call(self._stages_of, self._config.pipeline_args, {}, "pipeline")
        stages = list(found) if isinstance(found, list | tuple) else [found]
        for stage in stages:
            if not isinstance(stage, Estimator | Transformer):
                raise ParamError(
                    f"pipeline: {self._config.pipeline} gave a {type(stage).__name__}; it must return a list of Spark"
                    " ML stages, without the KerasEstimator, which the job adds",
                    param="pipeline",
                )
        return stages

    def check(self, store: Store) -> list[str]:
        """Make all that can be made without Spark.

        Parameters
        ----------
        store
            The job's; nothing is written.

        Returns
        -------
        list of str
            What was not made, and why.

        Raises
        ------
        ConfigError
            When a value cannot be used; what the user's functions raise goes through.
        """
        skipped = []
        try:
            self.stages()
        except Exception as exc:
            if not _is_for_want_of_spark(exc):
                raise
            skipped.append(f"the stages of {self._config.pipeline}, which are Spark's own")
        if self.needs_preparation:
            skipped.append(f"the network of {self._config.estimator.model}, which is built for the fitted stages")
        else:
            self.estimator(store, self._config.run_id or "check")
        return skipped

    @property
    def needs_preparation(self) -> bool:
        """Whether the network is built for what the fitted stages know, such as the number of categories."""
        return self._network is not None and wants(self._network, "prepared")

    def estimator(
        self, store: Store, run_id: str, warm_start: str | None = None, prepared: PipelineModel | None = None
    ) -> KerasEstimator:
        """Make the estimator.

        Parameters
        ----------
        store, run_id
            Where it trains.
        warm_start
            The saved model whose weights it begins with.
        prepared
            The fitted stages, where the network's function asks for them.

        Raises
        ------
        ConfigError
            When a value cannot be used.
        """
        section = self._config.estimator
        params = dict(section.params)
        if warm_start is not None:
            params["warm_start"] = warm_start
        try:
            return KerasEstimator(
                store=store,
                run_id=run_id,
                model=self._model(prepared),
                custom_objects=self._custom_objects,
                callbacks=self._called(section.callbacks, "estimator.callbacks"),
                checkpoint_callback=self._best_of(),
                **self._compiling,
                **params,
            )
        except ParamError as exc:
            raise estimator_error(self._document, exc) from exc

    def _model(self, prepared: PipelineModel | None) -> keras.Model:
        import keras

        section = self._config.estimator
        # Whoever builds it again, as after the death of a driver, gets the same weights.
        keras.utils.set_random_seed(int(section.params.get("random_seed", 0)))
        if self._network is not None:
            model = call(self._network, section.model_args, {"prepared": prepared}, "estimator.model")
            if not isinstance(model, keras.Model):
                raise ParamError(
                    f"estimator.model: {section.model} gave a {type(model).__name__}; it must return a keras.Model",
                    param="model",
                )
            return model
        try:
            with fsspec.open(section.model, "rb") as file:
                data = file.read()
        except (OSError, ValueError, ImportError) as exc:
            raise ParamError(
                f"{self._document.where(('estimator', 'model'))}: estimator.model: cannot read {section.model}: {exc}."
                " Give 'module:function' that builds a Keras model, or the path of a .keras file",
                param="model",
            ) from exc
        try:
            return codec.model_from_bytes(data, self._custom_objects, origin=section.model)
        except ModelFormatError as exc:
            raise ParamError(f"estimator.model: {exc}", param="model") from exc

    def _make_compiling(self, section: EstimatorSection) -> dict[str, Any]:
        return {
            "optimizer": self._object("optimizers", section.optimizer, "estimator.optimizer"),
            "loss": self._object("losses", section.loss, "estimator.loss"),
            "loss_weights": section.loss_weights,
            "metrics": self._object("metrics", section.metrics, "estimator.metrics"),
        }

    def _extra_metrics(self) -> list[Any]:
        return [] if self._config.evaluation is None else list(self._config.evaluation.metrics)

    def _object(self, kind: str, value: Any, where: str) -> Any:
        """Make a Keras object of its name or configuration; a structure of them becomes the same one of objects."""
        import keras

        if isinstance(value, list):
            return [self._object(kind, item, where) for item in value]
        if isinstance(value, dict) and "class_name" not in value:
            return {name: self._object(kind, item, where) for name, item in value.items()}
        if isinstance(value, str) and ":" in value:
            return find_function(value, where)
        if value is None or not isinstance(value, str | dict):
            return value
        module = getattr(keras, kind)
        try:
            known = module.get(value) if isinstance(value, str) else module.deserialize({"config": {}, **value})
        except Exception as exc:  # whatever Keras makes of a configuration that is none
            raise self._unknown(kind, value, where, str(exc)) from exc
        if known is None or isinstance(known, str | dict):
            raise self._unknown(kind, value, where, "there is no such class")
        if isinstance(value, str):
            # Keras chooses by the shape of an output what 'accuracy' means, so it gets the word.
            return value
        return _named(known, value) if kind == "metrics" else known

    def _unknown(self, kind: str, value: Any, where: str, reason: str) -> ParamError:
        keys = tuple(where.split("."))
        first = reason.strip().partition("\n")[0].rstrip(".")
        return ParamError(
            f"{self._document.where(keys)}: {where}: keras.{kind} has nothing like {value!r} ({first}). Give a name,"
            " {class_name: …, config: {…}} as Keras writes it, or 'module:function'",
            param=keys[-1],
        )

    def _called(self, address: str | None, where: str) -> Any:
        return None if address is None else call(find_function(address, where), {}, {}, where)

    def _best_of(self) -> BestOf | None:
        found = self._config.estimator.checkpoint_callback
        if found is None or isinstance(found, str):
            return None if found is None else BestOf(found)
        try:
            return BestOf(**found)
        except TypeError as exc:
            raise ConfigError(
                f"{self._document.where(('estimator', 'checkpoint_callback'))}: estimator.checkpoint_callback={found}:"
                " give the name of a metric, such as val_loss, or {monitor: val_loss, mode: min}"
            ) from exc


def _is_for_want_of_spark(exc: BaseException) -> bool:
    """Whether PySpark itself raised an error that says no more than that there is no session: often an empty one."""
    *_, (frame, _) = traceback.walk_tb(exc.__traceback__)
    is_from_pyspark = str(frame.f_globals.get("__name__")).startswith("pyspark.")
    return is_from_pyspark and not isinstance(exc, TypeError | ValueError)


def _named(metric: keras.metrics.Metric, value: Mapping[str, Any]) -> keras.metrics.Metric:
    """Give a metric the name of its class where it has none of its own: Keras would count those of the process."""
    if value.get("config", {}).get("name"):
        return metric
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(metric).__name__).lower()
    return type(metric).from_config({**metric.get_config(), "name": name})
