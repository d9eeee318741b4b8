"""Keras on Horovod: the estimator, its model, and the trainer that runs in every rank."""
