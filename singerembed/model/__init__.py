"""The model: its spec, the mel front end on CPU and GPU, and checkpoints of the encoder.

May import errors and the compiled extension.
"""
