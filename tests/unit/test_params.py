"""The parameters: setters, getters, converters, and every keyword of horovod.spark."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
from hvdspark.estimators import KerasEstimator, KerasModel
from hvdspark.estimators.keywords import HINTS, REPLACED
from pyspark.ml.param import Param
from pyspark.ml.tuning import ParamGridBuilder

from hvdspark import Store
from hvdspark.errors import ParamError

# Per parameter what may be given, and what is then kept.
GOOD: dict[str, tuple[Any, Any]] = {
    "feature_cols": ([("a", "b"), "v"], [["a", "b"], "v"]),
    "label_cols": (("y", "z"), ["y", "z"]),
    "output_cols": (["p"], ["p"]),
    "output_types": (["vector", None], ["vector", None]),
    "transform_batch_size": (16, 16),
    "run_id": ("run-1_a.b=c", "run-1_a.b=c"),
    "num_proc": (np.int64(3), 3),
    "batch_size": (7.0, 7),
    "val_batch_size": (8, 8),
    "epochs": (9, 9),
    "learning_rate": (1, 1.0),
    "scale_learning_rate": (False, False),
    "validation": ("held_out", "held_out"),
    "sample_weight_col": ("w", "w"),
    "label_shapes": ([(1,), [2, 3]], [[1], [2, 3]]),
    "fill_nulls": ({"a": 0, "b": "x"}, {"a": 0, "b": "x"}),
    "padding": (
        {"t": 0, "u": {"value": 1.5, "length": 4}},
        {"t": {"value": 0, "length": None}, "u": {"value": 1.5, "length": 4}},
    ),
    "compress_sparse_cols": (True, True),
    "shuffle": (False, False),
    "random_seed": (11, 11),
    "verbose": (0, 0),
    "tensorboard": (True, True),
    "timeline": (True, True),
    "gradient_compression": ("fp16", "fp16"),
    "allreduce": ("horovod", "horovod"),
    "backward_passes_per_step": (2, 2),
    "train_steps_per_epoch": (100, 100),
    "validation_steps_per_epoch": (10, 10),
    "train_reader_num_workers": (4, 4),
    "data": ("direct", "direct"),
    "keep_dataset": (False, False),
    "cache": ("disk", "disk"),
    "inmemory_cache_all": (True, True),
    "use_gpu": (False, False),
    "mlflow": (True, True),
    "warm_pool": (False, False),
    "allow_insecure_transport": (True, True),
    "controller": ("mpi", "mpi"),
    "rdma": (True, True),
    "max_restarts": (0, 0),
    "min_proc": (1, 1),
    "warm_start": ("alias:champion", "alias:champion"),
    "checkpoint_steps": (100, 100),
    "keep_checkpoints": (3, 3),
    "on_nan": ("skip", "skip"),
    "start_timeout": (30, 30.0),
    "stall_timeout_s": (60, 60.0),
    "slots_timeout_s": (300, 300.0),
    "nics": (("lo",), ["lo"]),
    "backend_env": ({"OMP_NUM_THREADS": 2}, {"OMP_NUM_THREADS": "2"}),
}

HOROVOD_KEYWORDS: dict[str, Any] = {
    "num_proc": 2,
    "backend": object(),
    "store": Store.create("memory://params"),
    "model": object(),
    "optimizer": "adam",
    "loss": "mse",
    "loss_weights": [1.0],
    "metrics": ["mae"],
    "custom_objects": {"f": len},
    "gradient_compression": "fp16",
    "compress_sparse_cols": True,
    "sample_weight_col": "w",
    "feature_cols": ["a"],
    "label_cols": ["y"],
    "continuous_cols": ["a"],
    "categorical_cols": ["a"],
    "validation": 0.1,
    "callbacks": [object()],
    "batch_size": 32,
    "val_batch_size": 32,
    "epochs": 1,
    "verbose": 1,
    "tensorboard": False,
    "timeline": False,
    "random_seed": 1,
    "shuffle": True,
    "shuffle_buffer_size": 100,
    "partitions_per_process": 10,
    "run_id": "run",
    "train_steps_per_epoch": 1,
    "validation_steps_per_epoch": 1,
    "transformation_fn": print,
    "transformation_edit_fields": [],
    "transformation_removed_fields": ["a"],
    "label_shapes": [[1]],
    "train_reader_num_workers": 2,
    "val_reader_num_workers": 2,
    "reader_pool_type": "process",
    "inmemory_cache_all": False,
    "use_gpu": True,
    "mp_start_method": "spawn",
    "backward_passes_per_step": 1,
    "tensorflow_dataset_prefetch_buffer_size": 1,
    "checkpoint_callback": object(),
    "data_module": object(),
    "backend_env": {"A": "b"},
}


def accessor(prefix: str, name: str) -> str:
    return prefix + "".join(part.capitalize() for part in name.split("_"))


def param_names(owner: Any) -> list[str]:
    return [param.name for param in owner.params]


def test_the_table_of_this_test_names_every_parameter() -> None:
    assert set(param_names(KerasEstimator())) == set(GOOD)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(owner, name) for owner in (KerasEstimator, KerasModel) for name in param_names(owner())],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_parameter_has_a_setter_and_a_getter(owner: type[Any], name: str) -> None:
    given, kept = GOOD[name]
    instance = owner()
    default = getattr(instance, accessor("get", name))()
    assert getattr(instance, accessor("set", name))(given) is instance
    found = getattr(instance, accessor("get", name))()
    assert (found, type(found)) == (kept, type(kept))
    assert instance.getOrDefault(getattr(instance, name)) == kept
    getattr(instance, accessor("set", name))(None)
    assert getattr(instance, accessor("get", name))() == default


@pytest.mark.parametrize("name", GOOD)
def test_every_parameter_is_a_keyword(name: str) -> None:
    given, kept = GOOD[name]
    assert getattr(KerasEstimator(**{name: given}), accessor("get", name))() == kept


@pytest.mark.parametrize(
    ("owner", "name"),
    [(owner, name) for owner in (KerasEstimator, KerasModel) for name in owner._attributes],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_attribute_has_a_setter_and_a_getter(owner: type[Any], name: str) -> None:
    instance, value = owner(), object()
    assert getattr(instance, accessor("set", name))(value) is instance
    assert getattr(instance, accessor("get", name))() is value
    assert getattr(owner(), accessor("get", name))() is not value


@pytest.mark.parametrize("name", KerasEstimator._attributes)
def test_every_attribute_is_a_keyword(name: str) -> None:
    value = object()
    keywords: dict[str, Any] = {name: value}
    assert getattr(KerasEstimator(**keywords), accessor("get", name))() is value


def test_accessors_say_what_they_do() -> None:
    for name in GOOD:
        setter, getter = (getattr(KerasEstimator, accessor(prefix, name)) for prefix in ("set", "get"))
        assert (setter.__name__, getter.__name__) == (accessor("set", name), accessor("get", name))
        assert name in setter.__doc__
        assert name in getter.__doc__


def test_defaults_are_those_of_horovod_spark() -> None:
    estimator = KerasEstimator()
    assert (estimator.getBatchSize(), estimator.getEpochs(), estimator.getVerbose()) == (32, 1, 1)
    assert (estimator.getShuffle(), estimator.getUseGpu(), estimator.getInmemoryCacheAll()) == (True, True, False)
    assert (estimator.getTrainReaderNumWorkers(), estimator.getBackwardPassesPerStep()) == (2, 1)
    assert [estimator.getNumProc(), estimator.getValidation(), estimator.getLabelShapes()] == [None] * 3


BAD: list[tuple[str, Any, str]] = [
    *[
        (name, value, "an integer of at least 1")
        for name in ("num_proc", "batch_size", "epochs", "val_batch_size", "transform_batch_size")
        for value in (0, -1, 1.5, "3", True, [1], math.nan, math.inf)
    ],
    *[
        (name, value, "a number above 0")
        for name in ("learning_rate", "start_timeout")
        for value in (0, -0.1, "x", math.nan)
    ],
    *[
        (name, value, "True or False")
        for name in ("shuffle", "use_gpu", "warm_pool", "scale_learning_rate", "allow_insecure_transport")
        for value in (1, "yes")
    ],
    ("random_seed", "x", "an integer"),
    ("random_seed", 1.5, "an integer"),
    ("verbose", "loud", "an integer"),
    ("tensorboard", "runs/tb", "True or False"),
    ("timeline", "timeline.json", "True or False"),
    ("controller", "gloop", "Did you mean 'gloo'"),
    ("rdma", "yes", "give True, False or 'auto'"),
    ("max_restarts", -1, "at least 0"),
    ("keep_checkpoints", 0, "at least 1"),
    ("on_nan", "ignore", "choose one of fail, stop, skip"),
    ("controller", 3, "choose one of"),
    ("gradient_compression", "fp32", "choose one of none, fp16"),
    ("label_cols", "y", "['a', 'b']"),
    ("label_cols", [1], "['a', 'b']"),
    ("output_cols", {"p": 1}, "['a', 'b']"),
    ("nics", "lo", "['a', 'b']"),
    ("feature_cols", "a", "[['a', 'b'], 'v']"),
    ("feature_cols", [], "one entry per model input"),
    ("feature_cols", [[]], "one entry per model input"),
    ("feature_cols", ["a", 1], "one entry per model input"),
    ("feature_cols", ["a", [["b"]]], "one entry per model input"),
    ("feature_cols", ["a", ["b", 1]], "one entry per model input"),
    ("validation", 0.0, "between 0 and 1"),
    ("validation", 1, "between 0 and 1"),
    ("validation", True, "between 0 and 1"),
    ("validation", math.nan, "between 0 and 1"),
    ("validation", [0.1], "between 0 and 1"),
    ("label_shapes", [1], "[[1], [10]]"),
    ("label_shapes", [[None]], "[[1], [10]]"),
    ("label_shapes", 3, "[[1], [10]]"),
    ("warm_start", "", "give a name"),
    ("warm_start", 3, "give a name"),
    ("run_id", "a/b", "letters, digits"),
    ("run_id", "..", "letters, digits"),
    ("run_id", "", "letters, digits"),
    ("run_id", 3, "letters, digits"),
    ("output_types", "scalar", "one type per output"),
    ("output_types", ["scaler"], "Did you mean 'scalar'"),
    ("backend_env", ["A=b"], "a dictionary"),
]


@pytest.mark.parametrize(("name", "value", "remedy"), BAD, ids=lambda value: str(value)[:30])
def test_a_value_that_cannot_be_is_refused_with_its_name_itself_and_a_remedy(
    name: str, value: Any, remedy: str
) -> None:
    with pytest.raises(ParamError) as caught:
        KerasEstimator(**{name: value})
    message = str(caught.value)
    assert caught.value.param == name
    assert message.startswith(name)
    assert remedy in message
    if name != "output_types":
        assert repr(value) in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sample_weight_col", 3),
        ("random_seed", -1),
        ("random_seed", 2**32),
        ("learning_rate", math.inf),
        ("label_shapes", [[-1]]),
    ],
)
def test_a_value_that_would_fail_later_is_refused_as_well(name: str, value: Any) -> None:
    keywords: dict[str, Any] = {name: value}
    with pytest.raises(ParamError, match=name) as caught:
        KerasEstimator(**keywords)
    assert caught.value.param == name


def test_horovods_compression_classes_are_taken() -> None:
    class FP16Compressor:
        pass

    class NoneCompressor:
        pass

    assert KerasEstimator(gradient_compression=FP16Compressor).getGradientCompression() == "fp16"
    assert KerasEstimator(gradient_compression=NoneCompressor).getGradientCompression() == "none"


def test_horovods_name_for_the_cache_means_memory_and_contradicts_other_places() -> None:
    assert KerasEstimator()._cache() == "auto"
    assert KerasEstimator(cache="none")._cache() == "none"
    assert KerasEstimator(inmemory_cache_all=True)._cache() == "memory"
    with pytest.raises(ParamError, match="inmemory_cache_all=True means cache='memory', but cache='disk' was given"):
        KerasEstimator(inmemory_cache_all=True, cache="disk")._cache()


def test_an_unknown_keyword_names_the_closest() -> None:
    with pytest.raises(ParamError, match=r"KerasEstimator has no parameter 'batchsize'\. Did you mean 'batch_size'"):
        KerasEstimator(batchsize=3)


def test_an_unknown_keyword_is_refused_whatever_its_value() -> None:
    with pytest.raises(ParamError, match=r"Did you mean 'batch_size'"):
        KerasEstimator(batchsize=None)


def test_only_keywords_are_taken() -> None:
    with pytest.raises(TypeError, match="positional"):
        KerasEstimator(2)  # type: ignore[misc]


@pytest.mark.parametrize("name", HOROVOD_KEYWORDS)
def test_no_keyword_of_horovod_spark_is_unknown(name: str) -> None:
    keywords = {name: HOROVOD_KEYWORDS[name]}
    if name in REPLACED:
        with pytest.raises(ParamError, match=rf"KerasEstimator: {name} is not supported: {re.escape(REPLACED[name])}"):
            KerasEstimator(**keywords)
    elif name in HINTS:
        with pytest.warns(UserWarning, match=rf"{name} has no effect: {re.escape(HINTS[name])}"):
            KerasEstimator(**keywords)
    else:
        found = getattr(KerasEstimator(**keywords), accessor("get", name))()
        assert found == HOROVOD_KEYWORDS[name]


@pytest.mark.parametrize("name", [*HINTS, *REPLACED])
def test_hints_and_replacements_are_keywords_of_horovod_spark(name: str) -> None:
    assert name in HOROVOD_KEYWORDS
    assert name not in GOOD


@pytest.mark.parametrize("name", [*HINTS, *REPLACED])
def test_keywords_that_are_left_at_none_pass_in_silence(name: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        KerasEstimator(**{name: None})
    assert caught == []


def test_a_hint_points_at_the_line_that_gave_the_keyword() -> None:
    with pytest.warns(UserWarning, match="partitions_per_process") as caught:
        KerasEstimator(partitions_per_process=10)
    assert caught[0].filename == __file__


def test_a_refused_keyword_of_horovod_spark_is_refused_even_beside_a_hint() -> None:
    with pytest.warns(UserWarning, match="mp_start_method"), pytest.raises(ParamError, match="transformation_fn"):
        KerasEstimator(mp_start_method="spawn", transformation_fn=print)


def test_explain_params_explains_each_with_its_value() -> None:
    text = KerasEstimator(batch_size=7).explainParams()
    lines = text.splitlines()
    assert sorted(line.split(":")[0] for line in lines) == sorted(GOOD)
    assert "batch_size: training rows per rank and step (default: 32, current: 7)" in lines


def test_params_belong_to_their_instance() -> None:
    first, second = KerasEstimator(), KerasEstimator()
    assert first.uid != second.uid
    assert first.batch_size != second.batch_size
    assert isinstance(first.batch_size, Param)
    with pytest.raises(ValueError, match="does not belong"):
        first.set(second.batch_size, 3)


def test_a_copy_takes_extra_values_and_leaves_the_original_alone() -> None:
    model, store = object(), Store.create("memory://copy")
    original = KerasEstimator(batch_size=7, epochs=2, feature_cols=["a"], store=store, model=model, loss="mse")  # type: ignore[arg-type]
    copy = original.copy({original.epochs: 5})
    assert (copy.getBatchSize(), copy.getEpochs(), original.getEpochs()) == (7, 5, 2)
    assert (copy.getStore(), copy.getModel(), copy.getLoss()) == (store, model, "mse")
    assert copy.uid == original.uid
    copy.setBatchSize(1).setFeatureCols(["b"]).setLoss("mae").clear(copy.epochs)
    assert (original.getBatchSize(), original.getFeatureCols(), original.getLoss()) == (7, ["a"], "mse")
    assert (copy.getEpochs(), original.getEpochs()) == (1, 2)
    original.setBatchSize(9)
    assert copy.getBatchSize() == 1


def test_a_model_is_copied_with_its_bytes_and_history() -> None:
    original = KerasModel(b"data", history={"loss": [1.0, 0.5]}).setOutputCols(["p"])
    copy = original.copy({original.transform_batch_size: 3})
    assert (copy.getTransformBatchSize(), original.getTransformBatchSize()) == (3, 4096)
    assert (copy._data, copy.getHistory(), copy.getOutputCols()) == (b"data", {"loss": [1.0, 0.5]}, ["p"])
    copy.getHistory()["loss"].append(9.0)
    assert original.getHistory() == copy.getHistory() == {"loss": [1.0, 0.5]}


class Recording(KerasEstimator):
    """Says with which values it was asked to fit."""

    def _fit(self, dataset: Any) -> Any:
        return dataset, self.getEpochs(), self.getLearningRate(), self.getModel()


def test_fit_takes_values_for_this_one_fit() -> None:
    model: Any = object()
    estimator = Recording(epochs=2, model=model)
    rows: Any = object()
    assert estimator.fit(rows, {estimator.epochs: 7, estimator.learning_rate: 0.5}) == (rows, 7, 0.5, model)
    assert estimator.fit(rows) == (rows, 2, None, model)


def test_fit_takes_a_grid_of_values() -> None:
    estimator = Recording(epochs=2)
    grid = ParamGridBuilder().addGrid(estimator.learning_rate, [0.1, 0.2]).addGrid(estimator.epochs, [3]).build()
    fitted: Any = estimator.fit(object(), grid)  # type: ignore[call-overload]
    assert sorted((epochs, rate) for _, epochs, rate, _ in fitted) == [(3, 0.1), (3, 0.2)]


def test_a_grid_refuses_values_that_cannot_be() -> None:
    with pytest.raises(ParamError, match=r"epochs=0"):
        ParamGridBuilder().addGrid(KerasEstimator().epochs, [0]).build()


def test_instances_do_not_share_their_default_objects() -> None:
    first, second = KerasEstimator(), KerasEstimator()
    try:
        first.getCustomObjects()["mine"] = len
        assert "mine" not in second.getCustomObjects()
    finally:
        first.getCustomObjects().pop("mine", None)
