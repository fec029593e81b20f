"""Trains singer encoders with five self-supervised methods, to checkpoints that `singerembed build-engine` takes."""
