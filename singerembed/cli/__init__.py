"""The command line: a file a command, with its options and what it prints; no logic.

May import every other room.
"""
