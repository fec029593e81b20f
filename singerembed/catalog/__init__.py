"""Read a catalogue of recordings as tracks, and cut it into work units.

May import storage and errors.
"""
