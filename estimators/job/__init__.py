"""Training and scoring as jobs: what a configuration file describes, from the input to the promoted model."""
