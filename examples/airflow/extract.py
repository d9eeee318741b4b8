"""Clean the deliveries of some days: the program of the DAG's first task.

Days that are there already are written anew, so that a retry, or a night that is run again, changes nothing else.
"""

import argparse

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

parser = argparse.ArgumentParser(description=__doc__)
for name in ("source", "since", "until", "output"):
    parser.add_argument(f"--{name}", required=True)
options = parser.parse_args()

spark = (
    SparkSession.builder.appName("extract deliveries")
    .config("spark.sql.sources.partitionOverwriteMode", "dynamic")
    .getOrCreate()
)
rows = (
    spark.read.parquet(options.source)
    .where((F.col("day") >= F.lit(options.since).cast("date")) & (F.col("day") < F.lit(options.until).cast("date")))
    .dropna(subset=["distance_km", "items", "hour", "minutes"])
    .where("minutes BETWEEN 1 AND 240")
    .select("day", *(F.col(name).cast("float").alias(name) for name in ("distance_km", "items", "hour", "minutes")))
)
rows.write.mode("overwrite").partitionBy("day").parquet(options.output)
spark.stop()
