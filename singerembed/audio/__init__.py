"""Open, decode, mix down and resample recordings, and cut them into crops.

May import model, storage and errors.
"""
