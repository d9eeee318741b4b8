"""From rows to the plan of a fit: all that can be said only once the rows have been counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hvdspark.data.partitions import TRAIN, VAL, Split
from hvdspark.data.schema import resolve
from hvdspark.data.shards import plan_shards
from hvdspark.plan import BatchSpec, CacheMode, ColumnSpec, FitPlan, Manifest, ShardPlan, StoreRef


@dataclass(frozen=True)
class FitDraft:
    """A fit before its rows are counted.

    Parameters
    ----------
    run_id, store, epochs, shuffle, seed, reader_workers, cache, train_steps_per_epoch, validation_steps_per_epoch
        As for :class:`~hvdspark.plan.FitPlan`.
    columns, batch
        The columns to store and how they make up a batch, as far as their types tell.
    split
        Which rows are held out.
    size
        Number of ranks.
    batch_rows, val_batch_rows
        Rows per rank and step.
    """

    run_id: str
    store: StoreRef
    columns: tuple[ColumnSpec, ...]
    batch: BatchSpec
    split: Split
    size: int
    batch_rows: int
    val_batch_rows: int
    epochs: int
    shuffle: bool
    seed: int
    reader_workers: int = 2
    cache: CacheMode = "auto"
    train_steps_per_epoch: int | None = None
    validation_steps_per_epoch: int | None = None

    def complete(
        self,
        manifest: Manifest,
        data: StoreRef,
        dataset: str,
        shares: Mapping[str, tuple[int, ...]] | None = None,
        lots: tuple[int, ...] | None = None,
    ) -> FitPlan:
        """Plan the fit on these rows.

        Parameters
        ----------
        manifest
            The rows.
        data, dataset
            Where they are.
        shares
            By split the rows of each rank, where they lie with the ranks already.
        lots
            Which share that is for each rank.

        Raises
        ------
        SchemaError
            When the rows do not fill the model's shapes.
        EmptyDatasetError
            When there are none.
        """

        def shards(split: str, batch_rows: int, *, keep_order: bool) -> ShardPlan:
            held = None if shares is None else shares[split]
            groups = manifest.splits[split]
            return plan_shards(
                groups, self.size, batch_rows, keep_order=keep_order, seed=self.seed, shares=held, lots=lots
            )

        return FitPlan(
            run_id=self.run_id,
            store=self.store,
            dataset=dataset,
            columns=manifest.columns,
            batch=resolve(self.batch, manifest.columns),
            train=shards(TRAIN, self.batch_rows, keep_order=not self.shuffle),
            val=shards(VAL, self.val_batch_rows, keep_order=False) if manifest.rows(VAL) else None,
            epochs=self.epochs,
            shuffle=self.shuffle,
            seed=self.seed,
            reader_workers=self.reader_workers,
            cache=self.cache,
            train_steps_per_epoch=self.train_steps_per_epoch,
            validation_steps_per_epoch=self.validation_steps_per_epoch,
            data=data,
            summary=manifest.summary,
        )
