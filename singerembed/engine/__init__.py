"""Engines: build one from a checkpoint, load it, and embed crops of PCM on a CPU or a GPU.

May import audio, model, storage and errors.
"""
