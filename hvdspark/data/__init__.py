"""The way of the rows: from a DataFrame to Parquet, and from Parquet to each rank's batches."""
