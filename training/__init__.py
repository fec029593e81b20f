"""Trains singer encoders with five self-supervised methods; `singerembed build-engine` reads the checkpoints."""
