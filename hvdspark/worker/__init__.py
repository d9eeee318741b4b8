"""Inside the training process. Nothing here imports pyspark: no JVM is in sight.

The process gets a :class:`Job` through its standard input and answers through a pipe; see
:mod:`hvdspark.launch.child` for the other side.
"""
