"""Keywords of ``horovod.spark``'s estimators that have no effect here, or are refused with what to do instead."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from hvdspark.errors import ParamError, closest

# Keywords of horovod.spark that do nothing here, because what they tune does not exist; programs keep running.
HINTS: Mapping[str, str] = {
    "partitions_per_process": "shards are cut to the row, whatever the partitions",
    "shuffle_buffer_size": "rows are shuffled within a window of fixed memory; shuffle=False turns it off",
    "reader_pool_type": "rows are read by threads",
    "val_reader_num_workers": "train_reader_num_workers holds for both",
    "tensorflow_dataset_prefetch_buffer_size": "batches are prefetched as needed",
    "mp_start_method": "every rank is a process of its own",
    "continuous_cols": "columns are told apart by their types",
    "categorical_cols": "columns are told apart by their types",
}

# Keywords of horovod.spark that change what is trained and are not taken over, and what to do instead.
REPLACED: Mapping[str, str] = {
    "backend": "ranks always run on Spark barrier tasks: give num_proc, and backend_env for environment variables",
    "data_module": "rows are always read through Petastorm",
    "transformation_fn": "apply it to the DataFrame before fit(), or as a stage of the Pipeline before this one",
    "transformation_edit_fields": "apply transformations to the DataFrame before fit()",
    "transformation_removed_fields": "leave the columns out of feature_cols",
}


def sort_out(keywords: Mapping[str, Any], known: Iterable[str], owner: str) -> None:
    """Deal with keywords that an estimator does not have.

    Raises
    ------
    ParamError
        For a keyword of horovod.spark that has a replacement, and for one that nobody knows (naming the closest).
    """
    for name, value in keywords.items():
        if name in HINTS:
            if value is not None:
                warnings.warn(f"{owner}: {name} has no effect: {HINTS[name]}", UserWarning, stacklevel=3)
        elif name in REPLACED:
            if value is not None:
                raise ParamError(f"{owner}: {name} is not supported: {REPLACED[name]}", param=name)
        else:
            raise ParamError(
                f"{owner} has no parameter '{name}'.{closest(name, known)}",
                param=name,
            )
