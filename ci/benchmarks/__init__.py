"""The benchmark that ``ci/bench`` runs: hvdspark beside what it is built on, and beside horovod.spark.

One module per subject measures. ``comparison`` says what a ratio is, ``cases`` lists what there is, ``report`` and
``chart`` show it.
"""
