"""Daft, the dataframe engine: its embedded runner, with telemetry and progress bars off.

The environment is set before the import because Daft reads it then. Import Daft only through here.
"""

import os

os.environ.update(DO_NOT_TRACK="true", DAFT_ANALYTICS_ENABLED="0", DAFT_PROGRESS_BAR="0")

import daft

# Records a worker holds at a time; the default of 131,072 long documents would be gigabytes.
daft.set_execution_config(default_morsel_size=8192)

__all__ = ["daft"]
