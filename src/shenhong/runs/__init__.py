"""The run folder: its manifest and lock, its files, its events.

run.Run        an open run folder          files    written whole or not at all
events         what happened, line by line memory   what a process held
regular        files of others, and no links
"""
